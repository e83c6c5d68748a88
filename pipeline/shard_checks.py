"""What is wrong with the bytes of a shard: its images, its headers, its JSON, its hash.

A shard is read once, pair by pair: from one ground image's header to the next is everything of a pair, so a damaged
header costs its own pair alone and never the sight of the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash
from blake3 import blake3

from cvft.errors import ShardError, StoreError
from pipeline.manifest import ShardInfo
from pipeline.schema import ROLES
from pipeline.storage import Store
from pipeline.tar_reader import BLOCK_BYTES, Member, walk

DAMAGE_KINDS = {
    "damaged_manifest": "its content is right, but the file's bytes are not those that were published",
    "damaged_plan": "the plan's document is missing or damaged",
    "missing_shard": "there is no such file",
    "wrong_size": "the shard has another length",
    "unreadable": "the store does not give the bytes",
    "wrong_image": "an image has another hash",
    "wrong_json": "the pair's JSON says other things than the manifest",
    "wrong_index": "the pair's members lie elsewhere or have other names than the manifest says",
    "bad_tar": "a header, padding or the end is not as it was written",
    "wrong_hash": "the shard has another hash, though everything in it looks right",
    "missing_sidecar": "there is no such file",
    "bad_sidecar": "it is damaged, or tells of another shard",
}
"""What can be wrong, and what it means."""
_FACTS = ("key", "location_id", "split", "latitude_deg", "longitude_deg", "heading_deg", "easting_m", "northing_m")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged thing.

    Attributes:
        kind: One of `DAMAGE_KINDS`.
        path: The file, within the store.
        key: The pair, where the damage is one pair's.
        detail: What is wrong, in words.
        shard: Number of the shard in the manifest; none for the manifest and its plan.
    """

    kind: str
    path: str
    key: str | None = None
    detail: str
    shard: int | None

    def __str__(self) -> str:
        """Return the damage in one line."""
        where = self.path if self.key is None else f"{self.path}, key {self.key}"
        return f"{where}: {self.kind} ({self.detail})"


@dataclass(frozen=True, kw_only=True)
class PairSpan:
    """What the manifest says of a pair, and which part of the tar is its.

    Attributes:
        row: The manifest's row.
        start: Position of its first header.
        stop: Position of the next pair's first header, or the tar's end.
        is_last: Whether it is the tar's last pair.
    """

    row: Mapping[str, Any]
    start: int
    stop: int
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Pairs to be read from one shard.

    Attributes:
        number: The shard's in the manifest.
        shard: The shard.
        spans: The pairs, in the order in which they lie there.
        is_whole: Whether they are all its pairs; then it is hashed as well.
    """

    number: int
    shard: ShardInfo
    spans: Sequence[PairSpan]
    is_whole: bool


def pair_spans(rows: Sequence[Mapping[str, Any]], shard: ShardInfo) -> list[PairSpan]:
    """Cut a shard into its pairs, as the manifest's rows of it say."""
    ordered = sorted(rows, key=lambda row: int(row["ground_offset"]))
    starts = [row["ground_offset"] - BLOCK_BYTES for row in ordered]
    return [
        PairSpan(row=row, start=start, stop=stop, is_last=row is ordered[-1])
        for row, start, stop in zip(ordered, starts, [*starts[1:], shard.num_bytes], strict=True)
    ]


def check_shard(store: Store, task: ShardTask) -> list[Damage]:
    """Read a task's pairs one after the other and say what is wrong with them; one pair is in memory at a time."""
    damages: list[Damage] = []
    damage = partial(Damage, path=task.shard.name, shard=task.number)
    content = blake3()
    try:
        if task.is_whole:
            with store.open_input(task.shard.name) as stream:
                for span in task.spans:
                    # A manifest made by hand may have offsets that run backwards: nothing is read, nothing fits.
                    data = stream.read(max(0, span.stop - span.start))
                    content.update(data)
                    damages += _check_pair(data, span, task)
        else:
            for span in task.spans:
                data = store.read_range(task.shard.name, span.start, span.stop - span.start)
                damages += _check_pair(data, span, task)
    except StoreError as error:
        return [*damages, damage(kind="unreadable", detail=str(error))]
    if task.is_whole and not damages and content.hexdigest() != task.shard.blake3:
        damages.append(damage(kind="wrong_hash", detail=DAMAGE_KINDS["wrong_hash"]))
    return damages


def _check_pair(data: bytes, span: PairSpan, task: ShardTask) -> list[Damage]:
    row = span.row
    damage = partial(Damage, path=task.shard.name, key=row["key"], shard=task.number)

    def read(position: int, num_bytes: int) -> bytes:
        return data[position - span.start : position - span.start + num_bytes]

    damages = [
        damage(kind="wrong_image", detail=f"the {role} image's bytes are not those that were sharded")
        for role in ROLES
        if xxhash.xxh3_128_hexdigest(read(row[f"{role}_offset"], row[f"{role}_bytes"])) != row[f"{role}_xxh3_128"]
    ]
    members: list[Member] = []
    try:
        members.extend(walk(read, shard=task.shard.name, start=span.start, stop=span.stop, is_last=span.is_last))
    except ShardError as error:
        detail = str(error).removeprefix(task.shard.name).lstrip(", ")
        return [*damages, damage(kind="bad_tar", detail=detail)]
    if not _is_at_its_place(members, row):
        found = ", ".join(f"{member.name} of {member.num_bytes} bytes at {member.offset}" for member in members)
        damages.append(damage(kind="wrong_index", detail=f"there is {found or 'nothing'}"))
    elif not _says_the_same(read(members[-1].offset, members[-1].num_bytes), row):
        damages.append(damage(kind="wrong_json", detail=DAMAGE_KINDS["wrong_json"]))
    return damages


def _is_at_its_place(members: Sequence[Member], row: Mapping[str, Any]) -> bool:
    if len(members) != len(ROLES) + 1 or members[-1].name != f"{row['key']}.json":
        return False
    return all(
        member.name in (f"{row['key']}.{role}.jpg", f"{row['key']}.{role}.png")
        and (member.offset, member.num_bytes) == (row[f"{role}_offset"], row[f"{role}_bytes"])
        for role, member in zip(ROLES, members, strict=False)
    )


def _says_the_same(data: bytes, row: Mapping[str, Any]) -> bool:
    try:
        facts = json.loads(data)
        metadata = facts.get("metadata")
    except (ValueError, AttributeError):
        return False
    is_same = all(facts.get(name) == row[name] for name in _FACTS)
    return is_same and metadata == (json.loads(row["metadata"]) if row["metadata"] else None)
