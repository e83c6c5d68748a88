"""Are a dataset's files still what its manifest says? Presence, sizes, hashes, the index, every image, the sidecars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from cvft.configuration import require
from cvft.errors import ShardError, StoreError
from pipeline.manifest import PAIR_SCHEMA, Manifest, ShardInfo
from pipeline.parquet import rows_where
from pipeline.plan import document_path
from pipeline.sampler import epoch_permutation
from pipeline.sealed import is_whole
from pipeline.shard_checks import DAMAGE_KINDS, Damage, ShardTask, check_shard, pair_spans
from pipeline.shards import read_entry, sidecar_path
from pipeline.storage import FileStatus, Store

Files = Mapping[str, FileStatus]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        num_shards: Shards of the manifest; presence, size and sidecar of all were looked at, and the manifest's bytes.
        num_pairs: Pairs whose bytes were read and compared.
        num_bytes: Bytes of shards read.
        damages: Everything found, in the manifest's order.
    """

    num_shards: int
    num_pairs: int
    num_bytes: int
    damages: Sequence[Damage]

    @property
    def kinds(self) -> dict[str, int]:
        """How often each kind of damage occurs, kinds in alphabetical order."""
        return dict(sorted(Counter(damage.kind for damage in self.damages).items()))


def verify(
    manifest: Manifest,
    *,
    num_sampled: int | None = None,
    seed: int = 0,
    num_threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Hold a dataset's files against its manifest.

    Args:
        manifest: As it was loaded, so that its content is what its name says.
        num_sampled: Read so many pairs, by range, and no shard as a whole; everything if none; 0 looks at sizes and
            sidecars alone.
        seed: Of the choice of those pairs.
        num_threads: Shards are read in so many threads, each with one pair in memory.
        progress: Called with the number of pairs read and of all to be read.

    Raises:
        ConfigError: A number is out of range.
        StoreError: The store cannot be listed, or the manifest not be read.
    """
    require(num_threads >= 1, f"num_threads: {num_threads} must be at least 1")
    require(num_sampled is None or num_sampled >= 0, f"num_sampled: {num_sampled} must not be negative")
    store = Store.from_uri(manifest.store_uri)
    files = _list_files(manifest, store)
    numbers = range(len(manifest.shards))
    damages = _check_documents(manifest, store)
    sizes = [_check_size(manifest.shards[number], number, files) for number in numbers]
    damages += (found for found in sizes if found)
    tasks = _tasks(manifest, [number for number in numbers if not sizes[number]], num_sampled=num_sampled, seed=seed)
    num_pairs, total = 0, sum(len(task.spans) for task in tasks)
    with ThreadPoolExecutor(num_threads) as pool:
        damages += (found for found in pool.map(partial(_check_sidecar, manifest, store, files), numbers) if found)
        for task, found in zip(tasks, pool.map(partial(check_shard, store), tasks), strict=True):
            damages += found
            num_pairs += len(task.spans)
            if progress is not None:
                progress(num_pairs, total)
    return VerifyReport(
        num_shards=len(manifest.shards),
        num_pairs=total,
        num_bytes=sum(span.stop - span.start for task in tasks for span in task.spans),
        damages=sorted(damages, key=lambda damage: -1 if damage.shard is None else damage.shard),
    )


def _tasks(manifest: Manifest, numbers: Sequence[int], *, num_sampled: int | None, seed: int) -> list[ShardTask]:
    chosen = None
    if num_sampled is not None:
        order = epoch_permutation(manifest.pairs.num_rows, seed=seed, epoch=0)[:num_sampled]
        chosen = frozenset(manifest.pairs["key"].take(order).to_pylist())
    tasks = []
    for number in numbers:
        shard = manifest.shards[number]
        rows = rows_where(manifest.pairs, "shard", number).to_pylist()
        spans = [span for span in pair_spans(rows, shard) if chosen is None or span.row["key"] in chosen]
        tasks.append(ShardTask(number=number, shard=shard, spans=spans, is_whole=chosen is None))
    return [task for task in tasks if task.spans]


def _list_files(manifest: Manifest, store: Store) -> Files:
    folders = sorted({shard.name.rpartition("/")[0] for shard in manifest.shards})
    return {path: status for folder in folders for path, status in store.list_sizes(folder).items()}


def _check_documents(manifest: Manifest, store: Store) -> list[Damage]:
    """Look at every byte of the manifest, whose content is known to be right, it was loaded; and at its plan."""
    damages = []
    for kind, path in (("damaged_manifest", manifest.path), ("damaged_plan", document_path(manifest.plan))):
        if not store.exists(path) or not is_whole(store.read_bytes(path)):
            damages.append(Damage(kind=kind, path=path, detail=DAMAGE_KINDS[kind], shard=None))
    return damages


def _check_size(shard: ShardInfo, number: int, files: Files) -> Damage | None:
    damage = partial(Damage, path=shard.name, shard=number)
    status = files.get(shard.name)
    if status is None:
        return damage(kind="missing_shard", detail=DAMAGE_KINDS["missing_shard"])
    if status.num_bytes != shard.num_bytes:
        detail = f"{status.num_bytes} bytes, the manifest says {shard.num_bytes}"
        return damage(kind="wrong_size", detail=detail)
    return None


def _check_sidecar(manifest: Manifest, store: Store, files: Files, number: int) -> Damage | None:
    shard = manifest.shards[number]
    path = sidecar_path(shard.name)
    damage = partial(Damage, path=path, shard=number)
    if path not in files:
        return damage(kind="missing_sidecar", detail=DAMAGE_KINDS["missing_sidecar"])
    try:
        entry = read_entry(store, path)
    except ShardError as error:
        return damage(kind="bad_sidecar", detail=str(error).removeprefix(store.uri(path)).lstrip(": "))
    except StoreError as error:
        return damage(kind="unreadable", detail=str(error))
    rows = rows_where(manifest.pairs, "shard", number)
    columns = {name: rows[name].to_pylist() for name in PAIR_SCHEMA.names if name != "shard"}
    if entry.info != shard or entry.columns != columns:
        return damage(kind="bad_sidecar", detail="it tells of another shard than the manifest")
    return None
