"""Labels of a cluster's nodes, by which a job chooses where it runs: `ray.io/node-group=gpu`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from cvft.configuration import require
from cvft.errors import ConfigError


def add_node_label(parser: argparse.ArgumentParser) -> None:
    """Declare `--node-label`."""
    parser.add_argument(
        "--node-label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the cluster's nodes to run on, such as ray.io/node-group=cpu; repeat it (default: any node)",
    )


def parse_labels(texts: Sequence[str], *, option: str) -> dict[str, str]:
    """Read labels of nodes, written `key=value`.

    Raises:
        ConfigError: One is written otherwise.
    """
    labels = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not (key and separator and value):
            raise ConfigError(f"{option} {text}: is written KEY=VALUE, such as ray.io/node-group=gpu")
        labels[key] = value
    check_labels(labels, option)
    return labels


def check_labels(labels: Mapping[str, str], name: str) -> None:
    """Refuse what Ray would take for an expression.

    Raises:
        ConfigError: A value is no plain word.
    """
    for key, value in labels.items():
        require(value != "" and not set("!()") & set(value), f"{name}: {key}={value}: must be one plain value")
