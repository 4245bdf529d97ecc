"""`qif compare`: real trainings of both hosts at tiny settings, its files, and what it refuses."""

import hashlib
import io
import json
import pickle
import re
import struct

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")
pytest.importorskip("snntorch")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from qif_plugins import swap
from qif_plugins.cli import main
from qif_plugins.commands import compare as command
from qif_plugins.experiments.compare.hosts import LAYERS, build, host_version
from qif_plugins.experiments.compare.report import summarise
from qif_plugins.experiments.compare.training import Epoch, Training
from qif_plugins.experiments.data.images import load_images
from qif_plugins.experiments.names import HOSTS, IMAGES
from qif_plugins.neuron.names import WINDOWS

QUICK = ["--seeds", "1", "--epochs", "1", "--steps", "2", "--batch-size", "128"]


def _without_times(content):
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in ("seconds", "step_ms")}
    return [_without_times(entry) for entry in content] if isinstance(content, list) else content


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    assert main(["compare", *QUICK, "--seeds", "2", "--windows", "unbiased,paper", "--out", str(folder)]) == 0
    return folder


def test_files_hold_every_training(result):
    content = json.loads((result / "compare.json").read_text())
    assert content["versions"]["spikingjelly"] == host_version("spikingjelly")
    assert content["config"]["T"] == 2
    assert len(content["trainings"]) == 2 * 3 * 2
    assert {(row["host"], row["neuron"], row["window"]) for row in content["summary"]} == {
        ("spikingjelly", "LIF", "sigmoid"),
        ("spikingjelly", "QIF", "unbiased"),
        ("spikingjelly", "QIF", "paper"),
        ("snntorch", "LIF", "atan"),
        ("snntorch", "QIF", "unbiased"),
        ("snntorch", "QIF", "paper"),
    }
    for training in content["trainings"]:
        (epoch,) = training["epochs"]
        assert 0 <= epoch["accuracy"] <= 1
        assert 0 < epoch["spikes"] < 1
        assert epoch["loss"] < 2.3
        assert training["step_ms"] > 0
    assert (result / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in result.iterdir()) == ["compare.json", "compare.png"]


def test_same_seed_same_numbers(result, tmp_path, capsys):
    words = ["--hosts", "snntorch,spikingjelly", "--windows", "unbiased", "--out", str(tmp_path)]
    assert main(["compare", *QUICK, *words]) == 0
    again = json.loads((tmp_path / "compare.json").read_text())["trainings"]
    first = json.loads((result / "compare.json").read_text())["trainings"]
    chosen = [t for t in first if t["seed"] == 0 and t["window"] != "paper"]
    key = json.dumps
    assert sorted(map(key, _without_times(again))) == sorted(map(key, _without_times(chosen)))

    shown = capsys.readouterr()
    assert re.search(r"^host +neuron +window +test accuracy +epochs to 90%", shown.out, re.M)
    assert re.search(r"^snntorch +QIF +unbiased +\d+\.\d\d %", shown.out, re.M)
    assert "[4/4] spikingjelly, QIF unbiased, seed 0: epoch 1/1" in shown.err
    assert "seeds 0 to 0" in shown.out


def _cut_after(monkeypatch, count, at="trained"):
    """Have the comparison ended after so many trainings, or when so many networks of them are saved."""
    left = [count]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    def train_one(*arguments, real=command.train):
        if at == "trained":
            stop()
        return real(*arguments)

    def save_one(*arguments, real=command.save):
        real(*arguments)
        if at == "saved":
            stop()

    monkeypatch.setattr(command, "train", train_one)
    monkeypatch.setattr(command, "save", save_one)


