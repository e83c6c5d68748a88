"""What `cvft submit` decides before it speaks to a cluster."""

import importlib
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from cvft.errors import ConfigError
from jobs import cli
from jobs.submission.command import check_places, environment, read
from jobs.submission.following import find_result
from jobs.submission.package import collect, pack

KNOWN = tuple(cli.SUMMARIES)
TRAIN = ["train", "--config", "town", "data.manifest=s3://bucket/store", "output=s3://bucket/runs", "name=mine"]
HTTP = "tracking.uri=http://mlflow:5000"


def asked(*command, **options):
    return read(list(command), known=KNOWN, **options)


def test_the_same_request_has_the_same_id_however_it_is_typed():
    first = asked(*TRAIN, HTTP, "train.num_epochs=3")
    again = asked("train", HTTP, "train.num_epochs=3", *TRAIN[3:], "--config", "town")
    assert first.name == again.name
    assert first.name.startswith("train-mine-")
    assert first.digest == again.digest


def test_the_next_attempt_is_counted_from_the_newest_that_is_there():
    submission = asked(*TRAIN)
    assert submission.next_attempt(None) == submission.name
    assert submission.next_attempt(submission.name) == f"{submission.name}-2"
    assert submission.next_attempt(f"{submission.name}-9") == f"{submission.name}-10"  # whichever were deleted


def test_a_default_that_is_spelt_out_is_no_other_request():
    assert asked(*TRAIN).digest == asked(*TRAIN, "train.max_failures=3").digest


def test_twice_is_as_good_as_once_but_for_a_rollback():
    jobs = {name: importlib.import_module(f"jobs.{name}").JOB for name in KNOWN}
    assert [name for name, job in jobs.items() if not job.is_repeatable] == ["rollback"]
    assert not asked("rollback", "--tracking-uri", "http://mlflow:5000").is_repeatable
    assert asked(*TRAIN).is_repeatable


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([*TRAIN], [*TRAIN, "train.seed=1"]),
        (["shard", "--root", "/a", "--store", "/s"], ["shard", "--root", "/b", "--store", "/s"]),
        (["verify", "--manifest", "/a"], ["inspect", "--manifest", "/a"]),
    ],
)
def test_another_request_has_another_id(one, other):
    assert asked(*one).name != asked(*other).name


def test_the_jobs_own_arguments_are_held_against_the_job(capfd):
    with pytest.raises(ConfigError, match=r"data\.manifset: unknown key; did you mean data\.manifest"):
        asked("train", "--config", "town", "data.manifset=x")
    with pytest.raises(SystemExit) as caught:
        asked("evaluate", "--checkpoint", "x")
    assert caught.value.code == 2
    assert "--manifest" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="'nojob' is no job"):
        asked("nojob")
    with pytest.raises(ConfigError, match="--name 'a b'"):
        asked(*TRAIN, name="a b")


REFUSED = {
    "demo": (["train.num_epcohs=2"], "num_epcohs"),
    "synthesize": (["--out", "/o", "--pairs", "4", "--test", "2"], "belong to --layout cvact"),
    "validate": (["--root", "/r", "--fix-leaks"], "--fix-list FILE"),
    "shard": (["--root", "/r", "--store", "/s", "--node-label", "gpu"], "is written KEY=VALUE"),
    "verify": (["--manifest", "/m", "--repair"], "--repair and --root go together"),
    "inspect": (["--manifest", "/m", "--out", "/sheet.txt"], "must end with one of"),
    "train": (["--config", "town", "data.manifest=/m", "train.seeds=1"], "train.seeds: unknown key"),
    "evaluate": (["--checkpoint", "/c", "--manifest", "/m", "model.head.kind=conv"], "only preprocess"),
    "report": (["--checkpoint", "/c", "--manifest", "/m", "--out", "/o", "--examples", "0"], "show at least 1"),
    "promote": (["--manifest", "/m", "min_gian=0.1"], "did you mean gate.min_gain"),
    "rollback": (["--alias", "v1"], "--alias 'v1'"),
    "models": (["--version", "0"], "--version 0"),
    "ablate": (["--out", "/o", "train.num_epcohs=2"], "num_epcohs"),
    "tune": (["--out", "/o", "--spec", "nospec"], "nospec"),
}
"""For each job what its parser lets through and it refuses by itself, before anything is sent."""
NOTHING_MORE = {"import_official": "its parser sees all that can be wrong", "submit": "is not submitted itself"}


@pytest.mark.parametrize("job", KNOWN)
def test_every_job_refuses_a_wrong_argument_before_anything_is_sent(job):
    if job in NOTHING_MORE:
        assert job not in REFUSED
        return
    arguments, message = REFUSED[job]
    with pytest.raises(ConfigError, match=re.escape(message)):
        asked(job, *arguments)


