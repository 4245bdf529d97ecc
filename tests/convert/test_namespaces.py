"""Registration in the hosts, on whatever versions are installed."""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from types import ModuleType

import forked
import pytest
import torch

import qif_plugins
from qif_plugins.convert import namespaces as registration

HOSTS = [host for host in ("spikingjelly", "snntorch") if importlib.util.find_spec(host) is not None]
pytestmark = pytest.mark.skipif(not HOSTS, reason="no host is installed")


@pytest.fixture(autouse=True)
def _clean():
    qif_plugins.unregister()
    registration._warned.clear()
    yield
    qif_plugins.unregister()
    registration._warned.clear()


def names(module):
    """A module's names; submodules appear among them whenever somebody imports one."""
    return {name: value for name, value in vars(module).items() if not isinstance(value, ModuleType)}


def snapshot():
    """Every table that registration may write to."""
    tables = {}
    if "spikingjelly" in HOSTS:
        from spikingjelly.activation_based import neuron

        tables["neuron"] = names(neuron)
        vision = "spikingjelly.activation_based.distributed.vision.config"
        if importlib.util.find_spec("spikingjelly.activation_based.distributed") is not None:
            config = importlib.import_module(vision)
            tables["neurons"], tables["surrogates"] = dict(config._NEURON_REGISTRY), dict(config._SURROGATE_REGISTRY)
    if "snntorch" in HOSTS:
        import snntorch

        tables["snntorch"] = names(snntorch)
    return tables


def test_publishes_and_is_undone_exactly():
    before = snapshot()
    qif_plugins.register()
    once = snapshot()
    qif_plugins.register()
    assert snapshot() == once != before
    if "spikingjelly" in HOSTS:
        from qif_plugins.adapters.spikingjelly import QIFNode
        from spikingjelly.activation_based import neuron

        assert neuron.AnalyticQIFNode is QIFNode
        assert neuron.QIFNode is not QIFNode  # SpikingJelly's own, never shadowed
    if "snntorch" in HOSTS:
        import snntorch
        from qif_plugins.adapters.snntorch import QIF

        assert snntorch.QIF is QIF
    qif_plugins.unregister()
    assert snapshot() == before
    qif_plugins.unregister()
    assert snapshot() == before


@pytest.mark.parametrize("host", HOSTS)
def test_one_host_alone(host):
    before = snapshot()
    qif_plugins.register(host)
    mine = {"spikingjelly": {"neuron", "neurons", "surrogates"}, "snntorch": {"snntorch"}}[host]
    assert {name for name, table in snapshot().items() if table != before[name]} == mine & before.keys()


def test_a_name_of_the_host_is_never_shadowed(monkeypatch):
    snntorch = pytest.importorskip("snntorch")
    theirs = object()
    monkeypatch.setattr(snntorch, "QIF", theirs, raising=False)
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"snntorch\.QIF exists already"):
        qif_plugins.register()
    assert snapshot() == before
    assert snntorch.QIF is theirs


def test_what_somebody_else_registered_stays(monkeypatch):
    snntorch = pytest.importorskip("snntorch")
    from qif_plugins.adapters.snntorch import QIF

    monkeypatch.setattr(snntorch, "QIF", QIF, raising=False)
    qif_plugins.register()
    qif_plugins.unregister()
    assert snntorch.QIF is QIF


def test_a_missing_interface_is_refused_by_name_before_anything_changes(monkeypatch):
    snntorch = pytest.importorskip("snntorch")
    monkeypatch.delattr(snntorch.SpikingNeuron, "instances")
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"snntorch.*lacks.*snntorch\.SpikingNeuron\.instances"):
        qif_plugins.register()
    assert snapshot() == before


def test_a_missing_argument_is_refused_by_name(monkeypatch):
    snntorch = pytest.importorskip("snntorch")

    class Leaky(snntorch.Leaky):
        def __init__(self, beta, threshold=1.0):
            super().__init__(beta, threshold)

    monkeypatch.setattr(snntorch, "Leaky", Leaky)
    with pytest.raises(RuntimeError, match=r"snntorch\.Leaky\(\.\.\., spike_grad\)"):
        qif_plugins.register()


def test_a_missing_module_is_refused_by_name(monkeypatch):
    pytest.importorskip("spikingjelly")
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based.functional", None)
    with pytest.raises(RuntimeError, match=r"spikingjelly\.activation_based\.functional"):
        qif_plugins.register()


@pytest.mark.parametrize("host", HOSTS)
def test_a_newer_version_warns_once(host, monkeypatch):
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0.1rc1" if name == host else installed(name))
    with pytest.warns(UserWarning, match=rf"{host} 99\.0\.1rc1 is newer than"):
        qif_plugins.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qif_plugins.register()


def test_tested_versions_do_not_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is newer than")
        qif_plugins.register()


def test_unknown_and_absent_hosts(monkeypatch):
    with pytest.raises(ValueError, match="choose from 'spikingjelly', 'snntorch'"):
        qif_plugins.register("norse")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    either = r"pip install 'qif-plugins\[spikingjelly\]' or pip install 'qif-plugins\[snntorch\]'"
    with pytest.raises(ModuleNotFoundError, match=either):
        qif_plugins.register()
    with pytest.raises(ModuleNotFoundError, match=r"snntorch is not installed"):
        qif_plugins.register("snntorch")


def test_importing_the_package_imports_no_host():
    code = (
        "import sys, qif_plugins; qif_plugins.register; "
        "assert not {'spikingjelly', 'snntorch'} & sys.modules.keys(), 'a host was imported'"
    )
    done = forked.python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "class_path",
    [
        "qif_plugins.adapters.spikingjelly.QIFNode",
        "spikingjelly.activation_based.neuron.AnalyticQIFNode",
    ],
)
def test_spikingjelly_builds_models_from_configurations_that_name_it(class_path):
    vision = pytest.importorskip("spikingjelly.activation_based.distributed.vision", exc_type=ImportError)
    from qif_plugins.adapters.spikingjelly import QIFNode
    from spikingjelly.activation_based.model import sew_resnet

    def build():
        config = sew_resnet.SEWResNet34Config(neuron_config=vision.NeuronConfig(class_path, {"v_threshold": 0.5}))
        model, *_ = sew_resnet.SEWResNet34Builder(config).build(
            process_group=None,
            memopt_process_group=None,
            pipeline_rank=0,
            pipeline_size=1,
            pipeline_microbatches=1,
            device=torch.device("cpu"),
            micro_batch_size=1,
            memopt_level=0,
            memopt_compress_inputs=False,
            memopt_checkpoint_budget="balanced",
        )
        return model

    with pytest.raises(ValueError, match="Unregistered neuron class"):
        build()
    qif_plugins.register("spikingjelly")
    nodes = [module for module in build().modules() if isinstance(module, QIFNode)]
    assert nodes
    assert {node.v_threshold for node in nodes} == {0.5}
