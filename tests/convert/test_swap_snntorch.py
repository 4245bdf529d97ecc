"""``qif_plugins.swap`` on snnTorch networks, against the host's own neurons."""

import copy
import gc
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("snntorch")

import snntorch as snn
from qif_plugins.adapters.snntorch import QIF, SpikeGradient
from snntorch import surrogate, utils

from qif_plugins import Gaussian, QIFParameters, Window, swap
from qif_plugins.convert.snntorch import HOST, LapicqueQIF, RecurrentQIF

pytestmark = pytest.mark.host_independent

X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Batch norm, a learned leak and threshold, recurrence, Lapicque, no leak, and a readout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.bn, self.lif1 = nn.Linear(6, 8), nn.BatchNorm1d(8), snn.Leaky(0.9)
        self.fc2 = nn.Linear(8, 8)
        self.lif2 = snn.Leaky(torch.full((8,), 0.7), torch.full((8,), 0.6), learn_beta=True, learn_threshold=True)
        self.fc3, self.lif3 = nn.Linear(8, 8), snn.RLeaky(0.8, linear_features=8)
        self.fc4, self.lif4 = nn.Linear(8, 8), snn.Lapicque(R=5.0, C=1.0, time_step=0.5, threshold=0.4)
        self.fc5, self.lif5 = nn.Linear(8, 8), snn.Leaky(1.0, spike_grad=surrogate.fast_sigmoid(slope=10))
        self.fc6, self.out = nn.Linear(8, 3), snn.Leaky(0.9)

    def forward(self, x, steps=4):
        mem1, mem2, (spk3, mem3) = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.init_rleaky()
        mem4, mem5, mem6 = self.lif4.init_lapicque(), self.lif5.init_leaky(), self.out.reset_mem()
        record = []
        for _ in range(steps):
            spk, mem1 = self.lif1(self.bn(self.fc1(3 * x)), mem1)
            spk, mem2 = self.lif2(self.fc2(3 * spk), mem2)
            spk3, mem3 = self.lif3(self.fc3(3 * spk), spk3, mem3)
            spk, mem4 = self.lif4(self.fc4(3 * spk3), mem4)
            spk, mem5 = self.lif5(self.fc5(3 * spk), mem5)
            spk, mem6 = self.out(self.fc6(spk), mem6)
            record.append(mem6)
        return torch.stack(record)


HIDDEN = ("lif1", "lif2", "lif3", "lif4", "lif5")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("example", [None, X], ids=["by order", "by data flow"])
def test_each_neuron_gets_the_parameters_that_its_place_asks_for(example):
    net = Net()
    report = swap(net, example_input=example)
    assert [type(getattr(net, n)) for n in HIDDEN] == [QIF, QIF, RecurrentQIF, LapicqueQIF, QIF]
    assert type(net.out) is snn.Leaky
    assert net.lif1.dynamics == "monotone"
    assert net.lif1.window == "isometric"  # fed by a norm
    assert net.lif3.derived_window is None
    assert net.lif2.dynamics == "monotone"
    assert net.lif3.qif_parameters.u2 == pytest.approx(QIFParameters.matching_lif(0.8).u2)
    matched = QIFParameters.matching_lif(1 - 0.5 / 5, v_threshold=0.4)
    assert net.lif4.qif_parameters.a == pytest.approx(matched.a)
    assert net.lif4.qif_parameters.v_threshold == pytest.approx(0.4)
    no_leak = QIF(beta=torch.tensor(0.95), dynamics="monotone", reset_mechanism="subtract")
    assert net.lif5.qif_parameters == no_leak.qif_parameters
    assert [row.name for row in report.left] == ["out"]
    assert "reads out" in report.left[0].why
    net(X).sum().backward()
    learned = [net.lif2.beta, net.lif2.threshold, net.lif3.recurrent.weight, net.fc1.weight]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


def test_lapicque_scales_its_input():
    lapicque = snn.Lapicque(R=5.0, C=2.0, time_step=0.5)
    swap(lapicque)
    plain = QIF(beta=1 - 0.5 / 10)
    spk, mem = lapicque(X)
    expected_spk, expected_mem = plain(X * 0.25)
    torch.testing.assert_close(mem, expected_mem)
    assert torch.equal(spk, expected_spk)
    torch.testing.assert_close(
        lapicque.forward_sequence(X.repeat(3, 1, 1), torch.zeros(4, 6))[1],
        plain.forward_sequence(X.repeat(3, 1, 1) * 0.25, torch.zeros(4, 6))[1],
    )


