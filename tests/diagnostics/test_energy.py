"""Operations counted one by one, energies that follow from them, and `qif energy`."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from measured_models import MODELS
from torch import nn

from qif_plugins.cli import main
from qif_plugins.diagnostics.energy.costs import LIF_UPDATES, MEMORIES, Costs, Energy, memory_traffic
from qif_plugins.diagnostics.energy.counting import count_operations
from qif_plugins.diagnostics.energy.rates import StepCount, count_at_rate

independent = pytest.mark.host_independent


def neuron(kind="IFNode", **options):
    return getattr(pytest.importorskip("spikingjelly.activation_based.neuron"), kind)(step_mode="m", **options)


def enumerated(layer, x, dims):
    """SynOps and connections: every input alone through the layer with weights of 1, its effects added up."""
    ones = type(layer)(*(getattr(layer, name) for name in SIZES[type(layer)]), bias=False, **geometry(layer)).double()
    nn.init.ones_(ones.weight)
    samples = x.reshape(-1, *x.shape[x.dim() - dims :]).double()
    each = torch.eye(samples[0].numel(), dtype=torch.float64).view(-1, *samples.shape[1:])
    fan_out = ones(each).flatten(1).sum(1).view(samples.shape[1:])
    return int((samples * fan_out).sum()), int(fan_out.sum()) * len(samples)


SIZES = {
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d),
        ("in_channels", "out_channels", "kernel_size"),
    ),
}


def geometry(layer):
    names = ("stride", "padding", "dilation", "groups") if hasattr(layer, "groups") else ()
    return {name: getattr(layer, name) for name in names}


@independent
@settings(max_examples=25)
@given(
    kind=st.sampled_from([k for k in SIZES if k is not nn.Linear]),
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    size=st.tuples(*[st.integers(3, 4)] * 3),
    groups=st.sampled_from([1, 2]),
    rate=st.floats(0, 1),
)
def test_synops_of_convolutions_are_those_of_every_spike(kind, kernel, stride, padding, dilation, size, groups, rate):
    dims = int(kind.__name__[-2])
    kernel, stride, padding, dilation, size = (v[:dims] for v in (kernel, stride, padding, dilation, size))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)))
    layer = kind(2, 4, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    transposed = "Transpose" in kind.__name__
    assume(not transposed or all((n - 1) * s - 2 * p + d * (k - 1) + 1 > 0 for n, s, p, d, k in
                                 zip(size, stride, padding, dilation, kernel, strict=True)))  # fmt: skip
    x = (torch.rand(3, 2, *size) < rate).float()
    counts = count_operations(nn.Sequential(layer, neuron()), x)
    assert (counts.synops, counts.connections) == enumerated(layer, x, dims + 1)
    assert counts.macs == 0
    assert counts.neuron_steps == layer(x).numel()
    if not any(padding) or not transposed:
        assert counts.padded >= counts.connections


@independent
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_padding_by_name_and_around_the_border(padding, mode):
    layer = nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=mode)
    x = (torch.rand(2, 2, 5, 6) < 0.4).float()
    counts = count_operations(nn.Sequential(layer, neuron()), x)
    if mode == "zeros" or padding == "valid":
        assert (counts.synops, counts.connections) == enumerated(layer, x, 3)
    else:
        # Every position is used by every kernel position once.
        assert counts.synops == x.count_nonzero() * 3 * 12


@independent
def test_layers_of_a_network_are_told_apart_by_their_input():
    seen = {}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lif = nn.Conv2d(3, 4, 3, padding=1, groups=1), neuron("LIFNode", tau=2.0)
            self.deep, self.lif2 = nn.Conv2d(4, 6, 3, stride=2, groups=2), neuron("LIFNode", tau=2.0)
            self.pool, self.fc = nn.AvgPool2d(2), nn.Linear(6, 5)

        def forward(self, x_seq):
            T, N = x_seq.shape[:2]
            seen[1] = spikes = self.lif(self.conv(x_seq.flatten(0, 1)).unflatten(0, (T, N)) * 4)
            seen[2] = deeper = self.lif2(self.deep(spikes.flatten(0, 1)).unflatten(0, (T, N)) * 4)
            return self.fc(self.pool(deeper.flatten(0, 1)).flatten(1)).unflatten(0, (T, N))

    net, x = Net(), torch.randn(2, 3, 3, 6, 6)
    counts = count_operations(net, [x, (x, torch.zeros(3))])
    conv, deep, fc = counts.layers
    assert [layer.name for layer in counts.layers] == ["conv", "deep", "fc"]
    assert (conv.macs, conv.synops) == (2 * 2 * 3 * 4 * 36 * 27, 0)
    assert counts.input_macs == conv.macs
    one = enumerated(net.deep, seen[1], 3)
    assert (deep.macs, deep.synops, deep.connections) == (0, 2 * one[0], 2 * one[1])
    assert deep.weights == net.deep.weight.numel()
    assert (fc.macs, fc.synops) == (2 * 2 * 3 * 6 * 5, 0)
    assert [(n.kind, n.steps) for n in counts.neurons] == [("LIF", 2 * 6 * 4 * 36), ("LIF", 2 * 6 * 6 * 4)]
    assert [n.spikes for n in counts.neurons] == [2 * seen[1].count_nonzero(), 2 * seen[2].count_nonzero()]
    assert counts.synaptic_rate == counts.synops / counts.connections


@independent
@pytest.mark.parametrize("x", [torch.rand(4, 3, 7) < 0.3, (torch.rand(7) < 0.5).float()], ids=["bool", "one sample"])
def test_spikes_of_any_type_and_rank_into_a_linear_layer(x):
    layer = nn.Linear(7, 5)
    model = nn.Sequential(layer, neuron())

    def drive(model):
        # As a linear layer takes no bool.
        return model[1](torch.nn.functional.linear(x.float(), layer.weight))

    counts = count_operations(model, drive if x.dtype == torch.bool else x)
    assert (counts.synops, counts.connections) == (5 * int(x.count_nonzero()), 5 * x.numel())


@pytest.mark.parametrize("host", MODELS)
def test_multi_step_and_stepped_networks_of_both_hosts(host):
    model, batches = MODELS[host]()
    counts = count_operations(model, batches)
    neuron_steps = 3 * 6 * 16
    assert [layer.macs for layer in counts.layers] == [neuron_steps * 12 * 40, 0, 0]
    assert [n.kind for n in counts.neurons] == ["QIF", "QIF", "LIF"]
    assert [n.steps for n in counts.neurons] == [neuron_steps * n for n in (40, 30, 4)]
    first, second, _ = counts.neurons
    assert 0 < first.spikes < first.steps
    assert [layer.synops for layer in counts.layers[1:]] == [first.spikes * 30, second.spikes * 4]


@independent
def test_one_step_a_call_and_a_whole_sequence_count_the_same():
    pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    model = nn.Sequential(nn.Linear(6, 8), QIF(init_hidden=True), nn.Linear(8, 3))
    model.append(QIF(init_hidden=True))
    x = torch.randn(5, 6)

    def sequence(model):
        spikes, _ = model[1].forward_sequence(model[0](x).expand(4, 5, 8))
        model[3].forward_sequence(model[2](spikes))

    stepped = count_operations(model, x, steps=4)
    whole = count_operations(model, sequence)
    assert whole.neurons == stepped.neurons
    assert whole.layers[1] == stepped.layers[1]
    assert stepped.synops > 0


def test_the_hosts_own_counters_agree():
    op_counter = pytest.importorskip("spikingjelly.activation_based.op_counter")
    from qif_plugins.models import build
    from qif_plugins.neuron.norm import TDBatchNorm1d, TDBatchNorm2d

    norms = [TDBatchNorm1d, TDBatchNorm2d]
    for name, shape in (("resnet19", (3, 9, 9)), ("vggsnn", (2, 16, 16)), ("perceptron", (1, 4, 4))):
        theirs = [op_counter.SynOpCounter(), op_counter.MACCounter(extra_ignore_modules=norms)]
        states, flops = op_counter.NeuronStateCounter(), op_counter.FlopCounter()
        model = build(name, shape, 10, "qif")

        def drive(model, counters=(*theirs, states, flops), shape=shape):
            with op_counter.DispatchCounterMode(counters):
                model(torch.randn(2, 1, *shape) * 3)

        ours = count_operations(model, drive)
        assert ours.synops > 0
        assert [ours.synops, ours.macs] == [counter.get_total() for counter in theirs]
        assert ours.neuron_steps == states.get_metric_counts()["Global"]["neuron_logical_steps"]
        # Of its LIF update the host counts ten operations, ours counts three; what QIF adds is the same two.
        added = Costs(mult=1, add=1).qif_extra * ours.neuron_steps
        assert flops.get_counts()["Global"][torch.ops.qif.multi_step.default] == 10 * ours.neuron_steps + added


@independent
def test_the_model_is_left_as_it_was():
    model, batches = MODELS["spikingjelly"]()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_operations(model, batches)
    with pytest.raises(ValueError, match="layer 0 received a value that is not finite"):
        count_operations(model, torch.full((2, 3, 12), math.nan))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@independent
def test_wrong_input_is_refused_by_name():
    model, batches = MODELS["spikingjelly"]()
    with pytest.raises(ValueError, match="Linear has no spiking neuron"):
        count_operations(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no batch to count on"):
        count_operations(model, [])
    with pytest.raises(ValueError, match="no neuron received a value"):
        count_operations(model, torch.ones(2, 0, 12))
    with pytest.raises(ValueError, match="no neuron received a value"):
        count_operations(model, lambda model: None)
    for rate in (0, 1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            count_at_rate(model, (12,), 2, rate)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        count_operations(model, batches, steps=0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="energy of ac must be finite and not negative"):
            Costs(ac=value)
    with pytest.raises(ValueError, match="unknown lif_update 'free'; choose from 'none', 'charge', 'compare'"):
        Costs(lif_update="free")


@independent
def test_products_that_are_not_counted_are_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = neuron()

        def forward(self, x):
            return self.lif(x @ x.transpose(-1, -2))

    with pytest.warns(UserWarning, match=r"not counted, and it costs energy: matmul in \(model\)"):
        count_operations(Attention(), torch.randn(2, 3, 4, 4))
    model, batches = MODELS["spikingjelly"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_operations(model, batches)


amounts = st.integers(0, 10**12)
prices = st.floats(0, 1e3)
steps = st.builds(
    StepCount, connections=st.integers(1, 10**10), padded=st.integers(1, 10**10), input_macs=st.integers(0, 10**9),
    other_macs=st.integers(0, 10**9), neurons=st.integers(1, 10**8), weights=st.integers(1, 10**8),
)  # fmt: skip


@independent
@given(macs=amounts, synops=amounts, neurons=amounts, factor=st.integers(1, 9), costs=st.builds(
    Costs, mac=prices, ac=prices, mult=prices, add=prices, lif_update=st.sampled_from(list(LIF_UPDATES))))  # fmt: skip
def test_energy_is_linear_in_counts_and_prices(macs, synops, neurons, factor, costs):
    energy = Energy.of(macs, synops, neurons, costs)
    mults, adds = LIF_UPDATES[costs.lif_update]
    by_hand = macs * costs.mac + synops * costs.ac + neurons * (mults * costs.mult + adds * costs.add)
    assert energy.total_lif == pytest.approx(by_hand)
    assert energy.total_qif - energy.total_lif == pytest.approx(neurons * (costs.mult + costs.add), abs=1e-9 * by_hand)
    dearer = Costs(*(factor * price for price in (costs.mac, costs.ac, costs.mult, costs.add)), costs.lif_update)
    for scaled in (Energy.of(factor * macs, factor * synops, factor * neurons, costs),
                   Energy.of(macs, synops, neurons, dearer)):  # fmt: skip
        assert scaled.total_qif == pytest.approx(factor * energy.total_qif)
        assert scaled.overhead == pytest.approx(energy.overhead, nan_ok=True)
    more = Energy.of(macs, synops + 1, neurons, costs)
    assert more.total_lif - energy.total_lif == pytest.approx(costs.ac, abs=1e-9 * (1 + energy.total_lif))


@independent
@given(step=steps, rate=st.floats(0.01, 1), once_in=st.integers(1, 8), lif_update=st.sampled_from(list(LIF_UPDATES)))
def test_overhead_falls_with_the_rate_and_its_inverse_is_exact(step, rate, once_in, lif_update):
    costs = Costs(lif_update=lif_update)
    overhead = step.energy(rate, costs, once_in).overhead
    assert step.energy(rate + 0.1, costs, once_in).overhead <= overhead
    total = step.energy(rate, costs, once_in).total_lif
    assert step.rate_at(overhead, costs, once_in) == pytest.approx(rate, abs=1e-12 * total / step.connections)
    assert step.energy(rate, costs, once_in).overhead >= step.energy(rate, costs).overhead
    saved = step.energy(rate + step.break_even(costs), costs).total_lif - step.energy(rate, costs).total_lif
    assert saved == pytest.approx(step.energy(rate, costs).qif_extra, abs=1e-9 * total)


@independent
@given(step=steps, rate=st.floats(0.01, 1))
def test_traffic_is_that_of_every_operation(step, rate):
    used = step.connections * rate + step.input_macs + step.other_macs
    events, reused = step.traffic(rate, False), step.traffic(rate, True)
    assert (events.weights, events.sums) == pytest.approx((used, 2 * used))
    assert (reused.weights, reused.sums) == (step.weights, 0)
    assert events.membranes == reused.membranes == 2 * step.neurons
    assert memory_traffic(used, step.weights, step.neurons, True) == reused
    assert events.energy(2.0) == pytest.approx(6 * used + 4 * step.neurons)


@pytest.mark.parametrize("kind", ["qif", "lif"])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_neurons_are_held_at_the_rate_that_was_asked_for(kind, rate):
    from qif_plugins.models import build

    counts = count_at_rate(build("convnet", (1, 28, 28), 10, kind), (1, 28, 28), 4, rate)
    assert all(n.spikes / n.steps == pytest.approx(rate, abs=0.01) for n in counts.neurons)


@independent
def test_resnet19_has_the_published_size():
    from qif_plugins.models import build

    step = StepCount.of(count_at_rate(build("resnet19", (3, 32, 32), 10, "qif"), (3, 32, 32), 1, 0.2))
    assert step.neurons == 64 * 1024 + 6 * 128 * 1024 + 6 * 256 * 256 + 4 * 512 * 64 + 256
    assert step.input_macs == 64 * 1024 * 27
    assert step.weights == sum(n * k for n, k in (
        (64 * 3, 9), (128 * 64, 10), (128 * 128 * 5, 9), (256 * 128, 10), (256 * 256 * 5, 9), (512 * 256, 10),
        (512 * 512 * 3, 9), (512 * 256 + 256 * 10, 1)))  # fmt: skip
    # The rates between which the overhead is what arXiv 2510.05168 reports, as docs/energy.md states them.
    low, high = (step.rate_at(overhead, Costs()) for overhead in (0.0323, 0.0094))
    assert (round(low, 3), round(high, 3)) == (0.098, 0.359)


@independent
def test_command(tmp_path, capsys):
    files = [tmp_path / "energy.json", tmp_path / "energy.png"]
    words = ["energy", "--model", "convnet", "--shape", "1", "8", "8", "--rates", "0.1", "0.3", "--steps", "2"]
    assert main([*words, "--out", str(files[0]), "--plot", str(files[1])]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("0.94 %", "3.23 %", *LIF_UPDATES, *MEMORIES))
    assert files[1].read_bytes().startswith(b"\x89PNG")
    content = json.loads(files[0].read_text())
    step = StepCount(**content["time_step"])
    for row in content["measured"]:
        energy = Energy(**row["energy_pj"])
        assert energy.overhead == pytest.approx(row["overhead"])
        predicted = step.energy(row["synaptic_rate"], Costs())
        assert energy.total_lif / row["steps"] == pytest.approx(predicted.total_lif)
        assert row["overhead"] == pytest.approx(predicted.overhead)
    assert dataclasses.asdict(Costs()) == content["costs_pj"]
    assert main([*words, "--qif-map", "monotone", "--out", str(files[0])]) == 0
    assert "of QIF (monotone) 11" in capsys.readouterr().out
    bent = json.loads(files[0].read_text())["measured"][0]
    # One comparison, counted as an addition, on top of a multiplication and an addition.
    assert bent["overhead"] == pytest.approx(content["measured"][0]["overhead"] * 5.5 / 4.6)


def test_a_comparison_costs_an_addition_where_that_of_lif_does():
    for update, extra in (("compare", 5.5), ("charge", 4.6), ("none", 4.6)):
        assert Costs(lif_update=update, qif_map="monotone").qif_extra == pytest.approx(extra)
        assert Costs(lif_update=update).qif_extra == pytest.approx(4.6)
    with pytest.raises(ValueError, match="unknown qif_map 'cubic'; choose from 'parabola', 'monotone'"):
        Costs(qif_map="cubic")


@independent
def test_command_on_a_checkpoint(tmp_path, capsys):
    training = pytest.importorskip("qif_plugins.experiments.training.session")
    from qif_plugins.experiments.checkpoints import Checkpoints
    from qif_plugins.experiments.training.config import from_dict
    from qif_plugins.experiments.training.engine import Trainer

    tables = {"data": {"name": "digits", "steps": 3}, "model": {"name": "perceptron", "width": 16}}
    tables["neuron"] = {"name": "qif", "dynamics": "monotone"}
    config = from_dict(tables | {"training": {"epochs": 1, "batch_size": 200}})
    model, task = training.prepare(config)
    trainer = training.make_trainer(config, model, task)
    assert isinstance(trainer, Trainer)
    trainer.fit()
    checkpoints = Checkpoints(tmp_path, config.to_dict())
    checkpoints.save(trainer, best=True)
    capsys.readouterr()
    written = tmp_path / "energy.json"
    words = ["energy", "--checkpoint", str(checkpoints.best), "--out", str(written)]
    assert main(words) == 0
    content = json.loads(written.read_text())
    counts = content["measured"]
    assert content["costs_pj"]["qif_map"] == "monotone"
    assert content["samples"] == 600
    assert content["accuracy"] == pytest.approx(trainer.history[-1]["test_accuracy"])
    assert counts["firing_rate"] == pytest.approx(trainer.history[-1]["test_rate"])
    first, readout = counts["layers"]
    assert first["macs"] == 600 * 3 * 64 * 16
    assert readout["synops"] == counts["neurons"][0]["spikes"] * 10
    assert f"{100 * content['accuracy']:.2f} % of them" in capsys.readouterr().out
    assert main([*words, "--batches", "1"]) == 0
    assert json.loads(written.read_text())["samples"] == 200
    assert main([*words, "--rates", "0.2"]) == 2
    assert "--rates and --checkpoint exclude each other" in capsys.readouterr().err


@independent
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ac", "nan"], "the energy of ac must be finite"),
        (["--neuron", "izhikevich"], "unknown neuron 'izhikevich'"),
        (["--ac", "0"], "does not depend on the firing rate"),
        (["--batches", "2"], "--batches is for --checkpoint"),
        (["--checkpoint", "nowhere.pt"], "no file nowhere.pt"),
        (["--model", "convnet", "--shape", "1", "8", "9"], "square"),
    ],
)
def test_command_refuses(words, message, capsys):
    assert main(["energy", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
