import copy
import itertools

import pytest
import torch
from measured_models import MODELS
from torch import nn
from torch.nn import functional as F

from qif_plugins import calibrate, firing_rate, initialise, membrane_moments
from qif_plugins.diagnostics.initialisation import IDENTITY, _mix_identity
from qif_plugins.neuron.module import QIFLayer
from qif_plugins.neuron.norm import TDBatchNorm1d

HOSTS = pytest.mark.parametrize("host", MODELS)


def spikingjelly():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode
    from spikingjelly.activation_based import functional, layer, neuron

    return QIFNode, functional, layer, neuron


def perceptron(node, layers, width=64, out=10, *, norm=False, step_mode="m"):
    _, functional, layer, _ = spikingjelly()
    blocks = []
    for _ in range(layers - 1):
        blocks += [layer.Linear(width, width), *([TDBatchNorm1d(width)] if norm else []), node()]
    model = nn.Sequential(*blocks, layer.Linear(width, out))
    functional.set_step_mode(model, step_mode)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(model, batch, match, error=ValueError, **options):
    """Refused with this text, and nothing has changed."""
    before, modes = state(model), [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    numbers = torch.get_rng_state()
    with pytest.raises(error, match=match):
        initialise(model, batch, **options)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(numbers, torch.get_rng_state())


@HOSTS
def test_inputs_have_the_deviation_of_the_threshold_and_neurons_spike_as_the_closure_says(host):
    model, _ = MODELS[host]()
    batch = torch.randn(12, 200, 12)
    report = initialise(model, batch)
    assert [row.weights for row in report.layers] == [
        (name,) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    measured = calibrate(model, batch).layers
    for row, layer in zip(report.layers, measured, strict=False):
        assert row.name == layer.name
        assert row.input_std == pytest.approx(1, rel=0.01)
        assert layer.input_std == pytest.approx(row.input_std, rel=1e-6)
        assert row.rate == pytest.approx(layer.rate, rel=1e-6)
    # The first layer's input is independent in time, as the closure assumes; its neurons differ in variance.
    first, params = report.layers[0], next(m for m in model.modules() if isinstance(m, QIFLayer)).qif_parameters
    predicted = firing_rate(params, *membrane_moments(params, 1.0, first.input_mean))
    assert first.rate == pytest.approx(predicted, rel=0.15)
    assert first.expected_rate == pytest.approx(predicted, rel=0.05)


def test_weights_and_biases_are_scaled_by_the_reported_factor_and_by_nothing_else():
    QIFNode, *_ = spikingjelly()
    model = perceptron(lambda: QIFNode(tau=2.0, v_threshold=0.5), 4)
    before, membranes = state(model), [node.v for node in model if isinstance(node, QIFNode)]
    report = initialise(model, torch.rand(4, 32, 64))
    after = model.state_dict()
    for row in report.layers:
        assert row.threshold == 0.5
        assert row.input_std == pytest.approx(0.5, rel=0.01)
        for name in (f"{row.weights[0]}.weight", f"{row.weights[0]}.bias"):
            torch.testing.assert_close(after[name], before[name] * row.factor)
    assert torch.equal(after["6.weight"], before["6.weight"])
    assert membranes == [node.v for node in model if isinstance(node, QIFNode)]
    table = str(report)
    assert all(row.name in table and f"{row.factor:.3g}" in table for row in report.layers)
    again = initialise(model, torch.rand(4, 32, 64))
    assert all(row.factor == pytest.approx(1, abs=0.15) for row in again.layers)


def test_a_stepped_model_is_scaled_over_all_its_steps():
    QIFNode, functional, *_ = spikingjelly()
    stepped = perceptron(lambda: QIFNode(tau=2.0), 4, step_mode="s")
    sequence = copy.deepcopy(stepped)
    functional.set_step_mode(sequence, "m")
    x = torch.rand(32, 64)
    one, other = initialise(stepped, x, steps=4), initialise(sequence, x.expand(4, -1, -1))
    for row, same in zip(one.layers, other.layers, strict=True):
        assert row.factor == pytest.approx(same.factor, rel=0.02)
        assert row.input_std == pytest.approx(1, rel=0.01)
        assert row.rate == pytest.approx(same.rate, rel=0.05)
    by_hand = perceptron(lambda: QIFNode(tau=2.0), 3, step_mode="s")

    def over_time(model):
        functional.reset_net(model)
        return [model(x) for _ in range(4)]

    assert all(row.input_std == pytest.approx(1, rel=0.01) for row in initialise(by_hand, over_time).layers)


def test_the_hosts_lif_neurons_are_scaled_with_their_own_gain():
    *_, neuron = spikingjelly()
    model = perceptron(lambda: neuron.LIFNode(tau=4.0), 4)
    report = initialise(model, torch.randn(8, 64, 64))
    assert all(row.input_std == pytest.approx(1, rel=0.01) for row in report.layers)
    with torch.no_grad():
        assert model[0](torch.randn(8, 64, 64)).std().item() == pytest.approx(4, rel=0.05)
    assert all(row.rate == pytest.approx(row.expected_rate, rel=0.5) and row.rate > 0.05 for row in report.layers)


def test_the_gradient_reaches_the_first_of_twenty_layers_without_norm():
    QIFNode, functional, *_ = spikingjelly()
    x, target = torch.rand(4, 64, 64), torch.randint(10, (64,))

    def gradients(model):
        functional.reset_net(model)
        model.zero_grad()
        F.cross_entropy(model(x).mean(0), target).backward()
        return [module.weight.grad.norm().item() for module in model if isinstance(module, nn.Linear)]

    model = perceptron(lambda: QIFNode(tau=2.0, decay_input=False, window="isometric"), 20)
    assert gradients(model)[0] < 1e-12
    model.zero_grad()
    report = initialise(model, x)
    assert all(row.rate > 0.1 for row in report.layers)
    norms = gradients(model)
    assert all(1e-3 < norm / norms[-2] < 10 for norm in norms[:-1])


def _row_of(layers, width=64, bias=True):
    QIFNode, functional, *_ = spikingjelly()
    torch.manual_seed(0)
    made = [m for _ in range(layers) for m in (nn.Linear(width, width, bias=bias), QIFNode(dynamics="monotone"))]
    model = nn.Sequential(*made, nn.Linear(width, 10))
    functional.set_step_mode(model, "m")
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_in_a_long_row_every_neuron_starts_as_a_copy_of_one_before_it(bias):
    _, functional, *_ = spikingjelly()
    model = _row_of(40, bias=bias)
    x = torch.rand(4, 32, 64)
    report = initialise(model, x)
    assert [row.identity for row in report.layers] == [0] + [0.965] * 39
    assert all(row.input_std == pytest.approx(3, rel=0.01) for row in report.layers)  # the gain of so deep a network
    assert all(module.window_scale == 3 for module in model if hasattr(module, "window_scale"))
    assert all(0.25 < row.rate < 0.5 for row in report.layers)
    first, *_ = spikes = [model[:2](x)]
    functional.reset_net(model)
    spikes.append(model[:-1](x))
    assert (spikes[1] == first).float().mean() > 0.75  # forty layers on; independent spikes would agree in half
    weight = model[40].weight
    assert torch.allclose(weight.sum(1), torch.zeros(64), atol=1e-4)
    own = _row_of(40, bias=bias)[40].weight
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    correlation = torch.corrcoef(torch.stack([weight[off_diagonal], (own - own.mean(1, keepdim=True))[off_diagonal]]))
    assert correlation[0, 1] > 0.99  # what is not copied are the neuron's own weights


def test_an_identity_between_layers_of_different_widths_copies_all_neurons():
    QIFNode, functional, *_ = spikingjelly()
    widths = [16, 24, 12, 12, 30]
    made = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), QIFNode())]
    model = nn.Sequential(*made)
    functional.set_step_mode(model, "m")
    initialise(model, torch.rand(4, 32, 16), identity=0.999)
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        if index == 0:
            continue
        weight = model[2 * index].weight
        least = min(before, after)
        copied = (torch.arange(after)[:, None] - torch.arange(before)) % least == 0
        assert (weight[copied] > 0).all()
        assert weight[copied].abs().min() > 2 * weight[~copied].abs().max()


