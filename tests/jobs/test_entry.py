import json
import os
import sys

import pytest
import ray.exceptions

from cvft.errors import CvftError, DataError
from jobs import cli, entry


def _job(run):
    return entry.Job(
        name="job",
        summary="A job.",
        example="cvft job --count 3",
        add_arguments=_arguments,
        run=run,
        resolve=entry.plain,
    )


def _arguments(parser):
    parser.add_argument("--count", type=int, default=1)


def test_the_last_line_of_stdout_is_the_result_whatever_the_work_prints(capfd):
    def run(arguments):
        os.write(1, b"a library's chatter\n")
        sys.stderr.write("a log line\n")
        return {"count": arguments.count}

    assert entry.main(_job(run), ["--count", "3"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"count": 3}
    assert "a library's chatter" in err


@pytest.mark.parametrize(
    "command",
    [
        "ablate --spec town --pairs 80 --out",
        "inspect --manifest shards --out",
        "models --fetch",
        "report --checkpoint a --manifest b --out",
        "synthesize --pairs 8 --out",
        "validate --root a --html",
        "validate --root a --fix-list",
    ],
)
def test_a_uri_is_refused_where_a_job_writes_to_a_disk(command, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # made a path of, it was a folder `s3:` here
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command.split(), "s3://bucket/out.html"])
    assert "s3://bucket/out.html: is written to a disk, not to a store; name a local path" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_users_error_is_one_line_and_exit_code_2(capfd, wrapped):
    def run(arguments):
        error = DataError("pairs.csv: line 3\nhas no ground image")
        if wrapped:
            raise ray.exceptions.RayTaskError("f", "traceback", error).as_instanceof_cause()
        raise error

    assert entry.main(_job(run), []) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "cvft job: error: pairs.csv: line 3 has no ground image\n")


def test_a_fault_of_ours_keeps_its_traceback():
    def run(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entry.main(_job(run), [])


def test_a_wrong_argument_is_one_line_and_exit_code_2(capfd):
    with pytest.raises(SystemExit) as caught:
        entry.main(_job(dict), ["--count", "many"])
    assert caught.value.code == 2
    assert capfd.readouterr().err == (
        "cvft job: error: argument --count: invalid int value: 'many'; see cvft job --help\n"
    )


def test_help_shows_an_example(capfd):
    with pytest.raises(SystemExit) as caught:
        entry.main(_job(dict), ["--help"])
    assert caught.value.code == 0
    assert "example:\n  cvft job --count 3" in capfd.readouterr().out


def test_the_dispatcher_lists_the_jobs_and_refuses_others(capfd):
    assert cli.main([]) == 0
    assert "evaluate" in capfd.readouterr().out
    assert cli.main(["evalute"]) == 2
    assert "'evalute' is no job" in capfd.readouterr().err


def test_a_users_error_is_found_below_other_errors():
    outer = RuntimeError("the stage failed")
    outer.__cause__ = DataError("shard 3 is damaged")
    assert entry.find_user_error(outer) is outer.__cause__
    assert entry.find_user_error(RuntimeError("x")) is None


def test_a_file_where_a_folder_should_be_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "file" / "inside").mkdir()
    assert isinstance(entry.find_user_error(caught.value), CvftError)
    assert entry.find_user_error(FileNotFoundError(2, "gone", "ours")) is None


def test_overrides_may_stand_on_either_side_of_an_option(capfd):
    def arguments(parser):
        parser.add_argument("--config", required=True)
        parser.add_argument("overrides", nargs="*")

    job = entry.Job(name="job", summary="A job.", example="x", add_arguments=arguments, run=vars, resolve=entry.plain)
    assert entry.main(job, ["a=1", "--config", "c", "b=2"]) == 0
    assert json.loads(capfd.readouterr().out) == {"config": "c", "overrides": ["a=1", "b=2"]}


def test_progress_in_a_log_is_one_line_at_intervals_and_the_last_one(caplog):
    with caplog.at_level("INFO", logger="cvft"):
        progress = entry.Progress("rendering")
        for done in range(1, 1001):
            progress(done, 1000)
    assert 1 <= len(caplog.records) <= 3
    assert caplog.records[-1].getMessage().startswith("rendering: 1,000/1,000 pairs")
