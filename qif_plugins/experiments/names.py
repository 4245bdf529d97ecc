"""Names that options and configurations choose from; importing them imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

HOSTS = ("spikingjelly", "snntorch")
"""Hosts by the name of their package."""
BUNDLED = ("digits", "mnist5k")
"""Data sets that come with a package."""
IN_MEMORY = (*BUNDLED, "mnist", "fashion-mnist")
IMAGES = (*IN_MEMORY, "cifar10")
"""Data sets that :func:`~qif_plugins.experiments.data.images.load_images` reads."""
SOUNDS = ("spoken-digits", "shd", "ssc")
"""Data sets of sounds: one row of bands or channels a time step."""
SEQUENCES = ("cifar10dvs", "nmnist", *SOUNDS)
"""Data sets whose samples have a time axis; those of the others are repeated over time."""
DATA_SETS = (*IMAGES, "cifar100", "imagenet", "image-folder", *SEQUENCES)
"""Data sets of ``qif train``."""
STUDIED = ("spoken-digits", "nmnist", "cifar10")
"""Data sets of ``qif study`` that lie in folders of the user's."""
ENCODERS = ("onset", "crossings", "rates")
"""Encoders of sound, see :func:`~qif_plugins.experiments.data.sound.encode`."""
SPLITS = ("speaker", "index")
"""Divisions of spoken digits, see :func:`~qif_plugins.experiments.data.sound.divide`."""
SHAPES = {
    "perceptron": (1, 28, 28),
    "convnet": (1, 28, 28),
    "resnet19": (3, 32, 32),
    "resnet34": (3, 224, 224),
    "vggsnn": (2, 48, 48),
}
"""The models, each with its usual input ``[C, H, W]``."""
FIGURES = ("png", "pdf", "svg")
"""Formats of figures."""
CONFIGURATIONS = Path(__file__).parent / "training" / "configs"


def configurations() -> tuple[str, ...]:
    """List the names of the configurations of ``qif train`` that come with the package."""
    return tuple(sorted(path.stem for path in CONFIGURATIONS.glob("*.toml")))
