"""A recipe's settings: frozen dataclasses, filled by YAML, then by `key=value`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.loader import WORKER_TIMEOUT
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError, unknown_name
from pix2seq.model.config import ModelConfig
from pix2seq.tasks import DEFAULT_TASK, get_task, loaded_task_names, task_names
from pix2seq.tasks.task import TaskConfig
from pix2seq.training.optimizer import OPTIMIZERS, ScheduleConfig

PARALLEL = ("ddp", "fsdp")
FREEZABLE = ("encoder",)
COUNTS = (
    "steps",
    "batch_size",
    "accumulate",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "max_skipped",
    "eval_batch_size",
)  # settings that must be at least 1


class Source(NamedTuple):
    """Where a split is."""

    location: str  # data folder, or folder or address of shards
    split: str
    annotations: str | None  # COCO file, if the rules for names must not choose


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; saved beside its checkpoints and enough to repeat it.

    `load_config` gives it a field of its own for each task, with that task's settings: `detection.top_p=0.4`.
    """

    data: Any = None  # data folder, folder or http address of shards, or a mapping of task names to these
    val_data: Any = None  # folder of the validation split, or a mapping; none given: data
    annotations: Any = None  # COCO file of the training split where several could be, or a mapping of tasks to these
    val_annotations: Any = None  # the same for the validation split
    val_fraction: float = 0.1  # share of the training images, drawn by seed, that validate where there is no val_split
    share_images: bool = False  # an image teaches all tasks of its folder that do not crop; else each draws its own
    shard_mix: int = 4  # shards that each worker holds in memory and draws from
    out: str = "runs/train"  # folder of checkpoints and logs
    tasks: tuple[str, ...] = (DEFAULT_TASK,)
    train_split: str = "train"
    val_split: str = "val"
    steps: int = 10_000  # optimiser steps
    batch_size: int = 32  # images a step
    accumulate: int = 1  # micro-batches a step; must divide batch_size
    lr: float = 1e-4  # peak, reached after warm-up
    seed: int = 0
    checkpoint_every: int = 1000  # steps; the last step is always saved
    keep_checkpoints: int = 3  # newest kept, and the best besides
    best_metric: str | None = (
        None  # metric of metrics.json that chooses the best checkpoint; None: the first task's main metric
    )
    eval_every: int = 0  # steps; 0 evaluates only after the last
    eval_images: int = 0  # of the validation split; 0 takes all
    eval_batch_size: int = 16
    log_every: int = 20  # steps
    trackers: tuple[str, ...] = ("tensorboard",)  # beside log.jsonl: tensorboard, wandb, trackio
    max_skipped: int = 10  # steps in a row without a finite loss and gradient, after which the run stops
    num_workers: int = 1  # processes that prepare samples; 0 prepares them between steps
    max_bad_share: float = MAX_BAD_SHARE  # of images, objects or captions; the run stops if more are unusable
    worker_timeout: float = WORKER_TIMEOUT  # seconds without a batch from the workers after which the run stops
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_processes: int = 0  # number of processes that torchrun must have started; 0: any number
    parallel: str = "ddp"  # ddp, or fsdp, which shards weights and optimiser state over processes
    bf16: bool = True  # bf16 autocast
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    cuda_graphs: bool = False  # record a step once per padded length and replay it; for one GPU, adamw and bf16
    compile: bool = False  # torch.compile the blocks: takes minutes at first; no gain was measured on two CPU cores
    optimizer: str = "adamw"  # adamw, or muon: Muon for linear layers and AdamW for the rest, at the same lr
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0  # 0 does not clip
    label_smoothing: float = 0.0  # share of every target that is spread over the vocabulary
    ema_decay: float = 0.999  # 0 evaluates and saves the raw weights
    init: str | None = None  # checkpoint to start from
    freeze: str | None = None  # encoder: it keeps its weights; None: everything is trained
    features: str | None = None  # folder that `pix2seq data features` wrote; replaces images and the encoder's forward
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.parallel not in PARALLEL:
            raise unknown_name("parallel", self.parallel, PARALLEL)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.freeze is not None and self.freeze not in FREEZABLE:
            raise unknown_name("part of the model to freeze", self.freeze, FREEZABLE)
        if self.features is not None and self.share_images:
            raise ValueError("features cannot be combined with share_images=true; set share_images=false")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for task in self.tasks:
            if self.batch_size_of(task) % self.accumulate:
                raise ValueError(
                    f"the batch size of {task}, {self.batch_size_of(task)}, does not divide into "
                    f"accumulate={self.accumulate} parts"
                )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.shard_mix < 1:
            raise ValueError(f"shard_mix must be at least 1, got {self.shard_mix}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must lie in [0, 1], got {self.max_bad_share}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {self.val_fraction}")
        if not self.worker_timeout > 0:
            raise ValueError(f"worker_timeout must be positive, got {self.worker_timeout}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    @property
    def freezes_encoder(self) -> bool:
        """Whether the encoder keeps its weights, which stored features imply."""
        return self.freeze == "encoder" or self.features is not None

    def task(self, name: str) -> TaskConfig:
        """Return the settings of a task."""
        settings = getattr(self, name)
        assert isinstance(settings, TaskConfig)
        return settings

    def batch_size_of(self, task: str) -> int:
        """Return the images of a task per step."""
        return self.task(task).batch_size or self.batch_size

    def data_of(self, task: str) -> str:
        """Return the data folder or address of a task. Raises `InputError` if none was given."""
        folder = _of_task(self.data, task)
        if not folder:
            raise InputError(
                f"no data was given for {task}; add data=FOLDER, or data.{task}=FOLDER where tasks differ, with a "
                "COCO, Pascal VOC or YOLO data set"
            )
        return str(folder)

    def train_source(self, task: str) -> Source:
        """Return where a task's training split is."""
        return Source(self.data_of(task), self.train_split, _of_task(self.annotations, task))

    def val_source(self, task: str) -> Source:
        """Return where a task's validation split is."""
        folder = str(_of_task(self.val_data, task) or self.data_of(task))
        return Source(folder, self.val_split, _of_task(self.val_annotations, task))


def _of_task(setting: Any, task: str) -> Any:
    return setting.get(task) if isinstance(setting, Mapping) else setting


def load_config(path: str | Path | None, overrides: Sequence[str] = (), **fixed: Any) -> TrainConfig:
    """Merge defaults, the YAML file, `key=value` strings and `fixed` values; later ones win.

    Raises `InputError` for an unreadable file, for a key that does not exist (naming the nearest one)
    and for a value of the wrong type or range.
    """
    sources: list[dict[str, Any]] = []
    if path is not None:
        sources.append(read_yaml(path))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise InputError(f"setting {override!r} is not of the form key=value")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"the value of setting {override!r} cannot be read as YAML; quote it") from None
        sources.append(_nested(key, _number(parsed)))
    sources.append(fixed)
    schema = _schema(sources)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *sources))
    except ConfigKeyError as error:
        raise _unknown_key(str(error.full_key or error.key), schema) from None
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        key = f" ({error.full_key})" if getattr(error, "full_key", None) else ""
        raise InputError(f"setting cannot be used: {first_line}{key}") from None
    except ValueError as error:
        raise InputError(f"setting cannot be used: {error}") from None
    assert isinstance(config, TrainConfig)
    return config


