"""What a run learns from: the data of every task, and the classes and words that they share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pix2seq.data.annotations import find_samples
from pix2seq.data.check import find_bad_images, refuse_skipped, unseen_classes
from pix2seq.data.dataset import ClassMap, has_split, needed_categories, open_dataset, unite_categories
from pix2seq.data.features import FeatureStore, Variants, write_features
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.shards import ShardIndex, is_shards
from pix2seq.data.samples import SharedTrainingSet, TrainingSet, TrainingStream
from pix2seq.device import pick_device
from pix2seq.errors import InputError, shortened
from pix2seq.model.encoders.build import encoder_fingerprint
from pix2seq.model.pretrained import read_config
from pix2seq.tasks import get_task
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.text import TextTokenizer, has_text_tokenizer, load_text_tokenizer
from pix2seq.training.config import Source, TrainConfig
from pix2seq.training.initialize import initial_encoder, with_init_model
from pix2seq.types import Category
from pix2seq.vocab import TASK_IDS, Vocab

SEED_STRIDE = 1_000_003  # between the seeds of two tasks

Samples: TypeAlias = TrainingSet | SharedTrainingSet | TrainingStream


@dataclass(frozen=True)
class Recipe:
    """Tasks with their data, and the vocabulary they share."""

    samples: tuple[Samples, ...]  # each for one task, or for tasks that share images
    train_data: dict[str, Dataset | ShardIndex]  # training split by task
    val_data: dict[str, Dataset]  # validation split by task
    categories: tuple[Category, ...]
    text: TextTokenizer | None
    vocab: Vocab
    tasks: dict[str, Task[Any]]
    features: FeatureStore | None = None  # in place of the images of the training split
    notes: tuple[str, ...] = ()  # what the user should know before the first step

    @property
    def tells_sentences(self) -> bool:
        """Whether some sequences hold sentences to compare images with."""
        return any(task.tells_sentences for task in self.tasks.values())

    def evaluations(self) -> list[tuple[Dataset, list[str]]]:
        """Return the validation splits, each with all tasks that are scored on it."""
        datasets = {id(dataset): dataset for dataset in self.val_data.values()}.values()
        return [(dataset, [name for name, data in self.val_data.items() if data is dataset]) for dataset in datasets]


def prepare(config: TrainConfig, *, resumed: Path | None = None) -> Recipe:
    """Open the data of every task, and join their classes and words in one vocabulary.

    A run that is `resumed` keeps its words and the ids of its tasks.
    """
    if config.objective == "reward" and config.init is None:
        raise InputError("objective=reward tunes a model that was trained by likelihood; give init=CHECKPOINT")
    kinds = {name: get_task(name) for name in config.tasks}
    sources = {name: config.train_source(name) for name in config.tasks}
    val_sources = {name: config.val_source(name) for name in config.tasks}
    opened = {source: _open(config, source) for source in dict.fromkeys(sources.values())}
    features = _open_features(config, opened) if config.features is not None else None
    opened_val: dict[Source, Dataset] = {}
    notes = []
    for name, source in val_sources.items():
        train_source = sources[name]
        if source in opened_val:
            continue
        if _has_to_hold_out(source, train_source, opened[train_source]):
            opened[train_source], opened_val[source], note = _hold_out(config, opened[train_source])
            notes.append(note)
        else:
            opened_val[source] = _open_val(config, source)
    train_data = {name: opened[source] for name, source in sources.items()}
    val_data = {name: opened_val[source] for name, source in val_sources.items()}
    categories = unite_categories([dataset.categories for dataset in train_data.values()])
    vocab = config.model.vocab
    if resumed is not None:
        vocab = replace(vocab, other_tasks=read_config(resumed)[0].vocab.other_tasks)
    vocab, text = vocab.with_tasks(config.tasks), None
    readers = [name for name, kind in kinds.items() if kind.reads_text]
    if readers:
        text = _text_tokenizer(config, readers, train_data, resumed)
        vocab = vocab.with_text(text.size)

    tasks = {name: kind(config.task(name), vocab, categories, text) for name, kind in kinds.items()}
    tasks |= {
        name: task.with_data(_captions(train_data[name]), categories) for name, task in tasks.items() if task.reads_text
    }
    if config.model.contrast is not None and config.init is None and not any(t.tells_sentences for t in tasks.values()):
        raise InputError(
            f"model.contrast compares images with sentences, and {', '.join(tasks)} tells none; train a task that "
            "does, or leave model.contrast out"
        )
    for name, task in tasks.items():
        if task.max_seq_len > config.model.decoder.max_seq_len:
            raise InputError(
                f"{name} sequences of up to {task.max_seq_len} tokens do not fit model.decoder.max_seq_len="
                f"{config.model.decoder.max_seq_len}; raise it, or lower {task.length_setting}"
            )
        if task.looks_closer and not config.model.encoder.closeups:
            raise InputError(
                f"{name}.closeup=true needs model.encoder.closeups=true, and the encoder vit with a conv stem"
            )
        if task.num_references > config.model.memory.references:
            raise InputError(
                f"{name} reads up to {task.num_references} memories beside the first, but the model has places for "
                f"{config.model.memory.references}; set model.memory.references={task.num_references} or more"
            )
        if task.shows_companions and isinstance(train_data[name], ShardIndex):
            raise InputError(
                f"{name} reads other images of the data set beside each one, but {sources[name].location} holds "
                "shards, which are read in order; give data=FOLDER with the data set that they were written from"
            )
        if features is not None and task.looks_closer:
            raise InputError(
                f"{name} looks at finer maps, which features={config.features} do not hold; set {name}.closeup=false, "
                "or leave features out"
            )
        if features is not None and task.crop_padding is not None:
            raise InputError(
                f"{name} crops around objects, but features={config.features} are of whole images; turn cropping off "
                "(a setting of the task), or leave features out"
            )
        if features is not None and features.mirrored and not task.flips:
            raise InputError(
                f"{name} does not learn from mirrored images, but features={config.features} have some; write them "
                "again with augment.flip=0"
            )
        if not _num_images(train_data[name], task.learns_from):
            raise InputError(
                f"{sources[name].location} has no {task.learns_from} to learn from in split {config.train_split!r}"
            )
    samples: list[Samples] = []
    for names in _groups(config, tasks, train_data):
        name, dataset = names[0], train_data[names[0]]
        options: dict[str, Any] = {
            "size": config.model.image_size,
            "augment": config.augment,
            "seed": task_seed(config, vocab.task_id(name)) if len(names) == 1 else config.seed,
            "classes": ClassMap(dataset.categories, categories),
        }
        if isinstance(dataset, ShardIndex):
            samples.append(TrainingStream(dataset, tasks[name], mix=config.shard_mix, **options))
            continue
        options["max_bad_share"] = config.max_bad_share
        if len(names) == 1:
            samples.append(TrainingSet(dataset, tasks[name], features=features, **options))
        else:
            samples.append(SharedTrainingSet(dataset, [tasks[name] for name in names], **options))
    _warn_of_unflipped(samples)
    for name, dataset in val_data.items():
        if kinds[name].uses_classes:
            notes += _compare_classes(name, dataset, train_data[name], categories)
    if max(category.label for category in categories) > vocab.max_label:  # of tasks that do not use them
        categories = ()
    return Recipe(
        tuple(samples), train_data, val_data, categories, text, vocab, tasks, features, tuple(dict.fromkeys(notes))
    )


def _warn_of_unflipped(samples: Sequence[Samples]) -> None:
    """Name the classes that flipping would teach wrong."""
    for name in dict.fromkeys(name for each in samples for name in each.maker.unflipped.values()):
        print(
            f"warning: images with keypoints of {name!r} are not flipped, because the names of its points do not say "
            "which are left and right; give augment.flip_pairs=[[POINT,POINT],...], or [] if no two points swap",
            file=sys.stderr,
        )


def check_val_images(config: TrainConfig, recipe: Recipe) -> None:
    """Decode the images of all evaluations. Raises `InputError` with the first ten that cannot be used."""
    for dataset, _ in recipe.evaluations():
        images = dataset.images[: config.eval_images or len(dataset)]
        refusal = refuse_skipped(dataset, find_bad_images(images, name=f"checking {dataset.split}"))
        if refusal is not None:
            raise InputError(refusal)


def _has_to_hold_out(source: Source, train_source: Source, train_data: Dataset | ShardIndex) -> bool:
    """Return whether the validation split is one that nobody named and nobody made."""
    is_default = source == Source(train_source.location, TrainConfig.val_split, None)
    return is_default and isinstance(train_data, Dataset) and not has_split(source.location, source.split)


def _hold_out(config: TrainConfig, dataset: Dataset | ShardIndex) -> tuple[Dataset, Dataset, str]:
    """Split a data set in two by the run's seed, for training and validation, and say so."""
    assert isinstance(dataset, Dataset)
    total, root = len(dataset), dataset.root
    count = max(round(total * config.val_fraction), 1)
    if config.val_fraction == 0 or count >= total:
        raise InputError(
            f"{root} has no validation split, and val_fraction={config.val_fraction:g} of its {total} images leaves "
            "nothing for one; add a split, name val_data=FOLDER or val_split=NAME, or raise val_fraction"
        )
    chosen = np.zeros(total, np.bool_)
    chosen[np.random.default_rng((config.seed, total)).permutation(total)[:count]] = True
    note = (
        f"{root} has no validation split: {count} of the {total} training images are held out for it "
        f"(val_fraction={config.val_fraction:g}, seed={config.seed})"
    )
    held_out = dataset.select(config.val_split, np.flatnonzero(chosen))
    return dataset.select(dataset.split, np.flatnonzero(~chosen)), held_out, note


