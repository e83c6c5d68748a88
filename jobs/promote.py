"""Compare a candidate with the champion on the same pairs, and let it take its place if the gate says so.

    python -m jobs.promote --candidate models:/cvft@candidate --manifest demo/shards/manifests/0123.parquet

Exit code 0: the candidate is champion now, or was already. Exit code 2: it is not, and the result says why.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cvft.configuration import parse, require, to_plain
from cvft.errors import ConfigError, CvftError, StoreError
from jobs import entry
from jobs.config import read_overrides, read_yaml
from jobs.measuring import MeasuredVersion, Protocol, comparison_table, measure_versions, notes_on
from jobs.registering import CANDIDATE, find_candidate, origin_of
from jobs.tracking_config import default_uri
from pipeline.model_card import model_card
from pipeline.model_facts import Comparison, describe
from pipeline.promotion import GateConfig, decide
from pipeline.tracking.aliases import AliasMovedError
from pipeline.tracking.versions import Registry, Version

Result = dict[str, Any]
GATES = Path(__file__).parent / "gates"
CHAMPION = "champion"
ROLLED_BACK = "rolled_back"
_GOOD_ENDS = ("promoted", "unchanged")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a candidate is judged.

    Attributes:
        protocol: What both models are measured on.
        gate: The conditions.
        gate_name: Its name, for the records.
        alias: What is moved.
        is_again: Accept a candidate that was rolled back before.
    """

    protocol: Protocol
    gate: GateConfig
    gate_name: str = "default"
    alias: str = CHAMPION
    is_again: bool = False


def promote(registry: Registry, candidate: Version, rules: Rules) -> Result:
    """Measure candidate and champion, hold them against the gate, and move the alias if it says so.

    Args:
        registry: The registered model.
        candidate: The version that may take the champion's place.
        rules: How it is judged.

    Returns:
        `status` (`promoted`, `tie`, `refused`, `overtaken` by another promotion meanwhile, or `unchanged` where the
        candidate is champion already), `verdict` in words, the numbers of both, and `version`, the champion at the end.

    Raises:
        CvftError: A model, the data or MLflow cannot be used.
    """
    champion, number = registry.aliased(rules.alias), candidate.version
    if champion is not None and champion.version == number:
        told = f"version {number} of {registry.name} is {rules.alias} already"
        return {"status": "unchanged", "verdict": told, "candidate": number, **_at_the_end(registry, rules.alias)}
    if candidate.tags.get("validation_status") == ROLLED_BACK and not rules.is_again:
        because = candidate.tags.get("rolled_back_because") or "nobody said why"
        raise ConfigError(f"version {number} was rolled back ({because}); --again promotes it all the same")
    registry.set_tags(number, {"validation_status": "pending"})
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = measure_versions(registry, candidate, champion, rules.protocol, Path(folder))
            licence = candidate.tags.get("data_licence", "")
            origin = origin_of(registry, ours.evaluation.checkpoint, run_id=candidate.run_id, data_licence=licence)
    except CvftError:
        with contextlib.suppress(StoreError):  # why it could not be measured matters more
            registry.set_tags(number, {"validation_status": "not_measured"})
        raise
    comparison = _compare(ours, theirs, rules)
    status, told = _move(registry, candidate, comparison)
    registry.set_tags(number, {"validation_status": status, "verdict": told, **_number_tags(ours, comparison)})
    if status == "overtaken":
        comparison = replace(comparison, overtaken=told)
    card = model_card(registry.name, origin, version=number, measurement=ours.measurement, comparison=comparison)
    registry.describe(candidate, description=describe(origin, ours.measurement, comparison), card=card)
    return {
        **comparison.verdict.plain(),
        "status": status,
        "verdict": told,
        "candidate": number,
        "compared_with": comparison.champion,
        "gate": rules.gate_name,
        "digest": ours.measurement.digest,
        "split": rules.protocol.split,
        "candidate_numbers": ours.numbers(),
        "champion_numbers": theirs.numbers() if theirs else None,
        **_at_the_end(registry, rules.alias),
    }


def _compare(ours: MeasuredVersion, theirs: MeasuredVersion | None, rules: Rules) -> Comparison:
    verdict = decide(
        ours.measured,
        theirs.measured if theirs else None,
        gate=rules.gate,
        location=ours.location,
        notes=notes_on(ours, theirs),
    )
    entry.LOGGER.info("\n%s\n", comparison_table(ours, theirs, verdict))
    return Comparison(
        verdict=verdict,
        alias=rules.alias,
        champion=theirs.version.version if theirs else None,
        gate=rules.gate_name,
        day=ours.measurement.day,
    )


def _move(registry: Registry, candidate: Version, comparison: Comparison) -> tuple[str, str]:
    """Move the alias if the gate says so; return how it ended, as a word and as a sentence."""
    if comparison.verdict.status != "promoted":
        return comparison.verdict.status, comparison.headline
    try:
        registry.move(comparison.alias, expected=comparison.champion, to=candidate.version)
    except AliasMovedError as error:
        return "overtaken", str(error)
    if comparison.champion is not None:
        replaced = {"replaced_by": str(candidate.version), "replaced_on": comparison.day}
        registry.set_tags(comparison.champion, replaced)
    return "promoted", comparison.headline


def _at_the_end(registry: Registry, alias: str) -> Result:
    champion = registry.aliased(alias)
    if champion is None:
        return {"version": None, "model": None}
    return {"version": champion.version, "model": f"models:/{registry.name}@{alias}"}


