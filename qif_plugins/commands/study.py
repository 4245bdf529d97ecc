"""``qif study``: experiments of several trainings, recorded trial by trial and written up."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.figures import require_matplotlib
from ..experiments.studies import OF_FOLDERS, STUDIES
from ..support.names import check_known

if TYPE_CHECKING:
    from ..experiments.studies.runner import Progress


def run(arguments: argparse.Namespace) -> int:
    """Run the trials that are not recorded yet, and write the page."""
    if arguments.list or arguments.name is None:
        for name, asks in STUDIES.items():
            print(f"{name:10} {asks}")
        return 0
    names = list(STUDIES) if arguments.name == "all" else [arguments.name]
    check_known("study", (*STUDIES, "all"), names[0])
    if len(names) > 1 and not (arguments.data_folder or arguments.quick):
        names = [name for name in names if name not in OF_FOLDERS]
        print(f"without --data-folder, which they need, {' and '.join(OF_FOLDERS)} are left out")
    require_matplotlib()  # before hours of training, not after
    from ..experiments.studies.runner import Options, run_study

    out = arguments.out or Path("runs/studies" if arguments.quick else "docs/studies")
    sizes = {"networks": arguments.networks, "arms": arguments.arms, "factors": arguments.rates}
    given: dict[str, Any] = {name: tuple(values) for name, values in sizes.items() if values}
    given["folders"] = dict(arguments.data_folder or ())
    options = Options(arguments.quick, arguments.seeds, arguments.results, **given)
    for name in names:
        words = ["qif", "study", name, *(["--quick"] if arguments.quick else [])]
        words += [] if arguments.seeds is None else ["--seeds", str(arguments.seeds)]
        for option in ("networks", "arms", "rates") if name == "swap" else ():
            values = getattr(arguments, option)
            words += [f"--{option}", *map(str, values)] if values else []
        command = shlex.join(words)
        with _progress_bar(name) as say:
            page = run_study(
                name, options, out, command, arguments.jobs, arguments.threads, not arguments.page_only, say
            )
        print(f"wrote {page}")
    return 0


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[Progress], None]]:
    """Show the trials of a study as they finish; in a log file, once a minute."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        bar: Any = None

        def say(progress: Progress) -> None:
            nonlocal bar
            if bar is None:
                every = 0.1 if sys.stderr.isatty() else 60.0
                shown = tqdm(desc=name, unit="trial", initial=progress.done - 1, mininterval=every, dynamic_ncols=True)
                bar = stack.enter_context(shown)
            bar.total = progress.total
            bar.update()

        yield say
