"""Gradients against central differences, and continuity where spikes come and go."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qif_plugins.exact import LIFLayer, OscillatingLIFLayer, QIFLayer, Spikes, ThetaLayer, spiking_layer

pytestmark = pytest.mark.host_independent

MODELS = ["lif", "qif", "theta", "olif"]
LAYERS = {"lif": LIFLayer, "qif": QIFLayer, "theta": ThetaLayer, "olif": OscillatingLIFLayer}


def problem(model, seed, recurrent=False, delays=None, batch=2, events=8, neurons=3, inputs=4):
    """Parameters by name, and the function of them that returns spike times, indices and the end state."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=g, dtype=torch.float64) * (high - low) + low

    indices = torch.randint(0, inputs, (batch, events), generator=g)
    parameters = {
        "times": uniform(batch, events, low=0.1, high=4.5).sort(1)[0],
        "weight": torch.randn(neurons, inputs, generator=g, dtype=torch.float64) * 1.5 + 0.7,
        "v0": uniform(neurons, low=-0.5, high=0.5),
    }
    if model == "lif":
        parameters["current"] = uniform(neurons, low=-0.5, high=0.5)
    if model == "olif":
        parameters["weight"] = parameters["weight"] * 0.2
        parameters["current"] = uniform(neurons, low=1.2, high=1.6)
    if model in ("theta", "olif") and recurrent:
        del parameters["v0"]
        parameters["phase0"] = uniform(neurons, low=0.1, high=0.8)
    if model in ("lif", "qif"):
        parameters["i0"] = uniform(batch, neurons, low=-1, high=2)
    if recurrent:
        parameters["recurrent_weight"] = torch.randn(neurons, neurons, generator=g, dtype=torch.float64) * 0.7
        if model == "olif":
            parameters["recurrent_weight"] *= 0.3
        if delays:
            parameters["recurrent_delay"] = uniform(neurons, low=0.1, high=0.5)
    elif delays:
        parameters["delay"] = uniform(*((inputs,) if delays == "input" else (neurons, inputs)), high=0.4)

    def run(values):
        options = dict(values)
        times, weight = options.pop("times"), options.pop("weight")
        if model == "theta":
            options["current"] = 1.25
        return spiking_layer(model, times, indices, weight, 5.0, **options)

    return parameters, run


def smooth(out):
    """A scalar in which every spike and every end state has its own weight."""
    n = out.times.shape[1]
    mask = torch.isfinite(out.times)
    factor = torch.linspace(1, 2, n, dtype=torch.float64) * (1 + out.indices)
    total = (torch.where(mask, out.times, 0.0) * factor).sum()
    angle = out.end.v if out.end.angle is None else out.end.angle
    return total + (angle * torch.arange(1, 4)).sum() + (out.end.current * torch.tensor([0.3, -1, 2])).sum()


