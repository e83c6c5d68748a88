"""When the fused solver is taken and when it is refused; its tests, interpreted; its compilation without a GPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvft.errors import ConfigError
from cvft.kernels import sinkhorn
from cvft.transport import TransportProblem, solve

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")

COMPILE = """
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cvft.kernels import sinkhorn_triton

SIZES = {"NUM_SOURCES": 64, "NUM_TARGETS": 64, "N": 64, "M": 64, "KEEP": True}
TYPES = {"counts": "*i64", "num_rounds": "i32", "scale_high": "fp32", "scale_low": "fp32", "threshold": "fp32"}
for kernel in (sinkhorn_triton.forward_kernel, sinkhorn_triton.backward_kernel):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in SIZES else TYPES.get(name, "*fp32") for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    constants = {name: SIZES[name] for name in names if name in SIZES}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(*re.search("REG:([0-9]+) STACK:([0-9]+)", usage).groups(), compiled.metadata.shared)
"""


def run_python(*arguments: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_CACHE_DIR": str(tmp_path)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def fresh_look():
    """What was found out about Triton is forgotten before and after the test."""
    sinkhorn.triton_obstacle.cache_clear()
    yield
    sinkhorn.triton_obstacle.cache_clear()


@pytest.mark.slow
@NEEDS_TRITON
def test_the_kernels_pass_their_tests_in_tritons_interpreter(tmp_path):
    files = ("tests/cvft/test_kernels_sinkhorn.py", "tests/cvft/test_kernels_activation.py")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    done = run_python(*arguments, tmp_path=tmp_path, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
@NEEDS_TRITON
def test_both_kernels_compile_for_a_hopper_gpu_and_keep_the_tile_in_registers(tmp_path):
    done = run_python("-c", COMPILE, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        num_registers, spilled_bytes, shared_bytes = map(int, line.split())
        assert num_registers < 255
        assert spilled_bytes == 0
        assert shared_bytes < 48 * 1024
    assert len(done.stdout.splitlines()) == 2


def test_without_triton_it_is_refused_by_name_with_what_is_missing(monkeypatch, fresh_look):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = TransportProblem(cost=torch.zeros(1, 3, 3), epsilon=0.1)
    with pytest.raises(
        ConfigError, match="solver: triton needs the package triton, which is not installed; use solver=au"
    ):
        solve(problem, solver="triton")


@NEEDS_TRITON
def test_without_a_c_compiler_it_is_refused_by_name(monkeypatch, fresh_look, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="solver: triton needs a C compiler"):
        solve(TransportProblem(cost=torch.zeros(1, 3, 3), epsilon=0.1), solver="triton")


@NEEDS_TRITON
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the CPU's costs")
def test_costs_on_the_cpu_are_refused_by_name_and_solved_by_scaling_otherwise(caplog):
    problem = TransportProblem(cost=torch.zeros(1, 3, 3), epsilon=0.1)
    with pytest.raises(ConfigError, match="solver: triton runs on CUDA, not on cpu; use solver=auto"):
        solve(problem, solver="triton")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(solve(problem).plan, solve(problem, solver="scaling").plan)
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_chosen_by_itself_and_left_by_itself_with_a_warning(caplog):
    cost = torch.rand(2, 64, 64, device="cuda")
    problem = TransportProblem(cost=cost, epsilon=0.1)
    assert torch.equal(solve(problem).plan, solve(problem, solver="triton" if HAS_TRITON else "scaling").plan)
    large = TransportProblem(cost=torch.rand(1, 300, 300, device="cuda"), epsilon=0.1)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(solve(large).plan, solve(large, solver="scaling").plan)
    assert "transport by solver=scaling: the fused solver" in caplog.text
