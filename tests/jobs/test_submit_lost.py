"""`cvft submit` where nobody adds nodes: a full queue, what never fits, and machines that are lost.

The head is killed and started again with its state, and so is the node of a job's own process. One scenario for each,
from which the tests read: they take minutes.
"""

import contextlib
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from cvft.checkpoint import MODEL_FILE
from tests.jobs import clusters
from tests.jobs.clusters import await_true
from tests.jobs.conftest import NO_PICTURES, TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

AWAY = ["--label", "where=away"]
NODE = "--labels=where=away"


@pytest.fixture(scope="module")
def ours(manifest_uri, tracking_uri, tmp_path_factory):
    """A head that keeps its state, and what a training on it is asked for by."""
    runs = tmp_path_factory.mktemp("runs")

    def training(name: str) -> list[str]:
        places = [f"data.manifest={manifest_uri}", f"output={runs}", f"tracking.uri={tracking_uri}"]
        settings = [*TINY, NO_PICTURES, "train.workers=1", "train.num_epochs=16", f"name={name}"]
        return ["train", "--config", "town", *places, *settings]

    with (
        clusters.cluster(NODES="none", GCS_DIR="FOLDER") as cluster,
        clusters.submitters(cluster.client, "--working-dir", "none") as begin,
    ):
        yield SimpleNamespace(cluster=cluster, training=training, runs=runs, begin=begin)


