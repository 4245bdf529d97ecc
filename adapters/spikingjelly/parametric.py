"""QIF nodes that learn their map: a, u1 and u2, kept in the region where the neuron works, or the leak that it matches.

The bijection onto that region is :mod:`qif_plugins.neuron.reparametrization`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qif_plugins.neuron.names import MAP, WindowName
from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.reparametrization import constrained, unconstrained
from qif_plugins.neuron.surrogate import Gaussian, Surrogate, Window

from .arguments import checked_assignment, learns
from .node import RESOLVED, QIFNeuron


class LearnedMap(QIFNeuron):
    """A node whose map is computed from parameters of the module. Mixed in before a version's QIFNode.

    ``_params`` holds the numbers that are not learned. Named windows but "heuristic" follow the parameters.
    """

    raw_names: ClassVar[tuple[str, ...]]
    """The parameters of the module."""
    unassigned: ClassVar[str]
    """Why others may not."""

    def _learned_params(self) -> QIFParameters:
        """The neuron for the parameters as they are now, with gradient."""
        raise NotImplementedError

    def _replace(self, **changes: Any) -> None:
        """Assign numbers that are not learned."""
        raise NotImplementedError

    # -- parameters ------------------------------------------------------------------------------

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; tensors with gradient."""
        # By hasattr, since a parametrization, or a tensor in its place, removes a parameter from _parameters; and the
        # host's constructor runs before there are any.
        return self._learned_params() if all(hasattr(self, name) for name in self.raw_names) else self._params

    def _assign(self, name: str, value: Any, store: Callable[[Any], None]) -> None:
        """Take over a number that is not learned."""
        value = checked_assignment(name, value, type(self).__name__)
        if name not in ("v_threshold", "v_reset", "input_gain"):
            error = AttributeError if name in RESOLVED else ValueError  # the first for a read-only property
            raise error(
                f"{name} of a {type(self).__name__} cannot be assigned: {self.unassigned}. Construct another, or take "
                "QIFNode"
            )
        if isinstance(value, Tensor) and (learns(value) or value.numel() > 1):
            raise ValueError(
                f"{type(self).__name__} learns beside one fixed {name}, a number; QIFNode learns its threshold and "
                "takes one a neuron"
            )
        if value is None and name != "v_reset":
            raise ValueError(f"{name} of a {type(self).__name__} must be a number, got None")
        changes: dict[str, Any] = {"reset": "soft"} if value is None else {name: float(value)}
        if name == "v_reset" and value is not None:
            changes["reset"] = "hard"
        if any(getattr(self._params, key) != new for key, new in changes.items()):
            self._replace(**changes)
            self._link = None
        if name not in RESOLVED:  # input_gain is read as part of params
            store(value)

    # -- window ----------------------------------------------------------------------------------

    @property
    def learns_window(self) -> bool:
        return self.derived_window not in (None, "heuristic")

    @property
    def moments(self) -> Tensor:
        """Mean and deviation of the membrane behind the window, ``[2]`` or ``[2, channels]``, for the parameters as
        they are now.
        """
        return torch.stack(torch.broadcast_tensors(*self.followed_moments(self.params))).float()

    def _learned(self) -> Sequence[Any]:
        return [getattr(self, name) for name in self.raw_names]

    def _new_window(self, window: WindowName | Window) -> Window | Gaussian:
        if not isinstance(window, str) or window == "heuristic":
            return super()._new_window(window)
        self.window_moments()  # raises where the closure does not converge, which training only falls back for
        return self.followed_window(window, self.params)

    def _refresh_window(self) -> None:
        """Show the window of the current parameters in ``surrogate_function``."""
        self._window_memory.clear()
        if self.learns_window:
            self._followed()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        self._refresh_window()  # its numbers move to the module's device with it
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "moments", None)  # of versions whose window depended on how often forward had run
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._link = None
        self._refresh_window()


