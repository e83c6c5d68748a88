"""A Ray of the tests' own on a busy machine."""

from typing import Any

import ray


def init_ray(*address: str, **options: Any) -> None:
    """Call `ray.init`; where Ray's parts miss their own deadline of 30 s it is tried again, as jobs do."""
    for is_last in (False, False, False, True):
        try:
            ray.init(*address, **options)
        except Exception as error:  # Ray has no error of its own for it
            ray.shutdown()
            if is_last or "timed out during startup" not in str(error):
                raise
        else:
            return
