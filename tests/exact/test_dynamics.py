"""Spike times against numerical integration and against high-precision arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
from exact_oracle import integrate
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from qif_plugins.exact import (
    EventBudgetError,
    LIFLayer,
    OscillatingLIFLayer,
    QIFLayer,
    Spikes,
    ThetaLayer,
    spiking_layer,
)
from qif_plugins.exact.functional import spiking_traces

pytestmark = pytest.mark.host_independent

MODELS = ["lif", "qif", "theta", "olif"]
SMALLER = {"theta": 0.5, "olif": 0.2}
"""Factor of the weights that are added to V, rather than to the current."""
CONSTANT = {"theta": 1.5, "olif": 1.3}


def case(seed, model, neurons=3, inputs=4, events=10, duration=5.0, scale=2.0):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, duration, events))
    sources = rng.integers(0, inputs, events)
    weight = rng.normal(0.3 * scale, scale, (neurons, inputs)) * SMALLER.get(model, 1.0)
    return rng, times, sources, weight


def layer(model, times, sources, weight, duration, **options):
    options = {k: torch.from_numpy(np.asarray(v)) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    out = spiking_layer(model, torch.tensor(times)[None], torch.tensor(sources)[None], weight, duration, **options)
    return out, weight


def sensitivity(out, weight):
    """The largest sum over the weights of |dt/dw|: integration errors reach spike times multiplied by it."""
    worst = 0.0
    for k in range(out.times.shape[1]):
        (grad,) = torch.autograd.grad(out.times[0, k], weight, retain_graph=True)
        worst = max(worst, float(grad.abs().sum()))
    return worst


def assert_same(out, spikes, duration, tolerance=1e-9):
    """Spikes within the tolerance of the trial's end may be on either side of it."""
    ours = [
        (float(t), int(n))
        for t, n in zip(out.times[0].detach(), out.indices[0], strict=True)
        if t < duration - tolerance
    ]
    spikes = [spike for spike in spikes if spike[0] < duration - tolerance]
    assert len(ours) == len(spikes)
    for n in {n for _, n in spikes}:
        mine = [t for t, m in ours if m == n]
        true = [t for t, m in spikes if m == n]
        assert len(mine) == len(true)
        assert np.abs(np.subtract(mine, true)).max() < tolerance


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.5, 6.0), tau=st.floats(0.5, 2.0))
def test_feed_forward_matches_integration(model, seed, scale, tau):
    rng, times, sources, weight = case(seed, model, scale=scale)
    v0, i0 = rng.uniform(-1, 0.9, 3), rng.normal(0, 2, 3)
    current = rng.normal(0, 1, 3) if model == "lif" else CONSTANT.get(model, 0.0)
    start = {"v0": v0} if model in CONSTANT else {"v0": v0, "i0": i0}
    out, parameter = layer(model, times, sources, weight, 5.0, tau=tau, current=current, **start)
    assume(sensitivity(out, parameter) < 30)
    spikes, end, i = integrate(model, times, sources, weight, 5.0, tau, current=current, **start)
    assert_same(out, spikes, 5.0)
    if model not in CONSTANT:
        assert np.abs(out.end.current[0].detach().numpy() - i).max() < 1e-9
    near = np.abs(end) < 5
    assert np.abs(out.end.v[0].detach().numpy() - end)[near].max(initial=0) < 1e-7


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("delay", [0.0, 0.3])
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_recurrent_matches_integration(model, delay, seed):
    rng, times, sources, weight = case(seed, model, neurons=4, events=6, duration=3.0)
    recurrent = rng.normal(0, 1.0, (4, 4)) * SMALLER.get(model, 1.0)
    delays = delay * rng.uniform(0.5, 1.5, 4)
    start = {"current": CONSTANT.get(model, 0.0)}
    if model == "olif":  # which would otherwise all spike at the same time
        start["v0"] = rng.uniform(-1, 0.9, 4)
    out, parameter = layer(
        model, times, sources, weight, 3.0, recurrent_weight=recurrent, recurrent_delay=delays, **start
    )
    assume(sensitivity(out, parameter) < 30)
    spikes, _, _ = integrate(model, times, sources, weight, 3.0, recurrent=recurrent, delay=delays, **start)
    assert_same(out, spikes, 3.0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recurrent", [False, True])
def test_traces_match_integration(model, recurrent):
    rng, times, sources, weight = case(11, model, events=6, duration=3.0, scale=6.0 if model == "lif" else 2.0)
    options = {"current": CONSTANT.get(model, 0.0), "tau": 0.8}
    if recurrent:
        options["recurrent_weight"] = rng.normal(0, 1.0, (3, 3)) * SMALLER.get(model, 1.0)
        options["recurrent_delay"] = rng.uniform(0.1, 0.3, 3)
    out, parameter = layer(model, times, sources, weight, 3.0, **options)
    assert sensitivity(out, parameter) < 100
    at = rng.uniform(0, 3.0, 120)
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    given = torch.tensor(times)[None], torch.tensor(sources)[None], torch.tensor(weight)
    traces = spiking_traces(model, *given, 3.0, torch.from_numpy(at), **tensors)
    pieces = []
    names = {"recurrent_weight": "recurrent", "recurrent_delay": "delay"}
    integrate(
        model, times, sources, weight, 3.0, pieces=pieces, **{names.get(k, k): v for k, v in options.items()}
    )  # fmt: skip
    assert len(pieces) > 7  # input spikes, and at least one spike
    true = np.array([next(values(t) for start, end, values in pieces if start <= t < end) for t in at])
    v, current = true[:, :3], true[:, 3:]
    near = np.abs(v) < 5
    assert near.mean() > 0.7
    assert np.abs(traces.v[0].numpy() - v)[near].max() < 1e-6
    assert np.abs(traces.current[0].numpy() - current).max() < 1e-8


def test_traces_of_layers_end_where_the_trial_does():
    torch.manual_seed(0)
    for make in (LIFLayer, QIFLayer, ThetaLayer, OscillatingLIFLayer):
        for options in ({}, {"delay": 0.1}, {"delay": 0.1, "synaptic_delays": True}, {"recurrent": True}):
            net = make(3, 4, 3.0, 0.7), make(4, 2, 3.0, 0.7, **options)
            times = torch.rand(2, 9, dtype=torch.float64).mul(3).sort(1)[0]
            hidden = net[0](Spikes(times, torch.randint(0, 3, (2, 9)), 3))
            at = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)
            traces = net[1].traces(hidden, at)
            given = {"times": hidden.times, "indices": hidden.indices, "duration": 3.0, **net[1]._options()}
            end = spiking_layer(make.model, **given).end
            assert traces.v.shape == (2, 3, 2)
            assert torch.allclose(traces.v[:, 0], end.v, rtol=1e-9)
            assert torch.allclose(traces.current[:, 0], end.current, atol=1e-12)
            assert bool((traces.v[:, 1] == (0.5 if make is ThetaLayer else 0.0)).all())
            assert not traces.v.requires_grad


