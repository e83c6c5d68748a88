"""Writing one shard: a USTAR tar that any webdataset reads; equal input, equal bytes.

A pair is three adjacent members, `<key>.ground.jpg`, `<key>.aerial.jpg` and `<key>.json` (a PNG keeps its bytes and
gets `.png`), so that one range read fetches a pair. Times and owners are 0. The images' offsets become the manifest.
Pairs are read, written and forgotten one after the other: memory does not grow with a shard.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3

from cvft.errors import DataError, ShardError
from pipeline.checks import LoadedImage, damage_kind, load_pair
from pipeline.images import ImageInfo, decode, encode_jpeg
from pipeline.manifest import PAIR_SCHEMA, ShardInfo, canonical_json
from pipeline.profile import ORIGINAL, ShardProfile
from pipeline.raw import RawFolder
from pipeline.schema import ROLES, ImageRules, Location, PairSource
from pipeline.sources.base import Problem, printable
from pipeline.storage import Store
from pipeline.tar_writer import TarWriter

# Part of every plan's fingerprint: raise it when the bytes of a shard change for the same input.
FORMAT_VERSION = 2

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 * 1024 * 1024

Row = dict[str, Any]
_COLUMNS = [name for name in PAIR_SCHEMA.names if name != "shard"]
_SOURCE_HASHES = tuple(f"{role}_source_xxh3_128" for role in ROLES)
_PLACE = ("latitude_deg", "longitude_deg", "heading_deg", "easting_m", "northing_m")
_NOWHERE = (None,) * len(_PLACE)
FACTS = ("location_id", *_PLACE, "metadata")


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Everything a shard is made from; equal specs over equal files give equal bytes.

    Attributes:
        name: Path of the tar within the store.
        root: Root of the raw dataset, which the pairs' files are relative to.
        pairs: The pairs, in order.
        rules: What the layout says about its images.
        profile: What the shard's images are to be.
        check_images: Whether each image is decoded before it is written.
    """

    name: str
    root: RawFolder
    pairs: Sequence[PairSource]
    rules: ImageRules = field(default_factory=ImageRules)
    profile: ShardProfile = ORIGINAL
    check_images: bool = True

    @property
    def sidecar(self) -> str:
        """Path of the file that is written when the shard is finished."""
        return sidecar_path(self.name)

    def fingerprint(self) -> str:
        """Return a digest of the spec and the files' sizes and stamps; a finished shard with another one is redone."""
        content = blake3(canonical_json([FORMAT_VERSION, self.profile.plain()]).encode())
        for pair in self.pairs:
            ground, aerial = pair.ground_status, pair.aerial_status
            stamps = f"{ground.num_bytes} {ground.stamp} {aerial.num_bytes} {aerial.stamp}"
            content.update(f"{pair_identity(pair)} {stamps}\n".encode())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard: what its sidecar says.

    Attributes:
        info: Name, bytes, digest and number of pairs.
        fingerprint: Of the spec it was written from.
        is_checked: Whether every image was decoded before it was written.
        columns: The manifest's columns of its pairs, without the column `shard`.
        problems: What was wrong with its images; unusable pairs were left out.
    """

    info: ShardInfo
    fingerprint: str
    is_checked: bool
    columns: Mapping[str, Sequence[Any]]
    problems: list[Problem]


def write_shard(spec: ShardSpec, store: Store, *, before_it_appears: Callable[[], None] = lambda: None) -> ShardEntry:
    """Write the shard and then its sidecar.

    Pairs whose images cannot be used are left out and listed in the entry's problems.

    Args:
        spec: What to write.
        store: Where.
        before_it_appears: Called when all is written, before the shard takes its name; raising, it keeps it from that.

    Raises:
        StoreError: The store cannot be written, or raw data in a store not be read.
    """
    _keep_freed_memory()
    rows: list[Row] = []
    problems: list[Problem] = []
    with store.open_output(spec.name) as stream:
        tar = TarWriter(stream)
        for pair in spec.pairs:
            images, found = load_pair(pair, spec.root, rules=spec.rules, check_images=spec.check_images)
            members = images if spec.profile == ORIGINAL else _derive(pair, images, spec.profile, found)
            problems += found
            if len(members) == len(ROLES):
                rows.append(_add_pair(tar, pair, members, spec.profile))
                if members is not images:
                    rows[-1] |= dict(zip(_SOURCE_HASHES, original_hashes(images), strict=True))
                tar.flush()
        tar.finish()
        before_it_appears()
    num_pairs = len(rows)
    columns = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    entry = ShardEntry(
        info=ShardInfo(name=spec.name, num_bytes=tar.position, blake3=tar.blake3(), num_pairs=num_pairs),
        fingerprint=spec.fingerprint(),
        is_checked=spec.check_images,
        columns=columns,
        problems=problems,
    )
    content = {**vars(entry), "info": asdict(entry.info), "problems": [asdict(problem) for problem in problems]}
    store.write_bytes(spec.sidecar, _sealed(content))
    return entry


def sidecar_path(shard: str) -> str:
    """Return the path of the file beside a shard that tells what is in it."""
    return f"{shard.removesuffix('.tar')}.json"


def read_entry(store: Store, sidecar: str) -> ShardEntry:
    """Read a finished shard's sidecar.

    Raises:
        ShardError: It is damaged.
        StoreError: It cannot be read.
    """
    data = store.read_bytes(sidecar)
    try:
        content = json.loads(data)
        del content["blake3"]
        if _sealed(content) != data:
            raise ValueError("its hash is another")  # noqa: TRY301 (one kind of damage among others)
        info = ShardInfo(**content["info"])
        columns = {name: content["columns"][name] for name in _COLUMNS}
        if any(len(values) != info.num_pairs for values in columns.values()):
            raise ValueError("columns of unequal lengths")  # noqa: TRY301 (one kind of damage among others)
        return ShardEntry(
            info=info,
            fingerprint=content["fingerprint"],
            is_checked=content["is_checked"],
            columns=columns,
            problems=[Problem(**problem) for problem in content["problems"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{store.uri(sidecar)}: is damaged ({reason}); delete it and shard again") from None


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return plain data as JSON that carries a hash of itself: one flipped bit is found wherever it lies."""
    plain = canonical_json(content)
    # `blake3` comes before every other name of a sidecar, as it must in canonical JSON.
    return f'{{"blake3":"{blake3(plain.encode()).hexdigest()}",{plain[1:]}'.encode()


