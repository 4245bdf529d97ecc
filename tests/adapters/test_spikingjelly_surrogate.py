"""AnalyticWindow as a surrogate module of the host, in its LIFNode and in its CUDA kernels."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("spikingjelly")

from qif_plugins.adapters import spikingjelly as adapter
from qif_plugins.adapters.spikingjelly import AnalyticGaussian, AnalyticWindow, QIFNode
from spikingjelly.activation_based import functional, neuron, surrogate

from qif_plugins import QIFParameters, swap
from qif_plugins.neuron.surrogate import Gaussian, Window

OLD = hasattr(AnalyticWindow, "cuda_codes")
needs_cuda_codes = pytest.mark.skipif(not OLD, reason="this SpikingJelly's kernels take no CUDA text of a surrogate")


@pytest.mark.parametrize("name", ["unbiased", "paper", "heuristic"])
def test_built_from_a_neuron_it_is_the_window_relative_to_the_threshold(name):
    params = QIFParameters(v_threshold=0.8)
    window = Window.named(name, params)
    mine = getattr(AnalyticWindow, name)(params)
    assert (mine.lo, mine.hi, mine.height) == (window.lo - 0.8, window.hi - 0.8, window.height)
    back = mine.window(0.8)
    assert (back.lo, back.hi, back.height) == pytest.approx((window.lo, window.hi, window.height), rel=1e-15)


def test_options_are_passed_on():
    params = QIFParameters()
    wide = AnalyticWindow.unbiased(params, input_std=0.5, kappa=1.0)
    assert wide.hi == pytest.approx(Window.unbiased(params, 0.5, kappa=1.0).hi - 1)
    assert AnalyticWindow.heuristic(params, alpha=2.0).hi == 1.0


@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_bad_ends_are_refused(ends):
    with pytest.raises(ValueError, match="lo < hi"):
        AnalyticWindow(*ends)


def test_it_is_a_surrogate_module_of_the_host():
    bases = (surrogate.SurrogateFunctionBase, *([surrogate.MultiArgsSurrogateFunctionBase] if OLD else []))
    mine = AnalyticWindow(-0.25, 0.5, 2.0)
    assert isinstance(mine, bases)
    assert repr(mine) == "AnalyticWindow(lo=-0.25, hi=0.5, height=2, spiking=True)"
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert repr(other) == repr(mine)


def test_forward_and_both_gradients():
    mine = AnalyticWindow(-0.25, 0.5, 2.0)
    x = torch.tensor([-1.0, -0.25, -0.1, 0.0, 0.5, 0.6], requires_grad=True)
    expected = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0, 0.0])
    out = mine(x)
    assert out.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    mine.set_spiking_mode(False)
    out = mine(x)
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.3, 0.5, 1.5, 1.5]))
    inside = torch.tensor([True, False, True, True, False, True])  # the kinks have no derivative
    integrated = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(integrated[inside], expected[inside]), "the primitive function integrates the window"


def test_spiking_and_primitive_function_have_the_same_gradient():
    """What the host's check_manual_grad prints, without the two kinks."""
    mine = AnalyticWindow(-0.3, 0.6, 0.7)
    arguments = {"lo": mine.lo, "hi": mine.hi, "height": mine.height}
    x = torch.linspace(-2, 2, 1000)
    x = x[((x + 0.3).abs() > 1e-3) & ((x - 0.6).abs() > 1e-3)].requires_grad_()
    manual, automatic = (
        torch.autograd.grad(function(x, **arguments).sum(), x)[0]
        for function in (mine.spiking_function, mine.primitive_function)
    )
    assert torch.equal(manual, automatic)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_in_the_hosts_lif_node(step_mode):
    """The host has a rectangle of its own, PiecewiseLeakyReLU with c = 0; its height differs between versions."""
    rectangle = surrogate.PiecewiseLeakyReLU(w=0.5, c=0.0)
    centre = torch.zeros((), requires_grad=True)
    (height,) = torch.autograd.grad(rectangle(centre), centre)
    x = torch.randn(5, 4, 3) * 2
    gradients = []
    for chosen in (AnalyticWindow(-0.5, 0.5, height.item()), rectangle):
        node = neuron.LIFNode(surrogate_function=chosen, step_mode=step_mode)
        step = x.clone().requires_grad_()
        out = node(step) if step_mode == "m" else torch.stack([node(s) for s in step])
        gradients.append(torch.autograd.grad((out * torch.arange(5.0).view(5, 1, 1)).sum(), step)[0])
        functional.reset_net(node)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "derived"), [(AnalyticWindow, Window.unbiased), (AnalyticGaussian, Gaussian.isometric)]
)
def test_without_arguments_it_is_the_one_of_the_papers_parameters(kind, derived):
    params = QIFParameters()
    assert kind().window(params.v_threshold).coefficients() == pytest.approx(derived(params).coefficients())
    assert kind(spiking=False).spiking is False