@pytest.mark.parametrize("kind", [{"linear_features": 6}, {"all_to_all": False, "V": 0.5}])
@pytest.mark.parametrize("hidden", [False, True])
def test_recurrence_adds_the_last_spikes_to_the_input(kind, hidden):
    neuron = snn.RLeaky(0.8, init_hidden=hidden, reset_mechanism="zero", **kind)
    keys = set(neuron.state_dict())
    swap(neuron)
    assert set(neuron.state_dict()) == keys
    plain = QIF(0.8, dynamics=neuron.dynamics)
    spk = mem = torch.zeros(4, 6)
    xs = 2 * torch.rand(5, 4, 6)
    neuron.reset_mem()
    for x in xs:
        out = neuron(x) if hidden else neuron(x, spk, mem)
        expected, mem_expected = plain(x + neuron.recurrent(spk), mem)
        spk, mem = expected, mem_expected
        assert torch.equal(out if hidden else out[0], expected)
    neuron.reset_mem()
    stepped, mems = neuron.forward_sequence(xs)
    assert torch.equal(stepped[-1], spk)
    torch.testing.assert_close(mems[-1], mem)
    with pytest.raises(ValueError, match="at least one"):
        neuron.forward_sequence(xs[:0])
    utils.reset(nn.Sequential(neuron))
    assert not neuron.spk.any()
    assert not neuron.mem.any()


def test_options_are_carried_over():
    spike_grad = surrogate.atan(alpha=3.0)
    leaky = snn.Leaky(
        0.9, threshold=0.7, spike_grad=spike_grad, init_hidden=True, reset_mechanism="zero", output=True,
        graded_spikes_factor=2.0, learn_graded_spikes_factor=True, reset_delay=False,
    )  # fmt: skip
    net = nn.Sequential(nn.Linear(6, 6), leaky)
    net.double().eval()
    factor = leaky.graded_spikes_factor
    swap(net, readout="swap", window="keep")
    assert (leaky.init_hidden, leaky.output, leaky.reset_mechanism, leaky.reset_delay) == (True, True, "zero", False)
    assert leaky.spike_grad.surrogate.alpha == 3.0
    assert leaky.graded_spikes_factor is factor
    assert leaky.threshold.item() == pytest.approx(0.7)
    assert not leaky.training
    spk, mem = net(X.double())
    assert spk.dtype == mem.dtype == torch.float64
    assert set(spk.unique().tolist()) <= {0.0, 2.0}
    swap(net, to="lif")
    assert leaky.spike_grad is spike_grad


def test_resets():
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.9), nn.Linear(6, 6), snn.Leaky(0.9, reset_mechanism="none"))
    report = swap(net, readout="swap")
    assert net[1].reset_mechanism == "subtract"
    assert net[1].qif_parameters.reset == "soft"
    assert "instead of subtracting" not in str(report)
    assert "never resets" in report.left[0].why
    with pytest.warns(UserWarning, match=r"no longer bounds the membrane.*Assign reset_mechanism='zero'"):
        net[1].dynamics = "lif"
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.9))
    report = swap(net, readout="swap", dynamics="lif")
    assert net[1].reset_mechanism == "zero"
    assert "instead of subtracting" in report.changed[0].why
    swap(net, to="lif")
    assert net[1].reset_mechanism == "subtract"
    assert net[1].reset_mechanism_val == 0
    swap(net, readout="swap", dynamics="lif", reset_mechanism="subtract")
    assert net[1].reset_mechanism == "subtract"
    swap(net, to="lif")
    swap(net, readout="swap", reset_mechanism="zero")
    assert net[1].reset_mechanism == "zero"


def test_there_and_back_leaves_the_network_bit_for_bit():
    net, instances = Net(), list(snn.SpikingNeuron.instances)
    net(X)
    state = copy.deepcopy(net.state_dict())
    net.eval()
    before = net(X)
    parameters = dict(net.named_parameters())
    swap(net, example_input=X)
    assert net.state_dict().keys() == state.keys()
    assert all(parameters[name] is p for name, p in net.named_parameters())
    assert snn.SpikingNeuron.instances == instances
    net.load_state_dict(state, strict=True)
    net(X)
    swap(net, to="lif")
    assert equal(net.state_dict(), state)
    assert torch.equal(net(X), before)
    assert snn.SpikingNeuron.instances == instances


