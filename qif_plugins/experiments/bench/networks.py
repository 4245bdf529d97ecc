"""Time a training step of whole networks with LIF, swapped to QIF, and with neurons that cost nothing, in one run.

Every repetition runs one step (forward, backward, optimizer) of each peer, one after another and beginning with another
one each time, so that other work on the machine slows all of them alike. The networks are copies with the same weights:

- *lif*: the network as its host has it, with the backend that the host chooses;
- *qif*: the same after :func:`qif_plugins.swap`;
- *identity*: the same with an identity in place of every neuron that the swap replaced, which is the floor.

Two numbers count. *LIF over QIF* is the ratio of their steps, which the user feels; the rest of the network limits it.
The *share* is the neurons' part alone, QIF's time over the identity's as a part of LIF's time over the identity's.
Membranes are reset between steps, outside the measured time.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import swap
from ...convert.trial import reset_state
from ...support.text import one_line
from ..studies import networks as published
from ..studies.networks import Network
from .harness import LEAST, complete
from .network_table import BOOK, EAGER, IDENTITY, LIF, QIF, Case, compared
from .peers import dtype_name
from .runner import peak_bytes, release

_IMAGES: dict[str, Any] = {"sequence": published.repeated(4, 3, 32, 32), "batch": 8, "lr": 1e-3}
NETWORKS: dict[str, tuple[int, Network, str]] = {
    "spiking VGG-11": (3 * 32 * 32, Network(published.vgg_11, **_IMAGES), "ms"),
    "spiking ResNet-18": (
        3 * 32 * 32,
        Network(partial(published.resnet_18, published.spiking_resnet, "spiking_resnet18"), **_IMAGES),
        "ms",
    ),
    "SEW-ResNet-18": (
        3 * 32 * 32,
        Network(partial(published.resnet_18, published.sew_resnet, "sew_resnet18", cnf="ADD"), **_IMAGES),
        "ms",
    ),
    "Spikformer, small": (64, published.NETWORKS["Spikformer"], "m"),
    "recurrent": (784, Network(partial(published.Recurrent, 28, 256), published.rows(28), batch=64), "ms"),
    "snnTorch tutorial 5": (
        784,
        replace(published.NETWORKS["snnTorch tutorial 5"], build=partial(published.tutorial_5, 1000)),
        "s",
    ),
    "snnTorch tutorial 6": (
        784,
        Network(
            partial(published.convolutional, 1.0, 25, (12, 64), 5, 0, 1024), published.repeated(25, 1, 28, 28),
            batch=32, lr=1e-2,
        ),
        "s",
    ),
}  # fmt: skip
"""Numbers in one sample, the network, and the step modes that it has."""


class _Step:
    """A peer that takes one training step at each call."""

    def __init__(self, model: nn.Module, network: Network, x: Tensor, y: Tensor, case: Case, compiled: bool) -> None:
        self.model, self.loss, self.x, self.y = model, network.loss, x, y
        self.low = case.dtype != "float32"
        self.dtype = getattr(torch, case.dtype)
        self.optimizer = network.optimizer(model.parameters(), lr=network.lr)
        forward: Any = torch.compile(model) if compiled else model
        loops = case.step_mode == "m" or isinstance(model, published.Unrolled)
        self.forward = forward if loops else published.Stepped(forward)

    def __call__(self) -> float:
        """Take a step, and return the seconds from an idle device until it is idle again."""
        reset_state(self.model)
        self._wait()
        began = time.perf_counter()
        with torch.autocast(self.x.device.type, self.dtype if self.low else None, enabled=self.low):
            out = self.forward(self.x)
        loss = self.loss(out.float(), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.x.device.type == "cuda":
            torch.cuda.synchronize(self.x.device)


def peers(case: Case, device: torch.device) -> tuple[list[int], dict[str, Callable[[], _Step]]]:
    """Build the networks of a case: the shape of the input, and functions that make each peer's step."""
    features, network, _ = NETWORKS[case.network]
    torch.manual_seed(0)
    images = torch.rand(case.batch, features, device=device)
    y = torch.randint(published.CLASSES, (len(images),), device=device)
    x = network.sequence(images)
    models = {LIF: network.build().to(device)}
    models[QIF] = copy.deepcopy(models[LIF])
    replaced = [row.name for row in swap(models[QIF], example_input=x[:, :2]).rows if row.changed]
    models[IDENTITY] = copy.deepcopy(models[LIF])
    for name in replaced:
        parent, _, child = name.rpartition(".")
        setattr(models[IDENTITY].get_submodule(parent), child, nn.Identity())
    if case.compiled:
        models[EAGER] = copy.deepcopy(models[QIF])
    return list(x.shape), {
        name: partial(_Step, model, network, x, y, case, case.compiled and name != EAGER)
        for name, model in models.items()
    }


def measure(case: Case, device: torch.device, seconds: float = 10.0) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: The case; its dtype, if not float32, is autocast's.
        device: Device to measure on.
        seconds: Time to spend after the first steps; at least three repetitions are made. Default 10.

    Returns:
        The case, the input's shape, the number of repetitions; of each peer the median seconds and the peak memory of a
        step, or why it could not run; ``ratio``, LIF's step over QIF's, and ``share``, each as the quartiles [25, 50,
        75 %] over the repetitions. There is no share where the identity's step takes as long as LIF's.
    """
    release()
    torch.compiler.reset()
    shape, build = peers(case, device)
    steps: dict[str, _Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, make in build.items():
        started = _start(make)
        if isinstance(started, str):  # a peer that cannot run says so in the table
            results[name] = {"error": started}
        else:
            steps[name], peak = started
            results[name] = {"peak_bytes": peak}
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    began = time.perf_counter()
    order = list(steps)
    while order and (len(times[order[0]]) < LEAST or time.perf_counter() - began < seconds):
        for name in order:
            times[name].append(steps[name]())
        order = order[1:] + order[:1]
    for name, taken in times.items():
        results[name]["seconds"] = statistics.median(taken)
    return {
        **case._asdict(), "input": shape, "repeats": max(map(len, times.values()), default=0), "peers": results,
        **compared(times),
    }  # fmt: skip


def _start(make: Callable[[], _Step]) -> tuple[_Step, int] | str:
    """Build a peer and take two steps, since the second sees the optimizer's state; return it with its peak memory."""
    try:
        step = make()
        step(), step()
        return step, peak_bytes(step.x.device, step)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 200)}"


def run(
    names: Sequence[str], dtypes: Iterable[torch.dtype], compiled: bool, batch: int | None, device: torch.device,
    path: Path, command: str, seconds: float, report: Callable[[str], None], resume: bool, minutes: float,
) -> int:  # fmt: skip
    """Measure the networks of these names, eager ones first, and write the results file after each.

    The arguments are those of :func:`measure` and of :func:`.harness.complete`; ``compiled`` adds every case under
    ``torch.compile``, and ``batch`` is the number of samples, by default each network's own.

    Returns:
        The number of cases that are left to measure.
    """
    wanted = [
        Case(name, mode, dtype_name(dtype), under, batch or NETWORKS[name][1].batch)
        for under in ((False, True) if compiled else (False,))
        for dtype in dtypes
        for name in names
        for mode in NETWORKS[name][2]
    ]
    one = partial(measure, device=device, seconds=seconds)
    return complete(wanted, one, BOOK, device, path, command, report, resume, minutes)
