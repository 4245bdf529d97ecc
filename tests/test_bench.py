"""``qif bench``: every peer runs, the file is complete, and bad input is refused before anything runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from qif_plugins.bench import PASSES, format_case, machine_name, measure
from qif_plugins.bench_peers import FLOOR, OURS, PEERS, OldHost, Runner, peers_for
from qif_plugins.cli import main
from qif_plugins.ops import memory

pytestmark = pytest.mark.host_independent

CPU = torch.device("cpu")


def test_results_file(tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    arguments = ["bench", "--size", "2x64", "--size", "3x32", "--dtypes", "float32", "bfloat16"]
    assert main([*arguments, "--seconds", "0.1", "--most", "100", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    assert [(case["T"], case["N"], case["dtype"]) for case in results["cases"]] == [
        (3, 32, "float32"),
        (3, 32, "bfloat16"),
    ]
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["machine"]["versions"]["torch"].startswith("2")
    for case in results["cases"]:
        assert case["repeats"] >= 3
        for name, peer in case["peers"].items():
            assert "error" not in peer, (name, peer)
            assert all(peer[which]["seconds"] > 0 for which in PASSES)
        assert case["peers"][OURS]["both"]["ratio"] == 1
    assert "T = 3, N = 32, bfloat16" in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "results.json"
    arguments = ["bench", "--size", "2x16", "--size", "2x32", "--dtypes", "float32", "--seconds", "0.01"]
    arguments += ["--minutes", "1e-9", "--out", str(out)]
    assert main(arguments) == 0
    assert "1 cases are left" in capsys.readouterr().out
    (first,) = json.loads(out.read_text())["cases"]
    assert main([*arguments, "--resume"]) == 0
    assert "left" not in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["cases"][0] == first
    assert [case["N"] for case in results["cases"]] == [16, 32]
    results["machine"]["versions"]["torch"] = "1.0"
    out.write_text(json.dumps(results))
    assert main([*arguments, "--resume"]) == 2
    assert "leave out --resume" in capsys.readouterr().err
    assert json.loads(out.read_text()) == results


def test_every_peer_of_an_installed_host_runs():
    pytest.importorskip("spikingjelly")
    pytest.importorskip("snntorch")
    names = peers_for(CPU, ("spikingjelly", "snntorch"))
    assert len(names) == 8
    for name in names:
        times = Runner(name, 2, 16, torch.float32, CPU).repeat()
        assert set(times) == set(PASSES)


def test_flex_runs_our_equations():
    """SpikingJelly's FlexSN is measured on GPUs; its equations are ours everywhere."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    if not hasattr(neuron, "FlexSN"):
        pytest.skip("this SpikingJelly has no FlexSN")
    x = torch.randn(6, 200)
    ours = PEERS[OURS](CPU)(x)
    assert torch.equal(PEERS["SpikingJelly FlexSN, our equations"](CPU)(x), ours)


def test_peak_memory_is_what_is_allocated():
    """Spikes and h are held at the end of backward, the gradient in the latter where none needs it any more."""
    size = 4 * 50_000 * 4
    tensors = 2 if memory._keeps_graph is not None and memory._shows_hooks else 3
    assert tensors * size <= Runner(OURS, 4, 50_000, torch.float32, CPU).peak_bytes() < (tensors + 0.3) * size
    assert Runner(FLOOR, 4, 50_000, torch.float32, CPU).peak_bytes() == 3 * size


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    def refuse(device):
        raise NotImplementedError("not on\nthis device")

    monkeypatch.setitem(PEERS, "qif, reference", refuse)
    case = measure(2, 16, torch.float32, CPU, (), seconds=0.01)
    assert case["peers"]["qif, reference"] == {"error": "NotImplementedError: not on this device"}
    assert "not on this device" in format_case(case)


def test_a_second_version_of_a_host():
    folder = Path(sys.prefix) / "spikingjelly-0.0.0.0.14"
    if not folder.is_dir():
        pytest.skip(f"no second SpikingJelly in {folder}")
    old = OldHost(folder)
    try:
        assert old.version == "0.0.0.0.14"
        case = measure(2, 16, torch.float32, CPU, (), old, seconds=0.01)
        with pytest.raises(RuntimeError, match="no such thing"):
            old.ask(peer="no such thing", T=1, N=1, dtype="float32", device="cpu")
    finally:
        old.close()
    assert case["peers"]["SpikingJelly LIFNode, 0.0.0.0.14"]["both"]["seconds"] > 0
    assert old.process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4,2"], "TxN"),
        (["--size", "0x5"], "TxN"),
        (["--device", "nowhere"], "nowhere"),
        (["--size", "1x8", "--old-spikingjelly", "nowhere"], "pip install --target"),
        (["--size", "4x8", "--most", "8"], "--most"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["bench", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_machine_name_is_a_file_name():
    name = machine_name(CPU)
    assert name == name.lower()
    assert name.replace("-", "").isalnum()
