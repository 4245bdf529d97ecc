"""MultiStepQIFNode and QIFNode of clock_driven, as projects written for MultiStepLIFNode use them."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly.clock_driven", reason="this SpikingJelly has no clock_driven")

from qif_plugins.adapters import spikingjelly as adapter
from qif_plugins.adapters.spikingjelly import MultiStepQIFNode
from qif_plugins.adapters.spikingjelly.clock_driven import AnalyticGaussian, AnalyticWindow, QIFNode
from spikingjelly.clock_driven import functional, neuron, surrogate

from qif_plugins import QIFParameters
from qif_plugins.neuron.functional import qif_multi_step


def inputs(*shape):
    return torch.randn(*(shape or (5, 3, 4))) * 1.2


@pytest.mark.parametrize(("ours", "host"), [(MultiStepQIFNode, neuron.MultiStepLIFNode), (QIFNode, neuron.LIFNode)])
def test_first_arguments_are_those_of_lif_in_its_order(ours, host):
    theirs = list(inspect.signature(host).parameters)
    mine = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in mine[: len(theirs)]] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    assert "MultiStepQIFNode" in adapter.__all__


def test_positional_arguments_reach_their_places():
    node = MultiStepQIFNode(2.0, True, 0.5, 0.0, surrogate.ATan(), True, "torch", 32)
    assert node.params == QIFParameters.matching_lif(0.5, 0.5, input_gain=0.5)
    assert (node.detach_reset, node.backend, node.lava_s_cale) == (True, "torch", 32)
    assert MultiStepQIFNode().params == QIFParameters.matching_lif(0.5)
    assert MultiStepQIFNode(dynamics="paper").params == QIFParameters()
    with pytest.raises(ValueError, match="'auto'"):
        MultiStepQIFNode(backend="lava")


@pytest.mark.parametrize("v_reset", [0.0, None])
def test_forward_and_gradient_are_the_cores(v_reset):
    node = MultiStepQIFNode(v_reset=v_reset)
    x = inputs().requires_grad_()
    out = node(x)
    expected, v_seq = qif_multi_step(x, 0.0, node.params, node.surrogate_function.window(1.0), store_v_seq=True)
    assert torch.equal(out, expected)
    assert torch.equal(node.v_seq, v_seq)
    assert torch.equal(node.v, v_seq[-1])
    weight = torch.linspace(-1, 1, x.numel()).view(x.shape)
    (mine,) = torch.autograd.grad((out * weight).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.equal(mine, theirs)
    node.reset()
    assert node.v == 0.0
    assert node.v_seq is None


def test_single_step_node_has_the_gradients_of_the_sequence():
    x = inputs().requires_grad_()
    single, multi = QIFNode(), MultiStepQIFNode()
    out = torch.stack([single(step) for step in x])
    whole = multi(x)
    assert torch.equal(out, whole)
    weight = torch.linspace(-1, 1, x.numel()).view(x.shape)
    (mine,) = torch.autograd.grad((out * weight).sum(), x)
    (theirs,) = torch.autograd.grad((whole * weight).sum(), x)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("node_class", [neuron.MultiStepLIFNode, MultiStepQIFNode])
def test_a_block_of_a_spiking_transformer_trains(node_class):
    """The pattern of Spikformer: flatten time into the batch for the weights, unflatten for the neuron."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.norm = nn.BatchNorm1d(6)
            self.lif = node_class(tau=2.0, detach_reset=True, backend="torch")
            self.attention = node_class(tau=2.0, v_threshold=0.5, detach_reset=True, backend="torch")
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            steps, batch, tokens, size = x.shape
            q = self.norm(self.linear(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
            q = self.lif(q.reshape(steps, batch, tokens, size).contiguous())
            x = x + self.attention(q @ q.transpose(-2, -1) @ q * 0.5)
            return self.head(x.mean((0, 2)))

    net = Block()
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    x, target = inputs(4, 12, 5, 6), torch.arange(12) % 3
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_copies_pickles_and_loads_a_lif_checkpoint():
    net, lif = (
        nn.Sequential(nn.Linear(4, 4), MultiStepQIFNode()),
        nn.Sequential(nn.Linear(4, 4), neuron.MultiStepLIFNode()),
    )
    net.load_state_dict(lif.state_dict(), strict=True)
    lif.load_state_dict(net.state_dict(), strict=True)
    net(inputs())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other[1].v_seq, net[1].v_seq)
    net[1].detach()
    assert not net[1].v_seq.requires_grad


def test_overridden_fire_is_run_through():
    class Silent(MultiStepQIFNode):
        def neuronal_fire(self):
            return super().neuronal_fire() * 0

    class Same(MultiStepQIFNode):
        def neuronal_fire(self):
            return super().neuronal_fire()

    x = inputs()
    assert Silent()(x + 2).sum() == 0
    same, plain = Same(), MultiStepQIFNode()
    assert torch.equal(same(x), plain(x))
    torch.testing.assert_close(same.v_seq, plain.v_seq)


@pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
def test_surrogates():
    assert type(MultiStepQIFNode().surrogate_function) is AnalyticGaussian
    assert type(MultiStepQIFNode(window="unbiased").surrogate_function) is AnalyticWindow
    x = inputs().requires_grad_()
    node = MultiStepQIFNode(surrogate_function=surrogate.ATan())
    node(x).sum().backward()
    assert x.grad.abs().sum() > 0
    lif = neuron.MultiStepLIFNode(surrogate_function=AnalyticWindow(-0.5, 0.5))
    lif(x).sum().backward()
    node.surrogate_function.set_spiking_mode(False)
    node.reset()
    assert node(x).unique().numel() > 2


def test_a_sequence_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\[T, N, \*\]"):
        MultiStepQIFNode()(torch.ones(4))


@pytest.mark.parametrize("cls", [QIFNode, MultiStepQIFNode])
def test_assignments_take_effect_or_are_refused(cls):
    x = inputs() if cls is MultiStepQIFNode else inputs(3, 4)
    node = cls(tau=2.0)
    for name, value in (("tau", 5.0), ("decay_input", False), ("v_threshold", 0.5), ("v_reset", None)):
        setattr(node, name, value)
    constructed = cls(5.0, False, 0.5, None)
    assert torch.equal(node(x), constructed(x))
    assert repr(node) == repr(constructed)
    functional.reset_net(node)
    assert node.v_threshold == 0.5
    with pytest.raises(ValueError, match="v_threshold must be finite"):
        node.v_threshold = float("inf")
    node.dynamics = "paper"
    with pytest.raises(ValueError, match="would have no effect"):
        node.tau = 3.0


@pytest.mark.parametrize("way", ["assign", "delete and assign"])
def test_a_threshold_is_learned_in_either_class_alike(way):
    x, gradients = inputs(), []
    for cls in (QIFNode, MultiStepQIFNode):
        node, threshold = cls(tau=2.0), nn.Parameter(torch.tensor(0.8))
        if way == "delete and assign":
            del node.v_threshold
        node.v_threshold = threshold
        assert list(node.state_dict()) == ["v_threshold"]
        out = torch.stack([node(step) for step in x]) if cls is QIFNode else node(x)
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        functional.reset_net(node)
        assert node.v_threshold is threshold
        gradients.append(threshold.grad)
    assert gradients[0] != 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("v", [torch.tensor(0.3), torch.full((4,), 0.3), torch.zeros(3, 4, dtype=torch.int64)], ids=str)
@pytest.mark.parametrize("cls", [neuron.LIFNode, QIFNode, neuron.MultiStepLIFNode, MultiStepQIFNode])
def test_an_initial_membrane_broadcasts_as_in_the_host(cls, v):
    node, full = cls(), cls()
    node.v, full.v = v, v.to(torch.float32).expand(3, 4).contiguous()
    x = inputs() if "MultiStep" in cls.__name__ else inputs(3, 4)
    assert torch.equal(node(x), full(x))
    assert torch.equal(node.v, full.v)
