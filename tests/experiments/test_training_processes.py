"""Runs that are killed and resumed, and runs of two processes, against runs of one process left alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.host_independent

pytest.importorskip("accelerate")
pytest.importorskip("spikingjelly")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

DRIVER = Path(__file__).parents[1] / "helpers" / "training_processes.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(DRIVER), str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"folder": folder, "stderr": done.stderr, **json.loads((folder / "report.json").read_text())}


def checkpoint(report, run, name="last.pt"):
    return torch.load(report["folder"] / run / name, weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_every_run_ended_as_it_should(report):
    kill, term = -9, 128 + 15
    assert report["killed"] == {"whole": 0, "ends": [kill, kill, kill, kill, term, kill], "finished": 0}
    assert "saving after this step" in report["stderr"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_one_left_alone(report, name):
    whole, killed = checkpoint(report, "whole", name), checkpoint(report, "killed", name)
    for part in ("model", "optimizer", "scheduler", "random", "epoch", "step"):
        assert same(whole["state"][part], killed["state"][part]), part
    assert timeless(whole["state"]["history"]) == timeless(killed["state"]["history"])
    assert whole["config"] == killed["config"]


def test_a_killed_save_leaves_no_rest(report):
    files = {path.name for path in (report["folder"] / "killed").iterdir()}
    assert files == {"best.pt", "last.pt", "history.json"}


def test_two_processes_have_the_losses_of_one(report):
    assert (report["one"], report["two"]) == ([0], [0, 0])
    one, two = (
        timeless(json.loads((report["folder"] / f"of-{count}" / "history.json").read_text())) for count in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-5), name


def test_synchronized_batch_norm_has_the_statistics_of_one_process(report):
    one, two = (json.loads((report["folder"] / f"double-{count}.json").read_text()) for count in (1, 2))
    assert len(one["steps"]) == 18
    for part in ("steps", "history"):
        for a, b in zip(one[part], two[part], strict=True):
            assert a.keys() == b.keys()
            for name in a:
                # A step's means travel between processes in float32.
                near = 1e-9 if name.startswith("test") else 1e-6
                assert math.isclose(a[name], b[name], rel_tol=near, abs_tol=near), (part, name)
