"""Configurations: those that come with the package, and what is said about wrong ones."""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("spikingjelly")

from qif_plugins.experiments.data.images import BUNDLED as PACKAGES
from qif_plugins.experiments.names import BUNDLED, DATA_SETS, SHAPES, configurations
from qif_plugins.experiments.training.config import Config, DataConfig, from_dict, load_config
from qif_plugins.experiments.training.data import expected_shape
from qif_plugins.experiments.training.losses import SequenceLoss, mean_cross_entropy, tet
from qif_plugins.experiments.training.session import build_model, functional, make_optimizer, make_schedule, prepare
from qif_plugins.experiments.training.sizes import activations, weights
from qif_plugins.models import MODELS

pytestmark = pytest.mark.host_independent


@pytest.mark.parametrize("neuron", ["qif", "lif"])
@pytest.mark.parametrize("name", configurations())
def test_every_configuration_makes_its_model_with_either_neuron(name, neuron):
    config = load_config(name, [f"neuron.name={neuron}"])
    assert from_dict(config.to_dict()) == config
    with torch.device("meta"):
        model = build_model(config, *expected_shape(config.data))
    assert next(model.parameters()).is_meta
    assert make_optimizer(config.optimizer, model).param_groups[0]["lr"] == config.optimizer.lr


def test_another_neuron_drops_what_describes_the_papers():
    assert load_config("cifar10").neuron == {"name": "qif", "dynamics": "paper"}
    assert load_config("cifar10", ["neuron.name=lif", "neuron.tau=3.0"]).neuron == {"name": "lif", "tau": 3.0}
    kept = load_config("cifar10", ["neuron.window=paper", "neuron.name=qif"]).neuron
    assert kept == {"name": "qif", "dynamics": "paper", "window": "paper"}
    config = load_config("cifar10", ["neuron.name=lif", "neuron.dynamics=paper"])
    with pytest.raises(ValueError, match=r"neuron\.dynamics"):
        build_model(config, *expected_shape(config.data))


def test_they_cover_the_papers_experiments():
    users = {"image_folder", "nmnist", "shd", "spoken_digits"}
    papers = {"cifar10", "cifar100", "imagenet", "cifar10dvs_vggsnn", "cifar10dvs_resnet19"}
    assert papers | users | {"digits", "mnist5k"} == set(configurations())


def test_every_name_that_an_option_takes_stands_for_something():
    assert set(SHAPES) == set(MODELS)
    assert all(expected_shape(DataConfig(name)) for name in DATA_SETS)
    assert set(BUNDLED) == set(PACKAGES)