def _compare_classes(name: str, val: Dataset, train: Dataset | ShardIndex, categories: Sequence[Category]) -> list[str]:
    """Return a note on the classes that only validation has objects of.

    Raises `InputError` if the training split does not even name them.
    """
    shown = set(val.annotations.labels.tolist())
    unknown = unseen_classes([c.name for c in val.categories if c.label in shown], [c.name for c in categories])
    if unknown:
        raise InputError(
            f"split {val.split!r} of {val.root} has objects of classes that the training data of {name} does not have: "
            f"{', '.join(shortened(unknown, 10))}; add them to the training split, or take them out"
        )
    ClassMap(needed_categories(val, categories), categories)  # raises for keypoints that training does not have
    if isinstance(train, ShardIndex):
        return []
    learned = set(train.annotations.labels.tolist())
    seen = [c.name for c in train.categories if c.label in learned]
    unseen = unseen_classes([c.name for c in val.categories if c.label in shown], seen)
    some = ", ".join(shortened(unseen, 10))
    return [f"warning: split {val.split!r} has objects of classes that training has none of: {some}"] if unseen else []


def _open_features(config: TrainConfig, opened: Mapping[Source, Dataset | ShardIndex]) -> FeatureStore:
    """Open the stored features of the training split, and check that they are of its images."""
    if len(opened) > 1:
        raise InputError(
            f"features={config.features} are of one data folder, but the tasks have {len(opened)}; give all of them "
            "the same data=FOLDER, or leave features out"
        )
    ((source, dataset),) = opened.items()
    store = FeatureStore(Path(str(config.features)), config.train_split)
    store.check_images(_with_images(dataset, source.location).images, config.model.image_size)
    return store


