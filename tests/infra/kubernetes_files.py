"""The manifests of `infra/kuberay`, and what kustomize makes of them, read for the tests."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra import validators

KUBERAY = validators.INFRA / "kuberay"
QUEUES = KUBERAY / "queues" / "kueue.yaml"  # Kueue's own kinds, of which no schema is kept here: see test_queues.py
FILES = sorted(path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml" and path != QUEUES)
BUILDS = sorted(path.parent for path in KUBERAY.glob("*/*/kustomization.yaml") if path.parts[-3] != "components")


def short_name(path: Path) -> str:
    """Where a file or folder is below `infra/kuberay`."""
    return str(path.relative_to(KUBERAY))


@cache
def build(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder; skips the test where it is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: what kustomize makes of the overlays was not looked at")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def ray_cluster() -> dict[str, Any]:
    """The RayCluster that all others are made of."""
    (found,) = validators.documents(KUBERAY / "base" / "cluster" / "raycluster.yaml")
    return found
