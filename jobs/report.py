"""Make the HTML report of a checkpoint: recalls, answers, transport, training, data.

    python -m jobs.report --checkpoint runs/town/checkpoints/step-00000720 --manifest MANIFEST --out report

The page holds its pictures and needs no network.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cvft.errors import ConfigError
from cvft.preprocess import Preprocess
from jobs import entry, evaluate
from jobs.commit import code_commit
from jobs.training.progress import read_history
from pipeline.evaluation import Evaluation
from pipeline.images import decode, thumbnail
from pipeline.manifest import Manifest
from pipeline.report.contents import DataSummary, ReportFiles, TransportExample
from pipeline.report.page import build_report

_IMAGE_PX = 512


def write_report(
    found: Evaluation,
    out: Path,
    *,
    title: str,
    facts: dict[str, object],
    history: Sequence[dict[str, Any]] | None = None,
    num_examples: int = 4,
) -> ReportFiles:
    """Write the report of an evaluation into the folder `out`.

    Args:
        found: The evaluation.
        out: Made if missing.
        title: Heading of the page.
        facts: Further lines for "How this was made".
        history: Numbers of each evaluated epoch; without it those that the checkpoint knows, which end with itself.
        num_examples: How many of the best, of the worst and of the transported queries to show.
    """

    @functools.lru_cache(maxsize=256)  # remote pairs are read by range, and the pictures ask for some several times
    def images(row: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        ground, aerial = found.dataset.read(row)
        rows_px = found.dataset.ground_rows_px[row]  # as the network saw it: plans are drawn over it
        return thumbnail(ground, 2 * _IMAGE_PX, rows_px=rows_px), _unrolled(found, thumbnail(aerial, _IMAGE_PX))

    return build_report(
        out,
        title=title,
        data=summarise(found.dataset.manifest),
        history=read_history(found.info) if history is None else history,
        result=found.result,
        images=images,
        deleaked=found.queries.deleaked(found.result),
        locations_m=found.dataset.location_m,
        transports=_transports(found, num_examples),
        facts={
            "checkpoint": f"{found.checkpoint.name}, step {found.info.step:,}",
            "split": found.dataset.split,
            "head": found.info.model.head.kind,
            "code": code_commit() or "unknown",
            **facts,
        },
        num_examples=num_examples,
    )


def _unrolled(found: Evaluation, aerial: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return an aerial image as the network sees it, which may unroll it first."""
    if found.model.polar is None:
        return aerial
    planes = torch.from_numpy(aerial).to(found.device).permute(2, 0, 1)[None].float()
    pixels: npt.NDArray[np.uint8] = found.model.polar(planes)[0].permute(1, 2, 0).round().byte().cpu().numpy()
    return pixels


def summarise(manifest: Manifest) -> DataSummary:
    """Return what the report says about a dataset."""
    columns = ("latitude_deg", "longitude_deg")
    locations = {
        split: np.stack([manifest.split(split)[name].to_numpy(zero_copy_only=False) for name in columns], axis=1)
        for split in manifest.splits
    }
    return DataSummary(
        layout=manifest.layout,
        manifest_digest=manifest.digest,
        pairs=manifest.splits,
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        problems=Counter(problem.kind for problem in manifest.excluded),
        locations_deg={split: degrees for split, degrees in locations.items() if not np.isnan(degrees).all()},
    )


def _transports(found: Evaluation, number: int) -> list[TransportExample]:
    """Show the plans of the best queries and of the worst one."""
    if found.info.model.head.kind != "cvft":
        return []
    order = found.result.match_rank.argsort(stable=True).tolist()
    rows = order if len(order) <= number else [*order[: number - 1], order[-1]]
    height_px, width_px = found.preprocess.ground_size_px
    pixels = np.empty((len(rows), height_px, width_px, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        rows_px = found.dataset.ground_rows_px[row]
        decode(found.dataset.read(row)[0], pixels[place], profile=found.preprocess.decode_profile, rows_px=rows_px)
    with torch.no_grad():
        ground = Preprocess(found.preprocess)(torch.from_numpy(pixels).to(found.device))
        plans = found.model.ground_plan(ground).cpu().numpy().astype(np.float64)
    transport = found.model.transport
    return [
        TransportExample(index=row, plan=plan, source_grid=transport.source_grid, target_grid=transport.grid)
        for row, plan in zip(rows, plans, strict=True)
    ]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    evaluate.add_evaluation_arguments(parser)
    parser.add_argument("--out", type=entry.local_path, required=True, help="folder of the report")
    parser.add_argument("--title", default="Cross-view geo-localization", help="the page's heading")
    parser.add_argument("--examples", type=int, default=4, help="best, worst and transported queries to show")


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.examples < 1:
        raise ConfigError(f"--examples {arguments.examples}: show at least 1")
    evaluate.checked(arguments)
    return evaluate.plain(arguments)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    _resolve(arguments)
    found = evaluate.run(arguments)
    files = write_report(found, arguments.out, title=arguments.title, facts={}, num_examples=arguments.examples)
    return {"report": str(files.html.absolute()), "pictures": len(files.pngs), **found.metrics()}


JOB = entry.Job(
    name="report",
    summary="Make the HTML report of a checkpoint: recalls, best and worst answers, the transport, the training.",
    example="cvft report --checkpoint $(ls -d demo/runs/town-*/checkpoints/* | tail -1)"
    " --manifest $(ls demo/shards/manifests/*.parquet) --out report",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
