"""The way past the dispatcher, and memory that is used again: the same results, and only where nobody can tell."""

import copy
import ctypes
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qif_plugins.neuron import functional
from qif_plugins.neuron.functional import qif_multi_step, qif_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import ATan, Gaussian, Window
from qif_plugins.ops import shortcuts
from qif_plugins.ops.shortcuts import eager, memory, openmp

pytest.importorskip("numba", reason="Numba is not installed")
pytestmark = pytest.mark.host_independent

PARAMS = QIFParameters()
WINDOW = Window.unbiased(PARAMS)
SEQUENCE = (4, (1 << 17) + 7)


class Watch(TorchDispatchMode):
    """Sees every operator, which makes a call go by the operator."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.name())
        return function(*args, **(kwargs or {}))


def by_both_ways(run):
    """What ``run`` gives past the dispatcher and through the operator."""
    direct = run()
    with Watch() as watch:
        through = run()
    assert "qif::multi_step" in watch.seen
    return direct, through


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_a_plain_call_goes_past_the_dispatcher(monkeypatch):
    if not (eager._known and shortcuts.ENABLED):
        pytest.skip("shortcuts are off, or this version of PyTorch does not say what is plain")
    monkeypatch.setattr(functional, "multi_step", None)
    x = torch.randn(3, 5, requires_grad=True)
    qif_multi_step(x, 0.0, PARAMS, WINDOW)[0].sum().backward()
    qif_step(x.detach(), torch.zeros(3, 5), PARAMS, ATan())
    with torch.inference_mode():
        qif_multi_step(torch.randn(3, 5), 0.0, PARAMS, WINDOW)


@settings(max_examples=40)
@given(
    x_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    v_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    reset=st.sampled_from(["hard", "soft"]),
    surrogate=st.sampled_from([WINDOW, Gaussian(0.6, 0.5, offset=0.1)]),
    options=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 9),
)
def test_both_ways_give_the_same(x_dtype, v_dtype, reset, surrogate, options, seed):
    detach_reset, store_v_seq, store_h_seq, pre_reset, single = options
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, generator=generator).to(x_dtype)
    state = None if v_dtype is None else torch.randn(*(x.shape if single else x.shape[1:])).to(v_dtype)
    params = QIFParameters(reset=reset)

    def run():
        leaf = x.clone().requires_grad_()
        v = 0.3 if state is None else state.clone().requires_grad_()
        if single:
            outputs = qif_step(leaf, v, params, surrogate, detach_reset, store_h=store_h_seq, pre_reset=pre_reset)
        else:
            outputs = qif_multi_step(
                leaf, v, params, surrogate, detach_reset, store_v_seq, store_h_seq=store_h_seq, pre_reset=pre_reset
            )
        weights = torch.Generator().manual_seed(seed + 1)
        loss = sum((torch.randn(o.shape, generator=weights) * o.float()).sum() for o in outputs)
        loss.backward()
        return [*(output.detach() for output in outputs), leaf.grad, None if state is None else v.grad]

    assert_same(*by_both_ways(run))


def test_a_negated_view_is_no_plain_tensor():
    x = torch.randn(3, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert not eager.is_plain(x)
    assert_same(qif_multi_step(x, 0.0, PARAMS, WINDOW), qif_multi_step(x.clone(), 0.0, PARAMS, WINDOW))


def test_the_pre_reset_membrane_of_a_step_may_be_changed_in_place():
    x = torch.randn(5, 7, requires_grad=True)
    spike, _, h = qif_step(x, 0.2, PARAMS, WINDOW, store_h=True)
    h.detach_().zero_()
    spike.sum().backward()
    wanted = x.grad
    x.grad = None
    qif_step(x, 0.2, PARAMS, WINDOW)[0].sum().backward()
    assert torch.equal(x.grad, wanted)


def test_a_second_derivative_past_the_dispatcher():
    def run():
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        _, v = qif_multi_step(x, 0.0, PARAMS, ATan())
        (first,) = torch.autograd.grad((v**3).sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.sum(), x)

    assert_same(*by_both_ways(run))


def sequence(seed=0, params=PARAMS, **options):
    x = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return x, qif_multi_step(x, 0.0, params, WINDOW, **options)


@pytest.mark.parametrize("learned", [False, True], ids=["past the dispatcher", "operator"])
def test_a_graph_that_is_kept_gives_the_same_twice(learned):
    params = QIFParameters.unchecked(a=torch.tensor(0.25, requires_grad=True) if learned else 0.25)
    x, (spikes, _) = sequence(params=params)
    first, second = (
        torch.autograd.grad(spikes, x, torch.ones_like(spikes), retain_graph=keep)[0] for keep in (True, False)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("learned", [False, True], ids=["past the dispatcher", "operator"])
@pytest.mark.parametrize("how", ["returned", "view", "detached", "saved", "only saved", "storage", "packed"])
def test_no_tensor_that_somebody_holds_changes_in_a_backward_pass(how, learned):
    """However h is got hold of, and however the pass is run: the same h before and after, and no gradient in it."""
    params = QIFParameters.unchecked(a=torch.tensor(0.25, requires_grad=True) if learned else 0.25)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    if how == "only saved":
        x, (spikes, _) = sequence(params=params)
        h = None
    elif how == "packed":
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x, (spikes, _, h) = sequence(params=params, store_h_seq=True)
    else:
        x, (spikes, _, h) = sequence(params=params, store_h_seq=True)
    if how == "returned":
        kept.append(h)
    elif how == "view":
        kept.append(h[1:])
    elif how == "detached":
        kept.append(h.detach())
    elif how in ("saved", "only saved"):
        kept.append(next(tensor for tensor in spikes.grad_fn.saved_tensors if tensor is not None))
    elif how == "storage":
        kept.append(torch.empty(0).set_(h.untyped_storage(), 0, SEQUENCE))
    del h
    held = next(tensor for tensor in kept if tensor.shape[-1] == SEQUENCE[1]).detach()
    before = held.clone()
    spikes.backward(torch.ones_like(spikes))
    assert torch.equal(held, before)
    assert x.grad.untyped_storage().data_ptr() != held.untyped_storage().data_ptr()
    y, (expected, _) = sequence(params=params, backend="torch")
    expected.backward(torch.ones_like(expected))
    assert torch.equal(x.grad, y.grad)


def test_an_observer_keeps_h():
    from qif_plugins.neuron.observe import observing

    seen = []
    with observing(seen.append):
        _, (spikes, _) = sequence()
    before = seen[0].h_seq.detach().clone()
    spikes.backward(torch.ones_like(spikes))
    assert torch.equal(seen[0].h_seq, before)


def test_large_tensors_that_are_streamed_hold_the_same_bits():
    """Rows of whole bursts go past the caches, others do not."""
    for neurons in (memory.LARGE // 8 + 64, memory.LARGE // 8 + 5):
        x = torch.randn(2, neurons)
        weights = torch.randn(2, neurons)
        results = []
        for backend in ("auto", "torch"):
            leaf = x.clone().requires_grad_()
            outputs = qif_multi_step(leaf, 0.2, PARAMS, WINDOW, backend=backend, store_h_seq=True)
            outputs[0].backward(weights)
            results.append([*outputs, leaf.grad])
        assert_same(*results)


def large_call(**options):
    """Everything large that a call makes: spikes, membranes, h and the gradient."""
    x = torch.randn(2, memory.LARGE // 8 + 5, requires_grad=True)
    outputs = qif_multi_step(x, 0.0, PARAMS, WINDOW, store_v_seq=True, store_h_seq=True, **options)
    outputs[0].sum().backward()
    return [*(output.detach() for output in outputs), x.grad]


@pytest.mark.parametrize("backend", ["auto", "numba", "torch"])
def test_the_storage_of_a_large_result_is_pytorchs_own(backend):
    for tensor in large_call(backend=backend):
        before = tensor.clone()
        assert not tensor._is_view()
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), before)
        assert torch.equal(copy.deepcopy(tensor), before)
        tensor.resize_(2 * tensor.numel())
        assert torch.equal(tensor[: before.numel()], before.flatten())
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


def test_many_lengths_leave_no_memory_behind():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say what a process holds")
    results = large_call()
    del results
    before = resident()
    for length in range(20):
        x = torch.randn(2, memory.LARGE // 4 + 4096 * length)
        qif_multi_step(x, 0.0, PARAMS, WINDOW)
    assert resident() - before < 64 << 20


@pytest.mark.skipif(not memory.uses_huge_pages(), reason="no huge pages are asked for")
def test_large_tensors_lie_on_huge_pages():
    tensor = memory.on_huge_pages(torch.empty(4 * memory.LARGE, dtype=torch.uint8))
    middle, flags = tensor.data_ptr() + 2 * memory.LARGE, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, stop = (int(part, 16) for part in name.split("-"))
            inside = first <= middle < stop
        elif name == "VmFlags:" and inside:
            flags = rest
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has none")
    assert "hg" in flags


@pytest.mark.parametrize("lacking", ["constant", "library", "function", "switched off"])
def test_a_system_without_advice_leaves_tensors_as_they_are(lacking, monkeypatch):
    if lacking == "constant":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif lacking == "switched off":
        monkeypatch.setattr(memory, "ENABLED", False)
    else:

        def load(name):
            if lacking == "library":
                raise OSError(name)
            return object()

        monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(memory, "_madvise", memory._find_madvise())
    assert not memory.uses_huge_pages()
    x = torch.randn(2, memory.LARGE // 8)
    assert_same(qif_multi_step(x, 0.0, PARAMS, WINDOW), qif_multi_step(x, 0.0, PARAMS, WINDOW, backend="torch"))


def test_the_profiler_sees_what_large_tensors_take():
    x = torch.randn(2, memory.LARGE // 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        spikes, _ = qif_multi_step(x, 0.0, PARAMS, WINDOW)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) >= spikes.nbytes


def test_a_version_that_does_not_say_whether_it_profiles_takes_the_operator(monkeypatch):
    monkeypatch.delattr(torch.autograd.profiler, "_is_profiler_enabled")
    x = torch.randn(3, 5)
    assert not eager.applies(x, 0.0)
    assert_same(qif_multi_step(x, 0.0, PARAMS, WINDOW), qif_multi_step(x, 0.0, PARAMS, WINDOW, backend="torch"))


@pytest.mark.parametrize("lacking", ["file", "symbol", "library", "switched off"])
def test_a_pytorch_without_a_team_to_start_has_our_threads(lacking, monkeypatch):
    if lacking == "file":
        monkeypatch.delattr(torch._C, "__file__")
    elif lacking == "switched off":
        monkeypatch.setattr(openmp, "ENABLED", False)
    else:

        def load(name):
            if lacking == "library":
                raise OSError(name)
            return object()

        monkeypatch.setattr(ctypes, "CDLL", load)
    assert openmp._find_team() is None


FALLBACK = """
import torch
import torch.autograd.function as function
kept = function._SingleLevelFunction
del function._SingleLevelFunction  # as in a version that has none
import qif_plugins.ops.autograd as derivatives
function._SingleLevelFunction = kept
assert not derivatives.TAKES_TRANSFORMS
from qif_plugins import ATan, QIFParameters, Window, qif_multi_step
from qif_plugins.ops.shortcuts import eager
def run():
    torch.manual_seed(0)
    x, a = torch.randn(3, 4, 5, requires_grad=True), torch.full((5,), 0.25, requires_grad=True)
    v = torch.randn(4, 5, requires_grad=True)
    out = qif_multi_step(x, v, QIFParameters.unchecked(a=a), Window(0.5, 1.5), store_v_seq=True, backend=backend)
    (out[0].sum() + (out[1] ** 2).sum()).backward()
    return [*out, x.grad, v.grad, a.grad]
