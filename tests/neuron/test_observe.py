"""Watching layers at work: every call of each, of every host, and nothing left behind."""

import copy
import pickle
import threading

import pytest
import torch
from measured_models import MODELS
from torch import nn

from qif_plugins import health, swap
from qif_plugins.diagnostics.spiking import qif_layers, spiking_layers
from qif_plugins.experiments.training.firing import FiringRates
from qif_plugins.neuron.observe import observers, watching

HOSTS = pytest.mark.parametrize("host", MODELS)


def hooks_of(model):
    return [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def recurrent(snn, qif):
    layer = nn.Sequential(snn.RLeaky(beta=0.9, all_to_all=True, linear_features=5))
    swap(layer, readout="swap")
    return layer[0]


def lapicque(snn, qif):
    layer = nn.Sequential(snn.Lapicque(beta=0.9))
    swap(layer, readout="swap")
    return layer[0]


MAKERS = [
    lambda snn, qif: qif(beta=0.9),
    lambda snn, qif: qif(beta=0.9, init_hidden=True),
    lambda snn, qif: qif(beta=0.9, inhibition=True),
    recurrent,
    lapicque,
]


@pytest.mark.parametrize("make", MAKERS, ids=["plain", "hidden", "stepped", "recurrent", "lapicque"])
def test_a_sequence_and_its_steps_are_the_same_spikes(make):
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    layer, x_seq = make(snn, QIF), torch.randn(7, 4, 5) * 3
    rates = FiringRates({"it": layer})
    with rates.measuring():
        layer.reset_mem()
        expected = layer.forward_sequence(x_seq)[0].detach()
    assert rates.sums() == [expected.sum().item(), x_seq.numel()]
    rates.clear()
    with rates.measuring(), torch.no_grad():
        layer.reset_mem()
        for x in x_seq:
            layer(x)
    assert rates.sums() == [expected.sum().item(), x_seq.numel()]


@HOSTS
def test_every_call_is_seen_with_its_membranes(host):
    model, (x, *_) = MODELS[host]()
    found = {name: [] for name in qif_layers(model)}
    with torch.no_grad(), watching(qif_layers(model), lambda seen: found[seen.name].append(seen), membranes=True):
        model(x)
    for calls in found.values():
        runs = [run for call in calls for run in call.runs]
        h, spikes = (torch.cat([getattr(run, part).flatten() for run in runs]) for part in ("h_seq", "spike_seq"))
        assert torch.equal(torch.cat([call.spikes.flatten() for call in calls]), spikes)
        assert torch.equal(spikes, (h >= 1).float())
        assert h.numel() == x.shape[0] * x.shape[1] * calls[0].spikes.shape[-1]


def test_one_layer_in_two_places_and_one_inside_another():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Outer(neuron.BaseNode):
        def __init__(self):
            super().__init__(step_mode="m")
            self.inner = neuron.LIFNode(step_mode="m")

        def forward(self, x):
            return 1 - self.inner(x)

    shared = Outer()
    model, x = nn.Sequential(nn.Linear(6, 6), shared, nn.Linear(6, 6), shared), torch.rand(4, 3, 6)
    rates = FiringRates(spiking_layers(model))
    with rates.measuring(), torch.no_grad():
        model(x)
    assert rates.sums()[2:] == [2 * x.numel()] * 2
    assert sum(rates.sums()[:2]) == 2 * x.numel()


@HOSTS
def test_a_call_that_fails_is_not_seen_and_leaves_nothing(host):
    model, (x, *_) = MODELS[host]()
    before, layers, seen = hooks_of(model), qif_layers(model), []
    first, second = layers.values()
    with torch.no_grad(), watching(layers, seen.append, membranes=True):
        with pytest.raises((AttributeError, TypeError)):
            first("no input")
        second(torch.rand_like(x)[0] if host == "snntorch" else torch.rand_like(x))
    assert [(call.name, len(call.runs)) for call in seen] == [(list(layers)[1], 1)]
    with pytest.raises((AttributeError, TypeError)), watching(layers, seen.append, membranes=True):
        first("no input")
    assert hooks_of(model) == before
    assert observers == []


@HOSTS
def test_copies_made_meanwhile_are_not_watched(host):
    model, (x, *_) = MODELS[host]()
    rates = FiringRates(spiking_layers(model))
    with rates.measuring(), torch.no_grad():
        copy.deepcopy(model)(x)
        layer = next(iter(qif_layers(model).values()))
        pickle.loads(pickle.dumps(layer))(torch.rand(2, 3, 40))
    assert rates.mean() is None


@HOSTS
def test_watching_inside_watching(host):
    model, (x, *_) = MODELS[host]()
    rates = FiringRates(qif_layers(model))
    expected = {row.name: row.rate for row in health(model, x).layers}
    with rates.measuring():
        health(model, x)
        assert rates.rates() == pytest.approx(expected)
        health(model, x)
    assert rates.rates() == pytest.approx(expected)


@HOSTS
def test_calls_in_several_threads_keep_their_own_membranes(host):
    model, _ = MODELS[host]()
    (name, layer), *_ = qif_layers(model).items()
    layer = copy.deepcopy(layer)
    inputs = [torch.full((2, 3, 40), float(index)) for index in range(4)]
    seen, together = [], threading.Barrier(len(inputs))

    def wait(*_):
        together.wait(timeout=60)

    def run(x):
        layer(x[0] if host == "snntorch" else x)

    with watching({name: layer}, seen.append, membranes=True):
        # All are inside the layer before the operator runs in any of them.
        handle = layer.register_forward_pre_hook(wait)
        threads = [threading.Thread(target=run, args=(x,)) for x in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    assert sorted(call.runs[0].x_seq.flatten()[0].item() for call in seen) == [0.0, 1.0, 2.0, 3.0]
    assert all(len(call.runs) == 1 for call in seen)
