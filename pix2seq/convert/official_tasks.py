"""Convert official task sections to task settings, so that a converted checkpoint predicts as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pix2seq.convert.coco_classes import coco_categories
from pix2seq.convert.official_config import official_tasks
from pix2seq.convert.presets import TASKS as PUBLISHED
from pix2seq.errors import InputError
from pix2seq.model.config import ModelConfig
from pix2seq.tasks.task import numbered_categories
from pix2seq.tokenizers.instance import PROMPT_LENGTH
from pix2seq.types import Category
from pix2seq.vocab import Vocab

SAMPLING = ("temperature", "top_k", "top_p")
# Official names of tasks and settings to ours.
NAMES = {
    "object_detection": ("detection", {}),
    "instance_segmentation": (
        "segmentation",
        {
            "max_points_per_object": "max_points",
            "ensemble_num_samples": "num_samples",
            "ensemble_threshold": "threshold",
            "min_bbox_score": "min_box_score",
        },
    ),
    "keypoint_detection": (
        "keypoint",
        {
            "crop_to_bbox": "crop",
            "crop_to_bbox_pad_scale": "crop_padding",
            "points_score_weight": "score_weight",
            "eval_suppress_invisible_token": "suppress_invisible",
            "min_bbox_score": "min_box_score",
        },
    ),
    "captioning": ("captioning", {"max_seq_len": "max_tokens"}),
}


def task_settings(official: Mapping[str, Any], config: ModelConfig, *, captions: bool) -> dict[str, dict[str, Any]]:
    """Return the settings of each task that the model was trained for, by our names.

    A config without task sections gets the published settings: of all four tasks if its vocabulary has
    text, else of detection. Captioning is left out if `captions` is false.
    """
    sections = {str(task.get("name")): task for task in official_tasks(official)}
    if not sections:
        sections = dict(PUBLISHED) if config.vocab.num_text else {"object_detection": PUBLISHED["object_detection"]}
    room = config.decoder.max_seq_len
    settings: dict[str, dict[str, Any]] = {}
    for theirs, (ours, names) in NAMES.items():
        if theirs not in sections or (ours == "captioning" and not captions):
            continue
        section = {**PUBLISHED[theirs], **sections[theirs]}
        for key in PUBLISHED[theirs]:
            if not isinstance(section[key], int | float):
                raise InputError(f"config has {theirs}.{key}={section[key]!r}; expected a number or true or false")
        values = {key: section[key] for key in SAMPLING if key in section}
        values |= {name: section[key] for key, name in names.items() if isinstance(section.get(key), int | float)}
        if ours == "detection":
            # The official decoder never stops early, so it predicts as many objects as fit.
            num_objects = min(section["max_instances_per_image_test"], (room - 2) // 5)
            values |= {"max_objects": num_objects, "num_objects": num_objects}
        elif ours == "segmentation":
            values["max_points"] = min(values["max_points"], (room - PROMPT_LENGTH) // 2)
        elif ours == "captioning":
            values["max_tokens"] = min(values["max_tokens"], room - 1)
        settings[ours] = values
    return settings


def categories_of(official: Mapping[str, Any], vocab: Vocab, *, keypoints: bool) -> tuple[Category, ...]:
    """Return COCO's classes if the config names COCO as its data set and the vocabulary has room for them.

    Otherwise classes are numbered; with `keypoints`, label 1 is the person, as in the official code.
    """
    dataset = official.get("dataset")
    name = dataset.get("name", "") if isinstance(dataset, Mapping) else ""
    named = coco_categories()
    if str(name).startswith("coco/") and vocab.max_label >= max(category.label for category in named):
        return named
    if not keypoints:
        return ()
    person = next(category for category in named if category.keypoints)
    return tuple(
        replace(category, keypoints=person.keypoints, skeleton=person.skeleton) if category.label == 1 else category
        for category in numbered_categories(vocab)
    )