def _with_images(dataset: Dataset | ShardIndex, location: str) -> Dataset:
    if isinstance(dataset, ShardIndex):
        raise InputError(
            f"{location} holds shards, but features belong to single images; give data=FOLDER with the COCO or "
            "Pascal VOC data set that the shards were written from"
        )
    return dataset


def store_features(config: TrainConfig, out: Path, *, augmentations: int = 1, **options: Any) -> FeatureStore:
    """Encode the training split with the encoder that a run with `config` starts from, for `features=OUT`.

    Augmentations are those of `config.augment`, at scales that all of its tasks allow. `options` are those of
    `write_features`.
    """
    config = with_init_model(config)
    source = config.train_source(config.tasks[0])
    dataset = _with_images(_open(config, source), source.location)
    settings = config.model
    device = pick_device(config.device)
    encoder = initial_encoder(config).to(device)
    fingerprint = encoder_fingerprint(encoder, settings.encoder, settings.positions)
    grid = encoder.grid(*settings.image_size)
    scales = [get_task(name).scale_range for name in config.tasks]
    variants = Variants(
        settings.image_size,
        config.augment,
        (max(low for low, _ in scales), min(high for _, high in scales)),
        augmentations,
        config.seed,
    )

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            features, found = encoder(images.to(device).float() / 255)
        if found != grid:
            raise InputError(
                f"{settings.encoder.name} has a grid of {found[0]}x{found[1]} features, expected {grid[0]}x{grid[1]}; "
                f"use sides of model.image_size that are multiples of {encoder.stride}"
            )
        return features.cpu()

    about = {"encoder": asdict(settings.encoder), "fingerprint": fingerprint, "grid": list(grid), "bf16": config.bf16}
    return write_features(
        dataset,
        out,
        encode,
        variants,
        encoder=about,
        batch_size=config.eval_batch_size,
        max_bad_share=config.max_bad_share,
        **options,
    )