@pytest.mark.parametrize(
    ("kind", "arguments", "missing"),
    [
        (AnalyticWindow, {"lo": -0.5}, "hi must be passed with lo"),
        (AnalyticWindow, {"hi": 0.5, "height": 2.0}, "lo must be passed with hi, height"),
        (AnalyticWindow, {"height": 2.0}, "lo and hi must be passed with height"),
        (AnalyticGaussian, {"height": 2.0}, "width must be passed with height"),
    ],
    ids=str,
)
def test_a_surrogate_that_is_given_in_part_is_refused(kind, arguments, missing):
    with pytest.raises(ValueError, match=missing):
        kind(**arguments)


# -- the Gaussian ---------------------------------------------------------------------------------


def test_the_gaussian_is_that_of_the_neuron_and_a_surrogate_module():
    params = QIFParameters(v_threshold=0.8)
    mine, core = AnalyticGaussian.isometric(params), Gaussian.isometric(params)
    assert isinstance(mine, surrogate.MultiArgsSurrogateFunctionBase if OLD else surrogate.SurrogateFunctionBase)
    assert mine.window(0.8) == core
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert repr(other) == repr(mine)
    with pytest.raises(ValueError, match="width"):
        AnalyticGaussian(1.0, 0.0)


def test_the_gaussian_has_one_gradient_in_both_modes():
    mine = AnalyticGaussian(0.7, 0.4)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    spikes = mine(x)
    assert spikes.tolist() == [float(value >= 0) for value in x.tolist()]
    gradient = torch.autograd.grad(spikes.sum(), x)[0]
    torch.testing.assert_close(gradient, 0.7 * torch.exp(-0.5 * (x.detach() / 0.4) ** 2))
    mine.set_spiking_mode(False)
    torch.testing.assert_close(torch.autograd.grad(mine(x).sum(), x)[0], gradient)


def test_the_gaussian_in_the_hosts_lif_node_is_the_hosts_own_erf():
    mine, theirs = AnalyticGaussian(2 / math.pi**0.5, 1 / 8**0.5), surrogate.Erf(2.0)
    gradients = []
    for chosen in (mine, theirs):
        x = torch.linspace(-1, 3, 20, requires_grad=True)
        gradients.append(torch.autograd.grad(neuron.LIFNode(surrogate_function=chosen)(x).sum(), x)[0])
    torch.testing.assert_close(*gradients)


# -- CUDA text ------------------------------------------------------------------------------------


@needs_cuda_codes
def test_cuda_text_for_float_and_half2():
    mine = AnalyticWindow(-0.25, 1e-05, 2.0)
    assert mine.cuda_codes("const float g", "a - b", "float") == (
        "const float g = ((a - b) >= -0.25f && (a - b) <= 1e-05f) ? 2.0f : 0.0f;"
    )
    half = mine.cuda_codes("const half2 g", "x", "half2")
    for part in ("__hge2(x, __float2half2_rn(-0.25f))", "__hle2(x, __float2half2_rn(1e-05f))", "const half2 g ="):
        assert part in half
    assert mine.cuda_code(x="x", y="g", dtype="fp32") == mine.cuda_codes("const float g", "x", "float")
    assert mine.cuda_code(x="x", y="g", dtype="fp16") == mine.cuda_codes("const half2 g", "x", "half2")
    with pytest.raises(NotImplementedError, match="'float'"):
        mine.cuda_codes("g", "x", "double")


