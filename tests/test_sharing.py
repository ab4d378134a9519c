"""Images that teach several tasks at once, and captions that are still true after a flip."""

import json
import multiprocessing
import shutil
import zlib
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_settings import ALL, TINY

from pix2seq.cli import main
from pix2seq.data.annotations import contents
from pix2seq.data.dataset import open_dataset
from pix2seq.data.image import read_record_image, warp_image
from pix2seq.data.loader import batches
from pix2seq.data.samples import SharedTrainingSet, TrainingSet, TrainingStream
from pix2seq.data.shapes import write_shapes
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import AugmentConfig, random_affine
from pix2seq.errors import InputError
from pix2seq.geometry.keypoints import mirror_order
from pix2seq.tasks import get_task
from pix2seq.tasks.captioning import CaptioningConfig
from pix2seq.tasks.detection import DetectionConfig
from pix2seq.tasks.keypoint import KeypointConfig
from pix2seq.tasks.segmentation import SegmentationConfig
from pix2seq.tokenizers.captioning import decode_caption
from pix2seq.tokenizers.text import WordTokenizer, names_side
from pix2seq.training.config import config_file, load_config
from pix2seq.training.recipe import prepare
from pix2seq.vocab import Vocab

SIZE = (48, 40)
SEED = 11
NO_MASKS, NO_CAPTIONS, NOTHING = 2, 3, 4  # images that lack these annotations
CONFIGS = {
    "detection": DetectionConfig(max_objects=12, noise_objects=2, sequences_per_image=2),
    "segmentation": SegmentationConfig(max_objects=3, max_points=20),
    "keypoint": KeypointConfig(crop=False),
    "captioning": CaptioningConfig(captions_per_image=5, max_tokens=60),
}
SHARED = [setting for setting in TINY if not setting.startswith("segmentation.batch_size")] + ["share_images=true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Generated images, some of which lack annotations."""
    folder = tmp_path_factory.mktemp("sharing") / "shapes"
    write_shapes(folder, num_train=16, num_val=4, size=48, seed=1, workers=1)
    for name in ("instances", "person_keypoints", "captions"):
        file = folder / "annotations" / f"{name}_train2017.json"
        content = json.loads(file.read_text())
        ids = sorted(image["id"] for image in content["images"])
        without = {ids[NOTHING]} | ({ids[NO_CAPTIONS]} if name == "captions" else set())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in without]
        for annotation in content["annotations"]:
            if annotation["image_id"] == ids[NO_MASKS]:
                annotation.pop("segmentation", None)
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def dataset(data):
    return open_dataset(data, "train")


@pytest.fixture(scope="module")
def text(dataset):
    return WordTokenizer.build(dataset.annotations.all_captions())


@pytest.fixture(scope="module")
def tasks(dataset, text):
    vocab = Vocab(num_bins=48, text_base=1100, size=1100).with_text(text.size)
    return {name: get_task(name)(CONFIGS[name], vocab, dataset.categories, text) for name in CONFIGS}


def sharing(dataset, tasks, augment=None, **options):
    return SharedTrainingSet(
        dataset, tasks, **{"size": SIZE, "augment": augment or AugmentConfig(), "seed": SEED} | options
    )


def assert_same_examples(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items() if name != "target")


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_ids == other.image_ids
        for name, value in vars(one).items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, vars(other)[name]), name


def take(samples, count, **options):
    stream = batches([(samples, 6)], **options)
    try:
        return list(islice(stream, count))
    finally:
        getattr(stream, "close", lambda: None)()


