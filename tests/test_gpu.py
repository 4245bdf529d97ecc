"""On a CUDA GPU: every implementation that runs there against the reference on the CPU, and the hosts on top.

``pytest -m gpu``. Without a GPU everything here is skipped. Most of the time goes into compiling: Triton takes one to
three seconds for each kind of kernel that the cases draw. ``-n 8`` (pytest-xdist) spreads that over the cores.

With ``QIF_REHEARSAL`` (a folder for what is compiled) and ``TRITON_INTERPRET=1`` in the environment, a rehearsal on the
CPU: Triton's kernels interpreted, those of ``qif.cu`` emulated. ``benchmarks/gpu.py`` says what that cannot show.
"""

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cuda_shim
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import SHORT, Case, cases, check_against_reference
from measured_models import MODELS
from torch import distributed, nn

from qif_plugins.cli import main
from qif_plugins.experiments.bench.peers import OURS
from qif_plugins.experiments.bench.runner import PASSES
from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import ATan, FastSigmoid, Sigmoid, Window
from qif_plugins.ops.backends import available_backends, implementation, unavailable_reason
from qif_plugins.ops.contract import Coefficient, Coefficients, Kind, Shape
from qif_plugins.ops.library import multi_step

REHEARSAL = os.environ.get("QIF_REHEARSAL")
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning" if REHEARSAL else "default"),  # NumPy interprets NaN
]
host_independent = pytest.mark.host_independent


def on_card(why):
    """Leave a test out of the rehearsal."""
    return pytest.mark.skipif(bool(REHEARSAL), reason=f"not rehearsed: {why}")


MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="session", autouse=True)
def _emulated():
    if REHEARSAL:
        cuda_shim.rehearse(REHEARSAL)


@pytest.fixture(scope="module", params=["triton", "cupy", "torch"])
def backend(request):
    reason = unavailable_reason(request.param, DEVICE)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    if REHEARSAL and request.param == "triton":
        import interpreter

        if reason := interpreter.fault():
            pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def fused(backend):
    if backend == "torch":
        pytest.skip("the reference is not a fused kernel")
    return backend


@host_independent
@on_card("the CPU has other backends")
def test_fused_backends_come_first():
    assert available_backends("cuda")[-1] == "torch"
    assert "numba" not in available_backends("cuda")


@host_independent
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.kind.shape.name)
def test_short_list(backend, case):
    """The first thing that a card is asked."""
    check_against_reference(implementation(backend), case, DEVICE)


@host_independent
@on_card("the suite interprets and emulates the same cases")
@pytest.mark.parametrize("shape", Shape)
@given(case=cases())
@settings(max_examples=30)
def test_same_bits_as_the_reference(backend, shape, case):
    case = replace(case, kind=case.kind._replace(shape=shape), seed=case.seed + shape)
    check_against_reference(implementation(backend), case, "cuda")


