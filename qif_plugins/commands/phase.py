"""``qif phase``: the map with its fixed points, threshold and regions, printed and drawn."""

from __future__ import annotations

import argparse
import math

from ..experiments.figures import plot_phase
from ..neuron.parameters import QIFParameters
from ..neuron.phase import fixed_points, regions
from .objects import describe, neuron


def run(arguments: argparse.Namespace) -> int:
    """Print the fixed points and regions, and write the figure."""
    params = neuron(arguments)
    current = arguments.input
    if not math.isfinite(current):
        raise ValueError(f"--input must be finite, got {current}")
    starts = arguments.start or _default_starts(params, current)
    if not all(math.isfinite(start) for start in starts):
        if arguments.start:
            raise ValueError(f"--start must be finite, got {' '.join(map(str, starts))}")
        raise ValueError(
            f"the fixed points of a={params.a:g}, u1={params.u1:g}, u2={params.u2:g} are beyond what floating point "
            "holds; take smaller numbers, or pass --start"
        )
    plot_phase(arguments.out, params, starts, arguments.steps, current)
    print(f"{describe(arguments, params)}\nconstant input {current:g}\n")
    points = fixed_points(params, current)
    print(f"{'fixed point':>12}{'slope':>12}   character")
    for point in points:
        print(f"{point.v:>12.6g}{point.slope:>12.6g}   {point.character}")
    if not points:
        print("        none: the input is above the saddle-node bifurcation, and the neuron fires again and again")
    print(f"\n{'from':>12}{'to':>12}   membrane")
    for region in regions(params, current):
        print(f"{region.lo:>12.6g}{region.hi:>12.6g}   {region.meaning}")
    print(f"\nwrote {arguments.out}")
    return 0


def _default_starts(params: QIFParameters, current: float) -> list[float]:
    """Start one trajectory below the threshold, one between it and the unstable point, and one beyond that."""
    theta = float(params.v_threshold)
    points = fixed_points(params, current)
    if not points:
        return [float(params.u1)]
    rest, unstable = points[0].v, points[-1].v
    between = [theta + 0.8 * (unstable - theta)] if unstable > theta else []
    return [rest + 0.5 * (min(theta, unstable) - rest), *between, unstable + 0.05 * abs(unstable - rest)]
