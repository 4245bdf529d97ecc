import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qif_plugins import (
    ATan,
    FastSigmoid,
    Gaussian,
    QIFParameters,
    Sigmoid,
    Window,
    available_backends,
    membrane_moments,
    qif_multi_step,
)
from qif_plugins.neuron.surrogate import spike, unbiased_window

pytestmark = pytest.mark.host_independent


def test_the_paper_window_is_mean_plus_minus_deviation():
    p = QIFParameters()
    mean, std = membrane_moments(p, 1.0)
    window = Window.paper(p, 1.0)
    assert (window.lo, window.hi, window.height) == pytest.approx((mean - std, mean + std, 1))
    free = Window.paper(p, 1.0, closure="free")
    mean, std = membrane_moments(p, 1.0, closure="free")
    assert (free.lo, free.hi) == pytest.approx((mean - std, mean + std))


@given(st.floats(0.3, 1.5), st.floats(0.1, 2))
def test_the_unbiased_window_has_no_mean_mismatch(input_std, kappa):
    p = QIFParameters()
    mean, std = membrane_moments(p, input_std)
    window = Window.unbiased(p, input_std, kappa=kappa)
    normal = torch.distributions.Normal(mean, std)
    probability = normal.cdf(torch.tensor(window.hi)) - normal.cdf(torch.tensor(window.lo))
    density = normal.log_prob(torch.tensor(1.0)).exp()
    assert (window.height * probability).item() == pytest.approx(density.item(), rel=1e-4)
    assert (window.lo + window.hi) / 2 == pytest.approx(1.0)
    assert window.hi - window.lo == pytest.approx(2 * kappa * std)


def test_the_unbiased_window_stays_finite_far_in_the_tail():
    window = Window.unbiased(QIFParameters(), 0.02)  # the threshold is 50 deviations away
    assert math.isfinite(window.height)
    assert window.height > 0
    batch = unbiased_window(torch.tensor(1.0), torch.tensor([0.0, 0.5]), torch.tensor([0.02, 0.2]))
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in batch)


def test_the_heuristic_window_is_centred_on_the_threshold():
    window = Window.heuristic(QIFParameters(v_threshold=0.8), alpha=2.0)
    assert (window.lo, window.hi, window.height) == pytest.approx((-0.2, 1.8, 0.5))


def test_windows_assume_tdbn_where_nothing_else_is_known():
    p = QIFParameters(v_threshold=0.7)
    assert Window.unbiased(p) == Window.unbiased(p, 0.7)
    assert Window.named("paper", p) == Window.paper(p, 0.7)
    assert Window.named("unbiased", p, 0.5, kappa=1.0) == Window.unbiased(p, 0.5, kappa=1.0)
    assert Window.named("heuristic", p, alpha=2.0) == Window.heuristic(p, 2.0)


