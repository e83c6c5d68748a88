"""The configuration of an experiment: a YAML file, dotted overrides, nothing else.

    python -m jobs.train --config town data.manifest=... train.loss.gamma=12

A file states what differs from the defaults (the paper's). `load` resolves it; `to_plain` of the result is stored with
the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from cvft.augment import AugmentConfig
from cvft.config import LossConfig, ModelConfig, OptimizerConfig, Precision, PreprocessConfig
from cvft.configuration import parse, require
from cvft.errors import ConfigError
from jobs.node_labels import check_labels
from jobs.tracking_config import TrackingConfig
from pipeline.mining import SamplingConfig
from pipeline.schema import TRAIN, VAL

PRESETS = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from.

    Attributes:
        manifest: Path or URI of the store, whose newest manifest is taken, or of one of its manifests.
        train_split: Split to train on.
        eval_split: Split to evaluate on after an epoch.
        hit_distance_m: Also report recall with any reference nearer than so many metres as right (CVACT_test: 5); none
            does not.
        num_threads: Decoding threads in each worker.
        cache: Local folder for shards of a remote store; none is `$XDG_CACHE_HOME/cvft/shards`.
        cache_gb: Gigabytes (10^9 bytes) that this folder may hold, those used least recently go first; none is no
            limit.
        cold_start_window: Number of shards that the first epoch mixes at a time, so that it begins before all shards of
            a remote store are fetched; none mixes all pairs from the first epoch on. With `train.sampling.kind=hard`
            that epoch has no hard negatives.
        keep_pixels: Where decoded pixels of both splits stay, so that each pair is decoded once: `host` memory, that of
            the `device` that trains, or nowhere (`never`). Each worker keeps whole splits.
    """

    manifest: str
    train_split: str = TRAIN
    eval_split: str = VAL
    hit_distance_m: float | None = None
    num_threads: int = 2
    cache: str | None = None
    cache_gb: float | None = None
    cold_start_window: int | None = None
    keep_pixels: Literal["never", "host", "device"] = "never"

    def __post_init__(self) -> None:
        require(self.num_threads >= 1, f"num_threads: {self.num_threads} must be at least 1")
        limit, window, distance = self.cache_gb, self.cold_start_window, self.hit_distance_m
        require(distance is None or distance > 0, f"hit_distance_m: {distance} must be positive, or null for none")
        require(limit is None or limit > 0, f"cache_gb: {limit} must be positive, or null for no limit")
        require(window is None or window >= 1, f"cold_start_window: {window} must be at least 1, or null for none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the network is trained.

    Attributes:
        seed: Fixes the initial weights, the order of the pairs and the dropout.
        num_epochs: Passes over the training split.
        batch_size: Pairs in a global batch, over all workers; every pair is a negative for every other.
        chunk_size: Pairs that a worker holds in memory at a time; the same gradients for one more forward pass. Null
            means all of its pairs.
        precision: `bfloat16` trains the trunks in it; all else, and every evaluation, is float32.
        workers: Ray Train workers; 1 trains in this process, or on a node of the cluster that RAY_ADDRESS names. A list
            `[min, max]` is elastic: as many as the cluster has room for, fewer when nodes are lost and more when some
            are added.
        use_gpu: Give each worker a GPU.
        node_labels: Labels of the cluster's nodes that workers run on: `{ray.io/node-group: gpu}`.
        evaluate_every: Evaluate and save a checkpoint each so many epochs, and after the last one.
        early_stopping: Stop after so many evaluations in a row without a better R@1; null trains all epochs.
        checkpoint_every_steps: Save a checkpoint each so many steps as well; null saves only with evaluations.
        keep_last: Number of checkpoints that are kept besides the best by R@1.
        store_patience_s: Time that a store may be away before the training gives up. While it is that of the
            checkpoints, the training goes on; while it is that of a shard that is needed now, it waits.
        max_failures: Times that a lost worker or node restarts the workers from the last checkpoint. Nodes that say
            beforehand that they go do not count.
        collective_timeout_s: Time that a worker waits for the others, one of which may hang or be out of its reach;
            then all start again from the last checkpoint. Must exceed `store_patience_s`.
        preemption_check_every_steps: Ask whether a node has said that it goes each so many steps; the workers then save
            at that very step and start again on the other nodes.
        resize_after_s: Elastic training grows when there has been room for another worker for so long.
        activation_checkpointing: Keep less of the trunks for the backward pass and compute it again there: the same
            gradients in less memory, for about one more forward pass.
        compile: Compile the trunks by torch.compile; results agree to rounding.
        ema_decay: Evaluate and save the exponential moving average of the weights over the steps, see `cvft.averaging`;
            0.999 averages over about a thousand. Null takes the weights themselves.
        loss: See `LossConfig`.
        optimizer: See `OptimizerConfig`.
        augment: See `AugmentConfig`.
        sampling: See `SamplingConfig`.
    """

    seed: int = 0
    num_epochs: int = 100
    batch_size: int = 32
    chunk_size: int | None = None
    precision: Precision = "float32"
    workers: int | tuple[int, int] = 2
    use_gpu: bool = False
    node_labels: dict[str, str] = field(default_factory=dict)
    evaluate_every: int = 1
    early_stopping: int | None = None
    checkpoint_every_steps: int | None = None
    keep_last: int = 2
    store_patience_s: float = 600.0
    max_failures: int = 3
    collective_timeout_s: int = 1800
    preemption_check_every_steps: int = 10
    resize_after_s: float = 60.0
    activation_checkpointing: bool = False
    compile: bool = False
    ema_decay: float | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} must not be negative")
        for name in ("num_epochs", "evaluate_every", "keep_last", "preemption_check_every_steps"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("early_stopping", "checkpoint_every_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} must be at least 1, or null for never")
        require(self.store_patience_s >= 0, f"store_patience_s: {self.store_patience_s} must not be negative")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, f"ema_decay: {decay} must lie in (0, 1), or null for no average")
        require(self.batch_size >= 2, f"batch_size: {self.batch_size} must be at least 2; a pair needs a negative")
        chunk_size = self.chunk_size
        require(chunk_size is None or chunk_size >= 1, f"chunk_size: {chunk_size} must be at least 1, or null for all")
        check_labels(self.node_labels, "node_labels")
        self._check_workers()

    def _check_workers(self) -> None:
        least, most, size = self.min_workers, self.max_workers, self.batch_size
        require(least >= 1, f"workers: {least} must be at least 1")
        is_range = isinstance(self.workers, int) or least < most
        require(is_range, f"workers: [{least}, {most}] must rise from the least to the most workers")
        require(size >= most, f"batch_size: {size} leaves some of train.workers={most} without a pair")
        require(self.max_failures >= 0, f"max_failures: {self.max_failures} must not be negative")
        waits, patience = self.collective_timeout_s, self.store_patience_s
        is_enough = most == 1 or waits > patience  # one may wait for the store so long, and the others for it
        require(is_enough, f"collective_timeout_s: {waits} must exceed store_patience_s={patience:g}")
        require(self.resize_after_s >= 0, f"resize_after_s: {self.resize_after_s} must not be negative")

    @property
    def min_workers(self) -> int:
        """The least workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers to train with."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that decides an experiment's outcome.

    Attributes:
        name: Names the run; the same name continues it.
        output: Folder or URI under which `<name>/checkpoints` is written.
        data: See `DataConfig`.
        preprocess: See `PreprocessConfig`.
        model: See `ModelConfig`.
        train: See `TrainConfig`.
        tracking: See `TrackingConfig`.
    """

    name: str
    data: DataConfig
    output: str = "runs"
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        is_safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name)
        require(bool(is_safe), f"name: {self.name!r} must be letters, digits, '.', '_' and '-': it names a folder")
        self.train.augment.require_fits(self.preprocess)

    @property
    def folder(self) -> str:
        """URI of the run's folder."""
        return f"{self.output.rstrip('/')}/{self.name}"

    def located(self) -> ExperimentConfig:
        """Return the same with absolute paths: Ray's workers run in folders of their own."""
        weights, cache = self.model.backbone.weights, self.data.cache
        backbone = replace(self.model.backbone, weights=weights and _absolute(weights))
        data = replace(self.data, manifest=_absolute(self.data.manifest), cache=cache and _absolute(cache))
        model = replace(self.model, backbone=backbone)
        return replace(self, output=_absolute(self.output), data=data, model=model)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).expanduser().absolute())


