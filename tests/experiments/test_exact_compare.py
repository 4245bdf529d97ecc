"""The equal search: its space, its split, its file, and the command."""

import argparse
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from data_files import tone, write_wav
from shd_files import write_shd

from qif_plugins.commands import exact as command
from qif_plugins.commands import options
from qif_plugins.exact.encoders import encode_images
from qif_plugins.exact.initialisation import InactiveError, initialise
from qif_plugins.experiments.data.sound import encode_folder
from qif_plugins.experiments.exact import search
from qif_plugins.experiments.exact.data import SPEECH, SpikeData, load
from qif_plugins.experiments.exact.search import Comparison, Runs, compare, space, summarise, validation_split
from qif_plugins.experiments.exact.train import LAYERS, Settings, build, fit
from qif_plugins.experiments.landscape.subjects import load_subject
from qif_plugins.experiments.training import NonFiniteError

pytestmark = pytest.mark.host_independent
pytest.importorskip("optuna")

SMALL = Comparison(limit=40, hidden=(5,), epochs=1, batch=16)


def without_seconds(runs):
    def plain(run):
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in run.result["history"]]
        return {**run.setting, **run.result, "history": history}

    return [plain(run) for run in runs]


def test_both_neurons_are_searched_alike():
    assert set(space("digits")) == set(space("mnist5k")) == (set(space("shd")) - {"tau"}) | {"duration", "latest"}
    for dataset in ("digits", "shd"):
        for name, distribution in space(dataset).items():
            if name not in ("latest", "loss"):
                assert distribution.log
                assert distribution.high / distribution.low >= 10
    for dataset, duration in (("shd", 1.4), ("spoken-digits", 0.7)):
        # tau 0.1 to 5 in trials of 2, as the authors' code
        tau = space(dataset)["tau"]
        assert tau.low <= 0.05 * duration
        assert tau.high == pytest.approx(2.5 * duration)
    params = {"duration": 2.0, "latest": 0.5, "loss": "first", "scale": 0.1, "rate": 2.0, "lr": 1e-3, "clip": 3.0}
    lif, qif = (SMALL.settings(neuron, params, seed=7) for neuron in ("lif", "qif"))
    assert replace(lif, neuron="qif") == qif
    assert (lif.latest, lif.duration, lif.clip, lif.seed, lif.hidden) == (1.0, 2.0, 3.0, 7, (5,))
    timed = Comparison(dataset="shd").settings("qif", {"tau": 0.2, "loss": "first", "scale": 0.1}, seed=0)
    assert (timed.scale, timed.duration) == (pytest.approx(0.02), 1.4)
    assert Comparison(dataset="shd").settings("qif", {"tau": 0.2, "loss": "count", "scale": 0.1}, seed=0).scale == 0.1


def test_validation_comes_from_the_training_set_alone():
    data = load("digits", 4.0, 2.0)
    split = validation_split(data)
    assert (len(split.train_labels), len(split.test_labels)) == (1150, 287)

    def images(spikes):
        return {tuple(row.tolist()) for row in torch.stack([spikes.times, spikes.indices.double()], 2).flatten(1)}

    def padded(spikes, width=data.train.times.shape[1]):
        missing = width - spikes.times.shape[1]
        return type(spikes)(
            torch.nn.functional.pad(spikes.times, (0, missing), value=math.inf),
            torch.nn.functional.pad(spikes.indices, (0, missing), value=-1),
            spikes.channels,
        )

    parts = [images(padded(part)) for part in (split.train, split.test)]
    assert parts[0] | parts[1] == images(data.train)
    assert not parts[0] & parts[1]
    assert torch.equal(validation_split(data).test_labels, split.test_labels)
    with pytest.raises(ValueError, match="2 samples to train are too few to hold out"):
        validation_split(load("digits", 4.0, 2.0, limit=2))


