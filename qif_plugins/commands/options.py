"""Options that several subcommands share, and the objects that they become."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from ..neuron.arguments import DEFAULT_BETA, DYNAMICS, MAP, MapArguments, build_parameters
from ..neuron.parameters import QIFParameters
from ..support.names import unknown

__all__ = ["add_neuron_arguments", "at_least", "describe", "device", "neuron", "one_of", "positive"]

_PAPER = QIFParameters()


def add_neuron_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the neuron: its map, or the leak of a LIF neuron to match."""
    group = parser.add_argument_group("neuron", "f(v) = a (v - u1)(v - u2), spike at h >= threshold")
    group.add_argument(
        "--a", type=float, help=f"curvature of the map (the paper's: {_PAPER.a:g}, taken with --u1 or --u2)"
    )
    group.add_argument(
        "--u1", type=float, help=f"first root of the map (the paper's: {_PAPER.u1:g}, taken with --a or --u2)"
    )
    group.add_argument(
        "--u2", type=float, help=f"second root of the map (the paper's: {_PAPER.u2:g}, taken with --a or --u1)"
    )
    group.add_argument("--threshold", type=float, default=_PAPER.v_threshold, help="threshold")
    group.add_argument("--v-reset", type=float, help="membrane after a spike (default: u1, or the matched rest)")
    group.add_argument(
        "--beta",
        type=float,
        help=f"leak to match (default: {DEFAULT_BETA:g}, unless --a, --u1, --u2 or --dynamics decides)",
    )
    group.add_argument(
        "--curvature", type=float, help="with --beta: threshold over unstable fixed point (default: 0.5)"
    )
    group.add_argument("--dynamics", choices=DYNAMICS, help="paper: the paper's map; lif: the map that matches --beta")


def neuron(arguments: argparse.Namespace) -> QIFParameters:
    """Build the neuron that the options of :func:`add_neuron_arguments` ask for.

    Raises:
        ValueError: Contradicting options, or parameters that :class:`QIFParameters` refuses.
    """
    chosen = _map_arguments(arguments)
    beta = DEFAULT_BETA if chosen.left_open else arguments.beta
    if chosen.decided == "lif" and beta is None:
        what = "--dynamics lif matches a leak" if chosen.dynamics else "--curvature shapes the map that --beta matches"
        raise ValueError(
            f"{what}; pass --beta too, or --a instead (without any of these options the leak is {DEFAULT_BETA:g})"
        )
    curvature = {} if arguments.curvature is None else {"curvature": arguments.curvature}
    return build_parameters(chosen.roots, arguments.threshold, beta=beta, v_reset=arguments.v_reset, **curvature)


def _map_arguments(arguments: argparse.Namespace) -> MapArguments:
    given = {name: getattr(arguments, name) for name in MAP if getattr(arguments, name) is not None}
    leak = {name: value for name in ("beta", "curvature") if (value := getattr(arguments, name)) is not None}
    return MapArguments(arguments.dynamics, given, leak)


def describe(arguments: argparse.Namespace, params: QIFParameters) -> str:
    """Describe in one line the neuron, the option that decided its map, and the options that were set aside."""
    shown = {"a": params.a, "u1": params.u1, "u2": params.u2, "threshold": params.v_threshold, "reset": params.v_reset}
    chosen = _map_arguments(arguments)
    numbers = ", ".join(f"{name} {value:g}" for name, value in shown.items())
    return f"QIF neuron  {numbers}, dynamics {chosen.decided}{chosen.describe_set_aside()}"


def at_least(minimum: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Make an argparse type: an integer from ``minimum`` to ``most``, by default the largest integer of 64 bits."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below the minimum, {minimum}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is above the maximum, {most}")
        return value

    return integer


def positive(text: str) -> float:
    """Convert an argument to a positive, finite number, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value


def one_of(kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Split a comma-separated list into names, without repetition, each of them known.

    Raises:
        ValueError: An empty list or an unknown name; the message lists those that exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ValueError(unknown(kind, name, known))
    if not names:
        raise ValueError(f"no {kind} given; choose from {', '.join(map(repr, known))}")
    return names


def device(name: str) -> torch.device:
    """Return the torch device called ``name``.

    Raises:
        ValueError: This machine has no such device.
    """
    try:
        wanted = torch.device(name)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"device {name!r} cannot be used here: {reason}. 'cpu' always works.") from None
    return wanted
