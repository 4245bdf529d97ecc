"""SpikingJelly's own features with QIFNode in LIFNode's place; docs/compatibility.md lists every test here."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")
from qif_plugins.adapters.spikingjelly import AnalyticWindow, ParametricQIFNode, QIFNode
from spikingjelly.activation_based import base, functional, layer, monitor, neuron, surrogate

from qif_plugins.neuron.norm import TDBatchNorm2d
from qif_plugins.neuron.surrogate import ATan, FastSigmoid, Gaussian, Sigmoid, Window

OLD = not hasattr(base.MemoryModule, "single_step_functional_forward")
only_new = pytest.mark.skipif(OLD, reason="SpikingJelly 0.0.0.0.14 does not have this")
only_old = pytest.mark.skipif(not OLD, reason="SpikingJelly 2 does not have this")
T, N = 4, 3


def network(spiking_neuron=QIFNode, norm=None, **options):
    """conv - norm - neuron - linear - neuron over ``[T, N, 1, 6, 6]``."""
    model = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False), norm or layer.BatchNorm2d(4), spiking_neuron(**options),
        layer.Flatten(), layer.Linear(4 * 36, 5), spiking_neuron(**options),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    with torch.no_grad():
        model[4].weight.mul_(4)
    return model


@pytest.fixture
def x():
    return torch.randn(T, N, 1, 6, 6)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)


# -- both versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("detach_reset", [False, True])
def test_step_modes(x, detach_reset):
    model = network(detach_reset=detach_reset).eval()
    many = model(x)
    expected = gradients(model, many.square().sum() + many.sum())
    functional.reset_net(model)
    functional.set_step_mode(model, "s")
    one = torch.stack([model(step) for step in x])
    assert torch.equal(one, many)
    assert_same(gradients(model, one.square().sum() + one.sum()), expected)


def test_reset_and_detach(x):
    model = network()
    first = model(x)
    model(x).sum().backward()
    functional.reset_net(model)
    assert torch.equal(model.train()(x), first)
    functional.detach_net(model)
    assert all(not m.v.requires_grad for m in model if isinstance(m, QIFNode))
    model(x).sum().backward()  # would fail through the freed graph


def test_state_dict_of_a_lif_network():
    qif, lif = network(), network(neuron.LIFNode)
    lif.load_state_dict(qif.state_dict(), strict=True)
    qif.load_state_dict(lif.state_dict(), strict=True)
    assert list(qif.state_dict()) == list(lif.state_dict())


def test_copies(x):
    model = network()
    model(x).sum()  # with a membrane and a graph behind it
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        functional.reset_net(clone)
        functional.reset_net(model)
        assert torch.equal(clone(x), model(x))


def test_monitors(x):
    model = network(store_v_seq=True)
    kinds = {
        "output": monitor.OutputMonitor(model, QIFNode),
        "input": monitor.InputMonitor(model, QIFNode),
        "v_seq": monitor.AttributeMonitor("v_seq", False, model, QIFNode),
        "grad_input": monitor.GradInputMonitor(model, QIFNode),
        "grad_output": monitor.GradOutputMonitor(model, QIFNode),
    }
    y = model(x)
    y.sum().backward()
    for name, one in kinds.items():
        assert len(one.records) == 2, name
        shapes = {tuple(record.shape) for record in one.records}
        assert shapes == {(T, N, 4, 6, 6), (T, N, 5)}, name
    assert torch.equal(kinds["output"]["5"][0], y)


def test_containers(x):
    inside = layer.SeqToANNContainer(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    stepped = layer.MultiStepContainer(QIFNode(step_mode="s"))
    together = QIFNode(step_mode="m")
    current = inside(x)
    assert torch.equal(stepped(current), together(current))
    recurrent = layer.LinearRecurrentContainer(QIFNode(), 5, 5, step_mode="m")
    elementwise = layer.ElementWiseRecurrentContainer(QIFNode(), lambda a, b: a + b, step_mode="m")
    for container in (recurrent, elementwise):
        out = container(torch.randn(T, N, 5, requires_grad=True))
        assert out.shape == (T, N, 5)
        out.sum().backward()


def test_surrogates_of_the_host(x):
    for host_surrogate in (surrogate.ATan(), surrogate.Sigmoid(), AnalyticWindow(-0.5, 0.5)):
        for node in (neuron.LIFNode, QIFNode):
            model = network(node, surrogate_function=host_surrogate)
            model(x).sum().backward()
            assert model[0].weight.grad.abs().sum() > 0
            assert model[2].surrogate_function is host_surrogate


def test_autocast(x):
    model = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert set(y.unique().tolist()) <= {0.0, 1.0}
    y.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_half_precision(x):
    model = network().half()
    y = model(x.half())
    assert y.dtype == torch.float16
    assert set(y.unique().tolist()) <= {0.0, 1.0}


def test_threshold_margin(x):
    """``functional.set_threshold_margin`` gives every output neuron a threshold of its own while training."""
    model = network()
    labels = nn.functional.one_hot(torch.arange(N), 5).float()
    functional.set_threshold_margin(model[5], labels, threshold0=0.4, threshold1=0.8)
    current = model[4](model[3](model[2](model[1](model[0](x)))))
    spikes = model[5](current)
    assert torch.equal(spikes[0], (current[0] >= torch.where(labels == 1, 0.8, 0.4)).float())
    spikes.sum().backward()
    functional.set_threshold_margin(model[5].eval(), labels, eval_threshold=1.0)
    assert model[5].v_threshold == 1.0


@pytest.mark.parametrize("kind", ["ours", "host"])
def test_folding_tdbn(x, kind):
    """``torch.nn.utils.fusion.fuse_conv_bn_eval`` takes tdBN, the host's and ours."""
    if kind == "host" and OLD:
        pytest.skip("that of 0.0.0.0.14 cannot be called; its forward raises NotImplementedError")
    norm = TDBatchNorm2d(4, 1.0, 1.0) if kind == "ours" else layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 4)
    model = network(norm=norm)
    for _ in range(5):
        model(x)
        functional.reset_net(model)
    model.eval()
    before = model[1](model[0](x))
    folded = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded(x), before)


