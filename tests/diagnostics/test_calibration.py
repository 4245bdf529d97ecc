import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured_models import MODELS
from torch import nn

import qif_plugins
from qif_plugins import MomentClosureError, QIFParameters, Window, calibrate, membrane_moments, qif_multi_step
from qif_plugins.diagnostics.calibration import CalibrationWarning
from qif_plugins.diagnostics.statistics import Moments
from qif_plugins.neuron.module import QIFLayer

HOSTS = pytest.mark.parametrize("host", MODELS)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        yield


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QIFLayer)}


def windows(model):
    return {
        name: layer.derive_window(layer.derived_window, layer.qif_parameters) for name, layer in layers(model).items()
    }


def first_inputs(model, batches):
    """What the first QIF layer receives, from the weights."""
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    return torch.stack([linear(x) for x in batches]).detach()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(-5, 5), st.integers(1, 3))
def test_streaming_moments_are_those_of_all_values(sizes, shift, groups):
    chunks = [torch.randn(n, groups, dtype=torch.float64) ** 2 + shift for n in sizes]
    moments = Moments()
    for chunk in chunks:
        moments.update(chunk)
    values = torch.cat(chunks)
    d = values - values.mean(0)
    assert moments.n == len(values)
    torch.testing.assert_close(moments.mean, values.mean(0))
    torch.testing.assert_close(moments.std, values.std(0, correction=0))
    if len(values) > 2:
        variance = (d**2).mean(0)
        torch.testing.assert_close(moments.skewness, (d**3).mean(0) / variance**1.5, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.kurtosis, (d**4).mean(0) / variance**2 - 3, rtol=1e-6, atol=1e-6)


@HOSTS
def test_the_window_is_that_of_the_measured_input(host):
    model, batches = MODELS[host]()
    inputs = first_inputs(model, batches)
    report = calibrate(model, batches)
    row = report.layers[0]
    assert row.changed
    assert row.samples == inputs.numel()
    assert row.input_mean == pytest.approx(inputs.mean().item(), abs=1e-6)
    assert row.input_std == pytest.approx(inputs.std(correction=0).item(), rel=1e-5)
    expected = Window.unbiased(QIFParameters(), row.input_std, input_mean=row.input_mean)
    assert windows(model)[row.name] == expected
    assert row.window == (expected.lo, expected.hi)


@HOSTS
def test_the_membrane_is_measured_before_its_reset(host):
    model, batches = MODELS[host]()
    hs = [
        qif_multi_step(x, 0.0, QIFParameters(), Window(0, 1), store_h_seq=True)[-1]
        for x in first_inputs(model, batches)
    ]
    h = torch.stack(hs).double()
    row = calibrate(model, batches).layers[0]
    assert row.membrane_mean == pytest.approx(h.mean().item(), abs=1e-6)
    assert row.membrane_std == pytest.approx(h.std(correction=0).item(), rel=1e-6)
    assert row.rate == pytest.approx((h >= 1).double().mean().item())
    mean, std = membrane_moments(QIFParameters(), row.input_std, row.input_mean)
    assert (row.predicted_mean, row.predicted_std) == (mean, std)


@HOSTS
def test_the_gradient_uses_the_new_window(host):
    """Backward is that of a neuron with this very window given, and not that of the window assumed before."""
    x = 0.4 * torch.randn(5, 30, 7)
    weight = torch.randn(x.shape)

    def gradient(layer):
        input_ = x.clone().requires_grad_()
        spikes = layer(input_) if host == "spikingjelly" else layer.forward_sequence(input_)[0]
        return torch.autograd.grad((spikes * weight).sum(), input_)[0]

    def neuron(**options):
        if host == "spikingjelly":
            return pytest.importorskip("qif_plugins.adapters.spikingjelly").QIFNode(step_mode="m", **options)
        return pytest.importorskip("qif_plugins.adapters.snntorch").QIF(**options)

    calibrated = neuron(window="unbiased")
    run = x if host == "spikingjelly" else lambda layer: layer.forward_sequence(x)
    calibrate(calibrated, run)
    before = copy.deepcopy(calibrated)
    before.measured_moments = {}
    window = calibrated.derive_window("unbiased", calibrated.qif_parameters)
    expected = gradient(neuron(window=window))
    assert torch.equal(gradient(calibrated), expected)
    assert not torch.equal(gradient(before), expected)


