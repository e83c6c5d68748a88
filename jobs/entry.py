"""What every entry point shares: arguments in, one line of JSON out, an exit code that tells whose fault it is.

Exit codes: 0 done; 2 something the user can mend, said in one line; 1 a fault of ours, with its traceback.
`cvft submit` ends with the exit code of the job that it submitted.
Everything but the result goes to standard error, so that the last line of standard output is the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, NoReturn

from cvft.errors import CvftError, StoreError
from jobs.submission.record import keep_result

LOGGER = logging.getLogger("cvft")
LINE_INTERVAL_S = 10.0
# A file where a folder should be, a folder that may not be written: the user's, wherever they surface.
_USERS_OS_ERRORS = (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One entry point.

    Attributes:
        name: What is typed after `cvft` or `python -m jobs.`.
        summary: One sentence for `--help`.
        example: A command that works as it is printed.
        add_arguments: Declares the arguments.
        run: Does the work and returns the result, which must be plain JSON data.
        resolve: Returns what the arguments mean as plain data and refuses what is wrong with them, without touching
            data, stores or clusters: `plain` where the parser refuses all that can be. See `jobs.submission`.
        state: What it looks at or changes and its arguments do not fix, in words: its result may be another one at the
            next call. "" where the result follows from what the arguments name.
        is_repeatable: Doing it twice gives what doing it once gives, so that one that was lost may be given again.
        takes_command: Everything from the first argument without a dash on is the command of another job.
    """

    name: str
    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]
    resolve: Callable[[argparse.Namespace], dict[str, Any]]
    state: str = ""
    is_repeatable: bool = True
    takes_command: bool = False


class FailedResultError(CvftError):
    """A job that ended with a result, but one that says no: the result is printed and the exit code is 2."""

    def __init__(self, message: str, *, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


class EndedElsewhereError(Exception):
    """A job that ran on a cluster and whose output has been shown: this process ends as that one did."""

    def __init__(self, message: str, *, code: int, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.result = result


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Run a job from the command line and return its exit code."""
    arguments = parse_arguments(job, argv)
    log_to_stderr()
    try:
        with _stdout_to_stderr():
            result = job.run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"cvft {job.name}: interrupted; the same command continues where it can\n")
        return 130
    except EndedElsewhereError as ended:
        sys.stderr.write(f"cvft {job.name}: {ended}\n")
        if ended.result is not None:
            sys.stdout.write(json.dumps(ended.result) + "\n")
        return ended.code
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise  # a fault of ours: Python prints the traceback and exits with 1
        sys.stderr.write(f"cvft {job.name}: error: {' '.join(str(user_error).split())}\n")
        if isinstance(user_error, FailedResultError):
            _give(user_error.result)
        return 2
    _give(result)
    return 0


def _give(result: dict[str, Any]) -> None:
    """Print the result, and keep it where it outlives the log of a job on a cluster."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    with _stdout_to_stderr():
        keep_result(result)


def parse_arguments(job: Job, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a job's arguments; a wrong one ends the process with one line and exit code 2."""
    parser = _OneLineParser(
        prog=f"cvft {job.name}",
        description=job.summary,
        epilog=f"example:\n  {job.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    job.add_arguments(parser)
    # Overrides may stand on either side of an option.
    return parser.parse_args(argv) if job.takes_command else parser.parse_intermixed_args(argv)


def local_path(text: str) -> Path:
    """Read the path of a file or folder that a job writes on the machine that it runs on.

    Raises:
        argparse.ArgumentTypeError: It is a URI: made a path of, `s3://bucket/x` would be a folder `s3:` here.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: is written to a disk, not to a store; name a local path")
    return Path(text)


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as they are; overrides as what they set, in no order."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    overrides = (text.partition("=") for text in values.get("overrides", ()))
    return values | {"overrides": {key: value for key, _, value in overrides}}


def find_user_error(error: BaseException) -> CvftError | None:
    """Return the user's error inside `error`: Ray wraps what its tasks and workers raise."""
    if isinstance(error, CvftError) and not hasattr(error, "cause"):
        return error
    if isinstance(error, OSError) and error.filename and (isinstance(error, _USERS_OS_ERRORS) or error.errno == ENOSPC):
        return StoreError(f"{error.filename}: {error.strerror}; name another place or mend this one")
    for candidate in (getattr(error, "cause", None), error.__cause__):
        found = find_user_error(candidate) if isinstance(candidate, BaseException) else None
        if found is not None:
            return found
    return None


def log_to_stderr() -> None:
    """Print log lines to standard error, with the time."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # tells where it found credentials, every time


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and subprocesses print to standard error: standard output carries the result alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


class Progress:
    """Progress on standard error: a rewritten line in a terminal, one line at intervals in a job's log."""

    def __init__(self, what: str, unit: str = "pairs") -> None:
        self._what = what
        self._unit = unit
        self._started = time.monotonic()
        self._printed = 0.0
        self._is_done = False

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return max(time.monotonic() - self._started, 1e-9)

    def __call__(self, done: int, total: int, *, before: int = 0, details: str = "") -> None:
        """Tell that `done` of `total` are finished, `before` of them already at the beginning."""
        now = time.monotonic()
        if self._printed == 0.0 and done == before:  # what came before, such as Ray's start, is no part of the rate
            self._started = now
        is_terminal = sys.stderr.isatty()
        interval_s = 0.2 if is_terminal else LINE_INTERVAL_S
        if self._is_done or (done < total and now - self._printed < interval_s):
            return
        self._is_done = done >= total
        self._printed = now
        rate = (done - before) / self.seconds
        left = f"{(total - done) / rate if rate else 0:,.0f} s left" if rate or done >= total else "time left unknown"
        line = f"{self._what}: {done:,}/{total:,} {self._unit}, {rate:,.1f}/s, {left}"
        line += f", {details}" if details else ""
        if is_terminal:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if done >= total else ""))
            sys.stderr.flush()
        else:
            LOGGER.info(line)