def test_learned_parameters(x):
    model = network(ParametricQIFNode)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        functional.reset_net(model)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert model[2].raw_a.grad is not None


# -- SpikingJelly 2 ------------------------------------------------------------------------------


@only_new
def test_functional_forms(x):
    model = network().eval()
    expected = model(x)
    states = tuple(base.extract_memories(model))
    functional.reset_net(model)
    forward = base.to_functional_forward(model)
    outputs, after = forward((x,), tuple(base.extract_memories(model)))
    assert torch.equal(outputs[0], expected)
    for mine, theirs in zip(after, states, strict=True):
        assert torch.equal(mine, theirs)
    assert all(isinstance(m, float) for m in base.extract_memories(model))  # explicit states leave the module's alone


@only_new
def test_memopt(x):
    from spikingjelly.activation_based import memopt

    model = network()
    lighter = memopt.optimize_memory(copy.deepcopy(model), (QIFNode, layer.Conv2d), lambda net: net(x), level=1)
    for net in (model, lighter):
        functional.reset_net(net)
    assert any("Checkpoint" in type(m).__name__ for m in lighter.modules())
    a, b = model(x), lighter(x)
    assert torch.equal(a, b)
    assert_same(gradients(lighter, b.sum()), gradients(model, a.sum()))


@only_new
def test_precision_conversion(x):
    from spikingjelly.activation_based import precision

    model = network()
    prepared = precision.prepare_model_for_precision(model, "cpu", "bf16")
    with prepared.autocast_context():
        y = prepared.model(x)
    assert y.dtype == torch.bfloat16
    prepared.backward(y.float().sum(), torch.optim.SGD(model.parameters(), 0.1))
    # Storage formats are the host's own kernels'; it names the neurons that have them.
    with pytest.raises(RuntimeError, match="IF/LIF/PLIF"):
        precision.prepare_model_for_precision(network(), "cpu", {"neuron_storage": "bf16"})


def counted(counters, run, strict=False):
    """``counters`` after ``run()``."""
    from spikingjelly.activation_based import op_counter

    with op_counter.DispatchCounterMode(counters, strict=strict):
        run()
    return counters


