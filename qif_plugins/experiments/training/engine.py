"""The trainer: epochs and steps of any model on any batches, in one process or several.

The trainer knows nothing of images or time steps. It takes batches from :class:`~.batches.Batches`, calls the loss with
the model and a batch, and steps the optimizer. It prints nothing, writes nothing unless it is given a
:class:`Store`, and draws no random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...diagnostics.spiking import spiking_layers
from ...support.checkpoints import load_weights
from ...support.names import check_known
from .batches import Batches
from .diagnosis import non_finite_error
from .firing import FiringRates
from .means import Means
from .precision import PRECISIONS, autocast_forward
from .processes import accelerate, gather, prepare, share
from .randomness import random_state, set_random_state, set_torch_random, torch_random
from .state import check_state

Loss = Callable[[nn.Module, Any], Any]


class Store(Protocol):
    """A place to save a trainer's state, such as :class:`~qif_plugins.experiments.checkpoints.Checkpoints`."""

    def save(self, trainer: Trainer, *, best: bool) -> None:
        """Save the state of a trainer; called in every process."""


class Trainer:
    """A trainer of a model, which is changed in place.

    Args:
        model: Any module.
        optimizer: Over its parameters.
        loss: Called with the model and a batch, in training and (without gradient, in evaluation mode) in testing.
            Returns a scalar, the mean over the samples of the batch, or a tuple of that and a dictionary of further
            such means by name, such as ``{"accuracy": ...}``.
        train: Training batches.
        test: Batches to evaluate after every epoch. Default none.
        evaluate_loss: Loss for evaluation. Default ``loss``.
        scheduler: Stepped after every step of the optimizer. Default none.
        epochs: Number of epochs. Default 1.
        accumulation: Number of training batches in one step of the optimizer. Default 1.
        precision: Autocast of the model's forward in this trainer: ``"no"``, ``"bf16"`` or ``"fp16"`` (on GPUs, with
            loss scaling). Outputs are converted back to float32. Default ``"no"``.
        clip_norm: Largest norm of the gradient; larger ones are scaled down to it. Default none.
        reset: Called with the model before every batch, to clear the state of neurons. Default none.
        layers: Modules by name whose outputs are spikes, to measure their firing rates. Default: the layers found by
            :func:`~qif_plugins.diagnostics.spiking.spiking_layers`.
        train_rates: Whether to measure firing rates in training too, at the cost of one sum per layer and call.
            Default True.
        on_step: Called with the trainer and the step's measurements after every step of the optimizer.
        on_epoch: Called with the trainer and the epoch's row of the history.
        store: Place to save the state to, see :class:`~qif_plugins.experiments.checkpoints.Checkpoints`. Default: none.
        save_every: Steps between savings within an epoch; 0 saves only at the end of each epoch. Default 0.
        monitor: The measurement whose largest value marks the best epoch; a loss, the smallest.
            Default ``"test_accuracy"``.
        cpu: Whether to stay on the CPU where there is a GPU. Default: if the model's parameters are on the CPU and
            this is the only process.

    Attributes:
        history: One dictionary per epoch: epoch (from 1), loss and the further measurements of ``loss``, rate,
            gradient_norm (mean over steps, before clipping), lr (of the last step), seconds, and, with the prefix
            test_, the measurements on ``test``.
        epoch: Epochs finished.
        step: Steps of the optimizer finished in the epoch under way.
        rates: Firing rate of each layer in the last evaluation.

    Raises:
        ValueError: An unknown precision, one that the device does not have, a number below its limit, a batch too small
            to be divided among processes, or another Accelerator in several processes, whose settings are others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        train: Batches,
        *,
        test: Batches | None = None,
        evaluate_loss: Loss | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        epochs: int = 1,
        accumulation: int = 1,
        precision: str = "no",
        clip_norm: float | None = None,
        reset: Callable[[nn.Module], Any] | None = None,
        layers: Mapping[str, nn.Module] | None = None,
        train_rates: bool = True,
        on_step: Callable[[Trainer, dict[str, float]], Any] | None = None,
        on_epoch: Callable[[Trainer, dict[str, float]], Any] | None = None,
        store: Store | None = None,
        save_every: int = 0,
        monitor: str = "test_accuracy",
        cpu: bool | None = None,
    ) -> None:
        check_known("precision", PRECISIONS, precision)
        numbers = ("epochs", epochs, 0), ("accumulation", accumulation, 1), ("save_every", save_every, 0)
        for name, value, least in numbers:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}; leave it out for none")
        self.accelerator, wrapped = prepare(model, cpu)
        self.processes, self.process = self.accelerator.num_processes, self.accelerator.process_index
        kind = self.accelerator.device.type
        if precision == "fp16" and kind == "cpu":
            raise ValueError("precision 'fp16' scales the loss on a GPU, and this runs on the CPU; use 'bf16' or 'no'")
        if any(train.size(batch) < self.processes for batch in (0, len(train) - 1)):
            raise ValueError(
                f"a batch of {train.size(len(train) - 1)} samples cannot be divided among {self.processes} processes; "
                "use a larger batch size, or drop_last if the last batch is the small one"
            )
        self.model, self.loss, self.evaluate_loss = model, loss, evaluate_loss or loss
        self.train, self.test, self.scheduler = train, test, scheduler
        self.epochs, self.accumulation, self.clip_norm, self.reset = epochs, accumulation, clip_norm, reset
        self.on_step, self.on_epoch, self.precision = on_step, on_epoch, precision
        self.store, self.save_every, self.monitor = store, save_every, monitor
        self.history: list[dict[str, float]] = []
        self.epoch = self.step = 0
        self.rates: dict[str, float] = {}
        layers = spiking_layers(model) if layers is None else layers
        self.train_rates = FiringRates(layers if train_rates else {})
        self._test_rates = FiringRates(layers)
        self._means = Means()
        self._seconds = self._last_lr = 0.0
        self._asked = self._agreed = False
        self._wrapped: nn.Module = wrapped
        self._scaler = torch.amp.GradScaler(kind) if precision == "fp16" else None
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return -(-len(self.train) // self.accumulation)

    @property
    def main(self) -> bool:
        """True in the process that prints and writes."""
        return bool(self.process == 0)

    def stop(self) -> None:
        """Make :meth:`fit` return after the step under way, with the state saved if there is a store.

        May be called from a callback, a signal handler or another thread, in any one of the processes.
        """
        self._asked = True

    @property
    def stopped(self) -> bool:
        """True when all processes know that one of them was asked to stop."""
        return self._agreed or (self._asked and self.processes == 1)

    def fit(self) -> list[dict[str, float]]:
        """Train until ``epochs`` are finished, from where the state stands.

        Returns:
            The history.

        Raises:
            NonFiniteError: The loss or a gradient is not finite. Raised before the optimizer steps; the message names
                the layer that made it. Nothing is saved after the last good step.
        """
        self.model.train()
        self._optimizer.zero_grad()
        while self.epoch < self.epochs and not self.stopped:
            self._run_epoch()
        return self.history

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Measure the means of the loss and of its further measurements over batches, and the firing rate.

        The model runs in evaluation mode without gradients, and its modes are restored. Afterwards :attr:`rates` has
        the firing rate of each layer.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self._test_rates.clear()
        means = Means()
        try:
            self.model.eval()
            with torch.no_grad(), self._test_rates.measuring():
                for number, batch in enumerate(batches.epoch(0, 0, self.process, self.processes)):
                    size = share(batches.size(number), self.process, self.processes)
                    if size:
                        loss, measured = self._forward(self.model, self.evaluate_loss, batch)
                        means.add(size, {"loss": loss, **measured})
        finally:
            for module, training in modes:
                module.training = training
        means = Means.merged(self._gather(means.plain()))
        self._test_rates.restore(self._sum(self._test_rates.sums()))
        self.rates = self._test_rates.rates()
        return _row(means, self._test_rates)

    def state(self) -> dict[str, Any]:
        """Collect everything that a run needs to resume bit for bit, in tensors and plain values.

        Called in every process; only the main process gets a complete result.
        """
        rates = self._sum(self.train_rates.sums())
        # From here on the spikes of all processes are counted in the main one.
        self.train_rates.restore(rates if self.main else [0.0] * len(rates))
        optimizer = self._optimizer.state_dict()
        weights = [number for group in optimizer["param_groups"] for number in group["params"]]
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            # Weights without a gradient so far, so that an entry that is missing is known to be.
            "unmoved": [number for number in weights if number not in optimizer["state"]],
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "random": self._gather(random_state(self.accelerator.device)),
            "epoch": self.epoch,
            "step": self.step,
            "means": self._means.plain(),
            "rates": rates,
            "seconds": self._seconds,
            "history": [dict(row) for row in self.history],
        }

    def load_state(self, state: Mapping[str, Any], source: str = "the saved state") -> None:
        """Restore a state from :meth:`state`.

        With another number of processes the order of the data stays the same, but random numbers that are drawn in the
        model, such as those of dropout, change.

        Args:
            state: The state.
            source: Origin of the state, for the error. Default ``"the saved state"``.

        Raises:
            ValueError: The state is another model's or another run's, or a part of it is missing or of another kind;
                nothing is changed.
        """
        own = {"optimizer": self._optimizer, "scheduler": self.scheduler, "scaler": self._scaler}
        parts = {name: part for name, part in own.items() if part is not None}
        try:
            check_state(state, self._optimizer, self.scheduler, self._scaler, self.steps)
            random = random_state(self.accelerator.device)
            before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
            try:
                if self.process < len(state["random"]):
                    set_random_state(self.accelerator.device, state["random"][self.process])
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.load_model(state, "it")
            except BaseException:
                set_random_state(self.accelerator.device, random)
                for name, part in parts.items():
                    part.load_state_dict(before[name])
                raise
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{source} cannot be resumed from: {error}") from error
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self.history = [dict(row) for row in state["history"]]
        self._means = Means.merged([state["means"]])
        if len(state["rates"]) == len(self.train_rates.sums()):
            self.train_rates.restore(state["rates"] if self.main else [0.0] * len(state["rates"]))

    def load_model(self, state: Mapping[str, Any], source: str = "the saved state") -> None:
        """Restore only the model from a state of :meth:`state`, for example to evaluate it.

        Args:
            state: The state.
            source: Origin of the state, for the error. Default ``"the saved state"``.

        Raises:
            ValueError: The state is another model's; nothing is changed.
        """
        load_weights(self.model, state["model"], source)

    def so_far(self) -> dict[str, float]:
        """Compute the means of the current epoch over the samples that this process has seen."""
        return _row(self._means, self.train_rates)

    def best(self) -> bool:
        """Return whether the last epoch is the best so far by ``monitor``; among equals the first one is."""
        values = [row[self.monitor] for row in self.history if self.monitor in row]
        sign = -1 if self.monitor.endswith("loss") else 1
        return bool(values) and all(sign * values[-1] > sign * value for value in values[:-1])

    # -- one epoch -----------------------------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        began = time.perf_counter() - self._seconds
        batches = self.train.epoch(self.epoch, self.step * self.accumulation, self.process, self.processes)
        with self.train_rates.measuring():
            while self.step < self.steps:
                measured = self._run_step(list(islice(batches, self.accumulation)))
                self.step += 1
                self._seconds = time.perf_counter() - began
                if self.on_step is not None:
                    self.on_step(self, measured)
                due = bool(self.save_every) and self.step % self.save_every == 0
                if self.store is not None and (due or self.stopped) and self.step < self.steps:
                    self.store.save(self, best=False)
                if self.stopped and self.step < self.steps:
                    return
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        """Write the epoch's row of the history, evaluate, and save."""
        self.train_rates.restore(self._sum(self.train_rates.sums()))
        row = {"epoch": self.epoch + 1.0, **self.so_far(), "lr": self._last_lr, "seconds": self._seconds}
        if self.test is not None:
            row.update({f"test_{name}": value for name, value in self.evaluate(self.test).items()})
        self.history.append(row)
        self.epoch, self.step, self._seconds, self._means = self.epoch + 1, 0, 0.0, Means()
        self.train_rates.clear()
        if self.on_epoch is not None:
            self.on_epoch(self, row)
        self._agreed = any(self._gather(self._asked))
        if self.store is not None:
            self.store.save(self, best=self.best())

    # -- one step ------------------------------------------------------------------------------------------------------

    def _run_step(self, group: list[Any]) -> dict[str, float]:
        """Train on some batches, and return the means of what was measured on them."""
        random_before = torch_random(self.accelerator.device)
        samples, sums = self._accumulate(group)
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        measured, norm = self._measure(sums)
        # With loss scaling, gradients that overflow skip the step and lower the scale, while there is one to lower.
        skipped = self._scaler is not None and not math.isfinite(norm) and self._scaler.get_scale() > 1
        if not math.isfinite(measured["loss"]) or not (math.isfinite(norm) or skipped):
            set_torch_random(self.accelerator.device, random_before)
            where = f"training stopped at epoch {self.epoch + 1}, step {self.step + 1}"
            run = lambda model, batch: self._forward(model, self.loss, batch)[0]  # noqa: E731
            raise non_finite_error(self.model, group, run, where, measured["loss"], norm, self.processes)
        if not skipped:
            measured["gradient_norm"] = norm
        self._update(norm, skipped)
        self._means.add(samples, measured)
        return measured

    def _accumulate(self, group: list[Any]) -> tuple[int, dict[str, Any]]:
        """Add up the gradients of some batches; returns their samples, and this process's part of the means."""
        first = self.step * self.accumulation
        sizes = [self.train.size(first + place) for place in range(len(group))]
        sums: dict[str, Any] = {}
        for place, batch in enumerate(group):
            weight = share(sizes[place], self.process, self.processes) / sum(sizes)
            exchange = place == len(group) - 1 or self.processes == 1
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(self._wrapped):
                loss, measured = self._forward(self._wrapped, self.loss, batch)
                # DistributedDataParallel takes the mean over processes; this makes it the mean over samples.
                scale = weight * self.processes
                scaled = loss if scale == 1 else loss * scale
                (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
            for name, value in (("loss", loss.detach()), *measured.items()):
                value = value if weight == 1 else value * weight
                sums[name] = sums[name] + value if name in sums else value
        return sum(sizes), sums

    def _update(self, norm: float, skipped: bool) -> None:
        """Clip the gradients, then step the optimizer, the loss scale and the schedule."""
        if not skipped and self.clip_norm is not None and norm > self.clip_norm:
            torch._foreach_mul_(self._gradients(), self.clip_norm / norm)
        self._last_lr = float(self._optimizer.param_groups[0]["lr"])
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad()
        if self.scheduler is not None and not skipped:
            self.scheduler.step()

    def _measure(self, sums: dict[str, Any]) -> tuple[dict[str, float], float]:
        """Read the step's means over all processes and the norm of the gradient, in one transfer from the device.

        Also finds out whether any process was asked to stop.
        """
        gradients = self._gradients()
        if not gradients:
            raise ValueError(
                "no parameter that the optimizer was given has a gradient: the loss does not depend on any of them"
            )
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if norm.dtype != torch.float64:  # a float64 norm may exceed the range of float32
            norm = norm.float()
        if self.processes == 1 and norm.device.type == "cpu":
            return {name: float(value) for name, value in sums.items()}, norm.item()
        values = [*sums.values(), float(self._asked)]
        vector = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=norm.device).detach() for v in values])
        if self.processes > 1:
            vector = self.accelerator.reduce(vector, reduction="sum")
        *numbers, asked, length = torch.cat([vector.to(norm.dtype), norm[None]]).tolist()
        self._agreed = asked > 0
        return dict(zip(sums, numbers, strict=True)), length

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _forward(self, model: nn.Module, loss: Loss, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        if self.accelerator.device.type != "cpu":
            batch = accelerate().utils.send_to_device(batch, self.accelerator.device, non_blocking=True)
        if self.reset is not None:
            self.reset(self.model)
        with autocast_forward(self.model, self.accelerator.device.type, self.precision):
            result = loss(model, batch)
        return result if isinstance(result, tuple) else (result, {})

    def _gather(self, value: Any) -> list[Any]:
        return gather(value, self.processes)

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        return [sum(parts) for parts in zip(*self._gather(values), strict=True)]


def _row(means: Means, rates: FiringRates) -> dict[str, float]:
    row, rate = means.values(), rates.mean()
    return row if rate is None else {**row, "rate": rate}
