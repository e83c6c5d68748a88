import json
import threading
from pathlib import PurePath

import pytest

from cvft.errors import StoreError
from jobs import tracked, train
from jobs.run_file import RUN_FILE
from jobs.training import attempts
from jobs.training.attempts import TakenOverError
from pipeline.storage import Store
from pipeline.tracking.runs import Run


@pytest.fixture
def store(tmp_path):
    return Store.from_uri(tmp_path / "run")


def test_workers_may_write_until_another_group_or_another_driver_begins(store):
    driver = attempts.begin_attempt(store)
    first = attempts.claim(store, driver)
    first.check()
    second = attempts.claim(store, driver)
    second.check()
    with pytest.raises(TakenOverError, match=r"run: another `train` has taken this run over"):
        first.check()
    attempts.begin_attempt(store)
    with pytest.raises(TakenOverError):
        second.check()


def test_orphans_of_a_killed_driver_cannot_claim_the_run_again(store):
    killed = attempts.begin_attempt(store)
    again = attempts.begin_attempt(store)
    assert not attempts.is_current(store, killed)
    with pytest.raises(TakenOverError):
        attempts.claim(store, killed)
    attempts.check_current(store, again)
    attempts.claim(store, again).check()


def test_a_run_whose_folder_was_deleted_is_nobodys(store):
    mine = attempts.claim(store, attempts.begin_attempt(store))
    store.delete(attempts.ATTEMPT_FILE)
    with pytest.raises(TakenOverError):
        mine.check()


def test_of_groups_that_claim_at_once_exactly_one_holds_the_run(store):
    driver = attempts.begin_attempt(store)
    claims = []
    threads = [threading.Thread(target=lambda: claims.append(attempts.claim(store, driver))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def holds(claim):
        try:
            claim.check()
        except TakenOverError:
            return False
        return True

    assert [holds(claim) for claim in claims].count(True) == 1


def test_a_training_that_another_driver_takes_over_publishes_nothing_more_and_leaves_its_mlflow_run_open(
    tiny, monkeypatch
):
    config = tiny("train.num_epochs=4")
    store = Store.from_uri(config.folder)

    def take_over(recorder, metrics):
        if metrics["epoch"] == 2:
            attempts.begin_attempt(store)

    monkeypatch.setattr(tracked.Recorder, "on_epoch", take_over)
    with pytest.raises(TakenOverError):
        train.train(config)
    steps = {int(path.parts[1].removeprefix("step-")) for path in map(PurePath, store.list("checkpoints"))}
    assert max(steps) <= 6  # three steps an epoch
    run = Run(**json.loads(store.read_bytes(RUN_FILE))["run"])
    assert run.client.get_run(run.run_id).info.status == "RUNNING"  # for the other driver


def test_an_error_of_workers_that_were_cut_off_does_not_end_those_that_go_on(store):
    ray_train = pytest.importorskip("jobs.training.ray_train")
    driver = attempts.begin_attempt(store)
    cut_off = attempts.claim(store, driver)
    going_on = attempts.claim(store, driver)
    ray_train._tell(StoreError("the store was away"), cut_off)
    assert not store.exists("user_error.json")
    ray_train._tell(StoreError("a shard is missing"), going_on)
    assert json.loads(store.read_bytes("user_error.json")) == {"message": "a shard is missing"}


def test_a_store_that_never_replaces_anything_is_named_instead_of_asked_for_ever(store, monkeypatch):
    driver = attempts.begin_attempt(store)
    # As Ceph 16 does in a bucket that keeps versions.
    monkeypatch.setattr(Store, "replace_bytes", lambda *_: False)
    with pytest.raises(StoreError, match=r"attempt\.json: the store refuses to replace it"):
        attempts.claim(store, driver)
