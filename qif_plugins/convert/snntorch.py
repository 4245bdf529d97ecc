"""snnTorch's part of :func:`qif_plugins.swap`: the QIF class and the arguments for each of its neurons."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from ..adapters.snntorch import QIF
from ..adapters.snntorch.parameters import matched_leak
from ..adapters.snntorch.surrogate import SpikeGradient, recognised
from ..neuron.arguments import MAX_BETA
from ..neuron.functional import check_sequence
from ..neuron.names import MATCHED
from ..support.numbers import number
from .area import area
from .hosts import NO_LEAK_BETA, Neuron, Plan, Request, Snapshot, check_arguments, never_fires, no_leak
from .rates import Dynamics, leaky, mean_of, quadratic
from .rebuild import classify, extended, own_code


class LapicqueQIF(QIF):
    """QIF neuron that replaces ``snn.Lapicque``, whose leak is 1 - Δt/RC and whose input is scaled by Δt/C."""

    time_step: Tensor
    R: Tensor
    C: Tensor

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """Run one time step, as :meth:`QIF.forward` does."""
        return super().forward(input_ * (self.time_step / self.C), mem)

    def forward_sequence(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run all time steps, as :meth:`QIF.forward_sequence` does."""
        return super().forward_sequence(x_seq * (self.time_step / self.C), mem)

    def _used(self, name: str, tensor: Tensor) -> Tensor:
        # The state_dict's beta is exp(-Δt/RC), but Lapicque leaks with 1 - Δt/RC.
        return super()._used(name, leak_of_lapicque(self).to(tensor) if name == "beta" else tensor)

    def init_lapicque(self) -> Tensor:
        """Return the membrane at rest, under Lapicque's name for it."""
        return self.reset_mem()


