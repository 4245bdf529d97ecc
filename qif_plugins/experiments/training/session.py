"""Make the model, data, optimizer, schedule and trainer of a configuration."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..names import SEQUENCES
from .arguments import arguments_of, checked
from .batches import seed_of
from .config import Config, OptimizerConfig
from .data import ADVICE, Advice, Task, expected_shape, load_task, samples_of
from .engine import Trainer
from .losses import SequenceLoss
from .processes import main_process_first
from .sizes import activations, check_memory, memory_here, weights
from .synchronized import synchronize_batch_norm

try:
    from spikingjelly.activation_based import functional, surrogate
except ImportError as error:
    raise ImportError(
        "the models that are trained are built on SpikingJelly: pip install 'qif-plugins[train]'"
    ) from error

from ...models import MODELS, NEURONS, build
from ...support.text import shown


def build_model(config: Config, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build the model of a configuration, with weights drawn from its seed.

    Raises:
        ValueError: The model or the neuron does not have an argument, or refuses its value.
    """
    seed = config.training.seed
    own, neuron = _nulls(config.model), _nulls(config.neuron)
    name, spiking_neuron = own.pop("name"), neuron.pop("name", "qif")
    both = sorted(own.keys() & neuron.keys())
    if both:
        raise ValueError(f"{both[0]} is in both [model] and [neuron]; remove one of them")
    if name in MODELS and spiking_neuron in NEURONS:  # build says what there is
        of_neuron = {**arguments_of(NEURONS[spiking_neuron][0]), "per_channel": bool}
        has_channels = bool(of_neuron.pop("channels", False))  # each layer has its own number of them
        own = checked("model", own, {**arguments_of(MODELS[name]), **of_neuron})
        neuron = checked("neuron", neuron, of_neuron)
        if (own | neuron).get("per_channel") and not has_channels:
            raise ValueError(f"neuron.per_channel needs a neuron with numbers per channel, got {spiking_neuron!r}")
    for table in (own, neuron):
        if table.get("surrogate_function") is not None:
            table["surrogate_function"] = _surrogate(table["surrogate_function"])
    try:
        _check_size(config, build, name, shape, classes, spiking_neuron, **own, **neuron)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        model: nn.Module = build(name, shape, classes, spiking_neuron, **own, **neuron)
    except (TypeError, AssertionError, AttributeError, ArithmeticError) as error:  # as hosts refuse arguments
        reason = str(error) or f"refuses {', '.join(f'{key} = {value!r}' for key, value in (own | neuron).items())}"
        raise ValueError(f"model {name!r} with neuron {spiking_neuron!r}: {reason}") from error
    return synchronize_batch_norm(model) if config.training.sync_batch_norm else model