def test_an_identity_in_convolutions_is_at_the_centre_and_within_groups():
    QIFNode, functional, layer, *_ = spikingjelly()
    convolutions = [layer.Conv2d(4, 8, 3, padding=1), layer.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)]
    model = nn.Sequential(*(m for conv in convolutions for m in (conv, QIFNode())))
    functional.set_step_mode(model, "m")
    initialise(model, torch.rand(4, 8, 4, 6, 6), identity=0.99)
    weight = model[2].weight  # [8, 4, 3, 3]
    centre = weight[:, :, 1, 1].clone()
    assert (centre.argmax(1) == torch.arange(8) % 4).all()
    assert centre.amax() > 5 * weight.flatten(2)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].abs().amax()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("size", "padding", "dilation", "at"),
    [
        (2, "same", 1, 6), (3, "same", 1, 6), (4, "same", 1, 6), (3, "same", 2, 6), (3, 1, 1, 6), (4, 1, 1, 6),
        (4, 2, 1, 6), (2, "valid", 1, 6), (3, 0, 1, 5), (4, 0, 1, 5),
    ],
)  # fmt: skip
def test_an_identity_in_a_convolution_leaves_the_image_where_it_is(size, padding, dilation, at):
    module = nn.Conv2d(8, 8, size, padding=padding, dilation=dilation, bias=False)
    _mix_identity(module, 0.9999)
    image = torch.zeros(1, 8, 12, 12)
    image[0, 0, 6, 6] = 1
    out = module(image)[0, 0]
    assert (out == out.max()).nonzero().tolist() == [[at, at]]  # 5: of a kernel without padding, whose image is smaller


