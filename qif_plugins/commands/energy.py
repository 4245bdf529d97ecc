"""``qif energy``: operations and energy of a network, and the energy that QIF adds to LIF."""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..convert.trial import reset_state
from ..diagnostics.energy.costs import LIF_UPDATES, MEMORIES, Costs, Energy, Traffic, memory_traffic
from ..diagnostics.energy.counting import Operations, count_operations
from ..diagnostics.energy.rates import StepCount, count_at_rate
from ..experiments.figures import plot_overhead, require_matplotlib
from ..experiments.names import SEQUENCES, SHAPES
from ..neuron.module import QIFLayer
from ..support.files import check_target, write_json
from ..support.text import percent, text_table

PAPER = 0.0094, 0.0323
"""The overhead that arXiv 2510.05168 reports, from the least to the most."""

REUSE = {True: "weights once a step", False: "event by event"}

CLASSES = {"resnet34": 1000}


def run(arguments: argparse.Namespace) -> int:
    """Count, print the tables, write the files asked for."""
    qif_map = arguments.qif_map or Costs.qif_map
    costs = Costs(arguments.mac, arguments.ac, arguments.mult, arguments.add, arguments.lif_update, qif_map)
    if not costs.ac:
        raise ValueError("with --ac 0 the overhead does not depend on the firing rate; give accumulates an energy")
    given = [f"--{name}" for name in arguments.sweep if getattr(arguments, name) is not None]
    if arguments.checkpoint and given:
        raise ValueError(f"{', '.join(given)} and --checkpoint exclude each other: a checkpoint has a model and data")
    for name in ("batches", "data", "data_folder"):
        if getattr(arguments, name) is not None and not arguments.checkpoint:
            raise ValueError(f"--{name.replace('_', '-')} is for --checkpoint")
    for path in filter(None, (arguments.plot, arguments.out)):
        check_target(path)  # before the counting, not after
    if arguments.plot:
        require_matplotlib(arguments.plot)
    torch.set_num_threads(arguments.threads)
    content = _trained(arguments, costs) if arguments.checkpoint else _sweep(arguments, costs)
    if arguments.out:
        content = {
            "versions": {"qif-plugins": __version__, "python": platform.python_version(), "torch": torch.__version__},
            "memory_pj_per_word": MEMORIES,
            **content,
        }
        write_json(arguments.out, content)
    written = [str(path) for path in (arguments.out, arguments.plot) if path]
    if written:
        print(f"\nwrote {' and '.join(written)}")
    return 0


