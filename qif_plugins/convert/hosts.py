"""The interface through which :func:`~qif_plugins.swap` handles the neurons of a host, and the hosts that there are."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..neuron.arguments import map_resting_at
from ..neuron.surrogate import Window
from .area import REACH
from .report import SWAP, Terms

if TYPE_CHECKING:
    from .rates import Dynamics

HOSTS = {
    "spikingjelly": "qif_plugins.convert.spikingjelly",
    "snntorch": "qif_plugins.convert.snntorch",
}
"""Host package -> the module that has its :class:`Host` as ``HOST``."""

LOADED_GAIN = "_qif_run_gain"
"""Attribute of a LIF neuron that loaded a QIF neuron's checkpoint under ``qif run``: what decides its input gain."""

NO_LEAK_BETA = 0.95
"""Leak that is matched for a neuron without leak, since a QIF map needs a resting point."""

LEAST_AREA, LARGE_AREA = 0.5, 2.0
"""Areas under a surrogate: below the first it is replaced, above the second the report names the area. The spike's true
derivative has an area of 1."""
LONG_MEMORY = 0.8
"""Smallest leak with which LIF's surrogate is kept under a norm, too, unless there are many neurons in a row."""
SHALLOW, EACH_MORE, LARGEST_GAIN = 12, 0.1, 3.0
"""Gain under a norm: the number of neurons in a row up to which it is 1, its growth with each further neuron, and its
limit. The measurement is in docs/does-not-learn.md, "More than twelve layers in a row"."""

SWAP_OPTIONS = ("dynamics", "window", "norm", "readout", "to", "example_input")
"""Arguments of :func:`~qif_plugins.swap` itself; it passes all others on to the QIF neurons."""


class Choice(NamedTuple):
    """Choices for a neuron that the user leaves open. The leak is matched in any case.

    Attributes:
        unit_gain: Whether the input gain is 1 (more in a deep network) instead of the LIF neuron's.
        window: A window's name, or ``"keep"`` for the LIF neuron's surrogate.
    """

    unit_gain: bool
    window: str


CHOICE = {True: Choice(unit_gain=True, window="isometric"), False: Choice(unit_gain=False, window="keep")}
"""Choices for a neuron that a normalization feeds (True), and for one without (False). The measurements behind them are
in docs/mathematics.md, "Defaults"."""


