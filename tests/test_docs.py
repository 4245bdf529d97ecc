"""Python blocks of README.md, CONTRIBUTING.md and docs/ run in order, one namespace a page; links resolve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python(?P<flags>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<target>[^)#]+)")


def name(page):
    return str(page.relative_to(ROOT))


# Pages show what the warning is given for.
@pytest.mark.filterwarnings("ignore::qif_plugins.diagnostics.calibration.CalibrationWarning")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    blocks = list(BLOCK.finditer(page.read_text()))
    if not blocks:
        pytest.skip("no Python block on this page")
    needs = re.search(r"<!-- needs: (.*?) -->", page.read_text())
    for requirement in needs.group(1).split(",") if needs else ():
        _require(requirement.strip())
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        line = page.read_text()[: block.start("code")].count("\n")
        # Padded, so that a traceback points at the line of the page.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@pytest.mark.host_independent
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    missing = [t for t in LINK.findall(page.read_text()) if not (page.parent / t.strip()).exists()]
    assert not missing


def _require(requirement):
    """``module`` must import; ``spikingjelly 2`` and ``spikingjelly 0`` name the host's major version besides."""
    module, _, major = requirement.partition(" ")
    pytest.importorskip(module)
    if major:
        from importlib.metadata import version

        import spikingjelly

        # The older host is put in front on the path; its own files say which one was imported.
        old = (Path(spikingjelly.__file__).parent / "clock_driven").exists()
        found = "0" if old else version("spikingjelly").partition(".")[0]
        if found != major:
            pytest.skip(f"this page is for {module} {major}, and {found} is imported")
