"""Turn options that several subcommands share into objects: the neuron, names from a list, the device."""

from __future__ import annotations

import argparse

import torch

from ..neuron.arguments import MapArguments, build_parameters
from ..neuron.names import DEFAULT_BETA, MAP
from ..neuron.parameters import QIFParameters
from ..support.names import check_known


def neuron(arguments: argparse.Namespace) -> QIFParameters:
    """Build the neuron that the options of ``qif window`` and ``qif phase`` ask for.

    Raises:
        ValueError: Contradicting options, or parameters that :class:`QIFParameters` refuses.
    """
    chosen = _map_arguments(arguments)
    chosen.check_beta(f"pass --beta too, or --a instead (without any of these options the leak is {DEFAULT_BETA:g})")
    return build_parameters(
        chosen.roots, arguments.threshold, v_reset=arguments.v_reset, rebound=chosen.rebound,
        **{"beta": DEFAULT_BETA, **chosen.leak},
    )  # fmt: skip


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


def one_of(kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Split a comma-separated list into names, without repetition, each of them known.

    Raises:
        ValueError: An empty list or an unknown name; the message lists those that exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    check_known(kind, known, *names)
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