@pytest.mark.parametrize(("model", "period"), [("theta", math.pi), ("olif", math.log(5))])
def test_the_initial_phase_is_a_share_of_the_period(model, period):
    phase = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    none = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64)
    weight = torch.ones(5, 1, dtype=torch.float64)
    out = spiking_layer(model, *none, weight, 4.0, current=1.25, phase0=phase)
    first = Spikes(out.times, out.indices, 5).first()[0]
    assert (first - period * (1 - phase)).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(first[1:4].sum(), phase)
    assert (grad[1:4] + period).abs().max() < 1e-11


@pytest.mark.parametrize("make", [ThetaLayer, OscillatingLIFLayer])
def test_pseudospikes_of_oscillating_neurons_are_the_spikes_of_a_longer_trial(make):
    times = torch.tensor([[0.3, 0.9, 1.4]], dtype=torch.float64)
    spikes = Spikes(times, torch.tensor([[0, 1, 0]]), 2)
    weight = torch.tensor([[0.2, -0.3], [-0.5, 0.3], [0.1, 0.4]], dtype=torch.float64)
    trains = []
    for duration in (1.5, 20.0):
        net = make(2, 3, duration, 0.9)
        net.weight.data.copy_(weight)
        trains.append(net(spikes).nth(4))
    assert bool((trains[0] > 1.5).any())
    assert (trains[0] - trains[1]).abs().max() < 1e-10


