"""The tasks by name: built in, registered in this process, or from installed packages.

Importing this package imports no task, so that the command line can list their names quickly.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from pix2seq.errors import InputError, unknown_name

if TYPE_CHECKING:
    from pix2seq.tasks.task import Task

ENTRY_POINTS = "pix2seq.tasks"  # the group in which packages name their tasks
BUILT_IN = {
    "detection": "pix2seq.tasks.detection:Detection",
    "segmentation": "pix2seq.tasks.segmentation:Segmentation",
    "keypoint": "pix2seq.tasks.keypoint:Keypoint",
    "captioning": "pix2seq.tasks.captioning:Captioning",
    "prompted": "pix2seq.tasks.prompted:Prompted",
    "by_example": "pix2seq.tasks.by_example:ByExample",
    "by_words": "pix2seq.tasks.by_words:ByWords",
    "matching": "pix2seq.tasks.matching:Matching",
}
DEFAULT_TASK = next(iter(BUILT_IN))
AnyTask = TypeVar("AnyTask", bound="Task[Any]")

_registered: dict[str, type[Task[Any]]] = {}


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks. Those of other packages come from their metadata, without an import."""
    return tuple(dict.fromkeys([*BUILT_IN, *_registered, *sorted(_installed())]))


def loaded_task_names() -> tuple[str, ...]:
    """Return the names of tasks that are known without importing other packages."""
    return (*BUILT_IN, *_registered)


def get_task(name: str) -> type[Task[Any]]:
    """Return the class of a task. Raises `InputError` for an unknown name and for a package that fails to import."""
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: type[Task[Any]] = getattr(importlib.import_module(module), attribute)
        return found
    if name not in _installed():
        raise unknown_name("task", name, task_names())
    point = _installed()[name]
    try:
        task = point.load()
    except Exception as error:
        package = point.dist.name if point.dist is not None else point.value
        raise InputError(
            f"task {name!r} of package {package} cannot be imported ({type(error).__name__}: {error}); "
            "repair or uninstall that package"
        ) from error
    if getattr(task, "name", None) != name:
        raise InputError(f"the entry point {name!r} gives {task!r}, expected a Task with name = {name!r}")
    return register_task(task)


def register_task(task: type[AnyTask]) -> type[AnyTask]:
    """Make a task available under its name in this process, and return it; also a class decorator.

    Raises `ValueError` for a class that is no task, or has the name of another one.
    """
    from pix2seq.tasks.task import Task, TaskConfig

    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"expected a subclass of Task, got {task!r}")
    name, config_type = getattr(task, "name", None), getattr(task, "config_type", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{task.__name__}.name is {name!r}; expected a word of letters, digits and underscores")
    if not (isinstance(config_type, type) and issubclass(config_type, TaskConfig)):
        raise ValueError(f"{task.__name__}.config_type is {config_type!r}; expected a subclass of TaskConfig")
    if name in BUILT_IN or _registered.get(name, task) is not task:
        raise ValueError(f"there is a task {name!r} already; give {task.__name__} another name")
    _registered[name] = task
    return task


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in BUILT_IN}
