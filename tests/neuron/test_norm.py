import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qif_plugins.neuron.norm import TDBatchNorm1d, TDBatchNorm2d, TDBatchNorm3d

pytestmark = pytest.mark.host_independent

CASES = [(TDBatchNorm1d, ()), (TDBatchNorm2d, (4, 5)), (TDBatchNorm3d, (2, 3, 4))]


@pytest.mark.parametrize(("norm", "space"), CASES)
@given(threshold=st.floats(0.2, 3), alpha=st.floats(0.3, 1))
def test_the_output_has_the_thresholds_scale_over_time_batch_and_space(norm, space, threshold, alpha):
    x = torch.randn(6, 8, 3, *space) * 4 + 2
    y = norm(3, threshold, alpha)(x).transpose(0, 2).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(1, unbiased=False), torch.full((3,), alpha * threshold), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("norm", "space"), CASES)
def test_it_is_the_plain_batch_norm_of_the_flattened_sequence(norm, space):
    ours = norm(3)
    plain = {(): torch.nn.BatchNorm1d, (4, 5): torch.nn.BatchNorm2d, (2, 3, 4): torch.nn.BatchNorm3d}[space](3)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 3, *space)
    torch.testing.assert_close(ours(x), plain(x.flatten(0, 1)).unflatten(0, (5, 4)))
    ours.eval()
    plain.eval()
    torch.testing.assert_close(ours(x[0]), plain(x[0]))


def test_it_agrees_with_spikingjellys():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    x = torch.randn(5, 4, 3, 6, 6)
    torch.testing.assert_close(
        TDBatchNorm2d(3, v_threshold=0.7, alpha=0.5)(x), layer.ThresholdDependentBatchNorm2d(0.5, 0.7, 3)(x)
    )


def test_bad_input_is_refused():
    for arguments in ({"v_threshold": 0.0}, {"v_threshold": float("nan")}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            TDBatchNorm2d(3, **arguments)
    with pytest.raises(ValueError, match="affine=True"):
        TDBatchNorm2d(3, affine=False)
    with pytest.raises(ValueError, match=r"4 dimensions.*5 with time first"):
        TDBatchNorm2d(3)(torch.zeros(2, 3))
