"""``QIF`` against its equations, and against ``snn.Leaky`` where the quadratic term vanishes."""

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

snn = pytest.importorskip("snntorch")

from qif_plugins.adapters.snntorch import QIF, analytic_window  # noqa: E402
from snntorch import surrogate  # noqa: E402
from snntorch.functional import quant  # noqa: E402

from qif_plugins import ATan, FastSigmoid, Gaussian, QIFParameters, Sigmoid, Window  # noqa: E402
from qif_plugins.neuron.surrogate import spike  # noqa: E402
from qif_plugins.ops.shortcuts import ENABLED  # noqa: E402

pytestmark = pytest.mark.host_independent

T, N, FEATURES = 6, 5, 4


def stable(options):
    """A test's identifier without addresses, so that every worker collects the same ones."""
    return re.sub(r" at 0x\w+", "", str(options))


def step(neuron, x_seq, mem=None):
    """The host's loop; returns spikes, membranes."""
    mem = neuron.reset_mem() if mem is None else mem
    spikes, mems = [], []
    for x in x_seq:
        if neuron.init_hidden:
            out = neuron(x)
            spk = out[0] if neuron.output else out
            mem = neuron.mem
        else:
            spk, mem = neuron(x, mem)
        spikes.append(spk)
        mems.append(mem)
    return torch.stack(spikes), torch.stack(mems)


def gradients(run, neuron, x_seq):
    """Outputs of ``run``, and gradients of x_seq and the neuron's parameters under fixed random weights."""
    x_seq = x_seq.clone().requires_grad_()
    spk, mem = run(neuron, x_seq)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(spk.shape, generator=generator).to(spk.dtype) for _ in range(2)]
    loss = (spk * weights[0] + mem * weights[1]).sum()
    return spk, mem, *torch.autograd.grad(loss, [x_seq, *neuron.parameters()])


def sequence(neuron, x_seq):
    neuron.reset_mem()
    return neuron.forward_sequence(x_seq)


def inputs(dtype=torch.float64, scale=1.0):
    return scale * torch.randn(T, N, FEATURES, dtype=dtype) + 0.2


def test_takes_leakys_arguments_in_order():
    ours = list(inspect.signature(QIF).parameters.values())
    theirs = list(inspect.signature(snn.Leaky).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    changed = {p.name for p, q in zip(ours, theirs, strict=False) if p.default != q.default}
    assert changed == {"beta", "reset_mechanism"}
    neuron = QIF(0.9, 0.5, None, False, True, False, True, True, "subtract", False, True, 2.0, True, False)
    assert (neuron.init_hidden, neuron.output, neuron.reset_delay) == (True, True, False)
    assert neuron.beta.requires_grad
    assert neuron.threshold.requires_grad
    assert neuron.graded_spikes_factor.requires_grad
    assert neuron.reset_mechanism_val == 0


@pytest.mark.parametrize("mechanism", ["zero", "subtract", "none"])
@pytest.mark.parametrize("run", [step, sequence])
def test_follows_its_equations_and_their_gradient(mechanism, run):
    beta = torch.rand(FEATURES, dtype=torch.float64) * 0.9
    theta = torch.rand(FEATURES, dtype=torch.float64) + 0.5
    neuron = QIF(
        beta, theta, ATan(2.0), learn_beta=True, learn_threshold=True, reset_mechanism=mechanism, curvature=0.3
    )

    def equations(neuron, x_seq):
        b, th = neuron.beta, neuron.threshold
        h = torch.zeros_like(x_seq[0])
        spikes, mems = [], []
        for x in x_seq:
            fired = (h >= th).to(h.dtype).detach()
            v = {"zero": (1 - fired) * h, "subtract": h - fired * th, "none": h}[mechanism]
            h = b * v + 0.3 * (1 - b) / th * v * v + x
            spikes.append(spike(h, th, ATan(2.0)))
            mems.append(h)
        return torch.stack(spikes), torch.stack(mems)

    x_seq = inputs(scale=0.5)
    for mine, expected in zip(gradients(run, neuron, x_seq), gradients(equations, neuron, x_seq), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reset_mechanism": "none"},
        {"init_hidden": True},
        {"init_hidden": True, "output": True},
        {"graded_spikes_factor": 1.7, "learn_graded_spikes_factor": True},
        {"reset_delay": False},
        {"reset_delay": False, "reset_mechanism": "none"},
        {"reset_delay": False, "graded_spikes_factor": 0.3},
        {"state_quant": quant.state_quant(num_bits=4, uniform=True, upper_limit=0.5)},
        {"inhibition": True},
        {"inhibition": True, "reset_delay": False},
        {"surrogate_disable": True, "learn_threshold": False},
    ],
    ids=stable,
)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
def test_becomes_leaky_as_the_curvature_vanishes(options):
    beta = torch.rand(FEATURES, dtype=torch.float64) * 0.9
    theta = torch.tensor(0.8, dtype=torch.float64)
    options = {"reset_mechanism": "zero", "learn_beta": True, "learn_threshold": True} | options
    leaky = snn.Leaky(beta, theta, surrogate.atan(), **options)
    neuron = QIF(beta, theta, surrogate.atan(), curvature=1e-10, **options)
    x_seq = inputs()
    if options.get("surrogate_disable"):
        for mine, expected in zip(step(neuron, x_seq), step(leaky, x_seq), strict=True):
            torch.testing.assert_close(mine, expected.to(mine.dtype), rtol=0, atol=1e-7)
        return
    mine, expected = gradients(step, neuron, x_seq), gradients(step, leaky, x_seq)
    assert mine[0].unique().numel() > 1
    for index, (ours, theirs) in enumerate(zip(mine, expected, strict=True)):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-6, msg=f"output {index}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.9},
        {"beta": torch.linspace(0, 0.99, FEATURES), "learn_beta": True, "learn_threshold": True},
        {"threshold": torch.linspace(0.3, 1.2, FEATURES), "learn_threshold": True},
        {"reset_mechanism": "subtract"},
        {"reset_mechanism": "none"},
        {"spike_grad": surrogate.fast_sigmoid(10)},
        {"spike_grad": lambda x: surrogate.fast_sigmoid(10)(x)},
        {"spike_grad": Gaussian(0.6, torch.linspace(0.3, 0.8, FEATURES), offset=0.1)},
        {"graded_spikes_factor": 2.0},
        {"inhibition": True},
        {"state_quant": quant.state_quant(num_bits=4)},
        {"reset_delay": False},
        {"init_hidden": True},
    ],
    ids=stable,
)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
def test_a_sequence_in_one_call_equals_stepping(options):
    neuron = QIF(**options)
    x_seq = inputs(torch.float32, 0.7)
    stepped, whole = gradients(step, neuron, x_seq), gradients(sequence, neuron, x_seq)
    torch.testing.assert_close(whole[:2], stepped[:2], rtol=0, atol=0)
    torch.testing.assert_close(whole[2:], stepped[2:], rtol=1e-4, atol=1e-5)
    assert torch.equal(neuron.mem, whole[1][-1])


