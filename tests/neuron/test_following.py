"""Windows that follow learned parameters: equal parameters, equal windows, whatever ran before, in every host."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qif_plugins import MomentClosureError, QIFParameters, membrane_moments
from qif_plugins.neuron.following import WindowMemory, followed_moments, window_of_moments
from qif_plugins.neuron.surrogate import Window

CHANNELS = 3


def tensors(*values):
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def matched(betas, **arguments):
    return QIFParameters.matching_lif(torch.tensor(betas, dtype=torch.float64), **arguments)


@pytest.mark.host_independent
class TestTheClosure:
    @pytest.mark.parametrize(
        ("params", "input_std", "input_mean"),
        [
            (QIFParameters(*tensors([0.05, 0.25, 0.5], [0.0, -0.3, 0.1], [0.5, 0.2, 0.0])), 1.0, 0.0),
            (QIFParameters(*tensors([0.05, 0.2, 0.3], [0.0, -0.3, 0.1], [0.5, 0.2, 0.0]), v_reset=-0.5), 0.3, 0.2),
            (QIFParameters(*tensors([0.1, 0.2], [0.0, -0.3], [0.5, 0.2]), reset="soft"), 0.5, 0.0),
            (QIFParameters(0.25, 0.0, 0.5, *tensors([0.5, 1.0, 2.0])), torch.tensor([0.5, 1.0, 2.0]), 0.0),
            (matched([0.0, 0.5, 0.9, 0.99, 0.999, 0.9999]), 1.0, 0.0),
            (matched([0.0, 0.5, 0.9, 0.99, 0.999, 0.9999]), 0.1, 0.0),
            (matched([0.5, 0.9, 0.99, 0.9999], v_threshold=20.0), 20.0, torch.tensor([1.0, -1.0, 2.0, 3.0])),
            (matched([0.5, 0.9, 0.99, 0.999], reset="soft"), 0.3, 0.0),
        ],
    )
    def test_is_solved_where_membrane_moments_solves_it(self, params, input_std, input_mean):
        for mine, expected in zip(
            followed_moments(params, input_std, input_mean),
            membrane_moments(params, input_std, input_mean),
            strict=True,
        ):
            torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-8)

    def test_parameters_and_measured_moments_broadcast(self):
        params = QIFParameters(torch.tensor(0.25, dtype=torch.float64))
        std = torch.tensor([0.5, 1.0]).view(2, 1, 1)
        mean, deviation = followed_moments(params, std)
        assert mean.shape == deviation.shape == std.shape
        expected = membrane_moments(params, std)
        torch.testing.assert_close((mean, deviation), expected, rtol=1e-7, atol=1e-8)

    def test_where_it_does_not_converge_the_moments_are_the_inputs(self):
        a = torch.tensor([0.25, 1.2])
        with pytest.raises(MomentClosureError):
            membrane_moments(QIFParameters(1.2), 1.0, 0.1)
        mean, std = followed_moments(QIFParameters(a), 1.0, 0.1)
        assert (mean[1].item(), std[1].item()) == (0.1, 1.0)
        expected = membrane_moments(QIFParameters(a[0].item()), 1.0, 0.1)
        assert (mean[0].item(), std[0].item()) == pytest.approx(expected, rel=1e-6)

    def test_nothing_is_read_back_from_a_device(self):
        """A tensor without values refuses it."""
        mean, std = followed_moments(QIFParameters.unchecked(a=torch.ones(3, device="meta")), torch.ones(2, 1))
        assert (mean.shape, mean.device.type, std.shape) == ((2, 3), "meta", (2, 3))

    @given(
        a=st.floats(1e-6, 1e6), u1=st.floats(-1e5, 1e5), u2=st.floats(-1e5, 1e5), threshold=st.floats(-10, 100),
        std=st.floats(0, 100), soft=st.booleans(),
    )  # fmt: skip
    def test_no_parameters_give_nan(self, a, u1, u2, threshold, std, soft):
        numbers = {name: torch.tensor(value) for name, value in {"a": a, "u1": u1, "u2": u2}.items()}
        params = QIFParameters.unchecked(**numbers, v_threshold=threshold, reset="soft" if soft else "hard")
        mean, deviation = followed_moments(params, std)
        assert torch.isfinite(mean)
        assert torch.isfinite(deviation)
        assert deviation > 0


@pytest.mark.host_independent
class TestTheMemory:
    def derived(self, memory, *tensors):
        calls = []

        def derive():
            calls.append(1)
            return Window.unchecked(*(value.sum().detach() for value in tensors), 1.0)

        return memory(tensors, derive), bool(calls)

    def test_a_window_is_kept_until_a_parameter_changes(self):
        memory, p, q = WindowMemory(), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        first, derived = self.derived(memory, p, q)
        assert derived
        assert self.derived(memory, p, q) == (first, False)
        torch.optim.SGD([p], 0.1, foreach=True).step()  # no gradient, no change
        assert not self.derived(memory, p, q)[1]
        p.grad = torch.ones(2)
        torch.optim.SGD([p], 0.1, foreach=True).step()
        window, derived = self.derived(memory, p, q)
        assert derived
        assert window.lo.item() == pytest.approx(1.8)
        assert self.derived(memory, torch.nn.Parameter(p.detach().clone()), q)[1]

    def test_a_write_through_data_is_noticed_when_in_doubt_and_only_for_a_gradient(self):
        memory, p = WindowMemory(), torch.nn.Parameter(torch.ones(2))
        self.derived(memory, p, p)
        p.data.fill_(3.0)
        memory.doubt()
        with torch.no_grad():
            assert not self.derived(memory, p, p)[1]
        assert self.derived(memory, p, p)[0].lo.item() == 6.0

    def test_copies_begin_empty_and_nothing_of_a_transform_is_kept(self):
        memory, p = WindowMemory(), torch.nn.Parameter(torch.ones(2))
        self.derived(memory, p, p)
        for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
            assert self.derived(twin, p, p)[1]
        memory.clear()

        def loss(x):
            return (x * self.derived(memory, p, x)[0].lo).sum()

        torch.func.grad(loss)(torch.ones(2))
        assert self.derived(memory, p, p)[1]


def parametric():
    return pytest.importorskip("qif_plugins.adapters.spikingjelly").ParametricQIFNode(channels=CHANNELS)


def learned_leak():
    pytest.importorskip("spikingjelly")
    from qif_plugins.convert.leak import LeakQIFNode

    return LeakQIFNode(3.0)


def snntorch_neuron():
    QIF = pytest.importorskip("qif_plugins.adapters.snntorch").QIF
    return QIF(torch.full((CHANNELS,), 0.7), learn_beta=True, learn_threshold=True)


NEURONS = [parametric, learned_leak, snntorch_neuron]


def run(neuron, x_seq, single=False):
    """All steps from rest, one by one or at once."""
    if hasattr(neuron, "reset_mem"):
        neuron.reset_mem()
        if not single:
            return neuron.forward_sequence(x_seq)[0]
        mem, spikes = torch.zeros_like(x_seq[0]), []
        for x in x_seq:
            spike, mem = neuron(x, mem)
            spikes.append(spike)
        return torch.stack(spikes)
    neuron.reset()
    neuron.step_mode = "s" if single else "m"
    return torch.stack([neuron(x) for x in x_seq]) if single else neuron(x_seq)


def window_of(neuron):
    """The numbers that follow the learned parameters; the Gaussian's offset is 0."""
    ours = hasattr(neuron, "reset_mem")
    surrogate = neuron.surrogate if ours else neuron.surrogate_function.window(neuron.v_threshold)
    return [value for value in surrogate.coefficients() if isinstance(value, torch.Tensor)]


