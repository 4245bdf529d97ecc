"""``qif doctor``: installed versions, usable back ends, and a check of their results."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..experiments.bench.machine import installed
from ..experiments.names import HOSTS
from ..neuron.functional import qif_multi_step
from ..neuron.parameters import QIFParameters
from ..neuron.surrogate import Window
from ..ops.backends import BACKENDS, BackendName, unavailable_reason
from ..ops.shortcuts import ENABLED, VARIABLE, eager
from ..ops.shortcuts.memory import uses_huge_pages
from ..ops.shortcuts.openmp import uses_openmp
from ..ops.threads import which_threads
from ..support.text import one_line

OPTIONAL = {
    "numba": ("numba",),
    "triton": ("triton", "triton-windows"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
"""Packages by the name they are imported under, and the distributions that provide them."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0 if every backend that runs here agrees with the reference, 1 otherwise.
    """
    print(f"{'qif-plugins':<14}{__version__}")
    print(f"{'python':<14}{platform.python_version()} at {sys.executable}")
    print(f"{'torch':<14}{torch.__version__}, {torch.get_num_threads()} threads; CPU kernels run on {which_threads()}")
    for host in HOSTS:
        print(f"{host:<14}{installed(host) or f'not installed; pip install {chr(39)}qif-plugins[{host}]{chr(39)}'}")
    for name, distributions in OPTIONAL.items():
        print(f"{name:<14}{next(filter(None, map(installed, distributions)), 'not installed')}")
    print(f"{'shortcuts':<14}{_shortcuts()}")
    devices = list(_devices())
    print(f"{'devices':<14}{', '.join(label for _, label in devices)}")
    if len(devices) == 1:
        print(f"{'':<14}{_no_accelerator()}")

    healthy = True
    for device, label in devices:
        print(f"\nbackends on {label}, best first")
        for backend in BACKENDS:
            reason = unavailable_reason(backend, device)
            fault = None if reason is not None else _self_check(backend, device)
            healthy &= fault is None
            state = f"not here: {reason}" if reason else f"FAULTY: {fault}" if fault else "ok, bits of the reference"
            print(f"  {backend:<12}{state}")
    print("\nusable" if healthy else "\nnot usable: a backend disagrees with the reference; please report this output")
    return 0 if healthy else 1


def _shortcuts() -> str:
    """Name the shortcuts that this process takes, and the variable that turns them off."""
    if not ENABLED:
        return f"off by {VARIABLE}=0"
    taken = {
        "small CPU calls past PyTorch's dispatcher": eager.applies(torch.zeros(1, dtype=torch.float32), 0.0),
        "PyTorch's own threads": uses_openmp(),
        "huge pages": uses_huge_pages(),
    }
    return f"{', '.join(name for name, is_taken in taken.items() if is_taken) or 'none'}; {VARIABLE}=0 turns them off"


def _devices() -> Iterator[tuple[torch.device, str]]:
    """List the devices of this machine with their labels."""
    yield torch.device("cpu"), "cpu"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        yield torch.device("cuda", index), f"cuda:{index} ({name}, sm_{major}{minor})"


def _no_accelerator() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU: this PyTorch was built without CUDA; see https://pytorch.org/get-started/locally"
    return f"no GPU: PyTorch, built for CUDA {torch.version.cuda}, finds no device (no GPU, or no driver for it)"


def _self_check(backend: BackendName, device: torch.device) -> str | None:
    """Run a small sequence forward and backward; say what differs from the reference on the CPU, or ``None``."""
    try:
        results = _small_problem(backend, device)
    except Exception as error:  # any error of a kernel is a finding to print
        return f"{type(error).__name__}: {one_line(error)}"
    expected = _small_problem("torch", torch.device("cpu"))
    wrong = [name for name in expected if not torch.equal(results[name].cpu(), expected[name])]
    return f"{', '.join(wrong)} differ from the reference" if wrong else None


def _small_problem(backend: BackendName, device: torch.device) -> dict[str, Tensor]:
    drawn: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    x = torch.randn(8, 257, **drawn).to(device).requires_grad_()
    v = torch.randn(257, **drawn).mul(0.3).to(device).requires_grad_()
    weight = torch.randn(8, 257, **drawn).to(device)
    params = QIFParameters()
    spikes, v_seq = qif_multi_step(x, v, params, Window.unbiased(params), store_v_seq=True, backend=backend)
    grad_x, grad_v = torch.autograd.grad((spikes * weight).sum() + (v_seq * weight).sum(), (x, v))
    return {"spikes": spikes, "membranes": v_seq, "input gradients": grad_x, "state gradients": grad_v}