def _number_tags(ours: MeasuredVersion, comparison: Comparison) -> dict[str, str]:
    """Return what `cvft models` shows: the numbers of the newest comparison."""
    found, seen = comparison.verdict.difference, ours.measurement
    values = {
        "recall_at_1": seen.recall(1, seen.judged_suffix),
        "recall_at_1_deleaked": seen.recall(1, "_deleaked"),
        "gain": found.gain,
        "gain_low": found.low,
        "gain_high": found.high,
        "latency_ms": seen.latency_ms,
        "model_mb": seen.model_mb,
    }
    return {
        **{key: f"{value:.6g}" for key, value in values.items() if value is not None},
        "compared_with": "chance" if comparison.champion is None else str(comparison.champion),
        "evaluation_digest": seen.digest,
        "evaluation_split": seen.split,
        "evaluated_on": comparison.day,
        "gate": comparison.gate,
    }


def gate_names() -> list[str]:
    """List the gates in `jobs/gates/`."""
    return sorted(item.stem for item in GATES.glob("*.yaml"))


def load_gate(name: str, overrides: list[str] | None = None) -> GateConfig:
    """Read a gate: a YAML file, or the name of one in `jobs/gates/`; `key=value` changes it.

    Raises:
        ConfigError: There is no such gate, or a key or value is refused.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else GATES / f"{name}.yaml"
    if path.parent == GATES and not path.exists():
        raise ConfigError(f"--gate {name}: no such file, and no such gate; gates: {', '.join(gate_names())}")
    return parse(GateConfig, read_overrides(overrides or [], read_yaml(path)), prefix="gate")


def add_registry_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which registered model is meant, and where it is."""
    parser.add_argument("--name", default="cvft", help="registered model (default: cvft)")
    parser.add_argument("--tracking-uri", default=default_uri(), help="where MLflow keeps it (default: %(default)s)")
    parser.add_argument("--alias", default=CHAMPION, help=f"which alias is meant (default: {CHAMPION})")


def check_registry_arguments(arguments: argparse.Namespace) -> None:
    """Refuse names that MLflow would refuse.

    Raises:
        ConfigError: A name cannot be a registered model's or an alias.
    """
    name, alias = arguments.name, arguments.alias
    require(name != "" and not set("/:") & set(name), f"--name {name!r}: must not be empty nor hold '/' or ':'")
    is_alias = re.fullmatch(r"[\w-]+", alias) and not re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE)
    require(bool(is_alias), f"--alias {alias!r}: must be letters, digits, '_' and '-', and neither 'latest' nor 'v1'")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "version, models:/NAME@ALIAS, models:/NAME/VERSION, id of a run in MLflow, or path or URI of a checkpoint"
    parser.add_argument("--candidate", default=None, help=f"{what} (default: models:/NAME@{CANDIDATE})")
    parser.add_argument("--manifest", required=True, help="path or URI of the store, or of one of its manifests")
    parser.add_argument("--split", default="val", help="whose ground images are the queries (default: val)")
    parser.add_argument("--train-split", default="train", help="split that leaks are counted against (default: train)")
    parser.add_argument(
        "--hit-distance", type=float, metavar="M", help="count references nearer than M metres as right"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pairs embedded at a time")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads")
    parser.add_argument(
        "--gate", default="default", help=f"YAML file, or the name of a gate: {', '.join(gate_names())}"
    )
    parser.add_argument("--data-licence", default="", help="what the model card says of the data's licence")
    parser.add_argument("--again", action="store_true", help="accept a candidate that was rolled back")
    add_registry_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the gate: min_gain=0.01")


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    check_registry_arguments(arguments)
    for option in ("batch_size", "threads"):
        value = getattr(arguments, option)
        require(value >= 1, f"--{option.replace('_', '-')} {value}: at least 1")
    gate = load_gate(arguments.gate, arguments.overrides)
    return {**entry.plain(arguments), "gate": to_plain(gate), "gate_name": arguments.gate, "overrides": {}}


def _run(arguments: argparse.Namespace) -> Result:
    _resolve(arguments)
    gate = load_gate(arguments.gate, arguments.overrides)
    registry = Registry.at(arguments.tracking_uri, arguments.name)
    protocol = Protocol(
        manifest=arguments.manifest,
        split=arguments.split,
        train_split=arguments.train_split,
        hit_distance_m=arguments.hit_distance,
        batch_size=arguments.batch_size,
        num_threads=arguments.threads,
    )
    named = arguments.candidate or f"models:/{registry.name}@{CANDIDATE}"
    candidate = find_candidate(registry, named, data_licence=arguments.data_licence)
    rules = Rules(
        protocol=protocol, gate=gate, gate_name=arguments.gate, alias=arguments.alias, is_again=arguments.again
    )
    result = promote(registry, candidate, rules)
    if result["status"] not in _GOOD_ENDS:
        raise entry.FailedResultError(f"version {candidate.version}: {result['verdict']}", result=result)
    entry.LOGGER.info("version %d: %s", candidate.version, result["verdict"])
    return result


JOB = entry.Job(
    name="promote",
    summary="Compare a candidate with the champion on the same pairs; it takes its place if the gate says so.",
    example="cvft promote --manifest $(ls demo/shards/manifests/*.parquet) --tracking-uri sqlite:///demo/mlflow.db",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
    state="the registry",
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