def test_windows_are_inclusive():
    window = Window(0.5, 1.5, 2.0)
    h = torch.tensor([0.4999, 0.5, 1.0, 1.5, 1.5001, float("nan")])
    assert window.derivative(h, 1.0).tolist() == [0, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("backend", available_backends())
def test_the_gaussian_ends_in_exact_zeros(backend):
    """At the peak, at 12.6 and 12.7 widths (e⁻⁸⁰ lies between), and where the exponent is beyond float32."""
    gaussian = Gaussian(0.5, 0.1, offset=0.25)
    h = torch.tensor([1.25, 2.51, -0.01, 2.52, -0.02, 1e30, -math.inf, math.nan])
    zeros = [False, False, False, True, True, True, True, True]
    assert (gaussian.derivative(h, 1.0) == 0).tolist() == zeros
    x = h[None, :-2].clone().requires_grad_()  # the neuron's own slope is not finite at the last two
    qif_multi_step(x, 0.0, QIFParameters(), gaussian, backend=backend)[0].sum().backward()
    assert x.grad[0, 0] == 0.5
    assert (x.grad[0] == 0).tolist() == zeros[:-2]


def test_windows_per_channel():
    p = QIFParameters(v_threshold=torch.tensor([0.5, 1.0]).reshape(2, 1))
    window = Window.unbiased(p)
    for index, threshold in enumerate((0.5, 1.0)):
        one = Window.unbiased(QIFParameters(v_threshold=threshold))
        assert window.lo[index].item() == pytest.approx(one.lo)
        assert window.height[index].item() == pytest.approx(one.height)


@pytest.mark.parametrize("surrogate", [Window(0.5, 1.5), ATan(2.0), Sigmoid(4.0), FastSigmoid(5.0), Gaussian(0.7, 0.6)])
def test_the_spike_has_the_surrogates_gradient(surrogate):
    h = torch.linspace(-1, 3, 41, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    s = spike(h, threshold, surrogate)
    assert s.tolist() == [float(x >= 1) for x in h.tolist()]
    s.sum().backward()
    expected = surrogate.derivative(h.detach(), 1.0)
    torch.testing.assert_close(h.grad, expected)
    torch.testing.assert_close(threshold.grad, -expected.sum())


@pytest.mark.parametrize(
    ("surrogate", "primitive"),
    [
        (ATan(3.0), lambda z: torch.atan(math.pi / 2 * 3.0 * z) / math.pi),
        (Sigmoid(3.0), lambda z: torch.sigmoid(3.0 * z)),
        (FastSigmoid(3.0), lambda z: z / (1 + 3.0 * z.abs())),
        (Gaussian(1 / math.sqrt(2 * math.pi) / 0.4, 0.4), lambda z: torch.distributions.Normal(0.0, 0.4).cdf(z)),
        (
            Gaussian(2.0, 0.4, offset=0.3),
            lambda z: 0.4 * math.sqrt(2 * math.pi) * torch.erf((z - 0.3) / 0.4 / 2**0.5),
        ),
    ],
)
def test_surrogates_are_the_derivatives_of_their_primitives(surrogate, primitive):
    z = torch.linspace(-2, 2, 37, dtype=torch.float64) + 0.013
    z.requires_grad_()
    (slope,) = torch.autograd.grad(primitive(z).sum(), z)
    torch.testing.assert_close(surrogate.derivative(z.detach() + 1.0, 1.0), slope)


def test_host_surrogates_do_not_fire_at_equality():
    h = torch.tensor([1.0])
    assert spike(h, 1.0, ATan()).item() == 1
    assert spike(h, 1.0, ATan(strict=True)).item() == 0


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_windows_without_width_are_refused(ends):
    with pytest.raises(ValueError, match="lo < hi"):
        Window(*ends)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="height"):
        Window(0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="alpha"):
        ATan(0.0)
    with pytest.raises(ValueError, match="slope"):
        FastSigmoid(float("nan"))
    for wrong in ((0.0, 1.0), (1.0, 0.0), (1.0, float("inf")), (float("nan"), 1.0), (1.0, torch.tensor([1.0, -1.0]))):
        with pytest.raises(ValueError, match="positive, finite height and width"):
            Gaussian(*wrong)
    with pytest.raises(ValueError, match="offset=inf"):
        Gaussian(1.0, 1.0, offset=math.inf)
    with pytest.raises(TypeError, match="width must be a number or a tensor"):
        Gaussian(1.0, "wide")
    with pytest.raises(ValueError, match="kappa"):
        Window.unbiased(QIFParameters(), kappa=-1.0)
    with pytest.raises(ValueError, match="alpha"):
        Window.heuristic(QIFParameters(), alpha=0.0)
    with pytest.raises(ValueError, match="'unbiased', 'paper', 'heuristic'"):
        Window.named("wide", QIFParameters())


def test_windows_are_values_with_tensors_too():
    per_channel = Window(torch.zeros(3), torch.ones(3))
    assert per_channel == Window(torch.zeros(3), torch.ones(3))
    assert hash(per_channel) == hash(Window(torch.zeros(3), torch.ones(3)))
    assert per_channel != Window(torch.zeros(3), torch.full((3,), 2.0))
    assert per_channel != Window(0.0, 1.0)
    assert Window(0.0, 1.0) == Window(0, 1)
    assert Gaussian(1.0, 2.0) == Gaussian(1, 2) != Gaussian(1.0, 2.0, strict=True)
    assert hash(Gaussian(1.0, 2.0)) == hash(Gaussian(1, 2))
    assert Gaussian(1.0, 2.0) != Gaussian(2.0, 1.0)
    assert ATan(2.0) == ATan(2) != ATan(3.0)
    assert ATan(2.0) not in (Sigmoid(2.0), Window(0.0, 1.0), 2.0)
