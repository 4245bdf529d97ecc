"""The user's default dtype and device decide nothing about numbers: float32 input gives what it always gives."""

import contextlib

import pytest
import torch
from torch import nn

from qif_plugins import QIFParameters, Window, calibrate, health, qif_multi_step, qif_step, swap
from qif_plugins.neuron.surrogate import ATan
from qif_plugins.ops.backends import available_backends

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(backend, tensors):
    """Outputs and gradients of a step and of a sequence, all numbers floats or all tensors."""
    x = torch.linspace(-1, 3, 60, dtype=torch.float32).view(4, 3, 5).requires_grad_()
    v = torch.linspace(-1, 1, 15, dtype=torch.float32).view(3, 5).requires_grad_()
    numbers = {"a": 0.25, "u1": 0.0, "u2": 0.5, "v_threshold": 1.0, "v_reset": 0.1, "input_gain": 0.9}
    leaves = [x, v]
    if tensors:
        numbers = {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}
        numbers["a"] = numbers["a"].repeat(5).requires_grad_()
        leaves.append(numbers["a"])
    results = []
    for surrogate in (Window.unbiased(QIFParameters()), ATan()):
        params = QIFParameters(**numbers)
        spikes, v_seq = qif_multi_step(x, v, params, surrogate, store_v_seq=True, backend=backend)
        spike, after = qif_step(x[0], 0.3, params, surrogate, backend=backend)
        gradients = torch.autograd.grad((spikes + v_seq * v_seq).sum() + (spike + after).sum(), leaves)
        results += [spikes, v_seq, spike, after, *gradients]
    return results


@pytest.mark.host_independent
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("backend", [*available_backends("cpu"), "auto"])
def test_kernels(backend, tensors, dtype):
    wanted = everything(backend, tensors)
    with default_dtype(dtype):
        got = everything(backend, tensors)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.host_independent
@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_another_default_device(backend):
    wanted = everything(backend, True)
    x = torch.linspace(-1, 3, 60).view(4, 3, 5)
    a = torch.full((5,), 0.25)
    with torch.device("meta"):
        got = qif_multi_step(x, 0.2, QIFParameters(a=a), ATan(), backend=backend)
    for one, other in zip(got, qif_multi_step(x, 0.2, QIFParameters(a=a), ATan(), backend=backend), strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)
    assert all(torch.equal(*pair) for pair in zip(everything(backend, True), wanted, strict=True))


def sequence():
    generator = torch.Generator().manual_seed(0)
    return (1.5 * torch.randn(4, 6, 8, generator=generator, dtype=torch.float32)).requires_grad_()


def run_spikingjelly(node, x):
    node.step_mode, node.store_v_seq = "m", True
    spikes = node(x)
    return [spikes, node.v_seq, *torch.autograd.grad((spikes + node.v_seq).sum(), [x, *node.parameters()])]


def run_snntorch(node, x):
    mem, outputs = node.init_leaky(), []
    for step in x:
        spike, mem = node(step, mem)
        outputs += [spike, mem]
    return [*outputs, *torch.autograd.grad(sum(output.sum() for output in outputs), x)]


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"tau": 3.0}, {"tau": 3.0, "decay_input": False, "detach_reset": True}])
def test_spikingjelly(options, dtype):
    adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")
    wanted = run_spikingjelly(adapter.QIFNode(**options), sequence())
    with default_dtype(dtype):
        got = run_spikingjelly(adapter.QIFNode(**options), sequence())
    assert_same(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one", "channels", "leak"])
def test_learned_parameters(kind, dtype):
    """They are stored in the default dtype, as any module's; a float32 copy of what is stored computes the same."""
    adapter = pytest.importorskip("qif_plugins.adapters.spikingjelly")
    from qif_plugins.convert.leak import LeakQIFNode

    def make():
        if kind == "leak":
            return LeakQIFNode(tau=3.0)
        return adapter.ParametricQIFNode(channels=8 if kind == "channels" else None)

    with default_dtype(dtype):
        stored = make()
    copy = make()
    copy.load_state_dict({name: value.float() for name, value in stored.state_dict().items()})
    with default_dtype(dtype):
        got = run_spikingjelly(stored, sequence())
    wanted = run_spikingjelly(copy, sequence())
    assert all(parameter.dtype == dtype for parameter in stored.parameters())
    tolerance = 1e-5 if dtype == torch.float64 else 0.0  # the map is computed in float64 then
    for one, other in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for one, other in zip(got[3:], wanted[3:], strict=True):
        torch.testing.assert_close(one.float(), other.to(dtype).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.9, "threshold": 0.7}, {"beta": torch.linspace(0.1, 0.9, 8)}, {"a": 0.3, "u1": 0.1}],
    ids=["paper", "leak", "leaks", "numbers"],
)
def test_snntorch(options, dtype):
    adapter = pytest.importorskip("qif_plugins.adapters.snntorch")
    wanted = run_snntorch(adapter.QIF(**options), sequence())
    with default_dtype(dtype):
        got = run_snntorch(adapter.QIF(**options), sequence())
    if dtype == torch.float64:  # Leaky's buffers then hold the leak itself and not its float32 rounding
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert_same(got, wanted)


def test_a_number_of_snntorch_in_half_precision_that_is_changed_is_taken():
    adapter = pytest.importorskip("qif_plugins.adapters.snntorch")
    node = adapter.QIF(beta=0.9).bfloat16()
    assert node.qif_parameters == adapter.QIF(beta=0.9).qif_parameters
    node.beta.fill_(0.5)
    assert node.qif_parameters == QIFParameters.matching_lif(0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_calibrate_and_health(dtype):
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, neuron

    def inspect():
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8, dtype=torch.float32), neuron.LIFNode(), nn.Linear(8, 3).float()]
        net = nn.Sequential(*layers, neuron.LIFNode())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
        functional.set_step_mode(net, "m")
        x = torch.rand(4, 6, 8, generator=generator, dtype=torch.float32)
        swap(net, window="unbiased", example_input=x)
        calibrated = calibrate(net, [x])
        return str(calibrated), net[1].surrogate_function.window(1.0), str(health(net, x))

    wanted = inspect()
    with default_dtype(dtype):
        assert inspect() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_beyond_half_precision_is_finite(dtype):
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import neuron

    with default_dtype(dtype):
        for threshold in (1e5, 3):
            net = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode(v_threshold=float(threshold)), nn.Linear(2, 2))
            assert "finite" not in str(swap(net, readout="swap"))
            assert net[1].v_threshold == threshold


def test_the_memory_of_a_batch_is_that_of_the_model_whatever_the_default_dtype():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional

    from qif_plugins.experiments.training.sizes import activations

    net = nn.Sequential(nn.Flatten(2), nn.Linear(4, 3, dtype=torch.float32))
    with default_dtype(torch.float64):
        assert activations(net, (1, 2, 2), functional.reset_net) == 3
