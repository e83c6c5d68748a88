"""Writing one shard: a USTAR tar that any webdataset reads, with the images' original bytes; equal input, equal bytes.

A pair is three adjacent members, `<key>.ground.jpg`, `<key>.aerial.jpg` and `<key>.json` (a PNG keeps its bytes and
gets `.png`), so that one range read fetches a pair. Times and owners are 0. The images' offsets become the manifest.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash
from blake3 import blake3

from cvft.errors import ShardError
from pipeline.checks import ROLES, LoadedImage, load_pair
from pipeline.manifest import ShardInfo
from pipeline.raw import RawFolder
from pipeline.schema import ImageRules, PairSource
from pipeline.sources.base import Problem
from pipeline.storage import Store

# Part of every plan's fingerprint: raise it when the bytes of a shard change for the same input.
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """Everything a shard is made from; equal specs over equal files give equal bytes.

    Attributes:
        name: Path of the tar within the store.
        root: Root of the raw dataset.
        pairs: The pairs, in order.
        rules: What the layout says about its images.
        check_images: Whether each image is decoded before it is written.
    """

    name: str
    root: RawFolder
    pairs: Sequence[PairSource]
    rules: ImageRules = field(default_factory=ImageRules)
    check_images: bool = True

    @property
    def sidecar(self) -> str:
        """Path of the file that is written when the shard is finished."""
        return f"{self.name.removesuffix('.tar')}.json"

    def fingerprint(self) -> str:
        """Return a digest of the spec and the scanned files' states; a finished shard with another one is redone."""
        content = hashlib.sha256(f"{FORMAT_VERSION} {self.check_images}\n".encode())
        for pair in self.pairs:
            stamps = [(status.num_bytes, status.stamp) for status in (pair.ground_status, pair.aerial_status)]
            content.update(f"{pair.split} {_pair_json(pair).decode()} {stamps}\n".encode())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A finished shard: what its sidecar says.

    Attributes:
        info: Name, bytes, digest and number of pairs.
        fingerprint: Of the spec it was written from.
        rows: The manifest's rows of its pairs, without the column `shard`.
        problems: What was wrong with its images; unusable pairs were left out.
    """

    info: ShardInfo
    fingerprint: str
    rows: list[dict[str, Any]]
    problems: list[Problem]


def write_shard(spec: ShardSpec, store: Store) -> ShardEntry:
    """Write the shard and then its sidecar.

    Pairs whose images cannot be used are left out and listed in the entry's problems.

    Raises:
        StoreError: The store cannot be written, or the raw data's store not be read.
    """
    fingerprint = spec.fingerprint()
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    with store.open_output(spec.name) as stream:
        tar = TarStream(stream)
        for pair in spec.pairs:
            images, found = load_pair(pair, spec.root, rules=spec.rules, check_images=spec.check_images)
            problems.extend(found)
            if len(images) == len(ROLES):
                rows.append(_write_pair(tar, pair, images))
        tar.finish()
    info = ShardInfo(name=spec.name, num_bytes=tar.position, blake3=tar.blake3(), num_pairs=len(rows))
    entry = ShardEntry(info=info, fingerprint=fingerprint, rows=rows, problems=problems)
    store.write_bytes(spec.sidecar, json.dumps(asdict(entry), sort_keys=True).encode())
    return entry


def read_entry(store: Store, sidecar: str) -> ShardEntry:
    """Read a finished shard's sidecar.

    Raises:
        ShardError: It is damaged.
        StoreError: It cannot be read.
    """
    data = store.read_bytes(sidecar)
    try:
        content = json.loads(data)
        return ShardEntry(
            info=ShardInfo(**content["info"]),
            fingerprint=content["fingerprint"],
            rows=content["rows"],
            problems=[Problem(**problem) for problem in content["problems"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{store.uri(sidecar)}: is damaged ({reason}); delete it and shard again") from None


class TarStream:
    """Writes a reproducible USTAR tar to a stream and knows where each member's bytes begin."""

    def __init__(self, stream: Any) -> None:
        self.position = 0
        self._stream = stream
        self._blake3 = blake3()

    def add(self, name: str, data: bytes) -> int:
        """Write one member; return the offset of its first byte."""
        header = tarfile.TarInfo(name)  # its defaults are mtime 0, owner 0, mode 644
        header.size = len(data)
        self._write(header.tobuf(format=tarfile.USTAR_FORMAT, encoding="utf-8"))
        offset = self.position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        """Write the end: two empty blocks, filled up to a whole record."""
        end = self.position + 2 * tarfile.BLOCKSIZE
        self._write(bytes(end - self.position + -end % tarfile.RECORDSIZE))

    def blake3(self) -> str:
        """Return the digest of everything written."""
        return self._blake3.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._blake3.update(data)
        self.position += len(data)


def _write_pair(tar: TarStream, pair: PairSource, images: Mapping[str, LoadedImage]) -> dict[str, Any]:
    row: dict[str, Any] = {"key": pair.key, "location_id": pair.location_id, "split": pair.split}
    for role in ROLES:
        data, info = images[role].data, images[role].info
        row[f"{role}_offset"] = tar.add(f"{pair.key}.{role}.{info.kind}", data)
        row[f"{role}_bytes"] = len(data)
        row[f"{role}_xxh3_128"] = xxhash.xxh3_128_hexdigest(data)
        row[f"{role}_height_px"] = info.height_px
        row[f"{role}_width_px"] = info.width_px
    tar.add(f"{pair.key}.json", _pair_json(pair))
    return row | _location_columns(pair)


def _location_columns(pair: PairSource) -> dict[str, float | None]:
    place = pair.location
    return {
        "latitude_deg": place.latitude_deg if place else None,
        "longitude_deg": place.longitude_deg if place else None,
        "heading_deg": place.heading_deg if place else None,
    }


def _pair_json(pair: PairSource) -> bytes:
    content = {"key": pair.key, "location_id": pair.location_id, "split": pair.split, **_location_columns(pair)}
    return json.dumps(content, sort_keys=True).encode()
