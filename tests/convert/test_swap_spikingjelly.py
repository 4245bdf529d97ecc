"""``qif_plugins.swap`` on SpikingJelly networks, against the host's own nodes."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")

from qif_plugins.adapters.spikingjelly import AnalyticWindow, ParametricQIFNode, QIFNode
from spikingjelly.activation_based import functional, layer, monitor, neuron, surrogate

from qif_plugins import QIFParameters, Window, swap
from qif_plugins.convert.leak import LeakQIFNode
from qif_plugins.convert.spikingjelly import HOST
from qif_plugins.neuron.norm import TDBatchNorm1d

HAS_BACKENDS = "backend" in vars(neuron.LIFNode()) or hasattr(neuron.LIFNode(), "_backend")


def network(step_mode="m"):
    """Convolution with batch norm, convolution without, learned leak, and a readout."""
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, bias=False), layer.BatchNorm2d(4),
        neuron.LIFNode(tau=3.0, detach_reset=True, surrogate_function=surrogate.ATan()),
        layer.Conv2d(4, 4, 3), neuron.LIFNode(4.0, decay_input=False, v_threshold=0.5),
        layer.Conv2d(4, 4, 3), neuron.ParametricLIFNode(), layer.AvgPool2d(2, 2), layer.Flatten(),
        layer.Linear(4 * 3 * 3, 5), neuron.LIFNode(v_reset=None),
    )  # fmt: skip
    functional.set_step_mode(net, step_mode)
    return net


X = torch.rand(3, 2, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def run(net, x=X):
    functional.reset_net(net)
    return net(x)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("example", [None, X], ids=["by order", "by data flow"])
def test_each_neuron_gets_the_parameters_that_its_place_asks_for(example):
    net = network()
    report = swap(net, example_input=example)
    assert [type(net[i]) for i in (2, 4, 6, 10)] == [QIFNode, QIFNode, LeakQIFNode, neuron.LIFNode]
    # Fed by a norm: an input gain of 1, not 1/tau.
    assert net[2].params == QIFParameters.matching_lif(1 - 1 / 3.0, rebound=False)
    assert net[2].window == "isometric"
    assert net[4].params == QIFParameters.matching_lif(0.75, v_threshold=0.5, rebound=False)
    assert type(net[4].surrogate_function) is surrogate.Sigmoid
    # Fed by none, beside a neuron that is: an input gain of 1 as well.
    matched = QIFParameters.matching_lif(0.5, rebound=False)
    assert (net[6].params.a.item(), net[6].params.u2.item()) == (matched.a, matched.u2)
    assert net[6].params.input_gain == 1
    assert [row.name for row in report.changed] == ["2", "4", "6"]
    assert "reads out" in report.left[0].why
    assert ("data flow" if example is not None else "registration order") in report.left[0].why
    assert "fed by 1" in str(report)
    run(net).sum().backward()
    assert net[6].w.grad is not None


def test_configuration_is_carried_over():
    net = network()
    net.double().eval()
    net[4].store_v_seq = True
    net[0].weight.requires_grad_(False)
    swap(net)
    assert net[2].detach_reset
    assert not net[4].detach_reset
    assert net[4].v_threshold == 0.5
    assert net[4].store_v_seq
    assert all(net[i].step_mode == "m" for i in (2, 4, 6))
    assert not any(m.training for m in net.modules())
    assert not net[0].weight.requires_grad
    assert run(net, X.double()).dtype == torch.float64
    assert net[4].v_seq.shape == (3, 2, 4, 8, 8)


def test_the_analytic_window_replaces_the_surrogate_unless_it_is_kept():
    net = network()
    swap(net, window="keep")
    assert isinstance(net[2].surrogate_function, surrogate.ATan)
    swap(net, to="lif")
    swap(net, window="heuristic")
    assert (net[2].surrogate_function.lo, net[2].surrogate_function.hi) == (-0.5, 0.5)
    net = network()
    swap(net, window=Window(0.25, 1.5))
    assert isinstance(net[2].surrogate_function, AnalyticWindow)
    assert net[2].surrogate_function.hi == 0.5
    net = network()
    swap(net, surrogate_function=surrogate.Sigmoid(alpha=3.0))
    assert net[4].surrogate_function.alpha == 3.0


def test_parameters_and_dynamics_take_precedence():
    net = network()
    swap(net, dynamics="lif")
    assert net[2].params == QIFParameters.matching_lif(1 - 1 / 3, input_gain=1 / 3)
    net = network()
    swap(net, dynamics="paper", v_threshold=0.75)
    assert net[4].params == QIFParameters(v_threshold=0.75)
    assert type(net[6]) is QIFNode
    assert not net[6].w.requires_grad
    assert "6.w" in net.state_dict()
    swap(net, to="lif")
    assert net[6].w.requires_grad
    assert net[4].v_threshold == 0.5
    net = network()
    swap(net, a=0.1)
    assert net[2].params == QIFParameters(a=0.1)
    net = network()
    swap(net, tau=5.0)
    assert net[2].params == QIFParameters.matching_lif(0.8, input_gain=0.2, rebound=False)


def test_a_subtracting_reset_stays_where_it_leaves_the_membrane_bounded():
    net = nn.Sequential(layer.Linear(4, 4), neuron.LIFNode(v_reset=None), layer.Linear(4, 2))
    report = swap(net)
    assert net[1].v_reset is None
    assert net[1].params.reset == "soft"
    assert "instead of subtracting" not in str(report)
    for name, value in {"dynamics": "lif", "a": 0.2}.items():
        changed = copy.deepcopy(net[1])
        with pytest.warns(UserWarning, match=r"no longer bounds the membrane.*Assign v_reset=0\.0 to reset to rest"):
            setattr(changed, name, value)
        assert changed.params.reset == "soft"
    swap(net, to="lif")
    assert type(net[1]) is neuron.LIFNode
    assert net[1].v_reset is None
    report = swap(net, dynamics="lif")
    assert net[1].v_reset == 0.0
    assert "instead of subtracting" in report.changed[0].why
    swap(net, to="lif")
    assert net[1].v_reset is None
    swap(net, dynamics="lif", v_reset=None)
    assert net[1].v_reset is None
    swap(net, to="lif")
    swap(net, v_reset=0.0)
    assert net[1].v_reset == 0.0
    net = nn.Sequential(layer.Linear(4, 4), neuron.LIFNode(v_reset=-0.25), layer.Linear(4, 2))
    swap(net)
    assert net[1].v_reset == -0.25


def test_if_neurons_are_matched_at_a_leak_where_nothing_normalizes_them():
    net = nn.Sequential(layer.Linear(4, 4), neuron.IFNode(), layer.Linear(4, 2))
    report = swap(net)
    assert net[1].params == QIFParameters.matching_lif(1 - 1 / net[1].tau, rebound=False)
    assert net[1].tau == pytest.approx(20)
    assert "no leak" in report.changed[0].why
    run(net, torch.rand(2, 4))


def test_there_and_back_leaves_the_network_bit_for_bit():
    torch.manual_seed(1)
    net = network()
    before = run(net)
    state = copy.deepcopy(net.state_dict())
    described = repr(net)
    modules, w = list(net), net[6].w
    swap(net)
    assert equal(net.state_dict(), state | {k: net.state_dict()[k] for k in state if "running" in k or "num" in k})
    assert list(net) == modules
    assert net[6].w is w
    run(net)
    trained = copy.deepcopy(net.state_dict())
    report = swap(net, to="lif")
    assert equal(net.state_dict(), trained)
    assert repr(net) == described
    assert [row.now for row in report.changed] == ["LIFNode", "LIFNode", "ParametricLIFNode"]
    net.load_state_dict(state)
    assert torch.equal(run(net), before)


def test_checkpoints_load_both_ways_and_in_either_order():
    lif, torch_seed = network(), 3
    torch.manual_seed(torch_seed)
    run(lif)
    state = lif.state_dict()
    first, then = network(), network()
    first.load_state_dict(state)
    swap(first, norm="tdbn")
    swap(then, norm="tdbn")
    then.load_state_dict(state, strict=True)
    assert equal(first.state_dict(), then.state_dict())
    assert torch.equal(run(first.eval()), run(then.eval()))
    network().load_state_dict(first.state_dict(), strict=True)


def test_a_swapped_network_copies_pickles_and_goes_back():
    net = network()
    swap(net)
    run(net)
    functional.reset_net(net)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert torch.equal(run(twin.eval()), run(net.eval()))
    swap(twin, to="lif")
    assert [type(twin[i]) for i in (2, 4, 6)] == [neuron.LIFNode, neuron.LIFNode, neuron.ParametricLIFNode]
    assert isinstance(net[2], QIFNode)


def test_shared_neurons_stay_shared_and_lists_keep_theirs():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = layer.Linear(4, 4)
            self.first = neuron.LIFNode()
            self.fc2 = layer.Linear(4, 4)
            self.second = self.first
            self.fc3 = layer.Linear(4, 4)
            self.plain = [neuron.LIFNode(), {"deep": (neuron.LIFNode(),)}]
            self.fc4 = layer.Linear(4, 2)

        def forward(self, x):
            x = self.second(self.fc2(self.first(self.fc1(x))))
            return self.fc4(self.plain[1]["deep"][0](self.fc3(self.plain[0](x))))

    net = Shared()
    kept = net.plain[0]
    with pytest.raises(ValueError, match="plain Python lists"):
        swap(net)
    report = swap(net, example_input=torch.rand(2, 4))
    assert net.first is net.second
    assert type(net.first) is QIFNode
    assert net.plain[0] is kept
    assert type(kept) is type(net.plain[1]["deep"][0]) is QIFNode
    assert len(report.changed) == 3


def test_hooks_and_what_the_user_attached_stay():
    net = network()
    seen = []
    handle = net[2].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net[2].label = "first"
    swap(net)
    run(net)
    assert seen == [(3, 2, 4, 10, 10)]
    assert net[2].label == "first"
    net[2].note = 1
    swap(net, to="lif")
    assert (net[2].label, net[2].note) == ("first", 1)
    handle.remove()
    run(net)
    assert len(seen) == 1


def set_after_the_swap(net):
    """What scripts set on their neurons, in a network that is built."""
    functional.set_step_mode(net, "s")
    net[2].detach_reset, net[2].v_threshold, net[2].v_reset, net[2].store_v_seq = False, 0.25, -0.5, True
    net[2].surrogate_function = surrogate.Sigmoid(alpha=2.0)
    net[4].v_threshold, net[4].tau, net[4].decay_input = 0.3, 5.0, True
    net[4].note, net[4]._private = "mine", [1]
    net[4].register_buffer("seen", torch.ones(2), persistent=False)
    net[4].scale = nn.Parameter(torch.ones(3))
    net[4].extra = nn.Linear(2, 2)
    net[6].w = nn.Parameter(torch.tensor(0.7), requires_grad=False)
    net[6].v_reset = -0.25


def test_a_leak_that_is_assigned_after_the_swap_is_matched_unless_the_papers_map_was_asked_for():
    for dynamics in ("auto", "paper"):
        net = nn.Sequential(layer.Linear(6, 6), layer.BatchNorm1d(6), neuron.LIFNode(4.0), layer.Linear(6, 2))
        swap(net, dynamics=dynamics, example_input=torch.rand(8, 6))
        assert net[2].dynamics == ("monotone" if dynamics == "auto" else "paper")
        if dynamics == "paper":
            with pytest.raises(ValueError, match="would have no effect"):
                net[2].tau = 5.0
            continue
        net[2].tau = 5.0
        assert net[2].params == QIFNode(tau=5.0, decay_input=False, dynamics="monotone").params


@pytest.mark.parametrize("through", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_what_is_set_between_there_and_back_stays_set(through):
    torch.manual_seed(1)
    net = network()
    lif = copy.deepcopy(net)
    swap(net)
    net = through(net)
    set_after_the_swap(net)
    set_after_the_swap(lif)
    lif[4].scale, lif[4].extra = net[4].scale, net[4].extra
    run(net, X[0])
    swap(net, to="lif")
    lif.load_state_dict(net.state_dict())
    assert repr(net) == repr(lif)
    assert net.state_dict().keys() == lif.state_dict().keys()
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        n for n, p in lif.named_parameters() if p.requires_grad
    ]
    for one, other in zip((net[2], net[4], net[6]), (lif[2], lif[4], lif[6]), strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert one._non_persistent_buffers_set == other._non_persistent_buffers_set
        assert (one.v, one.v_threshold, one.v_reset, one.store_v_seq) == (
            other.v, other.v_threshold, other.v_reset, other.store_v_seq
        )  # fmt: skip
    assert (net[4].note, net[4]._private) == ("mine", [1])
    functional.reset_net(lif)
    for x in X:
        assert torch.equal(net(x), lif(x))
    assert torch.equal(net[2].v_seq, lif[2].v_seq) if net[2].v_seq is not None else lif[2].v_seq is None


@pytest.mark.skipif(not HAS_BACKENDS, reason="this version's LIFNode has no backends")
def test_a_backend_of_ours_does_not_reach_the_lif_neuron():
    net = network()
    swap(net)
    net[2].backend, net[4].backend = "numba", "torch"
    swap(net, to="lif")
    assert [net[i].backend for i in (2, 4)] == ["torch", "torch"]


def test_a_threshold_chosen_at_the_swap_goes_with_it():
    net = network()
    swap(net, v_threshold=0.75)
    net[2].v_threshold = 0.5
    swap(net, to="lif")
    assert [net[i].v_threshold for i in (2, 4, 6)] == [0.5, 0.5, 1.0]


class OnlyConstructor(neuron.LIFNode):
    def __init__(self):
        super().__init__(tau=4.0)
        self.kind = "mine"


class OwnCode(neuron.LIFNode):
    def extra_repr(self):
        return super().extra_repr()

    def leak(self):
        return 1 / self.tau


def test_a_subclass_is_swapped_only_if_it_has_no_code_to_lose():
    net = nn.Sequential(layer.Linear(4, 4), OnlyConstructor(), layer.Linear(4, 4), OwnCode(), layer.Linear(4, 2))
    report = swap(net)
    assert type(net[1]) is QIFNode
    assert net[1].kind == "mine"
    assert net[1].params == QIFParameters.matching_lif(0.75, input_gain=0.25, rebound=False)
    assert type(net[3]) is OwnCode
    assert "code of its own (leak)" in report.left[0].why
    swap(net, to="lif")
    assert type(net[1]) is OnlyConstructor
    net[1].forward = lambda x: x
    with pytest.raises(ValueError, match="forward"):
        swap(net)


def test_other_neuron_models_are_left_with_the_reason():
    net = nn.Sequential(layer.Linear(4, 4), neuron.KLIFNode(), layer.Linear(4, 4), neuron.LIFNode(), layer.Linear(4, 2))
    report = swap(net)
    assert [(row.name, row.why) for row in report.left] == [("1", "another neuron model")]


def test_the_model_may_be_the_neuron():
    node = neuron.LIFNode(tau=4.0)
    report = swap(node)
    assert type(node) is QIFNode
    assert node.params == QIFParameters.matching_lif(0.75, input_gain=0.25, rebound=False)
    assert "the model is the neuron" in str(report)


# -- readouts ---------------------------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Registered in another order than it runs in: the readout comes first, the weights last."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden = neuron.LIFNode(), neuron.LIFNode()
        self.fc2, self.fc1, self.bn = nn.Linear(8, 3), nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.out(self.fc2(self.hidden(self.bn(self.fc1(x)) + self.bn(self.fc1(x * 2)))))


def test_data_flow_finds_readout_and_norm_where_the_order_cannot():
    net = Backwards()
    with pytest.raises(ValueError, match="example_input"):
        swap(net)
    assert type(net.hidden) is neuron.LIFNode
    report = swap(net, example_input=torch.rand(2, 4))
    assert type(net.hidden) is QIFNode
    assert type(net.out) is neuron.LIFNode
    assert net.hidden.params == QIFParameters.matching_lif(0.5, rebound=False)
    assert "fed by bn" in report.changed[0].why


def test_data_flow_follows_functional_weights_and_residual_paths():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, 4))
            self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.a, self.b, self.c = neuron.LIFNode(), neuron.LIFNode(), neuron.LIFNode()

        def forward(self, x):
            x = self.a(self.bn1(x))
            x = self.b(self.bn2(x) + x)
            return torch.relu(nn.functional.linear(self.c(nn.functional.linear(x, self.w)), self.w))

    net = Net()
    report = swap(net, norm="tdbn", example_input=torch.rand(3, 4))
    assert {row.name for row in report.changed} == {"a", "b", "c", "bn1", "bn2"}
    assert net.b.params == QIFParameters.matching_lif(0.5, rebound=False)
    assert net.c.params == QIFParameters.matching_lif(0.5, rebound=False)
    assert net.bn2.alpha == pytest.approx(2**-0.5)
    assert net.bn1.alpha == 1


def test_an_example_that_does_not_run_changes_nothing():
    net = network()
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="does not run on the example input"):
        swap(net, example_input=torch.rand(3, 2, 7, 12, 12))
    assert equal(net.state_dict(), state)
    assert type(net[2]) is neuron.LIFNode


def test_following_the_data_leaves_the_model_alone():
    net = network()
    run(net).sum().backward()
    v = net[2].v
    state = copy.deepcopy(net.state_dict())
    swap(net, readout="swap", example_input=X)
    assert equal(net.state_dict(), state)
    assert isinstance(v, torch.Tensor)
    assert net.training
    assert isinstance(net[10], QIFNode)


# -- tdBN -------------------------------------------------------------------------------------------------------------


def test_an_untrained_norm_gets_the_scale_of_tdbn_and_a_trained_one_keeps_everything():
    net = network()
    net[2].v_threshold = 0.5
    report = swap(net, norm="tdbn")
    assert isinstance(net[1], layer.ThresholdDependentBatchNorm2d)
    assert (net[1].v_th, net[1].alpha) == (0.5, 1)
    assert torch.equal(net[1].weight.detach(), torch.full((4,), 0.5))
    assert "feeds 2" in report.changed[-1].why
    assert run(net).shape == (3, 2, 5)

    net = network()
    net[2].v_threshold = 0.5
    run(net)
    state, weight = copy.deepcopy(net.state_dict()), net[1].weight
    swap(net, norm="tdbn")
    assert equal(net.state_dict(), state)
    assert net[1].weight is weight


def test_norms_that_cannot_become_tdbn_are_left_with_the_reason():
    net = network("s")
    report = swap(net, norm="tdbn")
    assert "set_step_mode" in report.left[-1].why
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), neuron.LIFNode(), nn.Linear(4, 4), nn.LayerNorm(4),
        neuron.LIFNode(), nn.Linear(4, 4),
    )  # fmt: skip
    why = [row.why for row in swap(net, norm="tdbn").left]
    assert "affine=False" in why[0]
    assert "LayerNorm" in why[1]


def test_torch_norms_become_ours_for_tokens_and_vectors():
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), neuron.LIFNode(v_threshold=0.5), nn.Conv1d(4, 2, 1))
    x = torch.randn(4, 3, 6)
    expected = nn.functional.batch_norm(net[0](x), None, None, torch.full((4,), 0.5), training=True)
    swap(net, norm="tdbn")
    assert torch.equal(net[1](net[0](x)), expected)
    assert net[1](torch.randn(8, 4)).shape == (8, 4)
    assert "v_threshold=0.5" in repr(net[1])


def test_an_error_undoes_everything():
    net = network()
    described, state = repr(net), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="4"):
        swap(net, norm="tdbn", dynamics="paper", v_threshold=4.5)
    assert repr(net) == described
    assert equal(net.state_dict(), state)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_swapping_twice_says_that_it_is_done():
    net = network()
    swap(net)
    with pytest.raises(ValueError, match=r"QIF neuron already.*to='lif'"):
        swap(net)
    swap(net, to="lif")
    with pytest.raises(ValueError, match="nothing to swap"):
        swap(net, to="lif")


def test_a_norm_can_follow_later():
    net = network()
    swap(net)
    report = swap(net, norm="tdbn")
    assert [row.name for row in report.changed] == ["1"]


def test_nothing_to_swap_says_what_was_found():
    with pytest.raises(ValueError, match="no spiking neuron"):
        swap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="readout='swap'"):
        swap(nn.Sequential(nn.Linear(4, 2), neuron.LIFNode()))
    with pytest.raises(ValueError, match="there is no neuron to go back to"):
        swap(nn.Sequential(nn.Linear(4, 2), QIFNode(dynamics="paper")), to="lif")


def test_wrapped_and_compiled_models_are_refused():
    net = network()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="swap the model first, then wrap"):
            swap(nn.parallel.DistributedDataParallel(net))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="first, then compile"):
        swap(torch.compile(net))
    net[2].compile()
    with pytest.raises(ValueError, match="first, then compile"):
        swap(net)
    assert type(net[4]) is neuron.LIFNode


def test_eval_mode_and_frozen_parameters():
    net = network().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    swap(net)
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert not run(net).requires_grad


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        net = network()
    swap(net, norm="tdbn")
    assert isinstance(net[6], LeakQIFNode)
    assert all(p.is_meta for p in net.parameters())
    source = network()
    net.to_empty(device="cpu").load_state_dict(source.state_dict())
    swap(source, norm="tdbn")
    assert torch.equal(run(net.eval()), run(source.eval()))


def test_wrong_choices_and_names():
    net = network()
    for choice in ({"dynamics": "fast"}, {"norm": "bn"}, {"readout": "all"}, {"to": "if"}, {"window": "wide"}):
        with pytest.raises(ValueError, match="unknown"):
            swap(net, **choice)
    with pytest.raises(TypeError, match="no argument beta"):
        swap(net, beta=0.5)
    with pytest.raises(TypeError, match="built model"):
        swap(neuron.LIFNode)
    with pytest.raises(ValueError, match="takes no other choice"):
        swap(net, to="lif", window="paper")
    assert type(net[2]) is neuron.LIFNode


@pytest.mark.skipif(not HAS_BACKENDS, reason="SpikingJelly 2 has no backend argument")
def test_the_backend_is_carried_over():
    net = network()
    functional.set_backend(net, "cupy", neuron.LIFNode)
    swap(net)
    assert net[2].backend == "cupy"
    assert net[6].backend == "auto"
    swap(net, to="lif")
    assert net[2].backend == "cupy"
    assert net[6].backend == "torch"


def test_learned_leak_is_learned_within_its_range():
    node = neuron.ParametricLIFNode(init_tau=4.0, step_mode="m")
    net = nn.Sequential(layer.Linear(3, 3), node, layer.Linear(3, 1))
    functional.set_step_mode(net, "m")
    swap(net)
    expected = QIFParameters.matching_lif(0.75, input_gain=0.25, rebound=False)
    assert node.params.a.item() == pytest.approx(expected.a)
    for w in (-100.0, 100.0):
        with torch.no_grad():
            node.w.fill_(w)
        functional.reset_net(net)
        out = net(torch.randn(4, 2, 3))
        out.sum().backward()
        assert out.isfinite().all()
        assert node.w.grad.isfinite()
    node.v_threshold = 0.5
    assert node.params.v_threshold == 0.5
    with pytest.raises(AttributeError):
        node.a = 0.1
    node.load_state_dict({"w": torch.tensor(0.0)})
    assert node.params.a.item() == pytest.approx(QIFParameters.matching_lif(0.5, v_threshold=0.5).a)


# -- where the order of registration ends -----------------------------------------------------------------------------


def registered(**modules):
    net = nn.Module()
    for name, module in modules.items():
        net.add_module(name, module)
    return net


def test_modules_grouped_by_kind_are_paired_by_index():
    conv, norm, lif = lambda: layer.Linear(4, 4), lambda: layer.BatchNorm1d(4), neuron.LIFNode
    flat = registered(conv1=conv(), conv2=conv(), bn1=norm(), bn2=norm(), lif1=lif(), lif2=lif(), fc=layer.Linear(4, 2))
    report = swap(flat)
    assert len(report.changed) == 2
    for i, row in enumerate(report.changed, 1):
        assert row.why.startswith(f"its leak matched (fed by bn{i}, by registration order)")
    lists = registered(
        convs=nn.ModuleList([conv(), conv(), conv()]), bns=nn.ModuleList([norm(), norm(), norm()]),
        lifs=nn.ModuleList([lif(), lif(), lif()]), head=layer.Linear(4, 2),
    )  # fmt: skip
    report = swap(lists)
    assert all(f"fed by bns.{i}," in row.why for i, row in enumerate(report.changed))
    assert len(report.changed) == 3


def test_where_the_order_cannot_tell_it_asks():
    conv, norm, lif = lambda: layer.Linear(4, 4), lambda: layer.BatchNorm1d(4), neuron.LIFNode
    shared = registered(lif=lif(), conv1=conv(), bn1=norm(), conv2=conv(), bn2=norm(), fc=conv())
    with pytest.raises(ValueError, match=r"which normalization feeds which neuron.*example_input"):
        swap(shared)
    assert type(shared.lif) is lif
    with pytest.raises(ValueError, match="example_input"):
        swap(shared, dynamics="lif", norm="tdbn")
    report = swap(shared, dynamics="lif")
    assert "no normalization" not in str(report)
    assert "what feeds it is not known" in str(report)
    two = registered(conv1=conv(), bn1=norm(), conv2=conv(), lif1=lif(), lif2=lif(), fc=conv())
    with pytest.raises(ValueError, match="which normalization feeds which neuron"):
        swap(two)
    head_first = registered(conv1=conv(), conv2=conv(), fc=conv(), lif1=lif(), lif2=lif())
    with pytest.raises(ValueError, match=r"registered by kind.*example_input"):
        swap(head_first)


def test_the_networks_input_is_a_path_of_a_residual_sum():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.lif, self.fc = (
                nn.Linear(4, 4),
                nn.BatchNorm1d(4),
                neuron.LIFNode(),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            return self.fc(self.lif(self.bn(self.conv(x)) + x))

    net = Block()
    swap(net, norm="tdbn", example_input=torch.rand(3, 4))
    assert net.bn.alpha == pytest.approx(2**-0.5)


def test_a_frozen_learned_leak_is_called_frozen():
    net = nn.Sequential(layer.Linear(4, 4), neuron.ParametricLIFNode(), layer.Linear(4, 2))
    net[1].w.requires_grad_(False)
    assert "its leak w stays frozen" in str(swap(net))
    assert not net[1].w.requires_grad


# -- readouts by data flow ---------------------------------------------------------------------------------------------


class ReadByName(nn.Module):
    """Its readout is not what forward returns; ``read`` says what is."""

    def __init__(self, read, step_mode="m"):
        super().__init__()
        self.fc1, self.norm, self.hidden = layer.Linear(4, 8), nn.LayerNorm(8), neuron.LIFNode()
        self.fc2, self.out = layer.Linear(8, 3), neuron.LIFNode(v_threshold=100.0, store_v_seq=True)
        self.read, self.kept = read, []
        functional.set_step_mode(self, step_mode)

    def forward(self, x, scale=1.0):
        spikes = self.out(self.fc2(self.norm(self.hidden(self.fc1(x * scale)))))
        return self.read(self, spikes)


READS = {
    "v": lambda net, spikes: net.out.v,
    "v_seq": lambda net, spikes: net.out.v_seq.mean(0),
    "nothing": lambda net, spikes: None,
    "hidden spikes": lambda net, spikes: {"spikes": net.hidden.v},
    "a list": lambda net, spikes: net.kept.append(net.out.v),
}


def test_monitors_do_not_record_the_run_of_the_example():
    net = ReadByName(READS["nothing"])
    watching = monitor.AttributeMonitor("v", False, net, neuron.LIFNode)
    report = swap(net, example_input=torch.rand(3, 2, 4))
    assert [row.name for row in report.left] == ["out"]
    assert watching.records == []
    net(torch.rand(3, 2, 4))
    assert len(watching.records) == 2


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_readout_that_is_read_by_name_is_one(read):
    net = ReadByName(read)
    report = swap(net, example_input=torch.rand(3, 2, 4))
    assert [type(net.hidden), type(net.out)] == [QIFNode, neuron.LIFNode]
    assert report.left[0].why.startswith("reads out, by data flow")


def test_a_record_that_is_written_step_by_step_is_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.hidden, self.fc2, self.out, self.fc3 = (
                nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 8), neuron.LIFNode(), nn.Linear(8, 3),
            )  # fmt: skip

        def forward(self, x):
            record, last = torch.zeros(len(x), x.shape[1], 8), torch.zeros(len(x), x.shape[1], 3)
            for t, step in enumerate(x):
                record[t] = self.hidden(self.fc1(step))
            for t in range(len(x)):
                last[t] = self.fc3(self.out(self.fc2(record[t])))
            return last

    net = Net()
    assert len(swap(net, example_input=torch.rand(3, 2, 4)).changed) == 2


def test_examples_by_name():
    net = ReadByName(READS["v"])
    swap(net, example_input={"x": torch.rand(3, 2, 4), "scale": 2.0})
    assert type(net.out) is neuron.LIFNode

    class TakesADict(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReadByName(READS["v"])

        def forward(self, batch):
            return self.inner(batch["x"])

    net = TakesADict()
    swap(net, example_input={"x": torch.rand(3, 2, 4)})
    assert type(net.inner.hidden) is QIFNode
    with pytest.raises(ValueError, match="does not run on the example input"):
        swap(net, to="qif", example_input={"y": torch.rand(3, 2, 4)})


# -- readouts by registration order ------------------------------------------------------------------------------------


def pre_activation():
    return registered(
        conv=layer.Conv2d(1, 4, 3), sn=neuron.LIFNode(), conv2=layer.Conv2d(4, 4, 3), bn1=layer.BatchNorm2d(4),
        linear=layer.Linear(4, 3), relu1=neuron.LIFNode(),
    )  # fmt: skip


OUT_OF_ORDER = {
    "hidden last": pre_activation,
    "norm before the head": lambda: registered(
        fc=nn.Linear(4, 8), sn=neuron.LIFNode(), bn=nn.BatchNorm1d(8), head=nn.Linear(8, 3), last=neuron.LIFNode()
    ),
    "head first": lambda: registered(
        head=nn.Linear(8, 8), fc1=nn.Linear(8, 8), sn1=neuron.LIFNode(), fc2=nn.Linear(8, 8), sn2=neuron.LIFNode()
    ),
    "head first, before a norm": lambda: registered(
        head=nn.Linear(8, 3), bn1=nn.BatchNorm1d(8), sn1=neuron.LIFNode(), fc=nn.Linear(8, 8), sn2=neuron.LIFNode()
    ),
    "head first, before blocks": lambda: registered(
        head=nn.Linear(8, 3), one=registered(fc=nn.Linear(4, 8), sn=neuron.LIFNode()),
        two=registered(fc=nn.Linear(8, 8), sn=neuron.LIFNode()),
    ),
    "backwards": lambda: registered(
        fc2=nn.Linear(8, 3), out=neuron.LIFNode(), fc1=nn.Linear(4, 8), hidden=neuron.LIFNode()
    ),
    "neurons before their weights": lambda: registered(
        sn1=neuron.LIFNode(), fc1=nn.Linear(4, 8), sn2=neuron.LIFNode(), fc2=nn.Linear(8, 3)
    ),
    "its one neuron before its one weight": lambda: registered(sn=neuron.LIFNode(), fc=nn.Linear(4, 3)),
    "both neurons after the first weight": lambda: registered(
        fc1=nn.Linear(4, 8), sn1=neuron.LIFNode(), sn2=neuron.LIFNode(), fc2=nn.Linear(8, 3)
    ),
    "a block that ends in a weight, the head, and a neuron": lambda: registered(
        body=registered(sn=neuron.LIFNode(), conv=nn.Linear(8, 8)), head=nn.Linear(8, 3), sn=neuron.LIFNode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("build", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_an_order_that_modules_need_not_run_in_is_asked_about(build):
    net = build()
    before = repr(net)
    with pytest.raises(ValueError, match=r"which (neuron|one) reads out.*example_input"):
        swap(net)
    assert repr(net) == before
    assert all(row.changed for row in swap(net, readout="swap", dynamics="lif").rows)


def test_an_order_that_modules_may_run_in_is_called_a_guess():
    net = registered(
        features=nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.BatchNorm1d(8), neuron.LIFNode()),
        head=nn.Linear(8, 3), out=neuron.LIFNode(),
    )  # fmt: skip
    report = swap(net)
    assert [row.name for row in report.changed] == ["features.3"]
    assert [row.name for row in report.left] == ["out"]
    assert all("a guess that example_input would check" in row.why for row in report.rows)
    assert "guess" not in str(swap(network()))
    assert "guess" not in str(swap(ReadByName(READS["v"]), example_input=torch.rand(3, 2, 4)))


def test_a_neuron_that_runs_twice_in_a_sequence_reads_out():
    shared = neuron.LIFNode()
    net = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), neuron.LIFNode(), nn.Linear(4, 4), shared)
    assert [row.name for row in swap(net).left] == ["1"]
    assert [row.name for row in swap(net, to="lif").left] == ["1"]
    assert [row.name for row in swap(net, example_input=torch.rand(3, 4)).left] == ["1"]


# -- norms of shortcuts, and before the convolution --------------------------------------------------------------------


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.sn1 = layer.Conv2d(1, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode()
        self.conv2, self.bn2, self.sn2 = layer.Conv2d(4, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.LIFNode()
        self.downsample = nn.Sequential(layer.Conv2d(1, 4, 1), layer.BatchNorm2d(4))
        self.bn3, self.conv3, self.sn3 = layer.BatchNorm2d(4), layer.Conv2d(4, 4, 1), neuron.LIFNode()
        self.fc, self.bn4, self.out = layer.Conv2d(4, 2, 1), layer.BatchNorm2d(2), neuron.LIFNode()
        self.sn1.v_threshold = self.sn2.v_threshold = 0.5
        functional.set_step_mode(self, "m")

    def forward(self, x):
        y = self.sn2(self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(x))))) + self.downsample(x))
        return self.out(self.bn4(self.fc(self.sn3(self.conv3(self.bn3(y))))))


def test_tdbn_reaches_the_norms_of_shortcuts_and_names_those_that_feed_no_neuron():
    net = Shortcut()
    before = repr(net)
    for choices in ({}, {"readout": "swap", "dynamics": "lif"}):
        with pytest.raises(ValueError, match="example_input"):
            swap(net, norm="tdbn", **choices)
        assert repr(net) == before
    report = swap(net, norm="tdbn", example_input=torch.rand(2, 3, 1, 6, 6))
    rows = {row.name: row for row in report.rows}
    for name, alpha in (("bn1", 1), ("bn2", 2**-0.5), ("downsample.1", 2**-0.5)):
        norm = net.get_submodule(name)
        assert isinstance(norm, layer.ThresholdDependentBatchNorm2d)
        assert (norm.v_th, norm.alpha) == (0.5, pytest.approx(alpha))
    assert "feeds no neuron directly" in rows["bn3"].why
    assert "feeds out, which is not QIF" in rows["bn4"].why
    assert not rows["bn3"].changed
    assert type(net.bn3) is type(net.bn4) is layer.BatchNorm2d


def test_norms_that_the_order_gives_no_neuron_are_asked_about():
    net = registered(
        conv1=nn.Conv2d(1, 4, 3), bn1=nn.BatchNorm2d(4), sn1=neuron.LIFNode(),
        downsample=nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)), fc=nn.Linear(4, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no neuron follows downsample\.1 in the order.*example_input"):
        swap(net, norm="tdbn")
    assert len(swap(net).changed) == 1
    # In a sequence it is no guess.
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), neuron.LIFNode(), nn.Linear(4, 2))
    report = swap(net, norm="tdbn")
    assert [(row.name, "feeds no neuron directly" in row.why) for row in report.left] == [("0", True)]


# -- what a swap changes of the firing rate ----------------------------------------------------------------------------


NODES = {
    "leaky": lambda: neuron.LIFNode(tau=2.0),
    "not decayed": lambda: neuron.LIFNode(tau=4.0, decay_input=False, v_threshold=0.7, v_reset=-0.2),
    "decayed to its reset": lambda: neuron.LIFNode(tau=4.0, v_threshold=0.2, v_reset=-0.2),
    "subtracting": lambda: neuron.LIFNode(tau=1.5, v_reset=None, v_threshold=0.3),
    "no leak": lambda: neuron.IFNode(v_threshold=1.5),
    "learned": lambda: neuron.ParametricLIFNode(init_tau=3.0, v_threshold=0.5),
    "QIF": lambda: QIFNode(),
    "matched": lambda: QIFNode(tau=3.0, v_threshold=0.5),
    "subtracting QIF": lambda: QIFNode(tau=3.0, v_threshold=0.5, v_reset=None, a=0.01),
}


@pytest.mark.parametrize("build", NODES.values(), ids=NODES)
def test_the_expected_rate_is_the_hosts(build):
    node = build()
    node.step_mode = "m"
    x = torch.randn(16, 1000)
    with torch.no_grad():
        expected = node(x).mean().item()
    assert 0 < expected < 1
    assert HOST.dynamics(node).rate(x) == pytest.approx(expected, abs=2e-3)


def test_a_swap_that_changes_the_firing_regime_says_so():
    def build(**lif):
        return nn.Sequential(
            nn.Linear(6, 32, bias=False), nn.BatchNorm1d(32), neuron.LIFNode(**lif), nn.Linear(32, 3)
        )  # fmt: skip

    def rate(net):
        return run(net[:3], x).mean().item()

    x = torch.randn(512, 6)
    net = build(tau=2.0)
    before = rate(net)
    why = swap(net).changed[0].why
    after = rate(net)
    assert after > 2 * before
    assert "input gain 1 instead of LIF's 0.5" in why
    told = re.search(
        r"expected firing rate (\S+) instead of (\S+) a step, so it spikes more \(at the moments of 1\)", why
    )
    # One step from rest has less of a membrane than sixteen.
    assert float(told[1]) == pytest.approx(after, rel=0.4)
    assert float(told[2]) == pytest.approx(before, rel=1.5)

    matched = swap(build(tau=2.0), dynamics="lif").changed[0].why
    assert "gain" not in matched
    assert "rate" not in matched
    assert "spikes less" in swap(build(tau=2.0, decay_input=False, v_threshold=0.2), v_threshold=2.0).changed[0].why
    assert "whose deviation is the threshold" in str(
        swap(nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(tau=8.0), nn.Linear(2, 2)), dynamics="paper")
    )


def test_the_firing_rate_is_measured_where_there_is_an_example():
    net = nn.Sequential(nn.Linear(4, 4), neuron.IFNode(), nn.Linear(4, 2))
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[0].bias.zero_()
    x = torch.full((40, 2, 4), 0.04)
    report = swap(net, example_input=x)
    # It adds up 25 steps to a spike, which a leak of 0.95 does not let happen.
    assert "instead of 0.025 a step, so it spikes less (measured on example_input)" in report.changed[0].why
    assert not run(net[:2], x).any()


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [float("inf"), float("nan"), 1e39])
@pytest.mark.parametrize("choices", [{}, {"dynamics": "paper"}, {"readout": "swap"}, {"v_threshold": 1.0}])
def test_a_threshold_that_is_not_finite_stays_lif(threshold, choices):
    net = nn.Sequential(
        layer.Linear(4, 8), neuron.LIFNode(), layer.Linear(8, 8), neuron.IFNode(threshold), layer.Linear(8, 2),
        neuron.LIFNode(v_threshold=threshold, v_reset=None),
    )  # fmt: skip
    report = swap(net, **choices)
    assert [type(net[i]) for i in (1, 3, 5)] == [QIFNode, neuron.IFNode, neuron.LIFNode]
    assert all("threshold is not finite" in row.why for row in report.left)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_below_the_resting_potential_stays_lif(threshold):
    net = nn.Sequential(
        layer.Linear(4, 8),
        neuron.LIFNode(),
        layer.Linear(8, 8),
        neuron.LIFNode(v_threshold=threshold),
        layer.Linear(8, 2),
    )
    report = swap(net)
    assert "QIF cannot take its place" in report.left[0].why
    with pytest.raises(ValueError, match=r"^3: "):
        swap(net, to="qif", dynamics="lif")


def test_a_neuron_that_a_project_wrote_itself_is_named_with_what_to_do():
    class LIFSpike(nn.Module):
        def forward(self, x):
            return (x > 1).float()

    net = nn.Sequential(nn.Linear(4, 4), LIFSpike(), nn.Sequential(LIFSpike(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"LIFSpike may be one: put in its place .*QIFNode in step mode 'm'"):
        swap(net)
    with pytest.raises(ValueError, match=r"cannot be swapped; put in its place"):
        swap(nn.Linear(2, 2))


# -- networks that were built with QIF ---------------------------------------------------------------------------------


BUILT = {
    "tau": (lambda: QIFNode(tau=3.0, v_threshold=0.5), lambda: neuron.LIFNode(tau=3.0, v_threshold=0.5)),
    "decay_input": (lambda: QIFNode(decay_input=False), lambda: neuron.LIFNode(decay_input=False)),
    "dynamics": (lambda: QIFNode(dynamics="lif", v_reset=None), lambda: neuron.LIFNode(v_reset=None)),
    "options": (
        lambda: QIFNode(4.0, True, 0.7, -0.1, surrogate.ATan(3.0), True, "m", store_v_seq=True),
        lambda: neuron.LIFNode(4.0, True, 0.7, -0.1, surrogate.ATan(3.0), True, "m", store_v_seq=True),
    ),
    "parametric": (lambda: ParametricQIFNode(init_tau=3.0), lambda: neuron.LIFNode(tau=3.0)),
}


@pytest.mark.parametrize(("qif", "lif"), BUILT.values(), ids=BUILT)
def test_a_network_built_with_qif_goes_back_by_its_leak(qif, lif):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(4, 8), qif(), layer.Linear(8, 3)).eval()
    net[1].label = "mine"
    state = copy.deepcopy(net.state_dict())
    run(net[:2], torch.randn(5, 4))
    report = swap(net, to="lif")
    expected = lif()
    assert type(net[1]) is type(expected)
    if "tau=3 as learned so far" not in str(report):
        assert repr(net[1]) == repr(expected)
    assert equal(net.state_dict(), state)
    assert net[1].label == "mine"
    assert not net[1].training
    x = 3 * torch.randn(5, 2, 4)
    for module in (net[1], expected):
        module.step_mode = "m"
    torch.testing.assert_close(run(net[1], x), run(expected, x))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert type(twin[1]) is neuron.LIFNode
    assert not [name for name in vars(net[1]) if name in ("_params", "_arguments", "window", "_replaced")]
    swap(net)
    assert type(net[1]) is QIFNode
    assert net[1].params.input_gain == pytest.approx(1 / expected.tau if expected.decay_input else 1)
    swap(net, to="lif")
    assert type(net[1]) is neuron.LIFNode


@pytest.mark.parametrize("multi", [False, True])
def test_a_clock_driven_network_built_with_qif_goes_back_by_its_leak(multi):
    clock_driven = pytest.importorskip("spikingjelly.clock_driven.neuron")
    from qif_plugins.adapters.spikingjelly import clock_driven as ours

    host = clock_driven.MultiStepLIFNode if multi else clock_driven.LIFNode
    node = (ours.MultiStepQIFNode if multi else ours.QIFNode)(3.0, False, 0.5, v_reset=-0.1, detach_reset=True)
    expected = host(3.0, False, 0.5, v_reset=-0.1, detach_reset=True)
    net = nn.Sequential(nn.Linear(4, 8), node, nn.Linear(8, 3))
    state = copy.deepcopy(net.state_dict())
    assert len(swap(net, to="lif").changed) == 1
    assert type(node) is host
    assert repr(node) == repr(expected)
    assert equal(net.state_dict(), state)
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(node(x), expected(x))
    paper = nn.Sequential(nn.Linear(4, 8), ours.QIFNode(dynamics="paper"), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="the paper's parameters, which match no leak"):
        swap(paper, to="lif")


def test_what_is_set_on_a_neuron_built_with_qif_comes_along():
    node = QIFNode(tau=3.0)
    node.tau, node.v_threshold, node.detach_reset = 4.0, nn.Parameter(torch.tensor(0.6)), True
    net = nn.Sequential(layer.Linear(4, 4), node, layer.Linear(4, 2))
    threshold = node.v_threshold
    state = copy.deepcopy(net.state_dict())
    swap(net, to="lif")
    assert (node.tau, node.detach_reset) == (4.0, True)
    assert node.v_threshold is threshold
    assert "v_threshold" not in vars(node)
    assert equal(net.state_dict(), state)
    assert dict(net.named_parameters())["1.v_threshold"] is threshold


def test_a_learned_map_goes_back_to_the_leak_that_it_has_by_now():
    node = ParametricQIFNode(init_tau=2.0)
    net = nn.Sequential(layer.Linear(4, 4), node, layer.Linear(4, 2))
    with torch.no_grad():
        node.raw_u2.mul_(1.2)
    params = node.qif_parameters
    slope = params.map_derivative(params.fixed_points()[0]).item()
    why = swap(net, to="lif").changed[0].why
    assert 1 - 1 / node.tau == pytest.approx(slope)
    assert f"tau={node.tau:.4g} as learned so far" in why
    assert "input gain" in why
    assert set(net.state_dict()) == {"0.weight", "0.bias", "1.raw_a", "1.raw_u1", "1.raw_u2", "2.weight", "2.bias"}
    assert not node.raw_a.requires_grad

    apart = ParametricQIFNode(init_tau=2.0, channels=4)
    with torch.no_grad():
        apart.raw_a[0] += 0.5
        apart.raw_u2[1] += 0.5
    net = nn.Sequential(layer.Linear(4, 4), apart, layer.Linear(4, 2))
    with pytest.raises(ValueError, match="no neuron to go back to: its learned leak differs from channel to channel"):
        swap(net, to="lif")
    assert type(apart) is ParametricQIFNode


class WithCode(QIFNode):
    def leak(self):
        return 1 / self.tau


def test_neurons_built_without_a_leak_stay_qif_with_the_reason():
    net = nn.Sequential(
        layer.Linear(4, 4), QIFNode(dynamics="paper"), layer.Linear(4, 4), QIFNode(a=0.3), layer.Linear(4, 4),
        QIFNode(tau=2.0, dynamics="paper"), layer.Linear(4, 4), WithCode(tau=2.0), layer.Linear(4, 4), QIFNode(tau=2.0),
    )  # fmt: skip
    report = swap(net, to="lif")
    assert [row.name for row in report.changed] == ["9"]
    why = {row.name: row.why for row in report.left}
    assert all("there is no neuron to go back to" in reason for reason in why.values())
    assert "the paper's parameters, which match no leak" in why["1"]
    assert "has its own a, u1, u2" in why["3"]
    assert "the paper's parameters" in why["5"]
    assert "code of its own (leak)" in why["7"]


def test_a_node_built_with_nothing_goes_back_to_lif_of_the_same_leak_and_gain():
    net = nn.Sequential(nn.Linear(4, 2), QIFNode())
    swap(net, to="lif")
    assert (net[1].tau, net[1].decay_input) == (2.0, False)


@pytest.mark.skipif(HAS_BACKENDS, reason="SpikingJelly 0.0.0.0.14 has no NIR exporter")
@pytest.mark.parametrize("qif", [lambda: QIFNode(tau=3.0), lambda: ParametricQIFNode(init_tau=3.0)])
def test_the_advice_of_the_nir_exporter_can_be_followed(qif):
    nir = pytest.importorskip("nir")
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    net = nn.Sequential(layer.Linear(3, 4), qif())
    with pytest.raises(NotImplementedError, match=r"swap\(model, to='lif'\)"):
        export_to_nir(net, torch.randn(2, 3))
    swap(net, to="lif")
    nodes = export_to_nir(net, torch.randn(2, 3)).nodes.values()
    [lif] = [node for node in nodes if isinstance(node, nir.LIF)]
    expected = [
        node
        for node in export_to_nir(nn.Sequential(net[0], neuron.LIFNode(tau=3.0)), torch.randn(2, 3)).nodes.values()
        if isinstance(node, nir.LIF)
    ]
    assert lif.tau == pytest.approx(expected[0].tau)
    assert lif.r == pytest.approx(expected[0].r)


class TestTheReportOfTheRates:
    def swapped(self, bias, node, **choices):
        net = nn.Sequential(layer.Linear(6, 64), nn.BatchNorm1d(64), node, layer.Linear(64, 3))
        with torch.no_grad():
            net[1].bias.fill_(bias)
        report = swap(net, **choices)
        return report, report.changed[0]

    def test_names_both(self):
        report, row = self.swapped(0.0, neuron.LIFNode(3.0))
        before, after = row.rate
        assert before < after / 2
        assert "input gain 1 instead of LIF's 0.3333" in row.why
        assert "reaches the neuron; swap(model, dynamics='monotone') keeps LIF's gain" in row.why
        assert f"{before:.2g} -> {after:.2g}" in str(report)

    def test_names_no_norm_where_none_decides_on_the_gain(self):
        net = nn.Sequential(layer.Linear(6, 64), neuron.LIFNode(3.0), layer.Linear(64, 3))
        bare = swap(net, dynamics="paper", input_gain=2.0, example_input=torch.randn(32, 6)).changed[0]
        given = self.swapped(0.0, neuron.LIFNode(3.0), input_gain=2.0)[1]
        for row in (bare, given):
            assert "spikes more" in row.why
            assert "norm's scale" not in row.why
            assert "pass input_gain=0.3333 to keep LIF's" in row.why

    def test_warns_of_saturation_unless_the_gain_is_kept(self):
        row = self.swapped(4.0, neuron.LIFNode(20.0))[1]
        assert row.rate[1] > 0.9 > row.rate[0]
        assert "WARNING: saturated" in row.why
        kept = self.swapped(4.0, neuron.LIFNode(20.0), dynamics="lif")[1]
        assert "WARNING" not in kept.why
        assert kept.rate[1] == pytest.approx(kept.rate[0], rel=0.5)

    def test_warns_of_silence(self):
        row = self.swapped(0.0, neuron.LIFNode(2.0, decay_input=False), v_threshold=8.0)[1]
        assert row.rate[1] < 0.01 < row.rate[0]
        assert "WARNING: silent" in row.why

    def test_says_what_is_added_to_a_norm(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.bn1, self.sn1 = nn.Linear(6, 8), nn.BatchNorm1d(8), neuron.LIFNode()
                self.fc2, self.bn2, self.sn2 = nn.Linear(8, 8), nn.BatchNorm1d(8), neuron.LIFNode()
                self.out = nn.Linear(8, 3)

            def forward(self, x):
                h = self.sn1(self.bn1(self.fc1(x)))
                return self.out(self.sn2(self.bn2(self.fc2(h)) + h))

        # One sample, which the norms cannot normalize.
        first, second = swap(Residual(), example_input=torch.rand(1, 6)).rows
        assert "(at the moments of bn1)" in first.why
        assert "(at the moments of bn2, without what sn1 adds)" in second.why
        assert "(measured on example_input)" in swap(Residual(), example_input=torch.rand(64, 6)).rows[1].why

    @pytest.mark.parametrize("trained", [False, True])
    def test_are_those_of_the_network_before_and_after(self, trained):
        """An attention's neuron has no norm before it, and receives products of spikes, of which there are more."""

        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.bn, self.sn = layer.Linear(16, 96), nn.BatchNorm1d(96), neuron.LIFNode()
                self.attn, self.out = neuron.LIFNode(v_threshold=0.5), layer.Linear(32, 4)

            def forward(self, x):
                normed = self.bn(self.qkv(x).flatten(0, 1)).unflatten(0, x.shape[:2])
                q, k, v = self.sn(normed).chunk(3, -1)
                return self.out(self.attn(q @ k.transpose(-1, -2) @ v * 0.5))

        def rates(net):
            found = {}
            hooks = [
                net.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: found.update({n: y.mean().item()}))
                for n in ("sn", "attn")
            ]
            functional.reset_net(net.train(not trained))
            net(x)
            functional.reset_net(net)
            for hook in hooks:
                hook.remove()
            return found

        torch.manual_seed(0)
        net, x = Attention(), torch.randn(4, 24, 16)
        functional.set_step_mode(net, "m")
        if trained:
            for _ in range(50):
                net(x)
                functional.reset_net(net)
        before, numbers = rates(copy.deepcopy(net)), torch.get_rng_state()
        report = swap(net, example_input=x)
        assert torch.equal(numbers, torch.get_rng_state())
        after = rates(net)
        assert after["sn"] > 2 * before["sn"]
        assert after["attn"] > 0.5 > 10 * before["attn"]
        for row in report.rows:
            assert row.rate == pytest.approx((before[row.name], after[row.name]))
        assert "WARNING: close to saturation" in report.rows[1].why or "WARNING: saturated" in report.rows[1].why
        assert "swap(model, dynamics='monotone') keeps LIF's gain in every neuron" in report.rows[1].why

    def test_without_an_example_say_whose_input_they_cannot_know(self):
        net = nn.Sequential(
            layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 8), layer.BatchNorm1d(8), neuron.LIFNode(),
            layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 3),
        )  # fmt: skip
        first, normed, last = swap(net).rows
        assert normed.rate[1] > 2 * normed.rate[0]
        assert "neurons before it spike more or less than before, which changes its input" in last.why
        assert "neurons before it spike" not in first.why + normed.why

    def test_tell_why_a_neuron_spikes_more_whose_own_gain_is_lifs(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            layer.Linear(6, 64), TDBatchNorm1d(64), neuron.LIFNode(4.0), layer.Linear(64, 64),
            neuron.LIFNode(decay_input=False), layer.Linear(64, 3),
        )  # fmt: skip
        functional.set_step_mode(net, "m")
        with torch.no_grad():
            net[3].weight.mul_(3), net[3].bias.zero_()
        row = swap(net, example_input=torch.randn(8, 64, 6)).rows[1]
        assert 0.5 > row.rate[1] > 2 * row.rate[0]
        assert "its gain is LIF's, its input comes from neurons whose gain changed" in row.why

    def test_tell_of_a_readout_that_falls_silent(self):
        net = nn.Sequential(layer.Linear(6, 64), neuron.LIFNode(), layer.Linear(64, 3), neuron.LIFNode())
        functional.set_step_mode(net, "m")
        with torch.no_grad():
            net[0].weight.mul_(3), net[2].weight.fill_(0.2)
        row = swap(net, example_input=torch.randn(8, 64, 6), v_threshold=8.0).left[0]
        assert row.rate[0] > 0.1 > row.rate[1] == 0
        assert "its input changed: expected firing rate" in row.why
        assert "WARNING: silent" in row.why

    def test_tell_of_layers_that_were_silent_already_and_of_no_readout(self):
        net = nn.Sequential(
            layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 3),
            neuron.LIFNode(),
        )  # fmt: skip
        functional.set_step_mode(net, "m")
        x = 0.01 * torch.randn(4, 5, 6)
        unmeasured = swap(copy.deepcopy(net))
        first, second, readout = swap(net, example_input=x).rows
        for row in (first, second):
            assert row.rate == (0, 0)
            assert "silent with LIF, too (0 and 0 spikes a step, measured on example_input)" in row.why
            assert "WARNING" not in row.why
        assert (readout.changed, readout.rate) == (False, (0, 0))
        assert "silent" not in readout.why + str(unmeasured)

    def test_are_not_expected_behind_weights_that_are_not_finite(self):
        net = nn.Sequential(layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 8), neuron.LIFNode(), nn.Flatten())
        functional.set_step_mode(net, "m")
        with torch.no_grad():
            net[0].weight[0, 0] = math.nan
        row = swap(net, readout="swap", example_input=torch.randn(4, 5, 6)).rows[0]
        assert row.rate is None
        assert "WARNING: its input has NaN or infinite values" in row.why
        assert "silent" not in row.why

    def test_expects_no_rate_of_an_input_that_is_not_finite(self):
        report, row = self.swapped(math.nan, neuron.LIFNode(2.0))
        assert row.rate is None
        assert "WARNING: its input has NaN or infinite values" in str(report)


