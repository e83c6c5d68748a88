"""Speed of the official model on a GPU: training step, where its time goes, inference, exact ranks.

    PYTHONPATH=. python tests/bench/bench_gpu.py            # three minutes; needs CUDA, torch >= 2.11, triton, numpy
    PYTHONPATH=. python tests/bench/bench_gpu.py --only steps profile
    PYTHONPATH=. python tests/bench/bench_gpu.py --quick    # a tiny network anywhere, to see that it runs

A step is all of `train_epoch`: batches of uint8 pixels that lie in pinned memory, copied ahead by `prefetch`, forward
in bf16 and channels_last with the first three blocks frozen, loss, backward, norm of the gradients, optimizer. The
variants take turns and the table has the median step of each. The work of a pair is counted by torch's own counter of
FLOP, with the frozen blocks forward only (142 GFLOP, not the 247 of a network that trains all); the share is of 989
TFLOP/s, the dense bf16 peak of an H100 SXM and an H200.

Each part prints its table and a line of JSON. Exits with 1 if the best share is below 45 % or a rank is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from gpu_ranking import measure_ranking, peak_memory_gb, wait
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cvft import activation
from cvft.batch import Batch, prefetch
from cvft.config import BackboneConfig, HeadConfig, LossConfig, ModelConfig, OptimizerConfig, PreprocessConfig
from cvft.engine import embed, train_epoch
from cvft.gradients import Forward, compute_gradients
from cvft.loss import build_loss
from cvft.model import build_model
from cvft.optim import build_optimizer
from cvft.preprocess import Preprocess

PEAK_TFLOPS = 989.0
MIN_SHARE = 0.45
TRITON_OBSTACLE = activation.triton_obstacle
NUM_IMAGES = 8  # different ones; the others repeat them
MODEL, PREPROCESS = ModelConfig(), PreprocessConfig()
SMALL_MODEL = ModelConfig(
    backbone=BackboneConfig(blocks=(1, 1, 1), width=0.125, num_frozen_blocks=1), head=HeadConfig(channels=4)
)
SMALL_PREPROCESS = PreprocessConfig(ground_size_px=(32, 96), aerial_size_px=(64, 64))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a step is computed; the defaults are the project's own."""

    name: str
    batch: int
    solver: str = "auto"
    is_compiled: bool = False
    has_fused_passes: bool = True
    has_fused_adam: bool = False
    has_cudnn_benchmark: bool = False


VARIANTS = (
    Variant(name="as it is", batch=32),
    Variant(name="as it is", batch=128),
    Variant(name="as it is", batch=256),
    Variant(name="cudnn.benchmark", batch=32, has_cudnn_benchmark=True),
    Variant(name="cudnn.benchmark", batch=128, has_cudnn_benchmark=True),
    Variant(name="plain passes", batch=32, has_fused_passes=False),
    Variant(name="plain passes", batch=128, has_fused_passes=False),
    Variant(name="fused Adam", batch=32, has_fused_adam=True),
    Variant(name="compiled trunks", batch=128, has_cudnn_benchmark=True, is_compiled=True),
    Variant(name="eager scaling", batch=32, solver="scaling"),
    Variant(name="eager log", batch=32, solver="log"),
)
RANKINGS = ((8_884, 1024), (8_884, 4096), (92_802, 4096), (92_802, 8192))