def test_a_sequence_continues_from_the_membrane():
    x_seq = inputs(torch.float32)
    neuron = QIF()
    spk, mem = sequence(neuron, x_seq)
    neuron.reset_mem()
    first = neuron.forward_sequence(x_seq[:2])
    second = neuron.forward_sequence(x_seq[2:])
    third = neuron.forward_sequence(x_seq[2:], first[1][-1])
    assert torch.equal(torch.cat([first[0], second[0]]), spk)
    assert torch.equal(torch.cat([first[1], third[1]]), mem)


@given(beta=st.floats(0, 0.99), theta=st.floats(0.01, 100), scale=st.floats(0.1, 3))
def test_matching_is_the_cores(beta, theta, scale):
    neuron = QIF(beta, theta)
    reference = QIFParameters.matching_lif(float(neuron.beta), float(neuron.threshold))
    assert neuron.qif_parameters == reference
    assert neuron.surrogate == Gaussian.isometric(reference)


class TestDynamics:
    def test_what_is_passed_decides(self):
        assert QIF().qif_parameters == QIFParameters.matching_lif(0.5)
        assert QIF(dynamics="paper").qif_parameters == QIFParameters()
        assert QIF(0.9, dynamics="paper").qif_parameters == QIFParameters()
        assert QIF(0.9, a=0.5).qif_parameters == QIFParameters(a=0.5)
        assert QIF(a=0.2, u2=0.1).qif_parameters == QIFParameters(a=0.2, u2=0.1)
        assert "dynamics=lif, beta=0.9" in repr(QIF(0.9))
        assert "dynamics=lif, beta=0.5" in repr(QIF())
        assert "dynamics=explicit, a=0.5" in repr(QIF(a=0.5))

    def test_a_leak_that_is_set_aside_is_shown(self):
        assert repr(QIF(0.9, dynamics="paper")).endswith("beta=0.9 set aside)")
        assert repr(QIF(0.9, a=0.3, curvature=0.2)).endswith("beta=0.9, curvature=0.2 set aside)")
        assert "set aside" not in repr(QIF(0.9)) + repr(QIF()) + repr(QIF(a=0.3))

    def test_without_a_leak_beta_holds_the_slope_at_rest(self):
        assert QIF(dynamics="paper").beta.item() == -0.125
        assert QIF().beta.item() == 0.5

    def test_tensors_follow_the_module(self):
        neuron = QIF(a=torch.full((FEATURES,), 0.3)).double()
        assert neuron.qif_parameters.a.dtype == torch.float64
        assert "a" not in neuron.state_dict()
        spk, _ = neuron(inputs()[0])
        assert spk.dtype == torch.float64


