"""Turn a batch norm into tdBN in place.

A trained norm keeps its weight, bias and statistics bit for bit: its weight counts as tdBN's λ α θ with some λ. A norm
that has never seen a batch gets tdBN's initial weight: its own (1, or 0 where a residual branch starts silent) times
α θ. A checkpoint can therefore be loaded before or after the swap, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron.norm import TDBatchNorm1d, TDBatchNorm2d, TDBatchNorm3d, _TDBatchNorm
from .find import Survey
from .hosts import Host
from .rebuild import undoing
from .report import Row


class TokenTDBatchNorm1d(TDBatchNorm1d):
    """tdBN that reads three-dimensional input as ``[N, C, L]``, as :class:`torch.nn.BatchNorm1d` does.

    :class:`~qif_plugins.neuron.norm.TDBatchNorm1d` reads it as ``[T, N, C]``.
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim

    def forward(self, input: Tensor) -> Tensor:
        return nn.modules.batchnorm._BatchNorm.forward(self, input)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: TokenTDBatchNorm1d,
    nn.BatchNorm2d: TDBatchNorm2d,
    nn.BatchNorm3d: TDBatchNorm3d,
}


def is_tdbn(norm: nn.Module) -> bool:
    """Return whether ``norm`` is tdBN already, this package's or a host's."""
    return isinstance(norm, _TDBatchNorm) or any("ThresholdDependent" in cls.__name__ for cls in type(norm).__mro__)


def convert_norms(found: Survey, hosts: list[Host], undo: list[Callable[[], None]]) -> list[Row]:
    """Turn every norm into tdBN that feeds QIF neurons with one and the same threshold.

    Args:
        found: The model's survey, after its neurons were swapped.
        hosts: Hosts that may have a tdBN of their own.
        undo: List to which the functions are added that undo it.

    Returns:
        A row for each norm.
    """
    rows = []
    for name, norm in found.norms.items():
        was = type(norm).__name__
        fed = [site for site in found.sites if name in site.norms]
        sites = [site for site in fed if getattr(site.host.neuron(site.module), "role", "") == "qif"]
        changed = False
        if not sites:
            lif = ", ".join(site.name for site in fed)
            why = (
                f"feeds {lif}, which is not QIF" if lif else "feeds no neuron directly, so no threshold gives its scale"
            )
        elif is_tdbn(norm):
            why = "tdBN already"
        else:
            names = ", ".join(site.name for site in sites)
            thresholds = {site.host.threshold(site.module) for site in sites}
            threshold = thresholds.pop() if len(thresholds) == 1 else None
            alpha = min(site.sources for site in sites) ** -0.5
            try:
                if threshold is None:
                    raise ValueError(f"the neurons that it feeds, {names}, do not have one threshold in common")
                fresh, undo_norm = _to_tdbn(norm, threshold, alpha, hosts)
            except ValueError as error:
                why = str(error)
            else:
                undo.append(undo_norm)
                scale = (
                    "untrained, so its weight starts at alpha * threshold" if fresh else "weight and statistics kept"
                )
                why = f"feeds {names}: threshold {threshold:g}, alpha {alpha:.4g}; {scale}"
                changed = True
        rows.append(Row(name, was, type(norm).__name__, (why,), changed))
    return rows


def _to_tdbn(norm: Any, threshold: float, alpha: float, hosts: list[Host]) -> tuple[bool, Callable[[], None]]:
    """Turn ``norm`` into tdBN.

    Args:
        norm: A batch norm of torch or of a host.
        threshold: Threshold θ of the neuron that it feeds.
        alpha: α.
        hosts: Hosts that may have a tdBN of their own.

    Returns:
        Whether the weight was untrained and got tdBN's initial scale, and a function that undoes everything.

    Raises:
        ValueError: It cannot become tdBN; the message says why.
    """
    cls = next(filter(None, (host.tdbn(norm) for host in hosts)), None) or _OURS.get(type(norm))
    if cls is None:
        raise ValueError(f"there is no tdBN for {type(norm).__name__}")
    if not norm.affine:
        raise ValueError("tdBN has its scale in the weight, and this norm has no weight (affine=False)")
    undo_class = undoing(norm)
    fresh = _is_fresh(norm)
    weight = norm.weight.detach().clone()
    object.__setattr__(norm, "__class__", cls)
    # This package's attribute or the hosts' for the same number.
    vars(norm).update(alpha=alpha, **{"v_threshold" if issubclass(cls, _TDBatchNorm) else "v_th": threshold})
    if fresh:
        with torch.no_grad():
            norm.weight.mul_(alpha * threshold)

    def undo() -> None:
        undo_class()
        if fresh:
            with torch.no_grad():
                norm.weight.copy_(weight)

    return fresh, undo


def _is_fresh(norm: Any) -> bool:
    """Return whether the norm is as its constructor left it; False for a weight on the meta device."""
    if norm.weight.is_meta:
        return False
    seen = norm.num_batches_tracked is not None and bool(norm.num_batches_tracked)
    initial = (norm.weight == 1).all() or (norm.weight == 0).all()
    return not seen and bool(initial) and not bool(norm.bias.any())
