"""Results of whole networks, without the hosts that measured them: ratios, shares and tables of :mod:`.networks`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ...support.text import text_table
from .harness import Book

LIF, QIF, IDENTITY, EAGER = "lif", "qif", "identity", "qif, eager"
"""The peers; the last one, the swapped network without ``torch.compile``, runs beside the compiled ones."""
TARGETS = {"m": 0.25, "s": 0.7}
"""The largest share that is aimed at, by step mode."""


class Case(NamedTuple):
    """One measurement; snnTorch's networks, which loop over time themselves, have step mode ``"s"``."""

    network: str
    step_mode: str
    dtype: str
    compiled: bool
    batch: int


def compared(times: dict[str, list[float]]) -> dict[str, list[float] | None]:
    """Compute ``ratio`` and ``share`` of :func:`.networks.measure` from each peer's seconds by repetition."""
    if not {LIF, QIF, IDENTITY} <= times.keys():
        return {"ratio": None, "share": None}
    lif, qif, floor = (times[name] for name in (LIF, QIF, IDENTITY))
    over = [(q - i, one - i) for one, q, i in zip(lif, qif, floor, strict=True)]
    shares = [mine / theirs for mine, theirs in over if theirs > 0]
    known = len(shares) > len(over) / 2 and len(shares) >= 2
    return {
        "ratio": _quartiles([a / b for a, b in zip(lif, qif, strict=True)]),
        "share": _quartiles(shares) if known else None,
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


HEADER = (
    "network", "input", "mode", "dtype", "", "LIF ms", "QIF ms", "identity ms", "LIF over QIF", "share", "target",
    "repetitions", "QIF eager", "peak MiB, LIF", "QIF",
)  # fmt: skip


def rows(cases: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Tabulate cases under :data:`HEADER`: medians, and in brackets the quartiles over the repetitions."""
    table = []
    for case in cases:
        peers = case["peers"]

        def shown(name: str, key: str, scale: float, peers: dict[str, Any] = peers) -> str:
            return f"{peers[name][key] * scale:.3g}" if key in peers.get(name, {}) else "-"

        why = [f"{name}: {peer['error']}" for name, peer in peers.items() if "error" in peer]
        ratios = [
            "-" if case[key] is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*case[key])
            for key in ("ratio", "share")
        ]
        target = TARGETS[case["step_mode"]]
        missed = case["share"] is None or case["share"][1] > target
        verdict = "-" if case["share"] is None else f"{'missed' if missed else 'met'}, {target:g}"
        how = "compiled" if case["compiled"] else "eager"
        table.append([
            case["network"], " × ".join(map(str, case["input"])), case["step_mode"], case["dtype"],
            how, *(shown(name, "seconds", 1e3) for name in (LIF, QIF, IDENTITY)),
            *ratios, "; ".join(why) or verdict, str(case["repeats"]), shown(EAGER, "seconds", 1e3),
            *(shown(name, "peak_bytes", 2**-20) for name in (LIF, QIF)),
        ])  # fmt: skip
    return table


BOOK = Book(
    "networks",
    {
        "network": str, "step_mode": str, "dtype": str, "compiled": bool, "batch": int, "input": [int], "repeats": int,
        "peers": {str: {str: object}},
    },
    lambda case: Case(*(case[name] for name in Case._fields)),
    lambda case: (case["compiled"], case["dtype"] != "float32", case["dtype"]),  # and then as they were measured
    lambda case: "\n" + text_table(HEADER, rows([case]), left=5),
)  # fmt: skip
"""Where the results file has the cases, and how they are told apart, put in order and shown."""
