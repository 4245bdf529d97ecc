"""NeuroBench's metrics see QIF neurons of both hosts, and agree with the count of ``qif energy``."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("neurobench")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

import snntorch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import SNNTorchModel, TorchModel
from neurobench.processors.postprocessors import ChooseMaxCount
from qif_plugins.adapters.snntorch import QIF
from qif_plugins.adapters.spikingjelly import QIFNode
from spikingjelly.activation_based import functional, layer, neuron

from qif_plugins.diagnostics.energy.counting import count_operations
from qif_plugins.diagnostics.running import reset_state

METRICS = [[Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations]]
SAMPLES, STEPS = 12, 10


class SpikingJellyModel(TorchModel):
    def __init__(self, net):
        super().__init__(net)
        self.add_activation_module(neuron.BaseNode)

    def __call__(self, x):
        functional.reset_net(self.net)
        return self.net(x.transpose(0, 1)).transpose(0, 1)


def batches(*shape):
    torch.manual_seed(0)
    x = (torch.rand(SAMPLES, STEPS, *shape) < 0.4).float()
    return DataLoader(TensorDataset(x, torch.zeros(SAMPLES)), batch_size=6)


def benchmarked(model, loader):
    return Benchmark(model, loader, [], [ChooseMaxCount()], METRICS).run(quiet=True)


def agree(found, counts):
    assert 0 < counts.firing_rate < 1
    assert found["SynapticOperations"]["Effective_ACs"] == pytest.approx(counts.synops / SAMPLES)
    assert found["SynapticOperations"]["Effective_MACs"] == counts.macs == 0
    assert found["SynapticOperations"]["Dense"] == pytest.approx(counts.connections / SAMPLES)
    assert found["ActivationSparsity"] == pytest.approx(1 - counts.firing_rate)
    assert found["ConnectionSparsity"] == 0


@pytest.mark.parametrize("kind", [QIF, snntorch.Leaky])
def test_snntorch(kind):
    loader = batches(20)
    net = nn.Sequential(
        nn.Linear(20, 30), kind(beta=0.9, init_hidden=True), nn.Linear(30, 10),
        kind(beta=0.9, init_hidden=True, output=True),
    )  # fmt: skip
    found = benchmarked(SNNTorchModel(net), loader)

    def drive(net):
        for x, _ in loader:
            reset_state(net)
            for step in range(STEPS):
                net(x[:, step])

    agree(found, count_operations(net, drive))


def qif_node():
    return QIFNode(tau=10.0, decay_input=False)


def lif_node():
    return neuron.LIFNode(tau=10.0, decay_input=False)


@pytest.mark.parametrize("make", [qif_node, lif_node])
def test_spikingjelly(make):
    """A convolution with padding, whose border neither side counts, a stride, and a readout without neurons."""
    loader = batches(2, 7, 7)
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1), make(), layer.Conv2d(6, 8, 3, 2), make(), layer.Flatten(), layer.Linear(72, 4)
    )
    functional.set_step_mode(net, "m")
    found = benchmarked(SpikingJellyModel(net), loader)

    def drive(net):
        for x, _ in loader:
            functional.reset_net(net)
            net(x.transpose(0, 1))

    agree(found, count_operations(net, drive))
    assert found["Footprint"] == sum(p.numel() * p.element_size() for p in net.parameters())
