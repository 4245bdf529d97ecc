"""The ``qif`` command.

Each subcommand has a line in :data:`COMMANDS` with its name, its module and its help. The module has two functions::

    add_arguments(parser)       declares its options
    run(arguments) -> int       does the work and returns the exit status

It is imported when its subcommand is called, so that ``qif --help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "compare": (".commands.compare", "train one network with LIF and with QIF in every installed host, and compare"),
    "run": (".commands.run", "run an unmodified program whose LIF classes build QIF neurons"),
    "train": (".commands.train", "train a model from a configuration, on one process or many"),
    "evaluate": (".commands.evaluate", "measure accuracy, loss and firing rates of a checkpoint of qif train"),
    "doctor": (".commands.doctor", "show installed versions, the backends that run here, and why others do not"),
    "window": (".commands.window", "compare membrane moments and surrogate windows with a simulation of the neuron"),
    "phase": (".commands.phase", "draw the map of a neuron with its fixed points, threshold and regions"),
    "energy": (".commands.energy", "count the operations of a network, and the energy that QIF adds to LIF"),
    "exact": (".commands.exact", "train with exact spike-time gradients, compare neurons, draw demonstrations"),
    "landscape": (
        ".commands.landscape",
        "measure and draw the loss of trained networks along directions in weight space",
    ),
    "study": (".commands.study", "run the experiments of docs/studies, and write their pages"),
    "bench": (".commands.bench", "time the kernels against the hosts' neurons in one run"),
}
"""Subcommands by name: module, relative to this package, and help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qif`` with ``arguments``, by default those of the command line.

    Returns:
        The status of the subcommand, 0 after success; 2 with one line on stderr for wrong input, a missing package, an
        unusable file or too little memory; 130 after an interrupt.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words and words[0] in COMMANDS else ""
    try:
        return _run(words, name)
    except (ValueError, ImportError, OSError) as error:
        print(f"qif {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        what = _one_line(error).rpartition("Allocator: ")[2][:200]  # PyTorch's sentence begins with where it failed
        way_out = "take a smaller network, smaller batches or fewer time steps"
        print(f"qif {name}: not enough memory ({what}); {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nqif {name}: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str], chosen: str) -> int:
    parser = argparse.ArgumentParser(
        prog="qif", description="Discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch."
    )
    parser.add_argument("--version", action="version", version=f"qif-plugins {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        if name == chosen:
            command = importlib.import_module(module, __package__)
            command.add_arguments(subparser)
    parsed = parser.parse_args(words)
    status: int = command.run(parsed)
    return status


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, except those of flags and of options whose help names their default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation failed, by the messages of PyTorch's allocators."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
