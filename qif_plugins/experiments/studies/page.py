"""What a study writes: one page with its finding, figure and tables, and the index of all pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...support.files import replacing
from ..records import Records, Trial
from . import STUDIES

__all__ = ["Body", "table", "write_index", "write_page"]


@dataclass(frozen=True)
class Body:
    """What a study makes of its trials.

    Attributes:
        finding: One paragraph that states what the numbers show.
        sections: Markdown: tables and what they mean.
        seeds: Of the trials.
        method: How the trials were made, and how the grid was thinned.
    """

    finding: str
    sections: Sequence[str]
    seeds: Sequence[int]
    method: str


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first ``left`` columns flush left and the others flush right."""
    marks = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, marks, *rows))


def write_page(
    path: Path, title: str, question: str, body: Body, trials: Sequence[Trial], records: Records, command: str
) -> None:
    """Write the page of a study: question, finding, figure, tables, and what the numbers depend on."""
    picture = path.with_suffix(".png")
    parts = [
        f"# {title}",
        question,
        body.finding,
        *([f"![{title}]({picture.name})"] if picture.exists() else []),
        *body.sections,
        "## How",
        body.method,
        *_provenance(body, trials, records, command),
    ]
    with replacing(path) as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_index(folder: Path) -> None:
    """Write ``index.md``: title and finding of every page there is."""
    parts = [
        "# Studies",
        "Every page is written by `qif study` from the trials recorded in the JSON file beside it. What it states is "
        "computed from them; a longer run rewrites it. `qif study --list` says what there is; `qif study windows "
        "--jobs 2` runs one, two trials at a time, and goes on where it was stopped. Numbers are mean ± standard "
        "deviation over seeds.",
    ]
    for name in STUDIES:
        page = folder / f"{name}.md"
        if page.exists():
            title, _, finding = page.read_text(encoding="utf-8").split("\n\n", 3)[:3]
            parts += [f"## [{title.removeprefix('# ')}]({page.name})", finding]
    with replacing(folder / "index.md") as beside:
        beside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _provenance(body: Body, trials: Sequence[Trial], records: Records, command: str) -> list[str]:
    minutes = sum(trial.seconds for trial in trials) / 60
    lines = [f"Command: `{command}`."]
    if trials:
        seeds = ", ".join(map(str, body.seeds))
        lines.append(f"{len(trials)} trials, seeds {seeds}; {minutes:.0f} minutes of CPU time.")
    for index in sorted({trial.environment for trial in trials}):
        seen = records.environments[index]
        versions = ", ".join(f"{name} {version}" for name, version in seen["versions"].items())
        cpu = re.sub(r"\((R|TM)\)", "", seen["cpu"])
        lines.append(f"{cpu}, {seen['system']}, Python {seen['python']}; {versions}.")
    return [" ".join(lines)]
