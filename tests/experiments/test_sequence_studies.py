"""The studies of speech and events: their networks, the costs that they count, and pages from small files."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

pytest.importorskip("spikingjelly.activation_based.model.ms_resnet")  # SpikingJelly 2 has it
pytest.importorskip("snntorch")
pytest.importorskip("accelerate")
pytest.importorskip("optuna")
pytest.importorskip("scipy")

from data_files import tone, write_images, write_nmnist, write_wav
from qif_plugins.adapters.spikingjelly import QIFNode
from spikingjelly.activation_based import neuron

from qif_plugins.cli import main
from qif_plugins.diagnostics.energy.costs import Costs
from qif_plugins.diagnostics.spiking import spiking_layers
from qif_plugins.experiments.studies import images, sequences, spikes
from qif_plugins.experiments.studies.runner import Options, run_study

pytestmark = pytest.mark.host_independent


def write_sample(path, digit):
    write_nmnist(path, [(1000 * t, (3 * t) % 34, (5 * t + digit) % 34, t % 2) for t in range(40)])


@pytest.fixture
def folders(tmp_path):
    """Twelve recordings of three speakers, and a sample of events of every digit to train and to test on."""
    speech, events = tmp_path / "speech", tmp_path / "events"
    for digit, speaker, index in itertools.product(range(2), ("ada", "ben", "cyd"), (0, 7)):
        write_wav(speech / f"{digit}_{speaker}_{index}.wav", tone(500 + 1000 * digit + 10 * index))
    for part, digit in itertools.product(("Train", "Test"), range(10)):
        write_sample(events / part / str(digit) / "0.bin", digit)
    return {"spoken-digits": speech, "nmnist": events}


@pytest.fixture
def small(monkeypatch):
    for name, widths in (("spoken-digits", (6, 6)), ("nmnist", (2, 3))):
        kind = dataclasses.replace(sequences.KINDS[name], steps=4, widths=widths, epochs=1)
        monkeypatch.setitem(sequences.KINDS, name, kind)


def built(**entries):
    example = (torch.rand(6, 4, 1, 1, 5) < 0.5).float()
    setting = {**sequences.settings_of("digits", entries.pop("recurrent", False)), "arm": "LIF", "seed": 3, **entries}
    return sequences.make(setting, example), example


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_arm_starts_from_the_weights_of_the_lif_network(norm, recurrent):
    lif, _ = built(norm=norm, recurrent=recurrent)
    for arm, arguments in sequences.ARMS.items():
        model, example = built(norm=norm, recurrent=recurrent, arm=arm)
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in lif.named_parameters())
        for layer in spiking_layers(model).values():
            assert isinstance(layer, QIFNode) == (arguments is not None)
            assert isinstance(layer, neuron.ParametricLIFNode) == (arm == "PLIF")
        assert model(example).shape == (6, 4, 10)
    assert len(list(built(arm="PLIF", norm=norm)[0].parameters())) == len(list(built(norm=norm)[0].parameters())) + 1


def test_the_threshold_is_the_swapped_neurons_too():
    for arm in ("LIF", "QIF, swap"):
        model, _ = built(arm=arm, threshold=2.5)
        (layer,) = spiking_layers(model).values()
        assert layer.v_threshold == 2.5
        assert getattr(layer, "input_gain", 1.0) == 1  # a higher one would undo the threshold


def test_a_recurrent_layer_adds_its_weighted_spikes_of_the_step_before():
    model, example = built(recurrent=True, norm=None)
    flat, linear, cell = list(model)[:3]
    assert isinstance(cell, sequences.Recurrent)
    x = 3 * linear(flat(example))
    v, spike, expected = torch.zeros(4, 16), torch.zeros(4, 16), []
    for step in x:
        h = 0.9 * v + step + spike @ cell.weights.weight.T
        spike = (h >= 1).float()
        v = h * (1 - spike)
        expected.append(spike)
    assert torch.equal(cell(x), torch.stack(expected))
    assert 0 < torch.stack(expected).mean() < 1


# -- trials ------------------------------------------------------------------------------------------------------------


def test_a_trial_counts_what_the_trained_network_costs():
    setting = {**sequences.settings_of("digits"), "arm": "QIF, swap", "seed": 0}
    result = sequences.run(setting, {})
    assert result["samples"] == [200, 100]
    assert result == sequences.run(setting, {})
    costs = Costs()
    updates = 8 * 16 * (costs.lif + costs.qif_extra)
    expected = result["macs"] * costs.mac + result["synops"] * costs.ac + updates
    assert result["picojoules"] == pytest.approx(expected)
    assert result["macs"] == 8 * 8 * 16  # the rows of images are not binary
    assert result["synops"] == pytest.approx(result["rate"] * 8 * 16 * 10)
    lif = sequences.run({**setting, "arm": "LIF"}, {})
    assert lif["picojoules"] == pytest.approx(lif["macs"] * costs.mac + lif["synops"] * costs.ac + 8 * 16 * costs.lif)


@pytest.mark.parametrize("arm", spikes.ARMS)
def test_a_penalty_on_firing_saves_spikes(arm):
    setting = {**sequences.settings_of("digits"), "arm": arm, "seed": 0, "epochs": 5, "lr": 0.02}
    rates = [sequences.run({**setting, "penalty": penalty}, {})["rate"] for penalty in (0.0, 30.0)]
    assert rates[1] < 0.8 * rates[0]


def test_a_network_that_diverges_has_the_accuracy_of_guessing():
    result = sequences.run({**sequences.settings_of("digits"), "arm": "LIF", "seed": 0, "lr": math.inf}, {})
    assert result["accuracy"] == 0.1
    assert result["diverged"]


# -- pages -------------------------------------------------------------------------------------------------------------


def test_speech_and_events_from_folders(folders, small, tmp_path, capsys):
    pytest.importorskip("torchaudio")
    out = tmp_path / "out"
    options = Options(seeds=2, folders={"nmnist": folders["nmnist"]})
    lines = []
    page = run_study("sequences", options, out, "qif study sequences", say=lines.append)
    assert len(lines) == 2 * 11
    text = page.read_text()
    assert "N-MNIST, batch norm" in text
    assert "10 samples to train and 10 to test, T = 4, convolutions of 2, 3 channels" in text
    assert "`qif study sequences --data-folder nmnist=FOLDER`" in text
    assert str(tmp_path) not in (out / "sequences.json").read_text() + text
    # Other data are added to what is there, and the page needs no folder.
    both = dataclasses.replace(options, seeds=1, folders={"spoken-digits": folders["spoken-digits"]})
    run_study("sequences", both, out, "qif study sequences", say=lines.append)
    assert len(lines) == 2 * 11 + 22
    text = run_study("sequences", Options(seeds=1), out, "qif study sequences", train=False).read_text()
    assert "N-MNIST, no norm" in text
    assert "speech, recurrent, no norm" in text
    assert "4 samples to train and 8 to test" in text
    assert "--data-folder spoken-digits=FOLDER nmnist=FOLDER`" in text
    trials = json.loads((out / "sequences.json").read_text())["trials"]
    assert all(trial["result"]["synops"] > 0 == trial["result"]["macs"] for trial in trials)  # spikes all the way


def test_accuracy_against_spikes_from_a_folder(folders, small, tmp_path, monkeypatch):
    pytest.importorskip("torchaudio")
    monkeypatch.setattr(spikes, "PENALTIES", (3.0,))
    monkeypatch.setattr(spikes, "THRESHOLDS", (0.5, 2.0))
    monkeypatch.chdir(tmp_path)
    words = ["study", "spikes", "--seeds", "2", "--data-folder", f"spoken-digits={folders['spoken-digits']}"]
    assert main([*words, "--out", "out"]) == 0
    text = (tmp_path / "out" / "spikes.md").read_text()
    assert "speech, penalty on firing" in text
    assert "`qif study spikes --seeds 2 --data-folder spoken-digits=FOLDER`" in text
    assert len(json.loads((tmp_path / "out" / "spikes.json").read_text())["trials"]) == 2 * 4 * 3


def test_images_are_shown_at_every_step_to_as_many_arms_as_steps_are_asked_for(tmp_path, monkeypatch):
    write_images(tmp_path / "images", ("train", "test"), [f"class{number}" for number in range(10)])
    kind = dataclasses.replace(sequences.KINDS["cifar10"], widths=(2, 2, 3), epochs=1)
    monkeypatch.setitem(sequences.KINDS, "cifar10", kind)
    monkeypatch.chdir(tmp_path)
    words = ["study", "images", "--data-folder", "cifar10=images", "--out", "out"]
    assert main([*words, "--seeds", "1"]) == 0
    assert "Nothing is significant from one seed." in (tmp_path / "out" / "images.md").read_text()
    assert main([*words, "--seeds", "2"]) == 0
    text = (tmp_path / "out" / "images.md").read_text()
    assert "CIFAR-10, T = 4, batch norm | QIF, paper's parameters | 2 |" in text
    assert "a folder a class" in text
    assert (
        "CIFAR-10 (the same image at every step): 20 samples to train and 20 to test, T = 2 and 4, convolutions" in text
    )
    trials = json.loads((tmp_path / "out" / "images.json").read_text())["trials"]
    assert len(trials) == 2 * len(images.STEPS) * len(images.ARMS)
    for trial in trials:  # pixels at every step; fewer channels than before, so the first stride is 1
        setting, result = trial["setting"], trial["result"]
        assert result["by_class"]
        assert result["macs"] == setting["steps"] * 9 * 3 * 2 * 32 * 32


def test_data_that_are_not_there_or_not_the_same_are_refused(folders, small, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["study", "sequences", "--out", out]) == 2
    assert "pass --data-folder spoken-digits=FOLDER nmnist=FOLDER, or one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "sequences", "--out", out, "--data-folder", str(tmp_path)])
    assert (
        "is not of the form NAME=FOLDER with one of the names spoken-digits, nmnist, cifar10" in capsys.readouterr().err
    )
    assert main(["study", "sequences", "--out", out, "--data-folder", f"nmnist={tmp_path / 'nowhere'}"]) == 2
    assert "there is no N-MNIST in" in capsys.readouterr().err
    run_study("sequences", Options(seeds=1, folders={"nmnist": folders["nmnist"]}), tmp_path / "out", "")
    for part, digit in itertools.product(("Train", "Test"), range(10)):
        write_sample(tmp_path / "more" / part / str(digit) / "0.bin", digit)
    write_sample(tmp_path / "more" / "Train" / "3" / "1.bin", 3)
    with pytest.raises(ValueError, match=r"nmnist are of \(10, 10\) and \(11, 10\) samples"):
        run_study("sequences", Options(seeds=2, folders={"nmnist": tmp_path / "more"}), tmp_path / "out", "")


def test_curves_are_compared_at_equal_cost_over_the_costs_that_both_reach():
    def result(synops, accuracy):
        return {"synops": synops, "picojoules": 2 * synops, "accuracy": accuracy}

    # Accuracy rises by 0.1 for each factor of 10; QIF lies 0.03 and 0.05 above LIF at the same cost.
    results = {}
    for seed, gain in ((0, 0.03), (1, 0.05)):
        for penalty, cost in ((0.0, 1000.0), (1.0, 100.0), (9.0, 10.0)):
            lif = result(cost, 0.1 * math.log10(cost))
            qif = result(cost / 2, 0.1 * math.log10(cost / 2) + gain)
            results.setdefault(("digits", "LIF", penalty, 1.0), {})[seed] = lif
            results.setdefault(("digits", "QIF, swap", penalty, 1.0), {})[seed] = qif
    compared = {
        (sweep, cost): spikes._at_equal_cost(results, "digits", "QIF, swap", sweep, cost)
        for sweep, cost in (("penalty", "synops"), ("penalty", "picojoules"), ("threshold", "synops"))
    }
    (mean, low, high), costs = compared["penalty", "synops"]
    assert mean == pytest.approx(0.04)
    assert (mean - low) == pytest.approx(high - mean) == pytest.approx(0.01 * 12.706, rel=1e-3)
    assert costs == pytest.approx((10, 500))
    assert compared["penalty", "picojoules"][1] == pytest.approx((20, 1000))
    assert compared["threshold", "synops"] is None  # one point is no curve
    for threshold, cost in ((2.0, 100.0), (4.0, 10.0)):  # LIF's thresholds, 0.02 below its penalties
        saved = result(cost, 0.1 * math.log10(cost) - 0.02)
        results["digits", "LIF", 0.0, threshold] = {0: saved, 1: saved}
    (mean, *_), costs = spikes._at_equal_cost(results, "digits", "LIF", "threshold", "synops")
    assert -0.02 < mean < 0
    assert costs == pytest.approx((10, 1000))
