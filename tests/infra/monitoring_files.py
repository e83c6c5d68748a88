"""What `infra/monitoring` draws and watches, read for the tests: expressions, and the metrics in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import ray

from jobs.metrics import METRICS
from tests.infra import validators

FOLDER = validators.INFRA / "monitoring"


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dashboards" / "cvft.json").read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def targets() -> list[tuple[str, str]]:
    """Each panel's title and the expressions it draws, with Grafana's variables filled in."""
    return [(panel["title"], filled(target["expr"])) for panel in panels() for target in panel["targets"]]


def filled(expression: str) -> str:
    return expression.replace("$run", ".*").replace("$__range", "1h")


def alerts() -> list[dict[str, Any]]:
    (rules,) = validators.documents(FOLDER / "rules" / "alerts.yml")
    return [rule for group in rules["groups"] for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """The metrics that an expression reads.

    Raises:
        ValueError: It is not PromQL.
    """
    return set(_names(promql_parser.parse(expression)))


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield str(node.name)
    for attribute in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, attribute, None)
        if child is not None and not isinstance(child, (str, float, int)):
            yield from _names(child)
    for child in getattr(node, "args", ()):
        yield from _names(child)


def exported() -> set[str]:
    """Our metrics as Prometheus sees them."""
    return {f"ray_{name}" + ("_total" if kind == "counter" else "") for name, (kind, _, _) in METRICS.items()}


def of_ray() -> set[str]:
    """Ray's own: those that the dashboards in its wheel draw, and those of its reporter on each node."""
    modules = Path(ray.__file__).parent / "dashboard" / "modules"
    drawn = "".join(path.read_text(encoding="utf-8") for path in (modules / "metrics" / "dashboards").glob("*.py"))
    reporter = (modules / "reporter" / "reporter_agent.py").read_text(encoding="utf-8")
    told = re.findall(r'^    "(node_\w+)": Gauge\(', reporter, flags=re.MULTILINE)
    return set(re.findall(r"\bray_\w+", drawn)) | {f"ray_{name}" for name in told}
