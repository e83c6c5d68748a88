"""The process group of the workers of a training on Ray: by which interface they meet, and how long they wait.

Ray Train tells the workers where rank 0 is, but not by which interface they speak: gloo takes the address that a host's
name stands for, and where a name server or `/etc/hosts` says 127.0.0.1 or nothing, the loopback, by which nobody on
another host answers. The address by which Ray knows a node is one that the other nodes do reach.

A worker that is lost while the others meet is no fault of Ray's controller, for which the training would end: it is
one of `train.max_failures`, as it is a second later.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from jobs.training.lost_workers import NotMetError

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class ProcessGroup(TorchConfig):  # type: ignore[misc]  # Ray has no type hints here
    """Ray's own, with our way of meeting."""

    @property
    def backend_cls(self) -> type[MeetingBackend]:
        """What sets the process group up."""
        return MeetingBackend


class MeetingBackend(_TorchBackend):  # type: ignore[misc]  # Ray has no type hints here
    """Lets the workers meet by the interface of their nodes' addresses."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set the process group up on all workers.

        Raises:
            NotMetError: They did not find each other.
        """
        try:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)
        except RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise NotMetError(reason, {0: error}) from error

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """End the process group, unless a worker failed: all are killed then, and one that hangs is not waited for."""
        status = worker_group.get_latest_poll_status()
        if status is None or not status.errors:
            super().on_shutdown(worker_group, backend_config)


def _choose_interface() -> None:
    """Have gloo speak by the interface of this node's address, unless the environment names another."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(_GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address, or none (the address is translated on its way)."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return None
