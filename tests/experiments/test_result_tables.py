"""The tables of the documentation are those of the recorded runs in benchmarks/results."""

import json
import re
from collections import Counter
from math import sqrt
from pathlib import Path
from statistics import fmean, mean, median, stdev

import pytest

from qif_plugins.diagnostics.energy.costs import Costs, Energy
from qif_plugins.diagnostics.energy.rates import StepCount

pytestmark = pytest.mark.host_independent

ROOT = Path(__file__).resolve().parents[2]
EVENTS = ("number of spikes", "order of spikes", "time of spikes", "none")


def recorded(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def rows_of(page):
    """Every row of the page's tables."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {line.strip() for line in text.splitlines() if line.startswith("|")}


def row(*cells):
    return f"| {' | '.join(cells)} |"


def missing(expected, page):
    assert expected
    return [line for line in expected if line not in rows_of(page)]


def percent(value, digits=1):
    return f"{100 * value:.{digits}f} %"


def spread(values, form, unit=""):
    more = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{more}{unit}"


# -- exact -----------------------------------------------------------------------------------------------------------


def test_comparison():
    columns = []
    for data in ("digits", "mnist5k"):
        content = recorded(f"exact-compare-{data}.json")
        tests = {}
        for found in content["neurons"]:
            name, params = found["neuron"], found["params"]
            runs = [run for run in content["runs"] if run["neuron"] == name]
            trials = [run["accuracy"] for run in runs if run["part"] == "search"]
            assert len(trials) == found["trials"]
            assert median(trials) == found["trials median"]
            best = [run for run in runs if run["part"] == "test" and run["params"] == params]
            tests[name] = found["test"]
            assert [run["accuracy"] for run in best] == found["test"]
            silent = (100 * found[f"silent at {when}"] for when in ("first", "worst", "last"))
            until = params["latest"] * params["duration"]
            columns.append(
                [
                    spread([100 * value for value in found["test"]], ".2f", " %"),
                    "",
                    percent(found["validation"]),
                    f"{sum(value > 0.9 for value in trials)} of {len(trials)}; {percent(median(trials))}",
                    percent(median(trials[:10])),
                    ", ".join(f"{value:.0f}" for value in silent) + " %",
                    f"{fmean(run['rate'] for run in best):.2f}",
                    percent(found["unanswered at last"], 0),
                    f"{found['gradient']:.2f}; {found['gradient largest over mean']:.1f}",
                    f"{params['duration']:.2g}, {until:.2g} τ",
                    f"{params['loss']}, {params['lr']:.2g}, {params['clip']:.2g}",
                ]
            )
        less = [100 * (qif - lif) for lif, qif in zip(tests["lif"], tests["qif"], strict=True)]
        columns[-1][1] = f"{mean(less):+.2f} ± {stdev(less) / sqrt(len(less)):.2f} %".replace("-", "−")
    heads = (
        "test accuracy, mean ± standard deviation over seeds", "QIF less LIF by seed, mean ± standard error",
        "validation accuracy of the settings", "trials above 90 % on validation; median", "ten random trials, median",
        "silent hidden neurons, before, worst, after", "spikes of a hidden neuron, after",
        "test samples without any output spike, after", "gradient norm, mean; largest batch over mean",
        "found: trial length, input until", "found: loss, learning rate, clipped at",
    )  # fmt: skip
    expected = [row(*cells).replace("|  |", "| |") for cells in zip(heads, *columns, strict=True)]
    assert not missing(expected, "exact.md")


def test_training():
    runs = recorded("exact-train.json")["runs"]
    by_setting = {}
    for run in (run for run in runs if run["table"] == "learning"):
        settings = run["settings"]
        key = (run["dataset"], settings["neuron"], settings["duration"], settings["hidden"][0], settings["epochs"])
        by_setting.setdefault(key, {})[settings["seed"]] = run["last"]["accuracy"]
    expected = [
        row(
            data, {"qif": "QIF", "theta": f"theta, `--duration {duration:g}`"}[neuron], str(hidden), str(epochs),
            ", ".join(map(str, sorted(seeds))), ", ".join(percent(seeds[seed]) for seed in sorted(seeds)),
        )
        for (data, neuron, duration, hidden, epochs), seeds in by_setting.items()
    ]  # fmt: skip
    lengths = {
        (run["settings"]["neuron"], run["settings"]["duration"]): run["last"]
        for run in runs
        if run["table"] == "trial length"
    }
    durations = sorted({duration for _, duration in lengths})
    for head, key, digits in (
        ("test accuracy", "accuracy", 1),
        ("test samples without any output spike", "unanswered", 0),
    ):
        for neuron in ("lif", "qif"):
            cells = [percent(lengths[neuron, duration][key], digits) for duration in durations]
            expected.append(row(f"{neuron.upper()}, {head}", *cells))
    assert not missing(expected, "exact.md")


# -- landscapes ------------------------------------------------------------------------------------------------------


def cells_of(lines):
    def values(key, scale=1.0):
        return [scale * line["numbers"][key] for line in lines]

    found = Counter(jump["event"] for line in lines for jump in line["jumps"])
    located = f"{found.total()}: " + ", ".join(f"{found[event]} {event}" for event in EVENTS if found[event])
    return [
        f"{max(values('unexplained')):.1e}", spread(values("unexplained_ratio"), ".2f"),
        spread(values("steps_with_jump", 100), ".0f", " %"), spread(values("jump_share", 100), ".1f", " %"),
        spread(values("variation_ratio"), ".2f"), spread(values("angle"), ".2g", "°"),
        spread(values("opposite", 100), ".0f", " %"), located if found else "0",
    ]  # fmt: skip


def by_title(networks, section, samples):
    groups = {}
    for network in networks:
        if network["section"] == section:
            lines = [line for line in network["lines"] if line["samples"] == samples]
            group = groups.setdefault(network["title"], ([], []))
            group[0].extend(lines)
            group[1].append(100 * network["accuracy"])
    return groups


@pytest.mark.parametrize(
    ("file", "sections"),
    [("landscape-exact.json", ("first", "tuned")), ("landscape-surrogate.json", ("convolutional", "perceptron"))],
)
def test_landscapes(file, sections):
    networks = recorded(file)["networks"]
    expected = [
        row(title, "one" if samples == 1 else "20", spread(accuracies, ".1f", " %"), *cells_of(lines))
        for section in sections
        for samples in (20, 1)
        for title, (lines, accuracies) in by_title(networks, section, samples).items()
    ]
    assert not missing(expected, "landscape.md")


def test_landscapes_along_the_gradient_and_between_networks():
    networks = recorded("landscape-exact.json")["networks"]
    sections = dict.fromkeys(network["section"] for network in networks)
    expected = [
        row(title, section, str(len(lines)), *cells_of(lines))
        for section in sections
        if section.startswith(("gradient", "seed"))
        for title, (lines, _) in by_title(networks, section, 20).items()
    ]
    assert len(expected) == 8
    assert not missing(expected, "landscape.md")


def test_counts_that_change_along_the_lines():
    text = " ".join((ROOT / "docs" / "landscape.md").read_text(encoding="utf-8").split())
    found = {}
    for network in recorded("landscape-exact.json")["networks"]:
        if "changed_counts" in network:
            hidden = network["changed_counts"]["0"]
            total = found.setdefault((network["section"], network["title"]), [0, 0])
            total[0] += hidden["before the last 2 %"]
            total[1] += hidden["in the last 2 %"]
    before, after = found["first", "LIF, exact"]
    assert f"of {before + after} hidden neurons' counts that differ" in text
    assert f"{before} differ by a spike before the trial's last 2 %" in text
    before, after = found["first", "QIF, exact"]
    assert before == 0
    assert f"all of its {after} counts differ by a spike in the trial's last 2 %" in text
    before, after = found["tuned", "LIF, exact"]
    assert f"of {before + after} hidden neurons' counts that differ" in text
    assert f"{after} differ by a spike in the trial's last 2 %, and only {before} by one before it" in text


# -- energy ----------------------------------------------------------------------------------------------------------


def test_energy_of_trained_networks():
    expected = []
    for network in recorded("energy-trained.json")["networks"]:
        measured, samples = network["measured"], network["samples"]
        layers, steps = measured["layers"], measured["steps"]
        macs, synops = (sum(layer[name] for layer in layers) for name in ("macs", "synops"))
        updates = sum(neurons["steps"] for neurons in measured["neurons"])
        energy = Energy(**measured["energy_pj"])
        assert energy == Energy.of(macs, synops, updates, Costs())
        once = Energy.of(macs - layers[0]["macs"] * (1 - 1 / steps), synops, updates, Costs())
        config = network["config"]
        expected.append(
            row(
                f"{config['data']['name']}, {config['model']['name']} of {len(layers)} layers",
                config["neuron"].get("name", "qif").upper(), f"{100 * network['accuracy']:.2f} %",
                f"{measured['firing_rate']:.4f}", f"{measured['synaptic_rate']:.4f}",
                f"{synops / samples:,.0f}", f"{macs / samples:,.0f}",
                f"{energy.total_lif / samples / 1e6:.4g}", f"{energy.total_qif / samples / 1e6:.4g}",
                f"{100 * energy.overhead:.2f} %", f"{100 * once.overhead:.2f} %",
            )
        )  # fmt: skip
    assert not missing(expected, "energy.md")


def test_energy_of_resnet19():
    content = recorded("energy-resnet19.json")
    text = re.sub(" +", " ", (ROOT / "docs" / "energy.md").read_text(encoding="utf-8"))
    step, costs = StepCount(**content["time_step"]), Costs(**content["costs_pj"])
    for measured in content["measured"]:
        energy, rate = Energy(**measured["energy_pj"]), measured["rate"]
        cells = [
            measured["steps"], f"{rate:g}", f"{measured['firing_rate']:.4f}", f"{measured['synaptic_rate']:.4f}",
            f"{energy.total_lif / measured['steps'] / 1e6:.4g}", f"{100 * energy.overhead:#.3g} %",
            f"{100 * step.energy(rate, costs).overhead:#.3g} %",
        ]  # fmt: skip
        assert "\n" + " ".join(map(str, cells)) + "\n" in text
