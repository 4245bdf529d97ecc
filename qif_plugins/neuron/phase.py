"""Phase portrait of the one-dimensional map: fixed points, trajectories, and the regions of the membrane.

Without reset and with a constant input I the membrane follows v -> f(v) + I. Its fixed points are the roots of
a u² - (a (u1 + u2) + 1) u + a u1 u2 + I, two below the saddle-node bifurcation and none above it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .parameters import QIFParameters


@dataclass(frozen=True)
class FixedPoint:
    """A fixed point of v -> f(v) + I.

    Attributes:
        v: The membrane at the fixed point.
        slope: Slope f'(v) of the map there.
    """

    v: float
    slope: float

    @property
    def stable(self) -> bool:
        """True if the membrane returns to it, |f'| < 1."""
        return abs(self.slope) < 1

    @property
    def character(self) -> str:
        """Words for the way in which the membrane approaches or leaves it."""
        verb = "approached" if self.stable else "left"
        manner = "with alternating sign" if self.slope < 0 else "from one side"
        return f"{'stable' if self.stable else 'unstable'}, {verb} {manner}"


@dataclass(frozen=True)
class Region:
    """An interval of the membrane, and the behaviour of a neuron there without further input.

    Attributes:
        lo: Lower end, may be -inf.
        hi: Upper end, may be inf.
        name: ``"rebound"``, ``"rest"``, ``"fire"`` or ``"runaway"``.
        meaning: Description in words.
    """

    lo: float
    hi: float
    name: str
    meaning: str


def fixed_points(params: QIFParameters, current: float = 0.0) -> tuple[FixedPoint, ...]:
    """Compute the fixed points under a constant input, the lower one first; none above the bifurcation.

    Args:
        params: The neuron; every number a float.
        current: The constant input, of g·x. Default 0.
    """
    a, u1, u2 = float(params.a), float(params.u1), float(params.u2)
    half = (a * (u1 + u2) + 1) / 2
    discriminant = half * half - a * (a * u1 * u2 + current)
    if discriminant < 0:
        return ()
    root = math.sqrt(discriminant)
    points = sorted({(half - root) / a, (half + root) / a})
    if not params.rebound and points[0] < u1:
        slope = a * (u1 - u2)
        points[0] = (current - slope * u1) / (1 - slope)
    return tuple(FixedPoint(v, params.map_derivative(v)) for v in points)


def regions(params: QIFParameters, current: float = 0.0) -> tuple[Region, ...]:
    """Divide the membrane into regions, from below to above, under a constant input.

    Args:
        params: The neuron; every number a float.
        current: The constant input. Default 0.

    Returns:
        Regions with these names:

        * ``rebound``: below the threshold, but one step of the map leads to the threshold or above it.
        * ``rest``: below the threshold, and still there after the next step.
        * ``fire``: at or above the threshold.
        * ``runaway``: above the unstable fixed point as well; without the reset the membrane would grow without bound.
    """
    theta = float(params.v_threshold)
    points = fixed_points(params, current)
    found: list[Region] = []
    rests = bool(points) and points[0].stable and points[0].v < theta
    rebound = "crosses the threshold at the next step"
    quiet = _quiet(params, theta - current)
    if quiet is not None:
        quiet_from, quiet_to = (min(end, theta) for end in quiet)
        found.append(Region(-math.inf, quiet_from, "rebound", rebound))
        found.append(
            Region(quiet_from, quiet_to, "rest", "returns to rest" if rests else "stays below at the next step")
        )
        found.append(Region(quiet_to, theta, "rebound", rebound))
    else:
        found.append(Region(-math.inf, theta, "rebound", rebound))
    unstable = max(points[-1].v, theta) if points else theta
    found.append(
        Region(theta, unstable, "fire", "spikes; without the reset it would return to rest" if rests else "spikes")
    )
    found.append(Region(unstable, math.inf, "runaway", "spikes; without the reset it would run away"))
    return tuple(region for region in found if region.lo < region.hi)


def _quiet(params: QIFParameters, limit: float) -> tuple[float, float] | None:
    """Compute the interval around the vertex of a parabola in which f(v) < ``limit``; ``None`` if there is none."""
    u1, u2 = float(params.u1), float(params.u2)
    if not params.rebound and limit <= 0:  # on the tangent, since f(u1) = 0
        slope = float(params.a) * (u1 - u2)
        return (-math.inf, u1 + limit / slope) if slope else None
    vertex = (u1 + u2) / 2
    gap = (limit - float(params.a) * (vertex - u1) * (vertex - u2)) / float(params.a)
    if gap <= 0:
        return None
    return (vertex - math.sqrt(gap) if params.rebound else -math.inf), vertex + math.sqrt(gap)


def trajectory(params: QIFParameters, start: float, steps: int, current: float = 0.0) -> list[float]:
    """Iterate v -> f(v) + I from ``start`` on, without the reset.

    Args:
        params: The neuron; every number a float.
        start: The first value.
        steps: Number of steps after it.
        current: The constant input. Default 0.

    Returns:
        ``steps + 1`` values, fewer if the next one is not finite.
    """
    path = [start]
    for _ in range(steps):
        following = params.map(path[-1]) + current
        if not math.isfinite(following):
            break
        path.append(following)
    return path
