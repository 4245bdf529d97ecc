"""What a host tells :func:`~qif_plugins.swap` about its neurons, and which hosts there are."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..neuron.surrogate import Window

if TYPE_CHECKING:
    from .rates import Dynamics

__all__ = [
    "HOSTS", "NO_LEAK_BETA", "Host", "Neuron", "Plan", "Request", "Snapshot", "check_arguments", "loaded_hosts",
    "never_fires", "no_leak",
]  # fmt: skip

HOSTS = {
    "spikingjelly": "qif_plugins.convert.spikingjelly",
    "snntorch": "qif_plugins.convert.snntorch",
}
"""Host package -> the adapter module that has its :class:`Host` as ``HOST``."""

NO_LEAK_BETA = 0.95
"""Leak that a neuron without one is matched at: a QIF map needs a resting point, which a leak of 1 does not give."""

SWAP_OPTIONS = ("dynamics", "window", "norm", "readout", "to", "example_input")
"""What :func:`~qif_plugins.swap` takes itself, before the arguments that it passes on."""


class Choice(NamedTuple):
    """What is chosen for a neuron where the user leaves it open. The leak is matched in any case.

    Attributes:
        unit_gain: Whether the input gain is 1, instead of the LIF neuron's.
        window: A window's name, or ``"keep"`` for the LIF neuron's surrogate.
    """

    unit_gain: bool
    window: str


CHOICE = {True: Choice(unit_gain=True, window="isometric"), False: Choice(unit_gain=False, window="keep")}
"""By whether a normalization feeds the neuron. The numbers behind it are in docs/mathematics.md, "Defaults"."""


@dataclass(frozen=True)
class Request:
    """What the user asked of the neurons.

    Attributes:
        dynamics: ``"auto"``, ``"paper"`` or ``"lif"``.
        window: A window's name, a Window, ``"keep"`` for the surrogate that the LIF neuron has, or ``"auto"``.
        parameters: Arguments of the QIF neurons, over everything else.
    """

    dynamics: str = "auto"
    window: str | Window = "auto"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chooses_map(self) -> bool:
        """Whether the dynamics are left open."""
        return self.dynamics == "auto" and not self.parameters.keys() & {"a", "u1", "u2"}

    @property
    def map(self) -> str:
        """``"paper"``, ``"lif"``, or ``"explicit"`` where a, u1 or u2 decide."""
        if self.parameters.keys() & {"a", "u1", "u2"}:
            return "explicit"
        return "lif" if self.dynamics == "auto" else self.dynamics

    def unit_gain(self, normalized: bool, gain_arguments: frozenset[str]) -> bool:
        """Whether the input gain becomes 1.

        Args:
            normalized: Whether a normalization feeds the neuron.
            gain_arguments: The host's arguments that give a gain; one that was passed decides.
        """
        return self.chooses_map and CHOICE[normalized].unit_gain and not self.parameters.keys() & gain_arguments

    def surrogate(self, normalized: bool) -> str | Window:
        """The window, its name, or ``"keep"``.

        Args:
            normalized: Whether a normalization feeds the neuron.
        """
        return CHOICE[normalized].window if self.window == "auto" else self.window


@dataclass(frozen=True)
class Plan:
    """How one neuron becomes a QIF neuron, or the other way round.

    Attributes:
        cls: The class that it gets.
        arguments: The constructor's keyword arguments.
        dynamics: What came of the request.
        notes: What is not as it was, for the report.
        attributes: Attributes to set besides.
        own: Names of parameters and buffers that are not taken over from the LIF neuron.
        idle: Names of parameters that the neuron keeps for the state_dict's sake and does not use.
    """

    cls: type[nn.Module]
    arguments: dict[str, Any]
    dynamics: str
    notes: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()


class Neuron(NamedTuple):
    """What a host says of a module that is a neuron.

    Attributes:
        role: ``"lif"`` for one of the LIF family, ``"qif"`` for one of ours, ``"other"`` for the rest.
        reason: Why one of the rest, or a LIF neuron, is left alone.
    """

    role: Literal["lif", "qif", "other"]
    reason: str = ""


class Snapshot(NamedTuple):
    """The plain attributes of a neuron.

    Attributes:
        at_rest: All of them, with the membrane and whatever else is left from a forward pass cleared.
        extra: Those that the host's constructor does not set, hence the user's.
    """

    at_rest: dict[str, Any]
    extra: dict[str, Any]


class Host(Protocol):
    """One host framework."""

    def neuron(self, module: nn.Module) -> Neuron | None:
        """What ``module`` is; ``None`` for a module that is no neuron."""

    def plan(self, module: nn.Module, request: Request, normalized: bool) -> Plan:
        """How the LIF neuron ``module`` becomes a QIF neuron.

        Raises:
            ValueError: It cannot, for the reason given.
            TypeError: ``request.parameters`` has a name that the QIF neuron does not take.
        """

    def back(self, module: nn.Module) -> Plan:
        """How a neuron that was built as QIF becomes the LIF neuron whose leak it matches.

        Raises:
            ValueError: It matches none, or is not told apart from QIF by its constructor alone.
        """

    def snapshot(self, module: nn.Module) -> Snapshot:
        """The plain attributes of a LIF neuron, or of one that was built as QIF."""

    def construct(self, module: nn.Module, plan: Plan) -> None:
        """Run the constructor of ``plan`` on ``module``, which has no attributes, and set its class."""

    def assign(self, module: nn.Module, changes: Mapping[str, Any]) -> None:
        """Set on a LIF neuron what was set on the QIF neuron in its place, as far as it takes that."""

    def settle(self, module: nn.Module) -> None:
        """What has to follow once parameters, buffers and children are in place."""

    def apart(self) -> AbstractContextManager[Any]:
        """Neurons made inside are not entered in the host's books."""

    def threshold(self, module: nn.Module) -> float | None:
        """The threshold of a neuron; ``None`` where it is not one number."""

    def dynamics(self, module: nn.Module) -> Dynamics:
        """What decides the firing rate of a LIF neuron, or of one of ours; recurrent input aside."""

    def takes_sequences(self, module: nn.Module) -> bool:
        """Whether one call of the neuron is all time steps."""

    def tdbn(self, norm: nn.Module) -> type[nn.Module] | None:
        """The host's tdBN class for a batch norm of its own; ``None`` where the norm is not the host's.

        Raises:
            ValueError: It cannot become one, for the reason given.
        """


