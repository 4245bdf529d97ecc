import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import simulate

from qif_plugins import (
    ATan,
    FastSigmoid,
    Gaussian,
    QIFParameters,
    Sigmoid,
    Window,
    available_backends,
    qif_multi_step,
    qif_step,
)  # fmt: skip
from qif_plugins.neuron.surrogate import spike

pytestmark = pytest.mark.host_independent

SURROGATES = [Window(0.4, 1.6, 0.9), ATan(2.0), Sigmoid(4.0), FastSigmoid(3.0), Gaussian(0.6, 0.5, offset=-0.1)]
DOUBLE = torch.float64


def maker(alpha):
    """Makes surrogates, as the host's functions do; none itself."""
    return lambda x: alpha * x


def leaves(shape, steps, generator):
    """Inputs and numbers in every layout: per layer, per channel, per neuron, with gradient."""
    channels = shape[-2]
    made = {
        "x_seq": torch.randn(steps, *shape, generator=generator, dtype=DOUBLE) * 1.2,
        "v": torch.randn(shape, generator=generator, dtype=DOUBLE) * 0.4,
        "a": 0.2 + 0.1 * torch.rand(channels, 1, generator=generator, dtype=DOUBLE),
        "u1": 0.1 * torch.rand(shape[-1], generator=generator, dtype=DOUBLE),
        "u2": torch.tensor(0.5, dtype=DOUBLE),
        "v_threshold": 0.9 + 0.2 * torch.rand(channels, shape[-1], generator=generator, dtype=DOUBLE),
        "v_reset": torch.tensor(0.05, dtype=DOUBLE),
        "input_gain": torch.tensor([1.1], dtype=DOUBLE),
    }
    for tensor in made.values():
        tensor.requires_grad_()
    return made


