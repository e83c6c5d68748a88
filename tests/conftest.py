"""Fixtures shared by all tests: one local Ray for the whole session."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Ray 2.60 switches token authentication on by itself, and writes a token below the home folder, unless told.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Two CPUs whatever the machine has; sockets have short names, so the folder must not be pytest's long one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=_short_folder(tmp_path_factory))
    yield
    ray.shutdown()


def _short_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("r", numbered=True))
