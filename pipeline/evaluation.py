"""A checkpoint measured on a split of a manifest, in one process: all its queries, and those that do not leak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvft.batch import Batch, prefetch
from cvft.checkpoint import CheckpointInfo, load_model, read_info
from cvft.config import PreprocessConfig
from cvft.configuration import parse, require, to_plain
from cvft.engine import Descriptors, embed
from cvft.errors import DataError
from cvft.model import CrossViewModel
from cvft.pair_retrieval import rank_pairs
from cvft.preprocess import Preprocess
from cvft.retrieval import RetrievalResult
from pipeline import sequential
from pipeline.cache import default_cache
from pipeline.checkpoints import fetch
from pipeline.dataset import PairDataset
from pipeline.leaks import Leaks, find_leaks
from pipeline.loader import Loader
from pipeline.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Queries:
    """The queries of a split besides their pixels: which share their reference, and which stand in training as well.

    Attributes:
        location: int64 [N], equal for pairs that share their reference; None if every pair has its own.
        leaks: The queries that share bytes or place with a training pair.
    """

    location: Tensor | None
    leaks: Leaks

    @classmethod
    def of_split(cls, manifest: Manifest, split: str, *, train_split: str) -> Queries:
        """Describe a split's queries.

        Raises:
            DataError: There is no such split.
        """
        names, code = np.unique(manifest.split(split)["location_id"].to_numpy(), return_inverse=True)
        return cls(
            location=None if len(names) == len(code) else torch.from_numpy(code),
            leaks=find_leaks(manifest.pairs, split, train_split=train_split),
        )

    def deleaked(self, result: RetrievalResult) -> RetrievalResult | None:
        """Return the result of the queries that do not leak, among all references; None if unknown or none is left."""
        if self.leaks.is_leaked is None or self.leaks.is_leaked.all():
            return None
        return result.of_queries(torch.from_numpy(~self.leaks.is_leaked))

    def metrics(self, result: RetrievalResult) -> dict[str, float | None]:
        """Return the result's metrics beside `recall_at_1_deleaked` and so on; None is what cannot be known."""
        kept = self.deleaked(result)
        deleaked = (kept or result).recalls("_deleaked")
        return {
            **result.metrics(),
            **(deleaked if kept else dict.fromkeys(deleaked)),
            "num_leaked_queries": self.leaks.num_leaked,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured and with what.

    Attributes:
        model: The network, on `device`.
        info: What the checkpoint says about itself.
        checkpoint: Local directory of the checkpoint.
        preprocess: How the network's input was made.
        dataset: The split's pairs.
        queries: Which queries leak.
        result: Ranks of all its queries: the exact pair is the true one.
        within: Ranks where any reference nearer than `hit_distance_m` is a true one as well; None if not asked for.
        hit_distance_m: That distance.
        device: Where the network is.
    """

    model: CrossViewModel
    info: CheckpointInfo
    checkpoint: Path
    preprocess: PreprocessConfig
    dataset: PairDataset
    queries: Queries
    result: RetrievalResult
    within: RetrievalResult | None
    hit_distance_m: float | None
    device: torch.device

    def metrics(self) -> dict[str, float | None]:
        """Return the recalls by exact pair, full and de-leaked, and those by distance: `recall_at_1_within_5m`."""
        by_distance = self.within.recalls(f"_within_{self.hit_distance_m:.12g}m") if self.within else {}
        return {**self.queries.metrics(self.result), **by_distance}


def evaluate_checkpoint(
    checkpoint: str,
    manifest: str,
    *,
    split: str = "val",
    train_split: str = "train",
    hit_distance_m: float | None = None,
    preprocess_changes: dict[str, Any] | None = None,
    allow_other_preprocess: bool = False,
    batch_size: int = 32,
    num_threads: int = 2,
    cache: Path | None = None,
) -> Evaluation:
    """Embed a split with a checkpoint's network and rank every ground image's own aerial image.

    Args:
        checkpoint: Path or URI of a checkpoint.
        manifest: Path or URI of a manifest.
        split: Which pairs.
        train_split: Split that leaks are counted against.
        hit_distance_m: Also rank with every reference nearer than this as a true one (CVACT_test: 5 m).
        preprocess_changes: Fields of the checkpoint's `PreprocessConfig` to change; refused unless allowed.
        allow_other_preprocess: Accept input prepared otherwise than in training.
        batch_size: Pairs embedded at a time.
        num_threads: Decoding threads.
        cache: Folder beside which copies of remote checkpoints are kept; shards of a remote store are not copied.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or trained with other preprocessing.
        ConfigError: A changed field is unknown or refused, or the distance is not positive.
        DataError: There is no such split, no position to measure distances by, or an image cannot be decoded.
        ShardError: The manifest or a shard is missing or damaged.
        StoreError: A store cannot be reached.
    """
    require(hit_distance_m is None or hit_distance_m > 0, f"hit_distance_m: {hit_distance_m} must be positive")
    directory = fetch(checkpoint, cache=(cache or default_cache()).parent)
    trained_with = read_info(directory).preprocess
    changed = {**to_plain(trained_with), **(preprocess_changes or {})}
    preprocess = parse(PreprocessConfig, changed, prefix="preprocess")
    model, info = load_model(directory, preprocess=preprocess, allow_other_preprocess=allow_other_preprocess)
    dataset = PairDataset(Manifest.load(manifest), split, access="sparse")
    if hit_distance_m is not None and not np.isfinite(dataset.location_m).any():
        raise DataError(f"split {split!r}: no pair has a position, so nothing can be counted by distance")
    queries = Queries.of_split(dataset.manifest, split, train_split=train_split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    batches = _batches(dataset, preprocess=preprocess, batch_size=batch_size, num_threads=num_threads)
    found = embed(model, prefetch(batches, device), preprocess=Preprocess(preprocess), num_pairs=len(dataset))
    return Evaluation(
        model=model,
        info=info,
        checkpoint=directory,
        preprocess=preprocess,
        dataset=dataset,
        queries=queries,
        result=rank_pairs(found.ground, found.aerial, location=queries.location),
        within=_rank_by_distance(found, queries, hit_distance_m),
        hit_distance_m=hit_distance_m,
        device=device,
    )


def _batches(
    dataset: PairDataset, *, preprocess: PreprocessConfig, batch_size: int, num_threads: int
) -> Iterator[Batch]:
    """Read every pair once: from memory maps if the shards are here, else in one pass that keeps no copies."""
    options: dict[str, Any] = {"preprocess": preprocess, "batch_size": batch_size, "num_threads": num_threads}
    if dataset.is_local:
        return Loader(dataset, **options).eval_batches()
    return sequential.eval_batches(dataset, **options)


def _rank_by_distance(found: Descriptors, queries: Queries, distance_m: float | None) -> RetrievalResult | None:
    if distance_m is None:
        return None
    return rank_pairs(
        found.ground,
        found.aerial,
        location=queries.location,
        location_m=found.location_m,
        hit_distance_m=distance_m,
    )
