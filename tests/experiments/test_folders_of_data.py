"""Data as users have them, in small files of the real formats: images by class, WAV files, N-MNIST, SHD and SSC."""

import itertools

import numpy
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("spikingjelly")
pytest.importorskip("torchvision")

from data_files import tone, write_images, write_nmnist, write_wav
from PIL import Image
from shd_files import write_shd

from qif_plugins.cli import main
from qif_plugins.experiments.data.images import is_by_class, load_images
from qif_plugins.experiments.data.sound import Sound, divide, encode, encode_folder, levels, recordings
from qif_plugins.experiments.data.spikingjelly import dataset_module
from qif_plugins.experiments.training.config import DataConfig, load_config
from qif_plugins.experiments.training.data import load_task

pytestmark = pytest.mark.host_independent


@pytest.fixture
def spoken(tmp_path):
    for digit, speaker, index in itertools.product(range(2), ("ada", "ben", "cyd"), (0, 4, 5, 12)):
        write_wav(tmp_path / "recordings" / f"{digit}_{speaker}_{index}.wav", tone(500 + 1000 * digit + 10 * index))
    return tmp_path


# -- images ------------------------------------------------------------------------------------------------------------


def test_cifar10s_own_files_take_precedence_over_images_by_class(tmp_path):
    assert not is_by_class(tmp_path)
    (tmp_path / "train").mkdir()
    assert is_by_class(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert not is_by_class(tmp_path)


def test_images_by_class_are_resized_and_keep_their_classes(tmp_path):
    write_images(tmp_path, ("train", "val"), ("cat", "dog", "owl"), size=(40, 60))
    task = load_task(DataConfig("image-folder", folder=str(tmp_path), size=16, augment=("flip",)), 4, 0)
    assert (task.shape, task.classes, task.train.count, task.test.count) == ((3, 16, 16), 3, 6, 6)
    assert next(task.train.epoch(0))[0].shape == (4, 3, 16, 16)
    assert [label for _, labels in task.test.epoch(0) for label in labels.tolist()] == [0, 0, 1, 1, 2, 2]
    assert task.record == {"classes": ["cat", "dog", "owl"]}
    with pytest.raises(ValueError, match=r"classes cat, dog, owl, and the checkpoint was made with cat, dog; pass"):
        load_task(DataConfig("image-folder", folder=str(tmp_path), size=16), 4, 0, record={"classes": ["cat", "dog"]})


def test_images_without_a_division_are_divided_and_the_record_repeats_it(tmp_path):
    write_images(tmp_path, ("",), ("cat", "dog"), number=10)
    data = DataConfig("image-folder", folder=str(tmp_path), size=8, split_seed=3)
    task = load_task(data, 4, 0)
    assert (task.train.count, task.test.count) == (18, 2)
    again = load_task(DataConfig("image-folder", folder=str(tmp_path), size=8), 4, 0, record=task.record)
    assert again.record == task.record
    assert torch.equal(next(again.test.epoch(0))[0], next(task.test.epoch(0))[0])


def test_a_class_without_images_and_a_missing_folder_are_named(tmp_path):
    write_images(tmp_path, ("train", "test"), ("cat", "dog"))
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"emu.*It takes folders 'train' and 'test' with a folder of image"):
        load_task(DataConfig("image-folder", folder=str(tmp_path), size=8), 4, 0)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*name the folder where they lie"):
        load_task(DataConfig("image-folder", folder=str(tmp_path / "nowhere"), size=8), 4, 0)
    with pytest.raises(ValueError, match=r"data\.size must be at least 1 for image-folder.*data\.size=64"):
        load_config("image_folder", ["data.size=0"])