@dataclass(frozen=True)
class Request:
    """Choices of the user for the neurons.

    Attributes:
        dynamics: ``"auto"`` or one of :data:`~qif_plugins.neuron.names.DYNAMICS`.
        window: A window's name, a Window, ``"keep"`` for the surrogate that the LIF neuron has, or ``"auto"``.
        parameters: Arguments of the QIF neurons, which take precedence over everything else.
        depth: Largest number of neurons in a row, see :attr:`~qif_plugins.convert.walk.Site.depth`.
        reach: Factor on the gain that brings a norm's output to a larger threshold. Default 1.
        beside_norms: Whether a norm feeds any neuron of the model.
        terms: The user's names of these choices.
    """

    dynamics: str = "auto"
    window: str | Window = "auto"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    depth: int = 0
    reach: float = 1.0
    beside_norms: bool = False
    terms: Terms = SWAP

    def loaded_gain(self, module: nn.Module, gain_arguments: frozenset[str], notes: list[str]) -> Mapping[str, Any]:
        """Return the arguments of the input gain that a LIF neuron's checkpoint was trained with, empty if unknown.

        Args:
            module: The neuron.
            gain_arguments: As in :meth:`gain`.
            notes: Receives the note.
        """
        loaded: Mapping[str, Any] = vars(module).get(LOADED_GAIN, {}) if self.leaves_gain_open(gain_arguments) else {}
        notes += ["the input gain of its checkpoint"] if loaded else []
        return loaded

    @property
    def chooses_map(self) -> bool:
        """Whether the dynamics are left open."""
        return self.dynamics == "auto" and not self.parameters.keys() & {"a", "u1", "u2"}

    def passes(self, names: frozenset[str]) -> bool:
        """Return whether the user passed any of these arguments of the QIF neurons."""
        return not names.isdisjoint(self.parameters)

    def leaves_gain_open(self, gain_arguments: frozenset[str]) -> bool:
        """Return whether neither the dynamics nor an argument that was passed decides the input gain."""
        return self.chooses_map and not self.passes(gain_arguments)

    def map(self, v_rest: Any = 0.0) -> str:
        """Name the dynamics, ``"explicit"`` if a, u1 or u2 were passed.

        Args:
            v_rest: The potential that the LIF neuron leaks to; ``None`` for 0.
        """
        if self.parameters.keys() & {"a", "u1", "u2"}:
            return "explicit"
        return map_resting_at(v_rest) if self.dynamics == "auto" else self.dynamics

    def gain(self, normalized: bool, gain_arguments: frozenset[str]) -> float | None:
        """Choose the input gain; ``None`` leaves it to the host's arguments.

        Under a norm it is 1. It is larger in a network of more than 12 neurons in a row: each layer of spikes passes on
        less of its input than it got, and a layer that spikes more often loses less. It is also larger if the
        threshold is above the norm's output, see :attr:`reach`. Without a norm it is 1 if a norm feeds another neuron
        of the model, since LIF's 1/τ would make that neuron's spikes small.

        Args:
            normalized: Whether a normalization feeds the neuron.
            gain_arguments: The host's arguments that determine a gain. If the user passed one, it decides.
        """
        if not self.leaves_gain_open(gain_arguments):
            return None
        if CHOICE[normalized].unit_gain:
            return gain_in_a_row(self.depth) * self.reach
        return 1.0 if self.beside_norms else None

    def surrogate(
        self,
        normalized: bool,
        leak: float,
        own: Mapping[str, Any],
        own_area: Callable[[], float],
        name: str,
        notes: list[str],
    ) -> dict[str, Any]:
        """Choose the QIF neuron's argument for its surrogate, and note the choice.

        Args:
            normalized: Whether a normalization feeds the neuron.
            leak: Share β of its membrane that the QIF neuron will keep in a step.
            own: The argument that keeps the LIF neuron's surrogate.
            own_area: Returns the area under that surrogate, see :func:`~qif_plugins.convert.area.area`.
            name: That surrogate's name.
            notes: List to which the note is added.
        """
        if self.window == "keep":
            notes.append(f"its surrogate {name} stays")
            return dict(own)
        window = self.window
        if window == "auto":
            remembers = LONG_MEMORY <= leak < 1 and self.depth <= SHALLOW
            window = "keep" if remembers else CHOICE[normalized].window
        if window != "keep":
            notes.append(f"surrogate {name} to the {window if isinstance(window, str) else 'given'} window")
            return {"window": window}
        share = own_area()
        if share >= LEAST_AREA:
            large = f", whose area is {share:.2g} within {REACH:g} thresholds" if share > LARGE_AREA else ""
            notes.append(f"its surrogate {name} stays{large}")
            return dict(own)
        notes.append(
            f"surrogate {name} to the isometric window, as it would pass on only {share:.2g} of the gradient; "
            f"{self.terms.choose('window', 'keep')} keeps it"
        )
        return {"window": "isometric"}


@dataclass(frozen=True)
class Plan:
    """Instructions to turn one LIF neuron into a QIF neuron, or the other way round.

    Attributes:
        cls: The class that it gets.
        arguments: The constructor's keyword arguments.
        dynamics: Name of the map that it gets: one of :data:`~qif_plugins.neuron.names.DYNAMICS`, or ``"explicit"``.
        notes: Changes that the report mentions.
        attributes: Further attributes to set.
        own: Names of parameters and buffers that are not taken over from the LIF neuron.
        idle: Names of parameters that the neuron keeps only so that the state_dict keeps its keys.
        gain: The input gain of :meth:`Request.gain`.
    """

    cls: type[nn.Module]
    arguments: dict[str, Any]
    dynamics: str
    notes: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    gain: float | None = None