class RecurrentQIF(QIF, snn.RLeaky):
    """QIF neuron that replaces ``snn.RLeaky`` and keeps its recurrent layer V, which feeds the last spikes back::

        mem[t] = f(v[t-1]) + g (x[t] + V(spk[t-1]))

    The input gain g is 1 unless :func:`qif_plugins.swap` chooses another or is given one. Only
    :func:`qif_plugins.swap` makes such a neuron; it has no constructor of its own.
    """

    recurrent: nn.Module
    spk: Tensor

    def forward(self, input_: Tensor, spk: Tensor | None = None, mem: Tensor | None = None) -> Any:
        """Run one time step.

        Args:
            input_: Input current.
            spk: Spikes of the step before; ``None`` (default) takes the neuron's own.
            mem: Membrane, as in :meth:`QIF.forward`.

        Returns:
            The same as :meth:`QIF.forward`.
        """
        if self.init_hidden and spk is not None:
            raise TypeError("spk cannot be passed to a neuron with init_hidden=True, which keeps its own")
        before = self.spk if spk is None else spk
        if before.shape != input_.shape:
            before = torch.zeros_like(input_)
        out = super().forward(input_ + self.recurrent(before), mem)
        self.spk = out if isinstance(out, Tensor) else out[0]
        return out

    def forward_sequence(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run all time steps, one after the other, because each needs the spikes of the step before."""
        check_sequence(x_seq)
        if mem is not None:
            self.mem = mem
        return self._step_through(x_seq)

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Reset, and return spikes and membrane at rest, as RLeaky does."""
        self.spk = torch.zeros_like(self.spk)
        return self.spk, super().reset_mem()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_buffers"]["spk"] = self.spk.detach()
        return state

    def init_rleaky(self) -> tuple[Tensor, Tensor]:
        """Reset, under RLeaky's name for it."""
        return self.reset_mem()


TARGETS: dict[type[Any], type[Any]] = {snn.Leaky: QIF, snn.Lapicque: LapicqueQIF, snn.RLeaky: RecurrentQIF}
"""The LIF family: host class -> the QIF class that takes its place."""

NEURONS = (snn.SpikingNeuron, snn.LeakyParallel)
CARRIED = ("init_hidden", "inhibition", "surrogate_disable", "reset_mechanism", "state_quant", "output", "reset_delay")
GAIN_ARGUMENTS = frozenset({"input_gain"})
PARAMETERS = frozenset(inspect.signature(QIF).parameters) - {"window", "dynamics"}
RECURRENT = ("all_to_all", "learn_recurrent", "linear_features", "kernel_size", "conv2d_channels")
"""RLeaky's attributes for its recurrent layer."""
LEARNED = ("beta", "threshold", "graded_spikes_factor")
_PROBES: dict[type[Any], dict[str, Any]] = {
    QIF: {"beta": 0.5},
    snn.Leaky: {"beta": 0.5},
    snn.Lapicque: {"beta": 0.5},
    snn.RLeaky: {"beta": 0.5, "all_to_all": False},
}


class HostGradient:
    """A function made by ``snntorch.surrogate``, which pickles as the name of its factory and the argument."""

    def __init__(self, function: Any, argument: dict[str, Any]) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return _make_gradient, (self.function.__qualname__.split(".")[0], self.argument)

    def __deepcopy__(self, memo: Any) -> HostGradient:
        return self

    def resolve(self, module: nn.Module) -> Any:
        """Return the function itself."""
        return self.function


def _make_gradient(factory: str, argument: dict[str, Any]) -> HostGradient:
    return HostGradient(getattr(snn.surrogate, factory)(**argument), argument)


class _SnnTorch:
    """Implements :class:`qif_plugins.convert.hosts.Host` for snnTorch."""

    def neuron(self, module: nn.Module) -> Neuron | None:
        if isinstance(module, QIF):
            return Neuron("qif")
        found = classify(module, extended(type(module), TARGETS), NEURONS)
        return Neuron("lif", never_fires(module.threshold)) if found == Neuron("lif") else found

    def plan(self, module: Any, request: Request, normalized: bool) -> Plan:
        known = extended(type(module), TARGETS)
        assert known is not None
        check_arguments(QIF, request.parameters, PARAMETERS)
        learns_leak = isinstance(module.beta, nn.Parameter) and known is not snn.Lapicque
        dynamics, notes = request.map(), list[str]()
        takes_leak = dynamics in MATCHED and not learns_leak and "beta" not in request.parameters
        arguments = _carried(module, request, normalized, notes)
        arguments |= _dynamics(module, dynamics, "beta" in request.parameters, notes)
        if "reset_mechanism" not in request.parameters:
            arguments |= _reset(module, arguments.get("dynamics"), notes)
        idle = learns_leak and dynamics not in MATCHED
        if learns_leak:
            learned = f"its leak beta {'goes on being learned' if module.beta.requires_grad else 'stays frozen'}"
            notes.append("beta is kept but not used" if idle else learned)
        gain = request.gain(normalized and known is not snn.Lapicque, GAIN_ARGUMENTS)
        arguments |= {} if gain is None else {"input_gain": gain}
        if loaded := request.loaded_gain(module, GAIN_ARGUMENTS, notes):
            gain = None
            arguments |= loaded
        arguments |= request.parameters
        with self.unlisted():
            QIF(**arguments)  # refuses before anything has changed
        return Plan(
            TARGETS[known], arguments, dynamics, tuple(notes),
            attributes={name: getattr(module, name) for name in RECURRENT if known is snn.RLeaky}
            | {"_no_leak_as": NO_LEAK_BETA if takes_leak else None, "_open_to_leak": request.chooses_map}
            | {"_gain_passed": request.passes(GAIN_ARGUMENTS)},
            own=frozenset({"reset_mechanism_val", *(request.parameters.keys() & {"beta", "threshold"})}),
            idle=frozenset({"beta"}) if idle else frozenset(),
            gain=gain,
        )  # fmt: skip

    def back(self, module: Any) -> Plan:
        if code := own_code(module, QIF):
            raise ValueError(f"{type(module).__name__} has code of its own ({', '.join(code)})")
        if module.dynamics not in MATCHED:
            raise ValueError(no_leak(module.dynamics))
        names = inspect.signature(snn.Leaky).parameters
        arguments = {name: getattr(module, name) for name in names if hasattr(module, name)}
        arguments |= {f"learn_{n}": isinstance(getattr(module, n), nn.Parameter) for n in LEARNED}
        notes = [] if module.input_gain == 1 else [f"input gain 1, LIF's, instead of {module.input_gain:.4g}"]
        if module.derived_window is not None:
            del arguments["spike_grad"]
            notes.append("the host's own surrogate in place of the window")
        return Plan(snn.Leaky, arguments, "lif", tuple(notes))

    def snapshot(self, module: Any) -> Snapshot:
        known = QIF if isinstance(module, QIF) else extended(type(module), TARGETS)
        assert known is not None
        own = _host_attributes(known) | {n for n in vars(module) if n.startswith("_") and hasattr(type(module), n)}
        extra = {name: value for name, value in vars(module).items() if name not in own and name != "reset"}
        at_rest = {name: _picklable(value) for name, value in vars(module).items() if name != "reset"}
        return Snapshot(at_rest, extra)

    def construct(self, module: nn.Module, plan: Plan) -> None:
        entered = module in snn.SpikingNeuron.instances
        # QIF's constructor calls that of the next class in the MRO, which must be Leaky's.
        first: Any = QIF if issubclass(plan.cls, QIF) else plan.cls
        object.__setattr__(module, "__class__", first)
        first.__init__(module, **plan.arguments)
        if entered:
            snn.SpikingNeuron.instances.pop()
        object.__setattr__(module, "__class__", plan.cls)
        if isinstance(module, RecurrentQIF):
            module.register_buffer("spk", torch.zeros(0), persistent=False)

    def assign(self, module: Any, changes: Mapping[str, Any]) -> None:
        for name, value in changes.items():
            setattr(module, name, value)
        if "reset_mechanism" in changes:
            # The host's setter does not update the function that its constructor chose by the mechanism.
            ending = {"subtract": "sub", "zero": "zero", "none": "int"}[module.reset_mechanism]
            module.state_function = getattr(module, f"_base_{ending}")

    def update_derived(self, module: nn.Module) -> None:
        if isinstance(module, QIF):
            module._refresh()

    @contextlib.contextmanager
    def unlisted(self) -> Iterator[None]:
        entered = {id(neuron) for neuron in snn.SpikingNeuron.instances}
        try:
            yield
        finally:  # copies that were freed inside have left the list
            snn.SpikingNeuron.instances[:] = [n for n in snn.SpikingNeuron.instances if id(n) in entered]

    def threshold(self, module: Any) -> float | None:
        threshold = module.threshold
        return None if threshold.is_meta or threshold.numel() != 1 else threshold.item()

    def dynamics(self, module: Any) -> Dynamics:
        lapicque = isinstance(module, snn.Lapicque | LapicqueQIF)
        gain = module.time_step / module.C if lapicque else 1.0
        if isinstance(module, QIF):
            return quadratic(module.qif_parameters, gain)
        beta = leak_of_lapicque(module) if lapicque else module.beta.clamp(0, 1)
        resets = module.reset_mechanism == "zero"
        subtracted = module.threshold if module.reset_mechanism == "subtract" else 0.0
        return leaky(beta, gain, module.threshold, 0.0 if resets else None, subtracted=subtracted)

    def takes_sequences(self, module: Any) -> bool:
        return False

    def tdbn(self, norm: nn.Module) -> type[nn.Module] | None:
        return None


HOST = _SnnTorch()


def leak_of_lapicque(module: Any) -> Tensor:
    """Return the share of its membrane that a Lapicque neuron keeps in a step."""
    return 1 - module.time_step / (module.R * module.C)


def _carried(module: Any, request: Request, normalized: bool, notes: list[str]) -> dict[str, Any]:
    """Return the arguments taken over from the LIF neuron, except those for the dynamics."""
    carried = {name: getattr(module, name) for name in CARRIED if hasattr(module, name)}
    carried |= {
        f"learn_{name}": isinstance(getattr(module, name, None), nn.Parameter)
        for name in ("threshold", "graded_spikes_factor")
    }
    if module.threshold.is_meta or module.beta.is_meta:
        raise ValueError("its beta and threshold have no values on the meta device; load the checkpoint, then swap")
    carried["threshold"] = module.threshold.detach()
    carried["graded_spikes_factor"] = 1.0
    if "spike_grad" in request.parameters or module.surrogate_disable:
        return carried
    name = getattr(module.spike_grad, "__qualname__", type(module.spike_grad).__name__).split(".")[0]
    core = recognised(module.spike_grad)
    core = core.surrogate if isinstance(core, SpikeGradient) else core
    # In a recurrent layer, a surrogate that passes on more makes the gradient grow from step to step.
    own, recurrent = {"spike_grad": module.spike_grad}, isinstance(module, snn.RLeaky)
    own_area = (lambda: 1.0) if recurrent else partial(area, core, carried["threshold"])
    leak = request.parameters.get("beta")
    if not isinstance(leak, int | float | Tensor):
        leak = _leak(module).clamp(max=MAX_BETA) if isinstance(module.beta, nn.Parameter) else _leak(module)
    return carried | request.surrogate(normalized, mean_of(leak), own, own_area, name, notes)


def _reset(module: Any, dynamics: str | None, notes: list[str]) -> dict[str, Any]:
    """Return the argument for the reset.

    Raises:
        ValueError: The neuron never resets.
    """
    if module.reset_mechanism == "none":
        raise ValueError("it never resets, and without a reset a QIF membrane runs away")
    if module.reset_mechanism == "subtract" and dynamics != "monotone":
        notes.append("reset to zero instead of subtracting the threshold, after which the parabola may run away")
        return {"reset_mechanism": "zero"}
    return {}


def _dynamics(module: Any, dynamics: str, chosen: bool, notes: list[str]) -> dict[str, Any]:
    """Return QIF's arguments for the map; ``chosen`` is whether the user passed the leak."""
    if dynamics not in MATCHED:
        return {} if dynamics == "explicit" else {"dynamics": dynamics}
    beta = _leak(module)
    if isinstance(module.beta, nn.Parameter):
        # Learning may have moved it out of the range to which the host and this package clamp it.
        return {"dynamics": dynamics, "beta": beta.clamp(0, MAX_BETA), "learn_beta": True}
    if not chosen and isinstance(module, snn.Lapicque) and bool((beta < 0).any()):
        raise ValueError(
            f"its leak 1 - time_step/RC is {number(beta, '.4g')}, so its membrane changes its sign at every step; "
            "a shorter time_step gives a leak that can be matched, and beta=... chooses one"
        )
    without = beta >= 1
    if not chosen and bool(without.any()):
        which = "it has" if bool(without.all()) else "some of its neurons have"
        notes.append(f"{which} no leak, matched at {NO_LEAK_BETA} (beta=... chooses another)")
    return {"dynamics": dynamics, "beta": matched_leak(beta, NO_LEAK_BETA)}


def _leak(module: Any) -> Tensor:
    """Return the share of its membrane that a LIF neuron keeps in a step."""
    beta: Tensor = (leak_of_lapicque(module) if isinstance(module, snn.Lapicque) else module.beta).detach()
    return beta


def _picklable(value: Any) -> Any:
    name = getattr(value, "__qualname__", "")
    if getattr(value, "__module__", "") != "snntorch.surrogate" or not name.endswith("<locals>.inner"):
        return value
    argument = inspect.getclosurevars(value).nonlocals
    return HostGradient(value, dict(argument)) if name.split(".")[0] in ("atan", "fast_sigmoid", "sigmoid") else value


def _host_attributes(cls: type[Any]) -> frozenset[str]:
    with HOST.unlisted():
        return frozenset(vars(cls(**_PROBES[cls])))