def test_values_are_set_with_their_types(tmp_path):
    changes = [
        "training.epochs=3", "optimizer.lr=1", "data.augment=[]", "neuron.window=paper", 'model.name="convnet"',
        "neuron.surrogate.alpha=2.5", "optimizer.clip_norm=0.5", "data.folder=/some/where", "model.norm=none",
        "optimizer.milestones=[1, 2.5]", "training.sync_batch_norm=true",
    ]  # fmt: skip
    config = load_config("digits", changes)
    assert (config.training.epochs, config.optimizer.lr, config.data.augment) == (3, 1.0, ())
    assert type(config.optimizer.lr) is float
    assert config.neuron == {"name": "qif", "window": "paper", "surrogate": {"alpha": 2.5}}
    assert config.model["name"] == "convnet"
    assert config.model["norm"] == "none"
    assert (config.optimizer.clip_norm, config.optimizer.milestones) == (0.5, (1.0, 2.5))
    assert config.data.folder == "/some/where"
    assert config.training.sync_batch_norm is True
    assert load_config(config.to_dict(), ["optimizer.clip_norm=none"]).optimizer.clip_norm is None
    path = tmp_path / "mine.toml"
    path.write_bytes('[data]\nname = "digits"\nfolder = "Zürich"\n[model]\nname = "perceptron"\n'.encode())
    mine = load_config(path)
    assert isinstance(mine, Config)
    assert mine.data.folder == "Zürich"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epochs=3", "did you mean training.epochs"),
        ("training.epoch=3", "did you mean training.epochs"),
        ("optimiser.lr=3", "did you mean optimizer.lr"),
        ("training.nonsense_word=3", "unknown configuration key"),
        ("training.epochs", "table.key=value"),
        ("training.epochs=2.5", "training.epochs must be a whole number, got 2.5"),
        ("training.epochs=0", "at least 1, got 0"),
        ("training.epochs=true", "must be a whole number, got True"),
        ("training.sync_batch_norm=1", "true or false"),
        ("training.batch_size=33 ", None),
        ("training.accumulation=3", "multiple of training.accumulation 3"),
        ("optimizer.lr=0", "positive and finite"),
        ("optimizer.lr=nan", "positive and finite"),
        ("optimizer.gamma=-1", "gamma must be positive and finite, got -1.0"),
        ("optimizer.gamma=nan", "gamma must be positive and finite"),
        ("optimizer.gamma=3", "gamma must be at most 1, got 3.0"),
        ("optimizer.clip_norm=inf", "'none' clips nothing"),
        ("optimizer.milestones=[2, -3]", "each of optimizer.milestones must be at least 0 and finite, got -3.0"),
        ("optimizer.momentum=5", "momentum must be below 1, got 5.0"),
        ("optimizer.weight_decay=inf", "weight_decay must be at least 0 and finite"),
        ("optimizer.warmup_epochs=1e9", "warmup_epochs must be at most training.epochs, 10, got 1000000000.0; lower"),
        ("loss.target=nan", "loss.target must be finite, got nan"),
        ("loss.target=-1", None),
        ("training.seed=9223372036854775808", "training.seed must be at most 9223372036854775807"),
        ("training.seed=9223372036854775807", None),
        ("data.steps=4294967296", "data.steps must be at most 2147483647"),
        ("optimizer.lr=fast", "must be a number, got 'fast'"),
        ("optimizer.name=adamm", "did you mean 'adam'"),
        ("loss.regularization=1.5", "at most 1"),
        ("data.name=cifar11", "did you mean 'cifar10'"),
        ("data.augment=flip", "must be a list"),
        ('data.augment=["flip"]', "none, leave it empty"),
        ("data.size=32", "keep their size"),
        ("model=3", "unknown configuration key 'model'"),
        ("optimizer.lr=1e400", "optimizer.lr must be positive and finite, got inf"),
        (f"optimizer.lr={10**400}", "optimizer.lr must be at most 3.4e+38 in magnitude, got 1000"),
        (f"optimizer.lr={'1' * 5000}", "optimizer.lr must be a number, got '1111"),
        (f"training.epochs={10**60}", "training.epochs must be at most 2147483647, got 1000"),
        ("loss.target=1e39", "loss.target must be at most 3.4e+38 in magnitude, got 1e+39"),
        ("optimizer.weight_decay=1e39", "optimizer.weight_decay must be at most 3.4e+38"),
        ("optimizer.lr=-1", "optimizer.lr must be positive and finite, got -1.0"),
        ("data.download=yes", "data.download must be true or false, got 'yes'"),
        ("data.download=False", "data.download must be true or false, got 'False'"),
        ("data.workers=-1", "data.workers must be at least 0, got -1"),
        ("optimizer.milestones=['a']", "optimizer.milestones must be a number, got 'a'"),
        ("data.augment=" + "[" * 5000, "data.augment must be a list, got"),
    ],
)
def test_wrong_values_are_refused_by_name(change, says):
    if says is None:
        table, _, key = change.partition("=")[0].partition(".")
        assert f"{load_config('digits', [change]).to_dict()[table][key]:g}" == f"{float(change.partition('=')[2]):g}"
        return
    with pytest.raises(ValueError, match=re.escape(says)):
        load_config("digits", [change])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.name=resnet18", "resnet19"),
        ("model.depth=3", "depth"),
        ("neuron.name=qiff", "unknown neuron 'qiff'"),
        ("neuron.surrogate_function=Atan", "such as ATan"),
        ("neuron.surrogate_function={name='ATan', beta=1}", "surrogate 'ATan'"),
        ("neuron.v_threshold=-9.0", "v_threshold=-9 must lie above v_reset=0"),
        ("neuron.width=7", "both [model] and [neuron]"),
        ("neuron.detach_reset=yes", "neuron.detach_reset must be true or false, got 'yes'"),
        ("neuron.detach_reset=1", "neuron.detach_reset must be true or false, got 1"),
        ("neuron.decay_input=False", "neuron.decay_input must be true or false, got 'False'"),
        ("neuron.per_channel=0", "neuron.per_channel must be true or false, got 0"),
        ("neuron.surrogate_function={name='ATan', spiking='no'}", "spiking must be true or false, got 'no'"),
        ("neuron.surrogate_function={name='ATan', alpha='2'}", "alpha must be a number, got '2'"),
        ("neuron.surrogate_function=3", "such as ATan"),
        ("neuron.tau=fast", "neuron.tau must be a number, got 'fast'"),
        ("neuron.tau=1e400", "neuron.tau must be finite and at most 3.4e+38 in magnitude, got inf"),
        (f"neuron.tau={10**400}", "neuron.tau must be finite and at most 3.4e+38 in magnitude, got 1000"),
        ("neuron.v_reset=nan", "neuron.v_reset must be finite and at most 3.4e+38 in magnitude, got nan"),
        ("neuron.backend=3", "neuron.backend must be a string, got 3"),
        ("neuron.dynamcis=lif", "did you mean neuron.dynamics?"),
        ("model.width=wide", "model.width must be a whole number, got 'wide'"),
        ("model.width=true", "model.width must be a whole number, got True"),
        ("model.width=0", "model.width must be at least 1, got 0"),
        ("model.width=none", "model.width must be a whole number, got None"),
        ("neuron.tau=0", "tau must be above 1 and finite, got 0"),
        ("neuron.per_channel=true", "neuron.per_channel needs a neuron with numbers per channel, got 'qif'"),
        ("neuron.surrogate_function=SurrogateFunctionBase", "unknown surrogate 'SurrogateFunctionBase'"),
        ("model.width=1e9", "model.width must be a whole number, got 1000000000.0"),
        ("model.width=10000000000", "model.width must be at most 2147483647, got 10000000000"),
        ("model.layers=1000000000", "model.layers must be at most 1000, got 1000000000"),
        (
            "model.width=1000000000",
            "model.width = 1000000000: the weights, their gradients and what",
        ),
        ("model.widht=3", "did you mean model.width?"),
        ("model.classes=3", "unknown configuration key 'model.classes'"),
    ],
)
def test_the_model_refuses_before_anything_is_read(change, says):
    config = load_config("digits", [change])
    with pytest.raises(ValueError, match=re.escape(says)):
        build_model(config, *expected_shape(config.data))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("digits", "data.steps=1000000000", "data.steps = 1000000000 and training.batch_size = 64: 64 samples of"),
        (
            "digits",
            "training.batch_size=1000000000",
            "training.batch_size must be at most 1197, the training samples",
        ),
        ("cifar10", "training.batch_size=50000", "data.steps = 4 and training.batch_size = 50000: 50000 samples of 4"),
        ("cifar10", "data.size=100000", "data.size = 100000, data.steps = 4 and training.batch_size"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_read(monkeypatch, name, change, says):
    monkeypatch.setattr("qif_plugins.experiments.training.session.load_task", None)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        prepare(load_config(name, [change]))
    assert "and the memory here is" in str(caught.value) or "at most" in str(caught.value)


def test_the_memory_of_a_batch_is_what_its_forward_pass_leaves():
    config = load_config("digits", ["model.layers=3", "model.width=32"])
    model = build_model(config, (1, 8, 8), 10)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    # Weights, norms and neurons of both hidden layers, and the readout.
    assert activations(model, (1, 8, 8), functional.reset_net) == 2 * 3 * 32 + 10
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert weights(model) == 4 * sum(tensor.numel() for tensor in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of cifar10.*mnist5k"):
        load_config("cifar")
    path = tmp_path / "wrong.toml"
    path.write_text("[data\n")
    with pytest.raises(ValueError, match="not TOML"):
        load_config(path)
    path.write_bytes(b'[data]\nname = "\xfc"\n')
    with pytest.raises(ValueError, match="not TOML"):
        load_config(path)
    path.write_text('[model]\nname = "perceptron"\n')
    with pytest.raises(ValueError, match="data is missing"):
        load_config(path)
    path.write_text('[data]\nsteps = 3\n[model]\nname = "perceptron"\n')
    with pytest.raises(ValueError, match=r"data\.name is missing"):
        load_config(path)


def test_the_same_seed_gives_the_same_weights_and_none_stands_for_null():
    config = load_config("digits", ["neuron.v_reset=none", "model.norm=none"])
    one, two = (build_model(config, (1, 8, 8), 10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any("running_mean" in name for name in one.state_dict())
    assert {m.v_reset for m in one.modules() if hasattr(m, "v_reset")} == {None}


# -- losses and schedules ----------------------------------------------------------------------------------------------


def test_tet_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    steps = torch.stack([torch.nn.functional.cross_entropy(logits[t], labels) for t in range(3)]).mean()
    constant = torch.nn.functional.mse_loss(logits, torch.full_like(logits, 0.7))
    torch.testing.assert_close(tet(logits, labels), steps)
    torch.testing.assert_close(tet(logits, labels, 0.2, 0.7), 0.8 * steps + 0.2 * constant)
    torch.testing.assert_close(
        mean_cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits.mean(0), labels)
    )


def test_images_are_repeated_and_sequences_put_time_first():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(2)[..., :3]

    labels = torch.tensor([0, 1])
    image, frames = torch.randn(2, 1, 2, 2), torch.randn(2, 5, 1, 2, 2)
    value, measured = SequenceLoss("mean", 4)(Model(), (image, labels))
    assert torch.equal(seen[0], torch.stack([image] * 4))
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(image.flatten(1)[:, :3], labels))
    assert measured["accuracy"] == (image.flatten(1)[:, :3].argmax(1) == labels).float().mean()
    SequenceLoss("tet", None)(Model(), (frames, labels))
    assert torch.equal(seen[1], frames.transpose(0, 1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "steps", "milestones": (1.0,), "gamma": 0.1}, [1, 1, 0.1, 0.1]),
        ({"schedule": "constant", "warmup_epochs": 1.0}, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "cosine", "warmup_epochs": 1.0}, [1 / 3, 2 / 3, 1, 0.5]),
    ],
)
def test_schedules(changes, expected):
    settings = dataclasses.replace(load_config("digits").optimizer, lr=2.0, **changes)
    optimizer = make_optimizer(settings, torch.nn.Linear(1, 1))
    schedule = make_schedule(settings, optimizer, steps=2, epochs=2)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-6)
