"""Settings: every field has a range, and a value outside it is one line that names it, before anything starts."""

import dataclasses
import math
import re
import types
import typing
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.data.transforms import AugmentConfig
from pix2seq.device import pick_device
from pix2seq.errors import InputError
from pix2seq.model.config import EncoderConfig
from pix2seq.settings import Range, Settings, Share, ShareBelowOne
from pix2seq.tasks import BUILT_IN
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.training.config import load_config
from pix2seq.types import Category
from pix2seq.vocab import Vocab

# Texts that no list of choices can hold: paths, names of splits, timm models, metrics and devices.
FREE_TEXTS = {
    "data", "val_data", "annotations", "val_annotations", "out",
    "tasks", "train_split", "val_split", "best_metric", "device", "init", "features",
    "model.encoder.name", "captioning.tokenizer", "matching.tokenizer", "augment.flip_pairs", "prompted.answers",
}  # fmt: skip
ALL_TASKS = {"tasks": list(BUILT_IN)}


def leaves(settings, prefix=""):
    """Name, class and type of every field below `settings`, those of nested settings too."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name) or optional(hints[field.name])
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, type(settings), hints[field.name]


def optional(hint):
    """The settings, at their defaults, that a field may hold in place of None."""
    return next((part() for part in get_args(hint) if isinstance(part, type) and issubclass(part, Settings)), None)


def parts(hint, wrap=lambda value: value):
    """The types of single values within a type, each with a function that puts a value back into its place."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for part in arguments:
            if part is not type(None):
                yield from parts(part, wrap)
    elif origin is tuple and arguments[-1] is not ...:
        yield from parts(arguments[0], lambda value: wrap((value, 1)))
        yield from parts(arguments[1], lambda value: wrap((0.5 if arguments[0] is ShareBelowOne else 1, value)))
    elif origin is tuple:
        yield from parts(arguments[0], lambda value: wrap((value,)))
    elif origin is dict:
        yield from parts(arguments[1], lambda value: wrap({"name": value}))
    else:
        yield hint, wrap


FIELDS = [
    (name, owner, hint, wrap)
    for name, owner, field in leaves(load_config(None, **ALL_TASKS))
    for hint, wrap in parts(field)
]
NUMBERS = [entry for entry in FIELDS if get_origin(entry[2]) is Annotated]


def refusal(name, value):
    """The line that refuses a setting."""
    *sections, last = name.split(".")
    setting = {last: value}
    for section in reversed(sections):
        setting = {section: setting}
    with pytest.raises(InputError) as caught:
        load_config(None, **ALL_TASKS | setting)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_says_what_it_accepts():
    assert len(NUMBERS) > 70
    for name, _, hint, _ in FIELDS:
        if hint is bool or get_origin(hint) is Literal or name in FREE_TEXTS:
            continue
        assert get_origin(hint) is Annotated, f"{name} has no range"
        kind, limits = get_args(hint)
        assert kind in (int, float), name
        assert isinstance(limits, Range), name
        assert {limits.least, limits.above} != {None}, f"{name} has no lower limit"
        assert {limits.most, limits.below} != {None}, f"{name} has no upper limit"


@pytest.mark.parametrize(("name", "owner", "hint", "wrap"), NUMBERS, ids=[entry[0] for entry in NUMBERS])
def test_numbers_outside_their_range_are_refused_by_name(name, owner, hint, wrap):
    kind, limits = get_args(hint)
    step = 1 if kind is int else 1e-6
    low = limits.above if limits.least is None else limits.least - step
    high = limits.below if limits.most is None else limits.most + max(step, limits.most // 1000)
    message = rf"{re.escape(name)}(\.name)? must be "
    assert re.search(message, refusal(name, wrap(kind(low))))
    for value in (kind(low), kind(high), -(10**30), 10**400, math.nan, math.inf, -math.inf, "1", True):
        with pytest.raises(ValueError, match=rf"^{message}"):
            owner(**{name.rpartition(".")[2]: wrap(value)})


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2).map(sorted), st.floats(-2e6, 2e6), st.booleans())
def test_a_range_takes_what_lies_inside_it(limits, value, at_limit):
    low, high = limits
    for number in (low, high) if at_limit else (value,):
        assert (Range(least=low, most=high).complaint(number) is None) == (low <= number <= high)
        assert (Range(above=low, below=high).complaint(number) is None) == (low < number < high)


