"""Write the page of a study, with its finding, tables and figure, and the index of all pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...support.files import replacing
from ..records import Records, Trial
from . import STUDIES

LONGEST = 20
"""Lines of the longest table that the index repeats."""


@dataclass(frozen=True)
class Body:
    """The part of a page that a study writes from its trials.

    Attributes:
        finding: At most two sentences that say what the numbers show; the index repeats them.
        sections: Markdown. The first is the table with the numbers behind the finding, which the index repeats;
            then come further tables, with a sentence on each that needs one.
        method: The networks and the training, and how the grid was thinned.
    """

    finding: str
    sections: Sequence[str]
    method: str


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table, the first ``left`` columns flush left and the others flush right."""
    marks = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))


def write_page(
    path: Path, title: str, question: str, body: Body, trials: Sequence[Trial], records: Records, command: str
) -> None:
    """Write the page of a study: question, finding, tables, figure, and what the numbers depend on."""
    picture = path.with_suffix(".png")
    first, *others = body.sections
    figure = [f"![{title}]({picture.name})"] if picture.exists() else []
    parts = [f"# {title}", question, body.finding, first, *figure, *others, "## Method", body.method]
    _write(path, [*parts, _provenance(trials, records, command)])


def write_index(folder: Path) -> None:
    """Write ``index.md``: title, finding and first table, unless it is long, of every page there is."""
    parts = [
        "# Studies",
        "`qif study NAME` runs one of these experiments, stores every trial in the JSON file next to its page, and "
        "writes the page from it. With `--jobs 2` it runs two trials at a time; if it is stopped, it goes on from "
        "there the next time. Numbers are mean ± standard deviation over seeds, and intervals are 95 % intervals.",
    ]
    for name in STUDIES:
        page = folder / f"{name}.md"
        if page.exists():
            title, _, finding, first = page.read_text(encoding="utf-8").split("\n\n", 4)[:4]
            parts += [f"## [{title.removeprefix('# ')}]({page.name})", finding]
            if len(first.splitlines()) <= LONGEST:
                parts.append(first)
    _write(folder / "index.md", parts)


def _write(path: Path, parts: Sequence[str]) -> None:
    with replacing(path) as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _provenance(trials: Sequence[Trial], records: Records, command: str) -> str:
    """Name the command, the seeds, the time, and the machines and versions of the trials."""
    minutes = sum(trial.seconds for trial in trials) / 60
    lines = [f"Command: `{command}`."]
    if trials:
        seeds = ", ".join(map(str, sorted({trial.setting["seed"] for trial in trials})))
        lines.append(f"{len(trials)} trials, seeds {seeds}; {minutes:.0f} minutes of CPU time.")
    for index in sorted({trial.environment for trial in trials}):
        seen = records.environments[index]
        versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
        cpu = re.sub(r"\((R|TM)\)", "", seen["cpu"])
        lines.append(f"{cpu}, {seen['system']}, Python {seen['python']}; {versions}.")
    return " ".join(lines)
