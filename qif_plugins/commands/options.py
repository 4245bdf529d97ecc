"""The options of every subcommand, each in the function of the subcommand's name; importing them imports no PyTorch."""

from __future__ import annotations

import argparse
import math
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..diagnostics.energy.costs import LIF_UPDATES, QIF_MAPS, Costs
from ..experiments.exact.settings import DATA_SETS as SPIKE_TRAINS
from ..experiments.exact.settings import DEFAULTS, DEMONSTRATIONS, LIF_IMAGES, LOSSES, NEURONS, Settings
from ..experiments.names import DATA_SETS, FIGURES, HOSTS, IMAGES, SHAPES, SPLITS, STUDIED, configurations
from ..experiments.studies import OF_FOLDERS, STUDIES
from ..neuron.names import CLOSURES, DEFAULT_BETA, DYNAMICS, PAPER, WINDOWS

NOTHING_BUILT = 3
"""Exit status of ``qif run`` for a program that succeeded without running a QIF neuron."""


# -- types -------------------------------------------------------------------------------------------------------------

COUNT = 2**31 - 1
"""The largest count of epochs, samples or runs."""


def at_least(minimum: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Make an argparse type: an integer from ``minimum`` to ``most``, by default the largest integer of 64 bits."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below the minimum, {minimum}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is above the maximum, {most}")
        return value

    return integer


