"""Replace the LIF neurons of a built model by QIF neurons, and back.

The neurons change in place (:mod:`~qif_plugins.convert.rebuild`), so that whatever refers to them still does. The
modules ``spikingjelly`` and ``snntorch`` choose the new class of each neuron, and its arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..neuron.module import OTHERS
from ..neuron.moments import MomentClosureError, membrane_moments
from ..neuron.names import DYNAMICS, WINDOWS, DynamicsName, WindowName
from ..neuron.parameters import QIFParameters
from ..neuron.surrogate import Window
from ..support.names import check_known
from .find import Survey, survey
from .hosts import HOSTS, SHALLOW, Host, Plan, Request, gain_in_a_row, loaded_hosts
from .norms import convert_norms, is_tdbn
from .rates import FACTOR, Expected, compared, deviation_after, expected, has_values, mean_of, measured_rates
from .rebuild import rebuild, replaced, restore
from .report import Row, SwapReport, Terms
from .walk import Site

__all__ = ["Row", "SwapReport", "swap"]

_CHOICES = {
    "dynamics": ("auto", *DYNAMICS),
    "norm": ("keep", "tdbn"),
    "readout": ("keep", "swap"),
    "to": ("qif", "lif"),
}


def swap(
    model: nn.Module,
    dynamics: Literal["auto"] | DynamicsName = "auto",
    window: WindowName | Literal["auto", "keep"] | Window = "auto",
    norm: Literal["keep", "tdbn"] = "keep",
    readout: Literal["keep", "swap"] = "keep",
    to: Literal["qif", "lif"] = "qif",
    *,
    example_input: Any = None,
    **parameters: Any,
) -> SwapReport:
    """Replace the LIF neurons of a built model by QIF neurons, in place.

    The LIF neurons are SpikingJelly's ``IFNode``, ``LIFNode`` and ``ParametricLIFNode``, their ``clock_driven`` forms,
    and snnTorch's ``Leaky``, ``Lapicque`` and ``RLeaky``. A subclass is replaced if it adds nothing but a constructor;
    one with methods of its own is left alone, because the swap would lose them.

    Threshold, ``detach_reset``, step mode, hidden-state options, device, dtype, training mode, hooks and parameters
    stay, and the model's state_dict keeps its keys. An ``RLeaky`` keeps its recurrent layer, whose output is added to
    the input. These change:

    * **The map.** It matches the neuron's leak, see ``dynamics``. A learned leak stays learned. A neuron without leak
      is matched at a leak of 0.95.
    * **The input gain**, with ``dynamics="auto"``:

        * If a normalization feeds the neuron, the gain becomes 1.
        * If more than 12 neurons follow one another, it becomes larger, by 0.1 for each further neuron, up to 3.
        * A threshold θ above the norm's weight γ multiplies the gain by θ/max(γ, 1), unless the norm is tdBN.
        * A ``ParametricLIFNode`` with a τ of at most 2 keeps its own gain, which it learns, instead of a gain of 1.
        * If no normalization feeds the neuron, the gain stays LIF's in a model without norms, and becomes 1 if a norm
          feeds another neuron of the model.
    * **The surrogate gradient**, see ``window``.
    * **The reset**, if it subtracts the threshold. With the map without rebound it leaves at most the threshold. With
      any other map it becomes a reset to rest, since the membrane would be unbounded; ``v_reset=None`` or
      ``reset_mechanism="subtract"`` asks for the unbounded one.
    * **The membrane** starts at rest.

    docs/mathematics.md, "Defaults", has these rules as a table, and the measurements behind them.

    Args:
        model: The model, before ``torch.compile`` and before wrapping for several devices.
        dynamics: The map of every neuron:

            * ``"auto"`` (default): the leak matched without rebound, and the input gain as above. Only a neuron that
              leaks to a potential below 0 (a negative ``v_reset``) gets the parabola.
            * ``"monotone"``: the leak matched without rebound, with LIF's gain everywhere.
            * ``"lif"``: the leak matched by the parabola, with LIF's gain everywhere.
            * ``"paper"``: the paper's parameters.
        window: The surrogate gradient of every neuron:

            * ``"auto"`` (default): the isometric Gaussian if a normalization feeds the neuron, else LIF's surrogate.
              There are two exceptions. LIF's surrogate stays under a norm, too, for a leak of 0.8 or more, if at most
              12 neurons follow one another. And a surrogate that would stay is replaced by the isometric Gaussian if
              the area under it is below one half, as with snnTorch's ``fast_sigmoid``, except in an ``RLeaky``.
            * ``"keep"``: each neuron's present surrogate.
            * ``"isometric"``, ``"unbiased"``, ``"paper"``, ``"heuristic"`` or a :class:`~qif_plugins.Window`.

            A derived surrogate is the one for the input that the norm gives, times the gain, and at least as large as
            the threshold.
        norm: ``"keep"`` (default), or ``"tdbn"`` to turn each batch norm that feeds a neuron into tdBN with that
            neuron's threshold. A trained norm keeps its weight and statistics bit for bit; one that has seen no batch
            gets tdBN's initial scale α θ. With ``example_input`` α is 1/√n where n paths add up before the neuron;
            otherwise it is 1. In a network that is called once per time step each step is normalized by itself. The
            report names the norms that stay: those that feed no neuron directly, or one that stays LIF.
        readout: ``"keep"`` (default) leaves a neuron alone if it reads out: if its output reaches the model's output
            with no weight between, or feeds nothing. The decoding was made for LIF's membrane. ``"swap"`` replaces
            readouts as well.
        to: ``"qif"`` (default), or ``"lif"`` to turn every swapped neuron back into the LIF neuron that it was.
            Trained parameters, and whatever was set on the neuron since, stay; what the swap chose goes, such as the
            surrogate and the reset. Norms stay as they are. A neuron that was built as QIF becomes the LIF neuron
            whose leak it matches, for a ``ParametricQIFNode`` the leak that it has learned by then. It keeps the other
            arguments that it was given. One that matches no leak stays QIF, and the report says so.
        example_input: The model's argument, a tuple of arguments, or a dict of them by name. Copies of the model run on
            it in eval mode. They show what feeds what, which neurons read out, and how often each neuron spikes before
            and after the swap. A norm that has seen no batch normalizes by the example's own statistics there.
            Without an example, the order in which modules were registered decides. In a plain ``nn.Sequential`` that
            is certain; elsewhere it is a guess, and the report says so.
        **parameters: Arguments of the QIF neurons, such as ``a=0.2``, ``v_threshold=0.5`` or ``backend="torch"``. They
            take precedence over everything else.

    Returns:
        The report: what each neuron became, which were left alone, and why. ``print`` shows it as a table.

    Raises:
        ValueError: There is nothing to swap, and the message says what was found; the model is compiled or wrapped; a
            choice is unknown; QIF refuses a parameter; or ``example_input`` is needed to tell the readout, or what the
            norms feed. The model is then unchanged.
        TypeError: ``model`` is no module, or a QIF neuron has no such parameter.
    """
    _check(model, {"dynamics": dynamics, "norm": norm, "readout": readout, "to": to}, window)
    hosts = loaded_hosts()
    if to == "lif":
        if (dynamics, window, norm, readout) != ("auto", "auto", "keep", "keep") or parameters:
            raise ValueError(
                "to='lif' takes no other choice, as it restores each neuron as it was; leave the others out"
            )
        return _back(model, hosts)
    request = Request(dynamics, window, parameters)
    found = survey(model, hosts, example_input)
    unknown, else_pass = _unknown(found, request, norm, readout)
    if unknown:
        raise ValueError(
            f"{unknown}. Pass example_input=..., the model's argument, so that swap can follow the data{else_pass}."
        )
    return swap_found(found, request, norm, readout, hosts, refuse=True)


def _unknown(found: Survey, request: Request, norm: str, readout: str) -> tuple[str, str]:
    """Return the reason why a choice cannot be made, and a choice that can; empty strings if all can be made."""
    if found.readout_unknown and readout == "keep":
        return found.readout_unknown, ", or readout='swap' to replace every neuron"
    if found.norms_unknown and (request.chooses_map or norm == "tdbn"):
        return found.norms_unknown, ", or dynamics='monotone', 'lif' or 'paper' for every neuron, with norm='keep'"
    stray = [name for name in found.norms if not any(name in site.norms for site in found.sites)]
    if norm == "tdbn" and stray and any(site.guess for site in found.sites):
        return (
            f"no neuron follows {', '.join(stray)} in the order of registration, as is the case with the norm of a "
            "shortcut, so the order does not tell what it feeds",
            "",
        )
    return "", ""


def swap_found(
    found: Survey, request: Request, norm: str, readout: str, hosts: list[Host], refuse: bool = False
) -> SwapReport:
    """Swap the neurons of a survey, all of them or none.

    Args:
        found: The places of the neurons.
        request: The user's choices.
        norm: As in :func:`swap`.
        readout: As in :func:`swap`.
        hosts: The hosts that have these neurons.
        refuse: Whether to raise an error if there is nothing to swap, or a neuron cannot become what was asked for.
            Default False: the report says so instead.

    Raises:
        ValueError: With ``refuse``, in the two cases above.
    """
    beside_norms = any(site.norms for site in found.sites if site.neuron in (("lif", ""), ("qif", "")))
    request = dataclasses.replace(request, depth=found.depth, beside_norms=beside_norms)
    undo: list[Callable[[], None]] = []
    rates = measured_rates(found, hosts)
    terms = request.terms
    lif = [expected(site, found.norms, rates, terms) if site.neuron == ("lif", "") else None for site in found.sites]
    try:
        gains: dict[str, float] = {}
        rows = []
        for site in found.sites:
            reach = dataclasses.replace(request, reach=_reach(site, found, request, norm))
            rows.append(_swap_site(site, reach, readout, undo, refuse, gains))
        if norm == "tdbn":
            rows += convert_norms(found, hosts, undo)
        rows = [
            _fit_scale(row, site, found, gains, terms) if row.changed and site.norms else row
            for row, site in zip(rows, found.sites, strict=False)
        ] + rows[len(found.sites) :]
        if refuse and not any(row.changed for row in rows):
            raise ValueError(_nothing(rows, found.handwritten))
        rows = _with_rates(rows, found, lif, measured_rates(found, hosts) if rates else {}, gains, terms)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return SwapReport(tuple(rows))


def _with_rates(
    rows: list[Row],
    found: Survey,
    lif: list[Expected | None],
    measured: Mapping[str, float],
    gains: Mapping[str, float],
    terms: Terms,
) -> list[Row]:
    """Add the firing rates before and after to the rows; for neurons that were left alone only if measured."""
    after = [
        None if before is None else expected(site, found.norms, measured, terms, before)
        for site, before in zip(found.sites, lif, strict=True)
    ]
    keeping = ""
    if any(a and b and abs(a.gain - b.gain) > 1e-3 * abs(b.gain) for a, b in zip(after, lif, strict=True)):
        # A map without rebound cannot take the place of a neuron that leaks to below 0.
        parabola = any(getattr(site.module, "dynamics", "") == "lif" for site in found.sites)
        keeping = terms.call("dynamics", "lif" if parabola else "monotone")
    rated, rates_change = [], False
    for row, site, before, now in zip(rows, found.sites, lif, after, strict=False):
        if row.changed or site.name in measured:
            rate, said = compared(before, now, site, row.changed, site.name in gains, keeping, terms)
            if rates_change and not site.norms and rate is not None and site.name not in measured:
                said.append(
                    "neurons before it spike more or less than before, which changes its input"
                    f"{terms.measures('its rate')}"
                )
            row = dataclasses.replace(row, reasons=(*row.reasons, *said), rate=rate)
            rates_change |= rate is not None and max(rate) > FACTOR * min(rate)
        rated.append(row)
    return rated + rows[len(rated) :]


def _check(model: Any, choices: dict[str, str], window: Any) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"swap takes a built model, which is a torch.nn.Module, got {what}")
    for name, value in choices.items():
        check_known(name, _CHOICES[name], value)
    if not isinstance(window, Window):
        check_known("window", ("auto", *WINDOWS, "keep"), window, otherwise=f"pass a Window(lo, hi); {OTHERS}")
    check_swappable(model)


def check_swappable(model: nn.Module) -> None:
    """Refuse a model that is compiled or wrapped.

    Raises:
        ValueError: The model is compiled or wrapped. The message says where, and what to do first.
    """
    for name, module in model.named_modules():
        where = f" (at {name!r})" if name else ""
        kinds = {cls.__name__ for cls in type(module).__mro__}
        wrapper = kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
        if wrapper:
            raise ValueError(
                f"the model is wrapped in {wrapper.pop()}{where}, which listed the model's parameters and buffers when "
                "it was made: swap the model first, then wrap it"
            )
        if "OptimizedModule" in kinds or module._compiled_call_impl is not None:
            raise ValueError(
                f"the model is compiled{where}, and the compiled code would go on running the old neurons: swap first, "
                "then compile"
            )


def _left(site: Site, *reasons: str) -> Row:
    was = type(site.module).__name__
    return Row(site.name, was, was, reasons, changed=False)


def _swap_site(
    site: Site,
    request: Request,
    readout: str,
    undo: list[Callable[[], None]],
    refuse: bool,
    gains: dict[str, float],
) -> Row:
    """Swap one neuron; ``gains`` receives the input gain if a norm that feeds it decided on one."""
    was = type(site.module).__name__
    if site.neuron.role == "qif":
        return _left(site, "a QIF neuron already")
    if site.neuron.reason:
        return _left(site, site.neuron.reason)
    if site.reads_out and readout == "keep":
        guess = f", a guess that {request.terms.example} would check" if site.guess else ""
        return _left(site, f"reads out, by {site.how}{guess}", f"{request.terms.choose('readout', 'swap')} replaces it")
    try:
        plan = site.host.plan(site.module, request, bool(site.norms))
        undo.append(rebuild(site.module, site.host, plan))
    except (ValueError, TypeError) as error:
        asked_for = refuse and (request.dynamics != "auto" or request.parameters)
        if isinstance(error, ValueError) and not asked_for:
            return _left(site, f"QIF cannot take its place: {error}")
        raise type(error)(f"{site.name or was}: {error}") from error
    if plan.gain is not None and site.norms:
        gains[site.name] = plan.gain
    return Row(site.name, was, type(site.module).__name__, _reasons(site, plan, request.terms), changed=True)


def _reach(site: Site, found: Survey, request: Request, norm: str) -> float:
    """Return the factor that lifts the input from plain norms to a larger threshold; 1 in all other cases.

    Under tdBN the factor is 1, since its output is as large as the threshold. A norm's weight below 1 is not made up
    for, because it was learned or chosen. Neither is a threshold that was passed to :func:`swap`, because it was raised
    to have fewer spikes.
    """
    norms = [found.norms[name] for name in site.norms]
    if (
        norm == "tdbn"
        or site.neuron != ("lif", "")
        or request.parameters.keys() & {"v_threshold", "threshold"}
        or any(is_tdbn(module) for module in norms)
        or not has_values(site.module)
    ):
        return 1.0
    deviation = deviation_after(norms)
    if deviation is None:
        return 1.0
    reach = site.host.dynamics(site.module).threshold / max(deviation, 1.0)
    return max(reach, 1.0) if math.isfinite(reach) else 1.0


def _fit_scale(row: Row, site: Site, found: Survey, gains: dict[str, float], terms: Terms) -> Row:
    """Derive the surrogate of a neuron under norms for the input that the norms give it.

    If the closure of the membrane's moments does not converge for so large an input, a gain that was chosen for the
    depth is lowered until it does.

    Returns:
        The row. It names a gain above 1, and warns if no surrogate could be derived for this input.
    """
    neuron: Any = site.module
    params = neuron.qif_parameters
    if not has_values(neuron):
        return row
    gain, threshold = abs(mean_of(params.input_gain)), mean_of(params.v_threshold)
    if gain == 0:
        return row
    circuit = abs(site.host.dynamics(neuron).gain) / gain  # Lapicque's factor on the input
    deviation = circuit * (deviation_after([found.norms[name] for name in site.norms]) or threshold)
    if math.isclose(deviation, threshold, rel_tol=1e-6):  # float32's rounding of a tdBN's weight
        deviation = threshold
    chosen = gains.get(site.name, 1.0)
    reach, said = chosen / gain_in_a_row(found.depth), list(row.reasons)
    try:
        neuron.assume_input(deviation)
    except MomentClosureError:
        lower = tuple(gain_in_a_row(depth) * reach for depth in range(found.depth, SHALLOW - 1, -1))
        stable = _largest_stationary(params, deviation, lower) if chosen > reach else None
        if stable is not None:
            neuron.input_gain = gains[site.name] = stable
            neuron.assume_input(deviation)
            said.append(
                f"input gain {stable:.4g}, not {chosen:.4g} as for other neurons among {found.depth} in a row, since "
                "the closure of the membrane's moments does not converge for a larger one"
            )
            return dataclasses.replace(row, reasons=tuple(said))
        keep = terms.choose("window", "keep")
        warning = (
            "WARNING: its surrogate is derived for an input as large as the threshold, not "
            f"{gain * deviation / threshold:.3g} times that, for which the closure of the membrane's moments does not "
            f"converge; {f'a smaller input_gain or {keep}' if terms.passes_arguments else keep} avoids it"
        )
    else:
        warning = ""
    if chosen > 1:
        causes = []
        if reach > 1:
            causes.append(f"the norm's output reaches the threshold of {threshold:.3g}")
        if chosen > reach:
            causes.append(f"{found.depth} neurons in a row pass the input on")
        keeping = "; input_gain=1 keeps the norm's scale" if terms.passes_arguments else ""
        said.append(f"input gain {chosen:.4g}, so that {' and '.join(causes)}{keeping}")
    return dataclasses.replace(row, reasons=(*said, *filter(None, [warning])))


def _largest_stationary(params: QIFParameters, deviation: float, gains: tuple[float, ...]) -> float | None:
    """Return the first of ``gains`` under which the closure of the membrane's moments converges."""
    for gain in gains:
        try:
            membrane_moments(params, gain * deviation)
        except MomentClosureError:
            continue
        return gain
    return None