def currents():
    return 1.5 * torch.randn(4, 8, CHANNELS, generator=torch.Generator().manual_seed(1))


def moved(make):
    """A neuron whose parameters are not where they started."""
    neuron = make()
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.add_(0.15)
    return neuron


def gradients(neuron, forward):
    x = currents().requires_grad_()
    neuron.zero_grad()
    forward(x).square().sum().backward()
    return [x.grad.clone(), *(parameter.grad.clone() for parameter in neuron.parameters())]


def train(neuron, steps, optimizer, between=None, single=False):
    for _ in range(steps):
        optimizer.zero_grad()
        run(neuron, currents(), single).square().sum().backward()
        optimizer.step()
        if between is not None:
            between(neuron)
    return optimizer


def sgd(neuron):
    return torch.optim.SGD(neuron.parameters(), lr=0.01, momentum=0.9)


def assert_same(mine, theirs):
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("make", NEURONS)
class TestEveryHost:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("single", [True, False])
    def test_activation_checkpointing_has_the_same_gradient(self, make, use_reentrant, single):
        neuron = moved(make)
        plain = gradients(neuron, lambda x: run(neuron, x, single))
        again = gradients(
            neuron, lambda x: checkpoint(lambda y: run(neuron, y, single), x, use_reentrant=use_reentrant)
        )
        assert_same(plain, again)

    def test_forwards_before_the_backward_change_nothing(self, make):
        neuron = moved(make)
        once = gradients(neuron, lambda x: run(neuron, x))

        def thrice(x):
            run(neuron, x.detach()), run(neuron, 2 * x.detach(), single=True)
            return run(neuron, x)

        assert_same(once, gradients(neuron, thrice))

    def test_evaluation_between_the_steps_changes_nothing(self, make):
        def evaluate(neuron):
            neuron.eval()
            with torch.no_grad():
                run(neuron, currents())
            neuron.train()

        plain, disturbed = make(), make()
        train(plain, 4, sgd(plain))
        train(disturbed, 4, sgd(disturbed), evaluate)
        assert_same(plain.parameters(), disturbed.parameters())

    def test_evaluation_has_the_window_of_training(self, make):
        neuron = moved(make)
        training = gradients(neuron, lambda x: run(neuron, x))
        neuron.eval()
        assert_same(training, gradients(neuron, lambda x: run(neuron, x)))

    def test_the_step_mode_changes_nothing(self, make):
        stepped, whole = make(), make()
        train(stepped, 1, sgd(stepped), single=True)
        train(whole, 1, sgd(whole))
        for mine, theirs in zip(stepped.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        stepped.load_state_dict(whole.state_dict())
        run(stepped, currents(), single=True), run(whole, currents())
        assert_same(window_of(stepped), window_of(whole))

    def test_a_resumed_training_is_the_uninterrupted_one(self, make):
        whole, resumed = make(), make()
        whole_optimizer = train(whole, 3, sgd(whole))
        file = io.BytesIO()
        torch.save([whole.state_dict(), whole_optimizer.state_dict()], file)
        file.seek(0)
        state, momentum = torch.load(file, weights_only=True)
        resumed.load_state_dict(state, strict=True)
        resumed_optimizer = sgd(resumed)
        resumed_optimizer.load_state_dict(momentum)
        train(whole, 3, whole_optimizer), train(resumed, 3, resumed_optimizer)
        assert_same(whole.parameters(), resumed.parameters())
        assert_same(window_of(whole), window_of(resumed))

    def test_the_window_is_that_of_the_parameters(self, make):
        neuron = moved(make)
        run(neuron, currents())
        params = neuron.qif_parameters
        mean, std = membrane_moments(params, params.v_threshold)
        expected = window_of_moments("isometric", params, mean, std, params.v_threshold).coefficients()[:2]
        for mine, theirs in zip(window_of(neuron), expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs.double().expand_as(mine), rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_copies_and_other_precisions_have_it_too(self, make, dtype):
        neuron = moved(make)
        run(neuron, currents())
        twins = copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))
        for twin in twins:
            run(twin, currents())
            assert_same(window_of(neuron), window_of(twin))
        other = twins[0].to(dtype)
        assert run(other, currents().to(dtype)).dtype == dtype
        for mine, theirs in zip(window_of(other), window_of(neuron), strict=True):
            assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2)

    def test_a_write_through_data_shows_in_the_next_sequence(self, make):
        written, stepped = make(), make()
        run(written, currents())
        for parameter in written.parameters():
            parameter.data.add_(0.15)
        with torch.no_grad():
            for parameter in stepped.parameters():
                parameter.add_(0.15)
        assert_same(*(gradients(neuron, lambda x, n=neuron: run(n, x)) for neuron in (written, stepped)))

    def test_frozen_parameters_keep_it_and_shared_ones_share_it(self, make):
        neuron, other = moved(make), make()
        expected = gradients(neuron, lambda x: run(neuron, x))[0]
        for name, parameter in neuron.named_parameters():
            setattr(other, name, parameter)
        assert torch.equal(gradients(other, lambda x: run(other, x))[0], expected)
        neuron.requires_grad_(False)
        x = currents().requires_grad_()
        run(neuron, x).square().sum().backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("make", [parametric, snntorch_neuron])
