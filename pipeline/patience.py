"""Waiting for a store that is away: what may pass by itself is tried again for a while, all else is raised at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from cvft.errors import StoreUnavailableError

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


def patiently(function: Callable[[], T], *, patience_s: float) -> T:
    """Call a function until its store answers, with growing pauses.

    An S3 client has tried for about half a minute already when it says that the store is away, so that the patience may
    be exceeded by as much.

    Args:
        function: May be called several times.
        patience_s: Time after which it is not called once more.

    Raises:
        StoreUnavailableError: The store is still away.
    """
    begun = time.monotonic()
    pause_s, num_failures = FIRST_PAUSE_S, 0
    while True:
        try:
            result = function()
        except StoreUnavailableError as error:
            left_s = begun + patience_s - time.monotonic()
            if left_s <= 0:
                raise
            num_failures += 1
            pause_s = min(pause_s, left_s)
            _LOGGER.warning("%s; trying again in %.0f s, for %.0f s more", error, pause_s, left_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            if num_failures:
                _LOGGER.warning("the store is back after %.0f s", time.monotonic() - begun)
            return result
