"""Study 7: LIF, parametric LIF and QIF on sequences that users have: spoken digits and N-MNIST."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import swap
from ...diagnostics.energy.costs import Costs, Energy
from ...diagnostics.energy.counting import count_operations
from ...diagnostics.spiking import spiking_layers
from ...neuron.observe import watching
from ...support.text import mean_pm
from ..data.images import is_by_class
from ..figures import plot_differences
from ..records import Records, Result, Setting, Trial, by_seed
from ..training.batches import Batches
from ..training.config import DataConfig
from ..training.data import load_task
from ..training.diagnosis import NonFiniteError
from ..training.losses import mean_cross_entropy
from .networks import CLASSES, multi, rows
from .page import Body, table
from .runner import Options
from .stats import LEVEL, Difference, adjusted, difference, p_text, points
from .trial import Samples, data_of, trainer_of

try:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
except ImportError as error:
    raise ImportError("the studies train SpikingJelly's layers: pip install 'qif-plugins[study]'") from error

TITLE = "Speech and events"
QUESTION = (
    "Is QIF more accurate than LIF on data whose time matters? LIF, parametric LIF and QIF neurons with surrogate "
    "gradients learn spoken digits of speakers that the test alone has, and the events of N-MNIST."
)
FOLDERS = ("spoken-digits", "nmnist")
"""Data sets that the study reads from the user's folders."""

ARMS: dict[str, dict[str, Any] | None] = {
    "LIF": None,
    "PLIF": None,
    "QIF, paper's parameters": {"dynamics": "paper", "window": "keep"},
    "QIF, parabola": {"dynamics": "lif", "window": "keep"},
    "QIF, LIF's surrogate": {"window": "keep"},
    "QIF, swap": {},
}
"""Arguments of ``swap`` by arm; ``None`` swaps nothing."""
DEFAULT = "QIF, swap"
SAME = "QIF, LIF's surrogate"
"""Without a norm before the neurons, ``swap`` keeps LIF's surrogate anyway."""


@dataclass(frozen=True)
class Kind:
    """Networks and training for a data set.

    Attributes:
        name: Name in the tables.
        encoding: What a network gets of a sample, as ``qif train`` makes it.
        steps: T; 0 where settings differ in it.
        widths: Neurons of each layer, or its channels where ``kernel`` is not 0.
        kernel: Side of the convolutions' kernels, with a stride of 2 where there are more channels than before; 0 for
            linear layers.
        tau: Time constant of LIF, in steps: a leak of 1 - 1/tau.
        epochs: Passes over the training samples.
        seeds: Number of seeds.
        recurrent: Epochs and seeds for networks whose layers feed themselves; ``None`` for no such networks.
    """

    name: str
    encoding: str
    steps: int
    widths: tuple[int, ...]
    kernel: int
    tau: float
    epochs: int
    seeds: int
    recurrent: tuple[int, int] | None = None


KINDS = {
    "spoken-digits": Kind(
        "speech", "divided by speaker, onset events in 40 mel bands", 60, (128, 128), 0, 10.0, 8, 5, (6, 3)
    ),
    "nmnist": Kind("N-MNIST", "frames of equal event counts", 10, (8, 16, 32), 3, 2.0, 6, 3),
    "cifar10": Kind("CIFAR-10", "the same image at every step", 0, (8, 16, 16, 32, 32, 64, 64), 3, 2.0, 2, 3),
    "digits": Kind("rows of digits", "a row a step", 8, (16,), 0, 10.0, 1, 1, (1, 1)),
}
"""By name of the data; ``"digits"`` are scikit-learn's, row by row, for the tiny version."""
TEST_BATCH = 100

Condition = tuple[str, int, bool, str | None]
"""Data, T, whether the layers feed themselves, and the norm."""
Results = dict[tuple[Condition, str], dict[int, Result]]
"""By condition and arm, then by seed."""


