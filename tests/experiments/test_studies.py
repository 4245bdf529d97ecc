"""Studies: the estimator against finite differences, records that survive a kill, pages from real trials."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")
pytest.importorskip("accelerate")
pytest.importorskip("optuna")

from qif_plugins.adapters.spikingjelly import QIFNode
from spikingjelly.activation_based import functional, neuron

from qif_plugins import QIFParameters
from qif_plugins.cli import main
from qif_plugins.diagnostics.spiking import spiking_layers
from qif_plugins.experiments.records import Records, key_of
from qif_plugins.experiments.studies import STUDIES, budget, closures
from qif_plugins.experiments.studies.mismatch import SmoothedLoss, agreement
from qif_plugins.experiments.studies.runner import Options, run_study
from qif_plugins.experiments.studies.stats import paired, welch
from qif_plugins.experiments.studies.trial import data_of, make, surrogate_named, train

pytestmark = pytest.mark.host_independent

ROOT = Path(__file__).resolve().parents[2]


# -- the estimator ---------------------------------------------------------------------------------------------------


NODES, WEIGHTS = numpy.polynomial.legendre.leggauss(80)
STEPS, NOISE, CLASS = 2, 0.5, 1
X = (0.7, -0.3)


def _cumulative(z):
    return 0.5 * torch.special.erfc(-torch.as_tensor(z, dtype=torch.float64) / math.sqrt(2))


def _patterns(charge, gain, inputs):
    """Probability of each pattern of two spikes of one neuron, its membrane integrated over."""
    theta, noise = 1.0, NOISE * gain
    first, second = (gain * x for x in inputs)
    fires = float(_cumulative((first - theta) / noise))
    again = float(_cumulative((charge(0.0) + second - theta) / noise))
    low = first - 9 * noise
    h = low + (theta - low) * (torch.from_numpy(NODES) + 1) / 2
    density = torch.exp(-0.5 * ((h - first) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    weight = torch.from_numpy(WEIGHTS) * (theta - low) / 2 * density
    late = float((weight * _cumulative((charge(h) + second - theta) / noise)).sum())
    return {(1, 1): fires * again, (1, 0): fires * (1 - again), (0, 1): late, (0, 0): 1 - fires - late}


def smoothed_loss(numbers, charge, gain):
    """E[L] of the network of :func:`tiny`, every pattern of spikes summed over."""
    w1, b1, w2, b2, w3, b3 = numbers
    drive = w1 @ torch.tensor(X, dtype=torch.float64) + b1
    total = 0.0
    hidden = [_patterns(charge, gain, (float(x), float(x))) for x in drive]
    for one, two in itertools.product(*hidden):
        probability = hidden[0][one] * hidden[1][two]
        spikes = torch.tensor([one, two], dtype=torch.float64)
        inputs = (w2 @ spikes + b2[:, None])[0]
        for pattern, chance in _patterns(charge, gain, inputs.tolist()).items():
            scores = w3[:, 0] * sum(pattern) / STEPS + b3
            total += probability * chance * float(torch.logsumexp(scores, 0) - scores[CLASS])
    return total


def tiny(node, gain):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2), node(), nn.Linear(2, 1), node(), nn.Linear(1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        model[0].bias.add_(0.8 / gain)  # near the threshold, where spikes are uncertain
        model[2].bias.add_(0.6 / gain)
    functional.set_step_mode(model, "m")
    return model


@pytest.mark.parametrize(
    ("node", "charge", "gain"),
    [
        (lambda: QIFNode(dynamics="paper"), lambda v: 0.25 * v * (v - 0.5), 1.0),
        (lambda: neuron.LIFNode(tau=2.0), lambda v: 0.5 * v, 0.5),
    ],
    ids=["qif", "lif"],
)
def test_score_gradient_is_that_of_the_smoothed_loss(node, charge, gain):
    model = tiny(node, gain)
    parameters = list(model.parameters())
    numbers = [p.detach().double() for p in parameters]
    exact = []
    for number in numbers:
        for index in range(number.numel()):
            values = []
            for step in (1e-5, -1e-5):
                moved = number.clone()
                moved.view(-1)[index] += step
                values.append(smoothed_loss([moved if n is number else n for n in numbers], charge, gain))
            exact.append((values[0] - values[1]) / 2e-5)
    exact = torch.tensor(exact)

    def forward(x):
        functional.reset_net(model)
        return model(x.expand(STEPS, *x.shape)).mean(0)

    smoothed = SmoothedLoss(
        forward, [model[1], model[3]], parameters, torch.tensor([X]), torch.tensor([CLASS]),
        lambda scores, labels: nn.functional.cross_entropy(scores, labels, reduction="none"), NOISE,
    )  # fmt: skip
    estimates = smoothed.score_gradients(3000, 40, torch.Generator().manual_seed(0)).double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert (error < 0.05 * exact.norm()).all()
    assert ((estimates.mean(0) - exact).abs() <= 4 * error + 1e-6).all()


def test_surrogate_gradient_of_a_single_layer_is_exact_where_the_window_is_the_density():
    # E[w(m + σξ)] of a window much narrower than the noise is the normal density: the true derivative of one layer.
    torch.manual_seed(0)
    window = surrogate_named("heuristic", 0.05, QIFNode().params)
    model = nn.Sequential(nn.Linear(3, 4), QIFNode(surrogate_function=window, step_mode="m"), nn.Linear(4, 2))

    def forward(x):
        functional.reset_net(model)
        return model(x[None]).mean(0)

    x, labels = torch.randn(8, 3), torch.randint(2, (8,))
    smoothed = SmoothedLoss(forward, [model[1]], list(model[0].parameters()), x, labels, _squares, 0.5)
    true = smoothed.score_gradients(3000, 10, torch.Generator().manual_seed(1))
    other = smoothed.surrogate_gradients(3000, 10, torch.Generator().manual_seed(2))
    seen = agreement(true, other)
    assert seen.resolved
    assert abs(seen.cosine - 1) < 4 * seen.cosine_error + 0.01
    assert abs(seen.ratio - 1) < 4 * seen.ratio_error + 0.01


def _squares(scores, labels):
    # Linear in the spikes, so that no product of them correlates.
    return scores.gather(1, labels[:, None])[:, 0]


def test_agreement_has_no_bias_from_noise():
    torch.manual_seed(0)
    g = torch.randn(500)
    other = g + torch.randn(500)
    expected = float(torch.dot(g, other) / g.norm() / other.norm())
    many = [
        agreement(g + 3 * torch.randn(8, 500), other + 3 * torch.randn(8, 500)) for _ in range(50)
    ]  # the plain cosine of two means would be near 0.3
    cosines = torch.tensor([seen.cosine for seen in many])
    assert abs(cosines.mean() - expected) < 4 * cosines.std() / 50**0.5 + 0.01
    assert 0.5 < torch.tensor([seen.cosine_error for seen in many]).mean() / cosines.std() < 2
    assert not agreement(torch.randn(8, 50), torch.randn(8, 50) + 1).resolved


@pytest.mark.parametrize(("noise", "repeats", "match"), [(0.0, 4, "positive"), (0.5, 1, "at least 2")])
def test_estimator_refuses(noise, repeats, match):
    arguments = (lambda x: x, [], [], torch.zeros(1, 2), torch.zeros(1), _squares, noise)
    with pytest.raises(ValueError, match=match):
        SmoothedLoss(*arguments).score_gradients(repeats, 3, None)


# -- records ---------------------------------------------------------------------------------------------------------

FILLER = """
import sys
from pathlib import Path
from qif_plugins.experiments.records import Records
records = Records(Path(sys.argv[1]))
for number in range(10**6):
    records.add({"number": number, "filler": "x" * 2000}, {"value": number}, 0.0)
