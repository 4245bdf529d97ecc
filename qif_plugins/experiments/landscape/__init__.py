"""Measure loss and gradient along directions in parameter space, and how fragmented they are.

For any network and any loss of it: exact networks, whose gradient is that of the loss, and surrogate-trained ones of
both hosts, whose gradient is the surrogate's.

    directions = [random_direction(network, seed=0), random_direction(network, seed=1)]
    line = along(network, loss, directions[0], positions)     loss and slope on a line
    fragmentation(line)                                       numbers
    locate_jumps(network, loss, directions[0], line)          where it jumps, and which spikes change there
    over_plane(network, loss, directions, (positions, positions))      the same over a plane

The network is measured in the mode (training or evaluation) that it is in. Afterwards parameters, buffers, modes,
membranes, hooks and random number generators are as before, even after an error. Before every evaluation membranes are
cleared, buffers restored and PyTorch's generators seeded: dropout or a random encoding draws the same everywhere.
"""

from ...diagnostics.spiking import spiking_layers
from .directions import between, gradient_direction, random_direction
from .jumps import EVENTS, Jump, locate_jumps
from .lines import Line, Plane, along, over_plane
from .numbers import fragmentation, plane_angle

__all__ = [
    "EVENTS", "Jump", "Line", "Plane", "along", "between", "fragmentation", "gradient_direction", "locate_jumps",
    "over_plane", "plane_angle", "random_direction", "spiking_layers",
]  # fmt: skip
