"""The ``qif`` command.

Each subcommand has a line in :data:`COMMANDS`. Its options are the function of its name in :mod:`.commands.options`,
which imports no PyTorch, so that help and wrong options are answered at once; its work is ``run(arguments) -> int`` in
the module of its name in :mod:`.commands`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import __version__
from .support.text import one_line

COMMANDS = {
    "compare": "train one network with LIF and with QIF in every installed host, and compare",
    "run": "run an unmodified program whose LIF classes build QIF neurons",
    "train": "train a model from a configuration, on one process or many",
    "evaluate": "measure accuracy, loss and firing rates of a checkpoint of qif train",
    "data": "draw a sample of images, sounds or events as the network gets it",
    "doctor": "show installed versions, the backends that run here, and why others do not",
    "window": "compare membrane moments and surrogate windows with a simulation of the neuron",
    "phase": "draw the map of a neuron with its fixed points, threshold and regions",
    "energy": "count the operations of a network, and the energy that QIF adds to LIF",
    "exact": "train with exact spike-time gradients, compare neurons, draw demonstrations",
    "landscape": "measure and draw the loss of trained networks along directions in weight space",
    "study": "run the experiments of docs/studies, and write their pages",
    "bench": "time the kernels against the hosts' neurons, or whole networks with either, in one run",
}
"""Help of each subcommand."""


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
        print(f"qif {name}: {one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        what = one_line(error).rpartition("Allocator: ")[2][:200]  # PyTorch's sentence begins with where it failed
        way_out = "take a smaller network, smaller batches or fewer time steps"
        print(f"qif {name}: not enough memory ({what}); {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nqif {name}: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str], chosen: str) -> int:
    parser = _Parser(
        prog="qif", description="discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch"
    )
    parser.add_argument("--version", action="version", version=f"qif-plugins {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:
            getattr(importlib.import_module(".commands.options", __package__), name)(subparser)
    parsed = parser.parse_args(words)
    status: int = importlib.import_module(f".commands.{chosen}", __package__).run(parsed)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser that shows defaults, takes no abbreviations, and names the nearest option or choice to an unknown one.

    Args:
        description: What the command does, in lower case and without a full stop, as in the list of commands.
        options: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, description: str, **options: Any) -> None:
        sentence = f"{description[0].upper()}{description[1:]}."
        super().__init__(description=sentence, formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse as ``argparse`` does, and refuse unknown arguments here, where the subcommand's options are known."""
        parsed, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self._refuse(unknown)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print ``message`` below the usage, with the nearest choice to one that does not exist; exit with status 2."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(wrong[1], re.findall(r"[^', ]+", wrong[2]), 1) if wrong else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        matches = [difflib.get_close_matches(name, self._option_string_actions, 1) for name in names]
        near = " and ".join(dict.fromkeys(found[0] for found in matches if found))
        self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near}?" if near else ""))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, except those of flags, empty lists, and options whose help names their default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default == []
        return action.help if hidden or "(default: " in str(action.help) else super()._get_help_string(action)


def _out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation failed, by the messages of PyTorch's allocators."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


if __name__ == "__main__":
    sys.exit(main())
