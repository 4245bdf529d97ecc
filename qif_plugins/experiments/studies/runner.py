"""Run the missing trials of a study, store each as it finishes, and write the page."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...support.files import occupied
from ...support.names import check_known
from ..records import Records, Result, Setting, key_of
from . import STUDIES
from .page import write_index, write_page


@dataclass(frozen=True)
class Options:
    """The size of a study.

    Attributes:
        quick: Whether to run a tiny version on scikit-learn's digits, to see that it works.
        seeds: Number of seeds, 0 first; ``None`` means the study's own number.
        results: Folder with the files of ``qif bench``, for ``latency``.
        networks: Names of the networks, for ``swap``; empty (default) means all.
        arms: Names of what LIF is compared with, for ``swap``. Default: swapped with the defaults.
        factors: Factors on each network's learning rate, for ``swap``. Default 1 alone.
        folders: Folders by the name of the data in them, for the studies that have ``FOLDERS``.
    """

    quick: bool = False
    seeds: int | None = None
    results: Path = Path("benchmarks/results")
    networks: tuple[str, ...] = ()
    arms: tuple[str, ...] = ("default",)
    factors: tuple[float, ...] = (1.0,)
    folders: Mapping[str, Path] = field(default_factory=dict)

    def seeds_of(self, own: int, quick: int = 1) -> range:
        """Return the seeds to run: as many as were asked for, or ``own``, or ``quick`` in the tiny version."""
        return range(self.seeds or (quick if self.quick else own))


class Progress(NamedTuple):
    """Progress after a trial: the trials done, those of earlier runs included, of all that the study names so far."""

    done: int
    total: int


def run_study(
    name: str,
    options: Options,
    out: Path,
    command: str,
    jobs: int = 1,
    threads: int = 1,
    train: bool = True,
    say: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Run the trials of a study that are not recorded yet, and write its page.

    Args:
        name: One of :data:`STUDIES`.
        options: The size of the study.
        out: Folder of ``<name>.json``, ``<name>.md`` and ``<name>.png``.
        command: The command that runs the study, for the page.
        jobs: Trials at a time, each in a process of its own. Default 1, in this process.
        threads: CPU threads of each. Default 1.
        train: Whether to run trials; without, the page is written from those there are. Default True.
        say: Called after each trial. Default: nothing.

    Returns:
        The page.

    Raises:
        ValueError: An unknown study, no trial to write about, or a file that is not a record of trials.
    """
    check_known("study", STUDIES, name)
    study: Any = importlib.import_module(f".{name}", __package__)
    with occupied(out):
        records = Records(out / f"{name}.json")
        while train and (missing := _missing(study, options, records)):
            total = len(records) + len(missing)
            for setting, result, seconds in _finished(name, missing, jobs, threads, options.folders):
                records.add(setting, result, seconds)
                say(Progress(len(records), total))
        with _reading(records):
            wanted = [records.get(setting) for setting in study.plan(options, records)]
        trials = [trial for trial in wanted if trial is not None]
        if wanted and not trials:
            raise ValueError(f"{records.path} holds no trial of this study yet; run it without --page-only")
        page = out / f"{name}.md"
        with _reading(records):
            body = study.report(options, trials, page.with_suffix(".png"))
        if names := {trial.setting.get("data", "") for trial in trials}.intersection(getattr(study, "FOLDERS", ())):
            command += f" --data-folder {' '.join(f'{each}=FOLDER' for each in sorted(names, reverse=True))}"
        write_page(page, study.TITLE, study.QUESTION, body, trials, records, command)
        write_index(out)
        return page


@contextmanager
def _reading(records: Records) -> Iterator[None]:
    """Turn the error for a result that lacks an entry into one that names the file."""
    try:
        yield
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{records.path} holds trials without all that this study records ({type(error).__name__}: {error}); take "
            "another copy, or move it away to start anew"
        ) from error


def _missing(study: Any, options: Options, records: Records) -> list[Setting]:
    with _reading(records):
        wanted = {key_of(setting): setting for setting in study.plan(options, records)}
    return [setting for setting in wanted.values() if setting not in records]


def _finished(
    name: str, settings: Sequence[Setting], jobs: int, threads: int, folders: Mapping[str, Path]
) -> Iterator[tuple[Setting, Result, float]]:
    """Run trials, and yield each with its result and CPU time when it has finished."""
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for setting in settings:
                yield setting, *_run(name, setting, folders)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of PyTorch's threads
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        waiting = {pool.submit(_run, name, setting, folders): setting for setting in settings}
        try:
            for future in as_completed(waiting):
                yield waiting[future], *future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run(name: str, setting: Setting, folders: Mapping[str, Path]) -> tuple[Result, float]:
    study: Any = importlib.import_module(f".{name}", __package__)
    began = time.process_time()
    result: Result = study.run(setting, folders) if hasattr(study, "FOLDERS") else study.run(setting)
    return result, time.process_time() - began