def test_cifar10_from_a_folder_of_images(tmp_path):
    classes = [f"class{number}" for number in range(10)]
    write_images(tmp_path, ("train", "test"), classes, number=1)
    task = load_task(DataConfig("cifar10", folder=str(tmp_path), augment=("crop", "flip")), 4, 0)
    assert (task.shape, task.classes, task.train.count) == ((3, 32, 32), 10, 10)
    images = load_images("cifar10", tmp_path)
    assert images.test.shape == (10, 3, 32, 32)
    pixels = numpy.asarray(Image.open(tmp_path / "test" / "class3" / "0.png"))
    assert numpy.array_equal(images.test[3].permute(1, 2, 0).numpy(), pixels)
    write_images(tmp_path / "others", ("train", "test"), ("cat", "dog"))
    with pytest.raises(ValueError, match=r"holds 2 classes .* 'image-folder' takes other images"):
        load_task(DataConfig("cifar10", folder=str(tmp_path / "others")), 4, 0)


# -- sound -------------------------------------------------------------------------------------------------------------


def test_a_tone_is_loudest_in_its_band_and_silence_is_level_0():
    pytest.importorskip("torchaudio")
    sound = Sound(50, duration=0.5, bands=20)
    level = levels(torch.from_numpy(tone(1000)), sound)
    assert level.shape == (50, 20)
    assert level.max() == 1
    assert not level[:8].any()
    assert not level[42:].any()
    low, high = (levels(torch.from_numpy(tone(f)), sound)[20].argmax() for f in (500, 3000))
    assert low < level[20].argmax() < high
    assert not levels(torch.zeros(4000), sound).any()
    assert not levels(torch.zeros(7), sound).any()
    with pytest.raises(ValueError, match=r"of 500 mel bands hold none .* lower data\.bands"):
        levels(torch.zeros(4000), Sound(50, bands=500))


def test_encoders():
    # A band that rises to 0.5, stays, and falls.
    level = torch.tensor([0.0, 0.5, *[0.5] * 20, 0.0], dtype=torch.float64)[:, None]
    onset = encode(level, Sound(23, duration=0.23))[:, 0, 0, 0]
    # The leaky mean comes within 0.1 of 0.5 after 50 ms times ln 5: 8.05 steps of 10 ms.
    assert onset.tolist() == [0] + [1] * 9 + [0] * 13
    crossings = encode(level, Sound(23, duration=0.23, encoder="crossings", delta=0.25))[:, :, 0, 0]
    assert crossings[1].tolist() == [2, 0]
    assert crossings[-1].tolist() == [0, 2]
    assert crossings.sum() == 4
    steady = torch.full((2000, 3), 0.3, dtype=torch.float64)
    sound = Sound(2000, duration=20, encoder="rates")
    drawn = encode(steady, sound, 4)
    assert drawn.double().mean() == pytest.approx(0.3, abs=0.03)  # five standard deviations
    assert torch.equal(drawn, encode(steady, sound, 4))
    assert not torch.equal(drawn, encode(steady, sound, 5))
    assert not torch.equal(drawn, encode(steady, Sound(2000, duration=20, encoder="rates", seed=1), 4))
    with pytest.raises(ValueError, match="unknown encoder 'onsets'; did you mean 'onset'"):
        Sound(10, encoder="onsets")


def test_divisions_by_index_and_by_speaker(spoken):
    found = recordings(spoken)
    train, test = divide(found, "index")
    assert {found[i].index for i in test} == {0, 4}
    assert {found[i].index for i in train} == {5, 12}
    train, test = divide(found, "speaker")
    assert {found[i].speaker for i in test} == {"ben", "cyd"}
    assert {found[i].speaker for i in train} == {"ada"}
    assert {found[i].speaker for i in divide(found, "speaker", ["ada"])[1]} == {"ada"}
    with pytest.raises(ValueError, match="unknown speaker 'adda'; did you mean 'ada'"):
        divide(found, "speaker", ["adda"])
    with pytest.raises(ValueError, match=r"leaves 0 recordings to train .* take the other split"):
        divide(found, "speaker", ["ada", "ben", "cyd"])


