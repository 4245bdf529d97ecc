"""PyTorch, Lightning and Accelerate around QIF networks of both hosts; docs/compatibility.md lists every test here."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from measured_models import MODELS
from torch import nn

from qif_plugins import calibrate

HOSTS = pytest.mark.parametrize("host", MODELS)


def reset(model):
    for module in model.modules():
        if hasattr(module, "_memories"):
            module.reset()


def loss_of(model, x):
    reset(model)
    y = model(x)
    return (y * torch.linspace(-1, 1, y.shape[-1])).sum()


def gradients(model, x):
    model.zero_grad()
    loss_of(model, x).backward()
    return [p.grad.clone() for p in model.parameters()]


class Head(nn.Module):
    """A stateless classifier around a network of a host: reset, run, average over time."""

    def __init__(self, host):
        super().__init__()
        self.inner = MODELS[host]()[0]
        self.out = nn.Linear(4, 2)

    def forward(self, x_seq):
        reset(self.inner)
        return self.out(self.inner(x_seq).mean(0))


def task(n=32):
    x = torch.randn(6, n, 12)
    return x, (x.mean((0, 2)) > 0).long()


@HOSTS
@pytest.mark.slow
def test_compile(host):
    model, (x, *_) = MODELS[host]()
    expected = model(x)
    reset(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    reset(model)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.reset()


class Stateless(nn.Module):
    """What exporters take: the state begins anew in forward."""

    def __init__(self, host):
        super().__init__()
        self.inner = MODELS[host]()[0].eval()
        if host == "spikingjelly":
            self.inner = self.inner[:-1]  # 0.0.0.0.14's LIFNode cannot be exported, 2.0.0's not to ONNX

    def forward(self, x_seq):
        reset(self.inner)
        return self.inner(x_seq)


@HOSTS
@pytest.mark.filterwarnings("ignore:The tensor attribute")  # the hosts' states are no buffers
def test_export(host):
    model, x = Stateless(host), torch.randn(6, 16, 12)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)


@HOSTS
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_onnx(host, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, x = Stateless(host), torch.randn(6, 16, 12)
    path = str(tmp_path / "model.onnx")
    sizes = {"dynamic_shapes": ({1: "batch"},)} if dynamo else {"dynamic_axes": {"x_seq": {1: "batch"}}}
    with torch.no_grad():
        torch.onnx.export(model, (x,), path, input_names=["x_seq"], dynamo=dynamo, verbose=False, **sizes)
        session = runtime.InferenceSession(path)
        for batch in (x, torch.randn(6, 3, 12)):
            expected = model(batch)
            (found,) = session.run(None, {"x_seq": batch.numpy()})
            assert expected.std() > 0
            torch.testing.assert_close(torch.from_numpy(found), expected)


@HOSTS
def test_amp(host):
    model, (x, *_) = MODELS[host]()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@HOSTS
def test_checkpointing(host):
    model, (x, *_) = MODELS[host]()
    expected = gradients(model, x)
    model.zero_grad()
    run = lambda inputs: loss_of(model, inputs)  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


@HOSTS
def test_averaging(host):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, (x, *_) = MODELS[host]()
    with torch.no_grad():
        model(x)  # snnTorch's membranes are buffers, which have their shape from the first batch
    averages = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        reset(average)
        assert average(x).shape == model(x).shape


@HOSTS
def test_functional_call(host):
    model, (x, *_) = MODELS[host]()
    parameters = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    halved = copy.deepcopy(model)
    halved.load_state_dict({**model.state_dict(), **parameters})
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), halved(x))


@HOSTS
def test_flop_counter_mode(host):
    from torch.utils.flop_counter import FlopCounterMode

    model, (x, *_) = MODELS[host]()
    with FlopCounterMode(display=False) as counter:
        loss_of(model, x).backward()
    # A product forward, one for the weights' gradient, one for the input's where it needs any; nothing elementwise.
    assert counter.get_total_flops() == 2 * 6 * 16 * (2 * 12 * 40 + 3 * 40 * 30 + 3 * 30 * 4)


def _distributed(rank, port, host, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = Head(host)
        x, y = task()
        parallel = nn.parallel.DistributedDataParallel(model)
        part = slice(16 * rank, 16 * rank + 16)
        nn.functional.cross_entropy(parallel(x[:, part]), y[part]).backward()
        calibrate(parallel, x[:, part])
        torch.save(([p.grad for p in model.parameters()], model.state_dict()), f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@HOSTS
@pytest.mark.slow
def test_ddp(host, tmp_path):
    """Two processes have the gradients, and the calibration, of one with the whole batch."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_distributed, (port, host, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = Head(host)
    x, y = task()
    nn.functional.cross_entropy(model(x), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(model, x)
    for rank in range(2):
        grads, state = torch.load(tmp_path / f"{rank}.pt")
        for grad, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value)


@HOSTS
@pytest.mark.slow
def test_lightning(host, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Head(host)
            self.losses = []

        def training_step(self, batch, _):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x.movedim(1, 0)), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=2e-2)

    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(module.net, task(64)[0])
        x, y = task(64)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.movedim(0, 1), y), batch_size=16)
        trainer = lightning.Trainer(
            max_epochs=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    fresh = Module()
    fresh.load_state_dict(state, strict=True)  # its windows come along
    assert [k for k in state if k.endswith("input_std")]


@HOSTS
@pytest.mark.slow
def test_accelerate(host, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    x, y = task(64)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.movedim(0, 1), y), batch_size=16)
    model = Head(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(model, x)
    model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=2e-2), data)
    losses = []
    for _ in range(8):
        for inputs, targets in data:
            loss = nn.functional.cross_entropy(model(inputs.movedim(1, 0)), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    accelerator.save_state(tmp_path, safe_serialization=True)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@HOSTS
def test_per_sample_gradients(host):
    model = Head(host)
    # The hosts' own surrogates refuse torch.func's transforms, so that the readout is QIF as well.
    if host == "spikingjelly":
        model.inner[-1] = copy.deepcopy(model.inner[3])
    else:
        model.inner.lif = copy.deepcopy(model.inner.qif2)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _, (x, *_) = MODELS[host]()

    def gradient():
        fresh = copy.deepcopy(
            model
        )  # snnTorch keeps the membranes of a transform that has ended, and cannot reset them

        def loss(weights, x):
            return torch.func.functional_call(fresh, weights, (x.unsqueeze(1),)).square().sum()

        return torch.func.grad(loss)

    together = torch.vmap(gradient(), (None, 1))(weights, x)
    one_by_one = [gradient()(weights, sample) for sample in x.unbind(1)]
    for name, found in together.items():
        torch.testing.assert_close(found, torch.stack([each[name] for each in one_by_one]), rtol=1e-4, atol=1e-5)


@HOSTS
def test_second_derivatives(host):
    model = Head(host)
    _, (x, *_) = MODELS[host]()
    weight = next(model.parameters())
    (first,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
    by_loop = torch.stack([torch.autograd.grad(g, weight, retain_graph=True)[0] for g in first.flatten()[:4]])
    (batched,) = torch.autograd.grad(first.flatten()[:4], weight, torch.eye(4), is_grads_batched=True)
    assert bool(by_loop.any())
    torch.testing.assert_close(batched, by_loop)
