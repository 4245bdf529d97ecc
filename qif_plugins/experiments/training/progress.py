"""Progress of a training run: a bar, one line per epoch and TensorBoard's logs, in the main process only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .engine import Trainer

REFRESH = 0.5
"""Seconds between two readings of loss, accuracy and rate, each of which waits for the GPU."""


class Progress:
    """Progress display and logs of a trainer, used as its ``on_step`` and ``on_epoch``.

    Args:
        writer: TensorBoard's writer; ``None`` logs nothing.
        quiet: Whether to hide the bar and the lines. Default False.
    """

    def __init__(self, writer: Any = None, quiet: bool = False) -> None:
        self.writer, self.quiet = writer, quiet
        self.bar: Any = None
        self._looked = 0.0

    @contextlib.contextmanager
    def following(self, trainer: Trainer) -> Iterator[None]:
        """Show the bar while the block runs."""
        if trainer.main and not self.quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("the progress bar needs tqdm: pip install 'qif-plugins[train]'") from None
            done = trainer.epoch * trainer.steps + trainer.step
            # On a terminal only: in a log file, the line for each epoch is enough.
            self.bar = tqdm(
                total=trainer.epochs * trainer.steps, initial=done, unit="step", disable=None, dynamic_ncols=True
            )
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
            if self.writer is not None:
                self.writer.close()

    def on_step(self, trainer: Trainer, measured: dict[str, float]) -> None:
        """Advance the bar, and log the step."""
        if self.writer is not None:
            step = trainer.epoch * trainer.steps + trainer.step
            for name, value in measured.items():
                self.writer.add_scalar(f"step/{name}", value, step)
        if self.bar is None or self.bar.disable:
            return
        now = time.perf_counter()
        if now - self._looked > REFRESH:
            self._looked = now
            row = trainer.so_far()
            shown = {name: f"{row[name]:.3g}" for name in ("loss", "accuracy", "rate") if name in row}
            self.bar.set_description(f"epoch {trainer.epoch + 1}/{trainer.epochs}", refresh=False)
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_epoch(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Print the epoch's line, and log its row and the rate of each layer."""
        if self.writer is not None:
            step = trainer.epoch * trainer.steps
            for name, value in row.items():
                part, _, rest = name.partition("_")
                self.writer.add_scalar(f"test/{rest}" if part == "test" else f"train/{name}", value, step)
            for layer, rate in trainer.rates.items():
                self.writer.add_scalar(f"rate/{layer}", rate, step)
            self.flush()
        if trainer.main and not self.quiet:
            self._print(describe(trainer, row))

    def flush(self) -> None:
        """Flush the logs, so that a checkpoint saved next is not ahead of them."""
        if self.writer is not None:
            self.writer.flush()

    def _print(self, line: str) -> None:
        if self.bar is None or self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)


def describe(trainer: Trainer, row: dict[str, float]) -> str:
    """Describe an epoch in one line."""
    parts = [f"epoch {row['epoch']:.0f}/{trainer.epochs}", f"loss {row['loss']:.4f}"]
    if "accuracy" in row:
        parts.append(f"accuracy {row['accuracy']:.2%}")
    for name, text in (("test_loss", "test loss {:.4f}"), ("test_accuracy", "test accuracy {:.2%}")):
        if name in row:
            parts.append(text.format(row[name]))
    rate = row.get("test_rate", row.get("rate"))
    if rate is not None:
        parts.append(f"spikes/step {rate:.4f}")
    parts += [f"lr {row['lr']:.2e}", f"{row['seconds']:.1f} s"]
    return ", ".join(parts)


def tensorboard_writer(folder: Path, steps_done: int) -> Any:
    """Make a TensorBoard writer; entries that an interrupted run wrote after step ``steps_done`` are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard's logs need tensorboard: pip install 'qif-plugins[train]', or pass --no-tensorboard"
        ) from None
    # TensorBoard reads the files of a folder by their names, which begin with the second they were made in.
    made = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while str(int(time.time())) in made:
        time.sleep(0.01)
    return SummaryWriter(str(folder), purge_step=steps_done + 1)