@pytest.mark.parametrize("make", [QIFLayer, LIFLayer])
def test_pseudospikes_match_integration_under_a_constant_drive(make):
    net = make(1, 3, 1.5, 0.9)
    net.weight.data.copy_(torch.tensor([[1.0], [-2.0], [0.3]]))
    spikes = Spikes(torch.tensor([[0.3]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), 1)
    given = {"times": spikes.times, "indices": spikes.indices, "duration": 1.5, **net._options()}
    end = spiking_layer(make.model, **given).end
    later = net(spikes).nth(1)[0, :, 0]
    for n in range(3):
        v, scale = float(end.v[0, n].detach()), net.pseudo_scale
        drive = scale * math.log1p(math.exp(float(end.current[0, n].detach()) / scale))

        def slope(t, x, drive=drive):
            lif = -x + 1 + drive
            return (lif if make is LIFLayer else np.cos(x) ** 2 + drive * np.sin(x) ** 2) / 0.9

        def spike(t, x):
            return x[0] - (1 if make is LIFLayer else math.pi)

        spike.terminal = True
        start = v if make is LIFLayer else math.atan2(1, 0.5 - v)
        found = solve_ivp(slope, (1.5, 50), [start], "DOP853", events=spike, rtol=1e-12, atol=1e-13)
        assert abs(found.t_events[0][0] - float(later[n].detach())) < 1e-9


def test_a_graph_of_layers_is_one_layer_with_masks():
    """Two layers one after the other, in one event loop: the same spikes, and no gradient where nothing connects."""
    torch.manual_seed(1)
    stack = torch.nn.Sequential(QIFLayer(3, 4, 4.0), QIFLayer(4, 2, 4.0))
    inputs, among = torch.zeros(6, 3, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    inputs[:4], among[4:, :4] = True, True
    graph = QIFLayer(3, 6, 4.0, recurrent=True, mask=inputs, recurrent_mask=among)
    assert bool((graph.weight[~inputs] == 0).all() and (graph.recurrent_weight[~among] == 0).all())
    graph.weight.data[:4], graph.recurrent_weight.data[4:, :4] = stack[0].weight.data, stack[1].weight.data
    times = torch.rand(5, 12, dtype=torch.float64).mul(4).sort(1)[0]
    spikes = Spikes(times, torch.randint(0, 3, (5, 12)), 3)
    hidden = stack[0](spikes)
    one, two = torch.cat([hidden.nth(2), stack[1](hidden).nth(2)], 1), graph(spikes).nth(2)
    assert (one < 4).sum() > 10
    assert ((one < 4) == (two < 4)).all()
    assert (one - two)[one < 4].abs().max() < 1e-12
    graph(spikes).first().sum().backward()
    assert bool((graph.weight.grad[~inputs] == 0).all() and (graph.recurrent_weight.grad[~among] == 0).all())


def exact_qif(times, weights, duration):
    """The first spike of one QIF neuron at rest, in 50 digits."""
    with mpmath.workdps(50):
        p, q, i, t = mpmath.mpf(0), mpmath.mpf(1), mpmath.mpf(0), mpmath.mpf(0)
        for until, w in [*zip(map(mpmath.mpf, times), weights, strict=True), (mpmath.mpf(duration), 0.0)]:
            sigma = -mpmath.expm1(-(until - t))
            root = mpmath.sqrt(mpmath.mpc(i))
            if i > 0:
                zero = mpmath.atan2(mpmath.re(root) * q, p) / mpmath.re(root)
            else:
                zero = mpmath.re(mpmath.atan(root * q / p) / root) if i != 0 and p > 0 else (q / p if p > 0 else 2)
                if i < 0 and (p <= 0 or abs(root) * q >= p):
                    zero = mpmath.mpf(2)
            if zero <= sigma:
                return float(t - mpmath.log(1 - zero))
            c = mpmath.re(mpmath.cos(root * sigma))
            k = mpmath.re(mpmath.sin(root * sigma) / root) if i != 0 else sigma
            p, q = (c * p + i * k * q) * (1 - sigma), c * q - k * p
            i = i * (1 - sigma) ** 2 + mpmath.mpf(w)
            t = until
    return math.inf


@settings(max_examples=200)
@given(
    st.lists(st.floats(0.0, 5.0), min_size=1, max_size=8),
    st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=8),
)
def test_the_first_qif_spike_is_exact_to_rounding(times, weights):
    times = np.sort(times)
    weights = weights[: len(times)]
    out, parameter = layer("qif", times, np.arange(len(times)), np.array([weights]), 6.0)
    true = exact_qif(times.tolist(), weights, 6.0)
    if out.times.shape[1] == 0:
        assert true > 6 - 1e-12
        return
    (grad,) = torch.autograd.grad(out.times[0, 0], parameter)
    # Rounding a weight moves the spike by eps·|w dt/dw|; nothing that computes in float64 does better.
    condition = float((grad.abs() * parameter.detach().abs()).sum())
    assume(condition < 10)
    assert abs(float(out.times[0, 0].detach()) - true) < 1e-12


def test_many_spikes_in_one_interval():
    """A constant drive makes the theta neuron strictly periodic, with period πτ/√(J - 1/4)."""
    out, _ = layer("theta", np.zeros(0), np.zeros(0, dtype=int), np.ones((1, 1)), 50.0, current=4.25, tau=0.7)
    period = math.pi * 0.7 / 2
    expected = period / 2 + period * np.arange(int(50 / period))
    assert out.times.shape[1] == len(expected)
    assert np.abs(out.times[0].detach().numpy() - expected).max() < 1e-12


def test_lif_period():
    out, _ = layer("lif", np.zeros(0), np.zeros(0, dtype=int), np.ones((1, 1)), 20.0, current=1.5)
    period = math.log(1.5 / 0.5)
    assert np.abs(out.times[0].detach().numpy() - period * np.arange(1, out.times.shape[1] + 1)).max() < 1e-12


@settings(max_examples=100)
@given(st.floats(1e-300, 1e12), st.booleans(), st.floats(-1e6, 1e6))
def test_extreme_currents_stay_finite(size, negative, v0):
    current = torch.tensor([-size if negative else min(size, 1e9)], dtype=torch.float64)
    none = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64)
    out = spiking_layer(
        "qif",
        *none,
        torch.ones(1, 1, dtype=torch.float64),
        30.0,
        i0=current,
        v0=torch.tensor([v0], dtype=torch.float64),
    )
    assert torch.isfinite(out.times).all()
    assert torch.isfinite(out.end.angle).all()
    assert (out.times[0].diff() >= 0).all()


