"""The index of a sharded dataset: where each pair's bytes lie, what they must be, where they were taken.

A manifest is one Parquet file `manifests/<digest>.parquet` in the dataset's store, published last and never changed.
Its name is its content's digest, taken over the shards and the columns and not over the file's bytes, so that it is the
same whatever version of Parquet's writer made it. Training and evaluation name their data by it. Adding pairs makes
another manifest; the store's pointer (`pipeline.pointer`) names the newest.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cvft.errors import ConfigError, DataError, ShardError
from pipeline.geography import geocentric_m
from pipeline.parquet import read_parquet, rows_where
from pipeline.pointer import POINTER_FILE, read_pointer
from pipeline.profile import ORIGINAL, ShardProfile
from pipeline.sealed import seal
from pipeline.sources.base import Problem
from pipeline.storage import Store

SCHEMA_VERSION = 2
_FOLDER = "manifests"
_DIGEST_CHARACTERS = 16
_METADATA_KEY = b"cvft"
_DEGREES = ("latitude_deg", "longitude_deg")
_PLANE = ("easting_m", "northing_m")
# NaN never occurs (unknown is null), and repr of a float is the same everywhere.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
_LOGGER = logging.getLogger(__name__)

_IMAGE_FIELDS = [
    ("offset", pa.int64()),  # of the image's first byte within its shard
    ("bytes", pa.int64()),
    ("xxh3_128", pa.string()),
    ("height_px", pa.int32()),
    ("width_px", pa.int32()),
    ("source_xxh3_128", pa.string()),  # of the original file where the shard holds another; else null
]
PAIR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("location_id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),  # position in `Manifest.shards`
        *((f"{role}_{name}", kind) for role in ("ground", "aerial") for name, kind in _IMAGE_FIELDS),
        ("latitude_deg", pa.float64()),
        ("longitude_deg", pa.float64()),
        ("heading_deg", pa.float64()),
        ("easting_m", pa.float64()),  # UTM, where the dataset gives it
        ("northing_m", pa.float64()),
        ("ground_first_row_px", pa.int32()),  # rows [first, stop) of the ground image are used; null: all
        ("ground_stop_row_px", pa.int32()),
        ("metadata", pa.string()),  # further facts of the layout as canonical JSON, or null
    ]
)


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar of the dataset.

    Attributes:
        name: Its path within the store.
        num_bytes: Its length.
        blake3: Its digest, hexadecimal, which also names it in caches.
        num_pairs: How many pairs it holds.
    """

    name: str
    num_bytes: int
    blake3: str
    num_pairs: int


