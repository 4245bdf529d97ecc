"""The registered operator: what PyTorch's own machinery does with it."""

import copy
import socket

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from qif_plugins.neuron.functional import qif_multi_step, qif_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import ATan, FastSigmoid, Gaussian, Sigmoid, Window
from qif_plugins.ops.backends import available_backends
from qif_plugins.ops.library import multi_step

pytestmark = pytest.mark.host_independent

PARAMS = QIFParameters()
WINDOW = Window.unbiased(PARAMS)
BACKENDS = available_backends("cpu")


class Net(nn.Module):
    """A layer, a neuron with learnable numbers, a second layer."""

    def __init__(self, backend="auto"):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.a = nn.Parameter(torch.full((5,), 0.25))
        self.backend = backend

    def forward(self, x):
        params = QIFParameters.unchecked(a=self.a)
        spikes, v = qif_multi_step(self.first(x), 0.0, params, WINDOW, backend=self.backend)
        return self.second(spikes), v


def gradients(function, *inputs):
    """The outputs' values and the gradients of their weighted sum, for comparison to the last bit."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs)
    return [*[output.detach() for output in outputs], *torch.autograd.grad(total, leaves)]


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def operands(x, v=None, tensors=(None,) * 9, save_h=True, soft=False, store_v_seq=False, backend="numba"):
    numbers = [0.25, 0.0, 0.5, 1.0, 0.0, 1.0, 0.5, 1.5, 0.8, 0.1]
    v_dtype = x.dtype if v is None else torch.promote_types(x.dtype, v.dtype)
    return (x, v, *tensors, numbers, v_dtype, soft, False, False, 0, False, True, store_v_seq, save_h, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        "plain",
        "bfloat16",
        "channels_last",
        "batch first",
        "slice",
        "expanded",
        "membrane",
        "numbers",
        "no gradient",
        "empty",
    ],
)
def test_opcheck(backend, case):
    x = torch.randn(3, 2, 4, 3, 5).requires_grad_(case != "no gradient")
    options = {}
    if case == "bfloat16":
        x = x.detach().bfloat16().requires_grad_()
        options["v"] = torch.randn(2, 4, 3, 5, requires_grad=True)
    elif case == "channels_last":
        x = x.detach()[:, :, :, :, :4].permute(0, 1, 4, 2, 3).requires_grad_()
        options["tensors"] = (torch.rand(4, 1, 1, requires_grad=True), *[None] * 8)
    elif case == "batch first":
        x = x.detach().transpose(0, 1).requires_grad_()
        options.update(v=torch.randn(4, 3, 3, 5).transpose(0, 1).requires_grad_(), store_v_seq=True)
    elif case == "slice":
        x = x.detach()[:, :, ::2].requires_grad_()
    elif case == "expanded":
        x = x.detach()[:, :1].expand(3, 2, 4, 3, 5).requires_grad_()
    elif case == "membrane":
        options.update(v=torch.randn(2, 4, 3, 5, requires_grad=True), store_v_seq=True)
    elif case == "numbers":
        numbers = [torch.rand(4, 1, 1, requires_grad=True), torch.rand(5, requires_grad=True), torch.rand(())]
        numbers += [torch.rand(2, 4, 3, 5, requires_grad=True), torch.rand(1, requires_grad=True)]
        options.update(tensors=(*numbers, torch.rand(4, 1, 1, requires_grad=True), None, None, None), soft=True)
    elif case == "no gradient":
        options["save_h"] = False
    elif case == "empty":
        x = torch.randn(3, 0, 4, requires_grad=True)
        options["tensors"] = (torch.rand(4, requires_grad=True), *[None] * 8)
    torch.library.opcheck(multi_step, operands(x, backend=backend, **options))


def test_opcheck_of_float64():
    torch.library.opcheck(multi_step, operands(torch.randn(3, 4).double().requires_grad_(), backend="torch"))


# One lane at a time: finding out what the CPU's vector units can do takes Inductor longer than all the rest.
@pytest.mark.parametrize(
    "options", [{"backend": "aot_eager"}, {"options": {"cpp.simdlen": 1}}], ids=["aot", "inductor"]
)
def test_compile_without_graph_breaks(options):
    def sequence(x, v, a):
        spikes, v = qif_multi_step(x * 1.5, v, QIFParameters.unchecked(a=a), WINDOW)
        return spikes * 2, v

    inputs = torch.randn(4, 3, 5), torch.randn(3, 5), torch.rand(5) / 4
    compiled = torch.compile(sequence, fullgraph=True, **options)
    assert_same(gradients(compiled, *inputs), gradients(sequence, *inputs))


def compiled_with_graphs(function):
    """``function`` compiled, and a list of the operators in its graphs, which grows as they are compiled."""
    operators = []

    def keep(graph, inputs):
        operators.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), operators


@pytest.mark.parametrize(
    ("options", "surrogate", "dtype"),
    [
        ({}, WINDOW, torch.float32),
        ({"store_v_seq": True}, Gaussian.isometric(PARAMS), torch.float32),
        ({"pre_reset": True, "store_h_seq": True}, ATan(strict=True), torch.float32),
        ({"pre_reset": True, "detach_reset": True}, Sigmoid(), torch.bfloat16),
        ({"soft": True, "pre_reset": True}, FastSigmoid(), torch.float32),
        ({"rebound": False}, Gaussian.isometric(PARAMS), torch.bfloat16),
    ],
)
def test_compiled_equations_have_the_bits_of_the_kernels(options, surrogate, dtype):
    """A graph whose numbers are no tensors holds PyTorch's operators in place of ours."""
    options = dict(options)
    reset, rebound = "soft" if options.pop("soft", False) else "hard", options.pop("rebound", True)
    params = QIFParameters.matching_lif(0.5, reset=reset, rebound=rebound, input_gain=0.5)

    def sequence(x, v):
        return qif_multi_step(x, v, params, surrogate, **options)

    compiled, operators = compiled_with_graphs(sequence)
    inputs = 4 * torch.randn(3, 4, 5).to(dtype).transpose(1, 2), torch.randn(4, 5).T
    for got, wanted in zip(gradients(compiled, *inputs), gradients(sequence, *inputs), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert got.stride() == wanted.stride()
    assert operators
    assert not [operator for operator in operators if "qif" in str(operator)]


def test_compiled_calls_of_many_time_steps_keep_the_operator():
    compiled, operators = compiled_with_graphs(lambda x: qif_multi_step(x, 0.0, PARAMS, WINDOW))
    x = torch.randn(40, 5)
    assert_same(compiled(x), qif_multi_step(x, 0.0, PARAMS, WINDOW))
    assert multi_step in operators


def test_compiled_equations_in_inductor():
    def sequence(x):
        return qif_multi_step(x, 0.1, PARAMS, ATan())

    x = 3 * torch.randn(2, 3, 32)
    compiled = torch.compile(sequence, fullgraph=True, options={"cpp.simdlen": 1})
    assert_same(gradients(compiled, x), gradients(sequence, x))


def test_compile_steps():
    def loop(x):
        v = 0.1
        spikes = []
        for current in x:
            spike, v = qif_step(current, v, PARAMS, ATan())
            spikes.append(spike)
        return torch.stack(spikes), v

    x = torch.randn(3, 4, 5)
    assert_same(gradients(torch.compile(loop, fullgraph=True, backend="aot_eager"), x), gradients(loop, x))


def test_compile_with_dynamic_shapes():
    def sequence(x):
        return qif_multi_step(x, 0.0, PARAMS, WINDOW)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sequence, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(4, 3, 5, requires_grad=True))
    first = counter.frame_count
    for shape in ((6, 7, 9), (2, 8, 4)):
        x = torch.randn(shape)
        assert_same(gradients(compiled, x), gradients(sequence, x))
    assert counter.frame_count == first