def test_a_swapped_network_copies_pickles_and_goes_back():
    net = Net()
    before = net.eval()(X)
    swap(net)
    net(X)
    with torch.no_grad():
        net(X)
    net.out.reset_mem()
    twin = pickle.loads(pickle.dumps(nn.ModuleList([copy.deepcopy(getattr(net, name)) for name in HIDDEN])))
    assert [type(m) for m in twin] == [QIF, QIF, RecurrentQIF, LapicqueQIF, QIF]
    swap(twin, to="lif")
    assert [type(m) for m in twin] == [snn.Leaky, snn.Leaky, snn.RLeaky, snn.Lapicque, snn.Leaky]
    for name, module in zip(HIDDEN, twin, strict=True):
        setattr(net, name, module)
    torch.testing.assert_close(net(X), before)


def set_after_the_swap(net):
    """What scripts set on their neurons, in a network that is built."""
    net.lif1.reset_mechanism, net.lif1.output, net.lif1.note = "subtract", True, "mine"
    net.lif1.beta, net.lif1.threshold = nn.Parameter(torch.tensor(0.5)), torch.tensor(0.75)
    net.lif2.inhibition = True
    net.lif2.beta.requires_grad_(False)
    net.lif2.threshold.data.fill_(0.3)
    net.lif3.reset_delay, net.lif4.state_quant = False, torch.round
    net.lif4.register_buffer("seen", torch.ones(2), persistent=False)
    net.lif5.spike_grad = surrogate.atan(alpha=3.0)


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_set_between_there_and_back_stays_set(copied):
    net = Net().eval()
    net.lif1 = snn.Leaky(0.9, reset_mechanism="zero")
    lif = copy.deepcopy(net)
    swap(net, dynamics="lif", example_input=X)
    net = copy.deepcopy(net) if copied else net
    set_after_the_swap(net)
    set_after_the_swap(lif)
    net(X)
    swap(net, to="lif")
    assert equal(net.state_dict(), lif.state_dict())
    assert dict(net.named_parameters()).keys() == dict(lif.named_parameters()).keys()
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in lif.parameters()]
    plain = (
        "reset_mechanism",
        "output",
        "inhibition",
        "reset_delay",
        "state_quant",
        "init_hidden",
        "surrogate_disable",
    )
    for name in HIDDEN:
        one, other = getattr(net, name), getattr(lif, name)
        assert [getattr(one, n) for n in plain if n in vars(other)] == [
            getattr(other, n) for n in plain if n in vars(other)
        ]
        assert one._non_persistent_buffers_set == other._non_persistent_buffers_set
        assert not one.mem.numel()
    assert net.lif1.note == "mine"
    # The host's own setter leaves the function that the constructor chose; the neuron that went back resets as said.
    lif.lif1.state_function = lif.lif1._base_sub
    torch.testing.assert_close(net(X), lif(X), rtol=0, atol=0)
    out = [x.lif5.spike_grad(torch.tensor(0.5, requires_grad=True)) for x in (net, lif)]
    assert out[0] == out[1] == 1


def test_a_leak_that_is_assigned_after_the_swap_is_matched_unless_the_papers_map_was_asked_for():
    x = torch.rand(8, 6)
    for dynamics in ("auto", "paper"):
        net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), snn.Leaky(0.9, init_hidden=True), nn.Linear(6, 2))
        swap(net, dynamics=dynamics, example_input=x)
        assert net[2].dynamics == ("monotone" if dynamics == "auto" else "paper")
        if dynamics == "paper":
            with pytest.raises(ValueError, match="would have no effect"):
                net[2].beta = torch.tensor(0.5)
            continue
        net[2].beta = torch.tensor(0.5)
        assert net[2].qif_parameters == QIF(0.5, dynamics="monotone", reset_mechanism="subtract").qif_parameters


def test_a_threshold_chosen_at_the_swap_goes_with_it_unless_it_was_changed():
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.9), nn.Linear(6, 6), snn.Leaky(0.9), nn.Linear(6, 2))
    swap(net, threshold=0.75)
    net[3].threshold = torch.tensor(0.5)
    swap(net, to="lif")
    assert [net[i].threshold.item() for i in (1, 3)] == [1.0, 0.5]


def test_paper_dynamics_keep_a_learned_leak_for_the_checkpoint_only():
    net = Net()
    swap(net, dynamics="paper")
    assert net.lif2.dynamics == "paper"
    assert not net.lif2.beta.requires_grad
    assert "lif2.beta" in net.state_dict()
    swap(net, to="lif")
    assert net.lif2.beta.requires_grad