class TestSurrogate:
    def test_left_out_it_is_the_window(self):
        assert QIF().surrogate == Gaussian.isometric(QIFParameters.matching_lif(0.5))
        assert QIF(dynamics="paper", window="paper").surrogate == Window.paper(QIFParameters())
        given_window = Window(0.5, 2.0, 0.7)
        assert QIF(window=given_window).surrogate is given_window
        assert QIF(spike_grad=given_window).surrogate is given_window
        neuron = QIF()
        neuron.window = "heuristic"
        assert neuron.surrogate == Window.heuristic(QIFParameters())

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (surrogate.atan(3.0), ATan(3.0, strict=True)),
            (surrogate.fast_sigmoid(7), FastSigmoid(7, strict=True)),
            (surrogate.sigmoid(5), Sigmoid(5, strict=True)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
    def test_the_hosts_have_kernels_and_the_same_gradient(self, theirs, ours):
        fused, called = QIF(spike_grad=theirs), QIF(spike_grad=lambda x: theirs(x))
        assert fused.surrogate == ours
        x_seq = inputs()
        # The host's spike is float32 whatever its input, so the gradient that enters its backward is rounded.
        for mine, expected in zip(gradients(sequence, fused, x_seq), gradients(sequence, called, x_seq), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)

    def test_ours_fires_at_equality_and_the_hosts_does_not(self):
        at_threshold = torch.ones(1, 3)
        assert QIF()(at_threshold)[0].all()
        assert QIF(spike_grad=ATan())(at_threshold)[0].all()
        assert not QIF(spike_grad=surrogate.atan())(at_threshold)[0].any()

    def test_assigning_one_changes_the_neuron(self):
        neuron = QIF()
        neuron.spike_grad = surrogate.atan()
        assert neuron.surrogate == ATan(strict=True)

    @pytest.mark.filterwarnings("ignore:the surrogate .* has no fused kernel")
    def test_disabled_it_passes_no_gradient(self):
        spk, mem = QIF(surrogate_disable=True)(inputs()[0].requires_grad_())
        assert not spk.requires_grad
        assert mem.requires_grad


class TestLearning:
    def test_learned_values_stay_where_the_neuron_is_stable(self):
        neuron = QIF(torch.tensor([0.5, 0.5, 0.5, 0.5]), learn_beta=True, learn_threshold=True)
        with torch.no_grad():
            neuron.beta.copy_(torch.tensor([-0.5, 0.0, 1.0, 2.0]))
            neuron.threshold.fill_(-1.0)
        params = neuron.qif_parameters
        assert QIFParameters(params.a, params.u1, params.u2, params.v_threshold).is_stable
        for grad in gradients(step, neuron, inputs(torch.float32, 1e-7)):
            assert grad.isfinite().all()

    def test_a_threshold_learned_by_the_papers_neuron_stays_below_the_unstable_point(self):
        neuron = QIF(learn_threshold=True, dynamics="paper")
        with torch.no_grad():
            neuron.threshold.fill_(100.0)
        assert neuron.qif_parameters.v_threshold.item() == pytest.approx(0.99 * 4.5)
        neuron(inputs(torch.float32)[0])

    @pytest.mark.parametrize("window", ["isometric", "unbiased", "paper", "heuristic"])
    def test_the_window_follows(self, window):
        neuron = QIF(0.5, learn_beta=True, learn_threshold=True, window=window)
        with torch.no_grad():
            neuron.beta.add_(0.3)
            neuron.threshold.add_(0.6)
        expected = Window.named(window, QIFParameters.matching_lif(0.8, 1.6))
        for mine, theirs in zip(neuron.surrogate.coefficients(), expected.coefficients(), strict=True):
            assert float(mine) == pytest.approx(theirs, rel=1e-6)

    def test_where_the_moments_diverge_there_is_a_window(self):
        neuron = QIF(learn_threshold=True)
        for _ in range(50):
            with torch.no_grad():
                neuron.threshold.add_(0.1)
            neuron.qif_parameters  # noqa: B018
        assert all(torch.as_tensor(value).isfinite().all() for value in neuron.surrogate.coefficients())

    def test_an_optimizer_moves_them(self):
        neuron = QIF(torch.rand(FEATURES), torch.rand(FEATURES) + 0.1, learn_beta=True, learn_threshold=True)
        before = [p.detach().clone() for p in neuron.parameters()]
        optimizer = torch.optim.Adam(neuron.parameters(), lr=0.01)
        windows = []
        for _ in range(3):
            optimizer.zero_grad()
            step(neuron, inputs(torch.float32))[1].square().mean().backward()
            windows.append(neuron.surrogate)
            optimizer.step()
        assert all(not torch.equal(now, then) for now, then in zip(neuron.parameters(), before, strict=True))
        assert not torch.equal(windows[0].width, windows[2].width)

    def test_betas_up_to_one_have_a_window(self):
        for window in ("isometric", "unbiased"):
            for neuron in (QIF(torch.tensor([0.1, 0.9999, 0.99999]), window=window), QIF(0.9999, learn_beta=True)):
                values = neuron.surrogate.coefficients()
                assert all(torch.as_tensor(value).isfinite().all() for value in values)


class TestChangesAreNoticed:
    def test_in_place_assigned_and_by_attribute(self):
        neuron = QIF(0.9)
        neuron.beta.fill_(0.5)
        assert neuron.qif_parameters == QIFParameters.matching_lif(0.5)
        neuron.threshold = torch.tensor(2.0)
        assert neuron.qif_parameters == QIFParameters.matching_lif(0.5, 2.0)
        neuron.graded_spikes_factor.fill_(3.0)
        assert neuron(torch.full((1, 2), 5.0))[0].tolist() == [[3.0, 3.0]]
        neuron.reset_mechanism = "subtract"
        assert neuron.qif_parameters.reset == "soft"
        assert neuron.reset_mechanism_val == 0

    def test_an_assigned_threshold_above_the_unstable_point_is_refused(self):
        neuron = QIF(dynamics="paper")
        mem, threshold, shown = neuron.mem, neuron.threshold, repr(neuron)
        with pytest.raises(ValueError, match=r"v_threshold=5 is not below the unstable fixed point 4\.5"):
            neuron.threshold = torch.tensor(5.0)
        assert neuron.threshold is threshold
        assert repr(neuron) == shown
        neuron.threshold.fill_(5.0)
        with pytest.raises(ValueError, match=r"v_threshold=5 is not below the unstable fixed point 4\.5"):
            neuron(torch.zeros(1, 2))
        assert neuron.mem is mem

    @pytest.mark.parametrize("name", ["beta", "threshold", "graded_spikes_factor", "a", "u1", "u2"])
    @pytest.mark.parametrize("like", [np.float32, np.array, list, tuple, lambda values: [list(values)]])
    def test_numbers_may_be_what_the_host_takes(self, name, like):
        values = np.float32(0.3) if like is np.float32 else np.linspace(0.2, 0.3, FEATURES, dtype=np.float32).tolist()
        others = {} if name in ("a", "u1", "u2") else {"beta": 0.9}
        x_seq = inputs(torch.float32)
        given = QIF(**{**others, name: like(values)})
        expected = QIF(**{**others, name: torch.as_tensor(like(values))})
        for mine, theirs in zip(gradients(step, given, x_seq), gradients(step, expected, x_seq), strict=True):
            assert torch.equal(mine, theirs)
        if others:
            host = snn.Leaky(**{**others, name: like(values)})
            assert getattr(given, name).shape == getattr(host, name).shape

    @pytest.mark.parametrize("name", ["beta", "threshold", "graded_spikes_factor", "a", "u1", "u2", "curvature"])
    @pytest.mark.parametrize("value", ["0.9", ["a"], {}, torch.tensor(0.9j)], ids=str)
    def test_what_is_no_number_is_answered_by_name(self, name, value):
        entered = len(snn.SpikingNeuron.instances)
        with pytest.raises(TypeError, match=f"^{name} must be "):
            QIF(**{"beta": 0.9, name: value})
        assert len(snn.SpikingNeuron.instances) == entered

    @pytest.mark.parametrize("name", ["beta", "threshold", "a", "u1", "u2"])
    @pytest.mark.parametrize("run", [step, sequence])
    def test_a_shape_that_does_not_fit_is_refused_by_the_name_that_was_passed(self, run, name):
        others = {} if name in ("a", "u1", "u2") else {"beta": 0.9}
        neuron = QIF(**{**others, name: torch.full((FEATURES + 1,), 0.3)})
        with pytest.raises(ValueError, match=rf"^{name} has shape \[{FEATURES + 1}\], which does not broadcast"):
            run(neuron, inputs(torch.float32))
        assert neuron.mem.numel() == 0

    def test_curvature_is_one_number(self):
        assert (
            QIF(0.9, curvature=torch.tensor([0.4])).qif_parameters
            == QIF(0.9, curvature=0.4000000059604645).qif_parameters
        )
        with pytest.raises(ValueError, match="curvature must be one number"):
            QIF(0.9, curvature=[0.4, 0.5])

    @pytest.mark.parametrize(
        ("arguments", "name", "value"),
        [
            ({"beta": 0.9}, "beta", torch.tensor(0.5)),
            ({"beta": 0.9}, "threshold", torch.tensor(2.0)),
            ({"beta": 0.9}, "curvature", 0.3),
            ({"beta": 0.9}, "dynamics", "paper"),
            ({"beta": 0.9, "dynamics": "paper"}, "dynamics", "lif"),
            ({"beta": 0.9}, "backend", "torch"),
            ({"beta": 0.9}, "window", "paper"),
            ({"beta": 0.9}, "spike_grad", ATan()),
            ({"beta": 0.9}, "reset_mechanism", "subtract"),
            ({"beta": 0.9}, "inhibition", True),
            ({"beta": 0.9}, "reset_delay", False),
            ({"beta": 0.9}, "state_quant", torch.floor),
            ({"beta": 0.9}, "graded_spikes_factor", torch.tensor(2.0)),
            ({}, "beta", torch.tensor(0.5)),
            ({"a": 0.2}, "a", 0.3),
            ({"a": 0.3}, "u2", torch.tensor([0.1, 0.2, 0.3, 0.4])),
        ],
        ids=stable,
    )
    @pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
    def test_an_assignment_makes_the_neuron_that_construction_makes(self, arguments, name, value):
        neuron = QIF(**arguments)
        step(neuron, inputs(torch.float32))  # used before
        setattr(neuron, name, value)
        constructed = QIF(**{**arguments, name: value})
        x_seq = inputs(torch.float32)
        for mine, expected in zip(gradients(step, neuron, x_seq), gradients(step, constructed, x_seq), strict=True):
            assert torch.equal(mine, expected)
        assert repr(neuron) == repr(constructed)

    def test_a_map_assigned_to_a_matched_neuron_keeps_the_other_numbers(self):
        neuron = QIF(0.5)
        neuron.a = 0.3
        assert neuron.qif_parameters == QIFParameters(a=0.3, u1=0.0, u2=-2.0)
        assert neuron.dynamics == "explicit"

    @pytest.mark.parametrize("arguments", [{"dynamics": "paper"}, {"a": 0.3}, {"beta": 0.9, "a": 0.3}], ids=str)
    def test_a_leak_that_would_have_no_effect_is_refused_until_it_is_asked_for(self, arguments):
        neuron = QIF(**arguments)
        shown, beta = repr(neuron), neuron.beta
        for name, value in (("beta", torch.tensor(0.5)), ("curvature", 0.3)):
            with pytest.raises(ValueError, match=f"{name}=.* would have no effect.*dynamics='lif' first"):
                setattr(neuron, name, value)
        assert repr(neuron) == shown
        assert neuron.beta is beta
        if "beta" in arguments:
            neuron.dynamics = "lif"
            neuron.beta = torch.tensor(0.5)
            assert neuron.qif_parameters == QIFParameters.matching_lif(0.5)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("beta", torch.tensor(1.0), "0 <= beta < 1"),
            ("threshold", torch.tensor(float("inf")), "must be finite"),
            ("threshold", torch.tensor(-1.0), "must lie above"),
            ("curvature", 1.5, "curvature must lie between"),
            ("curvature", "wide", "curvature must be a number"),
            ("dynamics", "liff", "did you mean 'lif'"),
            ("backend", "fortran", "unknown backend"),
            ("window", "unbaised", "did you mean 'unbiased'"),
            ("spike_grad", "atan", "spike_grad must be a function"),
            ("a", "x", "a must be a number"),
            ("a", torch.nn.Parameter(torch.tensor(0.2)), "QIF does not learn a.*ParametricQIFNode"),
            ("u2", float("nan"), "u2 must be finite"),
            ("reset_mechanism", "half", "reset_mechanism"),
        ],
    )
    def test_a_bad_assignment_is_refused_and_changes_nothing(self, name, value, message):
        neuron = QIF(0.9)
        before = repr(neuron), neuron.surrogate, dict(neuron.named_buffers()), dict(neuron.named_parameters())
        with pytest.raises((TypeError, ValueError), match=message):
            setattr(neuron, name, value)
        after = repr(neuron), neuron.surrogate, dict(neuron.named_buffers()), dict(neuron.named_parameters())
        assert after[:2] == before[:2]
        for mine, theirs in zip(after[2:], before[2:], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[key] is theirs[key] for key in mine)

    @pytest.mark.parametrize("name", ["beta", "threshold", "a", "dynamics"])
    def test_a_copy_takes_an_assignment_before_it_runs(self, name):
        value = {"beta": torch.tensor(0.5), "threshold": torch.tensor(0.7), "a": 0.03, "dynamics": "paper"}[name]
        neuron = QIF(0.9)
        twin = copy.deepcopy(neuron)
        for one in (neuron, twin):
            setattr(one, name, value)
        assert twin.qif_parameters == neuron.qif_parameters
        assert twin.surrogate == neuron.surrogate

    def test_a_window_takes_the_place_of_a_given_surrogate(self):
        neuron = QIF(0.9, spike_grad=surrogate.atan())
        neuron.window = "paper"
        assert neuron.surrogate == QIF(0.9, window="paper").surrogate
        with pytest.raises(ValueError, match="surrogate_disable and window"):
            QIF(0.9, surrogate_disable=True).window = "paper"


