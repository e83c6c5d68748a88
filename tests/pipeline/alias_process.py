"""Moves an alias when told to begin: `alias_process.py URI NAME ALIAS TO GO_FILE`, and says whether it won.

A line `EXPECTED TO` on its standard input makes it do that once more, but end in the middle of it, holding the lock.
"""

import os
import sys
import time
from pathlib import Path

from pipeline.tracking import aliases
from pipeline.tracking.server import tracking_client


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    uri, name, alias, to, go = sys.argv[1:]
    client = tracking_client(uri)
    client.get_registered_model(name)  # all imports and connections are made before the race
    _say("ready")
    while not Path(go).exists():
        time.sleep(0.001)
    try:
        aliases.move_alias(client, name, alias, expected=None, to=int(to))
    except aliases.AliasMovedError as error:
        _say(f"lost to {error.current}")
    else:
        _say("won")
    if line := sys.stdin.readline():
        expected, to = line.split()
        aliases._write = lambda *_: os._exit(9)
        aliases.move_alias(client, name, alias, expected=int(expected), to=int(to))
