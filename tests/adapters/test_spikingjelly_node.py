"""QIFNode in either SpikingJelly: the host's conventions, with its LIFNode and the core as oracles."""

import copy
import inspect
import io
import math
import pickle
from typing import get_args

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")

from qif_plugins.adapters import spikingjelly as adapter
from qif_plugins.adapters.spikingjelly import AnalyticGaussian, AnalyticWindow, ParametricQIFNode, QIFNode
from spikingjelly.activation_based import base, functional, layer, monitor, neuron, surrogate

from qif_plugins import QIFParameters
from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.surrogate import ATan, Gaussian, Sigmoid, Window
from qif_plugins.ops.backends import BACKENDS, BackendName

pytestmark = pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
HAS_FUNCTIONAL_FORMS = hasattr(base.MemoryModule, "single_step_functional_forward")
HAS_BACKENDS = hasattr(base.MemoryModule, "supported_backends")
needs_functional_forms = pytest.mark.skipif(
    not HAS_FUNCTIONAL_FORMS, reason="this SpikingJelly has no functional forms"
)
needs_backends = pytest.mark.skipif(not HAS_BACKENDS, reason="this SpikingJelly has no backend argument")

T = 6


def inputs(*shape, requires_grad=False, dtype=torch.float32):
    x = torch.randn(*(shape or (T, 3, 4)), dtype=dtype) * 1.2
    return x.requires_grad_(requires_grad)


def weights(x):
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)


def single_steps(node, x):
    node.step_mode = "s"
    return torch.stack([node(step) for step in x])


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "host"), [(QIFNode, neuron.LIFNode), (ParametricQIFNode, neuron.ParametricLIFNode)], ids=["LIF", "PLIF"]
)
def test_first_arguments_are_those_of_lif_in_its_order(ours, host):
    theirs = list(inspect.signature(host).parameters.values())
    mine = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    kept = {"v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"}
    assert all(m.default == t.default for m, t in zip(mine, theirs, strict=False) if t.name in kept)


@pytest.mark.parametrize("cls", [QIFNode, ParametricQIFNode])
def test_the_options_are_listed_and_others_refused_as_python_refuses_them(cls):
    named = inspect.signature(cls).parameters
    assert named.keys() >= {"a", "u1", "u2", "input_gain", "dynamics", "window", "backend"}
    assert not any(p.kind is p.VAR_KEYWORD for p in named.values())
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument 'curvture'"):
        cls(curvture=1.0)
    with pytest.raises(
        TypeError, match=r"'beta'; beta is snnTorch's: here tau .* is 1/\(1 - beta\), with decay_input=False"
    ):
        cls(beta=0.9)


def test_the_name_of_the_other_host_is_pointed_to():
    with pytest.raises(ImportError, match=r"QIF is snnTorch's neuron, in qif_plugins\.adapters\.snntorch; .* QIFNode"):
        from qif_plugins.adapters.spikingjelly import QIF  # noqa: F401


def test_the_names_that_type_checkers_know_are_those_that_there_are():
    assert get_args(BackendName) == ("auto", *BACKENDS)


def test_positional_arguments_reach_their_places():
    arguments = [3.0, False, 0.8, 0.0, surrogate.ATan(3.0), True, "m"]
    arguments += (["torch"] if HAS_BACKENDS else []) + [True]
    lif, node = neuron.LIFNode(*arguments), QIFNode(*arguments)
    for name in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"):
        assert getattr(node, name) == getattr(lif, name), name
    assert node.surrogate_function is arguments[4]
    assert node.backend == ("torch" if HAS_BACKENDS else "auto")


