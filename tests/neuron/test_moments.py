import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qif_plugins import MomentClosureError, QIFParameters, firing_rate, membrane_moments, qif_multi_step
from qif_plugins.neuron.moments import closure_step, membrane_memory
from qif_plugins.neuron.names import CLOSURES
from qif_plugins.neuron.surrogate import Window

pytestmark = pytest.mark.host_independent

# θ, σ_I, the reset closure's (μ, σ), the free closure's, or None where it diverges.
TABLE = [
    (1.0, 1.0, (0.157770, 1.053412), (0.277536, 1.082537)),
    (1.0, 1 / math.sqrt(2), (0.090702, 0.728857), (0.123008, 0.733761)),
    (0.5, 0.5, (0.046965, 0.510261), (0.058743, 0.510778)),
    (2.0, 2.0, (0.636463, 2.452150), None),
]


@pytest.mark.parametrize(("threshold", "input_std", "reset", "free"), TABLE)
def test_closures_reproduce_the_table(threshold, input_std, reset, free):
    p = QIFParameters(v_threshold=threshold)
    assert membrane_moments(p, input_std) == pytest.approx(reset, abs=1e-6)
    if free is None:
        with pytest.raises(MomentClosureError, match=r"'free' closure does not converge .*threshold of 2"):
            membrane_moments(p, input_std, closure="free")
    else:
        assert membrane_moments(p, input_std, closure="free") == pytest.approx(free, abs=1e-6)


def simulated_moments(params, input_std, neurons=400_000, steps=30):
    x = torch.randn(steps, neurons, generator=torch.Generator().manual_seed(1)) * input_std
    spikes, _, h = qif_multi_step(x, 0.0, params, Window(0.0, 1.0), store_h_seq=True)
    late = h[10:].double()
    return late.mean().item(), late.std().item(), spikes[10:].double().mean().item()


@pytest.mark.parametrize(
    ("threshold", "input_std", "simulated"),
    [(1.0, 1.0, (0.1526, 1.0492)), (0.5, 0.5, (0.0468, 0.5100)), (2.0, 2.0, (0.5311, 2.2769))],
)
def test_simulation_agrees_with_the_table(threshold, input_std, simulated):
    p = QIFParameters(v_threshold=threshold)
    mean, std, _ = simulated_moments(p, input_std)
    assert (mean, std) == pytest.approx(simulated, abs=2e-3)


def test_the_reset_closure_is_closer_to_the_simulation_than_the_free_one():
    p = QIFParameters()
    mean, std, rate = simulated_moments(p, 1.0)
    with_reset, without = membrane_moments(p, 1.0), membrane_moments(p, 1.0, closure="free")
    assert abs(with_reset[0] - mean) < abs(without[0] - mean) / 5
    assert abs(with_reset[1] - std) < abs(without[1] - std) / 5
    assert firing_rate(p, *with_reset) == pytest.approx(rate, abs=1e-2)  # h is not quite normal


@given(st.floats(0.3, 1.2), st.floats(-0.5, 0.5), st.floats(0, 0.9))
def test_moments_are_stationary_and_elementwise(input_std, input_mean, beta):
    p = QIFParameters.matching_lif(beta, curvature=0.3)
    try:
        mean, std = membrane_moments(p, input_std, input_mean)
    except MomentClosureError:
        return
    after = closure_step(
        p, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64), input_std, input_mean
    )
    assert after[0].item() == pytest.approx(mean, abs=1e-6)
    assert after[1].item() == pytest.approx(std, abs=1e-6)
    batch = membrane_moments(p, torch.tensor([input_std, 0.5], dtype=torch.float64), input_mean)
    assert batch[0][0].item() == pytest.approx(mean, abs=1e-9)
    assert batch[1][0].item() == pytest.approx(std, abs=1e-9)