class TestALearnedThresholdThatIsAssigned:
    """On Leaky an assigned parameter is learned; here it equals ``learn_threshold``, which has its own tests."""

    @pytest.mark.parametrize("arguments", [{"beta": 0.5}, {}], ids=str)
    @pytest.mark.parametrize("way", ["assign", "delete and assign", "register", "tensor with gradient"])
    def test_it_is_learned(self, arguments, way):
        neuron, reference = QIF(**arguments), QIF(threshold=0.8, learn_threshold=True, **arguments)
        threshold = torch.nn.Parameter(torch.tensor(0.8))
        if way == "tensor with gradient":
            threshold = torch.tensor(0.8, requires_grad=True)
        if way in ("delete and assign", "register"):
            del neuron.threshold
        if way == "register":
            neuron.register_parameter("threshold", threshold)
        else:
            neuron.threshold = threshold
        if way != "tensor with gradient":
            assert [name for name, _ in neuron.named_parameters()] == ["threshold"]
        assert neuron.state_dict().keys() == reference.state_dict().keys()
        x_seq = inputs(torch.float32)
        for one in (neuron, reference):
            spk, mem = step(one, x_seq)
            (spk.sum() + mem.square().sum()).backward()
        assert threshold.grad != 0
        assert torch.equal(threshold.grad, reference.threshold.grad)

    def test_a_leak_that_is_assigned_is_learned(self):
        neuron, reference = QIF(0.5), QIF(0.5, learn_beta=True)
        neuron.beta = torch.nn.Parameter(torch.tensor(0.5))
        x_seq = inputs(torch.float32)
        for mine, expected in zip(gradients(step, neuron, x_seq), gradients(step, reference, x_seq), strict=True):
            assert torch.equal(mine, expected)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_input(self, dtype):
        x_seq = inputs(torch.float32).to(dtype).float()
        exact = sequence(QIF(0.9), x_seq)
        spk, mem = gradients(sequence, QIF(0.9), x_seq.to(dtype))[:2]
        assert spk.dtype == mem.dtype == dtype
        torch.testing.assert_close(spk.float(), exact[0])
        torch.testing.assert_close(mem, exact[1].to(dtype))
        assert QIF(0.9).half()(x_seq[0].half())[0].dtype == torch.float16

    def test_autocast(self):
        net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 3), QIF(init_hidden=True))
        with torch.autocast("cpu", torch.bfloat16):
            out = net(inputs(torch.float32)[0])
        out.sum().backward()
        assert out.dtype == torch.bfloat16
        assert net[0].weight.grad.isfinite().all()

    def test_an_integer_threshold_is_a_number_like_any(self):
        assert QIF(0.9, threshold=20000).qif_parameters.v_threshold == 20000.0