@pytest.mark.parametrize("lif", [neuron.LIFNode, neuron.ParametricLIFNode])
def test_a_reset_that_goes_below_zero_and_back_leaves_the_map_without_rebound(lif):
    net = nn.Sequential(layer.Linear(4, 4), lif(), layer.Linear(4, 2))
    swap(net)
    node, before = net[1], repr(net[1])
    node.v_reset = -0.25
    assert node.dynamics == "lif"
    assert node.params.rebound
    node.v_reset = 0.0
    assert node.dynamics == "monotone"
    assert not node.params.rebound
    assert repr(node) == before
    if lif is neuron.LIFNode:
        node.dynamics = "lif"  # the user's choice from now on
        node.v_reset = -0.25
        node.v_reset = 0.0
        assert node.dynamics == "lif"


@pytest.mark.parametrize("v_reset", [-0.25, 0.0, 0.1, None])
def test_the_map_is_chosen_by_the_resting_potential(v_reset):
    net = nn.Sequential(layer.Linear(2, 2), neuron.LIFNode(v_reset=v_reset), layer.Linear(2, 2))
    swap(net)
    assert net[1].dynamics == ("lif" if v_reset == -0.25 else "monotone")
    later = nn.Sequential(layer.Linear(2, 2), neuron.LIFNode(), layer.Linear(2, 2))
    swap(later)
    values = torch.tensor([0.1, 0.0 if v_reset is None else v_reset])
    later[1].v_reset = values
    assert later[1].dynamics == net[1].dynamics


