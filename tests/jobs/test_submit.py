"""`cvft submit` on a real head with the real autoscaler, whose nodes are processes of this machine."""

import http.server
import re
import shutil
import signal
import threading

import pytest
import requests

from pipeline.synthetic.write import TownConfig, write_town
from tests.jobs import clusters
from tests.jobs.clusters import Submit

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster():
    """The environment of a client of a cluster of our own."""
    with clusters.cluster() as ours:
        yield ours.client


@pytest.fixture
def ask(cluster):
    """Run `cvft submit` to its end. A process each time: Ray reads how to authenticate once."""
    return lambda *arguments: Submit(cluster, *arguments).end()


@pytest.fixture
def begin(cluster):
    """Begin a `cvft submit` whose jobs take the code from this checkout.

    Nodes of one machine share the folder that sent code is unpacked in, and a node that comes unpacks it anew: of two
    jobs at once one would lose the code under its feet.
    """
    with clusters.submitters(cluster, "--working-dir", "none") as begin:
        yield begin


def listed(ask):
    return {job["id"]: job for job in ask("--list")[1]["jobs"]}


def statuses(ask):
    return {name: job["status"] for name, job in listed(ask).items()}


def until(submit, what):
    """Read what a submitter says up to a line that tells `what`, and return the lines."""
    lines = []
    while not lines or what not in lines[-1]:
        lines.append(submit.stderr.readline())
        assert lines[-1], f"it ended: {lines}"
    return lines


def test_a_submitter_ends_as_the_job_does(ask):
    code, result, err = ask("evaluate", "--checkpoint", "/no/checkpoint", "--manifest", "/no/store")
    assert code == 2
    assert result is None
    assert "cvft evaluate: error: /no/checkpoint: no checkpoint here" in err
    assert err.splitlines()[-1].endswith("ended with exit code 2")


def test_a_job_that_needs_a_cpu_brings_a_node_and_what_has_finished_is_found_again(ask, tmp_path):
    command = ["synthesize", "--out", str(tmp_path / "town"), "--pairs", "2", "--workers", "1"]
    code, result, err = ask(*command)
    assert (code, result["num_written"]) == (0, 2), err
    code, again, err = ask(*command)
    assert (code, again) == (0, result)
    assert "is the same request and has finished; --again runs it once more" in err


def test_what_looks_at_a_folder_is_run_again_when_it_has_finished(ask, tmp_path):
    command = ["--num-cpus", "0", "validate", "--root", str(tmp_path / "town")]
    for num_pairs in (2, 3):
        write_town(tmp_path / "town", config=TownConfig(num_pairs=num_pairs), workers=1)
        code, result, err = ask(*command)
        assert (code, sum(result["pairs"].values())) == (0, num_pairs), err
        shutil.rmtree(tmp_path / "town")
    told = r"submitted (validate-\w+)-2 to \S+; \1 has finished, but the folder may have changed since$"
    assert re.search(told, err, re.MULTILINE), err


def test_two_submitters_of_one_request_see_one_job_which_ctrl_c_leaves_and_stop_ends(begin, ask, tmp_path):
    long = ["synthesize", "--out", str(tmp_path / "town"), "--pairs", "20000", "--workers", "1"]
    both = [begin("--name", "long", "--num-cpus", "0", *long) for _ in range(2)]
    said = [until(each, "rendering") for each in both]
    assert sorted(any("submitted long to" in line for line in lines) for lines in said) == [False, True]
    leaves, stays = both
    leaves.send_signal(signal.SIGINT)
    code, _, err = leaves.end()
    assert code == 130
    assert "long goes on without you; follow it: cvft submit --address " in err
    assert {name: status for name, status in statuses(ask).items() if name.startswith("long")} == {"long": "RUNNING"}
    code, _, err = ask("--name", "long", "verify", "--manifest", "/no/store")
    assert code == 2
    assert "--name long: long is another job (python -m jobs.synthesize" in err
    assert ask("--stop", "long")[0] == 0
    for code, _, err in (stays.end(), ask("--attach", "long")):
        assert code == 1
        assert err.splitlines()[-1] == "cvft submit: long was stopped"