def written_out(v_reset, dynamics="lif"):
    """The default QIF neuron as a node of the host's own, in PyTorch's operators."""
    from spikingjelly.activation_based.functional.neuron import voltage_reset

    class WrittenOut(neuron.BaseNode):
        def single_step_functional_forward(self, inputs, states, **_):
            v = states[0]
            m = v if dynamics == "lif" else torch.where(v < 0.0, 0.0, v)
            h = (0.25 * (v - 0.0)) * (m - 0.5) + 1.0 * inputs[0]
            spike = self.surrogate_function(h - self.v_threshold)
            v = voltage_reset(h, spike, self.v_threshold, self.v_reset, self.detach_reset)
            if dynamics == "monotone" and self.v_reset is None:
                v = torch.where(v > self.v_threshold, self.v_threshold, v)
            return (spike,), (v,)

    return WrittenOut(v_reset=v_reset)


@only_new
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize(("dynamics", "qif_map"), [("lif", "parabola"), ("monotone", "monotone")])
def test_op_counter(x, dynamics, qif_map, v_reset, step_mode):
    """A QIF neuron costs what it would as one of the host's nodes, and more than LIF by what ``qif energy`` says."""
    from spikingjelly.activation_based import op_counter

    from qif_plugins.diagnostics.energy.costs import Costs

    def count(node):
        counters = [
            op_counter.FlopCounter(),
            op_counter.ACCounter(),
            op_counter.MACCounter(),
            op_counter.SynOpCounter(),
        ]
        node.step_mode = step_mode
        counted(counters, lambda: node(x) if step_mode == "m" else [node(step) for step in x])
        return [counter.get_total() for counter in counters]

    ours = count(QIFNode(v_reset=v_reset, dynamics=dynamics))
    assert ours == count(written_out(v_reset, dynamics))
    lif = count(neuron.LIFNode(v_reset=v_reset))
    hold = (
        dynamics == "monotone" and v_reset is None
    )  # of use after a spike alone, so that ``qif energy`` leaves it out
    assert ours[0] - lif[0] == (Costs(mult=1, add=1, qif_map=qif_map).qif_extra + hold) * x.numel()
    assert ours[1:] == lif[1:]


@only_new
def test_op_counter_with_a_rule_of_ones_own(x):
    from spikingjelly.activation_based import op_counter

    rules = {torch.ops.qif.multi_step.default: lambda args, kwargs, out: 7 * args[0].numel()}
    node = QIFNode(step_mode="m")
    [counter] = counted([op_counter.FlopCounter(extra_rules=rules)], lambda: node(x))
    assert counter.get_total() == 7 * x.numel()


