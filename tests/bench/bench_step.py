"""CPU time and memory of a training step of the official model: frozen blocks, bfloat16 and channels_last, one by one.

    python tests/bench/bench_step.py                       # four minutes; one thread
    python tests/bench/bench_step.py --rounds 1            # quicker, noisier
    python tests/bench/bench_step.py --quick               # a tiny network, to see that it runs

A step is one of `train_epoch`, with dropout, loss, gradient norm and Adam, on a batch of two pairs. `plain` trains
all blocks in float32 with the channels first; the paper's recipe freezes three blocks. All combinations take turns
within each round; the table has median times and the medians of the ratios to `plain` within a round. The clock is the
process's CPU time on one thread, which leaves out what others were given. `saved` are the bytes that autograd keeps for
the backward pass, each memory counted once and parameters left out; `peak` is the growth of the resident set's
high-water mark (VmHWM, so Linux alone) over a second step, in a fresh process each.

bfloat16 is fast where the processor has instructions for it (`amx_bf16`, `avx512_bf16`), and slower than float32 where
it has not; the line of JSON names those that are there. Exits with 1 if all three together take more than 0.35 of the
plain step on a processor with `amx_bf16`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvft.batch import Batch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, OptimizerConfig, PreprocessConfig
from cvft.engine import train_epoch
from cvft.gradients import Forward, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.optim import build_optimizer
from cvft.preprocess import Preprocess

BATCH = 2
MAX_RATIO = 0.35
PLAIN, FULL = "plain", "frozen+bf16+channels_last"
OPTIONS = ("frozen", "bf16", "channels_last")
VARIANTS = {
    "+".join(chosen) or PLAIN: frozenset(chosen)
    for size in range(len(OPTIONS) + 1)
    for chosen in itertools.combinations(OPTIONS, size)
}
SMALL = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, num_frozen_blocks=1), head=HeadConfig(channels=4)
)
SMALL_SIZES = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64))


class Trainer:
    """A network, and what one step of it needs."""

    def __init__(self, name: str, *, is_quick: bool) -> None:
        options = VARIANTS[name]
        config, sizes = (SMALL, SMALL_SIZES) if is_quick else (ModelConfig(), PreprocessConfig())
        num_frozen = config.backbone.num_frozen_blocks if "frozen" in options else 0
        torch.manual_seed(0)
        model = build_model(replace(config, backbone=replace(config.backbone, num_frozen_blocks=num_frozen)), sizes)
        self.is_last = "channels_last" in options
        self.model = model.to(memory_format=torch.channels_last) if self.is_last else model
        self.normalise = Preprocess(sizes)
        self.precision = "bfloat16" if "bf16" in options else "float32"
        self.loss = build_loss(LossConfig())
        self.optimizer = build_optimizer(model, OptimizerConfig(), loss=self.loss)
        shapes = (BATCH, *sizes.ground_size_px, 3), (BATCH, *sizes.aerial_size_px, 3)
        ground, aerial = (torch.randint(256, shape, dtype=torch.uint8) for shape in shapes)
        location_m = torch.zeros(BATCH, 3, dtype=torch.float64)
        self.batch = Batch(
            ground=ground, aerial=aerial, index=torch.arange(BATCH), location_m=location_m, num_valid=BATCH
        )

    def preprocess(self, pixels: Tensor) -> Tensor:
        images = self.normalise(pixels)
        return images if self.is_last else images.contiguous()

    def step(self) -> None:
        train_epoch(
            self.model,
            [self.batch],
            preprocess=self.preprocess,
            loss=self.loss,
            optimizer=self.optimizer,
            learning_rate=lambda step: 1e-5,
            first_step=0,
            seed=0,
            precision=self.precision,
        )

    def saved_mb(self) -> float:
        """Return the size of what autograd keeps of one forward pass."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, tuple[Tensor, int]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that no other takes its address
            return tensor

        forward = Forward(preprocess=self.preprocess, seed=0, step=0, precision=self.precision)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compute_gradients(self.model, self.batch, forward=forward, loss=self.loss)
        return sum(num_bytes for _, num_bytes in kept.values()) / 1e6


def measure_times(num_rounds: int, *, is_quick: bool) -> dict[str, list[float]]:
    """CPU seconds of each variant's step in each round."""
    trainers = {name: Trainer(name, is_quick=is_quick) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for trainer in trainers.values():
        trainer.step()
    for _ in range(num_rounds):
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step()
            times[name].append(time.process_time() - start)
    return times


def resident_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024 / 1e6


def peak_growth_mb(work: Callable[[], None]) -> float:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mb("VmRSS")
    work()
    return resident_mb("VmHWM") - before


def print_memory(name: str, *, is_quick: bool) -> None:
    """Print what one step needs, in this fresh process."""
    trainer = Trainer(name, is_quick=is_quick)
    trainer.step()
    peak_mb = peak_growth_mb(trainer.step)
    print(json.dumps({"peak_mb": round(peak_mb), "saved_mb": round(trainer.saved_mb(), 1)}))


def measure_memory(name: str, *, is_quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if is_quick else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def bfloat16_instructions() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return [name for name in ("amx_bf16", "avx512_bf16") if re.search(rf"\b{name}\b", flags)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="a tiny network")
    parser.add_argument("--memory-of", choices=[*VARIANTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print_memory(options.memory_of, is_quick=options.quick)
        return 0
    times = measure_times(options.rounds, is_quick=options.quick)
    rows = []
    print(f"{'variant':<28} CPU s  ratio saved MB peak MB")
    for name, of_variant in times.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(of_variant, times[PLAIN], strict=True))
        row = {"variant": name, "cpu_s": round(statistics.median(of_variant), 3), "ratio": round(ratio, 3)}
        rows.append(row | measure_memory(name, is_quick=options.quick))
        print("{variant:<28} {cpu_s:>5.2f} {ratio:>6.2f} {saved_mb:>8.1f} {peak_mb:>7}".format(**rows[-1]))
    found = bfloat16_instructions()
    ratio = next(row["ratio"] for row in rows if row["variant"] == FULL)
    is_missed = ratio > MAX_RATIO and "amx_bf16" in found and not options.quick
    missed = [f"{FULL} takes {ratio} of the plain step, not {MAX_RATIO}"] if is_missed else []
    line = {"benchmark": "step", "torch": torch.__version__, "instructions": found, "missed": missed, "rows": rows}
    print(json.dumps(line))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
