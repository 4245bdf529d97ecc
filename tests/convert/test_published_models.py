"""``spiking_neuron=QIFNode`` in every constructor of SpikingJelly's model zoo that takes a neuron.

The zoo is enumerated by inspection, so that a model of a new host version is tried, too. Every constructor is
trained for one step, the smallest of each family in numbers and the others on the meta device, whose tensors have
shapes and no values. What cannot work is in :data:`CANNOT`, and fails here once it can.
"""

import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch

pytest.importorskip("spikingjelly")

from qif_plugins.adapters import spikingjelly as adapter
from spikingjelly.activation_based import functional, neuron, surrogate

from qif_plugins.convert.find import survey
from qif_plugins.convert.spikingjelly import HOST

PACKAGES = ("spikingjelly.activation_based.model", "spikingjelly.clock_driven.model")
NEURON_ARGUMENTS = ("spiking_neuron", "single_step_neuron", "multi_step_neuron")
CANNOT: dict[str, str] = {}
"""Constructor -> why QIFNode does not work in it.

Nothing at present. In the OTTT models QIF trains by ordinary backpropagation, as any neuron but OTTTLIFNode does.
"""

IN_NUMBERS = {
    "MNISTNet", "CIFAR10Net", "CIFAR10DVSNet", "sew_resnet18", "spiking_resnet18", "OTTTSpikingVGG",
    "MultiStepMNISTNet", "multi_step_sew_resnet18", "multi_step_spiking_resnet18", "MASNN", "AttMSResNet", "MaxFormer",
    "MSResNet", "MaxResNet", "QKFormer", "SpikeDrivenTransformer", "Spikformer",
}  # fmt: skip
"""Constructors whose models are small enough, or can be made so, to train with values."""

SIZES = {
    "channels": 4, "num_classes": 5, "base_channels": 4, "embed_dims": 32, "T": 2, "inplanes": 8, "planes": 8,
    "in_channels": 3, "out_channels": 8, "kernel_size": 3, "padding": 1, "in_features": 8, "hidden_features": 16,
    "out_features": 8, "dim": 16, "num_heads": 2, "fc_hidden": 8, "img_size_h": 64, "img_size_w": 64, "cnf": "ADD",
}  # fmt: skip
"""What arguments of these names get, where a constructor has them."""
OVERRIDES = {
    "MASNN": {"channels": (8, 8, 8), "in_channels": 2, "T": 6, "input_size": (16, 16)},
    "Bottleneck": {"inplanes": 32},
    "masnn_dvs128_gesture": {"in_channels": 2, "T": 6},
    "MaxFormer": {"depths": (1, 1, 1)},
    "QKFormer": {"depths": (1, 1, 1), "num_heads": (2, 2, 2)},
    "SpikeDrivenTransformer": {"depths": 1},
    "Spikformer": {"depths": 1, "embed_dims": 32},
    "AttMSResNet": {"layers": (1, 1, 1, 1), "base_channels": 16},
    "MSResNet": {"layers": (1, 1, 1, 1)},
    "MaxResNet": {"layers": (1, 1, 1, 1)},
}
INPUTS = {
    "MNISTNet": (1, 28, 28), "FashionMNISTNet": (1, 28, 28), "NMNISTNet": (2, 34, 34), "CIFAR10Net": (3, 32, 32),
    "CIFAR10DVSNet": (2, 128, 128), "DVSGestureNet": (2, 128, 128), "BasicBlock": (8, 8, 8), "Bottleneck": (32, 8, 8),
    "SpikformerMLP": (8, 16), "SpikformerBlock": (16, 4, 4), "MASNN": (2, 16, 16), "sew_resnet18": (3, 32, 32),
    "spiking_resnet18": (3, 32, 32), "multi_step_sew_resnet18": (3, 32, 32),
    "multi_step_spiking_resnet18": (3, 32, 32), "OTTTSpikingVGG": (3, 16, 16),
    "masnn_dvs128_gesture": (2, 32, 32),
    "spikformer_cifar10": (3, 32, 32), "maxformer_cifar": (3, 32, 32), "spikformer_ti": (3, 64, 64),
}  # fmt: skip
"""Shape of one sample of one step, where it is not three channels of 64 x 64."""


def constructors():
    for package in PACKAGES:
        try:
            path = importlib.import_module(package).__path__
        except ModuleNotFoundError:
            continue
        for info in pkgutil.iter_modules(path):
            if info.name.startswith(("train", "tv_")):
                continue  # training scripts, no models
            module = importlib.import_module(f"{package}.{info.name}")
            for name, value in vars(module).items():
                if not callable(value) or name.startswith("_") or value.__module__ != module.__name__:
                    continue
                arguments = inspect.signature(value).parameters
                takes = next((argument for argument in NEURON_ARGUMENTS if argument in arguments), None)
                if takes:
                    yield pytest.param(value, takes, id=f"{package.split('.')[1]}.{info.name}.{name}")


CONSTRUCTORS = list(constructors())


def lif_arguments(clock_driven):
    """Everything that a user may pass for LIF, by name."""
    host = importlib.import_module("spikingjelly.clock_driven.surrogate") if clock_driven else surrogate
    return {
        "tau": 2.0, "decay_input": False, "v_threshold": 0.5, "v_reset": 0.0, "surrogate_function": host.ATan(),
        "detach_reset": True,
    }  # fmt: skip