@lru_cache(maxsize=2)
def _data(name: str, folder: Path | None, steps: int) -> Samples:
    """Load sequences ``[N, T, C, H, W]`` with their classes; T = 1 for images."""
    if name == "digits":
        images, by_row = data_of(name), rows(8)
        x, test_x = (by_row(part).transpose(0, 1)[:, :, None, None] for part in (images.x, images.test_x))
        return Samples(x[:200], images.y[:200], test_x[:100], images.test_y[:100])
    task = load_task(
        DataConfig(name, folder=str(folder), steps=steps), 1000, 0, advice=(f"pass --data-folder {name}=FOLDER", "")
    )
    parts = [list(part.epoch(0)) for part in (task.train, task.test)]
    x, y, test_x, test_y = (torch.cat([batch[i] for batch in part]) for part in parts for i in (0, 1))
    if x.dim() == 4:
        x, test_x = x[:, None], test_x[:, None]
    return Samples(x, y, test_x, test_y)


# -- one network -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Neurons that feed one another: their input is what the layer gets plus their weighted spikes of the step before.

    Args:
        cell: The neurons, in single-step mode.
        width: Their number.
    """

    cell: Any

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.weights = cell, nn.Linear(width, width, bias=False)

    def forward(self, x_seq: Tensor) -> Tensor:
        """Map ``[T, N, width]`` to spikes of that shape."""
        spikes = [self.cell(x_seq[0])]
        for x in x_seq[1:]:
            spikes.append(self.cell(x + self.weights(spikes[-1])))
        return torch.stack(spikes)


def make(setting: Setting, example: Tensor) -> nn.Module:
    """Build the LIF network of a setting, with weights drawn from its seed, and swap its neurons as its arm says.

    Args:
        setting: See :func:`run`.
        example: Some sequences ``[T, N, C, H, W]``.
    """
    torch.manual_seed(setting["seed"])
    kernel, normed = setting["kernel"], setting["norm"] is not None
    features, channels, side = example[0, 0].numel(), example.shape[2], example.shape[3]
    made: list[nn.Module] = [] if kernel else [layer.Flatten()]
    batch_norm = layer.BatchNorm2d if kernel else layer.BatchNorm1d
    for width in setting["widths"]:
        if kernel:
            stride = 2 if width > channels else 1
            side = (side + stride - 1) // stride
            made.append(layer.Conv2d(channels, width, kernel, stride, kernel // 2, bias=not normed))
            features, channels = width * side**2, width
        else:
            made.append(layer.Linear(features, width, bias=not normed))
            features = width
        made += [batch_norm(width)] if normed else []
        made.append(Recurrent(_neurons(setting), width) if setting["recurrent"] else _neurons(setting))
    model = multi(*made, *([layer.Flatten()] if kernel else []), layer.Linear(features, CLASSES))
    for module in model.modules():
        if isinstance(module, Recurrent):
            module.cell.step_mode = "s"
    arguments = ARMS[setting["arm"]]
    if arguments is not None:
        # Passed, since swap would otherwise raise the gain to a higher threshold, and so undo it.
        swap(model, example_input=example, v_threshold=setting["threshold"], **arguments)
    return model


def _neurons(setting: Setting) -> Any:
    numbers = {"v_threshold": setting["threshold"], "decay_input": False, "surrogate_function": surrogate.ATan()}
    if setting["arm"] == "PLIF":
        return neuron.ParametricLIFNode(init_tau=setting["tau"], **numbers)
    return neuron.LIFNode(tau=setting["tau"], **numbers)


def run(setting: Setting, folders: Mapping[str, Path]) -> Result:
    """Train and test one network.

    Args:
        setting: ``data``, of :data:`KINDS`, and the attributes ``steps``, ``widths``, ``kernel``, ``tau`` and
            ``epochs`` of its kind; ``recurrent`` (a bool) and ``norm`` (``"batch"`` or ``None``); ``arm``, of
            :data:`ARMS`; ``threshold`` of the LIF neurons, which ``swap`` gets as well, so that it does not raise the
            input gain; ``penalty``, what a spike per neuron-step, the mean over layers, adds to the cross-entropy;
            ``lr``, which a cosine takes to 0, ``batch_size``, ``seed``.
        folders: Folders by the name of the data in them.

    Returns:
        ``samples``, numbers to train and to test on; ``by_class``, for CIFAR-10, whether the images were files in
        folders; ``accuracy`` on the test samples after the last epoch; ``rate`` in spikes a neuron-step; ``synops``,
        ``macs`` and ``picojoules`` per test sample, see :mod:`~qif_plugins.diagnostics.energy.costs`. ``diverged`` in
        place of all but the accuracy, that of guessing, where a value stopped being finite.
    """
    steps = setting["steps"]
    folder = folders.get(setting["data"])
    data = _data(setting["data"], folder, steps if KINDS[setting["data"]].steps else 1)
    samples = [len(data.x), len(data.test_x)]
    about: Result = {"samples": samples}
    if setting["data"] == "cifar10" and folder is not None:
        about["by_class"] = is_by_class(folder)

    def sequence(x: Tensor) -> Tensor:
        return x.transpose(0, 1).expand(steps, *[-1] * (x.dim() - 1))

    model = make(setting, sequence(data.x[:8]))
    layers = spiking_layers(model)

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        x, labels = batch
        rates: list[Tensor] = []
        with watching(layers if setting["penalty"] else {}, lambda seen: rates.append(seen.spikes.mean())):
            logits = model(sequence(x))
        penalty = setting["penalty"] * torch.stack(rates).mean() if rates else 0.0
        return mean_cross_entropy(logits, labels) + penalty

    batches = Batches.of(data.x, data.y, batch_size=setting["batch_size"], seed=setting["seed"])
    try:
        trainer_of(setting, model, loss, batches, reset=functional.reset_net).fit()
    except NonFiniteError as error:
        return {**about, "accuracy": 1 / CLASSES, "diverged": error.layer}
    correct = 0

    def drive(model: nn.Module) -> None:
        nonlocal correct
        for x, labels in zip(data.test_x.split(TEST_BATCH), data.test_y.split(TEST_BATCH), strict=True):
            functional.reset_net(model)
            correct += int((model(sequence(x)).mean(0).argmax(1) == labels).sum())

    counts = count_operations(model, drive)
    energy = Energy.of(counts.macs, counts.synops, counts.neuron_steps, Costs())
    joules = energy.total_lif if ARMS[setting["arm"]] is None else energy.total_qif
    return {
        **about, "accuracy": correct / samples[1], "rate": counts.firing_rate,
        "synops": counts.synops / samples[1], "macs": counts.macs / samples[1], "picojoules": joules / samples[1],
    }  # fmt: skip


# -- the study ---------------------------------------------------------------------------------------------------------


def settings_of(data: str, recurrent: bool = False, **entries: Any) -> Setting:
    """Return the entries of a setting of :func:`run` that the kind of data decides, and those given.

    Args:
        data: One of :data:`KINDS`.
        recurrent: Whether the layers feed themselves. Default False.
        entries: Further entries, ``arm`` and ``seed`` among them.
    """
    kind = KINDS[data]
    epochs = kind.recurrent[0] if recurrent and kind.recurrent else kind.epochs
    return {
        "data": data, "steps": kind.steps, "widths": list(kind.widths), "kernel": kind.kernel, "tau": kind.tau,
        "epochs": epochs, "lr": 2e-3, "batch_size": 64, "recurrent": recurrent, "norm": "batch", "threshold": 1.0,
        "penalty": 0.0, **entries,
    }  # fmt: skip


def available(settings: Sequence[Setting], options: Options, done: Records) -> list[Setting]:
    """Choose the settings whose data have a folder, and those that have been run.

    Raises:
        ValueError: There are none.
    """
    found = [s for s in settings if s["data"] == "digits" or s["data"] in options.folders or s in done]
    if not found:
        names = dict.fromkeys(setting["data"] for setting in settings)
        raise ValueError(
            f"this study reads {' and '.join(names)} from your own folders; pass --data-folder "
            f"{' '.join(f'{name}=FOLDER' for name in names)}, or one of them (docs/training.md says what they hold)"
        )
    return found


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every seed, condition and arm, recurrent networks last.

    Raises:
        ValueError: There is neither a folder of data nor a finished trial.
    """
    wanted = [
        (recurrent, seed, name)
        for name in (("digits",) if options.quick else FOLDERS)
        for recurrent in (False, True)
        if (kind := KINDS[name]).recurrent or not recurrent
        for seed in options.seeds_of(kind.recurrent[1] if recurrent and kind.recurrent else kind.seeds)
    ]
    settings = [
        settings_of(name, recurrent, norm=norm, arm=arm, seed=seed)
        for recurrent, seed, name in sorted(wanted, key=lambda trial: trial[:2])
        for norm in ("batch", None)
        for arm in ARMS
        if norm or arm != SAME
    ]
    return available(settings, options, done)


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the differences from LIF with their intervals, accuracies, spikes and energy, and draw the differences.

    Raises:
        ValueError: The trials are of several numbers of samples, and so of several folders of data.
    """
    results: Results = by_seed(trials, lambda setting: (_condition(setting), setting["arm"]))
    conditions = list(dict.fromkeys(condition for condition, _ in results))
    differences = {
        key: found
        for key in results
        if key[1] != "LIF" and (found := difference(results.get((key[0], "LIF"), {}), results[key]))
    }
    p_values = adjusted(differences)
    others = [arm for arm in ARMS if any((condition, arm) in differences for condition in conditions)]
    drawn = {
        arm: {_label(c): differences[c, arm].interval for c in conditions if (c, arm) in differences} for arm in others
    }
    plot_differences(picture, list(map(_label, conditions)), drawn, DEFAULT)
    first = table(
        ["", "LIF, %", *others],
        [
            [
                _label(condition), mean_pm(_values(results, condition, "LIF", "accuracy"), ".1f", 100),
                *(points(differences.get((condition, arm))) for arm in others),
            ]
            for condition in conditions
        ],
    )  # fmt: skip
    header = [
        "", "", "seeds", "accuracy, %", "p (Holm)", "spikes a neuron-step", "SynOps a sample", "MACs a sample",
        "nJ a sample",
    ]  # fmt: skip
    rows = [
        [
            _label(condition), arm, str(len(results[condition, arm])),
            mean_pm(_values(results, condition, arm, "accuracy"), ".1f", 100), p_text(p_values.get((condition, arm))),
            *costs_of(list(results[condition, arm].values())),
        ]
        for condition in conditions
        for arm in ARMS
        if (condition, arm) in results
    ]  # fmt: skip
    cells = (
        " A recurrent layer adds the weighted spikes of its own neurons of the step before."
        if any(recurrent for _, _, recurrent, _ in conditions)
        else ""
    )
    method = (
        f"{described(trials)} Batch norm is over batch, time and space, before each layer of neurons.{cells} Every arm "
        "of a seed starts from the same LIF network, with `decay_input=False` and ATan as surrogate, and sees the same "
        f"batches. {'`PLIF` learns the leak; the' if 'PLIF' in others else 'The'} QIF arms are `swap`'s with "
        f"{'; '.join(_arguments(arm) for arm in others if ARMS[arm])}; `{DEFAULT}` has the defaults, which with a norm "
        "are the map without rebound and, at a leak below 0.8, the isometric surrogate. Differences are paired by seed "
        f"with Student's intervals, each for itself; p is adjusted by Holm for all {len(differences)} comparisons. "
        f"{COUNTED}"
    )
    return Body(_finding(differences, p_values, conditions), [first, table(header, rows, 2)], method)


COUNTED = (
    "Spikes, operations and energy are those of the trained network on the test samples, as `qif energy` counts them: "
    "an input that is not 0 or 1 costs multiplications (MACs), as counts of events and pixels do."
)


def described(trials: Sequence[Trial]) -> str:
    """Describe the data, networks and training of each kind in the trials.

    Raises:
        ValueError: The trials of one kind are of several numbers of samples.
    """
    sentences = []
    for name in dict.fromkeys(trial.setting["data"] for trial in trials):
        of_kind = [trial for trial in trials if trial.setting["data"] == name]
        sizes = {tuple(trial.result["samples"]) for trial in of_kind}
        if len(sizes) > 1:
            raise ValueError(
                f"the trials of {name} are of {' and '.join(map(str, sorted(sizes)))} samples to train and test, so of "
                "several folders; move the record away to start anew with one of them"
            )
        ((train, test),) = sizes
        setting, kind = of_kind[0].setting, KINDS[name]
        if any(trial.result.get("by_class") for trial in of_kind):
            sentences.append(
                "The images were files in a folder a class, such as JPEG: not the very pixels of CIFAR-10's own files."
            )
        widths = ", ".join(map(str, setting["widths"]))
        layers = (
            f"convolutions of {widths} channels, of stride 2 where their number grows"
            if kind.kernel
            else f"layers of {widths} neurons"
        )
        epochs = sorted({trial.setting["epochs"] for trial in of_kind}, reverse=True)
        steps = sorted({trial.setting["steps"] for trial in of_kind})
        sentences.append(
            f"{kind.name[0].upper()}{kind.name[1:]} ({kind.encoding}): {train:,} samples to train and {test:,} to "
            f"test, T = {' and '.join(map(str, steps))}, {layers}, a leak of {1 - 1 / setting['tau']:g} and a linear "
            f"readout whose mean over time decides, {' and (recurrent) '.join(map(str, epochs))} "
            f"epoch{'s' if max(epochs) > 1 else ''}."
        )
    setting = trials[0].setting
    return (
        f"{' '.join(sentences)} Adam at {setting['lr']:g}, which a cosine takes to 0, in batches of "
        f"{setting['batch_size']}; cross-entropy of the mean output."
    )


def costs_of(found: Sequence[Result]) -> list[str]:
    """Format the mean rate, SynOps, MACs and nanojoules of some results."""
    known = [result for result in found if "rate" in result]
    if not known:
        return ["–"] * 4
    rate, synops, macs, energy = (fmean(r[name] for r in known) for name in ("rate", "synops", "macs", "picojoules"))
    return [f"{rate:.3f}", f"{synops:,.0f}", f"{macs:,.0f}", f"{energy / 1000:,.0f}"]


def _condition(setting: Setting) -> Condition:
    return setting["data"], setting["steps"], setting["recurrent"], setting["norm"]


def _label(condition: Condition) -> str:
    data, steps, recurrent, norm = condition
    name = KINDS[data].name if KINDS[data].steps else f"{KINDS[data].name}, T = {steps}"
    return f"{name}{', recurrent' if recurrent else ''}, {'batch norm' if norm else 'no norm'}"


def _values(results: Results, condition: Condition, arm: str, name: str) -> list[float]:
    return [result[name] for result in results.get((condition, arm), {}).values()]


def _arguments(arm: str) -> str:
    return f"`{', '.join(f'{name}={value!r}' for name, value in (ARMS[arm] or {}).items())}` ({arm})"


def _finding(
    differences: Mapping[tuple[Condition, str], Difference], p_values: Mapping[tuple[Condition, str], float],
    conditions: Sequence[Condition],
) -> str:  # fmt: skip
    if not differences:
        return "The study is under way: no network has finished beside its LIF network yet."
    means = []
    for norm, name in (("batch", "with batch norm"), (None, "without norm")):
        of_arms = {
            arm: [f.interval[0] for (condition, of), f in differences.items() if (condition[-1], of) == (norm, arm)]
            for arm in ARMS
        }
        parts = [f"{arm} {100 * fmean(values):+.1f}" for arm, values in of_arms.items() if values]
        cases = sum(condition[-1] == norm for condition in conditions)
        means += [f"{name} ({cases} case{'s' if cases > 1 else ''}) {', '.join(parts)}"] if parts else []
    significant = {key: differences[key].interval[0] > 0 for key, p in p_values.items() if p < 1 - LEVEL}
    counts = [
        f"{arm} {above} and {len(of_arm) - above}"
        for arm in ARMS
        if (of_arm := [better for (_, of), better in significant.items() if of == arm])
        for above in (sum(of_arm),)
    ]
    by_arm = (
        f"Significantly above and below LIF after Holm's adjustment for {len(differences)} comparisons: "
        f"{'; '.join(counts) or 'no arm in any case'}."
    )
    if all(map(math.isnan, p_values.values())):
        by_arm = "Nothing is significant from one seed."
    return f"Points of accuracy less LIF's, on average: {'; '.join(means)}. {by_arm}"