def _groups(
    config: TrainConfig, tasks: Mapping[str, Task[Any]], data: Mapping[str, Dataset | ShardIndex]
) -> list[list[str]]:
    """Return which tasks draw images together: with `share_images`, those of one data set that do not crop.

    Raises `InputError` if one of them has another batch size than the run.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name, task in tasks.items():
        shares = config.share_images and task.crop_padding is None and not isinstance(data[name], ShardIndex)
        groups.setdefault((id(data[name]), "" if shares else name), []).append(name)
    for names in groups.values():
        for name in names if len(names) > 1 else ():
            if config.batch_size_of(name) != config.batch_size:
                raise InputError(
                    f"{name}.batch_size={config.batch_size_of(name)} differs from batch_size={config.batch_size}, but "
                    f"{', '.join(names)} share their images; leave it out, or set share_images=false"
                )
    return list(groups.values())


def _num_images(dataset: Dataset | ShardIndex, learns_from: str) -> int:
    if isinstance(dataset, ShardIndex):
        return dataset.num_with(learns_from)
    return len(find_samples(dataset.annotations, learns_from, each_object=False))


def _open(config: TrainConfig, source: Source) -> Dataset | ShardIndex:
    location, split, annotations = source
    if is_shards(location, split):
        return ShardIndex.read(location, split)
    dataset = open_dataset(location, split, annotations=annotations, max_bad_share=config.max_bad_share)
    if len(dataset.defects):
        print(
            f"warning: {len(dataset.defects)} annotations or images of split {split!r} have defects and "
            f"were dropped or repaired; see: pix2seq data check {dataset.root}",
            file=sys.stderr,
        )
    return dataset


def _open_val(config: TrainConfig, source: Source) -> Dataset:
    if is_shards(source.location, source.split) or is_shards(source.location, config.train_split):
        raise InputError(
            f"{source.location} holds shards, but evaluation reads single images; give val_data=FOLDER with a COCO, "
            "Pascal VOC or YOLO data set"
        )
    dataset = _open(config, source)
    assert not isinstance(dataset, ShardIndex)
    return dataset


def _text_tokenizer(
    config: TrainConfig, readers: Sequence[str], data: Mapping[str, Dataset | ShardIndex], resumed: Path | None
) -> TextTokenizer:
    """Return the tokenizer that the tasks `readers` share, made by the first of them of what all of them read.

    Captions are read by the tasks that learn from them, so no other model knows words that only captions have.
    """
    if resumed is not None and has_text_tokenizer(resumed):
        return load_text_tokenizer(resumed)
    captions: dict[str, Sequence[str]] = {}  # by the data set, which several tasks may share
    words: list[str] = []
    for name in readers:
        dataset = data[name]
        if isinstance(dataset, ShardIndex):
            where, attributes = dataset.location, dataset.attributes
        else:
            annotations = dataset.annotations
            where, attributes = str(dataset.root), annotations.attribute_kinds
        if get_task(name).learns_from == "caption":
            found = _captions(dataset)
            if not len(found):
                raise InputError(f"{where} has no caption to learn from in split {dataset.split!r}")
            captions[where] = found
        words += get_task(name).text_words(dataset.categories, attributes)
    texts = list(chain.from_iterable(captions.values()))
    return get_task(readers[0]).make_text_tokenizer(config.task(readers[0]), texts, words)


def _captions(dataset: Dataset | ShardIndex) -> Sequence[str]:
    return dataset.captions() if isinstance(dataset, ShardIndex) else dataset.annotations.all_captions()


def task_seed(config: TrainConfig, task_id: int) -> int:
    """Return a seed of its own for every task, the same alone and in a mix."""
    return config.seed + SEED_STRIDE * (task_id - min(TASK_IDS.values()))
