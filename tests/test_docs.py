"""What README.md, CONTRIBUTING.md and docs/ say: their code runs, their links resolve, the reference is complete."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python(?P<flags>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<target>[^)#]+)")
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))
OWN_LINK = re.compile(
    r"https://(?:github\.com/qif-plugins/qif-plugins/(?:blob|tree)|raw\.githubusercontent\.com/qif-plugins/qif-plugins)"
    r"/main/(?P<target>[^)#\s]+)"
)
ENTRY = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)
PUBLIC = (
    "qif_plugins",
    "qif_plugins.adapters.snntorch",
    "qif_plugins.adapters.spikingjelly",
    "qif_plugins.convert",
    "qif_plugins.diagnostics.calibration",
    "qif_plugins.diagnostics.energy.costs",
    "qif_plugins.diagnostics.energy.counting",
    "qif_plugins.diagnostics.health",
    "qif_plugins.diagnostics.spiking",
    "qif_plugins.exact",
    "qif_plugins.experiments.data.spikingjelly",
    "qif_plugins.experiments.landscape",
    "qif_plugins.experiments.training",
    "qif_plugins.models",
    "qif_plugins.neuron.norm",
)
"""Modules all of whose names stand in the reference."""
ONE_HOST = {"qif_plugins.adapters.spikingjelly.clock_driven.MultiStepQIFNode"}
"""Entries that import with one version of the host alone."""


def name(page):
    return str(page.relative_to(ROOT))


# Pages show what the warning is given for.
@pytest.mark.filterwarnings("ignore::qif_plugins.diagnostics.calibration.CalibrationWarning")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    blocks = list(BLOCK.finditer(page.read_text()))
    if not blocks:
        pytest.skip("no Python block on this page")
    _require_all(page.read_text())
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        line = page.read_text()[: block.start("code")].count("\n")
        # Padded, so that a traceback points at the line of the page.
        exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)


@pytest.mark.host_independent
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_example_runs(example, tmp_path, monkeypatch):
    """The cells of a notebook, in one namespace; they print and draw, and what they state they compute."""
    cells = json.loads(example.read_text())["cells"]
    _require_all("".join(cells[0]["source"]))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{example.name}, cell {number}", "exec"), namespace)


@pytest.mark.host_independent
@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=name)
def test_links_resolve(page):
    text = page.read_text()
    missing = [t for t in LINK.findall(text) if not (page.parent / t.strip()).exists()]
    missing += [t for t in OWN_LINK.findall(text) if not (ROOT / t).exists()]
    assert not missing


def test_links_of_the_readme_are_absolute():
    """The package index shows README.md, without the files beside it."""
    assert not LINK.findall((ROOT / "README.md").read_text())


@pytest.mark.host_independent
def test_comparison_is_the_same_in_the_readme_and_on_its_page():
    readme, page = (
        [line for line in path.read_text().splitlines() if line.startswith(("| SpikingJelly | ", "| snnTorch | "))]
        for path in (ROOT / "README.md", ROOT / "docs" / "lif-and-qif.md")
    )
    assert readme == page != []


@pytest.mark.host_independent
def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:adapters|benchmarks|docs|ops|qif_plugins|tests)/[^`*]*)`", text)
    assert named
    assert not [path for path in named if not any((folder / path).exists() for folder in (ROOT, ROOT / "qif_plugins"))]


def test_every_public_name_is_in_the_reference_once():
    entries = [path for page in sorted((ROOT / "docs" / "reference").glob("*.md")) for path in _entries(page)]
    elsewhere = [path for page in PAGES if page.parent.name != "reference" for path in _entries(page)]
    assert not elsewhere, "entries of the reference stand in docs/reference"
    documented = [id(_named(path)) for path in entries if path not in ONE_HOST or _imports(path)]
    assert len(set(documented)) == len(documented), "a name stands in the reference twice"
    missing = [
        f"{module}.{name}"
        for module in PUBLIC
        for name in import_module(module).__all__
        if id(getattr(import_module(module), name)) not in documented
    ]
    assert not missing, "add '::: NAME' to a page of docs/reference"


@pytest.mark.host_independent
def test_docstrings_describe_one_argument_an_entry():
    """The reference shows an entry such as ``a, b: ...`` as one argument of that name."""
    paths = [path for folder in ("qif_plugins", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))]
    joined = [f"{name(path)}: {entry}" for path in paths for entry in _entries_of_docstrings(path) if "," in entry]
    assert not joined


def _entries(page):
    return ENTRY.findall(page.read_text())


def _imports(path):
    try:
        _named(path)
    except ImportError:
        return False
    return True


def _named(path):
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


def _entries_of_docstrings(path):
    """What stands before the colon of each entry of the sections Args, Attributes and Raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        section = False
        for line in (ast.get_docstring(node) or "").splitlines():
            if line and not line.startswith(" "):
                section = line in ("Args:", "Attributes:", "Raises:")
            elif section and re.match(r"    \S", line):
                yield line.partition(":")[0].strip()


def _require_all(text):
    needs = re.search(r"<!-- needs: (.*?) -->", text)
    for requirement in needs.group(1).split(",") if needs else ():
        _require(requirement.strip())


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
