"""Write a synthetic town in CVUSA's raw layout.

python -m jobs.synthesize --out town --pairs 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from jobs import entry
from pipeline.synthetic.write import TownConfig, write_town


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; finished images in it are kept")
    parser.add_argument("--pairs", type=int, required=True, help="number of pairs, train and val together")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = TownConfig(num_pairs=arguments.pairs, seed=arguments.seed)
    progress = entry.Progress("rendering")
    return dataclasses.asdict(write_town(arguments.out, config=config, workers=arguments.workers, progress=progress))


JOB = entry.Job(
    name="synthesize",
    summary="Write a synthetic town in CVUSA's raw layout: panoramas and aerial images rendered from one 3-D scene.",
    example="cvft synthesize --out town --pairs 200 --seed 7",
    add_arguments=_add_arguments,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
