"""ParametricQIFNode: the region no optimizer step can leave, the start, the gradients, the window that follows."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("spikingjelly")

from qif_plugins.adapters.spikingjelly import ParametricQIFNode, QIFNode
from spikingjelly.activation_based import functional, layer

from qif_plugins import Gaussian, QIFParameters, membrane_moments
from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.reparametrization import constrained, unconstrained
from qif_plugins.neuron.surrogate import Window

NAMES = ("raw_a", "raw_u1", "raw_u2")
raw = st.one_of(
    st.sampled_from([0.0, 1e30, -1e30, 3.4e38, -3.4e38]), st.floats(-30, 30, width=32), st.floats(-1e4, 1e4, width=32)
)


def inputs(*shape):
    return torch.randn(*shape) * 1.2


def assert_in_the_region(params):
    """In exact arithmetic on the float32 numbers: float64 with room to spare, and QIFParameters' own checks."""
    a, u1, u2 = (value.detach().double() for value in (params.a, params.u1, params.u2))
    assert all(torch.isfinite(value.float()).all() for value in (a, u1, u2))
    theta = params.v_threshold
    assert (a > 0).all()
    excess = a * (theta - u1) * (theta - u2) - theta  # f(θ) - θ, negative between the fixed points
    assert (excess < 0).all()
    # D - 4 = a²(u1-u2)² + 2a(u1+u2) - 3, without the cancellation in D itself
    assert (a * a * (u1 - u2) ** 2 + 2 * a * (u1 + u2) - 3 < 0).all()
    if params.reset == "hard":
        assert (a * (params.v_reset - u1) * (params.v_reset - u2) < theta).all()


@given(r=raw, w1=raw, w2=raw, threshold=st.floats(0.1, 4.0), soft=st.booleans(), reset=st.floats(-2.0, 0.05))
def test_no_raw_parameters_leave_the_region(r, w1, w2, threshold, soft, reset):
    fixed = QIFParameters.unchecked(v_threshold=threshold, v_reset=reset, reset="soft" if soft else "hard")
    a, u1, u2 = constrained(*(torch.tensor(value, requires_grad=True) for value in (r, w1, w2)), fixed)
    numbers = {"v_threshold": threshold, "v_reset": reset, "reset": fixed.reset}
    assert_in_the_region(QIFParameters.unchecked(a=a, u1=u1, u2=u2, **numbers))
    gradients = torch.autograd.grad(a + u1 + u2, [a, u1, u2])
    assert all(torch.isfinite(g) for g in gradients)


@given(step=st.floats(1e-3, 1e30), seed=st.integers(0, 2**16))
def test_no_optimizer_step_leaves_the_region(step, seed):
    torch.manual_seed(seed)
    node = ParametricQIFNode(step_mode="m", channels=3)
    optimizer = torch.optim.SGD(node.parameters(), lr=step)
    x = inputs(3, 2, 3)
    for _ in range(3):
        optimizer.zero_grad()
        (node(x) * torch.randn(3, 2, 3)).sum().backward()
        for parameter in node.parameters():
            parameter.grad.nan_to_num_(0.0, 1.0, -1.0).clamp_(-1e4, 1e4)
        optimizer.step()
        functional.reset_net(node)
        assert_in_the_region(node.params)
        node(x)
        functional.reset_net(node)
        assert torch.isfinite(node.moments).all()
        surrogate = node.surrogate_function
        assert all(torch.isfinite(torch.as_tensor(getattr(surrogate, name))).all() for name in surrogate.names)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_tau": 2.0},
        {"init_tau": 1000.0, "window": "heuristic"},
        {"init_tau": 3, "decay_input": False, "v_reset": None},
        {"a": 0.3, "u1": -0.1, "u2": 0.2, "v_threshold": 0.7},
        {"v_threshold": 0.5},
        {"channels": 4},
    ],
    ids=str,
)
def test_starts_at_the_given_numbers(arguments):
    node = ParametricQIFNode(**arguments)
    given_arguments = {("tau" if k == "init_tau" else k): v for k, v in arguments.items() if k != "channels"}
    expected = QIFNode(**given_arguments).params
    for name in ("a", "u1", "u2"):
        value = torch.as_tensor(getattr(expected, name), dtype=torch.float32)
        torch.testing.assert_close(getattr(node, name).detach(), value.expand(node.raw_a.shape), rtol=2e-6, atol=1e-7)
    assert node.v_threshold == expected.v_threshold
    assert node.input_gain == expected.input_gain
    assert [name for name, _ in node.named_parameters()] == list(NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 0.9, "u1": 1.0, "u2": 1.0}, "outside the region"),
        ({"u2": -2e6, "a": 2e-7}, "out of reach"),
        ({"v_threshold": -0.5, "v_reset": -1.0}, "positive v_threshold"),
        ({"channels": 0}, "channels must be"),
        ({"init_tau": 0.5}, "tau must be above 1"),
    ],
    ids=str,
)
def test_bad_starts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParametricQIFNode(**arguments)


