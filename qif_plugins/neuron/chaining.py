"""Run time steps in several calls, with the same gradients as one call over all of them.

Without ``detach_reset`` the gradient of a sequence folds the reset into the charge (:mod:`.functional`). Calls that are
linked by the membrane after its reset cannot give this gradient. So the module also keeps the membrane before its
reset, and the next call starts from it if ``v`` has not been changed since the last call. In half precision ``v`` is
rounded, and the next call starts from the float32 membrane, as a call over all steps does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops.backends import BackendName
from ..ops.layout import wider
from .following import has_storage
from .functional import qif_multi_step, uncopied_step
from .module import NO_NIR, QIFLayer

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class _Link(NamedTuple):
    """The membrane that the last call left in ``v``, and the one from which the next call starts.

    Attributes:
        v: The membrane in ``v``.
        marks: The marks of ``v`` and of the threshold, see :func:`_mark`.
        threshold: The threshold of the last call; another one would change the reset.
        state: The membrane before its reset, with its graph; or the membrane after its reset in float32, if ``v`` is
            rounded.
        pre_reset: Whether ``state`` is the membrane before its reset.
    """

    v: Tensor
    marks: tuple[Any, Any]
    threshold: Any
    state: Tensor
    pre_reset: bool

    def leads_to(self, v: Any, threshold: Any) -> bool:
        """Return whether ``v`` and the threshold are unchanged since the last call."""
        if v is not self.v or _mark(v) != self.marks[0]:
            return False
        fixed = not isinstance(self.threshold, Tensor)
        return fixed or (threshold is self.threshold and _mark(threshold) == self.marks[1])


class ChainedSteps(QIFLayer):
    """Mixin, placed before the host's base class, for a module that keeps its membrane in ``v`` between calls."""

    detach_reset: bool
    _link: _Link | None = None

    def _neuron(self, x: Tensor, single: bool = False) -> tuple[Any, Any]:
        """Return the parameters and the surrogate for this input, which has no time dimension if ``single``."""
        raise NotImplementedError

    def _threshold(self) -> Any:
        """Return the threshold as it was assigned: a number, a tensor or a parameter."""
        raise NotImplementedError

    def _implementation(self, x: Tensor) -> BackendName:
        """Return the back end for this input."""
        return self.backend

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one time step or all of them, as the host's base class decides.

        Raises:
            NotImplementedError: torch.fx traces into the module, as NIR's exporter does.
        """
        if args and isinstance(args[0], torch.fx.Proxy):
            raise NotImplementedError(
                f"torch.fx cannot trace into {type(self).__name__}; make it a leaf of the tracer. If this is an export "
                f"to NIR: {NO_NIR}"
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _run(
        self, x: Tensor, v: Tensor | float, store_v_seq: bool = False, single: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the spikes, the last membrane and, on demand, every membrane.

        Args:
            x: All time steps, or one if ``single``.
            v: The module's membrane.
            store_v_seq: Whether to return every membrane. Default False.
            single: Whether ``x`` has no time dimension. Default False.
        """
        params, surrogate = self._neuron(x, single)
        threshold = self._threshold()
        low = x.dtype in _LOW_PRECISION
        dtype = wider(x.dtype, v.dtype) if isinstance(v, Tensor) else x.dtype
        link = self._link if self._link is not None and self._link.leads_to(v, threshold) else None
        start: Tensor | float = v
        if link is not None:
            start = link.state
        elif low:
            start = v.float() if isinstance(v, Tensor) else torch.full_like(x if single else x[0], v, dtype=torch.float)
        keep = _may_be_trained() and not self.detach_reset and params.reset == "hard"
        pre_reset = link is not None and link.pre_reset
        backend = self._implementation(x)
        if single:
            spikes, exact, *h = uncopied_step(x, start, params, surrogate, self.detach_reset, backend, keep, pre_reset)
        else:
            spikes, exact, *h = qif_multi_step(
                x, start, params, surrogate, self.detach_reset, store_v_seq, backend, store_h_seq=keep,
                pre_reset=pre_reset,
            )  # fmt: skip
        v_out = exact if exact.dtype == dtype else exact.to(dtype)
        v_last = v_out[-1].clone() if store_v_seq else v_out
        self._link = None
        if h or low:
            # The last step: a copy, which does not keep the others in memory.
            state, every = (h[0], not single) if h else (exact, store_v_seq)
            marks = _mark(v_last), _mark(threshold)
            self._link = _Link(v_last, marks, threshold, state[-1].clone() if every else state, bool(h))
        return spikes, v_last, v_out if store_v_seq else None


def _may_be_trained() -> bool:
    """Return whether a gradient may be needed; a captured graph (exported, traced) may need one later."""
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    if torch.compiler.is_compiling():  # versions of PyTorch without is_exporting may be exporting
        return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return getattr(proxies, "get_proxy_mode", lambda: None)() is not None


def _mark(value: Any) -> Any:
    """Return version, graph and memory of a tensor: a write, ``detach_()`` or an assigned ``.data`` changes one."""
    if not isinstance(value, Tensor):
        return None
    if torch.compiler.is_compiling():  # which cannot trace the rest
        return value.requires_grad
    version = None if value.is_inference() else value._version  # inference tensors count no versions
    return value.requires_grad, version, value.grad_fn, value.data_ptr() if has_storage(value) else None