"""


def test_a_kill_leaves_a_complete_file(tmp_path):
    path = tmp_path / "study.json"
    process = subprocess.Popen([sys.executable, "-c", FILLER, str(path)], cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while not path.exists() or len(json.loads(path.read_text())["trials"]) < 20:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    records = Records(path)
    numbers = [trial.setting["number"] for trial in records]
    assert numbers == list(range(len(numbers)))
    records.add({"number": -1}, {"value": math.nan}, 1.234)
    again = Records(path)
    assert len(again) == len(numbers) + 1
    assert again.get({"number": -1}).result == {"value": None}
    assert again.environments[0]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_records_refuse_another_file(tmp_path):
    path = tmp_path / "study.json"
    path.write_text('{"trials": 3}')
    with pytest.raises(ValueError, match=r"study\.json is no record"):
        Records(path)


def test_a_stopped_study_goes_on_in_other_processes(tmp_path):
    options, name = Options(quick=True), "closures"

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(name, options, tmp_path / "stopped", "", say=stop)
    (first,) = Records(tmp_path / "stopped" / f"{name}.json")
    lines = []
    page = run_study(name, options, tmp_path / "stopped", "", jobs=2, say=lines.append)
    stopped = {key_of(trial.setting): trial for trial in Records(tmp_path / "stopped" / f"{name}.json")}
    assert len(lines) == len(stopped) - 1 == 4
    assert stopped[key_of(first.setting)] == first
    whole = run_study(name, options, tmp_path / "whole", "", say=lambda _: None)
    for trial in Records(tmp_path / "whole" / f"{name}.json"):
        assert trial.result == stopped[key_of(trial.setting)].result
    assert page.read_text().split("## Method")[0] == whole.read_text().split("## Method")[0]
    before = page.read_text()
    lines.clear()
    run_study(name, options, tmp_path / "stopped", "", say=lines.append)
    assert not lines
    assert page.read_text() == before
    # Another seed is another trial, of which the page of what there is knows nothing.
    run_study(name, dataclasses.replace(options, seeds=2), tmp_path / "stopped", "", train=False)
    assert len(Records(tmp_path / "stopped" / f"{name}.json")) == 5


# -- trials ----------------------------------------------------------------------------------------------------------

SETTING = {
    "data": "digits", "neuron": "qif", "layers": 3, "width": 16, "norm": "tdbn", "steps": 3, "epochs": 1, "seed": 0,
    "batch_size": 64, "optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "detach_reset": False,
}  # fmt: skip


def test_a_search_never_sees_the_test_images():
    held_back, whole = data_of("digits", True), data_of("digits")
    assert len(held_back.x) + len(held_back.test_x) == len(whole.x)
    # Normalized by other images, but by one affine map: the labels tell whether they are the training images' last.
    assert torch.equal(torch.cat([held_back.y, held_back.test_y]), whole.y)


@pytest.mark.parametrize("name", ["paper", "unbiased", "heuristic", "atan"])
def test_surrogates_of_both_neurons(name):
    for kind in ("lif", "qif"):
        model = make({**SETTING, "neuron": kind, "surrogate": name, "detach_reset": True})
        nodes = list(spiking_layers(model).values())
        assert len(nodes) == 2
        assert all(node.detach_reset for node in nodes)
        shown = repr(nodes[0].surrogate_function)
        assert ("ATan" in shown) == (name == "atan")
    if name in ("paper", "unbiased"):  # for QIF, what the paper's QIFNode itself derives
        assert nodes[0].qif_parameters == QIFParameters()
        own, made = QIFNode(dynamics="paper", window=name).surrogate_function, nodes[0].surrogate_function
        assert (own.lo, own.hi, own.height) == (made.lo, made.hi, made.height)


def test_a_training_that_diverges_is_a_result():
    model = make(SETTING)
    with torch.no_grad():
        model.hidden[3].weight[0, 0] = math.inf
    result = train(SETTING, model=model)
    assert result["diverged"] == "hidden.3"
    assert result["accuracy"] == pytest.approx(0.1)


def test_closure_measurement_leaves_the_model():
    model = make(SETTING)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    rows = closures.measure(model, data_of("digits").test_x[:50], 3)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [row["layer"] for row in rows] == list(spiking_layers(model))
    for row in rows:
        assert abs(row["input_mean"]) < 1e-4
        assert row["input_std"] == pytest.approx(1, abs=0.02)
    # The image is the same at every step, so the first layer's input is.
    assert rows[0]["input_correlation"] == pytest.approx(1, abs=1e-5)


def test_search_is_decided_by_its_trials_alone(tmp_path):
    def settings():
        return [key_of(setting) for setting in budget.plan(Options(quick=True), records)]

    optuna = pytest.importorskip("optuna")
    verbosity = optuna.logging.get_verbosity()
    records = Records(tmp_path / "budget.json")
    for _ in range(3):
        for setting in budget.plan(Options(quick=True), records):
            if setting not in records:
                records.add(setting, {"accuracy": 1 / (1 + setting["lr"])}, 0.0)
    now = settings()
    records = Records(tmp_path / "budget.json")
    assert settings() == now
    final = [json.loads(key) for key in now if json.loads(key)["kind"] == "final"]
    assert len(final) == 4
    assert not any(setting["validation"] for setting in final)
    assert optuna.logging.get_verbosity() == verbosity


def test_intervals(monkeypatch):
    from scipy import stats

    a, b = [0.91, 0.93, 0.92, 0.95], [0.94, 0.95, 0.93, 0.97]
    expected = stats.ttest_rel(b, a).confidence_interval()
    assert paired(a, b)[1:] == pytest.approx((expected.low, expected.high))
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert welch(a, b)[1:] == pytest.approx((expected.low, expected.high))
    expected = stats.ttest_rel(b, a).confidence_interval(1 - 0.05 / 4)
    assert paired(a, b, comparisons=4)[1:] == pytest.approx((expected.low, expected.high))
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'qif-plugins\[study\]'"):
        paired(a, b)


# -- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_from_the_command_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["study", name, "--quick", "--results", str(ROOT / "benchmarks" / "results")]
    assert main(arguments) == 0
    shown = capsys.readouterr().err
    assert ("trial/s" in shown) == (name != "latency")
    assert "batch_size" not in shown  # no setting a line
    folder = tmp_path / "runs" / "studies"
    page = (folder / f"{name}.md").read_text()
    assert (folder / f"{name}.png").stat().st_size > 5000
    assert f"`qif study {name} --quick`" in page
    assert "nan" not in page.lower()
    finding = page.split("\n\n")[2]
    assert finding in (folder / "index.md").read_text()
    names = {f"{name}.md", f"{name}.png", "index.md"} | ({f"{name}.json"} if name != "latency" else set())
    assert {path.name for path in folder.iterdir()} == names


def test_list_and_errors(tmp_path, capsys):
    assert main(["study", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)
    assert main(["study", "pancakes"]) == 2
    assert "'windows', 'closures'" in capsys.readouterr().err
    assert main(["study", "learnable", "--page-only", "--out", str(tmp_path)]) == 2
    assert "holds no trial" in capsys.readouterr().err
    assert main(["study", "latency", "--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "qif bench" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
