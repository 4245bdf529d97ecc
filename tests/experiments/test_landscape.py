"""Landscapes against functions, neurons and networks whose jumps are known, in both hosts and in continuous time."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("numba")

from qif_plugins.cli import main
from qif_plugins.exact import LIFLayer, QIFLayer, Spikes, initialise
from qif_plugins.experiments.landscape import (
    Line,
    Plane,
    along,
    between,
    fragmentation,
    gradient_direction,
    locate_jumps,
    over_plane,
    plane_angle,
    random_direction,
    spiking_layers,
)
from qif_plugins.experiments.landscape.numbers import candidates


def grid(low, high, points):
    return torch.linspace(low, high, points, dtype=torch.float64)


def line_of(loss, slope, points=401):
    positions = grid(-1, 1, points)
    return Line(positions, loss(positions), slope(positions))


class Known(nn.Module):
    """One parameter, at 0, so that positions along the direction 1 are its values."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))


ONE = {"w": torch.ones((), dtype=torch.float64)}


@pytest.mark.host_independent
def test_numbers_tell_smooth_kinked_and_broken_lines_apart():
    smooth = fragmentation(line_of(lambda x: (3 * x).sin(), lambda x: 3 * (3 * x).cos()))
    assert smooth["unexplained_ratio"] < 0.01
    assert smooth["steps_with_jump"] == smooth["jump_share"] == smooth["opposite"] == 0
    assert smooth["angle"] < 0.1
    # A kink and a jump at 0.0012, off the grid.
    kinked = fragmentation(line_of(lambda x: (x - 0.0012).abs(), lambda x: (x - 0.0012).sign()))
    assert 0.1 < kinked["unexplained_ratio"] < 0.6
    broken = fragmentation(line_of(lambda x: x + 0.5 * (x > 0.0012), torch.ones_like))
    assert broken["unexplained_ratio"] == pytest.approx(1)
    assert broken["unexplained"] == pytest.approx(0.5)
    assert broken["steps_with_jump"] == pytest.approx(1 / 100)
    assert broken["jump_share"] == pytest.approx(0.5 / 2.5)
    noisy = fragmentation(line_of(lambda x: x + 0.1 * (100 * x).sin(), torch.ones_like))
    assert noisy["variation_ratio"] > 2
    assert noisy["angle"] > 45
    falling = fragmentation(line_of(lambda x: -x, torch.ones_like))
    assert falling["angle"] == pytest.approx(180)
    assert falling["opposite"] == 1
    flat = fragmentation(line_of(torch.zeros_like, torch.ones_like))
    assert flat["angle"] == pytest.approx(90)
    assert flat["variation_ratio"] == 1
    for points in (9, 14):
        with pytest.raises(ValueError, match="4n"):
            fragmentation(Line(*(torch.linspace(0, 1, points),) * 3))


@pytest.mark.host_independent
def test_the_angle_in_a_plane():
    x = grid(-1, 1, 9)
    values = x[:, None].square() + 3 * x
    right = torch.stack([(2 * x)[:, None].expand(9, 9), torch.full((9, 9), 3.0)], -1)
    assert plane_angle(Plane((x, x), values, right)) == pytest.approx(0, abs=1e-6)
    assert plane_angle(Plane((x, x), values, -right)) == pytest.approx(180)


@pytest.mark.host_independent
@settings(max_examples=6)
@given(st.floats(-0.9, 0.9), st.floats(0.05, 2), st.booleans(), st.floats(-3, 3))
def test_jumps_are_found_where_they_are(place, height, upwards, steepness):
    network, height = Known(), height if upwards else -height

    def loss():
        return (steepness * network.w).sin() + (network.w - 0.3).abs() + height * (network.w > place)

    positions = grid(-1, 1, 101)
    line = along(network, loss, ONE, positions)
    jumps = locate_jumps(network, loss, ONE, line)
    (jump,) = jumps
    assert jump.position == pytest.approx(place, abs=1e-9)
    assert jump.height == pytest.approx(height, abs=1e-6)
    assert (jump.event, jump.layer) == ("none", None)