def test_a_shared_sample_is_what_each_task_writes_alone_about_the_same_map(dataset, tasks):
    augment = AugmentConfig(scale_min=0.7, scale_max=1.2)
    samples = sharing(dataset, list(tasks.values()), augment)
    orders = {c.label: mirror_order(c.keypoints) for c in dataset.categories if c.keypoints}
    num_flips = 0
    for epoch, index in ((epoch, index) for epoch in (0, 3) for index in range(len(samples))):
        number = int(samples.index[index, 0])
        target = dataset.target(number)
        sample = samples[epoch, index]
        image = read_record_image(target.image)
        affine = random_affine(image.shape[:2], SIZE, augment, np.random.default_rng((SEED, epoch, number)))
        flipped = affine.scale_x < 0
        num_flips += flipped
        assert np.array_equal(sample.image, warp_image(image, affine, SIZE))
        assert set(sample.examples) == {n for n, task in tasks.items() if task.learns_from in contents(target)}
        moved = transform_target(target, affine, SIZE, mirror_orders=orders)
        true = tuple(c for c in target.captions if not (flipped and ("left" in c or "right" in c)))
        for name, examples in sample.examples.items():
            rng = np.random.default_rng((SEED, epoch, number, zlib.crc32(name.encode())))
            assert_same_examples(examples, tasks[name].examples(replace(moved, captions=true), SIZE, rng))
    assert 0 < num_flips < 2 * len(samples)


def test_every_task_writes_about_what_an_image_has_and_about_nothing_else(dataset, tasks):
    samples = sharing(dataset, list(tasks.values()), AugmentConfig(enabled=False))
    assert samples.tasks == list(CONFIGS)
    by_image = {int(number): samples[0, index] for index, (number, _) in enumerate(samples.index)}
    assert set(by_image) == set(range(len(dataset))) - {NOTHING}
    assert "segmentation" not in by_image[NO_MASKS].examples
    assert "captioning" not in by_image[NO_CAPTIONS].examples
    for number, sample in by_image.items():
        target = dataset.target(number)
        people = int((target.keypoints[..., 2] > 0).any(axis=1).sum())
        counts = {name: len(examples) for name, examples in sample.examples.items()}
        expected = {"detection": 2, "segmentation": min(len(target.labels), 3), "keypoint": people, "captioning": 5}
        absent = {NO_MASKS: "segmentation", NO_CAPTIONS: "captioning"}.get(number)
        assert counts == {name: count for name, count in expected.items() if count and name != absent}
    for names in (["segmentation", "captioning"], ["keypoint", "captioning"], ["segmentation", "keypoint"]):
        some = sharing(dataset, [tasks[name] for name in names])
        wanted = {tasks[name].learns_from for name in names}
        assert some.index[:, 0].tolist() == [i for i in range(len(dataset)) if wanted & contents(dataset.target(i))]


def test_what_a_task_draws_does_not_depend_on_the_others(dataset, tasks):
    augment = AugmentConfig(scale_min=0.7, scale_max=1.2, brightness=0.2)
    names = ["segmentation", "captioning"]
    few, all_of_them = (sharing(dataset, [tasks[n] for n in group], augment) for group in (names, CONFIGS))
    assert few.index.tolist() == all_of_them.index.tolist()
    for index in range(len(few)):
        one, other = few[5, index], all_of_them[5, index]
        assert np.array_equal(one.image, other.image)
        assert set(one.examples) == set(other.examples) & set(names)
        for name, examples in one.examples.items():
            assert_same_examples(examples, other.examples[name])


def test_ranks_and_workers_see_what_one_process_sees(dataset, tasks):
    samples = sharing(dataset, list(tasks.values()))
    complete = take(samples, 6)
    assert all(len(batch.images) == 6 for batch in complete)  # one image, whatever it teaches
    assert all(len(batch.lengths) > 6 * 4 for batch in complete)
    for start in (0, 4):
        assert_same_batches(take(samples, 2, num_workers=2, start=start), complete[start : start + 2])
        assert_same_batches(take(samples, 2, start=start), complete[start : start + 2])
    parts = [take(samples, 6, rank=rank, world_size=2, num_workers=rank * 2) for rank in range(2)]
    for batch, *pieces in zip(complete, *parts, strict=True):
        assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
        assert torch.equal(torch.cat([piece.tokens for piece in pieces]), batch.tokens)
        assert [pieces[0].counts[i] + pieces[1].counts[i] for i in range(4)] == pytest.approx(batch.counts)
    assert not multiprocessing.active_children()


