"""``qif.cu`` as a library of the host: compiled by g++ behind ``cuda_shim.h``, which replaces the launch alone."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qif_plugins.ops import cupy_backend as cuda

SHIM = Path(__file__).with_name("cuda_shim.h")


def build(folder):
    """Compile the library into ``folder``; without a C++ compiler the test is skipped, and a failure to build fails."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed, and without it qif.cu cannot run on the CPU")
    target = Path(folder) / "qif.so"
    command = [
        compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++",
        f'-DQIF_SOURCE="{cuda.SOURCE}"', str(SHIM), "-o", str(target),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    shim = ctypes.CDLL(str(target))
    shim.size_of_forward.restype = shim.size_of_backward.restype = ctypes.c_ulong
    return shim


def launcher(library):
    """The function that takes the place of ``cupy_backend._launch``."""

    def launch(name, flags, blocks, arguments, device):
        which, vector = re.fullmatch(r"(\w+)<(\d)>", name).groups()
        size = library.size_of_forward() if which == "forward" else library.size_of_backward()
        assert len(arguments) == size
        values = (ctypes.c_int * len(flags))(*flags.values())
        library.run(which == "forward", int(vector), values, arguments, blocks, cuda.THREADS)

    return launch


def rehearse(folder):
    """Make ``backend="cupy"`` run on the CPU, emulated, for the rest of this process."""
    cuda._launch = launcher(build(folder))
    cuda.unavailable = lambda device: None if device == torch.device("cpu") else "this is a rehearsal"
