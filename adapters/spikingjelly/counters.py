"""Teach SpikingJelly 2's counters of operations, memory accesses and energy the cost of our operator.

The counters look up every call of a PyTorch operator in a table. A neuron that runs as one operator of its own is not
in that table: it would cost nothing, or be refused in strict mode. Here it gets the cost of a QIF neuron that is
written in PyTorch's operators, as the host's LIFNode is on a CPU, so that the two compare; see
:mod:`qif_plugins.ops.operations`. For LIF and QIF alike, the host counts products of single elements as no
multiply-accumulates, and their sums as no synaptic operations.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name

from qif_plugins.neuron.module import QIFLayer
from qif_plugins.ops.library import multi_step, multi_step_backward
from qif_plugins.ops.operations import given, work

_ON_STATE = {
    False: {"state_adds": 5, "state_muls": 3, "state_reset_ops": 2, "spike_triggered_ops": 2},
    True: {"state_adds": 5, "state_muls": 2, "state_reset_ops": 1, "spike_triggered_ops": 1},
}
for _counts in _ON_STATE.values():
    _counts |= {"state_comps": 1, "timestep_dense_ops": 6, "state_nonlinear_ops": 0, "state_select_ops": 0}
"""Operations of a step on the membrane, in the host's categories, for a hard (False) and a soft reset (True).

Left out are g x, s v_reset and 1 - s."""
_BEND = "state_comps", "state_select_ops", "timestep_dense_ops"
"""Categories with one more operation where the map has no rebound, for v < u1 ? u1 : v; with a soft reset with two, for
v > θ ? θ : v."""


def _bytes(args: Any, kwargs: Any, out: Any) -> int:
    """Size of every tensor that goes into the operator or comes out of it, each once, as the host counts."""
    tensors = (value for value in (*args, *kwargs.values(), *out) if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_RULES: dict[str, Any] = {
    "FlopCounter": lambda operator, args, kwargs, out: sum(work(operator, args, kwargs)),
    "ACCounter": lambda operator, args, kwargs, out: work(operator, args, kwargs).additions,
    "MACCounter": lambda operator, args, kwargs, out: 0,
    "SynOpCounter": lambda operator, args, kwargs, out: 0,
    "MemoryAccessCounter": lambda operator, args, kwargs, out: _bytes(args, kwargs, out),
}


def teach_counters() -> None:
    """Make the host's counters count our operator; do nothing in a version that has no counters.

    A rule for our operator that the user passes to a counter as ``extra_rules`` takes precedence.
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
    # A counter copies the table when it is constructed, maybe before our import; so its copy is filled when it is used.
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
        values = given(func, args, kwargs)
        x_seq, element = values["x_seq"], out[1].element_size()
        # The bytes as for the host's own fused neurons: every step reads the state once and writes it once.
        metrics = dict.fromkeys(("state_reads", "state_writes"), x_seq.numel() * element)
        metrics["neuron_logical_steps"] = x_seq.numel()
        bend, soft = () if values["rebound"] else _BEND, bool(values["soft"])
        metrics |= {
            name: (times + (name in bend) * (1 + soft)) * x_seq.numel() for name, times in _ON_STATE[soft].items()
        }
        return int(counter._store_breakdown(metrics, state_buffer_bytes=x_seq[0].numel() * element))

    counter_type.count = count_ours


def _teach_neuromc(neuromc: Any) -> None:
    # NeuroMC has its own cost for a LIF update, and refuses to report if an operator ran that it does not know.
    neuromc._AUXILIARY_ATEN_OPS.update(resolve_name(operator) for operator in (multi_step, multi_step_backward))
    profiler = neuromc.NeuroMCEnergyProfiler
    count = profiler._extra_counts

    def marking(make: Any) -> Any:
        @functools.wraps(make)
        def make_and_mark(self: Any, stage: Any, module: Any, *args: Any) -> Any:
            fragment = make(self, stage, module, *args)
            fragment.is_qif = isinstance(module, QIFLayer)
            fragment.bends = fragment.is_qif and not module.qif_parameters.rebound
            return fragment

        return make_and_mark

    @functools.wraps(count)
    def count_ours(self: Any, fragment: Any) -> Any:
        counts = count(self, fragment)
        if getattr(fragment, "is_qif", False):
            # (a v + b) v for β v, and in the backward pass its slope, which is not constant.
            for name in ("add", "mul"):
                counts[name] += fragment.output_numel
            counts["comp"] += fragment.output_numel * fragment.bends  # the map without rebound, forward and backward
        return counts

    profiler._make_soma_forward_fragment = marking(profiler._make_soma_forward_fragment)
    profiler._make_soma_backward_fragment = marking(profiler._make_soma_backward_fragment)
    profiler._extra_counts = count_ours
