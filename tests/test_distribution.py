"""The source distribution and the wheel: built from the tracked files, and used without the checkout."""

import itertools
import os
import subprocess
import sys
import tarfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import qif_plugins

pytestmark = pytest.mark.host_independent

ROOT = Path(__file__).resolve().parent.parent


def run(*words, folder, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution of the tracked files, and the wheel that is built of it, both without the network."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    folder = tmp_path_factory.mktemp("built")
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).exists():
            copy = folder / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
    run("-c", build, "sdist", folder, folder=folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    run("-c", build, "wheel", folder, folder=unpacked)
    (wheel,) = folder.glob("*.whl")
    return folder / "tree", unpacked, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-index", "--no-deps", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *options, "--target", folder, built[2], folder=folder)
    return folder


def bare(installed, *words):
    """Run Python with the wheel and the packages that it needs; ``-S`` leaves out the links to the checkout."""
    packages = dict.fromkeys(str(metadata.distribution(name).locate_file("")) for name in ("torch", "numpy"))
    paths = os.pathsep.join([str(installed), *packages])
    return run("-S", *words, folder=installed, PYTHONPATH=paths)


def test_the_source_distribution_is_complete(built):
    tree, unpacked, _ = built
    tracked = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    there = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked - there <= {Path(".gitignore")}


def test_the_wheel_holds_modules_kernels_configurations_and_types(built, installed):
    tree, package = built[0], installed / "qif_plugins"
    for source, target in ((tree / "qif_plugins", package), (tree / "adapters", package / "adapters")):
        expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        assert {path for path in expected if not (target / path).is_file()} == set()
    assert {".py", ".cu", ".toml"} <= {path.suffix for path in package.rglob("*")}
    assert (package / "py.typed").is_file()
    assert sorted(path.name for path in installed.iterdir() if path.is_dir()) == [
        "bin", "qif_plugins", f"qif_plugins-{qif_plugins.__version__}.dist-info",
    ]  # fmt: skip


def test_the_command_runs_from_the_wheel(installed):
    assert bare(installed, installed / "bin" / "qif", "--version") == f"qif-plugins {qif_plugins.__version__}\n"


def test_the_adapters_run_from_the_wheel(installed):
    hosts = [host for host in ("snntorch", "spikingjelly") if find_spec(host)]
    code = "".join(f"import qif_plugins.adapters.{host} as {host}\n" for host in hosts)
    code += (
        "import torch, qif_plugins\n"
        "x, window = torch.ones(2, 3), qif_plugins.Window(0.5, 1.5)\n"
        "spikes, _ = qif_plugins.qif_multi_step(x, 0.0, qif_plugins.QIFParameters(), window)\n"
        f"print(int(spikes.sum()), *({', '.join([*hosts, 'qif_plugins'])}), sep='\\n')"
    )
    spikes, *modules = bare(installed, "-c", code).splitlines()[-len(hosts) - 2 :]
    assert spikes == "6"
    assert all(f"from '{installed / 'qif_plugins'}" in module for module in modules)


def test_the_package_index_accepts_what_the_wheel_says(installed):
    (info,) = installed.glob("*.dist-info")
    found = Metadata.from_email((info / "METADATA").read_bytes(), validate=True)
    assert str(found.version) == qif_plugins.__version__
    assert found.author == "qif-plugins developers"
    assert found.license_expression == "Apache-2.0"
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(found.project_urls)
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text()


RIGHT = """
import torch

from qif_plugins import QIFParameters, Window, membrane_moments, qif_multi_step, qif_step, swap
from qif_plugins.adapters.snntorch import QIF
from qif_plugins.adapters.spikingjelly import QIFNode

params = QIFParameters(reset="hard")
window = Window.named("paper", params, closure="free")
spikes, v = qif_multi_step(torch.ones(2, 3), 0.0, params, window, backend="numba")
spike, v, h = qif_step(torch.ones(3), v, params, Window.paper(params, closure="free"), store_h=True)
mean, std = membrane_moments(params, 1.0, closure="free")
spikes, v_seq, h_seq = qif_multi_step(torch.ones(2, 3), 0.0, params, window, store_v_seq=True, store_h_seq=True)
model = torch.nn.Sequential(QIFNode(dynamics="lif", window="paper", step_mode="m", backend="torch"))
layer = QIF(beta=0.9, window="heuristic", reset_mechanism="zero")
spike, mem = layer(torch.ones(3))
spike, mem = layer(torch.ones(3), mem)
spike_seq = QIFNode(step_mode="m")(torch.ones(2, 3))
report = swap(model, dynamics="lif", window="keep", norm="tdbn", readout="swap", to="lif")
"""
WRONG = (
    'QIFParameters(reset="sotf")',
    "QIFParameters(v_treshold=1.0)",
    'Window.named("papr", params)',
    'Window.paper(params, closure="fre")',
    'membrane_moments(params, 1.0, closure="fre")',
    'qif_multi_step(torch.ones(2, 3), 0.0, params, window, backend="numab")',
    "qif_step(torch.ones(3), 0.0, params, window, store_v=True)",
    "qif_step(torch.ones(3), 0.0, params, window).sum()",
    "spike, v = qif_step(torch.ones(3), 0.0, params, window, store_h=True)",
    "spikes, v, h_seq = qif_multi_step(torch.ones(2, 3), 0.0, params, window)",
    "QIFNode()()",
    "layer(torch.ones(3), state=torch.ones(3))",
    'QIFNode(dynamics="LIF")',
    'QIFNode(window="papr")',
    'QIFNode(step_mode="x")',
    'QIFNode(windov="paper")',
    'QIFNode(backend="numab")',
    'QIF(beta=0.9, window="papr")',
    'QIF(beta=0.9, reset_mechanism="zeros")',
    'QIF(beta=0.9, dynamics="LIF")',
    'QIF(beta=0.9, backend="numab")',
    'swap(model, window="papr")',
    'swap(model, dynamics="LIF")',
    'swap(model, norm="tdBN")',
    "from qif_plugins import swop",
    "from qif_plugins import QIFNode as Node",
)
"""Lines that a type checker refuses, after those above."""
MYPY = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,numpy.*,spikingjelly.*,snntorch.*]
follow_imports = skip
ignore_missing_imports = true
"""
"""A user's settings; without PyTorch and the hosts, which take minutes to check and are not ours."""


def test_a_type_checker_finds_misspelled_names(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(RIGHT + "\n".join(WRONG))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(installed)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    first = RIGHT.count("\n") + 1
    refused = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error:" in line]
    found = [place for place, _ in itertools.groupby(refused)]  # one line may have two errors
    assert found == [["wrong.py", str(first + number)] for number in range(len(WRONG))], done.stdout
