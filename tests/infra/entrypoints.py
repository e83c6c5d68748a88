"""Command lines of declarations, read by the jobs' own parsers."""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Sequence

from jobs import config
from jobs.search import config as search_config


class _RefusedError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise _RefusedError(message)


def problems(command: str | Sequence[str]) -> list[str]:
    """Parse `python -m jobs.NAME ...` as that job would, configuration keys and presets included."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    if words[:2] != ["python", "-m"] or not words[2].startswith("jobs."):
        return [f"not `python -m jobs.NAME ...`: {words[:3]}"]
    try:
        job = importlib.import_module(words[2]).JOB
    except ImportError as error:
        return [str(error)]
    parser = _Parser()
    job.add_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args(words[3:])
        if job.name == "train":
            config.load(arguments.config, arguments.overrides)
        if job.name == "tune":
            spec = search_config.load_search(arguments.spec)
            search_config.base_of(spec, manifest=arguments.manifest, out=arguments.out, overrides=arguments.overrides)
    except (_RefusedError, config.ConfigError) as error:
        return [str(error)]
    return []
