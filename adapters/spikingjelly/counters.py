"""SpikingJelly 2's counters of operations and energy, taught what our operator does.

The counters know PyTorch's operators and look each call up in a table, in which a neuron that runs as one operator of
its own is missing: it would be free, or refused in strict mode. Here it gets what a QIF neuron costs as one of the
host's own nodes, written in PyTorch's operators as the host's LIFNode is on a CPU, so that the two compare:

==========  =====================================  =========  ========  ===========
a step      written out                            additions  products  comparisons
==========  =====================================  =========  ========  ===========
charge      h = (a (v - u1)) (v - u2) + g x        3          3
fire        s = h - θ >= 0                         1                    1
hard reset  v = s v_reset + (1 - s) h              2          2
soft reset  v = h - s θ                            1          1
==========  =====================================  =========  ========  ===========

The charge has two operations more than LIF's v + (x - (v - v_reset)) / τ. The backward pass is counted as
:mod:`qif_plugins.ops.contract` writes it. A subtraction counts as an addition, a division as a product. Products of
single elements are no multiply-accumulates for the host, and their sums no synaptic operations, for LIF as for QIF.
A step that starts from the membrane before its reset (``pre_reset``) repeats a reset that was counted before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import resolve_name

from qif_plugins.neuron.module import QIFLayer
from qif_plugins.ops.contract import Shape
from qif_plugins.ops.library import multi_step, multi_step_backward

__all__ = ["teach_counters"]


class _Work(NamedTuple):
    """Operations on single numbers."""

    additions: int = 0
    products: int = 0
    comparisons: int = 0

    def __add__(self, other: Any) -> _Work:
        return _Work(*map(sum, zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> _Work:
        return _Work(*(times * count for count in self))


_CHARGE_AND_FIRE = _Work(4, 3, 1)
_RESET = {False: _Work(2, 2), True: _Work(1, 1)}
"""By whether it is soft."""
_BACKWARD = {False: _Work(6, 4, 2), True: _Work(7, 4, 2)}
"""Of a step whose reset passes no gradient to the spike, without w(h)."""
_THROUGH_RESET = {False: _Work(6, 4), True: _Work(1, 1)}
_SURROGATE = {
    Shape.WINDOW: _Work(0, 1, 2),
    Shape.ATAN: _Work(2, 3),
    Shape.SIGMOID: _Work(3, 5),  # the exponential as one
    Shape.FAST_SIGMOID: _Work(2, 3),
    Shape.GAUSSIAN: _Work(2, 4, 1),  # the exponential as one
}
_NUMBERS = {
    False: (_Work(3, 2), _Work(2, 2), _Work(2, 2), _Work(1), _Work(2, 1), _Work(1, 1)),
    True: (_Work(3, 2), _Work(2, 2), _Work(2, 2), _Work(2), _Work(), _Work(1, 1)),
}
"""Of the gradients of a, u1, u2, v_threshold, v_reset and input_gain, summed over the steps."""
_ON_STATE = {
    False: {"state_adds": 5, "state_muls": 3, "state_reset_ops": 2, "spike_triggered_ops": 2},
    True: {"state_adds": 5, "state_muls": 2, "state_reset_ops": 1, "spike_triggered_ops": 1},
}
for _counts in _ON_STATE.values():
    _counts |= {"state_comps": 1, "timestep_dense_ops": 6, "state_nonlinear_ops": 0, "state_select_ops": 0}
"""What of a step touches the membrane, as the host's counter of neuron states divides it: not g x, s v_reset, 1 - s."""
_INITIAL = _Work(3, 2)
"""Of the gradient of the membrane before the first step."""


def _work(operator: Any, args: Any, kwargs: Any) -> _Work:
    given = _given(operator, args, kwargs)
    soft = bool(given["soft"])
    if operator is multi_step:
        return (_CHARGE_AND_FIRE + _RESET[soft]) * given["x_seq"].numel()
    h_seq: Tensor = given["h_seq"]
    step = _BACKWARD[soft] + _SURROGATE[Shape(given["shape"])]
    if not given["detach_reset"]:
        step += _THROUGH_RESET[soft]
    neurons = h_seq.numel() // max(h_seq.shape[0], 1)
    once = _INITIAL if given["needs_v"] else _Work()
    for work, needed in zip(_NUMBERS[soft], given["needs"], strict=True):
        if needed and any(work):
            step += work
            once += _Work(1)  # summed over the neurons
    return step * h_seq.numel() + once * neurons


