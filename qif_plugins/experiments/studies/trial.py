"""Train a perceptron on a small image set, described by a setting of plain JSON values, as most studies do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...models import build
from ...neuron.parameters import QIFParameters
from ...support.names import check_known
from ..data.images import Images, load_images
from ..records import Setting
from ..training import Batches, NonFiniteError, Trainer
from ..training.config import OptimizerConfig
from ..training.session import make_optimizer

try:
    from spikingjelly.activation_based import functional, surrogate
except ImportError as error:
    raise ImportError("the studies train SpikingJelly's layers: pip install 'qif-plugins[study]'") from error

_adapter: Any = importlib.import_module("qif_plugins.adapters.spikingjelly")
AnalyticWindow, QIFNode = _adapter.AnalyticWindow, _adapter.QIFNode

GOAL = 0.9
"""Accuracy; the first epoch that reaches it is recorded."""
LIF_TAU = 2.0
LIMIT = 1e-6
"""Curvature of the QIF map that takes the place of LIF's: in the limit 0 QIFParameters.matching_lif is LIF."""

LEARNING = {"lr": 2e-3, "weight_decay": 0.0, "detach_reset": False}
"""Entries of settings that are the same in all studies that do not vary them."""
Observer = Callable[[nn.Module, int], None]
"""Called with the network before training (epoch 0) and after every epoch."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples, the first dimension theirs, with their classes."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, eq=False)
class Data(Samples):
    """Normalized images ``[N, features]`` with their classes."""

    shape: tuple[int, int, int]
    classes: int


@lru_cache(maxsize=2)
def data_of(name: str, validation: bool = False) -> Data:
    """Load and normalize a data set of :mod:`qif_plugins.experiments.data.images`.

    Args:
        name: ``"digits"`` or ``"mnist5k"``.
        validation: Whether to hold back the last fifth of the training images and test on it, so that a search never
            sees the test images.
    """
    images = load_images(name)
    if validation:
        images = _held_back(images)
    x, test_x = (part.flatten(1) for part in images.normalized())
    _, channels, height, width = images.train.shape
    return Data(x, images.train_labels, test_x, images.test_labels, (channels, height, width), images.classes)


def _held_back(images: Images) -> Images:
    cut = len(images.train) * 4 // 5
    x, y = images.train, images.train_labels
    return replace(images, train=x[:cut], train_labels=y[:cut], test=x[cut:], test_labels=y[cut:])


def perceptrons(quick: bool, epochs: int = 6) -> Setting:
    """Return the entries that the settings of all studies of perceptrons share, in the tiny version and in the whole.

    Args:
        quick: Whether for the tiny version.
        epochs: Epochs of the whole one. Default 6.
    """
    size = {"data": "digits", "width": 32, "epochs": 1}
    if not quick:
        size = {"data": "mnist5k", "width": 128, "epochs": epochs}
    return {**size, "norm": "tdbn", "steps": 4, "batch_size": 64, "optimizer": "adam"}


def surrogate_named(name: str, width: float, params: QIFParameters) -> nn.Module:
    """Make a surrogate for a neuron whose input tdBN scales to the threshold.

    Args:
        name: ``"paper"``, ``"unbiased"``, ``"heuristic"`` or ``"atan"``.
        width: Width of the window relative to the usual one of that name: ``"unbiased"`` has κ = width/2,
            ``"heuristic"`` α = width, ``"atan"`` SpikingJelly's α = 2/width. ``"paper"`` ignores it.
        params: The neuron as a QIF map; a LIF neuron as its limit, see :data:`LIMIT`.

    Raises:
        ValueError: Unknown name.
    """
    check_known("surrogate", ("paper", "unbiased", "heuristic", "atan"), name)
    input_std = params.input_gain * params.v_threshold
    if name == "atan":
        module: nn.Module = surrogate.ATan(alpha=2.0 / width)
        return module
    if name == "heuristic":
        return AnalyticWindow.heuristic(params, alpha=width)
    if name == "unbiased":
        return AnalyticWindow.unbiased(params, input_std, kappa=width / 2)
    return AnalyticWindow.paper(params, input_std)


def make(setting: dict[str, Any]) -> nn.Module:
    """Build the network of a setting, with weights drawn from its seed.

    ``neuron`` is a name of :data:`qif_plugins.models.NEURONS`, ``neuron_args`` its arguments, ``surrogate`` and
    ``surrogate_width`` as :func:`surrogate_named` takes them (left out: ``"unbiased"``).
    """
    data = data_of(setting["data"])
    arguments: dict[str, Any] = {"detach_reset": setting["detach_reset"], **setting.get("neuron_args", {})}
    if setting["neuron"] != "lif":  # the neuron and the window of the studies, where a setting names no other
        arguments |= {} if arguments.keys() & {"tau", "dynamics"} else {"dynamics": "paper"}
        arguments |= {} if "surrogate" in setting else {"window": "unbiased"}
    if "surrogate" in setting:
        params = as_map(setting["neuron"], arguments)
        arguments["surrogate_function"] = surrogate_named(
            setting["surrogate"], setting.get("surrogate_width", 1.0), params
        )
    torch.manual_seed(setting["seed"])
    return build(
        "perceptron", data.shape, data.classes, setting["neuron"], layers=setting["layers"], width=setting["width"],
        norm=setting["norm"], **arguments,
    )  # fmt: skip


def as_map(neuron: str, arguments: dict[str, Any]) -> QIFParameters:
    """Describe the neuron as a QIF map: QIF by its own parameters, LIF as the limit of vanishing curvature."""
    if neuron == "lif":
        tau = arguments.get("tau", LIF_TAU)
        gain = 1 / tau if arguments.get("decay_input", False) else 1.0
        return QIFParameters.matching_lif(
            1 - 1 / tau, arguments.get("v_threshold", 1.0), curvature=LIMIT, input_gain=gain
        )
    kept = ("tau", "decay_input", "v_threshold", "dynamics")
    return QIFNode(**{name: arguments[name] for name in kept if name in arguments}).params


def outputs(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Compute the mean output ``[N, classes]`` over ``steps`` steps of the constant input ``x``, from rest."""
    functional.reset_net(model)
    result: Tensor = model(x.expand(steps, *x.shape)).mean(0)
    return result


