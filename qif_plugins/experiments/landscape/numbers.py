"""Quantify how fragmented a landscape is."""

from __future__ import annotations

import math

import torch

from .lines import Line, Plane

REFINE = 4
"""Steps of the fine grid to one of the coarse grid."""
_WINDOW = 9
"""Width of the moving average that smooths the loss, in positions."""


def candidates(line: Line, smallest: float) -> torch.Tensor:
    """Find the steps of the grid that may hold a jump: the change did not shrink with the grid, and is not a kink.

    Args:
        line: Measured on 4n + 1 positions.
        smallest: Height below which nothing counts.

    Returns:
        [P - 1], bool.
    """
    # At a jump the unexplained change is that of the coarse step around it, at a kink a quarter of the largest, and
    # 1/1024 where the loss is smooth.
    fine = line.unexplained().abs()
    coarse = line.coarse(REFINE).unexplained().abs().repeat_interleave(REFINE)
    # A kink leaves at most this; in the middle of a coarse step it leaves nothing on the coarse grid and seems to grow.
    kink = line.positions.diff() * line.slope.diff().abs() / 2
    return (fine > smallest) & (fine > coarse / 2) & (fine > kink)


def fragmentation(line: Line, smallest: float = 1e-6) -> dict[str, float]:
    """Quantify how fragmented a line is.

    Args:
        line: Measured on a fine grid of 4n + 1 positions; the coarse one has every fourth.
        smallest: Height below which a jump does not count, in units of the loss. Default 1e-6.

    Returns:
        unexplained: the largest magnitude of :meth:`Line.unexplained`.
        unexplained_ratio: it over the one on the coarse grid, about 1 for a jump, 1/4 for a kink and
        1/1024 where the loss is smooth.
        steps_with_jump: the fraction of the coarse grid's steps in which a part larger than ``smallest`` did not shrink
        when the grid refined, and is more than a kink in the slope would leave.
        jump_share: those parts' sum over the line's total variation.
        variation_ratio: total variation over that of the smoothed loss, both without the ends.
        angle: in degrees, between the slopes and central differences as vectors over the line; 90 where one is zero.
        opposite: the fraction of positions at which slope and central difference have opposite signs.

    Raises:
        ValueError: Too few positions, or a number of them that is not 4n + 1.
    """
    count, least = len(line.positions), max(2 * REFINE, _WINDOW) + 1
    if count < least or count % REFINE != 1:
        raise ValueError(f"the line has {count} positions; it needs {REFINE}n + 1 of them and at least {least}")
    fine, coarse = line.unexplained().abs(), line.coarse(REFINE).unexplained().abs()
    jumping = candidates(line, smallest)
    total = float(line.loss.diff().abs().sum())
    smooth = line.loss.unfold(0, _WINDOW, 1).mean(1)
    inner = line.loss[_WINDOW // 2 : count - _WINDOW // 2]
    difference = (line.loss[2:] - line.loss[:-2]) / (line.positions[2:] - line.positions[:-2])
    return {
        "unexplained": float(fine.max()),
        "unexplained_ratio": _over(float(fine.max()), float(coarse.max())),
        "steps_with_jump": float(jumping.reshape(-1, REFINE).any(1).double().mean()),
        "jump_share": _over(float(fine[jumping].sum()), total),
        "variation_ratio": _over(float(inner.diff().abs().sum()), float(smooth.diff().abs().sum()), 1.0),
        "angle": float(_degrees(difference, line.slope[1:-1])),
        "opposite": float((difference * line.slope[1:-1] < 0).double().mean()),
    }


def plane_angle(plane: Plane) -> float:
    """Compute the median angle in degrees between the gradient in a plane and central differences, inside the grid."""
    steps = [line[2:] - line[:-2] for line in plane.positions]
    first = (plane.loss[2:, 1:-1] - plane.loss[:-2, 1:-1]) / steps[0][:, None]
    second = (plane.loss[1:-1, 2:] - plane.loss[1:-1, :-2]) / steps[1]
    return float(_degrees(torch.stack([first, second], -1), plane.slope[1:-1, 1:-1]).median())


def _degrees(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the angles between vectors in the last dimension, accurate near 0, where arccos is not."""
    a, b = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-300) for part in (a, b))
    return torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) * (360 / math.pi)


def _over(a: float, b: float, otherwise: float = 0.0) -> float:
    return a / b if b else otherwise