def build(constructor, takes, connect=None):
    clock_driven = "clock_driven" in constructor.__module__
    module = importlib.import_module(constructor.__module__)
    name = constructor.__name__
    arguments = inspect.signature(constructor).parameters
    given = {key: value for key, value in SIZES.items() if key in arguments}
    multi = "MultiStep" if name.startswith("MultiStep") else ""
    if "block" in arguments:
        given |= {"block": getattr(module, f"{multi}BasicBlock"), "layers": [1, 1, 1, 1]}
    if "cfg" in arguments:
        given["cfg"] = [8, "M", 512] if name in IN_NUMBERS else next(iter(module.cfgs.values()))
    if "batch_norm" in arguments:
        given["batch_norm"] = True
    given |= OVERRIDES.get(name.removeprefix("MultiStep"), {}) | ({"cnf": connect} if connect else {})
    if clock_driven:
        ours = importlib.import_module("qif_plugins.adapters.spikingjelly.clock_driven")
        given[takes] = ours.MultiStepQIFNode if takes == "multi_step_neuron" else ours.QIFNode
    else:
        given[takes] = adapter.QIFNode
    return constructor(**given, **lif_arguments(clock_driven))


def sample(constructor):
    name = constructor.__name__
    return INPUTS.get(name, INPUTS.get(name.removeprefix("MultiStep"), (3, 64, 64)))


def train(net, x, steps):
    """One optimizer step on the sum over ``steps`` calls."""
    total = 0
    repeats = {"T": 2} if "T" in inspect.signature(net.forward).parameters else {}
    for _ in range(steps):
        out = net(x, **repeats)
        for part in out if isinstance(out, tuple) else (out,):
            total = total + part.sum()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    total.backward()
    optimizer.step()
    return total


def modes(constructor, takes, net):
    """The ways to run a model: name, shape before the sample's, calls."""
    arguments = inspect.signature(constructor).parameters
    if takes == "single_step_neuron":
        return [("single", (2,), 2)]
    if takes == "multi_step_neuron":
        # With T, the model repeats a static image; without, it takes a sequence.
        repeats = getattr(net, "T", None) or "T" in inspect.signature(net.forward).parameters
        return [("multi", (2,) if repeats else (2, 2), 1)]
    if "T" in arguments or "spikformer" in constructor.__module__ or "transformer" in constructor.__module__:
        steps = (SIZES | OVERRIDES.get(constructor.__name__, {}))["T"]
        return [("multi", (steps, 2), 1)]
    return [("single", (2,), 2), ("multi", (2, 2), 1)]


def check(constructor, takes, device, connect=None):
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        net = build(constructor, takes, connect)
        neurons = [m for m in net.modules() if getattr(m, "qif_parameters", None) is not None]
        assert neurons
        assert not [m for m in net.modules() if type(m).__name__.endswith("LIFNode")]
        assert all(m.v_threshold == 0.5 and m.detach_reset and m.tau == 2.0 for m in neurons)
        for mode, shape, calls in modes(constructor, takes, net)[-1 if device == "meta" else 0 :]:
            if takes == "spiking_neuron":
                functional.set_step_mode(net, mode[0])
            net.zero_grad()
            train(net, torch.rand(*shape, *sample(constructor)), calls)
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            assert gradients
            if device == "cpu":
                assert all(bool(gradient.isfinite().all()) for gradient in gradients)
                assert any(bool(gradient.any()) for gradient in gradients)
            for m in net.modules():
                if hasattr(m, "reset"):
                    m.reset()


@pytest.mark.parametrize(("constructor", "takes"), CONSTRUCTORS)
def test_trains_with_qif(constructor, takes):
    name = constructor.__name__
    if name in CANNOT:
        with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)):
            check(constructor, takes, "meta")
        return
    check(constructor, takes, "cpu" if name in IN_NUMBERS else "meta")


@pytest.mark.parametrize("connect", ["AND", "IAND"])
@pytest.mark.parametrize(
    ("constructor", "takes"), [p for p in CONSTRUCTORS if p.values[0].__name__.endswith("sew_resnet18")]
)
def test_every_connect_function_trains(constructor, takes, connect):
    check(constructor, takes, "meta", connect)


def test_the_table_names_constructors_of_some_version():
    """A name that no version has is a typing mistake; 0.0.0.0.14 has no OTTT models."""
    found = {p.values[0].__name__ for p in CONSTRUCTORS}
    assert set(CANNOT) <= found or not any(name.startswith("ottt") for name in found)


@pytest.mark.parametrize(
    ("constructor", "takes"),
    [p for p in CONSTRUCTORS if p.values[0].__name__ in IN_NUMBERS and p.values[1] == NEURON_ARGUMENTS[0]],
)
def test_registration_order_finds_the_readout_or_asks(constructor, takes, monkeypatch):
    monkeypatch.setattr(adapter, "QIFNode", neuron.LIFNode)
    net = build(constructor, takes)
    functional.set_step_mode(net, "m")
    _, shape, _ = modes(constructor, takes, net)[-1]
    by_order = survey(net, [HOST])
    by_flow = survey(net, [HOST], torch.rand(*shape, *sample(constructor)))
    assert [site.guess for site in by_flow.sites] == [False] * len(by_flow.sites)
    if by_order.readout_unknown:
        assert constructor.__name__ == "MASNN"  # attention in its last blocks
        return
    assert [site.reads_out for site in by_order.sites] == [site.reads_out for site in by_flow.sites]