def without_rebound(made):
    """The same with roots that a map without rebound takes."""
    roots = {"u1": -made["u1"], "u2": -3 * made["u2"]}
    return made | {name: root.detach().requires_grad_() for name, root in roots.items()}


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("detach_reset", [False, True])
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6), rebound=st.booleans())
def test_gradients_follow_the_equations(surrogate, reset, detach_reset, seed, steps, rebound):
    generator = torch.Generator().manual_seed(seed)
    made = leaves((3, 4, 2), steps, generator)
    made = made if rebound else without_rebound(made)
    numbers = {name: made[name] for name in list(made)[2:]}
    params = QIFParameters(**numbers, reset=reset, rebound=rebound)
    weights = torch.randn(3, *made["x_seq"].shape, generator=generator, dtype=DOUBLE)

    def loss(outputs):
        return sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))

    ours = qif_multi_step(made["x_seq"], made["v"], params, surrogate, detach_reset, True, store_h_seq=True)
    theirs = simulate(made["x_seq"], made["v"], params, surrogate.derivative, detach_reset)
    assert torch.equal(ours[0], theirs[0])
    for mine, reference in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    tensors = list(made.values())
    for name, mine, reference in zip(
        made,
        torch.autograd.grad(loss(ours), tensors, allow_unused=True),
        torch.autograd.grad(loss(theirs), tensors, allow_unused=True),
        strict=True,
    ):
        expected = torch.zeros_like(made[name]) if reference is None else reference
        torch.testing.assert_close(
            mine, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_last_state_and_sequence_agree(reset, detach_reset):
    x = torch.randn(7, 5, 3, dtype=DOUBLE, requires_grad=True)
    params = QIFParameters(reset=reset)
    spikes, v_last = qif_multi_step(x, 0.1, params, SURROGATES[0], detach_reset)
    again, v_seq = qif_multi_step(x, 0.1, params, SURROGATES[0], detach_reset, store_v_seq=True)
    assert torch.equal(spikes, again)
    assert torch.equal(v_last, v_seq[-1])
    weight = torch.randn(5, 3, dtype=DOUBLE)
    (one,) = torch.autograd.grad((v_last * weight).sum(), x)
    (other,) = torch.autograd.grad((v_seq[-1] * weight).sum(), x)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", [*SURROGATES, lambda z: spike(z, 0.0, ATan())], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.filterwarnings("ignore:the surrogate")
def test_calls_chained_through_the_membrane_before_its_reset_equal_one_call(surrogate, reset):
    threshold = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    params = QIFParameters(v_threshold=threshold, reset=reset)
    x = torch.randn(6, 9, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(2, 6, 9, dtype=DOUBLE)
    whole = qif_multi_step(x, 0.0, params, surrogate, store_h_seq=True)
    first = qif_multi_step(x[:2], 0.0, params, surrogate, store_h_seq=True)
    second = qif_multi_step(x[2:], first[2][-1], params, surrogate, store_h_seq=True, pre_reset=True)
    parts = [torch.cat((first[i], second[i])) for i in (0, 2)]
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[2])
    mine = torch.autograd.grad((weight[0] * parts[0] + weight[1] * parts[1]).sum(), (x, threshold))
    reference = torch.autograd.grad((weight[0] * whole[0] + weight[1] * whole[2]).sum(), (x, threshold))
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_steps_equal_the_sequence_and_its_gradient_where_the_reset_is_detached():
    x = torch.randn(8, 11, dtype=DOUBLE, requires_grad=True)
    params = QIFParameters()
    whole, _ = qif_multi_step(x, 0.0, params, SURROGATES[1], detach_reset=True)
    v, spikes = 0.0, []
    for step in x:
        s, v = qif_step(step, v, params, SURROGATES[1], detach_reset=True)
        spikes.append(s)
    spikes = torch.stack(spikes)
    assert torch.equal(spikes, whole)
    weight = torch.randn_like(whole)
    torch.testing.assert_close(
        *(torch.autograd.grad((weight * s).sum(), x)[0] for s in (spikes, whole)), rtol=1e-12, atol=1e-12
    )


def test_one_step_has_the_gradients_of_the_post_reset_membrane():
    x = torch.linspace(-2, 3, 23, dtype=DOUBLE, requires_grad=True)
    v = torch.linspace(-1, 0.9, 23, dtype=DOUBLE, requires_grad=True)
    params, window = QIFParameters(v_reset=0.2), Window(0.5, 1.5, 0.7)
    s, after = qif_step(x, v, params, window)
    h = (params.map(v) + x).detach()
    fired, w = (h >= 1).double(), window.derivative(h, 1.0)
    expected = (1 - fired) + (0.2 - h) * w  # dv/dh
    torch.testing.assert_close(torch.autograd.grad(after.sum(), x, retain_graph=True)[0], expected)
    torch.testing.assert_close(
        torch.autograd.grad(after.sum(), v, retain_graph=True)[0], expected * params.map_derivative(v.detach())
    )
    torch.testing.assert_close(torch.autograd.grad(s.sum(), x)[0], w)


@pytest.mark.filterwarnings("ignore:the surrogate")
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_finite_differences_of_the_smoothed_problem(reset):
    """With the spike replaced by the surrogate's primitive, the gradient is a gradient."""

    def primitive(z):
        return torch.sigmoid(4.0 * z)

    x = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    v = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    numbers = [torch.tensor(value, dtype=DOUBLE, requires_grad=True) for value in (0.25, 0.0, 0.5, 1.0, 0.1, 0.9)]

    def run(x, v, *numbers):
        params = QIFParameters(*numbers[:5], reset, numbers[5])
        return qif_multi_step(x, v, params, primitive, store_v_seq=True)

    assert torch.autograd.gradcheck(run, (x, v, *numbers))


def test_where_no_membrane_meets_the_window_the_kernels_gradient_is_the_true_one():
    params, window = QIFParameters(), Window(0.99, 1.01)
    x = torch.tensor([[0.2, 1.7, -0.4], [0.5, 0.3, 2.5], [0.1, -0.2, 0.3]], dtype=DOUBLE, requires_grad=True)
    _, _, h = qif_multi_step(x, 0.0, params, window, store_h_seq=True)
    assert ((h - 1).abs() > 0.05).all()
    assert torch.autograd.gradcheck(lambda x: qif_multi_step(x, 0.0, params, window, store_v_seq=True)[1], (x,))


def test_the_paper_form_is_the_folded_form():
    """u(t+1) = f(u(t)) (1 - o(t)) + I(t) of arXiv 2510.05168, whose reset value maps to 0."""
    x = torch.randn(20, 50, dtype=DOUBLE) * 1.3
    params = QIFParameters()
    spikes, _, h = qif_multi_step(x, 0.0, params, SURROGATES[0], store_h_seq=True)
    u, o = torch.zeros(50, dtype=DOUBLE), torch.zeros(50, dtype=DOUBLE)
    for t in range(20):
        u = 0.25 * u * (u - 0.5) * (1 - o) + x[t]
        o = (u >= 1).double()
        torch.testing.assert_close(u, h[t])
        assert torch.equal(o, spikes[t])


def test_equality_fires():
    s, v = qif_step(torch.tensor([1.0, 1 - 1e-7]), 0.0, QIFParameters(), SURROGATES[0])
    assert s.tolist() == [1, 0]
    assert v[0] == 0


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("surrogate", [*SURROGATES, torch.nn.Sigmoid()], ids=lambda s: type(s).__name__)
@pytest.mark.filterwarnings("ignore:the surrogate")
def test_nan_never_spikes_and_stays_in_the_membrane(backend, surrogate):
    if isinstance(surrogate, torch.nn.Module):
        surrogate = lambda z: (z >= 0).to(z.dtype)  # noqa: E731
    x = torch.zeros(4, 3)
    x[1, 1] = float("nan")
    spikes, v_seq = qif_multi_step(x, 0.0, QIFParameters(), surrogate, store_v_seq=True, backend=backend)
    assert set(spikes.unique().tolist()) == {0.0}
    assert v_seq.isnan().tolist() == [[False] * 3, *[[False, True, False]] * 3]


@pytest.mark.parametrize("backend", available_backends())
def test_infinite_input_spikes_and_resets(backend):
    x = torch.tensor([[float("inf")], [0.0]])
    spikes, v_seq = qif_multi_step(x, 0.0, QIFParameters(), SURROGATES[0], store_v_seq=True, backend=backend)
    assert spikes.flatten().tolist() == [1, 0]
    assert v_seq.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_compute_in_float32_and_round_once(backend, dtype):
    x = (torch.randn(5, 64) * 1.3).to(dtype)
    half = qif_multi_step(x, 0.0, QIFParameters(), SURROGATES[0], store_v_seq=True, backend=backend)
    full = qif_multi_step(x.float(), 0.0, QIFParameters(), SURROGATES[0], store_v_seq=True, backend="torch")
    assert half[0].dtype == half[1].dtype == dtype
    assert torch.equal(half[0].float(), full[0])
    assert torch.equal(half[1], full[1].to(dtype))


def test_the_membrane_has_the_wider_dtype():
    _, v = qif_step(torch.zeros(3, dtype=torch.float16), torch.zeros(3), QIFParameters(), SURROGATES[0])
    assert v.dtype == torch.float32
    s, v = qif_step(torch.zeros(3), torch.zeros(3, dtype=DOUBLE), QIFParameters(), SURROGATES[0])
    assert (s.dtype, v.dtype) == (torch.float32, DOUBLE)


def layouts():
    """Tensors [3, 2, 4, 5, 6] of every kind of layout, by name."""
    base = torch.randn(3, 2, 4, 5, 6)
    orders = itertools.permutations(range(5))
    yield from (
        (f"memory in the order {order}", base.permute(order).contiguous().permute([order.index(d) for d in range(5)]))
        for index, order in enumerate(orders)
        if index % 3 == 0 or order[0] == 0
    )
    yield "channels last", base.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2))
    yield "every other channel", torch.randn(3, 2, 8, 5, 6)[:, :, ::2]
    yield "every other step", torch.randn(6, 2, 4, 5, 6)[::2]
    yield "a part of a batch-first tensor", torch.randn(4, 5, 4, 5, 6)[1:3, 2:].transpose(0, 1)
    yield "expanded over time", base[:1].expand(3, 2, 4, 5, 6)
    yield "expanded over the batch", base[:, :1].expand(3, 2, 4, 5, 6)
    yield "expanded over the last", base[..., :1].expand(3, 2, 4, 5, 6)