@only_new
@pytest.mark.parametrize("watched_forward", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rebound", [True, False])
@pytest.mark.parametrize(("reset", "detach_reset"), [("hard", False), ("hard", True), ("soft", False), ("soft", True)])
@pytest.mark.parametrize(
    "shape", [Window(0.5, 1.5), ATan(), Sigmoid(), FastSigmoid(), Gaussian(0.5, 0.4)], ids=lambda s: type(s).__name__
)
def test_op_counter_backward(shape, reset, detach_reset, rebound, learned, watched_forward):
    """The backward pass costs what the reference's does, which PyTorch's operators write out."""
    from spikingjelly.activation_based import op_counter

    from qif_plugins import QIFParameters, qif_multi_step
    from qif_plugins.ops import torch_backend
    from qif_plugins.ops.contract import Coefficient, Coefficients, Kind

    steps, neurons = 3, 500
    x = torch.rand(steps, neurons, dtype=torch.float64)
    numbers = {"a": 0.25, "u1": 0.0, "u2": -2.0, "v_threshold": 1.0, "v_reset": 0.0, "input_gain": 1.0}
    if learned:
        numbers = {name: torch.full((neurons,), value, requires_grad=True) for name, value in numbers.items()}
    params = QIFParameters(**numbers, reset=reset, rebound=rebound)
    call = x.clone().requires_grad_(), 0.1, params, shape, detach_reset

    def forward():
        spikes, v = qif_multi_step(*call)
        return spikes.sum() + v.sum()

    if watched_forward:
        [counter] = counted([op_counter.FlopCounter()], lambda: forward().backward())
    else:
        [counter] = counted([op_counter.FlopCounter()], forward().backward)
    counts = counter.get_counts()["Global"]
    assert (torch.ops.qif.multi_step.default in counts) == watched_forward

    c = Coefficients(*(Coefficient(getattr(n, "data", n)) for n in (*numbers.values(), *shape.coefficients())))
    kind = Kind(reset == "soft", detach_reset, False, shape.shape, False, rebound)
    needs = (learned, learned, learned, learned, learned and reset == "hard", learned)
    gradients = torch.ones_like(x), torch.ones_like(x[0]), None
    [expected] = counted(
        [op_counter.FlopCounter()],
        lambda: torch_backend.backward(*gradients, x, 0.1, x, c, kind, torch.empty_like(x), None, needs),
    )
    there = expected.get_total() / x.numel()
    if learned:
        # The reference resets the membrane again for the gradients of a, u1 and u2, in all steps but the first. It
        # computes f(v_reset), and the slope there at every step, of each neuron, all of which have their own numbers
        # here. And so it adds nothing up over the neurons.
        bend = 0 if rebound else 1
        again = 1 + kind.soft * (1 if rebound else 2)
        there -= again * (steps - 1) / steps + (4 + bend) / steps + (0 if kind.soft else 4 + bend)
        there += sum(needs) / steps
    # Besides there are a few operations on single numbers.
    assert counts[torch.ops.qif.multi_step_backward.default] / x.numel() == pytest.approx(there, abs=0.05)


@only_new
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strict_counters(x, step_mode, dtype):
    from spikingjelly.activation_based import op_counter

    model = network(tau=2.0).to(dtype)
    functional.set_step_mode(model, step_mode)

    def run():
        outputs = [model(step) for step in x.to(dtype)] if step_mode == "s" else [model(x.to(dtype))]
        outputs[-1].sum().backward()

    for kind in (op_counter.FlopCounter, op_counter.MemoryAccessCounter):
        functional.reset_net(model)
        [counter] = counted([kind()], run, strict=True)
        assert all(counter.get_counts()["Global"][op] > 0 for op in counter.rules if "qif" in str(op))


@only_new
def test_memory_access_counter(x):
    """As of the host's fused operators: every tensor that goes in or comes out, once."""
    from spikingjelly.activation_based import op_counter

    node = QIFNode(step_mode="m")
    node(x)
    with torch.no_grad():
        [counter] = counted([op_counter.MemoryAccessCounter()], lambda: node(x))
    operator = torch.ops.qif.multi_step.default
    assert counter.get_counts()["Global"][operator] == 4 * (2 * x.numel() + 2 * x[0].numel())


@only_new
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("dynamics", ["lif", "monotone"])
def test_neuron_state_counter(x, dynamics, v_reset, step_mode):
    from spikingjelly.activation_based import op_counter

    def count(node):
        node.step_mode = step_mode
        run = (lambda: node(x)) if step_mode == "m" else (lambda: [node(step) for step in x])
        [counter] = counted([op_counter.NeuronStateCounter(strict=True)], run)
        return counter.get_metric_counts()[type(node).__name__]

    ours, theirs = count(QIFNode(v_reset=v_reset, dynamics=dynamics)), count(written_out(v_reset, dynamics))
    if dynamics == "monotone":  # The host takes every selection that it sees written out for one by a spike.
        selections = 1 if v_reset == 0 else 2
        for name, change in (("state_reset_ops", -1), ("spike_triggered_ops", -1), ("timestep_dense_ops", 1)):
            theirs[name] += change * selections * x.numel()
    # In bytes each step of a fused neuron reads and writes its state once, as the host counts its own.
    moved = {"state_reads": 4 * x.numel(), "state_writes": 4 * x.numel(), "neuron_logical_steps": x.numel()}
    assert ours == theirs | moved


@only_new
@pytest.mark.parametrize("dynamics", ["lif", "monotone"])
def test_neuromc(x, dynamics):
    """The estimator's update of a neuron plus what ``qif energy`` says that QIF adds; backward, its slope."""
    from spikingjelly.activation_based import op_counter

    from qif_plugins.diagnostics.energy.costs import Costs

    def estimate(make):
        torch.manual_seed(0)
        node = make(detach_reset=True)
        model = nn.Sequential(layer.Conv2d(1, 4, 3, bias=False), node, layer.Flatten(), layer.Linear(64, 5))
        functional.set_step_mode(model, "m")
        arguments = {"target": torch.zeros(T, N, 5), "loss_fn": nn.functional.mse_loss}
        return op_counter.estimate_neuromc_runtime_energy(model, (x > 0.5).float().requires_grad_(), **arguments)

    # It has one cost for every neuron of the host's, of which it cannot take LIF backward.
    ours, theirs = estimate(partial(QIFNode, dynamics=dynamics)), estimate(neuron.IFNode)
    assert ours.warnings == []
    comparison = 0.056 if dynamics == "monotone" else 0.0
    extra = (Costs(mult=0.812, add=0.548).qif_extra + comparison) * T * N * 64  # its own prices
    for stage in ("soma.forward", "soma.backward"):
        assert ours.energy_by_op[stage] - theirs.energy_by_op[stage] == pytest.approx(extra)


@only_new
def test_energy_estimate(x):
    from spikingjelly.activation_based import op_counter

    report = op_counter.estimate_simple_energy(network(), x)
    reference = op_counter.estimate_simple_energy(network(neuron.LIFNode), x)
    assert report.counts["mac"] == reference.counts["mac"]
    # The host counts an addition as an AC and a product of two numbers as nothing.
    assert report.counts["ac"] - report.counts["synop"] == reference.counts["ac"] - reference.counts["synop"]
    states = "neuron_state_memory_pj"
    assert report.breakdown_pj[states] == reference.breakdown_pj[states] > 0


@only_new
@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated")  # found among all objects
def test_profiler(x):
    from spikingjelly.activation_based import profiler

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with profiler.CategoryMemoryProfiler((model,), (optimizer,)) as profile:
        model(x).sum().backward()
        profile.export(output=False)
    assert all(not m._forward_hooks for m in model)


@only_new
def test_fusing_conv_and_batch_norm(x):
    """``fuse_conv_bn_eval_modules`` and ``pack_conv_bn_train_modules``; they leave tdBN as it is."""
    from spikingjelly.activation_based.functional.conv_bn_fusion import (
        fuse_conv_bn_eval_modules,
        pack_conv_bn_train_modules,
    )

    for norm, folded in ((layer.BatchNorm2d(4), True), (layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 4), False)):
        model = network(norm=norm)
        packed = pack_conv_bn_train_modules(copy.deepcopy(model))
        assert torch.equal(packed(x), model(x))
        functional.reset_net(model)
        model.eval()
        fused = fuse_conv_bn_eval_modules(copy.deepcopy(model))
        assert folded == (not any(isinstance(m, type(norm)) for m in fused.modules()))
        assert torch.equal(fused(x), model(x))


