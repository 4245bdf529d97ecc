"""What holds for the package as a whole: light imports, no host in the core, the layering."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import forked
import pytest
import torch

import qif_plugins

pytestmark = pytest.mark.host_independent

ROOT = Path(__file__).resolve().parent.parent
HOSTS = ("spikingjelly", "snntorch")
HEAVY = (*HOSTS, "numba", "triton", "cupy", "matplotlib", "sklearn", "torchvision")


def run(code):
    done = forked.python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bare(code):
    """As ``run``, in an interpreter that has not imported PyTorch."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout


def test_importing_the_package_imports_no_host_and_no_kernel_compiler():
    code = (
        "import torch, sys; before = set(sys.modules); import qif_plugins; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    imported = ast.literal_eval(run(code))
    assert not set(imported) & set(HEAVY)


def test_importing_the_package_touches_no_gpu():
    assert run("import qif_plugins, torch; print(torch.cuda.is_initialized())").strip() == "False"


@pytest.mark.parametrize("program", ["qif", "/usr/bin/qif", "qif.exe", "-m"])
def test_the_command_does_not_import_torch_with_the_package(program):
    code = f"import sys; sys.argv[0] = {program!r}; import qif_plugins; print('torch' in sys.modules)"
    assert bare(code).strip() == "False"


@pytest.mark.parametrize("imports", ["import qif_plugins, torch", "import torch, qif_plugins"])
def test_a_saved_program_finds_the_operator(imports, tmp_path):
    params, window = qif_plugins.QIFParameters(), qif_plugins.Window(0.5, 1.5)

    class Neurons(torch.nn.Module):
        def forward(self, x_seq):
            return qif_plugins.qif_multi_step(x_seq, 0.0, params, window)

    x = torch.linspace(-2, 2, 20).reshape(4, 5)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(Neurons(), (x,)), path)
    load = f"torch.export.load({str(path)!r}).module()(torch.tensor({x.tolist()}))[0].tolist()"
    assert ast.literal_eval(bare(f"{imports}\nprint({load})")) == Neurons()(x)[0].tolist()


def test_every_name_has_one_home_which_type_checkers_see_too():
    tree = ast.parse((ROOT / "qif_plugins" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {f".{node.module}": tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == qif_plugins._HOMES
    assert sorted(name for names in seen.values() for name in names) == sorted(qif_plugins.__all__)
    for module, names in seen.items():
        for name in names:
            home = import_module(module, "qif_plugins")
            assert getattr(qif_plugins, name) is getattr(home, name)


@pytest.mark.parametrize("name", list(qif_plugins._ADAPTERS))
def test_a_neuron_of_a_host_says_where_it_is(name):
    adapter = f"qif_plugins.adapters.{qif_plugins._ADAPTERS[name]}"
    with pytest.raises(ImportError, match=rf"{name} belongs to a host: from {adapter} import {name}$"):
        exec(f"from qif_plugins import {name}", {})
    try:
        host = import_module(adapter)
    except ImportError:
        pytest.skip("its host is not installed")
    assert name in host.__all__ or name == "MultiStepQIFNode"  # which one version of the host has
    assert set(host.__all__) <= set(qif_plugins._ADAPTERS)


def test_the_module_can_be_inspected():
    assert not hasattr(qif_plugins, "QIFNod")
    assert getattr(qif_plugins, "__wrapped__", None) is None
    assert {name for name, _ in inspect.getmembers(qif_plugins)} >= set(qif_plugins.__all__)
    assert not doctest.testmod(qif_plugins).failed
    with pytest.raises(AttributeError, match="module 'qif_plugins' has no attribute 'QIFNod'"):
        qif_plugins.QIFNod  # noqa: B018


def test_the_package_works_with_neither_host_installed():
    code = f"""
import sys
for name in {HOSTS!r}:
    sys.modules[name] = None
import torch, qif_plugins
s, v = qif_plugins.qif_multi_step(torch.ones(2, 3), 0.0, qif_plugins.QIFParameters(), qif_plugins.Window(0.5, 1.5))
print(int(s.sum()))
"""
    assert run(code).strip() == "6"


@pytest.mark.parametrize("host", HOSTS)
def test_an_adapter_without_its_host_says_what_to_install(host):
    code = f"""
import sys
sys.modules[{host!r}] = None
try:
    import qif_plugins.adapters.{host}
except ImportError as error:
    print(error)
"""
    assert re.match(rf"qif_plugins\.adapters\.{host} needs \w+: pip install", run(code))


LAYERS = [
    "ops",
    "support",
    "neuron",
    "adapters",
    "exact",
    "models",
    "convert",
    "diagnostics",
    "experiments",
    "commands",
]
"""Each layer imports only those before it."""


def modules():
    """``{module: path}`` of the package, the adapters where they are installed."""
    return {
        ".".join(("qif_plugins", *(("adapters",) if folder == "adapters" else ()), *parts[:-1], *last)): path
        for folder in ("qif_plugins", "adapters")
        for path in (ROOT / folder).rglob("*.py")
        for parts in [path.relative_to(ROOT / folder).with_suffix("").parts]
        for last in [() if parts[-1] == "__init__" else parts[-1:]]
    }


def imports(module, path):
    """The modules that a module imports, anywhere in it, by their absolute names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package.rsplit(".", node.level - 1)[0]
            yield from (f"{base}.{node.module}",) if node.module else (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_each_layer_imports_only_those_above_it():
    below = []
    for module, path in modules().items():
        layer = module.split(".")[1:2]
        if not layer or layer[0] not in LAYERS:  # qif_plugins itself and qif_plugins.cli
            continue
        for name in imports(module, path):
            parts = name.split(".")
            if parts[0] == "qif_plugins" and parts[1] in LAYERS and LAYERS.index(parts[1]) > LAYERS.index(layer[0]):
                below.append(f"{module} imports {name}")
    assert not below, "\n".join(below)


def test_neuron_kernels_and_tools_know_no_host():
    with_host = tuple(f"qif_plugins.{layer}" for layer in ("adapters", "models", "convert", "experiments"))
    for module, path in modules().items():
        if not module.startswith(with_host):
            assert not any(name.startswith(HOSTS) for name in imports(module, path)), path


def test_adapters_do_not_import_each_other():
    for module, path in modules().items():
        if module.startswith("qif_plugins.adapters."):
            other = "snntorch" if "spikingjelly" in module else "spikingjelly"
            others = (other, f"qif_plugins.adapters.{other}")
            assert not any(name.startswith(others) for name in imports(module, path)), path


def test_every_folder_is_installed():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("qif_plugins", "adapters")
        for kind in ("__init__.py", "*.toml")
        for path in (ROOT / folder).rglob(kind)
    }
    assert listed == {f"qif_plugins.{name}" if name.startswith("adapters") else name for name in found}


def test_every_module_says_what_it_is():
    for folder in ("qif_plugins", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_docstrings_describe_arguments_that_there_are():
    for folder in ("qif_plugins", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    described = re.search(
                        r"^Args:\n((?:(?: .*)?\n)+)", f"{ast.get_docstring(node) or ''}\n", re.MULTILINE
                    )
                    entries = re.findall(r"^ {4}(\S[^:]*):", described[1] if described else "", re.MULTILINE)
                    of = node.args
                    names = {a.arg for a in (*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg) if a}
                    assert {entry.lstrip("*") for entry in entries} <= names, f"{path}, {node.name}"


def test_the_citation_names_this_version():
    assert f"\nversion: {qif_plugins.__version__}\n" in (ROOT / "CITATION.cff").read_text()