def test_batch_norm_becomes_tdbn():
    net = Net()
    report = swap(net, norm="tdbn")
    assert type(net.bn).__name__ == "TokenTDBatchNorm1d"
    assert report.changed[-1].name == "bn"
    assert net(X).shape == (4, 4, 3)


def test_a_model_on_the_meta_device():
    net = Net().to("meta")
    with pytest.raises(ValueError, match="load the checkpoint, then swap"):
        swap(net)
    assert type(net.lif1) is snn.Leaky


def test_subclasses_and_other_models():
    class OnlyConstructor(snn.Leaky):
        def __init__(self):
            super().__init__(beta=0.6)

    class OwnCode(snn.Leaky):
        def fire(self, mem):
            return super().fire(mem)

    net = nn.Sequential(
        nn.Linear(6, 6), OnlyConstructor(), nn.Linear(6, 6), OwnCode(0.9), nn.Linear(6, 6), snn.Synaptic(0.9, 0.8),
        nn.Linear(6, 6),
    )  # fmt: skip
    report = swap(net)
    assert type(net[1]) is QIF
    own, other = (row.why for row in report.left)
    assert own.startswith("has code of its own (fire), which a swap would lose; for QIF derive its class from the QIF")
    assert other == "another neuron model"
    swap(net, to="lif")
    assert type(net[1]) is OnlyConstructor


def test_wrong_names_and_values_change_nothing():
    net = Net()
    gc.collect()  # networks of other tests leave the list whenever they are freed
    instances = list(snn.SpikingNeuron.instances)
    with pytest.raises(TypeError, match=r"no argument tau to pass on.* swap takes dynamics, window, norm.*threshold"):
        swap(net, tau=2.0)
    with pytest.raises(TypeError, match=r"no argument windows to pass on; did you mean window\?"):
        swap(net, windows="paper")
    with pytest.raises(ValueError, match=r"lif1.*threshold"):
        swap(net, dynamics="paper", threshold=5.0)
    assert type(net.lif1) is snn.Leaky
    assert snn.SpikingNeuron.instances == instances
    swap(net, beta=0.5)
    assert net.lif1.qif_parameters == QIFParameters.matching_lif(0.5, reset="soft", rebound=False)


def test_hidden_spikes_that_are_returned_too_are_no_readout():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(6, 8), snn.Leaky(0.9), nn.Linear(8, 3), snn.Leaky(0.9)

        def forward(self, x):
            mem1, mem2, record = self.lif1.init_leaky(), self.lif2.init_leaky(), []
            for _ in range(3):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                record.append((spk2, mem2, spk1))
            return tuple(torch.stack(one) for one in zip(*record, strict=True))

    net = Two()
    report = swap(net, example_input=X)
    assert [row.name for row in report.changed] == ["lif1"]
    assert [row.name for row in report.left] == ["lif2"]


def test_a_recurrent_readout_is_still_one():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1, self.fc2 = nn.Linear(6, 8), snn.Leaky(0.9), nn.Linear(8, 3)
            self.out = snn.RLeaky(0.9, linear_features=3)

        def forward(self, x):
            mem1, (spk2, mem2) = self.lif1.init_leaky(), self.out.init_rleaky()
            for _ in range(3):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.out(self.fc2(spk1), spk2, mem2)
            return spk2, spk1

    assert [row.name for row in swap(Recurrent(), example_input=X).left] == ["out"]


def test_a_frozen_learned_leak_is_called_frozen():
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.9, learn_beta=True), nn.Linear(6, 2))
    net[1].beta.requires_grad_(False)
    assert "its leak beta stays frozen" in str(swap(net))


@pytest.mark.parametrize("read", ["mem", "hook"])
def test_a_hidden_state_that_is_read_by_name_is_a_readout(read):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(6, 8), snn.Leaky(0.9, init_hidden=True)
            self.fc2, self.lif2 = nn.Linear(8, 3), snn.Leaky(0.9, init_hidden=True)

        def forward(self, x):
            utils.reset(self)
            for _ in range(3):
                self.lif2(self.fc2(self.lif1(self.fc1(x))))
            return self.lif2.mem if read == "mem" else None

    net, seen = Net(), []
    net.lif2.register_forward_hook(lambda module, args, out: seen.append(module.mem))
    report = swap(net, example_input=X)
    assert [row.name for row in report.changed] == ["lif1"]
    assert report.left[0].why.startswith("reads out, by data flow")


