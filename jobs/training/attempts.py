"""Who may write into a run's folder: of all drivers and worker groups the one that began last.

A killed driver's workers live on for seconds, those on a node that lost its network for minutes; meanwhile the same
command may have been given again. Each driver leaves its token in the run's folder, and each group of workers that
starts for it leaves one of its own beside it, by compare-and-swap. Before a checkpoint is published and before one is
deleted, the writer looks whether its tokens still stand there.

Between that look and the write there is an instant in which another attempt may begin. What is published then is a
whole checkpoint of the same training, as good to go on from as any other.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass

from cvft.errors import StoreError, TrainingError
from pipeline.storage import Store

ATTEMPT_FILE = "attempt.json"
_RACES = 100  # groups of one driver that claim at once are a few


class TakenOverError(TrainingError):
    """Another driver or another group of workers goes on with this run."""


@dataclass(frozen=True)
class Claim:
    """The right to write into a run's folder, until the next claim.

    Attributes:
        store: The run's folder.
        attempt: Token of the driver.
        group: Token of the group of workers; none before there is one.
    """

    store: Store
    attempt: str
    group: str | None = None

    def check(self) -> None:
        """Pass while this is the last claim.

        Raises:
            TakenOverError: It is not.
            StoreError: The store cannot be read.
        """
        if not self.is_last():
            raise _taken_over(self.store)

    def is_last(self) -> bool:
        """Tell whether this is the last claim.

        Raises:
            StoreError: The store cannot be read.
        """
        found = self.store.read_versioned(ATTEMPT_FILE)
        return found is not None and found[0] == self.encode()

    def encode(self) -> bytes:
        """Return the file's content."""
        tokens = asdict(self)
        del tokens["store"]
        return json.dumps(tokens).encode()


def begin_attempt(store: Store) -> str:
    """Take the run over for a driver and return its token.

    Raises:
        StoreError: The store cannot be written.
    """
    attempt = uuid.uuid4().hex
    store.write_bytes(ATTEMPT_FILE, Claim(store, attempt).encode())
    return attempt


def claim(store: Store, attempt: str) -> Claim:
    """Take the run over for a group of workers of the driver `attempt`.

    Raises:
        TakenOverError: Another driver has begun since.
        StoreError: The store cannot be read or written.
    """
    mine = Claim(store, attempt, group=uuid.uuid4().hex)
    for _ in range(_RACES):
        found = store.read_versioned(ATTEMPT_FILE)
        if found is None or _attempt_of(found[0]) != attempt:
            raise _taken_over(store)
        if store.replace_bytes(ATTEMPT_FILE, mine.encode(), found[1]):
            return mine
    raise StoreError(
        f"{store.uri(ATTEMPT_FILE)}: the store refuses to replace it, though nobody changes it; Ceph 16 does so in a "
        "bucket that keeps versions: use one that does not"
    )


def is_current(store: Store, attempt: str) -> bool:
    """Tell whether no other driver has begun since `attempt`.

    Raises:
        StoreError: The store cannot be read.
    """
    found = store.read_versioned(ATTEMPT_FILE)
    return found is not None and _attempt_of(found[0]) == attempt


def check_current(store: Store, attempt: str) -> None:
    """Pass while no other driver has begun since `attempt`.

    Raises:
        TakenOverError: One has.
        StoreError: The store cannot be read.
    """
    if not is_current(store, attempt):
        raise _taken_over(store)


def _attempt_of(data: bytes) -> str:
    return str(json.loads(data)["attempt"])


def _taken_over(store: Store) -> TakenOverError:
    return TakenOverError(
        f"{store.uri()}: another `train` has taken this run over, and goes on with it; this one stops"
    )