def _sweep(arguments: argparse.Namespace, costs: Costs) -> dict[str, Any]:
    """Count an untrained model at several firing rates; return the content of the results file."""
    from ..models import build

    name, kind, seed = arguments.model or "resnet19", arguments.neuron or "qif", arguments.seed or 0
    shape, steps = arguments.shape or SHAPES[name], arguments.steps or [2, 4]
    rates = sorted(arguments.rates or (0.05, 0.1, 0.15, 0.2, 0.3, 0.4))
    torch.manual_seed(seed)
    model = build(name, shape, CLASSES.get(name, 10), kind)
    costs = _with_map_of(model, costs, arguments.qif_map)
    step = StepCount.of(count_at_rate(model, shape, 1, 0.2, seed))
    print(
        f"{name}, {kind} neurons, input {list(shape)}: {step.weights:,} weights, {step.neurons:,} neurons\n"
        f"a time step: {step.connections:,} connections carry spikes ({step.padded:,} with padding); "
        f"{step.input_macs:,} MACs in the input layer, {step.other_macs:,} in other layers whose input is not binary\n"
        f"{_describe(costs)}"
    )
    _print_closed_form(step, rates, steps, costs)
    _print_ranges(step, steps, costs)
    counted = [(T, rate, count_at_rate(model, shape, T, rate, seed)) for T in steps for rate in rates]
    print(f"\nQIF costs no more than LIF if it fires {step.break_even(costs):.4f} spikes per connection less")
    _print_measured(counted, step, costs)
    middle = rates[(len(rates) - 1) // 2]
    print(f"\na time step with the movement of data, at {middle:g} spikes per connection")
    _print_memory(step.energy(middle, costs), lambda reuse: step.traffic(middle, reuse))
    if arguments.plot:
        _draw(arguments.plot, f"{name}, input {list(shape)}", step, counted, costs)
    return {
        "costs_pj": asdict(costs),
        "config": {"model": name, "neuron": kind, "shape": list(shape), "seed": seed},
        "time_step": asdict(step),
        "measured": [{"steps": T, "rate": rate, **_counts(operations, costs)} for T, rate, operations in counted],
    }


def _trained(arguments: argparse.Namespace, costs: Costs) -> dict[str, Any]:
    """Count a checkpoint's model on its test data; return the content of the results file."""
    from ..experiments.checkpoints import load_checkpoint
    from ..experiments.training.config import from_dict
    from ..experiments.training.session import make_loss, on_other_data, prepare
    from ..support.checkpoints import load_weights

    checkpoint = load_checkpoint(arguments.checkpoint)
    trained = from_dict(checkpoint["config"], arguments.checkpoint)
    config = on_other_data(trained, arguments.data, arguments.data_folder)
    record = checkpoint["data"] if config.data.name == trained.data.name else None
    model, task = prepare(config, record, ("pass --data-folder where they lie", ""), train=False)
    load_weights(model, checkpoint["state"]["model"], str(arguments.checkpoint))
    costs = _with_map_of(model, costs, arguments.qif_map)
    # prepare may have set another number.
    torch.set_num_threads(arguments.threads)
    static, T = config.data.name not in SEQUENCES, config.data.steps
    loss = make_loss(config)
    samples, correct = 0, 0.0

    def drive(model: nn.Module) -> None:
        nonlocal samples, correct
        for batch in itertools.islice(task.test.epoch(0), arguments.batches):
            reset_state(model)
            _, measured = loss(model, batch)
            samples += len(batch[1])
            correct += float(measured["accuracy"]) * len(batch[1])

    operations = count_operations(model, drive)
    print(
        f"{arguments.checkpoint}: {config.model['name']}, {config.neuron.get('name', 'qif')} neurons, "
        f"{config.data.name}, T = {T}; {samples} test samples, {100 * correct / samples:.2f} % of them classified "
        f"correctly\n{_describe(costs)}\n"
    )
    _print_layers(operations, samples)
    energy = _energy(operations, costs).scaled(1 / samples)
    input_layer = operations.input_macs * costs.mac / samples / energy.total_lif
    print(
        f"\n{operations.firing_rate:.4f} spikes per neuron-step, {operations.synaptic_rate:.4f} spikes per connection; "
        f"the input layer takes {percent(input_layer, '#.3g')} of LIF's energy\n"
    )
    _print_assumptions(operations, samples, T if static else 1, costs)
    print("\na sample with the movement of data")
    used, updates = (operations.macs + operations.synops) / samples, operations.neuron_steps / samples
    _print_memory(energy, lambda reuse: memory_traffic(used, operations.weights * T, updates, reuse))
    return {
        "costs_pj": asdict(costs),
        "config": config.to_dict(),
        "samples": samples,
        "accuracy": correct / samples,
        "measured": {"steps": T, **_counts(operations, costs)},
    }


def _with_map_of(model: nn.Module, costs: Costs, given: str | None) -> Costs:
    """Price the map that the model's QIF neurons have, unless the user gave one."""
    layers = [module for module in model.modules() if isinstance(module, QIFLayer)]
    bends = any(not layer.qif_parameters.rebound for layer in layers)
    return replace(costs, qif_map="monotone") if bends and given is None else costs


def _print_layers(operations: Operations, samples: int) -> None:
    rows = [[n.name, n.kind, f"{n.steps / samples:,.0f}", f"{n.spikes / n.steps:.4f}"] for n in operations.neurons]
    print(text_table(["neurons", "kind", "updates a sample", "spikes per neuron-step"], rows, left=2))
    rows = [
        [
            layer.name,
            f"{layer.macs / samples:,.0f}",
            f"{layer.synops / samples:,.0f}",
            f"{layer.synops / layer.connections:.4f}" if layer.connections else "",
        ]
        for layer in operations.layers
    ]
    print("\n" + text_table(["weights", "MACs a sample", "SynOps a sample", "spikes per connection"], rows))


def _print_assumptions(operations: Operations, samples: int, once_in: int, costs: Costs) -> None:
    """Print the overhead for every LIF update, with the input layer computed at each step and, if possible, once."""
    once = operations.macs - operations.input_macs + operations.input_macs / once_in
    header = ["LIF update", "its pJ", "LIF, uJ a sample", "overhead"]
    header += [f"input layer once in {once_in}"] * (once_in > 1)
    rows = []
    for update in LIF_UPDATES:
        assumed = replace(costs, lif_update=update)
        energies = [
            Energy.of(macs, operations.synops, operations.neuron_steps, assumed) for macs in (operations.macs, once)
        ]
        overheads = [percent(energy.overhead, "#.3g") for energy in energies[: 1 + (once_in > 1)]]
        rows.append([update, f"{assumed.lif:g}", _micro(energies[0].total_lif / samples), *overheads])
    print(text_table(header, rows))


def _counts(operations: Operations, costs: Costs) -> dict[str, Any]:
    energy = _energy(operations, costs)
    return {
        "firing_rate": operations.firing_rate,
        "synaptic_rate": operations.synaptic_rate,
        "energy_pj": asdict(energy),
        "overhead": energy.overhead,
        **asdict(operations),
    }


def _describe(costs: Costs) -> str:
    return (
        f"pJ: MAC {costs.mac:g}, AC {costs.ac:g}, multiplication {costs.mult:g}, addition {costs.add:g}; "
        f"a neuron-step of LIF {costs.lif:g}, of QIF ({costs.qif_map}) {costs.lif + costs.qif_extra:g}"
    )


def _micro(picojoules: float) -> str:
    return f"{picojoules / 1e6:.4g}"


def _print_closed_form(step: StepCount, rates: Sequence[float], steps: Sequence[int], costs: Costs) -> None:
    header = ["spikes per connection", "LIF, uJ a step", "overhead", *(f"input layer once in {T}" for T in steps)]
    rows = [
        [
            f"{rate:g}",
            _micro(step.energy(rate, costs).total_lif),
            *(percent(step.energy(rate, costs, once_in).overhead, "#.3g") for once_in in (1, *steps)),
        ]
        for rate in rates
    ]
    print(f"\noverhead of QIF over LIF in closed form\n{text_table(header, rows)}")


def _print_ranges(step: StepCount, steps: Sequence[int], costs: Costs) -> None:
    low, high = PAPER
    print(f"\nspikes per connection at which the overhead is {100 * high:g} % to {100 * low:g} %")
    header = ["LIF update", "its pJ", "input layer each step", *(f"once in {T}" for T in steps), "padding counted, too"]
    rows = []
    for update in LIF_UPDATES:
        assumed = replace(costs, lif_update=update)
        cells = [_range(step, assumed, once_in) for once_in in (1, *steps)]
        rows.append([update, f"{assumed.lif:g}", *cells, _range(step.with_padding(), assumed, 1)])
    print(text_table(header, rows))


def _range(step: StepCount, costs: Costs, once_in: int) -> str:
    low, high = (step.rate_at(overhead, costs, once_in) for overhead in reversed(PAPER))
    return f"{max(low, 0):.3f} to {high:.3f}" if high >= 0 and low <= 1 else "at none"


def _energy(operations: Operations, costs: Costs) -> Energy:
    return Energy.of(operations.macs, operations.synops, operations.neuron_steps, costs)


def _print_measured(counted: Sequence[tuple[int, float, Operations]], step: StepCount, costs: Costs) -> None:
    header = ["T", "rate to hold", "spikes per neuron-step", "spikes per connection", "LIF, uJ a step", "overhead",
              "in closed form"]  # fmt: skip
    rows = []
    for steps, rate, operations in counted:
        energy = _energy(operations, costs)
        rows.append(
            [
                str(steps),
                f"{rate:g}",
                f"{operations.firing_rate:.4f}",
                f"{operations.synaptic_rate:.4f}",
                _micro(energy.total_lif / steps),
                percent(energy.overhead, "#.3g"),
                percent(step.energy(rate, costs).overhead, "#.3g"),
            ]
        )
    print(f"\nmeasured on spikes of neurons held at a rate\n{text_table(header, rows)}")


def _print_memory(energy: Energy, traffic: Callable[[bool], Traffic]) -> None:
    """Print the energy of arithmetic alone and with every memory, for ``traffic`` with and without reuse."""
    header = ["uJ", "weights", "sums", "membranes", "arithmetic, LIF", "QIF adds", "overhead"]
    arithmetic = [_micro(energy.total_lif), _micro(energy.qif_extra)]
    rows = [["arithmetic alone", "", "", "", *arithmetic, percent(energy.overhead, "#.3g")]]
    for reuse in (True, False):
        moved = traffic(reuse)
        for name, access in MEMORIES.items():
            rows.append(
                [
                    f"{name}, {REUSE[reuse]}",
                    *(_micro(words * access) for words in (moved.weights, moved.sums, moved.membranes)),
                    *arithmetic,
                    percent(energy.qif_extra / (energy.total_lif + moved.energy(access)), "#.3g"),
                ]
            )
    print(text_table(header, rows))


def _draw(
    path: Path, title: str, step: StepCount, counted: Sequence[tuple[int, float, Operations]], costs: Costs
) -> None:
    rates = [0.01 * 1.05**k for k in range(82)]
    curves = {"arithmetic alone": [step.energy(rate, costs).overhead for rate in rates]}
    for memory, reuse in (("8 KB SRAM", False), ("32 KB SRAM", True), ("DRAM", True)):
        curves[f"with {memory}, {REUSE[reuse]}"] = [
            energy.qif_extra / (energy.total_lif + step.traffic(rate, reuse).energy(MEMORIES[memory]))
            for rate in rates
            for energy in [step.energy(rate, costs)]
        ]
    points = [(operations.synaptic_rate, _energy(operations, costs).overhead) for _, _, operations in counted]
    plot_overhead(path, rates, curves, points, PAPER, title)
