"""Arrays that worker processes share with their parent instead of copying them."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FOLDERS: weakref.WeakKeyDictionary[SharedArrays, Path] = weakref.WeakKeyDictionary()


class SharedArrays:
    """Base of frozen dataclasses (`eq=False`) whose fields are arrays, and perhaps a few small values.

    A forked worker shares the parent's arrays anyway, as nothing writes to them and they hold no
    Python objects. For a worker that is spawned they are written to the temporary folder, once for
    all workers, and mapped from there; the files go with the object in the parent. Any other pickle
    and every copy holds the arrays themselves.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        values: dict[str, Any] = dict(vars(self))
        if get_spawning_popen() is None:
            return _rebuild, (type(self), values)
        folder = _FOLDERS.get(self)
        if folder is None:
            folder = _FOLDERS[self] = _write(values)
            weakref.finalize(self, _remove, folder, os.getpid())
        small = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
        return _map, (type(self), folder, [name for name in values if name not in small], small)


def _write(values: dict[str, Any]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pix2seq-"))
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value, allow_pickle=False)
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker has inherited this call, but not the folder
        shutil.rmtree(folder, ignore_errors=True)


def _rebuild(cls: type[Any], values: dict[str, Any]) -> Any:
    return cls(**values)


def _map(cls: type[Any], folder: Path, names: list[str], small: dict[str, Any]) -> Any:
    return cls(**{name: _load(folder / f"{name}.npy") for name in names}, **small)


def _load(path: Path) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # slices of a memmap take several times as long
