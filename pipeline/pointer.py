"""`<store>/dataset.json`: which manifest is the dataset's newest.

The pointer is the only file of a store that ever changes. It is moved by compare-and-swap, so that of two jobs racing
for one dataset exactly one moves it, and the other learns of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from cvft.errors import ShardError
from pipeline.storage import Store

POINTER_FILE = "dataset.json"
_FORMAT = 1
_MANIFEST = re.compile(r"manifests/([0-9a-f]{16})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """What the pointer says.

    Attributes:
        generation: 1 for a dataset's first manifest, then one more for each.
        manifest: The manifest's path within the store.
        digest: Its digest.
        previous: The digest of the generation before, if there is one.
    """

    generation: int
    manifest: str
    digest: str
    previous: str | None

    def encode(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2).encode()


def read_pointer(store: Store) -> Pointer | None:
    """Return what the store's pointer says, or None if there is none.

    Raises:
        ShardError: It is damaged.
        StoreError: It cannot be read.
    """
    return read_versioned_pointer(store)[0]


def read_versioned_pointer(store: Store) -> tuple[Pointer, str] | tuple[None, None]:
    """Return the pointer and its version, as `move_pointer` takes it; twice None if there is no pointer.

    Raises:
        ShardError: It is damaged.
        StoreError: It cannot be read.
    """
    found = store.read_versioned(POINTER_FILE)
    return (None, None) if found is None else (_decode(found[0], store), found[1])


def move_pointer(store: Store, pointer: Pointer, version: str | None) -> Pointer:
    """Move the pointer if it is still of that version; return what it says afterwards, one's own or the winner's.

    Args:
        store: The dataset's store.
        pointer: What it shall say.
        version: The version that it was read at; None if there was none.

    Raises:
        ShardError: The winner's is damaged.
        StoreError: The store cannot be read or written.
    """
    if store.replace_bytes(POINTER_FILE, pointer.encode(), version):
        return pointer
    winner, _ = read_versioned_pointer(store)
    if winner is None:
        raise ShardError(f"{store.uri(POINTER_FILE)}: was deleted while a job ran; shard again")
    return winner


def _decode(data: bytes, store: Store) -> Pointer:
    """Return what a pointer file's content says.

    Raises:
        ShardError: It is damaged, or of a later format.
    """
    try:
        content = json.loads(data)
        is_known = content.pop("format") == _FORMAT
        pointer = Pointer(**content)
        name = _MANIFEST.fullmatch(pointer.manifest)
        if is_known and (not isinstance(pointer.generation, int) or not name or not pointer.digest.startswith(name[1])):
            raise ValueError("manifest, digest and generation do not fit together")  # noqa: TRY301 (one of many kinds)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{store.uri(POINTER_FILE)}: is damaged ({reason}); delete it and shard again") from None
    if not is_known:
        raise ShardError(f"{store.uri(POINTER_FILE)}: is of another format than {_FORMAT}; update this program")
    return pointer