@pytest.mark.parametrize("backend", available_backends())
def test_any_layout_gives_the_values_of_contiguous_input_and_the_strides_of_an_elementwise_function(backend):
    for name, x in layouts():
        params = QIFParameters(a=torch.linspace(0.2, 0.3, x.shape[2]).reshape(-1, 1, 1), u1=torch.rand(6) * 0.1)
        v = torch.rand(4, 2, 5, 6).transpose(0, 1)
        results = []
        for input, runs_on in ((x, backend), (x.contiguous(), "torch")):
            leaves = input.detach().requires_grad_(), v.detach().requires_grad_()
            outputs = [
                output
                for store_v_seq in (False, True)
                for output in qif_multi_step(
                    *leaves, params, SURROGATES[0], store_v_seq=store_v_seq, store_h_seq=True, backend=runs_on
                )
            ]
            loss = sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), name
        spikes, v_last, h_seq, _, v_seq, _, grad_x, grad_v = results[0]
        for result in (spikes, h_seq, v_seq, grad_x):
            assert result.stride() == (x * 2).stride(), name
        assert v_last.stride() == (x[0] * 2).stride(), name
        assert grad_v.stride() == v.stride(), name


@pytest.mark.parametrize("surrogate", [SURROGATES[0], lambda z: spike(z, 0.0, ATan())], ids=["fused", "callable"])
@pytest.mark.filterwarnings("ignore:the surrogate")
def test_single_steps_and_other_surrogates_keep_the_layout_too(surrogate):
    for name, made in layouts():
        for x in (made, made.to(torch.bfloat16)):
            for output in qif_step(x[0], 0.2, PARAMS, surrogate, store_h=True):
                assert output.stride() == (x[0] * 2).stride(), name
            spikes, v_seq, h_seq = qif_multi_step(x, 0.2, PARAMS, surrogate, store_v_seq=True, store_h_seq=True)
            assert spikes.stride() == v_seq.stride() == h_seq.stride() == (x * 2).stride(), name


