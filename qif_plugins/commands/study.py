"""``qif study``: experiments of several trainings, recorded trial by trial and written up."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..experiments.figures import require_matplotlib
from ..experiments.studies import STUDIES
from ..support.names import unknown
from .options import at_least

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("name", nargs="?", help=f"which study: {', '.join(STUDIES)}, or all of them: all")
    parser.add_argument("--list", action="store_true", help="say what each study asks, and run none")
    parser.add_argument(
        "--seeds", type=at_least(1, 10_000), help="how many seeds, 0 first (default: the study's own number)"
    )
    parser.add_argument("--jobs", type=at_least(1, 1024), default=1, help="trials at a time, each in its own process")
    parser.add_argument("--threads", type=at_least(1, 1024), default=1, help="CPU threads of each trial")
    parser.add_argument("--quick", action="store_true", help="a tiny version on digits, to see that it runs")
    parser.add_argument(
        "--page-only", action="store_true", help="run nothing, write the page from the trials there are"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="files of qif bench, for latency"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of records and pages (default: docs/studies; quick: runs/studies)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run what is not recorded yet and write the page; a study that was stopped goes on where it was."""
    if arguments.list or arguments.name is None:
        for name, asks in STUDIES.items():
            print(f"{name:10} {asks}")
        return 0
    names = list(STUDIES) if arguments.name == "all" else [arguments.name]
    if names[0] not in STUDIES:
        raise ValueError(unknown("study", names[0], (*STUDIES, "all")))
    require_matplotlib()  # before hours of training, not after
    from ..experiments.studies.runner import Options, run_study

    out = arguments.out or Path("runs/studies" if arguments.quick else "docs/studies")
    options = Options(arguments.quick, arguments.seeds, arguments.results)
    for name in names:
        seeds = [] if arguments.seeds is None else ["--seeds", str(arguments.seeds)]
        command = " ".join(["qif", "study", name, *(["--quick"] if arguments.quick else []), *seeds])
        page = run_study(
            name, options, out, command, arguments.jobs, arguments.threads, not arguments.page_only,
            lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        print(f"wrote {page}")
    return 0