def test_a_compiled_neuron_follows(make):
    neuron = moved(make)
    neuron.step_mode = "m"
    call = neuron.forward_sequence if hasattr(neuron, "reset_mem") else neuron
    compiled = torch.compile(call, backend="eager", fullgraph=True)

    def whole(x, call):
        neuron.reset_mem() if hasattr(neuron, "reset_mem") else neuron.reset()
        result = call(x)
        return result if isinstance(result, torch.Tensor) else result[0]

    for _ in range(2):
        mine = gradients(neuron, lambda x: whole(x, compiled))
        expected = gradients(neuron, lambda x: whole(x, call))
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            next(neuron.parameters()).sub_(0.2)


@pytest.mark.parametrize("make", NEURONS)
def test_a_functional_call_has_the_window_and_the_gradients_of_its_parameters(make):
    neuron, other = make(), moved(make)
    x, values = currents(), {name: value.detach().clone() for name, value in other.named_parameters()}

    def loss(values):
        if hasattr(neuron, "reset_mem"):
            neuron.reset_mem()
        else:
            neuron.reset()
        mem, total = torch.zeros_like(x[0]), 0.0
        for step in x:
            if hasattr(neuron, "reset_mem"):
                spike, mem = torch.func.functional_call(neuron, values, (step, mem))
            else:
                spike = torch.func.functional_call(neuron, values, (step,))
            total = total + spike.square().sum()
        return total

    found = torch.func.grad(loss)(values)
    expected = gradients(other, lambda x: run(other, x, single=True))[1:]
    for mine, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    gradients(neuron, lambda x: run(neuron, x))
    assert_same(window_of(neuron), window_of_fresh(make))


