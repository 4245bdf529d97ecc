"""The area under a surrogate, by formula and by integration."""

import math

import pytest
import torch

from qif_plugins import ATan, FastSigmoid, Gaussian, Sigmoid, Window
from qif_plugins.convert.area import area
from qif_plugins.neuron.surrogate import spike

pytestmark = pytest.mark.host_independent

FUSED = [ATan(3.0), Sigmoid(5.0), FastSigmoid(25.0), Gaussian(0.1, 0.1, offset=0.3), Window(-0.1, 0.3, 0.5)]


class SuperSpike(torch.autograd.Function):
    """A project's own surrogate, of area 2/100."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad / (100 * ctx.saved_tensors[0].abs() + 1) ** 2


@pytest.mark.parametrize("surrogate", FUSED, ids=lambda s: type(s).__name__)
def test_the_integral_of_the_gradient_is_that_of_the_formula(surrogate):
    with torch.no_grad():
        found = area(lambda x: spike(x, 0.0, surrogate), 2.0)
    assert found == pytest.approx(area(surrogate), rel=0.02)  # the tails beyond 40


def test_a_window_of_tensors_counts_with_its_mean():
    assert area(Gaussian(torch.tensor([0.1, 0.3]), 0.5)) == pytest.approx(0.1 * math.sqrt(2 * math.pi))
    assert area(Window(torch.tensor([0.0, 0.5]), 1.0)) == pytest.approx(0.75)


def test_a_projects_own_function_is_integrated_and_nothing_else_changes():
    assert area(SuperSpike.apply) == pytest.approx(0.02, rel=1e-2)
    alpha = torch.nn.Parameter(torch.tensor(4.0))
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        assert area(lambda x: torch.sigmoid(alpha * x)) == pytest.approx(1, rel=1e-2)
    assert area(lambda x: (1 + torch.randn_like(x)) * x.sigmoid()) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert alpha.grad is None


def fails(x):
    raise RuntimeError("needs a GPU")


@pytest.mark.parametrize(
    "surrogate",
    [fails, lambda x: (x > 0).float(), lambda x: 0 * x, lambda x: 0.01 * torch.sin(x), lambda x: x.log()],
    ids=["fails", "no gradient", "gradient 0", "negative", "not a number"],
)
def test_what_has_no_area_counts_as_the_true_derivative(surrogate):
    assert area(surrogate) == 1
