"""Ports for servers of our own."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST = 20_000  # Ray's workers have those from 10,002 to 19,999


def free_ports(count: int, *, width: int = 1) -> list[int]:
    """Return ports that are free, each with the `width - 1` next to it.

    Not of those that the system gives away by itself: between now and their use one of Ray's would take it.
    """
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        ports = random.SystemRandom().sample(range(_FIRST, first_given - width + 1, width), count)
        if all(_is_free(port + further) for port in ports for further in range(width)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
