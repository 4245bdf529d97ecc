"""The input gain that ``swap`` chooses under norms in networks of many neurons in a row."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")

from qif_plugins.adapters.spikingjelly import ParametricQIFNode, QIFNode
from spikingjelly.activation_based import functional, layer, neuron

from qif_plugins import Gaussian, swap
from qif_plugins.convert.find import survey
from qif_plugins.convert.spikingjelly import HOST


def same_surrogate(node, expected):
    """Whether the node's surrogate is ``expected``, to rounding."""
    found = node.surrogate_function.window(node.v_threshold)
    return torch.allclose(
        torch.tensor([float(v) for v in found.coefficients()]),
        torch.tensor([float(v) for v in expected.coefficients()]),
        rtol=1e-4,
    )


class _Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*_row(2))

    def forward(self, x):
        return x + self.body(x)


class _Listed(nn.Module):
    """Layers in a list, run in a loop, as many people write it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(_row(layers))
        self.out = layer.Conv2d(4, 2, 1)

    def forward(self, x):
        for module in self.layers:
            x = module(x)
        return self.out(x)


class _Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class _Tied(nn.Module):
    """The same block again and again."""

    def __init__(self, times):
        super().__init__()
        self.block, self.out, self.times = nn.Sequential(*_row(1)), layer.Conv2d(4, 2, 1), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return self.out(x)


def _row(layers, lif=neuron.LIFNode):
    return [m for _ in range(layers) for m in (layer.Conv2d(4, 4, 1), layer.BatchNorm2d(4), lif())]


def _deep(build):
    model = build()
    functional.set_step_mode(model, "m")
    return model


@pytest.mark.parametrize("example", [None, torch.rand(2, 3, 4, 1, 1)], ids=["by order", "by data flow"])
@pytest.mark.parametrize(
    ("build", "depth"),
    [
        (lambda: nn.Sequential(*_row(32), layer.Conv2d(4, 2, 1)), 32),
        (lambda: _Listed(22), 22),
        (lambda: _Wrapped(_Listed(22)), 22),
        (lambda: nn.Sequential(*(_Wrapped(nn.Sequential(*_row(1))) for _ in range(16)), layer.Conv2d(4, 2, 1)), 16),
        (lambda: nn.Sequential(*_row(12), layer.Conv2d(4, 2, 1)), 12),
        (lambda: nn.Sequential(*_row(3), *(_Shortcut() for _ in range(15)), layer.Conv2d(4, 2, 1)), 5),
    ],
)
def test_the_gain_under_norms_grows_with_the_neurons_in_a_row_shortcuts_taken(build, depth, example):
    model = _deep(build)
    report = swap(model, example_input=example)
    nodes = [m for m in model.modules() if isinstance(m, QIFNode)]
    gain = min(max(1 + 0.1 * (depth - 12), 1), 3)
    assert len(nodes) == len(report.changed) > 0
    for node in nodes:
        assert node.input_gain == pytest.approx(gain)
        assert node.window_scale == node.input_gain
        assert same_surrogate(node, Gaussian.isometric(node.qif_parameters, node.input_gain))
    assert (f"{depth} neurons in a row" in str(report)) == (gain > 1)


def test_a_neuron_that_layers_share_counts_once_for_each_call():
    tied = _deep(lambda: _Tied(20))
    swap(tied, example_input=torch.rand(2, 3, 4, 1, 1))
    assert tied.block[2].input_gain == tied.block[2].window_scale == pytest.approx(1.8)
    block = nn.Sequential(*_row(1))
    listed = _deep(lambda: nn.Sequential(*[block] * 20, layer.Conv2d(4, 2, 1)))
    swap(listed)
    assert block[2].input_gain == pytest.approx(1.8)


class _Own(nn.Module):
    """A stem, neurons in a row with norms, and a forward of the test's own."""

    def __init__(self, run, neurons=20):
        super().__init__()
        self.run = run
        self.stem, self.out, self.embedding = layer.Linear(8, 8), layer.Linear(8, 2), nn.Embedding(50, 8)
        self.position = nn.Parameter(torch.zeros(8))
        self.register_buffer("waves", torch.zeros(3, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(layer.Linear(8, 8), nn.LayerNorm(8), neuron.LIFNode()) for _ in range(neurons)
        )

    def forward(self, *inputs):
        return self.run(self, *inputs)

    def row(self, x, between=lambda x: x):
        for block in self.blocks:
            x = between(block(x))
        return self.out(x)

    def with_shortcuts(self, x):
        x = self.stem(x)
        for linear, norm, lif in self.blocks:
            x = x + norm(linear(lif(x)))
        return self.out(x)


@dataclasses.dataclass
class _Batch:
    frames: torch.Tensor


def _depth(run, *example, step_mode="m"):
    model = _Own(run)
    functional.set_step_mode(model, step_mode)
    return survey(model, [HOST], example).depth


FRAMES, IDS = torch.rand(2, 3, 8), torch.randint(0, 50, (2, 3))
KEPT = torch.ones(2, 3, 1)


@pytest.mark.parametrize(
    ("tensor", "example"),
    [
        (torch.as_tensor, FRAMES.numpy()),
        (torch.tensor, FRAMES.numpy()),
        (lambda batch: batch.frames, _Batch(FRAMES)),
        (lambda frames: torch.as_tensor(frames.numpy() * 2), FRAMES),
        (lambda frames: frames.float() / 255, FRAMES.to(torch.uint8)),
        (lambda frames: (torch.rand_like(frames) < frames).float(), FRAMES),
        (lambda size: torch.rand(size), (2, 3, 8)),
    ],
    ids=["array", "copied array", "object", "through numpy", "bytes", "rate code", "made by the model"],
)
def test_the_depth_is_known_whatever_the_model_takes(tensor, example):
    assert _depth(lambda model, x: model.row(tensor(x)), example) == 20
    assert _depth(lambda model, x: model.with_shortcuts(tensor(x)), example) == 1


@pytest.mark.parametrize(
    ("run", "example"),
    [
        (lambda m, x: m.row(x, lambda h: h * (x.sum(-1, keepdim=True) != 0)), (FRAMES,)),
        (lambda m, x: m.row(x, lambda h: h.masked_fill(x.isnan(), 0.0)), (FRAMES,)),
        (lambda m, x, kept: m.row(x * kept, lambda h: h * kept), (FRAMES, KEPT)),
        (lambda m, x, kept: m.row(x * kept, lambda h: h * kept), (FRAMES, KEPT.bool())),
        (lambda m, ids: m.row(m.embedding(ids), lambda h: h * (ids != 0).float().unsqueeze(-1)), (IDS,)),
        (lambda m, x: m.row(x, lambda h: h * torch.sigmoid(h.mean(-1, keepdim=True))), (FRAMES,)),
        (lambda m, x: m.row(x, lambda h: h + m.position), (FRAMES,)),
        (lambda m, x: m.row(x, lambda h: h + m.waves), (FRAMES,)),
        (lambda m, x: m.row(x, lambda h: h + m.embedding(torch.arange(3))), (FRAMES,)),
    ],
    ids=[
        "mask of the input", "NaN of the input", "mask", "boolean mask", "mask of tokens", "gate", "learned position",
        "wave position", "embedded position",
    ],
)  # fmt: skip
def test_masks_gates_and_positions_are_no_shortcuts(run, example):
    assert _depth(run, *example) == 20


def test_a_mask_made_of_spikes_is_no_shortcut_and_spikes_that_are_compared_stay_in_the_row():
    def masked(model, x):
        first = model.blocks[0](x)
        return model.row(first, lambda h: h * (first.sum(-1, keepdim=True) > 0))

    assert _depth(masked, FRAMES) == 21
    assert _depth(lambda model, x: model.row(x, lambda h: (h > 0).float()), FRAMES) == 20
    assert _depth(lambda model, x: model.row(x, lambda h: (model.stem(h) > 0).float()), FRAMES) == 20
    assert _depth(lambda model, x: model.row(x, lambda h: h.bool().float()), FRAMES) == 20


def test_the_input_that_is_added_again_is_a_shortcut():
    assert _depth(lambda model, x: model.row(x, lambda h: h + x), FRAMES) == 1
    assert _depth(lambda model, x: model.row(y := torch.as_tensor(x), lambda h: h + y), FRAMES.numpy()) == 1


def test_a_mask_before_a_neuron_is_not_added_to_its_input():
    model = _Own(lambda model, x: model.out(model.blocks[0][2](model.stem(x) * (x.sum(-1, keepdim=True) > 0))))
    functional.set_step_mode(model, "m")
    site = survey(model, [HOST], FRAMES).sites[0]
    assert (site.weights, site.direct, site.sources) == (["stem"], [], 1)


@pytest.mark.parametrize("steps", [2, 30])
def test_steps_of_a_network_that_runs_on_its_own_output_are_no_neurons_in_a_row(steps):
    def run(model, x):
        outs = []
        for _ in range(steps):
            for block in model.blocks[:3]:
                x = block(x)
            outs.append(model.out(x))
        return outs

    assert _depth(run, FRAMES[0], step_mode="s") == 3
    assert _depth(run, FRAMES) == 3 * steps  # sequences: every call has all steps, and is a layer


def test_a_network_with_feedback_is_as_deep_in_one_step_as_in_many():
    def run(model, x):
        h = torch.zeros(3, 8)
        for step in x:
            for linear, norm, lif in model.blocks:
                step = lif(norm(linear(step) + model.stem(h)))
            h = step
        return model.out(h)

    assert _depth(run, FRAMES[:1], step_mode="s") == _depth(run, FRAMES, step_mode="s") == 20


def test_the_report_says_so_where_no_window_is_derived_for_a_large_gain():
    model = _deep(lambda: nn.Sequential(*_row(2), layer.Conv2d(4, 2, 1)))
    report = swap(model, dynamics="lif", input_gain=3.0)
    assert model[2].window_scale == 1
    said = "its surrogate is derived for an input as large as the threshold, not 3 times that"
    assert all(said in row.why for row in report.changed)
    model = _deep(lambda: nn.Sequential(*_row(2), layer.Conv2d(4, 2, 1)))
    assert "derived for an input" not in str(swap(model, input_gain=3.0))


def test_a_gain_that_is_passed_decides_and_the_window_goes_with_it():
    model = _deep(lambda: nn.Sequential(*_row(20), layer.Conv2d(4, 2, 1), neuron.ParametricLIFNode()))
    swap(model, input_gain=1.5, readout="swap")
    assert {m.input_gain for m in model.modules() if isinstance(m, QIFNode)} == {1.5}
    assert model[2].window_scale == 1.5
    assert model[-1].window_scale == 1  # no norm before it, so that nothing is known of its input
    learned = _deep(lambda: nn.Sequential(*_row(30, neuron.ParametricLIFNode), layer.Conv2d(4, 2, 1)))
    swap(learned)
    assert learned[2].input_gain == learned[2].window_scale == pytest.approx(2.8)
    learned[2].input_gain = 2.0
    assert learned[2].params.input_gain == 2
    learned(torch.rand(2, 3, 4, 1, 1)).sum().backward()
    assert torch.isfinite(learned[2].w.grad)


def test_the_scale_of_the_window_goes_with_copies_and_stays_out_of_the_checkpoint():
    model = _deep(lambda: nn.Sequential(*_row(30), layer.Conv2d(4, 2, 1)))
    names = set(model.state_dict())
    swap(model)
    assert set(model.state_dict()) == names
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[2].window_scale == pytest.approx(2.8)
        copied[2].v_threshold = 2.0  # derives the window anew
        assert same_surrogate(copied[2], Gaussian.isometric(copied[2].qif_parameters, 2 * copied[2].window_scale))
    with pytest.raises(ValueError, match="window_scale must be positive and finite, got 0"):
        model[2].window_scale = 0
    assert model[2].window_scale == pytest.approx(2.8)
    swap(model, to="lif")
    assert type(model[2]) is neuron.LIFNode
    swap(model, dynamics="lif")
    assert model[2].window_scale == 1


def test_snntorch_neurons_get_the_gain_as_well():
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    layers = [m for _ in range(24) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), snn.Leaky(beta=0.5, init_hidden=True))]
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    swap(model)
    node = model[2]
    assert node.input_gain == node.window_scale == pytest.approx(2.2)
    expected = Gaussian.isometric(node.qif_parameters, 2.2)
    assert float(node.surrogate.width) == pytest.approx(float(expected.width))
    x = torch.rand(3, 4)
    other = QIF(beta=0.5, dynamics="monotone", init_hidden=True)
    assert torch.equal(node(x), other(2.2 * x))
    assert "input_gain=2.2" in repr(node)
    node.input_gain = 3.0
    assert node.window_scale == 3
    with pytest.raises(ValueError, match="window_scale"):
        node.dynamics = "paper"
    assert node.dynamics == "monotone"
    node.input_gain = 1.0
    node.reset_mechanism = "zero"
    node.dynamics = "paper"
    assert node.window_scale == 1