@pytest.mark.host_independent
def test_kinks_and_wrong_slopes_are_no_jumps():
    network = Known()

    def kink():
        return (network.w - 0.013).abs()

    line = along(network, kink, ONE, grid(-1, 1, 101))
    assert not candidates(line, 1e-6).any()
    assert locate_jumps(network, kink, ONE, line) == []

    def reversed_gradient():
        return 2 * network.w.detach() - network.w

    line = along(network, reversed_gradient, ONE, grid(-1, 1, 101))
    assert fragmentation(line)["angle"] == pytest.approx(180)
    assert locate_jumps(network, reversed_gradient, ONE, line) == []


@pytest.mark.host_independent
def test_directions():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    network[2].bias.requires_grad_(False)
    parameters = dict(network.named_parameters())
    direction = random_direction(network, 0)
    assert direction.keys() == parameters.keys() - {"2.bias"}
    for name, part in direction.items():
        assert torch.allclose(part.norm(dim=-1), parameters[name].norm(dim=-1))
    assert not torch.equal(direction["0.weight"], random_direction(network, 1)["0.weight"])

    x = torch.randn(8, 5)

    def loss():
        return network(x).square().mean()

    uphill = gradient_direction(network, loss)
    norm = torch.cat([part.flatten() for part in uphill.values()]).norm()
    assert torch.allclose(norm, torch.cat([parameters[name].detach().flatten() for name in uphill]).norm())
    assert along(network, loss, uphill, grid(0, 0.1, 2)).slope[0] > 0

    other = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    other[1].running_mean.add_(1)
    there = between(network, other.state_dict())
    measured = along(network, loss, there, grid(0, 1, 3)).loss
    assert measured[0] == loss()
    assert measured[2] == pytest.approx(float(other(x).square().mean().detach()), rel=1e-5)
    wrong = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"0\.weight is \[3, 5\] in one and \[4, 5\] in the other"):
        between(network, wrong.state_dict())
    with pytest.raises(ValueError, match="gradient is zero"):
        gradient_direction(network, lambda: 0 * loss())


@pytest.mark.host_independent
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    x = torch.randn(7, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calls = []

    def loss():
        calls.append(None)
        network.eval() if fails else network.train()
        network[0].extra = 1
        if fails and len(calls) == 4:
            raise RuntimeError("in the midst of it")
        return network(x).square().mean()

    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    directions = random_direction(network, 0), random_direction(network, 1)
    if fails:
        with pytest.raises(RuntimeError, match="in the midst"):
            along(network, loss, directions[0], grid(-1, 1, 5))
    else:
        line = along(network, loss, directions[0], grid(-1, 1, 5))
        # Dropout draws the same everywhere, and batch norm's statistics do not move along.
        again = along(network, loss, directions[0], grid(-1, 1, 5))
        assert torch.equal(line.loss, again.loss)
        plane = over_plane(network, loss, directions, (grid(-1, 1, 5), grid(-2, 2, 3)))
        assert torch.allclose(plane.loss[:, 1], line.loss)
        assert torch.allclose(plane.slope[:, 1, 0], line.slope)
        assert torch.equal(plane.lines(1)[2].loss, plane.loss[2])
    assert torch.equal(drawn, torch.rand(1))
    assert network.training
    assert not hasattr(network[0], "extra")
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("loss", "positions", "direction", "message"),
    [
        (lambda n: n.w / 0, (-1, 1, 5), ONE, r"the loss is -?inf at -1"),
        (lambda n: torch.ones(()), (-1, 1, 5), ONE, "scalar tensor with a gradient"),
        (lambda n: n.w.expand(2), (-1, 1, 5), ONE, "scalar tensor with a gradient"),
        (lambda n: n.w, (1, -1, 5), ONE, "ascending and equidistant"),
        (lambda n: n.w, (-1, 1, 5), {"v": torch.ones(())}, "moves v of shape .*has none"),
        (lambda n: n.w, (-1, 1, 5), {"w": torch.ones(2)}, "has one of shape"),
    ],
)
def test_wrong_input_is_refused(loss, positions, direction, message):
    network = Known()
    with pytest.raises(ValueError, match=message):
        along(network, lambda: loss(network), direction, grid(*positions))
    assert network.w == 0


# One LIF neuron, τ = 1, an input spike of weight w at 0: V = w (e^-t - e^-2t), largest at log 2, where it is w/4.
CRITICAL = 4.0