def test_a_bad_image_is_named_once_and_replaced(data, tasks, tmp_path):
    shutil.copytree(data, tmp_path / "some")
    dataset = open_dataset(tmp_path / "some", "train")
    samples = sharing(dataset, list(tasks.values()))
    dataset.images[0].path.write_bytes(b"junk")
    with pytest.warns(UserWarning, match="skipped in training") as caught:
        found = [samples[epoch, 0].image_id for epoch in range(3)]
    assert found == [dataset.images[1].id] * 3
    assert [warning.filename for warning in caught] == [__file__]


def test_shared_images_take_the_scales_that_all_tasks_allow(dataset, tasks):
    def scales(augment, *names):
        return sharing(dataset, [tasks[name] for name in names], augment).maker.scale_range

    assert scales(AugmentConfig(), "detection", "captioning") == (0.3, 2.0)
    assert scales(AugmentConfig(), "detection", "segmentation") == (0.3, 1.0)
    assert scales(AugmentConfig(scale_max=1.5), "detection", "segmentation") == (0.3, 1.5)
    large = type("Large", (type(tasks["captioning"]),), {"scale_range": (1.1, 2.0)})
    apart = [tasks["segmentation"], large(CONFIGS["captioning"], tasks["captioning"].vocab, dataset.categories)]
    message = (
        r"have no scale in common: segmentation 0.3 to 1, captioning 1.1 to 2, from 1.1 to 1 in all; set augment.scale"
    )
    with pytest.raises(InputError, match=message):
        sharing(dataset, apart, AugmentConfig())
    for augment in (AugmentConfig(enabled=False), AugmentConfig(scale_min=0.5)):
        sharing(dataset, apart, augment)


@pytest.mark.parametrize(
    "caption",
    [
        "a cat at the left", "LEFT: a dog", "the rightmost of two cups", "a bottom-right corner", "a left-hand turn",
        "a righthand glove", "the car moves leftwards", "a wheel that turns anticlockwise", "on the right.",
    ],
)  # fmt: skip
def test_a_caption_that_names_a_side_is_told(caption):
    assert names_side(caption)


@pytest.mark.parametrize(
    "caption", ["a bright star", "an upright post above a cat", "a copyright sign", "two clefts", "human rights", ""]
)
def test_other_captions_name_no_side(caption):
    assert not names_side(caption)


def captions_of(sample, task):
    return {decode_caption(e.targets, task.tokenizer, task.vocab) for e in sample.examples.get("captioning", ())}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("flip", ["auto", "always", "never"])
def test_flips_drop_captions_that_name_sides_and_only_those(dataset, tasks, shared, flip):
    task = tasks["captioning"].with_settings(flip=flip)
    options = {"size": SIZE, "augment": AugmentConfig(flip=1.0), "seed": SEED}
    other = [tasks["detection"]] if shared else []
    samples = sharing(dataset, [*other, task], **options) if shared else TrainingSet(dataset, task, **options)
    num_dropped = 0
    for index, (number, _) in enumerate(samples.index):
        target, sample = dataset.target(int(number)), samples[0, index]
        sided = {c for c in target.captions if {"left", "right"} & set(c.replace(".", " ").replace(",", " ").split())}
        wanted = set(target.captions) - (sided if flip == "auto" else set())
        if flip == "never" and shared:
            wanted = set()
        assert captions_of(sample, task) == {c.lower() for c in wanted}
        num_dropped += len(sided)
    assert num_dropped > 10


def test_images_that_a_task_does_not_learn_from_mirrored_are_not_mirrored_for_it_alone(dataset, tasks):
    task = tasks["captioning"].with_settings(flip="never")
    options = {"size": SIZE, "augment": AugmentConfig(flip=1.0, scale_min=1.0, scale_max=1.0), "seed": SEED}
    plain = TrainingSet(dataset, tasks["captioning"], **options | {"augment": replace(options["augment"], flip=0.0)})
    never, auto = (TrainingSet(dataset, each, **options) for each in (task, tasks["captioning"]))
    for index in range(len(plain)):
        assert np.array_equal(never[0, index].image, plain[0, index].image)
    assert not np.array_equal(auto[0, 0].image, plain[0, 0].image)


def recipe_of(data, *settings, tasks=ALL):
    return prepare(load_config(None, [f"data={data}", *SHARED, *settings], tasks=tasks.split(",")))