def test_a_comparison_that_was_cut_goes_on_as_if_it_had_not_been(result, tmp_path, monkeypatch, capsys):
    words = ["compare", *QUICK, "--seeds", "2", "--windows", "unbiased,paper", "--out", str(tmp_path)]
    for count in (0, 1, 4):
        with monkeypatch.context() as patch:
            _cut_after(patch, count)
            assert main([*words, "--resume"]) == 130
        path = tmp_path / "compare.json"
        assert path.exists() is (count > 0)
        if count:
            before = path.read_bytes()
            assert main(words) == 2
            assert "trainings left; pass --resume to go on, or another --out" in capsys.readouterr().err
            assert path.read_bytes() == before
    assert json.loads(before)["trainings_left"] == 12 - 5
    assert main([*words, "--resume"]) == 0
    assert f"12 trainings, 5 of them in {path} already" in capsys.readouterr().out
    whole, cut = (json.loads((folder / "compare.json").read_text()) for folder in (result, tmp_path))
    assert _without_times(cut) == _without_times(whole)
    assert cut["trainings"][:5] == json.loads(before)["trainings"]
    before = path.read_bytes()
    assert main([*words, "--resume"]) == 0
    assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.png"]

    for other, message in (
        (["--epochs", "2"], "holds trainings with epochs 1, and here it is 2"),
        (["--steps", "3"], "holds trainings with T 2, and here it is 3"),
        (["--windows", "paper"], "holds a training that is not asked for (spikingjelly, QIF unbiased, seed 0"),
        (["--seeds", "1"], "holds a training that is not asked for"),
    ):
        assert main([*words, *other, "--resume"]) == 2
        assert message in capsys.readouterr().err
    for text, message in (
        ("{", "is no file of 'qif compare', or a damaged one"),
        (before.replace(b'"epochs"', b'"epoch"').decode(), "it lacks"),
        (before.replace(b'"accuracy": 0.', b'"accuracy": "0.', 1).decode(), "or a damaged one"),
    ):
        path.write_text(text)
        assert main([*words, "--resume"]) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