def test_a_row_of_convolutions_with_an_even_kernel_spikes_to_its_end():
    _, functional, layer, neuron = spikingjelly()
    torch.manual_seed(0)
    blocks = [m for _ in range(14) for m in (layer.Conv2d(8, 8, 2, padding="same"), neuron.LIFNode(2.0, False))]
    model = nn.Sequential(*blocks, layer.Flatten(), layer.Linear(128, 4))
    functional.set_step_mode(model, "m")
    report = initialise(model, torch.randn(3, 2, 8, 4, 4))
    assert all(0.1 < row.rate < 0.3 for row in report.layers)


def test_frozen_weights_stay_and_the_report_says_so():
    _, _, _, neuron = spikingjelly()
    model = perceptron(lambda: neuron.LIFNode(2.0, False), 4)
    with torch.no_grad():
        model[2].weight.mul_(5)  # so that it spikes as it is
    model[2].requires_grad_(False)
    before = state(model)
    report = initialise(model, torch.randn(4, 32, 64), identity=0.5)
    after = model.state_dict()
    assert [row.weights for row in report.layers] == [("0",), (), ("4",)]
    assert report.layers[1].note == "left: 2.weight is frozen (requires_grad=False)"
    assert all(torch.equal(after[name], before[name]) for name in ("2.weight", "2.bias"))
    silent = perceptron(lambda: neuron.LIFNode(2.0, False), 4)
    silent[2].requires_grad_(False)
    with torch.no_grad():
        silent[2].weight.mul_(1e-3)
        silent[4].bias.zero_()
    refused(silent, torch.randn(4, 32, 64), "Note that 2.weight cannot be scaled while frozen")
    model.requires_grad_(False)
    refused(model, torch.randn(4, 32, 64), "no weight is left to scale, as 0.weight, 2.weight, 4.weight cannot be")


def test_a_callable_shows_the_depth_and_the_input_as_a_tensor_does():
    _, functional, layer, neuron = spikingjelly()
    x = torch.randn(3, 16, 16)

    def over_time(model):
        functional.reset_net(model)
        return torch.stack([model(step) for step in x])

    model = perceptron(lambda: neuron.LIFNode(2.0, False), 17, 16, step_mode="s")
    rows = initialise(model, over_time).layers
    assert [row.identity for row in rows] == [0, *[IDENTITY] * 15]
    assert all(row.input_std == pytest.approx(1.4, rel=0.01) for row in rows)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif, self.out = layer.Linear(16, 16), neuron.LIFNode(), layer.Linear(16, 2)

        def forward(self, x):
            return self.out(self.lif(x + self.fc(x)))

    refused(Residual(), over_time, "lif adds up the output of fc and of input")


def test_an_identity_is_mixed_in_once_however_often_initialise_runs():
    model, x = _row_of(3), torch.rand(4, 32, 64)
    initialise(model, x, identity=0.9)
    once = model[2].weight.clone()
    initialise(model, x, identity=0.9)
    torch.testing.assert_close(model[2].weight, once, rtol=0.02, atol=1e-4)
    weight = model[2].weight.detach()
    identity = torch.eye(64) - 1 / 64
    share = (weight * identity).sum().square() / (identity.square().sum() * weight.square().sum())
    assert share == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("kind", ["transposed", "one input each", "one output"])