def weights(ours, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(checkpoints(ours, name)[-1] / MODEL_FILE)


def checkpoints(ours, name: str) -> list[Path]:
    return sorted(path.parent for path in (ours.runs / name / "checkpoints").glob(f"*/{MODEL_FILE}"))


def test_a_full_queue_says_who_holds_the_room_and_what_waits_in_it_can_be_stopped_at_once(ours, tmp_path):
    forever = ["synthesize", "--pairs", "5000", "--workers", "1", "--out"]
    for name in ("one", "other"):
        assert ours.begin("--name", name, "--no-wait", *forever, str(tmp_path / name)).end()[0] == 0
    waits = ours.begin("--name", "waits", *forever, str(tmp_path / "waits"))
    lines = []
    while "waits waits for" not in (line := waits.stderr.readline()) or "2 of 2" not in line:
        lines.append(line)
        assert waits.poll() is None, lines
    assert re.search(r"waits waits for 1 CPU; 2 of 2 CPU held by (one 1, other 1|other 1, one 1)$", line)
    code, result, err = ours.begin("--stop", "waits").end()
    assert (code, result) == (0, {"submission_id": "waits", "status": "stopped"}), err
    code, _, err = waits.end()
    assert (code, err.splitlines()[-1]) == (1, "cvft submit: waits was stopped")
    listed = {job["id"]: job["status"] for job in ours.begin("--list").end()[1]["jobs"]}
    helper = next(name for name in listed if name.startswith("withdraw-waits-"))
    assert listed == {"one": "RUNNING", "other": "RUNNING", "waits": "STOPPED", helper: "SUCCEEDED"}
    assert not (tmp_path / "waits").exists()
    for name in ("one", "other"):
        assert ours.begin("--stop", name).end()[0] == 0


@pytest.mark.parametrize(
    ("asks", "wanted"),
    [(["--num-cpus", "64"], "64 CPU"), (["--label", "where=mars"], "1 CPU on a node with where=mars")],
)
def test_what_no_node_there_holds_is_refused_at_once(ours, asks, wanted):
    code, _, err = ours.begin(*asks, "verify", "--manifest", "/no/store").end()
    assert code == 2
    assert f" has or adds holds {wanted}; ask for less by --num-cpus" in err


@pytest.fixture(scope="module")
def straight(ours):
    """A training that nothing happens to: how it ended."""
    return ours.begin(*ours.training("straight")).end()


@pytest.fixture(scope="module")
def restarted(ours, straight, tmp_path_factory):
    """Three jobs while the head is killed and started again: on the head, on a node that lives on, not begun yet."""
    away, out = tmp_path_factory.mktemp("away"), tmp_path_factory.mktemp("away") / "town"
    elsewhere = ["--name", "elsewhere", *AWAY, "--num-cpus", "1", "synthesize", "--workers", "1", "--out", str(out)]
    after_it = ["--name", "after_it", *AWAY, "--num-cpus", "2", "synthesize", "--workers", "1", "--out", str(away)]
    with ours.cluster.node(NODE):
        lives = ours.begin(*elsewhere, "--pairs", "400")
        await_true(lambda: lives.poll() is not None or len(list(out.rglob("*.jpg"))) > 4)
        waits = ours.begin(*after_it, "--pairs", "2")
        lost = ours.begin(*ours.training("restarted"))
        await_true(lambda: lost.poll() is not None or len(checkpoints(ours, "restarted")) > 1)
        ours.cluster.kill_head()
        ours.cluster.start_head_again()
        told = []
        while not told or "submitted after_it-2" not in told[-1]:
            told.append(waits.stderr.readline())
            assert told[-1], told
        # Not to its end: Ray may have given the room to the one that was lost, if it came while the head was away.
        ours.begin("--stop", "after_it-2").end()
        waits.end()
        return SimpleNamespace(lives=lives.end(), lost=lost.end(), told="".join(told))


def test_a_job_that_was_lost_with_the_head_is_submitted_again_and_equals_one_that_was_not(ours, straight, restarted):
    code, result, err = restarted.lost
    assert code == 0, err
    assert "does not answer; waiting for it" in err
    assert len([line for line in err.splitlines() if line.endswith("; submitting it again")]) == 1
    expected = straight[1]
    assert {key: result[key] for key in ("digest", "epochs_done")} == {
        key: expected[key] for key in ("digest", "epochs_done")
    }
    recalls = {key: value for key, value in expected.items() if key.startswith("recall")}
    assert recalls
    assert {key: result[key] for key in recalls} == recalls
    torch.testing.assert_close(weights(ours, "restarted"), weights(ours, "straight"), rtol=0, atol=0)


def test_a_job_that_lives_through_it_is_shown_on_with_nothing_lost_or_twice(ours, restarted):
    code, result, err = restarted.lives
    assert code == 0, err
    assert result["num_written"] == 400
    assert "answers again" in err
    of_the_submitter = ("http://", "its log cannot be read", "elsewhere waits for")  # the last on a busy machine only
    own = [line for line in err.splitlines() if not any(words in line for words in of_the_submitter)]
    written = ours.cluster.log_of("elsewhere").splitlines()
    assert own == written[-len(own) :]
    assert written[-len(own) - 1 : -len(own)] in ([], [written[0]])  # Ray's own line from before the job


def test_a_job_that_had_not_begun_is_submitted_again(restarted):
    told = restarted.told
    assert "after_it was lost with the head that took it, before it began; submitting it again" in told
    assert told.count("; submitting it again") == 1
    assert re.search(r"submitted after_it-2 to \S+, after after_it which never begins$", told, re.MULTILINE)


def test_what_has_finished_before_is_found_again_with_its_result(ours, straight, restarted):
    code, result, err = ours.begin(*ours.training("straight")).end()
    assert (code, result) == (0, straight[1])
    assert "is the same request and has finished" in err


@pytest.fixture(scope="module")
def moved(ours, straight):
    """A training, and a rollback whose MLflow says nothing, while their node is lost and another one comes."""
    training = [*AWAY, "--num-cpus", "1", *ours.training("moved")]
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as open_till_the_end:
        silent.settimeout(clusters.START_S)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with ours.cluster.node(NODE):
            following = ours.begin(*training)
            rolling_back = ours.begin("--name", "back", *AWAY, "rollback", "--reason", "wrong", "--tracking-uri", uri)
            open_till_the_end.enter_context(silent.accept()[0])
            await_true(lambda: following.poll() is not None or len(checkpoints(ours, "moved")) > 1)
        with ours.cluster.node(NODE):
            return SimpleNamespace(training=following.end(), rollback=rolling_back.end())


def test_a_job_whose_own_node_is_lost_is_submitted_again_and_equals_one_that_was_not(ours, straight, moved):
    code, result, err = moved.training
    assert code == 0, err
    assert len([line for line in err.splitlines() if line.endswith("; submitting it again")]) == 1
    assert result["epochs_done"] == straight[1]["epochs_done"]
    torch.testing.assert_close(weights(ours, "moved"), weights(ours, "straight"), rtol=0, atol=0)


def test_what_may_have_been_done_and_is_not_to_be_done_twice_is_not_submitted_again(ours, moved):
    code, result, err = moved.rollback
    assert (code, result) == (1, None), err
    last = err.splitlines()[-1]
    assert last.startswith("cvft submit: back was lost with its node (")
    assert "; see whether it was done before you give it again" in last
    assert "back-2" not in {job["id"] for job in ours.begin("--list").end()[1]["jobs"]}
