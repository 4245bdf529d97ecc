import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qif_plugins import QIFParameters, Window

pytestmark = pytest.mark.host_independent


def test_defaults_are_the_papers():
    p = QIFParameters()
    assert (p.a, p.u1, p.u2, p.v_threshold, p.v_reset, p.reset, p.input_gain) == (0.25, 0, 0.5, 1, 0, "hard", 1)
    resting, unstable = p.fixed_points()
    assert resting == pytest.approx(0, abs=1e-15)
    assert unstable == pytest.approx(4.5)
    assert p.map_derivative(resting) == pytest.approx(-0.125)
    assert p.map_derivative(unstable) == pytest.approx(2.125)
    assert p.is_stable
    assert p.map(p.v_reset) == 0


def test_reset_follows_u1():
    assert QIFParameters(u1=0.2).v_reset == 0.2
    assert QIFParameters(u1=0.2, v_reset=0.0).v_reset == 0


@given(
    a=st.floats(0.01, 2),
    u1=st.floats(-2, 2),
    u2=st.floats(-2, 2),
    threshold=st.floats(0.1, 3),
)
def test_fixed_points_are_fixed_and_bound_the_threshold(a, u1, u2, threshold):
    try:
        p = QIFParameters(a, u1, u2, threshold, v_reset=threshold - 1e-3)
    except ValueError:
        assume(False)
    resting, unstable = p.fixed_points()
    for point in (resting, unstable):
        assert p.map(point) == pytest.approx(point, rel=1e-6, abs=1e-6)
    assert resting < unstable
    assert threshold < unstable
    assert p.map_derivative(unstable) > 1


@given(st.floats(0, 0.999), st.floats(0.05, 0.95), st.floats(0.2, 4))
def test_matching_lif_has_the_leak_at_rest_and_the_unstable_point_where_asked(beta, curvature, threshold):
    p = QIFParameters.matching_lif(beta, threshold, curvature)
    assert p.map(0.0) == pytest.approx(0, abs=1e-9)
    assert p.map_derivative(0.0) == pytest.approx(beta, abs=1e-9)
    assert p.fixed_points()[1] == pytest.approx(threshold / curvature, rel=1e-6)


@given(st.floats(0.3, 0.99), st.floats(-1, 0.2))
def test_matching_lif_rests_where_the_lif_neuron_leaks_to(beta, rest):
    assume(beta**2 >= 2 * (1 - beta) / (1 - rest) * rest)  # else the matched map has no real roots
    p = QIFParameters.matching_lif(beta, 1.0, v_rest=rest)
    assert p.map(rest) == pytest.approx(rest, abs=1e-6)
    assert p.map_derivative(rest) == pytest.approx(beta, abs=1e-6)
    assert p.v_reset == rest


def test_matching_lif_takes_a_leak_per_neuron():
    beta = torch.tensor([0.0, 0.5, 0.95])
    p = QIFParameters.matching_lif(beta)
    torch.testing.assert_close(p.map_derivative(torch.zeros(3)), beta)
    torch.testing.assert_close(p.fixed_points()[1], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v_threshold": 4.5}, r"v_threshold=4.5 .* unstable fixed point 4.5"),
        ({"v_threshold": 7.0}, r"v_threshold=7 .* unstable fixed point 4.5"),
        ({"a": 0.0}, "a=0"),
        ({"a": -1.0}, "a=-1"),
        ({"a": float("nan")}, "a must be finite"),
        ({"u2": float("inf")}, "u2 must be finite"),
        ({"v_threshold": torch.tensor([1.0, float("nan")])}, "v_threshold must be finite"),
        ({"v_threshold": torch.tensor([1.0, 4.6])}, "unstable fixed point"),
        ({"a": torch.tensor([0.25, 0.0])}, "a must be positive"),
        ({"a": 1.0, "u1": -1.0, "u2": -1.0}, "no resting point"),
        ({"v_reset": 4.6}, "basin"),
        ({"v_reset": -4.1}, "basin"),
        ({"reset": "medium"}, "'hard', 'soft'"),
    ],
)
def test_bad_parameters_are_refused_with_their_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        QIFParameters(**arguments)


@pytest.mark.parametrize("beta", [1.0, -0.1, 1.5, torch.tensor([0.5, 1.0])])
def test_a_leak_that_cannot_be_matched_is_refused(beta):
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        QIFParameters.matching_lif(beta)


@pytest.mark.parametrize("curvature", [0.0, 1.0, 2.0])
def test_curvature_outside_its_range_is_refused(curvature):
    with pytest.raises(ValueError, match="curvature"):
        QIFParameters.matching_lif(0.5, curvature=curvature)


def test_rest_above_threshold_and_unmatched_rest_are_refused():
    with pytest.raises(ValueError, match="resting potential"):
        QIFParameters.matching_lif(0.5, v_threshold=1.0, v_rest=1.0)
    with pytest.raises(ValueError, match="no real roots"):
        QIFParameters.matching_lif(0.1, v_threshold=1.0, v_rest=0.5)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        QIFParameters(a=torch.tensor([1]))
    with pytest.raises(TypeError, match="a must be a number"):
        QIFParameters(a="much")
    with pytest.raises(TypeError, match="no field named b"):
        QIFParameters.unchecked(b=1.0)