def test_lapicque_keeps_the_gain_of_its_circuit():
    snn = pytest.importorskip("snntorch")
    layers = [
        m for _ in range(24) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), snn.Lapicque(beta=0.9, init_hidden=True))
    ]
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    swap(model)
    assert model[2].input_gain == 1
    swap(model, to="lif")
    swap(model, input_gain=2.0)
    circuit = 2 * float(model[2].time_step / model[2].C)
    assert model[2].window_scale == pytest.approx(max(circuit, 1))


class _Sum(nn.Module):
    """Two paths, each with a norm, that add up before the neuron."""

    def __init__(self, norm):
        super().__init__()
        self.one, self.two = layer.Conv2d(4, 4, 1), layer.Conv2d(4, 4, 1)
        self.norm_one, self.norm_two = norm(), norm()
        self.neuron, self.out = neuron.LIFNode(v_threshold=1.0), layer.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.out(self.neuron(self.norm_one(self.one(x)) + self.norm_two(self.two(x))))


def _under(norm, **lif):
    return _deep(lambda: nn.Sequential(layer.Conv2d(4, 4, 1), norm, neuron.LIFNode(**lif), layer.Conv2d(4, 2, 1)))


@pytest.mark.parametrize(
    ("norm", "deviation"),
    [
        (lambda: layer.BatchNorm2d(4), 1.0),
        (lambda: layer.BatchNorm2d(4, affine=False), 1.0),
        (lambda: nn.GroupNorm(2, 4), 1.0),
        (lambda: layer.ThresholdDependentBatchNorm2d(1.0, 0.25, 4), 0.25),
    ],
)
def test_the_surrogate_is_for_the_deviation_that_the_norm_gives(norm, deviation):
    model = _under(norm(), v_threshold=0.25)
    swap(model)
    assert model[2].input_gain == 1
    assert model[2].window_scale == pytest.approx(deviation / 0.25)
    assert same_surrogate(model[2], Gaussian.isometric(model[2].qif_parameters, deviation))


