"""What breaks between here and an object store is repeated or continued; what cannot be mended is one clear line."""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from cvft.errors import StoreError
from pipeline import s3, s3_download, s3_upload
from pipeline.storage import Store
from tests.cutting_proxy import CuttingProxy

pytestmark = pytest.mark.objectstore

PART_BYTES = 5 << 20  # the smallest that servers take
CONTENT = random.Random(0).randbytes(5_000_000)
ONE_LINE = r"^s3://[^\n]*$"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """As many attempts as ever, without the growing pauses between them."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr(s3_download, "LONGEST_PAUSE_S", 0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART_BYTES)


@pytest.fixture
def store(s3_uri) -> Store:
    return Store.from_uri(s3_uri)


@pytest.fixture
def proxy(s3_port, monkeypatch) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


@pytest.fixture
def on_request() -> Iterator[Callable[..., None]]:
    """Call a function before each request of one operation; what it returns is taken for the server's answer."""
    registered = []

    def register(answer: Callable[..., AWSResponse | None], operation: str = "*") -> None:
        events = s3.client().meta.events
        events.register(f"before-send.s3.{operation}", answer)
        registered.append((events, f"before-send.s3.{operation}", answer))

    yield register
    for events, name, answer in registered:
        events.unregister(name, answer)


class _Raw(io.BytesIO):
    def stream(self) -> Iterator[bytes]:
        yield self.read()


def _answers(status: int, code: str, *, times: int) -> Callable[..., AWSResponse | None]:
    """Answer each request so many times with an error, then let it through."""
    counts: Counter[tuple[str, str]] = Counter()

    def answer(request, **_) -> AWSResponse | None:
        counts[request.method, request.url] += 1
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        return (
            AWSResponse(request.url, status, {}, _Raw(body)) if counts[request.method, request.url] <= times else None
        )

    return answer


def _requests(store: Store) -> dict[str, Callable[[], object]]:
    return {
        "exists": lambda: store.exists("a"),
        "list": lambda: store.list(),
        "read": lambda: store.read_bytes("a"),
        "range": lambda: store.read_range("a", 0, 1),
        "versioned": lambda: store.read_versioned("a"),
        "write": lambda: store.write_bytes("a", b"1"),
        "parts": lambda: store.write_bytes("a", bytes(PART_BYTES + 1)),
        "create": lambda: store.create_bytes("a", b"1"),
        "swap": lambda: store.replace_bytes("a", b"1", "0"),
        "delete": lambda: store.delete("a"),
    }


