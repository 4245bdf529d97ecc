"""The real loaders, on small files of the real formats."""

import hashlib
import pickle
import struct

import numpy
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("spikingjelly")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from torchvision import datasets
from training_processes import write_cifar10

from qif_plugins.experiments.data.spikingjelly import dataset_module
from qif_plugins.experiments.training.augmentation import Augmented, cutout, event_transform
from qif_plugins.experiments.training.config import DataConfig
from qif_plugins.experiments.training.data import CIFAR10_STATISTICS, load_task, split_per_class

pytestmark = pytest.mark.host_independent


def normalized(pixels, mean, std):
    x = torch.as_tensor(pixels).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(datasets.CIFAR10, name, getattr(datasets.CIFAR10, name))
    write_cifar10(tmp_path)
    return tmp_path


def test_cifar10(cifar10):
    task = load_task(
        DataConfig("cifar10", folder=str(cifar10), augment=("crop", "flip", "autoaugment", "cutout")), 16, 0
    )
    assert (task.shape, task.classes, task.train.count, task.test.count) == ((3, 32, 32), 10, 40, 8)
    (x, labels), *rest = task.test.epoch(0)
    source = datasets.CIFAR10(cifar10, train=False)
    assert not rest
    assert labels.tolist() == source.targets
    torch.testing.assert_close(x, normalized(source.data.transpose(0, 3, 1, 2), *CIFAR10_STATISTICS))
    x, labels = next(task.train.epoch(0))
    assert x.shape == (16, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"data\.download=true"):
        load_task(DataConfig("cifar10", folder=str(cifar10 / "nowhere")), 16, 0)


def test_augmentation_belongs_to_seed_epoch_and_sample(cifar10):
    def batches(epoch, first=0, workers=0, seed=0):
        data = DataConfig(
            "cifar10", folder=str(cifar10), augment=("crop", "flip", "autoaugment", "cutout"), workers=workers
        )
        task = load_task(data, 16, seed)
        before = torch.get_rng_state()
        found = list(task.train.epoch(epoch, first))
        assert torch.equal(torch.get_rng_state(), before)
        return found

    def same(a, b):
        return all(torch.equal(x, y) and torch.equal(m, n) for (x, m), (y, n) in zip(a, b, strict=True))

    whole = batches(1)
    torch.manual_seed(5)
    assert same(batches(1, first=1), whole[1:])
    assert same(batches(1, workers=2), whole)
    assert not same(batches(2), whole)
    assert not same(batches(1, seed=1), whole)


def test_cifar100(tmp_path, monkeypatch):
    kind = datasets.CIFAR100
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(kind, name, getattr(kind, name))
    base = tmp_path / kind.base_folder
    base.mkdir()
    pixels = numpy.random.RandomState(0).randint(0, 256, (6, 3072), dtype=numpy.uint8)
    for name, content in (
        ("train", {"data": pixels, "fine_labels": [99, 0, 5, 7, 7, 1], "coarse_labels": [0] * 6}),
        ("test", {"data": pixels[:2], "fine_labels": [3, 98], "coarse_labels": [0] * 2}),
        ("meta", {"fine_label_names": [str(number) for number in range(100)]}),
    ):
        (base / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    kind.train_list, kind.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
    kind.meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    task = load_task(DataConfig("cifar100", folder=str(tmp_path)), 4, 0)
    assert (task.classes, task.train.count) == (100, 6)
    assert next(task.test.epoch(0))[1].tolist() == [3, 98]


def test_imagenet(tmp_path):
    from PIL import Image

    random = numpy.random.RandomState(0)
    for part, number in (("train", 3), ("val", 2)):
        for label in ("n01440764", "n01443537"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = random.randint(0, 256, (40, 50, 3), dtype=numpy.uint8)
                Image.fromarray(pixels).save(folder / f"{label}_{index}.JPEG")
    task = load_task(DataConfig("imagenet", folder=str(tmp_path), size=32, augment=("resized_crop", "flip")), 4, 0)
    assert (task.shape, task.classes, task.train.count) == ((3, 32, 32), 2, 6)
    assert next(task.train.epoch(0))[0].shape == (4, 3, 32, 32)
    x, labels = next(task.test.epoch(0))
    assert x.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match="'train' and 'val'"):
        load_task(DataConfig("imagenet", folder=str(tmp_path / "val")), 4, 0)


def test_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = numpy.random.RandomState(0).randint(0, 256, (7, 28, 28), dtype=numpy.uint8)
    for name, number in (("train", 7), ("t10k", 3)):
        images, labels = pixels[:number], numpy.arange(number, dtype=numpy.uint8)
        header = struct.pack(">IIII", 2051, number, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, number) + labels.tobytes())
    task = load_task(DataConfig("mnist", folder=str(tmp_path)), 4, 0)
    x, labels = next(task.test.epoch(0))
    assert labels.tolist() == [0, 1, 2]
    values = torch.as_tensor(pixels).float()
    torch.testing.assert_close(x[:, 0], (values[:3] - values.mean()) / values.std())


# -- events ------------------------------------------------------------------------------------------------------------


