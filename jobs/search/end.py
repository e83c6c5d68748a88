"""What a search leaves behind: the best configuration as a file for `train`, the numbers, a report, how sure it is."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cvft.configuration import to_plain
from jobs.ablation import TrialSpec, run_trials
from jobs.cluster import ray_session
from jobs.config import ExperimentConfig
from jobs.entry import LOGGER
from jobs.search.journal import TrialRecord
from jobs.search.plan import Search
from jobs.search.scheduler import rungs
from jobs.search.trial import read_run
from pipeline.ablation import Trial, VariantSummary, summarise
from pipeline.manifest import Manifest
from pipeline.ray_tasks import OnRay
from pipeline.report.search_page import write_search_report
from pipeline.search import SearchResult, Status
from pipeline.tracking.server import store_errors

BEST_FILE = "best.yaml"
NUMBERS_FILE = "search.json"
REPORT = "report"
DEFAULT = "default"
_IN_WORDS = {
    "within the noise": "a tie: the difference is within the noise",
    "better": "better than the default",
    "worse": "worse than the default",
    "one seed tells nothing": "one seed tells nothing",
}


def finish_search(search: Search, manifest: Manifest) -> dict[str, Any]:
    """Choose the winner, compare it with the base, write the files and tell MLflow; the search's JSON result.

    Raises:
        CvftError: A store cannot be used, or a training of the comparison failed.
    """
    records = list(search.journal.in_order())
    best = winner(records, search.spec.metric)
    config = None if best is None else best_config(search, best)
    comparison = () if best is None or config is None else _compare(search, best, config)
    result = _result(search, manifest, best, comparison)
    verdict = in_words(comparison)
    files = {NUMBERS_FILE: json.dumps(dataclasses.asdict(result), indent=2) + "\n"}
    if best is not None and config is not None:
        files[BEST_FILE] = best_text(search, best, config, verdict=verdict)
    for name, text in files.items():
        search.out.write_bytes(name, text.encode())
    counts = Counter(record.status for record in records)
    with tempfile.TemporaryDirectory() as folder:
        drawn = write_search_report(result, Path(folder))
        for path in (drawn.html, *drawn.pngs):
            search.out.write_bytes(f"{REPORT}/{path.relative_to(folder)}", path.read_bytes())
        with store_errors(search.run.uri):
            _tell_mlflow(search, best, counts, verdict=verdict)
            for name, text in files.items():
                search.run.log_text(text, f"search/{name}")
            search.run.log_artifacts([drawn.html], artifact_path="search")
            search.run.log_artifacts(drawn.pngs, artifact_path="search/figures")
        report = search.out.uri(f"{REPORT}/{drawn.html.name}")
    _say(search, best, verdict=verdict)
    value = None if best is None else best.best(search.spec.metric)
    return {
        "best": None if best is None else best.name,
        "values": {} if best is None else dict(best.values),
        search.spec.metric: value,
        "config": None if best is None else search.out.uri(BEST_FILE),
        "numbers": search.out.uri(NUMBERS_FILE),
        "report": report,
        "trials": {status: counts[status] for status in ("finished", "stopped", "failed", "running") if counts[status]},
        "verdict": verdict,
        "used_up": search.clock.used_up,
        "comparison": [summary.plain() for summary in comparison],
    }


def winner(records: list[TrialRecord], metric: str) -> TrialRecord | None:
    """Return the finished trial with the highest metric, the first of equals; another one only where none finished."""
    known = [record for record in records if record.best(metric) is not None]
    finished = [record for record in known if record.status == "finished"]
    return max(finished or known, key=lambda record: (record.best(metric) or 0.0, -record.number), default=None)


def best_config(search: Search, best: TrialRecord) -> ExperimentConfig:
    """Return the winner's configuration under a name of its own."""
    return replace(search.config(best), name=f"{search.spec.name}-best", output=search.out.uri("best"))


def best_text(search: Search, best: TrialRecord, config: ExperimentConfig, *, verdict: str) -> str:
    """Return the winner's configuration as a file that `train` takes."""
    value, place = best.best(search.spec.metric), search.out.uri(BEST_FILE)
    lines = [
        f"Best of the search {search.spec.name}: {best.name} ({best.status}) reached {search.spec.metric} {value!r}",
        f"after at most {best.epoch} epochs. Beside the default: {verdict}.",
        f"Train it: cvft train --config {place}",
    ]
    if not config.train.use_gpu:
        lines.append(
            f"The trial computed with OMP_NUM_THREADS={search.spec.trial.threads}: the same repeats its numbers."
        )
    if len(best.generations) > 1:
        lines.append("Its values changed while it trained (population-based training); these are the last ones.")
    header = "".join(f"# {line}\n" for line in lines)
    return header + yaml.safe_dump(to_plain(config), sort_keys=False)


