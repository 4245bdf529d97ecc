"""Measure losses and slopes on lines and planes in parameter space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...convert.trial import reset_state
from ...diagnostics.running import preserved

Loss = Callable[[], Tensor]
Direction = Mapping[str, Tensor]
Move = Callable[[Sequence[float], Sequence[Direction], Loss], tuple[float, dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Line:
    """A loss on an equidistant grid along a direction.

    Attributes:
        positions: [P], multiples of the direction.
        loss: [P].
        slope: [P], the gradient that backward gives, along the direction.
    """

    positions: Tensor
    loss: Tensor
    slope: Tensor

    def unexplained(self) -> Tensor:
        """Compute [P - 1], the part of the loss's change between neighbours that their slopes do not explain.

        By the trapezoidal rule or by that with its end correction (the slope's own differences), whichever leaves less:
        as the grid refines, the magnitude shrinks with the fifth power of the step where the loss is smooth, with the
        step at a kink and where the slope is not that of the loss (a surrogate's), and not at all at a jump.
        """
        step = self.positions.diff()
        plain = self.loss.diff() - step * (self.slope[1:] + self.slope[:-1]) / 2
        if len(self.positions) < 3:
            return plain
        bend = torch.gradient(self.slope, spacing=(self.positions,), edge_order=2)[0].diff()
        corrected = plain + step.square() / 12 * bend
        return torch.where(corrected.abs() < plain.abs(), corrected, plain)

    def coarse(self, refine: int) -> Line:
        """Take every ``refine``-th position."""
        return Line(self.positions[::refine], self.loss[::refine], self.slope[::refine])


@dataclass(frozen=True, eq=False)
class Plane:
    """A loss over the plane of two directions.

    Attributes:
        positions: [P] and [Q], multiples of the first and of the second direction.
        loss: [P, Q].
        slope: [P, Q, 2], along either direction.
    """

    positions: tuple[Tensor, Tensor]
    loss: Tensor
    slope: Tensor

    def lines(self, axis: int) -> list[Line]:
        """List the lines of the grid along direction ``axis``, 0 or 1, one for each position of the other."""
        losses, slopes = self.loss.movedim(axis, 1), self.slope[..., axis].movedim(axis, 1)
        return [Line(self.positions[axis], loss, slope) for loss, slope in zip(losses, slopes, strict=True)]


def along(network: nn.Module, loss: Loss, direction: Direction, positions: Tensor) -> Line:
    """Measure the loss and its slope along a direction.

    Args:
        network: Changed while measuring, and restored.
        loss: Evaluates the loss of ``network``, a scalar with a gradient.
        direction: From :func:`random_direction`, :func:`gradient_direction` or :func:`between`.
        positions: [P], ascending and equidistant; 0 is the network as it is.

    Returns:
        The line.

    Raises:
        ValueError: A loss that is not a finite scalar, positions that do not ascend, or a direction that is not one of
            this network.
    """
    _check(positions)
    values, slopes = [], []
    with moving(network) as move:
        for position in positions.tolist():
            value, gradient = move([position], [direction], loss)
            values.append(value)
            slopes.append(slope_along(gradient, direction))
    found = (torch.tensor(column, dtype=torch.float64, device="cpu") for column in (values, slopes))
    return Line(positions, *found)


def over_plane(
    network: nn.Module, loss: Loss, directions: tuple[Direction, Direction], positions: tuple[Tensor, Tensor]
) -> Plane:
    """Measure the loss and its slopes over the plane of two directions; otherwise as :func:`along`."""
    for line in positions:
        _check(line)
    shape = [len(line) for line in positions]
    values, slopes = (torch.empty(size, dtype=torch.float64, device="cpu") for size in (shape, (*shape, 2)))
    with moving(network) as move:
        for i, x in enumerate(positions[0].tolist()):
            for j, y in enumerate(positions[1].tolist()):
                values[i, j], gradient = move([x, y], directions, loss)
                for axis, direction in enumerate(directions):
                    slopes[i, j, axis] = slope_along(gradient, direction)
    return Plane(positions, values, slopes)


@contextmanager
def moving(network: nn.Module) -> Iterator[Move]:
    """Provide a function that evaluates loss and gradient elsewhere; everything is restored at the end."""
    # Only what is in the state: hosts keep membranes in buffers, too, whose size changes with the batch.
    state = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"{type(network).__name__} has no trainable parameters, so there is nothing to move along")
    origin = {name: tensor.detach().clone() for name, tensor in state.items()}

    def move(
        positions: Sequence[float], directions: Sequence[Direction], loss: Loss
    ) -> tuple[float, dict[str, Tensor]]:
        for direction in directions:
            _check_direction(direction, origin)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(origin[name])
                for position, direction in zip(positions, directions, strict=True):
                    if name in direction:
                        tensor.add_(direction[name], alpha=position)
        reset_state(network)
        torch.manual_seed(0)
        with torch.enable_grad():
            value = loss()
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                raise ValueError(
                    f"the loss must be a scalar tensor with a gradient by the network's parameters, got {value!r:.80}"
                )
            if not math.isfinite(value.detach()):
                place = ", ".join(f"{position:g}" for position in positions) or "0"
                raise ValueError(f"the loss is {float(value.detach())} at {place}; take a smaller radius")
            grads = torch.autograd.grad(value.sum(), list(trainable.values()), allow_unused=True)
        return float(value.detach()), {
            name: torch.zeros_like(parameter) if grad is None else grad
            for grad, (name, parameter) in zip(grads, trainable.items(), strict=True)
        }

    with preserved(network):
        try:
            yield move
        finally:
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(origin[name])


def slope_along(gradient: Direction, direction: Direction) -> float:
    """Compute the inner product; buffers, which move without a gradient, do not count."""
    return sum(float((grad * direction[name]).sum()) for name, grad in gradient.items() if name in direction)


def _check(positions: Tensor) -> None:
    step = positions.diff()
    if len(positions) < 2 or not bool((step > 0).all()) or not torch.allclose(step, step[:1].expand_as(step)):
        raise ValueError("positions must be at least two, ascending and equidistant; torch.linspace makes them")


def _check_direction(direction: Direction, origin: Mapping[str, Tensor]) -> None:
    for name, part in direction.items():
        if name not in origin or part.shape != origin[name].shape:
            have = f"one of shape {list(origin[name].shape)}" if name in origin else "none"
            raise ValueError(
                f"the direction moves {name} of shape {list(part.shape)}, and the network has {have}; make the "
                "direction from the same network"
            )