for backend in ("torch", "auto"):
    results = run()
    print([round(float(result.detach().double().sum()), 4) for result in results])
eager._known = False  # as in a version that does not say
x, a = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_(), torch.tensor(0.25, requires_grad=True)
def loss(x):
    return (qif_multi_step(x, 0.0, QIFParameters.unchecked(a=a), ATan())[1] ** 3).sum()
(g,) = torch.autograd.grad(loss(x), x, create_graph=True)
second = torch.autograd.grad((g ** 2).sum(), [x, a])
print([round(float(result.double().sum()), 3) for result in second])
assert torch.equal(*(torch.autograd.functional.jacobian(loss, x, vectorize=batched) for batched in (True, False)))
try:
    torch.func.grad(loss)(x)
except RuntimeError as error:
    print(error)
"""


def test_a_version_without_the_private_names():
    """The public way to register a derivative, and no shortcut: the same numbers; ``torch.func`` is refused."""
    done = forked.python(FALLBACK)
    assert done.returncode == 0, done.stderr
    reference, fast, second, refused = done.stdout.splitlines()
    assert reference == fast
    assert "functorch transforms" in refused
    x, a = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_(), torch.tensor(0.25, requires_grad=True)
    v = qif_multi_step(x, 0.0, QIFParameters.unchecked(a=a), ATan())[1]
    (first,) = torch.autograd.grad((v**3).sum(), x, create_graph=True)
    expected = torch.autograd.grad((first**2).sum(), [x, a])
    assert str([round(float(result.double().sum()), 3) for result in expected]) == second
    torch.manual_seed(0)
    x, a = torch.randn(3, 4, 5, requires_grad=True), torch.full((5,), 0.25, requires_grad=True)
    v = torch.randn(4, 5, requires_grad=True)
    out = qif_multi_step(x, v, QIFParameters.unchecked(a=a), Window(0.5, 1.5), store_v_seq=True)
    (out[0].sum() + (out[1] ** 2).sum()).backward()
    results = [*out, x.grad, v.grad, a.grad]
    assert str([round(float(result.detach().double().sum()), 4) for result in results]) == reference


WITHOUT_RULES = """
import warnings
import torch
del torch.library.register_vmap  # as in PyTorch 2.4
from qif_plugins import QIFParameters, Window, qif_multi_step
warnings.simplefilter("ignore")  # of PyTorch's loop over the batch
def loss(x, a):
    spikes, v = qif_multi_step(x, 0.0, QIFParameters.unchecked(a=a), Window(0.5, 1.5))
    return (spikes * x).sum() + (v ** 2).sum()
