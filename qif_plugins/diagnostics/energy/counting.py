"""Count the operations of a spiking network while it runs on real data.

- A *SynOp* is one spike arriving at one target. A spike counts as often as it is used, so at the borders of a
  convolution less often than inside.
- *MACs* are counted in a call of a layer whose input has values other than 0 and 1, such as the input layer of images
  and layers after an average pooling. As usual they include the multiplications with padding.
- A *neuron-step* is one neuron updated once.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ...convert.hosts import loaded_hosts
from ...convert.trial import unwrapped
from ...convert.walk import neurons
from ...neuron.observe import Seen, watching
from ..running import Batches, check_steps, preserved, run_all

__all__ = ["LayerCount", "NeuronCount", "Operations", "count_operations"]


@dataclass(frozen=True)
class LayerCount:
    """Operations of the weights of one module.

    Attributes:
        name: The module's name.
        macs: Multiply-accumulates, in the calls whose input was not binary.
        synops: Spikes times the targets that each reached, in the other calls.
        connections: ``synops`` if every input had spiked.
        padded: ``connections`` including those to padding, the number that papers call the layer's FLOPs.
        weights: Number of weights.
    """

    name: str
    macs: int
    synops: int
    connections: int
    padded: int
    weights: int


@dataclass(frozen=True)
class NeuronCount:
    """Steps and spikes of one layer of neurons.

    Attributes:
        name: The module's name.
        kind: ``"QIF"``, ``"LIF"`` or the class of another neuron.
        steps: Neurons times time steps times samples.
        spikes: Number of spikes.
    """

    name: str
    kind: str
    steps: int
    spikes: int


def _total(name: str, doc: str) -> property:
    return property(lambda operations: sum(getattr(layer, name) for layer in operations.layers), doc=doc)


@dataclass(frozen=True)
class Operations:
    """Operations of everything that ran, part by part and in total.

    Attributes:
        layers: The modules with weights, in the order in which they first ran.
        neurons: The layers of neurons that ran, in the model's order.
    """

    layers: tuple[LayerCount, ...]
    neurons: tuple[NeuronCount, ...]

    macs = _total("macs", "Multiply-accumulates.")
    synops = _total("synops", "Synaptic operations.")
    connections = _total("connections", "Synaptic operations if every input had spiked.")
    padded = _total("padded", "Connections including those to padding.")
    weights = _total("weights", "Weights that were used.")

    @property
    def input_macs(self) -> int:
        """Multiply-accumulates of the layer that ran first."""
        return self.layers[0].macs if self.layers else 0

    @property
    def neuron_steps(self) -> int:
        """Neuron updates."""
        return sum(neuron.steps for neuron in self.neurons)

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron-step."""
        return sum(neuron.spikes for neuron in self.neurons) / self.neuron_steps

    @property
    def synaptic_rate(self) -> float:
        """SynOps per connection: the firing rate weighted by the fan-out of the neurons, which decides the energy."""
        return self.synops / self.connections if self.connections else 0.0


def count_operations(model: nn.Module, batches: Batches, steps: int = 1) -> Operations:
    """Run a model on batches, in evaluation mode and without gradient, and count its operations.

    Calls of ``linear``, ``conv1d`` to ``conv3d`` and ``conv_transpose1d`` to ``conv_transpose3d`` are counted wherever
    they occur. A batch that is binary by chance, such as an image of zeros, counts as spikes. Modes, membranes, hooks
    and random numbers are restored.

    Args:
        model: A model with spiking neurons, of either host.
        batches: Batches to run the model on: tensors, or tuples or lists whose first element is the input, such as
            those of a DataLoader; a single batch; or a callable that takes the model and runs it in its own way. The
            callable resets the state itself.
        steps: How often to call the model on each batch, without a reset in between; for models that take one time
            step per call. Default 1.

    Returns:
        The counts, summed over batches and steps.

    Raises:
        ValueError: No spiking neuron, no batch or only empty ones, or values that are not finite in front of a weight.
        TypeError: ``batches`` holds something else, or the model takes more than one input.

    Warns:
        UserWarning: Products of other kinds ran, such as those of attention, which are not counted.
    """
    check_steps(steps)
    inner = unwrapped(model)
    sites = neurons(inner, loaded_hosts())
    if not sites:
        raise ValueError(
            f"{type(inner).__name__} has no spiking neuron of SpikingJelly or snnTorch, so there is nothing to compare"
        )
    names = {module: name or "(model)" for name, module in inner.named_modules()}
    counts = {site.name: [0, 0] for site in sites}

    def see(seen: Seen) -> None:
        counts[seen.name][0] += seen.spikes.numel()
        counts[seen.name][1] += int(seen.spikes.count_nonzero())

    counter = _Counter()
    with preserved(inner), torch.no_grad(), contextlib.ExitStack() as stack:
        inner.eval()
        for module, name in names.items():
            stack.enter_context(_running(module, name, counter.running))
        stack.enter_context(watching({site.name: site.module for site in sites}, see))
        stack.enter_context(counter)
        run_all(inner, batches, steps, "count")
    if not any(steps for steps, _ in counts.values()):
        raise ValueError("no neuron received a value: the batches are empty or do not reach one")
    if counter.uncounted:
        warnings.warn(f"not counted, and it costs energy: {', '.join(counter.uncounted)}", stacklevel=2)
    kinds = {"qif": "QIF", "lif": "LIF"}
    return Operations(
        tuple(counter.layers()),
        tuple(
            NeuronCount(site.name or "(model)", kinds.get(site.neuron.role, type(site.module).__name__), *count)
            for site in sites
            if (count := counts[site.name])[0]
        ),
    )


