"""Hard negatives: which pairs lie near each other in metres, which look alike to the network, and when that is found.

The first epochs take the nearest pairs in metres: neighbours share streets, fields and weather. Later the network
itself says what it mistakes: every few epochs the training split is embedded in evaluation mode, and each ground
image's most similar aerial images are its pair's neighbours until the next time. Source: Deuser et al., Sample4Geo
(ICCV 2023); distances are measured in metres here, whatever the coordinates are.

A table of neighbours never holds a pair's own place, nor one nearer than the distance below which the loss masks
negatives. The loss's mask itself stays on, for pairs that meet in a batch all the same.

Cost of mining N pairs of descriptors with D values, over W ranks: a forward pass of N / W pairs, 8 * N * D bytes for
the descriptors on every rank's host, and the search (`cvft.neighbours`).

Shape letters: N pairs of the split, K neighbours in a pool, Q rows of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from cvft.checkpoint import State
from cvft.configuration import require
from cvft.distributed import current_world
from cvft.engine import Descriptors
from cvft.errors import CheckpointError
from cvft.neighbours import most_similar, share_rows
from cvft.retrieval import row_slices
from pipeline.geography import NeighbourTree
from pipeline.hard_batches import grouped_permutation
from pipeline.manifest import Manifest
from pipeline.sampler import Indices

_LOGGER = logging.getLogger(__name__)
_ROWS_AT_A_TIME = 4096
_SPARE = 32  # pairs that are found for a small pool to replace those that may not be in it
_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which pairs of the training split share a batch.

    Attributes:
        kind: `random` mixes all of them; `hard` puts pairs together that are near each other or look alike, and never
            two of one location.
        pool_size: Nearest pairs that a pair's hard negatives are taken from; used by `hard` alone, as is all below.
        num_hard: Pairs to take from a pool, half of them the nearest and half at random.
        mine_from: First epoch, counted from 0, in which near means similar by descriptor; before it near is meant in
            metres. Null means metres throughout.
        mine_every: Epochs after which the similar pairs are searched anew, with the weights of that time.
        min_distance_m: Pairs nearer than this to each other never share a batch, nor do chains of such pairs; null
            keeps only those apart that the layout calls one location.
    """

    kind: Literal["random", "hard"] = "random"
    pool_size: int = 128
    num_hard: int = 64
    mine_from: int | None = 4
    mine_every: int = 4
    min_distance_m: float | None = None

    def __post_init__(self) -> None:
        for name in ("pool_size", "num_hard", "mine_every"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} must be at least 1")
        pool, taken, first = self.pool_size, self.num_hard, self.mine_from
        require(taken <= pool, f"num_hard: {taken} must be at most pool_size={pool}, of which they are taken")
        require(first is None or first >= 0, f"mine_from: {first} must not be negative, or null for never")
        distance = self.min_distance_m
        require(distance is None or distance > 0, f"min_distance_m: {distance} must be positive, or null for none")

    def made_in(self, epoch: int) -> int:
        """Return the epoch at whose beginning the table is made that is in force in `epoch`."""
        if not self.is_mined(epoch) or self.mine_from is None:
            return 0
        return epoch - (epoch - self.mine_from) % self.mine_every

    def is_mined(self, epoch: int) -> bool:
        """Return whether near means similar in `epoch`."""
        return self.mine_from is not None and epoch >= self.mine_from


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the pairs of a split are, as far as batches are concerned.

    Attributes:
        code: Equal for pairs that must not share a batch, int64 [N] from 0 on.
        location_m: float64 [N, 3], NaN where unknown.
        mask_distance_m: Pairs nearer than this are no negatives of each other; none if all are.
    """

    code: Indices
    location_m: _FloatArray
    mask_distance_m: float | None = None

    @classmethod
    def of_split(
        cls, manifest: Manifest, split: str, *, min_distance_m: float | None, mask_distance_m: float | None
    ) -> Places:
        """Describe the places of a split's pairs.

        Raises:
            DataError: There is no such split.
        """
        location_m = manifest.location_m(split)
        names = manifest.split(split)["location_id"].to_numpy()
        code = np.unique(names, return_inverse=True)[1].astype(np.int64)
        if min_distance_m is not None:
            code = merge_near(code, location_m, min_distance_m)
        return cls(code=code, location_m=location_m, mask_distance_m=mask_distance_m)

    def __len__(self) -> int:
        """Return N."""
        return len(self.code)

    def most_excluded(self) -> int:
        """Return how many pairs, itself included, the pair with the most of them has to be kept from."""
        counts = np.bincount(self.code)[self.code]
        if self.mask_distance_m is not None and len(counts):
            counts = counts + NeighbourTree(self.location_m).num_within(self.mask_distance_m)
        return int(counts.max(initial=1))

    def pools(self, rows: slice, found: Indices, *, pool_size: int) -> npt.NDArray[np.int32]:
        """Return the first `pool_size` of the pairs found for some rows that may be their negatives.

        Args:
            rows: The rows.
            found: Pairs near to each of them, nearest first, int64 [Q, at least K]; -1 for none.
            pool_size: K.

        Returns:
            int32 [Q, K], -1 where there are fewer.
        """
        is_excluded = (found < 0) | (self.code[found] == self.code[rows, None])
        if self.mask_distance_m is not None:
            apart_m = self.location_m[found] - self.location_m[rows, None]
            is_excluded |= np.square(apart_m).sum(axis=-1) < self.mask_distance_m**2  # false for NaN
        kept = np.argsort(is_excluded, axis=1, kind="stable")[:, :pool_size]
        pools = np.where(is_excluded, -1, found)
        pools = np.take_along_axis(pools, kept, axis=1).astype(np.int32)
        return np.pad(pools, ((0, 0), (0, pool_size - pools.shape[1])), constant_values=-1)


def merge_near(code: Indices, location_m: _FloatArray, distance_m: float) -> Indices:
    """Give one number, int64 [N] from 0 on, to all places that chains of pairs less than `distance_m` apart connect.

    Args:
        code: Numbers of the places so far, int64 [N] from 0 on.
        location_m: float64 [N, 3], NaN where unknown, which is never near.
        distance_m: Two pairs this far apart are not near.
    """
    for rows, others in NeighbourTree(location_m).pairs_within(np.nextafter(distance_m, 0)):
        links = coo_array((np.ones(len(rows), dtype=np.bool_), (code[rows], code[others])), shape=(code.max() + 1,) * 2)
        code = connected_components(links, directed=False)[1][code].astype(np.int64)
    return code


def pools_by_distance(places: Places, *, pool_size: int, device: torch.device) -> Tensor:
    """Return each pair's nearest pairs in metres, int32 [N, K], nearest first; -1 where there are fewer.

    A pair without a location has none. The ranks share the work.

    Args:
        places: Of the split's pairs.
        pool_size: K.
        device: Where this rank's tensors are gathered.
    """
    tree = NeighbourTree(places.location_m)
    num = _num_to_find(places, pool_size)

    def nearest(rows: slice) -> Tensor:
        found = tree.nearest(places.location_m[rows], num).index
        return torch.from_numpy(places.pools(rows, found, pool_size=pool_size))

    return share_rows(len(places), nearest, width=pool_size, device=device)


def pools_by_descriptor(
    places: Places, *, ground: Tensor, aerial: Tensor, pool_size: int, device: torch.device
) -> Tensor:
    """Return the pairs whose aerial images are most similar to each pair's ground image, int32 [N, K], likewise.

    Args:
        places: Of the split's pairs.
        ground: float32 [N, D], the same on every rank.
        aerial: float32 [N, D], the same on every rank.
        pool_size: K.
        device: Where this rank searches.

    Raises:
        TrainingError: A descriptor holds NaN or infinity.
    """
    found = most_similar(ground, aerial, k=_num_to_find(places, pool_size), device=device).numpy()
    pools = [places.pools(rows, found[rows], pool_size=pool_size) for rows in row_slices(len(places), _ROWS_AT_A_TIME)]
    return torch.from_numpy(np.concatenate(pools))


def _num_to_find(places: Places, pool_size: int) -> int:
    # The pools of a crowd at one place are left short rather than that every pair's search should pay for them.
    return min(pool_size + min(places.most_excluded(), max(pool_size, _SPARE)), len(places))


class HardNegatives:
    """The order of each epoch of a training, and what it is made from."""

    def __init__(
        self, config: SamplingConfig, places: Places, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        """Prepare to order epochs; `prepare` makes the table.

        Args:
            config: With `kind` hard.
            places: Of the training split's pairs.
            batch_size: Pairs of a global batch.
            seed: Of the order of training epochs.
            device: Where this rank searches.
        """
        self._config = config
        self._places = places
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._made_in: int | None = None
        self._pools = np.empty((0, 0), dtype=np.int32)

    def prepare(self, epoch: int, embed: Callable[[], Descriptors]) -> None:
        """Make the table that is in force in an epoch, unless it is here; to be called on every rank before `order`.

        Args:
            epoch: The epoch to come. A training that goes on within it has its table from `restore`.
            embed: Computes the descriptors of the training split with the weights of now, on every rank.

        Raises:
            TrainingError: A descriptor holds NaN or infinity.
        """
        if self._config.made_in(epoch) == self._made_in:
            return
        pool_size, device = self._config.pool_size, self._device
        if self._config.is_mined(epoch):
            found = embed()
            pools = pools_by_descriptor(
                self._places, ground=found.ground, aerial=found.aerial, pool_size=pool_size, device=device
            )
        else:
            pools = pools_by_distance(self._places, pool_size=pool_size, device=device)
        self._pools, self._made_in = pools.numpy(), self._config.made_in(epoch)
        if current_world().rank == 0:
            self._log(epoch)

    def order(self, epoch: int) -> Indices:
        """Return the order of all ranks' pairs in an epoch, int64 [N]; the last ones may not fill a batch.

        Raises:
            ConfigError: There are not enough places to fill every batch with different ones.
        """
        if self._config.made_in(epoch) != self._made_in:
            raise RuntimeError(f"the neighbours of epoch {epoch} are not there; call prepare first")
        return grouped_permutation(
            self._pools,
            place=self._places.code,
            batch_size=self._batch_size,
            num_hard=self._config.num_hard,
            seed=self._seed,
            epoch=epoch,
        )

    def state(self) -> State:
        """Return the table, because another number of ranks would not find it again to the last bit."""
        return State(values={"made_in": self._made_in}, tensors={"pools": torch.from_numpy(self._pools)})

    def restore(self, state: State) -> None:
        """Take up the table of a checkpoint.

        Raises:
            CheckpointError: It is not of this many pairs and neighbours.
        """
        pools = state.tensors["pools"].numpy()
        if pools.size and pools.shape != (len(self._places), self._config.pool_size):
            raise CheckpointError(
                f"the checkpoint's neighbours are {pools.shape[1]} for each of {pools.shape[0]} pairs, but the training"
                f" split has {len(self._places)} pairs and train.sampling.pool_size is {self._config.pool_size};"
                " go on with the training's own data and configuration"
            )
        self._pools, self._made_in = pools, state.values["made_in"]

    def _log(self, epoch: int) -> None:
        num_without = int((self._pools < 0).all(axis=1).sum())
        meaning = "descriptor" if self._config.is_mined(epoch) else "distance in metres"
        level = logging.WARNING if num_without == len(self._pools) else logging.INFO
        _LOGGER.log(
            level,
            "epoch %d: hard negatives by %s from pools of %d; %d of %d pairs have none and are placed at random",
            epoch + 1,
            meaning,
            self._config.pool_size,
            num_without,
            len(self._pools),
        )