class TestBadInput:
    def test_the_other_hosts_leak_is_pointed_to(self):
        with pytest.raises(TypeError, match=r"'tau'; tau is SpikingJelly's: here beta is 1 - 1/tau"):
            QIF(tau=2.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"threshold": 4.5, "dynamics": "paper"}, r"v_threshold=4\.5 is not below the unstable fixed point 4\.5"),
            ({"threshold": torch.tensor([1.0, 6.0]), "dynamics": "paper"}, "is not below the unstable fixed point"),
            ({"beta": 1.0}, "0 <= beta < 1, got beta=1"),
            ({"beta": torch.tensor([0.5, -0.1])}, "0 <= beta < 1"),
            ({"beta": float("nan")}, "got beta=nan"),
            ({"beta": 0.9, "threshold": 0.0}, "v_threshold=0 must lie above"),
            ({"beta": 0.9, "curvature": 1.0}, "curvature must lie between 0 and 1"),
            ({"a": -1.0}, "a must be positive"),
            ({"u2": float("inf")}, "u2 must be finite"),
            ({"a": 0.2, "dynamics": "paper"}, "contradicts a"),
            ({"beta": 0.9, "threshold": float("inf")}, "v_threshold must be finite, got inf"),
            ({"threshold": float("nan")}, "v_threshold must be finite, got nan"),
            ({"curvature": 0.3}, r"pass beta \(QIF\(\) alone matches 0\.5\)"),
            ({"beta": 0.9, "window": "unbaised"}, "did you mean 'unbiased'"),
            ({"beta": 0.9, "window": "paper", "spike_grad": ATan()}, "spike_grad and window both decide"),
            ({"window": "paper", "surrogate_disable": True}, "surrogate_disable and window both decide"),
            ({"a": torch.nn.Parameter(torch.tensor(0.2))}, "QIF does not learn a"),
            ({"dynamics": "lif"}, r"pass beta \(QIF\(\) alone matches 0\.5\)"),
            ({"dynamics": "izhikevich"}, "choose from 'paper', 'lif'"),
            ({"learn_beta": True, "dynamics": "paper"}, "learn_beta"),
            ({"window": "gaussian"}, "'unbiased', 'paper', 'heuristic'"),
            ({"backend": "fortran"}, "choose from 'auto'"),
            ({"reset_mechanism": "soft"}, "'subtract', 'zero', 'none'"),
            ({"threshold": 3.0, "dynamics": "paper"}, "does not converge"),
        ],
    )
    def test_construction(self, arguments, message):
        before = list(snn.SpikingNeuron.instances)
        with pytest.raises(ValueError, match=message):
            QIF(**arguments)
        assert len(snn.SpikingNeuron.instances) == len(before)
        with pytest.raises(TypeError, match=r"as snntorch\.surrogate\.atan\(\) returns, got 'atan'"):
            QIF(spike_grad="atan")
        assert len(snn.SpikingNeuron.instances) == len(before)

    @pytest.mark.parametrize("name", ["beta", "threshold", "a", "u1", "u2", "curvature"])
    def test_a_string_for_a_number(self, name):
        with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got '0.5'"):
            QIF(**{"beta": 0.9, name: "0.5"})

    def test_integer_input(self):
        neuron = QIF()
        with pytest.raises(TypeError, match="floating point"):
            neuron(torch.ones(2, 3, dtype=torch.int64))
        assert neuron.mem.numel() == 0

    @pytest.mark.parametrize("shape", [(), (0, 2)])
    def test_no_time_step(self, shape):
        with pytest.raises(ValueError, match="at least one time step"):
            QIF().forward_sequence(torch.zeros(shape))

    def test_a_membrane_passed_to_a_neuron_that_keeps_its_own(self):
        for call in (QIF(init_hidden=True), QIF(init_hidden=True).forward_sequence):
            with pytest.raises(TypeError, match="init_hidden"):
                call(torch.zeros(2, 3), torch.zeros(2, 3))

    def test_a_nan_does_not_spike(self):
        spk, mem = QIF()(torch.tensor([[float("nan"), 2.0]]))
        assert spk.tolist() == [[0.0, 1.0]]
        assert mem.isnan().tolist() == [[True, False]]