def _unfinished_uploads(store: Store) -> list[object]:
    bucket = store.uri().split("/")[2]
    return list(boto3.session.Session().client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", []))


class TestStorm:
    def test_seven_refusals_in_a_row_are_survived_by_every_request(self, store, on_request, caplog):
        on_request(_answers(503, "SlowDown", times=7))
        with store.open_output("a") as stream:
            stream.write(CONTENT * 5)
        assert store.read_bytes("a") == CONTENT * 5
        assert store.create_bytes("b", b"1")
        assert store.replace_bytes("b", b"2", store.read_versioned("b")[1])
        assert store.read_range("b", 0, 1) == b"2"
        assert store.list() == ["a", "b"]
        store.delete("a")
        assert not store.exists("a")
        assert "S3 UploadPart failed 7 times: HTTP 503" in caplog.text

    @pytest.mark.parametrize("request_name", list(_requests(Store.from_uri("s3://b"))))
    def test_a_storm_without_end_is_one_line(self, store, on_request, request_name, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        store.write_bytes("a", b"1")
        on_request(_answers(503, "SlowDown", times=1_000_000))
        with pytest.raises(StoreError, match=ONE_LINE) as caught:
            _requests(store)[request_name]()
        assert "the server is overloaded or broken; try again later" in str(caught.value)

    def test_upload_that_fails_half_way_leaves_nothing(self, store, on_request, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        on_request(_answers(500, "InternalError", times=1_000_000), "UploadPart")
        with pytest.raises(StoreError, match="overloaded or broken"):
            store.write_bytes("a", bytes(6 * PART_BYTES))
        assert store.list() == []
        assert _unfinished_uploads(store) == []

    def test_parts_that_cannot_be_taken_away_are_told(self, store, on_request, monkeypatch, caplog):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        on_request(_answers(500, "InternalError", times=1_000_000), "AbortMultipartUpload")
        on_request(_answers(403, "AccessDenied", times=1_000_000), "CompleteMultipartUpload")
        with pytest.raises(StoreError, match="these credentials may not do this"):
            store.write_bytes("a", bytes(2 * PART_BYTES))
        assert "parts of it may be left in the bucket" in caplog.text
        assert store.list() == []

    def test_creation_beside_another_under_way_is_tried_again(self, store, on_request):
        on_request(_answers(409, "ConditionalRequestConflict", times=2))
        assert store.create_bytes("a", b"1")


class TestBrokenConnection:
    @pytest.mark.parametrize("with_reset", [True, False])
    def test_body_that_breaks_is_read_on_where_it_broke(self, store, proxy, with_reset, caplog):
        store.write_bytes("a", CONTENT)
        proxy.cut("to_client", after_bytes=1_500_000, times=3, with_reset=with_reset)
        assert store.read_bytes("a") == CONTENT
        assert proxy.cuts_left == 0
        assert "a: the connection broke; reading on" in caplog.text

    @pytest.mark.parametrize("with_reset", [True, False])
    def test_range_that_breaks_is_read_on_where_it_broke(self, store, proxy, with_reset):
        store.write_bytes("a", CONTENT)
        proxy.cut("to_client", after_bytes=2_000_000, with_reset=with_reset)
        assert store.read_range("a", 1_000_000, 3_000_000) == CONTENT[1_000_000:4_000_000]
        assert proxy.cuts_left == 0

    def test_two_versions_are_never_joined(self, store, proxy):
        store.write_bytes("a", CONTENT * 6)  # more than waits in the buffers of sockets
        with store.open_input("a") as stream:
            assert stream.read(1_000_000) == CONTENT[:1_000_000]
            store.write_bytes("a", CONTENT)
            proxy.cut("to_client", with_reset=False)
            with pytest.raises(StoreError, match="it was replaced while it was read; start again"):
                stream.read()

    def test_connection_that_always_breaks_is_one_line(self, store, proxy):
        store.write_bytes("a", CONTENT)
        proxy.cut("to_client", after_bytes=2_000, times=1_000_000)
        with pytest.raises(StoreError, match=ONE_LINE):
            store.read_bytes("a")

    @pytest.mark.parametrize("with_reset", [True, False])
    @pytest.mark.parametrize(("after_bytes", "num_pieces"), [(100, 1), (2_000_000, 1), (2_000_000, 4), (9_000_000, 4)])
    def test_upload_that_breaks_is_repeated(self, store, proxy, after_bytes, num_pieces, with_reset):
        proxy.cut("to_server", after_bytes=after_bytes, with_reset=with_reset)
        with store.open_output("a") as stream:
            for _ in range(num_pieces):
                stream.write(CONTENT)
        assert proxy.cuts_left == 0
        assert store.read_bytes("a") == CONTENT * num_pieces
        assert _unfinished_uploads(store) == []

    def test_write_whose_answer_got_lost_has_still_won(self, store, proxy):
        store.exists("a")  # a connection to lose
        proxy.cut("to_client", times=2)
        assert store.create_bytes("a", b"1")
        assert proxy.cuts_left == 0
        version = store.read_versioned("a")[1]
        proxy.cut("to_client", times=2)
        assert store.replace_bytes("a", b"2", version)
        assert proxy.cuts_left == 0
        assert store.read_bytes("a") == b"2"

    def test_write_whose_answer_got_lost_has_not_won_over_an_equal_file(self, store, proxy):
        store.write_bytes("a", b"1")
        proxy.cut("to_client")
        assert not store.create_bytes("a", b"1")

    def test_last_request_of_an_upload_whose_answer_got_lost_has_succeeded(self, store, proxy, on_request):
        armed = []

        def lose_the_first_answer(**_) -> None:
            if not armed:
                proxy.cut("to_client")
                armed.append(True)

        on_request(lose_the_first_answer, "CompleteMultipartUpload")
        store.write_bytes("a", CONTENT * 4)
        assert armed
        assert proxy.cuts_left == 0
        assert store.size("a") == len(CONTENT) * 4


class TestMessages:
    """One line for every kind of request."""

    @staticmethod
    def _messages(store: Store, *, but: tuple[str, ...] = ()) -> list[str]:
        messages = []
        for name, request in _requests(store).items():
            if name not in but:
                with pytest.raises(StoreError, match=ONE_LINE) as caught:
                    request()
                messages.append(str(caught.value))
        return messages

    def test_missing_bucket(self, s3_uri):
        for message in self._messages(Store.from_uri("s3://no-such-bucket/x")):
            assert "there is no bucket 'no-such-bucket'; create it, or check the name" in message

    def test_no_credentials(self, store, monkeypatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        for message in self._messages(store):
            assert "no credentials, or not all of them; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in message

    def test_unreachable_endpoint(self, store, proxy, monkeypatch, caplog):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        proxy.close()
        for message in self._messages(store):
            assert "the server cannot be reached; check AWS_ENDPOINT_URL and that it runs" in message
        assert "S3 PutObject failed 2 times: Could not connect to the endpoint" in caplog.text

    def test_endpoint_that_is_no_url(self, store, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
        with pytest.raises(StoreError, match="check AWS_ENDPOINT_URL, which is written http://host:port"):
            store.write_bytes("a", b"1")

    def test_unknown_profile(self, store, monkeypatch):
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        for message in self._messages(store):
            assert "profile (nobody)" in message

    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [
            (403, "SignatureDoesNotMatch", "the secret key is wrong; check AWS_ACCESS_KEY_ID and"),
            (403, "InvalidAccessKeyId", "the server does not know this access key; check AWS_ACCESS_KEY_ID"),
            (403, "AccessDenied", "these credentials may not do this"),
            (403, "RequestTimeTooSkewed", "clock differs"),
            (400, "ExpiredToken", "have expired"),
            (400, "AuthorizationHeaderMalformed", "another region; set AWS_REGION"),
            (400, "InvalidBucketName", "InvalidBucketName"),
        ],
    )
    def test_refusal(self, store, on_request, status, code, expected):
        on_request(_answers(status, code, times=1_000_000))
        for message in self._messages(store):
            assert expected in message


class TestSettings:
    def test_a_process_has_one_client_for_one_setting(self, s3_uri, monkeypatch):
        first = s3.client()
        assert s3.client() is first
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert s3.client() is not first

    def test_region_and_endpoint_come_from_the_environment(self, s3_uri, monkeypatch):
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        assert s3.client().meta.region_name == "eu-north-1"
        assert s3.client().meta.endpoint_url == os.environ["AWS_ENDPOINT_URL"]

    @pytest.mark.parametrize(("style", "start"), [("path", "localhost:1/bucket/"), ("virtual", "bucket.localhost:1/")])
    def test_profile_names_endpoint_region_and_addressing_style(self, s3_uri, tmp_path, monkeypatch, style, start):
        (tmp_path / "config").write_text(
            "[profile lab]\nendpoint_url = http://localhost:1\nregion = eu-north-1\n"
            f"aws_access_key_id = a\naws_secret_access_key = b\ns3 =\n    addressing_style = {style}\n"
        )
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "lab")
        url = s3.client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
        assert url.startswith(f"http://{start}key?")
        assert s3.client().meta.region_name == "eu-north-1"

    def test_servers_of_ones_own_are_spoken_to_in_path_style(self, s3_uri):
        url = s3.client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
        assert url.startswith(f"{os.environ['AWS_ENDPOINT_URL']}/bucket/key?")
