"""``qif window``: membrane moments and surrogate windows, compared with a simulation of the same neuron."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ..neuron.moments import MomentClosureError, firing_rate, membrane_moments
from ..neuron.names import CLOSURES, WINDOWS, ClosureName, WindowName
from ..neuron.parameters import Number, QIFParameters
from ..neuron.simulate import MembraneStatistics, simulate_membrane
from ..neuron.surrogate import Gaussian, Window
from .objects import describe, neuron


def run(arguments: argparse.Namespace) -> int:
    """Print the two tables."""
    params = neuron(arguments)
    input_std = arguments.threshold if arguments.input_std is None else arguments.input_std
    if arguments.input_std is None and not input_std > 0:
        raise ValueError(
            f"the input's standard deviation is --threshold, got {input_std:g}, unless --input-std says another, and "
            "must be positive"
        )
    rows = [(f"{closure} closure", _closure(params, input_std, arguments.input_mean, closure)) for closure in CLOSURES]
    windows = {name: _window(name, params, input_std, arguments) for name in WINDOWS}
    usable = {name: window for name, window in windows.items() if not isinstance(window, str)}
    measured = simulate_membrane(
        params,
        input_std,
        arguments.input_mean,
        neurons=arguments.neurons,
        steps=arguments.steps,
        windows=tuple(usable.values()),
        seed=arguments.seed,
    )
    resting, unstable = params.fixed_points()
    print(f"{describe(arguments, params)}\nrests at {resting + 0.0:.6g}, unstable fixed point {unstable:.6g}")
    print(f"input       mean {arguments.input_mean:g}, deviation {input_std:g}\n")
    _print_moments(rows, measured)
    _print_windows(windows, params.v_threshold, dict(zip(usable, measured.window_means, strict=True)))
    return 0


def _closure(
    params: QIFParameters, input_std: float, input_mean: float, closure: ClosureName
) -> tuple[float, float, float] | str:
    try:
        mean, std = membrane_moments(params, input_std, input_mean, closure)
    except MomentClosureError:
        return "diverges: the membrane's deviation grows without bound"
    return float(mean), float(std), float(firing_rate(params, mean, std))


def _window(
    name: WindowName, params: QIFParameters, input_std: float, arguments: argparse.Namespace
) -> Window | Gaussian | str:
    if name == "heuristic":
        return Window.heuristic(params, arguments.alpha)
    options = {"kappa": arguments.kappa} if name == "unbiased" else {}
    try:
        return Window.named(
            name, params, input_std, input_mean=arguments.input_mean, closure=arguments.closure, **options
        )
    except MomentClosureError:
        return f"none: the {arguments.closure} closure diverges"


def _print_moments(rows: list[tuple[str, tuple[float, float, float] | str]], measured: MembraneStatistics) -> None:
    print(f"{'membrane':<18}{'mean':>12}{'deviation':>12}{'spikes/step':>13}")
    for label, result in rows:
        if isinstance(result, str):
            print(f"{label:<18}  {result}")
        else:
            print(f"{label:<18}{result[0]:>12.6f}{result[1]:>12.6f}{result[2]:>13.6f}")
    print(f"{'simulation':<18}{measured.mean:>12.6f}{measured.std:>12.6f}{measured.rate:>13.6f}")
    print(f"{'  standard error':<18}{measured.mean_error:>12.6f}{measured.std_error:>12.6f}")
    print(f"  ({measured.neurons} neurons, {measured.steps} steps, seed {measured.seed})\n")


def _print_windows(
    windows: Mapping[WindowName, Window | Gaussian | str], threshold: Number, shares: dict[str, float]
) -> None:
    print(f"{'window':<18}{'from':>12}{'to':>12}{'height':>13}{'mean w(h)':>13}")
    for name, window in windows.items():
        if isinstance(window, str):
            print(f"{name:<18}  {window}")
            continue
        low, high = window.span(threshold)
        print(f"{name:<18}{low:>12.6f}{high:>12.6f}{window.height:>13.6f}{shares[name]:>13.6f}")
    print("  (isometric: a Gaussian, from one deviation below the threshold to one above)")
    print("  (mean w(h) as simulated: the share of the gradient that passes)")