@only_new
def test_distributed_vision():
    """A vision config that names QIFNode builds, and survives its serialisation; training itself needs CUDA."""
    import qif_plugins

    qif_plugins.register("spikingjelly")
    try:
        from spikingjelly.activation_based.distributed.vision.config import NeuronConfig
        from spikingjelly.activation_based.model.spikformer import SpikformerConfig

        config = SpikformerConfig(
            time_steps=2, num_classes=3,
            neuron_config=NeuronConfig("qif_plugins.adapters.spikingjelly.QIFNode", {"detach_reset": True}),
        )  # fmt: skip
        config = type(config).from_dict(config.as_dict())
        model = config.get_builder_cls()(config)._build_canonical_model()
    finally:
        qif_plugins.unregister()
    nodes = [m for m in model.modules() if isinstance(m, neuron.BaseNode)]
    assert nodes
    assert all(type(m) is QIFNode and m.detach_reset for m in nodes)


@only_new
def test_nir_export_is_refused():
    pytest.importorskip("nir")
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    model = nn.Sequential(layer.Linear(3, 4), QIFNode())
    with pytest.raises(NotImplementedError, match=r"NIR has no quadratic.*swap\(model, to='lif'\)"):
        export_to_nir(model, torch.randn(2, 3))


# -- SpikingJelly 0.0.0.0.14 ---------------------------------------------------------------------


@only_old
def test_set_backend(x):
    model = network()
    expected = model(x)
    for name in ("numba", "torch"):
        functional.set_backend(model, name, instance=QIFNode)
        functional.reset_net(model)
        assert model[2].backend == name
        assert torch.equal(model(x), expected)
    assert "cupy" in QIFNode().supported_backends


@only_old
def test_clock_driven():
    from qif_plugins.adapters.spikingjelly import MultiStepQIFNode
    from spikingjelly.clock_driven import functional as clock_functional
    from spikingjelly.clock_driven import layer as clock_layer

    model = nn.Sequential(clock_layer.SeqToANNContainer(nn.Linear(6, 5)), MultiStepQIFNode(detach_reset=True))
    x = torch.randn(T, N, 6)
    y = model(x)
    y.sum().backward()
    assert model[1].v_seq.shape == (T, N, 5)
    clock_functional.reset_net(model)
    assert torch.equal(model(x), y)