def test_a_weight_that_takes_no_identity_keeps_its_draws_and_the_report_says_so(kind):
    QIFNode, functional, layer, *_ = spikingjelly()
    torch.manual_seed(0)
    second = {
        "transposed": layer.ConvTranspose2d(4, 4, 3),
        "one input each": layer.Conv2d(4, 4, 1, groups=4),
        "one output": layer.Conv2d(4, 1, 1),
    }[kind]
    own = second.weight.clone()
    model = nn.Sequential(layer.Conv2d(4, 4, 3), QIFNode(dynamics="monotone"), second, QIFNode(dynamics="monotone"))
    functional.set_step_mode(model, "m")
    report = initialise(model, torch.rand(4, 8, 4, 6, 6), identity=0.9)
    assert [row.identity for row in report.layers] == [0, 0]
    assert torch.allclose(second.weight, report.layers[1].factor * own, rtol=1e-4)


def test_an_identity_in_a_weight_that_is_computed_is_refused_and_in_half_precision_zeros_are_no_nan():
    model, x = _row_of(3), torch.rand(4, 32, 64)
    nn.utils.weight_norm(model[2])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="is computed from other parameters, as under weight_norm"):
        initialise(model, x, identity=0.9)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model = _row_of(3)
    nn.init.zeros_(model[2].weight)
    assert initialise(model.half(), x.half(), identity=0.9).layers[1].identity == 0.9


def test_the_report_says_so_where_no_surrogate_is_derived_for_a_large_input():
    QIFNode, *_ = spikingjelly()
    model = _row_of(33)
    model[3] = QIFNode(dynamics="lif", step_mode="m")
    report = initialise(model, torch.rand(4, 32, 64))
    assert [bool(row.note) for row in report.layers[:3]] == [False, True, False]
    assert "its surrogate assumes an input deviation of one threshold" in report.layers[1].note
    assert (model[1].window_scale, model[3].window_scale) == (3, 1)


def test_a_short_row_and_an_identity_of_0_keep_the_draws():
    for layers, options in ((12, {}), (14, {"identity": 0.0})):
        model, own = _row_of(layers), _row_of(layers)
        report = initialise(model, torch.rand(4, 32, 64), **options)
        for index, row in enumerate(report.layers):
            assert row.identity == 0
            assert torch.allclose(model[2 * index].weight, row.factor * own[2 * index].weight, rtol=1e-4)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="identity must be at least 0 and below 1"):
            initialise(_row_of(2), torch.rand(4, 32, 64), identity=wrong)


def test_layers_that_a_norm_feeds_and_layers_without_a_weight_are_left():
    QIFNode, functional, layer, neuron = spikingjelly()
    model = nn.Sequential(
        neuron.IFNode(), layer.Linear(8, 16), TDBatchNorm1d(16), QIFNode(), layer.Linear(16, 16), QIFNode(),
        layer.Linear(16, 4), neuron.LIFNode(v_threshold=1e9),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    before = state(model)
    report = initialise(model, 2 * torch.rand(6, 32, 8))
    assert [row.name for row in report.layers] == ["0", "3", "5", "7"]
    notes = {row.name: row.note for row in report.layers}
    assert notes["0"] == "left: no weight before it"
    assert notes["3"] == "left: fed by 2"
    assert notes["5"] == ""
    assert "not meant to spike" in notes["7"]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"4.weight", "4.bias"}
    assert "left: fed by 2" in str(report)


class Summed(nn.Module):
    """Two weights that add up before a neuron, a shared one, or a shortcut of spikes."""

    def __init__(self, kind):
        super().__init__()
        QIFNode, functional, layer, _ = spikingjelly()
        self.kind = kind
        self.fc1, self.fc2, self.fc3 = layer.Linear(8, 8), layer.Linear(8, 8), layer.Linear(8, 8)
        self.one, self.two, self.three = QIFNode(), QIFNode(), QIFNode()
        self.free = nn.Parameter(torch.randn(8, 8))
        if kind == "tied":
            self.fc2.weight = self.fc1.weight
        functional.set_step_mode(self, "m")

    def forward(self, x):
        spikes = self.one(self.fc1(x))
        if self.kind == "two weights":
            return self.two(self.fc2(spikes) + self.fc3(x))
        if self.kind == "fork":
            current = self.fc2(spikes)
            return self.two(current) + self.three(current)
        if self.kind == "shared":
            return self.two(self.fc1(spikes))
        if self.kind == "shortcut":
            return self.two(self.fc2(spikes) + spikes)
        if self.kind == "input":
            return self.two(self.fc2(spikes) + x)
        if self.kind == "function":
            return self.two(F.linear(spikes, self.free))
        return self.two(self.fc2(spikes))