def test_a_learned_weight_counts_by_its_mean_square_and_norms_add_up():
    model = _under(layer.BatchNorm2d(4), v_threshold=0.5)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 2.0, 3.0, -4.0]))
    swap(model)
    assert same_surrogate(model[2], Gaussian.isometric(model[2].qif_parameters, 7.5**0.5))
    model = _deep(lambda: _Sum(lambda: layer.BatchNorm2d(4)))
    swap(model, example_input=torch.rand(2, 3, 4, 1, 1))
    assert model.neuron.window_scale == pytest.approx(2**0.5)
    model = _deep(lambda: _Sum(lambda: layer.BatchNorm2d(4)))
    swap(model, norm="tdbn", example_input=torch.rand(2, 3, 4, 1, 1))
    assert model.neuron.window_scale == pytest.approx(1)


def test_a_threshold_above_a_plain_norm_raises_the_gain_and_tdbn_does_not_need_it():
    model = _under(layer.BatchNorm2d(4), v_threshold=2.0)
    why = swap(model).changed[0].why
    assert (model[2].input_gain, model[2].window_scale) == (2, 1)
    assert "input gain 2, so that the norm's output reaches the threshold of 2" in why
    assert "intended: with this gain the norm's scale reaches the neuron" in why
    assert "pass input_gain=0.5" not in why
    for model, choices in (
        (_under(layer.ThresholdDependentBatchNorm2d(1.0, 2.0, 4), v_threshold=2.0), {}),
        (_under(layer.BatchNorm2d(4), v_threshold=2.0), {"norm": "tdbn"}),
    ):
        swap(model, **choices)
        assert (model[2].input_gain, model[2].window_scale) == (1, 1)
    model = _under(layer.BatchNorm2d(4))
    swap(model, v_threshold=1.5)  # asks for fewer spikes
    assert (model[2].input_gain, model[2].window_scale) == (1, 1)
    model = _deep(lambda: nn.Sequential(*_row(22, lambda: neuron.LIFNode(v_threshold=2.0)), layer.Conv2d(4, 2, 1)))
    report = swap(model)
    assert model[2].input_gain == pytest.approx(4)
    assert model[2].window_scale == pytest.approx(2)
    assert "reaches the threshold of 2 and 22 neurons in a row pass the input on" in report.changed[0].why


