"""`qif window` and the simulation behind it, against the design's table of moments."""

import math
import re

import pytest
import torch

from qif_plugins import MomentClosureError, QIFParameters, Window, firing_rate, membrane_moments
from qif_plugins.cli import main
from qif_plugins.neuron.simulate import simulate_membrane

pytestmark = pytest.mark.host_independent

# threshold, input deviation, simulated (mean, deviation), reset closure, free closure
TABLE = [
    (1.0, 1.0, (0.1526, 1.0492), (0.157770, 1.053412), (0.277536, 1.082537)),
    (1.0, 1 / math.sqrt(2), (0.0900, 0.7276), (0.090702, 0.728857), (0.123008, 0.733761)),
    (0.5, 0.5, (0.0468, 0.5100), (0.046965, 0.510261), (0.058743, 0.510778)),
    (2.0, 2.0, (0.5311, 2.2769), (0.636463, 2.452150), None),
]


@pytest.mark.parametrize(("threshold", "input_std", "simulated", "reset", "free"), TABLE)
def test_moments_table(threshold, input_std, simulated, reset, free):
    params = QIFParameters(v_threshold=threshold)
    assert membrane_moments(params, input_std) == pytest.approx(reset, abs=1e-6)
    if free is None:
        with pytest.raises(MomentClosureError):
            membrane_moments(params, input_std, closure="free")
    else:
        assert membrane_moments(params, input_std, closure="free") == pytest.approx(free, abs=1e-6)
    measured = simulate_membrane(params, input_std, neurons=2**19)
    assert (measured.mean, measured.std) == pytest.approx(simulated, abs=2e-3)
    assert measured.mean_error < 1e-3
    assert measured.std_error < 1e-3


def test_simulation_follows_from_its_seed_only():
    params = QIFParameters()
    first = simulate_membrane(params, 1.0, neurons=4096, seed=3)
    assert simulate_membrane(params, 1.0, neurons=4096, seed=3) == first
    assert simulate_membrane(params, 1.0, neurons=4096, seed=4) != first


def test_simulated_windows_and_rate():
    """A narrow window's mean is the density at the threshold; a window over everything passes all."""
    params = QIFParameters()
    everything, narrow = Window(-1e6, 1e6), Window(0.99, 1.01, 50.0)
    measured = simulate_membrane(params, 1.0, 0.1, neurons=2**17, windows=(everything, narrow))
    assert measured.window_means[0] == pytest.approx(1, abs=1e-12)
    mean, std = membrane_moments(params, 1.0, 0.1)
    density = math.exp(-0.5 * ((1 - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    assert measured.window_means[1] == pytest.approx(density, rel=0.03)
    assert measured.rate == pytest.approx(firing_rate(params, mean, std), abs=0.01)


def test_simulated_input_gain_scales_nothing():
    """The moments of the input are those of g·x, as in the closures."""
    plain = simulate_membrane(QIFParameters(), 1.0, 0.2, neurons=2**14)
    gained = simulate_membrane(QIFParameters(input_gain=0.5), 1.0, 0.2, neurons=2**14)
    assert gained.mean == pytest.approx(plain.mean, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_std": 0.0}, "input_std=0.0"),
        ({"input_std": 1.0, "input_mean": math.nan}, "input_mean=nan"),
        ({"input_std": 1.0, "neurons": 1}, "neurons=1"),
        ({"input_std": 1.0, "steps": 20}, "steps=20"),
    ],
)
def test_simulation_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        simulate_membrane(QIFParameters(), **options)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (QIFParameters(a=torch.tensor([0.2, 0.3])), "a is a tensor: pass one of its entries"),
        (QIFParameters(input_gain=0.0), "input gain of 0"),
    ],
)
def test_simulation_refuses_neurons(params, message):
    with pytest.raises(ValueError, match=message):
        simulate_membrane(params, 1.0)


def test_a_runaway_membrane_is_reported():
    with pytest.raises(ValueError, match="ran away"):
        simulate_membrane(QIFParameters(reset="soft"), 3.0, neurons=4096)


def _rows(text):
    return {line[:18].strip(): line[18:].split() for line in text.splitlines() if line[:18].strip()}


