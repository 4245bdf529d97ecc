"""The trainer by itself: what it computes, what it leaves alone, and how it stops."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from qif_plugins.diagnostics.spiking import spiking_layers
from qif_plugins.experiments.training import Batches, FiringRates, NonFiniteError, Trainer
from qif_plugins.experiments.training.batches import seed_of

pytestmark = pytest.mark.host_independent

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
LABELS = (X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(2))).argmax(1)


def batches(size=16, **options):
    return Batches.of(X, LABELS, batch_size=size, **options)


def model(*between, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), *between, nn.Linear(12, 3)).to(dtype)


def loss(model, batch):
    x, labels = batch
    logits = model(x.to(next(model.parameters()).dtype))
    return nn.functional.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}


def trainer(net, lr=0.1, size=16, kind=torch.optim.SGD, seed=0, **options):
    return Trainer(net, kind(net.parameters(), lr), loss, batches(size, seed=seed), **options)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- the order of the data ---------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 40), size=st.integers(1, 12), epoch=st.integers(0, 5), first=st.integers(0, 5),
    processes=st.integers(1, 4), seed=st.integers(0, 2**40), drop_last=st.booleans(),
)  # fmt: skip
def test_batches_depend_on_seed_and_epoch_alone(count, size, epoch, first, processes, seed, drop_last):
    if drop_last and count < size:
        return
    data = Batches.of(torch.arange(count), batch_size=size, seed=seed, drop_last=drop_last)
    whole = [batch[0] for batch in data.epoch(epoch)]
    assert [len(batch) for batch in whole] == [data.size(number) for number in range(len(data))]
    seen = torch.cat(whole).sort().values
    assert torch.equal(seen, torch.arange(count)) or (drop_last and len(seen.unique()) == count // size * size)
    for number, batch in enumerate(data.epoch(epoch, first)):
        assert torch.equal(batch[0], whole[first + number])
    shares = [list(data.epoch(epoch, first, process, processes)) for process in range(processes)]
    for number, parts in enumerate(zip(*shares, strict=True)):
        assert torch.equal(torch.cat([part[0] for part in parts if part is not None]), whole[first + number])
        sizes = [0 if part is None else len(part[0]) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ():
    orders = [torch.cat([b[0] for b in batches(seed=s).epoch(e)]) for s in (0, 1) for e in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert len({seed_of(a, b, c) for a in range(6) for b in range(6) for c in range(6)}) == 216


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 51, "drop_last": True}, "lower batch_size"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Batches.of(X, LABELS, **options)


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_is_the_plain_loop_bit_for_bit():
    net = model()
    run = trainer(net, test=batches(shuffle=False), epochs=3, clip_norm=0.4)
    run.fit()

    other = model()
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for epoch in range(3):
        values, norms = [], []
        for batch in batches().epoch(epoch):
            value = loss(other, batch)[0]
            optimizer.zero_grad()
            value.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
            if norm > 0.4:
                for p in other.parameters():
                    p.grad.mul_(0.4 / norm.item())
            optimizer.step()
            values.append(value.item() * len(batch[1]))
            norms.append(norm.item() * len(batch[1]))
        row = run.history[epoch]
        assert (row["loss"], row["gradient_norm"]) == pytest.approx((sum(values) / 50, sum(norms) / 50), rel=1e-6)
    assert equal(weights(net), weights(other))
    value, measured = loss(other, (X, LABELS))
    assert row["test_loss"] == pytest.approx(value.item(), rel=1e-5)
    assert row["test_accuracy"] == pytest.approx(measured["accuracy"].item(), rel=1e-5)


def test_accumulated_batches_are_one_large_batch():
    nets = [model(dtype=torch.float64) for _ in range(2)]
    # 50 samples: the last step takes what is left, and its last batch is a small one.
    trainer(nets[0], size=24, epochs=2).fit()
    trainer(nets[1], size=8, epochs=2, accumulation=3).fit()
    for p, q in zip(*map(weights, nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_bfloat16_autocast_reaches_the_model_and_leaves_the_weights_alone():
    net = model()
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run = trainer(net, epochs=1, precision="bf16")
    run.fit()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    # The model is the user's again, and another trainer's, of another precision, in the same process.
    seen.clear()
    net(X)
    trainer(net, epochs=1).fit()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("first", [True, False])
def test_accelerators_of_the_user_stay_as_they_are(first):
    def accelerator():
        return Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)

    mine = accelerator() if first else None
    run = trainer(model(), epochs=1, test=batches(shuffle=False))
    mine = mine or accelerator()
    run.fit()
    assert (mine.mixed_precision, mine.state.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", "bf16", 4)
    assert run.accelerator.mixed_precision == "no"
    assert AcceleratorState().mixed_precision == "bf16"


def test_it_leaves_alone_what_is_not_its_business(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    net = model(nn.Dropout(0.0).eval())
    torch.set_rng_state(before)
    run = trainer(net, epochs=2, test=batches(shuffle=False))
    assert not net[2].training
    run.evaluate(batches())
    assert not net[2].training
    assert net[0].training
    run.fit()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_run_cut_within_an_epoch_goes_on_bit_for_bit():
    def run(**options):
        net = model(nn.Dropout(0.5))
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return Trainer(
            net, optimizer, loss, batches(), test=batches(shuffle=False), scheduler=schedule, epochs=4,
            layers={"relu": net[1]}, **options,
        )  # fmt: skip

    torch.manual_seed(7)
    whole = run()
    torch.manual_seed(7)
    whole.fit()

    def cut(trainer, measured):
        if (trainer.epoch, trainer.step) == (1, 2):
            trainer.stop()

    torch.manual_seed(7)
    first = run(on_step=cut)
    torch.manual_seed(7)
    first.fit()
    assert (first.epoch, first.step, len(first.history)) == (1, 2, 1)
    state = copy.deepcopy(first.state())
    torch.manual_seed(99)
    second = run()
    second.load_state(state)
    second.fit()
    assert equal(weights(second.model), weights(whole.model))
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (second, whole)]
    assert rows[0] == rows[1]


def test_another_models_state_is_refused():
    state = trainer(model()).state()
    net = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(ValueError, match="another model's"):
        trainer(net).load_state(state)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduled = Trainer(net, optimizer, loss, batches(), scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(ValueError, match="no scheduler, and this run has one"):
        scheduled.load_state(state)


def test_a_weight_without_a_gradient_has_no_moments_to_miss():
    net = nn.Sequential(model(), nn.Linear(3, 2))  # the second is never called

    def run():
        return Trainer(net, torch.optim.Adam(net.parameters()), lambda net, batch: loss(net[0], batch), batches())

    first = run()
    first.fit()
    state = copy.deepcopy(first.state())
    assert state["unmoved"] == [4, 5]
    run().load_state(state)
    del state["unmoved"]  # as in files of early versions
    run().load_state(state)


def test_a_state_that_the_optimizer_refuses_changes_nothing():
    class Strict(torch.optim.SGD):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            if state["param_groups"][0]["lr"] == 7.0:
                raise TypeError("no seven")

    def run(lr):
        net = model()
        return Trainer(net, Strict(net.parameters(), lr, momentum=0.9), loss, batches(), epochs=1)

    other, mine = run(7.0), run(0.1)
    mine.fit()
    state, before = copy.deepcopy(other.state()), copy.deepcopy(mine.state())
    with pytest.raises(ValueError, match="that file cannot be resumed from: no seven"):
        mine.load_state(state, "that file")
    after = mine.state()
    assert equal(list(before["model"].values()), list(after["model"].values()))
    assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    for number, entry in before["optimizer"]["state"].items():
        assert torch.equal(after["optimizer"]["state"][number]["momentum_buffer"], entry["momentum_buffer"])
    assert torch.equal(after["random"][0]["torch"][0], before["random"][0]["torch"][0])


def test_the_best_epoch():
    run = trainer(model())
    for rows, best in (([0.5], True), ([0.5, 0.5], False), ([0.5, 0.6], True), ([0.7, 0.6], False)):
        run.history = [{"test_accuracy": value} for value in rows]
        assert run.best() is best
    run.monitor, run.history = "test_loss", [{"test_loss": 2.0}, {"test_loss": 1.0}]
    assert run.best()
    run.history = [{"loss": 1.0}]
    assert not run.best()


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_spikes():
    net = model()
    net = nn.Sequential(net[0], nn.ReLU(), nn.Hardtanh(0, 1), net[2])
    counted = []
    net[2].register_forward_hook(lambda module, args, output: counted.append(output.detach().clone()))
    run = trainer(net, lr=0.0, epochs=1, test=batches(shuffle=False), layers={"a": net[2], "never": nn.ReLU()})
    run.fit()
    per_epoch = [torch.cat(part).double().mean().item() for part in (counted[:4], counted[4:])]
    row = run.history[0]
    assert (row["rate"], row["test_rate"]) == pytest.approx(per_epoch, rel=1e-6)
    assert run.rates == {"a": pytest.approx(per_epoch[1], rel=1e-6)}
    quiet = trainer(net, epochs=1, layers={})
    assert "rate" not in quiet.fit()[0]


def test_neurons_of_every_host_are_found():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    pytest.importorskip("numba")
    snntorch = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF
    from qif_plugins.adapters.spikingjelly import QIFNode

    from qif_plugins.exact import QIFLayer, encode_images

    net = nn.Sequential(
        nn.Linear(2, 2), neuron.LIFNode(), QIFNode(), snntorch.Leaky(0.9), QIF(), neuron.LIFNode().surrogate_function,
        layer.SynapseFilter(), QIFLayer(2, 3, 1.0),
    )  # fmt: skip
    assert list(spiking_layers(net)) == ["1", "2", "3", "4", "7"]
    assert list(spiking_layers(net[1])) == ["(model)"]
    # Trains of exact spikes have no rate per step.
    trains = encode_images(torch.rand(2, 2), 1.0)
    rates = FiringRates({"exact": net[7]})
    with rates.measuring():
        net[7](trains)
    assert (rates.rates(), rates.mean()) == ({}, None)


# -- what is not finite ------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.how == "forward":
            return (x - x.max() - 1).log()
        if self.how == "overflow":
            return x * 1e38 * 1e38
        if self.how == "backward":
            return x + (x * 0).sqrt()
        return x + (self.scale * 0).abs().sqrt()


@pytest.mark.parametrize(
    ("how", "phase", "says"),
    [
        ("forward", "forward", "layer '2' (Broken) made it from finite input"),
        ("overflow", "forward", "layer '2' (Broken) made it from finite input"),
        ("backward", "backward", "layer '2' (Broken) made it from a finite gradient"),
        ("parameter", "backward", "layer '2' (Broken) made the gradient of '2.scale' not finite"),
    ],
)
def test_the_layer_that_made_the_first_nan_is_named(how, phase, says):
    net = model(Broken(how), nn.Linear(12, 12), nn.Tanh())
    before = weights(net)
    run = trainer(net)
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    assert (caught.value.layer, caught.value.phase) == ("2", phase)
    assert says in str(caught.value)
    assert "epoch 1, step 1" in str(caught.value)
    assert "learning rate" in str(caught.value)
    assert "health" not in str(caught.value)  # which has nothing to say of a network without QIF layers
    assert equal(weights(net), before)
    assert all(p.grad is None for p in net.parameters())


def test_a_nan_between_layers_in_the_loss_or_in_the_data_is_not_put_on_a_layer():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(self.first(x) / torch.zeros(()))

    with pytest.raises(NonFiniteError, match="an operation between layers made it") as caught:
        trainer(Between()).fit()
    assert caught.value.layer == "second"

    net = model()

    def bad_loss(model, batch):
        return model(batch[0]).sum() * math.inf

    run = Trainer(net, torch.optim.SGD(net.parameters(), 0.1), bad_loss, batches())
    with pytest.raises(NonFiniteError, match="look at the loss"):
        run.fit()
    bad = X.clone()
    bad[7, 2] = math.nan
    run = Trainer(net, torch.optim.SGD(net.parameters(), 0.1), loss, Batches.of(bad, LABELS, batch_size=50))
    with pytest.raises(NonFiniteError, match="look at the data"):
        run.fit()


def test_a_diverging_run_keeps_its_last_good_weights_and_dropout_does_not_hide_the_layer():
    class Sometimes(nn.Module):
        def forward(self, x):
            dropped = nn.functional.dropout(torch.ones_like(x[:1]), 0.3)
            return x / (0 if bool((dropped == 0).sum() > 5) else 1)

    torch.manual_seed(3)
    net = model(Sometimes())
    good = []
    run = trainer(net, epochs=30, on_step=lambda trainer, measured: good.append(weights(net)))
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    assert caught.value.layer == "2"
    assert len(good) > 1
    assert equal(weights(net), good[-1])


def test_gradients_in_float64_may_be_larger_than_float32_holds():
    net = nn.Linear(1, 1, bias=False).double()
    trainer = Trainer(
        net, torch.optim.SGD(net.parameters(), 1.0), lambda model, batch: 1e60 * model(batch[0]).sum(),
        Batches.of(torch.ones(1, 1, dtype=torch.float64), batch_size=1), clip_norm=0.5,
    )  # fmt: skip
    before = net.weight.item()
    (row,) = trainer.fit()
    assert row["gradient_norm"] == pytest.approx(1e60)
    assert before - net.weight.item() == pytest.approx(0.5)


def test_a_failing_network_of_qif_layers_is_told_what_health_says():
    pytest.importorskip("spikingjelly")
    from qif_plugins.adapters.spikingjelly import QIFNode

    net = nn.Sequential(nn.Linear(6, 12), QIFNode(window="paper", backend="torch"), nn.Linear(12, 3), Broken("forward"))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-5.0)

    def over_time(model, batch):
        model[1].reset()
        logits = sum(model(batch[0]) for _ in range(4))
        return nn.functional.cross_entropy(logits, batch[1])

    run = Trainer(net, torch.optim.SGD(net.parameters(), 0.1), over_time, batches())
    with pytest.raises(NonFiniteError, match=r"layer '3' \(Broken\)") as caught:
        run.fit()
    assert "qif_plugins.health(model, batch)" in str(caught.value)
    assert "1: " in str(caught.value)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp64"}, "'no', 'bf16', 'fp16'"),
        ({"precision": "fp16", "cpu": True}, "'fp16' scales the loss on a GPU"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(model(), **options)


def test_a_loss_without_gradient_is_refused():
    net = model()
    other = nn.Linear(6, 3)
    run = Trainer(net, torch.optim.SGD(other.parameters(), 0.1), loss, batches())
    with pytest.raises(ValueError, match="does not depend on any of them"):
        run.fit()
