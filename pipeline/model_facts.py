"""What is known of a model besides its weights, and the few lines that a registry shows of it.

All of it comes from the checkpoint, from the run that trained it and from a measurement; what none of them says is left
out, or said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cvft.checkpoint import CheckpointInfo
from pipeline.promotion import Verdict, gain_text

LOSSES = {"soft_margin_triplet": "soft-margin triplet loss", "info_nce": "InfoNCE"}
HEADS = {
    "cvft": "feature transport (CVFT)",
    "conv": "a convolution, without transport",
    "global_pool": "global max-pooling",
}
DIGEST_CHARACTERS = 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    Attributes:
        info: What its checkpoint says.
        descriptor_dim: Numbers in a descriptor.
        num_parameters: Numbers in the network.
        config: The resolved configuration of its training; empty if it is not known.
        layout: Raw layout of the data; empty if it is not known.
        num_pairs: Pairs by split of the data trained on; empty if they are not known.
        commit: Commit of the code that trained it.
        run_id: Its run in MLflow.
        data_licence: What somebody said of the data's licence; empty if nobody did.
    """

    info: CheckpointInfo
    descriptor_dim: int
    num_parameters: int
    config: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    num_pairs: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None
    run_id: str = ""
    data_licence: str = ""

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a value of the training's configuration by its dotted key; the default where it is not known."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of a model.

    Attributes:
        metrics: Recalls by the names of `pipeline.evaluation.Ranks.metrics`.
        split: The split whose ground images are the queries.
        digest: Digest of its manifest.
        day: When, as a date.
        hit_distance_m: A reference nearer than this counted as right, too; none if only the query's own did.
        latency_ms: Median time of embedding one ground image; none if it was not measured.
        device: What that was measured on.
        model_mb: Size of the model's files in 10^6 bytes; none if it was not measured.
    """

    metrics: Mapping[str, float | None]
    split: str
    digest: str
    day: str = ""
    hit_distance_m: float | None = None
    latency_ms: float | None = None
    device: str = ""
    model_mb: float | None = None

    def recall(self, k: int | str, suffix: str = "") -> float | None:
        """Return a recall; None if it was not measured."""
        return self.metrics.get(f"recall_at_{k}{suffix}")

    @property
    def judged_suffix(self) -> str:
        """End of the names of the recalls that a promotion is decided by."""
        return "" if self.hit_distance_m is None else f"_within_{self.hit_distance_m:.12g}m"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a model stood beside the champion of its time.

    Attributes:
        verdict: What the gate said.
        alias: The alias that it was about.
        champion: The version that it was compared with; none if there was none.
        gate: Name of the gate.
        day: When, as a date.
        overtaken: What became of the alias meanwhile, where another promotion was faster; empty otherwise.
    """

    verdict: Verdict
    alias: str
    champion: int | None
    gate: str
    day: str
    overtaken: str = ""

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        if self.overtaken:
            return f"Not promoted on {self.day}: {self.overtaken}."
        found = self.verdict.difference
        other = "a guess" if self.champion is None else f"version {self.champion}"
        if self.verdict.status == "promoted":
            place = f"the first {self.alias}" if self.champion is None else f"{self.alias} in place of {other}"
            doubt = ", which the gate lets pass though it is no better" if found.is_tie or found.gain <= 0 else ""
            return f"Promoted on {self.day}: {place}. R@1 {gain_text(found)} over {other}{doubt}."
        if self.verdict.status == "tie":
            return f"Not promoted on {self.day}: a tie with {other}. R@1 {gain_text(found)}."
        return f"Refused on {self.day}: {self.verdict.reason}."


def describe(origin: Origin, measurement: Measurement | None, comparison: Comparison | None) -> str:
    """Return what a registry shows of a version, in Markdown: outcome, recalls, data, recipe, costs, code."""
    lines = [
        f"**{comparison.headline if comparison else 'A candidate: nothing has compared it with a champion yet.'}**"
    ]
    items = {
        "Recall": recall_text(measurement) if measurement else "not measured",
        "Data": data_text(origin),
        "Recipe": recipe_text(origin),
        "Costs": costs_text(origin, measurement),
        "Code": code_text(origin),
    }
    lines += ["", *(f"- {name}: {text}." for name, text in items.items())]
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Return a recall for people."""
    return "unknown" if value is None else f"{100 * value:.2f} %"


def recall_text(found: Measurement) -> str:
    """Say the recalls, what they were measured on, and what a guess would have."""
    end = found.judged_suffix
    recalls = ", ".join(f"R@{k} {percent(found.recall(k, end))}" for k in (1, 5, 10))
    within = f" within {found.hit_distance_m:g} m" if found.hit_distance_m is not None else ""
    queries = found.metrics.get("num_queries")
    place = f"{queries or 0:,.0f} queries of split {found.split}, manifest {found.digest[:DIGEST_CHARACTERS]}"
    text = f"{recalls}{within} on {place}; a guess has R@1 {percent(found.metrics.get('chance'))}"
    return f"{text}; without leaked queries R@1 {percent(found.recall(1, '_deleaked'))}"


def data_text(origin: Origin) -> str:
    """Say what it was trained on."""
    digest = origin.info.manifest_digest
    if digest is None:
        return "unknown: imported weights, or trained elsewhere"
    split = origin.setting("data.train_split", "train")
    count = origin.num_pairs.get(split)
    pairs = f"{count:,} pairs of split {split}" if count else f"split {split}"
    layout = f" in layout {origin.layout}" if origin.layout else ""
    return f"{pairs}{layout}, manifest {digest[:DIGEST_CHARACTERS]}"


def recipe_text(origin: Origin) -> str:
    """Say how it was trained, as the configuration has it."""
    train = origin.setting("train")
    if train is None:
        return "unknown"
    loss, optimizer = train["loss"], train["optimizer"]
    shape = f"gamma {loss['gamma']:g}" if loss["kind"] == "soft_margin_triplet" else f"from {loss['temperature']:g}"
    schedule = "" if optimizer["schedule"] == "constant" else f", {optimizer['schedule']} schedule"
    decay = f", weight decay {optimizer['weight_decay']:g}" if optimizer["weight_decay"] else ""
    changed = [
        key for key, value in train.get("augment", {}).items() if value and key not in ("blur_sigma_px", "fov_deg")
    ]
    hard = train.get("sampling", {}).get("kind") == "hard"
    parts = [
        f"{origin.info.epoch} of {train['num_epochs']} epochs in batches of {train['batch_size']} pairs",
        f"{LOSSES.get(loss['kind'], loss['kind'])} ({shape})",
        f"{optimizer['kind']} at {optimizer['learning_rate']:g}{schedule}{decay}",
        f"{'hard' if hard else 'random'} negatives",
        f"augmentation: {', '.join(changed) if changed else 'none'}",
    ]
    return "; ".join(parts)


def costs_text(origin: Origin, found: Measurement | None) -> str:
    """Say how large and how slow it is."""
    parts = [
        f"{origin.num_parameters:,} parameters",
        f"descriptors of {origin.descriptor_dim:,} numbers",
    ]
    if found is not None and found.model_mb is not None:
        parts.append(f"{found.model_mb:.1f} MB of files")
    if found is not None and found.latency_ms is not None:
        parts.append(f"{found.latency_ms:.1f} ms for one ground image ({found.device}, median)")
    return ", ".join(parts)


def code_text(origin: Origin) -> str:
    """Say which code and which run it comes from."""
    run = f", MLflow run {origin.run_id}" if origin.run_id else ""
    return f"commit {origin.commit or 'unknown'}{run}"