def test_the_gate_is_part_of_what_is_asked():
    asked_for = asked("promote", "--manifest", "/m")
    assert asked_for.digest == asked("promote", "--manifest", "/m", "--gate", "default").digest
    assert asked_for.digest != asked("promote", "--manifest", "/m", "min_gain=0.5").digest


def test_a_search_in_another_town_is_another_search():
    assert asked("tune", "--out", "/o", "--pairs", "40").digest != asked("tune", "--out", "/o", "--pairs", "50").digest


def test_a_search_in_a_town_is_the_same_request_from_every_folder(tmp_path, monkeypatch):
    here = asked("tune", "--out", "/o")
    monkeypatch.chdir(tmp_path)
    assert asked("tune", "--out", "/o").digest == here.digest


FIXED = "s3://bucket/store/manifests/0123456789abcdef.parquet"
STATES = {
    "demo": ([["--out", "/o"]], []),
    "synthesize": ([["--out", "/o", "--pairs", "4"]], []),
    "validate": ([], [["--root", "/r"]]),
    "shard": ([], [["--root", "/r", "--store", "/s"]]),
    "verify": ([], [["--manifest", FIXED]]),
    "inspect": ([], [["--manifest", FIXED]]),
    "train": ([["--config", "town", f"data.manifest={FIXED}"]], [TRAIN[1:]]),
    "evaluate": (
        [["--manifest", FIXED, "--checkpoint", name] for name in ("/c", "models:/mine/3")],
        [["--manifest", FIXED, "--checkpoint", "models:/mine@champion"], ["--manifest", "/s", "--checkpoint", "/c"]],
    ),
    "report": (
        [["--manifest", FIXED, "--out", "/o", "--checkpoint", "models:/mine/3"]],
        [["--manifest", FIXED, "--out", "/o", "--checkpoint", "models:/mine@champion"]],
    ),
    "promote": ([], [["--manifest", FIXED, "--candidate", "3"]]),
    "rollback": ([], [[]]),
    "models": ([], [[], ["--version", "3"]]),
    "ablate": ([["--out", "/o"], ["--out", "/o", "--manifest", FIXED]], [["--out", "/o", "--manifest", "/s"]]),
    "tune": ([["--out", "/o"], ["--out", "/o", "--manifest", FIXED]], [["--out", "/o", "--manifest", "/s"]]),
    "import_official": ([["--checkpoint", "/c", "--out", "/o"]], []),
}
"""For each job requests whose finished result answers them for ever, and such as must be run again."""


@pytest.mark.parametrize("job", [name for name in KNOWN if name != "submit"])
def test_only_a_result_that_follows_from_what_is_asked_answers_the_same_request_again(job):
    settled, unsettled = STATES[job]
    assert [asked(job, *arguments).state for arguments in settled] == [""] * len(settled)
    assert all(asked(job, *arguments).state for arguments in unsettled)


def test_what_a_shell_would_take_apart_arrives_whole():
    submission = asked("validate", "--root", "/with space/$HOME")
    assert submission.entrypoint == "python -m jobs.validate --root '/with space/$HOME'"


def test_a_job_that_works_by_itself_gets_a_cpu_and_one_that_asks_ray_none():
    assert asked("validate", "--root", "/a").num_cpus == 1
    assert asked("shard", "--root", "/a", "--store", "/s").num_cpus == 0
    assert asked(*TRAIN, "train.workers=1").num_cpus == 0


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([*TRAIN, HTTP, "data.manifest=shards"], "data.manifest=shards is relative"),
        ([*TRAIN], "tracking.uri=sqlite:///mlflow.db is relative"),
        (["evaluate", "--checkpoint", "runs/x", "--manifest", "/s"], "checkpoint=runs/x is relative"),
        (["rollback"], "tracking_uri=sqlite:///mlflow.db is relative"),
        (["models", "--fetch", "x", "--tracking-uri", "http://m"], "fetch=x is relative"),
    ],
)
def test_a_relative_path_is_refused_because_it_would_lie_in_the_jobs_copy_of_the_code(command, named):
    with pytest.raises(ConfigError, match=named):
        check_places(asked(*command), working_dir=None, names=[])


