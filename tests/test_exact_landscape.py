"""Lines, planes and the numbers for how fragmented they are."""

import argparse
import json
import math

import pytest
import torch

from qif_plugins.exact import LIFLayer, QIFLayer, Spikes, command, initialise
from qif_plugins.exact.landscape import Line, along, classify_jumps, fragmentation, random_direction, surface

pytestmark = pytest.mark.host_independent


def line(loss, slope):
    positions = torch.linspace(-1, 1, 401, dtype=torch.float64)
    return Line(positions, loss(positions), slope(positions))


def test_numbers_tell_smooth_kinked_and_broken_lines_apart():
    smooth = fragmentation(line(lambda x: (3 * x).sin(), lambda x: 3 * (3 * x).cos()))
    # A kink and a jump at 0.0012, off the grid.
    kinked = fragmentation(line(lambda x: (x - 0.0012).abs(), lambda x: (x - 0.0012).sign()))
    broken = fragmentation(line(lambda x: x + 0.5 * (x > 0.0012), torch.ones_like))
    assert smooth["jump_ratio"] < 0.03
    assert smooth["angle"] < 0.1
    assert 0.1 < kinked["jump_ratio"] < 0.6
    assert broken["jump_ratio"] == pytest.approx(1)
    assert broken["jump"] == pytest.approx(0.5)
    noisy = fragmentation(line(lambda x: x + 0.1 * (100 * x).sin(), torch.ones_like))
    assert noisy["variation_ratio"] > 2
    assert noisy["angle"] > 45
    with pytest.raises(ValueError, match="too few"):
        fragmentation(Line(*(torch.linspace(0, 1, 9),) * 3))


def test_directions_have_the_norms_of_the_rows():
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    for drawn, parameter in zip(random_direction(network, 0), network.parameters(), strict=True):
        assert drawn.shape == parameter.shape
        assert torch.allclose(drawn.norm(dim=-1), parameter.norm(dim=-1))
    assert not torch.equal(random_direction(network, 0)[0], random_direction(network, 1)[0])


def test_any_module_and_loss_will_do_and_is_left_as_it_was():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    before = [p.clone() for p in network.parameters()]
    directions = [random_direction(network, 0), random_direction(network, 1)]
    grid = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def loss():
        return network(x).square().mean()

    measured = along(network, loss, directions[0], grid)
    values, slopes = surface(network, loss, *directions, grid)
    assert torch.allclose(values[:, 2], measured.loss)
    assert torch.allclose(slopes[:, 2, 0], measured.slope)
    # A parabola: Simpson's rule holds exactly, and the middle is the network as it is.
    assert torch.allclose((measured.loss[4] - measured.loss[0]) / 2, measured.slope[2])
    assert torch.allclose(measured.loss[2], loss())
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("layer", [LIFLayer, QIFLayer])
def test_the_landscape_of_lif_jumps_and_that_of_qif_does_not(layer):
    torch.manual_seed(0)
    network = torch.nn.Sequential(layer(10, 8, 4.0), layer(8, 2, 4.0))
    times = (torch.rand(1, 30, dtype=torch.float64) * 3).sort(1)[0]
    inputs = Spikes(times, torch.randint(0, 10, (1, 30)), 10)
    initialise(network, inputs, rate=2.0)
    direction = random_direction(network, 0)
    measured = along(
        network, lambda: network(inputs).first().sum(), direction, torch.linspace(-0.5, 0.5, 401, dtype=torch.float64)
    )
    numbers = fragmentation(measured)
    jumps = classify_jumps(network, inputs, direction, measured, smallest=1e-2)
    if layer is QIFLayer:
        assert numbers["jump_ratio"] < 0.5
        assert numbers["jump"] < 1e-2
        assert sum(jumps.values()) == 0
    else:
        assert numbers["jump_ratio"] > 0.9
        assert numbers["jump"] > 1e-2
        assert jumps["number of spikes"] + jumps["order of spikes"] > 0


def test_the_command_draws_and_writes(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for neuron in ("lif", "qif"):
        words = f"train --neuron {neuron} --hidden 5 --epochs 0 --limit 20 --out {tmp_path / neuron}"
        assert command.run(parser.parse_args(words.split())) == 0
    words = f"landscape {tmp_path / 'lif'} {tmp_path / 'qif'} --samples 4 --points 21 --grid 3 --out {tmp_path / 'out'}"
    assert command.run(parser.parse_args(words.split())) == 0
    assert "(qif): " in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "landscape.json").read_text())["runs"]
    assert all(math.isfinite(numbers[str(tmp_path / neuron)]["batch"]["jump"]) for neuron in ("lif", "qif"))
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 0
