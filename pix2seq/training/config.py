"""A recipe's settings: frozen dataclasses, filled by YAML, then by `key=value`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from pix2seq.data.defects import MAX_BAD_SHARE
from pix2seq.data.loader import WORKER_TIMEOUT
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.model.config import ModelConfig
from pix2seq.settings import (
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Settings,
    Share,
    ShareBelowOne,
)
from pix2seq.tasks import DEFAULT_TASK, get_task, loaded_task_names, task_names
from pix2seq.tasks.task import TaskConfig
from pix2seq.training.contrast import ContrastTraining
from pix2seq.training.optimizer import OptimizerName, ScheduleConfig
from pix2seq.training.reward import RewardConfig
from pix2seq.training.yaml_file import parse_yaml, read_yaml

SETTINGS_FILE = "config.yaml"  # in the folder of a run


class Source(NamedTuple):
    """Where a split is."""

    location: str  # data folder, or folder or address of shards
    split: str
    annotations: str | None  # COCO file, if the rules for names must not choose


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that a run depends on; saved beside its checkpoints and enough to repeat it.

    `load_config` gives it a field of its own for each task, with that task's settings: `detection.top_p=0.4`.
    """

    data: Any = None  # data folder, folder or http address of shards, or a mapping of task names to these
    val_data: Any = None  # folder of the validation split, or a mapping; none given: data
    annotations: Any = None  # COCO file of the training split where several could be, or a mapping of tasks to these
    val_annotations: Any = None  # the same for the validation split
    # Share of the training images, drawn by seed, that validate where there is no val_split.
    val_fraction: ShareBelowOne = 0.1
    share_images: bool = False  # an image teaches all tasks of its folder that do not crop; else each draws its own
    shard_mix: Annotated[int, Range(least=1, most=1000)] = 4  # shards that each worker holds in memory and draws from
    out: str = "runs/train"  # folder of checkpoints and logs
    tasks: tuple[str, ...] = (DEFAULT_TASK,)
    train_split: str = "train"
    val_split: str = "val"
    steps: PositiveInt = 10_000  # optimiser steps
    batch_size: BatchSize = 32  # images a step
    accumulate: BatchSize = 1  # micro-batches a step; must divide batch_size
    lr: Annotated[float, Range(above=0, most=1000)] = 1e-4  # peak, reached after warm-up
    seed: Annotated[int, Range(least=0, most=2**63 - 1)] = 0
    checkpoint_every: PositiveInt = 1000  # steps; the last step is always saved
    keep_checkpoints: PositiveInt = 3  # newest kept, and the best besides
    # Metric of metrics.json that chooses the best checkpoint; None: the first task's main metric.
    best_metric: str | None = None
    eval_every: NonNegativeInt = 0  # steps; 0 evaluates only after the last
    eval_images: NonNegativeInt = 0  # of the validation split; 0 takes all
    eval_batch_size: BatchSize = 16
    log_every: PositiveInt = 20  # steps
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)  # beside log.jsonl
    # likelihood of the annotated sequences, or reward of sampled ones: for a model that was trained by likelihood.
    objective: Literal["likelihood", "reward"] = "likelihood"
    max_skipped: PositiveInt = 10  # steps in a row without a finite loss and gradient, after which the run stops
    # Processes that prepare samples; 0 prepares them between steps.
    num_workers: Annotated[int, Range(least=0, most=256)] = 1
    max_bad_share: Share = MAX_BAD_SHARE  # of images, objects or captions; the run stops if more are unusable
    # Seconds without a batch from the workers after which the run stops.
    worker_timeout: Annotated[float, Range(above=0, most=1e6)] = WORKER_TIMEOUT
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_processes: NonNegativeInt = 0  # number of processes that torchrun must have started; 0: any number
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards weights and optimiser state over processes
    bf16: bool = True  # bf16 autocast
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    cuda_graphs: bool = False  # record a step once per padded length and replay it; for one GPU, adamw and bf16
    compile: bool = False  # torch.compile the blocks: takes minutes at first; no gain was measured on two CPU cores
    optimizer: OptimizerName = "adamw"  # muon: Muon for linear layers and AdamW for the rest, at the same lr
    weight_decay: Annotated[float, Range(least=0, most=100)] = 0.05
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    max_grad_norm: NonNegativeFloat = 1.0  # 0 does not clip
    label_smoothing: ShareBelowOne = 0.0  # share of every target that is spread over the vocabulary
    ema_decay: ShareBelowOne = 0.999  # 0 evaluates and saves the raw weights
    init: str | None = None  # checkpoint to start from
    freeze: Literal["encoder"] | None = None  # encoder: it keeps its weights; None: everything is trained
    features: str | None = None  # folder that `pix2seq data features` wrote; replaces images and the encoder's forward
    reward: RewardConfig = field(default_factory=RewardConfig)
    contrast: ContrastTraining = field(default_factory=ContrastTraining)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < max(len(self.tasks), 1):
            raise ValueError(f"tasks={list(self.tasks)} must name at least one task, and none of them twice")
        if self.features is not None and self.share_images:
            raise ValueError("features cannot be combined with share_images=true; set share_images=false")
        if self.objective == "reward":
            if self.parallel == "fsdp":
                raise ValueError("objective=reward samples with full weights, so set parallel=ddp")
            if self.label_smoothing:
                raise ValueError("objective=reward has no use for label_smoothing; set it to 0")
        for task in self.tasks:
            if self.batch_size_of(task) % self.accumulate:
                raise ValueError(
                    f"the batch size of {task}, {self.batch_size_of(task)}, does not divide into "
                    f"accumulate={self.accumulate} parts"
                )

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
    sources = [] if path is None else [read_yaml(path)]
    origins = [*([] if path is None else [str(path)]), *overrides, ""]
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise InputError(f"setting {override!r} is not of the form key=value")
        try:
            parsed = parse_yaml(value)
        except ValueError:
            raise InputError(f"the value of setting {override[:200]!r} cannot be read as YAML; quote it") from None
        sources.append(_nested(key, parsed))
    sources.append(fixed)
    schema = _schema(sources)
    merged = OmegaConf.structured(schema)
    for source, origin in zip(sources, origins, strict=True):
        try:
            merged = OmegaConf.merge(merged, source)
        except ConfigKeyError as error:
            raise _unknown_key(str(error.full_key or error.key), schema) from None
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            for placeholder in (" '$VALUE' of type '$VALUE_TYPE'", " '$VALUE'"):  # of a part of a list
                reason = reason.replace(placeholder, "")
            raise InputError(f"setting cannot be used: {reason} ({error.full_key or origin})") from None
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"setting cannot be used: {str(error).splitlines()[0]}") from None
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


def config_yaml(config: TrainConfig) -> str:
    """Return the resolved settings as YAML, for `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Turn `a.b.c` and a value into nested mappings."""
    for part in reversed(key.split(".")):
        value = {part: value}
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