NEURONS = {
    "subtracting": lambda: snn.Leaky(0.8, threshold=0.7),
    "zeroed": lambda: snn.Leaky(0.8, threshold=0.7, reset_mechanism="zero"),
    "never reset": lambda: snn.Leaky(0.5, reset_mechanism="none"),
    "Lapicque": lambda: snn.Lapicque(R=5.0, C=2.0, time_step=0.5, threshold=0.3),
    "matched": lambda: QIF(0.8),
    "subtracting QIF": lambda: QIF(0.8, a=0.01, reset_mechanism="subtract", dynamics=None),
}


@pytest.mark.parametrize("name", [*NEURONS, "swapped Lapicque"])
def test_the_expected_rate_is_the_hosts(name):
    neuron = NEURONS.get(name, NEURONS["Lapicque"])()
    if name == "swapped Lapicque":
        swap(neuron)
    x = torch.randn(16, 1000)
    mem, spikes = torch.zeros(1000), []
    with torch.no_grad():
        for step in x:
            spk, mem = neuron(step, mem)
            spikes.append(spk)
    expected = torch.stack(spikes).mean().item()
    assert 0 < expected < 1
    assert HOST.dynamics(neuron).rate(x) == pytest.approx(expected, abs=2e-3)


def test_an_infinite_threshold_stays_lif():
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.9), nn.Linear(6, 3), snn.Leaky(0.9, threshold=float("inf")))
    report = swap(net, readout="swap", dynamics="paper")
    assert [type(net[i]) for i in (1, 3)] == [QIF, snn.Leaky]
    assert "threshold is not finite" in report.left[0].why


def test_a_swap_that_changes_the_firing_regime_says_so():
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), snn.Leaky(0.9, threshold=0.25), nn.Linear(32, 3))
    with torch.no_grad():
        net[1].weight.fill_(0.1)
    row = swap(net, dynamics="paper").changed[0]
    assert "gain" not in row.why
    assert "so it spikes less (at the moments of 1)" in row.why
    before, after = row.rate
    assert before > 2 * after > 0


