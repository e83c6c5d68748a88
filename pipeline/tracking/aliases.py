"""Which version an alias names, moved by one process at a time and never past a version that the mover does not know.

The registered model's tag `<alias>_history` lists the versions that the alias named, oldest first; going back twice
goes back two of them. The alias itself is the truth: where it was moved by hand, the list follows it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cvft.errors import CvftError
from pipeline.tracking.lock import STALE_S, registry_lock
from pipeline.tracking.server import is_refusal

_MAX_HISTORY = 1000
_LOGGER = logging.getLogger(__name__)


class AliasMovedError(CvftError):
    """The alias names another version than the mover thinks: somebody was faster.

    Attributes:
        current: The version that it names; None for none.
    """

    def __init__(self, message: str, *, current: int | None) -> None:
        super().__init__(message)
        self.current = current


class NothingToRollBackError(CvftError):
    """The alias has named no other version before."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """What a rollback did.

    Attributes:
        version_from: The version that the alias named.
        version_to: The one that it names now.
    """

    version_from: int
    version_to: int


def aliased_version(client: MlflowClient, name: str, alias: str) -> int | None:
    """Return the version that an alias names, or none."""
    try:
        version = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if is_refusal(error):
            return None
        raise
    return None if version is None else int(version)


def move_alias(
    client: MlflowClient, name: str, alias: str, *, expected: int | None, to: int, stale_s: float = STALE_S
) -> None:
    """Move an alias from the version that it is expected to name, and keep that one in the history.

    Args:
        client: Of the place.
        name: Registered model.
        alias: What is moved.
        expected: The version that it names now; None for none.
        to: The version that it shall name.
        stale_s: See `registry_lock`.

    Raises:
        AliasMovedError: It names another version; nothing was moved.
        LockLostError: The lock was lost; nothing was moved.
    """
    with registry_lock(client, _lock_name(name, alias), stale_s=stale_s) as check:
        history = alias_history(client, name, alias)
        current = history[-1] if history else None
        if current != expected:
            now, then = (f"version {number}" if number else "no version" for number in (current, expected))
            raise AliasMovedError(
                f"{alias} of {name} is {now} by now and was {then} when this began: nothing was moved; run it again",
                current=current,
            )
        check()
        if current is not None:
            client.set_model_version_tag(name, str(to), f"previous_{alias}", str(current))
        _write(client, name, alias, [*history, to])


def roll_back(client: MlflowClient, name: str, alias: str, *, stale_s: float = STALE_S) -> Rollback:
    """Move an alias back to the version that it named before; versions deleted meanwhile are passed over and named.

    Raises:
        NothingToRollBackError: There is none.
        LockLostError: The lock was lost; nothing was moved.
    """
    with registry_lock(client, _lock_name(name, alias), stale_s=stale_s) as check:
        history = alias_history(client, name, alias)
        if not history:
            raise NothingToRollBackError(
                f"{name} has no {alias}, so there is nothing to roll back; `cvft models` lists its versions"
            )
        before = history[:-1]
        while before and not _exists(client, name, before[-1]):
            _LOGGER.warning("version %d of %s, %s before, was deleted: going back further", before.pop(), name, alias)
        if not before:
            raise NothingToRollBackError(
                f"version {history[-1]} is the first {alias} of {name} that is known: there is none before it to go"
                " back to; promote another one"
            )
        check()
        _write(client, name, alias, before)
        return Rollback(version_from=history[-1], version_to=before[-1])


def alias_history(client: MlflowClient, name: str, alias: str) -> list[int]:
    """Return the versions that an alias named, oldest first; the last is the one that it names now."""
    current = aliased_version(client, name, alias)
    if current is None:
        return []
    text = client.get_registered_model(name).tags.get(f"{alias}_history")
    history = [int(version) for version in json.loads(text)] if text else _history_by_tags(client, name, alias, current)
    if current not in history:
        return [*history, current]
    last = len(history) - 1 - history[::-1].index(current)
    return history[: last + 1]


def _history_by_tags(client: MlflowClient, name: str, alias: str, current: int) -> list[int]:
    """Follow the versions' tags, which were all there was before the history had a tag of its own."""
    history = [current]
    while _exists(client, name, history[0]):
        previous = client.get_model_version(name, str(history[0])).tags.get(f"previous_{alias}")
        if previous is None or int(previous) in history:
            break
        history.insert(0, int(previous))
    return history


def _write(client: MlflowClient, name: str, alias: str, history: list[int]) -> None:
    """Keep the history, and then move the alias: between the two, the alias is still the truth."""
    client.set_registered_model_tag(name, f"{alias}_history", json.dumps(history[-_MAX_HISTORY:]))
    client.set_registered_model_alias(name, alias, str(history[-1]))


def _exists(client: MlflowClient, name: str, version: int) -> bool:
    try:
        client.get_model_version(name, str(version))
    except MlflowException as error:
        if is_refusal(error):
            return False
        raise
    return True


def _lock_name(name: str, alias: str) -> str:
    return f"{name}.{alias}.lock"
