"""Turn the authors' TensorFlow checkpoint into one of ours.

python -m jobs.import_official --checkpoint CVUSA/model.ckpt --out official
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jobs import entry
from pipeline.official_import import import_official


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="path without .index and .data-00000-of-00001")
    parser.add_argument("--out", type=entry.local_path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--head", choices=("cvft", "conv", "global_pool"), help="default: read off the variables' names"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    info = import_official(arguments.checkpoint, arguments.out, head=arguments.head)
    return {"checkpoint": str(arguments.out.absolute()), "head": info.model.head.kind, "step": info.step}


JOB = entry.Job(
    name="import_official",
    summary='Turn the authors\' TensorFlow checkpoint into one of ours; needs pip install "cvft[tensorflow]".',
    example="cvft import_official --checkpoint CVUSA/model.ckpt --out official",
    add_arguments=_add_arguments,
    run=_run,
    resolve=entry.plain,
)

if __name__ == "__main__":
    sys.exit(entry.main(JOB))
