"""What is submitted to a cluster: a job with its arguments, checked here, under an id that says what is asked.

The id is derived from what the arguments mean, so that the same request is the same submission whoever makes it, in
whatever order the arguments stand: it is found again instead of being started twice.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cvft.configuration import dotted_values
from cvft.errors import ConfigError
from jobs import entry
from jobs.tracking_config import URI_VARIABLE

_PLACES = (
    *("root", "store", "manifest", "checkpoint", "output", "out", "json", "html", "fix_list", "weights", "uri"),
    *("tracking_uri", "fetch"),
)
"""Arguments and keys that name a folder, a file or a URI which the job's processes must reach."""
_FILES = ("config", "spec", "exclude", "gate")
"""Arguments that may name a file of the checkout."""
_COORDINATORS = ("shard", "train", "tune", "evaluate", "ablate")
"""Jobs whose work is done by Ray tasks and workers: their own process needs no CPU to itself."""
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_NAME = 40


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job to be run on a cluster.

    Attributes:
        job: The job's name.
        arguments: Its arguments as they were typed.
        meaning: What they mean, as plain data.
        name: Id of the first attempt; the next ones are `name-2`, `name-3`, ...
        state: What may have changed since the same request has finished, in words, so that its result is no answer any
            more; "" where the result follows from what is asked.
        is_repeatable: It may be given again where nobody knows how far it came.
    """

    job: str
    arguments: tuple[str, ...]
    meaning: Mapping[str, Any]
    name: str
    state: str
    is_repeatable: bool

    @property
    def digest(self) -> str:
        """What is asked, as 16 hexadecimal digits."""
        text = json.dumps([self.job, self.meaning], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def entrypoint(self) -> str:
        """The shell command that the cluster runs."""
        return shlex.join(["python", "-m", f"jobs.{self.job}", *self.arguments])

    @property
    def num_cpus(self) -> float:
        """CPUs that the job's own process is given: none where Ray's tasks and workers do the work."""
        return 0.0 if self.job in _COORDINATORS else 1.0

    def next_attempt(self, newest_id: str | None) -> str:
        """Return the id of the first attempt, or of the one after the newest that is there: older ones may be gone."""
        if newest_id is None:
            return self.name
        number = int(newest_id.removeprefix(self.name).removeprefix("-") or "1")
        return f"{self.name}-{number + 1}"


def read(command: Sequence[str], *, known: Sequence[str], name: str | None = None) -> Submission:
    """Read a job and its arguments as the job itself would; a wrong argument ends the process with one line.

    Args:
        command: The job's name and its arguments.
        known: Names of all jobs.
        name: Id to submit under; none derives it from the request.

    Raises:
        ConfigError: There is no such job, or it refuses its arguments.
    """
    if not command:
        raise ConfigError("name a job and its arguments: cvft submit train --config ...")
    job = command[0].replace("-", "_")
    if job not in known:
        raise ConfigError(f"{command[0]!r} is no job; jobs: {', '.join(known)}")
    if name is not None and not _SAFE.fullmatch(name):
        raise ConfigError(f"--name {name!r}: must be letters, digits, '.', '_' and '-'")
    described = importlib.import_module(f"jobs.{job}").JOB
    arguments = entry.parse_arguments(described, command[1:])
    meaning = described.resolve(arguments)
    state = described.state or _moving(meaning)
    asked = Submission(
        job=job,
        arguments=tuple(command[1:]),
        meaning=meaning,
        name="",
        state=state,
        is_repeatable=described.is_repeatable,
    )
    run_name = meaning.get("name")
    parts = [job, *([run_name[:_MAX_NAME]] if isinstance(run_name, str) else []), asked.digest[:8]]
    return replace(asked, name=name or "-".join(parts))


def _moving(meaning: Mapping[str, Any]) -> str:
    """Name what stands for something else as time goes on: a store for its newest manifest, an alias for a version."""
    for key, value in dotted_values(meaning).items():
        leaf = key.rpartition(".")[2]
        is_store = leaf == "manifest" and isinstance(value, str) and not value.endswith(".parquet")
        is_alias = leaf == "checkpoint" and isinstance(value, str) and value.startswith("models:") and "@" in value
        if is_store or is_alias:
            return f"what {key}={value} names"
    return ""


def check_places(submission: Submission, *, working_dir: Path | None, names: Sequence[str]) -> list[str]:
    """Refuse places that the cluster's processes cannot find, and return those that only some may.

    Args:
        submission: The job.
        working_dir: Folder whose code is sent; none if none is.
        names: Files that are sent.

    Returns:
        Absolute local paths, as `key=path`: every node must see the same there.

    Raises:
        ConfigError: A path is relative, and so would lie in the job's own throw-away copy of the code; or a file is not
            sent.
    """
    local = []
    for key, value in dotted_values(submission.meaning).items():
        leaf, said = key.rpartition(".")[2], f"{key}={value}"
        if not isinstance(value, str) or value in ("", "none") or leaf not in _PLACES:
            continue
        path = value.removeprefix("sqlite:///") if value.startswith("sqlite:///") else value
        if "://" in path or path.startswith("models:/"):  # a registered model is MLflow's
            continue
        if not Path(path).is_absolute():
            raise ConfigError(
                f"{said} is relative, and the job runs in a copy of the code that is thrown away; "
                "write a URI such as s3://bucket/prefix, or an absolute path that all nodes share"
            )
        local.append(said)
    _check_files(submission, working_dir, names)
    return local


def _check_files(submission: Submission, working_dir: Path | None, names: Sequence[str]) -> None:
    """A file of ours must be among those sent, and be named as it is found from the top of the code."""
    options = {f"--{name}": name for name in _FILES}
    for option, value in zip(submission.arguments, submission.arguments[1:], strict=False):
        if option in options and Path(value).is_file() and not Path(value).is_absolute():
            is_sent = working_dir is not None and value in names and Path(value).samefile(working_dir / value)
            if not is_sent:
                raise ConfigError(
                    f"{option} {value}: this file is not sent; put it into --working-dir, named from there"
                )


def environment(patterns: Sequence[str]) -> dict[str, str]:
    """Return the variables that a job is given besides those of its node.

    MLFLOW_TRACKING_URI is one of them where it is set here: what the arguments mean was read with it.

    Args:
        patterns: `NAME=value`, `NAME` for the value it has here, or a pattern of such names: `AWS_*`.

    Raises:
        ConfigError: No variable here has such a name.
    """
    chosen = {name: os.environ[name] for name in (URI_VARIABLE,) if os.environ.get(name)}
    for pattern in patterns:
        name, separator, value = pattern.partition("=")
        found = {name: value} if separator else {key: os.environ[key] for key in fnmatch.filter(os.environ, name)}
        if not found:
            raise ConfigError(f"--env {pattern}: no such variable here; set it, or write {pattern}=VALUE")
        chosen |= found
    return chosen