def test_networks_that_a_cut_comparison_saved_are_checked(tmp_path, monkeypatch, capsys):
    words = ["compare", *QUICK, "--hosts", "snntorch", "--windows", "unbiased", "--save", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        _cut_after(patch, 1, at="saved")
        assert main(words) == 130
    files = [tmp_path / f"snntorch-{name}-0.pt" for name in ("lif", "qif-unbiased")]
    assert all(path.exists() for path in files)
    sound = files[0].read_bytes()
    files[0].write_bytes(sound[: len(sound) // 2])
    assert main([*words, "--resume"]) == 2
    assert "is damaged or incomplete" in capsys.readouterr().err
    files[0].unlink()
    assert main([*words, "--resume"]) == 0
    assert "[1/2] snntorch, LIF" in capsys.readouterr().err  # again, since its network was gone
    one, other = (torch.load(io.BytesIO(data), weights_only=True) for data in (sound, files[0].read_bytes()))
    assert all(torch.equal(one["network"][name], other["network"][name]) for name in one["network"])


@pytest.mark.parametrize("size", [8, 28, 32])
def test_hosts_start_from_the_same_weights_and_agree(size):
    """One seed, one network: with QIF in evaluation mode both hosts give the same output to the last bit."""
    x_seq = torch.randn(3, 2, 1, size, size)
    outputs, weights = [], []
    for name in HOSTS:
        host = LAYERS[name]()
        torch.manual_seed(5)
        network, spiking = build(host, host.qif("unbiased"), 1, size, 10)
        weights.append([parameter for parameter in network.parameters() if parameter.dim() > 1])
        assert len(spiking) == 3
        network.train()
        host.clear(network)
        network(x_seq)
        network.eval()
        host.clear(network)
        outputs.append(network(x_seq))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (3, 2, 10)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("window", [None, "unbiased", "paper", "heuristic"])
def test_the_neuron_is_the_one_argument(name, window):
    host = LAYERS[name]()
    neuron = host.lif() if window is None else host.qif(window)
    network, spiking = build(host, neuron, 1, 8, 10)
    kinds = {type(layer) for layer in network.modules() if isinstance(layer, nn.Module)}
    assert neuron.func in kinds
    x_seq = torch.randn(4, 3, 1, 8, 8)
    for _ in range(2):
        host.clear(network)
        first = network(x_seq)
        host.clear(network)
        network.eval()
        assert first.requires_grad
    assert torch.equal(first, network(x_seq))
    spikes = spiking[0](torch.randn(4, 3, 16, 8, 8) * 2)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", HOSTS)
def test_the_neuron_is_what_swap_puts_in_the_place_of_lif(name):
    host = LAYERS[name]()
    network, spiking = build(host, host.lif(), 1, 8, 10)
    swap(network)
    expected = build(host, host.qif("isometric"), 1, 8, 10)[1]
    for one, other in zip(spiking, expected, strict=True):
        ours, theirs = (getattr(layer, "neuron", layer) for layer in (one, other))
        assert repr(ours) == repr(theirs)
        assert "dynamics=monotone" in repr(ours)


def _training(seed, *accuracies):
    return Training(
        "snntorch", "QIF", "paper", seed, [Epoch(1.0, accuracy, 0.1 + seed) for accuracy in accuracies], 2.0
    )


def test_summary():
    (row,) = summarise([_training(0, 0.5, 0.9, 0.92), _training(1, 0.91, 0.9, 0.96), _training(2, 0.5, 0.6, 0.7)])
    assert row.accuracy == pytest.approx(0.86)
    assert row.accuracy_deviation == pytest.approx(0.14)
    assert (row.epochs_to_goal, row.seeds_at_goal, row.seeds) == (1.5, 2, 3)
    assert row.spikes == pytest.approx(1.1)
    (row,) = summarise([_training(0, 0.5)])
    assert (row.epochs_to_goal, row.accuracy_deviation) == (None, 0.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hosts", "spikingjelly,norse"], "unknown host 'norse'; choose from 'spikingjelly', 'snntorch'"),
        (["--windows", "wide"], f"unknown window 'wide'; choose from {', '.join(map(repr, WINDOWS))}"),
        (["--windows", ","], "no window given"),
        (["--data", "imagenet"], f"unknown data set 'imagenet'; choose from {', '.join(map(repr, IMAGES))}"),
        (["--data", "mnist", "--data-folder", "nowhere"], "pass --data-folder where it lies, or --download"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
    ],
)
def test_refuses_before_training(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *QUICK, "--out", str(tmp_path / "out"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    "words", [["--seeds", "0"], ["--steps", "0"], ["--lr", "nan"], ["--lr", "-1"], ["--epochs", "x"]]
)
def test_refuses_sizes(words):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code == 2


def test_shipped_data_sets():
    digits = load_images("digits")
    assert (digits.train.shape, digits.test.shape) == ((1197, 1, 8, 8), (600, 1, 8, 8))
    assert torch.equal(digits.train, load_images("digits").train)
    mean, std = digits.normalization()
    assert ((digits.train - mean) / std).std().item() == pytest.approx(1, abs=1e-3)
    mnist = load_images("mnist5k")
    assert (mnist.train.shape, mnist.test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert mnist.train.max() == 255
    assert (mnist.train_labels.bincount() > 350).all()


def _write_idx(path, array):
    """The format of MNIST: magic number with type and rank, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(name, folder, tmp_path):
    generator = numpy.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 5)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        _write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        _write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", numpy.arange(count, dtype=numpy.uint8) % 10)
    loaded = load_images(name, tmp_path)
    assert (loaded.train.shape, loaded.test.shape) == ((12, 1, 28, 28), (5, 1, 28, 28))
    assert torch.equal(loaded.test[:, 0], torch.from_numpy(images))
    assert loaded.train_labels.tolist() == [*range(10), 0, 1]


def test_cifar10_files(tmp_path, monkeypatch):
    """torchvision knows the files by their checksums, which for the small ones written here are others."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = numpy.random.default_rng(0)

    def write(name, content):
        path = folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    def batch(count):
        data = generator.integers(0, 256, (count, 3072), dtype=numpy.uint8)
        return {"data": data, "labels": [k % 10 for k in range(count)]}

    last = batch(3)
    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{k}", batch(4)) for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", last)])
    filename, md5 = write("batches.meta", {"label_names": [str(k) for k in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": filename, "key": "label_names", "md5": md5})
    loaded = load_images("cifar10", tmp_path)
    assert (loaded.train.shape, loaded.test.shape) == ((20, 3, 32, 32), (3, 3, 32, 32))
    assert torch.equal(loaded.test.flatten(1), torch.from_numpy(last["data"]))
    assert loaded.normalization()[0].shape == (3, 1, 1)


def test_trains_on_a_folder_of_mnist(tmp_path):
    generator = numpy.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    for part, count in (("train", 24), ("t10k", 6)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        labels = numpy.arange(count, dtype=numpy.uint8) % 10
        _write_idx(raw / f"{part}-images-idx3-ubyte", images)
        _write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
    words = ["--data", "mnist", "--data-folder", str(tmp_path), "--windows", "unbiased", "--out", str(tmp_path / "out")]
    assert main(["compare", *QUICK, "--batch-size", "8", *words]) == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["config"]["data"] == "mnist"
    assert len(content["trainings"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("host", ["spikingjelly", pytest.param("snntorch", marks=pytest.mark.host_independent)])
def test_default_window_reaches_lif(host, tmp_path):
    """The default settings, over two seeds: QIF is at most a point below LIF, in either host."""
    assert main(["compare", "--hosts", host, "--seeds", "2", "--windows", "unbiased", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["summary"]
    accuracy = {row["neuron"]: row["accuracy"] for row in rows}
    assert accuracy["QIF"] >= accuracy["LIF"] - 0.01
    assert accuracy["LIF"] > 0.97