def test_compile_without_gradient():
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        compiled = torch.compile(lambda x: qif_multi_step(x, 0.0, PARAMS, WINDOW), fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), qif_multi_step(x, 0.0, PARAMS, WINDOW))


def test_functional_gradient():
    net = Net()
    x = torch.randn(4, 2, 6)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        out, v = torch.func.functional_call(net, parameters, (x,))
        return (out**2).sum() + v.sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()}, x)
    wanted = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    assert_same(list(got.values()), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    def sequence(x):
        return qif_multi_step(x * 1.5, 0.0, PARAMS, WINDOW)[0]

    x, y = (torch.linspace(-1, 3, 60).view(4, 3, 5).requires_grad_() for _ in range(2))
    checkpoint(sequence, x, use_reentrant=reentrant).mul(x.detach()).sum().backward()
    sequence(y).mul(y.detach()).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_autocast():
    net, x = Net(), torch.randn(4, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        current = net.first(x)
        spikes, v = qif_multi_step(current, 0.0, PARAMS, WINDOW)
        assert current.dtype == spikes.dtype == v.dtype == torch.bfloat16
        net(x)[0].sum().backward()
    assert net.a.grad.dtype == net.first.weight.grad.dtype == torch.float32


def test_export():
    net, x = Net(), torch.randn(4, 2, 6)
    exported = torch.export.export(net, (x,))
    assert [node.target for node in exported.graph.nodes].count(multi_step) == 1
    assert_same(exported.module()(x), net(x))


def test_copies_of_a_used_module_give_the_same():
    net, x = Net(), torch.randn(4, 2, 6)
    net(x)[0].sum().backward()
    assert_same(copy.deepcopy(net)(x), net(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
def test_forward_mode_is_refused():
    x = torch.randn(4, 5)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward mode"):
        torch.func.jvp(lambda x: qif_multi_step(x, 0.0, PARAMS, WINDOW)[1], (x,), (torch.ones_like(x),))


def test_vmap_gives_what_a_loop_gives():
    x = torch.randn(3, 4, 5)

    def one(x):
        return qif_multi_step(x, 0.0, PARAMS, WINDOW)

    got = torch.vmap(one)(x)
    assert_same(got, [torch.stack(parts) for parts in zip(*map(one, x), strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward(backend, dtype):
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    v = torch.randn(3, 5, dtype=dtype)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            qif_multi_step(x, v, PARAMS, WINDOW, backend=backend)
        assert saved == []
        spikes, _ = qif_multi_step(x, v, PARAMS, WINDOW, backend=backend)
    assert [(tensor.dtype, tensor.shape) for tensor in saved] == [(torch.float32, x.shape)]
    spikes.float().sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_knows_the_layouts(dynamic):
    """What follows is compiled for strides that the fake kernels say; a batch-first input, in and out."""

    def sequence(x):
        spikes, v_seq = qif_multi_step(x.transpose(0, 1), 0.0, PARAMS, WINDOW, store_v_seq=True)
        return spikes.transpose(0, 1).view(x.shape[0], -1), v_seq.transpose(0, 1).view(x.shape[0], -1)

    compiled = torch.compile(sequence, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 4, 5), (6, 2, 7)):
        x = torch.randn(shape)
        assert_same(gradients(compiled, x), gradients(sequence, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_goes_through_uncopied(backend):
    x = torch.randn(4, 2, 8, 5, 6).transpose(2, 4).contiguous().transpose(2, 4).requires_grad_()
    strides = x.stride()
    assert not x.is_contiguous()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        spikes, v_seq = qif_multi_step(x, 0.0, PARAMS, WINDOW, store_v_seq=True, backend=backend)
    assert spikes.stride() == v_seq.stride() == strides
    if backend != "torch":
        assert not [event for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
    plain = x.detach().contiguous().requires_grad_()
    expected = qif_multi_step(plain, 0.0, PARAMS, WINDOW, store_v_seq=True, backend=backend)
    assert_same((spikes, v_seq), expected)


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_train_distributed, (port, str(tmp_path)), nprocs=2)
    mean = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same(mean[0], mean[1])
    net = Net()
    torch.manual_seed(0)
    batches = torch.randn(2, 4, 2, 6)
    (sum(net(x)[0].pow(2).mean() for x in batches) / 2).backward()
    for got, parameter in zip(mean[0], net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


def _train_distributed(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(Net())
    torch.manual_seed(0)
    net(torch.randn(2, 4, 2, 6)[rank])[0].pow(2).mean().backward()
    torch.save([parameter.grad for parameter in net.module.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