class TestAnalyticWindow:
    def test_on_the_hosts_neurons(self):
        params = QIFParameters.matching_lif(0.9, 0.5)
        expected = Gaussian.isometric(params)
        leaky = snn.Leaky(0.9, threshold=0.5, spike_grad=analytic_window(params))
        x = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
        spk, _ = leaky(x)
        assert torch.equal(spk, (x >= 0.5).to(x.dtype))
        spk.sum().backward()
        torch.testing.assert_close(x.grad, expected.derivative(x.detach(), 0.5))
        for neuron in (
            snn.Synaptic(0.9, 0.8, spike_grad=analytic_window()),
            snn.Lapicque(0.9, spike_grad=analytic_window()),
        ):
            assert neuron(torch.ones(1, 3))[0].shape == (1, 3)

    def test_by_name_and_given(self):
        assert analytic_window(window="heuristic", alpha=2.0).surrogate == Window(-1.0, 1.0, 0.5)
        assert analytic_window(window=Window(0.5, 1.75)).surrogate == Window(-0.5, 0.75)
        assert analytic_window(input_std=0.5).surrogate != analytic_window().surrogate
        with pytest.raises(ValueError, match="'unbiased', 'paper', 'heuristic'"):
            analytic_window(window="gaussian")

    def test_passed_to_ours_it_is_the_same_window(self):
        params = QIFParameters.matching_lif(0.9)
        mine, default = QIF(0.9, spike_grad=analytic_window(params)), QIF(0.9)
        for one, other in zip(mine.surrogate.coefficients(), default.surrogate.coefficients(), strict=True):
            assert one == pytest.approx(other, rel=1e-6)
        rectangle = QIF(0.9, window="unbiased").spike_grad.surrogate
        assert rectangle.hi == pytest.approx(-rectangle.lo)