def positive(text: str) -> float:
    """Convert an argument to a positive, finite number, as an argparse type."""
    value = _number(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value


def _rate(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a firing rate between 0 and 1 spikes per neuron-step")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _named_folder(text: str) -> tuple[str, Path]:
    """Convert an argument ``NAME=FOLDER``, as an argparse type."""
    name, equals, folder = text.partition("=")
    if not (equals and folder) or name not in STUDIED:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form NAME=FOLDER with one of the names {', '.join(STUDIED)}"
        )
    return name, Path(folder)


# -- subcommands -------------------------------------------------------------------------------------------------------


def compare(parser: ArgumentParser) -> None:
    """Declare the options of ``qif compare``."""
    add = parser.add_argument
    add("--data", default="digits", help=f"data set: {', '.join(IMAGES)}")
    add("--data-folder", type=Path, default=Path("data"), help="folder of the data sets that torchvision reads")
    add("--download", action="store_true", help="download a data set that torchvision reads, if it is missing")
    add("--hosts", help=f"hosts, separated by commas: {', '.join(HOSTS)} (default: those installed)")
    add("--windows", default=",".join(WINDOWS), help="windows of QIF, separated by commas")
    add("--seeds", type=at_least(1, 10_000), default=3, help="number of seeds, from 0")
    add("--epochs", type=at_least(1), default=5, help="passes over the training images")
    add("--steps", type=at_least(1), default=4, help="time steps")
    add("--batch-size", type=at_least(2), default=32, help="images in a training step")
    add("--lr", type=positive, default=4e-3, help="learning rate of Adam, which a cosine schedule takes to 0")
    add("--device", default="cpu", help="device to train on")
    text = "CPU threads; more than one slows such small networks down"
    add("--threads", type=at_least(1, 1024), default=1, help=text)
    add("--save", action="store_true", help="also write every trained network, for 'qif landscape'")
    add("--resume", action="store_true", help="keep the trainings in compare.json of --out, and run the others")
    add("--out", type=Path, default=Path("runs/compare"), help="folder of compare.json and compare.png")


def run(parser: ArgumentParser) -> None:
    """Declare the options of ``qif run``; all words from the program's name on are passed to the program."""
    parser.usage = "qif run [options] (script.py | -m package.module) [arguments of the program ...]"
    parser.epilog = (
        "Prints on stderr what was patched, what became of the neurons of each network when it is called for the first "
        f"time, and how many ran as QIF. Exit status: the program's; {NOTHING_BUILT} if it came to its end and no "
        "QIF neuron ran. A launcher that starts other processes goes before: "
        "torchrun --no-python qif run train.py."
    )
    add = parser.add_argument
    add(
        "--dynamics", choices=("auto", *DYNAMICS), default="auto",
        help="auto: match LIF's leak by the map without rebound, with an input gain of 1 under a norm, elsewhere "
        "LIF's; monotone: the same map, with LIF's gain everywhere; lif: the parabola, with LIF's gain everywhere; "
        "paper: the paper's parameters",
    )  # fmt: skip
    add(
        "--window", choices=("auto", *WINDOWS, "keep"), default="auto",
        help="surrogate gradient; auto: isometric under a norm, elsewhere the program's own; keep: the program's own",
    )  # fmt: skip
    text = "tdbn: make tdBN of each batch norm that feeds a neuron"
    add("--norm", choices=("keep", "tdbn"), default="keep", help=text)
    text = "keep: leave neurons that feed the output without weights in between as they are; swap: swap them, too"
    add("--readout", choices=("keep", "swap"), default="keep", help=text)
    add("-m", dest="module", action="store_true", help="run a module, as python -m does")
    # As for a subcommand: everything from the first word that is not an option belongs to the program, even "--".
    text = "the script, or with -m the module, and its arguments"
    add("words", nargs=argparse.PARSER, metavar="program", help=text)


def train(parser: ArgumentParser) -> None:
    """Declare the options of ``qif train``."""
    add = parser.add_argument
    add(
        "--config", help=f"configuration: a TOML file, or one of {', '.join(configurations())} (default: none; with "
        "--resume and --out, the checkpoint's own)",
    )  # fmt: skip
    add(
        "--set", action="append", metavar="KEY=VALUE", dest="changes",
        help="change a value of the configuration, such as training.epochs=5 or neuron.window=paper; may be repeated; "
        "--show lists the keys",
    )  # fmt: skip
    add(
        "--data", metavar="NAME", choices=DATA_SETS,
        help=f"data set: {', '.join(DATA_SETS)}; short for --set data.name=NAME (default: the configuration's)",
    )  # fmt: skip
    add("--data-folder", type=Path, help="folder of the data; short for --set data.folder=... (default: as configured)")
    add("--out", type=Path, help="folder of checkpoints and logs (default: runs/NAME, the configuration's name)")
    add(
        "--resume", action="store_true",
        help="continue from last.pt in --out, or begin if there is none; --set training.epochs=... trains longer",
    )  # fmt: skip
    add(
        "--init-from", type=Path, metavar="FILE",
        help="begin with the weights of another run, its best.pt or last.pt, as far as names and shapes agree; epochs, "
        "optimizer and schedule begin anew (default: weights drawn by training.seed)",
    )  # fmt: skip
    add("--no-tensorboard", action="store_true", help="write no TensorBoard logs")
    add("--quiet", action="store_true", help="show neither a progress bar nor a line for each epoch")
    add("--show", action="store_true", help="print all values of the configuration instead of training")


def data(parser: ArgumentParser) -> None:
    """Declare the modes of ``qif data``, and the options of each."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="mode")
    text = "draw a sample as the network gets it"
    add = modes.add_parser("show", help=text, description=text).add_argument
    add("file", type=Path, help="image, WAV file, .bin file of N-MNIST, or .h5 file of SHD or SSC")
    add(
        "--config", help="configuration with the settings of the data: a TOML file, or one of "
        f"{', '.join(configurations())} (default: the one that comes for this kind of file)",
    )  # fmt: skip
    add(
        "--set", action="append", metavar="KEY=VALUE", dest="changes",
        help="change a value of the configuration, such as data.encoder=crossings or data.steps=100; may be repeated",
    )  # fmt: skip
    add("--index", type=at_least(0), default=0, help="number of the sample in an .h5 file")
    add("--out", type=Path, default=Path("sample.png"), help="file of the figure")


def evaluate(parser: ArgumentParser) -> None:
    """Declare the options of ``qif evaluate``."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="best.pt or last.pt that 'qif train' wrote")
    _add_other_data(add)
    add("--batch-size", type=at_least(1), help="samples in a batch (default: as in training)")
    add("--workers", type=at_least(0), help="processes that load data (default: as in training)")


def _add_other_data(add: Callable[..., argparse.Action]) -> None:
    """Declare the options that name other data for a checkpoint."""
    add(
        "--data", metavar="NAME", choices=DATA_SETS,
        help=f"another data set with the same shape and number of classes: {', '.join(DATA_SETS)} (default: the one "
        "that it was trained on)",
    )  # fmt: skip
    add("--data-folder", type=Path, help="folder of the data (default: as in training)")


def doctor(parser: ArgumentParser) -> None:
    """Declare the options of ``qif doctor``: none."""


def window(parser: ArgumentParser) -> None:
    """Declare the options of ``qif window``."""
    _add_neuron(parser)
    add = parser.add_argument
    add("--input-std", type=float, help="standard deviation of the input (default: the threshold)")
    add("--input-mean", type=float, default=0.0, help="mean of the input")
    add("--closure", choices=CLOSURES, default="reset", help="closure that the windows are derived with")
    add("--kappa", type=float, default=0.5, help="half-width of the unbiased window, in deviations of the membrane")
    add("--alpha", type=float, default=1.0, help="width of the heuristic window")
    add("--neurons", type=at_least(2), default=2**18, help="simulated neurons")
    add("--steps", type=at_least(21), default=60, help="simulated steps, of which the first 20 are not counted")
    add("--seed", type=at_least(0), default=0, help="seed of the simulation")


def phase(parser: ArgumentParser) -> None:
    """Declare the options of ``qif phase``."""
    _add_neuron(parser)
    add = parser.add_argument
    add("--input", type=float, default=0.0, help="constant input")
    text = "membranes at which trajectories start (default: one in each region)"
    add("--start", type=float, nargs="+", help=text)
    add("--steps", type=at_least(1), default=12, help="steps of each trajectory")
    add("--out", type=Path, default=Path("phase.png"), help="file of the figure")


def _add_neuron(parser: ArgumentParser) -> None:
    """Declare the options of the neuron: its map, or the leak of a LIF neuron to match."""
    add = parser.add_argument_group("neuron", "f(v) = a (v - u1)(v - u2), spike at h >= threshold").add_argument
    for name, what, others in (
        ("a", "curvature", "--u1 or --u2"), ("u1", "first root", "--a or --u2"), ("u2", "second root", "--a or --u1"),
    ):  # fmt: skip
        add(f"--{name}", type=float, help=f"{what} of the map (the paper's: {PAPER[name]:g}, taken with {others})")
    add("--threshold", type=float, default=1.0, help="threshold")
    add("--v-reset", type=float, help="membrane after a spike (default: u1, or the rest of a matched neuron)")
    text = f"leak to match (default: {DEFAULT_BETA:g}, unless --a, --u1, --u2 or --dynamics decides)"
    add("--beta", type=float, help=text)
    add("--curvature", type=float, help="with --beta: threshold over unstable fixed point (default: 0.5)")
    add(
        "--dynamics",
        choices=DYNAMICS,
        help="paper: the paper's map; lif: the parabola that matches --beta; monotone: the map without rebound that "
        "matches it",
    )


def energy(parser: ArgumentParser) -> None:
    """Declare the options of ``qif energy``."""
    add = parser.add_argument_group("an untrained model, held at given firing rates (the default)").add_argument
    sweep = [
        add("--model", choices=SHAPES, help="model (default: resnet19)"),
        add("--neuron", help="neuron, a name of qif_plugins.models.NEURONS (default: qif)"),
        add(
            "--shape", type=at_least(1), nargs=3, metavar=("C", "H", "W"),
            help="shape of the input (default: the model's usual one)",
        ),
        add("--steps", type=at_least(1), nargs="+", metavar="T", help="time steps (default: 2 4)"),
        add("--rates", type=_rate, nargs="+", help="spikes per neuron-step (default: 0.05 0.1 0.15 0.2 0.3 0.4)"),
        add("--seed", type=at_least(0), help="seed of weights and input (default: 0)"),
        add("--plot", type=Path, help="file for a figure, in the format of its suffix (.png, .pdf ...)"),
    ]  # fmt: skip
    parser.set_defaults(sweep=[option.dest for option in sweep])
    add = parser.add_argument_group("a trained model, on its test data").add_argument
    add("--checkpoint", type=Path, help="checkpoint of qif train")
    _add_other_data(add)
    add("--batches", type=at_least(1), help="number of batches of its test data (default: all)")
    add = parser.add_argument
    add("--threads", type=at_least(1), default=1, help="CPU threads")
    add(
        "--lif-update", choices=LIF_UPDATES, default=Costs.lif_update,
        help="operations counted for a LIF update: none; multiplication and addition (charge); the comparison, too",
    )  # fmt: skip
    add(
        "--qif-map", choices=QIF_MAPS,
        help="QIF's map; monotone, that of swap, costs a comparison more (default: that of the model's QIF neurons, "
        "parabola where it has none)",
    )  # fmt: skip
    for name, text in (("mac", "a multiply-accumulate"), ("ac", "an accumulate"), ("mult", "a multiplication"),
                       ("add", "an addition")):  # fmt: skip
        add(f"--{name}", type=float, default=getattr(Costs, name), help=f"energy of {text} in pJ")
    add("--out", type=Path, help="JSON file for everything that was counted (default: none is written)")


def exact(parser: ArgumentParser) -> None:
    """Declare the modes of ``qif exact``, and the options of each."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="mode")

    def mode(name: str, text: str) -> Callable[..., argparse.Action]:
        return modes.add_parser(name, help=text, description=text).add_argument

    add = mode("train", "train on a data set")
    _add_spike_trains(add)
    add("--neuron", choices=NEURONS, default="qif", help="neuron")
    text = f"the output neuron that spikes first wins, or the one that spikes most ({_default('loss')})"
    add("--loss", choices=LOSSES, help=text)
    for name, kind, text in NUMBERS:
        add(_exact_option(name), dest=name, type=kind, help=f"{text} ({_default(name)})")
    add("--resume", action="store_true", help="continue from last.pt in --out, or begin if there is none")
    add("--out", type=Path, help="folder of the results (default: runs/exact-DATA-NEURON)")
    add = mode("compare", "search hyperparameters equally for several neurons, then test the best")
    _add_spike_trains(add)
    add("--neurons", choices=NEURONS, nargs="+", help="neurons (default: lif qif)")
    add("--trials", type=at_least(1, COUNT), default=40, help="trials of the search for each neuron")
    add("--finalists", type=at_least(1, COUNT), default=5, help="best trials, which are trained again")
    add("--seeds", type=at_least(1, COUNT), default=5, help="seeds of the test")
    add("--epochs", type=at_least(1, COUNT), default=8, help="epochs of every run")
    add(_exact_option("batch"), dest="batch", type=at_least(1, COUNT), default=50, help="samples in a batch")
    text = "folder of the results; runs that are there are not done again"
    add("--out", type=Path, default=Path("runs/exact-compare"), help=text)
    add = mode("demo", "move, add and remove spikes by gradient descent, and learn from silent neurons")
    add("names", nargs="*", metavar="NAME", help=f"demonstrations: {', '.join(DEMONSTRATIONS)} (default: all)")
    add("--seed", type=at_least(0), default=0, help="seed")
    add("--out", type=Path, default=Path("runs/exact-demo"), help="folder of the figures")


NUMBERS = (
    ("duration", positive, "trial length, in the unit of the spike times (SHD: seconds)"),
    ("tau", positive, "membrane time constant, in the same unit"),
    ("latest", positive, "time at which a black pixel would spike; only for images"),
    ("scale", positive, "time, or number of spikes, that one logit stands for"),
    ("rate", positive, "mean number of spikes of a neuron at the start"),
    ("epochs", at_least(0, COUNT), "epochs"),
    ("batch", at_least(1, COUNT), "samples in a batch"),
    ("lr", positive, "learning rate"),
    ("seed", at_least(0), "seed of weights and batches"),
    ("clip", positive, "largest norm of a gradient, beyond which it is scaled down"),
    ("pseudo_scale", positive, "scale of the pseudospikes' drive"),
)
"""The numbers of :class:`~qif_plugins.experiments.exact.settings.Settings` that are options of ``qif exact train``:
name, type and help."""
_UNSET = {"clip": "no limit", "pseudo_scale": "the neuron's own"}


def _exact_option(name: str) -> str:
    """Return the option of ``qif exact`` that sets a number of the settings."""
    return "--batch-size" if name == "batch" else f"--{name.replace('_', '-')}"


def _default(name: str) -> str:
    """Describe the default of an option of ``qif exact train``, for its help."""

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    parts = [_UNSET.get(name) or shown(getattr(Settings, name))]
    parts += [f"{data}: {shown(changes[name])}" for data, changes in DEFAULTS.items() if name in changes]
    if name in LIF_IMAGES:
        parts.append(f"lif on images: {shown(LIF_IMAGES[name])}")
    return f"default: {'; '.join(parts)}"


def _add_spike_trains(add: Callable[..., Any]) -> None:
    add("--data", choices=SPIKE_TRAINS, default="digits", help="data set")
    text = "folder of shd_train.h5 and shd_test.h5, SpikingJelly's SHD root, or folder of the recordings"
    add("--data-folder", type=Path, help=text)
    text = "test samples of spoken-digits: those of the last two speakers, or those with the indices 0 to 4"
    add("--split", choices=SPLITS, default="speaker", help=text)
    text = "largest number of samples to use of the training and of the test set (default: all)"
    add("--limit", type=at_least(1, COUNT), help=text)
    sizes = [f"{name} {' '.join(map(str, DEFAULTS[name].get('hidden', Settings.hidden)))}" for name in SPIKE_TRAINS]
    add("--hidden", type=at_least(1), nargs="*", help=f"sizes of the hidden layers (default: {', '.join(sizes)})")
    add("--recurrent", action="store_true", help="make the hidden layers recurrent")


def landscape(parser: ArgumentParser) -> None:
    """Declare the options of ``qif landscape``."""
    add = parser.add_argument
    add(
        "networks", nargs="+", metavar="NETWORK",
        help="folder of 'qif exact train' or 'qif train', file of 'qif compare --save', or package.module:function "
        "that returns (network, loss); of networks of one kind the table has the mean",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--direction", choices=("random", "gradient"), default="random", help="direction of the line")
    where.add_argument("--to", metavar="NETWORK", help="measure the line from each network to this one")
    add("--directions", type=at_least(1), default=1, help="number of random directions for each network")
    add("--samples", type=at_least(1), default=20, help="training samples in the batch")
    add("--single", type=at_least(0), default=3, help="number of samples that are also measured one by one")
    add("--points", type=int, default=401, help="positions on a line, a number of the form 4n + 1")
    text = "positions on each side of a plane, of the form 4n + 1; 0 measures no plane"
    add("--grid", type=int, default=0, help=text)
    text = "reach of a line to either side, in units of the weights' norms"
    add("--radius", type=positive, default=0.2, help=text)
    add("--smallest", type=positive, default=1e-6, help="smallest jump of the loss that counts")
    add("--jumps", type=at_least(0), default=20, help="largest number of jumps to locate on a line")
    add("--seed", type=at_least(0), default=0, help="seed of the first random direction")
    text = "folder of the data (default: data for files of 'qif compare', else as in training)"
    add("--data-folder", type=Path, help=text)
    add("--format", choices=FIGURES, default="png", help="format of the figures")
    add("--out", type=Path, default=Path("runs/landscape"), help="folder of landscape.json and the figures")


def study(parser: ArgumentParser) -> None:
    """Declare the options of ``qif study``."""
    add = parser.add_argument
    add("name", nargs="?", help=f"study: {', '.join(STUDIES)}, or all (default: list them)")
    add("--list", action="store_true", help="list the studies with their questions, and exit")
    add("--seeds", type=at_least(1, 10_000), help="number of seeds, from 0 (default: the study's own number)")
    text = "trials that run at the same time, each in its own process"
    add("--jobs", type=at_least(1, 1024), default=1, help=text)
    add("--threads", type=at_least(1, 1024), default=1, help="CPU threads of each trial")
    add("--quick", action="store_true", help="a tiny version on digits, to check that it runs")
    add("--page-only", action="store_true", help="run no trial, and write the page from the recorded ones")
    text = "folder of the files of qif bench, for the study latency"
    add("--results", type=Path, default=Path("benchmarks/results"), help=text)
    add("--networks", nargs="+", help="for the study swap: names of networks (default: all)")
    text = "for the study swap: what LIF is compared with: default, paper, matched, isometric (default: default)"
    add("--arms", nargs="+", help=text)
    text = "for the study swap: factors on each network's own learning rate, such as 0.333 1 3 (default: 1)"
    add("--rates", nargs="+", type=positive, help=text)
    text = f"for the studies {' and '.join(OF_FOLDERS)}: folders of your own data, for {' and '.join(STUDIED)}"
    add("--data-folder", nargs="+", type=_named_folder, metavar="NAME=FOLDER", help=text)
    add("--out", type=Path, help="folder of records and pages (default: docs/studies; quick: runs/studies)")


def bench(parser: ArgumentParser) -> None:
    """Declare the options of ``qif bench``."""
    add = parser.add_argument
    add("--device", default="cpu", help="device to measure on")
    add("--threads", type=at_least(1), help="CPU threads (default: as PyTorch sets them)")
    add("--full", action="store_true", help="measure T in 1, 4, 16, 64 and N from 2^10 to 2^25, up to --most")
    add("--size", action="append", help="only this size, as TxN, e.g. 4x2097152; may be repeated")
    add(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE",
        help="types of the input: float32, bfloat16, float16 (default: float32 bfloat16)",
    )  # fmt: skip
    text = "seconds for each size or network after its warm-up; at least 3 repetitions (default: 10, with --full 2)"
    add("--seconds", type=positive, help=text)
    add("--most", type=at_least(1), help="largest T times N to measure (default: 2^25 on a CPU, 2^28 on a GPU)")
    add(
        "--old-spikingjelly", type=Path, metavar="FOLDER",
        help="folder with a second SpikingJelly (pip install --target FOLDER --no-deps spikingjelly==0.0.0.0.14)",
    )  # fmt: skip
    text = "neurons not to measure, by their names in the table, e.g. 'qif, reference'"
    add("--leave-out", nargs="+", default=[], metavar="NAME", help=text)
    add(
        "--networks", nargs="*", metavar="NAME",
        help="instead of neurons, measure a training step of whole networks: with LIF, swapped to QIF, and without "
        "neurons (default: all networks)",
    )  # fmt: skip
    add("--batch-size", type=at_least(1), help="with --networks: samples in a batch (default: each network's own)")
    add("--eager", action="store_true", help="with --networks: measure without torch.compile only")
    add("--resume", action="store_true", help="keep what is in the results file, and measure only what is missing")
    text = "start no further size or network after so many minutes; --resume continues (default: no limit)"
    add("--minutes", type=positive, help=text)
    add(
        "--out", type=Path, help="results file (default: MACHINE.json, or networks-MACHINE.json, in benchmarks/results)"
    )
