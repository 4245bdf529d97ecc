"""The isometric surrogates: their two equations by quadrature, their prediction against networks that run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qif_plugins import Gaussian, MomentClosureError, QIFParameters, Window, membrane_moments, qif_multi_step
from qif_plugins.experiments.studies.chain import GradientChain
from qif_plugins.neuron.isometry import gaussian_width, rectangle_width, relative_mean_square
from qif_plugins.neuron.moments import membrane_memory
from qif_plugins.neuron.simulate import simulate_membrane
from qif_plugins.neuron.surrogate import isometric_gaussian

pytestmark = pytest.mark.host_independent

NEURONS = {
    "paper": QIFParameters(),
    "matched": QIFParameters.matching_lif(0.5),
    "monotone": QIFParameters.matching_lif(0.5, rebound=False),
    "long leak": QIFParameters.matching_lif(0.9),
    "soft": QIFParameters.matching_lif(0.5, reset="soft"),
}


def normal_mean(function, mean, std):
    """E[function(h)] for h ~ N(mean, std²), by the midpoint rule."""
    edges = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    z = (edges[1:] + edges[:-1]) / 2
    weight = torch.exp(-0.5 * z * z)
    return (weight * function(mean + std * z)).sum().item() / weight.sum().item()


def memory(params, mean, std):
    """E[(∂h[t+1]/∂h[t])²], by the midpoint rule."""

    def square(h):
        below = (h < params.v_threshold).double()
        kept = params.map_derivative(h) * below
        if params.reset == "soft":
            kept = kept + params.map_derivative(h - params.v_threshold) * (1 - below)
        return kept.square()

    return normal_mean(square, mean, std)


def asked_for(params, mean, std, input_std):
    """E[w] and E[w²] of the theory, the least width aside."""
    z = (params.v_threshold - mean) / std
    rate = 0.5 * math.erfc(z / math.sqrt(2))
    density = math.exp(-0.5 * z * z) / (std * math.sqrt(2 * math.pi))
    return density, rate * (1 - rate) * (1 - memory(params, mean, std)) / input_std**2


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(NEURONS)), st.floats(0.3, 1.2), st.floats(-0.5, 0.5),
    st.sampled_from([Gaussian, Window]),
)  # fmt: skip
def test_mean_and_mean_square_are_those_asked_for(neuron, input_std, input_mean, shape):
    params = NEURONS[neuron]
    try:
        mean, std = membrane_moments(params, input_std, input_mean)
    except MomentClosureError:
        return
    surrogate = shape.isometric(params, input_std, input_mean)
    first, second = asked_for(params, mean, std, input_std)
    assert normal_mean(lambda h: surrogate.derivative(h, 1.0), mean, std) == pytest.approx(first, rel=1e-3)
    second = max(second, math.pi / 2 * first**2)  # the width stops there
    assert normal_mean(lambda h: surrogate.derivative(h, 1.0).square(), mean, std) == pytest.approx(second, rel=2e-3)


@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_the_memory_is_that_of_the_map(neuron):
    moments = (torch.tensor(value, dtype=torch.float64) for value in (0.2, 0.9))
    expected = memory(NEURONS[neuron], 0.2, 0.9)
    assert membrane_memory(NEURONS[neuron], *moments).item() == pytest.approx(expected, rel=1e-4)


@given(st.floats(-1000, 1000), st.floats(0, 60))
def test_widths_are_finite_however_far_the_threshold_is(z, more):
    z = torch.tensor(z, dtype=torch.float64)
    _, log_rho = relative_mean_square(QIFParameters(), 1.0 - z, torch.ones_like(z))
    for width in (gaussian_width(z, log_rho + more), rectangle_width(z, log_rho + more)):
        assert 0 < width.item() < 2


def test_a_threshold_far_in_the_tail_has_a_surrogate():
    for input_std in (0.02, 0.1):
        for surrogate in (Gaussian.isometric(QIFParameters(), input_std), Window.isometric(QIFParameters(), input_std)):
            assert all(math.isfinite(value) for value in surrogate.coefficients())
            assert surrogate.derivative(torch.tensor([1.0]), 1.0).item() > 0


def test_one_for_each_channel():
    params = QIFParameters(v_threshold=torch.tensor([0.5, 1.0, 2.0]).view(3, 1))
    for shape in (Gaussian, Window):
        many = shape.isometric(params)
        for index, threshold in enumerate((0.5, 1.0, 2.0)):
            one = shape.isometric(QIFParameters(v_threshold=threshold))
            for mine, theirs in zip(many.coefficients(), one.coefficients(), strict=True):
                assert torch.as_tensor(mine).expand(3, 1)[index].item() == pytest.approx(theirs, rel=1e-9)


def test_scales_with_the_threshold():
    one = Gaussian.isometric(QIFParameters.matching_lif(0.5))
    other = Gaussian.isometric(QIFParameters.matching_lif(0.5, v_threshold=2.0))
    assert (other.height, other.width) == pytest.approx((one.height / 2, 2 * one.width))


def test_where_only_the_membrane_is_known_it_decides_alone():
    params = QIFParameters.matching_lif(0.9)
    surrogate = Gaussian(*isometric_gaussian(params, -0.5, 1.2))
    kept = 1 - memory(params, -0.5, 1.2)
    first, second = asked_for(params, -0.5, 1.2, 1.2 * math.sqrt(kept))
    assert normal_mean(lambda h: surrogate.derivative(h, 1.0), -0.5, 1.2) == pytest.approx(first, rel=1e-4)
    assert normal_mean(lambda h: surrogate.derivative(h, 1.0).square(), -0.5, 1.2) == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("shape", [Gaussian, Window])
def test_simulated_membranes_get_the_mean_of_the_density(shape):
    params = QIFParameters.matching_lif(0.5)
    surrogate = shape.isometric(params)
    measured = simulate_membrane(params, 1.0, neurons=2**16, windows=(surrogate,))
    mean, std = membrane_moments(params, 1.0)
    assert measured.window_means[0] == pytest.approx(asked_for(params, mean, std, 1.0)[0], rel=0.02)


def gradient_growth(params, surrogate, steps=8, layers=14, width=192, batch=96):
    """How one layer of a deep perceptron with a norm before each neuron changes the mean square of the gradient.

    Returns:
        Measured, with inputs and output gradients that are independent from step to step, and as the chain predicts it.
    """
    torch.manual_seed(0)
    x, inputs = torch.randn(steps, batch, width, requires_grad=True), []
    for _ in range(layers):
        weighted = nn.functional.linear(x, torch.randn(width, width) / math.sqrt(width))
        inputs.append((weighted - weighted.mean((0, 1))) / weighted.std((0, 1)))
        x, _ = qif_multi_step(inputs[-1], 0.0, params, surrogate)
    gradients = torch.autograd.grad((x * torch.randn_like(x)).sum(), [inputs[2], inputs[-3]])
    first, last = (gradient.square().mean().item() for gradient in gradients)
    chain = GradientChain(params, surrogate, steps, params.input_gain)
    predicted = chain.mean_squares(layers, torch.eye(steps, dtype=torch.float64))
    return (first / last) ** (1 / (layers - 5)), (predicted[2] / predicted[-3]) ** (1 / (layers - 5))


@pytest.mark.parametrize("neuron", ["paper", "matched", "monotone"])
def test_deep_networks_keep_the_size_of_their_gradient(neuron):
    """The chain explains what the closed form leaves out, such as that gradients of successive steps are alike."""
    params = NEURONS[neuron]
    for shape in (Gaussian, Window):
        measured, predicted = gradient_growth(params, shape.isometric(params))
        assert measured == pytest.approx(1.0, abs=0.15 if neuron == "monotone" else 0.12)
        assert measured == pytest.approx(predicted, rel=0.03)
    measured, predicted = gradient_growth(params, Window.unbiased(params))
    assert measured > 1.5
    assert measured == pytest.approx(predicted, rel=0.03)


def test_an_input_gain_under_the_norm_is_taken_into_account():
    params = QIFParameters.matching_lif(0.5, input_gain=0.6)
    measured, _ = gradient_growth(params, Gaussian.isometric(params, 0.6))
    assert measured == pytest.approx(1.0, abs=0.15)
