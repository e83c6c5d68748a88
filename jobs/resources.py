"""What a training's process uses of its machine, and what the whole machine does."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from pathlib import Path

import psutil
import torch

from jobs.entry import LOGGER

_STATM = Path("/proc/self/statm")


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return this process's main memory, and that on `device` if it is a GPU; bytes by their names in MLflow."""
    metrics: dict[str, float] = {}
    if _STATM.exists():  # Linux
        metrics["system/rss_bytes"] = int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        metrics["system/cuda_allocated_bytes"] = torch.cuda.memory_allocated(device)
        metrics["system/cuda_reserved_bytes"] = torch.cuda.memory_reserved(device)
        metrics["system/cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return metrics


def memory_text(device: torch.device) -> str:
    """Return the memory in words, for a log line."""
    found = memory_metrics(device)
    names = {"system/rss_bytes": "memory", "system/cuda_reserved_bytes": "GPU memory"}
    return ", ".join(f"{names[name]} {found[name] / 1e9:.1f} GB" for name in names if name in found)


class Machine:
    """Reads what the whole machine does, under the names by which MLflow's page of system metrics knows it."""

    def __init__(self, device: torch.device, *, every_s: float = 5.0) -> None:
        """Begin to count.

        Args:
            device: Where this process computes; of GPUs only this one is read.
            every_s: The numbers are read at most so often.
        """
        self._device = device
        self._every_s = every_s
        self._next_s = 0.0
        self._network = psutil.net_io_counters()
        self._has_nvml = device.type == "cuda" and self._try()
        psutil.cpu_percent()  # what it returns is since the call before

    def metrics(self) -> dict[str, float]:
        """Return the numbers, or nothing if the last ones are not old enough."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return {}
        self._next_s = now_s + self._every_s
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        metrics = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / 1e6,
            **self._gpu(),
        }
        return {f"system/{name}": float(value) for name, value in metrics.items()}

    def _gpu(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        metrics = {"memory_usage_megabytes": (total - free) / 1e6, "memory_usage_percentage": 100 * (1 - free / total)}
        if self._has_nvml:
            metrics["utilization_percentage"] = torch.cuda.utilization(self._device)
            metrics["power_usage_watts"] = torch.cuda.power_draw(self._device) / 1000
        return {f"gpu_{self._device.index or 0}_{name}": value for name, value in metrics.items()}

    def _try(self) -> bool:
        if importlib.util.find_spec("pynvml") is None:
            LOGGER.info("the GPU's utilisation is not logged: nvidia-ml-py is not installed")
            return False
        nvml = importlib.import_module("pynvml")
        try:
            torch.cuda.utilization(self._device)
            torch.cuda.power_draw(self._device)
        except nvml.NVMLError as error:  # a part of a GPU that is shared has none, for example
            LOGGER.info("the GPU's utilisation is not logged: %s", error)
            return False
        return True