@needs_cuda_codes
def test_cuda_text_computes_the_window():
    """The float statement is C, and its conditional expression becomes Python by two substitutions."""
    mine = AnalyticWindow(-0.25, 0.5, 2.0)
    text = mine.cuda_codes("g", "x", "float").removesuffix(";").replace("f)", ")").replace("f :", " :")
    condition, values = text.removeprefix("g = ").split(" ? ")
    inside, outside = values.removesuffix("f").split(" : ")
    x = torch.tensor([-1.0, -0.25, 0.0, 0.5, 0.7], requires_grad=True)
    expected = torch.autograd.grad(mine(x).sum(), x)[0].tolist()
    python = condition.replace("&&", "and").replace("f and", " and").replace("-0.25f", "-0.25")
    got = [float(inside) if eval(python, {"x": value}) else float(outside) for value in x.tolist()]
    assert got == expected


@needs_cuda_codes
@pytest.mark.parametrize("kind", ["AnalyticWindow", "AnalyticGaussian"])
@pytest.mark.parametrize("dtype", ["float", "half2"])
@pytest.mark.parametrize("hard_reset", [True, False])
def test_the_hosts_kernels_compile_with_it(dtype, hard_reset, kind):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    from spikingjelly.activation_based.auto_cuda import neuron_kernel

    kernel = neuron_kernel.LIFNodeBPTTKernel(
        decay_input=True, surrogate_function=getattr(adapter, kind).isometric(QIFParameters()).cuda_codes,
        hard_reset=hard_reset, detach_reset=False, dtype=dtype,
    )  # fmt: skip
    compile_with_nvrtc(nvrtc, kernel.full_codes)


@needs_cuda_codes
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_kernels_of_clock_driven_compile_with_it(dtype, monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    pytest.importorskip("cupy")
    from qif_plugins.adapters.spikingjelly.clock_driven import AnalyticWindow as Older
    from spikingjelly.clock_driven import neuron_kernel

    kernel = neuron_kernel.MultiStepLIFNodePTT.create_bptt_kernel(
        Older.unbiased(QIFParameters()).cuda_code, True, True, False, dtype
    )
    compile_with_nvrtc(nvrtc, kernel.code)


def compile_with_nvrtc(nvrtc, source):
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [b"--gpu-architecture=compute_80", *(f"--include-path={path}".encode() for path in cuda_headers())]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(max(size, 2))  # written into: Python shares bytes objects of length 1 with everybody
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()


def cuda_headers():
    nvidia = pytest.importorskip("nvidia")
    found = {path.parent for root in nvidia.__path__ for path in Path(root).glob("*/include/cuda_fp16.h")}
    if not found:
        pytest.skip("the CUDA headers (cuda_fp16.h) are not installed")
    return sorted(found)


@pytest.mark.parametrize("beside", [{"offset": 0.3}, {"offset": torch.tensor([0.0, 0.3])}, {"strict": True}])
def test_a_gaussian_beside_the_threshold_is_refused_with_the_way_to_use_it(beside):
    given = Gaussian(0.5, 0.4, **beside)
    with pytest.raises(ValueError, match=r"has its peak at the threshold.*surrogate_function=Gaussian"):
        AnalyticGaussian.from_window(given, 1.0)
    with pytest.raises(TypeError, match="also a Gaussian, as surrogate_function"):
        QIFNode(window=given)
    with pytest.raises(ValueError, match="also a Gaussian, as surrogate_function"):
        swap(torch.nn.Sequential(torch.nn.Linear(2, 2), neuron.LIFNode(), torch.nn.Linear(2, 2)), window=given)
    x = torch.linspace(0.0, 2.0, 6).reshape(3, 2).requires_grad_()
    QIFNode(surrogate_function=given)(x).sum().backward()
    torch.testing.assert_close(x.grad, given.derivative(x.detach(), 1.0))
