"""``qif bench``: every peer runs, the file is complete, and bad input is refused before anything runs."""

import importlib
import importlib.util
import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from qif_plugins.cli import main
from qif_plugins.experiments.bench.harness import format_case, measure
from qif_plugins.experiments.bench.machine import machine_name
from qif_plugins.experiments.bench.network_table import compared
from qif_plugins.experiments.bench.old_host import OldHost, OldRunner
from qif_plugins.experiments.bench.peers import (
    FLOOR_NEW,
    FLOOR_THERE,
    FLOORS,
    OURS,
    PEERS,
    draw,
    moved_bytes,
    peers_for,
)
from qif_plugins.experiments.bench.runner import PASSES, Runner

pytestmark = pytest.mark.host_independent

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def runner(name, steps, neurons):
    return Runner(name, *draw(steps, neurons, torch.float32, CPU))


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
    arguments += ["--leave-out", "qif, reference", "--minutes", "1e-9", "--out", str(out)]
    assert main(arguments) == 0
    assert "1 cases are left" in capsys.readouterr().out
    (first,) = json.loads(out.read_text())["cases"]
    assert OURS in first["peers"]
    assert "qif, reference" not in first["peers"]
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


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {"name": 1}, "cases": []}'])
def test_another_file_is_not_resumed(content, tmp_path, capsys):
    out = tmp_path / "other.json"
    out.write_text(content)
    assert main(["bench", "--size", "2x16", "--resume", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(out) in message
    assert "--out" in message
    assert out.read_text() == content


def test_our_own_failure_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(device):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(PEERS, OURS, refuse)
    out = tmp_path / "results.json"
    assert main(["bench", "--size", "2x16", "--dtypes", "float32", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "T = 2, N = 16, float32 on cpu: RuntimeError: out of memory" in message
    assert not out.exists()


def test_every_peer_of_an_installed_host_runs():
    pytest.importorskip("spikingjelly")
    pytest.importorskip("snntorch")
    names = peers_for(CPU, ("spikingjelly", "snntorch"))
    assert len(names) == 9
    for name in names:
        times = runner(name, 2, 16).repeat()
        assert list(times) == ["call"]
        assert set(times["call"]) == set(PASSES)


def test_flex_runs_our_equations():
    """SpikingJelly's FlexSN is measured on GPUs; its equations are ours everywhere."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    if not hasattr(neuron, "FlexSN"):
        pytest.skip("this SpikingJelly has no FlexSN")
    x = torch.randn(6, 200)
    ours = PEERS[OURS](CPU)(x)
    assert torch.equal(PEERS["SpikingJelly FlexSN, our equations"](CPU)(x), ours)


def test_peak_memory_is_what_is_allocated():
    """Spikes, h and the gradient are held at the end of backward."""
    size = 4 * 50_000 * 4
    assert 3 * size <= runner(OURS, 4, 50_000).peak_bytes() < 3.3 * size
    for floor in FLOORS:
        assert runner(floor, 4, 50_000).peak_bytes() == 3 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floors_copy_into_old_and_into_new_memory(dtype):
    x, _ = draw(2, 3000, dtype, CPU)
    new, there = PEERS[FLOOR_NEW](CPU), PEERS[FLOOR_THERE](CPU)
    first, second = (new(x), there(x)), (new(x), there(x))
    for copies in (*first, *second):
        assert len(copies) == 3
        assert all(torch.equal(copy, x) for copy in copies)
    addresses = [[copy.data_ptr() for copies in run for copy in copies] for run in (first, second)]
    assert not set(addresses[0][:3]) & set(addresses[1][:3])
    assert addresses[0][3:] == addresses[1][3:]


def test_bytes_that_must_move():
    """In float32 ours moves what three copies move, and the last membrane; in bfloat16 h stays in float32."""
    per_step = {torch.float32: (24, 24), torch.bfloat16: (12, 16)}
    for dtype, (floor, ours) in per_step.items():
        x = torch.zeros(5, 7, dtype=dtype)
        assert moved_bytes(FLOOR_THERE, x) == moved_bytes(FLOOR_NEW, x) == 35 * floor
        assert moved_bytes(OURS, x) == moved_bytes("qif, cupy", x) == 35 * ours + 7 * x.element_size()
        assert moved_bytes("snnTorch Leaky", x) is None


def test_a_peer_that_cannot_run_says_why(monkeypatch):
    def refuse(device):
        raise NotImplementedError("not on\nthis device")

    monkeypatch.setitem(PEERS, "qif, reference", refuse)
    case = measure(2, 16, torch.float32, CPU, (), seconds=0.01)
    assert case["peers"]["qif, reference"] == {"error": "NotImplementedError: not on this device"}
    assert "not on this device" in format_case(case)


@pytest.fixture
def tiny_network(monkeypatch):
    """A network of two layers and two time steps, under the name ``"tiny"``."""
    pytest.importorskip("snntorch")
    if not hasattr(pytest.importorskip("spikingjelly.activation_based.neuron"), "FlexSN"):
        pytest.skip("the networks are SpikingJelly 2's")
    published = importlib.import_module("qif_plugins.experiments.studies.networks")
    networks = importlib.import_module("qif_plugins.experiments.bench.networks")
    network = published.Network(lambda: published.plain(2, 64, 8), published.repeated(2, 64), batch=3)
    monkeypatch.setitem(networks.NETWORKS, "tiny", (64, network, "ms"))
    return networks


def test_whole_networks(tiny_network, tmp_path, capsys):
    out = tmp_path / "networks.json"
    arguments = ["bench", "--networks", "tiny", "--eager", "--seconds", "0.01", "--out", str(out)]
    assert main([*arguments, "--dtypes", "float32", "--minutes", "1e-9"]) == 0
    assert "1 cases are left" in capsys.readouterr().out
    assert main([*arguments, "--dtypes", "float32", "bfloat16", "--resume"]) == 0
    cases = json.loads(out.read_text())["networks"]
    assert [(case["step_mode"], case["dtype"]) for case in cases] == [
        ("m", "float32"), ("s", "float32"), ("m", "bfloat16"), ("s", "bfloat16"),
    ]  # fmt: skip
    for case in cases:
        assert case["input"] == [2, 3, 64]
        assert case["repeats"] >= 3
        assert list(case["peers"]) == ["lif", "qif", "identity"]
        assert all(peer["seconds"] > 0 and peer["peak_bytes"] > 0 for peer in case["peers"].values()), case
        assert len(case["ratio"]) == 3
    assert capsys.readouterr().out.count("2 × 3 × 64") == 3


def test_the_peers_of_a_network_differ_in_their_neurons_alone(tiny_network):
    case = tiny_network.Case("tiny", "s", "float32", False, 3)
    steps = {name: make() for name, make in tiny_network.peers(case, CPU)[1].items()}
    kinds = {name: [type(module).__name__ for module in step.model] for name, step in steps.items()}
    assert kinds == {name: ["Linear", neuron, "Linear"] for name, neuron in
                     (("lif", "LIFNode"), ("qif", "QIFNode"), ("identity", "Identity"))}  # fmt: skip
    weights = [[weight.clone() for weight in step.model.parameters()] for step in steps.values()]
    assert all(map(torch.equal, weights[0] * 2, [*weights[1], *weights[2]]))
    for index, step in enumerate(steps.values()):  # each trains weights of its own
        assert all(map(torch.equal, weights[index], step.model.parameters()))
        step()
        assert not all(map(torch.equal, weights[index], step.model.parameters()))


def test_share_of_the_neurons():
    """QIF's time over the floor as a part of LIF's; none where LIF is as fast as the floor."""
    times = {"lif": [5.0, 6.0, 7.0], "qif": [2.0, 3.0, 4.0], "identity": [1.0, 2.0, 3.0]}
    assert compared(times) == {"ratio": [1.875, 2.0, 2.25], "share": [0.25, 0.25, 0.25]}
    assert compared({**times, "identity": times["lif"]})["share"] is None
    assert compared({"qif": [1.0]}) == {"ratio": None, "share": None}


def test_a_second_version_of_a_host():
    folder = Path(sys.prefix) / "spikingjelly-0.0.0.0.14"
    if not folder.is_dir():
        pytest.skip(f"no second SpikingJelly in {folder}")
    old = OldHost(folder)
    try:
        assert old.version == "0.0.0.0.14"
        case = measure(2, 16, torch.float32, CPU, (), old, seconds=0.01)
        with pytest.raises(RuntimeError, match="no such thing"):
            OldRunner(old, "no such thing", 1, 1, torch.float32, CPU)
        old.forget()
        lif, qif = (
            OldRunner(old, name, 2, 1000, torch.float32, CPU)
            for name in ("SpikingJelly LIFNode", "SpikingJelly's own QIFNode")
        )
        assert lif.peak_bytes() < qif.peak_bytes()  # each stays itself beside the other
        assert set(lif.repeat()["call"]) == set(PASSES)
        (process,) = multiprocessing.active_children()
    finally:
        old.close()
    assert case["peers"]["SpikingJelly LIFNode, 0.0.0.0.14"]["both"]["seconds"] > 0
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4,2"], "TxN"),
        (["--size", "0x5"], "TxN"),
        (["--device", "nowhere"], "nowhere"),
        (["--size", "1x8", "--old-spikingjelly", "nowhere"], "--no-deps spikingjelly==0.0.0.0.14"),
        (["--size", "4x8", "--most", "8"], "--most"),
        (["--size", "1x8", "--leave-out", "qif"], "--leave-out 'qif'"),
        (["--networks", "--size", "1x8"], "--size"),
        (["--size", "1x8", "--eager"], "--networks"),
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


def test_report_judges_a_gpu_by_bytes_and_by_both_clocks():
    """The table from a file such as a GPU leaves, with numbers that are easy to divide."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)

    def peer(call, device, queued=1.0, **more):
        passes = {"seconds": call, "ratio": call, "device_seconds": device, "device_ratio": device, "queued": queued}
        return {"peak_bytes": 8, **dict.fromkeys(PASSES, passes), **more}

    case = {"T": 1, "N": 2**22, "dtype": "bfloat16", "repeats": 3}
    case["peers"] = {
        FLOOR_THERE: peer(0.9, 0.6, moved_bytes=12),
        OURS: peer(1.0, 1.0, moved_bytes=18),
        "SpikingJelly LIFNode": peer(3.0, 0.5, queued=0.0),
        "SpikingJelly FlexSN, our equations": {"error": "ImportError: none"},
    }
    machine = {"device": "cuda", "gpu": "A card", "name": "a-card", "load": None, "system": "", "python": ""}
    results = {"machine": {**machine, "versions": {}}, "cases": [case], "date": "", "command": ""}
    page = report.page(results, Path("figure.png"))
    assert "| 0.90 | T = 1, N = 4194304 | ≥ 0.85 | met at all 1 sizes |" in page
    assert "| call time | 3.00 | T = 1, N = 4194304 | ≥ 1.00 | met at all 1 sizes |" in page
    assert "| device time | 0.50 | T = 1, N = 4194304 | ≥ 1.00 | missed at 1 of 1 sizes |" in page
    assert "| peak memory | 1.00 | T = 1, N = 4194304 | > 1.00 | missed at 1 of 1 sizes |" in page
    assert "SpikingJelly LIFNode at T = 1, N = 4194304, bfloat16 (0% queued in time)" in page
    assert "device ms" in format_case(case)
