"""Make directions in parameter space: a tensor for each parameter or buffer that moves, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .lines import Direction, Loss, moving


def random_direction(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw a filter-normalised random direction (Li et al., *Visualizing the Loss Landscape of Neural Nets*, 2018).

    Each row of a parameter (the weights of one neuron or filter) has the norm of the network's own row; a vector, such
    as the biases of a layer, has its own norm as a whole.

    Args:
        network: The network whose trainable parameters give the shapes and norms.
        seed: Seed of the draw.

    Returns:
        One tensor for each trainable parameter, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in _trainable(network).items():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu").to(parameter)
        rows = [part.flatten(1) if part.dim() > 1 else part.reshape(1, -1) for part in (drawn, parameter.detach())]
        norms = [part.norm(dim=1, keepdim=True) for part in rows]
        smallest = torch.finfo(parameter.dtype).tiny
        direction[name] = (rows[0] / norms[0].clamp(min=smallest) * norms[1]).reshape(parameter.shape)
    return direction


def gradient_direction(network: nn.Module, loss: Loss) -> dict[str, Tensor]:
    """Compute the gradient of the loss, scaled to the norm of all parameters, as a random direction is.

    Args:
        network: Left as it was.
        loss: Evaluates the loss of ``network``; its gradient by backward, a surrogate one where spikes have surrogates.

    Returns:
        One tensor for each trainable parameter, by name.

    Raises:
        ValueError: The gradient is zero.
    """
    with moving(network) as move:
        gradient = move([], [], loss)[1]
    parameters = _trainable(network)
    norm = _norm(gradient)
    if norm == 0:
        raise ValueError("the gradient is zero here, so it gives no direction; take a random one")
    scale = _norm(parameters) / norm
    return {name: grad * scale for name, grad in gradient.items()}


def between(network: nn.Module, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the direction that leads to another state of the same network: there at 1, at ``network`` at 0.

    Buffers with floating-point values, such as batch norm's running statistics, move along, so that both ends are the
    networks themselves; the slope is that of the parameters alone.

    Args:
        network: The network at one end.
        other: The ``state_dict`` of the other end.

    Returns:
        One tensor for each floating-point entry of the state, by name.

    Raises:
        ValueError: The states differ in names or shapes; the message says which.
    """
    own = network.state_dict()
    names = [f"only one has {name}" for name in sorted(own.keys() ^ other.keys())]
    shapes = [
        f"{name} is {list(own[name].shape)} in one and {list(other[name].shape)} in the other"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    if names or shapes:
        shown, left = [*shapes, *names][:3], len(names) + len(shapes) - 3
        raise ValueError(
            f"no line leads from one network to the other: {'; '.join(shown)}{f'; {left} more' if left > 0 else ''}. "
            "Take two checkpoints of the same architecture"
        )
    return {name: other[name].to(value) - value.detach() for name, value in own.items() if value.is_floating_point()}


def _trainable(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _norm(direction: Direction) -> float:
    return sum(float(part.detach().double().square().sum()) for part in direction.values()) ** 0.5
