"""The ``qif`` command.

A subcommand is one line in :data:`COMMANDS`: its name, the module that holds it, and its help. The module has

    add_arguments(parser)       declares its options
    run(arguments) -> int       does the work and returns the exit status

and is imported only when its subcommand is called, so that ``qif --help`` waits for none of them.
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
    "run": (".commands.run", "run an unmodified program, its LIF classes building QIF neurons"),
    "train": (".commands.train", "train a model from a configuration, on one process or many"),
    "evaluate": (".commands.evaluate", "accuracy, loss and firing rates of a checkpoint of qif train"),
    "doctor": (".commands.doctor", "say what is installed, which backends run here, and why the others do not"),
    "window": (".commands.window", "membrane moments and surrogate windows, beside a simulation of the same neuron"),
    "phase": (".commands.phase", "draw the map of the neuron with its fixed points, threshold and regions"),
    "energy": (".commands.energy", "count a network's operations, and what QIF costs more energy than LIF"),
    "exact": (".commands.exact", "train with exact spike-time gradients, compare neurons, draw demonstrations"),
    "landscape": (".commands.landscape", "measure and draw loss and gradient of trained networks along directions"),
    "study": (".commands.study", "experiments of several trainings: run, recorded trial by trial, written up"),
    "bench": (".commands.bench", "time the kernels beside the hosts' neurons, interleaved in one run"),
}
"""Subcommands by name: module, relative to this package, and help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qif`` with ``arguments``, by default those of the command line.

    Returns:
        0 after success, the subcommand's own status otherwise; 2 with one line on stderr for wrong input, a missing
        package, an unusable file or too little memory; 130 after an interrupt.
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
    """Shows defaults, except those of flags and of options that say themselves what leaving them out means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, in the words of PyTorch's allocators."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
