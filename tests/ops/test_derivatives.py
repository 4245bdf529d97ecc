"""Derivatives beyond one backward pass: second ones, batched ones, and those of a call captured without gradients."""

import functools
import warnings

import pytest
import torch
from oracle import simulate
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from qif_plugins.neuron.functional import qif_multi_step, qif_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import ATan, FastSigmoid, Gaussian, Sigmoid, Window
from qif_plugins.ops import composed
from qif_plugins.ops.backends import available_backends
from qif_plugins.ops.library import multi_step, multi_step_backward

pytestmark = [pytest.mark.host_independent, pytest.mark.filterwarnings("ignore:`torch.jit")]

PARAMS = QIFParameters()
WINDOW = Window(0.3, 1.6, 0.7)
SURROGATES = [WINDOW, ATan(), Sigmoid(), FastSigmoid(3.0), Gaussian(0.7, 0.6, offset=0.1)]
NAMES = ("a", "u1", "u2", "v_threshold", "v_reset", "input_gain")
BACKENDS = available_backends("cpu")


@pytest.fixture
def no_warning():
    """PyTorch warns where it falls back to a loop over the batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def leaves(soft=False, rebound=True):
    """x, v and the six numbers, one of them one value a neuron, in float64 and with gradient."""
    generator = torch.Generator().manual_seed(3)
    x = 1.2 * torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    v = 0.6 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.25, 0.1, 0.5, 0.9, 0.05, 1.1)]
    numbers[0] = numbers[0] + torch.tensor([0.0, 0.02, -0.03], dtype=torch.float64)
    if soft:
        del numbers[4]
    if not rebound:
        numbers[1:3] = -numbers[1], -4 * numbers[2]
    return [leaf.requires_grad_() for leaf in (x, v, *numbers)]


def parameters(numbers, soft):
    """The neuron of these numbers, one that does not rebound where its second root lies below the first."""
    numbers = dict(zip([name for name in NAMES if not (soft and name == "v_reset")], numbers, strict=True))
    rebound = bool((numbers["u2"] > numbers["u1"]).all())
    return QIFParameters.unchecked(**numbers, reset="soft" if soft else "hard", rebound=rebound)


def by_package(tensors, surrogate, soft, detach_reset, pre_reset):
    x, v, *numbers = tensors
    return qif_multi_step(
        x, v, parameters(numbers, soft), surrogate, detach_reset, True, store_h_seq=True, pre_reset=pre_reset
    )


def by_oracle(tensors, surrogate, soft, detach_reset, pre_reset):
    x, v, *numbers = tensors
    params = parameters(numbers, soft)
    if not pre_reset:
        return simulate(x, v, params, surrogate.derivative, detach_reset)
    # The membrane before its reset, as a step of its own that starts where the map is zero whatever the numbers.
    first = (v / params.input_gain).unsqueeze(0)
    outputs = simulate(torch.cat([first, x]), params.u1.expand_as(v), params, surrogate.derivative, detach_reset)
    return tuple(output[1:] for output in outputs)


def weighted(tensors, seed, power=1):
    generator = torch.Generator().manual_seed(seed)
    return sum(
        (torch.randn(t.shape, generator=generator, dtype=torch.float64) * t**power).sum()
        for t in tensors
        if t is not None
    )


def derivatives(run, soft, order, *options, rebound=True):
    """All derivatives up to ``order``, each of a random functional of those before it."""
    tensors = leaves(soft, rebound)
    value, found = weighted(run(tensors, *options), 0, power=2), []
    for level in range(order):
        gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        found.append([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)])
        value = weighted(gradients, level + 1)
    return found


@pytest.mark.parametrize("pre_reset", [False, True], ids=["", "pre_reset"])
@pytest.mark.parametrize("detach_reset", [False, True], ids=["", "detached"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda surrogate: type(surrogate).__name__)
def test_second_derivatives_are_those_of_the_equations(surrogate, soft, detach_reset, pre_reset):
    options = (surrogate, soft, detach_reset, pre_reset)
    for rebound in (True, False):
        got, wanted = (derivatives(run, soft, 2, *options, rebound=rebound) for run in (by_package, by_oracle))
        assert all(bool(gradient.any()) for gradient in wanted[1])
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("surrogate", [ATan(), Gaussian(0.7, 0.6, offset=0.1)], ids=lambda s: type(s).__name__)
def test_third_derivatives_are_those_of_the_equations(surrogate):
    options = (surrogate, False, False, False)
    got, wanted = (derivatives(run, False, 3, *options) for run in (by_package, by_oracle))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_chained_steps():
    def by_steps(tensors, surrogate, *_):
        x, v, *numbers = tensors
        spikes, membranes, potentials, pre_reset = [], [], [], False
        for step in x:
            spike, after, h = qif_step(
                step, v, parameters(numbers, False), surrogate, store_h=True, pre_reset=pre_reset
            )
            v, pre_reset = h, True
            for found, of_step in zip((spikes, membranes, potentials), (spike, after, h), strict=True):
                found.append(of_step)
        return torch.stack(spikes), torch.stack(membranes), torch.stack(potentials)

    options = (ATan(), False, False, False)
    got, wanted = (derivatives(run, False, 2, *options) for run in (by_steps, by_oracle))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learned", [False, True], ids=["floats", "learned"])
def test_every_backend_has_second_derivatives(backend, learned):
    def second(dtype, backend):
        x = torch.linspace(-1, 2, 24, dtype=dtype).view(4, 6).requires_grad_()
        a = torch.tensor(0.25, dtype=dtype, requires_grad=True)
        params = QIFParameters.unchecked(a=a) if learned else PARAMS
        spikes, v = qif_multi_step(x, 0.2, params, ATan(), backend=backend)
        (first,) = torch.autograd.grad((spikes * x).sum() + (v**3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), [x, a] if learned else x)

    for got, wanted in zip(second(torch.float32, backend), second(torch.float64, "torch"), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "surrogate", [ATan(), Sigmoid(), Gaussian(0.7, 0.6)], ids=lambda surrogate: type(surrogate).__name__
)
def test_second_derivatives_against_finite_differences(surrogate, no_warning):
    """With the reset detached what is differentiated is smooth as long as no membrane crosses the threshold."""
    x, v = (leaf.detach().requires_grad_() for leaf in leaves()[:2])

    def run(x, v):
        spikes, v_seq = qif_multi_step(x, v, PARAMS, surrogate, True, True)
        return spikes * 1.0, v_seq

    assert torch.autograd.gradgradcheck(run, (x, v), check_batched_grad=True)


def loss(x, surrogate=None, **options):
    spikes, v = qif_multi_step(x, 0.1, PARAMS, surrogate or ATan(), **options)
    return (spikes * x).sum() + (v**3).sum()


def hessian_of_the_equations(x):
    def run(x):
        v = torch.full_like(x[0], 0.1)
        spikes, v_seq, _ = simulate(x, v, PARAMS, ATan().derivative, False)
        return (spikes * x).sum() + (v_seq[-1] ** 3).sum()

    return torch.autograd.functional.hessian(run, x)


def by_loop(x):
    grad = torch.func.grad
    rows = [grad(lambda z, i=i: grad(loss)(z).flatten()[i])(x) for i in range(x.numel())]
    return torch.stack(rows).view(*x.shape, *x.shape)


def checkpointed(x):
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x, create_graph=True)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in first.flatten()]
    return torch.stack(rows).view(*x.shape, *x.shape)


HESSIANS = {
    "grad of grad": by_loop,
    "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(loss)),
    "jacrev of grad, in chunks": torch.func.jacrev(torch.func.grad(loss), chunk_size=5),
    "functional.hessian": functools.partial(torch.autograd.functional.hessian, loss),
    "vectorized": functools.partial(torch.autograd.functional.hessian, loss, vectorize=True),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("name", HESSIANS)
def test_every_transform_gives_the_second_derivative(name, no_warning):
    x = leaves()[0].detach()
    torch.testing.assert_close(HESSIANS[name](x), hessian_of_the_equations(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("transform", ["hessian", "jacfwd"])
def test_forward_mode_is_refused_with_what_works_instead(transform):
    x = leaves()[0].detach()
    with pytest.raises(NotImplementedError, match=r"jacrev\(torch.func.jacrev\(f\)\) for a Hessian"):
        getattr(torch.func, transform)(loss)(x)


def test_the_composed_backward_has_the_kernels_bits():
    generator = torch.Generator().manual_seed(0)
    x, grad_spike, grad_v, grad_h = (1.5 * torch.randn(5, 4, 6, generator=generator) for _ in range(4))
    v = torch.randn(4, 6, generator=generator)
    numbers = [torch.rand(6, generator=generator) for _ in range(3)] + [torch.ones(()), torch.zeros(1, 1, 1), None]
    for surrogate in SURROGATES:
        for bits in range(16):
            soft, detach_reset, pre_reset, rebound = (bool(bits >> k & 1) for k in range(4))
            kind = (soft, detach_reset, False, int(surrogate.shape), pre_reset, rebound)
            floats = [0.0] * 5 + [0.9, *surrogate.coefficients(), 0.0]
            h_seq = multi_step(
                x, v, *numbers, None, None, None, floats, torch.float32, *kind, True, True, "torch"
            )[2]  # fmt: skip
            operands = (
                grad_spike, grad_v, grad_h, h_seq, v, x, *numbers, None, None, None, floats, torch.float32, *kind, True,
                [True] * 6, "torch",
            )  # fmt: skip
            got, wanted = composed.multi_step_backward(*operands), multi_step_backward(*operands)
            assert all(map(torch.equal, got[:2], wanted[:2]))
            for one, other in zip(got[2:], wanted[2:], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- batches ---------------------------------------------------------------------------------------


def sample(x, v, a, threshold, backend="auto", **options):
    params = QIFParameters.unchecked(a=a, v_threshold=threshold)
    return qif_multi_step(x, v, params, WINDOW, store_v_seq=True, backend=backend, **options)


def scalar(*arguments, **options):
    spikes, v_seq = sample(*arguments, **options)
    return (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum() + (v_seq**2).sum()


def operands(size=3):
    """x, v, a (one value a channel) and the threshold, each with a batch in front."""
    generator = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(size, 4, 5, 2, generator=generator)
    v, a = torch.randn(size, 5, 2, generator=generator), 0.2 + 0.1 * torch.rand(size, 5, 1, generator=generator)
    return x, v, a, 0.8 + 0.4 * torch.rand(size, generator=generator)


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def looped(function, in_dims, arguments):
    """What ``function`` gives for one sample after another."""
    size = next(x.shape[d] for x, d in zip(arguments, in_dims, strict=True) if d is not None)
    results = [
        function(*(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


IN_DIMS = [
    (0, 0, 0, 0),
    (0, None, None, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (0, 0, None, 0),
    (2, 1, -1, 0),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_is_a_loop(backend, in_dims, no_warning):
    arguments = [
        x[0] if d is None else x.movedim(0, d) for x, d in zip(operands(), in_dims, strict=True)
    ]  # fmt: skip
    arguments[0] = arguments[0].contiguous()
    for function in (
        functools.partial(sample, backend=backend),
        torch.func.grad(functools.partial(scalar, backend=backend), (0, 1)),
    ):
        assert_same(torch.vmap(function, in_dims)(*arguments), looped(function, in_dims, arguments))
    learned = torch.func.grad(functools.partial(scalar, backend=backend), (2, 3))
    torch.testing.assert_close(
        torch.vmap(learned, in_dims)(*arguments), tuple(looped(learned, in_dims, arguments)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("in_dims", IN_DIMS[:5], ids=str)
def test_a_gradient_of_vmap_is_that_of_a_loop(in_dims, no_warning):
    arguments = [(x[0] if d is None else x).clone().requires_grad_() for x, d in zip(operands(), in_dims, strict=True)]
    gradients = [
        torch.autograd.grad(total, arguments)
        for total in (
            torch.vmap(scalar, in_dims)(*arguments).sum(),
            looped(lambda *one: (scalar(*one),), in_dims, arguments)[0].sum(),
        )
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_nested_vmap(no_warning):
    x, v, a, threshold = operands()
    xs = torch.stack([x, -x, 2 * x, x + 1])
    function = torch.func.grad(scalar, (0, 1))
    got = torch.vmap(torch.vmap(function), (0, None, None, None))(xs, v, a, threshold)
    wanted = looped(lambda x: looped(function, (0,) * 4, (x, v, a, threshold)), (0,), (xs,))
    assert_same(got, wanted)


def test_vmap_of_steps_and_of_other_surrogates(no_warning):
    x, v, *_ = operands()
    for surrogate in SURROGATES:

        def step(x, v, surrogate=surrogate):
            return qif_step(x[0], v, PARAMS, surrogate, store_h=True)

        assert_same(torch.vmap(step)(x, v), looped(step, (0, 0), (x, v)))


@pytest.mark.parametrize("learned", [False, True], ids=["floats", "learned"])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda surrogate: type(surrogate).__name__)
def test_batched_gradients_are_those_of_a_loop(surrogate, learned, no_warning):
    params = QIFParameters.unchecked(a=torch.tensor(0.25, requires_grad=True)) if learned else PARAMS
    x = (1.5 * torch.randn(3, 5)).requires_grad_()

    def run(x):
        return qif_multi_step(x, 0.0, params, surrogate, store_v_seq=True)

    jacobian = functools.partial(torch.autograd.functional.jacobian, run, x)
    assert_same(jacobian(vectorize=True), jacobian())
    assert_same(torch.func.jacrev(run)(x), jacobian())
    spikes, _ = run(x)
    batch = torch.randn(4, *spikes.shape)
    (got,) = torch.autograd.grad(spikes, x, batch, is_grads_batched=True, retain_graph=True)
    assert torch.equal(got, torch.stack([torch.autograd.grad(spikes, x, g, retain_graph=True)[0] for g in batch]))


def test_batched_gradients_of_a_learned_number(no_warning):
    a = torch.full((5,), 0.25, requires_grad=True)
    _, v = qif_multi_step(torch.randn(3, 5), 0.0, QIFParameters.unchecked(a=a), WINDOW)
    batch = torch.randn(4, 5)
    (got,) = torch.autograd.grad(v, a, batch, is_grads_batched=True, retain_graph=True)
    wanted = torch.stack([torch.autograd.grad(v, a, g, retain_graph=True)[0] for g in batch])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_per_sample_gradients_of_a_network(host, no_warning):
    if host == "spikingjelly":
        adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")
        neuron = adapter.QIFNode(tau=2.0, step_mode="m")
    else:
        adapter = pytest.importorskip("qif_plugins.adapters.snntorch")
        neuron = adapter.QIF(beta=0.9, learn_beta=True, learn_threshold=True)
    net = nn.ModuleDict({"first": nn.Linear(6, 5), "neuron": neuron, "second": nn.Linear(5, 3)})

    def forward(x):
        current, neuron = net["first"](x), net["neuron"]
        if host == "spikingjelly":
            neuron.reset()
            return net["second"](neuron(current))
        mem, outputs = torch.zeros(5), []
        for step in current:
            spikes, mem = neuron(step, mem)
            outputs.append(net["second"](spikes))
        return torch.stack(outputs)

    net.forward = forward
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    x = 2 * torch.randn(7, 4, 6)

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    wanted = [torch.func.grad(loss)(weights, one) for one in x]
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, torch.stack([one[name] for one in wanted]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "grad of grad"])
def test_compiled_transforms(transform):
    function = torch.func.grad(loss)
    if transform == "vmap of grad":
        function = torch.vmap(function)
    elif transform == "grad of grad":
        function = torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())
    x = torch.randn(3, 4, 5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


# -- captured without gradients --------------------------------------------------------------------


class Neuron(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.25))

    def forward(self, x):
        return qif_multi_step(x, 0.1, QIFParameters.unchecked(a=self.a), ATan())


CAPTURES = {
    "export": lambda module, x: torch.export.export(module, (x,)).module(),
    "export, lowered": lambda module, x: torch.export.export(module, (x,)).run_decompositions().module(),
    "jit.trace": lambda module, x: torch.jit.trace(module, (x,)),
    "make_fx": lambda module, x: make_fx(module)(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", CAPTURES)
def test_captured_without_gradients_then_trained(name):
    x = 1.5 * torch.randn(3, 5)
    results = []
    for capture in (lambda module, x: module, CAPTURES[name]):
        with torch.no_grad():
            module = capture(Neuron(), x)
        leaf = x.clone().requires_grad_()
        spikes, v = module(leaf)
        found = [leaf] if name == "make_fx" else [leaf, *module.parameters()]
        first = torch.autograd.grad((spikes * leaf).sum() + (v**2).sum(), found, create_graph=True)
        results.append([spikes, v, *first, torch.autograd.grad((first[0] ** 2).sum(), leaf)[0]])
    expected = results[0] if name != "make_fx" else [*results[0][:3], results[0][-1]]
    torch.testing.assert_close(results[1], expected)


def test_a_captured_call_chooses_its_backend_where_it_runs():
    program = torch.export.export(Neuron(), (torch.randn(3, 5),))
    (call,) = [node for node in program.graph.nodes if node.target == multi_step]
    assert call.args[-1] == "auto"
    assert_same(program.module()(torch.ones(3, 5)), Neuron()(torch.ones(3, 5)))


def test_a_backend_that_cannot_run_is_refused_while_compiling():
    with pytest.raises(Exception, match="cannot run on cpu"):
        torch.compile(
            lambda x: qif_multi_step(x, 0.0, PARAMS, WINDOW, backend="cupy"), backend="eager", fullgraph=True
        )(torch.randn(3, 5))


def test_an_empty_h_is_refused():
    x = torch.randn(3, 5)
    floats = [0.25, 0.0, 0.5, 1.0, 0.0, 1.0, 0.3, 1.6, 0.7, 0.0]
    kind = (False, False, False, 0, False, True)
    h_seq = multi_step(x, None, *[None] * 9, floats, x.dtype, *kind, False, False, "auto")[2]
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="save_h=True; this one is empty"):
            multi_step_backward(
                x.to(device),
                None,
                None,
                h_seq.to(device),
                *[None] * 11,
                floats,
                x.dtype,
                *kind,
                False,
                [False] * 6,
                "auto",
            )


# -- single steps, whose gradients chain through the membrane before its reset ---------------------


def unrolled(node, x):
    node.reset()
    return (torch.stack([node(step) for step in x]) * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()


def folded(x):
    """What a call over all steps gives."""
    adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")
    leaf = x.clone().requires_grad_()
    node = adapter.QIFNode(step_mode="m")
    (node(leaf) * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum().backward()
    return leaf.grad


def test_steps_chain_under_every_transform():
    adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")
    xs = 1.5 * torch.randn(2, 5, 3, 4)
    wanted = torch.stack([folded(x) for x in xs])

    def run(x):
        return unrolled(adapter.QIFNode(), x)

    leaf = xs.clone().requires_grad_()
    torch.vmap(run)(leaf).sum().backward()
    for got in (
        leaf.grad,
        torch.vmap(torch.func.grad(run))(xs),
        torch.func.grad(lambda xs: torch.vmap(run)(xs).sum())(xs),
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("name", ["export", "jit.trace", "make_fx"])
def test_steps_captured_without_gradients_chain(name):
    adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")

    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = adapter.QIFNode()

        def forward(self, x):
            return unrolled(self.node, x)

    x = 1.5 * torch.randn(5, 3, 4)
    with torch.no_grad():
        module = CAPTURES[name](Unrolled(), x)
    leaf = x.clone().requires_grad_()
    module(leaf).backward()
    torch.testing.assert_close(leaf.grad, folded(x))