def test_weights_that_add_up_are_scaled_together():
    model = Summed("two weights")
    with torch.no_grad():
        model.fc2.bias.zero_(), model.fc3.bias.zero_()
    before = state(model)
    report = initialise(model, torch.randn(6, 64, 8))
    row = next(row for row in report.layers if row.name == "two")
    assert row.weights == ("fc2", "fc3")
    assert row.input_std == pytest.approx(1, rel=0.01)
    for name in row.weights:
        torch.testing.assert_close(getattr(model, name).weight, before[f"{name}.weight"] * row.factor)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("fork", "fc2, which feeds t.*, feeds t.*, too"),
        ("shared", "fc1, which feeds .*, feeds .*, too"),
        ("tied", "shares its parameters"),
        ("shortcut", "two adds up the output of fc2 and of one, which no weight scales"),
        ("input", "two adds up the output of fc2 and of input"),
        ("function", "a parameter that a function uses"),
    ],
)
def test_weights_that_no_single_factor_suits_are_refused(kind, match):
    refused(Summed(kind), torch.randn(6, 64, 8), match)


@pytest.mark.parametrize("model", [nn.Linear, "model"])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="initialise takes a built model"):
        initialise(model, torch.randn(6, 64, 8))


def test_a_trained_model_is_refused():
    QIFNode, functional, *_ = spikingjelly()
    x = torch.rand(4, 64, 64)
    model = perceptron(QIFNode, 3, norm=True)
    model(x)
    functional.reset_net(model)
    refused(model, x, r"1 has counted 1 batches.*reset_running_stats")

    model = perceptron(QIFNode, 3)
    model(x).sum().backward()
    functional.reset_net(model)
    refused(model, x, r"has a gradient.*zero_grad")

    model = perceptron(QIFNode, 3)
    calibrate(model, torch.randn(4, 64, 64))
    refused(model, x, "calibrated to its current input. Initialise first")


def test_weights_that_were_learned_are_told_from_initial_ones_of_any_kind():
    QIFNode, functional, *_ = spikingjelly()
    x = torch.rand(512, 64)
    target = (x[:, :8] @ torch.randn(8, 10)).argmax(1)
    model = perceptron(lambda: QIFNode(tau=2.0, window="isometric"), 3)
    initialise(model, x.expand(4, -1, -1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        functional.reset_net(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x.expand(4, -1, -1)).mean(0), target).backward()
        optimizer.step()
    fresh = perceptron(lambda: QIFNode(tau=2.0), 3)
    fresh.load_state_dict(model.state_dict())
    refused(fresh, x.expand(4, -1, -1), "not independent of one another")
    for kind in (
        nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.eye_,
    ):  # fmt: skip
        model = perceptron(QIFNode, 3)
        for module in model:
            if isinstance(module, nn.Linear):
                kind(module.weight)
        initialise(model, torch.randn(4, 64, 64))


def test_batches_and_models_that_cannot_be_measured_are_refused():
    QIFNode, *_ = spikingjelly()
    x = torch.rand(4, 64, 64)
    refused(perceptron(QIFNode, 3), torch.full((4, 64, 64), float("nan")), "not finite")
    refused(perceptron(QIFNode, 3), x[:, :0], "empty")
    refused(perceptron(QIFNode, 3), [1, 2], "a batch must be a tensor", TypeError)
    refused(perceptron(QIFNode, 3), x, "steps must be", steps=0)
    refused(nn.Linear(4, 4), torch.rand(2, 4), "no spiking neuron")
    silent = perceptron(QIFNode, 4)
    with torch.no_grad():
        silent[4].weight.zero_(), silent[4].bias.fill_(-1.0)
    refused(silent, x, "the input of 5 is constantly -1")
    refused(nn.DataParallel(perceptron(QIFNode, 3)), x, "wrapped in DataParallel: initialise it first")
