"""Wrong input is refused with the value, the limit and the way out; budgets raise and never truncate."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from qif_plugins.exact import (
    EventBudgetError,
    LIFLayer,
    OscillatingLIFLayer,
    QIFLayer,
    Spikes,
    ThetaLayer,
    encode_images,
    initialise,
    pad_events,
    spiking_layer,
)

pytestmark = pytest.mark.host_independent


def call(model="qif", times=((0.5, 1.0),), indices=((0, 1),), weight=((1.0, 2.0),), duration=4.0, **options):
    return spiking_layer(
        model,
        torch.tensor(times, dtype=torch.float64),
        torch.tensor(indices),
        torch.tensor(weight, dtype=torch.float64),
        duration,
        **options,
    )


def one(value):
    return torch.tensor([value], dtype=torch.float64)


WRONG = {
    "unsorted": ({"times": ((1.0, 0.5),)}, r"ascend.*sort times and indices"),
    "padding in front": ({"times": ((math.inf, 0.5),), "indices": ((-1, 0),)}, r"padding last"),
    "negative time": ({"times": ((-0.5, 0.5),)}, r"-0\.5, before the trial"),
    "NaN time": ({"times": ((0.5, math.nan),)}, r"NaN; pad with infinity"),
    "after the trial": ({"times": ((0.5, 4.5),)}, r"4\.5, after the trial's end at 4"),
    "index too large": ({"indices": ((0, 2),)}, r"is 2; the layer has inputs 0 to 1"),
    "index negative": ({"indices": ((-1, 1),)}, r"is -1; the layer has inputs 0 to 1"),
    "float indices": ({"indices": ((0.0, 1.0),)}, r"must be integers"),
    "shapes": ({"indices": ((0, 1, 1),)}, r"\[1, 2\] and \[1, 3\]"),
    "NaN weight": ({"weight": ((1.0, math.nan),)}, r"weight\[0, 1\] is nan"),
    "infinite weight": ({"weight": ((math.inf, 1.0),)}, r"weight\[0, 0\] is inf"),
    "huge weight": ({"weight": ((1e200, 1.0),)}, r"weight\[0, 0\] is 1e\+200; it must be finite and within ±1e\+100"),
    "huge weights that cancel": ({"weight": ((1e200, -1e200),)}, r"weight\[0, 0\] is 1e\+200"),
    "huge recurrent weight": (
        {"recurrent_weight": -one(1e200)[None]},
        r"recurrent_weight\[0, 0\] is -1e",
    ),
    "huge initial current": ({"i0": one(1e200)}, r"i0\[0\] is 1e\+200"),
    "huge constant current": ({"model": "lif", "current": 1e200}, r"constant current must be finite and within"),
    "huge theta current": (
        {"model": "theta", "current": 1e200},
        r"constant current must be at most 1e\+100, got 1e\+200",
    ),
    "far too low v0": ({"model": "lif", "v0": one(-1e200)}, r"v0\[0\] is -1e\+200"),
    "trial of another unit than tau": ({"tau": 1e-310}, r"duration / tau must lie between 1e-100 and 1e\+100, got 4 /"),
    "zero-length trial": ({"duration": 0.0}, r"positive, finite duration, got 0"),
    "endless trial": ({"duration": math.inf}, r"positive, finite duration, got inf"),
    "tau": ({"tau": 0.0}, r"tau must be positive"),
    "model": ({"model": "alif"}, r"unknown neuron 'alif'; did you mean 'lif'\? Choose from 'lif', 'qif', 'theta'"),
    "theta current": ({"model": "theta", "current": 0.25}, r"above 1/4 \(it oscillates\), got 0\.25"),
    "theta i0": ({"model": "theta", "current": 1.0, "i0": one(0.0)}, r"no synaptic current"),
    "olif current": ({"model": "olif", "current": 1.0}, r"above the threshold 1, got 1\.0"),
    "olif i0": ({"model": "olif", "current": 1.5, "i0": one(0.0)}, r"oscillating LIF neuron has no synaptic current"),
    "phase of a neuron without": ({"phase0": one(0.5)}, r"which oscillate without input; use v0 for 'qif'"),
    "phase and v0": (
        {"model": "theta", "current": 1.5, "phase0": one(0.5), "v0": one(0.0)},
        r"v0 and phase0 say the same",
    ),
    "phase above 1": (
        {"model": "theta", "current": 1.5, "phase0": one(1.5)},
        r"phase0\[0\] is 1\.5; it must be a share of the period, from 0 to 1",
    ),
    "qif current": ({"current": 0.5}, r"no closed form with a constant current"),
    "NaN current": ({"model": "lif", "current": one(math.nan)}, r"constant current must be finite"),
    "negative delay": ({"delay": torch.tensor([0.0, -1.0])}, r"delay\[1\] is -1\.0; it must be a finite delay >= 0"),
    "delay shape": ({"delay": torch.zeros(3)}, r"delay must be \[2\] or \[1, 2\], got \[3\]"),
    "v0 above threshold": ({"model": "lif", "v0": one(1.0)}, r"v0\[0\] is 1\.0; it must be finite and below"),
    "v0 NaN": ({"v0": one(math.nan)}, r"v0\[0\] is nan"),
    "recurrent shape": ({"recurrent_weight": torch.zeros(1, 2)}, r"recurrent_weight must be \[1, 1\]"),
    "synaptic delays with recurrence": (
        {"recurrent_weight": torch.zeros(1, 1), "delay": torch.zeros(1, 2)},
        r"do not go with recurrence",
    ),
    "budget": ({"max_spikes": 0}, r"max_spikes must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        spiking_layer("qif", one(0.5)[None], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).half(), 4.0)


@pytest.mark.parametrize("model", ["lif", "qif", "theta"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_an_exhausted_budget_raises(model, recurrent):
    current = {"lif": 3.0, "qif": 0.0, "theta": 5.0}[model]
    options = {"recurrent_weight": torch.zeros(1, 1, dtype=torch.float64)} if recurrent else {}
    out = call(model, weight=((400.0, 400.0),), current=current, **options)
    count = out.times.shape[1]
    assert count > 3
    again = call(model, weight=((400.0, 400.0),), current=current, max_spikes=count, **options)
    assert torch.equal(again.times, out.times)
    with pytest.raises(
        EventBudgetError, match=rf"more than max_spikes={count - 1} spikes in sample 0; raise max_spikes"
    ):
        call(model, weight=((400.0, 400.0),), current=current, max_spikes=count - 1, **options)


def test_runaway_recurrence_exhausts_the_budget_and_ends():
    with pytest.raises(EventBudgetError):
        call("qif", weight=((50.0, 50.0),), recurrent_weight=torch.full((1, 1), 1e4), max_spikes=500)


def test_buffers_grow_up_to_the_budget():
    """Far more spikes than the first guess of the buffer's size: none is lost."""
    weight = torch.full((1, 1), 1e5, dtype=torch.float64)
    out = spiking_layer("qif", one(0.0)[None], torch.zeros(1, 1, dtype=torch.int64), weight, 4.0)
    # σ advances by π/√I from one spike to the next, and the trial ends at σ = 1 - exp(-4).
    expected = math.floor(0.5 + math.sqrt(1e5) * (1 - math.exp(-4)) / math.pi)
    assert out.times.shape[1] == expected > 64