def test_an_input_below_the_threshold_gets_the_surrogate_for_one_as_large_as_the_threshold():
    model = _under(layer.BatchNorm2d(4))
    swap(model, dynamics="monotone", window="isometric")
    assert (model[2].input_gain, model[2].window_scale) == (0.5, 1)
    model[2].input_gain = 2.0
    assert model[2].window_scale == 2
    model[2].v_threshold = 4.0
    assert model[2].window_scale == 1
    assert same_surrogate(model[2], Gaussian.isometric(model[2].qif_parameters, 4.0))


def test_the_gain_is_lowered_where_the_closure_does_not_converge():
    model = _deep(lambda: nn.Sequential(*_row(33, lambda: neuron.LIFNode(v_reset=-0.01)), layer.Conv2d(4, 2, 1)))
    why = swap(model).changed[0].why
    node = model[2]
    assert 1 < node.input_gain < 3
    assert node.window_scale == node.input_gain
    assert same_surrogate(node, Gaussian.isometric(node.qif_parameters, node.input_gain))
    assert f"input gain {node.input_gain:.3g}, not 3 as for other neurons" in why
    assert "swap(model, dynamics='lif') keeps LIF's gain" in why  # which 'monotone' would refuse
    assert "WARNING" not in why


def test_an_assigned_gain_takes_the_surrogate_along_and_an_error_names_the_scale():
    deep = _deep(lambda: nn.Sequential(*_row(33), layer.Conv2d(4, 2, 1)))
    report = swap(deep)
    node = deep[2]
    with pytest.raises(ValueError, match=r"window_scale.*assign a smaller input_gain"):
        node.dynamics = "paper"
    assert (node.dynamics, node.input_gain, node.window_scale) == ("monotone", 3, 3)
    node.input_gain = 1.0
    assert node.window_scale == 1
    assert same_surrogate(node, Gaussian.isometric(node.qif_parameters))
    node.dynamics = "paper"
    assert same_surrogate(node, Gaussian.isometric(node.qif_parameters))
    deep[5].window_scale = 1
    deep[5].dynamics = "paper"
    assert "input gain 3 instead of LIF's 0.5; " in report.changed[0].why
    assert "intended: with this gain" in report.changed[0].why


