"""Scale the weights of a network without norms, before it trains, so that every layer spikes.

The analytic windows assume an input g·x whose deviation is the threshold θ, as under tdBN. With PyTorch's initial
weights and no norm the input is far smaller, and a deep network does not spike at all. :func:`initialise` scales the
weights layer by layer until each neuron receives that deviation, as Mishkin and Matas do for analog networks (*All you
need is a good init*, arXiv 1511.06422).

If many neurons follow one another that is not enough, since each layer of random weights passes on less of its input
than it got. There every neuron starts as a copy of one before it. Its weights become

    W = ρ P + √(1 - ρ²) N,     ρ² = 0.965

with the initial weights N and an identity P, both with rows of length 1. The mean of each row is subtracted, so that
the input has mean 0 and the firing rate does not drift from layer to layer. With a larger share ρ² of the identity
gradients grow from layer to layer, with a smaller one they shrink. With this share, in perceptrons of 100 layers of 128
neurons, they keep their size to some per cent per layer. Zagoruyko and Komodakis use identities in place of shortcuts
(*DiracNets*, arXiv 1706.00388).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..convert.find import survey
from ..convert.hosts import gain_in_a_row, loaded_hosts
from ..convert.rates import Dynamics
from ..convert.trial import Call, unwrapped
from ..convert.walk import Site
from ..convert.walk import neurons as find_neurons
from ..neuron.module import QIFLayer
from ..neuron.moments import MomentClosureError
from ..neuron.observe import Seen, watching
from ..support.text import plus_minus, text_table
from .running import check_steps, input_of, preserved, run_on
from .statistics import Moments

TOLERANCE = 0.01
"""Largest relative error of the deviation of an input."""
ATTEMPTS = 8
"""Largest number of times that the weights of a layer are scaled. Once is enough if they feed their neuron through
linear modules."""
MARGIN = 4.0
"""Largest distance of the largest singular value of initial weights above √rows + √columns, in units of their root mean
square. Independent normal entries exceed it with a probability below exp(-MARGIN² / 2) = 3e-4 (Davidson and Szarek,
*Local operator theory, random matrices and Banach spaces*, theorem II.13)."""
IDENTITY = 0.965
"""Share of an identity in the mean square of the weights, if many neurons follow one another."""
INTEGRATES = 1000.0
"""Threshold from which on a neuron is not meant to spike."""

_WEIGHTS = (nn.Linear, _ConvNd)
_FROZEN = " is frozen (requires_grad=False)"


@dataclass(frozen=True, kw_only=True)
class InitialisedLayer:
    """Weights and input of one neuron layer; NaN if they were not measured.

    Attributes:
        name: The neuron's name in the model.
        weights: Names of the modules whose weight and bias were scaled; empty if the layer was left alone.
        factor: Factor on their weight and bias, after an identity was mixed in.
        identity: Share ρ² of an identity in the weight's mean square; 0 if none was mixed in.
        threshold: Threshold θ.
        std_before: Standard deviation of g·x with the initial weights.
        input_mean: Mean of g·x afterwards.
        input_std: Standard deviation of g·x afterwards.
        rate: Spikes per neuron-step afterwards.
        expected_rate: Spikes per neuron-step of the same neuron under a normal input, independent in time, of mean
            ``input_mean`` and the intended deviation.
        note: The reason why the layer was left alone, or a remark; or ``""``.
    """

    name: str
    weights: tuple[str, ...] = ()
    factor: float = 1.0
    identity: float = 0.0
    threshold: float = math.nan
    std_before: float = math.nan
    input_mean: float = math.nan
    input_std: float = math.nan
    rate: float = math.nan
    expected_rate: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class InitialisationReport:
    """Result of :func:`initialise`; ``str()`` is a table.

    Attributes:
        layers: One entry for each neuron layer, in the order in which they ran.
    """

    layers: tuple[InitialisedLayer, ...]

    def __str__(self) -> str:
        header = (
            "layer", "weights", "identity", "scaled by", "std before", "input", "threshold", "spikes/step", "expected",
        )  # fmt: skip
        rows = [
            (
                row.name, ", ".join(row.weights) or "left", f"{row.identity:.3g}", f"{row.factor:.3g}",
                f"{row.std_before:.3g}",
                plus_minus(row.input_mean, row.input_std), f"{row.threshold:.3g}", f"{row.rate:.4f}",
                f"{row.expected_rate:.4f}",
            )
            for row in self.layers
        ]  # fmt: skip
        notes = [f"{row.name}: {row.note}" for row in self.layers if row.note]
        return "\n".join([text_table(header, rows, 2), *([""] if notes else []), *notes])


class _Seen:
    """Input, spikes and steps of one neuron layer in one run of the batch."""

    def __init__(self) -> None:
        self.input = Moments()
        self.spikes = self.neuron_steps = self.steps = self.calls = 0

    def moments(self) -> tuple[float, float]:
        """Return deviation and mean of the input."""
        return self.input.std.item(), self.input.mean.item()


def initialise(model: nn.Module, batch: Any, *, steps: int = 1, identity: float | None = None) -> InitialisationReport:
    """Scale each layer's weights so that its neurons receive an input g·x whose standard deviation is the threshold.

    This is for networks that train from scratch and have no norm before their neurons. The layers are scaled in the
    order in which they run: the weight and the bias of the linear and convolution modules that feed a neuron are
    multiplied by one factor. The deviation is taken over batch, time and neurons. The membranes then have the scale
    that the analytic windows assume, and the neurons spike about as often. QIF neurons and the hosts' LIF neurons are
    treated alike.

    Two things are different if more than 12 neurons follow one another, not counting those that a shortcut passes by
    (see :mod:`qif_plugins.diagnostics.initialisation`):

    * Weights that follow another neuron are first mixed with an identity, and their biases become 0.
    * The deviation is the threshold times the gain that :func:`~qif_plugins.swap` would choose under norms for a
      network of this depth, up to 3. The surrogates of QIF neurons then assume this deviation. They keep it in their
      attribute ``window_scale``, which is not part of the ``state_dict``: set it when you load one to train further.

    Modes, membranes, norm statistics, hooks and random numbers do not change, and after an error the weights do not
    either.

    Some layers are left alone, and the report says why: a norm feeds the neuron, and so sets the scale; no weight feeds
    it, or a frozen one (``requires_grad=False``); it does not run; its threshold is 1000 or more; or its class is
    unknown.

    Args:
        model: A model of either host, before ``torch.compile`` and before wrapping for several devices.
        batch: A tensor, or a tuple or list whose first element is the input, as a DataLoader gives it; or a callable
            that takes the model and runs it in its own way, such as over time. The callable resets the state itself.
        steps: How often to call the model on the batch, without a reset in between; for models that take one time
            step per call. Default 1.
        identity: Share of an identity in the mean square of each weight that follows another neuron, in [0, 1).
            ``None`` (default): 0 for up to 12 neurons in a row, 0.965 for more.

    Returns:
        The report with the factor of each layer, and its input and firing rate afterwards; ``str()`` is a table.

    Raises:
        ValueError: ``identity`` is out of range. The model has no spiking neuron. It shows signs of training: norms
            that have counted batches, a gradient, calibrated windows, or weights whose entries are not independent (a
            model that was trained for a few steps shows no such sign). Weights are shared between neurons or by
            parametrization, or their output is added to spikes or to the network's input, which no weight scales.
            Every weight that could be scaled is frozen. Or an input does not vary, or is not finite.
        TypeError: ``model`` is no module, ``batch`` is something else, or the model takes more than one input.
    """
    check_steps(steps)
    if identity is not None and not 0 <= identity < 1:
        raise ValueError(f"identity must be at least 0 and below 1, got {identity}; None chooses it by depth")
    if not isinstance(model, nn.Module):
        raise TypeError(f"initialise takes a built model, a torch.nn.Module, got {model!r}")
    if unwrapped(model) is not model:
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}: initialise it first, then compile or wrap it"
        )
    hosts = loaded_hosts()
    trained = _signs_of_training(model)
    if trained:
        raise ValueError(f"initialise is for a model that has not been trained, and {trained}")

    x = () if callable(batch) else (input_of(model, batch),)

    def drive(one: nn.Module, *copies: Tensor) -> Any:
        return run_on(one, (copies or x)[0], steps) if x else batch(one)

    neurons = {site.name or "(model)": site for site in find_neurons(model, hosts)}
    if not neurons:
        raise ValueError(
            f"{type(model).__name__} has no spiking neuron of SpikingJelly or snnTorch whose input could be scaled"
        )
    dynamics = {name: site.host.dynamics(site.module) for name, site in neurons.items() if _is_known(site)}
    before = _measure(model, neurons, dynamics, drive)
    if not any(seen.input.n for seen in before.values()):
        raise ValueError("the batch is empty: no neuron received a value. Pass one with at least one sample.")
    found = survey(model, hosts, Call(x, drive=drive))
    places = {site.name or "(model)": site for site in found.sites}
    left = {name: _why_left(model, places[name], before.get(name), dynamics.get(name)) for name in neurons}
    if all(left.values()) and (frozen := _frozen(left)):
        raise ValueError(f"no weight is left to scale, as {frozen}")
    feeding = _feeding(model, {name: places[name] for name in neurons if not left[name]}, places)
    scale = gain_in_a_row(found.depth)
    if identity is None:
        identity = IDENTITY if scale > 1 else 0.0
    mixed = {name: identity if places[name].depth > 1 and identity else 0.0 for name in feeding}
    return _scaled(model, neurons, dynamics, before, feeding, left, drive, scale, mixed)


def _is_known(site: Site) -> bool:
    return site.neuron.role in ("lif", "qif") and not site.neuron.reason


def _why_left(model: nn.Module, site: Site, seen: _Seen | None, dynamics: Dynamics | None) -> str:
    """Return why the weights before a neuron stay unchanged, or ``""``."""
    if dynamics is None:
        return f"left: {site.neuron.reason}"
    if seen is None:
        return "left: the batch does not reach it, or a subclass computes its own steps"
    if site.norms:
        return f"left: fed by {', '.join(site.norms)}"
    if not site.weights:
        return "left: no weight before it"
    if not 0 < dynamics.threshold < INTEGRATES:
        return f"left: with a threshold of {dynamics.threshold:g} it is not meant to spike"
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in site.weights and not parameter.requires_grad:
            return f"left: {name}{_FROZEN}"
    return ""


def _frozen(left: Mapping[str, str]) -> str:
    """Return a sentence on the frozen parameters among the reasons and the way out, or ``""``."""
    frozen = [reason.removeprefix("left: ").removesuffix(_FROZEN) for reason in left.values() if _FROZEN in reason]
    if not frozen:
        return ""
    what = f"{', '.join(frozen[:3])}{' and others' if len(frozen) > 3 else ''}"
    return f"{what} cannot be scaled while frozen: initialise before freezing, or set requires_grad=True"


def _feeding(model: nn.Module, scaled: Mapping[str, Site], places: Mapping[str, Site]) -> dict[str, list[str]]:
    """Find the modules whose weights set the scale of each neuron's input.

    Raises:
        ValueError: They also set the scale of another neuron, or another part of the input has no weight.
    """
    modules = dict(model.named_modules())
    shared = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for name, site in scaled.items():
        if site.direct:
            raise ValueError(
                f"{name} adds up the output of {', '.join(site.weights)} and of {', '.join(site.direct)}, which no "
                "weight scales, so no factor on the weights can set the deviation of the sum. Put a norm before "
                f"{name}, or a weight on the other path."
            )
        for weight in site.weights:
            module = modules.get(weight)
            if not isinstance(module, _WEIGHTS):
                what = "a parameter that a function uses" if module is None else f"a {type(module).__name__}"
                raise ValueError(
                    f"{name} is fed by {weight}, {what}; initialise scales the weights of linear and convolution "
                    "modules. Use one of these, or put a norm before the neuron."
                )
            others = sorted(other for other, place in places.items() if weight in place.weights and other != name)
            if others or any(shared[id(p)] > 1 for p in module.parameters(recurse=False)):
                by = f"feeds {', '.join(others)}, too" if others else "shares its parameters with another module"
                raise ValueError(
                    f"{weight}, which feeds {name}, {by}, so one factor cannot set the scale of both. Put a norm "
                    "before these neurons, or give each a weight of its own."
                )
    return {name: site.weights for name, site in scaled.items()}


def _measure(
    model: nn.Module, neurons: Mapping[str, Site], dynamics: Mapping[str, Dynamics], drive: Any,
    adjust: Callable[[str, float], float] | None = None,
) -> dict[str, _Seen]:  # fmt: skip
    """Run the batch once, and return the measurements of the neurons that ran, in the order in which they ran.

    Args:
        model: The model.
        neurons: Its neurons by name.
        dynamics: Gain and threshold of those that are measured.
        drive: Function that runs the model on the batch.
        adjust: Function of the name and the input's deviation of a neuron that is about to run. It scales the weights
            before the neuron and returns the factor, by which the current input is scaled, too. Default: no scaling.
    """
    found: dict[str, _Seen] = {}

    def entering(name: str, site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                return None
            seen = found.setdefault(name, _Seen())
            current = x.detach().reshape(-1, 1) * dynamics[name].gain
            factor = 1.0
            if adjust is not None:
                now = Moments()
                now.update(current)
                factor = adjust(name, now.std.item())
            seen.input.update(current * factor)
            seen.calls += 1
            seen.steps += len(x) if site.host.takes_sequences(module) else 1
            if factor == 1.0:
                return None
            scaled = x * factor
            return (
                tuple(scaled if value is x else value for value in args),
                {key: scaled if value is x else value for key, value in kwargs.items()},
            )

        return hook

    def see(seen: Seen) -> None:
        if seen.name in found:
            found[seen.name].spikes += int((seen.spikes != 0).sum().item())
            found[seen.name].neuron_steps += seen.spikes.numel()

    known = {name: neurons[name] for name in dynamics}
    # preserved gives every run the same random numbers, so that randomness in the model does not affect comparisons.
    with preserved(model), watching({name: site.module for name, site in known.items()}, see), torch.no_grad():
        for name, site in known.items():
            site.module.register_forward_pre_hook(entering(name, site), with_kwargs=True)
        drive(model)
    return found


def _scaled(
    model: nn.Module, neurons: Mapping[str, Site], dynamics: Mapping[str, Dynamics], before: dict[str, _Seen],
    feeding: Mapping[str, list[str]], left: Mapping[str, str], drive: Any, scale: float, mixed: dict[str, float],
) -> InitialisationReport:  # fmt: skip
    """Mix identities in, scale the weights and report.

    Args:
        scale: The deviation that the inputs get, in thresholds.
        mixed: Neuron -> the share of an identity in the weights before it. It becomes 0 if they cannot hold one.
    """
    modules = dict(model.named_modules())
    parameters = {
        name: [p for weight in weights for p in modules[weight].parameters(recurse=False)]
        for name, weights in feeding.items()
    }
    saved = [(p, p.detach().clone()) for own in parameters.values() for p in own]
    layers = [neurons[name].module for name in feeding if isinstance(neurons[name].module, QIFLayer)]
    assumed = [(layer, layer.window_scale) for layer in layers]
    targets = {name: scale * dynamics[name].threshold for name in feeding}
    notes = dict(left)
    factors, attempts = dict.fromkeys(feeding, 1.0), Counter[str]()
    # One call of these neurons has the whole input, all time steps, so they can all be scaled in a single run.
    at_once = {n for n in feeding if before[n].calls == 1 and neurons[n].host.takes_sequences(neurons[n].module)}

    def is_off(name: str, std: float, mean: float) -> bool:
        return attempts[name] < ATTEMPTS and _is_off(name, std, mean, targets[name], _frozen(left))

    def adjust(name: str, std: float) -> float:
        attempts[name] += 1
        factor = targets[name] / std
        factors[name] *= factor
        for parameter in parameters[name]:
            parameter.mul_(factor)
        return factor

    def adjust_at_once(name: str, std: float) -> float:
        return adjust(name, std) if name in at_once and std > 0 and is_off(name, std, math.nan) else 1.0

    seen = before
    try:
        for name, share in mixed.items():
            took = [_mix_identity(modules[weight], share) for weight in feeding[name] if share]
            mixed[name] = share if any(took) else 0.0
        if any(mixed.values()):
            seen = _measure(model, neurons, dynamics, drive)
        # In the order of the run, as the input of later neurons depends on the earlier ones.
        while name := next((n for n in seen if n in feeding and is_off(n, *seen[n].moments())), ""):
            if name in at_once:
                _measure(model, neurons, dynamics, drive, adjust_at_once)
            else:
                with torch.no_grad():
                    adjust(name, seen[name].moments()[0])
            seen = _measure(model, neurons, dynamics, drive)
        for name in feeding:
            if scale > 1 and isinstance(layer := neurons[name].module, QIFLayer):
                try:
                    layer.window_scale = scale
                except MomentClosureError:  # the parabola's, for large inputs
                    notes[name] = (
                        "its surrogate assumes an input deviation of one threshold, since its membrane is not "
                        f"stationary under {scale:.3g} thresholds; with dynamics='monotone' it would be"
                    )
    except BaseException:
        with torch.no_grad():
            for parameter, copy in saved:
                parameter.copy_(copy)
        for layer, assumption in assumed:
            layer.window_scale = assumption
        raise
    order = [*before, *(name for name in neurons if name not in before)]
    rows = [
        InitialisedLayer(name=name, note=left[name])
        if name not in seen
        else _row(
            name, dynamics[name], before[name], seen[name], feeding.get(name, []), factors.get(name, 1.0), notes[name],
            targets.get(name, math.nan), mixed.get(name, 0.0),
        )
        for name in order
    ]  # fmt: skip
    return InitialisationReport(tuple(rows))


@torch.no_grad()
def _mix_identity(module: Any, share: float) -> bool:
    """Mix an identity into the weight of a linear or convolution module, in place, and set its bias to 0.

    The mean square becomes that of rows of length 1. If there are m outputs and n inputs, output i copies input j where
    i and j have the same remainder modulo min(m, n). An identity that the weight has already is replaced.

    Args:
        module: The module. Transposed convolutions, and modules whose outputs have one input each, are left unchanged.
        share: Share ρ² of the identity in the mean square.

    Returns:
        Whether there is an identity in the weight now.

    Raises:
        ValueError: The weight is no parameter of the module, so its next call would compute it anew.
    """
    if getattr(module, "transposed", False) or module.weight[0].numel() == 1:
        return False
    if "weight" not in module._parameters:
        raise ValueError(
            f"the weight of {module} is computed from other parameters, as under weight_norm, so no identity can be "
            "mixed in: initialise before that is applied, or pass identity=0"
        )
    weight = module.weight.to(torch.promote_types(module.weight.dtype, torch.float32))
    groups = getattr(module, "groups", 1)
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    least = min(outputs, inputs)
    rows, columns = torch.arange(outputs) % least, torch.arange(inputs) % least
    copies = (rows[:, None] == columns).to(weight).repeat(groups, 1)
    identity = torch.zeros_like(weight)
    identity[_centre(module)] = copies
    dims = tuple(range(1, weight.dim()))
    own, identity = (part - part.mean(dims, keepdim=True) for part in (weight, identity))
    if not identity.any():  # a single output, which would be the mean of all inputs
        return False
    own = own - (own * identity).sum() / identity.square().sum() * identity
    fan_in = weight[0].numel()

    def unit(part: Tensor) -> Tensor:
        return part / (part.square().mean() * fan_in).sqrt().clamp(min=1e-30)

    module.weight.copy_(math.sqrt(share) * unit(identity) + math.sqrt(1 - share) * unit(own))
    if module.bias is not None:
        module.bias.zero_()
    return True


def _centre(module: Any) -> tuple[Any, ...]:
    """Return the index of the weights by which a kernel copies an image without a shift; for a linear module, of all.

    An even kernel has two positions next to its centre. The padding before the image decides which of them meets the
    pixel of the output.
    """
    centre: list[int] = []
    for i, size in enumerate(module.weight.shape[2:]):
        dilation, padding = module.dilation[i], module.padding
        if isinstance(padding, str):
            before = dilation * (size - 1) // 2 if padding == "same" else 0
        else:
            before = padding[i]
        centre.append(min(max(before // dilation, (size - 1) // 2), size // 2))
    return (..., *centre)


def _is_off(name: str, std: float, mean: float, target: float, frozen: str) -> bool:
    """Return whether the deviation of an input differs from ``target``. Errors also contain the sentence ``frozen``.

    Raises:
        ValueError: The deviation is not finite, or 0.
    """
    if not math.isfinite(std):
        raise ValueError(
            f"{name} received an input that is not finite; look for the NaN where the model runs before it"
        )
    if not std > 0:
        raise ValueError(
            f"the input of {name} is constantly {mean:g}, so no factor on the weights can give it a deviation: its "
            "weights are 0, or no layer before it spikes. Pass another batch or more steps, or check the layer before "
            "it." + (f" Note that {frozen}." if frozen else "")
        )
    return abs(std / target - 1) > TOLERANCE


def _row(
    name: str, dynamics: Dynamics, before: _Seen, after: _Seen, weights: list[str], factor: float, note: str,
    target: float, identity: float,
) -> InitialisedLayer:  # fmt: skip
    std, mean = after.moments()
    if weights and abs(std / target - 1) > TOLERANCE:
        note = (
            f"its input has a deviation of {std:.3g} instead of {target:.3g}: something between its "
            "weights and it, or its own feedback, does not scale with them"
        )
    return InitialisedLayer(
        name=name, weights=tuple(weights), factor=factor, identity=identity, threshold=dynamics.threshold,
        std_before=before.moments()[0], input_mean=mean, input_std=std, rate=after.spikes / max(after.neuron_steps, 1),
        expected_rate=_expected(dynamics, mean, target if weights else dynamics.threshold, after.steps), note=note,
    )  # fmt: skip


def _expected(dynamics: Dynamics, mean: float, std: float, steps: int) -> float:
    """Compute the spikes per neuron-step under normal input of these moments, over ``steps`` steps from rest."""
    size = min(max(steps, 1), 64), 4096
    draws = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return dynamics.rate((mean + std * draws) / dynamics.gain)


def _signs_of_training(model: nn.Module) -> str:
    """Return the sign that a model was trained, and the way out if it was not; or ``""``."""
    for name, module in model.named_modules():
        at = name or "the model"
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None:
            batches = int(module.num_batches_tracked)
            if batches:
                return (
                    f"{at} has counted {batches} batches. If these did not train it, call its reset_running_stats() "
                    "first."
                )
        if isinstance(module, QIFLayer) and module.measured_moments:
            return f"the window of {at} is calibrated to its current input. Initialise first, then calibrate."
        if isinstance(module, _WEIGHTS) and not nn.parameter.is_lazy(module.weight) and _is_structured(module.weight):
            return (
                f"the weights of {at} are not independent of one another, as initial ones are: their largest singular "
                "value is too large for that. Build the model anew, or call the layer's reset_parameters()."
            )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            return f"{name} has a gradient. If it did not train the model, call zero_grad() first."
    return ""


@torch.no_grad()
def _is_structured(weight: Tensor) -> bool:
    """Return whether a weight's largest singular value is above that of independent entries with mean 0.

    Training adds a few directions to the initial noise, and these stand out of its singular values (Martin and
    Mahoney, *Implicit self-regularization in deep neural networks*, arXiv 1810.01075).
    """
    matrix = weight.detach().flatten(1).float()
    if matrix.is_meta or not matrix.numel():
        return False
    rows, columns = matrix.shape
    # Power iteration approaches the largest singular value from below, so it raises no false alarm.
    v = torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    v = v.to(matrix.device)
    for _ in range(50):
        v = matrix.T @ (matrix @ nn.functional.normalize(v, dim=0))
    largest = (matrix @ nn.functional.normalize(v, dim=0)).norm()
    limit = (math.sqrt(rows) + math.sqrt(columns) + MARGIN) * matrix.square().mean().sqrt()
    return bool(largest > limit)
