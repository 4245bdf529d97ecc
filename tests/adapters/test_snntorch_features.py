"""snnTorch's own features with QIF in Leaky's place; docs/compatibility.md lists every test here."""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("snntorch")
import snntorch as snn
from qif_plugins.adapters.snntorch import QIF, analytic_window
from snntorch import functional as SF
from snntorch import spikegen, surrogate, utils

pytestmark = pytest.mark.host_independent


@pytest.fixture(autouse=True)
def _instances():
    snn.SpikingNeuron.init()


def hidden_network(**options):
    """The tutorials' style with states inside the neurons; the readout stays Leaky."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 30), QIF(init_hidden=True, **options), nn.Linear(30, 10),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.mul_(4)
    return model


def digits(n=256):
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images[:n] / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target[:n])


def loader(n=256, batch_size=64):
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*digits(n)), batch_size=batch_size, shuffle=True, drop_last=True
    )


def tutorials():
    """The module of the benchmark, whose networks are the tutorials'."""
    if "snntorch_tutorials" not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "benchmarks" / "snntorch_tutorials.py"
        spec = importlib.util.spec_from_file_location("snntorch_tutorials", path)
        sys.modules["snntorch_tutorials"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["snntorch_tutorials"])
    return sys.modules["snntorch_tutorials"]


def test_tutorial_3():
    """One neuron under a step current, then 784-1000-10 over rate-coded input, recorded step by step."""
    num_steps = 100
    neuron = QIF(beta=0.8)
    current = torch.cat((torch.zeros(10), torch.ones(90) * 0.35))
    mem = torch.zeros(1)
    spikes = []
    for step in range(num_steps):
        spk, mem = neuron(current[step], mem)
        spikes.append(spk)
    assert 0 < torch.stack(spikes).sum() < num_steps

    fc1, lif1, fc2, lif2 = nn.Linear(784, 1000), QIF(beta=0.99), nn.Linear(1000, 10), snn.Leaky(beta=0.99)
    mem1, mem2 = lif1.init_leaky(), lif2.init_leaky()
    spk_in = spikegen.rate_conv(torch.rand((num_steps, 784))).unsqueeze(1)
    mem2_rec, spk1_rec = [], []
    for step in range(num_steps):
        spk1, mem1 = lif1(fc1(spk_in[step]), mem1)
        _, mem2 = lif2(fc2(spk1), mem2)
        spk1_rec.append(spk1)
        mem2_rec.append(mem2)
    assert torch.stack(spk1_rec).mean() > 0
    assert torch.stack(mem2_rec).shape == (num_steps, 1, 10)
    assert torch.stack(mem2_rec).isfinite().all()


def test_tutorial_5():
    """Shortened to 512 digits; docs/compatibility.md has the accuracies of the whole runs, beside Leaky's."""
    module = tutorials()
    hidden = module.TUTORIALS["tutorial 5"][2]["QIF"]
    assert module.train(module.Tutorial5, hidden, 2, 0, train_size=512, test_size=500) > 50


def test_tutorial_6():
    """Shortened to 256 digits and 10 of the 50 steps."""
    module = tutorials()

    class Short(module.Tutorial6):
        num_steps = 10

    hidden = module.TUTORIALS["tutorial 6"][2]["QIF, analytic window"]
    assert module.train(Short, hidden, 4, 0, train_size=256, test_size=250) > 30


@pytest.mark.filterwarnings("ignore:The module snntorch.backprop will be deprecated")
def test_population_coding():
    from snntorch import backprop

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), QIF(beta=0.9, spike_grad=surrogate.fast_sigmoid(), init_hidden=True),
        nn.Linear(64, 200), QIF(beta=0.9, spike_grad=surrogate.fast_sigmoid(), init_hidden=True, output=True),
    )  # fmt: skip
    loss_fn = SF.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = [
        backprop.BPTT(
            model, loader(), num_steps=2, optimizer=optimizer, criterion=loss_fn, time_var=False, device="cpu"
        )
        for _ in range(4)
    ]
    assert losses[-1] < losses[0]
    images, targets = digits()
    utils.reset(model)
    with torch.no_grad():
        spk_rec = torch.stack([model(images)[0] for _ in range(2)])
    assert SF.accuracy_rate(spk_rec, targets, population_code=True, num_classes=10) > 0.2