def test_a_gain_that_was_passed_decides_under_a_norm_too():
    for given, gain in (({}, 1.0), ({"decay_input": True}, 0.25), ({"tau": 2.0}, 0.5), ({"input_gain": 0.3}, 0.3)):
        net = nn.Sequential(layer.Linear(6, 6), layer.BatchNorm1d(6), neuron.LIFNode(4.0), layer.Linear(6, 2))
        swap(net, **given)
        assert net[2].params.input_gain == pytest.approx(gain)


@pytest.mark.parametrize(
    ("lif", "kept"),
    [
        (lambda: neuron.LIFNode(tau=4.0), False),
        (lambda: neuron.LIFNode(tau=5.0), True),
        (lambda: neuron.ParametricLIFNode(init_tau=10.0), True),
        (lambda: neuron.IFNode(), False),  # without a leak, as in networks of images
    ],
)
def test_under_a_norm_a_neuron_of_long_memory_keeps_its_surrogate(lif, kept):
    model = nn.Sequential(layer.Linear(4, 4), layer.BatchNorm1d(4), lif(), layer.Linear(4, 2))
    own = model[2].surrogate_function
    swap(model)
    assert (model[2].derived_window is None) == kept
    assert (model[2].surrogate_function is own) == kept
    assert model[2].input_gain == 1  # the norm's scale in any case


