"""A checkpoint measured on a split of a manifest, in one process: all its queries, and those that do not leak."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvft.augment import Augment, AugmentConfig
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

Progress = Callable[[int, int], None]


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

    def rank(self, found: Descriptors, *, hit_distance_m: float | None = None) -> Ranks:
        """Rank the split's references for each query, by exact pair and, if asked for, by distance."""
        result = rank_pairs(found.ground, found.aerial, location=self.location)
        if hit_distance_m is None:
            return Ranks(queries=self, result=result)
        within = rank_pairs(
            found.ground,
            found.aerial,
            location=self.location,
            location_m=found.location_m,
            hit_distance_m=hit_distance_m,
        )
        return Ranks(queries=self, result=result, within=within, hit_distance_m=hit_distance_m)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """What was found for the queries of a split.

    Attributes:
        queries: Which queries leak.
        result: Ranks of all queries: the exact pair is the true one.
        within: Ranks where any reference nearer than `hit_distance_m` is a true one as well; None if not asked for.
        hit_distance_m: That distance.
    """

    queries: Queries
    result: RetrievalResult
    within: RetrievalResult | None = None
    hit_distance_m: float | None = None

    def metrics(self) -> dict[str, float | None]:
        """Return the recalls by exact pair, full and de-leaked, and those by distance: `recall_at_1_within_5m`.

        None is what cannot be known.
        """
        kept = self.queries.deleaked(self.result)
        deleaked = (kept or self.result).recalls("_deleaked")
        by_distance = self.within.recalls(f"_within_{self.hit_distance_m:.12g}m") if self.within else {}
        return {
            **self.result.metrics(),
            **(deleaked if kept else dict.fromkeys(deleaked)),
            "num_leaked_queries": self.queries.leaks.num_leaked,
            **by_distance,
        }


def require_positions(manifest: Manifest, split: str, *, hit_distance_m: float | None) -> None:
    """Refuse recall by a distance that is none, and where no pair has a position.

    Raises:
        ConfigError: The distance is not positive.
        DataError: No pair has a position.
    """
    require(hit_distance_m is None or hit_distance_m > 0, f"hit_distance_m: {hit_distance_m} must be positive")
    if hit_distance_m is not None and not np.isfinite(manifest.location_m(split)).any():
        raise DataError(f"split {split!r}: no pair has a position, so nothing can be counted by distance")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured and with what.

    Attributes:
        model: The network, on `device`.
        info: What the checkpoint says about itself.
        checkpoint: Local directory of the checkpoint.
        preprocess: How the network's input was made.
        dataset: The split's pairs.
        ranks: What was found.
        device: Where the network is.
    """

    model: CrossViewModel
    info: CheckpointInfo
    checkpoint: Path
    preprocess: PreprocessConfig
    dataset: PairDataset
    ranks: Ranks
    device: torch.device

    @property
    def queries(self) -> Queries:
        """Which queries leak."""
        return self.ranks.queries

    @property
    def result(self) -> RetrievalResult:
        """Ranks of all queries: the exact pair is the true one."""
        return self.ranks.result

    @property
    def within(self) -> RetrievalResult | None:
        """Ranks by distance, see `Ranks`."""
        return self.ranks.within

    @property
    def hit_distance_m(self) -> float | None:
        """The distance of `within`."""
        return self.ranks.hit_distance_m

    def metrics(self) -> dict[str, float | None]:
        """Return all recalls, see `Ranks.metrics`."""
        return self.ranks.metrics()


def evaluate_checkpoint(
    checkpoint: str,
    manifest: str,
    *,
    split: str = "val",
    train_split: str = "train",
    hit_distance_m: float | None = None,
    preprocess_changes: dict[str, Any] | None = None,
    allow_other_preprocess: bool = False,
    view: AugmentConfig | None = None,
    view_seed: int = 0,
    batch_size: int = 32,
    num_threads: int = 2,
    cache: Path | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
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
        view: Changes the pixels first: a limited field of view, an unknown orientation; none leaves them as they are.
        view_seed: What `view` draws is a function of this and the pair, the same in every evaluation.
        batch_size: Pairs embedded at a time.
        num_threads: Decoding threads.
        cache: Folder beside which copies of remote checkpoints are kept; shards of a remote store are not copied.
        device: Where to embed; by default on a GPU if there is one.
        progress: Called after each batch with the numbers of pairs embedded and of all.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or trained with other preprocessing.
        ConfigError: A changed field is unknown or refused, or the distance is not positive.
        DataError: There is no such split, no position to measure distances by, or an image cannot be decoded.
        ShardError: The manifest or a shard is missing or damaged.
        StoreError: A store cannot be reached.
    """
    directory = fetch(checkpoint, cache=(cache or default_cache()).parent)
    preprocess = _preprocess(read_info(directory), preprocess_changes or {})
    model, info = load_model(directory, preprocess=preprocess, allow_other_preprocess=allow_other_preprocess)
    dataset = PairDataset(Manifest.load(manifest), split, access="sparse")
    queries = _queries(dataset.manifest, split, train_split=train_split, hit_distance_m=hit_distance_m)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = _batches(dataset, preprocess=preprocess, batch_size=batch_size, num_threads=num_threads)
    seen = _told(_changed(prefetch(batches, device), view, preprocess, view_seed), progress, num_pairs=len(dataset))
    found = embed(model.to(device), seen, preprocess=Preprocess(preprocess), num_pairs=len(dataset))
    return Evaluation(
        model=model,
        info=info,
        checkpoint=directory,
        preprocess=preprocess,
        dataset=dataset,
        ranks=queries.rank(found, hit_distance_m=hit_distance_m),
        device=device,
    )


def _queries(manifest: Manifest, split: str, *, train_split: str, hit_distance_m: float | None) -> Queries:
    require_positions(manifest, split, hit_distance_m=hit_distance_m)
    return Queries.of_split(manifest, split, train_split=train_split)


def _preprocess(info: CheckpointInfo, changes: dict[str, Any]) -> PreprocessConfig:
    return parse(PreprocessConfig, {**to_plain(info.preprocess), **changes}, prefix="preprocess")


def _changed(
    batches: Iterable[Batch], view: AugmentConfig | None, preprocess: PreprocessConfig, seed: int
) -> Iterator[Batch]:
    augment = Augment(view or AugmentConfig(), preprocess)
    return (augment.of_batch(batch, seed=seed, step=0) for batch in batches)


def _told(batches: Iterable[Batch], progress: Progress | None, *, num_pairs: int) -> Iterator[Batch]:
    """Tell of each batch once the next one is asked for: by then it is embedded."""
    num_embedded = 0
    for batch in batches:
        yield batch
        num_embedded += batch.num_valid
        if progress is not None:
            progress(num_embedded, num_pairs)


def _batches(
    dataset: PairDataset, *, preprocess: PreprocessConfig, batch_size: int, num_threads: int
) -> Iterator[Batch]:
    """Read every pair once: from memory maps if the shards are here, else in one pass that keeps no copies."""
    options: dict[str, Any] = {"preprocess": preprocess, "batch_size": batch_size, "num_threads": num_threads}
    if dataset.is_local:
        return Loader(dataset, **options).eval_batches()
    return sequential.eval_batches(dataset, **options)
