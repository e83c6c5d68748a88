"""What a training's process uses of its machine: memory, and of a GPU its memory and time."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

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


class Utilization:
    """Reads the share of time that a GPU was busy, where there is one that tells."""

    def __init__(self, device: torch.device) -> None:
        """Find out whether it can be read; if a GPU's cannot, say why."""
        self._device = device
        self._is_readable = device.type == "cuda" and self._try()

    def metrics(self) -> dict[str, float]:
        """Return per cent of the last moment by its name in MLflow, or nothing."""
        if not self._is_readable:
            return {}
        return {"system/gpu_utilization_percent": float(torch.cuda.utilization(self._device))}

    def _try(self) -> bool:
        if importlib.util.find_spec("pynvml") is None:
            LOGGER.info("the GPU's utilisation is not logged: nvidia-ml-py is not installed")
            return False
        nvml = importlib.import_module("pynvml")
        try:
            torch.cuda.utilization(self._device)
        except nvml.NVMLError as error:  # a part of a GPU that is shared has none, for example
            LOGGER.info("the GPU's utilisation is not logged: %s", error)
            return False
        return True