def exact_network(layer, others=()):
    """One neuron that reads input 0 at time 0 and input 1 at time 2; ``others`` read input 2 at time 1."""
    network = nn.Sequential(layer(3, 1 + len(others), 4.0))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].weight[0, :2] = torch.tensor([CRITICAL, 3.2])
        for place, weight in enumerate(others, 1):
            network[0].weight[place, 2] = weight
    direction = {"0.weight": torch.zeros_like(network[0].weight)}
    direction["0.weight"][0, 0] = 1
    return network, direction


@pytest.mark.host_independent
@pytest.mark.parametrize(
    ("inputs", "others", "event", "shift"),
    [
        ([0], (), "number of spikes", 0.0),
        # The second input makes the neuron spike if the first did not, and is not enough after the reset if it did.
        ([0, 1], (), "time of spikes", 1.5),
        # Another neuron spikes between.
        ([0, 2, 1], (20.0,), "order of spikes", 1.5),
    ],
)
def test_a_lif_neuron_jumps_where_its_maximum_meets_the_threshold(inputs, others, event, shift):
    when = {0: 0.0, 2: 1.0, 1: 2.0}
    times = torch.tensor([[when[i] for i in inputs]], dtype=torch.float64)
    network, direction = exact_network(LIFLayer, others)
    spikes = Spikes(times, torch.tensor([inputs]), 3)

    def loss():
        return network(spikes).first()[0, 0]

    line = along(network, loss, direction, grid(-0.31, 0.29, 41))
    (jump,) = locate_jumps(network, loss, direction, line)
    assert jump.position == pytest.approx(CRITICAL - 4.0, abs=1e-9)
    assert (jump.event, jump.layer, jump.neurons) == (event, "0", 1)
    # From wherever it was to log 2; the square root by which it gets there is what is left within the bracket.
    before = float(line.loss[line.positions < 0][-1])
    assert jump.height == pytest.approx(math.log(2) - before, abs=0.2)
    assert jump.shift >= shift
    smooth, direction = exact_network(QIFLayer, others)
    line = along(smooth, lambda: smooth(spikes).first()[0, 0], direction, grid(-0.31, 0.29, 201))
    assert fragmentation(line)["steps_with_jump"] == 0


@pytest.mark.host_independent
@pytest.mark.parametrize("layer", [LIFLayer, QIFLayer])
def test_the_landscape_of_lif_jumps_and_that_of_qif_does_not(layer):
    torch.manual_seed(0)
    network = nn.Sequential(layer(10, 8, 4.0), layer(8, 2, 4.0))
    times = (torch.rand(1, 30, dtype=torch.float64) * 3).sort(1)[0]
    inputs = Spikes(times, torch.randint(0, 10, (1, 30)), 10)
    initialise(network, inputs, rate=2.0)
    direction = random_direction(network, 0)

    def loss():
        return network(inputs).first().sum()

    line = along(network, loss, direction, grid(-0.5, 0.5, 201))
    jumps = locate_jumps(network, loss, direction, line, smallest=1e-3, most=4)
    numbers = fragmentation(line, smallest=1e-3)
    if layer is QIFLayer:
        assert jumps == []
        assert numbers["steps_with_jump"] == 0
        assert numbers["angle"] < 5
    else:
        assert len(jumps) == 4
        assert all(abs(jump.height) > 1e-3 and jump.layer in ("0", "1") for jump in jumps)
        assert {jump.event for jump in jumps} <= {"number of spikes", "order of spikes", "time of spikes"}
        assert numbers["unexplained_ratio"] > 0.9
        assert numbers["angle"] > 5


class Host(nn.Module):
    """One neuron of a host with the input w at each of two steps; ``read`` is the weight of its first spike."""

    def __init__(self, neuron, sequence):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.95, dtype=torch.float64))
        self.neuron, self.sequence = neuron, sequence

    def forward(self):
        return self.sequence(self.neuron, self.w.expand(2, 1))