def test_what_no_node_can_hold_is_refused_long_before_ray_gives_it_up(ask):
    code, _, err = ask("--num-cpus", "64", "verify", "--manifest", "/no/store")
    assert code == 2
    assert re.search(r"verify-\w+: no node that http://127\.0\.0\.1:\d+ has or adds holds 64 CPU; ask for less", err)
    (status,) = (status for name, status in statuses(ask).items() if name.startswith("verify-"))
    assert status == "STOPPED"  # it asks for nothing any more
    assert ask("--name", "large", "--no-wait", "--num-cpus", "64", "verify", "--manifest", "/no/store")[0] == 0
    clusters.await_true(lambda: listed(ask)["large"]["waits_for"] == "64 CPU; no node can ever hold it")
    assert ask("--stop", "large")[1]["status"] == "stopped"
    code, _, err = ask("evaluate", "--use-gpu", "--checkpoint", "/c", "--manifest", "/m")
    assert code == 2
    message = "cvft evaluate: error: --use-gpu: 1 x 1 CPU + 1 GPU cannot be had"
    assert message in err
    assert "no type of node that its autoscaler may add holds them" in err


def test_a_full_cluster_is_waited_for_though_its_autoscaler_calls_all_infeasible(begin, ask, tmp_path):
    def begin_long(name):
        long = ["synthesize", "--out", str(tmp_path / name), "--pairs", "20000", "--workers", "1"]
        return begin("--label", "ray.io/node-group=train", "--name", name, *long)  # two nodes with a CPU each

    first, second = begin_long("first"), begin_long("second")
    for each in (first, second):
        until(each, "rendering")
    third = begin_long("third")
    for _ in range(3):  # 20 s: the autoscaler looks each 5 s
        told = until(third, "third waits for")[-1]
    assert re.search(r"third waits for 1 CPU on a node with ray\.io/node-group=train; 2 of \d CPU held by", told)
    assert ask("--stop", "first")[0] == 0
    until(third, "rendering")
    for name in ("second", "third"):
        assert ask("--stop", name)[0] == 0
    for each in (first, second, third):
        assert each.end()[0] == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "(Authentication failed: Forbidden: Invalid authentication token)"),
        ({"RAY_AUTH_MODE": "disabled"}, "(Authentication required: Unauthorized: Missing authentication token)"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/token"}, "file cannot be opened or is empty: /no/token); set RAY_AUTH_MODE"),
    ],
)
def test_a_token_that_is_wrong_or_missing_is_one_line(cluster, given, told):
    environment = {name: value for name, value in cluster.items() if name != "RAY_AUTH_TOKEN_PATH"}
    code, _, err = Submit(environment | given, "--list").end()
    assert code == 2
    assert err.count("\n") == 1
    assert told in err
    assert "RAY_AUTH_TOKEN_PATH" in err


@pytest.fixture
def proxied(cluster):
    """The cluster's address behind a proxy: below a path, without WebSockets, which some proxies do not pass on."""
    target = cluster["RAY_API_SERVER_ADDRESS"]

    class Proxy(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            if "Upgrade" in self.headers or not self.path.startswith("/ray/"):
                return self.send_error(400)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url, sent = target + self.path.removeprefix("/ray"), dict(self.headers)
            reply = requests.request(self.command, url, data=body, headers=sent, timeout=120)
            self.send_response(reply.status_code)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            return self.wfile.write(reply.content)

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/ray"
        server.shutdown()


def test_a_job_is_followed_through_a_proxy_that_passes_requests_alone(proxied, ask, tmp_path):
    out = str(tmp_path / "town")
    command = ["--num-cpus", "0", "synthesize", "--out", out, "--pairs", "200", "--workers", "1"]
    code, result, err = ask("--address", f"{proxied}/", *command)
    assert (code, result["num_written"]) == (0, 200), err
    assert err.count("rendering: 0/200 pairs") == err.count("rendering: 200/200 pairs") == 1


def test_what_is_no_job_server_is_one_line(proxied, ask):
    code, _, err = ask("--address", proxied.removesuffix("/ray"), "--list")
    assert code == 2
    assert err.count("\n") == 1
    assert "no Ray job server answers there" in err


def test_where_no_cluster_answers_is_one_line(ask):
    code, _, err = ask("--address", "http://127.0.0.1:1", "--list")
    assert code == 2
    assert err == (
        "cvft submit: error: http://127.0.0.1:1: no Ray job server answers there; name the cluster's with "
        "--address http://HEAD:8265 or RAY_API_SERVER_ADDRESS\n"
    )
