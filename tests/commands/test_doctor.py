"""`qif doctor` on this machine."""

import importlib.metadata

import pytest
import torch

from qif_plugins import available_backends
from qif_plugins.cli import main
from qif_plugins.ops import shortcuts
from qif_plugins.ops.backends import BACKENDS, unavailable_reason
from qif_plugins.ops.shortcuts.memory import uses_huge_pages
from qif_plugins.ops.shortcuts.openmp import uses_openmp


@pytest.fixture(scope="module")
def report():
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = main(["doctor"])
    return status, shown.getvalue()


def test_this_machine_is_usable(report):
    status, shown = report
    assert status == 0
    assert shown.endswith("\nusable\n")


def test_versions(report):
    lines = {line.split()[0]: line for line in report[1].split("backends on")[0].splitlines()[:7]}
    assert torch.__version__ in lines["torch"]
    for host in ("spikingjelly", "snntorch"):
        try:
            expected = importlib.metadata.version(host)
        except importlib.metadata.PackageNotFoundError:
            expected = f"pip install 'qif-plugins[{host}]'"
        assert expected in lines[host]


def test_shortcuts_and_how_to_turn_them_off(report):
    (line,) = [line for line in report[1].splitlines() if line.startswith("shortcuts")]
    on = {name for name in ("past PyTorch's dispatcher", "PyTorch's own threads", "huge pages") if name in line}
    if not shortcuts.ENABLED:
        assert line.split(maxsplit=1)[1] == "off by QIF_PLUGINS_SHORTCUTS=0"
        return
    assert line.endswith("; QIF_PLUGINS_SHORTCUTS=0 turns them off")
    assert ("huge pages" in on) == uses_huge_pages()
    assert ("PyTorch's own threads" in on) == uses_openmp()


def test_every_backend_runs_or_says_why(report):
    section = report[1].split("backends on cpu, best first\n")[1].split("\n\n")[0]
    lines = {line.split()[0]: line for line in section.splitlines()}
    assert list(lines) == list(BACKENDS)
    for name, line in lines.items():
        reason = unavailable_reason(name, torch.device("cpu"))
        assert line.split(maxsplit=1)[1] == (f"not here: {reason}" if reason else "ok, bits of the reference")
        assert (reason is None) == (name in available_backends("cpu"))