def test_equal_reasons_are_printed_once():
    deep = _deep(lambda: nn.Sequential(*_row(14), layer.Conv2d(4, 2, 1)))
    report = swap(deep)
    assert str(report).count("14 neurons in a row") == 1
    assert str(report).count(" [1]\n") == 14
    assert str(report).count("\n[1] surrogate") == 1
    assert all("14 neurons in a row" in row.why for row in report.changed)


def test_the_leak_that_the_neuron_gets_decides_whether_its_surrogate_stays():
    snn = pytest.importorskip("snntorch")

    def window(**choices):
        model = _under(layer.BatchNorm2d(4))
        return swap(model, **choices) and model[2].derived_window

    def window_snntorch(leak, learn_beta=False, **choices):
        leaky = snn.Leaky(leak, learn_beta=learn_beta, init_hidden=True)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), leaky, nn.Linear(4, 2))
        return swap(model, **choices) and model[2].derived_window

    assert (window(), window(tau=20.0)) == ("isometric", None)
    assert (window_snntorch(0.5), window_snntorch(0.5, beta=0.95)) == ("isometric", None)
    assert (window_snntorch(0.95), window_snntorch(0.95, beta=0.5)) == (None, "isometric")
    assert (window_snntorch(0.99, True), window_snntorch(1.01, True)) == (None, None)


