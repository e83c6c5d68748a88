"""What every store promises, wherever it is: inherit `StoreContract` and give it a `store` fixture."""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from cvft.errors import StoreError
from pipeline.s3_upload import PART_BYTES
from pipeline.storage import FileStatus, Store


class StoreContract:
    def test_written_bytes_come_back(self, store):
        store.write_bytes("a/b.bin", b"first")
        store.write_bytes("a/b.bin", b"second")
        assert store.read_bytes("a/b.bin") == b"second"
        assert store.exists("a/b.bin")
        assert store.size("a/b.bin") == 6
        assert not store.exists("a")

    @pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES, 2 * PART_BYTES + 12_345])
    def test_file_written_piece_by_piece_comes_back_from_any_position(self, store, num_bytes):
        content = random.Random(num_bytes).randbytes(num_bytes)
        with store.open_output("big.bin") as stream:
            for start in range(0, num_bytes, 1_000_003):
                stream.write(memoryview(content)[start : start + 1_000_003])
        assert store.size("big.bin") == num_bytes
        with store.open_input("big.bin") as stream:
            assert stream.read() == content
            assert stream.read(1) == b""
            stream.seek(num_bytes // 2)
            assert stream.read(100) == content[num_bytes // 2 : num_bytes // 2 + 100]
            assert stream.tell() == min(num_bytes, num_bytes // 2 + 100)

    def test_listing_is_recursive_sorted_and_relative(self, store):
        for path in ("x/2.bin", "x/y/1.bin", "xy.bin", "z.bin"):
            store.write_bytes(path, b"1")
        assert store.list() == ["x/2.bin", "x/y/1.bin", "xy.bin", "z.bin"]
        assert store.list("x") == ["x/2.bin", "x/y/1.bin"]
        assert store.list("nothing") == store.list("z.bin") == []

    def test_listing_tells_sizes_and_a_stamp_that_changes_with_the_content(self, store):
        store.write_bytes("x/1.bin", b"12345")
        before = store.list_sizes("x")
        assert before == {"x/1.bin": store.status("x/1.bin")}
        assert isinstance(before["x/1.bin"], FileStatus)
        assert before["x/1.bin"].num_bytes == 5
        store.write_bytes("x/1.bin", b"54321")
        after = store.list_sizes()["x/1.bin"]
        assert after.num_bytes == 5
        assert after.stamp != before["x/1.bin"].stamp

    def test_names_need_no_escaping(self, store):
        names = sorted(["a b.bin", "a+b.bin", "a%20b.bin", "å&?=#.bin", "60.2,24.9,.jpg"])
        for name in names:
            store.write_bytes(name, name.encode())
        assert store.list() == names
        assert [store.read_bytes(name).decode() for name in names] == names
        assert all(store.exists(name) for name in names)

    def test_range_is_read_exactly_or_refused(self, store):
        store.write_bytes("a.bin", b"0123456789")
        assert store.read_range("a.bin", 3, 4) == b"3456"
        assert store.read_range("a.bin", 0, 10) == b"0123456789"
        assert store.read_range("a.bin", 10, 0) == b""
        for start in (8, 10, 99):
            with pytest.raises(StoreError, match=rf"a\.bin: has no bytes {start} to {start + 4}"):
                store.read_range("a.bin", start, 4)
        with pytest.raises(StoreError, match=r"no\.bin: cannot read it: there is no such file"):
            store.read_range("no.bin", 0, 1)

    def test_absent_file_is_told_by_name(self, store):
        assert not store.exists("no.bin")
        assert store.size("no.bin") is None
        assert store.read_versioned("no.bin") is None
        with pytest.raises(StoreError, match=r"/no\.bin: cannot read it: there is no such file"):
            store.read_bytes("no.bin")

    def test_deleting_is_final_and_twice_is_no_error(self, store):
        for path in ("a/1.bin", "a/b/2.bin", "ab.bin"):
            store.write_bytes(path, b"1")
        store.delete("ab.bin")
        store.delete("ab.bin")
        assert store.list() == ["a/1.bin", "a/b/2.bin"]
        store.delete_folder("a")
        assert store.list() == []

    @pytest.mark.parametrize("num_bytes", [9, 2 * PART_BYTES])
    def test_block_that_fails_leaves_what_was_there(self, store, num_bytes):
        def fail_half_way() -> None:
            with store.open_output("half.bin") as stream:
                stream.write(bytes(num_bytes))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_half_way()
        assert store.list() == []
        store.write_bytes("half.bin", b"whole")
        with pytest.raises(ZeroDivisionError):
            fail_half_way()
        assert store.read_bytes("half.bin") == b"whole"

    def test_blocks_own_errors_stay_what_they_are(self, store, tmp_path):
        store.write_bytes("a.bin", b"1")
        for opened in (store.open_output("b.bin"), store.open_input("a.bin")):
            with pytest.raises(FileNotFoundError, match=r"not-the-stores\.jpg"), opened:
                (tmp_path / "not-the-stores.jpg").read_bytes()
        assert store.list() == ["a.bin"]

    def test_create_only_write_refuses_an_existing_name(self, store):
        assert store.create_bytes("m.bin", b"first")
        assert not store.create_bytes("m.bin", b"second")
        assert not store.create_bytes("m.bin", b"first")
        assert store.read_bytes("m.bin") == b"first"
        assert store.list() == ["m.bin"]

    def test_racing_creators_have_one_winner(self, store):
        contents = [bytes([number]) * 10 for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(lambda content: store.create_bytes("m.bin", content), contents))
        assert sum(wins) == 1
        assert store.read_bytes("m.bin") == contents[wins.index(True)]

    def test_swap_needs_the_version_that_was_read(self, store):
        assert not store.replace_bytes("p.json", b"x", "0123456789abcdef")
        assert store.replace_bytes("p.json", b"first", None)
        assert not store.replace_bytes("p.json", b"other", None)
        content, version = store.read_versioned("p.json")
        assert content == b"first"
        assert store.replace_bytes("p.json", b"second", version)
        assert not store.replace_bytes("p.json", b"third", version)
        assert store.read_bytes("p.json") == b"second"
        assert store.list() == ["p.json"]

    def test_racing_swaps_of_threads_lose_no_update(self, store):
        store.write_bytes("count", b"0")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_count_up, [store.uri()] * 24))
        assert store.read_bytes("count") == b"24"
        assert store.list() == ["count"]

    def test_racing_swaps_of_processes_lose_no_update(self, store):
        store.write_bytes("count", b"0")
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_count_up, [store.uri()] * 24))
        assert store.read_bytes("count") == b"24"


def _count_up(uri: str) -> None:
    store = Store.from_uri(uri)
    for _ in range(1000):
        content, version = store.read_versioned("count")
        if store.replace_bytes("count", str(int(content) + 1).encode(), version):
            return
    raise AssertionError("no turn came")
