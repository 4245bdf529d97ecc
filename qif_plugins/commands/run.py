"""``qif run``: an unmodified program whose LIF classes build QIF neurons."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
import os
import runpy
import sys
import types
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ..convert.script import Patch
from ..convert.standins import NAMES
from ..convert.watch import Rate
from .options import NOTHING_BUILT


def run(arguments: argparse.Namespace) -> int:
    """Run the program and return its exit status."""
    program, *rest = arguments.words
    if arguments.module:
        _import_from(os.getcwd())
        if importlib.util.find_spec(program) is None:
            raise ModuleNotFoundError(f"no module named {program!r}")
    else:
        if not Path(program).is_file():
            raise FileNotFoundError(f"no such file: {program}")
        _import_from(str(Path(program).resolve().parent))
    sys.argv = [program, *rest]
    choices = {name: getattr(arguments, name) for name in ("dynamics", "window", "norm", "readout")}
    with Patch(_say, **choices) as patch:
        status, chosen = _execute(program, arguments.module)
    return _account(patch, status, chosen)


def _execute(program: str, is_module: bool) -> tuple[int, bool]:
    """Run the program as python would, and report its exceptions; return its exit status, and whether it chose it."""
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            _run_script(program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0, True
        print(end.code, file=sys.stderr)
        return 1, True
    except BaseException as error:
        theirs = _theirs(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(theirs), theirs)
        return 130 if isinstance(error, KeyboardInterrupt) else 1, False
    return 0, False


def _run_script(program: str) -> None:
    # Not runpy.run_path, which would put the absolute path into sys.argv.
    path = os.path.abspath(program)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = types.ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """Cut the traceback to the program's own frames."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    return frames


def _account(patch: Patch, status: int, chosen: bool) -> int:
    """Print what became of the neurons; return the exit status, which is the program's own where it chose one."""
    became, stayed, alone, uncalled = (
        sum(counts.values()) for counts in (patch.became, patch.stayed, patch.alone, patch.uncalled)
    )
    if became or stayed:
        what = f"{became} {'neuron is' if became == 1 else 'neurons are'} QIF"
        place = f" (in the place of {_kinds(patch.became)})" if became else ""
        _say(f"{what}{place}{f'; {stayed} stayed LIF ({_kinds(patch.stayed)})' if stayed else ''}")
    if alone:
        _say(
            f"{alone} of them {'was' if alone == 1 else 'were'} in no network that was called ({_kinds(patch.alone)}): "
            "each is QIF with the leak of its LIF neuron"
        )
    if uncalled:
        _say(
            f"{uncalled} more {'was' if uncalled == 1 else 'were'} built and not called ({_kinds(patch.uncalled)}), as "
            "in a network that is built only to load weights, or inside a compiled function: LIF"
        )
    _spikes(patch.watch.rates(), patch.request.window)
    if became:
        return status
    if chosen:
        _say("no QIF neuron ran before the program ended itself")
        return status
    if stayed:
        where = "its neurons stayed LIF, for the reasons given above"
    elif uncalled:
        where = "neurons were built, but none ran"
    elif patch.patched:
        names = [name for names in patch.patched.values() for name in names]
        where = f"it imported {', '.join(patch.patched)}, but built no {' or '.join(dict.fromkeys(names))}"
    else:
        where = f"it imported none of {', '.join(NAMES)}"
    what = "ran as" if stayed or uncalled else "was"
    _say(
        f"nothing {what} QIF: {where} in this process. Processes that it starts are not patched; "
        "start them through 'qif run' instead, as in 'torchrun --no-python qif run train.py'."
    )
    return status or NOTHING_BUILT


def _spikes(rates: Iterable[Rate], window: object) -> None:
    """Name the layers that hardly spiked towards the end of the run, and therefore do not learn."""
    silent = {rate.name: rate for rate in rates if rate.silent}
    for name, rate in silent.items():
        what = "reads out, and " if rate.reads_out else ""
        _say(
            f"{name}: {what}hardly ever spiked ({rate.last:.2g} per neuron-step in the end, {rate.first:.2g} at first)"
        )
    if silent:
        keep = "" if window == "keep" else "'qif run --window keep' leaves each neuron its own surrogate; "
        _say(
            f"layers that hardly spike do not learn, nor do those before them. What helps: {keep}a normalization "
            "inserted before each layer that has none (qif_plugins.neuron.norm.TDBatchNorm1d to 3d). See 'dead' in "
            "docs/does-not-learn.md"
        )


def _kinds(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _import_from(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _say(line: str) -> None:
    print(f"qif run: {line}", file=sys.stderr, flush=True)
