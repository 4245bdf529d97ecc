"""``qif run``: an unmodified program, its LIF classes building QIF neurons."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
import os
import runpy
import sys
import types
from pathlib import Path
from types import TracebackType

from ..patch import NAMES, Patch
from ..surrogate import WINDOWS

__all__ = ["add_arguments", "run"]

NOTHING_BUILT = 3
"""Exit status of a program that ended well and built no QIF neuron."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand; everything from the program's name on is the program's."""
    parser.usage = "qif run [options] (script.py | -m package.module) [arguments of the program ...]"
    parser.epilog = (
        "Prints on stderr what was patched, what became of the neurons of each network when it is called for the first "
        f"time, and how many were built. Exit status: the program's; {NOTHING_BUILT} if it ended well and built no "
        "QIF neuron. A launcher that starts other processes goes before: torchrun --no-python qif run train.py."
    )
    parser.add_argument("--dynamics", choices=("auto", "paper", "lif"), default="auto", help="as in qif_plugins.swap")
    parser.add_argument("--window", choices=(*WINDOWS, "keep"), default="unbiased", help="as in qif_plugins.swap")
    parser.add_argument("--norm", choices=("keep", "tdbn"), default="keep", help="as in qif_plugins.swap")
    parser.add_argument("--readout", choices=("keep", "swap"), default="keep", help="as in qif_plugins.swap")
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    parser.add_argument("program", help="the script, or with -m the module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments, passed on untouched")


def run(arguments: argparse.Namespace) -> int:
    """Run the program and return its exit status."""
    program = arguments.program
    if arguments.module:
        _import_from(os.getcwd())
        if importlib.util.find_spec(program) is None:
            raise ModuleNotFoundError(f"no module named {program!r}")
    else:
        if not Path(program).is_file():
            raise FileNotFoundError(f"no such file: {program}")
        _import_from(str(Path(program).resolve().parent))
    sys.argv = [program, *arguments.arguments]
    choices = {name: getattr(arguments, name) for name in ("dynamics", "window", "norm", "readout")}
    with Patch(_say, **choices) as patch:
        status = _execute(program, arguments.module)
    return _account(patch, status)


def _execute(program: str, is_module: bool) -> int:
    """Run it as python would; its exit status. Nothing that it raises gets past here."""
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            _run_script(program)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        theirs = _theirs(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(theirs), theirs)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _run_script(program: str) -> None:
    # Not runpy.run_path, which would put the absolute path into sys.argv.
    path = os.path.abspath(program)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    main = types.ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's first frame on."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while frames is not None and frames.tb_frame.f_code.co_filename in ours:
        frames = frames.tb_next
    return frames


def _account(patch: Patch, status: int) -> int:
    built = sum(patch.built.values())
    if built:
        kinds = ", ".join(f"{count} {name}" for name, count in patch.built.items() if count)
        stayed = sum(patch.stayed.values())
        _say(f"{built} neurons are QIF (in the place of {kinds}){f'; {stayed} stayed LIF' if stayed else ''}")
        return status
    if patch.patched:
        names = [name for names in patch.patched.values() for name in names]
        where = f"it imported {', '.join(patch.patched)}, but built no {' or '.join(dict.fromkeys(names))}"
    else:
        where = f"it imported none of {', '.join(NAMES)}"
    _say(
        f"nothing was QIF: {where} in this process. Processes that it starts are not patched; start them through "
        "'qif run' instead, as in 'torchrun --no-python qif run train.py'."
    )
    return status or NOTHING_BUILT


def _import_from(folder: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _say(line: str) -> None:
    print(f"qif run: {line}", file=sys.stderr, flush=True)
