"""Files and folders: what is damaged is refused, what is written is whole, and a folder has one run at a time."""

import os
import pickle
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qif_plugins.support import checkpoints
from qif_plugins.support.files import check_parts, check_target, occupied, read_json, replacing, write_json

pytestmark = pytest.mark.host_independent
posix = pytest.mark.skipif(os.name != "posix", reason="forks, and limits of POSIX")

CONTENT = {"weights": torch.arange(3000.0), "name": "a", "steps": [1, 2, {"lr": 0.5}]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.pt"
    checkpoints.save(path, CONTENT)
    return path.read_bytes()


def equal(content):
    return torch.equal(content["weights"], CONTENT["weights"]) and {**content, "weights": 0} == {
        **CONTENT,
        "weights": 0,
    }


# -- damage ------------------------------------------------------------------------------------------------------------


@given(place=st.integers(0, 10**9), length=st.integers(1, 2000), byte=st.integers(0, 255))
def test_a_file_that_was_written_over_is_refused_or_as_it_was(sound, tmp_path_factory, place, length, byte):
    data = bytearray(sound)
    start = place % len(data)
    data[start : start + length] = bytes([byte]) * len(data[start : start + length])
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(data)
    try:
        content = checkpoints.load(path, "checkpoint")
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:  # an entry that nothing reads, such as padding
        assert equal(content)


@given(length=st.integers(0, 10**9))
def test_a_file_that_was_cut_is_refused(sound, tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(sound[: length % len(sound)])
    with pytest.raises(ValueError, match=r"damaged or incomplete|is empty|cannot be read"):
        checkpoints.load(path, "checkpoint")


def test_other_files_are_refused_by_what_they_are(tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    (tmp_path / "pickle").write_bytes(pickle.dumps(Harmful()))
    torch.save({"a": Harmful()}, tmp_path / "code")
    torch.save(CONTENT, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name, message in (
        ("text", "text is no checkpoint: it cannot be read as a checkpoint; say so"),
        ("empty", "it is empty"),
        ("pickle", "cannot be read"),
        ("code", "code is no checkpoint: UnpicklingError while reading it; say so"),
        ("old", "cannot be read"),
        ("", "is a folder, and no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.load(tmp_path / name, "checkpoint", "say so")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoints.load(tmp_path / "nowhere", "checkpoint")
    assert not (tmp_path / "written").exists()


def test_a_program_without_checksums_still_saves_what_can_be_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("PyTorch before 2.6 writes checksums always")
    torch.serialization.set_crc32_options(False)
    try:
        checkpoints.save(tmp_path / "a.pt", CONTENT)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(checkpoints.load(tmp_path / "a.pt", "checkpoint"))


ROW = {"loss": (float, type(None)), str: object}
PARTS = {"config": {"epochs": int, "lr": float, "on": bool}, "rows": [ROW], "w": dict}
RIGHT = {"config": {"epochs": 1, "lr": 1, "on": True}, "rows": [{"loss": None}, {"loss": 0.5, "more": "a"}], "w": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"config": {"epochs": 1, "lr": 0.5}}, "it lacks config.on"),
        ({"config": [1]}, "config must be a table, and is a list"),
        ({"config": {"epochs": 1.0, "lr": 0.5, "on": True}}, "config.epochs must be a whole number, and is a number"),
        ({"config": {"epochs": True, "lr": 0.5, "on": True}}, "config.epochs must be a whole number, and is true or"),
        ({"config": {"epochs": 1, "lr": "0.5", "on": True}}, "config.lr must be a number, and is text"),
        ({"config": {"epochs": 1, "lr": 0.5, "on": 1}}, "config.on must be true or false, and is a whole number"),
        ({"rows": {}}, "rows must be a list, and is a table"),
        ({"rows": [{"loss": 0.5}, {}]}, r"it lacks rows\[1\].loss"),
        ({"rows": [{"loss": "x"}]}, r"rows\[0\].loss must be a number or nothing, and is text"),
        ({"rows": [{"loss": 0.5, 3: 1}]}, r"a name in rows\[0\] must be text, and is a whole number"),
        ({"w": None}, "w must be a table, and is nothing"),
    ],
)
def test_parts_are_named(change, message):
    if message is None:
        check_parts({**RIGHT, **change}, PARTS)
        return
    with pytest.raises(ValueError, match=message):
        check_parts({**RIGHT, **change}, PARTS)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"cases": 3}', "[" * 10**5, "\x00"])
def test_json_that_is_none_of_ours(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is no results file, or a damaged one: .*; move it away"):
        read_json(path, "no results file", {"cases": [int]})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no results file"):
        read_json(path, "no results file", {"cases": [int]})


def test_weights_that_are_not_finite_are_named(tmp_path):
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan"), float("inf")]), "n": torch.tensor(3)}
    with pytest.raises(ValueError, match=r"b is NaN or infinite in 2 of its 3 values"):
        checkpoints.check_tensors(tmp_path, weights)
    with pytest.raises(ValueError, match="a as a tensor without plain numbers"):
        checkpoints.check_tensors(tmp_path, {"a": torch.ones(3, device="meta")})
    checkpoints.check_tensors(tmp_path, {"a": torch.ones(3), "n": torch.tensor(3)})


@pytest.mark.parametrize(
    "change",
    [
        {"0.weight": torch.ones(2, 3)},
        {"0.weight": torch.ones(4, 3, dtype=torch.int64)},
        {"0.weight": [1.0]},
        {"more": torch.ones(1)},
        {"0.weight": None},
    ],
)
def test_another_models_weights_change_nothing(change):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()} | change
    other = {name: tensor for name, tensor in other.items() if tensor is not None}
    with pytest.raises(ValueError, match=r"run\.pt is another model's: "):
        checkpoints.load_weights(net, other, "run.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


# -- writing -----------------------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from qif_plugins.support import checkpoints
from qif_plugins.support.files import write_json
folder = Path(sys.argv[1])
checkpoints.save(folder / "a.pt", torch.ones(2))
write_json(folder / "a.json", [1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write, name, content in ((checkpoints.save, "a.pt", torch.ones(10**5)), (write_json, "a.json", [0] * 10**4)):
    try:
        write(folder / name, content)
    except OSError as error:
        print(error)
"""


@posix
def test_a_full_disk_leaves_the_file_before_and_no_rest(tmp_path):
    done = forked.python(FULL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"[Errno 27] cannot write {tmp_path / name}: File too large" for name in ("a.pt", "a.json")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt"]
    assert torch.equal(checkpoints.load(tmp_path / "a.pt", "checkpoint"), torch.ones(2))
    assert read_json(tmp_path / "a.json", "no list", [int]) == [1]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        with pytest.raises(OSError, match="cannot write into"), occupied(folder):
            pytest.fail("began")
        with pytest.raises(OSError, match="cannot write into"):
            check_target(folder / "result.json")
    with pytest.raises(OSError, match="it is a folder; name a file"):
        check_target(tmp_path)
    check_target(tmp_path / "new" / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


# -- folders -----------------------------------------------------------------------------------------------------------

REST = ".last.pt.qif-0123456789abcdef.tmp.pt"


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a" / "run"
    with occupied(folder):
        with replacing(folder / "result.json") as beside:
            message = rf"another run \(process {os.getpid()} on .*\) writes to {folder}"
            with pytest.raises(ValueError, match=message), occupied(folder):
                pytest.fail("began")
            assert beside.exists()  # what the first was writing
            beside.write_text("1")
        (folder / REST).touch()
        with occupied(tmp_path / "a"):  # another folder
            pass
    assert sorted(path.name for path in folder.iterdir()) == [REST, "result.json"]
    (folder / ".last-1.pt").touch()
    with occupied(folder):
        assert not (folder / REST).exists()
    assert sorted(path.name for path in folder.iterdir()) == [".last-1.pt", "result.json"]
    with pytest.raises(RuntimeError), occupied(tmp_path / "b" / "c"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_of_one_folder_are_apart(tmp_path):
    (tmp_path / REST).touch()
    with occupied(tmp_path, "one.json"), occupied(tmp_path, "two.json"):
        with pytest.raises(ValueError, match=r"writes to .*one\.json"), occupied(tmp_path, "one.json"):
            pytest.fail("began")
        write_json(tmp_path / "one.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [REST, "one.json"]


HOLDER = """
import os, sys, time
from pathlib import Path
from qif_plugins.support.files import occupied
with occupied(Path(sys.argv[1])):
    if not os.fork():  # a process that loads data, say
        time.sleep(60)
        os._exit(0)
    Path(sys.argv[1], "held").touch()
    time.sleep(60)
"""


@posix
def test_a_killed_run_blocks_no_later_one(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "held").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(ValueError, match=f"process {process.pid} on "), occupied(tmp_path):
            pytest.fail("began")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # Its child lives on.
        with occupied(tmp_path):
            pass
        os.killpg(process.pid, 0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["held"]