@settings(max_examples=100)
@given(st.floats(0, 100), st.floats(0, 3), st.sampled_from([-1.0, 1.0]))
def test_lif_with_a_weight_of_any_size_is_right_or_refused(exponent, at, sign):
    """Its first spike: the smaller root w = 1 - exp(-Δ) of I w² - I w + 1, which no other spike precedes."""
    current = sign * 10**exponent
    times = torch.tensor([[at]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    weight = torch.tensor([[current]], dtype=torch.float64)
    try:
        out = spiking_layer("lif", *times, weight, 4.0, max_spikes=2000).times[0]
    except EventBudgetError:
        # As V' <= I, each spike uses up at least 1 of the integral of I to the trial's end.
        assert current / 2 * -math.expm1(-2 * (4 - at)) > 2000
        return
    spikes = current >= 4 and 2 / (current * (1 + math.sqrt(1 - 4 / current))) <= -math.expm1(-(4 - at))
    assert (len(out) > 0) == spikes
    if spikes:
        first = at - math.log1p(-2 / (current * (1 + math.sqrt(1 - 4 / current))))
        assert abs(out[0].item() - first) < 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_batch_threads_and_chunks_do_not_matter(model):
    rng = np.random.default_rng(0)
    times = torch.from_numpy(np.sort(rng.uniform(0, 5, (64, 40)), axis=1))
    indices = torch.from_numpy(rng.integers(0, 6, (64, 40)))
    weight = torch.from_numpy(rng.normal(0.3, 0.5, (80, 6)))
    current = 1.25 if model in CONSTANT else 0.0
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(spiking_layer(model, times, indices, weight, 5.0, current=current))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0].times, outs[1].times)
    assert torch.equal(outs[0].indices, outs[1].indices)
    alone = spiking_layer(model, times[5:6], indices[5:6], weight, 5.0, current=current)
    count = alone.times.shape[1]
    assert torch.equal(alone.times[0], outs[0].times[5, :count])


def test_float32_is_float64_rounded_once():
    _, times, sources, weight = case(3, "qif")
    single = torch.tensor(times, dtype=torch.float32)[None], torch.tensor(sources)[None]
    w = torch.tensor(weight, dtype=torch.float32)
    low = spiking_layer("qif", *single, w, 5.0)
    high = spiking_layer("qif", single[0].double(), single[1], w.double(), 5.0)
    assert low.times.dtype == torch.float32
    assert torch.equal(low.times, high.times.float())