def hosted(host, kind):
    if host == "spikingjelly":
        pytest.importorskip("spikingjelly")
        from qif_plugins.adapters.spikingjelly import QIFNode
        from spikingjelly.activation_based import neuron

        made = QIFNode(dynamics="paper") if kind == "qif" else neuron.LIFNode(tau=2.0, decay_input=False)
        made.step_mode = "m"
        return Host(made, lambda neuron, x: neuron(x))
    pytest.importorskip("snntorch")
    import snntorch
    from qif_plugins.adapters.snntorch import QIF

    def step_by_step(neuron, x_seq):
        mem, out = neuron.reset_mem(), []
        for x in x_seq:
            spike, mem = neuron(x, mem)
            out.append(spike)
        return torch.stack(out)

    if kind == "qif":
        return Host(QIF(dynamics="paper"), lambda neuron, x: (neuron.reset_mem(), neuron.forward_sequence(x))[1][0])
    return Host(snntorch.Leaky(beta=0.5, reset_mechanism="zero"), step_by_step)


# h[1] = w and h[2] = f(w) + w pass the threshold 1 here, f(v) = v/2 for LIF and v (v - 1/2)/4 for QIF.
SECOND = {"lif": 2 / 3, "qif": (-0.875 + math.sqrt(0.875**2 + 1)) / 0.5}


