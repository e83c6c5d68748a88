"""A training's process that tells of every entry it has kept, until it is killed; with a limit for its files.

    python spool_process.py FILE [LIMIT_BYTES]

With a limit, which stands for a full disk, it appends until three entries are lost, lifts the limit and appends one
more.
"""

import itertools
import resource
import sys
from pathlib import Path

from pipeline.tracking.spool import Spool

spool = Spool(Path(sys.argv[1]))
hard = resource.RLIM_INFINITY
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
for step in itertools.count():
    spool.append({"step": step, "timestamp_ms": step, "metrics": {"loss": step / 2}})
    sys.stdout.write(f"{step}\n")
    sys.stdout.flush()
    if spool.num_lost == 3:
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
spool.append({"step": step + 1, "timestamp_ms": step + 1, "metrics": {"loss": 0.0}})