def train(setting: dict[str, Any], observe: Observer | None = None, model: nn.Module | None = None) -> dict[str, Any]:
    """Train and test one network.

    Args:
        setting: ``data``, ``validation``, ``neuron`` (see :func:`make`), ``layers``, ``width``, ``norm``, ``steps``,
            ``epochs``, ``batch_size``, ``optimizer`` (``"adam"`` with decoupled weight decay, or ``"sgd"`` with
            momentum 0.9), ``lr``, which a cosine takes to 0, ``weight_decay``, ``detach_reset``, ``seed``.
        observe: Called with the network before training and after every epoch.
        model: The network of :func:`make`, if the caller has made it already.

    Returns:
        ``accuracy`` on the test (or validation) images after the last epoch, ``accuracies`` and ``losses`` by epoch,
        ``rate`` in spikes a neuron-step, ``epochs_to_goal`` (``None`` if not reached); ``diverged`` instead, with the
        layer, where a value stopped being finite. The accuracy is then that of guessing.
    """
    data = data_of(setting["data"], setting.get("validation", False))
    model = make(setting) if model is None else model
    steps = setting["steps"]

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        x, labels = batch
        scores = outputs(model, x, steps)
        accuracy = (scores.argmax(1) == labels).float().mean()
        return nn.functional.cross_entropy(scores, labels), {"accuracy": float(accuracy)}

    batches = Batches.of(data.x, data.y, batch_size=setting["batch_size"], seed=setting["seed"])
    test = Batches.of(data.test_x, data.test_y, batch_size=500, shuffle=False)
    trainer = trainer_of(
        setting, model, loss, batches, test=test,
        on_epoch=None if observe is None else lambda trainer, row: observe(trainer.model, int(row["epoch"])),
    )  # fmt: skip
    if observe is not None:
        observe(model, 0)
    try:
        rows = trainer.fit()
    except NonFiniteError as error:
        return {"accuracy": 1 / data.classes, "epochs_to_goal": None, "diverged": error.layer}
    accuracies = [row["test_accuracy"] for row in rows]
    return {
        "accuracy": accuracies[-1],
        "accuracies": accuracies,
        "losses": [row["loss"] for row in rows],
        "rate": rows[-1]["test_rate"],
        "epochs_to_goal": next((epoch for epoch, value in enumerate(accuracies, 1) if value >= GOAL), None),
    }


def trainer_of(
    setting: Setting, model: nn.Module, loss: Callable[[nn.Module, Any], Any], batches: Batches, **options: Any
) -> Trainer:
    """Make the trainer of a setting: its optimizer, and a cosine that takes the learning rate to 0.

    Args:
        setting: ``lr``, ``epochs``, and unless they are Adam and 0, ``optimizer`` and ``weight_decay``; see
            :func:`train`.
        model: The network.
        loss: See :class:`~qif_plugins.experiments.training.Trainer`.
        batches: Training batches.
        options: Further arguments of the trainer.
    """
    kind = "sgd" if setting.get("optimizer") == "sgd" else "adamw"
    optimizer = make_optimizer(
        OptimizerConfig(kind, setting["lr"], weight_decay=setting.get("weight_decay", 0.0)), model
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting["epochs"] * len(batches))
    return Trainer(
        model, optimizer, loss, batches, scheduler=schedule, epochs=setting["epochs"], train_rates=False, **options
    )