def in_words(comparison: tuple[VariantSummary, ...]) -> str:
    """Say what the comparison with the default came to."""
    return _IN_WORDS[comparison[-1].verdict] if comparison else "not compared (final.seeds is empty)"


def _compare(search: Search, best: TrialRecord, config: ExperimentConfig) -> tuple[VariantSummary, ...]:
    """Train the base and the winner with seeds that the search has not used."""
    seeds, trial = search.spec.final.seeds, search.spec.trial
    if not seeds or search.clock.used_up:
        return ()
    LOGGER.info("comparing %s with the default: %d trainings with new seeds", best.name, 2 * len(seeds))
    trials = [
        TrialSpec(
            variant=variant,
            seed=seed,
            config=to_plain(_with_seed(search, what, variant=variant, seed=seed)),
            num_threads=trial.threads,
        )
        for seed in seeds
        for variant, what in ((DEFAULT, search.base), (best.name, config))
    ]
    session = partial(ray_session, has_dashboard=False)
    done: list[Trial] = run_trials(trials, OnRay(session=session, num_cpus=trial.cpus, num_gpus=trial.gpus))
    return tuple(summarise(done, reference=DEFAULT, metric=search.spec.metric))


def _with_seed(search: Search, config: ExperimentConfig, *, variant: str, seed: int) -> ExperimentConfig:
    train = replace(config.train, seed=seed, workers=1)
    return replace(config, name=f"{variant}-seed-{seed}", output=search.out.uri("final"), train=train)


def _result(
    search: Search, manifest: Manifest, best: TrialRecord | None, comparison: tuple[VariantSummary, ...]
) -> SearchResult:
    spec, records = search.spec, list(search.journal.in_order())
    runs = {record.number: read_run(search.journal.folder(record.number)) for record in records}
    splits = ", ".join(f"{number:,} {split}" for split, number in manifest.splits.items())
    budget = ", ".join(f"{key} {value:g}" for key, value in to_plain(spec.budget).items() if value is not None)
    about = (
        f"Search {spec.name} on {manifest.layout} pairs ({splits}), manifest {manifest.digest[:16]}: searcher "
        f"{spec.searcher.kind}, scheduler {spec.scheduler.kind}, budget {budget or 'the whole grid'}, "
        f"{search.base.train.num_epochs} epochs; seed {search.base.train.seed}."
    )
    chances = [metrics["chance"] for record in records for metrics in record.evaluations[:1]]
    return SearchResult(
        name=spec.name,
        about=about,
        metric=spec.metric,
        parameters=search.space.report(),
        trials=tuple(record.report(run_id=run.run_id if (run := runs[record.number]) else "") for record in records),
        best="" if best is None else best.name,
        comparison=comparison,
        chance=chances[0] if chances and spec.metric == "recall_at_1" else None,
        rungs=rungs(spec.scheduler, search.base.train.num_epochs),
    )


def _tell_mlflow(search: Search, best: TrialRecord | None, counts: Counter[Status], *, verdict: str) -> None:
    search.run.log_metrics({f"trials.{status}": float(number) for status, number in counts.items()}, step=0)
    tags = {"search.verdict": verdict}
    if best is not None:
        tags |= {"search.best": best.name, **{f"best.{key}": str(value) for key, value in best.values.items()}}
        search.run.log_metrics({f"best.{search.spec.metric}": best.best(search.spec.metric) or 0.0}, step=0)
    search.run.set_tags(tags)


def _say(search: Search, best: TrialRecord | None, *, verdict: str) -> None:
    cut = [
        f"{record.name} at epoch {record.epoch}" for record in search.journal.in_order() if record.status == "running"
    ]
    if search.clock.used_up:
        LOGGER.warning(
            "%s is used up: %s", search.clock.used_up, f"cut {', '.join(cut)}" if cut else "no trial was cut"
        )
    if best is None:
        LOGGER.warning("no trial has an evaluation: there is no best one")
    else:
        LOGGER.info("best: %s, %s; %s", best.name, search.out.uri(BEST_FILE), verdict)
