"""Files that are either complete or not there."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["finite", "remove_rests", "replacing", "write_json"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path`` and with its suffix, that takes its place if the block succeeds.

    Args:
        path: The file to create or replace; its folder is created if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.qif-{secrets.token_hex(8)}.tmp{path.suffix}")
    # The rights of an ordinary new file; tempfile's are private.
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove_rests(path: Path) -> None:
    """Remove what :func:`replacing` left beside ``path`` in a process that was killed, and nothing else."""
    rest = re.compile(rf"\.{re.escape(path.name)}\.qif-[0-9a-f]{{16}}\.tmp{re.escape(path.suffix)}")
    for other in path.parent.glob(".*"):
        if rest.fullmatch(other.name):
            other.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON.

    Raises:
        ValueError: A number that is not finite, which JSON does not have; see :func:`finite`.
    """
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(content: Any) -> Any:
    """``content`` with ``None`` for every number that is not finite."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