def test_subclass_of_lif_style_passes_arguments_on():
    class Mine(QIFNode):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert Mine(2.0, False).params == QIFNode(tau=2, decay_input=False).params


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, QIFParameters.matching_lif(0.5)),
        ({"dynamics": "paper", "tau": 4.0}, QIFParameters()),
        ({"tau": 4.0}, QIFParameters.matching_lif(0.75, input_gain=0.25)),
        ({"tau": 4, "v_threshold": 2, "v_reset": 0}, QIFParameters.matching_lif(0.75, 2.0, input_gain=0.25)),
        ({"tau": 4.0, "decay_input": False}, QIFParameters.matching_lif(0.75)),
        ({"decay_input": False}, QIFParameters.matching_lif(0.5)),
        ({"dynamics": "lif"}, QIFParameters.matching_lif(0.5, input_gain=0.5)),
        ({"tau": 2.0, "v_reset": None}, QIFParameters.matching_lif(0.5, input_gain=0.5, reset="soft")),
        ({"tau": 2.0, "v_reset": -0.5}, QIFParameters.matching_lif(0.5, input_gain=0.5, v_rest=-0.5)),
        ({"v_reset": None}, QIFParameters.matching_lif(0.5, reset="soft")),
        ({"dynamics": "paper", "v_reset": None}, QIFParameters(reset="soft")),
        ({"tau": 4.0, "a": 0.3}, QIFParameters(a=0.3)),
        ({"u1": 0.1, "u2": -0.4, "v_threshold": 0.7}, QIFParameters(u1=0.1, u2=-0.4, v_threshold=0.7, v_reset=0.0)),
        ({"tau": 4.0, "input_gain": 2}, QIFParameters.matching_lif(0.75, input_gain=2.0)),
    ],
    ids=str,
)
def test_arguments_to_parameters(arguments, expected):
    assert QIFNode(**arguments).params == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamics": "paper", "a": 0.2}, "both decide the map"),
        ({"dynamics": "izhikevich"}, "'paper', 'lif'"),
        ({"tau": 1.0}, "tau must be above 1"),
        ({"tau": 0}, "tau must be above 1 and finite, got 0"),
        ({"v_threshold": 5.0, "dynamics": "paper"}, "unstable fixed point"),
        ({"v_threshold": 0.0, "dynamics": "paper"}, "must then be positive, got v_threshold=0"),
        ({"v_threshold": 0.0}, "v_threshold=0 must lie above v_reset=0"),
        ({"a": -1.0}, "a must be positive"),
        ({"window": "gauss"}, "'unbiased', 'paper', 'heuristic'"),
        ({"window": "paper", "surrogate_function": surrogate.ATan()}, "both decide the surrogate"),
        ({"backend": "tpu"}, "'auto'"),
        ({"step_mode": "x"}, "step_mode"),
        ({"tau": 2.0, "v_threshold": float("inf")}, "v_threshold must be finite, got inf"),
        ({"v_threshold": float("nan")}, "v_threshold must be finite, got nan"),
        ({"tau": 2.0, "v_reset": float("-inf")}, "v_reset must be finite"),
        ({"tau": 2.0, "v_reset": 1.5}, "v_threshold=1 must lie above v_reset=1.5"),
        ({"tau": float("inf")}, "tau must be above 1 and finite, got inf"),
        ({"tau": 1e18}, "tau must be above 1 and finite"),
        ({"tau": 1.1, "v_reset": 0.5}, "tau=1.1 with v_reset=0.5 cannot be matched"),
        ({"window": "unbaised"}, "did you mean 'unbiased'"),
        ({"dynamics": "papr"}, "did you mean 'paper'"),
        ({"v_threshold": nn.Parameter(torch.tensor(0.8))}, r"node\.v_threshold = nn\.Parameter"),
        ({"a": nn.Parameter(torch.tensor(0.2))}, "ParametricQIFNode learns a, u1 and u2"),
        ({"v_threshold": torch.ones(3)}, r"v_threshold has shape \[3\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QIFNode(**arguments)


def test_surrogates_that_are_none_are_refused():
    for wrong in (surrogate.ATan, "atan"):
        with pytest.raises(TypeError, match=r"a class has to be called, surrogate\.ATan\(\)"):
            QIFNode(surrogate_function=wrong)


def test_assigning_a_number_checks_it_and_derives_the_window_anew():
    node = QIFNode(dynamics="paper")
    node.v_threshold = 0.8
    assert node.params == QIFParameters(v_threshold=0.8, v_reset=0.0)
    assert (
        node.surrogate_function.extra_repr()
        == QIFNode(v_threshold=0.8, dynamics="paper").surrogate_function.extra_repr()
    )
    with pytest.raises(ValueError, match="unstable"):
        node.v_threshold = 9.0
    assert node.v_threshold == 0.8
    node.v_reset = None
    assert node.params.reset == "soft"
    node.v_reset = 0.25
    assert node.params == QIFParameters(v_threshold=0.8, v_reset=0.25)
    given = QIFNode(window=Window(0.0, 2.0))
    given.v_threshold = 0.9
    assert (given.surrogate_function.lo, given.surrogate_function.hi) == (-1.0, 1.0)


@pytest.mark.parametrize("name", ["tau", "v_threshold", "v_reset", "a", "u1", "u2", "input_gain"])
def test_a_string_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got '2'"):
        QIFNode(**{name: "2"})
    node = QIFNode()
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got '2'"):
        setattr(node, name, "2")
    assert node.params == QIFNode().params


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ({"tau": 2.0}, "tau", 20.0),
        ({"tau": 2.0}, "tau", 20),
        ({"tau": 2.0}, "tau", torch.tensor(20.0)),
        ({"tau": 2.0}, "decay_input", False),
        ({"decay_input": False}, "tau", 3.0),
        ({}, "tau", 3.0),
        ({}, "decay_input", True),
        ({"tau": 2.0}, "v_threshold", 0.5),
        ({"tau": 2.0}, "v_threshold", torch.tensor(0.5)),
        ({}, "v_threshold", 2),
        ({"tau": 2.0}, "v_reset", -0.25),
        ({"tau": 2.0, "v_reset": -0.25}, "v_reset", None),
        ({}, "v_reset", None),
        ({"tau": 2.0}, "input_gain", 0.7),
        ({"tau": 2.0}, "dynamics", "paper"),
        ({"tau": 2.0, "dynamics": "paper"}, "dynamics", "lif"),
        ({"a": 0.2}, "a", 0.3),
        ({"a": 0.3}, "u2", 0.4),
        ({"tau": 2.0}, "window", "paper"),
        ({"tau": 2.0}, "window", Window(0.25, 1.5)),
        ({"tau": 2.0}, "surrogate_function", surrogate.ATan()),
        ({"tau": 2.0}, "detach_reset", True),
        ({"tau": 2.0}, "backend", "torch"),
        ({"tau": 2.0, "step_mode": "m"}, "store_v_seq", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_an_assignment_makes_the_node_that_construction_makes(arguments, name, value, step_mode):
    node = QIFNode(**arguments)
    single_steps(node, inputs()), node.reset()
    setattr(node, name, value)
    constructed = QIFNode(**{**arguments, name: value})
    x, other = inputs(requires_grad=True), None
    results = []
    for one in (node, constructed):
        if name == "v_reset":  # the membrane of a node goes on from where it was constructed, as the host's does
            one.v = 0.1
        one.step_mode = step_mode
        out = one(x) if step_mode == "m" else single_steps(one, x)
        results.append((out, one.v, *torch.autograd.grad((out * weights(out)).sum() + one.v.sum(), x)))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert node.params == constructed.params
    assert repr(node) == repr(constructed)


def test_assigned_numbers_survive_copies_and_checkpoints():
    node = QIFNode(tau=2.0, step_mode="m")
    node.tau, node.decay_input, node.v_threshold, node.window = 5.0, False, torch.tensor([0.5, 0.8, 0.9, 1.0]), "paper"
    x = inputs()
    expected = node(x)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        twin.reset()
        assert torch.equal(twin(x), expected)
        twin.v_threshold[:] = 0.7
        assert twin.params == QIFNode(5.0, False, 0.7).params or torch.equal(
            twin.params.a, torch.full((4,), QIFNode(5.0, False, 0.7).a)
        )
        assert node.v_threshold.tolist() != twin.v_threshold.tolist()
        twin.tau = 2.0
        assert node.tau == 5.0


def test_a_threshold_written_to_in_place_takes_effect():
    """``functional.set_threshold_margin`` assigns a tensor, and writes into it then."""
    node = QIFNode(tau=2.0, step_mode="m")
    node.v_threshold = torch.ones(4)
    node.v_threshold[2] = 0.4
    x = inputs()
    out = node(x)
    for index, threshold in ((0, 1.0), (2, 0.4)):
        reference = QIFNode(tau=2.0, v_threshold=threshold, step_mode="m")
        assert torch.equal(reference(x[..., index]), out[..., index])
    node.v_threshold[0] = float("nan")
    with pytest.raises(ValueError, match="v_threshold must be finite"):
        node(x)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tau", 1.0, "tau must be above 1"),
        ("tau", float("nan"), "tau must be above 1"),
        ("tau", nn.Parameter(torch.tensor(2.0)), "does not learn tau: ParametricQIFNode"),
        ("decay_input", "no", "decay_input must be True or False"),
        ("v_threshold", -1.0, "v_threshold=-1 must lie above v_reset=0"),
        ("v_threshold", float("inf"), "v_threshold must be finite"),
        ("v_threshold", None, "v_threshold must be a number or a tensor"),
        ("v_threshold", torch.tensor([1.0, float("nan")]), "v_threshold must be finite"),
        ("v_threshold", nn.Parameter(torch.tensor(-1.0)), "must lie above v_reset"),
        ("v_reset", 2.0, "must lie above v_reset=2"),
        ("v_reset", nn.Parameter(torch.tensor(0.0)), "does not learn v_reset"),
        ("input_gain", float("inf"), "input_gain must be finite"),
        ("a", 5.0, "unstable fixed point"),
        ("a", nn.Parameter(torch.tensor(0.2)), "ParametricQIFNode learns a, u1 and u2.*needs another name"),
        ("u1", "x", "u1 must be a number"),
        ("dynamics", "liff", "did you mean 'lif'"),
        ("window", "unbaised", "did you mean 'unbiased'"),
        ("window", 3, "window must be one of"),
        ("surrogate_function", "atan", r"surrogate\.ATan\(\)"),
        ("surrogate_function", None, "surrogate_function must be"),
        ("backend", "tpu", "'auto'"),
        ("step_mode", "x", "step_mode"),
    ],
    ids=str,
)
def test_a_bad_assignment_is_refused_and_changes_nothing(name, value, message):
    node = QIFNode(tau=2.0)
    node(inputs(3, 4))
    before = repr(node), node.v, getattr(node, name)
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(node, name, value)
    assert repr(node) == before[0]
    assert node.v is before[1]
    assert getattr(node, name) == before[2]
    assert not list(node.parameters())