@HOSTS
def test_moments_measured_takes_the_membrane_itself(host):
    model, batches = MODELS[host]()
    report = calibrate(model, batches, moments="measured")
    for row in report.layers:
        params = layers(model)[row.name].qif_parameters
        window = windows(model)[row.name]
        half = 0.5 * row.membrane_std
        assert (window.lo, window.hi) == pytest.approx((params.v_threshold - half, params.v_threshold + half))


class Preceded(nn.Module):
    def __init__(self, before, inner):
        super().__init__()
        self.before, self.inner = before, inner

    def forward(self, x):
        return self.inner(self.before(x).movedim(1, 0))


@HOSTS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_left_as_found(host, training, fails):
    inner, batches = MODELS[host]()
    # [N, T, *] outside, for a batch norm with statistics that the run would move, and time first inside.
    net = Preceded(nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(6)), inner).train(training)
    shaped = [x.movedim(0, 1).contiguous() for x in batches]
    net.before[0].eval()  # a mode of its own
    net(shaped[0])  # membranes from an earlier batch
    net.inner.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(net.state_dict())
    membranes = _membranes(net)
    modes = [m.training for m in net.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def stream():
        yield shaped[1]
        torch.rand(3), np.random.rand(), random.random()
        if fails:
            raise RuntimeError("the loader broke")
        yield shaped[2]

    if fails:
        with pytest.raises(RuntimeError, match="loader broke"):
            calibrate(net, stream())
    else:
        calibrate(net, stream())
    after = net.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert fails == (set(after) == set(before))
    assert [m.training for m in net.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks
    assert all("forward_sequence" not in m.__dict__ for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert random.getstate() == generators[2]
    for now, then in zip(_membranes(net), membranes, strict=True):
        assert torch.equal(torch.as_tensor(now), torch.as_tensor(then))


def _membranes(model):
    found = []
    for module in model.modules():
        found += list(getattr(module, "_memories", {}).values())
        found += [module.mem] if hasattr(module, "mem") else []
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in found if value is not None]


@HOSTS
def test_each_batch_starts_from_reset_membranes(host):
    model, batches = MODELS[host]()
    alone = calibrate(model, [batches[1]]).layers[0]
    model(batches[0])
    again = calibrate(model, [batches[1]]).layers[0]
    assert (alone.membrane_mean, alone.membrane_std) == (again.membrane_mean, again.membrane_std)


@HOSTS
def test_forms_of_batches(host):
    model, batches = MODELS[host]()
    target = torch.zeros(16, dtype=torch.long)
    expected = calibrate(model, batches).layers[0]
    for form in (
        iter(batches),
        [(x, target) for x in batches],
        [[x, target] for x in batches],
        torch.utils.data.DataLoader(batches, batch_size=None),
    ):
        assert calibrate(model, form).layers[0] == expected
    single = calibrate(model, [batches[0]]).layers[0]
    assert calibrate(model, batches[0]).layers[0] == single
    assert calibrate(model, (batches[0], target)).layers[0] == single

    def drive(net):
        for module in net.modules():
            if hasattr(module, "_memories"):
                module.reset()
        net(batches[0])

    assert calibrate(model, drive).layers[0] == single


def test_models_of_one_step_a_call():
    model, batches = MODELS["spikingjelly"](per_step=True)
    row = calibrate(model, [batches[0]], steps=5).layers[0]
    x = next(m for m in model.modules() if isinstance(m, nn.Linear))(batches[0]).detach()
    h = qif_multi_step(x.expand(5, *x.shape), 0.0, QIFParameters(), Window(0, 1), store_h_seq=True)[-1].double()
    assert row.samples == h.numel()
    assert row.membrane_std == pytest.approx(h.std(correction=0).item(), rel=1e-6)


def test_hidden_states_and_sequences_of_snntorch():
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    linear = nn.Linear(12, 40)
    hidden = nn.Sequential(linear, QIF(init_hidden=True), nn.Linear(40, 4), snn.Leaky(0.9, init_hidden=True))

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.qif = linear, QIF()

        def forward(self, x):
            return self.qif.forward_sequence(self.fc(x))[0]

    x = torch.randn(16, 12)
    stepped = calibrate(hidden, x, steps=4).layers[0]
    sequence = calibrate(Sequence(), x.expand(4, 16, 12)).layers[0]
    assert stepped.samples == sequence.samples == 4 * 16 * 40
    assert stepped.membrane_std == pytest.approx(sequence.membrane_std, rel=1e-6)


@HOSTS
def test_one_window_a_channel(host):
    model, batches = MODELS[host]()
    inputs = first_inputs(model, batches).flatten(0, -2)
    calibrate(model, batches, per="channel")
    layer = next(iter(layers(model).values()))
    torch.testing.assert_close(
        layer.measured_moments["input_std"], inputs.std(0, correction=0).double(), rtol=1e-5, atol=0
    )
    window = layer.derive_window(layer.derived_window, layer.qif_parameters)
    assert window.lo.shape == (40,)
    model(batches[0]).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_channels_of_images_and_still_channels():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode

    node = QIFNode(step_mode="m")
    x = torch.randn(4, 8, 3, 5, 5) * torch.tensor([0.5, 1.0, 0.0]).view(3, 1, 1)
    calibrate(node, x, per="channel")
    std = node.measured_moments["input_std"]
    assert std.shape == (3, 1, 1)
    assert std[0] < std[1]
    assert std[2] == pytest.approx(x.std(correction=0).item(), rel=1e-5)  # of the whole layer
    x.requires_grad_()
    node.reset()
    node(x).sum().backward()
    assert x.grad.isfinite().all()


@HOSTS
def test_checkpoints(host, tmp_path):
    model, batches = MODELS[host]()
    uncalibrated = copy.deepcopy(model.state_dict())
    calibrate(model, batches)
    path = tmp_path / "checkpoint.pt"
    torch.save(model.state_dict(), path)

    fresh, _ = MODELS[host]()
    fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert windows(fresh) == windows(model)
    assert windows(copy.deepcopy(model)) == windows(model)

    kept = windows(model)
    model.load_state_dict(uncalibrated, strict=True)  # an older checkpoint: the windows stay
    assert windows(model) == kept


@HOSTS
def test_a_checkpoint_with_impossible_moments_is_refused(host):
    model, batches = MODELS[host]()
    calibrate(model, batches)
    state = model.state_dict()
    key = next(k for k in state if k.endswith("input_std"))
    state[key] = torch.tensor(-1.0)
    before = windows(model)
    with pytest.raises(RuntimeError, match="deviation positive"):
        model.load_state_dict(state)
    assert windows(model) == before


def test_lif_checkpoints():
    """Both ways under strict=True without calibration; a calibrated one names what LIF cannot take."""
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode
    from spikingjelly.activation_based import neuron

    qif, lif = (nn.Sequential(nn.Linear(3, 3), node) for node in (QIFNode(), neuron.LIFNode()))
    lif.load_state_dict(qif.state_dict(), strict=True)
    qif.load_state_dict(lif.state_dict(), strict=True)
    calibrate(qif, torch.randn(20, 3))
    qif.load_state_dict(lif.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="input_mean"):
        lif.load_state_dict(qif.state_dict(), strict=True)


def test_moments_move_and_window_survives_half_precision():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode

    node = QIFNode(step_mode="m")
    x = torch.randn(4, 8, 3)
    calibrate(node, x, per="channel")
    before = node.derive_window("unbiased", node.qif_parameters)
    node.half()
    assert torch.equal(node.derive_window("unbiased", node.qif_parameters).lo, before.lo)
    assert node(x.half()).dtype == torch.float16


def test_a_learning_layer_follows_its_parameters_from_the_measured_input():
    adapters = pytest.importorskip("qif_plugins.adapters.spikingjelly")
    node = adapters.ParametricQIFNode(step_mode="m", dynamics="paper")
    x = 0.3 + 0.6 * torch.randn(4, 200, 5)
    row = calibrate(node, x, per="channel").layers[0]
    mean, std = membrane_moments(QIFParameters(), row.input_std, row.input_mean)
    torch.testing.assert_close(node.moments.double(), torch.tensor([mean, std]).double(), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(node.parameters(), lr=0.05)
    for _ in range(30):
        node.reset()
        optimizer.zero_grad()
        node(x).sum().backward()
        optimizer.step()
    params = node.params
    exact = QIFParameters.unchecked(a=params.a.item(), u1=params.u1.item(), u2=params.u2.item())
    expected = torch.tensor(membrane_moments(exact, row.input_std, row.input_mean))
    torch.testing.assert_close(node.moments.double(), expected.double(), rtol=2e-2, atol=2e-2)
    clone = adapters.ParametricQIFNode(step_mode="m")
    clone.load_state_dict(node.state_dict(), strict=True)
    assert clone.input_moments() == node.input_moments()


def test_a_learned_leak_of_snntorch_follows_too():
    pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    layer = QIF(beta=0.5, learn_beta=True, window="unbiased")
    x = 0.2 + 0.7 * torch.randn(500, 6)
    row = calibrate(layer, x, steps=5, moments="measured").layers[0]
    assert set(layer.measured_moments) == {"input_mean", "input_std"}  # the closure, which can follow beta
    layer.reset_mem()
    layer(x)
    window = layer.surrogate
    expected = Window.unbiased(QIFParameters.matching_lif(0.5), row.input_std, input_mean=row.input_mean)
    assert float(window.lo) == pytest.approx(expected.lo, rel=1e-4)
    assert float(window.height) == pytest.approx(expected.height, rel=1e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_empty_chunks_add_nothing(sizes):
    some, all_ = Moments(), Moments()
    for n in sizes:
        chunk = torch.randn(n, 2)
        all_.update(chunk)
        if n:
            some.update(chunk)
    all_.merge(0, torch.full((4, 2), float("nan")))
    assert all_.n == some.n == sum(sizes)
    assert (all_.sums is None) == (some.sums is None)
    assert some.sums is None or torch.equal(all_.sums, some.sums)


# -- warnings ------------------------------------------------------------------------------------


@pytest.fixture
def node():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode

    return QIFNode(step_mode="m")


def test_normal_input_does_not_warn(node):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = calibrate(node, torch.randn(20, 400, 30))
    assert "±" in str(report)
    assert report.layers[0].note == ""


def test_warns_of_an_input_far_from_normal(node):
    with pytest.warns(CalibrationWarning, match=r"far from normal: skewness 2\.\d\d and excess kurtosis"):
        calibrate(node, torch.empty(8, 400, 30).exponential_())


def test_warns_of_a_closure_that_does_not_fit(node):
    node = type(node)(tau=10.0, decay_input=False, step_mode="m")
    constant_in_time = (0.1 * torch.randn(400, 30)).expand(12, 400, 30)
    with pytest.warns(CalibrationWarning, match=r"closure does not fit.*factor of 0\.\d\d.*moments='measured'"):
        calibrate(node, constant_in_time)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(node, constant_in_time, moments="measured")


def test_a_warning_made_an_error_leaves_the_window(node):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        with pytest.raises(CalibrationWarning):
            calibrate(node, torch.empty(8, 400, 30).exponential_())
    assert not node.measured_moments


def test_what_another_thread_computes_is_not_measured(node):
    x_seq, others = torch.randn(8, 40, 30), copy.deepcopy(node)

    def run(model):
        model(x_seq)
        beside = threading.Thread(target=others, args=(5 + 2 * x_seq,))
        # While the layer that is measured is inside its own call.
        handle = model.register_forward_hook(lambda *_: (beside.start(), beside.join()), prepend=True)
        model(x_seq)
        handle.remove()

    report = calibrate(node, run)
    assert others.v.shape == x_seq.shape[1:]
    assert report.layers[0].samples == 2 * x_seq.numel()
    assert report.layers[0].input_mean == pytest.approx(x_seq.mean().item(), abs=1e-6)


@HOSTS
@pytest.mark.parametrize("moments", ["closure", "measured"])
@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("first", [False, True])
def test_a_threshold_out_of_reach_leaves_the_window(host, moments, per, first):
    model, batches = MODELS[host]()
    if first:
        calibrate(model, batches, per)
    name, layer = next(iter(layers(model).items()))
    before, keys = layer.measured_moments, list(model.state_dict())
    weak = [0.1 * x for x in batches]
    with pytest.warns(CalibrationWarning, match=r"threshold 1 is \d+\.\d dev.*insert tdBN.*window is unchanged"):
        report = calibrate(model, weak, per, moments=moments)
    assert report.layers[0].name == name
    assert not report.layers[0].changed
    assert set(layer.measured_moments) == set(before)
    assert all(torch.equal(value, before[key]) for key, value in layer.measured_moments.items())
    assert first or list(model.state_dict()) == keys


def test_a_learned_window_is_left_where_the_threshold_is_out_of_reach():
    node = pytest.importorskip("qif_plugins.adapters.spikingjelly").ParametricQIFNode(step_mode="m")
    before = node.moments.clone()
    assert not calibrate(node, 0.1 * torch.randn(4, 50, 5)).layers[0].changed
    assert torch.equal(node.moments, before)


@pytest.mark.parametrize("moments", ["closure", "measured"])
def test_channels_out_of_reach_have_the_moments_of_the_layer(node, moments):
    x = torch.randn(6, 40, 3, 5) * torch.tensor([1.0, 1.0, 0.05]).view(3, 1)
    with pytest.warns(CalibrationWarning, match="in 1 channels the threshold is out of reach"):
        row = calibrate(node, x, per="channel", moments=moments).layers[0]
    assert row.changed
    kind = "input" if moments == "closure" else "membrane"
    std = node.measured_moments[f"{kind}_std"].flatten()
    assert std[2] == pytest.approx(getattr(row, f"{kind}_std"), rel=1e-6)
    assert std[0] > std[2]


def test_a_membrane_that_runs_away_leaves_the_window(node):
    node.v_reset = None
    before = node.derive_window("unbiased", node.qif_parameters)
    for moments in ("closure", "measured"):
        with pytest.warns(CalibrationWarning, match=r"membrane is not finite.*v_reset=0.*its window is unchanged"):
            assert not calibrate(node, 2.5 * torch.randn(100, 3, 8), moments=moments).layers[0].changed
        assert node.derive_window("unbiased", node.qif_parameters) == before


def test_warns_of_a_closure_that_does_not_converge(node):
    before = node.derive_window("unbiased", node.qif_parameters)
    with pytest.warns(CalibrationWarning, match="does not converge"):
        row = calibrate(node, 6 * torch.randn(8, 400, 30)).layers[0]
    assert not row.changed
    assert node.derive_window("unbiased", node.qif_parameters) == before
    with pytest.raises(MomentClosureError):
        node.measured_moments = {"input_mean": 0.0, "input_std": row.input_std}
    assert not node.measured_moments
    assert calibrate(node, 6 * torch.randn(8, 400, 30), moments="measured").layers[0].changed


def test_warns_of_a_constant_input_and_of_a_layer_not_reached(node):
    with pytest.warns(CalibrationWarning, match=r"constantly 0\.5; its window is unchanged"):
        assert not calibrate(node, torch.full((3, 4, 5), 0.5)).layers[0].changed
    with pytest.warns(CalibrationWarning, match="did not reach it"):
        calibrate(
            nn.ModuleDict({"used": copy.deepcopy(node), "unused": node}), lambda net: net["used"](torch.randn(3, 4, 5))
        )


def test_a_given_surrogate_is_measured_and_left():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode
    from spikingjelly.activation_based import surrogate

    x = torch.randn(4, 50, 6)
    for options in ({"surrogate_function": surrogate.ATan()}, {"window": Window(0.0, 2.0)}, {"window": "heuristic"}):
        node = QIFNode(step_mode="m", **options)
        row = calibrate(node, x).layers[0]
        assert not row.changed
        assert not node.measured_moments
        assert row.rate > 0


@pytest.mark.parametrize("moments", ["closure", "measured"])
def test_warns_of_one_step_and_not_of_what_it_did_to_the_membrane(node, moments):
    """The input is weak and constant in time: over six steps the membrane adds it up, from rest it cannot."""
    node = type(node)(tau=10.0, decay_input=False)
    x = 0.1 * torch.randn(400, 30)
    with pytest.warns(CalibrationWarning, match=r"measured over one time step; pass steps=T or a callable"):
        report = calibrate(node, [x, x], moments=moments)
    assert report.layers[0].note.startswith("measured over one time step")
    assert "closure does not fit" not in report.layers[0].note
    assert "deviations from the mean" not in report.layers[0].note

    def one_step(model):
        model.reset()
        model(x)

    assert "one time step" in calibrate(node, one_step).layers[0].note
    for options in ({"steps": 2}, {"steps": 12}):
        assert "one time step" not in calibrate(node, [x, x], **options).layers[0].note


def test_one_step_of_snntorch():
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    model = nn.Sequential(
        nn.Linear(12, 40), QIF(beta=0.9, init_hidden=True), nn.Linear(40, 4), snn.Leaky(0.9, init_hidden=True)
    )
    x = torch.randn(16, 12)
    assert calibrate(model, x).layers[0].note.startswith("measured over one time step")
    assert "one time step" not in calibrate(model, x, steps=5).layers[0].note


# -- bad input -----------------------------------------------------------------------------------


def test_bad_input(node):
    with pytest.raises(ValueError, match=r"no QIF layer.*swap"):
        calibrate(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="no batch"):
        calibrate(node, [])
    with pytest.raises(ValueError, match="'layer', 'channel'"):
        calibrate(node, torch.randn(2, 2), per="neuron")
    with pytest.raises(ValueError, match="'closure', 'measured'"):
        calibrate(node, torch.randn(2, 2), moments="free")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        calibrate(node, torch.randn(2, 2), steps=0)
    with pytest.raises(TypeError, match="callable"):
        calibrate(node, [{"x": torch.randn(2, 2)}])
    with pytest.raises(TypeError, match="got int"):
        calibrate(node, 3)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(node, torch.tensor([[1.0, float("nan")]]))
    assert not node.measured_moments


@HOSTS
@pytest.mark.parametrize("per", ["layer", "channel"])
def test_empty_batches_count_for_nothing(host, per):
    model, batches = MODELS[host]()
    expected = calibrate(model, batches[:1], per=per)
    empty = batches[0][:, :0]
    assert calibrate(model, [batches[0], empty], per=per) == expected
    assert calibrate(model, [empty, batches[0]], per=per) == expected
    before = windows(model)
    with pytest.raises(ValueError, match="every batch is empty"):
        calibrate(model, [empty, empty], per=per)
    assert windows(model) == before


def test_a_model_of_two_inputs(node):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = node

        def forward(self, a, b):
            return self.node(a + b)

    a, b = torch.randn(4, 8, 3), torch.randn(4, 8, 3)
    for batches in ([(a, b)], (a, b), a):
        with pytest.raises(TypeError, match=r"missing 1 required.*lambda model: model\(a, b\)") as caught:
            calibrate(Both(), batches)
        assert isinstance(caught.value.__cause__, TypeError)
    assert calibrate(Both(), lambda model: model(a, b)).layers[0].changed


def test_swapped_models():
    """Whatever swap makes of a host's neurons can be measured, trained and saved."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    x = 2 * torch.randn(5, 16, 12)
    model = nn.Sequential(nn.Linear(12, 20), neuron.ParametricLIFNode(step_mode="m"), nn.Linear(20, 20),
                          neuron.IFNode(step_mode="m"), nn.Linear(20, 4))  # fmt: skip
    keys = list(model.state_dict())
    qif_plugins.swap(model, window="unbiased")
    for options in ({}, {"per": "channel"}, {"moments": "measured"}):
        assert all(row.changed for row in calibrate(model, x, **options).layers)
        for node in (model[1], model[3]):
            node.reset()
        model(x).sum().backward()
    qif_plugins.swap(model, to="lif")
    assert list(model.state_dict()) == keys


def test_swapped_recurrent_models():
    snn = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.rleaky = nn.Linear(12, 20), snn.RLeaky(beta=0.9, linear_features=20)
            self.fc2, self.lapicque = nn.Linear(20, 20), snn.Lapicque(beta=0.8)
            self.fc3 = nn.Linear(20, 4)

        def forward(self, x_seq):
            (spk, mem), mem2 = self.rleaky.init_rleaky(), self.lapicque.init_lapicque()
            out = []
            for x in x_seq:
                spk, mem = self.rleaky(self.fc1(x), spk, mem)
                spk2, mem2 = self.lapicque(self.fc2(spk), mem2)
                out.append(self.fc3(spk2))
            return torch.stack(out)

    x = 2 * torch.randn(5, 16, 12)
    net = Net()
    nn.init.normal_(net.fc2.weight)  # for a membrane that comes near the threshold
    qif_plugins.swap(net, window="unbiased")
    for options in ({}, {"per": "channel"}, {"moments": "measured"}):
        assert all(row.changed for row in calibrate(net, x, **options).layers)
        net(x).sum().backward()
    clone = Net()
    qif_plugins.swap(clone, window="unbiased")
    clone.load_state_dict(net.state_dict(), strict=True)
    assert windows(clone) == windows(net)


@HOSTS
def test_a_compiled_model_is_measured_as_written(host):
    model, batches = MODELS[host]()
    expected = calibrate(copy.deepcopy(model), batches)
    assert calibrate(torch.compile(model, backend="eager"), batches) == expected


def test_a_model_on_the_meta_device_is_refused(node):
    with pytest.raises(ValueError, match="meta device"):
        calibrate(nn.Sequential(nn.Linear(2, 2, device="meta"), node), torch.randn(3, 2))


def test_lazy_layers_are_refused():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode

    with pytest.raises(ValueError, match="run one batch"):
        calibrate(nn.Sequential(nn.LazyLinear(4), QIFNode()), torch.randn(3, 2))


def test_public_name():
    assert qif_plugins.calibrate is calibrate