def test_what_a_folder_holds_is_encoded_once(spoken):
    pytest.importorskip("torchaudio")
    data = DataConfig("spoken-digits", folder=str(spoken), steps=20, bands=12, split="index")
    task = load_task(data, 8, 0)
    assert (task.shape, task.classes, task.train.count, task.test.count) == ((1, 1, 12), 10, 12, 12)
    x, labels = next(task.test.epoch(0))
    assert (x.shape, x.dtype) == ((8, 20, 1, 1, 12), torch.float32)
    assert labels.tolist() == [0] * 6 + [1] * 2
    (kept,) = (spoken / ".qif-sound").iterdir()
    written = kept.stat().st_mtime_ns
    sound = Sound(20, bands=12)
    _, spikes = encode_folder(spoken, sound)
    assert kept.stat().st_mtime_ns == written
    # Another file, a damaged store and other settings are noticed.
    kept.write_bytes(kept.read_bytes()[:50])
    assert torch.equal(encode_folder(spoken, sound)[1], spikes)
    write_wav(spoken / "recordings" / "0_ada_0.wav", tone(2500, 0.4))
    changed = encode_folder(spoken, sound)[1]
    assert [bool((a != b).any()) for a, b in zip(changed, spikes, strict=True)].index(True) == 0
    assert torch.equal(changed[1:], spikes[1:])
    assert encode_folder(spoken, Sound(20, bands=12, encoder="crossings"))[1].shape == (24, 20, 2, 1, 12)


def test_other_recordings_are_refused(tmp_path):
    pytest.importorskip("torchaudio")
    data = DataConfig("spoken-digits", folder=str(tmp_path / "sub"), steps=20, bands=12)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*sub .*name the folder"):
        load_task(data, 8, 0)
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no recordings"):
        load_task(data, 8, 0)
    write_wav(tmp_path / "sub" / "0_ada_0.wav", tone(500), rate=16000)
    with pytest.raises(ValueError, match=r"16000 samples a second.*8000; set data\.sample_rate=16000"):
        load_task(data, 8, 0)
    (tmp_path / "sub" / "0_ada_0.wav").write_bytes(b"no sound at all")
    with pytest.raises(ValueError, match=r"0_ada_0\.wav is not a WAV file"):
        load_task(data, 8, 0)
    write_wav(tmp_path / "sub" / "zero.wav", tone(500))
    with pytest.raises(ValueError, match=r"zero\.wav is not named DIGIT_SPEAKER_INDEX\.wav"):
        load_task(data, 8, 0)


# -- events ------------------------------------------------------------------------------------------------------------


