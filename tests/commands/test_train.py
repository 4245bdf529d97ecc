"""``qif train`` and ``qif evaluate`` from the outside."""

import io
import json
import math
import os
import re
import sys

import forked
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("spikingjelly")
pytest.importorskip("sklearn")

from qif_plugins import cli
from qif_plugins.experiments.checkpoints import COMPARE, EXACT, load_checkpoint
from qif_plugins.support.files import occupied, write_json

SMALL = [
    "--config", "digits", "--set", "training.epochs=2", "--set", "model.width=32", "--set", "neuron.backend=torch",
    "--set", "data.steps=2",
]  # fmt: skip


MINE = [".my-settings.json", ".last-1.pt", ".last.pt.qif-mine.tmp.pt", "notes.json"]
REST = ".history.json.qif-0123456789abcdef.tmp.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    folder.mkdir()
    for name in (*MINE, REST):
        (folder / name).write_text("{}")
    threads = torch.get_num_threads()
    assert cli.main(["train", *SMALL, "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def test_it_trains_logs_and_evaluates(trained, capsys):
    history = json.loads((trained / "history.json").read_text())
    names = {"loss", "accuracy", "rate", "gradient_norm", "lr", "seconds", "test_loss", "test_accuracy", "test_rate"}
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(names <= row.keys() for row in history)
    assert history[1]["test_accuracy"] > 0.5
    best = max(history, key=lambda row: row["test_accuracy"])
    assert cli.main(["evaluate", str(trained / "best.pt"), "--batch-size", "600"]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {best['test_accuracy']:.2%}" in out
    assert f"loss {best['test_loss']:.4f}" in out
    rates = dict(re.findall(r"^(\S+) +(0\.\d{4})$", out, re.MULTILINE))
    assert rates.keys() == {"hidden.2", "hidden.5", "all"}
    assert float(rates["all"]) == pytest.approx(best["test_rate"], abs=1e-4)


@pytest.mark.host_independent
def test_of_what_lies_in_the_folder_it_removes_its_own_rests_alone(trained):
    files = {"best.pt", "last.pt", "history.json", "tensorboard"}
    assert {path.name for path in trained.iterdir()} == {*files, *MINE}


@pytest.mark.host_independent
@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
def test_result_files_have_the_rights_of_ordinary_ones(tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            write_json(tmp_path / "result.json", {})
        finally:
            os.umask(before)
        assert (tmp_path / "result.json").stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "result.json", float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.host_independent
def test_tensorboard_reads_the_logs(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = accumulator.EventAccumulator(str(trained / "tensorboard"))
    logs.Reload()
    history = json.loads((trained / "history.json").read_text())
    steps = -(-1197 // 64)
    for tag, name in (("train/loss", "loss"), ("test/accuracy", "test_accuracy"), ("train/lr", "lr")):
        events = logs.Scalars(tag)
        assert [event.step for event in events] == [steps, 2 * steps]
        assert [event.value for event in events] == pytest.approx([row[name] for row in history], rel=1e-6)
    assert len(logs.Scalars("step/loss")) == 2 * steps
    assert len(logs.Scalars("rate/hidden.2")) == 2


@pytest.mark.host_independent
def test_a_finished_run_is_not_run_over_or_changed(trained, capsys, monkeypatch):
    before = (trained / "last.pt").read_bytes()
    assert cli.main(["train", *SMALL, "--out", str(trained)]) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert cli.main(["train", *SMALL, "--set", "optimizer.lr=0.5", "--out", str(trained), "--resume"]) == 2
    assert "optimizer.lr (was 0.004, now 0.5)" in capsys.readouterr().err
    (trained / "runs").mkdir()
    (trained / "runs" / "digits").symlink_to(trained)
    with monkeypatch.context() as patch:
        patch.chdir(trained)
        assert cli.main(["train", *SMALL, "--set", "optimizer.lr=0.5", "--resume"]) == 2
    assert "the run in runs/digits was made with another configuration" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(trained), "--resume", "--set", "training.save_every=7", "--quiet"]) == 0
    assert cli.main(["train", "--config", "digits", "--set", "neuron.name=qiff", "--out", str(trained / "new")]) == 2
    assert "unknown neuron 'qiff'" in capsys.readouterr().err
    assert not (trained / "new").exists()
    assert (trained / "last.pt").read_bytes() == before


@pytest.mark.host_independent
def test_show_and_missing_arguments(capsys):
    assert cli.main(["train", "--config", "cifar10dvs_vggsnn", "--set", "training.seed=4", "--show"]) == 0
    out = capsys.readouterr().out
    assert "data.steps = 10" in out
    assert "training.seed = 4" in out
    assert cli.main(["train"]) == 2
    assert "--config is missing: a TOML file, or one of cifar10" in capsys.readouterr().err
    assert cli.main(["train", "--resume"]) == 2
    assert "--resume takes the one of the run in --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "[]" not in capsys.readouterr().out


@pytest.mark.host_independent
def test_a_diverging_run_ends_with_the_layer_and_without_a_checkpoint(tmp_path, capsys):
    wild = ["--set", "optimizer.name=sgd", "--set", "optimizer.lr=1e38", "--set", "model.norm=none", "--quiet"]
    assert cli.main(["train", *SMALL, *wild, "--out", str(tmp_path / "run"), "--no-tensorboard"]) == 2
    message = capsys.readouterr().err
    assert re.search(r"training stopped at epoch 1, step \d+: .* It began in the (forward|backward) pass", message)
    assert "learning rate" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.host_independent
def test_files_that_are_no_checkpoints(trained, tmp_path, capsys):
    exact = tmp_path / "exact" / "last.pt"
    exact.parent.mkdir()
    torch.save({**torch.load(trained / "last.pt"), "kind": EXACT}, exact)
    text, other, tensor = tmp_path / "text.pt", tmp_path / "other.pt", tmp_path / "tensor.pt"
    text.write_text("hello")
    torch.save({"model": {}}, other)
    torch.save(torch.zeros(2), tensor)
    for path, says in (
        (tmp_path / "missing.pt", "there is no file"),
        (trained, "best.pt"),
        (text, "is no checkpoint of 'qif train'"),
        (other, "a checkpoint of another program"),
        (tensor, "a saved Tensor"),
    ):
        assert cli.main(["evaluate", str(path)]) == 2
        assert says in capsys.readouterr().err
    for command in (
        ["evaluate", str(exact)],
        ["energy", "--checkpoint", str(exact)],
        ["train", "--resume", "--out", str(exact.parent)],
        ["landscape", str(exact), "--out", str(tmp_path)],
    ):
        assert cli.main(command) == 2
        assert f"go on from it with 'qif exact train --resume --out {exact.parent}'" in capsys.readouterr().err
    torch.save({**torch.load(trained / "last.pt"), "kind": COMPARE}, other)
    assert cli.main(["evaluate", str(other)]) == 2
    assert "what is wanted is a checkpoint of 'qif train'; 'qif landscape' measures it" in capsys.readouterr().err
    assert cli.main(["evaluate", str(trained / "last.pt"), "--data", "mnist5k"]) == 2
    assert "shape and classes must be the same" in capsys.readouterr().err
    early = {name: value for name, value in torch.load(trained / "last.pt").items() if name != "kind"}
    torch.save(early, other)
    assert load_checkpoint(other)["config"] == early["config"]


def _without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def _with(value, *path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def _zeros(*path):
    return _with(torch.zeros(3), *path)


GROUP = "state", "optimizer", "param_groups", 0
BROKEN = [
    *[
        (_without("state", part), f"it lacks state.{part}")
        for part in ("model", "random", "epoch", "history", "seconds")
    ],
    (_without("state"), "it lacks state"),
    (_without("state", "optimizer"), "it lacks state.optimizer"),
    (_without("state", "optimizer", "param_groups"), "it lacks state.optimizer.param_groups"),
    (_without("state", "scheduler", "last_epoch"), "it lacks scheduler.last_epoch"),
    (_without("state", "optimizer", "state", 0, "exp_avg"), "it lacks optimizer.state[0].exp_avg"),
    (_without("state", "model", "hidden.0.weight"), "another model's"),
    (_with({}, "state", "optimizer", "state"), "it lacks optimizer.state"),
    (_with([], "config"), "config must be a table, and is a list"),
    (_with({}, "config"), "the configuration in"),
    (_with({"state": 3}, "state", "epoch"), "state.epoch must be a whole number, and is a table"),
    (_with(7, "state", "epoch"), "its epoch 7"),
    (_with([1, 2], "state"), "state must be a table, and is a list"),
    (_with(None, "state", "scheduler"), "it has no scheduler, and this run has one"),
    (_with("x", "state", "optimizer", "param_groups", 0, "lr"), "lr must be"),
    (_zeros("state", "optimizer", "state", 0, "exp_avg"), "optimizer.state[0].exp_avg is [3], and the weight [32, 64]"),
    (_zeros("state", "model", "hidden.0.weight"), "another model's"),
    (_zeros("state", "random", 0, "torch", 0), "its states of the random number generators are invalid"),
    (
        _with(["MT19937", [1], 2], "state", "random", 0, "numpy"),
        "its states of the random number generators are invalid",
    ),
    (_with([1], "state", "means", "loss"), "each of its means must be"),
    (
        _with(torch.full((32, 64), float("nan")), "state", "model", "hidden.0.weight"),
        "not finite: hidden.0.weight is NaN",
    ),
    (_without("state", "optimizer", "state", 2), "it lacks optimizer.state[2]"),
    (
        _with(None, "state", "optimizer", "state", 0, "exp_avg"),
        "optimizer.state[0].exp_avg must be a Tensor, and is noth",
    ),
    (
        _with(torch.tensor(1.0), "state", "optimizer", "state", 0, "exp_avg_sq"),
        "exp_avg_sq is [], and the weight [32, 64]",
    ),
    (_with("x", "state", "optimizer", "state", 1, "step"), "optimizer.state[1].step must be"),
    (_with(-1, "state", "optimizer", "state", 1, "step"), "optimizer.state[1].step must be at least 0, and is -1.0"),
    (_with([math.nan, 0.9], *GROUP, "betas"), "optimizer.param_groups[0].betas[0] is NaN"),
    (_with([0.9], *GROUP, "betas"), "optimizer.param_groups[0].betas has 1 entries, and this run's 2"),
    (_without(*GROUP, "eps"), "it lacks optimizer.param_groups[0].eps"),
    (
        _with("yes", *GROUP, "amsgrad"),
        "optimizer.param_groups[0].amsgrad must be true or false or nothing, and is text",
    ),
    (_with([None], "state", "scheduler", "base_lrs"), "scheduler.base_lrs[0] must be a number, and is nothing"),
    (_with([3], "state", "scheduler", "lr_lambdas"), "scheduler.lr_lambdas[0] must be"),
    (_with("3", "state", "scheduler", "_step_count"), "scheduler._step_count must be a whole number, and is text"),
    (_with([], "state", "random"), "it lacks random[0]"),
    (_with(3, "state", "step"), "it lacks means.loss, of the epoch under way"),
    (_with([-1.0], "state", "rates"), "each of its rates must be"),
    (_without("config", "optimizer"), "optimizer is missing from the configuration"),
    (_with(["x"], "kind"), "its kind is"),
    (_with("qif-plugins training checkpoint 2", "format"), "'qif-plugins training checkpoint 2' of qif-plugins"),
]


@pytest.mark.host_independent
@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_a_checkpoint_that_lacks_a_part_is_not_gone_on_from(trained, tmp_path, capsys, change, says):
    content = torch.load(trained / "last.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    assert cli.main(["train", *SMALL, "--resume", "--no-tensorboard", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert str(tmp_path / "last.pt") in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.host_independent
def test_other_commands_read_no_broken_checkpoint_either(trained, tmp_path, capsys):
    for change, says in (
        (_without("state", "model", "hidden.0.weight"), "another model's"),
        (_with([], "state", "model"), "state.model must be a table, and is a list"),
        (_with(torch.full((32, 64), float("inf")), "state", "model", "hidden.0.weight"), "not finite"),
        (_with(0, "config", "training", "epochs"), "training.epochs must be at least 1, got 0"),
    ):
        content = torch.load(trained / "best.pt", weights_only=True)
        change(content)
        path = tmp_path / "bad.pt"
        torch.save(content, path)
        for words in (["evaluate", str(path)], ["energy", "--checkpoint", str(path)], ["landscape", str(path)]):
            out = ["--out", str(tmp_path / "out")] if words[0] == "landscape" else []
            assert cli.main([*words, *out]) == 2
            message = capsys.readouterr().err
            assert says in message
            assert str(path) in message
            assert message.count("\n") == 1
    data = bytearray((trained / "best.pt").read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for words in (["evaluate", str(path)], ["energy", "--checkpoint", str(path)], ["landscape", str(path), *out]):
        assert cli.main(words) == 2
        assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.host_independent
def test_a_second_run_in_the_folder_is_refused(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with occupied(trained):
        (trained / REST).touch()
        for words in (
            ["train", *SMALL, "--resume"], ["train", *SMALL], ["compare", "--seeds", "1"], ["exact", "train"],
            ["exact", "compare"], ["study", "budget"], ["landscape", "nowhere"], ["exact", "demo"],
            ["bench", "--size", "1x8"],
        ):  # fmt: skip
            place = trained / "bench.json" if words[0] == "bench" else trained
            with occupied(trained, "bench.json"):
                assert cli.main([*words, "--out", str(place)]) == 2
            assert f"writes to {place}; wait until it has ended, or pass another --out" in capsys.readouterr().err
        assert (trained / REST).exists()
        (trained / REST).unlink()
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.host_independent
def test_a_folder_that_cannot_be_written_is_found_before_the_data_are_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("qif_plugins.experiments.training.session.load_task", None)
    monkeypatch.setattr("qif_plugins.commands.compare.load_images", None)
    monkeypatch.setattr("qif_plugins.commands.exact.load", None)
    for words in (
        ["train", *SMALL], ["compare"], ["exact", "train"], ["exact", "compare"], ["exact", "demo"],
        ["study", "budget"], ["landscape", "nowhere"],
    ):  # fmt: skip
        for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
            assert cli.main([*words, "--out", str(place)]) == 2
            message = capsys.readouterr().err
            assert f"cannot write into {place}" in message
            assert message.count("\n") == 1
    for words in (
        ["bench", "--size", "1x8", "--out"], ["energy", "--model", "perceptron", "--out"],
        ["energy", "--model", "perceptron", "--plot"],
    ):  # fmt: skip
        assert cli.main([*words, str(tmp_path / "file" / "result.json")]) == 2
        assert f"cannot write into {tmp_path / 'file'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.host_independent
def test_more_epochs_go_on_from_a_finished_run(trained, tmp_path, capsys):
    def run(out, *changes, schedule="constant"):
        sets = [f"--set=optimizer.schedule={schedule}", *(f"--set={change}" for change in changes)]
        assert cli.main(["train", *SMALL, *sets, "--no-tensorboard", "--resume", "--out", str(tmp_path / out)]) == 0
        return capsys.readouterr().out

    run("whole")
    run("more", "training.epochs=1")
    said = run("more")
    assert "training.epochs was 1 and is 2: the schedule 'constant' goes on as it was, with a learning rate of" in said
    whole, more = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "more"))
    assert more["config"] == whole["config"]
    assert more["state"]["scheduler"] == whole["state"]["scheduler"]
    for name, weight in whole["state"]["model"].items():
        assert torch.equal(weight, more["state"]["model"][name])

    said = run("cosine", "training.epochs=1", schedule="cosine")
    said = run("cosine", schedule="cosine")
    assert "the schedule 'cosine' is now that over all 2 epochs, and the learning rate goes on at 0.002 instead" in said
    content = load_checkpoint(tmp_path / "cosine" / "last.pt")
    steps = -(-1197 // 64)
    assert content["state"]["scheduler"]["last_epoch"] == 2 * steps
    # The last step's learning rate is that of a cosine over both epochs.
    rate = 0.004 * 0.5 * (1 + math.cos(math.pi * (2 * steps - 1) / (2 * steps)))
    assert content["state"]["history"][-1]["lr"] == pytest.approx(rate)
    words = ["train", *SMALL, "--set", "training.epochs=1", "--resume", "--out", str(trained)]
    assert cli.main(words) == 2
    assert "training.epochs is 1, and the run in" in capsys.readouterr().err


@pytest.mark.host_independent
def test_a_run_begins_with_the_weights_of_another(trained, tmp_path, capsys):
    def run(out, *words):
        words = ["train", *SMALL, "--set", "training.epochs=1", "--no-tensorboard", "--out", str(out), *words]
        assert cli.main(words) == 0
        return capsys.readouterr().out

    start = ["--init-from", str(trained / "last.pt")]
    still = ["--set", "optimizer.lr=1e-30"]  # below what moves a float32 weight
    assert "begins with 14 of 14 tensors of the model from" in run(tmp_path / "a", *start, *still)
    first, begun = (load_checkpoint(path / "last.pt")["state"] for path in (trained, tmp_path / "a"))
    for name, weight in first["model"].items():
        if "running" not in name and "num" not in name:  # statistics go on
            assert torch.equal(weight, begun["model"][name])
    assert begun["model"]["hidden.1.num_batches_tracked"] == first["model"]["hidden.1.num_batches_tracked"] + 19
    assert (begun["epoch"], begun["optimizer"]["state"][0]["step"], len(begun["history"])) == (1, 19, 1)

    said = run(tmp_path / "deep", *start, *still, "--set", "model.layers=4")
    assert "begins with 14 of 20 tensors" in said
    assert "as drawn: hidden.6.weight, hidden.7.bias" in said
    said = run(tmp_path / "shallow", *start, *still, "--set", "model.layers=2")
    assert "begins with 8 of 8 tensors" in said
    assert "not taken of the file: hidden.3.weight, hidden.4.bias" in said

    before = (tmp_path / "a" / "last.pt").read_bytes()
    assert "begins with" not in run(tmp_path / "a", *start, *still, "--resume")  # it goes on from its own checkpoint
    assert (tmp_path / "a" / "last.pt").read_bytes() == before


@pytest.mark.host_independent
def test_a_run_begins_with_no_weights_of_a_file_that_has_none_for_it(trained, tmp_path, capsys):
    content = torch.load(trained / "last.pt", weights_only=True)
    content["state"]["model"] = {"other.weight": torch.ones(3)}
    torch.save(content, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name, says in (
        ("other.pt", "has no weights of this model"),
        ("text.pt", "is no checkpoint of 'qif train'"),
        ("nowhere.pt", "there is no file"),
    ):
        words = ["train", *SMALL, "--init-from", str(tmp_path / name), "--out", str(tmp_path / "run")]
        assert cli.main(words) == 2
        message = capsys.readouterr().err
        assert says in message
        assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


KILLED = """
import os, signal, sys
from qif_plugins import cli
from qif_plugins.experiments.training.progress import Progress

def on_step(self, trainer, measured, before=Progress.on_step):
    before(self, trainer, measured)
    if trainer.epoch * trainer.steps + trainer.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

Progress.on_step = on_step
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.host_independent
@pytest.mark.skipif(os.name != "posix", reason="kills itself")
def test_the_logs_of_a_killed_run_have_every_point_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ["train", *SMALL, "--set", "training.save_every=5", "--quiet", "--resume", "--out", str(tmp_path)]
    steps = -(-1197 // 64)
    for place in (3, steps + 7):  # before the first checkpoint, and after some
        done = forked.python(KILLED, str(place), *words)
        assert done.returncode == -9, done.stderr
    assert cli.main(words) == 0
    logs = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    logs.Reload()
    assert [event.step for event in logs.Scalars("step/loss")] == list(range(1, 2 * steps + 1))
    for tag in ("train/loss", "test/accuracy"):
        assert [event.step for event in logs.Scalars(tag)] == [steps, 2 * steps]
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt", "history.json", "tensorboard"}


@pytest.mark.host_independent
def test_the_bar_shows_loss_accuracy_rate_and_time_left(monkeypatch):
    pytest.importorskip("tqdm")
    from qif_plugins.experiments.training import Batches, Trainer
    from qif_plugins.experiments.training.progress import Progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x, labels = torch.randn(40, 3), torch.zeros(40, dtype=torch.long)

    def loss(model, batch):
        logits = model(batch[0])
        return torch.nn.functional.cross_entropy(logits, batch[1]), {"accuracy": 0.25}

    trainer = Trainer(
        net, torch.optim.SGD(net.parameters(), 0.1), loss, Batches.of(x, labels, batch_size=10), epochs=2,
        layers={"relu": net[1]},
    )  # fmt: skip
    progress = Progress()
    trainer.on_step, trainer.on_epoch = progress.on_step, progress.on_epoch
    with progress.following(trainer):
        trainer.fit()
    shown = terminal.getvalue()
    assert "epoch 1/2" in shown
    assert re.search(r"accuracy=0\.25", shown)
    assert re.search(r"loss=\d", shown)
    assert re.search(r"rate=\d", shown)
    assert re.search(r"\d+/8 \[\d+:\d+<\d+:\d+", shown)
