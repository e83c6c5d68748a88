"""Which pair goes into which shard, decided and written down before any work.

The first plan of a dataset mixes each split's pairs by the seed and cuts them into shards. A later plan stands on the
newest manifest: shards whose pairs are all unchanged are kept as they are, a shard with a changed or removed pair is
planned anew from the pairs that remain in it, and pairs that are new are mixed and cut among themselves.

A plan's fingerprint names the folder of its shards. It covers what is cut how and the manifest that it stands on, so
that no plan ever writes over a shard of an older manifest; times of files and places of folders do not enter it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from cvft.configuration import require
from cvft.errors import ConfigError, ShardError
from pipeline.manifest import Manifest, canonical_json
from pipeline.profile import ORIGINAL, ShardProfile
from pipeline.sampler import epoch_permutation
from pipeline.schema import PairSource
from pipeline.sealed import seal
from pipeline.shards import FORMAT_VERSION, ShardSpec, pair_identity
from pipeline.sources.base import SourceScan
from pipeline.storage import Store

_FOLDER_CHARACTERS = 12
_METADATA_KEY = b"cvft"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a dataset is cut into shards, the same for all its generations.

    Attributes:
        pairs_per_shard: The last shard of a split may hold fewer.
        seed: Of the permutation that mixes each split's pairs before they are cut.
        profile: What the shards' images are to be.
    """

    pairs_per_shard: int = 1000
    seed: int = 0
    profile: ShardProfile = ORIGINAL

    def __post_init__(self) -> None:
        require(self.pairs_per_shard >= 1, f"pairs_per_shard: {self.pairs_per_shard} must be at least 1")
        require(0 <= self.seed < 2**64, f"seed: {self.seed} must lie in [0, 2**64)")

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return {"pairs_per_shard": self.pairs_per_shard, "seed": self.seed, "profile": self.profile.plain()}

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.pairs_per_shard} pairs per shard, seed {self.seed}, profile {self.profile}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be written.

    Attributes:
        fingerprint: Names the plan and the folder of its shards.
        content: Digest of the pairs and the cut alone, whatever the plan stands on.
        layout: Layout of the raw data.
        cut: How pairs are cut into shards.
        base: The manifest that the plan stands on, if any.
        kept_shards: Numbers of the shards of `base` that stay.
        specs: The shards to be written.
    """

    fingerprint: str
    content: str
    layout: str
    cut: Cut
    base: Manifest | None
    kept_shards: Sequence[int]
    specs: Sequence[ShardSpec]

    @property
    def folder(self) -> str:
        """Folder of the plan's shards within the store."""
        return f"shards/{self.fingerprint[:_FOLDER_CHARACTERS]}"

    @property
    def num_kept_pairs(self) -> int:
        """Pairs in the kept shards."""
        return sum(self.base.shards[number].num_pairs for number in self.kept_shards) if self.base else 0

    def write(self, store: Store) -> None:
        """Write the plan's document (keys and the shards they go to) unless it is there.

        Raises:
            StoreError: The store cannot be written.
        """
        keys = [pair.key for spec in self.specs for pair in spec.pairs]
        shards = [number for number, spec in enumerate(self.specs) for _ in spec.pairs]
        metadata = {
            **{"fingerprint": self.fingerprint, "content": self.content, "layout": self.layout, "num_pairs": len(keys)},
            **{"base": self.base.digest if self.base else None, "num_kept_shards": len(self.kept_shards)},
            **{"shards": [spec.name for spec in self.specs], "cut": self.cut.plain()},
        }
        table = pa.table({"key": pa.array(keys, pa.string()), "shard": pa.array(shards, pa.int32())})
        stream = io.BytesIO()
        described = table.replace_schema_metadata({_METADATA_KEY: canonical_json(metadata).encode()})
        pq.write_table(described, stream, compression="zstd")
        store.create_bytes(document_path(self.fingerprint), seal(stream.getvalue()))


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What the document of a manifest's plan says.

    Attributes:
        content: See `Plan`.
        layout: See `Plan`.
        cut: See `Plan`.
        num_kept_shards: How many shards of an older manifest the plan kept.
    """

    content: str
    layout: str
    cut: Cut
    num_kept_shards: int


def read_plan(manifest: Manifest) -> PlanFacts:
    """Read the document of the plan that a manifest was made by.

    Raises:
        ShardError: It is missing or damaged.
        StoreError: It cannot be read.
    """
    store, path = Store.from_uri(manifest.store_uri), document_path(manifest.plan)
    advice = "start the dataset anew with --rebuild"
    if not store.exists(path):
        raise ShardError(f"{store.uri(path)}: the newest manifest's plan is missing; {advice}")
    try:
        content = json.loads(pq.read_schema(io.BytesIO(store.read_bytes(path))).metadata[_METADATA_KEY])
        cut = Cut(**(content["cut"] | {"profile": ShardProfile.from_plain(content["cut"]["profile"])}))
        return PlanFacts(
            content=content["content"],
            layout=content["layout"],
            cut=cut,
            num_kept_shards=content["num_kept_shards"],
        )
    except (OSError, pa.ArrowException, ConfigError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{store.uri(path)}: is damaged ({reason}); {advice}") from None


def make_plan(
    scan: SourceScan,
    cut: Cut,
    *,
    check_images: bool,
    base: Manifest | None = None,
    kept_shards: Sequence[int] = (),
    remaining: Sequence[Sequence[PairSource]] = (),
    new: Sequence[PairSource] | None = None,
) -> Plan:
    """Cut pairs into shards.

    Args:
        scan: The raw data.
        cut: How.
        check_images: Decode images before they are written.
        base: The manifest that the plan stands on; none for a dataset's first.
        kept_shards: Numbers of its shards that stay.
        remaining: For each of its shards that does not, the pairs that remain in it.
        new: The pairs that it does not have; none for all of the scan.

    Returns:
        The plan; it depends on the order in which the source lists pairs nowhere.
    """
    lots = [pairs for pairs in remaining if pairs] + list(_mixed(scan.pairs if new is None else new, cut))
    content = _digest([canonical_json([FORMAT_VERSION, cut.plain()])], *(map(_identity, pairs) for pairs in lots))
    stands_on = [base.digest if base else "", *(base.shards[number].name for number in kept_shards if base)]
    fingerprint = _digest([content], stands_on)
    folder = f"shards/{fingerprint[:_FOLDER_CHARACTERS]}"
    numbers: dict[str, int] = {}
    specs = []
    for pairs in lots:
        split = pairs[0].split
        number = numbers[split] = numbers.get(split, -1) + 1
        specs.append(
            ShardSpec(
                name=f"{folder}/{split}-{number:05d}.tar",
                root=scan.root,
                pairs=pairs,
                rules=scan.rules,
                profile=cut.profile,
                check_images=check_images,
            )
        )
    return Plan(
        fingerprint=fingerprint,
        content=content,
        layout=scan.layout,
        cut=cut,
        base=base,
        kept_shards=kept_shards,
        specs=specs,
    )


def _mixed(pairs: Sequence[PairSource], cut: Cut) -> Iterable[list[PairSource]]:
    """Yield the shards' pairs: each split mixed by the seed, whatever order the source listed them in."""
    by_split: dict[str, list[PairSource]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.key):
        by_split.setdefault(pair.split, []).append(pair)
    for _, ordered in sorted(by_split.items()):
        mixed = [ordered[row] for row in epoch_permutation(len(ordered), seed=cut.seed, epoch=0)]
        yield from (mixed[start : start + cut.pairs_per_shard] for start in range(0, len(mixed), cut.pairs_per_shard))


def _identity(pair: PairSource) -> str:
    return f"{pair_identity(pair)} {pair.ground_status.num_bytes} {pair.aerial_status.num_bytes}"


def _digest(*parts: Iterable[str]) -> str:
    content = blake3()
    for part in parts:
        for line in part:
            content.update(f"{line}\n".encode())
        content.update(b"\n")
    return content.hexdigest()


def document_path(fingerprint: str) -> str:
    """Return where the document of the plan of that fingerprint lies within the store."""
    return f"plans/{fingerprint[:16]}.parquet"
