"""Spoken digits from WAV files: levels of mel bands over time, and these levels as spikes.

torchaudio computes the mel bands, SciPy reads the files. What a folder holds is encoded once and kept in a file in its
subfolder ``.qif-sound``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...support.files import replacing
from ...support.names import check_known
from ..names import ENCODERS

RANGE = 60.0
"""Decibels from level 1, the loudest band of a recording, down to level 0."""
ADAPTATION = 0.05
"""Time constant, in seconds, in which the encoder ``"onset"`` adapts to a level."""
_NAME = re.compile(r"(\d)_(.+)_(\d+)\.wav", re.IGNORECASE)
_VERSION = 1
"""Number to raise when the same settings give other spikes, so that files made before are not used."""


@dataclass(frozen=True)
class Sound:
    """Settings by which a recording becomes spikes.

    Attributes:
        steps: T, the number of time steps.
        duration: Seconds that they span; longer recordings are cut, shorter ones are followed by silence. Default 0.6.
        bands: Number of mel bands, from 0 Hz to half the sample rate. Default 40.
        sample_rate: Samples a second of the recordings. Default 8000.
        encoder: One of :data:`~qif_plugins.experiments.names.ENCODERS`, see :func:`encode`. Default ``"onset"``.
        delta: Change of a level that makes an event, as a share of 60 dB, for ``"onset"`` and ``"crossings"``.
            Default 0.1.
        seed: Seed of the encoder ``"rates"``. Default 0.
    """

    steps: int
    duration: float = 0.6
    bands: int = 40
    sample_rate: int = 8000
    encoder: str = "onset"
    delta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("encoder", ENCODERS, self.encoder)
        if self.hop < 1:
            raise ValueError(
                f"{self.steps} steps in {self.duration:g} s are more than the {self.sample_rate} samples a second; "
                "take fewer steps or a longer duration"
            )

    @property
    def hop(self) -> int:
        """Samples in a time step."""
        return round(self.sample_rate * self.duration / self.steps)


@dataclass(frozen=True)
class Recording:
    """A WAV file ``DIGIT_SPEAKER_INDEX.wav``, as the Free Spoken Digit Dataset names them."""

    path: Path
    digit: int
    speaker: str
    index: int


def recordings(folder: Path) -> list[Recording]:
    """List the recordings in a folder, or in its subfolder ``recordings`` if it has one, by name.

    Raises:
        FileNotFoundError: There is no such folder, or no WAV file in it.
        ValueError: A file has another name than ``DIGIT_SPEAKER_INDEX.wav``.
    """
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with recordings DIGIT_SPEAKER_INDEX.wav")
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() == ".wav"):
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise ValueError(
                f"{path} is not named DIGIT_SPEAKER_INDEX.wav, such as 7_jackson_32.wav; rename it or move it away"
            )
        found.append(Recording(path, int(name[1]), name[2], int(name[3])))
    if not found:
        raise FileNotFoundError(f"there are no recordings DIGIT_SPEAKER_INDEX.wav in {folder}")
    return found


def divide(found: Sequence[Recording], split: str, speakers: Sequence[str] = ()) -> tuple[list[int], list[int]]:
    """Divide recordings into those to learn from and those to test on.

    Args:
        found: The recordings.
        split: ``"index"`` tests those with the indices 0 to 4, as the Free Spoken Digit Dataset itself does;
            ``"speaker"`` tests all of some speakers, who are then not heard in training.
        speakers: Those speakers. Default: the last two by name.

    Returns:
        Places in ``found`` of either part.

    Raises:
        ValueError: A speaker is unknown, or a part is empty.
    """
    known = sorted({recording.speaker for recording in found})
    check_known("speaker", known, *speakers)
    held_out = set(speakers or known[-2:])
    tested = [recording.index <= 4 if split == "index" else recording.speaker in held_out for recording in found]
    parts = [i for i, test in enumerate(tested) if not test], [i for i, test in enumerate(tested) if test]
    if not all(parts):
        raise ValueError(
            f"the split by {split} leaves {len(parts[0])} recordings to train and {len(parts[1])} to test, of speakers "
            f"{', '.join(known)}; take the other split (of 'index' and 'speaker'), or other test_speakers"
        )
    return parts


def polarities(encoder: str) -> int:
    """Number of channels an encoder gives each band: 2 for ``"crossings"`` (up and down), 1 for the others."""
    return 2 if encoder == "crossings" else 1


def levels(samples: Tensor, sound: Sound) -> Tensor:
    """Compute the levels of the mel bands, ``[T, bands]``: 1 for the recording's loudest, 0 from 60 dB below it.

    Args:
        samples: The recording, ``[samples]``.
        sound: The settings.

    Raises:
        ImportError: torchaudio is not installed, or not for this PyTorch.
        ValueError: There are so many bands that one of them holds no frequency of the spectrum.
    """
    length = sound.hop * sound.steps
    padded = torch.nn.functional.pad(samples[:length].double(), (0, max(0, length - len(samples))))
    power = _filter_bank(sound.sample_rate, sound.hop, sound.bands)(padded)[:, : sound.steps]
    loudest = power.max()
    if loudest == 0:
        return torch.zeros_like(power).T
    return 1 + 10 / RANGE * (power / loudest).clamp_min(10 ** (-RANGE / 10)).log10().T


def encode(level: Tensor, sound: Sound, number: int = 0) -> Tensor:
    """Convert levels to spikes.

    ``"onset"``: a spike in every step in which a level is at least ``delta`` above what the band has adapted to, the
    leaky mean (50 ms) of its levels before: a burst at each onset, as of inner hair cells, which adapt.
    ``"crossings"``: a spike for each ``delta`` that a level has risen (channel 0) or fallen (channel 1) since the last.
    ``"rates"``: a spike in a step with the probability that the level says, drawn from ``seed`` and ``number``.

    Args:
        level: ``[T, bands]``, see :func:`levels`.
        sound: The settings.
        number: Number of the recording in its folder. Default 0.

    Returns:
        Spike counts ``[T, polarities, 1, bands]``, uint8.
    """
    if sound.encoder == "rates":
        generator = torch.Generator("cpu").manual_seed((sound.seed * 1_000_003 + number) % 2**63)
        drawn = torch.rand(level.shape, generator=generator, dtype=level.dtype, device="cpu")
        return (drawn < level).to(torch.uint8)[:, None, None]
    rows = []
    if sound.encoder == "onset":
        share = -math.expm1(-sound.hop / sound.sample_rate / ADAPTATION)
        adapted = torch.zeros_like(level[0])
        for now in level:
            rows.append((now - adapted >= sound.delta)[None])
            adapted = adapted + share * (now - adapted)
    else:
        crossed = torch.zeros_like(level[0])
        for now in level:
            moved = (now / sound.delta - crossed).trunc()
            rows.append(torch.stack([moved.clamp_min(0), (-moved).clamp_min(0)]))
            crossed = crossed + moved
    return torch.stack(rows)[:, :, None].to(torch.uint8)


def encode_file(path: Path, sound: Sound, number: int = 0) -> Tensor:
    """Read a WAV file and convert it to spikes; several channels are averaged.

    Args:
        path: The file.
        sound: The settings.
        number: See :func:`encode`.

    Raises:
        ValueError: The file is not a WAV file, is empty, or has another sample rate.
    """
    try:
        from scipy.io import wavfile
    except ImportError:
        raise _missing("SciPy") from None
    try:
        rate, values = wavfile.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a WAV file that SciPy reads ({error}); convert it, or move it away") from error
    if rate != sound.sample_rate:
        raise ValueError(
            f"{path} has {rate} samples a second, and data.sample_rate is {sound.sample_rate}; set "
            f"data.sample_rate={rate} if all files have that, or resample the file"
        )
    samples = torch.from_numpy(values.astype(numpy.float64) - (128 if values.dtype == numpy.uint8 else 0))
    if not (samples.numel() and samples.isfinite().all()):
        raise ValueError(f"{path} holds no samples, or some that are not finite; move it away")
    return encode(levels(samples if samples.dim() == 1 else samples.mean(1), sound), sound, number)


def encode_folder(folder: Path, sound: Sound) -> tuple[list[Recording], Tensor]:
    """Convert all recordings of a folder, or read what was kept of the same conversion of the same files.

    Returns:
        The recordings, and their spike counts ``[N, T, polarities, 1, bands]``, uint8.
    """
    found = recordings(folder)
    stats = [(recording.path.name, recording.path.stat()) for recording in found]
    key: list[Any] = [_VERSION, asdict(sound), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    kept = folder / ".qif-sound" / f"{name}.npy"
    shape = (len(found), sound.steps, polarities(sound.encoder), 1, sound.bands)
    try:
        counts = numpy.load(kept)
        if counts.shape == shape and counts.dtype == numpy.uint8:
            return found, torch.from_numpy(counts)
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged
    spikes = torch.stack([encode_file(recording.path, sound, i) for i, recording in enumerate(found)])
    try:
        with replacing(kept) as beside:
            numpy.save(beside, spikes.numpy())
    except OSError as error:
        logging.getLogger(__name__).warning("%s; the recordings are encoded again in the next run", error)
    return found, spikes


@lru_cache(maxsize=4)
def _filter_bank(sample_rate: int, hop: int, bands: int) -> Any:
    try:
        from torchaudio.transforms import MelSpectrogram
    except (ImportError, OSError, RuntimeError) as error:  # OSError and RuntimeError: built for another PyTorch
        raise _missing("torchaudio", f" ({error})") from error
    # 25 ms or a step, whichever is longer, rounded up to a power of two.
    width = 2 ** math.ceil(math.log2(max(0.025 * sample_rate, hop)))
    bank = MelSpectrogram(sample_rate, n_fft=width, hop_length=hop, n_mels=bands).double()
    empty = int((bank.mel_scale.fb.amax(0) == 0).sum())
    if empty:
        raise ValueError(
            f"{empty} of {bands} mel bands hold none of the {width // 2 + 1} frequencies of a spectrum of {width} "
            "samples; lower data.bands"
        )
    return bank


def _missing(package: str, reason: str = "") -> ImportError:
    return ImportError(f"recordings need {package}, which does not import{reason}: pip install 'qif-plugins[sound]'")
