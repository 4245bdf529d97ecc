"""Parts that the models share: neurons by class or name, norms by name, initialization and the check of the input.

As in SpikingJelly's model zoo, every constructor takes ``spiking_neuron`` and hands its remaining keyword arguments,
deeply copied, to each neuron that it makes.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..neuron.norm import TDBatchNorm1d, TDBatchNorm2d
from ..support.names import check_known

try:
    from spikingjelly.activation_based import base, functional, layer, neuron
except ImportError as error:
    raise ImportError(
        "qif_plugins.models is built on SpikingJelly's layers: pip install 'qif-plugins[spikingjelly]'"
    ) from error

__all__ = ["NEURONS", "NORMS", "Neurons", "QIFNode", "SpikingModel", "conv", "layer", "norm1d", "norm2d"]

_adapter: Any = importlib.import_module("qif_plugins.adapters.spikingjelly")
QIFNode = _adapter.QIFNode

NEURONS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "qif": (QIFNode, {}),
    "parametric_qif": (_adapter.ParametricQIFNode, {}),
    "lif": (neuron.LIFNode, {"tau": 2.0, "decay_input": False}),
    "parametric_lif": (neuron.ParametricLIFNode, {"init_tau": 2.0, "decay_input": False}),
    "if": (neuron.IFNode, {}),
}
"""Neurons by name, with default arguments that the caller may override.

LIF is that of the TET code, with a leak of 1/2 and an input that is not decayed: tdBN scales the input to the
threshold, and SpikingJelly's default would halve it again.
"""

NORMS = ("tdbn", "batch", None)
"""Names of norms. ``"tdbn"`` scales to a deviation of α θ at first and ``"batch"`` to 1, both with statistics over
time, batch and space; ``None`` makes no norm, and convolutions then have biases."""


class Neurons:
    """Factory of the neurons of one model.

    Args:
        spiking_neuron: A SpikingJelly neuron's class, anything that makes one from keywords, or a name in
            :data:`NEURONS`.
        kwargs: Keyword arguments of the neuron. ``per_channel=True`` is not passed on; it gives each neuron
            ``channels``, the width of its layer, so that ``ParametricQIFNode`` learns per channel. Default False.

    Attributes:
        v_threshold: The neurons' threshold θ, for tdBN.

    Raises:
        ValueError: Unknown name, arguments that the neuron refuses, or a neuron that is not a SpikingJelly module.
    """

    def __init__(self, spiking_neuron: Callable[..., nn.Module] | str, kwargs: dict[str, Any]) -> None:
        self.kwargs = dict(kwargs)
        self.per_channel = self.kwargs.pop("per_channel", False)
        if isinstance(spiking_neuron, str):
            check_known("neuron", NEURONS, spiking_neuron)
            self.constructor, defaults = NEURONS[spiking_neuron]
            self.kwargs = defaults | self.kwargs
        else:
            self.constructor = spiking_neuron
        trial: Any = self(1)
        if not isinstance(trial, base.StepModule):
            raise ValueError(f"spiking_neuron must make a SpikingJelly neuron, got a {type(trial).__name__}")
        self.v_threshold = float(getattr(trial, "v_threshold", 1.0))

    def __call__(self, channels: int) -> nn.Module:
        """Make the neurons of a layer of ``channels`` channels."""
        kwargs = deepcopy(self.kwargs)
        if self.per_channel:
            kwargs["channels"] = channels
        try:
            inspect.signature(self.constructor).bind(**kwargs)
        except TypeError as error:
            name = getattr(self.constructor, "__name__", repr(self.constructor))
            raise ValueError(
                f"{name} {error}; what the model itself does not name is passed on to the neuron, "
                f"here {', '.join(kwargs) or 'nothing'}"
            ) from error
        return self.constructor(**kwargs)


class SpikingModel(nn.Module, base.StepModule):
    """Base class of the models of sequences ``[T, N, *]``, time first.

    After SpikingJelly's ``set_step_mode(model, "s")`` a model takes single steps ``[N, *]``.

    Attributes:
        in_channels: Channels C of the input.
        step_mode: ``"m"`` unless changed; SpikingJelly's ``functional.set_step_mode`` changes it throughout.
    """

    in_channels: int

    def __init__(self) -> None:
        super().__init__()
        self._step_mode = "m"

    def _finish(self) -> None:
        """Put every layer into multi-step mode and draw the convolutions' weights."""
        functional.set_step_mode(self, "m")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _check(self, x_seq: Tensor) -> None:
        """Raise ``ValueError`` unless the input is ``[T, N, C, H, W]``, or ``[N, C, H, W]`` in single-step mode."""
        lead = "T, N" if self.step_mode == "m" else "N"
        rank = 5 if self.step_mode == "m" else 4
        if x_seq.dim() != rank or x_seq.shape[-3] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} in step mode {self.step_mode!r} takes [{lead}, {self.in_channels}, H, W], got "
                f"{list(x_seq.shape)}; repeat a static image over time with x.expand(T, *x.shape)"
            )


def conv(channels: int, width: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> nn.Module:
    """Make a convolution padded by half its kernel."""
    return layer.Conv2d(channels, width, kernel, stride, kernel // 2, bias=bias)


def norm2d(
    name: str | None, channels: int, v_threshold: float, alpha: float = 1.0,
    kind: type[TDBatchNorm1d] | type[TDBatchNorm2d] = TDBatchNorm2d,
) -> nn.Module:  # fmt: skip
    """Make the norm ``name`` of :data:`NORMS` for ``[T, N, channels, H, W]``; ``alpha`` is tdBN's.

    Raises:
        ValueError: Unknown name.
    """
    check_known("norm", NORMS, name)
    if name is None:
        return nn.Identity()
    # Batch norm over a sequence is tdBN at a scale of 1.
    return kind(channels, v_threshold, alpha) if name == "tdbn" else kind(channels)


norm1d = partial(norm2d, kind=TDBatchNorm1d)
"""The same for ``[T, N, features]``."""
