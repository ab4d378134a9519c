"""A lock on the folder of a run, because two runs in one folder would ruin each other's checkpoints and log."""

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
from pix2seq.files import output_folder, report_write_errors

LOCK_FILE = ".lock"
PID_FILE = ".lock.pid"  # on file systems without locks
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

_held: set[int] = set()  # file descriptors of this process's locks


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Create the folder and hold OUT/.lock. Raises `InputError` naming process and host if another run holds it.

    The kernel releases the lock when the process ends in any way. The file stays, and means nothing by itself.
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
    """Return the descriptor of a locked file, or None if the system or the disk has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    with report_write_errors(out, "locking the folder"):
        descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 1000, 0)
        os.close(descriptor)
        if error.errno in UNSUPPORTED:
            return None
        raise _in_use(out, *_parse_owner(owner)) from None
    with suppress(OSError):  # on a full disk the lock still holds; only its owner is not written
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _this_process().encode(), 0)
    _held.add(descriptor)
    return descriptor


@contextmanager
def _pid_file(out: Path) -> Iterator[None]:
    """Hold a file that names its owner, as a fallback. It is stale once that process is gone from this host."""
    path = out / PID_FILE
    with suppress(FileNotFoundError):
        pid, host = _parse_owner(path.read_bytes())
        if host != socket.gethostname() or _is_running(pid):
            raise _in_use(out, pid, host, hint=f" (if that is no longer so, remove {path})")
        path.unlink()
    with report_write_errors(out, "locking the folder"):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise _in_use(out, 0, "") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_this_process())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _this_process() -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n"


def _parse_owner(content: bytes) -> tuple[int, str]:
    """Return process id and host from a lock file, or 0 and an empty string if they were not written."""
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
        return True  # it belongs to another user
    return True


def _close_in_child() -> None:
    # A forked loader worker shares the lock. If it kept it, it would keep a killed run's folder locked.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
