"""Running a model to look at its QIF layers, and leaving it as it was found."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.find import survey
from ..convert.hosts import loaded_hosts
from ..convert.norms import is_tdbn
from ..neuron.module import QIFLayer
from ..neuron.parameters import Number, QIFParameters
from ..support.text import plus_minus

__all__ = [
    "ONE_STEP", "REACH", "Moments", "bare", "batches_of", "derives", "preserved", "qif_layers", "run", "runaway",
    "tdbn_before",
]  # fmt: skip

Batches = Iterable[Any] | Tensor | Callable[[nn.Module], Any]

ONE_STEP = "measured over one time step; pass steps=T or a callable that runs the model over all its steps"
"""Advice on a layer whose membrane had no time to leave rest: its spikes and gradient may mislead."""

REACH = 3.0
"""Largest distance of the threshold from the membrane's mean, in deviations, at which a window around the threshold
has membranes in it."""


class Moments:
    """Count, mean and central moments up to the fourth of a stream, of each group of it.

    Merged chunk by chunk (Chan, Golub and LeVeque; Pébay, *Formulas for robust, one-pass parallel computation of
    covariances and arbitrary-order statistical moments*, SAND2008-6212), in float64.

    Attributes:
        n: Values so far, a group.
        sums: ``[4, groups]``: the mean, and the sums of the 2nd, 3rd and 4th powers of the deviations from it.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sums: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add ``[n, groups]``; nothing where n is 0."""
        if not len(values):
            return
        # Apple's GPUs have no float64.
        values = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
        mean = values.mean(0)
        deviation = values - mean
        square = deviation * deviation
        chunk = torch.stack([mean, square.sum(0), (square * deviation).sum(0), (square * square).sum(0)])
        self.merge(values.shape[0], chunk.to("cpu", torch.float64))

    def merge(self, n: int, sums: Tensor) -> None:
        """Add another stream's count and sums; nothing where the count is 0."""
        if not n:
            return
        if self.sums is None:
            self.n, self.sums = n, sums
            return
        a, b = self.n, n
        total = a + b
        (mean_a, m2a, m3a, m4a), (mean_b, m2b, m3b, m4b) = self.sums, sums
        d = mean_b - mean_a
        self.n = total
        self.sums = torch.stack(
            [
                mean_a + d * b / total,
                m2a + m2b + d**2 * (a * b / total),
                m3a + m3b + d**3 * (a * b * (a - b) / total**2) + 3 * d * (a * m2b - b * m2a) / total,
                m4a + m4b + d**4 * (a * b * (a * a - a * b + b * b) / total**3)
                + 6 * d**2 * (a * a * m2b + b * b * m2a) / total**2 + 4 * d * (a * m3b - b * m3a) / total,
            ]
        )  # fmt: skip

    @property
    def mean(self) -> Tensor:
        """Mean, ``[groups]``."""
        return self._sums()[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation, ``[groups]``."""
        return (self._sums()[1] / self.n).sqrt()

    @property
    def skewness(self) -> Tensor:
        """Third standardized moment, 0 for a normal distribution; ``[groups]``."""
        return self._sums()[2] / self.n / self.std**3

    @property
    def kurtosis(self) -> Tensor:
        """Fourth standardized moment less 3, 0 for a normal distribution; ``[groups]``."""
        return self._sums()[3] / self.n / self.std**4 - 3

    def _sums(self) -> Tensor:
        if self.sums is None:
            raise ValueError("no values yet")
        return self.sums


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def qif_layers(model: nn.Module) -> dict[str, QIFLayer]:
    """The QIF layers of a model by name; a shared one once.

    Raises:
        ValueError: There is none.
    """
    layers = {
        name or "(model)": module
        for name, module in model.named_modules()
        if isinstance(module, QIFLayer) and module.resets
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no QIF layer to look at. Build it with QIFNode or QIF in LIF's place, or "
            "replace its LIF neurons with qif_plugins.swap(model)."
        )
    return layers


def derives(layer: QIFLayer) -> bool:
    """Whether the layer's window follows from the moments of its membrane."""
    return layer.derived_window not in (None, "heuristic")


def runaway(layer: QIFLayer, mean: float, std: float) -> str:
    """What to do about a membrane that is not finite although its input is."""
    found = f"its membrane is not finite ({plus_minus(mean, std)}), though its input is: "
    if layer.qif_parameters.reset == "soft":
        return found + (
            "the soft reset leaves a large membrane large, and the map squares it. Use the hard reset, v_reset=0 or "
            "reset_mechanism='zero'."
        )
    return found + (
        "the map squares a membrane far below rest, which strongly negative input makes. Normalize or clamp the input."
    )


def tdbn_before(model: nn.Module, layers: dict[str, QIFLayer]) -> dict[str, str]:
    """What to do for tdBN before each layer, as an imperative that begins in lower case.

    What feeds a layer is told by the order of registration, as in :func:`~qif_plugins.swap`; converting norms inserts
    none, so that a layer without one needs another advice.
    """
    found = survey(model, loaded_hosts())
    sites = {id(site.module): site for site in found.sites}
    advice = {}
    for name, layer in layers.items():
        site = sites.get(id(layer))
        if site is None or not site.norms_known:
            advice[name] = (
                "see that tdBN comes before it (swap(model, norm='tdbn') makes tdBN of a batch norm that is there, and "
                "inserts none; qif_plugins.neuron.norm has TDBatchNorm1d to 3d)"
            )
        elif not site.norms:
            advice[name] = (
                "insert tdBN before it, as no normalization feeds it (TDBatchNorm1d to 3d of qif_plugins.neuron.norm)"
            )
        elif all(isinstance(found.norms[norm], _BatchNorm) and not is_tdbn(found.norms[norm]) for norm in site.norms):
            advice[name] = f"make tdBN of {', '.join(site.norms)}, which feeds it (swap(model, norm='tdbn'))"
        else:
            advice[name] = f"change the scale of {', '.join(site.norms)}, which feeds it (its weight and bias)"
    return advice


def effective_input(params: QIFParameters, x_seq: Tensor) -> Tensor:
    """g·x, what the closures call the input."""
    gain: Number = params.input_gain
    x = x_seq if x_seq.dtype == torch.float64 else x_seq.float()
    return x * gain.to(x.device, x.dtype) if isinstance(gain, Tensor) else x * gain


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the model's state, buffers, flags and hooks, and to the random numbers, is undone.

    Raises:
        ValueError: The model has parameters that its first forward would create, or is on the meta device.
    """
    modules = list(model.modules())
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("the model has lazy layers without parameters yet; run one batch through it first")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the model is on the meta device and cannot run; give it values first, to_empty and a checkpoint"
        )
    saved = [(module, _shallow(module.__dict__)) for module in modules]
    tensors = [tensor for _, state in saved for tensor in _state_tensors(state)]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), _eager():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for tensor, copy in copies:
                # By value: batch norm does not count the changes of its running statistics.
                if not torch.equal(tensor, copy):
                    tensor.detach().copy_(copy)
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    # One level down: parameters, buffers, submodules, hooks and the hosts' memories are dictionaries.
    return {name: value.copy() if isinstance(value, dict) else value for name, value in state.items()}


def _state_tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    for name in ("_buffers", "_memories"):
        yield from (value for value in state.get(name, {}).values() if isinstance(value, Tensor))


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled submodules run as written, so that hooks and observers see them."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return stance("force_eager")


def batches_of(batches: Any) -> Iterable[Any]:
    """``batches`` as an iterable of batches, a single batch as one of length 1."""
    if isinstance(batches, Tensor) or _is_pair(batches):
        return (batches,)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of tensors or of (tensor, target), or a callable that runs the model, got "
            f"{type(batches).__name__}"
        )
    return batches


def _is_pair(batch: Any) -> bool:
    """Whether this is one (input, target) rather than two batches: the target is integer, the input is not."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        return False
    return batch[0].is_floating_point() and not batch[1].is_floating_point()


def run(model: nn.Module, batch: Any, steps: int) -> list[Any]:
    """Reset the state, then call the model ``steps`` times on the batch's input; the outputs.

    Raises:
        TypeError: The batch is neither a tensor nor a sequence that begins with one, or the model takes more than it.
    """
    return run_on(model, input_of(model, batch), steps)


def run_on(model: nn.Module, x: Tensor, steps: int) -> list[Any]:
    """Reset the state, then call the model ``steps`` times on ``x``; the outputs.

    Raises:
        TypeError: The model cannot be called on ``x`` alone.
    """
    reset_state(model)
    try:
        return [model(x) for _ in range(steps)]
    except TypeError as error:
        raise TypeError(
            f"calling the model on the batch's input, its first tensor, failed: {error}. If the model takes more than "
            "that, pass a callable that takes the model and runs it, such as lambda model: model(a, b)."
        ) from error


def input_of(model: nn.Module, batch: Any) -> Tensor:
    """The input tensor of a batch, on the model's device."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a batch must be a tensor, or a tuple or list that begins with one, got {type(batch).__name__}. For "
            "anything else pass a callable that takes the model and runs it, such as lambda model: model(**inputs)."
        )
    device = next((t.device for t in (*model.parameters(), *model.buffers())), x.device)
    return x.to(device)


def reset_state(model: nn.Module) -> None:
    """Forget membranes, in whichever host's modules."""
    for module in model.modules():
        # By what they have: SpikingJelly's memories, snnTorch's reset_mem.
        clear: Any = getattr(module, "reset" if hasattr(module, "_memories") else "reset_mem", None)
        if callable(clear):
            clear()


def average(value: Number) -> float:
    """The mean over neurons of a number that may differ between them."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").mean().item()


def check_steps(steps: int) -> None:
    """Raises ValueError unless ``steps`` is a whole number above 0."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