@pytest.mark.parametrize("arguments", [{"dynamics": "paper"}, {"a": 0.3}, {"tau": 3.0, "a": 0.3}], ids=str)
def test_a_leak_that_would_have_no_effect_is_refused_until_it_is_asked_for(arguments):
    node = QIFNode(**arguments)
    shown, tau = repr(node), node.tau
    for name, value in (("tau", 20.0), ("decay_input", False)):
        with pytest.raises(ValueError, match=f"{name}=.* would have no effect.*dynamics='lif' first"):
            setattr(node, name, value)
    assert repr(node) == shown
    assert node.tau == tau
    node.dynamics = "lif"
    node.tau = 20.0
    assert node.params == QIFNode(tau=20.0).params


def test_a_map_assigned_to_a_matched_node_keeps_the_other_numbers():
    node = QIFNode(tau=2.0)
    node.a = 0.3
    assert node.dynamics == "explicit"
    assert node.params == QIFParameters(a=0.3, u1=0.0, u2=-2.0, input_gain=0.5)
    node.dynamics = "lif"
    node.tau = 4.0
    assert node.params == QIFNode(tau=4.0).params


def test_a_surrogate_that_was_assigned_is_kept():
    node, given = QIFNode(), AnalyticWindow(-0.1, 0.1)
    node.surrogate_function = given
    node.v_threshold = 0.9
    assert node.window is None
    assert (given.lo, given.hi) == (-0.1, 0.1)
    node.window = "unbiased"
    assert repr(node) == repr(QIFNode(v_threshold=0.9, window="unbiased"))
    assert (given.lo, given.hi) == (-0.1, 0.1)  # it may be another node's as well


@pytest.mark.parametrize("node_class", [QIFNode, ParametricQIFNode])
def test_a_window_put_in_the_place_of_a_deleted_or_a_registered_one_is_kept(node_class):
    def delete_and_assign(node, given):
        del node.surrogate_function
        node.surrogate_function = given

    def register(node, given):
        node._modules["surrogate_function"] = given

    for put in (delete_and_assign, register, lambda node, given: node.add_module("surrogate_function", given)):
        node, given = node_class(step_mode="m"), AnalyticWindow(-0.1, 0.1, 4.0)
        put(node, given)
        node.v_threshold = 0.9
        assert node.derived_window is None
        x = inputs(requires_grad=True)
        constructed = node_class(v_threshold=0.9, surrogate_function=AnalyticWindow(-0.1, 0.1, 4.0), step_mode="m")
        constructed.load_state_dict(node.state_dict())
        mine, expected = (torch.autograd.grad((n(x) * weights(x)).sum(), x)[0] for n in (node, constructed))
        assert torch.equal(mine, expected)
        assert (given.lo, given.hi, given.height) == (-0.1, 0.1, 4.0)


# -- a learned threshold --------------------------------------------------------------------------


def by_autograd(x_seq, threshold, tau, v_reset, detach_reset):
    """The equations of the folded reset, differentiated by PyTorch; ATan of the host."""
    spike_of, rest = surrogate.ATan(), 0.0 if v_reset is None else v_reset
    if tau is None:
        gain, a, beta = 1.0, 0.25, -0.125
    else:
        beta = 1 - 1 / tau
        gain, a = 1 / tau, 0.5 * (1 - beta) / (threshold - rest)

    def f(v):
        return rest + beta * (v - rest) + a * (v - rest) ** 2

    charge, spikes = f(torch.full_like(x_seq[0], rest)), []
    for x in x_seq:
        h = charge + gain * x
        spikes.append(spike_of(h - threshold))
        s = spikes[-1].detach() if detach_reset else spikes[-1]
        if v_reset is None:
            v = h - s * threshold
            charge = f(v)
        else:
            v = (1 - s) * h + s * v_reset
            charge = (1 - s) * f(h) + s * f(torch.full_like(h, v_reset))
    return torch.stack(spikes), v


