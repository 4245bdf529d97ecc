"""SpikingJelly's part of :func:`qif_plugins.swap`: the QIF class and the arguments for each of its nodes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

from ..adapters.spikingjelly import ParametricQIFNode, QIFNode
from ..adapters.spikingjelly.parametric import LearnedMap
from ..adapters.spikingjelly.surrogate import fused
from ..neuron.arguments import DEFAULT_TAU
from ..neuron.module import QIFLayer
from ..neuron.names import MATCHED
from .area import area
from .hosts import NO_LEAK_BETA, Neuron, Plan, Request, Snapshot, check_arguments, never_fires, no_leak
from .leak import MIN_LEAK, LeakQIFNode, LearnedLeak
from .rates import Dynamics, leaky, mean_of, quadratic
from .rebuild import classify, extended, own_code

TARGETS: dict[type[Any], type[Any]] = {
    neuron.IFNode: QIFNode,
    neuron.LIFNode: QIFNode,
    neuron.ParametricLIFNode: LeakQIFNode,
}
"""The LIF family: host class -> the QIF class that takes its place."""
BASES: tuple[type[nn.Module], ...] = (neuron.BaseNode,)

if find_spec("spikingjelly.clock_driven") is not None:
    from spikingjelly.clock_driven import neuron as clock_driven

    from ..adapters.spikingjelly import clock_driven as ours
    from .leak import ClockDrivenLeakQIFNode, MultiStepLeakQIFNode

    TARGETS |= {
        clock_driven.IFNode: ours.QIFNode,
        clock_driven.LIFNode: ours.QIFNode,
        clock_driven.ParametricLIFNode: ClockDrivenLeakQIFNode,
        clock_driven.MultiStepIFNode: ours.MultiStepQIFNode,
        clock_driven.MultiStepLIFNode: ours.MultiStepQIFNode,
        clock_driven.MultiStepParametricLIFNode: MultiStepLeakQIFNode,
    }
    BASES += (clock_driven.BaseNode,)

BACK: dict[type[Any], type[Any]] = {QIFNode: neuron.LIFNode, ParametricQIFNode: neuron.LIFNode}
"""QIF classes that users build -> the LIF class in whose place they stand."""
if find_spec("spikingjelly.clock_driven") is not None:
    BACK |= {ours.QIFNode: clock_driven.LIFNode, ours.MultiStepQIFNode: clock_driven.MultiStepLIFNode}

NEURONS = BASES + tuple(
    value
    for value in vars(neuron).values()
    if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith(neuron.__name__)
)
CARRIED = ("v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "cupy_fp32_inference")
KEPT = ("_neuron_precision", "lava_s_cale")
"""Attributes of the host's base class that no constructor takes."""
GAIN_ARGUMENTS = frozenset({"tau", "decay_input", "input_gain"})


class TDBatchNorm1d(layer.ThresholdDependentBatchNorm1d):
    """The host's tdBN, with the check of dimensions that it needs and that is missing in 0.0.0.0.14."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class TDBatchNorm2d(layer.ThresholdDependentBatchNorm2d):
    """The same as :class:`TDBatchNorm1d`, in two dimensions."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class TDBatchNorm3d(layer.ThresholdDependentBatchNorm3d):
    """The same as :class:`TDBatchNorm1d`, in three dimensions."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim


TDBN: dict[type[Any], type[Any]] = {
    layer.BatchNorm1d: TDBatchNorm1d,
    layer.BatchNorm2d: TDBatchNorm2d,
    layer.BatchNorm3d: TDBatchNorm3d,
}
"""The host's batch norms -> the tdBN that takes their place."""