def compare(parameters, run, h=1e-6):
    """The largest error of a gradient relative to max(1, |gradient|), or None if the order of spikes changes nearby."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    out = run(leaves)
    grads = dict(zip(leaves, torch.autograd.grad(smooth(out), tuple(leaves.values())), strict=True))
    worst = 0.0
    for name, value in parameters.items():
        for place in np.ndindex(*value.shape):
            sides = []
            for sign in (1, -1):
                moved = value.clone()
                moved[place] += sign * h
                if name == "times" and bool((moved.diff(dim=1) < 0).any()):
                    return None
                other = run({**parameters, name: moved})
                if other.indices.shape != out.indices.shape or not torch.equal(other.indices, out.indices):
                    return None
                sides.append(float(smooth(other)))
            exact = float(grads[name][place])
            worst = max(worst, abs((sides[0] - sides[1]) / (2 * h) - exact) / max(1.0, abs(exact)))
    return worst, max(float(g.abs().max()) for g in grads.values())


KINDS = [(False, None), (False, "input"), (False, "synapse"), (True, None), (True, "recurrent")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("recurrent", "delays"), KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_gradients_match_central_differences(model, recurrent, delays, seed):
    result = compare(*problem(model, seed, recurrent, delays))
    # Differences are off by h² times the third derivative, which explodes with the gradient itself.
    assume(result is not None and result[1] < 100)
    assert result[0] < 1e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recurrent", [False, True])
def test_gradcheck(model, recurrent):
    parameters, run = problem(model, 5, recurrent)
    names = list(parameters)
    leaves = tuple(parameters[name].requires_grad_() for name in names)

    def outputs(*values):
        out = run(dict(zip(names, values, strict=True)))
        return torch.where(torch.isfinite(out.times), out.times, 0.0), out.end.current

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_gradients_across_many_segments():
    """More events than states kept: the recomputed stretches give what the forward pass saw."""
    g = torch.Generator().manual_seed(0)
    times = (torch.rand(1, 300, generator=g, dtype=torch.float64) * 10).sort(1)[0]
    indices = torch.randint(0, 5, (1, 300), generator=g)
    weight = torch.randn(3, 5, generator=g, dtype=torch.float64) * 0.2 + 0.15

    def loss(w):
        out = spiking_layer("qif", times, indices, w, 10.0)
        return (torch.where(torch.isfinite(out.times), out.times, 0.0)).sum() + out.end.angle.sum()

    leaf = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    for place in np.ndindex(3, 5):
        step = torch.zeros_like(weight)
        step[place] = 1e-6
        difference = float(loss(weight + step) - loss(weight - step)) / 2e-6
        assert abs(difference - float(grad[place])) < 1e-6 * max(1, abs(float(grad[place])))


@pytest.mark.parametrize("model", MODELS)
def test_a_stack_is_differentiable_through_every_layer(model):
    torch.manual_seed(3)
    make = LAYERS[model]
    net = torch.nn.Sequential(make(6, 5, 5.0, delay=0.1), make(5, 4, 5.0, recurrent=True), make(4, 2, 5.0))
    times = (torch.rand(3, 12, dtype=torch.float64) * 4).sort(1)[0]
    indices = torch.randint(0, 6, (3, 12))

    def loss():
        out = net(Spikes(times, indices, 6))
        return (out.nth(2) * torch.tensor([1.0, 0.5])).sum() + out.counts().square().sum()

    parameters = list(net.parameters())
    grads = torch.autograd.grad(loss(), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            up = float(loss())
            parameter -= 2e-6 * direction
            down = float(loss())
            parameter += 1e-6 * direction
        exact = float((grad * direction).sum())
        assert abs((up - down) / 2e-6 - exact) < 1e-6 * max(1, abs(exact))


@pytest.mark.parametrize("read", ["times", "first", "counts"])
def test_second_derivatives_are_refused(read):
    """Also where they would otherwise only lack the layer's part: the gradient of a sum is a constant."""
    layer = QIFLayer(1, 2, 4.0)
    spikes = Spikes(TIMES, torch.zeros(1, 3, dtype=torch.int64), 1)
    layer.weight.data.fill_(5.0)
    out = layer(spikes)
    loss = (out.times if read == "times" else getattr(out, read)()).sum() + layer.weight.square().sum()
    (grad,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    assert torch.isfinite(grad).all()
    with pytest.raises(NotImplementedError, match=r"no second derivatives: differentiate once; .* two gradients"):
        torch.autograd.grad(grad.sum(), layer.weight)


TIMES = torch.tensor([[0.5, 1.5, 2.5]], dtype=torch.float64)


def sweep(model, weights, number=2):
    """The first spike times of neurons that differ in their weight, and the derivatives by it: [points, number]."""
    layer = LAYERS[model](1, len(weights), 4.0)
    layer.weight.data = weights[:, None].clone()
    out = layer(Spikes(TIMES, torch.zeros(1, 3, dtype=torch.int64), 1)).nth(number)[0]
    slopes = [torch.autograd.grad(out[:, k].sum(), layer.weight, retain_graph=True)[0][:, 0] for k in range(number)]
    return out.detach(), torch.stack(slopes, 1)


@pytest.mark.parametrize("model", ["qif", "theta"])
def test_spikes_leave_and_enter_the_trial_continuously(model):
    """Jumps along a weight shrink with the grid, from silence to many spikes."""
    jumps = []
    for points in (4001, 16001):
        values, _ = sweep(model, torch.linspace(-1.0, 4.0, points, dtype=torch.float64))
        jumps.append(float(values.diff(dim=0).abs().max()))
        assert bool((values < 4).any() and (values > 4).any())
    assert jumps[1] < 0.35 * jumps[0]


def test_lif_spikes_vanish_in_the_midst_of_a_trial():
    """The same sweep jumps for LIF, by an amount that does not shrink: what QIF is here to avoid."""
    jumps = [
        float(sweep("lif", torch.linspace(-1.0, 4.0, points, dtype=torch.float64))[0].diff(dim=0).abs().max())
        for points in (4001, 16001)
    ]
    assert jumps[1] > 0.9 * jumps[0] > 0.1


def test_an_oscillating_lif_neuron_jumps_where_an_input_meets_its_spike():
    """An input just before a spike is lost in the reset or delays the spike; just after it, it adds to the reset."""
    period = math.log(5)
    ends = []
    for at in (period - 1e-9, period + 1e-9):
        spikes = Spikes(torch.tensor([[at]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 1)
        layer = OscillatingLIFLayer(1, 2, 4.0)
        layer.weight.data = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
        ends.append(layer(spikes).nth(2)[0].detach())
    # Membranes after the event: 0 and 0.5 of the first neuron; 0.5 (not yet spiked) and -0.5 of the second.
    assert (
        ends[0] - torch.tensor([[period, 2 * period], [period + math.log(3), 2 * period + math.log(3)]])
    ).abs().max() < 1e-6
    late = math.log(1.75 / 0.25), math.log(0.75 / 0.25)
    assert (ends[1] - torch.tensor([[period, period + late[1]], [period, period + late[0]]])).abs().max() < 1e-6


def leaving(model):
    """Weights on both sides of the one at which the first spike crosses the trial's end."""
    low, high = -1.0, 4.0
    for _ in range(5):
        grid = torch.linspace(low, high, 1001, dtype=torch.float64)
        late = int((sweep(model, grid, 1)[0][:, 0] > 4).sum())
        low, high = float(grid[late - 1]), float(grid[late])
    return low, high


@pytest.mark.parametrize("model", ["qif", "theta", "olif"])
def test_the_derivative_is_continuous_where_a_spike_leaves_the_trial(model):
    low, high = leaving(model)
    values, slopes = sweep(model, torch.tensor([low - 1e-7, high + 1e-7], dtype=torch.float64), 1)
    assert values[0, 0] > 4 > values[1, 0]
    assert abs(float(slopes[0] - slopes[1])) < 1e-4 * abs(float(slopes[0]))


@pytest.mark.parametrize("model", ["qif", "theta", "olif"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_receivers_do_not_notice_a_spike_that_leaves_the_trial(model, recurrent):
    """Pseudospikes of a neuron are continuous where a spike of the neuron before it crosses the trial's end."""
    low, high = leaving(model)
    first, second = LAYERS[model](1, 1, 4.0), LAYERS[model](1, 2, 4.0, recurrent=recurrent)
    second.weight.data = torch.tensor([[5.0], [-3.0]], dtype=torch.float64)
    times = []
    for w in (low - 1e-9, high + 1e-9):
        first.weight.data.fill_(w)
        times.append(second(first(Spikes(TIMES, torch.zeros(1, 3, dtype=torch.int64), 1))).nth(2).detach())
    assert (times[0] - times[1]).abs().max() < 1e-5


def test_nobody_in_a_recurrent_layer_notices_a_spike_that_leaves_the_trial():
    """Neither the neuron that receives it nor the one that receives from that one."""
    low, high = leaving("qif")
    layer = QIFLayer(1, 3, 4.0, recurrent=True)
    layer.recurrent_weight.data = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0]], dtype=torch.float64)
    times = []
    for w in (low - 1e-9, high + 1e-9):
        layer.weight.data = torch.tensor([[w], [0.1], [-0.1]], dtype=torch.float64)
        times.append(layer(Spikes(TIMES, torch.zeros(1, 3, dtype=torch.int64), 1)).nth(2).detach())
    assert (times[0] < 4).sum() < (times[1] < 4).sum()
    assert (times[0] - times[1]).abs().max() < 1e-5


def test_silent_neurons_receive_a_gradient():
    layer = QIFLayer(2, 3, 3.0)
    layer.weight.data.fill_(-0.5)
    out = layer(Spikes(torch.tensor([[1.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 2))
    assert out.times.shape == (1, 0)
    out.first().sum().backward()
    assert (layer.weight.grad[:, 0] < 0).all()


def test_counts_are_continuous_and_differ_from_the_ordinary_ones_by_the_phase():
    jumps = []
    for points in (3001, 12001):
        layer = QIFLayer(1, points, 4.0)
        layer.weight.data = torch.linspace(0, 30, points, dtype=torch.float64)[:, None]
        out = layer(Spikes(torch.tensor([[0.5]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 1))
        counts = out.counts().detach()[0]
        rest = counts - out.ordinary_counts()[0]
        assert bool(((rest >= 0) & (rest <= 1)).all())
        assert counts.max() > 2
        jumps.append(float(counts.diff().abs().max()))
    assert jumps[1] < 0.35 * jumps[0]


def test_nth_lists_ordinary_spikes_then_pseudospikes():
    spikes = Spikes(
        torch.tensor([[0.5, 1.0, 2.0, math.inf], [0.1, 0.2, 0.3, 0.4]]),
        torch.tensor([[1, 0, 1, -1], [2, 2, 2, 0]]),
        3,
        torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.5, 1.0]]),
        torch.tensor([[2.0, 4.0, 1.0], [2.0, 2.0, 1.0]]),
        3.0,
    )
    expected = torch.tensor(
        [[[1.0, 4.0, 6.0], [0.5, 2.0, 6.0], [4.0, 5.0, 6.0]], [[0.4, 4.0, 6.0], [4.0, 6.0, 8.0], [0.1, 0.2, 0.3]]]
    )
    assert torch.allclose(spikes.nth(3), expected)
    assert torch.equal(spikes.ordinary_counts(), torch.tensor([[1, 2, 0], [1, 0, 3]]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LIFLayer(4, 3, 4.0, learn_current=True), "current"),
        (lambda: QIFLayer(4, 3, 4.0, learn_v0=True), "v0"),
        (lambda: ThetaLayer(4, 3, 4.0, learn_v0=True), "v0"),
        (lambda: QIFLayer(4, 3, 4.0, learn_i0=True), "i0"),
        (lambda: LIFLayer(4, 3, 4.0, learn_i0=True), "i0"),
        (lambda: ThetaLayer(4, 3, 4.0, learn_phase=True), "phase0"),
        (lambda: OscillatingLIFLayer(4, 3, 4.0, learn_phase=True), "phase0"),
        (lambda: QIFLayer(4, 3, 4.0, delay=0.2), "delay"),
        (lambda: QIFLayer(4, 3, 4.0, delay=0.2, synaptic_delays=True), "delay"),
        (lambda: QIFLayer(4, 3, 4.0, recurrent=True, recurrent_delay=0.2), "recurrent_weight"),
    ],
)
def test_what_a_layer_learns_besides_weights(make, name):
    torch.manual_seed(0)
    layer = make()
    # Small enough that no input makes an oscillating LIF neuron spike at once, whatever its phase.
    layer.weight.data.abs_().mul_(0.05 if isinstance(layer, OscillatingLIFLayer) else 1.0)
    times = (torch.rand(2, 10, dtype=torch.float64) * 3).sort(1)[0]
    spikes = Spikes(times, torch.randint(0, 4, (2, 10)), 4)
    parameter = getattr(layer, name)
    layer(spikes).first().sum().backward()
    direction = torch.randn_like(parameter)
    sides = []
    for sign in (1, -1):
        moved = make()
        moved.load_state_dict(layer.state_dict())
        getattr(moved, name).data += sign * 1e-6 * direction
        sides.append(float(moved(spikes).first().sum().detach()))
    exact = float((parameter.grad * direction).sum())
    assert abs(exact) > 1e-6
    assert abs((sides[0] - sides[1]) / 2e-6 - exact) < 1e-6 * max(1, abs(exact))


def test_inputs_do_not_continue():
    spikes = Spikes(torch.tensor([[0.5]]), torch.tensor([[1]]), 2)
    assert spikes.nth(2).tolist() == [[[math.inf, math.inf], [0.5, math.inf]]]
    assert spikes.counts().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="at least 1"):
        spikes.nth(0)


@pytest.mark.parametrize("layer", [QIFLayer, LIFLayer])
def test_pseudospikes_of_a_strongly_inhibited_neuron_are_finite(layer):
    inhibited = layer(1, 1, duration=1.0)
    with torch.no_grad():
        inhibited.weight.fill_(-3000.0)
    times = torch.tensor([[0.9]], dtype=torch.float64, requires_grad=True)
    out = inhibited(Spikes(times, torch.tensor([[0]]), channels=1))
    first = out.first()
    assert torch.isfinite(first).all()
    first.log().sum().backward()
    assert torch.isfinite(inhibited.weight.grad).all()
    assert torch.isfinite(times.grad).all()
