"""Batch norm with statistics over all processes, on any device.

PyTorch's ``SyncBatchNorm`` runs on GPUs only and would take a sequence's second dimension, the batch, for channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...neuron.norm import TDBatchNorm1d, TDBatchNorm2d, TDBatchNorm3d


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make every tdBN of a model, in place, compute its training statistics over all processes.

    The modules keep their parameters, buffers and ``state_dict``. A training step needs two small all-reduces per norm
    in each direction.

    Raises:
        ValueError: The model has batch norms of another kind.
    """
    for name, module in model.named_modules():
        if type(module) in _KINDS:
            module.__class__ = _KINDS[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, _Synchronized):
            raise ValueError(
                f"training.sync_batch_norm synchronizes the norms of qif_plugins.models, and {name!r} is a "
                f"{type(module).__name__}; use torch.nn.SyncBatchNorm.convert_sync_batchnorm on GPUs"
            )
    return model


class _Synchronized(nn.modules.batchnorm._BatchNorm):
    _spatial_dims: int

    def forward(self, input: Tensor) -> Tensor:
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        x = input.flatten(0, 1) if input.dim() == self._spatial_dims + 3 else input
        wide = x if x.dtype == torch.float64 else x.float()
        others = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        totals = all_reduce(torch.cat([wide.sum(others), wide.new_tensor([x.numel() / x.shape[1]])]))
        count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().sum(others)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * (variance + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype).view(input.shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _Synchronized1d(_Synchronized, TDBatchNorm1d):
    pass


class _Synchronized2d(_Synchronized, TDBatchNorm2d):
    pass


class _Synchronized3d(_Synchronized, TDBatchNorm3d):
    pass


_KINDS: dict[type, type] = {
    TDBatchNorm1d: _Synchronized1d,
    TDBatchNorm2d: _Synchronized2d,
    TDBatchNorm3d: _Synchronized3d,
}