class _SpikingJelly:
    """Implements :class:`qif_plugins.convert.hosts.Host` for SpikingJelly."""

    def neuron(self, module: nn.Module) -> Neuron | None:
        if isinstance(module, QIFLayer) and isinstance(module, BASES):
            return Neuron("qif")
        found = classify(module, extended(type(module), TARGETS), NEURONS)
        if found == Neuron("lif") and getattr(module, "backend", None) == "lava":
            return Neuron("other", "runs on Lava, which has no QIF neuron")
        if found == Neuron("lif"):
            return Neuron("lif", never_fires(module.v_threshold))
        return found

    def plan(self, module: Any, request: Request, normalized: bool) -> Plan:
        known = extended(type(module), TARGETS)
        assert known is not None
        learns_leak = issubclass(TARGETS[known], LearnedLeak)
        v_rest = request.parameters.get("v_reset", module.v_reset)
        dynamics, cls = request.map(v_rest), TARGETS[known]
        if learns_leak and dynamics not in MATCHED:
            cls = cls.__bases__[1]
        notes: list[str] = []
        arguments = _carried(module, request, dynamics, normalized, notes) | _dynamics(module, dynamics, notes)
        decisive = GAIN_ARGUMENTS - {"tau"} if issubclass(cls, LearnedLeak) else GAIN_ARGUMENTS  # its tau is learned
        gain = request.gain(normalized, decisive)
        if learns_leak and normalized and gain == 1 and _leak(module)["tau"] <= DEFAULT_TAU + 1e-6:
            gain = None  # LIF's, which follows the learned leak; measured in docs/mathematics.md, "Defaults"
        if gain is not None:
            arguments |= {"decay_input": False} | ({"input_gain": gain} if gain != 1 else {})
        if loaded := request.loaded_gain(module, decisive, notes):
            gain = None
            arguments |= loaded
        if learns_leak:
            learned = f"its leak w {'goes on being learned' if module.w.requires_grad else 'stays frozen'}"
            notes.append(learned if dynamics in MATCHED else "w is kept but not used")
        check_arguments(cls, request.parameters, _arguments(cls) - {"window", "dynamics"})
        given = dict(request.parameters)
        if issubclass(cls, LearnedLeak):
            notes += ["tau not used, as it follows w"] if given.pop("tau", None) else []
        arguments |= given
        arguments = {name: value for name, value in arguments.items() if name in _arguments(cls)}
        cls(**arguments)  # refuses before anything has changed
        attributes = {name: vars(module)[name] for name in KEPT if name in vars(module)}
        attributes |= {"_open_to_leak": request.chooses_map, "_gain_passed": request.passes(decisive)}
        idle = frozenset({"w"}) if learns_leak and dynamics not in MATCHED else frozenset[str]()
        return Plan(cls, arguments, dynamics, tuple(notes), attributes=attributes, idle=idle, gain=gain)

    def back(self, module: Any) -> Plan:
        base = _ours(type(module))
        code = own_code(module, base)
        if base not in BACK or code:
            raise ValueError(f"{type(module).__name__} has code of its own ({', '.join(code)})")
        if not module._arguments.map.matches_leak:
            raise ValueError(no_leak(module._arguments.map.decided))
        tau, learned, notes = DEFAULT_TAU if module.tau is None else module.tau, frozenset[str](), []
        if isinstance(module, LearnedMap):
            tau, learned = _tau_by_now(module), frozenset({name for name in module._parameters if "raw_" in name})
            notes.append(f"tau={tau:.4g} as learned so far; {', '.join(sorted(learned))} are kept but not used")
        values = {name: getattr(module, name) for name in CARRIED if hasattr(module, name)}
        values |= {"tau": tau, "decay_input": module._arguments.decays_input}
        gain, lif = mean_of(module.params.input_gain), mean_of(1 / tau) if values["decay_input"] else 1.0
        if abs(gain - lif) > 1e-6 * lif:
            notes.append(f"input gain {lif:.4g}, LIF's, instead of {gain:.4g}")
        if module.derived_window is None:
            values["surrogate_function"] = module.surrogate_function
        else:
            notes.append("the host's own surrogate in place of the window")
        if module.backend == "cupy":
            values["backend"] = "cupy"
        attributes = {name: vars(module)[name] for name in KEPT if name in vars(module)}
        for name in ("tau", "v_threshold", "v_reset"):
            if isinstance(values[name], Tensor):  # the host's constructor takes no tensors
                value = values.pop(name)
                attributes |= {name: value} if name not in module._parameters | module._buffers else {}
        names = inspect.signature(BACK[base]).parameters
        arguments = {name: value for name, value in values.items() if name in names}
        return Plan(BACK[base], arguments, "lif", tuple(notes), attributes, idle=learned)

    def snapshot(self, module: Any) -> Snapshot:
        known = _ours(type(module)) if isinstance(module, QIFLayer) else extended(type(module), TARGETS)
        assert known is not None
        attributes = dict(vars(module))
        attributes["_memories"] = {
            name: copy.deepcopy(module._memories_rv[name])
            if isinstance(value, Tensor) or name in ("v", "v_seq")
            else value
            for name, value in module._memories.items()
        }
        if "v_seq" in attributes:
            attributes["v_seq"] = None
        own = _host_attributes(known)
        private = {name for name in attributes if name.startswith("_") and hasattr(type(module), name)}
        return Snapshot(attributes, {n: v for n, v in attributes.items() if n not in own | private})

    def construct(self, module: nn.Module, plan: Plan) -> None:
        object.__setattr__(module, "__class__", plan.cls)
        plan.cls.__init__(module, **plan.arguments)

    def assign(self, module: Any, changes: Mapping[str, Any]) -> None:
        for name, value in changes.items():
            ours = name == "backend" and value not in getattr(module, "supported_backends", ("torch", "cupy"))
            if name != "v_seq" and not ours:
                setattr(module, name, value)

    def update_derived(self, module: nn.Module) -> None:
        if isinstance(module, LearnedLeak):
            module._window_changed()
        for name in (*module._parameters, *module._buffers):
            vars(module).pop(name, None)  # a learned threshold takes the place of the constructor's

    def unlisted(self) -> nullcontext[None]:
        return nullcontext()

    def threshold(self, module: Any) -> float | None:
        return float(module.v_threshold) if isinstance(module.v_threshold, int | float) else None

    def dynamics(self, module: Any) -> Dynamics:
        if isinstance(module, QIFLayer):
            return quadratic(module.qif_parameters)
        leak = _leak(module)
        beta = 1 - 1 / leak["tau"] if leak else 1.0
        gain = 1 / leak["tau"] if leak and leak["decay_input"] else 1.0
        return leaky(
            beta, gain, module.v_threshold, module.v_reset, rest=0.0 if module.v_reset is None else module.v_reset,
            subtracted=beta * module.v_threshold,
        )  # fmt: skip

    def takes_sequences(self, module: Any) -> bool:
        if isinstance(module, neuron.BaseNode):
            return bool(module.step_mode == "m")
        return any(cls.__name__.startswith("MultiStep") for cls in type(module).__mro__)

    def tdbn(self, norm: nn.Module) -> type[nn.Module] | None:
        if type(norm) in TDBN and norm.step_mode != "m":
            raise ValueError(
                "tdBN normalizes over time, and this norm sees one step at a time; call "
                "functional.set_step_mode(model, 'm') first"
            )
        return TDBN.get(type(norm))