@pytest.mark.parametrize("spike_grad", [None, surrogate.straight_through_estimator()], ids=["fused", "another"])
@pytest.mark.filterwarnings("ignore:the surrogate")
def test_a_batch_first_view_keeps_its_layout(spike_grad):
    x_seq = torch.randn(N, T, FEATURES).transpose(0, 1)
    spk, mem = QIF(spike_grad=spike_grad).forward_sequence(x_seq)
    assert spk.stride() == mem.stride() == x_seq.stride()


class TestMembraneHandedOut:
    """The membrane that forward returns is a copy; the backward pass reads what it was copied from."""

    def test_one_tensor_a_step_is_saved(self):
        if not ENABLED:
            pytest.skip("the operator saves the copies, too")
        neuron, saved = QIF(beta=0.9), set()
        x, mem = torch.randn(6, 3, 5, requires_grad=True), neuron.init_leaky()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
            for current in x:
                _, mem = neuron(current, mem)
        assert len(saved) == 6

    @pytest.mark.parametrize("change", ["none", "in place", "replaced"])
    def test_gradients_are_those_of_the_membrane_that_was_passed(self, change):
        def gradients(backend):
            neuron, total = QIF(beta=0.9, spike_grad=ATan(), backend=backend), 0.0
            x, mem, mems = inputs.clone().requires_grad_(), neuron.init_leaky(), []
            for current in x:
                spk, mem = neuron(current, mem)
                if change == "in place":
                    mem *= 0.5
                elif change == "replaced":
                    mem = 0.5 * mem
                mems.append(mem)
                total = total + (spk * current).sum()
            first = torch.autograd.grad(total, [x, mems[1]], create_graph=True)
            return first, torch.autograd.grad(sum((g * g).sum() for g in first), [x, mems[1]])

        inputs = 2 * torch.randn(4, 3, 5)
        for got, wanted in zip(gradients("auto"), gradients("torch"), strict=True):
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other)


