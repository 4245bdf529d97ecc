"""Small networks of every host for the tests that measure, each with a batch and a name of its own."""

import pytest
import torch
from torch import nn

PAPER = {"dynamics": "paper", "window": "unbiased"}


def spikingjelly(per_step=False, **options):
    """Two QIF layers and a LIF readout over ``[T, N, 12]``, or over ``[N, 12]`` a call."""
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode
    from spikingjelly.activation_based import functional, layer, neuron

    model = nn.Sequential(
        layer.Linear(12, 40), QIFNode(**PAPER | options), layer.Linear(40, 30),
        QIFNode(tau=2.0, window="unbiased"), layer.Linear(30, 4),
        neuron.LIFNode(),
    )  # fmt: skip
    if not per_step:
        functional.set_step_mode(model, "m")
    return _scaled(model), [torch.randn(*(() if per_step else (6,)), 16, 12) for _ in range(3)]


class Unrolled(nn.Module):
    """The same in snnTorch: the loop over time in forward, as its tutorials write it."""

    def __init__(self, snn, qif, **options):
        super().__init__()
        self.fc1, self.qif1 = nn.Linear(12, 40), qif(**PAPER | options)
        self.fc2, self.qif2 = nn.Linear(40, 30), qif(beta=0.5, window="unbiased")
        self.fc3, self.lif = nn.Linear(30, 4), snn.Leaky(beta=0.9)

    def forward(self, x_seq):
        mem1, mem2, mem3 = self.qif1.reset_mem(), self.qif2.reset_mem(), self.lif.reset_mem()
        out = []
        for x in x_seq:
            spk1, mem1 = self.qif1(self.fc1(x), mem1)
            spk2, mem2 = self.qif2(self.fc2(spk1), mem2)
            _, mem3 = self.lif(self.fc3(spk2), mem3)
            out.append(mem3)
        return torch.stack(out)


def snntorch(**options):
    snn = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    return _scaled(Unrolled(snn, QIF, **options)), [torch.randn(6, 16, 12) for _ in range(3)]


MODELS = {"spikingjelly": spikingjelly, "snntorch": snntorch}


def _scaled(model):
    """Inputs of the neurons near the threshold's scale, as tdBN would make them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1 / module.in_features**0.5)
                if module.in_features != 12:
                    module.weight.mul_(2.5)
    return model
