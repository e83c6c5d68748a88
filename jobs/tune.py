"""Search over configurations: many trials at a time, bad ones stopped early, the best one ready for `train`.

    python -m jobs.tune --spec town --pairs 800 --out search

A search is a YAML file (see `jobs/searches/`). Killed anywhere and started again, it goes on: trials that ended are not
repeated, those under way go on from their checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cvft.configuration import dotted_values, parse, to_plain
from cvft.errors import ConfigError, StoreError
from jobs import entry
from jobs.ablate import make_town
from jobs.cluster import ray_session
from jobs.commit import code_commit
from jobs.config import ExperimentConfig
from jobs.run_file import FREE_KEYS
from jobs.search.clock import Clock
from jobs.search.config import SearchConfig, base_of, load_search, space_of
from jobs.search.draw import searcher_of
from jobs.search.end import finish_search
from jobs.search.journal import Journal
from jobs.search.plan import SEARCH_FILE, Search
from jobs.search.run import run_search
from jobs.training import attempts
from pipeline.manifest import Manifest
from pipeline.ray_tasks import OnRay
from pipeline.storage import Store
from pipeline.tracking.runs import Run, Status, open_run
from pipeline.tracking.server import prepare, store_errors

# What may differ when a search goes on: how long it may go on, and what happens at its end.
_FREE = ("budget.", "final.", "trial.max_concurrent", "trial.max_failures")


def tune(spec: SearchConfig, *, manifest: str, out: str, overrides: list[str]) -> dict[str, Any]:
    """Search, or go on searching, and compare the winner with the base.

    Args:
        spec: The specification.
        manifest: Path or URI of the manifest, or of a store.
        out: Folder or URI of the search.
        overrides: Changes of the base.

    Raises:
        CvftError: The specification, the data or a store cannot be used.
    """
    opened = Manifest.load(manifest)
    base = base_of(spec, manifest=opened.uri, out=out, overrides=overrides)
    tracking = prepare(base.tracking.uri, experiment=base.tracking.experiment)
    base = replace(base, tracking=replace(base.tracking, uri=tracking.uri))  # trials run in folders of their own
    store = Store.from_uri(out)
    about = _enter(spec, base, opened, store)
    attempt = attempts.begin_attempt(store)
    run = _open_run(spec, base, opened, store)
    try:
        search = _prepare(spec, base, store, run, attempt=attempt, about=about)
        with contextlib.ExitStack() as stack:
            if search.has_work:  # else there is nothing to start Ray for
                cpus = spec.trial.workers * spec.trial.cpus
                stack.enter_context(ray_session(num_cpus=cpus, has_dashboard=spec.trial.workers > 1))
            run_search(search)
            result = finish_search(search, opened)
    except attempts.TakenOverError:
        raise
    except BaseException as error:
        _close(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    _close(run, "FINISHED")
    return {"run_id": run.run_id, "digest": opened.digest, **result}


def _close(run: Run, status: Status) -> None:
    try:
        with store_errors(run.uri):
            run.finish(status)
    except StoreError as error:  # how the search ended matters more
        entry.LOGGER.warning("the run in MLflow stays open: %s", error)


def _prepare(
    spec: SearchConfig, base: ExperimentConfig, store: Store, run: Run, *, attempt: str, about: dict[str, Any]
) -> Search:
    space = space_of(spec, base)
    proposer = searcher_of(spec, space)
    if proposer.num_left_out:
        entry.LOGGER.warning("the configuration refuses %d points of the grid: left out", proposer.num_left_out)
    journal = Journal(
        store=store,
        patience_s=base.train.store_patience_s,
        guard=lambda: attempts.check_current(store, attempt),
    )
    journal.load()
    gpus = spec.trial.gpus * spec.trial.workers
    clock = Clock(spec.budget, journal, gpus_per_trial=gpus, seconds=float(about.pop("seconds", 0.0)))
    search = Search(
        spec=spec,
        base=base,
        space=space,
        proposer=proposer,
        out=store,
        run=run,
        journal=journal,
        clock=clock,
        about=about,
    )
    search.save()
    return search


def _enter(spec: SearchConfig, base: ExperimentConfig, manifest: Manifest, store: Store) -> dict[str, Any]:
    """Return what the folder says about its search, or is going to say.

    Raises:
        ConfigError: It holds another search; names what differs.
    """
    about: dict[str, Any] = {"spec": to_plain(spec), "base": to_plain(base), "manifest_digest": manifest.digest}
    if not store.exists(SEARCH_FILE):
        return about
    known = json.loads(store.read_bytes(SEARCH_FILE))
    then, now = (
        {**dotted_values(content["spec"]), **dotted_values(content["base"], "base.")} for content in (known, about)
    )
    free = tuple(f"base.{key}" for key in FREE_KEYS)
    changed = [
        f"{key}={now.get(key)!r} (was {then.get(key)!r})"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(_FREE) and key not in free
    ]
    if known["manifest_digest"] != manifest.digest:
        changed.append(f"manifest {manifest.digest[:16]} (was {known['manifest_digest'][:16]})")
    if changed:
        raise ConfigError(f"--out {store.uri()}: another search was begun here: {', '.join(changed)}; name another")
    return {**about, "seconds": known.get("seconds", 0.0)}


def _open_run(spec: SearchConfig, base: ExperimentConfig, manifest: Manifest, store: Store) -> Run:
    tracking = prepare(base.tracking.uri, experiment=base.tracking.experiment)
    run = open_run(
        tracking,
        name=f"search-{spec.name}",
        identity=store.uri(),
        config={"search": to_plain(spec), "base": to_plain(base)},
        commit=code_commit(),
        tags={"manifest_digest": manifest.digest},
    )
    run.log_dataset(
        name=manifest.layout,
        digest=manifest.digest,
        source=manifest.uri,
        context="search",
        profile={"pairs": manifest.splits},
    )
    return run


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="town", help="YAML file, or a name in jobs/searches (default: town)")
    parser.add_argument(
        "--out", required=True, help="folder or URI for the trials, the report and the best configuration"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--manifest", help="train on these pairs instead of a town")
    data.add_argument("--pairs", type=int, default=800, help="pairs of the town, train and val together (default: 800)")
    parser.add_argument("--town-seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("--trials", type=int, help="so many trials instead of the specification's")
    parser.add_argument("--hours", type=float, help="at most so many hours instead of the specification's")
    parser.add_argument("--max-concurrent", type=int, help="so many trials at a time instead of the specification's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the base: train.num_epochs=4")


def _changed(spec: SearchConfig, arguments: argparse.Namespace) -> SearchConfig:
    plain = to_plain(spec)
    for section, key, value in (
        ("budget", "trials", arguments.trials),
        ("budget", "hours", arguments.hours),
        ("trial", "max_concurrent", arguments.max_concurrent),
    ):
        if value is not None:
            plain[section][key] = value
    return parse(SearchConfig, plain)


def _checked(arguments: argparse.Namespace) -> tuple[SearchConfig, ExperimentConfig]:
    """Return specification and base, before the first pair is rendered."""
    spec = _changed(load_search(arguments.spec), arguments)
    manifest = arguments.manifest or "unknown"
    base = base_of(spec, manifest=manifest, out=_place(arguments.out), overrides=arguments.overrides)
    space_of(spec, base)
    return spec, base


def _place(out: str) -> str:
    return out if "://" in out else str(Path(out).absolute())


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    spec, base = _checked(arguments)
    resolved = {"search": to_plain(spec), "base": to_plain(base), "town": None, "out": arguments.out}
    if not arguments.manifest:
        resolved["town"] = {"pairs": arguments.pairs, "seed": arguments.town_seed}
        del resolved["base"]["data"]["manifest"]  # the town's, which is not there yet
    return resolved


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    spec, _ = _checked(arguments)
    out = _place(arguments.out)
    if arguments.manifest is None and "://" in out:
        raise ConfigError(f"--out {out}: a town is made in a local folder; give --manifest, or a local --out")
    runner = OnRay(session=partial(ray_session, has_dashboard=False))
    manifest = arguments.manifest or make_town(Path(out), arguments.pairs, arguments.town_seed, runner)
    return tune(spec, manifest=manifest, out=out, overrides=arguments.overrides)


JOB = entry.Job(
    name="tune",
    summary="Search over configurations: trials at a time on Ray, bad ones stopped early, the best one as a file.",
    example="cvft tune --spec town --pairs 800 --out search",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
