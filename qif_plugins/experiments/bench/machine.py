"""Describe the machine and the versions that a measurement depends on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...ops.backends import available_backends


def installed(package: str) -> str | None:
    """Return the version of an installed package, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Describe device, system and versions."""
    packages = ("torch", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "spikingjelly", "snntorch", "numpy")
    return {
        "name": machine_name(device),
        "device": device.type,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"qif-plugins": __version__, **{p: v for p in packages if (v := installed(p)) is not None}},
        "backend": available_backends(device)[0],
    }


def machine_name(device: torch.device) -> str:
    """Name the results file after the GPU, or the CPU and the number of threads."""
    what = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()} {torch.get_num_threads()} threads"
    )
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", what.lower())).strip("-")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
