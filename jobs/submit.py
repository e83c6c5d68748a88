"""Run a job on a Ray cluster, and follow it.

    python -m jobs.submit --address http://HEAD:8265 train --config official data.manifest=s3://bucket/cvusa ...

The same as `ray job submit --working-dir . -- python -m jobs.train ...`, which works too, with what people forget: the
arguments are checked before anything is sent, code is sent without data, the same request is never run twice at a time,
and the exit status is the job's. Ctrl-C leaves the job running. What has finished is not run again, unless its result
may be another one by now: that of a registry, of a store's newest manifest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cvft.errors import ConfigError
from jobs import entry
from jobs.cli import SUMMARIES
from jobs.commit import code_commit
from jobs.entry import LOGGER, EndedElsewhereError
from jobs.node_labels import parse_labels
from jobs.submission import waiting
from jobs.submission.attempt import Attempt, Request
from jobs.submission.command import Submission, check_places, environment, read
from jobs.submission.following import Follower, find_result
from jobs.submission.job_server import JobServer
from jobs.submission.package import collect, pack

JOBS = tuple(name for name in SUMMARIES if name != "submit")
_RACES = 10


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", help="http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine)"
    )
    parser.add_argument("--name", help="submission id (default: made of the job, its name and what its arguments mean)")
    parser.add_argument(
        "--working-dir",
        default=os.environ.get("CVFT_WORKING_DIR", "."),
        help="checkout that is sent, or `none` for what the nodes hold (default: CVFT_WORKING_DIR, else this folder)",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="files not to send; repeat it"
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="variable to pass, or a pattern such as 'AWS_*'; whoever may ask the cluster for its jobs can read it",
    )
    parser.add_argument("--num-cpus", type=float, help="CPUs for the job's own process (default: what it needs)")
    parser.add_argument("--num-gpus", type=float, default=0.0, help="GPUs for the job's own process (default: 0)")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="of the node that it runs on")
    parser.add_argument("--retries", type=int, default=2, help="new attempts when its node is lost (default: 2)")
    parser.add_argument("--again", action="store_true", help="run it although the same has finished")
    parser.add_argument("--no-wait", action="store_true", help="do not follow it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the cluster's jobs instead")
    what.add_argument("--attach", metavar="ID", help="follow a job that is there instead")
    what.add_argument("--stop", metavar="ID", help="end a job that is there instead")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="JOB ...", help="a job and its arguments")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.list or arguments.attach or arguments.stop:
        if command:
            raise ConfigError(f"{command[0]}: --list, --attach and --stop take no job")
        return _on_what_is_there(arguments)
    submission = read(command, known=JOBS, name=arguments.name)
    folder = None if arguments.working_dir == "none" else Path(arguments.working_dir)
    names = [] if folder is None else collect(folder, exclude=arguments.exclude)
    local = check_places(submission, working_dir=folder, names=names)
    variables = environment(arguments.env)
    labels = parse_labels(arguments.label, option="--label")
    server = JobServer(arguments.address)
    if local and not server.is_here:
        LOGGER.warning("%s: every node of %s must see the same there", ", ".join(local), server.address)
    with tempfile.TemporaryDirectory(prefix="cvft-") as scratch:
        archive = None
        if folder is not None:
            archive = Path(scratch) / "code.zip"
            size = pack(folder, names, archive)
            LOGGER.info("code: %d files of %s, %.2f MB packed", len(names), folder.resolve(), size / 1e6)
        if variables:
            LOGGER.info("passed on, readable for whoever may ask the cluster: %s", ", ".join(sorted(variables)))
        cpus = submission.num_cpus if arguments.num_cpus is None else arguments.num_cpus
        request = Request(
            archive=archive,
            variables=variables,
            needs={name: number for name, number in (("CPU", cpus), ("GPU", arguments.num_gpus)) if number},
            labels=labels,
            metadata={"cvft_commit": code_commit() or "unknown"},
        )
        return _see_through(server, submission, request, arguments)


def _see_through(
    server: JobServer, submission: Submission, request: Request, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Enter an attempt and follow it, and further ones where a node is lost or no room comes."""
    num_lost, is_anew = 0, arguments.again or submission.state != ""
    while True:
        attempt = _enter(server, submission, request, is_anew=is_anew)
        if arguments.no_wait:
            return {"submission_id": attempt.id, "status": attempt.status, "address": server.address}
        attempt, output = _follow(server, attempt)
        is_anew = False  # what somebody else has finished meanwhile answers this request
        if attempt.is_not_started:
            LOGGER.warning("%s %s; submitting it again", attempt.id, _ended(attempt))
        elif attempt.is_lost and not submission.is_repeatable:
            raise EndedElsewhereError(
                f"{attempt.id} {_ended(attempt)}; see whether it was done before you give it again: twice is another "
                "thing than once",
                code=1,
            )
        elif attempt.is_lost and num_lost < arguments.retries:
            num_lost += 1
            LOGGER.warning("%s %s; submitting it again", attempt.id, _ended(attempt))
        else:
            return _end(attempt, output)


