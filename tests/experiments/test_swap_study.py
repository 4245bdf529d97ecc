"""The parity study: its networks are both hosts' LIF networks, swapped from equal weights; its table and its tests."""

import json
import math

import pytest
import torch

pytest.importorskip("spikingjelly.activation_based.model.ms_resnet")  # SpikingJelly 2 has it
pytest.importorskip("snntorch")
pytest.importorskip("accelerate")
pytest.importorskip("scipy")

from scipy import stats as scipy_stats

from qif_plugins.cli import main
from qif_plugins.diagnostics.spiking import spiking_layers
from qif_plugins.experiments.records import Records
from qif_plugins.experiments.studies import networks, swap
from qif_plugins.experiments.studies.runner import Options
from qif_plugins.experiments.studies.stats import holm, p_value
from qif_plugins.neuron.module import QIFLayer

pytestmark = pytest.mark.host_independent


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_each_network_is_lif_runs_and_takes_a_gradient(name):
    network = networks.NETWORKS[name]
    torch.manual_seed(0)
    model = network.build()
    layers = spiking_layers(model)
    assert layers
    assert not any(isinstance(layer, QIFLayer) for layer in layers.values())
    x, y, *_ = networks.data(network, 4)
    out = model(network.sequence(x))
    network.loss(out, y).backward()
    assert math.isfinite(network.score(out.detach(), y))
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_there_are_networks_of_every_kind():
    assert len(networks.NETWORKS) >= 20
    assert sum("snnTorch" in name for name in networks.NETWORKS) >= 5


def test_the_study_trains_both_from_equal_weights_and_goes_on_where_it_stopped(tmp_path):
    arguments = ["study", "swap", "--quick", "--out", str(tmp_path), "--arms", "default", "paper"]
    assert main(arguments) == 0
    trials = json.loads((tmp_path / "swap.json").read_text())["trials"]
    assert len(trials) == 6
    by_arm = {(t["setting"]["network"], t["setting"]["arm"]): t["result"] for t in trials}
    for name in swap.QUICK:
        assert by_arm[name, "lif"]["swapped"] == 0
        assert by_arm[name, "default"]["swapped"] == by_arm[name, "paper"]["swapped"] > 0
        assert all(0 <= rate <= 1 for rate in by_arm[name, "default"]["rate"])
    page = (tmp_path / "swap.md").read_text()
    assert all(f"| {name} |" in page for name in swap.QUICK)
    assert "mean over networks" in page
    assert "Command: `qif study swap --quick --arms default paper`" in page
    assert (tmp_path / "swap.png").stat().st_size > 1000
    assert main([*arguments, "--seeds", "2"]) == 0
    again = json.loads((tmp_path / "swap.json").read_text())["trials"]
    assert again[:6] == trials
    assert len(again) == 12
    assert "p (Holm)" in (tmp_path / "swap.md").read_text()


def test_a_swapped_network_starts_from_the_weights_of_its_lif_network(monkeypatch):
    seen = {}
    real = swap._rates

    def rates(model, x):
        parameters = dict(model.named_parameters())
        seen.setdefault(tuple(parameters), []).append([value.detach().clone() for value in parameters.values()])
        return real(model, x)

    monkeypatch.setattr(swap, "_rates", rates)
    setting = {"network": "snnTorch recurrent", "lr": 1e-3, "seed": 3, "epochs": 1, "samples": 32}
    assert swap.run({**setting, "arm": "lif"}) == swap.run({**setting, "arm": "lif"})
    swap.run({**setting, "arm": "default"})
    ((first, _, swapped),) = seen.values()
    assert all(torch.equal(one, other) for one, other in zip(first, swapped, strict=True))


def test_the_plan_covers_seeds_first_and_refuses_unknown_names(tmp_path):
    records = Records(tmp_path / "none.json")
    settings = swap.plan(Options(seeds=2, factors=(1 / 3, 1.0), networks=("VGG, no norm", "rows, recurrent")), records)
    assert [setting["seed"] for setting in settings] == [0] * 8 + [1] * 8
    assert {setting["arm"] for setting in settings} == {"lif", "default"}
    rates = {setting["lr"] for setting in settings}
    assert rates == {network.lr * f for network in (networks.NETWORKS["VGG, no norm"],) for f in (1 / 3, 1.0)}
    with pytest.raises(ValueError, match="VGG, no norm"):
        swap.plan(Options(networks=("VGG",)), records)
    with pytest.raises(ValueError, match="isometric"):
        swap.plan(Options(arms=("quadratic",)), records)


def test_p_values_are_scipys_and_holms_are_those_of_his_procedure():
    first, second = [0.90, 0.91, 0.88, 0.93], [0.92, 0.91, 0.90, 0.96]
    assert p_value(first, second) == pytest.approx(scipy_stats.ttest_rel(second, first).pvalue)
    assert math.isnan(p_value([0.5], [0.6]))
    assert p_value([0.5, 0.5], [0.5, 0.5]) == 1
    # Three hypotheses by hand: 0.01 · 3, then 0.02 · 2, and 0.03 · 1 is not below the one before.
    assert holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([math.nan, 0.6, 0.7])[1:] == pytest.approx([1.0, 1.0])
    assert math.isnan(holm([math.nan, 0.6])[0])
