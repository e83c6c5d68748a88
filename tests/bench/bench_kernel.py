"""Time of the fused Sinkhorn on a GPU, forward and backward, beside the eager solvers and the plain port.

    PYTHONPATH=. python tests/bench/bench_kernel.py   # a minute; needs CUDA, torch >= 2.11 and triton, nothing else

Batch 128, 64 x 64 costs, 20 rounds, float32, costs as CVFT's fully connected layer makes them. `gpu_us` is the time of
one forward and backward of the solver alone, recorded once as a CUDA graph and replayed, so that Python's time does not
count; solvers whose host looks at results cannot be recorded and are timed between two events, as `call_us` is for all:
what a step of an eager program waits for. All take turns within each round; the table has medians. The gradient's error
is the largest difference from float64 autograd through the plain port, over that gradient's largest entry. Where CUDA
or triton is missing it says so and exits with 0.

Prints a table and, last, one line of JSON. Exits with 1 if the fused solver takes more than 40 us or its gradient is
off by more than 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cvft.kernels import sinkhorn
from cvft.transport import TransportProblem, solve

EPSILON = 0.01
BATCH, NUM_POSITIONS, NUM_ITERATIONS = 128, 64, 20
FEATURES_RMS = 3.0
REPLAYS = 20  # of a graph between two events
MAX_FUSED_US = 40.0
MAX_GRADIENT_ERROR = 1e-5
CAN_BE_RECORDED = ("triton", "triton kernels", "plain port")


def plain_port(cost: Tensor) -> Tensor:
    """The published loop: two logsumexp per round on the tile itself."""
    log_plan = cost * (-1 / EPSILON)
    for _ in range(NUM_ITERATIONS):
        log_plan = log_plan - log_plan.logsumexp(2, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp()


def ours(solver: str) -> Callable[[Tensor], Tensor]:
    return lambda cost: (
        solve(
            TransportProblem(cost=cost, epsilon=EPSILON),
            num_iterations=NUM_ITERATIONS,
            solver=solver,
            check_finite=False,
        ).plan
    )


def kernels_alone(cost: Tensor) -> Tensor:
    """The two launches without `solve` around them."""
    ones = torch.ones_like(cost[:, 0])
    options = {"epsilon": EPSILON, "num_iterations": NUM_ITERATIONS, "threshold": None}
    return sinkhorn.solve_fused(cost, ones, ones, **options).plan


IMPLEMENTATIONS = {
    "triton": ours("triton"),
    "triton kernels": kernels_alone,
    "scaling": ours("scaling"),
    "log": ours("log"),
    "plain port": plain_port,
}


def make_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUM_POSITIONS, NUM_POSITIONS**2, generator=generator) * 0.005
    cost = (torch.randn(BATCH, NUM_POSITIONS, generator=generator) * FEATURES_RMS) @ weights
    back = torch.randn(BATCH, NUM_POSITIONS, NUM_POSITIONS, generator=generator)
    return cost.view(BATCH, NUM_POSITIONS, NUM_POSITIONS).cuda(), back.cuda()


def step_of(name: str, cost: Tensor, back: Tensor) -> Callable[[], Tensor]:
    leaf = cost.clone().requires_grad_()
    run = IMPLEMENTATIONS[name]
    return lambda: torch.autograd.grad(run(leaf), leaf, back)[0]


def record(step: Callable[[], Tensor]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_us(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def measure(num_rounds: int) -> list[dict[str, float | str]]:
    cost, back = make_inputs()
    expected = step_of("plain port", cost.double(), back.double())()
    steps = {name: step_of(name, cost, back) for name in IMPLEMENTATIONS}
    errors = {name: float((step() - expected).abs().max() / expected.abs().max()) for name, step in steps.items()}
    replays = {name: record(steps[name]) for name in CAN_BE_RECORDED}
    calls: dict[str, list[float]] = {name: [] for name in steps}
    on_gpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            calls[name].append(time_us(step, 2))
            on_gpu[name].append(time_us(replays[name], REPLAYS) if name in replays else calls[name][-1])
    return [
        {
            "implementation": name,
            "gpu_us": round(statistics.median(on_gpu[name]), 1),
            "call_us": round(statistics.median(calls[name]), 1),
            "gradient_error": errors[name],
        }
        for name in steps
    ]


def missed_targets(rows: list[dict]) -> list[str]:
    fused = next(row for row in rows if row["implementation"] == "triton kernels")
    missed = []
    if fused["gpu_us"] > MAX_FUSED_US:
        missed.append(f"the fused solver takes {fused['gpu_us']} us, not {MAX_FUSED_US}")
    if not fused["gradient_error"] <= MAX_GRADIENT_ERROR:
        missed.append(f"its gradient is off by {fused['gradient_error']:.1e}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="interleaved rounds")
    options = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        missing = "CUDA device" if not torch.cuda.is_available() else "package triton"
        print(f"not measured: there is no {missing} here")
        return 0
    rows = measure(options.rounds)
    print("implementation    gpu us   call us gradient error")
    for row in rows:
        print(f"{row['implementation']:<15} {row['gpu_us']:>8} {row['call_us']:>9} {row['gradient_error']:>14.1e}")
    missed = missed_targets(rows)
    name = torch.cuda.get_device_name()
    print(
        json.dumps({"benchmark": "kernel", "device": name, "torch": torch.__version__, "missed": missed, "rows": rows})
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