def test_the_reset_closure_knows_soft_resets():
    # Low input, so that the soft-reset membrane stays bounded over the simulated steps.
    p = QIFParameters(a=0.1, u2=0.5, reset="soft")
    x = torch.randn(40, 200_000, generator=torch.Generator().manual_seed(2)) * 0.8
    _, _, h = qif_multi_step(x, 0.0, p, Window(0.0, 1.0), store_h_seq=True)
    mean, std = membrane_moments(p, 0.8)
    assert mean == pytest.approx(h[15:].mean().item(), abs=5e-3)
    assert std == pytest.approx(h[15:].std().item(), abs=5e-3)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_an_input_deviation_that_is_none_is_refused(std):
    with pytest.raises(ValueError, match="deviation positive"):
        membrane_moments(QIFParameters(), std)


def test_unknown_closures_are_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="'reset', 'free'"):
        membrane_moments(QIFParameters(), 1.0, closure="open")


@given(st.floats(0.1, 50), st.floats(-20, 20))
def test_a_closure_converges_or_raises_but_never_returns_nan(input_std, input_mean):
    p = QIFParameters()
    for closure in ("reset", "free"):
        try:
            mean, std = membrane_moments(p, input_std, input_mean, closure)
        except MomentClosureError:
            continue
        assert math.isfinite(mean)
        assert math.isfinite(std)
        assert std > 0


@pytest.mark.parametrize(("tau", "rest"), [(50.0, 0.0), (2000.0, 0.0), (1e4, 0.0), (1000.0, -0.5)])
def test_long_leaks_settle(tau, rest):
    """Where the plain iteration needs thousands of steps, Newton's method finds the point it would end at."""
    p = QIFParameters.matching_lif(1 - 1 / tau, v_rest=rest, input_gain=1 / tau)
    mean, std = membrane_moments(p, 1.0)
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    for _ in range(200):
        m, s = closure_step(p, m, s, 1.0)
    assert m.item() == pytest.approx(mean, abs=1e-8)
    assert s.item() == pytest.approx(std, abs=1e-8)


def test_a_diverging_closure_names_the_ways_out():
    with pytest.raises(
        MomentClosureError, match=r"smaller input deviation.*match a leak.*'heuristic'.*Window\(lo, hi\)"
    ):
        membrane_moments(QIFParameters(v_threshold=4.0), 4.0)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("closure", CLOSURES)
@given(mean=st.floats(-2, 1), std=st.floats(0.3, 2), beta=st.floats(0.1, 0.95))
@settings(max_examples=20)
def test_without_rebound_a_closure_step_is_the_mean_over_the_normal_density(reset, closure, mean, std, beta):
    params = QIFParameters.matching_lif(beta, reset=reset, rebound=False)
    z = torch.linspace(-9, 9, 90_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    h = mean + std * z
    v = h if closure == "free" else torch.where(h < 1, h, (h - 1).clamp(max=1) if reset == "soft" else 0.0 * h)
    charge = params.map(v)
    expected = (charge * weight).sum()
    deviation = torch.sqrt((charge * charge * weight).sum() - expected**2 + 0.5**2)
    at = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    got = closure_step(params, *at, 0.5, 0.1, closure)
    torch.testing.assert_close(torch.stack(got), torch.stack([expected + 0.1, deviation]), rtol=1e-3, atol=1e-3)
    if closure == "reset":
        low = params.with_numbers(v_threshold=-0.5)  # below u1, where only the tangent is left
        kept = low.map_derivative(h) * (h < -0.5)  # a soft reset, too, leaves the threshold, whatever h is
        torch.testing.assert_close(membrane_memory(low, *at), (kept**2 * weight).sum(), rtol=2e-3, atol=2e-3)
        kept = params.map_derivative(v) * ((h < 1) | ((reset == "soft") & (h < 2)))
        torch.testing.assert_close(membrane_memory(params, *at), (kept**2 * weight).sum(), rtol=1e-3, atol=1e-3)
