"""Time and memory of the transport layer, forward and backward with the plan applied, against a plain port and POT.

    python tests/bench/bench_transport.py            # two minutes; one thread
    python tests/bench/bench_transport.py --rounds 3 # quicker, noisier

All implementations take turns within each round; the table has the median times and the medians of the ratios within a
round, so that another process's load hits all alike. The clock is the process's CPU time (everything runs on one
thread), which leaves out what others were given. Peak memory is the growth of the resident set's high-water mark
(VmHWM, reset through /proc/self/clear_refs, so Linux alone) over one forward and backward, in a fresh process each. The
gradient's error is the largest difference from float64 autograd through the plain port, over that gradient's largest
entry.

Prints a table and, last, one line of JSON. Exits with 1 if `scaling` is not 4 times faster than the plain port and than
POT's log_sinkhorn at batch 128 and 20 iterations, or its gradient is off by more than 1e-5. POT's `sinkhorn` stands
beside them without a target: it works on exp(-cost / epsilon), whose float32 range these costs exceed in its backward.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ot.batch
import torch
from torch import Tensor

from cvft.transport import TransportProblem, solve

EPSILON = 0.01
NUM_POSITIONS = 64  # an 8x8 map
FEATURES_RMS = 3.0  # of what enters the layer that makes the costs; trained networks lie around it
CASES = ((32, 20), (128, 20), (128, 100))  # batch, iterations
GATE = (128, 20)
MIN_SPEEDUP = 4.0
MAX_GRADIENT_ERROR = 1e-5


def plain_port(cost: Tensor, num_iterations: int) -> Tensor:
    """The published loop: two logsumexp per round on the tile itself."""
    log_plan = cost * (-1 / EPSILON)
    for _ in range(num_iterations):
        log_plan = log_plan - log_plan.logsumexp(2, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp()


def pot(method: str) -> Callable[[Tensor, int], Tensor]:
    def run(cost: Tensor, num_iterations: int) -> Tensor:
        ones = cost.new_ones(cost.shape[:2])
        # A negative tolerance never stops early: all do the same number of rounds.
        return ot.batch.solve_batch(
            cost, reg=EPSILON, a=ones, b=ones, max_iter=num_iterations, tol=-1.0, method=method, grad="autodiff"
        ).plan

    return run


def ours(solver: str) -> Callable[[Tensor, int], Tensor]:
    return lambda cost, num_iterations: (
        solve(TransportProblem(cost=cost, epsilon=EPSILON), num_iterations=num_iterations, solver=solver).plan
    )


IMPLEMENTATIONS = {
    "plain port": plain_port,
    "POT log_sinkhorn": pot("log_sinkhorn"),
    "POT sinkhorn": pot("sinkhorn"),
    "log": ours("log"),
    "scaling": ours("scaling"),
}


def make_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Costs as CVFT's fully connected layer makes them, features to move, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(NUM_POSITIONS, NUM_POSITIONS**2, generator=generator) * 0.005
    cost = (torch.randn(batch, NUM_POSITIONS, generator=generator) * FEATURES_RMS) @ weights
    features, back = torch.randn(2, batch, NUM_POSITIONS, NUM_POSITIONS, generator=generator)
    return cost.view(batch, NUM_POSITIONS, NUM_POSITIONS), features, back


def forward_backward(name: str, inputs: tuple[Tensor, Tensor, Tensor], num_iterations: int) -> Tensor:
    cost, features, back = inputs
    cost = cost.detach().requires_grad_()
    plan = IMPLEMENTATIONS[name](cost, num_iterations)
    torch.bmm(plan.transpose(1, 2), features).backward(back)
    return cost.grad


def measure_times(batch: int, num_iterations: int, num_rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each implementation in each round."""
    inputs = make_inputs(batch)
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for name in IMPLEMENTATIONS:
        forward_backward(name, inputs, num_iterations)
    for _ in range(num_rounds):
        for name in IMPLEMENTATIONS:
            start = time.process_time()
            forward_backward(name, inputs, num_iterations)
            times[name].append(time.process_time() - start)
    return times


def measure_gradient_errors(batch: int, num_iterations: int) -> dict[str, float]:
    inputs = make_inputs(batch)
    exact = forward_backward("plain port", tuple(value.double() for value in inputs), num_iterations)
    scale = exact.abs().max()
    return {
        name: float((forward_backward(name, inputs, num_iterations) - exact).abs().max() / scale)
        for name in IMPLEMENTATIONS
    }


def resident_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def print_peak_memory(name: str, batch: int, num_iterations: int) -> None:
    """Print the peak over one forward and backward, in this fresh process."""
    inputs = make_inputs(batch)
    forward_backward(name, make_inputs(1), 2)  # loads the kernels
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident_mb("VmRSS")
    forward_backward(name, inputs, num_iterations)
    print(resident_mb("VmHWM") - before)


def measure_memory(batch: int, num_iterations: int) -> dict[str, float]:
    def measure(name: str) -> float:
        command = [sys.executable, __file__, "--memory-of", name, str(batch), str(num_iterations)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return {name: measure(name) for name in IMPLEMENTATIONS}


def run_case(batch: int, num_iterations: int, num_rounds: int) -> list[dict[str, float | int | str]]:
    times = measure_times(batch, num_iterations, num_rounds)
    errors = measure_gradient_errors(batch, num_iterations)
    memory = measure_memory(batch, num_iterations)
    return [
        {
            "batch": batch,
            "num_iterations": num_iterations,
            "implementation": name,
            "cpu_ms": round(statistics.median(times[name]) * 1e3, 2),
            "times_slower_than_scaling": round(
                statistics.median(x / y for x, y in zip(times[name], times["scaling"], strict=True)), 2
            ),
            "peak_mb": round(memory[name], 1),
            "gradient_error": errors[name],
        }
        for name in IMPLEMENTATIONS
    ]


def missed_targets(rows: list[dict]) -> list[str]:
    gate = {row["implementation"]: row for row in rows if (row["batch"], row["num_iterations"]) == GATE}
    missed = [
        f"scaling is {row['times_slower_than_scaling']}x faster than {name}, not {MIN_SPEEDUP}x"
        for name, row in gate.items()
        if name in ("plain port", "POT log_sinkhorn") and row["times_slower_than_scaling"] < MIN_SPEEDUP
    ]
    missed += [
        f"gradient of scaling is off by {row['gradient_error']:.1e} at {row['batch']} x {row['num_iterations']}"
        for row in rows
        if row["implementation"] == "scaling" and not row["gradient_error"] <= MAX_GRADIENT_ERROR
    ]
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per case")
    parser.add_argument("--memory-of", nargs=3, metavar=("NAME", "BATCH", "ITERATIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        name, batch, num_iterations = options.memory_of
        print_peak_memory(name, int(batch), int(num_iterations))
        return 0
    print("batch rounds implementation      CPU ms  ratio  peak MB gradient error")
    rows = []
    for batch, num_iterations in CASES:
        for row in run_case(batch, num_iterations, options.rounds):
            rows.append(row)
            print(
                f"{batch:>5} {num_iterations:>6} {row['implementation']:<17} {row['cpu_ms']:>8.1f} "
                f"{row['times_slower_than_scaling']:>6.2f} {row['peak_mb']:>8.1f} {row['gradient_error']:>14.1e}"
            )
    missed = missed_targets(rows)
    print(json.dumps({"benchmark": "transport", "torch": torch.__version__, "missed": missed, "rows": rows}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