def write_aedat(path, events):
    """Events ``(t, x, y, p)`` as the DVS128 writes them: a header, then address and time, big-endian."""
    words = []
    for t, x, y, p in events:
        # The loader turns the picture: x and y of its events are 127 less the y and x of the camera's.
        words += [(127 - x) << 8 | (127 - y) << 1 | (1 - p), t]
    path.write_bytes(b"#!AER-DAT2.0\r\n# made for a test\r\n" + numpy.array(words, ">u4").tobytes())


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Ten samples of each of two classes, through the host's own conversion of AEDAT files."""
    root = tmp_path_factory.mktemp("cifar10dvs")
    random = numpy.random.RandomState(0)
    written = {}
    for label in ("airplane", "truck"):
        (root / "extract" / label).mkdir(parents=True)
        for index in range(10):
            number = 40
            t = numpy.sort(random.randint(0, 10**6, number))
            x, y = random.randint(0, 128, number), random.randint(0, 128, number)
            p = random.randint(0, 2, number)
            # The header ends before a byte that is no text.
            x[0], t[0] = 0, 0xFFFF
            sample = [tuple(map(int, event)) for event in zip(t, x, y, p, strict=True)]
            written[f"cifar10_{label}_{index}"] = sample
            write_aedat(root / "extract" / label / f"cifar10_{label}_{index}.aedat", sample)
    kind = dataset_module("cifar10_dvs").CIFAR10DVS
    convert = getattr(kind, "create_raw_from_extracted", None)
    if convert is None:
        pytest.skip("this SpikingJelly reads AEDAT files with functions that NumPy 2 no longer has")
    (root / "events_np").mkdir()
    convert(root / "extract", root / "events_np")
    return root, written


def test_cifar10dvs(events):
    root, written = events
    task = load_task(DataConfig("cifar10dvs", folder=str(root), steps=4, augment=("flip", "roll")), 5, 0)
    assert (task.shape, task.classes, task.train.count, task.test.count) == ((2, 128, 128), 2, 18, 2)
    (x, labels), *rest = task.test.epoch(0)
    assert not rest
    assert labels.tolist() == [0, 1]
    names = sorted(written)
    for row, index in enumerate(task.record["test"]):
        # Four frames of ten events each, counted by polarity and place.
        frames = torch.zeros(4, 2, 128, 128)
        for place, (_, ex, ey, p) in enumerate(written[names[index]]):
            frames[place // 10, p, ey, ex] += 1
        assert torch.equal(x[row], frames)
    resized = load_task(DataConfig("cifar10dvs", folder=str(root), steps=4, size=48), 5, 0)
    assert next(resized.train.epoch(0))[0].shape == (5, 4, 2, 48, 48)


def test_the_division_is_recorded_and_repeated(events):
    root, _ = events
    task = load_task(DataConfig("cifar10dvs", folder=str(root), steps=4, split_seed=3), 5, 0)
    again = load_task(DataConfig("cifar10dvs", folder=str(root), steps=4, split_seed=0), 5, 0, record=task.record)
    assert again.record == task.record
    assert all(torch.equal(a[0], b[0]) for a, b in zip(task.test.epoch(0), again.test.epoch(0), strict=True))
    with pytest.raises(ValueError, match="20 samples, and the checkpoint was made with 10000"):
        load_task(DataConfig("cifar10dvs", folder=str(root), steps=4), 5, 0, record={"samples": 10000, "test": [1]})


def test_nothing_is_downloaded_unasked(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither 'events_np' nor 'download'"):
        load_task(DataConfig("cifar10dvs", folder=str(tmp_path / "dvs")), 5, 0)
    assert not (tmp_path / "dvs").exists()


def test_the_division_is_nine_to_one_in_each_class():
    labels = [0] * 10 + [2] * 21 + [1] * 30
    train, test = split_per_class(labels, 0.9, seed=1)
    assert sorted(train + test) == list(range(61))
    assert [sum(labels[i] == label for i in test) for label in (0, 1, 2)] == [1, 3, 2]
    assert split_per_class(labels, 0.9, seed=1) == (train, test)
    assert split_per_class(labels, 0.9, seed=2) != (train, test)


def test_event_augmentation_moves_all_frames_alike():
    frames = torch.zeros(3, 2, 16, 16)
    frames[:, 0, 8, 5] = 1
    items = Augmented([(frames.numpy(), 4)] * 200, event_transform(("flip", "roll"), 16), seed=0)
    places = set()
    for index in range(200):
        x, label = items[0, index]
        assert label == 4
        assert torch.equal(x[0], x[1])
        assert torch.equal(x[0], x[2])
        assert x.sum() == 3
        places.add(tuple(x[0, 0].nonzero()[0].tolist()))
    assert all(3 <= y <= 13 and (0 <= x <= 10 or 5 <= x <= 15) for y, x in places)
    assert {y for y, _ in places} >= {3, 13}
    assert torch.equal(event_transform((), 16, train=False)(frames), frames)


def test_cutout_clears_one_square():
    for seed in range(20):
        torch.manual_seed(seed)
        image = torch.ones(3, 32, 32)
        holes = cutout(image, 8) == 0
        assert torch.equal(holes[0], holes[1])
        rows, columns = holes[0].any(1).sum(), holes[0].any(0).sum()
        assert holes[0].sum() == rows * columns
        assert 4 <= rows <= 8
        assert 4 <= columns <= 8
        assert (image == 1).all()