class Loop(nn.Module):
    """A recurrent network, with the loop over time in its forward pass."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 32), nn.BatchNorm1d(32)
        self.rec = snn.RLeaky(0.9, linear_features=32, init_hidden=True)
        self.fc2, self.lif, self.out = nn.Linear(32, 8), snn.Leaky(0.9), nn.Linear(8, 2)

    def forward(self, x_seq):
        snn.utils.reset(self)
        mem, outputs = self.lif.reset_mem(), []
        for x in x_seq:
            spk, mem = self.lif(self.fc2(self.rec(self.bn(self.fc(x)))), mem)
            outputs.append(self.out(spk))
        return torch.stack(outputs)


def test_rates_are_those_of_the_network_recurrent_input_included():
    def rates(net):
        found = {"rec": [], "lif": []}
        hooks = [
            net.get_submodule(name).register_forward_hook(
                lambda m, a, y, seen=seen: seen.append((y[0] if isinstance(y, tuple) else y).mean().item())
            )
            for name, seen in found.items()
        ]
        net(x)
        for hook in hooks:
            hook.remove()
        return {name: sum(seen) / len(seen) for name, seen in found.items()}

    torch.manual_seed(0)
    net, x = Loop(), torch.randn(12, 40, 6)
    before = rates(copy.deepcopy(net))
    report = swap(net, example_input=x)
    after = rates(net)
    assert [row.name for row in report.changed] == ["rec", "lif"]
    for row in report.rows:
        assert row.rate == pytest.approx((before[row.name], after[row.name]))


def test_a_layer_that_was_silent_with_leaky_is_told_of_and_a_readout_decoded_by_its_membrane_is_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(6, 8), snn.Leaky(0.9)
            self.fc2, self.lif2 = nn.Linear(8, 3), snn.Leaky(0.9)

        def forward(self, x_seq):
            mem1, mem2, mems = self.lif1.reset_mem(), self.lif2.reset_mem(), []
            for x in x_seq:
                spikes, mem1 = self.lif1(self.fc1(x), mem1)
                _, mem2 = self.lif2(self.fc2(spikes), mem2)
                mems.append(mem2)
            return torch.stack(mems)

    net, x = Net(), 0.01 * torch.randn(4, 5, 6)
    nn.init.zeros_(net.fc1.bias), nn.init.zeros_(net.fc2.bias)
    hidden, readout = swap(net, example_input=x).rows
    assert hidden.rate == (0, 0)
    assert "silent with LIF, too (0 and 0 spikes a step, measured on example_input)" in hidden.why
    assert (readout.changed, readout.rate) == (False, (0, 0))
    assert "silent" not in readout.why
    with torch.no_grad():
        net.fc1.weight.fill_(math.nan)
    swap(net, to="lif")
    row = swap(net, example_input=x).rows[0]
    assert row.rate is None
    assert "WARNING: its input has NaN or infinite values" in row.why


def test_rates_without_an_example_say_what_they_leave_out():
    net = Loop()
    nn.init.constant_(net.bn.weight, 0.05)
    row = swap(net, readout="swap", dynamics="paper", threshold=0.1).changed[0]
    assert "(at the moments of bn, without what its recurrent input adds)" in row.why
    assert row.rate[1] > 2 * row.rate[0]
    net = nn.Sequential(nn.Linear(4, 4), snn.Leaky(0.9), nn.Linear(4, 2))
    assert "example_input=... measures it" in swap(net, dynamics="paper", threshold=2.0).changed[0].why


def test_a_network_that_takes_one_step_a_call_is_called_for_several():
    """One step from rest would not show what a leak adds up."""
    net = nn.Sequential(nn.Linear(4, 4), snn.Leaky(0.9, init_hidden=True), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4)), net[0].bias.zero_()
    row = swap(net, example_input=torch.full((2, 4), 0.25)).changed[0]
    assert row.rate[0] == pytest.approx(3 / 16)  # 0.25, 0.475, ... exceeds 1 at the fifth step, less the threshold


BUILT = {
    "beta": ({"beta": 0.8, "threshold": 0.7}, {"beta": 0.8, "threshold": 0.7, "reset_mechanism": "zero"}),
    "dynamics": (
        {"beta": 0.6, "dynamics": "lif", "output": True}, {"beta": 0.6, "output": True, "reset_mechanism": "zero"},
    ),
    "learned": (
        {"beta": torch.full((6,), 0.6), "learn_beta": True, "learn_threshold": True, "reset_mechanism": "subtract"},
        {"beta": torch.full((6,), 0.6), "learn_beta": True, "learn_threshold": True, "reset_mechanism": "subtract"},
    ),
    "surrogate": (
        {"beta": 0.6, "spike_grad": surrogate.fast_sigmoid(slope=7), "inhibition": True, "reset_delay": False},
        {
            "beta": 0.6, "spike_grad": surrogate.fast_sigmoid(slope=7), "inhibition": True, "reset_delay": False,
            "reset_mechanism": "zero",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize(("qif", "lif"), BUILT.values(), ids=BUILT)
def test_a_network_built_with_qif_goes_back_by_its_leak(qif, lif, init_hidden):
    net = nn.Sequential(nn.Linear(6, 6), QIF(**qif, init_hidden=init_hidden), nn.Linear(6, 3))
    expected = snn.Leaky(**lif, init_hidden=init_hidden)
    net[1].label = "mine"
    net[:2](X)
    instances = len(snn.SpikingNeuron.instances)
    state, parameters = copy.deepcopy(net.state_dict()), dict(net.named_parameters())
    swap(net, to="lif")
    assert type(net[1]) is snn.Leaky
    assert equal(net.state_dict(), state)
    assert all(parameters[name] is p for name, p in net.named_parameters())
    assert len(snn.SpikingNeuron.instances) == instances
    assert net[1].label == "mine"
    utils.reset(net)
    expected.reset_mem()
    for x in 2 * torch.rand(4, 4, 6):
        x.requires_grad_()
        out = [module(x) if init_hidden else module(x, torch.zeros(4, 6)) for module in (net[1], expected)]
        spikes = [value if isinstance(value, torch.Tensor) else value[0] for value in out]
        assert torch.equal(*spikes)
        gradients = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in spikes]
        torch.testing.assert_close(*gradients)
    swap(net)
    assert type(net[1]) is QIF


def test_the_report_names_the_gain_that_a_neuron_built_with_one_loses():
    net = nn.Sequential(nn.Linear(6, 6), QIF(0.6, input_gain=2.0), nn.Linear(6, 6), QIF(0.6), nn.Linear(6, 3))
    gained, plain = swap(net, to="lif").rows
    assert "input gain 1, LIF's, instead of 2" in gained.why
    assert "gain" not in plain.why


def test_neurons_built_without_a_leak_stay_qif_with_the_reason():
    net = nn.Sequential(nn.Linear(6, 6), QIF(dynamics="paper"), nn.Linear(6, 6), QIF(a=0.3), nn.Linear(6, 6), QIF(0.9))
    report = swap(net, to="lif")
    assert [row.name for row in report.changed] == ["5"]
    assert ["the paper's parameters" in report.left[0].why, "its own a, u1, u2" in report.left[1].why] == [
        True,
        True,
    ]
    with pytest.raises(ValueError, match="there is no neuron to go back to"):
        swap(net[:4], to="lif")


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph is being deprecated")  # which the host calls
def test_the_advice_of_the_nir_exporter_can_be_followed():
    nir = pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    from snntorch.export_nir import export_to_nir

    net = nn.Sequential(nn.Linear(6, 4), QIF(torch.full((4,), 0.9), torch.ones(4), init_hidden=True))
    with pytest.raises(NotImplementedError, match=r"swap\(model, to='lif'\)"):
        export_to_nir(net, torch.randn(1, 6), ignore_dims=[0])
    swap(net, to="lif")
    nodes = export_to_nir(net, torch.randn(1, 6), ignore_dims=[0]).nodes.values()
    assert [node for node in nodes if isinstance(node, nir.LIF)]


@pytest.mark.parametrize(("name", "value"), [("beta", torch.tensor(0.3)), ("curvature", 0.3)])
def test_what_is_assigned_of_the_leak_after_the_swap_does_not_bring_the_rebound_back(name, value):
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(beta=0.5, init_hidden=True), nn.Linear(6, 2))
    swap(net)
    setattr(net[1], name, value)
    assert (
        net[1].qif_parameters
        == QIF(**{"beta": 0.5, "dynamics": "monotone", "reset_mechanism": "subtract", name: value}).qif_parameters
    )


def test_a_surrogate_that_passes_little_of_the_gradient_on_is_replaced_without_a_norm_as_well():
    def swapped(spike_grad, **options):
        model = nn.Sequential(nn.Linear(8, 8), snn.Leaky(0.9, spike_grad=spike_grad, init_hidden=True), nn.Linear(8, 2))
        return model[1], str(swap(model, **options))

    node, report = swapped(surrogate.fast_sigmoid(slope=25))
    assert node.derived_window == "isometric"
    assert "would pass on only 0.08 of the gradient; window='keep' keeps it" in report  # 2/25, the area under it
    assert node.window_scale == 1
    for kept, options in (
        (surrogate.fast_sigmoid(slope=25), {"window": "keep"}),
        (surrogate.fast_sigmoid(slope=3), {}),  # an area of 2/3
        (surrogate.atan(), {}),
        (surrogate.sigmoid(slope=25), {}),
        (surrogate.atan(alpha=0.05), {}),  # wide, and of an area of 1 as well
        (surrogate.sigmoid(slope=0.1), {}),
        (surrogate.spike_rate_escape(), {}),  # whose derivative the kernels do not have
    ):
        node, _ = swapped(kept, **options)
        assert node.derived_window is None
        assert node.spike_grad(torch.zeros(1)).shape == (1,)


@pytest.mark.parametrize(
    ("beta", "layers", "kept"), [(0.75, 2, False), (0.8, 2, True), (0.95, 12, True), (0.95, 13, False), (1.0, 2, False)]
)
def test_under_a_norm_a_neuron_of_long_memory_keeps_its_surrogate_unless_many_follow_one_another(beta, layers, kept):
    row = [
        m for _ in range(layers) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), snn.Leaky(beta=beta, init_hidden=True))
    ]
    model = nn.Sequential(*row, nn.Linear(4, 2))
    swap(model)
    assert (model[2].derived_window is None) == kept
    assert model[2].spike_grad(torch.zeros(1)).shape == (1,)
    sharp = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), snn.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(25)), nn.Linear(4, 2)
    )
    swap(sharp)
    assert sharp[2].derived_window == "isometric"  # its area is below one half


@pytest.mark.parametrize(
    "spike_grad",
    [
        surrogate.fast_sigmoid(np.float32(25)),
        surrogate.fast_sigmoid(torch.tensor(25.0)),
        lambda x: surrogate.FastSigmoid.apply(x, 25),
        surrogate.custom_surrogate(lambda x, grad, out: grad / (25 * x.abs() + 1) ** 2),
        SpikeGradient(Gaussian(0.1, 0.1)),
        SpikeGradient(Window(-0.1, 0.1)),
    ],
    ids=["NumPy", "tensor", "lambda", "custom", "Gaussian", "Window"],
)
def test_a_surrogate_of_small_area_is_replaced_however_it_is_written(spike_grad):
    net = nn.Sequential(nn.Linear(8, 8), snn.Leaky(0.9, spike_grad=spike_grad, init_hidden=True), nn.Linear(8, 2))
    assert "of the gradient; window='keep' keeps it" in str(swap(net))
    assert net[1].derived_window == "isometric"


def test_the_report_names_a_large_area():
    def report(spike_grad):
        return str(swap(nn.Sequential(nn.Linear(8, 8), snn.Leaky(0.9, spike_grad=spike_grad), nn.Linear(8, 2))))

    assert "spike_rate_escape stays, whose area is 50 within 20 thresholds" in report(surrogate.spike_rate_escape())
    assert "area" not in report(surrogate.atan())


OUTSIDE = {
    "no leak": (lambda: snn.Leaky(1, threshold=1, init_hidden=True), 0.95),
    "above 1": (lambda: snn.Leaky(1.5, reset_mechanism="zero", init_hidden=True), 0.95),
    "negative": (lambda: snn.Leaky(-0.1, init_hidden=True), 0.0),
    "each": (lambda: snn.Leaky(torch.tensor([-0.1, 0.5, 1.0] * 2), init_hidden=True), torch.tensor([0, 0.5, 0.95] * 2)),
    "recurrent": (lambda: snn.RLeaky(-0.1, all_to_all=False, init_hidden=True), 0.0),
    "Lapicque": (lambda: snn.Lapicque(R=1e9, C=1e9, time_step=1.0, init_hidden=True), 0.95),
}


@pytest.mark.parametrize(("leaky", "leak"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_leak_that_no_map_matches_becomes_the_nearest_and_the_state_dict_keeps_it(leaky, leak):
    net = nn.Sequential(nn.Linear(6, 6), leaky(), nn.Linear(6, 2))
    reset, before = net[1].reset_mechanism, copy.deepcopy(net.state_dict())
    report = str(swap(net))
    assert ("no leak, matched at 0.95" in report) == bool((torch.as_tensor(leak) == 0.95).any())
    expected = QIF(beta=torch.as_tensor(leak), dynamics="monotone", reset_mechanism=reset)
    assert net[1].qif_parameters == expected.qif_parameters
    assert net[1].reset_mechanism == reset
    assert equal(net.state_dict(), before)
    net.load_state_dict(before)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    copied[1].threshold = copied[1].threshold.float() * 1.5
    assert copied(X).isfinite().all()
    net(X)
    swap(net, to="lif")
    assert equal(net.state_dict(), before)
    torch.testing.assert_close(net[1].beta, leaky().beta)


def test_after_a_swap_an_assigned_leak_is_held_to_the_rule_of_the_constructor():
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(1.0, init_hidden=True), nn.Linear(6, 2))
    swap(net)
    assert "beta=0.95" in repr(net[1])
    parameters = net[1].qif_parameters
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        net[1].beta = torch.tensor(1.0)
    assert net[1].qif_parameters == parameters
    net[1].beta = torch.tensor(0.25)
    assert "beta=0.25" in repr(net[1])


def test_a_membrane_that_changes_its_sign_at_every_step_stays_lif():
    circuit = snn.Lapicque(R=1.0, C=0.5, time_step=1.0, init_hidden=True)
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(0.5, init_hidden=True), nn.Linear(6, 6), circuit, nn.Linear(6, 2))
    report = swap(net)
    assert [type(net[1]), type(net[3])] == [QIF, snn.Lapicque]
    assert "its leak 1 - time_step/RC is -1" in report.left[0].why


def test_a_recurrent_neuron_keeps_a_surrogate_of_small_area():
    recurrent = snn.RLeaky(beta=0.9, all_to_all=True, linear_features=6, spike_grad=snn.surrogate.fast_sigmoid())
    net = nn.Sequential(nn.Linear(6, 6), recurrent, nn.Linear(6, 2))
    report = swap(net)
    assert type(net[1]).__name__ == "RecurrentQIF"
    assert "FastSigmoid(slope=25" in repr(net[1].spike_grad)
    assert "fast_sigmoid stays" in report.changed[0].why