@pytest.mark.skipif(not hasattr(surrogate, "SuperSpike"), reason="this version has no SuperSpike")
def test_a_surrogate_of_small_area_is_replaced():
    for alpha, window in ((0.1, "isometric"), (1.0, None)):  # areas of 0.19 and 1.9
        node = neuron.LIFNode(surrogate_function=surrogate.SuperSpike(alpha=alpha))
        swap(nn.Sequential(layer.Linear(8, 8), node, layer.Linear(8, 2)))
        assert node.derived_window == window


@pytest.mark.parametrize(("w", "dtype"), [(-110.0, torch.float32), (-19.0, torch.float16), (110.0, torch.float32)])
def test_a_learned_leak_at_its_limits_is_kept_where_a_map_matches_it(w, dtype):
    node = neuron.ParametricLIFNode()
    node.w.data.fill_(w)
    net = nn.Sequential(layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 8), node, layer.Linear(8, 2)).to(dtype)
    swap(net)
    assert [type(net[1]), type(net[3])] == [QIFNode, LeakQIFNode]
    node.v_threshold = 0.5
    assert node.qif_parameters.a.isfinite()
    assert node.w == w
    assert 1 < node.tau < math.inf


def test_a_learned_leak_under_a_norm_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(layer.Linear(8, 8), layer.BatchNorm1d(8), neuron.ParametricLIFNode(), layer.Linear(8, 2))
    swap(net)
    assert type(net[2]) is LeakQIFNode
    assert net[2].w.is_meta