def test_nmnist_from_its_own_files(tmp_path):
    random = numpy.random.RandomState(0)
    events = [(1000 * t, *map(int, random.randint(0, 34, 2)), int(random.randint(2))) for t in range(40)]
    for part, digit in itertools.product(("Train", "Test"), "37"):
        write_nmnist(tmp_path / part / digit / "00001.bin", events)
    task = load_task(DataConfig("nmnist", folder=str(tmp_path), steps=4), 2, 0)
    assert (task.shape, task.train.count, task.test.count) == ((2, 34, 34), 2, 2)
    x, _ = next(task.test.epoch(0))
    frames = torch.zeros(4, 2, 34, 34)
    for place, (_, column, row, p) in enumerate(events):
        frames[place // 10, p, row, column] += 1
    assert torch.equal(x[0], frames)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(FileNotFoundError, match=r"there is no N-MNIST in .*'Train' and 'Test'"):
        load_task(DataConfig("nmnist", folder=str(tmp_path / "Train")), 2, 0)


def test_heidelberg_events_are_counted_by_step_and_channel(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_shd(tmp_path)
    task = load_task(DataConfig("shd", folder=str(tmp_path), steps=10, duration=1.0, workers=1), 5, 0)
    assert (task.shape, task.classes, task.train.count) == ((1, 1, 700), 20, 12)
    x, labels = next(task.test.epoch(0))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    with h5py.File(tmp_path / "shd_test.h5") as file:
        times, units = (numpy.asarray(file["spikes"][name][2]) for name in ("times", "units"))
    counts = torch.zeros(10, 700)
    for t, unit in zip(times.astype(float), units, strict=True):
        if t < 1:
            counts[int(t * 10), unit] += 1
    assert torch.equal(x[2, :, 0, 0], counts)
    if hasattr(dataset_module("shd"), "SpikingSpeechCommands"):
        for part in ("train", "test"):
            (tmp_path / f"shd_{part}.h5").rename(tmp_path / f"ssc_{part}.h5")
        assert load_task(DataConfig("ssc", folder=str(tmp_path), steps=10), 5, 0).classes == 35
    with pytest.raises((FileNotFoundError, ImportError), match=r"download and unpack it|spikingjelly>=2"):
        load_task(DataConfig("ssc", folder=str(tmp_path / "nowhere")), 5, 0)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_train_evaluate_and_energy_on_spoken_digits(spoken, tmp_path, capsys):
    pytest.importorskip("torchaudio")
    out = tmp_path / "run"
    options = ["--data", "spoken-digits", "--data-folder", str(spoken), "--out", str(out), "--quiet"]
    small = ["data.steps=8", "data.bands=12", "data.split=index", "training.epochs=1", "training.batch_size=8"]
    changes = [word for change in (*small, "model.width=8") for word in ("--set", change)]
    assert main(["train", "--config", "digits", "--no-tensorboard", *options, *changes]) == 0
    assert main(["evaluate", str(out / "best.pt"), "--data-folder", str(spoken)]) == 0
    assert "spoken-digits, 12 test samples" in capsys.readouterr().out
    assert main(["energy", "--checkpoint", str(out / "best.pt"), "--data", "spoken-digits"]) == 0
    capsys.readouterr()
    assert main(["energy", "--checkpoint", str(out / "best.pt"), "--data", "mnist"]) == 2
    assert "shape and classes must be the same" in capsys.readouterr().err
    too_many = ["--set", "training.batch_size=13", "--out", str(tmp_path / "other")]
    assert main(["train", "--config", "digits", *options[:4], *changes, *too_many]) == 2
    assert "must be at most 12, the training samples of spoken-digits, got 13" in capsys.readouterr().err


def test_another_data_set_drops_what_describes_the_configurations_own():
    data = load_config("cifar10dvs_vggsnn", ["data.name=nmnist", "data.augment=['roll']"]).data
    assert (data.folder, data.size, data.augment, data.steps) == ("data", 0, ("roll",), 10)


def test_samples_are_drawn_as_the_network_gets_them(spoken, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchaudio")
    write_nmnist(tmp_path / "1.bin", [(1000 * t, t % 34, 5, t % 2) for t in range(40)])
    write_images(tmp_path, ("pictures",), ("cat",), number=1)
    write_shd(tmp_path)
    out = tmp_path / "sample.png"
    for words, expected in (
        ([spoken / "recordings" / "0_ada_0.wav", "--set", "data.encoder=crossings"], "= 60x2x1x40"),
        ([tmp_path / "1.bin"], "= 10x2x34x34, values from 0 to 1; 40 events"),
        ([tmp_path / "shd_test.h5", "--index", 3], "sample 3, class 3: T x C x H x W = 100x1x1x700"),
        ([tmp_path / "pictures" / "cat" / "0.png"], "the same in all 4 steps: T x C x H x W = 1x3x32x32"),
    ):
        assert main(["data", "show", *map(str, words), "--out", str(out)]) == 0
        assert expected in capsys.readouterr().out
        assert out.read_bytes().startswith(b"\x89PNG")
        out.unlink()
    for words, message in (
        ([tmp_path / "no.wav"], "there is no file"),
        ([tmp_path / "shd_test.h5", "--index", 12], "--index must be at most 11"),
        ([spoken / "recordings" / "0_ada_0.wav", "--set", "data.encoder=onsets"], "did you mean 'onset'"),
        ([spoken / "recordings" / "0_ada_0.wav", "--config", "image_folder"], "is no image, WAV file"),
    ):
        assert main(["data", "show", *map(str, words), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
