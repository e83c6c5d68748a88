"""Versions of a registered model, measured on the same pairs in the same way."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cvft.configuration import dotted_values, to_plain
from cvft.errors import CheckpointError
from jobs.entry import Progress
from pipeline.bootstrap import IntArray
from pipeline.evaluation import Evaluation, evaluate_checkpoint
from pipeline.latency import device_text, ground_times_ms, median_ratio
from pipeline.manifest import Manifest
from pipeline.model_facts import Measurement, percent
from pipeline.promotion import Measured, Verdict
from pipeline.tracking.versions import Registry, Version, checkpoint_of, size_bytes


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What models are measured on, and how.

    Attributes:
        manifest: Path or URI of the store, or of one of its manifests; the one that it names when measuring begins is
            the one for all.
        split: Whose ground images are the queries.
        train_split: Split that leaks are counted against.
        hit_distance_m: Count any reference nearer than this as right; none counts the query's own alone.
        batch_size: Pairs embedded at a time.
        num_threads: Decoding threads.
    """

    manifest: str
    split: str = "val"
    train_split: str = "train"
    hit_distance_m: float | None = None
    batch_size: int = 32
    num_threads: int = 2


@dataclass(frozen=True, kw_only=True)
class MeasuredVersion:
    """A version as it was measured.

    Attributes:
        version: Which one it is.
        evaluation: Its ranks.
        measured: What a gate looks at.
        measurement: What people look at.
    """

    version: Version
    evaluation: Evaluation
    measured: Measured
    measurement: Measurement

    @property
    def location(self) -> IntArray | None:
        """int64 [N], equal for queries that share their reference; None if every query has its own."""
        location = self.evaluation.queries.location
        return None if location is None else location.numpy()

    def numbers(self) -> dict[str, float | None]:
        """Return everything measured, as plain JSON."""
        costs = {"latency_ms": self.measured.latency_ms, "model_mb": self.measured.model_mb}
        return {**self.measurement.metrics, **costs}


def measure_versions(
    registry: Registry, candidate: Version, champion: Version | None, protocol: Protocol, folder: Path
) -> tuple[MeasuredVersion, MeasuredVersion | None]:
    """Measure a candidate and the champion: one manifest, one protocol, one device, each with its own preprocessing.

    Args:
        registry: The registered model.
        candidate: A version of it.
        champion: Another one, which is read first: without it nothing else is worth doing. None if there is none; then
            the candidate is judged by exact pairs, of which chance is known.
        protocol: What is measured on what.
        folder: Their files are copied into it.

    Raises:
        CheckpointError: The files of a version are gone or damaged.
        CvftError: The data or MLflow cannot be used.
    """
    manifest = Manifest.load(protocol.manifest)
    versions = [candidate] if champion is None else [champion, candidate]
    files = [_fetch(registry, version, folder, is_champion=version is champion) for version in versions]
    evaluations = [
        evaluate_checkpoint(
            str(checkpoint_of(path)),
            manifest.uri,
            split=protocol.split,
            train_split=protocol.train_split,
            hit_distance_m=protocol.hit_distance_m,
            batch_size=protocol.batch_size,
            num_threads=protocol.num_threads,
            progress=Progress(f"version {version.version}"),
        )
        for version, path in zip(versions, files, strict=True)
    ]
    times_ms = ground_times_ms([(found.model, found.preprocess) for found in evaluations], evaluations[0].device)
    measured = [
        _measured(
            version,
            evaluation,
            times_ms=own_ms,
            champion_ms=None if champion is None else times_ms[0],
            model_mb=size_bytes(path) / 1e6,
            protocol=protocol,
        )
        for version, evaluation, own_ms, path in zip(versions, evaluations, times_ms, files, strict=True)
    ]
    return measured[-1], None if champion is None else measured[0]


