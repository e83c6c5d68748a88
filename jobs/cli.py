"""`cvft NAME ...`: the same as `python -m jobs.NAME ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jobs import entry

SUMMARIES = {
    "demo": "everything at once on a synthetic town: from raw images to a registered model and a report",
    "synthesize": "write a synthetic town in CVUSA's raw layout",
    "validate": "say what a folder of pairs holds and what is wrong with it",
    "shard": "write raw pairs to WebDataset shards with a manifest",
    "verify": "hold shards against their manifest, repair damaged ones",
    "inspect": "show a dataset of shards: its numbers and its first pairs",
    "train": "train a network on a manifest",
    "evaluate": "measure a checkpoint's recall on a manifest",
    "report": "make the HTML report of a checkpoint",
    "promote": "compare a candidate with the champion; it takes its place if the gate says so",
    "rollback": "bring the champion before this one back",
    "models": "list the versions of a registered model, or copy one as a checkpoint",
    "ablate": "compare variants on the same pairs with several seeds",
    "submit": "run any of these on a Ray cluster, and follow it",
    "tune": "search over configurations: trials on Ray, the best one as a file for `train`",
    "import_official": "turn the authors' TensorFlow checkpoint into ours",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a job by its name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:16} {summary}" for name, summary in SUMMARIES.items())
        sys.stdout.write(f"usage: cvft JOB [arguments]\n\n{listing}\n\n`cvft JOB --help` shows an example.\n")
        return 0
    name = arguments[0].replace("-", "_")
    if name not in SUMMARIES:
        sys.stderr.write(f"cvft: error: {arguments[0]!r} is no job; jobs: {', '.join(SUMMARIES)}\n")
        return 2
    return entry.main(importlib.import_module(f"jobs.{name}").JOB, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
