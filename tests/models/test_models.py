"""The models: published sizes, shapes, neurons by name, and that a fresh one fires and learns in every layer.

Parameter counts are compared with Zhou et al., *Spikformer*, ICLR 2023, arXiv 2209.15425, which gives 12.63 M for the
ResNet-19 of tdBN and TET (Table 3), 21.79 M for their ResNet-34 (Table 2) and 9.27 M for TET's VGGSNN (section 4.2),
all cut off after two digits. Multiply-accumulates of ResNet-34 are compared with torchvision's 3.664e9, which He et
al., arXiv 1512.03385, round to 3.6e9. For ResNet-19 and VGGSNN no published number of operations was at hand: theirs
is held to arithmetic by hand.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("spikingjelly")

from qif_plugins.adapters.spikingjelly import ParametricQIFNode, QIFNode
from spikingjelly.activation_based import base, functional, neuron, surrogate

from qif_plugins import QIFParameters, Window
from qif_plugins.experiments.data.images import load_images
from qif_plugins.models import MODELS, NEURONS, build, convnet, perceptron, resnet19, resnet34, vggsnn
from qif_plugins.neuron.norm import TDBatchNorm2d

DIGITS = (1, 8, 8)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def neurons_of(model):
    return [m for m in model.modules() if isinstance(m, base.MemoryModule)]


def macs(name, shape, classes, **kwargs):
    """Multiply-accumulates of one sample and step, as PyTorch counts them from the shapes that run."""
    with torch.device("meta"):
        model = build(name, shape, classes, "if", **kwargs).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, *shape))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def residual_stage(blocks, channels, width, halves):
    """Weights of a stage's convolutions and channels of its norms, counted from the paper's table."""
    weights = 9 * channels * width + 9 * width * width * (2 * blocks - 1)
    norms = width * 2 * blocks
    if channels != width or halves:
        weights += channels * width
        norms += width
    return weights, norms


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.host_independent
def test_resnet19_has_the_published_size():
    stages = [residual_stage(3, 64, 128, False), residual_stage(3, 128, 256, True), residual_stage(2, 256, 512, True)]
    stem, head = 9 * 3 * 64, (512 + 1) * 256 + (256 + 1) * 10
    expected = stem + 2 * 64 + sum(weights + 2 * norms for weights, norms in stages) + head
    with torch.device("meta"):
        assert parameters(resnet19(head_norm=False)) == expected == 12_630_858
        assert parameters(resnet19()) == expected + 2 * 256
        assert parameters(resnet19(classes=100)) == expected + 2 * 256 + 90 * 257
    assert math.floor(expected / 1e4) == 1263
    operations = stem * 32**2 + sum(w * (32 >> i) ** 2 for i, (w, _) in enumerate(stages)) + 512 * 256 + 256 * 10
    assert macs("resnet19", (3, 32, 32), 10) == operations == 2_216_495_616


@pytest.mark.host_independent
def test_resnet34_has_the_published_size():
    layout = [(3, 64, 64, False), (4, 64, 128, True), (6, 128, 256, True), (3, 256, 512, True)]
    stages = [residual_stage(*stage) for stage in layout]
    stem, head = 49 * 3 * 64, 512 * 1000
    expected = stem + 2 * 64 + sum(weights + 2 * norms for weights, norms in stages) + head + 1000
    with torch.device("meta"):
        assert parameters(resnet34()) == expected == 21_797_672
    assert math.floor(expected / 1e4) == 2179
    operations = stem * 112**2 + sum(w * (56 >> i) ** 2 for i, (w, _) in enumerate(stages)) + head
    # A stage that halves does so in its first convolution: all its convolutions run at the lower resolution.
    assert macs("resnet34", (3, 224, 224), 1000) == operations
    assert round(operations / 1e9, 3) == 3.664


@pytest.mark.host_independent
def test_resnet34_counts_as_torchvisions_does():
    weights = pytest.importorskip("torchvision.models").ResNet34_Weights.IMAGENET1K_V1
    with torch.device("meta"):
        assert parameters(resnet34()) == weights.meta["num_params"]
    assert round(macs("resnet34", (3, 224, 224), 1000) / 1e9, 3) == weights.meta["_ops"]


@pytest.mark.host_independent
def test_vggsnn_has_the_published_size():
    pairs = [(2, 64, 48), (64, 128, 48), (128, 256, 24), (256, 256, 24)]
    pairs += [(256, 512, 12), (512, 512, 12), (512, 512, 6), (512, 512, 6)]
    head = 512 * 3 * 3 * 10
    # Weights, and per channel a bias and the norm's two.
    expected = sum(9 * i * o + 3 * o for i, o, _ in pairs) + head + 10
    with torch.device("meta"):
        assert parameters(vggsnn()) == expected == 9_271_498
    assert math.floor(expected / 1e4) == 927
    operations = sum(9 * i * o * size**2 for i, o, size in pairs) + head
    assert macs("vggsnn", (2, 48, 48), 10) == operations == 1_361_654_784


# -- shapes --------------------------------------------------------------------------------------


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("perceptron", (1, 28, 28), 10),
        ("convnet", (1, 28, 28), 10),
        ("convnet", DIGITS, 10),
        ("resnet19", (3, 32, 32), 100),
        ("resnet19", (2, 48, 48), 10),
        ("resnet34", (3, 224, 224), 1000),
        ("vggsnn", (2, 48, 48), 10),
        ("vggsnn", (2, 128, 128), 11),
    ],
)
def test_shapes(name, shape, classes):
    with torch.device("meta"):
        net = build(name, shape, classes, "if")
        for steps in (1, 3):
            assert net(torch.empty(steps, 2, *shape)).shape == (steps, 2, classes)


@pytest.mark.parametrize("name", NEURONS)
def test_every_model_takes_every_neuron_by_name(name):
    # The window of a ParametricQIFNode follows from its parameters' values, which the meta device does not have.
    device = "cpu" if name == "parametric_qif" else "meta"
    for model in MODELS:
        with torch.device(device):
            net = build(model, (2, 16, 16), 3, name)
        assert {type(m) for m in neurons_of(net)} == {NEURONS[name][0]}


@pytest.mark.parametrize("name", ["perceptron", "convnet"])
@pytest.mark.parametrize("kind", NEURONS)
def test_every_neuron_gets_gradient_to_every_parameter(name, kind):
    net = build(name, DIGITS, 10, kind)
    net(torch.randn(3, 16, *DIGITS)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in net.parameters())


# -- what the arguments do -----------------------------------------------------------------------


def test_the_default_neuron_is_qif():
    for constructor, sizes in (
        (perceptron, (64, 10)),
        (convnet, (1, 10)),
        (vggsnn, ()),
        (resnet19, ()),
        (resnet34, ()),
    ):
        with torch.device("meta"):
            assert {type(m) for m in neurons_of(constructor(*sizes))} == {QIFNode}


def test_neuron_arguments_are_passed_on_and_copied():
    mine = surrogate.ATan(alpha=3.0)
    net = convnet(1, 10, 8, spiking_neuron=neuron.LIFNode, tau=1.5, surrogate_function=mine, detach_reset=True)
    found = neurons_of(net)
    assert len(found) == 4
    assert all(m.tau == 1.5 and m.detach_reset and m.surrogate_function.alpha == 3.0 for m in found)
    assert len({id(m.surrogate_function) for m in found} | {id(mine)}) == 5


def test_names_stand_for_arguments_that_can_be_overridden():
    assert all(m.tau == 2.0 and not m.decay_input for m in neurons_of(build("perceptron", DIGITS, 10, "lif")))
    assert all(m.decay_input for m in neurons_of(build("perceptron", DIGITS, 10, "lif", decay_input=True)))


def test_tdbn_scales_to_the_neurons_threshold_and_branches_by_half_the_variance():
    net = resnet19(v_threshold=0.5)
    scales = {name: m.weight.unique() for name, m in net.named_modules() if isinstance(m, TDBatchNorm2d)}
    for name, scale in scales.items():
        alpha = 1 / math.sqrt(2) if ".norm2" in name or ".shortcut" in name else 1.0
        torch.testing.assert_close(scale, torch.tensor([0.5 * alpha]), msg=name)
    assert sum("shortcut" in name for name in scales) == 3
    plain = convnet(1, 10, 8, norm="batch", v_threshold=0.5)
    assert all(bool((m.weight == 1).all()) for m in plain.modules() if isinstance(m, TDBatchNorm2d))


def test_parameters_per_layer_or_per_channel():
    args = (1, 10, 8, (4, 6, 8))
    assert {m.a.shape for m in neurons_of(convnet(*args, spiking_neuron=ParametricQIFNode))} == {torch.Size([])}
    net = convnet(*args, spiking_neuron=ParametricQIFNode, per_channel=True)
    assert [len(m.a) for m in neurons_of(net)] == [4, 6, 8]


def test_single_steps_give_what_the_sequence_gives():
    x_seq = torch.randn(3, 2, 2, 16, 16)
    for name in MODELS:
        if name == "resnet34":
            continue  # the classes of resnet19
        net = build(name, (2, 16, 16), 5)
        net(x_seq)  # running statistics
        functional.reset_net(net)
        net.eval()
        with torch.no_grad():
            whole = net(x_seq)
            functional.reset_net(net)
            functional.set_step_mode(net, "s")
            steps = torch.stack([net(x) for x in x_seq])
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="step mode 's'"):
            net(x_seq)


# -- a fresh model works -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "steps"), [("resnet19", (3, 16, 16), 2), ("resnet34", (3, 32, 32), 1), ("vggsnn", (2, 16, 16), 2)]
)
def test_every_layer_of_a_fresh_model_fires_and_gets_gradient(name, shape, steps):
    net = build(name, shape, 10)
    rates = []
    for m in neurons_of(net):
        m.register_forward_hook(lambda module, args, out: rates.append(out.mean().item()))
    net(torch.randn(4, *shape).expand(steps, 4, *shape)).logsumexp(-1).mean().backward()
    assert len(rates) == len(neurons_of(net))
    # 1 - Φ(1) = 0.16 at the first step; the first shortcut of ResNet-34, behind a maximum over spikes, gives 0.42.
    assert all(0.1 < rate < 0.5 for rate in rates), rates
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert bool(p.grad.isfinite().all()), key
        assert p.dim() < 2 or bool(p.grad.any()), key


@pytest.mark.host_independent
def test_the_head_of_resnet19_is_silent_without_a_norm():
    """Why the head has one by default."""
    for head_norm in (True, False):
        net = resnet19(head_norm=head_norm)
        with torch.no_grad():
            net(torch.randn(2, 4, 3, 16, 16))
            spikes = net.head[:-1](torch.full((3, 4, 512), 0.2) + 0.1 * torch.randn(4, 512))
        assert bool(spikes.any()) is head_norm


@pytest.mark.host_independent
@pytest.mark.parametrize(("layers", "kappa"), [(2, 0.5), (5, 0.5), (9, 1.0)])
def test_perceptrons_learn(layers, kappa):
    """Nine layers learn with a window of twice the default width; with the default one they hardly do."""
    images = load_images("digits")
    x, y = images.train[:256].float() / 8 - 1, images.train_labels[:256]
    net = perceptron(64, 10, layers, 128, window=Window.unbiased(QIFParameters(), kappa=kappa))
    assert sum(isinstance(m, torch.nn.Linear) for m in net.modules()) == layers
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(30):
        out = net(x.expand(4, *x.shape)).mean(0)
        loss = torch.nn.functional.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
    assert (out.argmax(1) == y).float().mean() > 0.5


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "resnet20"}, "unknown model 'resnet20'.*resnet19"),
        ({"spiking_neuron": "LIF"}, "unknown neuron 'LIF'.*lif"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"widht": 3}, "QIFNode.*widht"),
        ({"tau": 0.5}, "tau"),
        ({"shape": (8, 8)}, "shape must be"),
        ({"name": "convnet", "shape": (1, 8, 6)}, "square"),
        ({"name": "vggsnn", "shape": (2, 8, 8)}, "size must be at least 16"),
        ({"name": "resnet19", "norm": None}, "'tdbn' or 'batch'"),
        ({"name": "convnet", "widths": (4,)}, "two convolutions"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"spiking_neuron": torch.nn.ReLU}, "SpikingJelly neuron"),
    ],
)
def test_refusals(arguments, match):
    arguments = {"name": "perceptron", "shape": DIGITS, "classes": 10} | arguments
    with pytest.raises(ValueError, match=match):
        build(**arguments)


@pytest.mark.parametrize("name", ["perceptron", "convnet", "vggsnn", "resnet19"])
def test_input_of_another_shape_is_refused(name):
    net = build(name, (2, 16, 16), 10)
    for shape in ((2, 16, 16), (4, 3, 1, 16, 16)) + (((4, 3, 2, 8, 8),) if name != "resnet19" else ()):
        with pytest.raises(ValueError, match=r"takes|built for"):
            net(torch.zeros(shape))
    assert all(isinstance(m.v, float) for m in neurons_of(net))
