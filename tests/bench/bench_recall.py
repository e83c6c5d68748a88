"""Exact ranks of 8,884 x 8,884 descriptors of 4,096 values beside numpy, faiss-cpu and scikit-learn.

    make bench-peers                                # once: the peers' environment, .venv-peers
    python tests/bench/bench_recall.py              # three minutes; one thread
    python tests/bench/bench_recall.py --rounds 1   # quicker, noisier
    python tests/bench/bench_recall.py --large      # 92,802 references too, ours alone; two minutes more

Half of the references are random, half lie around 400 centres, and a sixth are exact copies of others, so that there
are ties; the queries are noisy copies. All contenders take turns within a round, in one process on one thread; the
table has medians of the CPU time. `wrong` counts the ranks that differ from a float64 ranking in which equal references
are computed once and ties count against the query; for those that list the best 100, of the ranks below 100. Peak
memory is the growth of the resident set's high-water mark (VmHWM, reset through /proc/self/clear_refs, so Linux alone)
over one ranking, in a fresh process each.

`numpy` is the whole float32 matrix and one comparison. `faiss` (IndexFlatIP) and `scikit-learn` (brute force) list the
best 100, which is no whole ranking: it answers R@1% of 8,884 references (89) and of no more than 9,999.

Prints a table and, last, one line of JSON. Exits with 1 if a rank of ours is wrong, ours needs 130 MB or more or is
slower than the fastest of the others, or 92,802 need 4 GB in all; with 2 if the peers are not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEER_PYTHON = ROOT / ".venv-peers/bin/python"
CONTENDER = Path(__file__).with_name("recall_contender.py")
NAMES = ("ours", "numpy", "faiss", "scikit-learn")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
MAX_MEMORY_MB = 130.0
MAX_LARGE_GB = 4.0


def ask(python: Path, *arguments: str) -> dict:
    """Run the contenders' process and return its line of JSON."""
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    command = [str(python), str(CONTENDER), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def missed_targets(rows: list[dict], large: dict | None) -> list[str]:
    ours, fastest = rows[0], min(rows[1:], key=lambda row: row["cpu_s"])
    missed = []
    if ours["wrong"]:
        missed.append(f"{ours['wrong']} of our ranks are wrong")
    if ours["peak_mb"] >= MAX_MEMORY_MB:
        missed.append(f"ours needs {ours['peak_mb']} MB, not below {MAX_MEMORY_MB}")
    if ours["cpu_s"] > fastest["cpu_s"]:
        missed.append(f"ours takes {ours['cpu_s']} s, {fastest['contender']} {fastest['cpu_s']}")
    if large is not None and large["in_all_gb"] >= MAX_LARGE_GB:
        missed.append(f"92,802 references need {large['in_all_gb']:.2f} GB, not below {MAX_LARGE_GB}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--large", action="store_true", help="92,802 references too")
    parser.add_argument("--python", type=Path, default=PEER_PYTHON, help="of another environment with the peers")
    options = parser.parse_args()
    if not options.python.exists():
        sys.stderr.write("the peers are not installed: run `make bench-peers`\n")
        return 2
    found = ask(options.python, "compare", "--rounds", str(options.rounds))
    rows = [
        {
            "contender": name,
            "cpu_s": round(statistics.median(found["cpu_s"][name]), 2),
            "peak_mb": round(ask(options.python, "memory", name)["peak_mb"], 1),
            "wrong": found["wrong"][name],
        }
        for name in NAMES
    ]
    print(f"{'contender':<14} CPU s  peak MB  wrong")
    for row in rows:
        print(f"{row['contender']:<14} {row['cpu_s']:>5.2f} {row['peak_mb']:>8.1f} {row['wrong']:>6}")
    large = ask(options.python, "large") if options.large else None
    if large is not None:
        print(*(f"{name}={value:.4g}" for name, value in large.items()))
    missed = missed_targets(rows, large)
    known = {name: found[name] for name in ("copies", "recall_at_1", "listed")}
    print(json.dumps({"benchmark": "recall", "missed": missed, **known, "rows": rows, "large": large}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