@pytest.mark.parametrize("shape", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("tau", [None, 3.0])
def test_a_learned_threshold_has_the_gradient_of_autograd(tau, v_reset, detach_reset, shape):
    x = inputs(dtype=torch.float64)
    oracle = torch.full(shape, 0.8, dtype=torch.float64, requires_grad=True)
    spikes, v = by_autograd(x, oracle, tau, v_reset, detach_reset)
    ((spikes * weights(x)).sum() + v.sum()).backward()
    for run in (lambda node: node(x), lambda node: single_steps(node, x)):
        node = QIFNode(
            tau, v_reset=v_reset, detach_reset=detach_reset, surrogate_function=surrogate.ATan(),
            dynamics="lif" if tau else "paper",
        )  # fmt: skip
        node.step_mode = "m"
        node.v_threshold = nn.Parameter(torch.full(shape, 0.8, dtype=torch.float64))
        out = run(node)
        assert torch.equal(out, spikes)
        ((out * weights(x)).sum() + node.v.sum()).backward()
        torch.testing.assert_close(node.v_threshold.grad, oracle.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", ["isometric", "unbiased", "paper", "heuristic"])
def test_a_learned_threshold_under_the_window_has_the_gradient_of_the_core(window):
    node, x = QIFNode(window=window, step_mode="m", dynamics="paper"), inputs()
    node.v_threshold = nn.Parameter(torch.tensor(0.8))
    (node(x) * weights(x)).sum().backward()
    threshold = torch.tensor(0.8, requires_grad=True)
    params = QIFParameters.unchecked(v_threshold=threshold)
    fixed = QIFNode(v_threshold=0.8, window=window, dynamics="paper")
    spikes, _ = qif_multi_step(x, 0.0, params, fixed.surrogate_function.window(0.8))
    (spikes * weights(x)).sum().backward()
    assert node.v_threshold.grad != 0
    torch.testing.assert_close(node.v_threshold.grad, threshold.grad)


@pytest.mark.parametrize("tau", [None, 3.0])
@pytest.mark.parametrize("window", ["isometric", "unbiased", "paper", "heuristic"])
def test_a_window_follows_a_learned_threshold(window, tau):
    node = QIFNode(tau, window=window, step_mode="m")
    node.v_threshold = nn.Parameter(torch.tensor(0.8))
    with torch.no_grad():
        node.v_threshold.fill_(1.1)
    node(inputs())
    expected = QIFNode(tau, v_threshold=1.1, window=window).surrogate_function
    assert type(node.surrogate_function) is type(expected)
    for name in expected.names:
        assert float(getattr(node.surrogate_function, name)) == pytest.approx(getattr(expected, name), rel=1e-5)


def learnable(node, way):
    """Give ``node`` a learned threshold as published code does; returns the tensor that gets the gradient."""
    threshold = nn.Parameter(torch.tensor(0.8))
    if way != "assign":
        del node.v_threshold
    if way == "register":
        node.register_parameter("v_threshold", threshold)
    else:
        node.v_threshold = threshold
    return threshold


@pytest.mark.parametrize("way", ["assign", "delete and assign", "register"])
def test_a_learned_threshold_is_a_parameter_as_on_the_host(way):
    lif, node = neuron.LIFNode(), QIFNode(tau=2.0)
    theirs, mine = learnable(lif, way), learnable(node, way)
    assert node.v_threshold is mine
    assert [name for name, _ in node.named_parameters()] == [name for name, _ in lif.named_parameters()]
    assert node.state_dict().keys() == lif.state_dict().keys()
    optimizer = torch.optim.SGD(node.parameters(), 0.01)
    node(inputs(3, 4)).sum().backward()
    optimizer.step()
    assert mine != theirs
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert repr(twin) == repr(node)
        assert twin.v_threshold is not mine
        assert [id(p) for p in twin.parameters()] == [id(twin.v_threshold)]
    lif.load_state_dict(node.state_dict(), strict=True)
    fresh = QIFNode(tau=2.0)
    learnable(fresh, way)
    fresh.load_state_dict(node.state_dict(), strict=True)
    assert repr(fresh) == repr(node)
    assert node.a.item() == pytest.approx(0.25 / mine.item())


def test_a_tensor_with_gradient_is_a_threshold():
    node, raw = QIFNode(step_mode="m"), torch.tensor(0.5, requires_grad=True)
    x = inputs()
    for _ in range(2):  # made anew in every iteration, as a reparametrized threshold is
        node.reset()
        node.v_threshold = torch.exp(raw) - 0.8
        node(x).sum().backward()
    assert raw.grad != 0
    with torch.no_grad():
        node.reset()
        expected = QIFNode(v_threshold=node.v_threshold.item(), step_mode="m")(x)
        assert torch.equal(node(x), expected)


def test_a_threshold_may_be_a_buffer():
    node = QIFNode(tau=2.0)
    del node.v_threshold
    with pytest.raises(RuntimeError, match="has no v_threshold since it was deleted"):
        node(inputs(3, 4))
    node.register_buffer("v_threshold", torch.tensor(0.5))
    assert node.params == QIFNode(tau=2.0, v_threshold=0.5).params
    node.load_state_dict({"v_threshold": torch.tensor(0.25)})
    assert node.params == QIFNode(tau=2.0, v_threshold=0.25).params
    with pytest.raises(RuntimeError, match="v_threshold=-1 must lie above"):
        node.load_state_dict({"v_threshold": torch.tensor(-1.0)})
    assert node.v_threshold == 0.25


@pytest.mark.parametrize(
    ("tau", "learned", "used"), [(None, 50.0, 0.99 * 4.5), (None, 2.0, 2.0), (2.0, -3.0, 1e-6), (2.0, 50.0, 50.0)]
)
def test_a_learned_threshold_stays_where_the_membrane_is_stable(tau, learned, used):
    node = QIFNode(tau, step_mode="m", dynamics="lif" if tau else "paper")
    node.v_threshold = nn.Parameter(torch.tensor(0.8))
    with torch.no_grad():
        node.v_threshold.fill_(learned)
    assert node.params.v_threshold.item() == pytest.approx(used)
    x = inputs(50, 3, 4)
    out = node(x)
    out.sum().backward()
    assert node.v.isfinite().all()
    assert node.v_threshold.grad.isfinite()


def test_a_learned_threshold_works_with_transforms_compilation_and_half_precision():
    torch._dynamo.reset()
    node, x = QIFNode(tau=2.0, step_mode="m"), inputs()
    node.v_threshold = nn.Parameter(torch.tensor(0.8))
    spikes = torch.func.functional_call(node, {"v_threshold": torch.tensor(0.3)}, (x,))
    assert torch.equal(spikes, QIFNode(tau=2.0, v_threshold=0.3, step_mode="m")(x))
    node.reset()
    node(x).sum().backward()
    expected, node.v_threshold.grad = node.v_threshold.grad, None
    node.reset()
    torch.compile(node, fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(node.v_threshold.grad, expected)
    node.reset()
    node.half()(x.half()).sum().backward()
    assert node.v_threshold.grad.isfinite()


def test_a_step_after_an_update_of_the_threshold_resets_by_the_spikes_that_were_given():
    node, x = QIFNode(), torch.full((2, 3), 0.9, requires_grad=True)
    node.v_threshold = nn.Parameter(torch.tensor(0.8))
    node(x)
    with torch.no_grad():
        node.v_threshold.fill_(1.5)  # by which the step before would not have fired
    node(x * 0)
    assert torch.equal(node.v, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("v_threshold", nn.Parameter(torch.tensor(0.8)), "QIFNode learns its threshold"),
        ("v_threshold", torch.tensor([0.8, 0.9]), "one fixed v_threshold"),
        ("tau", 3.0, "cannot be assigned: it learns a, u1 and u2"),
        ("decay_input", False, "cannot be assigned"),
        ("a", 0.2, "cannot be assigned"),
        ("dynamics", "paper", "cannot be assigned"),
        ("w", nn.Parameter(torch.tensor(0.0)), "has no w.*swap"),
        ("init_tau", 3.0, "has no init_tau"),
    ],
)
def test_what_a_parametric_node_does_not_take_is_refused(name, value, message):
    node = ParametricQIFNode(init_tau=2.0)
    before, names = repr(node), list(node.state_dict())
    with pytest.raises((AttributeError, ValueError), match=message):
        setattr(node, name, value)
    assert repr(node) == before
    assert list(node.state_dict()) == names


def test_repr_shows_what_came_of_the_arguments():
    text = repr(QIFNode(tau=2.0, window="paper"))
    for part in ("a=0.25", "u1=0", "u2=-2", "v_threshold=1", "input_gain=0.5", "window=paper", "backend=auto", "lo="):
        assert part in text
    assert "dynamics=lif, tau=2" in text


def test_repr_shows_a_leak_that_was_set_aside():
    assert "tau=2 set aside" in repr(QIFNode(tau=2.0, dynamics="paper"))
    assert "tau=2, decay_input=False set aside" in repr(QIFNode(2.0, False, a=0.3))
    assert "set aside" not in repr(QIFNode(tau=2.0)) + repr(QIFNode()) + repr(QIFNode(a=0.3))


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, 0.3, None])
def test_multi_step_is_the_core(v_reset, detach_reset):
    node = QIFNode(v_reset=v_reset, detach_reset=detach_reset, step_mode="m", store_v_seq=True, dynamics="paper")
    x = inputs(requires_grad=True)
    spikes = node(x)
    other = x.detach().clone().requires_grad_()
    window = node.surrogate_function.window(node.v_threshold)
    start = 0.0 if v_reset is None else v_reset
    expected, v_seq = qif_multi_step(other, start, node.params, window, detach_reset, True)
    assert torch.equal(spikes, expected)
    assert torch.equal(node.v_seq, v_seq)
    assert torch.equal(node.v, v_seq[-1])
    (spikes * weights(x)).sum().add(node.v.sum()).backward()
    (expected * weights(x)).sum().add(v_seq[-1].sum()).backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("surrogate_function", [None, surrogate.ATan(), surrogate.PiecewiseQuadratic()], ids=str)
