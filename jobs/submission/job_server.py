"""A cluster's job server: attempts of a submission, one at a time, and what they print.

Ray refuses a second job under one submission id. All that is promised about double submissions rests on it: whoever
submits an attempt that somebody else has just submitted is refused, looks again, and finds that one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, cast

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cvft.errors import ClusterError, ConfigError
from jobs.submission.attempt import Attempt, Request
from jobs.submission.command import Submission

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_HTTP_ERROR = re.compile(r"Request failed with status code (\d+): (.*)", re.DOTALL)
_PAUSES_S = (1.0, 2.0, 4.0)  # before a job server that failed by itself is asked again
_TIMEOUTS_S = (10.0, 120.0)  # to connect, and to answer: a host that was cut off never would
_LOG_TIMEOUTS_S = (10.0, 20.0)
_WITHDRAW = Path(__file__).with_name("withdraw.py")
_WITHDRAW_S = 120.0
_POLL_S = 0.5
# A job's log comes as it is written, without colours, and without the autoscaler's lines: `jobs.room` says what comes.
_VARIABLES = {"PYTHONUNBUFFERED": "1", "RAY_COLOR_PREFIX": "0", "RAY_SCHEDULER_EVENTS": "0"}


class AwayError(ClusterError):
    """The cluster does not answer; it may do so later."""


class BusyError(ClusterError):
    """The job server failed by itself; asked again it may not."""


class UnknownJobError(ClusterError):
    """The cluster knows no such job."""


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray's class has no types
    """Ray's client, which would wait for ever for a host that is gone."""

    def _do_request(self, *arguments: Any, **options: Any) -> requests.Response:
        reply: requests.Response = super()._do_request(*arguments, **{"timeout": _TIMEOUTS_S, **options})
        return reply