class Neuron(NamedTuple):
    """Kind of a neuron.

    Attributes:
        role: ``"lif"`` for the LIF family, ``"qif"`` for the neurons of this package, ``"other"`` for all others.
        reason: The reason to leave it alone; empty if there is none.
    """

    role: Literal["lif", "qif", "other"]
    reason: str = ""


class Snapshot(NamedTuple):
    """The plain attributes of a neuron.

    Attributes:
        at_rest: All of them, without the membrane and other results of a forward pass.
        extra: Those that the user set, recognised by the fact that the host's constructor does not set them.
    """

    at_rest: dict[str, Any]
    extra: dict[str, Any]


class Host(Protocol):
    """One host framework."""

    def neuron(self, module: nn.Module) -> Neuron | None:
        """Classify a module; ``None`` for one that is no neuron."""

    def plan(self, module: nn.Module, request: Request, normalized: bool) -> Plan:
        """Plan how the LIF neuron ``module`` becomes a QIF neuron.

        Raises:
            ValueError: It cannot become one; the message says why.
            TypeError: ``request.parameters`` has a name that the QIF neuron does not take.
        """

    def back(self, module: nn.Module) -> Plan:
        """Plan how a neuron that was built as QIF becomes the LIF neuron whose leak it matches.

        Raises:
            ValueError: It matches no leak, or its class defines methods of its own.
        """

    def snapshot(self, module: nn.Module) -> Snapshot:
        """Copy the plain attributes of a LIF neuron, or of one that was built as QIF."""

    def construct(self, module: nn.Module, plan: Plan) -> None:
        """Run the constructor of ``plan`` on ``module``, which has no attributes, and set its class."""

    def assign(self, module: nn.Module, changes: Mapping[str, Any]) -> None:
        """Set on a LIF neuron the attributes that were set on the QIF neuron in its place, if it has them."""

    def update_derived(self, module: nn.Module) -> None:
        """Update what a rebuilt neuron derives from its parameters, buffers and children, once these are in place."""

    def unlisted(self) -> AbstractContextManager[Any]:
        """Keep neurons that are made inside out of the host's own lists of neurons."""

    def threshold(self, module: nn.Module) -> float | None:
        """Return the threshold of a neuron; ``None`` if it is not one number."""

    def dynamics(self, module: nn.Module) -> Dynamics:
        """Describe the dynamics of a LIF or QIF neuron without recurrent input, to compute its firing rate."""

    def takes_sequences(self, module: nn.Module) -> bool:
        """Return whether one call of the neuron runs all time steps."""

    def tdbn(self, norm: nn.Module) -> type[nn.Module] | None:
        """Return the host's tdBN class for a batch norm of its own; ``None`` if the norm is not the host's.

        Raises:
            ValueError: It cannot become tdBN; the message says why.
        """


def gain_in_a_row(depth: int) -> float:
    """Return the input gain under a norm for a network of ``depth`` neurons in a row."""
    return min(max(1 + EACH_MORE * (depth - SHALLOW), 1.0), LARGEST_GAIN)


def check_arguments(cls: type[Any], given: Iterable[str], accepted: Iterable[str]) -> None:
    """Refuse arguments that the QIF class does not take, and suggest similar ones.

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
    """Explain why a QIF neuron of these ``dynamics`` has no LIF neuron to go back to."""
    chosen = "has the paper's parameters" if dynamics == "paper" else "has its own a, u1, u2"
    return f"it {chosen}, which match no leak; train one that was built with a leak, or with dynamics='lif'"


def never_fires(threshold: Any) -> str:
    """Return why a LIF neuron cannot be swapped if its threshold is infinite in float32; empty if it is finite."""
    values = threshold.detach() if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)
    if values.is_meta or bool(values.to(torch.float32).isfinite().all()):
        return ""
    return "its threshold is not finite, so it only integrates, which no QIF neuron does"


def loaded_hosts() -> list[Host]:
    """Return the hosts that were imported; a model cannot have neurons of any other."""
    return [importlib.import_module(module).HOST for name, module in HOSTS.items() if name in sys.modules]