def test_command_prints_moments_windows_and_seed(capsys):
    assert main(["window", "--dynamics", "paper", "--neurons", "4096", "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    rows = _rows(shown)
    assert "4096 neurons, 60 steps, seed 7" in shown
    assert rows["reset closure"][:2] == ["0.157770", "1.053412"]
    assert rows["free closure"][:2] == ["0.277536", "1.082537"]
    params = QIFParameters()
    for name in ("isometric", "unbiased", "paper", "heuristic"):
        options = {} if name == "heuristic" else {"input_std": 1.0}
        window = Window.named(name, params, **options)
        assert [float(word) for word in rows[name][:3]] == pytest.approx([*window.span(1.0), window.height], abs=1e-6)


def test_command_reports_a_diverging_closure(capsys):
    words = ["window", "--dynamics", "paper", "--threshold", "2", "--neurons", "4096"]
    assert main(words) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["free closure"][0] == "diverges:"
    assert rows["unbiased"][0] == "0.773925"
    assert main([*words, "--closure", "free"]) == 0
    rows = _rows(capsys.readouterr().out)
    assert " ".join(rows["unbiased"]) == "none: the free closure diverges"
    assert rows["heuristic"][0] == "1.500000"


def test_command_matches_a_lif_neuron(capsys):
    assert main(["window", "--beta", "0.9", "--neurons", "4096", "--input-std", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "a 0.05, u1 0, u2 -18" in printed
    assert "rests at 0, unstable" in printed


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["--beta", "0.9"], {"beta": 0.9}),
        (["--beta", "0.9", "--curvature", "0.3"], {"beta": 0.9, "curvature": 0.3}),
        (["--beta", "0.9", "--a", "0.3"], {"beta": 0.9, "a": 0.3}),
        (["--beta", "0.9", "--dynamics", "paper"], {"beta": 0.9, "dynamics": "paper"}),
        (["--beta", "0.9", "--dynamics", "monotone"], {"beta": 0.9, "dynamics": "monotone"}),
        (["--u2", "0.4", "--curvature", "0.3"], {"u2": 0.4, "curvature": 0.3}),
    ],
    ids=str,
)
def test_what_decides_the_map_is_what_decides_it_in_a_neuron(words, arguments, capsys):
    neuron = pytest.importorskip("qif_plugins.adapters.snntorch").QIF(**arguments)
    assert main(["window", "--neurons", "4096", "--input-std", "0.3", *words]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    params = neuron.qif_parameters
    assert line.startswith(f"QIF neuron  a {params.a:g}, u1 {params.u1:g}, u2 {params.u2:g}, threshold 1,")
    assert line.split("dynamics ")[1].split(",")[0] == neuron.dynamics
    assert re.findall(r"(\w+=\S+)(?=[^=]*set aside)", line) == re.findall(r"(\w+=\S+)(?=[^=]*set aside)", repr(neuron))


def test_command_takes_the_map_without_rebound(capsys):
    words = ["--dynamics", "monotone", "--beta", "0.9", "--input-mean", "-0.5", "--neurons", "4096"]
    assert main(["window", *words]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("reset closure"))
    printed = tuple(map(float, line.split()[2:4]))
    without, parabola = (QIFParameters.matching_lif(0.9, rebound=rebound) for rebound in (False, True))
    assert printed == pytest.approx(membrane_moments(without, 1.0, -0.5), abs=1e-5)
    assert printed != pytest.approx(membrane_moments(parabola, 1.0, -0.5), abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dynamics", "paper", "--a", "1"], "both decide the map"),
        (["--dynamics", "monotone"], "pass --beta too"),
        (["--dynamics", "lif"], "pass --beta too, or --a instead (without any of these options the leak is 0.5)"),
        (["--beta", "0.9", "--threshold", "inf"], "v_threshold must be finite, got inf"),
        (["--curvature", "0.4"], "pass --beta too"),
        (["--beta", "1"], "0 <= beta < 1"),
        (["--input-std", "nan"], "input_std=nan"),
        (
            ["--dynamics", "paper", "--threshold", "0"],
            "the input's standard deviation is --threshold, got 0, unless --input-std",
        ),
        (["--kappa", "0"], "kappa must be positive"),
        (["--alpha", "-1"], "alpha must be positive"),
    ],
)
def test_command_refuses(words, message, capsys):
    assert main(["window", "--neurons", "4096", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--neurons", "1"], ["--steps", "20"], ["--seed", "x"], ["--closure", "no"]])
def test_command_refuses_sizes(words):
    with pytest.raises(SystemExit) as stop:
        main(["window", *words])
    assert stop.value.code == 2


def test_simulation_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    simulate_membrane(QIFParameters(), 1.0, neurons=256)
    assert torch.equal(torch.random.get_rng_state(), before)
