"""SpikingJelly's data sets, whether or not its package of them imports here; SHD through its loader."""

import importlib
import sys

import h5py
import numpy as np
import pytest
import torch
from shd_files import write_shd

pytest.importorskip("spikingjelly")

from qif_plugins.experiments.data.spikingjelly import dataset_module
from qif_plugins.experiments.exact.data import load_shd


def imports():
    """Whether ``import spikingjelly.datasets`` works."""
    try:
        importlib.import_module("spikingjelly.datasets")
    except (ImportError, OSError, RuntimeError):  # OSError: torchaudio's library does not fit this torch
        return False
    return True


@pytest.mark.parametrize("torchaudio", ["as it is", "missing", "of another torch"])
def test_the_hosts_own_classes_whether_or_not_their_package_imports(torchaudio, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("spikingjelly.datasets")]:
        monkeypatch.delitem(sys.modules, name)
    if torchaudio == "missing":
        monkeypatch.setitem(sys.modules, "torchaudio", None)
    elif torchaudio == "of another torch":
        monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
        (tmp_path / "torchaudio.py").write_text("raise OSError('undefined symbol: torch_library_impl')")
        monkeypatch.syspath_prepend(tmp_path)
    shd = dataset_module("shd").SpikingHeidelbergDigits
    assert shd.__module__ == "spikingjelly.datasets.shd"
    assert dataset_module("shd").SpikingHeidelbergDigits is shd
    assert dataset_module("cifar10_dvs").CIFAR10DVS.get_H_W() == (128, 128)
    # What was put in the package's place is gone.
    assert ("spikingjelly.datasets" in sys.modules) == imports()
    if imports():
        assert sys.modules["spikingjelly.datasets"].__file__.endswith("__init__.py")


def test_what_does_not_exist_is_refused():
    with pytest.raises(ImportError, match=r"spikingjelly\.datasets\.nothing does not import .*pip install"):
        dataset_module("nothing")


@pytest.mark.parametrize("place", ["", "events_h5", "extract"])
def test_shd_files_are_read_as_they_are(tmp_path, place):
    write_shd(tmp_path / place)
    before = sorted(tmp_path.rglob("*"))
    spikes, labels = load_shd(tmp_path, train=True, duration=1.0)
    assert sorted(tmp_path.rglob("*")) == before
    assert labels.tolist() == list(range(12))
    with h5py.File(tmp_path / place / "shd_train.h5") as file:
        for i in range(12):
            times = np.asarray(file["spikes"]["times"][i], dtype=np.float64)
            kept = torch.isfinite(spikes.times[i])
            assert np.array_equal(spikes.times[i, kept], times[times <= 1.0])
            assert np.array_equal(spikes.indices[i, kept], file["spikes"]["units"][i][times <= 1.0])
    few, _ = load_shd(tmp_path, train=False, duration=1.0, limit=3)
    assert len(few.times) == 3


@pytest.mark.parametrize(
    ("wrong", "message"), [({"units": 900}, "SHD has units 0 to 699"), ({"labels": 30}, "labels 0 to")]
)
def test_other_files_are_refused(tmp_path, wrong, message):
    write_shd(tmp_path, samples=25, **wrong)
    with pytest.raises(ValueError, match=message):
        load_shd(tmp_path, train=True, duration=1.4)
