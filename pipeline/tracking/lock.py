"""A lock in MLflow's own database, so that all who can move an alias exclude each other, wherever they run.

MLflow has no compare-and-swap. But the name of a registered model is unique, its creation is one transaction, and
unlike an experiment's it is free again once deleted. So a registered model of a known name is the lock: whoever creates
it holds it, its description tells people who that is, and no trace stays.

A holder that died leaves it behind. Those who wait recognise that by their own clock: the same text has stood there for
longer than any holder may work. They rename it to a name made of that very text's token: of several that try, one
succeeds, and as the name is taken until that one is done, a slow one cannot take away the next holder's lock. A holder
asks right before what it guards whether the lock is still its own, and gives up after half of that time.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cvft.errors import CvftError
from pipeline.tracking.server import is_refusal

STALE_S = 60.0
_PAUSE_S = 0.1
_LOGGER = logging.getLogger(__name__)


class LockLostError(CvftError):
    """A lock was held for so long that it may be another's now."""


@contextmanager
def registry_lock(client: MlflowClient, name: str, *, stale_s: float = STALE_S) -> Iterator[Callable[[], None]]:
    """Hold a lock; wait for it as long as others hold it.

    Args:
        client: Of the place; sqlite or a server.
        name: Name of the registered model that is the lock.
        stale_s: Time after which a lock whose holder does not change counts as left behind; the same for all.

    Yields:
        A function to call right before what the lock guards; raises LockLostError if the lock was taken away.
    """
    own = _own_text()
    tombstones: list[str] = []
    _acquire(client, name, own, stale_s=stale_s, tombstones=tombstones)
    acquired = time.monotonic()

    def check() -> None:
        if time.monotonic() - acquired > stale_s / 2 or _text_at(client, name) != own:
            raise LockLostError(
                f"the lock {name!r} was held for more than {stale_s / 2:g} s and may be another's now: nothing was"
                " moved; run it again"
            )

    try:
        yield check
    finally:
        _release(client, name, own, tombstones)


def _own_text() -> str:
    """Say who holds the lock: for people, and to tell holders apart."""
    owner = {
        "held_by": os.environ.get("USER", str(os.getuid())),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }
    return json.dumps(owner)


def _acquire(client: MlflowClient, name: str, own: str, *, stale_s: float, tombstones: list[str]) -> None:
    seen, since = "", time.monotonic()
    while (there := _create(client, name, own)) != own:
        if there != seen:
            seen, since = there, time.monotonic()
        elif seen and time.monotonic() - since > stale_s:
            _LOGGER.warning("breaking the lock %s, left behind %g s ago or more: %s", name, stale_s, seen)
            tombstone = _break(client, name, seen)
            if tombstone is not None:
                tombstones.append(tombstone)
            seen = ""
        time.sleep(_PAUSE_S)


def _create(client: MlflowClient, name: str, own: str) -> str:
    """Try to take the lock and return its text: our own, even where the answer to a first try was lost."""
    try:
        client.create_registered_model(name, description=own)
    except MlflowException as error:
        # It is there; or it was, and its holder let go before MLflow had looked who that is.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return _text_at(client, name)
    return own


def _text_at(client: MlflowClient, name: str) -> str:
    """Return the lock's text; empty if nobody holds it."""
    try:
        return client.get_registered_model(name).description or ""
    except MlflowException as error:
        if not is_refusal(error):
            raise
        return ""


def _break(client: MlflowClient, name: str, seen: str) -> str | None:
    """Move a lock aside that holds this text, and return where to; None if another one was faster."""
    if _text_at(client, name) != seen:
        return None
    tombstone = f"{name}.{json.loads(seen)['token']}"
    try:
        client.rename_registered_model(name, tombstone)
    except MlflowException:  # a refusal, or whatever a database says to the second of two at the same row
        if _text_at(client, name) == seen:
            raise
        return None
    return tombstone


def _release(client: MlflowClient, name: str, own: str, tombstones: list[str]) -> None:
    try:
        if _text_at(client, name) == own:
            client.delete_registered_model(name)
        for tombstone in tombstones:
            client.delete_registered_model(tombstone)
    except MlflowException as error:  # what it guarded is done or has raised: that matters more
        _LOGGER.warning("the lock %s stays, and will be broken as one left behind: %s", name, error)