@pytest.mark.parametrize("name", ["a", "u1", "u2", "v_threshold", "v_reset", "input_gain"])
def test_a_string_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got '0.3'"):
        QIFParameters(**{name: "0.3"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": "0.9"}, "beta must be a number or a tensor, got '0.9'"),
        ({"beta": 0.9, "v_threshold": "1"}, "v_threshold must be"),
        ({"beta": 0.9, "curvature": "1"}, "curvature must be a number between 0 and 1"),
        ({"beta": 0.9, "v_threshold": float("inf")}, "v_threshold must be finite, got inf"),
        ({"beta": 0.9, "v_threshold": float("nan")}, "v_threshold must be finite, got nan"),
        ({"beta": 0.9, "v_threshold": torch.tensor([1.0, float("inf")])}, "v_threshold must be finite"),
        ({"beta": 0.9, "v_rest": float("-inf")}, "v_rest must be finite"),
        ({"beta": 1 - 1e-16, "v_threshold": 1e300}, "got beta=1|matches beta=1"),
        ({"beta": 0.5, "v_threshold": 1e-320}, "no map in floating point matches beta=0.5 with v_threshold=9"),
    ],
)
def test_what_is_wrong_with_a_match_is_said_of_its_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        QIFParameters.matching_lif(**arguments)
    assert " a=" not in str(refused.value)


def test_names_of_windows_and_resets_are_guessed():
    with pytest.raises(ValueError, match="unknown window 'unbaised'; did you mean 'unbiased'"):
        Window.named("unbaised", QIFParameters())
    with pytest.raises(ValueError, match="unknown reset 'sotf'; did you mean 'soft'"):
        QIFParameters(reset="sotf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window("0", 1.0), "lo must be a number"),
        (lambda: Window(0.0, 1.0, "1"), "height must be a number"),
        (lambda: Window.unbiased(QIFParameters(), kappa="1"), "kappa must be a positive number"),
        (lambda: Window.heuristic(QIFParameters(), "1"), "alpha must be a positive number"),
        (lambda: Window.paper(QIFParameters(), "1"), "input_std must be a number"),
        (lambda: Window.named("paper", "paper"), "params must be QIFParameters, got 'paper'"),
    ],
)
def test_a_string_is_no_number_of_a_window(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_parameters_are_values():
    p = QIFParameters(a=torch.tensor([0.2, 0.25]))
    assert p == copy.deepcopy(p) == pickle.loads(pickle.dumps(p))
    assert hash(p) == hash(copy.deepcopy(p))
    assert p != QIFParameters()
    assert QIFParameters() == QIFParameters()
    with pytest.raises(AttributeError):
        p.a = 1.0


def test_checks_run_elementwise_without_breaking_gradients():
    a = torch.tensor([0.2, 0.25], requires_grad=True)
    p = QIFParameters(a=a)
    p.fixed_points()[1].sum().backward()
    assert torch.isfinite(a.grad).all()


def test_parameters_on_the_meta_device_have_no_values_to_check():
    assert QIFParameters(a=torch.empty(3, device="meta")).a.is_meta


@given(st.floats(0, 0.999), st.floats(0.05, 0.95), st.floats(0.2, 4), st.floats(0, 50))
def test_a_matched_neuron_is_lif_below_rest_and_never_decreases(beta, curvature, threshold, depth):
    p = QIFParameters.matching_lif(beta, threshold, curvature, rebound=False)
    assert p.map(-depth) == pytest.approx(-beta * depth, rel=1e-6, abs=1e-9)
    parabola = QIFParameters.matching_lif(beta, threshold, curvature)
    v = torch.linspace(0, 2 * threshold, 50, dtype=torch.float64)
    assert torch.equal(p.map(v), parabola.map(v))
    path = p.map(torch.linspace(-5 * threshold, 2 * threshold, 400, dtype=torch.float64))
    assert bool((path.diff() >= -1e-12).all())
    assert parabola.map(-20 * (beta + 1) * threshold / (1 - beta)) > threshold


def test_roots_that_a_map_without_rebound_does_not_take_are_refused():
    for roots in ({"u1": 0.0, "u2": 0.5}, {"u1": 0.1, "u2": -1.0}):
        with pytest.raises(ValueError, match="u2 <= u1 <= 0"):
            QIFParameters(**roots, rebound=False)
    with pytest.raises(ValueError, match="u2 <= u1 <= 0"):  # the larger root lies above the resting point
        QIFParameters.matching_lif(0.5, v_rest=-0.5, rebound=False)
    assert QIFParameters.matching_lif(0.5) != QIFParameters.matching_lif(0.5, rebound=False)
    # Far below the vertex, from where the parabola runs away.
    assert QIFParameters(u2=-1.0, v_reset=-50.0, rebound=False).v_reset == -50.0


@pytest.mark.parametrize(("v_rest", "v_threshold"), [(-0.5, 1.0), (-65.0, -50.0)])
def test_a_leak_to_below_zero_is_refused_without_rebound(v_rest, v_threshold):
    """Between -65 and -50 both roots lie below 0, but above the unstable point, where the tangent falls without end."""
    with pytest.raises(ValueError, match=f"v_rest={v_rest:g}: match it by the parabola"):
        QIFParameters.matching_lif(0.5, v_threshold, v_rest=v_rest, rebound=False)
    matched = QIFParameters.matching_lif(0.5, v_threshold, v_rest=v_rest)
    with pytest.raises(ValueError, match="not above the resting point"):
        QIFParameters(**matched.numbers(), rebound=False)
