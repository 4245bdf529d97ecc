"""Small files of the formats in which users have data: images by class, WAV files, N-MNIST's events."""

import itertools
import wave

import numpy

RATE = 8000
"""Samples a second of the WAV files."""


def write_wav(path, samples, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((numpy.asarray(samples) * 20_000).astype("<i2").tobytes())


def tone(frequency, seconds=0.3, start=0.1):
    t = numpy.arange(int(RATE * (start + seconds))) / RATE
    return numpy.where(t >= start, numpy.sin(2 * numpy.pi * frequency * t), 0)


def write_nmnist(path, events):
    """Events ``(t, x, y, p)`` of 40 bits: x, y, polarity and 23 bits of microseconds, big-endian."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bytes([x, y]) + (p << 23 | t).to_bytes(3, "big") for t, x, y, p in events))


def write_images(folder, parts, classes, size=(32, 32), number=2):
    from PIL import Image

    random = numpy.random.RandomState(0)
    for part, label in itertools.product(parts, classes):
        (folder / part / label).mkdir(parents=True)
        for index in range(number):
            pixels = random.randint(0, 256, (*size, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / part / label / f"{index}.png")