def _enter(server: JobServer, submission: Submission, request: Request, *, is_anew: bool) -> Attempt:
    """Return the attempt that does what is asked: one that is there, or a new one.

    Args:
        server: The cluster's.
        submission: What is asked.
        request: How it is to be run.
        is_anew: One that has finished is no answer.
    """
    for _ in range(_RACES):
        attempts = server.attempts(submission)
        newest = attempts[-1] if attempts else None
        # One that never starts, for needs that are mended now or since its head was lost, is in nobody's way.
        is_stuck = newest is not None and (
            (newest.needs != request.needs and waiting.never_holds(server, newest))
            or waiting.never_begins(server, newest)
        )
        if newest is not None and not newest.is_over and not is_stuck:
            LOGGER.info("%s is the same request and is %s: following it", newest.id, newest.status)
            return newest
        if newest is not None and newest.status == "SUCCEEDED" and not is_anew:
            LOGGER.info("%s is the same request and has finished; --again runs it once more", newest.id)
            return newest
        attempt_id = submission.next_attempt(newest.id if newest is not None else None)
        if server.submit(submission, attempt_id, request):
            why = _why_after(newest, submission) if newest is not None else ""
            LOGGER.info("submitted %s to %s%s", attempt_id, server.address, why)
            return server.get(attempt_id)
        LOGGER.info("%s has just been submitted by somebody else", attempt_id)
        is_anew = False
    raise ConfigError(f"{submission.name}: others submit it as fast as this; look with --list")


def _why_after(newest: Attempt, submission: Submission) -> str:
    if newest.status != "SUCCEEDED":
        return f", after {newest.id} which {_ended(newest)}"
    changed = f", but {submission.state} may have changed since" if submission.state else ""
    return f"; {newest.id} has finished{changed}"


def _on_what_is_there(arguments: argparse.Namespace) -> dict[str, Any]:
    server = JobServer(arguments.address)
    if arguments.list:
        jobs = [_listed(server, item) for item in server.all()]
        for job in jobs:
            waits_for = f"  (waits for {job['waits_for']})" if job["waits_for"] else ""
            LOGGER.info("%-10s %s  %s%s", job["status"], job["id"], job["entrypoint"], waits_for)
        return {"jobs": jobs}
    if arguments.stop:
        server.stop(arguments.stop)
        status = server.get(arguments.stop).status
        if status == "PENDING":
            LOGGER.info("%s has not begun; ending it by a job on the head", arguments.stop)
            status = server.withdraw(arguments.stop).status
        if status == "PENDING":
            LOGGER.warning("%s is there still, and ends when there is room for it, or Ray gives it up", arguments.stop)
        return {"submission_id": arguments.stop, "status": "stopped" if status == "STOPPED" else "asked to stop"}
    attempt, output = _follow(server, server.get(arguments.attach))
    return _end(attempt, output)


def _listed(server: JobServer, attempt: Attempt) -> dict[str, Any]:
    waits_for = None
    if attempt.status == "PENDING":
        if waiting.never_begins(server, attempt):
            waits_for = "nothing: it was lost with the head that took it; submit it again"
        else:
            is_hopeless = waiting.never_holds(server, attempt)
            waits_for = waiting.describe(server, attempt) + ("; no node can ever hold it" if is_hopeless else "")
    return {"id": attempt.id, "status": attempt.status, "entrypoint": attempt.entrypoint, "waits_for": waits_for}


def _follow(server: JobServer, attempt: Attempt) -> tuple[Attempt, str]:
    """Show what a job prints; return how it ended, and the end of its output."""
    if attempt.is_over:
        return attempt, server.logs(attempt.id)
    follower = Follower(server, attempt)
    try:
        attempt = follower.follow()
    except KeyboardInterrupt:
        where = f"cvft submit --address {server.address}"
        raise EndedElsewhereError(
            f"{attempt.id} goes on without you; follow it: {where} --attach {attempt.id}, "
            f"end it: {where} --stop {attempt.id}",
            code=130,
        ) from None
    return attempt, follower.output


def _end(attempt: Attempt, output: str) -> dict[str, Any]:
    """Return the job's result, or end as it did."""
    result = find_result(output) or attempt.result
    if attempt.status == "SUCCEEDED":
        if result is None:
            LOGGER.warning("%s has finished; its log went with its node, and no result is on record", attempt.id)
        return {"submission_id": attempt.id} if result is None else result
    code = attempt.exit_code
    # Its own one line, or its traceback, is what was shown last.
    raise EndedElsewhereError(
        f"{attempt.id} {_ended(attempt)}", code=code if code is not None and code > 0 else 1, result=result
    )


def _ended(attempt: Attempt) -> str:
    if attempt.status == "STOPPED":
        return "was stopped"
    if attempt.status == "PENDING":
        return "never begins"
    if attempt.is_not_started:
        lost = "was lost with the head that took it, before it began"
        return lost if attempt.is_lost else "found no room in the time that Ray waits"
    if attempt.is_lost:
        return f"was lost with its node ({attempt.message[:200]})"
    return (
        f"failed: {attempt.message[:300]}" if attempt.exit_code is None else f"ended with exit code {attempt.exit_code}"
    )


JOB = entry.Job(
    name="submit",
    summary="Run a job on a Ray cluster and follow it; the same request is found again, never run twice at a time.",
    example="cvft submit --address http://127.0.0.1:8265 evaluate --checkpoint models:/mine@candidate"
    " --manifest s3://bucket/cvusa",
    add_arguments=_add_arguments,
    run=_run,
    resolve=entry.plain,
    takes_command=True,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