def _reasons(site: Site, plan: Plan, terms: Terms) -> tuple[str, ...]:
    fed = f"fed by {', '.join(site.norms)}" if site.norms else "no normalization before it"
    dynamics = {
        "paper": "the paper's parameters", "lif": "its leak matched by the parabola", "monotone": "its leak matched",
        "explicit": "the parameters passed",
    }  # fmt: skip
    place = site.how if site.how == "the model is the neuron" else f"{fed}, by {site.how}"
    guess = [f"a guess that {terms.example} would check"] if site.guess and site.norms_known else []
    if not site.norms_known:
        place = f"what feeds it is not known: {site.how}"
    reads_out = ["reads out"] if site.reads_out else []
    return (f"{dynamics[plan.dynamics]} ({place})", *guess, *reads_out, *plan.notes)


def _back(model: nn.Module, hosts: list[Host]) -> SwapReport:
    rows = [_back_site(site) for site in survey(model, hosts).sites]
    if not any(row.changed for row in rows):
        raise ValueError(_nothing(rows))
    return SwapReport(tuple(rows))


def _back_site(site: Site) -> Row:
    """Turn a QIF neuron into the LIF neuron that it was or, if it was built as QIF, whose leak it matches."""
    was = type(site.module).__name__
    if site.neuron.role != "qif":
        return _left(site, "not a QIF neuron")
    if replaced(site.module) is not None:
        gain = _gain(site)
        restore(site.module, site.host)
        site.host.update_derived(site.module)
        reasons = ["the LIF neuron that it was, with the changes made since"]
        lif = _gain(site)
        if not math.isclose(gain, lif, rel_tol=1e-3):
            reasons.append(f"input gain {lif:.4g}, LIF's, instead of {gain:.4g}: train it further before you use it")
    else:
        try:
            plan = site.host.back(site.module)
        except ValueError as error:
            return _left(site, "built as QIF", f"there is no neuron to go back to: {error}")
        rebuild(site.module, site.host, plan, remember=False)
        reasons = ["built as QIF, now the LIF neuron whose leak it matched", *plan.notes]
    return Row(site.name, was, type(site.module).__name__, tuple(reasons), changed=True)


def _gain(site: Site) -> float:
    """Return the present input gain of a neuron; 0 on the meta device, where it has no value."""
    return site.host.dynamics(site.module).gain if has_values(site.module) else 0.0


def _nothing(rows: list[Row], handwritten: Sequence[str] = ()) -> str:
    if not rows:
        seems = f"{', '.join(handwritten)} may be one: put" if handwritten else "put"
        return (
            f"nothing to swap: the model has no spiking neuron of a host that is imported ({', '.join(HOSTS)}). "
            "Neurons that are built during the forward pass are not part of the model yet. Neurons that a project "
            f"wrote itself cannot be swapped; {seems} in its place a module that hands its input, time first, to a "
            "QIFNode in step mode 'm' or to qif_multi_step, as in the guide \"I have someone else's repository\" "
            "(docs/someone-elses-repository.md)."
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(f"{row.was}: {row.why}", []).append(row.name or "the model")
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    hint = (
        ". They were swapped before; swap(model, to='lif') goes back, to swap again with other choices"
        if any("QIF neuron already" in reason for reason in reasons)
        else ""
    )
    return f"nothing to swap: {listed}{hint}"