@pytest.mark.parametrize(("channels", "shape"), [(None, (5, 2, 3)), (3, (5, 2, 3)), (3, (5, 2, 3, 4, 4))])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_spikes_and_gradients_are_the_cores(channels, shape, step_mode):
    node = ParametricQIFNode(2.0, step_mode=step_mode, channels=channels)
    x = inputs(*shape).requires_grad_()
    out = node(x) if step_mode == "m" else torch.stack([node(step) for step in x])
    weight = torch.linspace(-1, 2, x.numel()).view(shape)
    parameters = [getattr(node, name) for name in NAMES]
    mine = torch.autograd.grad((out * weight).sum(), [x, *parameters])

    view = (-1, *[1] * (len(shape) - 3)) if channels else ()
    a, u1, u2 = (value.view(view) for value in constrained(*parameters, QIFParameters()))
    params = QIFParameters(a=a, u1=u1, u2=u2, v_reset=0.0, input_gain=0.5)
    height, width = (
        torch.as_tensor(value).view(view) for value in (node.surrogate_function.height, node.surrogate_function.width)
    )
    expected, _ = qif_multi_step(x, 0.0, params, Gaussian(height, width))
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *parameters])
    assert torch.equal(out, expected)
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", ["isometric", "unbiased", "paper"])
def test_the_window_follows_the_parameters_and_no_forward(window):
    node = ParametricQIFNode(step_mode="m", window=window, channels=2)
    x = inputs(4, 3, 2)
    start = node.moments.clone()
    node.eval()
    node(x)
    functional.reset_net(node)
    assert torch.equal(node.moments, start)
    with torch.no_grad():
        node.raw_a += torch.tensor([0.0, 0.5])
    node(x)
    in_evaluation = node.moments
    functional.reset_net(node)
    node.train()
    for _ in range(3):
        node(x)
        functional.reset_net(node)
    assert torch.equal(node.moments, in_evaluation)
    for channel in range(2):
        params = QIFParameters(*(getattr(node, name)[channel].item() for name in ("a", "u1", "u2")), v_reset=0.0)
        torch.testing.assert_close(
            node.moments[:, channel], torch.tensor(membrane_moments(params, 1.0)), rtol=1e-4, atol=1e-5
        )
        expected = Window.named(window, params)
        got = node.surrogate_function.window(1.0)
        for mine, theirs in zip(got.coefficients(), expected.coefficients(), strict=True):
            assert torch.as_tensor(mine).expand(2)[channel].item() == pytest.approx(theirs, abs=1e-4)
    assert node.moments[1, 1] > node.moments[1, 0]


def test_a_given_window_and_a_given_surrogate_stay():
    node = ParametricQIFNode(step_mode="m", window=Window(0.5, 1.5))
    node(inputs(4, 3, 2))
    assert (node.surrogate_function.lo, node.surrogate_function.hi) == (-0.5, 0.5)
    assert ParametricQIFNode(window="heuristic").surrogate_function.height == 1.0


