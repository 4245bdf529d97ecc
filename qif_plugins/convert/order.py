"""Find the places of a model's neurons by the order in which modules were registered, without an example.

In a plain ``nn.Sequential`` modules run in that order, so the result is certain. In any other model it is a guess. If
the modules do not look registered in the order in which they run, no guess is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .hosts import Host
from .walk import NEURON, NORM, OTHER, WEIGHT, Site, kind_of, walk

BLOCK = "block"
_UNKNOWN = "the registration order does not tell which neuron reads out"
_NORMS_UNKNOWN = "the registration order does not tell which normalization feeds which neuron"


@dataclass
class _Item:
    """A neuron, norm or weight layer, or a block of them with a forward of its own.

    Attributes:
        name: Its name; for a block that of its last neuron or weight.
        kind: Neuron, norm, weight or block.
        first: The kind of its first part that is not a norm.
        last: The kind of its last part that is not a norm.
        module: The module.
        chain: The ``nn.Sequential`` that runs it.
    """

    name: str
    kind: str
    first: str
    last: str
    module: nn.Module
    chain: nn.Module | None = None


def place(model: nn.Module, hosts: Sequence[Host], sites: list[Site]) -> tuple[str, str]:
    """Fill in the places of ``sites``, the model's neurons.

    Returns:
        The reason why the order does not tell the readout, and the reason why it does not tell which neurons the norms
        feed; empty strings if it does.
    """
    kinds = {id(module): (name, kind_of(module, found)) for name, module, found in walk(model, hosts)}
    parts = [module for _, module, _ in walk(model, hosts) if kinds[id(module)][1] == OTHER and _items(module, kinds)]
    runs_in_order = all(_is_chain(module) for module in parts)
    for site in sites:
        site.how, site.guess = "registration order", not runs_in_order
    if any("[" in site.name for site in sites):
        unknown = (
            "neurons in plain Python lists or dicts are not registered, so the order does not tell which one reads out"
        )
        return unknown, _norms(sites, kinds, None)
    depths = _depths(model, kinds)
    for site in sites:
        site.depth = depths.get(site.name, 0)
    line = _line(model, kinds)
    fed = _fed_in_chain(line) if runs_in_order else _fed_by_order(line)
    try:
        name = _readout(model, kinds)
    except _AmbiguousError as reason:
        return str(reason), _norms(sites, kinds, fed)
    for site in sites:
        site.reads_out = site.name == name
    return "", _norms(sites, kinds, fed)


def _norms(sites: list[Site], kinds: dict[int, tuple[str, str]], fed: dict[str, list[str]] | None) -> str:
    """Store in ``sites`` which norms feed which neuron; return the reason if that is unknown, else an empty string."""
    unknown = fed is None and any(kind == NORM for _, kind in kinds.values())
    for site in sites:
        site.norms_known = not unknown
        site.norms = (fed or {}).get(site.name, [])
    return _NORMS_UNKNOWN if unknown else ""


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _items(module: nn.Module, kinds: dict[int, tuple[str, str]]) -> list[_Item]:
    """List the parts of ``module``; a plain container is replaced by its own parts."""
    found: list[_Item] = []
    chain = module if _is_chain(module) else None
    for child in module._modules.values():
        if child is None:
            continue
        name, kind = kinds[id(child)]
        if kind != OTHER:
            found.append(_Item(name, kind, kind, kind, child, chain))
        elif _is_chain(child) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _items(child, kinds)
        elif inner := _items(child, kinds):
            solid = [item for item in inner if item.kind != NORM] or inner
            found.append(_Item(solid[-1].name, BLOCK, solid[0].first, solid[-1].last, child, chain))
    return found


def _line(module: nn.Module, kinds: dict[int, tuple[str, str]]) -> list[tuple[str, str]]:
    """List name and kind of every part of ``module``; a part that it has twice is listed twice."""
    line: list[tuple[str, str]] = []
    for item in _items(module, kinds):
        line += _line(item.module, kinds) if item.kind == BLOCK else [(item.name, item.kind)]
    return line


def _depths(model: nn.Module, kinds: dict[int, tuple[str, str]]) -> dict[str, int]:
    """Count the neurons in a row up to each neuron.

    A block with several neurons and a ``forward`` of its own may have a shortcut past them. It therefore adds nothing
    to the count of the neurons after it, unless it holds all neurons of the model.
    """
    depths: dict[str, int] = {}

    def visit(module: nn.Module, depth: int) -> int:
        items = _items(module, kinds)
        blocks = [item for item in items if item.kind == BLOCK]
        for item in items:
            if item.kind == NEURON:
                depth += 1
                depths[item.name] = max(depths.get(item.name, 0), depth)
            elif item.kind == BLOCK:
                inside = visit(item.module, depth)
                alone = len(blocks) == 1 and all(other.kind != NEURON for other in items)
                depth = inside if alone or inside == depth + 1 else depth
        return depth

    visit(model, 0)
    return depths


# -- the readout ------------------------------------------------------------------------------------------------------


class _AmbiguousError(Exception):
    """The order in which modules were registered does not look like the order in which they run."""


def _readout(module: nn.Module, kinds: dict[int, tuple[str, str]]) -> str | None:
    """Find the neuron that only norms follow, if there is one.

    Raises:
        _AmbiguousError: The order does not tell.
    """
    items = _items(module, kinds)
    solid = [item for item in items if item.kind != NORM]
    if not solid:
        return None
    if not _is_chain(module):
        _check(items, solid)
    last = solid[-1]
    if last.kind == BLOCK:
        return _readout(last.module, kinds)
    return last.name if last.kind == NEURON else None


def _check(items: list[_Item], solid: list[_Item]) -> None:
    """Refuse modules that are not registered in the order of a network: a weight, perhaps a norm, a neuron, and so on.

    Raises:
        _AmbiguousError: They are not.
    """
    word = "".join({NEURON: "n", WEIGHT: "w", BLOCK: "c"}[item.kind] for item in solid)
    neurons, weights = word.count("n"), word.count("w")
    if neurons > 1 and weights and word == "n" * neurons + "w" * weights:
        raise _AmbiguousError(
            "every neuron is registered before every weight, so the registration order does not tell which one reads "
            "out"
        )
    runs = ["".join(group) for _, group in itertools.groupby(word, lambda letter: letter)]
    for before, run in itertools.pairwise(["", *runs]):
        if run[0] == "n" and len(run) > 1 and before != "w" * len(run) and (weights or "c" in word):
            raise _AmbiguousError(
                "modules are registered by kind, so the registration order does not tell which neuron reads out"
            )
    if solid[-1].last == WEIGHT:
        if word[0] == "n" and neurons >= weights:
            raise _AmbiguousError(f"{_UNKNOWN}: {solid[0].name} comes before every weight")
        return
    if runs[-1][0] == "n" and len(runs[-1]) > 1:
        return  # as many weights, then as many neurons: grouped by kind, and the last neuron reads out
    for one, other in itertools.pairwise(solid):
        together = one.chain is not None and one.chain is other.chain
        if not together and one.last == other.first != NORM:
            what = "weight" if one.last == WEIGHT else "neuron"
            raise _AmbiguousError(f"{_UNKNOWN}: {one.name} and {other.name} are two {what}s in a row")
    if solid[-1].kind == NEURON:
        _check_last(items)
    _check_sizes(items)


def _check_last(items: list[_Item]) -> None:
    """Refuse a norm followed by a weight before the last neuron, because the neuron may run between these two."""
    last = max(i for i, item in enumerate(items) if item.kind == NEURON)
    before = [i for i, item in enumerate(items[:last]) if item.last == NEURON]
    segment = items[before[-1] + 1 if before else 0 : last]
    for one, other in itertools.pairwise(segment):
        if one.kind == NORM and other.first == WEIGHT:
            raise _AmbiguousError(f"{_UNKNOWN}: {items[last].name} may come between {one.name} and {other.name}")


def _check_sizes(items: list[_Item]) -> None:
    """Refuse an order in which the output size of one layer is not the input size of the next."""
    gives, giver = None, ""
    for item in items:
        takes = _size(item.module, "in_features", "in_channels", "num_features") if item.kind != BLOCK else None
        if gives and takes and takes % gives:
            raise _AmbiguousError(
                f"{_UNKNOWN}: {giver} gives {gives} features or channels and {item.name} takes {takes}"
            )
        if item.kind in (WEIGHT, BLOCK):
            gives, giver = _size(item.module, "out_features", "out_channels"), item.name


def _size(module: Any, *names: str) -> int | None:
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    return found if isinstance(found, int) else None


# -- norms ------------------------------------------------------------------------------------------------------------


def _fed_in_chain(line: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Map each neuron to the norms that feed it, for modules that run one after the other."""
    fed: dict[str, list[str]] = {}
    norms: list[str] = []
    for name, kind in line:
        if kind == NEURON:
            fed[name] = sorted({*fed.get(name, []), *norms})
        norms = [name] if kind == NORM else []
    return fed


def _fed_by_order(line: Sequence[tuple[str, str]]) -> dict[str, list[str]] | None:
    """Map each neuron to the norms that feed it, or return ``None`` if the order does not tell.

    It tells if there is a weight between every two neurons, or if n neurons in a row follow n norms.
    """
    fed: dict[str, list[str]] = {}
    runs = [(is_run, list(group)) for is_run, group in itertools.groupby(line, lambda item: item[1] == NEURON)]
    before: list[tuple[str, str]] = []
    for is_run, group in runs:
        if not is_run:
            before = group
            continue
        norms = [name for name, kind in before if kind == NORM]
        weights = len(before) - len(norms)
        if len(group) == len(norms) > 1:  # grouped by kind: the i-th norm feeds the i-th neuron
            pairs = [(name, [norm]) for (name, _), norm in zip(group, norms, strict=True)]
        elif len(group) > 1 or not before or (not weights and fed):
            return None
        else:
            pairs = [(group[0][0], [before[-1][0]] if before[-1][1] == NORM else [])]
        for name, found in pairs:
            fed[name] = sorted({*fed.get(name, []), *found})
    return fed
