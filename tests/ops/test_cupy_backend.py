"""qif.cu without a GPU: run behind a C++ shim against the reference, and compiled by NVRTC for every architecture.

The shim replaces the launch alone, so the packing of arguments, the choice of vector width and grid and
the final sums are those that run on a GPU.
"""

import itertools
import re

import cuda_shim
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Case, cases, check_against_reference

from qif_plugins.ops import cupy_backend as cuda
from qif_plugins.ops import sums
from qif_plugins.ops.contract import Kind, Shape

pytestmark = pytest.mark.host_independent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module", params=["one stride", "many strides"])
def shimmed(request, library):
    """The module ``cuda`` launching on the host, with the real block size and with one that strides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_launch", cuda_shim.launcher(library))
        if request.param == "many strides":
            patch.setattr(cuda, "THREADS", 8)
            patch.setattr(sums, "TARGET", 64)
        yield cuda


@given(case=cases())
@settings(max_examples=150)
def test_same_bits_as_the_reference(shimmed, case):
    check_against_reference(shimmed, case)


def test_every_gradient_and_every_kind(shimmed):
    for soft, detached, strict, pre_reset, rebound, shape in itertools.product(*[(False, True)] * 5, Shape):
        for layouts in (("single",) * 9, ("channel",) * 9, ("neuron",) * 9):
            for blocks in ((3, 2, 4), (2, 3, 5)):
                case = Case(
                    steps=3,
                    blocks=blocks,
                    dtype=torch.float32,
                    layouts=layouts,
                    kind=Kind(soft, detached, strict, shape, pre_reset, rebound),
                    start=torch.float32,
                    store_v_seq=True,
                    save_h=True,
                    specials=False,
                    gradients=(True, True, True),
                    needs=(True,) * 6,
                    needs_v0=True,
                    seed=1,
                )
                check_against_reference(shimmed, case)


ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")

FLAGS = {
    "QIF_X": 0, "QIF_V0": 0, "QIF_V": 0, "QIF_SOFT": 0, "QIF_DETACHED": 0, "QIF_STRICT": 0, "QIF_SHAPE": 0,
    "QIF_PRE_RESET": 0, "QIF_REBOUND": 1, "QIF_TENSORS": 0, "QIF_NEEDS": 0, "QIF_GIVEN": 6,
}  # fmt: skip

BENT = {"QIF_REBOUND": 0}

SPECIALISATIONS = [
    ("forward<4>", {}),
    (
        "forward<1>",
        {"QIF_X": 1, "QIF_V0": 1, "QIF_V": 1, "QIF_SOFT": 1, "QIF_STRICT": 1, "QIF_PRE_RESET": 1, "QIF_REBOUND": 0},
    ),
    ("forward<4>", {"QIF_X": 2, "QIF_V0": 0, "QIF_V": 2, "QIF_TENSORS": 9}),
    ("backward<4>", {}),
    ("backward<1>", {"QIF_SHAPE": 1, "QIF_SOFT": 1, "QIF_X": 1, "QIF_V": 1}),
    (
        "backward<4>",
        {
            "QIF_SHAPE": 2,
            "QIF_X": 2,
            "QIF_V": 2,
            "QIF_PRE_RESET": 1,
            "QIF_REBOUND": 0,
            "QIF_TENSORS": 511,
            "QIF_NEEDS": 63,
        },
    ),
    ("backward<4>", {"QIF_SHAPE": 4, "QIF_TENSORS": 448, "QIF_NEEDS": 8}),
    ("backward<4>", {"QIF_SHAPE": 3, "QIF_DETACHED": 1, "QIF_NEEDS": 7, "QIF_TENSORS": 7, "QIF_GIVEN": 31}),
]


def compile_to_ptx(name, flags, architecture):
    """PTX from NVRTC, which needs neither a GPU nor a driver."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    options = [f"--gpu-architecture={architecture.replace('sm', 'compute')}", *cuda.OPTIONS]
    options += [f"-D{key}={value}" for key, value in flags.items()]
    encoded = [option.encode() for option in options]
    _, program = nvrtc.nvrtcCreateProgram(cuda.SOURCE.read_bytes(), b"qif.cu", 0, [], [])
    nvrtc.nvrtcAddNameExpression(program, name.encode())
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytes(max(size, 2))  # written into: Python shares bytes objects of length 1 with everybody
        nvrtc.nvrtcGetProgramLog(program, log)
        raise AssertionError(log.decode())
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytes(max(size, 2))
    nvrtc.nvrtcGetPTX(program, ptx)
    _, lowered = nvrtc.nvrtcGetLoweredName(program, name.encode())
    assert lowered.decode() in ptx.decode()
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.decode()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_without_contraction(architecture):
    for name, changed in SPECIALISATIONS:
        ptx = compile_to_ptx(name, FLAGS | changed, architecture)
        inexact = re.findall(r"\b(?:fma|mad\.\S*f32)\S*|\S*(?:\.ftz|\.approx|div\.full)\S*", ptx)
        assert not inexact, (name, changed, inexact)
        # Without a rounding mode in PTX the assembler would be free to contract.
        arithmetic = re.findall(r"\b(?:add|sub|mul|div)\.\S*f32", ptx)
        assert arithmetic
        assert all(".rn." in operation for operation in arithmetic), (name, changed, set(arithmetic))
        if "<4>" in name and (FLAGS | changed)["QIF_X"] == 0:
            assert "ld.global.v4" in ptx, (name, changed)
            assert "st.global.v4" in ptx, (name, changed)
        if (FLAGS | changed)["QIF_V"] == 2:
            assert ("cvt.rn.bf16.f32" in ptx) == (architecture != "sm_75"), (name, changed)


@pytest.mark.parametrize(("capability", "start"), [((9, 0), b"\x7fELF"), ((99, 0), b"//")])
def test_cupy_compiles(capability, start):
    """Machine code for a GPU that NVRTC knows, PTX for a younger one."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    binary, symbol = cuda.compile_kernel("backward<4>", FLAGS, capability)
    assert binary.startswith(start)
    assert symbol.encode() in binary


def test_cupy_names_what_it_cannot_compile():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with pytest.raises(RuntimeError, match=r"no longer compiles for compute capability 3\.5"):
        cuda.compile_kernel("forward<4>", FLAGS, (3, 5))
    with pytest.raises(RuntimeError, match="identifier"):
        cuda.compile_kernel("sideways<4>", FLAGS, (9, 0))


def test_contraction_would_be_seen(monkeypatch):
    monkeypatch.setattr(cuda, "OPTIONS", ("-std=c++17",))
    assert "fma.rn.f32" in compile_to_ptx("forward<4>", FLAGS, "sm_90")


def test_what_the_backend_needs():
    reason = cuda.unavailable(torch.device("cpu"))
    assert "CUDA tensors only" in reason
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in cuda.unavailable(torch.device("cuda"))


def test_width_follows_alignment():
    x = torch.zeros(3, 8)
    assert cuda.width(8, (x, None, 0.5)) == 4
    assert cuda.width(6, (torch.zeros(3, 6),)) == 1
    assert cuda.width(8, (torch.zeros(9)[1:],)) == 1
    assert cuda.width(8, (torch.zeros(9, dtype=torch.bfloat16)[1:],)) == 1
