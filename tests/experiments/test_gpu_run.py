"""benchmarks/gpu.py and gpu_kernels.py without a GPU: the plan, the paper, the rehearsal, and the machine code."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_kernels
import pytest
import torch

from qif_plugins import QIFParameters, Window, qif_multi_step
from qif_plugins.experiments.bench.peers import OURS, moved_bytes
from qif_plugins.ops import torch_backend
from qif_plugins.ops.contract import Shape

pytestmark = pytest.mark.host_independent

NEEDS = {"machine": 20, "short": 40, "long": 300, "wrong": 10, "last": 500}
"""Seconds that each part of a pretended run takes altogether."""


class Pretended:
    """A run whose parts only let the clock go on; each continues where it stopped."""

    def __init__(self):
        self.now, self.worked, self.turns, self.results = 0.0, dict.fromkeys(NEEDS, 0.0), [], {"parts": {}}

    def execute(self, part, limit):
        taken = min(limit, NEEDS[part.name] - self.worked[part.name])
        self.now += taken
        self.worked[part.name] += taken
        self.turns.append((part.name, round(taken)))
        missing = self.worked[part.name] < NEEDS[part.name]
        return {"status": "out of time" if missing else "failed" if part.name == "wrong" else "done"}

    def run(self, minutes):
        began, self.turns = self.now, []
        todo = [gpu.Part(name, 60, [], "tests") for name in NEEDS]
        gpu.run(todo, self.results, minutes, self.execute, clock=lambda: self.now)
        assert self.now - began <= 60 * minutes
        return self.turns


def test_every_part_has_its_turn_and_the_rest_goes_to_those_that_lack_time():
    pretended = Pretended()
    first = pretended.run(8)
    assert first[:5] == [("machine", 20), ("short", 40), ("long", 60), ("wrong", 10), ("last", 60)]
    assert first[5:] == [("long", 240), ("last", 50)]
    assert pretended.results["parts"]["last"] == {"status": "out of time"}
    pretended.worked["machine"] = pretended.worked["wrong"] = 0.0
    assert pretended.run(8) == [("machine", 20), ("wrong", 10), ("last", 60), ("last", 330)]
    assert pretended.results["parts"]["last"] == {"status": "done"}


def test_no_part_begins_with_less_than_five_seconds():
    assert Pretended().run(1 / 15) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_paper_are_those_of_the_tensors_that_the_kernels_get(dtype, monkeypatch):
    """Each tensor is read or written once."""
    counted = {}

    def count(name, kernel):
        def counting(*args):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            counted.setdefault(name, []).append(sum(tensor.nbytes for tensor in tensors))
            return kernel(*args)

        monkeypatch.setattr(torch_backend, name, counting)

    count("forward", torch_backend.forward)
    count("backward", torch_backend.backward)
    x = torch.zeros(5, 7, dtype=dtype, requires_grad=True)
    spikes, _ = qif_multi_step(x, 0.0, QIFParameters(), Window(0.5, 1.5), backend="torch")
    spikes.sum().backward()
    paper = gpu.bytes_and_launches(5, 7, dtype.itemsize)
    assert {name: (sum(each), len(each)) for name, each in counted.items()} == paper
    assert sum(count for count, _ in paper.values()) == moved_bytes(OURS, x)


def test_a_miss_shows():
    passes = {"forward": {"device_seconds": 50e-6}, "backward": {"device_seconds": 80e-6}, "both": {}}
    lines = gpu.predictions([{"T": 4, "N": 2**22, "dtype": "float32", "peers": {"qif": passes}}], "triton")
    assert "| 4, 4194304, float32 | triton | forward | 1 | 218 | 53.7 | 50.0 | 0.93 |  |" in lines
    assert "| 4, 4194304, float32 | triton | backward | 1 | 201 | 49.8 | 80.0 | 1.61 | miss |" in lines


def test_rehearsal_of_the_kernels_from_the_command_to_the_page(tmp_path):
    """Interpreted and emulated, in a process of its own as on a card; then again, with nothing left to do."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--rehearse", "--only", "kernels", "--minutes", "30", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    results = json.loads(out.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    if lacking := [row["why"] for row in results["tests"].values() if "numpy<2.4" in row["why"]]:
        pytest.skip(lacking[0])
    outcomes = {name.rpartition("::")[2]: row["outcome"] for name, row in results["tests"].items()}
    wanted = {f"test_short_list[{backend}-{shape.name}]" for backend in ("triton", "cupy", "torch") for shape in Shape}
    assert outcomes == dict.fromkeys(wanted, "passed")
    page = out.with_suffix(".md").read_text()
    assert "| kernels against the reference | done |" in page
    assert "Tests, all tests: 15 passed, 0 failed, 0 skipped." in page
    out.write_text(json.dumps(results | {"sources": "others"}))
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert again.returncode != 0
    assert "other sources" in again.stderr


def test_rehearsal_of_whole_networks(tmp_path):
    pytest.importorskip("snntorch")
    if not hasattr(pytest.importorskip("spikingjelly.activation_based.neuron"), "FlexSN"):
        pytest.skip("the networks are SpikingJelly 2's")
    out = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--rehearse", "--only", "whole networks", "--minutes", "30"]
    command += ["--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    assert [case["step_mode"] for case in json.loads(out.read_text())["networks"]] == ["m", "s"]
    assert out.with_suffix(".md").read_text().count("| recurrent | 28 × 2 × 28 |") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_code_for_sm_90_spills_nothing_and_reads_wide(dtype):
    pytest.importorskip("triton")
    pytest.importorskip("cupy")
    width = 32 * dtype.itemsize
    for backend, shape, binary in gpu_kernels.machine_code((None, Shape.GAUSSIAN), dtype, 90):
        kernel = gpu_kernels.read(binary)
        assert kernel.spills == 0, (backend, shape)
        assert kernel.registers <= 64, (backend, shape)  # four blocks of 256 threads a multiprocessor
        expected = [[width], sorted([width, 128])] if shape is None else [sorted([width, 128]), [width]]
        assert [sorted(map(int, bits)) for bits in (kernel.loads, kernel.stores)] == expected, (backend, shape)


def test_the_page_in_results_is_of_these_kernels():
    page = Path(gpu_kernels.__file__).parent / "results" / "kernels-sm90.md"
    assert page.read_text().count("\n| Triton | ") == page.read_text().count("\n| CUDA | ") == 3 * (1 + len(Shape))
