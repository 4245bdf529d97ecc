"""Batches in an order that depends on the seed and the epoch alone.

The samples of a batch depend neither on the number of processes, nor on worker processes, nor on where a run was
interrupted: batch i of an epoch can be requested without the batches before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def seed_of(*numbers: int) -> int:
    """Combine numbers into a seed in [0, 2^63) that depends on each number and its position (SplitMix64, chained)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Batches:
    """Batches of a data set of known size, epoch after epoch.

    Args:
        count: Samples in the data set, at least 1.
        fetch: Called with the indices of a batch's samples (int64 ``[b]``) and the epoch; returns the batch, of any
            type.
        batch_size: Samples a batch over all processes, at least 1; the last one of an epoch may have fewer.
        shuffle: Whether each epoch has an order of its own. Default True.
        seed: Seed of that order. Default 0.
        drop_last: Whether to leave out a last batch that is not full. Default False.

    Raises:
        ValueError: ``count`` or ``batch_size`` below 1, or nothing left after ``drop_last``.
    """

    def __init__(
        self, count: int, fetch: Callable[[Tensor, int], Any], batch_size: int, *, shuffle: bool = True, seed: int = 0,
        drop_last: bool = False,
    ) -> None:  # fmt: skip
        if count < 1 or batch_size < 1:
            raise ValueError(f"count and batch_size must be at least 1, got {count} and {batch_size}")
        if drop_last and count < batch_size:
            raise ValueError(
                f"drop_last leaves nothing: {count} samples do not fill one batch of {batch_size}; lower batch_size"
            )
        self.count, self.fetch, self.batch_size = count, fetch, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last

    @classmethod
    def of(cls, *tensors: Tensor, batch_size: int, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> Any:
        """Make batches of tensors in memory that share their first dimension; a batch is a tuple of their rows."""
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"tensors of one length are needed, got lengths {sorted(lengths)}")

        def fetch(indices: Tensor, epoch: int) -> tuple[Tensor, ...]:
            return tuple(tensor[indices] for tensor in tensors)

        return cls(lengths.pop(), fetch, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def size(self, batch: int) -> int:
        """Number of samples in batch number ``batch``, over all processes."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def epoch(self, epoch: int, first: int = 0, process: int = 0, processes: int = 1) -> Iterator[Any]:
        """Yield the batches of an epoch, or one process's share of each.

        Args:
            epoch: Number of the epoch, from 0.
            first: The first batch to make. Default 0.
            process: Number of the share. Default 0.
            processes: Number of shares. A batch is cut into consecutive shares that differ by one sample at most; a
                share without samples is ``None``. Default 1.
        """
        for indices in self.indices(epoch, first, process, processes):
            yield self.fetch(indices, epoch) if len(indices) else None

    def order(self, epoch: int) -> Tensor:
        """Return the indices of all samples in the order of an epoch, int64 ``[count]``."""
        if not self.shuffle:
            return torch.arange(self.count, device="cpu")
        generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.count, generator=generator, device="cpu")

    def indices(self, epoch: int, first: int = 0, process: int = 0, processes: int = 1) -> Iterator[Tensor]:
        """Yield the indices of the samples that :meth:`epoch` fetches, one batch at a time."""
        order = self.order(epoch)
        for batch in range(first, len(self)):
            start = batch * self.batch_size
            indices = order[start : start + self.batch_size]
            yield indices if processes == 1 else indices.tensor_split(processes)[process]