# -- hooks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(module: nn.Module, name: str, stack: list[str]) -> Iterator[None]:
    """Keep the module's name at the end of ``stack`` while it runs."""
    handles = [
        module.register_forward_pre_hook(lambda *_: stack.append(name)),
        module.register_forward_hook(lambda *_: (stack.pop(), None)[1]),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- operations with weights ------------------------------------------------------------------------------------------

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_WITH_WEIGHTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED)
_UNCOUNTED = {
    torch.matmul: "matmul", Tensor.matmul: "matmul", Tensor.__matmul__: "matmul", torch.mm: "mm", torch.bmm: "bmm",
    Tensor.mm: "mm", Tensor.bmm: "bmm", torch.einsum: "einsum", torch.addmm: "addmm", torch.baddbmm: "baddbmm",
    torch.bilinear: "bilinear", F.scaled_dot_product_attention: "scaled_dot_product_attention",
    F.multi_head_attention_forward: "multi_head_attention_forward",
}  # fmt: skip


class _Counter(TorchFunctionMode):
    """Counter of the calls of functions with weights, by the name of the module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.uncounted: dict[str, None] = {}
        self._counts: dict[str, list[int]] = {}
        self._weights: dict[str, dict[Any, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = self.running[-1] if self.running else "(model)"
        if func in _WITH_WEIGHTS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            x, weight = given.pop("input"), given.pop("weight")
            given.pop("bias", None)
            counts = self._counts.setdefault(name, [0, 0, 0, 0])
            # Other counters of operations must not see these calls.
            with torch.autocast(x.device.type, enabled=False), _disable_current_modes():
                found = _count(lambda x, weight: func(x, weight, None, *args[3:], **given), func, x, weight, out, name)
            self._counts[name] = [count + more for count, more in zip(counts, found, strict=True)]
            # A weight that is computed anew for every call is another tensor each time.
            key = id(weight) if isinstance(weight, nn.Parameter) else tuple(weight.shape)
            self._weights.setdefault(name, {})[key] = weight.numel()
        elif func in _UNCOUNTED:
            self.uncounted[f"{_UNCOUNTED[func]} in {name}"] = None
        return out

    def layers(self) -> Iterator[LayerCount]:
        """Yield the counts of each module, in order of the first call."""
        for name, (macs, synops, connections, padded) in self._counts.items():
            yield LayerCount(name, macs, synops, connections, padded, sum(self._weights[name].values()))


def _count(apply: Any, func: Any, x: Tensor, weight: Tensor, out: Tensor, name: str) -> tuple[int, int, int, int]:
    """Count MACs, SynOps, connections and those with padding of one call."""
    transposed = func in _TRANSPOSED
    padded = (x if transposed else out).numel() * math.prod(weight.shape[1:])
    if not _binary(x):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"layer {name} received a value that is not finite; look for it where the model runs first"
            )
        return padded, 0, 0, 0
    # With weights of 1 each output is the number of spikes that reach it. One output channel per group is enough.
    groups = x.shape[-weight.dim() + 1] // weight.shape[1] if not transposed and func is not F.linear else 1
    channels = weight.shape[1] if transposed else weight.shape[0] // groups
    ones = torch.ones_like(weight[:, :1] if transposed else weight[:groups], dtype=torch.float32)
    spikes = x.float()
    arrive, could = (apply(values, ones).round().sum(dtype=torch.float64) for values in (spikes, 0 * spikes + 1))
    return 0, channels * int(arrive), channels * int(could), padded


def _binary(x: Tensor) -> bool:
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())