class Manifest:
    """The pairs and shards of one dataset.

    Attributes:
        digest: Hexadecimal sha256 of the content; 16 characters of it name the file.
        layout: Layout of the raw data.
        plan: Fingerprint of the plan that the shards were written by.
        pairs: Table with the columns of `PAIR_SCHEMA`.
        shards: The tars, in the order that the column `shard` counts them.
        excluded: Problems that kept listed pairs out of the shards.
        store_uri: The store that holds manifest and shards.
        profile: What the shards' images are.
    """

    def __init__(
        self,
        *,
        layout: str,
        plan: str,
        pairs: pa.Table,
        shards: Sequence[ShardInfo],
        excluded: Sequence[Problem],
        store_uri: str,
        profile: ShardProfile = ORIGINAL,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.pairs = pairs
        self.shards = tuple(shards)
        self.excluded = tuple(excluded)
        self.store_uri = store_uri
        self.profile = profile
        self.digest = self._compute_digest()

    @classmethod
    def load(cls, uri: str) -> Manifest:
        """Read and verify a manifest.

        Args:
            uri: `<store>/manifests/<digest>.parquet`, local or remote, or the store itself, whose pointer is followed.

        Raises:
            ShardError: The name is not a manifest's or a store's, the file is damaged or of another version, or its
                content is not what its name says.
            StoreError: It cannot be read.
        """
        uri = Store.from_uri(uri).uri()  # absolute, so that `manifests/x.parquet` names its store as well
        store_uri, _, name = uri.rpartition(f"/{_FOLDER}/")
        if not store_uri or not name.endswith(".parquet"):
            return cls._load_newest(uri)
        data = Store.from_uri(store_uri).read_bytes(f"{_FOLDER}/{name}")
        try:
            manifest = cls._decode(data, store_uri)
        except (OSError, pa.ArrowException, ConfigError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ShardError(f"{uri}: the manifest is damaged ({reason}); delete it and shard again") from None
        if not manifest.digest.startswith(name.removesuffix(".parquet")):
            found = manifest.digest[:_DIGEST_CHARACTERS]
            raise ShardError(f"{uri}: renamed or damaged, its content's digest is {found}; delete it and shard again")
        return manifest

    @classmethod
    def _load_newest(cls, store_uri: str) -> Manifest:
        found = read_pointer(Store.from_uri(store_uri))
        if found is None:
            raise ShardError(
                f"{store_uri}: is no manifest and has no {POINTER_FILE}; name the store or "
                f"<store>/{_FOLDER}/<digest>.parquet as `shard` printed it"
            )
        manifest = cls.load(Store.from_uri(store_uri).uri(found.manifest))
        if manifest.digest != found.digest:
            raise ShardError(
                f"{store_uri}: {POINTER_FILE} is damaged, its digest is not that of {manifest.uri}; name it"
            )
        _LOGGER.info("%s: generation %d, digest %s", store_uri, found.generation, manifest.digest)
        return manifest

    @classmethod
    def _decode(cls, data: bytes, store_uri: str) -> Manifest:
        pairs = read_parquet(data)
        metadata = json.loads(pairs.schema.metadata[_METADATA_KEY])
        version = metadata["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{store_uri}: the manifest has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "shard the raw data again"
            )
        return cls(
            layout=metadata["layout"],
            plan=metadata["plan"],
            pairs=pairs.select(PAIR_SCHEMA.names).replace_schema_metadata(None).cast(PAIR_SCHEMA),
            shards=[ShardInfo(**shard) for shard in metadata["shards"]],
            excluded=[Problem(**problem) for problem in metadata["excluded"]],
            store_uri=store_uri,
            profile=ShardProfile.from_plain(metadata["profile"]),
        )

    @property
    def uri(self) -> str:
        """Where the manifest is once published."""
        return Store.from_uri(self.store_uri).uri(self.path)

    @property
    def splits(self) -> dict[str, int]:
        """Number of pairs in each split, in alphabetical order."""
        counts = self.pairs["split"].value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: str(entry["values"]))}

    def publish(self) -> str:
        """Write the manifest into its store, unless this very one is there; return its URI.

        Raises:
            ShardError: There is a damaged file of this name.
            StoreError: The store cannot be written.
        """
        if not Store.from_uri(self.store_uri).create_bytes(self.path, self.encode()):
            Manifest.load(self.uri)
        return self.uri

    def encode(self) -> bytes:
        """Return the manifest's file, which also carries a hash of its own bytes (`pipeline.sealed`)."""
        metadata = {_METADATA_KEY: canonical_json(self._metadata()).encode()}
        stream = io.BytesIO()
        pq.write_table(self.pairs.replace_schema_metadata(metadata), stream, compression="zstd")
        return seal(stream.getvalue())

    def split(self, name: str) -> pa.Table:
        """Return the rows of one split, in the manifest's order.

        Raises:
            DataError: There is no such split.
        """
        if name not in self.splits:
            raise DataError(f"split {name!r} is not in {self.uri}; it has {', '.join(self.splits)}")
        return rows_where(self.pairs, "split", name)

    def location_m(self, split: str) -> npt.NDArray[np.float64]:
        """Return where a split's pairs were taken, [N, 3] in metres: straight distances between rows are distances.

        Where the dataset gives easting and northing to all its located pairs (CVACT) a row is (easting, northing, 0),
        else the earth-centred position of `geography.geocentric_m`. The choice is one for all splits.

        Returns:
            NaN in the rows without a location.
        """
        here = self.split(split)
        if _is_on_a_plane(self.pairs):
            plane_m = _columns(here, *_PLANE)
            return np.concatenate([plane_m, 0 * plane_m[:, :1]], axis=1)
        return geocentric_m(*_columns(here, *_DEGREES).T)

    @property
    def path(self) -> str:
        """Where the manifest is within its store, once published."""
        return f"{_FOLDER}/{self.digest[:_DIGEST_CHARACTERS]}.parquet"

    def _metadata(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "layout": self.layout,
            "plan": self.plan,
            "profile": self.profile.plain(),
            "shards": [asdict(shard) for shard in self.shards],
            "excluded": [asdict(problem) for problem in self.excluded],
        }

    def _compute_digest(self) -> str:
        content = hashlib.sha256(canonical_json(self._metadata()).encode())
        for name in PAIR_SCHEMA.names:
            content.update(name.encode())
            content.update(_column_bytes(self.pairs[name]))
        return content.hexdigest()


def pair_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return manifest rows as a table with `PAIR_SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=PAIR_SCHEMA)


def canonical_json(content: Any) -> str:
    """Return plain data as the one JSON text that equal content always has."""
    return _CANONICAL.encode(content)


def _column_bytes(column: pa.ChunkedArray) -> bytes:
    """Return a column's content as bytes that do not depend on how Arrow holds it."""
    if pa.types.is_string(column.type):
        return canonical_json(column.to_pylist()).encode()
    values = column.fill_null(0).to_numpy()
    is_null = np.packbits(column.is_null().to_numpy())
    return b"".join([values.astype(values.dtype.newbyteorder("<")).tobytes(), is_null.tobytes()])


def _is_on_a_plane(pairs: pa.Table) -> bool:
    has_plane, has_degrees = (np.isfinite(_columns(pairs, *names)).all(axis=1) for names in (_PLANE, _DEGREES))
    return bool(has_plane.any() and (has_plane | ~has_degrees).all())


def _columns(pairs: pa.Table, *names: str) -> npt.NDArray[np.float64]:
    columns = [pairs[name].to_numpy(zero_copy_only=False) for name in names]
    return np.stack([column.astype(np.float64) for column in columns], axis=1)