def test_a_surrogate_that_is_kept_is_reported():
    model = _under(layer.BatchNorm2d(4))
    assert "its surrogate Sigmoid stays" in swap(model, window="keep").changed[0].why


@pytest.mark.parametrize(("tau", "decay_input", "gain"), [(2.0, True, 0.5), (2.0, False, 1.0), (10.0, True, 1.0)])
def test_a_learned_leak_of_up_to_two_steps_keeps_the_gain_that_follows_it(tau, decay_input, gain):
    node = neuron.ParametricLIFNode(init_tau=tau, decay_input=decay_input)
    model = nn.Sequential(layer.Linear(4, 4), nn.LayerNorm(4), node, layer.Linear(4, 2))
    swap(model)
    assert float(torch.as_tensor(node.input_gain).detach()) == pytest.approx(gain)
    if decay_input and gain < 1:
        with torch.no_grad():
            node.w.fill_(1.0)
        assert float(node.qif_parameters.input_gain.detach()) == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())


@pytest.mark.parametrize("lif", [neuron.LIFNode, neuron.ParametricLIFNode])
def test_a_neuron_without_norm_has_a_gain_of_1_beside_others_with_one(lif):
    def model(norm):
        return nn.Sequential(
            layer.Linear(4, 4), norm, neuron.LIFNode(2.0), layer.Linear(4, 4), lif(2.0), layer.Linear(4, 2)
        )

    with_norm, without = model(nn.LayerNorm(4)), model(nn.Identity())
    report = swap(with_norm)
    swap(without)
    assert [with_norm[i].params.input_gain for i in (2, 4)] == [1, 1]
    assert [torch.as_tensor(without[i].qif_parameters.input_gain).item() for i in (2, 4)] == [0.5, 0.5]
    assert "input gain 1 instead of LIF's 0.5" in report.rows[1].why
    assert "input gain 0.5, LIF's, instead of 1" in swap(with_norm, to="lif").rows[1].why
    assert "input gain" not in str(swap(without, to="lif"))
    kept = model(nn.LayerNorm(4))
    swap(kept, dynamics="monotone")
    assert torch.as_tensor(kept[4].qif_parameters.input_gain).item() == 0.5


def test_a_tau_that_is_passed_does_not_decide_the_gain_of_a_neuron_that_learns_it():
    model = nn.Sequential(
        layer.Linear(4, 4), nn.LayerNorm(4), neuron.LIFNode(), layer.Linear(4, 4), neuron.ParametricLIFNode(),
        layer.Linear(4, 2),
    )  # fmt: skip
    report = swap(model, tau=3.0)
    assert model[2].params.input_gain == 1 / 3
    assert model[4].params.input_gain == 1
    assert "tau not used, as it follows w" in report.rows[1].why


def test_a_second_swap_counts_the_norms_of_neurons_that_are_qif_already():
    def model():
        return nn.Sequential(
            layer.Linear(4, 4), nn.LayerNorm(4), neuron.LIFNode(), layer.Linear(4, 4), neuron.LIFNode()
        )

    at_once, in_turn = model(), model()
    swap(at_once, readout="swap")
    swap(in_turn)
    swap(in_turn, readout="swap")
    assert [in_turn[i].params for i in (2, 4)] == [at_once[i].params for i in (2, 4)]


def _learned(lif, learn):
    model = nn.Sequential(layer.Linear(4, 4), nn.LayerNorm(4), lif(), layer.Linear(4, 2))
    with torch.no_grad():
        learn(model)
    return model