def test_choices_are_listed():
    choices = [entry for entry in FIELDS if get_origin(entry[2]) is Literal]
    assert len(choices) >= 10
    for name, owner, hint, wrap in choices:
        with pytest.raises(ValueError, match=rf"^{re.escape(name)} is 'nothing'; expected {get_args(hint)[0]}"):
            owner(**{name.rpartition(".")[2]: wrap("nothing")})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("detection.sequences_per_image=0", "detection.sequences_per_image must be at least 1, got 0"),
        ("augment.min_visible=1.5", "augment.min_visible must be at most 1, got 1.5"),
        ("weight_decay=-1", "weight_decay must be at least 0, got -1"),
        ("augment.flip=2", "augment.flip must be at most 1, got 2"),
        ("betas=[1.5,.9]", "betas must be less than 1, got 1.5"),
        ("betas=[.9]", "length 1 does not match"),
        ("betas=[a,1]", r"could not be converted to Float \(betas=\[a,1\]\)"),
        ("detection.class_corruption=some", "expected one of .*'real_n_rand_n_fake_cls'"),
        ("trackers=[some]", r"expected one of \['tensorboard', 'wandb', 'trackio'\] \(trackers=\[some\]\)"),
        ("detection.noise_objects=-1", "detection.noise_objects must be at least 0, got -1"),
        ("eval_images=-3", "eval_images must be at least 0, got -3"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("ema_decay=2", "ema_decay must be less than 1, got 2"),
        ("num_workers=5000", "num_workers must be at most 256, got 5000"),
        ("lr=.nan", "lr must be a finite number, got nan"),
        ("model.encoder.num_layers=1000000", "model.encoder.num_layers must be at most 256, got 1000000"),
        ("model.decoder.num_heads=7", "model.decoder.dim=256 does not divide into num_heads=7"),
        ("model.decoder={dim: 6, num_heads: 2}", "model.decoder.dim must be a multiple of 4, .* got 6"),
        ("model.encoder={name: vit, stem: conv, patch_size: 12}", "a patch_size of 4, 8, 16 or 32, got 12"),
        ("model.encoder={name: vit, dim: 100}", "model.encoder.dim=100 does not divide into num_heads=3"),
        ("model.image_size=[64,0]", "model.image_size must be at least 1, got 0"),
        ("model.vocab.num_bins=1", "model.vocab.num_bins must be at least 2, got 1"),
        ("model.vocab.coord_base=100", "model.vocab.coord_base must be more than 100, got 100"),
        ("captioning.max_tokens=1", "captioning.max_tokens must be at least 2, got 1"),
        ("tasks=[]", "at least one task"),
        ("tasks=[detection,detection]", "none of them twice"),
    ],
)
def test_settings_that_cannot_be_meant(setting, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [setting])


def test_one_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match=r"model\.encoder\.dim must be at least 1, got 0"):
        EncoderConfig(dim=0)
    with pytest.raises(ValueError, match=r"model\.encoder\.dim must be a whole number, got 2\.5"):
        EncoderConfig(dim=2.5)
    with pytest.raises(ValueError, match=r"model\.encoder\.stem is 'none'; expected patch or conv"):
        EncoderConfig(stem="none")
    with pytest.raises(ValueError, match=r"augment\.flip must be a finite number, got nan"):
        AugmentConfig(flip=np.float32("nan"))
    assert AugmentConfig(flip=np.float32(0.5), scale_min=np.int64(1)).flip == 0.5
    with pytest.raises(ValueError, match=r"augment\.flip must be a number, got True"):
        AugmentConfig(flip=True)
    assert EncoderConfig(name="deit_tiny_patch16_224", dim=100).num_heads == 3  # sizes of a timm model are its own


@pytest.mark.parametrize("name", ["meta", "cuda:99", "xla", "nothing"])
def test_a_device_that_cannot_train_is_refused(name):
    with pytest.raises(InputError, match=f"device '{name}' cannot be used"):
        pick_device(name)


def test_a_task_takes_other_settings_only_in_their_range():
    task = Detection(DetectionConfig(), Vocab(), [Category(1, 1, "cat")])
    assert task.with_settings(num_objects=7).config.num_objects == 7
    with pytest.raises(InputError, match=r"detection\.num_objects must be at most 10000, got 1000000"):
        task.with_settings(num_objects=10**6)


def test_settings_of_other_tasks_take_part():
    @dataclasses.dataclass(frozen=True)
    class Other(Settings):
        section = "other"
        shares: dict[str, Share] = dataclasses.field(default_factory=dict)
        pair: tuple[Share, ...] | None = None

    assert Other({"a": 1}, (0, 0.5)).pair == (0, 0.5)
    with pytest.raises(ValueError, match=r"other\.shares\.b must be at most 1, got 2"):
        Other({"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"other\.pair must be at least 0, got -1"):
        Other(pair=(0, -1))
