"""Find the QIF and spiking layers of a model, and measure input, membranes and spikes while they run."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..neuron.module import QIFLayer
from ..neuron.observe import Observation, Seen, watching
from ..support.text import plus_minus
from .running import preserved
from .statistics import Moments, effective_input

__all__ = ["LayerStatistics", "MeasuredLayer", "measured", "qif_layers", "spiking_layers"]

_BASES = (
    ("spikingjelly.activation_based.base", "MemoryModule"),
    ("spikingjelly.clock_driven.base", "MemoryModule"),
    ("snntorch._neurons", "SpikingNeuron"),
)
_EXACT = "qif_plugins.exact.layers", "SpikingLayer"


def qif_layers(model: nn.Module) -> dict[str, QIFLayer]:
    """Find the QIF layers of a model, by name; a shared layer is listed once.

    Raises:
        ValueError: The model has no QIF layer.
    """
    layers = {
        name or "(model)": module
        for name, module in model.named_modules()
        if isinstance(module, QIFLayer) and module.resets
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no QIF layer. Build it with QIFNode or QIF in LIF's place, or "
            "replace its LIF neurons with qif_plugins.swap(model)."
        )
    return layers


def spiking_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the spiking layers of a model, by name, in its order: QIF layers, either host's neurons, and exact layers.

    A host's module counts as a spiking neuron if it has a threshold. A neuron that a user wrote is found if it derives
    from the host's base class.

    Args:
        model: Any module. A model that is itself a spiking layer has the name ``"(model)"``.
    """
    bases = (QIFLayer, *_loaded(_BASES))
    exact = _loaded((_EXACT,))
    return {
        name or "(model)": module
        for name, module in model.named_modules()
        if isinstance(module, exact)
        or (isinstance(module, bases) and (hasattr(module, "v_threshold") or hasattr(module, "threshold")))
    }


def _loaded(classes: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
    """Look up the classes whose modules were imported; a model cannot have others."""
    found = (getattr(sys.modules.get(path), name, None) for path, name in classes)
    return tuple(kind for kind in found if kind is not None)


@dataclass(frozen=True, kw_only=True)
class MeasuredLayer:
    """Measurements of one layer; NaN if it did not run.

    Attributes:
        name: The module's name in the model.
        input_mean: Mean of g·x.
        input_std: Standard deviation of g·x.
        membrane_mean: Measured mean of the membrane before its reset.
        membrane_std: Its measured standard deviation.
        predicted_mean: Mean of the membrane by the closure; NaN if the closure does not converge.
        predicted_std: Standard deviation of the membrane by the closure; NaN if the closure does not converge.
        rate: Spikes per neuron-step.
    """

    name: str
    input_mean: float = math.nan
    input_std: float = math.nan
    membrane_mean: float = math.nan
    membrane_std: float = math.nan
    predicted_mean: float = math.nan
    predicted_std: float = math.nan
    rate: float = math.nan

    @property
    def input(self) -> str:
        """Mean ± deviation of the input, as text."""
        return plus_minus(self.input_mean, self.input_std)

    @property
    def membrane(self) -> str:
        """Mean ± deviation of the measured membrane, as text."""
        return plus_minus(self.membrane_mean, self.membrane_std)

    @property
    def predicted(self) -> str:
        """Mean ± deviation of the predicted membrane, as text; a dash without a prediction."""
        return "–" if math.isnan(self.predicted_mean) else plus_minus(self.predicted_mean, self.predicted_std)


def by_kind(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Combine the sentences on the layers: a problem of several layers is described for the first of them only.

    Args:
        notes: Pairs of a layer's name and a sentence. The words before the first colon name the problem.

    Returns:
        For each problem a line on the first layer that has it, and a line that names the other layers, if any.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, sentence in notes:
        kinds.setdefault(sentence.partition(":")[0], []).append((name, sentence))
    lines = []
    for (name, sentence), *others in kinds.values():
        lines.append(f"{name}: {sentence}")
        if others:
            names = ", ".join(other for other, _ in others)
            first = f" Cure {name} first: its output decides their input." if ":" in sentence else ""
            lines.append(f"    The same is true of {names}.{first}")
    return lines


class LayerStatistics:
    """Input g·x, membranes before their reset, and spikes of one QIF layer, over all neurons and time steps.

    Attributes:
        input: Moments of g·x, one group.
        membrane: Moments of the membrane before its reset, one group.
        spikes: Number of spikes.
        steps: Number of time steps, of all calls together.
    """

    def __init__(self) -> None:
        self.input, self.membrane = Moments(), Moments()
        self.spikes = self.steps = 0

    def add(self, seen: Observation) -> None:
        """Add a call of the operator."""
        x_seq = effective_input(seen.params, seen.x_seq.detach())
        self.steps += len(x_seq)
        self.spikes += int((seen.spike_seq != 0).sum().item())
        for x, h in zip(x_seq, seen.h_seq.detach(), strict=True):
            self.add_step(x, h)

    def add_step(self, x: Tensor, h: Tensor) -> None:
        """Add the input and the membranes of a time step."""
        self.input.update(x.reshape(-1, 1))
        self.membrane.update(h.reshape(-1, 1))

    def moments(self) -> dict[str, Any]:
        """Return the attributes of :class:`MeasuredLayer` that were measured, by name."""
        return {
            "input_mean": self.input.mean.item(), "input_std": self.input.std.item(),
            "membrane_mean": self.membrane.mean.item(), "membrane_std": self.membrane.std.item(),
            "rate": self.spikes / self.input.n,
        }  # fmt: skip


@contextlib.contextmanager
def measured(
    model: nn.Module, layers: Mapping[str, QIFLayer], statistics: Mapping[str, LayerStatistics]
) -> Iterator[None]:
    """Measure QIF layers whenever they run inside the block. The model is unchanged afterwards.

    Args:
        model: The model, see :func:`~.running.preserved`.
        layers: Its QIF layers by name.
        statistics: Objects that receive the measurements of the layers, by the same names.
    """

    def see(seen: Seen) -> None:
        for observation in seen.runs:
            statistics[seen.name].add(observation)

    with preserved(model), watching(layers, see, membranes=True):
        yield