def _check_size(config: Config, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
    """Raise ``ValueError`` if the weights, their gradients and the optimizer's state do not fit into memory."""
    sizes = {f"model.{key}": value for key, value in config.model.items() if type(value) in (int, list)}
    sizes |= {"data.size": config.data.size} if config.data.size else {}
    given = ", ".join(f"{key} = {shown(value)}" for key, value in sizes.items()) or f"model.name = {args[0]!r}"
    try:
        with torch.device("meta"):
            needed: float = weights(make(*args, **kwargs))
    except RuntimeError:  # more bytes than PyTorch counts
        needed = math.inf
    moments = {"sgd": int(config.optimizer.momentum > 0)}.get(config.optimizer.name, 2)
    check_memory(
        needed * (2 + moments), f"{given}: the weights, their gradients and what the optimizer keeps of them take",
        "lower it, or leave it at its default",
    )  # fmt: skip


def prepare(
    config: Config, record: Mapping[str, Any] | None = None, advice: Advice = ADVICE, *, train: bool = True
) -> tuple[nn.Module, Task]:
    """Build the model and load the data of a configuration.

    Errors in the arguments of the model and the neuron are raised before the data are touched.

    Args:
        config: The run.
        record: Record of a :class:`~.data.Task` from a checkpoint, to divide the data in the same way. Default: none.
        advice: Two remedies for missing data, for the error: to name their folder, and to download them.
        train: Whether the model will be trained, which needs memory for the backward pass. Default True.

    Raises:
        ValueError: The model or the neuron refuses an argument, or there is too little memory.
        FileNotFoundError: The data are missing.
    """
    model = build_model(config, *expected_shape(config.data))
    training = config.training
    if train:
        _check_batch(config, model)
    with main_process_first():
        batch_size = training.batch_size // training.accumulation
        task = load_task(config.data, batch_size, training.seed, dict(record or {}), advice)
    if train and not samples_of(config.data):
        _check_batch_size(config, task.train.count)
    if (task.shape, task.classes) != expected_shape(config.data):
        model = build_model(config, task.shape, task.classes)
    return model, task


def on_other_data(trained: Config, name: str | None, folder: Path | None) -> Config:
    """Change the data set or its folder of a trained model's configuration.

    Raises:
        ValueError: The data set has another shape or number of classes than the one that the model was trained on.
    """
    given: dict[str, Any] = {"name": name, "folder": None if folder is None else str(folder)}
    config = replace(trained, data=replace(trained.data, **{k: v for k, v in given.items() if v is not None}))
    if expected_shape(config.data) != expected_shape(trained.data):
        raise ValueError(
            f"the model was trained on {trained.data.name} {expected_shape(trained.data)}, and {config.data.name} is "
            f"{expected_shape(config.data)}: shape and classes must be the same"
        )
    return config


def _check_batch_size(config: Config, samples: int) -> None:
    batch_size = config.training.batch_size
    if samples and batch_size > samples:
        raise ValueError(
            f"training.batch_size must be at most {samples}, the training samples of {config.data.name}, got "
            f"{batch_size}"
        )


def _check_batch(config: Config, model: nn.Module) -> None:
    """Raise ``ValueError`` for a batch larger than the data, or one whose activations do not fit into memory."""
    data, training = config.data, config.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    _check_batch_size(config, samples_of(data))
    samples = -(-training.batch_size // (training.accumulation * processes))
    size = 2 if training.precision in ("bf16", "fp16") else 4
    image = expected_shape(data)[0]
    numbers: float = math.prod(image)
    if size * numbers < memory_here():
        try:
            numbers = activations(model, image, functional.reset_net)
        except RuntimeError:  # not even one sample fits
            numbers = math.inf
    shape = f"data.size = {data.size}, " if data.size else ""
    check_memory(
        size * data.steps * samples * numbers,
        f"{shape}data.steps = {data.steps} and training.batch_size = {training.batch_size}: {samples} samples of "
        f"{data.steps} steps take",
        "lower one of them, or raise training.accumulation",
    )


def make_trainer(config: Config, model: nn.Module, task: Task, **options: Any) -> Trainer:
    """Make the trainer of a model on a task.

    Args:
        config: The run.
        model: From :func:`prepare`.
        task: From :func:`prepare`.
        options: Further arguments of :class:`~.engine.Trainer`.
    """
    training = config.training
    if training.threads:
        torch.set_num_threads(training.threads)
    # A resumed run goes the same way on GPUs too.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    optimizer = make_optimizer(config.optimizer, model)
    steps = -(-len(task.train) // training.accumulation)
    trainer = Trainer(
        model, optimizer, make_loss(config), task.train, test=task.test,
        scheduler=make_schedule(config.optimizer, optimizer, steps, training.epochs),
        epochs=training.epochs, accumulation=training.accumulation, precision=training.precision,
        clip_norm=config.optimizer.clip_norm, reset=functional.reset_net, save_every=training.save_every, cpu=False,
        **options,
    )  # fmt: skip
    # Random numbers of a running model, such as those of dropout, differ between processes.
    torch.manual_seed(seed_of(training.seed, trainer.process))
    return trainer


def make_loss(config: Config) -> SequenceLoss:
    """Make the loss of a configuration, which repeats static images over its time steps."""
    data, loss = config.data, config.loss
    steps = None if data.name in SEQUENCES else data.steps
    return SequenceLoss(loss.name, steps, loss.regularization, loss.target)


def make_optimizer(settings: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a configuration, for all parameters of a model."""
    if settings.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(model.parameters(), settings.lr, weight_decay=settings.weight_decay)


def make_schedule(
    settings: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int, epochs: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the schedule of the learning rate, in steps of the optimizer.

    Args:
        settings: The table ``[optimizer]``.
        optimizer: The optimizer.
        steps: Steps in an epoch.
        epochs: Epochs of the whole schedule.
    """
    warmup = settings.warmup_epochs * steps
    after = max(1.0, epochs * steps - warmup)

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / after)))

    def stairs(step: int) -> float:
        return settings.gamma ** sum(step >= milestone * steps for milestone in settings.milestones)

    shapes: dict[str, Callable[[int], float]] = {"cosine": cosine, "steps": stairs, "constant": lambda step: 1.0}
    shape = shapes[settings.schedule]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else shape(step)
    )


def follow_schedule(trainer: Trainer) -> tuple[float, float]:
    """Set the learning rate to the schedule's value for the next step, after loading a state with another schedule.

    Args:
        trainer: From :func:`make_trainer`, its state loaded.

    Returns:
        The learning rate as the state had it, and as it is now.
    """
    schedule = cast(torch.optim.lr_scheduler.LambdaLR, trainer.scheduler)
    old = schedule.optimizer.param_groups[0]["lr"]
    for group, base, shape in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * shape(schedule.last_epoch)
    return float(old), float(schedule.optimizer.param_groups[0]["lr"])


def _nulls(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value == "none" else value for key, value in table.items()}


def _surrogate(value: Any) -> Any:
    """Make a surrogate of SpikingJelly from its name, or from a table of its name and arguments."""
    table = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = table.pop("name", None)
    kind = getattr(surrogate, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or kind.__name__.endswith("Base"):
        raise ValueError(
            f"unknown surrogate {name!r}; choose from the classes of spikingjelly.activation_based.surrogate, such as "
            "ATan or Sigmoid, or leave surrogate_function out for the isometric Gaussian"
        )
    try:
        return kind(**checked("neuron.surrogate_function", table, arguments_of(kind)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"surrogate {name!r}: {error}") from error