@pytest.mark.parametrize("recurrent", [False, True])
def test_samples_that_overflow_a_batchs_buffers_are_as_alone(recurrent):
    """From 1 to some 90 spikes of a sample, where there is room for 8 each at first."""
    i0 = torch.tensor([[3.0], [9e4], [50.0], [8e4], [1.0]], dtype=torch.float64)
    options = {"recurrent_weight": torch.full((1, 1), 0.1, dtype=torch.float64)} if recurrent else {}

    def run(i0):
        weight = torch.ones(1, 1, dtype=torch.float64)
        times = torch.full((len(i0), 1), 0.5, dtype=torch.float64)
        i0 = i0.clone().requires_grad_()
        out = spiking_layer("qif", times, torch.zeros(len(i0), 1, dtype=torch.int64), weight, 4.0, i0=i0, **options)
        torch.where(out.indices >= 0, out.times, 0.0).sum().backward()
        return out, i0.grad

    together, grad = run(i0)
    for sample in range(len(i0)):
        alone, own = run(i0[sample : sample + 1])
        count = alone.times.shape[1]
        assert torch.equal(together.times[sample, :count], alone.times[0])
        assert bool((together.indices[sample, count:] == -1).all())
        assert torch.equal(grad[sample], own[0])
    assert together.times.shape[1] > 80


def test_empty_trains_and_empty_batches():
    for batch in (0, 2):
        none = torch.zeros(batch, 0, dtype=torch.float64), torch.zeros(batch, 0, dtype=torch.int64)
        out = spiking_layer("qif", *none, torch.ones(3, 2, dtype=torch.float64), 1.0)
        assert out.times.shape == (batch, 0)
        assert out.end.v.shape == (batch, 3)


def test_padding_has_no_effect():
    plain = call()
    padded = call(times=((0.5, 1.0, math.inf, math.inf),), indices=((0, 1, -1, 7),))
    assert torch.equal(plain.end.angle, padded.end.angle)


def test_arrivals_after_the_trial_have_no_effect():
    late = call(delay=torch.tensor([0.0, 3.5], dtype=torch.float64))
    alone = call(times=((0.5, math.inf),), indices=((0, -1),))
    assert torch.equal(late.end.angle, alone.end.angle)