def _given(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = (argument.name for argument in operator._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Of every tensor that goes into the operator or comes out, each once, as the host counts its own operators."""
    tensors = (value for value in (*args, *kwargs.values(), *out) if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_RULES: dict[str, Any] = {
    "FlopCounter": lambda operator, args, kwargs, out: sum(_work(operator, args, kwargs)),
    "ACCounter": lambda operator, args, kwargs, out: _work(operator, args, kwargs).additions,
    "MACCounter": lambda operator, args, kwargs, out: 0,
    "SynOpCounter": lambda operator, args, kwargs, out: 0,
    "MemoryAccessCounter": lambda operator, args, kwargs, out: _bytes(args, kwargs, out),
}


def teach_counters() -> None:
    """Make the host's counters count our operator; nothing in a version that has none.

    A rule for our operator that is passed to a counter as ``extra_rules`` stays.
    """
    try:
        from spikingjelly.activation_based import op_counter
        from spikingjelly.activation_based.neuron import BaseNode
        from spikingjelly.activation_based.op_counter.neuromc import core as neuromc
    except ImportError:
        return
    _teach_tables(op_counter)
    _teach_states(op_counter.NeuronStateCounter, BaseNode)
    _teach_neuromc(neuromc)


def _teach_tables(op_counter: Any) -> None:
    # A counter has a table of its own from its construction on, which may lie before ours. So it is filled when used.
    enter = op_counter.DispatchCounterMode.__enter__
    kinds = [(getattr(op_counter, name), rule) for name, rule in _RULES.items()]

    @functools.wraps(enter)
    def fill_and_enter(mode: Any) -> Any:
        for counter in mode.counters:
            for kind, rule in kinds:
                if isinstance(counter, kind):
                    for operator in (multi_step, multi_step_backward):
                        counter.rules.setdefault(operator, functools.partial(rule, operator))
        return enter(mode)

    op_counter.DispatchCounterMode.__enter__ = fill_and_enter


def _teach_states(counter_type: Any, node_type: Any) -> None:
    count = counter_type.count

    @functools.wraps(count)
    def count_ours(
        counter: Any, func: Any, args: Any, kwargs: Any, out: Any, active_modules: Any = None, parent_names: Any = None
    ) -> int:
        nodes = [module for module in active_modules or () if isinstance(module, node_type)]
        if func is not multi_step or not nodes or any(type(node) in counter.extra_state_rules for node in nodes):
            return int(count(counter, func, args, kwargs, out, active_modules, parent_names))
        given = _given(func, args, kwargs)
        x_seq, element = given["x_seq"], out[1].element_size()
        # The bytes as for the host's own fused neurons: every step reads the state once and writes it once.
        metrics = dict.fromkeys(("state_reads", "state_writes"), x_seq.numel() * element)
        metrics["neuron_logical_steps"] = x_seq.numel()
        metrics |= {name: times * x_seq.numel() for name, times in _ON_STATE[bool(given["soft"])].items()}
        return int(counter._store_breakdown(metrics, state_buffer_bytes=x_seq[0].numel() * element))

    counter_type.count = count_ours


def _teach_neuromc(neuromc: Any) -> None:
    # It has a cost of its own for a LIF update, and refuses to report where an operator ran that it does not know.
    neuromc._AUXILIARY_ATEN_OPS.update(resolve_name(operator) for operator in (multi_step, multi_step_backward))
    profiler = neuromc.NeuroMCEnergyProfiler
    count = profiler._extra_counts

    def marking(make: Any) -> Any:
        @functools.wraps(make)
        def make_and_mark(self: Any, stage: Any, module: Any, *args: Any) -> Any:
            fragment = make(self, stage, module, *args)
            fragment.is_qif = isinstance(module, QIFLayer)
            return fragment

        return make_and_mark

    @functools.wraps(count)
    def count_ours(self: Any, fragment: Any) -> Any:
        counts = count(self, fragment)
        if getattr(fragment, "is_qif", False):
            # (a v + b) v for β v, and in the backward pass its slope, which is no constant.
            for name in ("add", "mul"):
                counts[name] += fragment.output_numel
        return counts

    profiler._make_soma_forward_fragment = marking(profiler._make_soma_forward_fragment)
    profiler._make_soma_backward_fragment = marking(profiler._make_soma_backward_fragment)
    profiler._extra_counts = count_ours
