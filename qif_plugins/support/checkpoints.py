"""Save and load files of tensors and plain values, complete and checked."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import check_parts, replacing
from .text import one_line


def save(path: Path, content: Any) -> None:
    """Write ``content`` as :func:`torch.save` does; afterwards the file is complete on the disk, or unchanged.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    # In memory first: the writer of PyTorch's zip files does not pass on why a file could not be written.
    whole = io.BytesIO()
    with _checksums():
        torch.save(content, whole)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(whole.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def load(path: Path, what: str, hint: str = "") -> Any:
    """Read a file that :func:`save` wrote, on the CPU and with ``weights_only``, so that no code in the file runs.

    Args:
        path: The file.
        what: Name of such a file, for the error: ``"checkpoint of 'qif train'"``.
        hint: Remedy if it is another file, for the error. Default: none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is another one, or is damaged.
    """
    end = f"; {hint}" if hint else ""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and no {what}{end}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}{end}")
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        problem = "it cannot be read as a checkpoint" if data else "it is empty"
        raise ValueError(f"{path} is no {what}: {problem}{end}")
    file = io.BytesIO(data)
    try:
        # torch.load does not look at the checksums.
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except Exception as error:  # any error is possible in a file that is truncated or overwritten
        raise ValueError(
            f"{path} is damaged or incomplete ({one_line(error)}); take another copy or an earlier checkpoint"
        ) from error
    if broken is not None:
        raise ValueError(
            f"{path} is damaged: the checksum of {broken} in it is not that of its content; take another copy or an "
            "earlier checkpoint"
        )
    try:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # any error is possible in a file of another kind
        raise ValueError(f"{path} is no {what}: {type(error).__name__} while reading it{end}") from error


def check_content(path: Path, content: Any, parts: Any, what: str) -> None:
    """Check that the content of a file has its parts.

    Args:
        path: The file, for the error.
        content: Content of the file.
        parts: Parts that it must have, see :func:`~qif_plugins.support.files.check_parts`.
        what: Name of such a file, for the error.

    Raises:
        ValueError: A part is missing or has another type.
    """
    try:
        check_parts(content, parts)
    except ValueError as error:
        raise ValueError(f"{path} is no complete {what}: {error}; take another copy or an earlier checkpoint") from None


def check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Check that the tensors of a saved model hold finite numbers.

    Raises:
        ValueError: A tensor does not, or is not an ordinary tensor of numbers; the message names it.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise ValueError(f"{path} holds {name} as a tensor without plain numbers; take another copy")
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise ValueError(
                f"{path} holds weights that are not finite: {name} is NaN or infinite in {wrong} of its "
                f"{tensor.numel()} values; take an earlier checkpoint"
            )


def load_weights(model: nn.Module, saved: Mapping[str, Any], source: str = "the saved state") -> None:
    """Load a saved state into a model, ``strict`` as PyTorch does it.

    Args:
        model: The model, unchanged if the state is not its own.
        saved: Result of ``state_dict``.
        source: Origin of the state, for the error.

    Raises:
        ValueError: The state is another model's: a tensor is missing, too many, or of another shape or kind.
    """
    problem = ""
    for name, parameter in model.named_parameters():
        other = saved.get(name)
        if isinstance(other, Tensor) and other.is_floating_point() != parameter.is_floating_point():
            problem = f"{name} is {other.dtype} in it and {parameter.dtype} here"
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        if not problem:
            model.load_state_dict(saved)
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        problem = one_line(error)
        # PyTorch has copied the tensors that fit.
        model.load_state_dict(before, strict=False)
    if problem:
        raise ValueError(f"{source} is another model's: {problem[:400]}")


@contextmanager
def _checksums() -> Iterator[None]:
    """Let :func:`torch.save` write checksums, which a program may have turned off (PyTorch 2.6 and later)."""
    serialization: Any = torch.serialization
    if not hasattr(serialization, "get_crc32_options") or serialization.get_crc32_options():
        yield
        return
    serialization.set_crc32_options(True)
    try:
        yield
    finally:
        serialization.set_crc32_options(False)
