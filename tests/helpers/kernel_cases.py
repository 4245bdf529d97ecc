"""One property test for every implementation of the kernels, at the level of ``qif_plugins.ops.contract``.

``cases()`` draws everything an implementation distinguishes; ``check_against_reference`` runs one
drawn case through a module of ``qif_plugins.ops`` and demands the reference's bits. The reference
always runs on the CPU, so that a spike that flips between devices fails too.

Spikes, membranes and the gradients of input and initial membrane are compared bit by bit, the sign of
zero included (any NaN equals any other). Gradients of the numbers are sums, whose order is free: each
term is float32 as the contract defines it, the sum is float64, and 1e-5 relative is demanded of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from hypothesis import strategies as st
from torch import Tensor

from qif_plugins.ops import torch_backend as reference
from qif_plugins.ops.contract import COEFFICIENT_NAMES, LEARNABLE, Coefficient, Coefficients, Kind, Shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Ranges around the defaults; a window or a sharpness for every shape.
RANGES = {
    "a": (0.05, 0.5),
    "u1": (-0.3, 0.2),
    "u2": (0.2, 0.8),
    "v_threshold": (0.6, 1.4),
    "v_reset": (-0.3, 0.3),
    "input_gain": (0.3, 1.5),
}
SURROGATES = {
    Shape.WINDOW: ((0.2, 0.7), (1.1, 1.8), (0.3, 1.5)),
    Shape.ATAN: ((1.0, 4.0), (0.5, 1.5), (0.0, 0.0)),
    Shape.SIGMOID: ((1.0, 6.0), (0.0, 0.0), (0.0, 0.0)),
    Shape.FAST_SIGMOID: ((1.0, 30.0), (0.0, 0.0), (0.0, 0.0)),
    Shape.GAUSSIAN: ((0.5, 8.0), (0.3, 1.5), (-0.4, 0.4)),
}


@dataclass(frozen=True)
class Case:
    """What distinguishes one call of ``forward`` and ``backward``; the values come from ``seed``.

    Attributes:
        steps: T.
        blocks: ``(outer, count, inner)``; N is their product, and a coefficient given per channel has ``count`` values.
        layouts: For each of the nine coefficients ``"float"``, ``"single"``, ``"channel"`` or ``"neuron"``.
        start: ``"float"``, or the dtype of the initial membrane.
        specials: Whether inputs, membranes and gradients hold NaN, infinities, zeros of both signs, subnormal
            numbers and values exactly at the threshold and at the window's ends.
        gradients: Which of grad_spike, grad_v, grad_h there are.
        needs: As in the contract; only numbers that are tensors.
    """

    steps: int
    blocks: tuple[int, int, int]
    dtype: torch.dtype
    layouts: tuple[str, ...]
    kind: Kind
    start: str | torch.dtype
    store_v_seq: bool
    save_h: bool
    specials: bool
    gradients: tuple[bool, bool, bool]
    needs: tuple[bool, ...]
    needs_v0: bool
    seed: int

    @property
    def neurons(self) -> int:
        return math.prod(self.blocks)


@st.composite
def cases(draw: st.DrawFn, max_neurons: int = 600, max_steps: int = 9) -> Case:
    """Draw a :class:`Case`. Small sizes reach every edge of a block; ``max_neurons`` bounds N."""
    blocks = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 7), st.sampled_from((1, 2, 3, 16, 31, 64, 129, 257, 1024))).filter(
            lambda b: math.prod(b) <= max_neurons
        )
    )
    layout = st.sampled_from(("float", "float", "single", "channel", "neuron"))
    uniform = draw(st.booleans())
    layouts = ("float",) * 9 if uniform else tuple(draw(layout) for _ in COEFFICIENT_NAMES)
    kind = Kind(
        soft=draw(st.booleans()),
        detach_reset=draw(st.booleans()),
        strict=draw(st.booleans()),
        shape=draw(st.sampled_from(Shape)),
        pre_reset=draw(st.booleans()),
        rebound=draw(st.booleans()),
    )
    return Case(
        steps=draw(st.integers(1, max_steps)),
        blocks=blocks,
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=layouts,
        kind=kind,
        start=draw(st.sampled_from(("float", *DTYPES))),
        store_v_seq=draw(st.booleans()),
        save_h=draw(st.booleans()),
        specials=draw(st.booleans()),
        gradients=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        needs=tuple(name != "float" and draw(st.booleans()) for name in layouts[:6]),
        needs_v0=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def _short() -> list[Case]:
    """One case for each surrogate, which between them have every type, layout, reset and gradient."""
    layouts = ("float", "channel", "neuron", "single")
    list_of_cases = []
    for i, shape in enumerate(Shape):
        chosen = tuple(layouts[(i + j) % 4] for j in range(9)) if i else ("float",) * 9
        list_of_cases.append(
            Case(
                steps=(1, 4, 5, 3, 7)[i],
                blocks=((2, 4, 128), (1, 3, 77), (2, 5, 64), (3, 7, 16), (1, 4, 257))[i],
                dtype=DTYPES[i % 3],
                layouts=chosen,
                kind=Kind(
                    soft=i in (1, 4),
                    detach_reset=i in (2, 4),
                    strict=i in (2, 3),
                    shape=shape,
                    pre_reset=i in (1, 3),
                    rebound=i < 3,
                ),
                start=("float", *DTYPES)[i % 4],
                store_v_seq=i % 2 == 1,
                save_h=i != 2,
                specials=i != 0,
                gradients=(True, i > 0, i in (1, 3)),
                needs=tuple(layout != "float" for layout in chosen[:6]),
                needs_v0=True,
                seed=i,
            )
        )
    return list_of_cases


SHORT = _short()


def coefficients(case: Case, generator: torch.Generator) -> Coefficients:
    """The nine coefficients of ``case``, on the CPU."""
    ranges = (*RANGES.values(), *SURROGATES[case.kind.shape])
    _, count, inner = case.blocks
    sizes = {"float": (1, 1), "single": (1, case.neurons), "channel": (count, inner), "neuron": (case.neurons, 1)}
    entries = []
    for (low, high), layout in zip(ranges, case.layouts, strict=True):
        size, width = sizes[layout]
        values = torch.rand(size, generator=generator) * (high - low) + low
        entries.append(Coefficient(values[0].item()) if layout == "float" else Coefficient(values, width))
    return Coefficients(*entries)


def check_against_reference(module: ModuleType, case: Case, device: str | torch.device = "cpu") -> None:
    """Run ``case`` through ``module`` on ``device`` and through the reference on the CPU; demand the same bits."""
    generator = torch.Generator().manual_seed(case.seed)
    c = coefficients(case, generator)
    shape = (case.steps, case.neurons)
    x = _values(case, c, shape, generator, scale=1.2).to(case.dtype)
    if isinstance(case.start, torch.dtype):
        v0: Tensor | float = _values(case, c, shape[1:], generator, scale=0.8).to(case.start)
        v_dtype = torch.promote_types(case.dtype, case.start)
    else:
        v0, v_dtype = 0.3, case.dtype

    def forward(implementation: ModuleType, where: str | torch.device, save_h: bool) -> dict[str, Tensor | None]:
        spike = _unwritten(shape, case.dtype, where)
        v_last = None if case.store_v_seq else _unwritten(shape[1:], v_dtype, where)
        v_seq = _unwritten(shape, v_dtype, where) if case.store_v_seq else None
        h = _unwritten(shape, torch.float32, where) if save_h else None
        implementation.forward(_to(x, where), _to(v0, where), _move(c, where), case.kind, spike, v_last, v_seq, h)
        return {"spike": spike, "v_last": v_last, "v_seq": v_seq, "h": h}

    expected = forward(reference, "cpu", True)
    h = expected["h"]
    assert h is not None
    for name, value in forward(module, device, case.save_h).items():
        if name != "h" or case.save_h:
            _assert_same_bits(name, value, expected[name])

    has_spike, has_v, has_h = case.gradients
    incoming = (
        _values(case, c, shape, generator, scale=1.0).to(case.dtype) if has_spike else None,
        _values(case, c, shape if case.store_v_seq else shape[1:], generator, scale=1.0).to(v_dtype) if has_v else None,
        _values(case, c, shape, generator, scale=1.0) if has_h else None,
    )

    def backward(implementation: ModuleType, where: str | torch.device) -> tuple[Tensor, Tensor | None, list]:
        grad_x = _unwritten(shape, case.dtype, where)
        grad_v0 = _unwritten(shape[1:], v0.dtype, where) if case.needs_v0 and isinstance(v0, Tensor) else None
        sums = implementation.backward(
            *(_to(gradient, where) for gradient in incoming), _to(h, where), _to(v0, where),
            _to(x, where) if case.needs[5] else None, _move(c, where), case.kind, grad_x, grad_v0, case.needs,
        )  # fmt: skip
        return grad_x, grad_v0, sums

    grad_x, grad_v0, sums = backward(module, device)
    expected_x, expected_v0, expected_sums = backward(reference, "cpu")
    _assert_same_bits("grad_x", grad_x, expected_x)
    _assert_same_bits("grad_v0", grad_v0, expected_v0)
    assert len(sums) == 6
    for name, needed, got, wanted, entry in zip(LEARNABLE, case.needs, sums, expected_sums, c[:6], strict=True):
        if not needed:
            assert got is None, name
            continue
        assert got.dtype == torch.float32, name
        assert got.shape == entry.values.shape, name
        torch.testing.assert_close(
            got.cpu(), wanted, rtol=1e-5, atol=1e-30, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def _values(case: Case, c: Coefficients, shape: tuple[int, ...], generator: torch.Generator, scale: float) -> Tensor:
    values = torch.randn(shape, generator=generator) * scale
    if case.specials:
        first = [float(entry.values.flatten()[0]) if isinstance(entry.values, Tensor) else entry.values for entry in c]
        rare = torch.tensor(
            [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-30, 3e38, first[3], first[6], first[7], -first[3]]
        )
        chosen = torch.randint(len(rare), shape, generator=generator)
        values = torch.where(torch.rand(shape, generator=generator) < 0.1, rare[chosen], values)
    return values


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """An output that fails the comparison where the kernel leaves it."""
    return torch.full(shape, 123.0, dtype=dtype, device=device)


def _to(value, device):
    return value.to(device) if isinstance(value, Tensor) else value


def _move(c: Coefficients, device: str | torch.device) -> Coefficients:
    return Coefficients(*(Coefficient(_to(entry.values, device), entry.inner) for entry in c))


def _assert_same_bits(name: str, got: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is None:
        assert got is None, name
        return
    assert got is not None, name
    assert got.dtype == wanted.dtype, name
    got = got.cpu()
    bits = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    wrong = (got.view(bits) != wanted.view(bits)) & ~(got.isnan() & wanted.isnan())
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name} differs in {int(wrong.sum())} of {wrong.numel()} elements, first at {where}: "
            f"{got[where].item()!r} instead of {wanted[where].item()!r}"
        )