def check_arguments(cls: type[Any], given: Iterable[str], accepted: Iterable[str]) -> None:
    """Refuse what the QIF class does not take, with what comes nearest.

    Raises:
        TypeError: A name in ``given`` is not in ``accepted``.
    """
    accepted = sorted(accepted)
    unknown = sorted(set(given) - set(accepted))
    if not unknown:
        return
    near = [name for word in unknown for name in difflib.get_close_matches(word, [*SWAP_OPTIONS, *accepted], 1)]
    guess = f"; did you mean {', '.join(near)}?" if near else "."
    raise TypeError(
        f"{cls.__name__} has no argument {', '.join(unknown)} to pass on{guess} swap takes {', '.join(SWAP_OPTIONS)}, "
        f"and passes on {', '.join(accepted)}"
    )


def no_leak(dynamics: str) -> str:
    """Why a neuron of these dynamics, of a name that its ``dynamics`` has, has no LIF neuron to go back to."""
    chosen = "has the paper's parameters" if dynamics == "paper" else "has an a, u1, u2 of its own"
    return f"it {chosen}, which match no leak; train one that was built with a leak, or with dynamics='lif'"


def never_fires(threshold: Any) -> str:
    """Why a LIF neuron with this threshold stays one, if so: what is infinite in float32 no membrane reaches."""
    values = threshold.detach() if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)
    if values.is_meta or bool(values.to(torch.float32).isfinite().all()):
        return ""
    return "its threshold is not finite, as that of a neuron that only integrates: no QIF neuron does that"


def loaded_hosts() -> list[Host]:
    """The hosts that were imported; a model cannot have neurons of another."""
    return [importlib.import_module(module).HOST for name, module in HOSTS.items() if name in sys.modules]
