"""The `qif` command itself: registration, exit status, one line for what the user got wrong."""

import ast
import re
import subprocess
import sys

import pytest

from qif_plugins import __version__
from qif_plugins.cli import COMMANDS, main

pytestmark = pytest.mark.host_independent


def test_help_lists_every_subcommand(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name}\b", shown, re.MULTILINE) for name in COMMANDS)


def imported(*words):
    """The modules that ``qif`` has imported after these words."""
    code = (
        "import sys, contextlib, io; sys.argv[0] = 'qif'; from qif_plugins.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main({list(words)})\n"
        "print(list(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return ast.literal_eval(done.stdout)


def test_help_imports_no_subcommand():
    heavy = "qif_plugins.commands", "matplotlib", "spikingjelly", "torch", "numpy"
    assert not [module for module in imported("--help") if module.startswith(heavy)]


def test_the_version_imports_no_torch():
    assert "torch" not in imported("--version")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("word", ["--help", "--no-such-option"])
def test_help_and_wrong_options_import_neither_torch_nor_numpy(name, word):
    words = [name, "train", word] if name == "exact" else [name, word]
    heavy = "matplotlib", "spikingjelly", "snntorch", "torch", "numpy", "numba", "sklearn"
    assert not [module for module in imported(*words) if module.startswith(heavy)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: qif {name}")
    assert "(default: [" not in shown
    assert ") (default: " not in shown


def test_the_help_says_whose_defaults_the_numbers_are(capsys):
    with pytest.raises(SystemExit):
        main(["window", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in (("--a A", 0.25), ("--u1 U1", 0), ("--u2 U2", 0.5)):
        assert re.search(rf"{name} [a-z ]+ \(the paper's: {value}, taken with", text)
    assert "leak to match (default: 0.5, unless" in text


def test_the_help_of_run_says_what_each_choice_does(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "auto: match LIF's leak by the map without rebound, with an input gain of 1 under a norm, elsewhere" in text
    assert "lif: the parabola, with LIF's gain everywhere; paper: the paper's parameters" in text
    assert "auto: isometric under a norm, elsewhere the program's own" in text


@pytest.mark.parametrize("words", ["compare --T 4", "exact train --batch 8", "energy --ou x.json"])
def test_an_option_has_one_name(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("compare --data-foldr x", "--data-folder"),
        ("exact train --btach-size=8", "--batch-size"),
        ("run --dynamic lif train.py", "--dynamics"),
        ("bench --sizes 1x8 --minute 3", "--size and --minutes"),
    ],
)
def test_an_unknown_option_names_the_nearest(words, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"qif {words.partition(' --')[0]}: error: unrecognized arguments: --")
    assert message.endswith(f"; did you mean {nearest}?")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [("trian", "train"), ("exact train --loss cuont", "count"), ("evaluate x --data cifar11", "cifar10")],
)
def test_an_unknown_choice_names_the_nearest(words, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"invalid choice: '[a-z0-9]+' \(choose from .*\); did you mean {nearest}\?$", message)


def test_an_unknown_option_that_is_like_none_gets_no_suggestion(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--quick"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --quick\n")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"qif-plugins {__version__}\n"


def test_a_wrong_value_is_one_line_and_status_2(capsys):
    assert main(["window", "--dynamics", "paper", "--threshold", "5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("qif window: v_threshold=5 is not below the unstable fixed point 4.5")


def test_the_installed_command_shows_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "qif_plugins.cli", "window", "--a", "-1"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qif window: a must be positive, got a=-1: the map must open upwards to initiate spikes\n"


@pytest.mark.parametrize("words", [[], ["windwo"], ["windwo", "--help"]])
def test_no_such_subcommand_names_those_that_exist(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in (COMMANDS if words else ["command"]))


def test_an_interrupt_ends_with_130_and_no_traceback():
    code = (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs start without
        "from qif_plugins.cli import main\n"
        "main(['window', '--neurons', '1000'])\n"  # loads Numba, which an interrupt may leave half loaded
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "raise SystemExit(main(['window', '--neurons', '2000000000']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr == "\nqif window: interrupted\n"
