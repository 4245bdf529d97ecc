"""Write files completely or not at all, lock folders for one run at a time, and check the content of files."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_KINDS = {
    dict: "a table", list: "a list", tuple: "a list", str: "text", bool: "true or false", int: "a whole number",
    float: "a number", type(None): "nothing",
}  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, with its suffix, that replaces it if the block succeeds.

    Args:
        path: The file to create or replace; its folder is created if necessary.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; the earlier file is unchanged.
    """
    try:
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
    except OSError as error:
        raise _cannot(error, f"cannot write {path}") from error


@contextmanager
def occupied(folder: Path, name: str = "") -> Iterator[None]:
    """Lock a folder, created if necessary, so that only this run writes to it while the block runs.

    The operating system holds the lock, on a file ``.qif-lock`` in the folder, until the process ends, even by a kill.
    Temporary files of an earlier run that was killed are removed. Folders that were created and stayed empty are
    removed at the end.

    Args:
        folder: The folder.
        name: Name of a file in the folder, to lock only that file. Default: the whole folder.

    Raises:
        ValueError: Another run writes there.
        OSError: The folder cannot be made or written to, or ``name`` is a folder.
    """
    if name and (folder / name).is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {folder / name}: it is a folder; name a file")
    made = _make(folder)
    path, owner = folder / f".{f'{name}.' if name else ''}qif-lock", os.getpid()
    try:
        handle = _locked(path, folder / name)
        try:
            _remove_rests(folder, name)
            yield
        finally:
            if os.getpid() == owner:  # and not a process that was forked inside the block
                _release(path, handle)
    finally:
        for place in made:
            with suppress(OSError):  # something is in it
                place.rmdir()


def check_target(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Raises:
        OSError: ``path`` is a folder, or its folder cannot be made or written to.
    """
    with occupied(path.parent, path.name):
        pass


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON.

    Raises:
        ValueError: A number that is not finite, which JSON does not have; see :func:`finite`.
    """
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, what: str, parts: Any, way_out: str = "move it away") -> Any:
    """Read and check a JSON file.

    Args:
        path: The file.
        what: Description of a wrong file, for the error: ``"no file of qif bench"``.
        parts: Parts that the file must have, see :func:`check_parts`.
        way_out: Remedy, for the error. Default ``"move it away"``.

    Raises:
        ValueError: The file is another one.
        OSError: The file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_parts(content, parts)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is {what}, or a damaged one: {error}; {way_out}") from error
    return content


def check_parts(value: Any, kind: Any, name: str = "") -> None:
    """Check the types and parts of a value read from a file.

    Args:
        value: The value.
        kind: A type, or a tuple of allowed types (``float`` allows whole numbers; only ``bool`` allows true and
            false); ``{"key": kind, ...}`` for a dictionary with at least these entries, ``{str: kind}`` for one with
            any names, ``[kind]`` for a list; ``object`` for anything.
        name: Name of the value, for the error.

    Raises:
        ValueError: A part is missing or has another type; the message names it.
    """
    if isinstance(kind, dict):
        _check_kind(value, (dict,), name)
        for key, part in kind.items():
            if key is str:
                for own, entry in value.items():
                    _check_kind(own, (str,), f"a name in {name or 'the file'}")
                    check_parts(entry, part, f"{name}.{own}".lstrip("."))
                continue
            where = f"{name}.{key}".lstrip(".")
            if key not in value:
                raise ValueError(f"it lacks {where}")
            check_parts(value[key], part, where)
    elif isinstance(kind, list):
        _check_kind(value, (list, tuple), name)
        for number, entry in enumerate(value):
            check_parts(entry, kind[0], f"{name}[{number}]")
    else:
        _check_kind(value, kind if isinstance(kind, tuple) else (kind,), name)


def finite(content: Any) -> Any:
    """Replace every number that is not finite by ``None``."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _check_kind(value: Any, kinds: tuple[type, ...], name: str) -> None:
    if object in kinds or (bool in kinds and isinstance(value, bool)):
        return
    if isinstance(value, (*kinds, int) if float in kinds else kinds) and not isinstance(value, bool):
        return
    wanted = " or ".join(dict.fromkeys(_named(kind) for kind in kinds))
    raise ValueError(f"{name or 'its content'} must be {wanted}, and is {_named(type(value))}")


def _named(kind: type) -> str:
    return _KINDS.get(kind, f"a {kind.__name__}")


def _cannot(error: OSError, what: str) -> OSError:
    """Make a one-line error that also says what was attempted."""
    text = f"{what}: {error.strerror or error}"
    return OSError(text) if error.errno is None else OSError(error.errno, text)


# -- folders -----------------------------------------------------------------------------------------------------------


def _make(folder: Path) -> list[Path]:
    """Create a folder, and return the folders that were created, the innermost first."""
    made: list[Path] = []
    try:
        place = folder
        while not place.exists():
            made.append(place)
            place = place.parent
        for place in reversed(made):
            place.mkdir(exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file")
    except OSError as error:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise _cannot(error, f"cannot write into {folder}") from error
    return made


_handles: set[int] = set()
"""Handles of the locks held. Forked processes, such as data loaders, must not keep them after this process ends."""


def _locked(path: Path, what: Path) -> int:
    """Lock a file, created if necessary, and return its handle."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _cannot(error, f"cannot write into {path.parent}") from error
        _handles.add(handle)
        if not _taken(handle):
            by = ""
            with suppress(OSError):
                by = os.read(handle, 200).decode(errors="replace").strip()
            _close(handle)
            raise ValueError(
                f"another run ({by or 'its process is not known'}) writes to {what}; wait until it has ended, or pass "
                "another --out"
            )
        # Whoever held it before may have removed it in between.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            with suppress(OSError):  # the content only tells people who holds the lock
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        _close(handle)


def _taken(handle: int) -> bool:
    """Lock an open file without waiting; returns False if another process holds the lock."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # On a file system without locks nobody can hold one.
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def _release(path: Path, handle: int) -> None:
    if sys.platform == "win32":  # which removes no open file
        _close(handle)
        with suppress(OSError):
            path.unlink()
    else:  # removed while locked, so that no other run locks a file that is about to go
        with suppress(OSError):
            path.unlink(missing_ok=True)
        _close(handle)


def _close(handle: int) -> None:
    _handles.discard(handle)
    os.close(handle)


def _close_all() -> None:
    for handle in list(_handles):
        with suppress(OSError):
            _close(handle)


_at_fork: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _at_fork is not None:
    _at_fork(after_in_child=_close_all)


def _remove_rests(folder: Path, name: str) -> None:
    """Remove the temporary files of :func:`replacing` in a process that was killed, and nothing else."""
    rest = re.compile(rf"\.{re.escape(name) if name else '.+'}\.qif-[0-9a-f]{{16}}\.tmp(\.[^.]+)?")
    for other in folder.glob(".*.qif-*"):
        if rest.fullmatch(other.name):
            other.unlink(missing_ok=True)