HOST = _SpikingJelly()


def _ours(cls: type[Any]) -> type[Any]:
    """Return the class of this package that ``cls`` is or extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("qif_plugins."))


def _tau_by_now(module: Any) -> float:
    """Return the time constant of the LIF neuron whose leak is the slope of a learned map at its resting point.

    Raises:
        ValueError: The slope is not between 0 and 1, or not one number.
    """
    params = module.qif_parameters
    beta = torch.as_tensor(params.map_derivative(params.fixed_points()[0]), dtype=torch.float64).detach()
    if bool((beta.max() - beta.min()) > 1e-6):
        raise ValueError("its learned leak differs from channel to channel, and LIFNode has one tau")
    if not 0 < beta.mean() < 1:
        raise ValueError(f"the learned slope of its map at rest is {beta.mean().item():.4g}, and a leak is in (0, 1)")
    return 1 / (1 - beta.mean().item())


def _carried(module: Any, request: Request, dynamics: str, normalized: bool, notes: list[str]) -> dict[str, Any]:
    """Return the arguments taken over from the LIF neuron, except those for the dynamics."""
    carried = {name: getattr(module, name) for name in CARRIED if hasattr(module, name)}
    if not isinstance(module.v_threshold, int | float):
        raise ValueError("its threshold is a tensor; pass v_threshold=<number>")
    carried["v_threshold"] = float(module.v_threshold)
    if module.v_reset is None and "v_reset" not in request.parameters and dynamics != "monotone":
        carried["v_reset"] = 0.0
        notes.append("reset to 0 instead of subtracting the threshold, after which the parabola may run away")
    if getattr(module, "backend", None) == "cupy":
        carried["backend"] = "cupy"  # in place of "torch", the host's default, "auto" is faster with the same bits
    if "surrogate_function" in request.parameters:
        return carried
    own, name, said = module.surrogate_function, type(module.surrogate_function).__name__, list[str]()
    tau, given = _leak(module).get("tau", math.inf), request.parameters.get("tau")
    if isinstance(given, int | float | Tensor) and not hasattr(module, "w"):  # a learned leak stays
        tau = given
    leak = 1 - 1 / max(mean_of(tau), 1.0)
    own_area = partial(area, fused(own), carried["v_threshold"])
    choice = request.surrogate(normalized, leak, {"surrogate_function": own}, own_area, name, said)
    spiking = getattr(own, "spiking", True)
    if "window" in choice and (not spiking or any(True for _ in (*own.parameters(), *own.buffers()))):
        choice = {"surrogate_function": own}
        said = [f"surrogate {name} stays: {'it learns' if spiking else 'not spiking'}"]
    notes += said
    return carried | choice


def _dynamics(module: Any, dynamics: str, notes: list[str]) -> dict[str, Any]:
    leak = _leak(module)
    if dynamics in MATCHED and not leak:
        leak = {"tau": 1 / (1 - NO_LEAK_BETA), "decay_input": False}
        notes.append(f"it has no leak, matched at {NO_LEAK_BETA} (tau=... chooses another)")
    return leak if dynamics == "explicit" else leak | {"dynamics": dynamics}


def _leak(module: Any) -> dict[str, Any]:
    """Return LIFNode's arguments for the leak that a neuron has now; empty for a neuron without leak."""
    leak = {name: getattr(module, name) for name in ("tau", "decay_input") if hasattr(module, name)}
    if hasattr(module, "w"):
        learned = module.w.detach().float().sigmoid().clamp(MIN_LEAK, 1 - MIN_LEAK)
        leak["tau"] = DEFAULT_TAU if learned.is_meta else 1 / learned.item()
    return leak


def _arguments(cls: type[Any]) -> frozenset[str]:
    """Return the names of the constructor's arguments, and of those that it passes on to its base class."""
    parameters = inspect.signature(cls).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return names | _arguments(cls.__bases__[1]) if takes_more else names


def _host_attributes(cls: type[Any]) -> frozenset[str]:
    return frozenset(vars(cls()))
