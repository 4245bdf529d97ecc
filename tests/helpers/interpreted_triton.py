"""The Triton kernels in Triton's interpreter; run by test_ops_triton.py with TRITON_INTERPRET=1.

A process of its own, because the variable is read once and changes every Triton kernel of a process,
the hosts' and those of torch.compile as well.
"""

import interpreter
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import cases, check_against_reference

from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import ATan
from qif_plugins.ops import sums
from qif_plugins.ops import triton_backend as triton
from qif_plugins.ops.backends import available_backends

# NaN and overflow are among the cases; the interpreter is NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def _interpreter_runs_loops():
    if reason := interpreter.fault():
        pytest.skip(reason)


@given(case=cases())
@settings(max_examples=60)
def test_same_bits_as_the_reference(case):
    check_against_reference(triton, case)


@pytest.fixture(scope="module")
def strided():
    """Blocks small enough that a program visits several, with the 64-bit indices of more than 2^31 neurons."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_SMALL", 16)
        patch.setattr(triton, "_is_wide", lambda lanes: True)
        patch.setattr(sums, "TARGET", 64)
        yield triton


@given(case=cases(max_neurons=300, max_steps=3))
@settings(max_examples=20)
def test_strides_and_wide_indices(strided, case):
    check_against_reference(strided, case)


def test_public_entry():
    assert "triton" in available_backends("cpu")
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        x = torch.randn(3, 2, 5, 4, requires_grad=True)
        gain = torch.rand(5, 1, requires_grad=True)
        params = QIFParameters.unchecked(input_gain=gain)
        spike, v = qif_multi_step(x, 0.1, params, ATan(), store_v_seq=True, backend=backend)
        (spike.sum() + (v * v).sum()).backward()
        results.append((spike, v, x.grad, gain.grad))
    for expected, got in zip(*(r[:3] for r in results), strict=True):
        assert torch.equal(expected, got)
    torch.testing.assert_close(results[1][3], results[0][3], rtol=1e-5, atol=0.0)


def test_another_default_dtype():
    x, a = torch.linspace(-1, 3, 60).view(4, 3, 5), torch.full((5,), 0.25)

    def run():
        leaf, learned = x.clone().requires_grad_(), a.clone().requires_grad_()
        params = QIFParameters.unchecked(a=learned, u1=torch.zeros(()), input_gain=0.9)
        spikes, v = qif_multi_step(leaf, 0.1, params, ATan(), backend="triton")
        (spikes.sum() + (v * v).sum()).backward()
        return spikes, v, leaf.grad, learned.grad

    wanted = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, got, wanted))
