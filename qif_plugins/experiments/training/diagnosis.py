"""Find the layer that made the first NaN or infinity, by running a batch again and checking all tensors in between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...diagnostics.health import health
from ...neuron.module import QIFLayer

ADVICE = "Lower the learning rate, or scale large gradients down to a smaller norm."
HEALTH = "qif_plugins.health(model, batch) shows membranes, rates and windows layer by layer and says what to change."
MOST_ADVICE = 3
"""Sentences of health's advice in an error."""


class Finding(NamedTuple):
    """The first value that is not finite: its layer ("" outside of layers), the pass, and one sentence about it."""

    layer: str
    phase: str
    what: str


class NonFiniteError(ValueError):
    """A loss or a gradient was not finite.

    Attributes:
        layer: Name of the layer that made the first value that is not finite; "" if it was not in a layer, or if the
            batch gave finite values when it was run again.
        phase: ``"forward"`` or ``"backward"``.
    """

    def __init__(self, message: str, layer: str, phase: str) -> None:
        super().__init__(message)
        self.layer, self.phase = layer, phase


def non_finite_error(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], where: str, value: float,
    norm: float, processes: int,
) -> NonFiniteError:  # fmt: skip
    """Explain a step whose loss or gradient is not finite.

    Args:
        model: The model; its gradients are removed.
        batches: The step's batches in this process.
        loss: Runs the model on a batch and returns the scalar to differentiate.
        where: The place in the training, for the message.
        value: The step's loss.
        norm: The norm of the step's gradient.
        processes: Number of training processes.

    Returns:
        The error to raise, with advice on QIF layers from :func:`~qif_plugins.health`.
    """
    batches = list(batches)
    finding = next(filter(None, (find_non_finite(model, batch, loss) for batch in batches)), None)
    model.zero_grad(set_to_none=True)
    advice = f"{ADVICE}{_advice_of_health(model, batches[0], loss)}"
    what = f"the loss is {value:.4g}" if not math.isfinite(value) else f"the norm of the gradient is {norm}"
    if finding is None:
        reason = "a batch of another process" if processes > 1 else "the same batch gave finite values again"
        return NonFiniteError(f"{where}: {what} ({reason}). {advice}", "", "forward")
    return NonFiniteError(
        f"{where}: {what}. It began in the {finding.phase} pass: {finding.what}. {advice}",
        finding.layer, finding.phase,
    )  # fmt: skip


def _advice_of_health(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> str:
    if not any(isinstance(module, QIFLayer) for module in model.modules()):
        return ""
    try:
        report = health(model, lambda model: loss(model, batch))
    except (ValueError, TypeError, RuntimeError):
        return f" {HEALTH}"
    lines = [f"{row.name}: {sentence}" for row in report.layers for sentence in row.advice]
    return " ".join(["", HEALTH, *lines[:MOST_ADVICE]])


def find_non_finite(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Finding | None:
    """Run a batch forward and backward and name the layer that made the first NaN or infinity.

    Gradients are overwritten and buffers move on, as in any training step.

    Args:
        model: The model.
        batch: The batch, as ``loss`` takes it.
        loss: Runs the model and returns the scalar to differentiate.

    Returns:
        The first such place, ``None`` if everything is finite.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not _finite(tensor):
            layer = name.rpartition(".")[0]
            return Finding(layer, "forward", f"{_kind(model, layer)} holds {name!r} that is not finite before the step")
    if not all(map(_finite, _tensors(batch))):
        return Finding("", "forward", "the batch itself holds values that are not finite; look at the data")
    model.zero_grad(set_to_none=True)
    search = _Search(model)
    with search.looking():
        value = loss(model, batch)
        if search.found is None and not _finite(value):
            search.found = Finding(
                "", "forward",
                f"the loss is {value.item()}, of outputs that every layer left finite (the largest is "
                f"{search.largest:.3g}); look at the loss",
            )  # fmt: skip
        if search.found is None:
            value.backward()
    return search.found or search.of_parameters()


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: Finding | None = None
        self.largest = math.nan
        self.makers: dict[int, list[str]] = {}
        self.takers: dict[int, list[str]] = {}
        self.kept: list[Tensor] = []
        """Tensors that are followed, kept alive so that no other tensor gets the id of one of them."""

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                stack.callback(module.register_forward_hook(partial(self._leave, name)).remove)
            yield

    def of_parameters(self) -> Finding | None:
        """Find a parameter whose gradient is not finite although the gradient of its layer's output is."""
        for name, parameter in reversed(list(self.model.named_parameters())):
            layer = name.rpartition(".")[0]
            if parameter.grad is not None and not _finite(parameter.grad):
                return Finding(
                    layer, "backward", f"{_kind(self.model, layer)} made the gradient of {name!r} not finite"
                )
        return None

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        what = (
            f"the input of {_kind(self.model, name)} is not finite, though every layer before it gave finite values: "
            "an operation between layers made it"
        )
        self._look(name, args, self.takers, what)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._look(name, output, self.makers, f"{_kind(self.model, name)} made it from finite input")
        if not name:
            self.largest = max(
                (tensor.detach().abs().max().item() for tensor in _tensors(output) if tensor.numel()), default=math.nan
            )

    def _look(self, name: str, value: Any, roles: dict[int, list[str]], what: str) -> None:
        for tensor in _tensors(value):
            if self.found is None and not _finite(tensor):
                self.found = Finding(name, "forward", what)
            self._follow(tensor, roles, name)

    def _follow(self, tensor: Tensor, roles: dict[int, list[str]], name: str) -> None:
        if not tensor.requires_grad:
            return
        key = id(tensor)
        if key not in self.makers and key not in self.takers:
            self.kept.append(tensor)
            tensor.register_hook(lambda gradient: self._arrived(gradient, key))
        roles.setdefault(key, []).append(name)

    def _arrived(self, gradient: Tensor, key: int) -> None:
        """Check a gradient. The last layer's come first, so a layer that takes the tensor made the first bad one."""
        if self.found is not None or _finite(gradient):
            return
        takers = _innermost(self.takers.get(key, []))
        if takers:
            layers = " or ".join(_kind(self.model, name) for name in takers)
            self.found = Finding(takers[-1], "backward", f"{layers} made it from a finite gradient")
            return
        layer = _kind(self.model, self.makers[key][0])
        self.found = Finding(
            self.makers[key][0], "backward",
            f"the gradient that reaches the output of {layer} is not finite, and no layer after it made it: the loss "
            "or an operation between layers did",
        )  # fmt: skip


def _innermost(names: list[str]) -> list[str]:
    return [n for n in names if not any(m != n and (not n or m.startswith(n + ".")) for m in names)]


def _kind(model: nn.Module, name: str) -> str:
    return f"layer {name!r} ({type(model.get_submodule(name)).__name__})" if name else f"the {type(model).__name__}"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all()) if tensor.is_floating_point() else True


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in tuples, lists and dictionaries.

    Other objects are skipped, since infinity may be an ordinary value in them, such as the time of a missing spike.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
