"""One pass over whole shards in their order, through `webdataset`: for evaluation and embedding, which need every pair.

A remote shard is read as a stream and kept nowhere. `webdataset` leaves out what it cannot pair up and stops at the end
of the first of two joined tars, both in silence; here everything it gives is held against the manifest.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3
from webdataset.tariterators import group_by_keys, tar_file_expander

from cvft.batch import Batch
from cvft.config import PreprocessConfig
from cvft.errors import CvftError, ShardError
from pipeline import sampler
from pipeline.dataset import PairBytes, PairDataset
from pipeline.decoding import Decoder, Request
from pipeline.manifest import Manifest, ShardInfo
from pipeline.schema import ROLES
from pipeline.storage import Store

_BUFFER_BYTES = 1024 * 1024
_MEMBERS = sorted([*ROLES, "json"])


@dataclass(frozen=True, kw_only=True)
class _Expected:
    """A pair that a shard must hold: its key, its images' hashes, and whether it belongs to the split."""

    key: str
    digests: Sequence[str]
    is_wanted: bool


def eval_batches(
    dataset: PairDataset, *, preprocess: PreprocessConfig, batch_size: int, num_threads: int = 2
) -> Iterator[Batch]:
    """Yield the batches that `Loader.eval_batches` yields in a single process, from one pass over the shards.

    Args:
        dataset: The split; its shards are not read through it.
        preprocess: Gives the sizes in pixels and the decode profile.
        batch_size: Pairs of a batch.
        num_threads: Decoding threads; one more reads.

    Raises:
        ConfigError: A number is out of range, or the decode profile does not fit the dataset's.
        DataError: An image cannot be decoded; names its shard and key.
        ShardError: A shard is not the one that the manifest describes; names it.
        StoreError: A shard cannot be read.
    """
    sampler.check_shared(batch_size, world_size=1)
    decoder = Decoder(dataset, preprocess=preprocess, size=batch_size, num_threads=num_threads)
    return _decode(decoder, dataset, batch_size)


def _decode(decoder: Decoder, dataset: PairDataset, batch_size: int) -> Iterator[Batch]:
    pairs = read_pairs(dataset.manifest, dataset.split)
    reader = ThreadPoolExecutor(1, thread_name_prefix="read")

    def request(rows: sampler.Indices, num_valid: int) -> Request:
        coming: Future[list[PairBytes]] = reader.submit(lambda: list(islice(pairs, num_valid)))
        first = int(rows[0])
        return Request(rows=rows, num_valid=num_valid, read=lambda row: coming.result()[row - first])

    try:
        yield from decoder.batches(
            request(rows, num_valid) for rows, num_valid in sampler.eval_batches(len(dataset), batch_size=batch_size)
        )
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
        pairs.close()


def read_pairs(manifest: Manifest, split: str) -> Generator[PairBytes]:
    """Yield the images of every pair of a split, in the manifest's order.

    Raises:
        DataError: There is no such split.
        ShardError: A shard is not the one that the manifest describes; names it.
        StoreError: A shard cannot be read.
    """
    store = Store.from_uri(manifest.store_uri)
    shards = manifest.split(split)["shard"].to_numpy()
    if (np.diff(shards) < 0).any():
        raise ShardError(f"{manifest.uri}: the pairs of {split} do not stand in the order of their shards; shard again")
    for number in np.unique(shards).tolist():
        yield from _read_shard(store, manifest.shards[number], _expected_pairs(manifest, number, split))


def _expected_pairs(manifest: Manifest, number: int, split: str) -> list[_Expected]:
    rows = manifest.pairs.filter(np.asarray(manifest.pairs["shard"]) == number).sort_by("ground_offset")
    digests = zip(*(rows[f"{role}_xxh3_128"].to_pylist() for role in ROLES), strict=True)
    return [
        _Expected(key=key, digests=pair, is_wanted=of_split == split)
        for key, of_split, pair in zip(rows["key"].to_pylist(), rows["split"].to_pylist(), digests, strict=True)
    ]


def _read_shard(store: Store, shard: ShardInfo, expected: Sequence[_Expected]) -> Iterator[PairBytes]:
    name = store.uri(shard.name)
    with store.open_input(shard.name) as source:
        stream = _CountedStream(source)
        buffered = io.BufferedReader(stream, _BUFFER_BYTES)
        samples = group_by_keys(tar_file_expander([{"url": name, "stream": buffered}]))
        try:
            for sample, pair in zip_longest(samples, expected):
                stream.raise_failure()
                images = _check_pair(sample, pair, name)
                if pair.is_wanted:
                    yield images
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            stream.raise_failure()
            raise ShardError(f"{name}: the tar is damaged ({error.args[0]}); run verify on it") from None
        while buffered.read(_BUFFER_BYTES):  # what stands behind the tar's end
            pass
        stream.raise_failure()
        if (stream.num_bytes, stream.content.hexdigest()) != (shard.num_bytes, shard.blake3):
            raise ShardError(
                f"{name}: is not the shard that the manifest describes: {stream.num_bytes} bytes with blake3 "
                f"{stream.content.hexdigest()[:16]}, not {shard.num_bytes} with {shard.blake3[:16]}; run verify on it"
            )


def _check_pair(sample: dict[str, Any] | None, pair: _Expected | None, name: str) -> PairBytes:
    if pair is None:
        raise ShardError(f"{name}: holds more pairs than the manifest says; run verify on it")
    if sample is None:
        raise ShardError(f"{name}: lacks key {pair.key}; run verify on it")
    members = {suffix.partition(".")[0]: data for suffix, data in sample.items() if not suffix.startswith("__")}
    if sample["__key__"] != pair.key or sorted(members) != _MEMBERS or len(sample) != len(_MEMBERS) + 2:
        found = ", ".join(suffix for suffix in sample if not suffix.startswith("__"))
        raise ShardError(
            f"{name}: where the manifest has key {pair.key} stands {sample['__key__']} with {found}; run verify on it"
        )
    for role, digest in zip(ROLES, pair.digests, strict=True):
        if xxhash.xxh3_128_hexdigest(members[role]) != digest:
            raise ShardError(
                f"{name}, key {pair.key}: the {role} image's bytes have changed since they were sharded; run verify"
            )
    return memoryview(members["ground"]), memoryview(members["aerial"])


class _CountedStream(io.RawIOBase):
    """A store's stream that knows what went through it.

    `webdataset` adds to the messages of errors that pass through it, so a store's error ends the stream here and is
    raised behind it.
    """

    def __init__(self, source: Any) -> None:
        self.num_bytes = 0
        self.content = blake3()
        self._source = source
        self._failure: CvftError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except CvftError as error:
            self._failure = error
            return 0
        self.content.update(data)
        self.num_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