def test_regression():
    """Per-neuron beta and threshold, learned; a readout without reset, as the tutorial has it."""

    class Net(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            grad = surrogate.fast_sigmoid()
            self.fc_in = nn.Linear(1, hidden)
            self.lif_in = QIF(torch.rand(hidden), torch.rand(hidden), learn_beta=True, spike_grad=grad)
            self.fc_hidden = nn.Linear(hidden, hidden)
            self.lif_hidden = QIF(torch.rand(hidden), torch.rand(hidden), learn_beta=True, spike_grad=grad)
            self.fc_out = nn.Linear(hidden, 1)
            self.li_out = snn.Leaky(beta=torch.rand(1), learn_beta=True, spike_grad=grad, reset_mechanism="none")

        def forward(self, x):
            mem_1, mem_2, mem_3 = self.lif_in.init_leaky(), self.lif_hidden.init_leaky(), self.li_out.init_leaky()
            out = []
            for step in x:
                spk, mem_1 = self.lif_in(self.fc_in(step), mem_1)
                spk, mem_2 = self.lif_hidden(self.fc_hidden(spk), mem_2)
                _, mem_3 = self.li_out(self.fc_out(spk), mem_3)
                out.append(mem_3)
            return torch.stack(out)

    feature = torch.linspace(0, 0.8, 30).view(30, 1, 1)
    label = torch.sqrt(feature * 0.7)
    model = Net(32)
    betas = model.lif_in.beta.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = nn.functional.mse_loss(model(feature), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.3 * losses[0]
    assert not torch.equal(model.lif_in.beta, betas)


@pytest.mark.filterwarnings("ignore:The module snntorch.backprop will be deprecated")
@pytest.mark.parametrize("algorithm", ["BPTT", "TBPTT", "RTRL"])
def test_backprop(algorithm):
    from snntorch import backprop

    model = hidden_network()
    options = {"K": 2} if algorithm == "TBPTT" else {}
    losses = [
        getattr(backprop, algorithm)(
            model, loader(), optimizer=optimizer, criterion=SF.ce_rate_loss(), num_steps=4, time_var=False, **options
        )
        for optimizer in [torch.optim.Adam(model.parameters(), lr=1e-3)]
        for _ in range(2)
    ]
    assert all(torch.as_tensor(loss).isfinite() for loss in losses)


def test_quantised_state():
    from snntorch.functional import quant

    model = hidden_network(state_quant=quant.state_quant(num_bits=4, lower_limit=-1.0, upper_limit=1.0))
    images, _ = digits(16)
    for _ in range(3):
        out, _ = model(images)
    levels = model[2].mem.unique()
    assert len(levels) <= 16
    out.sum().backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_reset_and_instances():
    model = hidden_network()
    images, _ = digits(8)
    first = model(images)[1].detach()
    model(images)
    utils.reset(model)
    assert torch.equal(model(images)[1], first)
    assert any(instance is model[2] for instance in snn.SpikingNeuron.instances)


def test_state_dict_of_a_leaky_network():
    make = lambda neuron: nn.Sequential(nn.Linear(4, 3), neuron(beta=0.9))  # noqa: E731
    qif, leaky = make(QIF), make(snn.Leaky)
    leaky.load_state_dict(qif.state_dict(), strict=True)
    qif.load_state_dict(leaky.state_dict(), strict=True)
    assert list(qif.state_dict()) == list(leaky.state_dict())


def test_copies():
    neuron = QIF(beta=0.9, init_hidden=True)
    x = 2 * torch.randn(8, 5, requires_grad=True)
    neuron(x)  # with a membrane and a graph behind it, which Leaky does not copy
    for clone in (copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))):
        assert torch.equal(clone(x), copy.deepcopy(neuron)(x))


def test_losses_and_rate_regularisation():
    images, targets = digits(32)
    losses = (SF.ce_rate_loss(), SF.ce_count_loss(), SF.mse_count_loss(0.8, 0.2), SF.ce_max_membrane_loss())
    for loss_fn in losses:
        model = hidden_network()
        spk, mem = (torch.stack(seq) for seq in zip(*(model(images) for _ in range(5)), strict=True))
        loss = loss_fn(mem if "membrane" in type(loss_fn).__name__ else spk, targets)
        (loss + SF.reg.l1_rate_sparsity(1e-5)(spk)).backward()
        assert model[1].weight.grad.isfinite().all()


def test_analytic_window_on_leaky():
    model = nn.Sequential(nn.Linear(5, 4), snn.Leaky(beta=0.9, spike_grad=analytic_window(), init_hidden=True))
    model(4 * torch.randn(20, 5)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_probes():
    from snntorch.functional import probe

    model = hidden_network()
    images, _ = digits(8)
    watch = probe.OutputMonitor(model, instance=QIF)
    model(images)
    assert watch.records[0].shape == (8, 30)
    watch.remove_hooks()


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph is being deprecated")  # which the host calls
def test_nir_export_is_refused():
    pytest.importorskip("nir")
    from snntorch.export_nir import export_to_nir

    model = nn.Sequential(nn.Linear(5, 4), QIF(init_hidden=True))
    with pytest.raises(NotImplementedError, match=r"NIR has no quadratic.*swap\(model, to='lif'\)"):
        export_to_nir(model, torch.randn(1, 5))
    leaky = nn.Sequential(nn.Linear(5, 4), snn.Leaky(torch.full((4,), 0.9), torch.ones(4), init_hidden=True))
    assert export_to_nir(leaky, torch.randn(1, 5), ignore_dims=[0]).nodes  # the host's own neurons still are