@host_independent
@on_card("more blocks than an interpreter gets through")
@pytest.mark.parametrize("blocks", [(5, 64, 4096), (3, 1000, 441), (2**14, 77, 1), (1, 3, 2**18 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_inputs(backend, blocks, dtype):
    """More neurons than a pass of the grid holds, so that the sums stride."""
    case = Case(
        steps=3,
        blocks=blocks,
        dtype=dtype,
        layouts=("channel", "single", "float", "neuron", "float", "channel", "float", "float", "float"),
        kind=Kind(soft=False, detach_reset=False, strict=False, shape=Shape.SIGMOID, pre_reset=False),
        start=torch.float32,
        store_v_seq=False,
        save_h=True,
        specials=False,
        gradients=(True, True, False),
        needs=(True, True, False, True, False, True),
        needs_v0=True,
        seed=7,
    )
    check_against_reference(implementation(backend), case, "cuda")


def run(x, v, backend, surrogate=None, gain=1.0):
    params = QIFParameters.unchecked(input_gain=gain)
    surrogate = surrogate or Window.unbiased(QIFParameters())
    return qif_multi_step(x, v, params, surrogate, store_v_seq=True, backend=backend)


def weights_like(y):
    """Whole numbers, which every device makes alike; linspace and randn differ between them."""
    return (torch.arange(y.numel(), device=y.device) % 7 - 3).to(y.dtype).view_as(y)


def run_with_gradients(x, v, backend, surrogate=None):
    """Spikes, membranes, and the gradients of x and v, on x's device."""
    x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
    spike, v_seq = run(x, v, backend, surrogate)
    weights = weights_like(v_seq)
    grads = torch.autograd.grad((spike * weights).sum() + (v_seq * weights).sum(), (x, v))
    return spike.detach(), v_seq.detach(), *grads


def assert_all_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@host_independent
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_public_entry(backend, memory_format):
    x = torch.randn(12, 6, 5, 3).to(memory_format=memory_format).unflatten(0, (3, 4))
    v = torch.randn(4, 6, 5, 3)
    assert_all_equal(run_with_gradients(x.to(DEVICE), v.to(DEVICE), backend), run_with_gradients(x, v, "torch"))


def check_that_nothing_waits(step):
    """Fail where the host waits for the device, once everything is compiled."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@host_independent
@on_card("the CPU has nothing to wait for")
@pytest.mark.parametrize("sizes", [(1000,), (1,)])
def test_no_host_synchronisation(backend, sizes):
    x, v = torch.randn(4, 1000, device="cuda"), torch.zeros(1000, device="cuda")
    gain = torch.rand(sizes, device="cuda", requires_grad=True)
    params = QIFParameters.unchecked(input_gain=gain)

    def step():
        spike, _ = qif_multi_step(x.requires_grad_(), v, params, ATan(), backend=backend)
        torch.autograd.grad(spike, (x, gain), torch.ones_like(spike))

    check_that_nothing_waits(step)


@host_independent
@on_card("the CPU has no streams")
def test_runs_on_the_current_stream(fused):
    x, v = torch.randn(4, 3000), torch.randn(3000)
    expected = run_with_gradients(x, v, "torch")
    x_gpu, v_gpu = torch.zeros_like(x, device="cuda"), v.cuda()
    run_with_gradients(x_gpu, v_gpu, fused)
    source = x.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The input arrives late on this stream; a launch on another one would read zeros.
        torch.cuda._sleep(200_000_000)
        x_gpu.copy_(source)
        got = run_with_gradients(x_gpu, v_gpu, fused)
    stream.synchronize()
    assert_all_equal(got, expected)


@host_independent
@on_card("the CPU has no streams")
def test_threads_with_streams_of_their_own(fused):
    """All of them compile the same kernel first."""
    x, v = torch.randn(7, 3001), torch.randn(3001)
    expected = run_with_gradients(x, v, "torch", FastSigmoid())

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [t.cpu() for t in run_with_gradients(x.cuda(), v.cuda(), fused, FastSigmoid())]

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(work, range(16)):
            assert_all_equal(got, expected)


@host_independent
def test_empty_input(fused):
    x = torch.empty(3, 0, device=DEVICE, requires_grad=True)
    spike, v = qif_multi_step(x, 0.0, QIFParameters(), ATan(), backend=fused)
    spike.sum().backward()
    assert spike.shape == x.grad.shape == (3, 0)
    assert v.shape == (0,)


@host_independent
def test_float64_takes_the_reference():
    x = torch.randn(3, 50, dtype=torch.float64)
    assert_all_equal(run_with_gradients(x.to(DEVICE), x[0].to(DEVICE), "auto"), run_with_gradients(x, x[0], "auto"))


@host_independent
@on_card("the CPU launches nothing")
def test_one_launch_a_pass(fused):
    x = torch.randn(4, 1000, device="cuda", requires_grad=True)
    weights = weights_like(x)

    def step():
        spike, _ = qif_multi_step(x, 0.0, QIFParameters(), ATan(), backend=fused)
        torch.autograd.grad(spike, x, weights)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 2, [event.name for event in on_device]


@host_independent
@on_card("the CUDA allocator is asked")
def test_memory(fused):
    """Without a gradient h is not kept; with one it is, and the backward pass adds the gradient of x alone."""
    x = torch.randn(4, 2**20, device="cuda")
    run(x, 0.0, fused)
    weights = weights_like(x)
    torch.cuda.empty_cache()

    def grown(function, held, peak):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        # The allocator does not split off a rest of less than 1 MiB.
        assert held * MIB <= torch.cuda.memory_allocated() - before < (held + 2) * MIB
        assert peak * MIB <= torch.cuda.max_memory_allocated() - before < (peak + 2) * MIB
        return result

    def forward():
        return qif_multi_step(x, 0.0, QIFParameters(), ATan(), backend=fused)

    result = grown(forward, held=16 + 4, peak=16 + 4)
    del result
    x.requires_grad_()
    spike, _ = grown(forward, held=16 + 4 + 16, peak=16 + 4 + 16)
    (grad,) = grown(lambda: torch.autograd.grad(spike, x, weights), held=0, peak=16)
    assert grad.shape == x.shape


@host_independent
def test_opcheck(fused):
    x = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True)
    gain = torch.rand(5, device=DEVICE, requires_grad=True)
    numbers = [0.25, 0.0, 0.5, 1.0, 0.0, 1.0, 0.5, 1.5, 0.8, 0.1]
    tensors = (None,) * 5 + (gain,) + (None,) * 3
    torch.library.opcheck(
        multi_step,
        (x, None, *tensors, numbers, x.dtype, False, False, False, int(Shape.WINDOW), False, False, True, fused),
    )


@host_independent
@on_card("the CPU has no graphs")
def test_cuda_graph(fused):
    """Captured once, replayed on other inputs; the second replay must not see anything of the first."""
    static_x = torch.randn(4, 2, 500, device="cuda", requires_grad=True)
    static_v = torch.zeros(2, 500, device="cuda")
    gain = torch.rand(500, device="cuda", requires_grad=True)

    def step():
        spike, v_seq = run(static_x, static_v, fused, Sigmoid(), gain)
        return spike, v_seq, *torch.autograd.grad(spike.sum() + (v_seq * v_seq).sum(), (static_x, gain))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            static_x.copy_(torch.randn(4, 2, 500))
            static_v.copy_(torch.randn(2, 500))
        graph.replay()
        assert_all_equal(captured, step())


@host_independent
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device(fused):
    x, v = torch.randn(4, 3000), torch.randn(3000)
    assert torch.cuda.current_device() == 0
    got = run_with_gradients(x.to("cuda:1"), v.to("cuda:1"), fused)
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_all_equal(got, run_with_gradients(x, v, "torch"))


class Network(nn.Module):
    """A convolution, a normalisation, a neuron with a gain for each channel that learns, and a readout."""

    def __init__(self, backend):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8 * 36, 2)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.surrogate, self.backend = ATan(), backend

    def forward(self, x_seq):
        y = self.norm(self.conv(x_seq.flatten(0, 1))).unflatten(0, x_seq.shape[:2])
        params = QIFParameters.unchecked(v_threshold=0.9, input_gain=self.gain)
        spikes, _ = qif_multi_step(y, 0.0, params, self.surrogate, backend=self.backend)
        return self.out(spikes.mean(0).flatten(1))


def gradients(network, x, y):
    network.zero_grad()
    loss = nn.functional.cross_entropy(network(x), y)
    loss.backward()
    return loss.detach().clone(), *[p.grad.clone() for p in network.parameters()]


@host_independent
@on_card("Inductor writes other code for the CPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_without_graph_break(fused, mode):
    """Inductor, which takes convolutions to channels-last; "reduce-overhead" captures CUDA graphs besides."""
    network = Network(fused).cuda()
    network.norm = nn.Identity()
    with torch.no_grad():  # so that the convolution is exact whatever computes it, and no spike can flip
        network.conv.weight.copy_(torch.randint(-2, 3, network.conv.weight.shape) / 4)
        network.conv.bias.zero_()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, mode=mode)
    for _ in range(4):  # a graph is warmed up, captured, replayed
        x, y = torch.randint(-3, 4, (4, 5, 3, 6, 6), device="cuda") / 2, torch.tensor([0, 1, 0, 1, 1], device="cuda")
        expected = gradients(network, x, y)
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(gradients(compiled, x, y), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@host_independent
@on_card("autocast and the gradient scaler of CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(backend, dtype):
    """With float16 the first scale is so large that gradients overflow and the scaler leaves steps out."""
    network = Network(backend).cuda().to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, enabled=dtype == torch.float16)
    x, y = torch.randn(4, 16, 3, 6, 6, device="cuda"), torch.arange(16, device="cuda") % 2
    losses = []
    for _ in range(80):
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(network(x), y)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in network.parameters())
    assert losses[-1] < losses[0] / 2
    if dtype == torch.float16:
        assert scaler.get_scale() < 2.0**24


@host_independent
@on_card("NCCL")
@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_nccl_available()), reason="this PyTorch has no NCCL"
)
def test_distributed_data_parallel(fused):
    network = Network(fused).cuda()
    x, y = torch.randn(4, 5, 3, 6, 6, device="cuda"), torch.tensor([0, 1, 0, 1, 1], device="cuda")
    expected = gradients(copy.deepcopy(network), x, y)
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(network, device_ids=[torch.cuda.current_device()])
        for a, b in zip(gradients(parallel, x, y), expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        distributed.destroy_process_group()


@host_independent
@on_card("more blocks than an interpreter gets through")
def test_same_sums_every_time(fused):
    """The gradients of numbers are reduced without atomics."""
    x = torch.randn(4, 8, 64, 1024, device="cuda")
    params = QIFParameters.unchecked(a=torch.full((64, 1), 0.25, device="cuda", requires_grad=True))
    results = set()
    for _ in range(5):
        spike, _ = qif_multi_step(x, 0.0, params, ATan(), backend=fused)
        (grad,) = torch.autograd.grad(spike.sum(), params.a)
        results.add(tuple(grad.flatten().tolist()))
    assert len(results) == 1


@host_independent
@on_card("memory")
@pytest.mark.parametrize(("steps", "neurons"), [(1, 2**31 + 1), (2, 2**30 + 4)])
def test_more_than_2_31_elements(fused, steps, neurons):
    """bfloat16 in, float32 saved; compared with the reference piece by piece."""
    needed = steps * neurons * 14 + neurons * 2 + 8 * GIB
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free GPU memory")
    module = implementation(fused)
    gain = torch.full((1,), 0.9, device="cuda")
    c = Coefficients(
        *(Coefficient(number) for number in (0.25, 0.0, 0.5, 1.0, 0.0)), Coefficient(gain, neurons),
        *(Coefficient(number) for number in (0.5, 1.5, 0.8)),
    )  # fmt: skip
    kind = Kind(soft=False, detach_reset=False, strict=False, shape=Shape.WINDOW, pre_reset=False)
    x = torch.empty(steps, neurons, dtype=torch.bfloat16, device="cuda").normal_()
    spike, h = torch.empty_like(x), torch.empty(steps, neurons, device="cuda")
    v_last = torch.empty(neurons, dtype=torch.bfloat16, device="cuda")
    module.forward(x, 0.1, c, kind, spike, v_last, None, h)
    grad_x = torch.empty_like(x)
    (*_, sum_gain) = module.backward(spike, None, None, h, 0.1, x, c, kind, grad_x, None, (False,) * 5 + (True,))

    total = 0.0
    reference = implementation("torch")
    for start in range(0, neurons, 2**26):
        part = slice(start, start + 2**26)
        xs = x[:, part].contiguous()
        count = xs.shape[1]
        cut = c._replace(input_gain=Coefficient(gain, count))
        want_spike, want_v, want_grad = torch.empty_like(xs), torch.empty_like(xs[0]), torch.empty_like(xs)
        want_h = torch.empty_like(xs, dtype=torch.float32)
        reference.forward(xs, 0.1, cut, kind, want_spike, want_v, None, want_h)
        (*_, want_sum) = reference.backward(
            want_spike, None, None, want_h, 0.1, xs, cut, kind, want_grad, None, (False,) * 5 + (True,)
        )
        assert torch.equal(spike[:, part], want_spike)
        assert torch.equal(v_last[part], want_v)
        assert torch.equal(h[:, part], want_h)
        assert torch.equal(grad_x[:, part], want_grad)
        total += want_sum.item()
    assert sum_gain.item() == pytest.approx(total, rel=1e-5)


def train_step(network, x, reset):
    """Output, and the gradient of every parameter and of x."""
    x = x.detach().requires_grad_()
    out = network(x)
    grads = torch.autograd.grad((out * out).sum(), (x, *network.parameters()))
    reset(network)
    return out.detach(), *grads


def assert_close_networks(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)


def test_spikingjelly_node(backend):
    pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
    from qif_plugins.adapters.spikingjelly import ParametricQIFNode, QIFNode
    from spikingjelly.activation_based import functional

    x = torch.randn(4, 3, 50)
    for make in (lambda name: QIFNode(step_mode="m", backend=name), lambda name: QIFNode(2.0, backend=name)):
        on_cpu, on_gpu = make("torch"), make(backend).to(DEVICE)
        functional.set_step_mode(on_cpu, "m")
        functional.set_step_mode(on_gpu, "m")
        assert_all_equal(
            train_step(on_gpu, x.to(DEVICE), functional.reset_net), train_step(on_cpu, x, functional.reset_net)
        )
    on_cpu, on_gpu = ParametricQIFNode(step_mode="m", backend="torch"), ParametricQIFNode(step_mode="m").to(DEVICE)
    on_gpu.backend = backend
    assert_close_networks(
        train_step(on_gpu, x.to(DEVICE), functional.reset_net), train_step(on_cpu, x, functional.reset_net)
    )


def test_set_backend(fused):
    """SpikingJelly 0.0.0.0.14's way to its CuPy kernels takes the neurons to ours."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional", reason="SpikingJelly is not installed")
    if not hasattr(functional, "set_backend"):
        pytest.skip("this SpikingJelly has no set_backend")
    from qif_plugins.adapters.spikingjelly import QIFNode

    x = torch.randn(4, 3, 50)
    on_cpu, on_gpu = (nn.Sequential(QIFNode(), QIFNode(2.0)) for _ in range(2))
    on_gpu.to(DEVICE)
    for network, name in ((on_cpu, "torch"), (on_gpu, fused)):
        functional.set_step_mode(network, "m")
        functional.set_backend(network, name, instance=QIFNode)
    assert [node.backend for node in on_gpu] == [fused, fused]
    assert_all_equal(
        train_step(on_gpu, x.to(DEVICE), functional.reset_net), train_step(on_cpu, x, functional.reset_net)
    )


@on_card("the CPU has nothing to wait for")
@pytest.mark.parametrize("host", MODELS)
def test_no_synchronisation_in_a_host(host):
    model, (x, *_) = MODELS[host]()
    model, x = model.cuda(), x.cuda()

    def step():
        for module in model.modules():
            if hasattr(module, "_memories"):
                module.reset()
        model(x).square().sum().backward()

    check_that_nothing_waits(step)


@pytest.mark.parametrize("host", MODELS)
def test_networks_of_a_host_learn(host):
    model, (x, *_) = MODELS[host]()
    model, x = model.to(DEVICE), x.to(DEVICE)
    wanted = torch.arange(x.shape[1], device=DEVICE) % 4
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        for module in model.modules():
            if hasattr(module, "_memories"):
                module.reset()
        loss = nn.functional.cross_entropy(4 * model(x).mean(0), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@host_independent
def test_snntorch_neuron():
    snntorch = pytest.importorskip("snntorch", reason="snnTorch is not installed")
    from qif_plugins.adapters.snntorch import QIF

    x = torch.randn(4, 3, 50)
    results = []
    for device in ("cpu", DEVICE):
        neuron = QIF(beta=0.9).to(device)
        current = x.to(device).requires_grad_()
        mem, spikes = neuron.reset_mem(), []
        for step in current:
            spike, mem = neuron(step, mem)
            spikes.append(spike)
        out = torch.stack(spikes)
        (grad,) = torch.autograd.grad(out.sum() + mem.sum(), current)
        results.append((out.detach(), mem.detach(), grad))
    assert snntorch.__version__
    assert_all_equal(*reversed(results))


@host_independent
@on_card("the GPU's clock is read")
def test_bench(tmp_path):
    out = tmp_path / "results.json"
    arguments = ["bench", "--device", "cuda", "--size", "4x4096", "--dtypes", "float32", "bfloat16"]
    assert main([*arguments, "--seconds", "0.1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["gpu"] == torch.cuda.get_device_name()
    assert results["machine"]["backend"] == available_backends("cuda")[0]
    for case in results["cases"]:
        for which in PASSES:
            times = case["peers"][OURS][which]
            assert times["seconds"] > 0
            assert times["device_seconds"] > 0
            assert 0 <= times["queued"] <= 1
        assert case["peers"][OURS]["peak_bytes"] > 0


@host_independent
@on_card("no name to find")
def test_doctor_names_the_gpu(capsys):
    assert main(["doctor"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