def _fetch(registry: Registry, version: Version, folder: Path, *, is_champion: bool) -> Path:
    try:
        return registry.fetch(version, folder / str(version.version))
    except CheckpointError as error:
        remedy = "; `cvft rollback` goes back to the champion before it" if is_champion else ""
        raise CheckpointError(f"{'the champion, ' if is_champion else ''}{error}{remedy}") from error


def _measured(
    version: Version,
    evaluation: Evaluation,
    *,
    times_ms: list[float],
    champion_ms: list[float] | None,
    model_mb: float,
    protocol: Protocol,
) -> MeasuredVersion:
    judged = (None if champion_ms is None else evaluation.within) or evaluation.result
    latency_ms = statistics.median(times_ms)
    is_leaked = evaluation.queries.leaks.is_leaked
    return MeasuredVersion(
        version=version,
        evaluation=evaluation,
        measured=Measured(
            hits=(judged.match_rank < 1).numpy(),
            is_deleaked=None if is_leaked is None else ~is_leaked,
            chance=evaluation.result.chance_at(1),
            latency_ms=latency_ms,
            model_mb=model_mb,
            latency_ratio=None if champion_ms is None else median_ratio(times_ms, champion_ms),
        ),
        measurement=Measurement(
            metrics=evaluation.metrics(),
            split=protocol.split,
            digest=evaluation.dataset.manifest.digest,
            day=datetime.now(UTC).date().isoformat(),
            hit_distance_m=protocol.hit_distance_m,
            latency_ms=latency_ms,
            device=device_text(evaluation.device),
            model_mb=model_mb,
        ),
    )


def notes_on(candidate: MeasuredVersion, champion: MeasuredVersion | None) -> list[str]:
    """Say what a reader of the comparison should know: other input sizes, other training data."""
    notes = []
    for model in filter(None, (candidate, champion)):
        trained_on = model.evaluation.info.manifest_digest
        if trained_on != model.measurement.digest:
            where = f"on manifest {trained_on[:16]}" if trained_on else "on data that nobody recorded"
            notes.append(
                f"version {model.version.version} was trained {where}: whether queries stand in that was not looked at"
            )
    if champion is not None:
        ours, theirs = (dotted_values(to_plain(model.evaluation.preprocess)) for model in (candidate, champion))
        changed = [f"{key} {theirs[key]} -> {ours[key]}" for key in ours if ours[key] != theirs[key]]
        if changed:
            notes.append(f"each model had its own preprocessing of the same images: {', '.join(changed)}")
    leaks = candidate.evaluation.queries.leaks
    if leaks.unknown_because:
        notes.append(f"recall without leaks is unknown: {leaks.unknown_because}")
    return notes


def comparison_table(candidate: MeasuredVersion, champion: MeasuredVersion | None, verdict: Verdict) -> str:
    """Return the numbers of both as a table for people, and the verdict."""
    end = candidate.measurement.judged_suffix
    names = {
        "R@1": f"recall_at_1{end}",
        "R@1 de-leaked": "recall_at_1_deleaked",
        "R@5": f"recall_at_5{end}",
        "R@10": f"recall_at_10{end}",
    }
    columns = [candidate] if champion is None else [candidate, champion]
    titles = [f"version {model.version.version}" for model in columns]
    lines = [f"  {'':16}" + "".join(f"{title:>14}" for title in titles)]
    for title, key in names.items():
        lines.append(
            f"  {title:16}" + "".join(f"{percent(model.measurement.metrics.get(key)):>14}" for model in columns)
        )
    lines.append(f"  {'ground image':16}" + "".join(f"{model.measured.latency_ms:>11.1f} ms" for model in columns))
    lines.append(f"  {'files':16}" + "".join(f"{model.measured.model_mb:>11.1f} MB" for model in columns))
    marks = [f"  [{'x' if item.holds else ' '}] {item.text}" for item in verdict.conditions]
    return "\n".join([*lines, "", *marks, *(f"  note: {note}" for note in verdict.notes)])