def test_a_neuron_can_start_just_after_a_spike():
    low = call(v0=one(-1e12), weight=((8.0, 2.0),))
    reset = call(v0=one(-math.inf), weight=((8.0, 2.0),))
    assert torch.allclose(low.end.angle, reset.end.angle, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QIFLayer(2, 2, 0.0), "duration must be positive"),
        (lambda: QIFLayer(2, 2, 1.0, tau=-1.0), "tau must be positive"),
        (lambda: QIFLayer(2, 2, 1.0, delay=-0.1), "delay must be finite and not negative"),
        (lambda: QIFLayer(2, 2, 1.0, synaptic_delays=True), "needs a delay to start from"),
        (lambda: ThetaLayer(2, 2, 1.0, current=0.2), "above 1/4"),
        (lambda: OscillatingLIFLayer(2, 2, 1.0, current=0.9), r"above 1 \(it oscillates\), got 0\.9"),
        (lambda: ThetaLayer(2, 2, 1.0, learn_i0=True), "no synaptic current to learn; pass learn_phase"),
        (lambda: ThetaLayer(2, 2, 1.0, learn_v0=True, learn_phase=True), "learn the same"),
        (lambda: QIFLayer(2, 3, 1.0, mask=torch.ones(2, 3).bool()), r"mask must be \[3, 2\] bool, got \[2, 3\]"),
        (lambda: QIFLayer(2, 2, 1.0, mask=torch.ones(2, 2)), r"mask must be \[2, 2\] bool, got \[2, 2\] torch.float"),
        (lambda: QIFLayer(2, 2, 1.0, recurrent_mask=torch.ones(2, 2).bool()), "pass recurrent=True as well"),
    ],
)
def test_wrong_layers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (torch.tensor([0.5, 2.0]), r"in \[0, 1\], the trial; got \[2\] in torch.float32, 0.5 to 2"),
        (torch.tensor([math.nan]), r"in \[0, 1\]"),
        (torch.tensor([[0.5]]), r"must be \[P\] floats"),
        (torch.tensor([0, 1]), r"got \[2\] in torch.int64"),
    ],
)
def test_traces_outside_the_trial_are_refused(times, message):
    spikes = Spikes(torch.zeros(1, 0, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=message):
        QIFLayer(2, 2, 1.0).traces(spikes, times)


def test_layers_refuse_spikes_of_other_sizes():
    with pytest.raises(ValueError, match="the layer has 3 inputs, the spikes 2 channels"):
        LIFLayer(3, 1, 1.0)(Spikes(torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64), 2))


def test_spikes_of_channels_that_do_not_exist_are_refused():
    spikes = Spikes(torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 2), 2)
    for read in (spikes.ordinary_counts, spikes.counts, spikes.first):
        with pytest.raises(
            ValueError, match="spike index 2 is not below the number of channels, 2; number the channels"
        ):
            read()
    assert spikes == spikes  # by identity, as tensors
    assert spikes != replace(spikes)


def test_single_precision_networks_stay_single_and_pass_spikes_on():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(QIFLayer(n, 4, 0.7, tau=0.1, dtype=torch.float32) for n in (3, 4)))
    times = torch.rand(8, 20).mul(0.7).sort(1)[0]
    initialise(net, Spikes(times, torch.randint(0, 3, (8, 20)), 3), rate=3.0)
    out = net(Spikes(times, torch.randint(0, 3, (8, 20)), 3))
    assert out.times.dtype == out.first().dtype == torch.float32
    out.first().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
    assert net[0].weight.grad.abs().max() > 0


def test_images_spike_earlier_the_brighter():
    spikes = encode_images(torch.tensor([[[0.0, 1.0], [0.05, 0.25]], [[0.0, 0.0], [0.0, 0.0]]]), latest=2.0)
    assert spikes.times.tolist() == [[0.0, 1.5], [math.inf, math.inf]]
    assert spikes.indices.tolist() == [[1, 3], [-1, -1]]
    assert spikes.channels == 4


@pytest.mark.parametrize("images", [torch.tensor([[2.0]]), torch.tensor([[-0.1]]), torch.tensor([[math.nan]])])
def test_images_outside_the_unit_interval_are_refused(images):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        encode_images(images, 1.0)


def test_event_lists_are_sorted_cut_and_padded():
    events = [(np.array([0.5, 0.1, 3.0], np.float16), np.array([4, 2, 1], np.uint16)), (np.zeros(0), np.zeros(0))]
    spikes = pad_events(events, 5, 1.0)
    assert spikes.indices.tolist() == [[2, 4], [-1, -1]]
    assert spikes.times[0].tolist() == [float(np.float16(0.1)), 0.5]


def test_initialise_reaches_the_wanted_activity_and_says_when_it_cannot():
    torch.manual_seed(0)
    net = torch.nn.Sequential(QIFLayer(6, 30, 4.0), QIFLayer(30, 20, 4.0))
    spikes = Spikes(torch.rand(20, 15, dtype=torch.float64).mul(3).sort(1)[0], torch.randint(0, 6, (20, 15)), 6)
    out = initialise(net, spikes, rate=1.0)
    assert abs(float(out.ordinary_counts().double().mean()) - 1) < 0.1
    silent = Spikes(torch.zeros(2, 0, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.int64), 6)
    with pytest.raises(ValueError, match="does its input spike"):
        initialise(net, silent)
    with pytest.raises(ValueError, match="rate must be positive"):
        initialise(net, spikes, rate=0.0)
    with pytest.raises(ValueError, match="entry 0 is Linear"):
        initialise(torch.nn.Sequential(torch.nn.Linear(2, 2)), spikes)