def test_a_resumed_training_goes_on_bit_for_bit():
    def train(node, optimizer, steps):
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            node(2 * torch.randn(4, 3, 2, generator=generator)).sum().backward()
            optimizer.step()
            functional.reset_net(node)

    def optimizer_of(node):
        return torch.optim.SGD(node.parameters(), lr=0.2)

    trained, resumed = (ParametricQIFNode(step_mode="m", channels=2) for _ in range(2))
    train(trained, optimizer_of(trained), 3)
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for node in (trained, resumed):
        train(node, optimizer_of(node), 3)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(trained.moments, resumed.moments)
    x = inputs(4, 3, 2)
    resumed.eval(), trained.eval()
    assert torch.equal(resumed(x), trained(x))


@pytest.mark.parametrize("stored", [True, False])
def test_a_checkpoint_brings_its_window_with_or_without_the_moments_of_older_versions(stored):
    trained, fresh = ParametricQIFNode(step_mode="m"), ParametricQIFNode(step_mode="m")
    with torch.no_grad():
        trained.raw_a += 0.7
        trained.raw_u2 -= 0.2
    state = trained.state_dict()
    assert list(state) == list(NAMES)
    if stored:
        state["moments"] = torch.tensor([0.3, 1.7])
    fresh.load_state_dict(state, strict=True)
    params = QIFParameters(trained.a.item(), trained.u1.item(), trained.u2.item(), v_reset=0.0)
    expected = torch.tensor(membrane_moments(params, 1.0), dtype=torch.float32)
    torch.testing.assert_close(fresh.moments, expected)
    assert fresh.surrogate_function.width.item() == pytest.approx(Gaussian.isometric(params).width, rel=1e-5)


def test_assigning_the_threshold_keeps_the_learned_map():
    node = ParametricQIFNode()
    with torch.no_grad():
        node.raw_u1 += 0.1
    before = [value.item() for value in (node.a, node.u1, node.u2)]
    node.v_threshold = 0.8
    assert [value.item() for value in (node.a, node.u1, node.u2)] == pytest.approx(before, rel=1e-5)
    assert node.params.v_threshold == 0.8
    with pytest.raises(ValueError, match="unstable"):
        node.v_threshold = 30.0
    assert node.v_threshold == 0.8


def test_it_learns_and_changes_precision():
    net = nn.Sequential(layer.Linear(6, 8), ParametricQIFNode(channels=8), layer.Linear(8, 3))
    functional.set_step_mode(net, "m")
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    x, target = inputs(4, 30, 6), torch.arange(30) % 3
    start = [getattr(net[1], name).detach().clone() for name in NAMES]
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(x).mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(getattr(net[1], name), before) for name, before in zip(NAMES, start, strict=True))
    net.bfloat16()
    out = net(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_in_the_region(net[1].params)


@given(r=st.floats(-8, 8), w1=st.floats(-5, 5), w2=st.floats(-5, 5), threshold=st.floats(0.1, 4.0))
def test_parameters_and_raw_parameters_are_inverse(r, w1, w2, threshold):
    fixed = QIFParameters.unchecked(v_threshold=threshold, reset="soft")
    raws = [torch.tensor(value, dtype=torch.float64) for value in (r, w1, w2)]
    a, u1, u2 = constrained(*raws, fixed)
    back = unconstrained(QIFParameters.unchecked(a=a, u1=u1, u2=u2, v_threshold=threshold, reset="soft", v_reset=0.0))
    assert [back[name].item() for name in NAMES] == pytest.approx([r, w1, w2], rel=1e-6, abs=1e-6)


def test_a_map_of_another_form_is_refused():
    with pytest.raises(ValueError, match="learns a, u1 and u2 of a parabola"):
        ParametricQIFNode(dynamics="monotone")


def test_an_assigned_gain_scales_the_input_of_a_node_that_learns_its_map():
    node = ParametricQIFNode(step_mode="m")
    node.input_gain = 2.0
    assert node.input_gain == node.params.input_gain == 2
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(node(x), ParametricQIFNode(step_mode="m")(2 * x))
