import copy
import math
import re

import pytest
import torch
from measured_models import MODELS
from torch import nn

import qif_plugins
from qif_plugins import QIFParameters, Window, calibrate, health, initialise, membrane_moments, qif_multi_step
from qif_plugins.diagnostics.calibration import CalibrationWarning
from qif_plugins.neuron.functional import _notice
from qif_plugins.neuron.module import QIFLayer
from qif_plugins.neuron.norm import TDBatchNorm1d
from qif_plugins.neuron.phase import regions

HOSTS = pytest.mark.parametrize("host", MODELS)


def node(**options):
    """The paper's neuron under the unbiased window, unless ``options`` say otherwise."""
    options = ({} if options.keys() & {"tau", "a"} else {"dynamics": "paper"}) | options
    options = ({} if "surrogate_function" in options else {"window": "unbiased"}) | options
    return pytest.importorskip("qif_plugins.adapters.spikingjelly").QIFNode(step_mode="m", **options)


@HOSTS
def test_the_numbers(host):
    """Against the operator run by hand on the first layer's input."""
    model, batches = MODELS[host]()
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, QIFLayer))
    x = linear(batches[0]).detach()
    window = Window.unbiased(QIFParameters())
    spikes, _, h = qif_multi_step(x, 0.0, QIFParameters(), window, store_h_seq=True)
    row = health(model, batches[0]).layers[0]
    assert row.name == name
    assert row.input_std == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    assert row.membrane_mean == pytest.approx(h.double().mean().item(), abs=1e-6)
    assert row.membrane_std == pytest.approx(h.double().std(correction=0).item(), rel=1e-6)
    assert (row.predicted_mean, row.predicted_std) == membrane_moments(first.qif_parameters, 1.0)
    assert row.rate == pytest.approx(spikes.mean().item(), abs=1e-6)
    assert row.window_share == pytest.approx(((h >= window.lo) & (h <= window.hi)).float().mean().item())
    per_neuron = spikes.sum((0, 1))
    assert row.silent == pytest.approx((per_neuron == 0).float().mean().item())
    assert row.saturated == pytest.approx((per_neuron >= 0.95 * 6 * 16).float().mean().item())


def test_the_share_of_the_gradient():
    """One layer and a loss that is linear in its spikes: the arriving gradient is the loss's own."""
    neuron = node()
    x = torch.randn(5, 20, 6)
    weight = torch.randn(5, 20, 6)
    row = health(neuron, x, loss=lambda spikes, _: (spikes * weight).sum()).layers[0]
    h = qif_multi_step(x, 0.0, QIFParameters(), Window(0, 1), store_h_seq=True)[-1]
    window = Window.unbiased(QIFParameters())
    inside = (h >= window.lo) & (h <= window.hi)
    assert row.gradient_share == pytest.approx((weight.abs() * inside).sum().item() / weight.abs().sum().item())
    assert row.gradient == pytest.approx(weight.abs().mean().item())


@HOSTS
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(host, fails):
    model, batches = MODELS[host]()
    model(batches[1])
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    rng = torch.get_rng_state()
    membranes = [_copied(m) for m in model.modules()]

    def loss(output, target):
        if fails:
            raise RuntimeError("broken loss")
        return output.sum()

    if fails:
        with pytest.raises(RuntimeError, match="broken loss"):
            health(model, batches[0], loss=loss)
    else:
        health(model, batches[0], loss=loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), rng)
    for module, then in zip(model.modules(), membranes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_copied(module), then, strict=True))


def _copied(module):
    values = [*getattr(module, "_memories", {}).values(), getattr(module, "mem", None)]
    return [value.detach().clone() for value in values if isinstance(value, torch.Tensor)]


@HOSTS
def test_targets_losses_and_callables(host):
    model, batches = MODELS[host]()
    target = torch.randint(0, 4, (16,))
    seen = []

    def loss(output, given):
        seen.append(given)
        return nn.functional.cross_entropy(output.mean(0), target)

    with_target = health(model, (batches[0], target), loss=loss)
    assert torch.equal(seen[0], target)
    assert health(model, lambda net: net(batches[0]), loss=loss).layers[0].gradient > 0
    assert with_target.layers[0].gradient > 0
    assert health(model, batches[0]) == health(model, batches[0])  # the default direction is fixed


def test_frozen_parameters_and_many_steps():
    model, batches = MODELS["spikingjelly"](per_step=True)
    model.requires_grad_(False)
    row = health(model, batches[0], steps=4).layers[0]
    assert row.gradient > 0


