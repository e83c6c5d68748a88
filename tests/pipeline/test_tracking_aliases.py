import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipeline.tracking import aliases
from pipeline.tracking.aliases import (
    AliasMovedError,
    NothingToRollBackError,
    alias_history,
    aliased_version,
    move_alias,
    roll_back,
)
from pipeline.tracking.lock import LockLostError, registry_lock
from pipeline.tracking.server import tracking_client
from tests.mlflow_server import MlflowServer

NAME, ALIAS, LOCK = "town", "champion", "town.champion.lock"


@pytest.fixture
def database(mlflow_schema, tmp_path) -> Path:
    return Path(shutil.copyfile(mlflow_schema, tmp_path / "mlflow.db"))


@pytest.fixture
def client(database):
    """A client of a place with five versions and no alias."""
    client = tracking_client(f"sqlite:///{database}")
    client.create_registered_model(NAME)
    for _ in range(5):
        client.create_model_version(NAME, source="file:///nowhere")
    return client


def names(client):
    return {model.name for model in client.search_registered_models()}


def test_an_alias_goes_from_version_to_version_and_back_twice(client):
    for expected, to in ((None, 1), (1, 3), (3, 2)):
        move_alias(client, NAME, ALIAS, expected=expected, to=to)
    assert alias_history(client, NAME, ALIAS) == [1, 3, 2]
    assert client.get_model_version(NAME, "2").tags == {"previous_champion": "3"}
    assert roll_back(client, NAME, ALIAS).version_to == 3
    assert roll_back(client, NAME, ALIAS).version_to == 1
    with pytest.raises(NothingToRollBackError, match="version 1 is the first champion of town that is known"):
        roll_back(client, NAME, ALIAS)
    assert aliased_version(client, NAME, ALIAS) == 1
    assert names(client) == {NAME}


def test_a_version_that_comes_again_is_gone_back_from_to_what_was_before_it(client):
    for expected, to in ((None, 1), (1, 2), (2, 1), (1, 2)):
        move_alias(client, NAME, ALIAS, expected=expected, to=to)
    assert [roll_back(client, NAME, ALIAS).version_to for _ in range(3)] == [1, 2, 1]


def test_nothing_is_moved_past_a_version_that_the_mover_does_not_know(client):
    move_alias(client, NAME, ALIAS, expected=None, to=1)
    with pytest.raises(AliasMovedError, match="is version 1 by now and was no version when this began") as error:
        move_alias(client, NAME, ALIAS, expected=None, to=2)
    assert error.value.current == 1
    assert alias_history(client, NAME, ALIAS) == [1]


def test_no_alias_and_no_model_are_nothing_to_roll_back(client):
    for name in (NAME, "unknown"):
        with pytest.raises(NothingToRollBackError, match=f"{name} has no champion, so there is nothing to roll back"):
            roll_back(client, name, ALIAS)


def test_a_name_that_mlflow_refuses_is_not_waited_for(client):
    with pytest.raises(MlflowException, match="cannot contain '/'"):
        roll_back(client, NAME, "a/b")


def test_the_history_follows_an_alias_moved_by_hand_and_versions_that_are_deleted(client, caplog):
    for expected, to in ((None, 1), (1, 2), (2, 3)):
        move_alias(client, NAME, ALIAS, expected=expected, to=to)
    client.set_registered_model_alias(NAME, ALIAS, "5")
    assert alias_history(client, NAME, ALIAS) == [1, 2, 3, 5]
    client.set_registered_model_alias(NAME, ALIAS, "2")
    assert alias_history(client, NAME, ALIAS) == [1, 2]
    move_alias(client, NAME, ALIAS, expected=2, to=4)
    client.delete_model_version(NAME, "2")
    assert roll_back(client, NAME, ALIAS).version_to == 1
    assert "version 2 of town, champion before, was deleted" in caplog.text


def test_the_history_of_a_registry_made_before_there_was_one_is_that_of_its_tags(client):
    client.set_model_version_tag(NAME, "3", "previous_champion", "2")
    client.set_model_version_tag(NAME, "2", "previous_champion", "3")  # as going back and forth once left it
    client.set_registered_model_alias(NAME, ALIAS, "3")
    assert alias_history(client, NAME, ALIAS) == [2, 3]
    assert roll_back(client, NAME, ALIAS).version_to == 2


def test_of_threads_that_move_from_the_same_version_one_wins_and_the_others_are_told_which(client):
    order = random.Random(0)

    def move(expected, to):
        try:
            move_alias(client, NAME, ALIAS, expected=expected, to=to)
        except AliasMovedError as error:
            return error.current
        return None

    expected = None
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            candidates = order.sample([version for version in range(1, 6) if version != expected], 4)
            told = list(threads.map(lambda to, now=expected: move(now, to), candidates))
            (winner,) = (to for to, lost_to in zip(candidates, told, strict=True) if lost_to is None)
            assert {lost_to for lost_to in told if lost_to is not None} == {winner}
            assert aliased_version(client, NAME, ALIAS) == winner
            expected = winner
    assert len(alias_history(client, NAME, ALIAS)) == 5
    assert names(client) == {NAME}


def test_a_lock_left_behind_is_broken_by_one_of_those_who_wait_and_leaves_nothing(client):
    client.create_registered_model(LOCK, description='{"held_by": "nobody", "token": "0123"}')
    at_work, most = [], []

    def work(number):
        with registry_lock(client, LOCK, stale_s=4.0) as check:
            check()
            at_work.append(number)
            most.append(len(at_work))
            at_work.remove(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert most == [1, 1, 1, 1]
    assert names(client) == {NAME}


def test_a_holder_whose_lock_was_broken_moves_nothing(client, monkeypatch):
    # As if the holder had slept since it took the lock, until another one broke it.
    def slept(*arguments):
        client.delete_registered_model(LOCK)
        return alias_history(*arguments)

    monkeypatch.setattr(aliases, "alias_history", slept)
    with pytest.raises(LockLostError, match="nothing was moved"):
        move_alias(client, NAME, ALIAS, expected=None, to=1)
    assert aliased_version(client, NAME, ALIAS) is None


@pytest.mark.slow
def test_two_processes_on_one_server_have_one_winner_and_a_killed_one_does_not_block(database, client, tmp_path):
    server = MlflowServer(database)
    server.start()
    try:
        server.wait()

        def start(to, go, *rest):
            script = Path(__file__).with_name("alias_process.py")
            command = [sys.executable, script, server.uri, NAME, ALIAS, str(to), tmp_path / go, *rest]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        with start(1, "go") as first, start(2, "go") as second:
            for process in (first, second):
                assert process.stdout.readline() == "ready\n"
            (tmp_path / "go").touch()
            told = [process.stdout.readline() for process in (first, second)]
            winner = aliased_version(client, NAME, ALIAS)
            assert told[winner - 1] == "won\n"
            assert told[2 - winner] == f"lost to {winner}\n"
            first.stdin.write(f"{winner} 3\n")  # again, but it ends by itself while it holds the lock
            first.stdin.close()
            assert first.wait(timeout=60) == 9
            second.stdin.close()
    finally:
        server.kill()
    assert names(client) == {NAME, LOCK}  # what the killed one left behind
    assert aliased_version(client, NAME, ALIAS) == winner
    move_alias(client, NAME, ALIAS, expected=winner, to=4, stale_s=4.0)
    assert aliased_version(client, NAME, ALIAS) == 4
    assert names(client) == {NAME}
