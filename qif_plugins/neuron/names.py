"""Names and defaults of windows, closures and dynamics, which commands show without importing PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

WindowName = Literal["isometric", "unbiased", "paper", "heuristic"]
WINDOWS: tuple[WindowName, ...] = get_args(WindowName)
DEFAULT_WINDOW: WindowName = "isometric"
"""The window of a neuron for which none was chosen, in every host."""
ClosureName = Literal["reset", "free"]
CLOSURES: tuple[ClosureName, ...] = get_args(ClosureName)
DynamicsName = Literal["paper", "lif", "monotone"]
DYNAMICS: tuple[str, ...] = get_args(DynamicsName)
MATCHED = ("lif", "monotone")
"""Those that match a leak: ``"lif"`` by the parabola, ``"monotone"`` by one that below rest is LIF."""
DEFAULT_BETA = 0.5
"""Leak that a neuron matches which was given neither a leak nor a map: that of SpikingJelly's LIFNode, tau = 2."""
MAP = ("a", "u1", "u2")
PAPER = {"a": 0.25, "u1": 0.0, "u2": 0.5}
"""The map of arXiv 2510.05168."""
