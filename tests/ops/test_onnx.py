"""What ONNX exporters get instead of the operator: the same bits, by PyTorch's own operators and by ONNX Runtime."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qif_plugins import QIFParameters, Window, qif_multi_step
from qif_plugins.ops.contract import Kind
from qif_plugins.ops.unfused import composed_multi_step

pytestmark = pytest.mark.host_independent

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def parameters(reset, spread):
    """Numbers, or a tensor a channel of each but one."""
    if not spread:
        return QIFParameters(a=0.3, u1=-0.1, u2=0.6, v_threshold=1.1, v_reset=-0.2, input_gain=0.9, reset=reset)
    centres = {"a": 0.3, "u1": 0.0, "u2": 0.5, "v_threshold": 1.0, "v_reset": -0.1}
    spread_numbers = {name: centre + 0.1 * torch.randn(5, 1) for name, centre in centres.items()}
    return QIFParameters(**spread_numbers, input_gain=0.9, reset=reset)


def inputs(dtype, steps, specials):
    x = torch.randn(steps, 2, 5, 3, dtype=dtype) * 2
    if specials:
        for value in (float("nan"), float("inf"), -float("inf"), 1.1, -0.0):
            x.flatten()[torch.randint(x.numel(), (3,))] = value
    return x


@given(
    seed=st.integers(0, 2**31), reset=st.sampled_from(("hard", "soft")), spread=st.booleans(), pre_reset=st.booleans(),
    dtype=st.sampled_from(DTYPES), state=st.booleans(), steps=st.integers(1, 6), specials=st.booleans(),
)  # fmt: skip
def test_the_composition_has_the_bits_of_the_reference(seed, reset, spread, pre_reset, dtype, state, steps, specials):
    torch.manual_seed(seed)
    params, x = parameters(reset, spread), inputs(dtype, steps, specials)
    v = torch.randn(2, 5, 3, dtype=dtype) if state else 0.25
    window = Window.heuristic(parameters(reset, False))
    expected = qif_multi_step(
        x, v, params, window, store_v_seq=True, backend="torch", store_h_seq=True, pre_reset=pre_reset
    )
    kind = Kind(reset == "soft", False, window.strict, window.shape, pre_reset)
    found = composed_multi_step(x, v, list(params.numbers().values()), kind)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=0, atol=0, equal_nan=True)


class Neuron(torch.nn.Module):
    """Spikes and membranes, from a membrane that is an input, too."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x_seq, v):
        return qif_multi_step(x_seq, v, self.params, Window.heuristic(QIFParameters()), store_v_seq=True)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("reset", "spread"), [("hard", False), ("soft", True)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_runtime_has_the_same_bits(reset, spread, dtype, dynamo, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Neuron(parameters(reset, spread))
    x, v = inputs(dtype, 4, specials=False), torch.randn(2, 5, 3, dtype=dtype)
    path = str(tmp_path / "neuron.onnx")
    torch.onnx.export(model, (x, v), path, input_names=["x_seq", "v"], dynamo=dynamo, verbose=False)
    found = runtime.InferenceSession(path).run(None, {"x_seq": x.numpy(), "v": v.numpy()})
    for mine, theirs in zip(found, model(x, v), strict=True):
        assert torch.equal(torch.from_numpy(mine), theirs)
    assert 0.05 < found[0].mean() < 0.95
