"""The Triton kernels without a GPU: interpreted against the reference, and compiled for every architecture."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_kernels import Compiled, Target, empty

from qif_plugins.ops import triton_backend as kernels
from qif_plugins.ops.contract import Coefficient, Coefficients, Kind, Shape

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.host_independent

HELPERS = Path(__file__).parents[1] / "helpers"


def test_interpreted_kernels_give_the_bits_of_the_reference():
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(HELPERS / "interpreted_triton.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HELPERS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    if "passed" not in finished.stdout:
        pytest.skip(finished.stdout)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton")
def test_the_cpu_needs_the_interpreter():
    reason = kernels.unavailable(torch.device("cpu"))
    assert "TRITON_INTERPRET=1" in reason
    assert "'mps'" in kernels.unavailable(torch.device("mps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can launch kernels here")
def test_what_launching_needs():
    assert "driver, a C compiler and Python's headers" in kernels._why_it_cannot_launch()


@pytest.fixture(params=[80, 90, 100])
def compiled(request, monkeypatch):
    """The two kernels, compiled for a compute capability whatever the machine has."""
    from triton.runtime import driver

    from qif_plugins.ops import triton_kernels

    if not isinstance(triton_kernels.forward, triton.JITFunction):
        pytest.skip("this process interprets Triton")
    monkeypatch.setattr(driver, "_active", Target(request.param), raising=False)
    monkeypatch.setattr(triton_kernels, "forward", Compiled(triton_kernels.forward))
    monkeypatch.setattr(triton_kernels, "backward", Compiled(triton_kernels.backward))
    return triton_kernels


UNIFORM = Coefficients(*(Coefficient(1.0 + i) for i in range(9)))
WINDOW = Kind(soft=False, detach_reset=False, strict=False, shape=Shape.WINDOW, pre_reset=False)


def forward(x, c, kind, v_dtype=torch.float32):
    kernels.forward(x, 0.5, c, kind, torch.empty_like(x), empty(x.shape[1], dtype=v_dtype), None, empty(*x.shape))


def backward(x, c, kind, needs=(False,) * 6):
    v0 = empty(x.shape[1], dtype=x.dtype)
    kernels.backward(
        x, v0, None, empty(*x.shape), v0, x, c, kind, torch.empty_like(x), torch.empty_like(v0), needs
    )  # fmt: skip


def check_arithmetic(ptx):
    """Every float32 operation is rounded by itself, to nearest, and subnormal numbers are kept."""
    assert not re.findall(r"\bfma\.\S+|\bmad\.\S*f32", ptx)
    # floor, of a number that cannot be subnormal, is the one exception.
    assert set(re.findall(r"\S*(?:ftz|approx|\.full)\S*", ptx)) <= {"cvt.rmi.ftz.f32.f32"}
    arithmetic = re.findall(r"\b(?:add|sub|mul|div)\.\S*f32", ptx)
    assert arithmetic
    assert all(".rn." in operation for operation in arithmetic), set(arithmetic)


def test_compiled_arithmetic_and_access_width(compiled):
    x = empty(4, 2**20)
    forward(x, UNIFORM, WINDOW)
    check_arithmetic(compiled.forward.ptx)
    assert "ld.global.v4" in compiled.forward.ptx
    assert "st.global.v4" in compiled.forward.ptx
    for shape in Shape:
        backward(x, UNIFORM, WINDOW._replace(shape=shape, soft=shape == Shape.ATAN, pre_reset=shape == Shape.SIGMOID))
        check_arithmetic(compiled.backward.ptx)
        assert "ld.global.v4" in compiled.backward.ptx
        assert "st.global.v4" in compiled.backward.ptx


def test_compiled_layouts_and_sums(compiled):
    neurons = 2**12
    tensors = [empty(1), empty(64), empty(neurons)] * 3
    mixed = Coefficients(*(Coefficient(t, neurons // t.numel() if t.numel() == 1 else 1) for t in tensors))
    x = empty(3, neurons, dtype=torch.bfloat16)
    forward(x, mixed, WINDOW._replace(strict=True, pre_reset=True), torch.bfloat16)
    check_arithmetic(compiled.forward.ptx)
    backward(x, mixed, WINDOW._replace(shape=Shape.FAST_SIGMOID, detach_reset=True), (True,) * 6)
    check_arithmetic(compiled.backward.ptx)
    assert re.search(r"cvt\.rn\.bf16\S*\.f32", compiled.backward.ptx)


def test_another_number_of_steps_compiles_nothing(compiled):
    for steps in (1, 2, 16, 17):
        forward(empty(steps, 2**12), UNIFORM, WINDOW)
    assert len(set(map(id, compiled.forward.results))) == 1


def test_compiled_for_more_than_2_31_neurons(compiled):
    for shape in ((1, 2**31 + 1), (3, 2**30), (1, 1)):
        x = empty(*shape, dtype=torch.bfloat16)
        forward(x, UNIFORM, WINDOW, torch.bfloat16)
        backward(x, UNIFORM, WINDOW)
        # The row's offset has 64 bits whatever the size.
        assert re.search(r"\badd\.s64", compiled.forward.ptx)