def load(file: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Resolve an experiment's configuration.

    Args:
        file: A YAML file, or the name of a preset in `jobs/configs/`.
        overrides: `dotted.key=value` strings; values are read as YAML.

    Raises:
        ConfigError: The file cannot be read, or a key or value is refused.
    """
    return parse(ExperimentConfig, read_overrides(overrides, read_yaml(_find(file))))


def read_overrides(overrides: Iterable[str], onto: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read `dotted.key=value` strings into nested plain data, over what is there.

    Raises:
        ConfigError: A string is no override, or its value is not YAML.
    """
    data = {} if onto is None else onto
    for override in overrides:
        _apply(data, override)
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping; `1e-5` is a number and a key given twice is an error.

    Raises:
        ConfigError: The file is missing, is not YAML, or its top is no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, got {data!r}")
    return data


def read_specification(file: str, *, folder: Path, what: str) -> dict[str, Any]:
    """Read what `--spec` names: a YAML file, or the name of one in the folder.

    Args:
        file: As it was given.
        folder: Where the named ones are.
        what: The word for one, for the message.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        path = folder / f"{file}.yaml"
        if not path.exists():
            known = ", ".join(sorted(item.stem for item in folder.glob("*.yaml")))
            raise ConfigError(f"--spec {file}: no such file, and no such {what}; there are: {known}")
    return read_yaml(path)


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader with YAML 1.2's numbers (`1e-5` has no dot) that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def preset_names() -> list[str]:
    """List the presets in `jobs/configs/`."""
    return sorted(item.stem for item in PRESETS.glob("*.yaml"))


def _find(file: str) -> Path:
    path = Path(file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    preset = PRESETS / f"{file}.yaml"
    if not preset.exists():
        raise ConfigError(f"--config {file}: no such file, and no such preset; presets: {', '.join(preset_names())}")
    return preset


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override is written dotted.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        child = data.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} holds the value {child!r}, not a section")
        data = child
    try:
        data[leaf] = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: cannot read the value {text!r}: {' '.join(str(error).split())}") from error