@pytest.mark.parametrize("kind", ["lif", "qif"])
@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_surrogate_networks_of_both_hosts_jump_where_a_membrane_meets_the_threshold(host, kind):
    network = hosted(host, kind)

    def loss():
        return (network() * torch.tensor([[1.0], [0.25]])).sum() + 0.1 * network.w

    line = along(network, loss, ONE, grid(-0.5, 0.3, 81))
    jumps = locate_jumps(network, loss, ONE, line)
    assert [jump.position + 0.95 for jump in jumps] == pytest.approx([SECOND[kind], 1.0], abs=1e-6)
    assert [jump.height for jump in jumps] == pytest.approx([0.25, 1.0], abs=1e-6)
    assert [(jump.event, jump.layer) for jump in jumps] == [("number of spikes", "neuron")] * 2
    assert list(spiking_layers(network)) == ["neuron"]
    # Between jumps the loss is as good as flat, and the surrogate's slope is not.
    numbers = fragmentation(line)
    assert numbers["jump_share"] > 0.5
    assert numbers["angle"] > 20
    assert network.w == 0.95


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Networks of every kind, hardly trained."""
    for package in ("spikingjelly", "snntorch", "accelerate", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, words in (("lif", "--seed 0 --neuron lif"), ("qif", "--seed 0"), ("qif1", "--seed 1")):
        command = f"exact train {words} --hidden 5 --epochs 0 --limit 60 --out {folder / name}"
        assert main(command.split()) == 0
    command = f"train --config digits --out {folder / 'trained'} --no-tensorboard --quiet"
    changes = ("training.epochs=1", "training.batch_size=400", "model.width=8", "data.steps=2")
    assert main([*command.split(), *(word for change in changes for word in ("--set", change))]) == 0
    command = f"compare --save --windows unbiased --seeds 1 --epochs 1 --steps 2 --batch-size 256 --out {folder}"
    assert main(command.split()) == 0
    return folder


def measure(capsys, out, *words):
    assert main(["landscape", *map(str, words), "--points", "13", "--jumps", "1", "--out", str(out)]) == 0
    return capsys.readouterr().out, json.loads((out / "landscape.json").read_text())


def test_the_command_measures_networks_of_every_kind(checkpoints, tmp_path, capsys):
    names = ("lif", "snntorch-lif-0.pt", "spikingjelly-qif-unbiased-0.pt", "trained")
    networks = [checkpoints / name for name in names]
    text, content = measure(capsys, tmp_path, *networks, "--samples", 4, "--single", 1)
    titles = [network["title"] for network in content["networks"]]
    assert titles == [
        "LIF, exact",
        "LIF (atan), snntorch",
        "QIF (unbiased), spikingjelly",
        "QIF, perceptron",
    ]
    assert all(title in text for title in titles)
    for network in content["networks"]:
        batch, sample = network["lines"]
        assert batch["samples"] == [0, 1, 2, 3]
        assert sample["samples"] == [0]
        assert len(batch["loss"]) == len(batch["slope"]) == 13
        assert all(math.isfinite(value) for value in [*batch["numbers"].values(), *batch["loss"]])
        assert 0 <= network["accuracy"] <= 1
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.host_independent
def test_the_command_repeats_itself_and_draws_vectors(checkpoints, tmp_path, capsys):
    for name in ("a", "b"):
        options = ("--directions", 2, "--single", 0, "--grid", 9, "--format", "pdf")
        text, content = measure(capsys, tmp_path / name, checkpoints / "qif", checkpoints / "qif1", *options)
    assert "4 batch" in text
    assert ["plane" in network for network in content["networks"]] == [True, False]
    assert 0 <= content["networks"][0]["plane"]["angle"] <= 180
    for file in ("landscape.json", "lines.pdf", "plane.pdf"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert file.endswith("json") or (tmp_path / "a" / file).read_bytes().startswith(b"%PDF")


@pytest.mark.host_independent
def test_between_two_checkpoints_and_along_the_gradient(checkpoints, tmp_path, capsys):
    first, second = checkpoints / "qif", checkpoints / "qif1"
    _, content = measure(capsys, tmp_path, first, "--to", second, "--single", 0)
    line = content["networks"][0]["lines"][0]
    assert line["positions"] == [-0.25, 1.25]
    _, there = measure(capsys, tmp_path, second, "--radius", 0.1, "--single", 0)
    # 13 positions: -0.25, -0.125, ..., 1.25, of which the eleventh is 1.
    assert line["loss"][10] == pytest.approx(there["networks"][0]["lines"][0]["loss"][6], rel=1e-9)
    _, uphill = measure(capsys, tmp_path, first, "--direction", "gradient", "--radius", 0.01, "--single", 0)
    line = uphill["networks"][0]["lines"][0]
    assert line["slope"][6] > 0
    assert line["loss"][6] < line["loss"][7]


@pytest.mark.host_independent
def test_a_function_gives_any_network(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_landscape.py").write_text(
        "import torch\n"
        "def made():\n"
        "    network = torch.nn.Linear(2, 1)\n"
        "    return network, lambda: network(torch.ones(3, 2)).square().mean()\n"
        "def wrong():\n"
        "    return 1\n"
    )
    text, content = measure(capsys, tmp_path, "mine_landscape:made")
    assert "Linear, made" in text
    assert len(content["networks"][0]["lines"]) == 1
    assert main(["landscape", "mine_landscape:wrong"]) == 2
    assert "must return (network, loss)" in capsys.readouterr().err
    assert main(["landscape", "mine_landscape:none"]) == 2
    assert "no function 'none'" in capsys.readouterr().err


@pytest.mark.host_independent
def test_the_command_refuses_before_it_works(checkpoints, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"a": 1}, tmp_path / "other.pt")
    lif, jelly = checkpoints / "lif", checkpoints / "spikingjelly-lif-0.pt"
    content = torch.load(lif / "exact.pt")
    torch.save({**content, "settings": {**content["settings"], "max_spikes": 1}}, tmp_path / "budget.pt")
    for name, change in (("host", {"host": "brian"}), ("window", {"neuron": "QIF", "window": "round"})):
        torch.save({**torch.load(jelly), **change}, tmp_path / f"{name}.pt")
    for words, message in (
        ([tmp_path / "host.pt"], "unknown host 'brian'; choose from 'spikingjelly', 'snntorch'"),
        ([tmp_path / "window.pt"], "unknown window 'round'; choose from 'isometric'"),
        ([tmp_path / "nowhere"], "does not exist; pass a folder that 'qif exact train' or"),
        ([tmp_path / "text.pt"], "cannot be read as a checkpoint"),
        ([tmp_path / "other.pt"], "not a checkpoint of this package"),
        ([lif, "--points", 12], "--points must be 4n + 1 and at least 13, got 12"),
        ([lif, "--grid", 8], "--grid must be 4n + 1 and at least 9, got 8"),
        ([lif, "--to", jelly], "no line leads from one network to the other"),
        ([lif, "--to", lif, "--directions", 2], "--directions is for random ones"),
    ):
        assert main(["landscape", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["landscape", str(tmp_path / "budget.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "emits more than 1 spikes in one sample; pass a smaller --radius" in capsys.readouterr().err