def test_single_steps_and_chunks_have_the_gradients_of_one_sequence(surrogate_function, v_reset, detach_reset):
    x = inputs(requires_grad=True)
    arguments = {"v_reset": v_reset, "detach_reset": detach_reset, "surrogate_function": surrogate_function}

    def gradient(run):
        node = QIFNode(step_mode="m", **arguments)
        out = run(node)
        (grad,) = torch.autograd.grad((out * weights(out)).sum() + node.v.square().sum(), x)
        return out, grad

    whole = gradient(lambda node: node(x))
    for run in (lambda node: single_steps(node, x), lambda node: torch.cat([node(x[:2]), node(x[2:])])):
        out, grad = gradient(run)
        assert torch.equal(out, whole[0])
        torch.testing.assert_close(grad, whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.detach(),
        lambda node: setattr(node, "v", node.v.detach()),
        lambda node: node.v.detach_().fill_(0.2),
        lambda node: node.v.detach_(),
        lambda node: node.v.detach_().requires_grad_(),
        lambda node: setattr(node.v.detach_(), "data", torch.full((3, 4), 0.3)),
        lambda node: node.reset(),
    ],
    ids=["detach", "assign", "in place", "cut", "leaf", "data", "reset"],
)
def test_the_graph_behind_the_state_is_dropped_when_the_state_changes(change):
    node, x = QIFNode(), inputs(2, 3, 4, requires_grad=True)
    node(x[0])
    change(node)
    v = node.v.detach().clone() if isinstance(node.v, torch.Tensor) else node.v
    spike = node(x[1])
    expected, v_next = qif_multi_step(x[1:2].detach(), v, node.params, Window(0.5, 1.5))
    assert torch.equal(spike, expected[0])
    assert torch.equal(node.v, v_next)
    (grad,) = torch.autograd.grad(node.v.sum() + spike.sum(), x)
    assert grad[0].abs().sum() == 0
    assert grad[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_assigned_through_data_is_where_the_next_step_starts(dtype):
    node, x = QIFNode(), inputs(2, 3, 4).to(dtype).requires_grad_()
    node(x[0])
    node.v.data = torch.full((3, 4), 0.3, dtype=dtype)
    node(x[1])
    other = QIFNode()
    other.v = torch.full((3, 4), 0.3, dtype=dtype)
    other(x[1])
    assert torch.equal(node.v, other.v)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_does_not_go_on_behind_a_membrane_that_was_cut(backend):
    torch.compiler.reset()
    node, x = QIFNode(), inputs(2, 3, 4, requires_grad=True)
    step = torch.compile(node, backend=backend)
    step(x[0])
    node.v.detach_()
    step(x[1])
    (grad,) = torch.autograd.grad(node.v.sum(), x)
    assert grad[0].abs().sum() == 0
    assert grad[1].abs().sum() > 0


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_spikes_and_membrane_may_be_used_in_place(step_mode, channels_last):
    x = inputs(2, 3, 4, 5)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    node = QIFNode(step_mode=step_mode)
    out = node(x)
    out += x  # the shortcut of SEW ResNet
    out.sum().backward()
    assert out.stride() == x.stride()
    node.v.detach_()
    node(x.detach())


@pytest.mark.parametrize("surrogate_function", [surrogate.ATan(), surrogate.SoftSign()], ids=["fused", "another"])
@pytest.mark.filterwarnings("ignore:the surrogate")
def test_a_batch_first_view_keeps_its_layout(surrogate_function):
    x = inputs(5, T, 4).transpose(0, 1)
    node = QIFNode(step_mode="m", store_v_seq=True, surrogate_function=surrogate_function)
    assert node(x).stride() == node.v_seq.stride() == x.stride()
    single = QIFNode(surrogate_function=surrogate_function)
    for step in (inputs(5, 4).t(), inputs(5, 4).t()):
        assert single(step).stride() == step.stride()
        assert single.v.stride() == step.stride()


def test_subthreshold_steps_match_lif_near_rest():
    x = inputs(T, 50) * 1e-4
    lif, node = neuron.LIFNode(4.0, step_mode="m"), QIFNode(4.0, step_mode="m")
    lif(x), node(x)
    torch.testing.assert_close(node.v, lif.v, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("host", "core"),
    [
        (surrogate.ATan(3.0), ATan(3.0)),
        (surrogate.Sigmoid(2.0), Sigmoid(2.0)),
        (surrogate.Erf(1.5), Gaussian(1.5 / math.sqrt(math.pi), 1 / (1.5 * math.sqrt(2)))),
        (Gaussian(0.6, 0.5), Gaussian(0.6, 0.5)),
    ],
)
def test_host_surrogates_run_fused_with_the_hosts_gradient(host, core):
    x = inputs(requires_grad=True)
    node = QIFNode(surrogate_function=host, step_mode="m")
    (mine,) = torch.autograd.grad((node(x) * weights(x)).sum(), x)
    spikes, _ = qif_multi_step(x, 0.0, node.params, core)
    (fused,) = torch.autograd.grad((spikes * weights(x)).sum(), x)
    spikes, _ = qif_multi_step(x, 0.0, node.params, host)
    (callable_path,) = torch.autograd.grad((spikes * weights(x)).sum(), x)
    assert torch.equal(mine, fused)
    torch.testing.assert_close(mine, callable_path, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("surrogate_function", [None, surrogate.Sigmoid()], ids=["window", "sigmoid"])
def test_spiking_mode_off_uses_the_primitive_function(surrogate_function):
    node = QIFNode(surrogate_function=surrogate_function, step_mode="m")
    node.surrogate_function.set_spiking_mode(False)
    x = inputs()
    out = node(x)
    h = node.params.input_gain * x[0] + node.params.map(0.0)
    torch.testing.assert_close(out[0], node.surrogate_function(h - 1.0))
    assert not torch.equal(out, out.round())
    node.surrogate_function.set_spiking_mode(True)
    node.reset()
    assert set(node(x).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_half_precision_single_steps_equal_the_sequence(dtype, grad):
    x = inputs(32, 200, dtype=dtype)
    with torch.set_grad_enabled(grad):
        x.requires_grad_(grad)
        node = QIFNode(step_mode="m").to(dtype)
        whole = node(x)
        assert whole.dtype == node.v.dtype == dtype
        v = node.v.clone()
        node.reset()
        assert torch.equal(single_steps(node, x), whole)
        assert torch.equal(node.v, v)
    with torch.inference_mode():
        node.reset()
        assert single_steps(node, x).dtype == dtype


def test_autocast():
    net = nn.Sequential(layer.Linear(5, 4, step_mode="m"), QIFNode(step_mode="m"), layer.Linear(4, 2, step_mode="m"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(inputs(T, 3, 5))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


# -- what LIFNode answers to ----------------------------------------------------------------------


@pytest.fixture(params=[neuron.LIFNode, QIFNode, ParametricQIFNode], ids=["LIFNode", "QIFNode", "ParametricQIFNode"])
def node_class(request):
    """The host's LIFNode goes through the same tests: what it does not pass is no requirement."""
    return request.param


def network(node_class, **arguments):
    return nn.Sequential(
        layer.Conv2d(2, 3, 3, padding=1, bias=False), layer.BatchNorm2d(3), node_class(**arguments), layer.Flatten(),
        layer.Linear(48, 4), node_class(**arguments),
    )  # fmt: skip


def test_step_modes_reset_and_detach_net(node_class):
    net = network(node_class)
    functional.set_step_mode(net, "m")
    x = inputs(T, 2, 2, 4, 4)
    net.eval()
    first = net(x)
    assert first.shape == (T, 2, 4)
    functional.reset_net(net)
    assert all(m.v == m.v_reset for m in net if isinstance(m, node_class))
    functional.set_step_mode(net, "s")
    assert torch.equal(torch.stack([net(step) for step in x]), first)
    functional.detach_net(net)
    assert not any(m.v.requires_grad for m in net if isinstance(m, node_class))
    net.train()  # the old host's LIFNode has no gradient in eval mode
    net(x[0]).sum().backward()


def test_truncated_backpropagation(node_class):
    net = network(node_class)
    for chunk in inputs(T, 2, 2, 4, 4).split(2):
        loss = sum(net(step).sum() for step in chunk)
        loss.backward()
        functional.detach_net(net)
    functional.reset_net(net)


def test_batch_size_may_change_after_a_reset(node_class):
    net = network(node_class)
    for batch in (2, 5):
        net(inputs(batch, 2, 4, 4))
        functional.reset_net(net)


@pytest.mark.skipif(not HAS_FUNCTIONAL_FORMS, reason="this SpikingJelly's LIFNode needs a reset between shapes")
def test_batch_size_may_change_without_a_reset(node_class):
    net = network(node_class)
    net.eval()
    net(inputs(2, 2, 4, 4))
    x = inputs(5, 2, 4, 4)
    changed = net(x)
    functional.reset_net(net)
    assert torch.equal(changed, net(x))


@pytest.mark.skipif(HAS_FUNCTIONAL_FORMS, reason="this SpikingJelly's LIFNode starts anew on a new shape")
def test_another_shape_without_a_reset_is_an_error(node_class):
    node = node_class()
    node(inputs(2, 3))
    with pytest.raises((RuntimeError, ValueError)):
        node(inputs(5, 3))


def test_store_v_seq_in_multi_step_mode(node_class):
    node = node_class(step_mode="m", store_v_seq=True)
    x = inputs()
    node(x)
    assert node.v_seq.shape == x.shape
    assert torch.equal(node.v_seq[-1], node.v)
    functional.detach_net(node)
    assert not node.v_seq.requires_grad
    functional.reset_net(node)
    assert node.v_seq is None


@needs_functional_forms
def test_store_v_seq_accumulates_in_single_step_mode(node_class):
    node, x = node_class(store_v_seq=True), inputs()
    steps = []
    for step in x:
        node(step)
        steps.append(node.v)
    assert torch.equal(node.v_seq, torch.stack(steps))
    node(inputs(7, 4))
    assert node.v_seq.shape == (1, 7, 4)


def test_deepcopy_and_pickle_used_and_unused():
    for cls in (QIFNode, ParametricQIFNode):
        net = network(cls)
        unused = copy.deepcopy(net)
        x = inputs(2, 2, 4, 4, requires_grad=True)
        net.eval(), unused.eval()
        first = net(x)
        for used in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert not used[2].v.requires_grad
            assert torch.equal(used[2].v, net[2].v)
            assert torch.equal(used(x), copy.deepcopy(net)(x))
        assert torch.equal(pickle.loads(pickle.dumps(unused))(x), first)
        net(x).sum().backward()  # the original keeps its graph


def test_state_dict_both_ways_with_lif(tmp_path):
    lif, qif = network(neuron.LIFNode), network(QIFNode)
    path = tmp_path / "net.pt"
    torch.save(lif.state_dict(), path)
    qif.load_state_dict(torch.load(path), strict=True)
    torch.save(qif.state_dict(), path)
    lif.load_state_dict(torch.load(path), strict=True)
    assert qif.state_dict().keys() == lif.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(qif, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)


def test_monitors(node_class):
    net = network(node_class)
    functional.set_step_mode(net, "m")
    for module in net:
        if isinstance(module, node_class):
            module.store_v_seq = True
    spikes = monitor.OutputMonitor(net, node_class)
    currents = monitor.InputMonitor(net, node_class)
    membranes = monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=node_class)
    x = inputs(T, 2, 2, 4, 4)
    net(x).sum().backward()
    assert [r.shape for r in spikes.records] == [r.shape for r in currents.records]
    assert [r.shape for r in membranes.records] == [r.shape for r in spikes.records] == [(T, 2, 3, 4, 4), (T, 2, 4)]


def test_hooked_gradients_and_a_step_of_training(node_class):
    net = network(node_class)[:-1]
    functional.set_step_mode(net, "m")
    gradients = monitor.GradOutputMonitor(net, node_class)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    x, target = inputs(T, 8, 2, 4, 4), torch.arange(8) % 4
    for _ in range(15):
        loss = nn.functional.cross_entropy(net(x).mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        losses.append(loss.item())
    assert len(gradients.records) == 15
    assert losses[-1] < losses[0]


def test_nan_never_spikes():
    x = torch.tensor([[float("nan"), 5.0], [5.0, 5.0]])
    node = QIFNode(step_mode="m")
    assert node(x).tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert node.v.isnan().tolist() == [True, False]
    node.reset()
    assert node(torch.full((2, 2), 5.0)).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_integer_input_is_refused_before_the_state_changes():
    node = QIFNode(step_mode="m")
    node(inputs())
    v = node.v
    with pytest.raises(TypeError, match="floating point"):
        node(torch.ones(T, 3, 4, dtype=torch.int64))
    assert node.v is v


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net = nn.Sequential(layer.Linear(5, 4, step_mode="m"), QIFNode(step_mode="m"))
    x = inputs(T, 3, 5)
    expected = net(x)
    functional.reset_net(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert torch.equal(out, expected)
    out.sum().backward()


# -- 2.0.0 only -----------------------------------------------------------------------------------


@needs_functional_forms
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_to_functional_forward(step_mode, node_class):
    net = network(node_class)
    functional.set_step_mode(net, step_mode)
    net.eval()
    forward = base.to_functional_forward(net)
    x = inputs(T, 2, 2, 4, 4) if step_mode == "m" else inputs(2, 2, 4, 4)
    states = tuple(base.extract_memories(net))
    (out,), after = forward((x,), states)
    assert tuple(base.extract_memories(net)) == states, "the module's own state is untouched"
    assert torch.equal(out, net(x))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, base.extract_memories(net), strict=True))


@needs_functional_forms
def test_functional_single_steps_chain_through_v():
    node, x = QIFNode(detach_reset=True), inputs(requires_grad=True)
    forward = base.to_functional_forward(node)
    out, states = [], (0.0,)
    for step in x:
        (spike,), states = forward((step,), states)
        out.append(spike)
    (grad,) = torch.autograd.grad((torch.stack(out) * weights(x)).sum(), x)
    node.step_mode = "m"
    (expected,) = torch.autograd.grad((node(x) * weights(x)).sum(), x)
    torch.testing.assert_close(grad, expected)


@needs_functional_forms
def test_materialize_states_and_precision(node_class):
    node, x = node_class(step_mode="m"), inputs()
    (v,) = node.materialize_states((x,), (0.25,), "m")
    assert torch.equal(v, torch.full((3, 4), 0.25))
    node._neuron_precision = (torch.float64, "fp32", "fp32")
    (v,) = node.materialize_states((x,), (v,), "m")
    assert v.dtype == torch.float64


@needs_functional_forms
def test_precision_conversion_leaves_the_node_in_high_precision():
    from spikingjelly.activation_based.precision import convert

    report = convert.analyze_convertible_modules(network(QIFNode))
    assert {"2", "5"} <= set(report.high_precision_modules)


@needs_functional_forms
def test_subclass_with_its_own_step_is_run_through_it():
    class Silent(QIFNode):
        def single_step_functional_forward(self, inputs, states, **kwargs):
            (spike,), states = super().single_step_functional_forward(inputs, states, **kwargs)
            return (spike * 0,), states

    node = Silent(step_mode="m")
    x = inputs() + 2
    assert node(x).sum() == 0
    assert single_steps(node, x).sum() == 0


@needs_functional_forms
def test_clock_driven_name_says_which_version_has_it():
    with pytest.raises(ImportError, match=r"0\.0\.0\.0\.14"):
        adapter.MultiStepQIFNode  # noqa: B018
    assert "MultiStepQIFNode" not in adapter.__all__
    with pytest.raises(AttributeError):
        adapter.LIFNode  # noqa: B018


# -- 0.0.0.0.14 only ------------------------------------------------------------------------------


@needs_backends
@pytest.mark.parametrize(
    "v",
    [torch.tensor(0.3), torch.full((4,), 0.3), torch.full((3, 1), 0.3), torch.zeros(3, 4, dtype=torch.int64)],
    ids=lambda v: str(v.shape),
)
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("cls", [neuron.LIFNode, QIFNode, ParametricQIFNode])
def test_an_initial_membrane_broadcasts_as_in_the_host(cls, step_mode, v):
    node, full = cls(step_mode="m"), cls(step_mode="m")
    x = inputs()
    node.v, full.v = v, torch.as_tensor(v).to(torch.float32).expand(3, 4).contiguous()
    node.step_mode = full.step_mode = step_mode
    x = x if step_mode == "m" else x[0]
    assert torch.equal(node(x), full(x))
    assert torch.equal(node.v, full.v)
    assert node.v.shape == (3, 4)


@needs_backends
@pytest.mark.parametrize("cls", [neuron.LIFNode, QIFNode])
def test_the_input_may_broadcast_to_the_membrane(cls):
    node, full = cls(step_mode="m"), cls(step_mode="m")
    node.v = full.v = torch.linspace(-0.5, 0.5, 12).view(3, 4)
    x = inputs(T, 4)
    assert torch.equal(node(x), full(x.unsqueeze(1).expand(T, 3, 4)))


@needs_functional_forms
@pytest.mark.parametrize("v", [torch.tensor(0.3), torch.full((4,), 0.3), torch.zeros(3, 4, dtype=torch.int64)], ids=str)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_an_initial_membrane_is_taken_as_the_host_takes_it(v, step_mode):
    """This SpikingJelly starts anew from a membrane of another shape."""
    node, lif = QIFNode(step_mode=step_mode), neuron.LIFNode(step_mode=step_mode)
    node.v = lif.v = v
    x = inputs() if step_mode == "m" else inputs(3, 4)
    reference = QIFNode(step_mode=step_mode)
    reference.v = lif.materialize_states((x,), (v,), step_mode)[0]
    assert torch.equal(node(x), reference(x))
    assert torch.equal(node.v, reference.v)
    assert lif(x).shape == x.shape


@needs_backends
def test_backend_goes_through_the_hosts_interface(caplog):
    net = network(QIFNode)
    assert net[2].supported_backends[0] == "auto"
    assert {"torch", *BACKENDS} <= set(net[2].supported_backends)
    for name in ("torch", "auto"):
        functional.set_backend(net, name)
        assert {m.backend for m in net if isinstance(m, QIFNode)} == {name}
    assert QIFNode(backend="torch").backend == "torch"
    functional.set_backend(net, "lava")  # not supported: the host warns and leaves it
    assert net[2].backend == "auto"


@needs_backends
@pytest.mark.skipif("cupy" not in BACKENDS, reason="this build of qif_plugins has no CuPy kernels")
def test_cupy_can_be_selected_and_says_what_is_missing_when_it_cannot_run():
    pytest.importorskip("cupy")
    net = nn.Sequential(QIFNode(step_mode="m"))
    functional.set_backend(net, "cupy")
    assert net[0].backend == "cupy"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cupy"):
            net(inputs())


@needs_backends
def test_overridden_single_step_forward_is_run_through_as_in_the_host():
    def subclass(base_class):
        class Gain(base_class):
            def single_step_forward(self, x):
                return super().single_step_forward(3 * x)

        return Gain

    x = inputs()
    for cls in (neuron.LIFNode, QIFNode, ParametricQIFNode):
        multi, plain = subclass(cls)(2.0, step_mode="m", store_v_seq=True), cls(2.0, step_mode="m", store_v_seq=True)
        assert torch.equal(multi(x), plain(3 * x)), cls
        assert torch.equal(multi.v_seq, plain.v_seq), cls
        assert torch.equal(
            single_steps(subclass(cls)(2.0), x), multi(x * 0) * 0 + plain.__class__(2.0, step_mode="m")(3 * x)
        )
    patched = QIFNode(2.0, step_mode="m")
    patched.single_step_forward = lambda step: step * 0
    assert patched(x + 5).sum() == 0


@needs_backends
def test_overridden_charge_fire_or_reset_is_run_through():
    class Silent(QIFNode):
        def neuronal_fire(self):
            return super().neuronal_fire() * 0

    class Same(QIFNode):
        def neuronal_fire(self):
            return super().neuronal_fire()

    x = inputs() + 1
    assert Silent(step_mode="m")(x).sum() == 0
    plain, same = QIFNode(step_mode="m", store_v_seq=True), Same(step_mode="m", store_v_seq=True)
    assert torch.equal(plain(x), same(x))
    torch.testing.assert_close(plain.v_seq, same.v_seq)
    same.step_mode = plain.step_mode = "s"
    assert torch.equal(plain(x[0]), same(x[0]))


def test_analytic_window_is_the_default_surrogate():
    assert type(QIFNode().surrogate_function) is AnalyticGaussian
    assert type(QIFNode(window="unbiased").surrogate_function) is AnalyticWindow
    assert type(QIFNode(window=Window(0.2, 1.2)).surrogate_function) is AnalyticWindow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inference_keeps_one_time_step(dtype):
    node = QIFNode(step_mode="m")
    with torch.no_grad():
        node(torch.randn(8, 100).to(dtype))
    kept = [value for value in node._link if isinstance(value, torch.Tensor)]
    assert max(tensor.untyped_storage().nbytes() for tensor in kept) == 100 * 4


@pytest.mark.parametrize("v_reset", [0.0, -0.4, None])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize(
    "make", [surrogate.ATan, surrogate.Erf, lambda spiking: AnalyticWindow(-0.3, 0.4, 2.0, spiking)]
)
def test_with_spiking_mode_off_the_membrane_is_reset_in_part_in_either_step_mode(make, detach_reset, v_reset):
    """The host's equations with a spike between 0 and 1, differentiated by PyTorch."""
    node = QIFNode(tau=2.0, v_reset=v_reset, surrogate_function=make(spiking=False), detach_reset=detach_reset)
    x, v, out = inputs(requires_grad=True), v_reset or 0.0, []
    for step in x:
        h = node.params.map(v) + node.params.input_gain * step
        out.append(node.surrogate_function(h - node.v_threshold))
        s = out[-1].detach() if detach_reset else out[-1]
        v = h - s * node.v_threshold if v_reset is None else (1 - s) * h + s * v_reset
    expected = torch.stack(out), *torch.autograd.grad((torch.stack(out) * weights(x)).sum(), x)

    def chunks():
        node.step_mode = "m"
        return torch.cat([node(part) for part in x.split(T // 2)])

    for run in (lambda: single_steps(node, x), chunks):
        node.reset()
        spikes = run()
        torch.testing.assert_close((spikes, *torch.autograd.grad((spikes * weights(x)).sum(), x)), expected)
        torch.testing.assert_close(node.v, v)


@pytest.mark.parametrize("name", ["tau", "v_threshold", "v_reset", "input_gain", "a", "u1", "u2"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_shape_that_does_not_fit_is_refused_by_the_name_that_was_assigned(name, step_mode):
    node = QIFNode(tau=2.0, step_mode=step_mode)
    value = torch.full((3,), float(getattr(node, name)))
    setattr(node, name, value)
    v = node.v
    with pytest.raises(
        ValueError, match=rf"^{name} has shape \[3\], which does not broadcast to one time step .* \[2, 4\]"
    ):
        node(torch.zeros(2, 4) if step_mode == "s" else torch.zeros(5, 2, 4))
    assert node.v is v


def test_channels_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^channels=3, and one time step of the input"):
        ParametricQIFNode(channels=3, step_mode="m")(torch.zeros(5, 2, 4))


def test_a_threshold_that_is_a_property_is_refused():
    with pytest.raises(TypeError, match=r"Learned\.v_threshold is a property"):

        class Learned(QIFNode):
            @property
            def v_threshold(self):
                return self.raw.sigmoid()


def test_repr_names_the_window_only_while_it_is_used():
    node = QIFNode()
    assert "window=isometric" in repr(node)
    node.surrogate_function = surrogate.ATan()
    assert "window=isometric" not in repr(node)


def test_repr_shows_a_given_map_without_rebound():
    node = QIFNode(tau=2.0, dynamics="monotone")
    node.dynamics = "explicit"
    assert not node.params.rebound
    assert "dynamics=explicit, rebound=False, a=" in repr(node)
    assert "rebound" not in repr(QIFNode(a=0.25)) + repr(QIFNode(dynamics="monotone"))


def test_vmap_runs_learned_thresholds_without_gradient():
    members = [QIFNode(tau=2.5, step_mode="m") for _ in range(3)]
    for threshold, member in zip((0.5, 0.8, 1.2), members, strict=True):
        member.v_threshold = torch.nn.Parameter(torch.tensor(threshold))
    base, x_seq = copy.deepcopy(members[0]), torch.randn(4, 2, 5)

    def run(parameters, buffers):
        base.reset()
        return torch.func.functional_call(base, (parameters, buffers), (x_seq,))

    together = torch.vmap(run)(*torch.func.stack_module_state(members))
    assert torch.equal(together, torch.stack([member(x_seq) for member in members]))