def test_mlflows_own_variable_says_where_runs_go_and_reaches_the_job(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    by_variable = asked(*TRAIN)
    assert environment([]) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert environment(["MLFLOW_TRACKING_URI=http://other"]) == {"MLFLOW_TRACKING_URI": "http://other"}
    assert check_places(by_variable, working_dir=None, names=[]) == []
    assert by_variable.digest == asked(*TRAIN, HTTP).digest
    assert asked(*TRAIN, "tracking.uri=http://elsewhere").meaning["tracking"]["uri"] == "http://elsewhere"


def test_absolute_paths_are_named_and_uris_are_not():
    submission = asked("evaluate", "--checkpoint", "s3://bucket/c", "--manifest", "/shared/store")
    assert check_places(submission, working_dir=None, names=[]) == ["manifest=/shared/store"]


def test_where_models_are_registered_matters_where_one_is_named():
    measured = ["evaluate", "--manifest", "s3://bucket/store", "--checkpoint"]
    with pytest.raises(ConfigError, match=r"tracking_uri=sqlite:///mlflow.db is relative"):
        check_places(asked(*measured, "models:/mine@champion"), working_dir=None, names=[])
    at = ["models:/mine@champion", "--tracking-uri", "http://mlflow:5000"]
    for command in ([*measured, *at], [*measured, "s3://bucket/c"]):
        assert check_places(asked(*command), working_dir=None, names=[]) == []


def test_a_configuration_file_must_be_among_what_is_sent(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--config", "mine.yaml", "data.manifest=s3://b/s", "output=s3://b/r", HTTP]
    with pytest.raises(ConfigError, match=r"--config mine\.yaml: this file is not sent"):
        check_places(asked(*command), working_dir=tmp_path, names=[])
    assert check_places(asked(*command), working_dir=tmp_path, names=["mine.yaml"]) == []


@pytest.fixture
def checkout(tmp_path):
    for name in ("jobs/__init__.py", "jobs/a.py", ".git-like", "data/images.bin", "runs/x/w.bin", ".venv/lib/big.py"):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "code"


def test_code_is_sent_without_data_caches_and_history(checkout):
    assert collect(checkout) == ["jobs/__init__.py", "jobs/a.py"]


def test_in_a_git_checkout_what_git_ignores_stays_and_what_is_new_goes(checkout):
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / ".gitignore").write_text("/data/\n/runs/\n.venv/\n")
    assert collect(checkout) == [".git-like", ".gitignore", "jobs/__init__.py", "jobs/a.py"]
    assert collect(checkout, exclude=["jobs/a*", ".git*"]) == ["jobs/__init__.py"]


def test_what_the_examples_write_is_sent_neither_by_us_nor_by_ray_job_submit(tmp_path):
    checkout, example = tmp_path / "code", re.compile(r"--(?:out|store|html) ([^/ ][^ :]*)(?= |$)")
    written = {name for job in KNOWN for name in example.findall(importlib.import_module(f"jobs.{job}").JOB.example)}
    assert {"town", "shards", "demo/validation.html", "search", "sheet.html"} <= written
    for name in {*written, "data/x.jpg", "runs/x", "mlflow.db", "jobs/__init__.py", "search/trials/x"} - {"search"}:
        path = checkout / name if "." in name or "/" in name else checkout / name / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    shutil.copyfile(Path(__file__).parents[2] / ".gitignore", checkout / ".gitignore")
    create_package(str(checkout), tmp_path / "ray.zip", include_gitignore=True)
    names = zipfile.ZipFile(tmp_path / "ray.zip").namelist()
    assert sorted(name for name in names if not name.endswith("/")) == [".gitignore", "jobs/__init__.py"]
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    assert collect(checkout) == [".gitignore", "jobs/__init__.py"]


def test_data_among_the_code_is_refused_by_its_folder(checkout):
    with (checkout / "jobs" / "weights.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(ConfigError, match=r"106 MB are no code \(most: jobs 106 MB\)"):
        collect(checkout)
    with pytest.raises(ConfigError, match="no jobs/ here"):
        collect(checkout / "data")


def test_the_same_files_are_the_same_archive(checkout, tmp_path):
    names = collect(checkout)
    pack(checkout, names, tmp_path / "1.zip")
    (checkout / "jobs" / "a.py").touch()
    pack(checkout, names, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "1.zip").read("jobs/a.py") == b"jobs/a.py"


def test_only_the_variables_that_are_named_are_passed(monkeypatch):
    monkeypatch.setenv("CVFT_TEST_ONE", "1")
    monkeypatch.setenv("CVFT_TEST_TWO", "2")
    assert environment([]) == {}
    assert environment(["CVFT_TEST_*", "OTHER=x=y"]) == {"CVFT_TEST_ONE": "1", "CVFT_TEST_TWO": "2", "OTHER": "x=y"}
    with pytest.raises(ConfigError, match="--env CVFT_TEST_THREE: no such variable"):
        environment(["CVFT_TEST_THREE"])


def test_the_result_is_the_last_line_that_is_an_object():
    assert find_result('chatter\n{"a": 1}\n12:00:00 a log line\n{broken}\n[1]\n') == {"a": 1}
    assert find_result("nothing\n") is None