class Setting:
    """The sizes of the run: the official model on CUDA, or a tiny one to see that everything runs."""

    def __init__(self, *, is_quick: bool) -> None:
        self.is_quick = is_quick
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.preprocess = (SMALL_MODEL, SMALL_PREPROCESS) if is_quick else (MODEL, PREPROCESS)
        self.variants = [replace(each, batch=max(each.batch // 32, 2)) for each in VARIANTS] if is_quick else VARIANTS
        self.num_warmup, self.num_steps = (1, 4) if is_quick else (3, 12)
        self.num_rounds = 1 if is_quick else 2
        self.rankings = ((300, 64), (500, 256)) if is_quick else RANKINGS
        self.descriptor_size = 64 if is_quick else 4096


class Trainer:
    """A model with all that a step needs, and a few batches in pinned memory."""

    def __init__(self, setting: Setting, variant: Variant) -> None:
        torch.manual_seed(0)
        self.setting, self.variant = setting, variant
        transport = replace(setting.model.head.transport, solver=variant.solver)
        config = replace(setting.model, head=replace(setting.model.head, transport=transport))
        self.model = build_model(config, setting.preprocess).to(setting.device, memory_format=torch.channels_last)
        self.loss = build_loss(LossConfig()).to(setting.device)
        self.optimizer = build_optimizer(self.model, OptimizerConfig(), loss=self.loss)
        self.normalise = Preprocess(setting.preprocess)
        self.pool = pinned_batches(setting, variant.batch)
        self.step = 0
        if variant.is_compiled:
            for trunk in (self.model.ground_trunk, self.model.aerial_trunk):
                trunk.compile(dynamic=False)
        for group in self.optimizer.param_groups:
            group["fused"] = variant.has_fused_adam or None

    def run(self, num_steps: int) -> list[float]:
        """Train some steps and return the seconds between the ends of two of them."""
        torch.backends.cudnn.benchmark = self.variant.has_cudnn_benchmark
        activation.triton_obstacle = TRITON_OBSTACLE if self.variant.has_fused_passes else lambda: "is switched off"
        ends = [time.perf_counter()]
        train_epoch(
            self.model,
            prefetch(itertools.islice(itertools.cycle(self.pool), num_steps), self.setting.device),
            preprocess=self.normalise,
            loss=self.loss,
            optimizer=self.optimizer,
            learning_rate=lambda step: 1e-5,
            first_step=self.step,
            seed=0,
            precision="bfloat16",
            on_step=lambda report: ends.append(time.perf_counter()),
        )
        self.step += num_steps
        return [after - before for before, after in itertools.pairwise(ends)]

    def flop_per_pair(self) -> float:
        """Count one step's FLOP, forward and backward, by torch's counter."""
        batch = next(prefetch(self.pool, self.setting.device))
        forward = Forward(preprocess=self.normalise, seed=0, step=0, precision="bfloat16")
        with FlopCounterMode(display=False) as counter:
            compute_gradients(self.model, batch, forward=forward, loss=self.loss)
        self.optimizer.zero_grad()
        return counter.get_total_flops() / len(batch.index)


def pinned_batches(setting: Setting, size: int, num: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shapes = (setting.preprocess.ground_size_px, setting.preprocess.aerial_size_px)

    def pixels(shape: tuple[int, int]) -> Tensor:
        images = torch.randint(256, (NUM_IMAGES, *shape, 3), dtype=torch.uint8, generator=generator)
        noise = images.repeat(-(-size // NUM_IMAGES), 1, 1, 1)[:size]
        return noise.pin_memory() if setting.device.type == "cuda" else noise

    return [
        Batch(
            ground=pixels(shapes[0]),
            aerial=pixels(shapes[1]),
            index=torch.arange(start * size, (start + 1) * size),
            location_m=torch.zeros(size, 3, dtype=torch.float64),
            num_valid=size,
        )
        for start in range(num)
    ]


def measure_steps(setting: Setting) -> Iterator[dict]:
    """Time each variant's step, in turns."""
    gflop = Trainer(setting, replace(setting.variants[0], batch=2)).flop_per_pair() / 1e9
    trainers, memory, warmup_s = [], [], []
    for variant in setting.variants:
        start = time.perf_counter()
        held_gb = peak_memory_gb(setting.device, lambda: None)
        trainers.append(Trainer(setting, variant))
        memory.append(peak_memory_gb(setting.device, lambda: trainers[-1].run(setting.num_warmup)) - held_gb)
        warmup_s.append(time.perf_counter() - start)
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(setting.num_rounds):
        for trainer, of_variant in zip(trainers, times, strict=True):
            of_variant += trainer.run(setting.num_steps)[2:]  # the first one or two fill the pipeline again
    for variant, of_variant, memory_gb, ready_s in zip(setting.variants, times, memory, warmup_s, strict=True):
        median = statistics.median(of_variant or [float("nan")])
        yield {
            "variant": variant.name,
            "batch": variant.batch,
            "step_ms": round(median * 1e3, 2),
            "pairs_per_s": round(variant.batch / median, 1),
            "gflop_per_pair": round(gflop, 1),
            "share_of_peak": round(variant.batch * gflop * 1e9 / median / (PEAK_TFLOPS * 1e12), 4),
            "memory_gb": round(memory_gb, 2),
            "ready_s": round(ready_s, 1),
        }


def profile_steps(setting: Setting) -> Iterator[dict]:
    """Say which kernels a step's time goes to."""
    activity = ProfilerActivity.CUDA if setting.device.type == "cuda" else ProfilerActivity.CPU
    for variant in setting.variants:
        if variant.name not in ("as it is", "plain passes") or variant.batch > 128:
            continue
        trainer = Trainer(setting, variant)
        trainer.run(setting.num_warmup)
        with profile(activities={ProfilerActivity.CPU, activity}) as profiler:
            start = time.perf_counter()
            trainer.run(3)
            wait(setting.device)
            wall_ms = (time.perf_counter() - start) * 1e3 / 3
        kernels = [
            each
            for each in profiler.events()
            if each.device_type.name == "CUDA" and not getattr(each, "is_user_annotation", False)
        ]
        totals: dict[str, list[float]] = {}
        for event in kernels:
            totals.setdefault(event.name, []).append(event.device_time_total / 3e3)
        ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))
        print(f"-- {variant.name}, batch {variant.batch}: ms and launches of a step by kernel")
        for name, times in ranked[:22]:
            print(f"{sum(times):>8.3f} {len(times) / 3:>6.1f}  {name[:110]}")
        yield {
            "variant": variant.name,
            "batch": variant.batch,
            "profiled_step_ms": round(wall_ms, 2),
            "kernels_ms": round(sum(map(sum, totals.values())), 2),
            "launches": round(sum(map(len, totals.values())) / 3),
            "sinkhorn_ms": round(sum(sum(times) for name, times in ranked if name.endswith("ward_kernel")), 4),
        }


def measure_inference(setting: Setting) -> Iterator[dict]:
    """Descriptors of both views, brought to the host, by `embed`."""
    size = 4 if setting.is_quick else 256
    trainer = Trainer(setting, replace(setting.variants[0], batch=size))
    torch.backends.cudnn.benchmark = True
    for precision in ("float32 as configured", "bfloat16"):
        for is_timed in (False, True):
            num = 3 if setting.is_quick or not is_timed else 12
            batches = [
                replace(batch, index=torch.arange(place * size, (place + 1) * size))
                for place, batch in zip(range(num), itertools.cycle(trainer.pool), strict=False)
            ]
            start = time.perf_counter()
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                embed(trainer.model, prefetch(batches, setting.device), preprocess=trainer.normalise)
            seconds = time.perf_counter() - start
        yield {"precision": precision, "batch": size, "pairs_per_s": round(num * size / seconds, 1)}


PARTS: dict[str, Callable[[Setting], Iterator[dict]]] = {
    "steps": measure_steps,
    "profile": profile_steps,
    "inference": measure_inference,
    "ranking": lambda setting: measure_ranking(setting.rankings, setting.descriptor_size, setting.device),
}


def run_part(name: str, setting: Setting) -> list[dict]:
    """Print a part's table; one that fails leaves the others their turn on a machine that is lent for minutes."""
    rows: list[dict] = []
    start = time.perf_counter()
    try:
        for row in PARTS[name](setting):
            rows.append(row)
            print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError):
        traceback.print_exc(file=sys.stdout)
        rows.append({"failed": name})
    seconds = time.perf_counter() - start
    print(json.dumps({"benchmark": "gpu", "part": name, "seconds": round(seconds, 1), "rows": rows}), flush=True)
    return rows


def missed_targets(rows: list[dict]) -> list[str]:
    shares = [row["share_of_peak"] for row in rows if "share_of_peak" in row]
    missed = [f"{row['failed']} failed" for row in rows if "failed" in row]
    if shares and max(shares) < MIN_SHARE:
        missed.append(f"the best step is {max(shares):.1%} of the peak, not {MIN_SHARE:.0%}")
    missed += [f"{row['wrong']} ranks of {row['references']} are wrong" for row in rows if row.get("wrong")]
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    parser.add_argument("--quick", action="store_true", help="a tiny network, here or anywhere")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        print("not measured: there is no CUDA device here")
        return 0
    torch._dynamo.config.recompile_limit = 64
    setting = Setting(is_quick=options.quick)
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}), flush=True)
    missed = missed_targets([row for part in options.only for row in run_part(part, setting)])
    print(json.dumps({"benchmark": "gpu", "device": name, "missed": missed}))
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
