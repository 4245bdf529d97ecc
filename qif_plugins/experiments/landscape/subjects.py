"""Load what ``qif landscape`` measures: trained networks from files, and networks that a function returns."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.checkpoints import load_weights
from ...support.files import read_json
from ..checkpoints import COMPARE, EXACT_NETWORK, TRAIN, load_checkpoint
from ..compare.hosts import rebuild
from ..compare.training import encoder
from ..data.images import load_images

ADVICE = "pass --data-folder where they lie"
_FORMS = (
    "a folder that 'qif exact train' or 'qif train' wrote, a file of 'qif compare --save' or of 'qif train', or "
    "package.module:function"
)


@dataclass(frozen=True)
class Subject:
    """A network with a loss to measure.

    Attributes:
        source: Where it comes from, as given.
        title: Its name in tables and figures.
        network: In evaluation mode.
        loss: The mean loss over samples by their numbers in the training set.
        samples: Number of samples; 0 where the loss is over samples of its own.
        about: Settings and accuracy, where they are known.
    """

    source: str
    title: str
    network: nn.Module
    loss: Callable[[list[int]], Tensor]
    samples: int
    about: dict[str, Any] = field(default_factory=dict)


def load_subject(source: str, data_folder: Path | None = None) -> Subject:
    """Load the network that ``source`` names.

    Args:
        source: A folder with ``exact.pt`` or ``best.pt``, a file of ``qif compare --save`` or ``qif train``, or
            ``package.module:function``, which is called without arguments and returns (network, loss), the loss a
            function without arguments, as :func:`~.lines.along` takes it. Networks of files are
            computed in float64, in which no threshold is crossed by rounding.
        data_folder: Where the data lie, of the networks of ``qif compare`` and ``qif train``. Default: ``"data"``, and
            as in training.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file or the function is something else.
        ImportError: A package is missing.
    """
    path = Path(source)
    if not path.exists() and ":" in source:
        return _from_function(source)
    if path.is_dir():
        path = next((path / name for name in ("exact.pt", "best.pt") if (path / name).is_file()), path)
    if not path.is_file():
        problem = "holds no exact.pt and no best.pt" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}; pass {_FORMS}")
    content = load_checkpoint(path, TRAIN, COMPARE, EXACT_NETWORK, way_out=f"pass {_FORMS}")
    loaded = {TRAIN: _of_training, COMPARE: _of_comparison, EXACT_NETWORK: _exact}[content["kind"]]
    return loaded(source, path, content, data_folder)


def _exact(source: str, path: Path, content: dict[str, Any], data_folder: Path | None) -> Subject:
    from ...exact.adjoint import EventBudgetError
    from ..exact.data import load, select
    from ..exact.settings import Settings
    from ..exact.train import build, classification_loss

    settings, saved = Settings(**content["settings"]), content["data"]
    data = load(
        saved["name"], settings.duration, settings.latest, saved["root"] and Path(saved["root"]), saved["limit"],
        saved["split"],
    )  # fmt: skip
    network = build(settings, data.train.channels, data.classes)
    load_weights(network, content["network"], str(path))

    def loss(samples: list[int]) -> Tensor:
        chosen = torch.tensor(samples, device="cpu")
        try:
            out = network(select(data.train, chosen))
        except EventBudgetError as error:
            raise ValueError(
                f"{source} emits more than {error.max_spikes} spikes in one sample; pass a smaller --radius"
            ) from error
        return classification_loss(out, data.train_labels[chosen], settings)

    about = {"kind": "exact", "data": saved["name"], "settings": content["settings"]}
    history = path.with_name("exact.json")
    if history.is_file():
        parts = {"history": [{"accuracy": float}]}
        about["accuracy"] = read_json(history, "no file of 'qif exact train'", parts)["history"][-1]["accuracy"]
    return Subject(source, f"{settings.neuron.upper()}, exact", network.eval(), loss, len(data.train_labels), about)


def _of_comparison(source: str, path: Path, content: dict[str, Any], data_folder: Path | None) -> Subject:
    images = load_images(content["data"], data_folder or "data", advice=ADVICE)
    host, network = rebuild(path, content, images)
    network.double()
    encode = encoder(images, content["steps"])

    def loss(samples: list[int]) -> Tensor:
        host.clear(network)
        logits = network(encode(images.train[samples]).double()).mean(0)
        return F.cross_entropy(logits, images.train_labels[samples])

    names = ("host", "neuron", "window", "seed", "epochs", "steps", "data")
    about = {"kind": "surrogate", **{name: content[name] for name in names}}
    about["accuracy"] = content["last_epoch"]["accuracy"]
    title = f"{content['neuron']} ({content['window']}), {content['host']}"
    return Subject(source, title, network, loss, len(images.train), about)


def _of_training(source: str, path: Path, content: dict[str, Any], data_folder: Path | None) -> Subject:
    from ..training.config import from_dict
    from ..training.session import make_loss, prepare

    trained = from_dict(content["config"], path)
    # Without augmentation.
    data = replace(trained.data, augment=(), folder=str(data_folder or trained.data.folder))
    config = replace(trained, data=data)
    network, task = prepare(config, content["data"], (ADVICE, ""), train=False)
    load_weights(network, content["state"]["model"], str(path))
    network.double()
    of_batch = make_loss(config)

    def loss(samples: list[int]) -> Tensor:
        x, labels = task.train.fetch(torch.tensor(samples, device="cpu"), 0)
        return of_batch(network, (x.double(), labels))[0]

    about = {"kind": "surrogate", "host": "spikingjelly", "config": content["config"]}
    history = content["state"]["history"]
    if history and "test_accuracy" in history[-1]:
        about["accuracy"] = history[-1]["test_accuracy"]
    title = f"{config.neuron.get('name', 'qif').upper()}, {config.model['name']}"
    return Subject(source, title, network.eval(), loss, task.train.count, about)


def _from_function(source: str) -> Subject:
    module_name, _, name = source.partition(":")
    # As with python -m, modules in the current folder are found.
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    finally:
        sys.path.remove("")
    if not callable(function):
        raise ValueError(f"{module_name} has no function {name!r}; pass package.module:function")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ValueError(f"{source} must return (network, loss), a module and a function without arguments")
    network, loss = made
    return Subject(
        source, f"{type(network).__name__}, {name}", network, lambda samples: loss(), 0, {"kind": "function"}
    )
