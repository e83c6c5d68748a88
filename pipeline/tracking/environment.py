"""What a run was computed with: Python, torch's build, the commit, and every installed package."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys

import torch


def environment_text(*, commit: str | None) -> str:
    """Return the environment of this process as a requirements file with comments; the same one gives the same text.

    Args:
        commit: Commit of the code.
    """
    facts = {
        "commit": commit or "unknown",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": f"{torch.__version__}, git {torch.version.git_version}",
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),  # type: ignore[no-untyped-call]  # not in torch's stubs
    }
    # The first of a name on the path is the one that is imported.
    versions: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        versions.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package.version)
    lines = [f"# {name}: {value}" for name, value in facts.items()]
    lines += [f"{name}=={version}" for name, version in sorted(versions.items())]
    return "\n".join(lines) + "\n"