def test_the_input_gain_scales_the_input_and_is_one_number():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    node, plain = QIF(beta=0.8, input_gain=2.0), QIF(beta=0.8)
    for got, expected in zip(node.forward_sequence(x), plain.forward_sequence(2 * x), strict=True):
        assert torch.equal(got, expected)
    node.input_gain = torch.tensor(0.5)
    assert node.input_gain == 0.5
    assert node.qif_parameters.input_gain == 0.5
    node.reset_mem()
    assert torch.equal(copy.deepcopy(node).forward_sequence(x)[0], QIF(beta=0.8).forward_sequence(0.5 * x)[0])
    for wrong in (torch.ones(2), torch.ones((), requires_grad=True)):
        with pytest.raises(ValueError, match="input_gain must be one number that is not learned"):
            node.input_gain = wrong
    with pytest.raises(ValueError, match="input_gain"):
        node.input_gain = float("nan")
    assert node.input_gain == 0.5


def test_without_reset_the_map_without_rebound_stays_without():
    x = torch.full((4, 2), -3.0)
    node = QIF(beta=0.5, dynamics="monotone", reset_mechanism="none")
    mem = node.forward_sequence(x)[1]
    assert (mem[1:] < mem[:-1]).all()  # LIF's below rest: it goes on falling, and does not rebound


def test_repr_shows_a_given_map_without_rebound():
    neuron = QIF(beta=0.5, dynamics="monotone")
    neuron.dynamics = "explicit"
    assert not neuron.qif_parameters.rebound
    assert "dynamics=explicit, rebound=False, a=" in repr(neuron)
    assert "rebound" not in repr(QIF(a=0.25)) + repr(QIF(beta=0.5, dynamics="monotone"))


@pytest.mark.parametrize(("dynamics", "scale"), [("monotone", 1.0), ("monotone", 3.0), ("lif", 0.5)])
def test_a_subtracting_reset_without_delay_gives_the_same_spikes(dynamics, scale):
    x = scale * torch.randn(30, 200, generator=torch.Generator().manual_seed(0))
    spikes, membranes = [], []
    for delay in (True, False):
        neuron = QIF(0.8, dynamics=dynamics, reset_mechanism="subtract", reset_delay=delay)
        mem, found = torch.zeros(200), []
        for step in x:
            spike, mem = neuron(step, mem)
            found.append(spike)
        spikes.append(torch.stack(found))
        membranes.append(mem)
    assert torch.equal(*spikes)
    left = membranes[0] - spikes[0][-1]
    torch.testing.assert_close(membranes[1], left.clamp(max=1) if dynamics == "monotone" else left)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_a_reset_without_delay_keeps_half_precision_with_one_threshold_per_neuron(reset):
    neuron = QIF(0.9, torch.tensor([0.5, 1.0, 2.0]), dynamics="monotone", reset_mechanism=reset, reset_delay=False)
    for result in neuron.bfloat16()(3 * torch.ones(2, 3, dtype=torch.bfloat16)):
        assert result.dtype == torch.bfloat16