def test_a_comparison_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Runs(tmp_path / "whole.json", SMALL)
    arguments = {"trials": 2, "finalists": 1, "confirmations": 1, "seeds": 1}
    compare(whole, **arguments)

    class CutError(Exception):
        pass

    def cut(record):
        raise CutError

    path = tmp_path / "cut.json"
    for finished in range(1, 6):
        with pytest.raises(CutError):
            compare(Runs(path, SMALL), **arguments, report=cut)
        assert len(json.loads(path.read_text())["trials"]) == finished
    again = Runs(path, SMALL)
    done = []
    compare(again, **arguments, report=done.append)
    assert len(done) == len(whole) - 5
    assert without_seconds(again) == without_seconds(whole)
    compare(again, **arguments, report=lambda record: pytest.fail("done again"))

    seeds = {part: {run.setting["seed"] for run in whole if run.setting["part"] == part} for part in ("search", "test")}
    assert not seeds["search"] & seeds["test"]
    summary = summarise(whole, ("lif", "qif"))
    for neuron in ("lif", "qif"):
        tests = whole.of("test", neuron)
        assert summary[neuron]["test"] == [run.result["accuracy"] for run in tests]
        assert all(run.setting["sampled"] == summary[neuron]["params"] for run in tests)
        trials = whole.of("search", neuron)
        best = max(trials, key=lambda trial: trial.result["accuracy"])
        assert best.setting["sampled"] == summary[neuron]["params"]
        assert {len(trial.result["history"]) for trial in trials} == {2}
        assert summary[neuron]["trials"] == 2


def test_a_run_that_fails_counts_as_zero_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MOST_SPIKES", 1)
    runs = Runs(tmp_path / "runs.json", SMALL)
    compare(runs, ["qif"], trials=1, finalists=0, seeds=1)
    assert [run.result["accuracy"] for run in runs] == [0.0, 0.0]
    assert all("max_spikes=5" in run.result["failed"] for run in runs)
    assert summarise(runs, ["qif"])["qif"]["trials failed"] == 1


def test_a_silent_input_cannot_be_made_active():
    empty = encode_images(torch.zeros(3, 4), latest=1.0)
    with pytest.raises(InactiveError, match="does its input spike"):
        initialise(build(Settings(hidden=(3,)), 4, 2), empty)


def test_a_run_has_the_layers_own_limit_of_spikes():
    assert Settings().max_spikes == LAYERS[Settings().neuron](64, 6, 4.0).max_spikes


def test_initialise_stops_counting_where_the_answer_is_known():
    data = load("digits", 4.0, 2.0, limit=50)
    for neuron in ("lif", "qif"):
        layer = LAYERS[neuron](64, 6, 4.0)
        initialise([layer], data.train, rate=1.5)
        assert layer.max_spikes == LAYERS[neuron](64, 6, 4.0).max_spikes
        assert float(layer(data.train).ordinary_counts().double().mean()) == pytest.approx(1.5, abs=0.05)


def tiny():
    data = load("digits", 1.0, 1.0, limit=40)
    return SpikeData(data.train, data.train_labels, data.train, data.train_labels, data.classes)


def test_clipping_bounds_the_step_and_none_leaves_it():
    data = tiny()
    settings = Settings(hidden=(5,), duration=1.0, latest=1.0, epochs=1, batch=10)
    histories, weights = {}, {}
    for clip in (None, 1e9, 1e-12):
        network = build(replace(settings, clip=clip), 64, 10)
        histories[clip] = fit(network, data, replace(settings, clip=clip), lambda record: None)
        weights[clip] = network[0].weight.detach().clone()
    assert torch.equal(weights[None], weights[1e9])
    assert not torch.equal(weights[None], weights[1e-12])
    for row in (histories[None][1], histories[1e-12][1]):
        # The norm is the one before clipping.
        assert 1e-3 < row["grad_norm"] <= row["grad_norm_max"]


def test_a_gradient_that_is_not_finite_stops_the_run():
    data = tiny()
    settings = Settings(hidden=(5,), duration=1.0, latest=1.0, epochs=1, batch=10, scale=1e-320)
    with pytest.raises(NonFiniteError, match="the loss is"):
        fit(build(settings, 64, 10), data, settings, lambda record: None)


