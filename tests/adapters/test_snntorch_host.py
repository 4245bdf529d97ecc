"""``QIF`` in ``snn.Leaky``'s place, as snnTorch's own tests, tutorials and utilities use it."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")

from qif_plugins.adapters.snntorch import QIF, analytic_window  # noqa: E402
from snntorch import functional as SF  # noqa: E402
from snntorch import surrogate, utils  # noqa: E402
from snntorch.functional import probe  # noqa: E402

from qif_plugins import Gaussian, QIFParameters  # noqa: E402

pytestmark = pytest.mark.host_independent


@pytest.fixture(autouse=True)
def _instances():
    """The host keeps every neuron alive in a class attribute."""
    kept = snn.SpikingNeuron.instances
    snn.SpikingNeuron.instances = []
    yield
    snn.SpikingNeuron.instances = kept


def images(count=8):
    return torch.rand(count, 1, 28, 28), torch.randint(10, (count,))


def perceptron(**options):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 20),
        QIF(0.9, init_hidden=True, **options),
        nn.Linear(20, 10),
        QIF(0.9, init_hidden=True, output=True, **options),
    )


class TestTheHostsOwnTests:
    """What snnTorch asks of its Leaky."""

    def test_two_steps_below_the_threshold(self):
        neuron = QIF(0.5, curvature=1e-6)
        mem = neuron.init_leaky()
        spk0, mem0 = neuron(torch.tensor([0.25]), mem)
        spk1, mem1 = neuron(torch.tensor([0.0]), mem0)
        torch.testing.assert_close(mem1, mem0 * 0.5, rtol=1e-4, atol=0)
        assert spk0 == spk1 == 0

    def test_reset_mechanism_can_be_changed(self):
        for value, mechanism in enumerate(("subtract", "zero", "none")):
            neuron = QIF(0.5, reset_mechanism=mechanism)
            assert neuron.reset_mechanism_val == value
            for other, name in enumerate(("subtract", "zero", "none")):
                neuron.reset_mechanism = name
                assert neuron.reset_mechanism_val == other
        with pytest.raises(ValueError, match="reset_mechanism"):
            neuron.reset_mechanism = "half"

    @pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
    def test_hidden_state(self, mechanism):
        neuron = QIF(0.5, init_hidden=True, reset_mechanism=mechanism)
        assert neuron(torch.tensor([0.25])) == neuron(torch.tensor([0.0]))
        with pytest.raises(TypeError, match="init_hidden"):
            neuron(torch.zeros(1), torch.zeros(1))

    def test_graded_spikes_are_learned(self):
        assert QIF(0.5, learn_graded_spikes_factor=True).graded_spikes_factor.requires_grad

    def test_membrane_of_another_shape_starts_at_zero(self):
        neuron, reference = QIF(0.5), QIF(0.5)
        neuron(torch.ones(4, 3))
        assert torch.equal(neuron(torch.ones(2, 3))[1], reference(torch.ones(2, 3))[1])
        assert neuron.reset_mem().shape == (2, 3)

    def test_states_are_those_of_leaky(self):
        ours, theirs = QIF(0.5), snn.Leaky(0.5)
        assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert ours.mem.shape == theirs.mem.shape


class TestUtilities:
    def test_reset_and_detach(self):
        net = perceptron()
        for _ in range(3):
            net(images()[0])
        assert net[2].mem.requires_grad
        assert net[2].mem.any()
        snn.Leaky.detach_hidden()
        assert not net[2].mem.requires_grad
        assert not net[4].mem.requires_grad
        net(images()[0])
        utils.reset(net)
        assert not net[2].mem.any()
        assert not net[4].mem.any()
        net(images()[0])
        QIF.reset_hidden()
        QIF.detach_hidden()
        assert not net[2].mem.any()
        assert snn.SpikingNeuron.instances == [net[2], net[4]]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("algorithm", ["BPTT", "TBPTT", "RTRL"])
    def test_backprop(self, algorithm):
        from snntorch import backprop

        net = perceptron()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        options = {"K": 2} if algorithm == "TBPTT" else {}
        data = [(2 * torch.rand(8, 1, 28, 28), torch.randint(10, (8,)))]
        losses = [
            getattr(backprop, algorithm)(
                net, data, optimizer, SF.ce_rate_loss(), num_steps=6, time_var=False, **options
            ).item()
            for _ in range(5)
        ]
        assert losses[-1] < losses[0]

    def test_monitors(self):
        net = perceptron()
        monitor = probe.OutputMonitor(net, instance=snn.Leaky)
        net(images()[0])
        assert monitor.monitored_layers == ["2", "4"]
        assert monitor["2"][0].shape == (8, 20)
        attribute = probe.AttributeMonitor("mem", False, net, instance=snn.Leaky)
        net(images()[0])
        assert attribute["4"][0].shape == (8, 10)


class TestAfterAForward:
    @pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
    def test_attributes_are_those_of_leaky(self, mechanism):
        leaky, neuron = (cls(0.9, reset_mechanism=mechanism) for cls in (snn.Leaky, QIF))
        assert not hasattr(neuron, "reset")
        x = torch.full((2, 3), 0.4)
        for one in (leaky, neuron):
            mem = one.reset_mem()
            for _ in range(4):
                mem = one(x, mem)[1]
        assert set(dir(leaky)) <= set(dir(neuron))
        assert torch.equal(neuron.reset, leaky.reset)
        assert not neuron.reset.requires_grad
        kept = neuron.mem.clone()
        assert torch.equal(neuron.state_function(x), neuron(x)[1])
        assert not torch.equal(neuron.mem, kept)

    def test_reset_is_the_spike_of_the_step_before(self):
        neuron = QIF(0.9)
        mem, fired = neuron.reset_mem(), torch.zeros(5, 4)
        for x in torch.randn(6, 5, 4) * 1.5:
            before = fired
            fired, mem = neuron(x, mem)
            assert torch.equal(neuron.reset, before)
        assert neuron.reset.any()
        neuron.forward_sequence(torch.randn(2, 5, 4))
        assert not hasattr(neuron, "reset")

    def test_a_membrane_changed_in_place_leaves_no_reset(self):
        neuron, mem = QIF(0.9), torch.ones(2, 3)
        neuron(torch.zeros(2, 3), mem)
        mem.zero_()
        with pytest.raises(RuntimeError, match="changed in place"):
            neuron.reset  # noqa: B018

    def test_a_compiled_step_leaves_no_reset_of_one_before(self):
        torch.compiler.reset()
        neuron, x = QIF(0.9), torch.zeros(2, 3)
        neuron(x, torch.ones(2, 3))
        assert neuron.reset.all()
        torch.compile(neuron, backend="eager", fullgraph=True)(x, torch.zeros(2, 3))
        assert not hasattr(neuron, "reset")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_a_membrane_of_integers(self, dtype):
        mem = torch.tensor([[0, 1, 0]], dtype=dtype)
        leaky, neuron = snn.Leaky(0.5, reset_mechanism="none"), QIF(0.5, curvature=1e-6, reset_mechanism="none")
        x = torch.full((1, 3), 0.25)
        expected, found = leaky(x, mem)[1], neuron(x, mem)[1]
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_a_membrane_that_is_none(self):
        with pytest.raises(TypeError, match=r"mem must be a tensor, got 0\.5"):
            QIF(0.9)(torch.zeros(1, 2), 0.5)


class TestTutorials:
    def test_quickstart_convolutional(self):
        grad = surrogate.fast_sigmoid()
        net = nn.Sequential(
            nn.Conv2d(1, 8, 5),
            nn.MaxPool2d(2),
            QIF(beta=0.9, spike_grad=grad, init_hidden=True),
            nn.Conv2d(8, 16, 5),
            nn.MaxPool2d(2),
            QIF(beta=0.9, spike_grad=grad, init_hidden=True),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
            QIF(beta=0.9, spike_grad=grad, init_hidden=True, output=True),
        )
        data, targets = images()
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        losses = []
        for _ in range(4):
            utils.reset(net)
            spikes = torch.stack([net(data)[0] for _ in range(5)])
            losses.append(SF.ce_rate_loss()(spikes, targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        assert SF.accuracy_rate(spikes, targets) >= 0

    def test_quickstart_with_a_decay_rate_for_every_neuron(self):
        torch.manual_seed(1)
        fc1, lif1 = nn.Linear(784, 30), QIF(beta=0.9)
        fc2, lif2 = nn.Linear(30, 10), QIF(beta=torch.rand(10), learn_beta=True)
        data, targets = images()
        optimizer = torch.optim.Adam([*fc1.parameters(), *fc2.parameters(), *lif2.parameters()], lr=5e-3)
        before, losses = lif2.beta.detach().clone(), []
        for _ in range(4):
            mem1, mem2, mems = lif1.init_leaky(), lif2.init_leaky(), []
            for _ in range(5):
                spk1, mem1 = lif1(fc1(data.flatten(1)), mem1)
                spk2, mem2 = lif2(fc2(spk1), mem2)
                mems.append(mem2)
            losses.append(SF.ce_max_membrane_loss()(torch.stack(mems), targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        assert not torch.equal(lif2.beta, before)
        assert spk2.shape == (8, 10)

    def test_regression(self):
        torch.manual_seed(0)
        grad = surrogate.fast_sigmoid()
        fc_in, fc_hidden, fc_out = nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)
        lif_in = QIF(torch.rand(40), torch.rand(40), learn_beta=True, spike_grad=grad)
        lif_hidden = QIF(torch.rand(40), torch.rand(40), learn_beta=True, learn_threshold=True, spike_grad=grad)
        li_out = snn.Leaky(torch.rand(1), 1.0, learn_beta=True, spike_grad=grad, reset_mechanism="none")
        layers = nn.ModuleList([fc_in, fc_hidden, fc_out, lif_in, lif_hidden, li_out])
        target = torch.linspace(0, 1, 15).square().reshape(-1, 1, 1)
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            mem1, mem2, mem3, mems = lif_in.init_leaky(), lif_hidden.init_leaky(), li_out.init_leaky(), []
            for x in target:
                spk, mem1 = lif_in(fc_in(x), mem1)
                spk, mem2 = lif_hidden(fc_hidden(spk), mem2)
                _, mem3 = li_out(fc_out(spk), mem3)
                mems.append(mem3)
            losses.append(nn.functional.mse_loss(torch.stack(mems), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]

    def test_population_coding(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 30),
            QIF(beta=0.9, spike_grad=surrogate.fast_sigmoid(), init_hidden=True),
            nn.Linear(30, 50),
            QIF(beta=0.9, spike_grad=surrogate.fast_sigmoid(), init_hidden=True, output=True),
        )
        data, targets = images()
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        loss_function = SF.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10)
        losses = []
        for _ in range(5):
            utils.reset(net)
            losses.append(loss_function(torch.stack([net(data)[0]]), targets))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]


class TestCheckpoints:
    def test_load_both_ways(self):
        leaky = nn.Sequential(nn.Linear(3, 4), snn.Leaky(torch.linspace(0.1, 0.9, 4), 0.7, learn_beta=True))
        ours = nn.Sequential(nn.Linear(3, 4), QIF(torch.rand(4), learn_beta=True))
        ours.load_state_dict(leaky.state_dict(), strict=True)
        assert ours[1].qif_parameters == QIFParameters.matching_lif(leaky[1].beta.detach(), float(leaky[1].threshold))
        with torch.no_grad():
            ours[1].beta.fill_(0.25)
        leaky.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(leaky[1].beta, torch.full((4,), 0.25))

    def test_loaded_numbers_are_matched(self):
        ours = QIF(0.9)
        ours(torch.zeros(1, 2))
        ours.load_state_dict(snn.Leaky(0.5, 2.0).state_dict(), strict=True)
        assert ours.qif_parameters == QIFParameters.matching_lif(0.5, 2.0)
        assert ours.surrogate == Gaussian.isometric(QIFParameters.matching_lif(0.5, 2.0))

    def test_the_papers_parameters_take_the_threshold_alone(self):
        ours = QIF(dynamics="paper")
        ours.load_state_dict(snn.Leaky(0.5, 2.0).state_dict(), strict=True)
        assert ours.qif_parameters == QIFParameters(v_threshold=2.0)

    def test_tensors_of_a_checkpoint_that_are_assigned_decide_no_dynamics(self):
        ours = QIF(dynamics="paper")
        ours.load_state_dict(snn.Leaky(0.5, 2.0).state_dict(), strict=True, assign=True)
        assert ours.qif_parameters == QIFParameters(v_threshold=2.0)

    def test_the_reset_mechanism_stays_the_one_constructed(self):
        ours = QIF(0.9)
        ours.load_state_dict(snn.Leaky(0.5, reset_mechanism="subtract").state_dict(), strict=True)
        assert ours.reset_mechanism == "zero"
        assert ours.reset_mechanism_val == 1

    @pytest.mark.parametrize(
        ("neuron", "state", "message"),
        [
            (
                lambda: QIF(dynamics="paper"),
                {"threshold": 5.0},
                r"v_threshold=5 is not below the unstable fixed point 4\.5",
            ),
            (lambda: QIF(0.9), {"beta": 1.0}, "0 <= beta < 1"),
            (lambda: QIF(0.9), {"beta": [0.1, 0.2]}, "size mismatch for beta"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, neuron, state, message):
        ours = neuron()
        before = ours.qif_parameters
        state = ours.state_dict() | {name: torch.tensor(value) for name, value in state.items()}
        with pytest.raises(RuntimeError, match=message):
            ours.load_state_dict(state)
        assert ours.qif_parameters == before


class TestCopies:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_is_a_neuron_of_its_own(self, way):
        def duplicate(net):
            if way == "deepcopy":
                return copy.deepcopy(net)
            if way == "pickle":
                return pickle.loads(pickle.dumps(net))
            buffer = io.BytesIO()
            torch.save(net, buffer)
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)

        net = perceptron(learn_beta=True, spike_grad=surrogate.atan())
        net(images()[0])  # mem carries a graph, which deepcopy refuses
        twin = duplicate(net)
        data = images()[0]
        assert torch.equal(twin(data)[1], net(data)[1])
        assert twin[2] in snn.SpikingNeuron.instances
        utils.reset(twin)
        assert not twin[2].mem.any()
        with torch.no_grad():
            twin[2].beta.fill_(0.1)
        assert net[2].beta == torch.tensor(0.9)

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_are_freed_and_leave_the_hosts_list(self, way):
        net = perceptron()
        net(images()[0])
        entered = list(snn.SpikingNeuron.instances)
        copies = [copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net)) for _ in range(3)]
        copies[0](images()[0])
        snn.Leaky.reset_hidden()
        assert not copies[0][2].mem.any()
        assert len(snn.SpikingNeuron.instances) == len(entered) + 6
        gone = weakref.ref(copies[1][2])
        del copies
        gc.collect()
        assert gone() is None
        assert snn.SpikingNeuron.instances == entered
        snn.Leaky.detach_hidden()

    def test_a_copy_that_is_collected_while_the_host_resets_hides_no_other(self):
        class Collecting(snn.Leaky):
            def __setattr__(self, name, value):
                if name == "mem" and hasattr(self, "mem"):
                    gc.collect()
                super().__setattr__(name, value)

        gc.disable()
        try:
            Collecting(0.9)
            gone = copy.deepcopy(QIF(0.9, init_hidden=True))
            gone.itself = [gone]  # freed by the collector alone
            last = QIF(0.9, init_hidden=True)
            last(torch.ones(2, 3))
            watched = weakref.ref(gone)
            del gone
            assert watched() is not None
            snn.Leaky.reset_hidden()
            assert watched() is None
            assert not last.mem.any()
        finally:
            gc.enable()

    def test_a_copy_outlives_the_hosts_list(self):
        twin = copy.deepcopy(QIF(0.9))
        snn.SpikingNeuron.init()
        assert snn.SpikingNeuron.instances == []
        del twin
        gc.collect()

    def test_copies_keep_what_was_assigned(self):
        net = perceptron()
        net[2].threshold = nn.Parameter(torch.tensor(0.7))
        net[2].curvature = 0.3
        net[4].dynamics = "paper"
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert repr(twin) == repr(net)
            x = images()[0]
            assert torch.equal(copy.deepcopy(twin)(x)[1], copy.deepcopy(net)(x)[1])
            twin[2].curvature = 0.4
            assert net[2].curvature == 0.3

    def test_the_window_for_the_hosts_neurons_can_be_pickled(self):
        leaky = snn.Leaky(0.9, spike_grad=analytic_window(QIFParameters.matching_lif(0.9)))
        twin = pickle.loads(pickle.dumps(leaky))
        x = torch.randn(3, 4)
        assert torch.equal(twin(x)[0], leaky(x)[0])

    def test_subclasses(self):
        class Mine(QIF):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.calls = 0

            def forward(self, input_, mem=None):
                self.calls += 1
                return super().forward(input_, mem)

        neuron = Mine(0.9, 1.0, None, False, True)
        neuron(torch.ones(2, 3))
        assert neuron.calls == 1
