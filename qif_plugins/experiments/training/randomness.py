"""Save and restore the states of all random number generators as plain values."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def torch_random(device: torch.device) -> list[Tensor]:
    """Return the states of PyTorch's generators: that of the CPU, and that of ``device`` if it is a GPU."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_torch_random(device: torch.device, states: list[Tensor]) -> None:
    """Restore the states from :func:`torch_random`; without a GPU, its state is ignored."""
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of PyTorch's, NumPy's and Python's generators."""
    numpy_state: Any = np.random.get_state()
    algorithm, keys, position, has_gauss, gauss = numpy_state
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch_random(device),
        "numpy": [str(algorithm), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), python_gauss],
    }


def set_random_state(device: torch.device, state: Mapping[str, Any]) -> None:
    """Restore the states from :func:`random_state`.

    Raises:
        ValueError: The states are not valid.
    """
    try:
        algorithm, keys, *rest = state["numpy"]
        numpy_state = algorithm, np.array(keys, np.uint32), *rest
        np.random.RandomState(0).set_state(numpy_state)
        version, words, gauss = state["python"]
        random.Random(0).setstate((version, tuple(words), gauss))
        set_torch_random(device, state["torch"])
        np.random.set_state(numpy_state)
        random.setstate((version, tuple(words), gauss))
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise ValueError(f"its states of the random number generators are invalid ({error})") from error