@pytest.mark.parametrize(
    ("lif", "learn", "gains"),
    [
        (neuron.ParametricLIFNode, lambda model: model[2].w.fill_(-1.0), (1.0, 0.2689)),
        (lambda: neuron.ParametricLIFNode(3.0), lambda model: model[2].w.fill_(1.0), (0.7311, 1.0)),
        (lambda: neuron.ParametricLIFNode(v_threshold=2.0), lambda model: model[2].w.fill_(-1.0), (2.0, 2.0)),
        (lambda: neuron.LIFNode(v_threshold=2.0), lambda model: model[1].weight.fill_(1.6), (1.25, 2.0)),
    ],
)
def test_the_checkpoint_of_a_swapped_network_brings_its_gains_along(tmp_path, lif, learn, gains):
    """LIF loads its own checkpoint and is swapped; later a network is built and swapped, and loads what was saved."""
    trained = _learned(lif, learn)
    keys = list(trained.state_dict())
    swap(trained)
    fresh = _learned(lif, lambda model: None)
    before = swap(fresh)
    lif_state = _learned(lif, learn).state_dict()
    fresh.load_state_dict(lif_state)  # no gains are in it
    found = [float(torch.as_tensor(model[2].params.input_gain).detach()) for model in (trained, fresh)]
    assert found == pytest.approx(gains, abs=1e-4), before
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    state = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert list(state) == keys
    fresh.load_state_dict(state, strict=True)
    x = 3 * torch.rand(16, 4)
    assert torch.equal(fresh(x), trained(x))
    own = _learned(lif, lambda model: None)
    swap(own, dynamics="monotone")  # asks for LIF's gain
    gain = own[2].params.input_gain
    own.load_state_dict(state)
    assert own[2].params.input_gain == (gain if isinstance(gain, float) else own[2].w.sigmoid())
    for passed, gain in ({"input_gain": 0.8}, 0.8), ({"decay_input": False}, 1.0):
        asked = _learned(lif, lambda model: None)
        swap(asked, **passed)
        asked.load_state_dict(state)
        assert asked[2].params.input_gain == gain


def test_a_loaded_gain_per_channel_is_a_copy():
    saved, loaded = (_learned(neuron.LIFNode, lambda model: None) for _ in range(2))
    swap(saved)
    swap(loaded)
    saved[2].input_gain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loaded.load_state_dict(saved.state_dict())
    saved[2].input_gain.zero_()
    assert loaded[2].params.input_gain.tolist() == [1, 2, 3, 4]


def test_snntorch_checkpoints_bring_their_gains_along(tmp_path):
    snn = pytest.importorskip("snntorch")

    def model(threshold):
        lif = snn.Leaky(beta=0.5, threshold=threshold, learn_threshold=True, init_hidden=True)
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), lif, nn.Linear(4, 2))

    trained, fresh = model(1.7), model(1.0)
    swap(trained)
    swap(fresh)
    assert (trained[2].input_gain, fresh[2].input_gain) == (pytest.approx(1.7), 1)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    fresh.load_state_dict(torch.load(tmp_path / "trained.pt", weights_only=True), strict=True)
    x = 3 * torch.rand(16, 4)
    assert torch.equal(fresh(x), trained(x))
    model(1.0).load_state_dict(trained.state_dict(), strict=True)
    asked = model(1.0)
    swap(asked, input_gain=0.8)
    asked.load_state_dict(trained.state_dict(), strict=True)
    assert asked[2].input_gain == 0.8


def test_a_learned_leak_takes_its_input_gain_back():
    node = neuron.ParametricLIFNode()
    swap(nn.Sequential(layer.Linear(4, 4), nn.LayerNorm(4), node, layer.Linear(4, 2)), input_gain=3.0)
    assert node.params.input_gain == 3
    node.input_gain = None  # LIF's again, as LIFNode's arguments give it
    assert float(node.params.input_gain.detach()) == pytest.approx(0.5)
    assert (node.v_reset, node.params.reset) == (0, "hard")
    with pytest.raises(ValueError, match="input_gain of a ParametricQIFNode must be a number, got None"):
        ParametricQIFNode().input_gain = None


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_an_input_without_deviation_is_refused(std):
    model = _under(layer.BatchNorm2d(4), v_threshold=0.5)
    swap(model)
    with pytest.raises(ValueError, match="std must be positive and finite"):
        model[2].assume_input(std)
    assert model[2].window_scale == 2