def call(*words):
    parser = argparse.ArgumentParser()
    options.exact(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_compares_on_shd_and_refuses_to_mix_comparisons(tmp_path, capsys):
    write_shd(tmp_path)
    out = tmp_path / "out"
    words = [
        "compare",
        "--data",
        "shd",
        "--data-folder",
        tmp_path,
        "--hidden",
        4,
        "--epochs",
        1,
        "--trials",
        1,
        "--out",
        out,
    ]
    assert call(*words, "--seeds", 1) == 0
    capsys.readouterr()
    assert call(*words, "--seeds", 2) == 0
    shown = capsys.readouterr().out
    assert "finished runs, which are not done again" in shown
    assert shown.count("test    ") == 2
    summary = json.loads((out / "compare.json").read_text())
    assert set(summary["neurons"]) == {"lif", "qif"}
    assert set(summary["neurons"]["lif"]["params"]) == set(space("shd"))
    assert len(summary["neurons"]["qif"]["test"]) == 2
    assert (out / "compare.png").stat().st_size > 0
    with pytest.raises(ValueError, match="holds runs with epochs=1, not 2; pass another --out"):
        call(*words, "--epochs", 2)
    (out / "runs.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of 'qif exact compare'"):
        call(*words)


@pytest.mark.parametrize(("data", "files"), [("shd", r"shd_train\.h5"), ("spoken-digits", "the recordings")])
def test_the_command_refuses_data_without_a_folder(tmp_path, data, files):
    with pytest.raises(ValueError, match=f"pass the folder that holds {files}"):
        call("compare", "--data", data, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def spoken(tmp_path):
    for digit, speaker, index in itertools.product(range(2), ("ada", "ben", "cyd"), (0, 5, 12)):
        write_wav(tmp_path / "recordings" / f"{digit}_{speaker}_{index}.wav", tone(500 + 2000 * digit, 0.2))
    return tmp_path


def test_the_events_of_a_recording_are_the_changes_of_its_levels(spoken):
    pytest.importorskip("torchaudio")
    data = load("spoken-digits", 0.7, 0.0, spoken)
    assert (len(data.train_labels), len(data.test_labels), data.train.channels) == (6, 12, 2 * SPEECH.bands)
    found, counts = encode_folder(spoken, SPEECH)
    one = int((data.test_labels == 1).nonzero()[0])
    expected = next(c for c, r in zip(counts, found, strict=True) if r.digit == 1 and r.speaker == "cyd").flatten(1)
    times, channels = data.test.times[one], data.test.indices[one]
    steps = (times[channels >= 0] * 100).round().long() - 1
    again = torch.zeros(SPEECH.steps, expected.shape[1], dtype=torch.int64)
    again.index_put_((steps, channels[channels >= 0]), torch.tensor(1), accumulate=True)
    assert torch.equal(again, expected.long())
    assert len(load("spoken-digits", 0.7, 0.0, spoken, split="index").test_labels) == 6
    few = load("spoken-digits", 0.7, 0.0, spoken, limit=3)
    assert few.train_labels.equal(data.train_labels[:3])
    early = load("spoken-digits", 0.15, 0.0, spoken)
    assert float(early.test.times[torch.isfinite(early.test.times)].max()) <= 0.15


def test_the_command_trains_on_spoken_digits_and_its_landscape_is_measured(spoken, capsys):
    pytest.importorskip("torchaudio")
    words = ["--data", "spoken-digits", "--data-folder", spoken, "--split", "index", "--hidden", 4, "--epochs", 1]
    assert call("train", *words, "--batch-size", 4, "--out", spoken / "out") == 0
    assert "spoken-digits: 12 samples to train, 6 to test" in capsys.readouterr().out
    subject = load_subject(str(spoken / "out"))
    assert subject.network[0].weight.shape == (4, 2 * SPEECH.bands)