def pair_identity(pair: PairSource) -> str:
    """Return what is known of a pair before its images are read, as one line that other pairs do not have."""
    where = _place(pair.location)
    return canonical_json([pair.split, pair.key, pair.location_id, where, pair.ground_rows_px, pair.metadata])


def _place(location: Location | None) -> tuple[float | None, ...]:
    if location is None:
        return _NOWHERE
    return (
        location.latitude_deg,
        location.longitude_deg,
        location.heading_deg,
        location.easting_m,
        location.northing_m,
    )


def pair_facts(pair: PairSource) -> tuple[str | float | None, ...]:
    """Return the manifest's `FACTS` of a pair, which do not depend on its images."""
    metadata = canonical_json(pair.metadata) if pair.metadata else None
    return pair.location_id, *_place(pair.location), metadata


def _pair_json(pair: PairSource, profile: ShardProfile) -> bytes:
    """Return a pair's JSON member: what is known of it, and how its images were made where they are not originals."""
    facts: Row = {"key": pair.key, "location_id": pair.location_id, "split": pair.split}
    facts.update((name, value) for name, value in zip(_PLACE, _place(pair.location), strict=True) if value is not None)
    if pair.metadata:
        facts["metadata"] = pair.metadata
    if profile.name != "original":
        facts["profile"] = profile.plain()
    elif pair.ground_rows_px is not None:
        facts["ground_rows_px"] = pair.ground_rows_px
    return canonical_json(facts).encode()


def original_hashes(images: Mapping[str, LoadedImage]) -> tuple[str, ...]:
    """Return xxh3_128 of the raw files of a pair, ground first."""
    return tuple(xxhash.xxh3_128_hexdigest(images[role].data) for role in ROLES)


def _add_pair(tar: TarWriter, pair: PairSource, images: Mapping[str, LoadedImage], profile: ShardProfile) -> Row:
    """Add a pair's members and return its row."""
    key = pair.key
    row: Row = dict(zip(FACTS, pair_facts(pair), strict=True))
    row["key"], row["split"] = key, pair.split
    for role in ROLES:
        image = images[role]
        row[f"{role}_offset"] = tar.add(f"{key}.{role}.{image.info.kind}", image.data)
        row[f"{role}_bytes"] = len(image.data)
        row[f"{role}_xxh3_128"] = xxhash.xxh3_128_hexdigest(image.data)
        row[f"{role}_height_px"] = image.info.height_px
        row[f"{role}_width_px"] = image.info.width_px
    if rows_px := images["ground"].rows_px:
        row["ground_first_row_px"], row["ground_stop_row_px"] = rows_px
    tar.add(f"{key}.json", _pair_json(pair, profile))
    return row


def _derive(
    pair: PairSource, images: Mapping[str, LoadedImage], profile: ShardProfile, problems: list[Problem]
) -> dict[str, LoadedImage]:
    """Return a pair's images at their input sizes, used rows only, as JPEGs; what is damaged becomes a problem."""
    derived = {}
    sizes_px = {"ground": profile.ground_size_px, "aerial": profile.aerial_size_px}
    for role, image in images.items():
        size_px = sizes_px[role]
        assert size_px is not None
        assert profile.jpeg_quality is not None
        pixels = np.empty((*size_px, 3), dtype=np.uint8)
        try:
            decode(image.data, pixels, profile="exact", rows_px=image.rows_px)
        except DataError as error:
            path = printable(getattr(pair, role))
            problems.append(Problem(kind=damage_kind(image.data), key=pair.key, path=path, detail=str(error)))
            continue
        info = ImageInfo(kind="jpg", height_px=size_px[0], width_px=size_px[1], colorspace="YCbCr")
        derived[role] = LoadedImage(encode_jpeg(pixels, quality=profile.jpeg_quality), info)
    return derived


@cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for what is read next.

    By default it hands blocks of an image's size back to the system each time, whose pages are then made anew: a
    fifth of the time of writing a shard.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)