def test_given_surrogates():
    from spikingjelly.activation_based import surrogate

    x = torch.randn(4, 10, 6)
    smooth = health(node(surrogate_function=surrogate.ATan()), x).layers[0]
    assert smooth.window_share == 1
    _notice.cache_clear()  # given once a process, perhaps to an earlier test
    with pytest.warns(UserWarning, match="no fused kernel"):
        pieces = health(node(surrogate_function=surrogate.PiecewiseQuadratic()), x).layers[0]
    assert 0 < pieces.window_share < 1
    assert pieces.gradient > 0


def perceptron(layers, width=64, norm=True, **options):
    """On input ``[T, N, 20]``, with tdBN before each neuron."""
    from spikingjelly.activation_based import functional, layer

    build = type(node())
    blocks, size = [], 20
    for _ in range(layers):
        blocks += [layer.Linear(size, width), *([TDBatchNorm1d(width)] if norm else []), build(**options)]
        size = width
    model = nn.Sequential(*blocks, layer.Linear(width, 10))
    functional.set_step_mode(model, "m")
    return model


class TestCauses:
    """Networks with one cause each: it is named, with no other, and the option that cures it cures it."""

    def test_none(self):
        for options in ({}, {"dynamics": "paper"}, {"tau": 10.0, "decay_input": False}):
            assert health(perceptron(3, **options), torch.randn(6, 40, 20)).healthy
        assert health(perceptron(20), torch.randn(6, 40, 20)).healthy

    def test_memory_under_an_input_that_does_not_change(self):
        x = torch.randn(40, 20).expand(8, 40, 20)
        report = health(perceptron(1, dynamics="paper"), x)
        assert report.causes == ("memory",)
        assert "the map of 2 keeps -0.125 of a membrane" in report.advice[0]
        assert report.layers[0].memory == pytest.approx(-0.125)
        assert report.layers[0].input_repeats == pytest.approx(1)
        assert report.layers[0].spike_repeats > 0.9
        cured = health(perceptron(1, dynamics="lif"), x)
        assert cured.healthy
        assert cured.layers[0].spike_repeats < 0.9

    def test_memory_in_a_deep_network(self):
        report = health(perceptron(9, dynamics="paper"), torch.randn(6, 40, 20))
        assert report.causes == ("memory",)
        assert "nothing adds up over the time steps in any of 9 layers" in report.advice[0]
        assert "9 layers (2 to 26)" in str(report)

    def test_the_windows_width(self):
        torch.manual_seed(0)
        narrow, x = perceptron(10, window="unbiased"), torch.randn(6, 40, 20)
        torch.manual_seed(0)
        isometric = perceptron(10)
        report, cured = health(narrow, x), health(isometric, x)
        assert report.causes == ("window's width",)
        assert "Use window='isometric' in 10 layers (2 to 29)" in report.advice[0]
        assert cured.healthy
        growth = [r.layers[0].gradient_square / r.layers[-1].gradient_square for r in (report, cured)]
        assert growth[0] > 200
        assert 0.2 < growth[1] < 5
        # What is expected from membranes, rates and surrogates is what the gradient does.
        for one, measured in zip((report, cured), growth, strict=True):
            expected = math.prod(row.gain for row in one.layers[:-1])
            assert math.log(expected) == pytest.approx(math.log(measured), abs=1.5)

    def test_the_width_of_isometric_surrogates_in_a_sequence_shorter_than_the_leak(self):
        model, x = perceptron(20, tau=10.0, decay_input=False), torch.randn(4, 40, 20)
        report = health(model, x)
        assert report.causes == ("window's width",)
        assert "moments='measured'" in report.advice[0]
        calibrate(model, x, moments="measured")
        cured = health(model, x)
        assert cured.healthy
        before, after = (r.layers[0].gradient_square / r.layers[-1].gradient_square for r in (report, cured))
        assert before < 0.01
        assert 0.1 < after < 10

    def test_the_windows_width_where_only_the_data_show_which_norm_feeds_what(self):
        class Grouped(nn.Module):
            def __init__(self):
                super().__init__()
                chain = perceptron(10, window="unbiased")
                self.neurons, self.layers = nn.ModuleList(chain[2::3]), nn.ModuleList(chain[0:-1:3])
                self.norms, self.out = nn.ModuleList(chain[1::3]), chain[-1]

            def forward(self, x):
                for fc, norm, neuron in zip(self.layers, self.norms, self.neurons, strict=True):
                    x = neuron(norm(fc(x)))
                return self.out(x)

        assert health(Grouped(), torch.randn(6, 40, 20)).causes == ("window's width",)

    def test_no_width_is_blamed_where_no_norm_feeds_the_layers(self):
        model, x = perceptron(10, norm=False, window="unbiased"), torch.randn(6, 40, 20)
        initialise(model, x)
        assert "window's width" not in health(model, x).causes

    def test_the_windows_scale(self):
        neuron, x = node(window="isometric"), 0.5 * torch.randn(8, 400, 20)
        report = health(neuron, x)
        assert report.causes == ("window's scale",)
        assert "window's scale: its window assumes a membrane of 0.158 ± 1.05, and it is" in str(report)
        calibrate(neuron, x)
        assert health(neuron, x).healthy

    def test_the_windows_tails(self):
        x = torch.randn(8, 400, 20)
        report = health(node(window=Window(3.5, 3.6)), x)
        assert report.causes == ("window's scale",)
        assert "leave it out for the isometric Gaussian" in str(report)
        assert report.layers[0].gradient_share < 0.02
        cured = health(node(window="isometric"), x)
        assert cured.healthy
        assert cured.layers[0].gradient_share > 0.9

    def test_the_inputs_scale_where_neurons_are_silent(self):
        model, x = perceptron(1, norm=False), 0.2 * torch.randn(6, 40, 20)
        report = health(model, x)
        assert report.causes == ("input's scale",)
        assert "initialise(model, batch)" in str(report)
        gain = float(re.search(r"take a gain (\S+) times as large", str(report))[1])
        assert gain == pytest.approx(1 / report.layers[0].input_std, rel=0.01)
        initialise(model, x)
        assert health(model, x).healthy
        model = perceptron(1, norm=False, input_gain=gain)
        assert "input's scale" not in health(model, x).causes

    def test_the_inputs_scale_where_neurons_saturate(self):
        from spikingjelly.activation_based import neuron as host

        from qif_plugins import swap

        def build():
            torch.manual_seed(0)
            model = perceptron(1)
            model[2] = host.LIFNode(tau=4.0, step_mode="m")
            nn.init.constant_(model[1].bias, 4.0)
            return model

        x = torch.randn(6, 40, 20)
        swapped = build()
        swap(swapped)
        report = health(swapped, x)
        assert "input's scale" in report.causes
        assert "LIF's own gain (swap(model, dynamics='monotone'))" in str(report)
        swap(cured := build(), dynamics="lif")
        assert "input's scale" not in health(cured, x).causes

    def test_the_rebound(self):
        """A strong mean inhibition, under which all spikes but a few are the parabola's."""
        x = torch.randn(20, 100, 8) - 2
        neuron = node(window="heuristic")
        report = health(neuron, x)
        assert report.causes == ("rebound",)
        row = report.layers[0]
        h = qif_multi_step(x, 0.0, QIFParameters(), Window(0, 1), store_h_seq=True)[-1]
        v = torch.where(h >= 1, 0.0, h)[:-1]
        vertex = QIFParameters().map(0.25)
        caused = (v < 0.25) & (h[1:] >= 1) & (x[1:] + vertex < 1)
        assert row.rebound_spikes == pytest.approx((caused.sum() / (h[1:] >= 1).sum()).item())
        assert row.rebound_spikes > 0.5
        cured = health(node(window="heuristic", tau=4.0), x).layers[0]
        assert "rebound" not in cured.causes
        assert cured.rebound < 0.01

    def test_are_the_same_one_step_at_a_call(self):
        """The steps' relations are those between calls."""
        model, x = perceptron(2, dynamics="paper"), torch.randn(40, 20)
        from spikingjelly.activation_based import functional

        model = nn.Sequential(*(m for m in model if not isinstance(m, TDBatchNorm1d)))  # which pools the steps
        whole = health(model, x.expand(6, 40, 20)).layers[0]
        functional.set_step_mode(model, "s")
        stepped = health(model, x, steps=6).layers[0]
        for name in ("input_repeats", "spike_repeats", "gain", "rebound"):
            assert getattr(stepped, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_healthy():
    report = health(node(), torch.randn(10, 50, 20))
    assert report.healthy
    assert "Nothing stands out." in str(report)
    assert report.rows()[0]["rate"] == report.layers[0].rate
    assert str(report).splitlines()[0].split()[:3] == ["layer", "input", "membrane"]


@pytest.mark.parametrize(
    ("x", "options", "found"),
    [
        (lambda: 0.1 * torch.randn(8, 40, 20), {}, "dead: 100.0 % of its neurons never spike; its input is"),
        (lambda: 3 + 0.1 * torch.randn(8, 40, 20), {}, "saturated: 100.0 % of its neurons"),
        (lambda: torch.randn(8, 40, 20), {"window": Window(6.0, 6.1)}, "starved: 0.0 % of its membranes"),
        (lambda: 0.5 * torch.randn(8, 40, 20), {}, "its window assumes a membrane of 0.158 ± 1.05"),
        (lambda: torch.full((2, 3, 4), math.nan), {}, "input is not finite"),
        (lambda: 2.5 * torch.randn(200, 3, 8), {"v_reset": None}, "membrane is not finite (inf ± nan), though its inp"),
        (lambda: 20 * torch.randn(20, 30, 8), {}, "of its membranes lie below -1.77, where the parabola"),
    ],
)
def test_advice(x, options, found):
    report = health(node(**options), x())
    assert not report.healthy
    assert any(found in sentence for sentence in report.layers[0].advice)
    assert found in str(report)


def test_a_surrogate_with_tails_is_advised_where_there_is_none():
    x = 0.01 * torch.randn(8, 40, 20)
    for window, advised in (("unbiased", True), ("heuristic", True), ("isometric", False), (Window(0, 2), False)):
        neuron = node(window=window)
        assert ("a surrogate with tails, window='isometric'" in str(health(neuron, x))) == advised
    with pytest.warns(CalibrationWarning, match="tails, window='isometric', instead of the unbiased rectangle"):
        calibrate(node(window="unbiased"), x)
    with pytest.warns(CalibrationWarning) as told:
        calibrate(node(window="isometric"), x)
    assert "tails" not in str(told[0].message)


def test_calibration_removes_the_advice_it_gives():
    neuron = node()
    x = 0.5 * torch.randn(8, 400, 20)
    assert "calibrate(model, batches)" in str(health(neuron, x))
    calibrate(neuron, x)
    assert health(neuron, x).healthy


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_no_calibration_where_the_input_is_the_problem(scale):
    assert "calibrate" not in str(health(node(), scale * torch.randn(20, 30, 8)))


def test_the_rebound_is_that_of_the_phase_portrait():
    x = 3 * torch.randn(6, 40, 20)
    h = qif_multi_step(x, 0.0, QIFParameters(), Window(0, 1), store_h_seq=True)[-1]
    point = regions(QIFParameters())[0].hi
    row = health(node(), x).layers[0]
    assert row.rebound == pytest.approx((h < point).float().mean().item())
    assert f"below {point:.3g}," in str(row.advice)


def test_what_to_do_depends_on_the_norm_before_the_layer():
    from spikingjelly.activation_based import functional, layer

    def advice(*norm):
        net = nn.Sequential(layer.Linear(8, 8), *norm, node(), layer.Linear(8, 2))
        functional.set_step_mode(net, "m")
        net[0].weight.data.mul_(1e-3), net[0].bias.data.zero_()
        return str(health(net.eval(), torch.randn(4, 10, 8)))

    assert "insert tdBN before it, as no normalization feeds it" in advice()
    batch_norm = nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Unflatten(0, (4, 10))
    assert "turn 2, which feeds it, into tdBN (swap(model, norm='tdbn'))" in advice(*batch_norm)
    for norm in (qif_plugins.neuron.norm.TDBatchNorm1d(8), nn.LayerNorm(8)):
        nn.init.constant_(norm.weight, 0.1)
        assert "change the scale of 1, which feeds it" in advice(norm)
    shared = nn.ModuleDict({"norm": nn.BatchNorm1d(8), "one": node(), "two": node()})
    told = str(health(shared, lambda net: net["two"](net["one"](0.1 * torch.randn(4, 10, 8).requires_grad_()))))
    assert "turns a batch norm into tdBN, but inserts none" in told


def test_a_gradient_that_is_not_finite():
    row = health(node(), torch.randn(5, 20, 6), loss=lambda spikes, _: (spikes * math.nan).sum()).layers[0]
    assert row.advice[0].startswith("the gradient that arrives at its spikes is not finite (nan)")


def test_a_loss_that_fails_says_what_it_was_called_with():
    cross_entropy, x = nn.CrossEntropyLoss(), torch.randn(4, 8, 5)
    with pytest.raises(TypeError, match=r"a tensor \[4, 8, 5\] and None; there was no target: pass \(x, target\)"):
        health(node(), x, loss=cross_entropy)
    with pytest.raises(TypeError, match=r"list of 2 \(first a tensor \[4, 8, 5\]\).*steps=2.*torch.stack\(outputs\)"):
        health(node(), (x, torch.zeros(4).long()), loss=cross_entropy, steps=2)
    with pytest.raises(ValueError, match=r"the loss failed: .* takes these two"):
        health(node(), (x, torch.zeros(8).long()), loss=cross_entropy)


def test_no_gradient_arrives():
    model = nn.ModuleDict({"used": node(), "aside": node()})

    def drive(net):
        net["aside"](torch.randn(4, 20, 5))
        return net["used"](torch.randn(4, 20, 5).requires_grad_())

    report = health(model, drive)
    assert report.layers[0].advice == ()
    assert "no gradient arrives" in report.layers[1].advice[0]


def test_one_step_is_told_and_not_diagnosed():
    """A weak input that adds up over the steps: dead over one of them, and over fifteen not."""
    neuron = type(node())(tau=20.0, decay_input=False, window="unbiased")
    x = 0.2 + 0.02 * torch.randn(40, 20)
    row = health(neuron, x).layers[0]
    assert row.silent == 1
    assert row.advice[0].startswith("measured over one time step; pass steps=T or a callable")
    assert len(row.advice) == 1
    assert not any("one time step" in sentence for sentence in health(neuron, x, steps=15).layers[0].advice)
    assert any(sentence.startswith("dead") for sentence in health(neuron, 0 * x, steps=2).layers[0].advice)
    # The second layer, still at rest, passes no gradient to the first.
    between = nn.Linear(20, 20)
    nn.init.constant_(between.weight, 1e-3)
    nn.init.zeros_(between.bias)
    before = type(neuron)(window=Window(0.0, 2.0))
    first, second = health(nn.Sequential(before, between, neuron), x + 1).layers
    assert math.isnan(first.gradient_share)
    assert all(row.advice[0].startswith("measured over one time step") for row in (first, second))
    assert not any("no gradient" in sentence for sentence in first.advice)


def test_one_step_of_snntorch():
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    model = nn.Sequential(
        nn.Linear(12, 40),
        QIF(beta=0.9, init_hidden=True),
        nn.Linear(40, 4),
        snn.Leaky(0.9, init_hidden=True, output=True),
    )
    x, target = 0.1 * torch.randn(16, 12), torch.randint(0, 4, (16,))

    def loss(outputs, target):
        return sum(nn.functional.cross_entropy(mem, target) for _, mem in outputs)

    assert health(model, x).layers[0].advice[0].startswith("measured over one time step")
    row = health(model, (x, target), loss=loss, steps=5).layers[0]
    assert row.gradient > 0
    assert not any("one time step" in sentence for sentence in row.advice)


def test_a_model_of_two_inputs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = node()

        def forward(self, a, b):
            return self.node(a + b)

    a = torch.randn(4, 30, 5).requires_grad_()
    with pytest.raises(TypeError, match=r"missing 1 required.*lambda model: model\(a, b\)") as caught:
        health(Both(), (a, a))
    assert isinstance(caught.value.__cause__, TypeError)
    assert health(Both(), lambda model: model(a, a)).layers[0].gradient > 0


def test_a_loader_and_an_empty_batch():
    with pytest.raises(TypeError, match=r"got DataLoader; pass one batch: next\(iter\(loader\)\)"):
        health(node(), torch.utils.data.DataLoader([torch.randn(3, 2)]))
    with pytest.raises(ValueError, match="the batch is empty"):
        health(node(), torch.randn(3, 0, 2))


def test_bad_input():
    with pytest.raises(ValueError, match="no QIF layer"):
        health(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(TypeError, match="callable"):
        health(node(), {"x": torch.randn(3, 2)})
    with pytest.raises(ValueError, match="has no gradient"):
        health(node(), torch.randn(3, 2, 2), loss=lambda output, _: output.detach().sum())
    with pytest.raises(ValueError, match="at least 1"):
        health(node(), torch.randn(3, 2, 2), steps=0)
    assert qif_plugins.health is health


class Stepped(nn.Module):
    """Two hidden layers of snnTorch and a readout that is decoded by its membrane, with the loop over time inside."""

    def __init__(self):
        super().__init__()
        snn = pytest.importorskip("snntorch")
        self.fc1, self.lif1 = nn.Linear(20, 32), snn.Leaky(0.9)
        self.fc2, self.lif2 = nn.Linear(32, 32), snn.Leaky(0.9)
        self.fc3, self.readout = nn.Linear(32, 10), snn.Leaky(0.9)

    def forward(self, x_seq):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.readout.reset_mem()
        mems = []
        for x in x_seq:
            spikes, mem1 = self.lif1(self.fc1(x), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            _, mem3 = self.readout(self.fc3(spikes), mem3)
            mems.append(mem3)
        return torch.stack(mems)


def swapped(host):
    """A network without norm of three linear layers, swapped, and a batch of noise for it."""
    torch.manual_seed(0)
    x = torch.randn(6, 16, 20)
    if host == "snntorch":
        model = Stepped()
    else:
        from spikingjelly.activation_based import functional, layer, neuron

        hidden = [layer.Linear(20, 32), neuron.LIFNode(), layer.Linear(32, 32), neuron.LIFNode()]
        model = nn.Sequential(*hidden, layer.Linear(32, 10))
        functional.set_step_mode(model, "m")
    qif_plugins.swap(model, example_input=x)
    return model, x


@HOSTS
class TestAfterSwap:
    """What a newcomer does wrong with a network that was swapped by default, without norm, with LIF's surrogate."""

    def test_an_input_that_is_far_too_large(self, host):
        model, x = swapped(host)
        report = health(model, 500 * x)
        first = report.layers[0]
        assert report.causes == ("input's scale",)
        assert first.rebound == 0
        assert first.near < 0.1
        told = re.search(r"too large: .* is (\S+) times the distance .* take a gain (\S+) times as large", str(report))
        assert float(told[1]) == pytest.approx(first.input_std, rel=0.01)
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.mul_(float(told[2]))
        assert "too large" not in str(health(model, 500 * x))

    def test_silent_layers_are_told_of_once(self, host):
        model, x = swapped(host)
        names = [name for name, module in model.named_modules() if isinstance(module, QIFLayer)]
        report = health(model, 0 * x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        report = health(model, x)
        assert all(row.advice[0].startswith("dead") for row in report.layers)
        assert str(report).count("never spike") == 1
        assert f"The same is true of {names[1]}. Cure {names[0]} first" in str(report)

    def test_inhibition_asks_for_another_mean_and_no_gain(self, host):
        model, x = swapped(host)
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, nn.Linear)).bias.fill_(-20)
        advice = health(model, x).layers[0].advice[0]
        assert "raise the mean of its input" in advice
        assert "gain" not in advice

    def test_nan_is_traced_to_the_weight_and_nothing_else_is_said(self, host):
        model, x = swapped(host)
        name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][1]
        with torch.no_grad():
            model.get_submodule(name).weight[0, 0] = math.nan
        report = health(model, x)
        assert not report.healthy
        assert report.advice == (f"{name}.weight: 1 of its 1024 values are NaN or infinite, and so are the results.",)
        assert [bool(row.advice) for row in report.layers] == [False, True]
        assert "dead" not in str(report)
        x[0, 0, 0] = math.inf
        assert "the batch: 1 of its 1920 values" in str(health(swapped(host)[0], x))

    def test_an_input_that_the_model_does_not_take(self, host):
        model, x = swapped(host)
        for measure in (health, calibrate):
            with pytest.raises(RuntimeError, match=r"a tensor \[6, 16, 12\] of torch.float32.*cannot be multiplied"):
                measure(model, x[..., :12])
            with pytest.raises(RuntimeError, match=r"of torch.float64.*The model's parameters are torch.float32"):
                measure(model, x.double())
            with pytest.raises(ValueError, match="meta device"):
                measure(model, x.to("meta"))
            with pytest.raises(TypeError, match=r"torch.as_tensor\(array\) makes one"):
                measure(model, [x.numpy()])
        with pytest.raises(RuntimeError, match="the input of batch 1, a tensor"):
            calibrate(model, [x, x[..., :12]])
        with pytest.raises(TypeError, match="got a list that begins with a tuple"):
            health(model, [(x, x)])

    def test_the_number_of_steps_is_told_and_a_missing_one_noticed(self, host):
        model, x = swapped(host)
        assert "Measured over 6 time steps.\n" in str(health(model, x))
        told = str(health(model, x[0]))
        assert "Measured over 16 time steps of one sample: the neurons received no batch dimension" in told

    def test_nothing_is_predicted_for_a_surrogate_that_was_kept(self, host):
        model, x = swapped(host)
        row = health(model, x).layers[0]
        assert math.isnan(row.predicted_mean)
        assert row.predicted == "–"
        assert "nan" not in str(health(model, x))