def test_dimensions_of_size_1_keep_their_strides():
    """They mean nothing, but comparing strides is how one asks for a layout."""
    for x in (torch.randn(6, 1, 5).transpose(0, 1), torch.randn(4, 1, 5).transpose(1, 2), torch.randn(1, 3)):
        spikes, v_seq = qif_multi_step(x, 0.2, PARAMS, SURROGATES[0], store_v_seq=True)
        assert spikes.stride() == v_seq.stride() == x.stride()


def test_no_neurons_is_no_error():
    x = torch.zeros(3, 0, 2, requires_grad=True)
    spikes, v = qif_multi_step(x, 0.0, QIFParameters(), SURROGATES[0])
    assert (spikes.shape, v.shape) == (x.shape, x.shape[1:])
    spikes.sum().backward()
    assert x.grad.shape == x.shape


def test_one_neuron_without_batch():
    spikes, v = qif_multi_step(torch.tensor([0.5, 1.5, 0.0]), 0.0, QIFParameters(), SURROGATES[0])
    assert spikes.tolist() == [0, 1, 0]
    assert v.shape == ()


PARAMS = QIFParameters()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: qif_multi_step(torch.zeros(0, 3), 0.0, PARAMS, SURROGATES[0]), ValueError, "at least one time step"),
        (lambda: qif_multi_step(torch.tensor(1.0), 0.0, PARAMS, SURROGATES[0]), ValueError, "at least one time step"),
        (lambda: qif_multi_step(torch.zeros(2, 3).int(), 0.0, PARAMS, SURROGATES[0]), TypeError, r"int32.*float\(\)"),
        (lambda: qif_multi_step([1.0], 0.0, PARAMS, SURROGATES[0]), TypeError, "x_seq must be a tensor"),
        (lambda: qif_step(torch.zeros(3).long(), 0.0, PARAMS, SURROGATES[0]), TypeError, "floating point"),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), torch.zeros(4), PARAMS, SURROGATES[0]),
            ValueError,
            r"v has shape \[4\] .* \[3\]",
        ),
        (lambda: qif_multi_step(torch.zeros(2, 3), torch.zeros(3).int(), PARAMS, SURROGATES[0]), TypeError, "v must"),
        (lambda: qif_multi_step(torch.zeros(2, 3), None, PARAMS, SURROGATES[0]), TypeError, "v must"),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), 0.0, QIFParameters(a=torch.full((4,), 0.2)), SURROGATES[0]),
            ValueError,
            r"a has shape \[4\]",
        ),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, Window(torch.zeros(2, 1), 1.0)),
            ValueError,
            r"the window's lo has shape \[2, 1\]",
        ),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, Gaussian(1.0, torch.ones(2, 1))),
            ValueError,
            r"the Gaussian's width has shape \[2, 1\]",
        ),
        (lambda: qif_multi_step(torch.zeros(2, 3), 0.0, None, SURROGATES[0]), TypeError, "QIFParameters, got None"),
        (lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, "unbiased"), TypeError, "Window.named"),
        (lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, Window), TypeError, "surrogate must be a Window"),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, maker),
            TypeError,
            "maker takes h - θ .* returned <fun",
        ),
        (
            lambda: qif_multi_step(torch.zeros(2, 3), 0.0, PARAMS, SURROGATES[0], backend="tpu"),
            ValueError,
            "unknown backend 'tpu'; choose from 'auto'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
def test_bad_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_backends_that_compute_in_float32_refuse_float64():
    for backend in available_backends():
        if backend != "torch":
            with pytest.raises(ValueError, match="computes in float32"):
                qif_multi_step(torch.zeros(2, 3, dtype=DOUBLE), 0.0, PARAMS, SURROGATES[0], backend=backend)


def test_the_reference_is_always_available():
    assert available_backends("cpu")[-1] == "torch"
    assert "torch" in available_backends("meta")


@pytest.mark.parametrize(
    ("x", "v"), list(itertools.product([torch.float16, torch.bfloat16, torch.float32, DOUBLE], repeat=2))
)
def test_the_membrane_has_the_dtype_that_both_are_promoted_to(x, v):
    _, after = qif_step(torch.ones(3, dtype=x), torch.zeros(3, dtype=v), QIFParameters(), Window(0.5, 1.5))
    assert after.dtype == torch.promote_types(x, v)


@given(
    beta=st.floats(0.0, 0.99), threshold=st.floats(0.1, 5.0), scale=st.floats(0.1, 1e4), seed=st.integers(0, 2**31 - 1)
)
def test_without_rebound_a_soft_reset_leaves_at_most_the_threshold(beta, threshold, scale, seed):
    params = QIFParameters.matching_lif(beta, v_threshold=threshold, reset="soft", rebound=False)
    x = scale * torch.randn(60, 40, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    spikes, v_seq, h_seq = qif_multi_step(x, 0.0, params, ATan(), store_v_seq=True, store_h_seq=True)
    left = h_seq - threshold * spikes
    assert torch.equal(v_seq, left.clamp(max=threshold))
    bound = params.map(threshold) + x.clamp(min=0)
    assert bool((h_seq <= bound * (1 + 1e-12)).all())