class JobServer:
    """Speaks to the job server of one cluster; what it refuses becomes one line."""

    def __init__(self, address: str | None) -> None:
        """Connect.

        Args:
            address: `http://HEAD:8265`; none is RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine.

        Raises:
            ClusterError: Nothing answers there, or it refuses this token.
        """
        if address is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its variables to what it is told
        named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
        self.address = named
        for part in ("job.sdk", "dashboard_sdk"):  # would tell of sockets that close and packages that are there
            logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)
        with self._errors():
            self._client = _Client(named)
            self.address = self._client.get_address()

    @property
    def is_here(self) -> bool:
        """Whether the cluster's head is this machine."""
        host = re.sub(r"^\w+://|[:/].*$", "", self.address.removeprefix("http://").removeprefix("https://"))
        return host in ("localhost", "127.0.0.1", "0.0.0.0")

    def attempts(self, submission: Submission) -> list[Attempt]:
        """Return the attempts of a submission, oldest first.

        Raises:
            ConfigError: Its name belongs to another request.
        """
        pattern = re.compile(re.escape(submission.name) + r"(-\d+)?")
        found = [item for item in self.all() if pattern.fullmatch(item.id)]
        found = [item for item in found if item.metadata.get("cvft_submission", submission.name) == submission.name]
        for item in found:
            if item.metadata.get("cvft_request") != submission.digest:
                raise ConfigError(
                    f"--name {submission.name}: {item.id} is another job ({item.entrypoint}); choose another"
                )
        return sorted(found, key=lambda item: (len(item.id), item.id))

    def all(self) -> list[Attempt]:
        """Return all jobs that were submitted, oldest first."""
        with self._errors():
            jobs = self._client.list_jobs()
        attempts = [Attempt.of(job) for job in jobs if job.submission_id is not None]
        return sorted(attempts, key=lambda attempt: attempt.started_ms)

    def get(self, job_id: str) -> Attempt:
        """Return the job with this id.

        Raises:
            ClusterError: There is none.
        """
        with self._errors():
            return Attempt.of(self._client.get_job_info(job_id))

    def stop(self, job_id: str) -> None:
        """Ask a job to end."""
        with self._errors():
            self._client.stop_job(job_id)

    def withdraw(self, job_id: str) -> Attempt:
        """End a job that has not begun, which hears no request to end; return what became of it."""
        helper = f"withdraw-{job_id}-{secrets.token_hex(4)}"
        program = {"CVFT_PROGRAM": _WITHDRAW.read_text(encoding="utf-8")}
        command = shlex.join(["python", "-c", "import os; exec(os.environ['CVFT_PROGRAM'])", job_id])
        with self._errors():
            self._client.submit_job(submission_id=helper, entrypoint=command, runtime_env={"env_vars": program})
        deadline = time.monotonic() + _WITHDRAW_S
        while not self.get(helper).is_over and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.get(job_id)  # the helper's record stays: Ray fails a job that is deleted as soon as it has finished

    def submit(self, submission: Submission, attempt_id: str, request: Request) -> bool:
        """Submit an attempt; return false where somebody else has just submitted it."""
        metadata = {
            "cvft_submission": submission.name,
            "cvft_request": submission.digest,
            "cvft_needs": json.dumps(request.needs),
            **({"cvft_labels": json.dumps(request.labels)} if request.labels else {}),
            **request.metadata,
        }
        code = {} if request.archive is None else {"working_dir": str(request.archive)}
        options = {
            "submission_id": attempt_id,
            "entrypoint": submission.entrypoint,
            "runtime_env": {**code, "env_vars": {**_VARIABLES, **request.variables}},
            "metadata": metadata,
            "entrypoint_num_cpus": request.needs.get("CPU"),
            "entrypoint_num_gpus": request.needs.get("GPU"),
            "entrypoint_label_selector": dict(request.labels) or None,
        }
        for pause_s in (*_PAUSES_S, None):
            try:
                with self._errors():
                    self._client.submit_job(**options)
            except BusyError:
                # Two who send the same code at once can fail each other. What was taken all the same exists by now.
                if pause_s is None:
                    raise
                time.sleep(pause_s)
            except ClusterError as error:
                if "already exists" not in str(error):
                    raise
                return False
            else:
                return True
        raise AssertionError("the last try returns or raises")

    def logs(self, job_id: str) -> str:
        """Return what a job has printed; "" where that is gone with its node, or cannot be read now."""
        with contextlib.suppress(AwayError), self._errors():
            reply = self._client._do_request("GET", f"/api/jobs/{job_id}/logs", timeout=_LOG_TIMEOUTS_S)
            return str(reply.json()["logs"]) if reply.status_code == 200 else ""
        return ""

    def tail(self, job_id: str) -> AsyncGenerator[str]:
        """Yield all that a job has printed and prints, until it is over or the connection breaks."""
        return cast(AsyncGenerator[str], self._client.tail_job_logs(job_id))

    def ask(self, path: str, **parameters: int | str) -> dict[str, Any]:
        """Ask the dashboard, beside the job server; {} where it leaves this out."""
        with self._errors():
            reply = self._client._do_request("GET", path, params=parameters)
        if reply.status_code != 200:
            return {}
        return cast(dict[str, Any], reply.json().get("data") or {})

    def wake(self, job_id: str) -> None:
        """Make a head that was started again look after the jobs that it finds on record.

        Ray's job manager begins with the first request that a submission makes of it; until then a job that was lost
        with the old head stays RUNNING for ever. This one asks for a label that no node may have: it is always refused.
        """
        with contextlib.suppress(ClusterError), self._errors():
            self._client.submit_job(
                submission_id=job_id, entrypoint="false", entrypoint_label_selector={"no label!": "none"}
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            refused = str(error).partition("\n")[0].partition(". ")[0]  # Ray goes on with how to make a token
            raise ClusterError(
                f"{self.address} refuses this client ({refused}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the cluster's token"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise AwayError(
                f"{self.address}: no Ray job server answers there; name the cluster's with --address "
                "http://HEAD:8265 or RAY_API_SERVER_ADDRESS"
            ) from error
        except RuntimeError as error:
            found = _HTTP_ERROR.match(str(error))
            if found is None and str(error).startswith("Version check returned 404"):
                raise AwayError(
                    f"{self.address}: what answers there is no Ray job server (404 for /api/version)"
                ) from error
            if found is None:
                raise
            reason = _last_line(found[2])
            kind: type[ClusterError] = ClusterError
            if found[1] == "404" and "does not exist" in found[2]:
                kind = UnknownJobError
            elif found[1].startswith("5") and "already exists" not in found[2]:
                kind = BusyError
            raise kind(f"{self.address} answers {found[1]}: {reason[:300]}") from error


def _last_line(text: str) -> str:
    """Return the end of a traceback, or the whole of something shorter."""
    lines = [line for line in text.replace("\\n", "\n").splitlines() if line.strip(" .")]  # Ray adds a full stop
    return lines[-1].strip() if lines else ""