class ParametricQIFNeuron(LearnedMap):
    """A node that learns a, u1 and u2.

    Attributes:
        raw_a: The unconstrained parameter behind a, one value or ``[channels]``.
        raw_u1: The same behind u1.
        raw_u2: The same behind u2.
    """

    raw_a: nn.Parameter
    raw_u1: nn.Parameter
    raw_u2: nn.Parameter
    raw_names = ("raw_a", "raw_u1", "raw_u2")
    unassigned = "it learns a, u1 and u2, which no argument decides any more"
    channels: int | None

    def _check_learnable(self, params: QIFParameters) -> None:
        if not params.rebound:
            raise ValueError(
                f"{type(self).__name__} learns a, u1 and u2 of a parabola, and dynamics='monotone' is a map of another "
                "form: leave dynamics out, or take QIFNode"
            )
        unconstrained(params)

    def _learn(self, channels: int | None) -> None:
        """Create the parameters at the numbers given to the constructor."""
        if channels is not None and not (isinstance(channels, int) and channels > 0):
            raise ValueError(f"channels must be a positive whole number or None, got {channels!r}")
        self.channels = channels
        for name, value in unconstrained(self._params).items():
            raw = torch.full(() if channels is None else (channels,), value.item())  # in the default dtype
            self.register_parameter(name, nn.Parameter(raw))
        self._refresh_window()

    @property
    def dynamics(self) -> str:
        """``"learned"``."""
        return "learned"

    def _learned_params(self) -> QIFParameters:
        # In float32, in float64 in a float64 module.
        dtype = torch.promote_types(self.raw_a.dtype, torch.float32)
        r, w1, w2 = (raw.to(dtype) for raw in (self.raw_a, self.raw_u1, self.raw_u2))
        return self._params.with_numbers(**dict(zip(MAP, constrained(r, w1, w2, self._params), strict=True)))

    def __setattr__(self, name: str, value: Any) -> None:
        # What ParametricLIFNode's users may look for.
        if name in ("w", "init_tau") and name not in self.__dict__.get("_parameters", ()):
            raise ValueError(
                f"{type(self).__name__} has no {name}: it learns {', '.join(MAP)}, in raw_a, raw_u1 and raw_u2. "
                "Construct one with another init_tau, or let swap() convert a ParametricLIFNode, which keeps its w"
            )
        super().__setattr__(name, value)

    def _replace(self, **changes: Any) -> None:
        """Assign numbers that are not learned; a, u1 and u2 keep their values."""
        now = self._learned_params()
        learned = {name: getattr(now, name).detach().double() for name in MAP}
        params = dataclasses.replace(self._params, **learned, **changes)
        raw = unconstrained(params)
        if self.learns_window:
            self.window_moments(params)
        with torch.no_grad():
            for name, value in raw.items():
                getattr(self, name).copy_(value)
        self._params = dataclasses.replace(self._params, **changes)
        self._refresh_window()

    def input_moments(self, params: QIFParameters | None = None) -> tuple[Number, Number]:
        mean, std = super().input_moments(params)
        if self.channels is None:
            return mean, std
        return tuple(value.flatten() if isinstance(value, Tensor) else value for value in (mean, std))  # type: ignore[return-value]

    def _neuron(self, x: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        params, surrogate = super()._neuron(x, single)
        if self.channels is None:
            return params, surrogate
        step = x.shape if single else x.shape[1:]
        if self.channels not in step[:2][-1:]:
            raise ValueError(
                f"channels={self.channels}, and one time step of the input, [N, channels, *], has shape {list(step)}"
            )
        # [C] against one step [N, C, *]: one dimension of size 1 for each after the channels.
        shape = (self.channels, *[1] * max(x.dim() + single - 3, 0))
        params = params.with_numbers(**{name: getattr(params, name).view(shape) for name in MAP})
        if isinstance(surrogate, Window | Gaussian):
            surrogate = surrogate.mapped(lambda value: value.view(shape) if value.dim() else value)
        return params, surrogate
