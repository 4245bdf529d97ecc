"""Files in the format of the Spiking Heidelberg Digits."""

import h5py
import numpy as np


def write_shd(folder, samples=12, units=700, labels=20, seed=0):
    """Files in the format of the Spiking Heidelberg Digits: ragged float16 times and uint16 units, and labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for name in ("train", "test"):
        with h5py.File(folder / f"shd_{name}.h5", "w") as file:
            ragged = file.create_group("spikes")
            times = ragged.create_dataset("times", (samples,), dtype=h5py.vlen_dtype(np.float16))
            channels = ragged.create_dataset("units", (samples,), dtype=h5py.vlen_dtype(np.uint16))
            for i in range(samples):
                count = int(rng.integers(50, 200))
                times[i] = np.sort(rng.uniform(0, 1.2, count)).astype(np.float16)
                channels[i] = rng.integers(0, units, count).astype(np.uint16)
            file["labels"] = (np.arange(samples) % labels).astype(np.uint16)