def _schema(sources: Sequence[Mapping[str, Any]]) -> type[TrainConfig]:
    """`TrainConfig` with a field for each task that is built in, registered, trained or set; others stay unimported."""
    trained = next((source["tasks"] for source in reversed(sources) if source.get("tasks")), [DEFAULT_TASK])
    trained = [trained] if isinstance(trained, str) else list(trained)
    own = {entry.name for entry in dataclasses.fields(TrainConfig)}
    keys = [key for source in sources for key in source if key not in own and key in task_names()]
    names = list(dict.fromkeys([*loaded_task_names(), *trained, *keys]))
    taken = sorted(own & set(names))
    if taken:
        raise InputError(f"a task cannot be called {taken[0]!r}, which is a setting of every run; rename the task")
    return _with_fields(tuple((name, get_task(name).config_type) for name in names))


@cache
def _with_fields(kinds: tuple[tuple[str, type[TaskConfig]], ...]) -> type[TrainConfig]:
    fields: list[Any] = [(name, kind, field(default_factory=kind)) for name, kind in kinds]
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True)


def config_file(name: str) -> Path:
    """Return the path of a config file of the package."""
    return Path(str(resources.files("pix2seq.configs").joinpath(name)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping of a YAML file. Raises `InputError` if there is none."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist; see the folder configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config {path} holds a {type(content).__name__}, expected key: value lines")
    return {key: _number(value) for key, value in content.items()}


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved settings as YAML, for `load_config`."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), encoding="utf-8")


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Turn `a.b.c` and a value into nested mappings."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _number(value: Any) -> Any:
    """Convert numbers such as 1e-4, which YAML 1.1 reads as strings."""
    if isinstance(value, dict):
        return {key: _number(entry) for key, entry in value.items()}
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "0123456789.+-" else value
        except ValueError:
            return value
    return value


def _unknown_key(key: str, schema: type[TrainConfig]) -> InputError:
    known = _known_keys(schema)
    last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}  # of equal last parts, the first name
    if key in last:  # top_p for detection.top_p
        near = [last[key]]
    else:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        near = [last[match] for match in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    hint = f"did you mean {near[0]!r}?" if near else "see pix2seq/training/config.py for all settings"
    return InputError(f"unknown setting {key!r}; {hint}")


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for entry in dataclasses.fields(schema):
        keys.append(prefix + entry.name)
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if dataclasses.is_dataclass(default):
            keys += _known_keys(default, f"{prefix}{entry.name}.")
    return keys
