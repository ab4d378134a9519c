"""One run a folder: two that write the same checkpoints and log would leave neither."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pix2seq.errors import InputError
from pix2seq.files import output_folder, writing

LOCK_FILE = ".lock"
PID_FILE = ".lock.pid"  # where the file system has no locks
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

_held: set[int] = set()  # descriptors of locks that this process has


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold OUT/.lock, making the folder. Raises `InputError` naming process and host if another run has it.

    The kernel lets go when the process ends, however it ends; the file stays and means nothing.
    """
    output_folder(out)
    descriptor = _lock(out)
    if descriptor is None:
        with _pid_file(out):
            yield
        return
    try:
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(out: Path) -> int | None:
    """An open, locked file; None where the system or the disk cannot lock."""
    if sys.platform == "win32":
        return None
    import fcntl

    with writing(out, "locking the folder"):
        descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 1000, 0)
        os.close(descriptor)
        if error.errno in UNSUPPORTED:
            return None
        raise _in_use(out, *_owner(owner)) from None
    with suppress(OSError):  # a full disk: the lock holds, only its owner's name is missing
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _name().encode(), 0)
    _held.add(descriptor)
    return descriptor


@contextmanager
def _pid_file(out: Path) -> Iterator[None]:
    """The next best: a file that names its owner, and is stale when that process is gone from this host."""
    path = out / PID_FILE
    with suppress(FileNotFoundError):
        pid, host = _owner(path.read_bytes())
        if host != socket.gethostname() or _is_running(pid):
            raise _in_use(out, pid, host, hint=f" (if that is no longer so, remove {path})")
        path.unlink()
    with writing(out, "locking the folder"):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise _in_use(out, 0, "", hint="") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_name())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _name() -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n"


def _owner(content: bytes) -> tuple[int, str]:
    """Process id and host in a lock file; 0 and nothing where it was not written."""
    try:
        owner = json.loads(content)
        return int(owner["pid"]), str(owner["host"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _in_use(out: Path, pid: int, host: str, *, hint: str = "") -> InputError:
    who = f"process {pid} on {host}" if pid else "another process"
    return InputError(f"{out} is in use by {who}{hint}; wait until it ends, stop it, or give another out=FOLDER")


def _is_running(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _close_in_child() -> None:
    # A forked loader worker shares the lock; if it held on, it would keep a killed run's folder locked.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