class Shrunk(torch.nn.Module):
    def forward(self, value):
        return 0.9 * value


def outside_parameters(neuron, name, how):
    """A learned number in a place other than the module's parameters; returns what a gradient is asked for."""
    if how == "parametrization":
        torch.nn.utils.parametrize.register_parametrization(neuron, name, Shrunk())
        return neuron.parametrizations[name].original
    value = (0.9 * getattr(neuron, name).detach()).requires_grad_()
    delattr(neuron, name)
    setattr(neuron, name, value)
    return value


@pytest.mark.parametrize("how", ["parametrization", "a tensor in its place"])
@pytest.mark.parametrize(
    ("make", "name"), [(parametric, "raw_u2"), (learned_leak, "w"), (snntorch_neuron, "beta")], ids=["own", "w", "beta"]
)
def test_a_number_that_is_learned_outside_the_parameters_is_learned(make, name, how):
    neuron, plain = moved(make), moved(make)
    with torch.no_grad():
        getattr(plain, name).mul_(0.9)
    with torch.no_grad():
        run(neuron, currents())
    value = outside_parameters(neuron, name, how)
    with torch.no_grad():
        run(neuron, currents())  # an evaluation in between takes it for no constant
    (found,) = torch.autograd.grad(run(neuron, currents()).square().sum(), value)
    (expected,) = torch.autograd.grad(run(plain, currents()).square().sum(), getattr(plain, name))
    torch.testing.assert_close(found, expected * (0.9 if how == "parametrization" else 1.0))
    torch.testing.assert_close(window_of(neuron), window_of(plain))


def constant_threshold():
    return pytest.importorskip("qif_plugins.adapters.snntorch").QIF(0.7, 0.9, learn_beta=True)


@pytest.mark.parametrize("make", [*NEURONS, constant_threshold])
def test_an_ensemble_is_batched_with_its_buffers(make):
    """PyTorch's own recipe, torch.func.stack_module_state, stacks the numbers that are not learned, too."""
    members = [moved(make) for _ in range(3)]
    for index, member in enumerate(members):
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.sub_(0.05 * index)
    x, base = currents()[0], copy.deepcopy(members[0])
    inputs = (x, 0.6 * torch.ones_like(x)) if hasattr(base, "reset_mem") else (x,)

    def loss(out):
        return sum(value.square().sum() for value in (out if isinstance(out, tuple) else (out,)))

    def of_state(parameters, buffers):
        return loss(torch.func.functional_call(base, (parameters, buffers), inputs))

    found = torch.vmap(torch.func.grad(of_state))(*torch.func.stack_module_state(members))
    for index, member in enumerate(members):
        expected = torch.autograd.grad(loss(member(*inputs)), list(member.parameters()))
        for (name, _), value in zip(member.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][index], value)


def window_of_fresh(make):
    neuron = make()
    run(neuron, currents())
    return window_of(neuron)


def test_both_hosts_have_one_window_for_one_leak():
    neuron = pytest.importorskip("qif_plugins.adapters.snntorch").QIF(0.5, learn_beta=True)
    node = learned_leak()
    for leak in (0.05, 0.5, 0.9, 0.999):
        with torch.no_grad():
            node.w.copy_(torch.logit(torch.tensor(1 - leak)))
            neuron.beta.fill_(leak)
        run(node, currents()), run(neuron, currents())
        torch.testing.assert_close(window_of(node), window_of(neuron), rtol=1e-4, atol=1e-5)
