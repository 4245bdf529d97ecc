"""Which implementation runs, and what is said about it."""

import logging
import sys
import warnings
from types import FunctionType

import forked
import pytest
import torch

from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import Window
from qif_plugins.ops.backends import BACKENDS, available_backends, choose_backend, unavailable_reason

pytestmark = pytest.mark.host_independent

PARAMS = QIFParameters()
WINDOW = Window.unbiased(PARAMS)
CPU = torch.device("cpu")


def fresh(script):
    """What a fresh interpreter prints."""
    done = forked.python(script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numba_is_first_on_a_cpu():
    pytest.importorskip("numba")
    assert available_backends("cpu")[0] == "numba"


def test_the_reference_is_always_there():
    assert available_backends("cpu")[-1] == available_backends("meta")[-1] == "torch"


def test_auto_logs_its_choice_once():
    out = fresh(
        "import logging, sys, torch, qif_plugins as q\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(name)s %(message)s')\n"
        "p = q.QIFParameters()\n"
        "for _ in range(3): q.qif_multi_step(torch.ones(2, 3), 0.0, p, q.Window.unbiased(p))\n"
    )
    lines = [line for line in out.splitlines() if line.startswith("qif_plugins ")]
    assert len(lines) == 1
    assert repr(available_backends("cpu")[0]) in lines[0]


def test_the_logger_is_quiet_by_default():
    assert logging.getLogger("qif_plugins").level == logging.NOTSET


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unavailable_backend_says_what_to_do(backend):
    reason = unavailable_reason(backend, CPU)
    if reason is None:
        assert choose_backend(backend, CPU, torch.float32) == backend
        return
    assert len(reason) > 20
    with pytest.raises(RuntimeError, match=r"Available there: .*'torch'"):
        qif_multi_step(torch.ones(2, 3), 0.0, PARAMS, WINDOW, backend=backend)


def test_numba_says_how_to_install_it():
    """As if it were not installed."""
    out = fresh(
        "import sys; sys.modules['numba'] = None\n"
        "import torch, qif_plugins as q\n"
        "p = q.QIFParameters(); w = q.Window.unbiased(p); x = torch.ones(2, 3)\n"
        "print(q.available_backends('cpu'), q.qif_multi_step(x, 0.0, p, w)[0].sum().item())\n"
        "try: q.qif_multi_step(x, 0.0, p, w, backend='numba')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "('torch',) 6.0" in out
    assert "pip install 'qif-plugins[cpu]'" in out


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"unknown backend 'fast'.*'numba'"):
        qif_multi_step(torch.ones(2, 3), 0.0, PARAMS, WINDOW, backend="fast")


def test_float64_runs_on_the_reference():
    x = torch.ones(2, 3, dtype=torch.float64)
    assert choose_backend("auto", CPU, x.dtype) == "torch"
    for backend in available_backends("cpu")[:-1]:
        with pytest.raises(ValueError, match="float64"):
            qif_multi_step(x, 0.0, PARAMS, WINDOW, backend=backend)


def test_a_surrogate_without_kernel_gives_one_notice():
    def mine(x):
        return (x >= 0).to(x.dtype)

    class Mine:
        def __call__(self, x):
            return (x >= 0).to(x.dtype)

    for surrogate in (mine, Mine()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                qif_multi_step(torch.ones(2, 3), 0.0, PARAMS, surrogate)
        (warning,) = caught
        assert "no fused kernel" in str(warning.message)
        assert getattr(surrogate, "__qualname__", "Mine") in str(warning.message)


def test_importing_the_package_loads_no_backend():
    out = fresh(
        "import sys, qif_plugins\nprint([m for m in ('numba', 'triton', 'cupy', 'torch._dynamo') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_nothing_depends_on_a_global_that_torchdynamo_may_overwrite():
    """Tracing in PyTorch 2.4 leaves the value where a function that is marked as constant had been, by its own name."""
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] == "qif_plugins"]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, FunctionType)]
    assert any("choose_backend" in function.__code__.co_names for function in functions)
    assert not [function for function in functions if hasattr(function, "_dynamo_marked_constant")]