xs, a = torch.randn(3, 4, 5), torch.linspace(0.2, 0.3, 5)
gradient = torch.func.grad(loss, (0, 1))
to_x, to_a = torch.vmap(gradient, (0, None))(xs, a)
wanted = [gradient(x, a) for x in xs]
assert torch.equal(to_x, torch.stack([one[0] for one in wanted]))
torch.testing.assert_close(to_a, torch.stack([one[1] for one in wanted]))
"""


def test_a_version_that_registers_no_rule_for_vmap():
    done = forked.python(WITHOUT_RULES)
    assert done.returncode == 0, done.stderr


def test_the_switch_turns_every_shortcut_off():
    """The variable in a fresh process: each shortcut says that it is off, and a kernel runs all the same."""
    done = forked.python(SWITCHED_OFF)
    assert done.returncode == 0, done.stderr


SWITCHED_OFF = """
import os
os.environ["QIF_PLUGINS_SHORTCUTS"] = "0"
import torch
from qif_plugins import QIFParameters, Window, qif_multi_step
from qif_plugins.ops.shortcuts import eager, memory, openmp
x = torch.randn(4, 1 << 19, requires_grad=True)
assert not eager.applies(x, 0.0) and not memory.uses_huge_pages() and not openmp.uses_openmp()
spikes, _ = qif_multi_step(x, 0.0, QIFParameters(), Window(0.5, 1.5))
spikes.sum().backward()
y = x.detach().clone().requires_grad_()
reference, _ = qif_multi_step(y, 0.0, QIFParameters(), Window(0.5, 1.5), backend="torch")
reference.sum().backward()
assert torch.equal(spikes, reference) and torch.equal(x.grad, y.grad)
"""


@pytest.mark.parametrize("value", ["off", "false", "2"])
def test_the_switch_takes_nothing_but_0_and_1(value):
    with pytest.raises(ValueError, match=f"QIF_PLUGINS_SHORTCUTS must be 0 .* or 1 .*{value!r}"):
        shortcuts._is_on(value)
    assert all(shortcuts._is_on(on) for on in (None, "", "1"))
    assert not shortcuts._is_on("0")


@pytest.mark.skipif(not shortcuts.ENABLED, reason="this is the run without shortcuts")
def test_the_kernel_tests_pass_with_every_shortcut_off():
    files = ["ops/test_shortcuts.py", "ops/test_numba_backend.py", "ops/test_library.py", "neuron/test_functional.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", NOT_AGAIN]
    done = subprocess.run(
        [*command, *(str(Path(__file__).parents[1] / name) for name in files)],
        env={**os.environ, shortcuts.VARIABLE: "0"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


SLOW = "switch equations compile processes export folder fork 31_elements private_names for_vmap many_chunks opcheck"
NOT_AGAIN = " and ".join(f"not {name}" for name in SLOW.split())
"""What takes long and meets no shortcut."""
