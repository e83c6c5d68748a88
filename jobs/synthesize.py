"""Write a synthetic town in the raw layout of CVUSA or CVACT.

python -m jobs.synthesize --out town --pairs 1000
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any

from cvft.configuration import require
from jobs import entry
from pipeline.synthetic.write import CvactConfig, TownConfig, cvact_town, write_town


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=entry.local_path, required=True, help="folder to write to; finished images in it are kept"
    )
    parser.add_argument("--pairs", type=int, required=True, help="number of pairs, train and val together")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another town")
    parser.add_argument("--layout", choices=("cvusa", "cvact"), default="cvusa", help="raw layout (default: cvusa)")
    parser.add_argument("--test", type=int, default=0, help="cvact: pairs of the test half besides those of val")
    parser.add_argument("--without-files", type=int, default=0, help="cvact: ids per split that have no images")
    parser.add_argument("--prepared", action="store_true", help="cvact: 616x112 and 256x256 PNGs, no 1664x832 JPEGs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    config = _config(arguments)
    progress = entry.Progress("rendering")
    return dataclasses.asdict(write_town(arguments.out, config=config, workers=arguments.workers, progress=progress))


def _resolve(arguments: argparse.Namespace) -> dict[str, Any]:
    _config(arguments)
    return entry.plain(arguments)


def _config(arguments: argparse.Namespace) -> TownConfig:
    cvact = CvactConfig(
        num_test=arguments.test, num_without_files=arguments.without_files, is_prepared=arguments.prepared
    )
    if arguments.layout == "cvact":
        return cvact_town(num_pairs=arguments.pairs, seed=arguments.seed, cvact=cvact)
    require(cvact == CvactConfig(), "--test, --without-files and --prepared belong to --layout cvact")
    return TownConfig(num_pairs=arguments.pairs, seed=arguments.seed)


JOB = entry.Job(
    name="synthesize",
    summary="Write a synthetic town in CVUSA's or CVACT's raw layout: panoramas and aerial images of one 3-D scene.",
    example="cvft synthesize --out town --pairs 200 --seed 7",
    add_arguments=_add_arguments,
    run=_run,
    resolve=_resolve,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