def test_crops_and_other_folders_stay_apart(data, tmp_path):
    def groups(*settings, **options):
        return [(type(s), s.tasks) for s in recipe_of(data, *settings, **options).samples]

    three = (SharedTrainingSet, ["detection", "segmentation", "captioning"])
    assert groups() == [three, (TrainingSet, ["keypoint"])]
    assert groups("keypoint.crop=false") == [(SharedTrainingSet, ALL.split(","))]
    assert groups(tasks="keypoint,captioning") == [(TrainingSet, ["keypoint"]), (TrainingSet, ["captioning"])]
    assert groups("share_images=false") == [(TrainingSet, [name]) for name in ALL.split(",")]
    recipe = prepare(load_config(config_file("multi_task_shapes.yaml"), [f"data={data}"]))
    assert [(type(s), s.tasks) for s in recipe.samples] == [three, (TrainingSet, ["keypoint"])]
    other = tmp_path / "other"
    shutil.copytree(data, other)
    folders = [f"data.{name}={other if name == 'segmentation' else data}" for name in ALL.split(",")]
    found = prepare(load_config(None, [*SHARED, *folders], tasks=ALL.split(","))).samples
    assert [s.tasks for s in found] == [["detection", "captioning"], ["segmentation"], ["keypoint"]]
    pytest.importorskip("webdataset")
    assert main(["data", "shard", str(data), str(tmp_path / "shards"), "--split", "train"]) == 0
    shards = ["data=" + str(tmp_path / "shards"), f"val_data={data}"]
    assert groups(*shards, tasks="detection,captioning") == [
        (TrainingStream, ["detection"]),
        (TrainingStream, ["captioning"]),
    ]


def test_tasks_apart_draw_what_they_drew_before(data):
    alone = recipe_of(data, tasks="keypoint").samples[0]
    beside = recipe_of(data).samples[1]
    assert alone.seed == beside.seed
    assert np.array_equal(alone[2, 1].image, beside[2, 1].image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["segmentation.batch_size=2"], "segmentation.batch_size=2 differs from batch_size=4, but detection, segm"),
        (["augment.scale_min=1.5"], "have no scale in common"),
        (["captioning.flip=maybe"], "expected one of ['auto', 'always', 'never'] (captioning.flip)"),
    ],
)
def test_what_cannot_be_shared_ends_in_one_line(data, tmp_path, capsys, settings, message):
    assert main(["train", "--task", ALL, f"data={data}", f"out={tmp_path / 'run'}", *SHARED, *settings]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_a_task_without_annotations_is_an_error_even_if_others_have_some(data, tmp_path, capsys):
    some = tmp_path / "some"
    shutil.copytree(data, some)
    file = some / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    file.write_text(json.dumps(content))
    (some / "annotations" / "person_keypoints_train2017.json").unlink()
    command = ["train", "--task", "detection,segmentation", f"data={some}", f"out={tmp_path / 'run'}", *SHARED]
    assert main(command) == 2
    assert "has no mask to learn from" in capsys.readouterr().err


def test_a_shared_run_trains_every_task_and_resumes_to_the_bit(data, tmp_path):
    settings = [*SHARED, "steps=40", "checkpoint_every=20", "eval_images=2", "lr=3e-3"]
    command = ["train", "--task", ALL, f"data={data}", *settings]
    assert main([*command, f"out={tmp_path / 'run'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 40
    for name in ALL.split(","):
        losses = [line[f"loss/{name}"] for line in train]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), name
    assert all(line["images"] == line["step"] * (4 + 4) for line in train)  # shared ones, and those of keypoints
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "run", broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000040")
    assert main([*command, f"out={broken}", "--resume", "auto"]) == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(f / "checkpoints/step-00000040" / name) for f in (broken, tmp_path / "run"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_sequences_of_one_task_of_a_shared_image_can_be_seen(data, capsys):
    for task in ALL.split(","):
        assert main(["data", "sequences", str(data), "--task", task, "--index", "1", *SHARED]) == 0
        assert f"task:{task} (prompt)" in capsys.readouterr().out
