"""Closeups: a memory of a single object, made from the finer maps of an image that is encoded once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from one_by_one import sums_one_by_one

from pix2seq import Predictor
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import SharedTrainingSet, TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample, collate
from pix2seq.geometry.polygons import rasterize, space_evenly
from pix2seq.model.closeups import sample_maps
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.sequences import SequenceView
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.objects import jitter_box
from pix2seq.tasks.request import Frame
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.training.config import config_file, load_config
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.recipe import prepare
from pix2seq.types import Instance
from pix2seq.vocab import INVISIBLE, Vocab

SIZE = (64, 96)  # height and width, not square
VOCAB = Vocab(num_bins=200, text_base=1300, size=1300)
ENCODER = EncoderConfig("vit", stem="conv", closeups=True, dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closeups") / "shapes"
    write_shapes(folder, num_train=24, num_val=4, size=96, seed=3, workers=1)
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def tasks(shapes):
    mask = SegmentationConfig(closeup=True, num_samples=1, even_points=40, random_start=False, max_points=64)
    return {
        "detection": Detection(DetectionConfig(max_objects=6, noise_objects=2), VOCAB, shapes.categories),
        "segmentation": Segmentation(mask, VOCAB, shapes.categories),
        "keypoint": Keypoint(KeypointConfig(crop=False, closeup=True, mask_inputs=False), VOCAB, shapes.categories),
    }


@pytest.fixture(scope="module")
def model(shapes, tasks):
    torch.manual_seed(0)
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=160)
    config = ModelConfig(image_size=SIZE, encoder=ENCODER, decoder=decoder, vocab=VOCAB)
    model = build_model(config, shapes.categories)
    model.task_settings = {name: task.settings() for name, task in tasks.items()}
    return model.eval()


def bilinear(channel, y, x):
    """A map (H, W) at a point in units of its cells, whose middles lie at halves; nothing lies outside."""
    value, top, left = 0.0, int(np.floor(y - 0.5)), int(np.floor(x - 0.5))
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < channel.shape[0] and 0 <= column < channel.shape[1]:
                share = (1 - abs(y - 0.5 - row)) * (1 - abs(x - 0.5 - column))
                value += share * float(channel[row, column])
    return value


def test_samples_are_those_of_a_slow_bilinear_interpolation():
    torch.manual_seed(0)
    maps = (torch.rand(3, 2, 8, 12), torch.rand(3, 1, 4, 6))
    frames = torch.tensor([[0.1, 0.2, 0.6, 0.7], [-0.3, 0.5, 0.2, 1.4], [0.0, 0.0, 1.0, 1.0], [0.4, 0.4, 0.45, 0.5]])
    image_index, grid = [0, 0, 2, 2], (2, 3)
    found = sample_maps(maps, frames, image_index, grid)
    assert found.shape == (4, 3, 4, 6)
    for frame, image, samples in zip(frames.tolist(), image_index, found, strict=True):
        y0, x0, y1, x1 = frame
        channels = [channel for level in maps for channel in level[image].numpy()]
        for number, channel in enumerate(channels):
            for row in range(4):
                for column in range(6):
                    y = (y0 + (y1 - y0) * (row + 0.5) / 4) * channel.shape[0]
                    x = (x0 + (x1 - x0) * (column + 0.5) / 6) * channel.shape[1]
                    assert float(samples[number, row, column]) == pytest.approx(bilinear(channel, y, x), abs=1e-5)


@given(
    st.lists(st.floats(0, 90), min_size=2, max_size=2),
    st.lists(st.floats(0.5, 60), min_size=2, max_size=2),
    st.floats(0, 1),
)
def test_a_frame_around_a_box_has_it_in_the_middle(corner, sides, padding):
    whole = Frame(np.zeros(2), np.array([96.0, 64.0]))
    box = np.array([*corner, corner[0] + sides[0], corner[1] + sides[1]])
    frame = whole.around(box, padding)
    np.testing.assert_allclose(frame.size[0] / frame.size[1], 96 / 64)
    np.testing.assert_allclose((frame.xyxy[:2] + frame.xyxy[2:]) / 2, (box[:2] + box[2:]) / 2)
    assert (frame.size >= np.array(sides) * (1 + 2 * padding) - 1e-6).all()
    limiting = np.array(sides) * (1 + 2 * padding) / frame.size
    assert limiting.max() == pytest.approx(1) or max(sides[0] / 96, sides[1] / 64) < 1 / 64


@pytest.mark.parametrize("jitter", [0.0, 0.2])
@pytest.mark.parametrize("name", ["segmentation", "keypoint"])
def test_sequences_of_closeups_say_where_objects_are_in_the_image(shapes, tasks, name, jitter):
    task = tasks[name].with_settings(box_jitter=jitter)
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    scale = SIZE[0] / 96  # square images of 96 pixels fill the height
    checked = 0
    for i in range(len(samples)):
        (image_index, _) = samples.index[i]
        target = shapes.target(int(image_index))
        for example in samples[0, i].examples[name]:
            (shown,) = task.shown(example, SIZE)
            boxes = target.boxes_xyxy * scale
            errors = np.abs(boxes - shown.box_xyxy).max(axis=1)
            sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
            same_class = target.labels == shown.category.label
            i_best = int(np.where(same_class, errors, np.inf).argmin())
            assert errors[i_best] <= sides[i_best] * jitter + 0.6
            if name == "segmentation" and not jitter:
                true = rasterize([ring * scale * 8 for ring in target.segmentations[i_best]], SIZE[0] * 8, SIZE[1] * 8)
                said = rasterize([ring * 8 for ring in shown.polygons], SIZE[0] * 8, SIZE[1] * 8)
                assert (true & said).sum() / (true | said).sum() > 0.8
                checked += 1
            if name == "keypoint":
                expected = target.keypoints[i_best, : len(shown.keypoints)]
                labelled = (expected[:, 2] > 0) & (shown.keypoints[:, 2] > 0)
                if jitter == 0:
                    np.testing.assert_array_equal(shown.keypoints[:, 2] > 0, expected[:, 2] > 0)
                worst = np.abs(shown.keypoints[labelled, :2] - expected[labelled, :2] * scale).max(initial=0)
                assert worst < 0.6
                checked += 1
    assert checked > 3 or jitter


def test_one_pass_gives_the_losses_of_each_closeup_alone(shapes, tasks, model):
    augment = AugmentConfig(scale_min=0.8, scale_max=1.2)
    together = SharedTrainingSet(shapes, list(tasks.values()), size=SIZE, augment=augment, seed=0)
    samples = [together[0, i] for i in range(12)]
    batch = collate(samples, list(tasks), bucket=256)
    near = [e.closeup for s in samples for some in s.examples.values() for e in some if e.closeup is not None]
    assert len(batch.closeups) == len(near) > 6
    assert (batch.memory_index.diff() >= 0).all()
    assert (batch.closeup_images.diff() >= 0).all()
    sums = {name: total for name, (total, _) in CrossEntropy()(model, batch).items()}
    torch.testing.assert_close(sums, sums_one_by_one(model, samples), rtol=1e-4, atol=1e-3)


def test_all_weights_have_gradients_in_a_batch_without_closeups(model):
    ids = np.arange(1, 4)
    sample = Sample(
        np.zeros((*SIZE, 3), np.uint8), {"detection": [Example(ids[:1], ids, ids, np.ones(3, np.float32))]}, 0
    )
    model.zero_grad()
    (total, _) = CrossEntropy()(model, collate([sample], ["detection"]))["detection"]
    total.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_an_image_is_encoded_once_however_many_objects_are_asked_about(model, monkeypatch):
    predictor = Predictor(model)
    calls = []
    forward = model.encoder.stem.with_maps
    monkeypatch.setattr(model.encoder.stem, "with_maps", lambda images: calls.append(len(images)) or forward(images))
    rng = np.random.default_rng(0)
    images = [predictor.encode(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8)) for _ in range(2)]
    boxes = [[5, 5, 30, 30], [40, 10, 75, 45], [0, 0, 80, 50]]
    alone = [predictor.segment(image, [box], categories="star")[0] for image in images for box in boxes]
    assert calls == [1, 1]
    category = next(c for c in model.categories if c.name == "star")
    about = [[Instance(tuple(map(float, box)), category, 1.0) for box in boxes] for _ in images]
    together = [found for some in predictor.ask("segmentation", images, about) for found in some]
    assert calls == [1, 1]
    by_box = {(i // 3, tuple(map(float, boxes[i % 3]))): found for i, found in enumerate(alone)}
    for i, found in enumerate(together):
        expected = by_box[i // 3, found.box_xyxy]
        assert len(found.polygons) == len(expected.polygons)
        for ring, same in zip(found.polygons, expected.polygons, strict=True):
            np.testing.assert_allclose(ring, same, atol=1e-3)
    # The same boxes on two images: the answers come from the images.
    assert any(len(a.polygons) != len(b.polygons) or any(x.shape != y.shape or (x != y).any()
               for x, y in zip(a.polygons, b.polygons, strict=True))
               for a, b in zip(alone[:3], alone[3:], strict=True))  # fmt: skip


def test_a_closeup_of_everything_sees_the_whole_image(model):
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        memory, maps = model.encode_with_maps(images)
        torch.testing.assert_close(memory, model.encode(images))
        near = model.look_closer(maps, torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]]), [0, 1])
        assert near.shape == (2, *memory.shape[1:])
        changed = images.clone()
        changed[1, :, :8] = 0  # far above what the second frame shows
        _, others = model.encode_with_maps(changed)
        again = model.look_closer(others, torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]]), [0, 1])
    torch.testing.assert_close(again[0], near[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"segmentation.closeup": True}, "needs model.encoder.closeups=true"),
        ({"segmentation.crop": True, "segmentation.closeup": True}, "two ways to look at an object"),
        ({"segmentation.box_jitter": 0.5}, "segmentation.box_jitter must be less than 0.5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, settings, words):
    with pytest.raises(InputError, match=words):
        prepare(load_config(None, [f"{k}={v}" for k, v in settings.items()], data=str(folder), tasks=["segmentation"]))


@pytest.mark.parametrize("changes", [{"stem": "patch"}, {"name": "resnet"}, {"patch_size": 4}])
def test_encoders_without_finer_maps_are_refused(changes):
    with pytest.raises(InputError, match="closeups need"):
        build_model(ModelConfig(image_size=(64, 64), encoder=replace(ENCODER, **changes), vocab=VOCAB))


def test_crops_keep_their_masks(shapes):
    task = Segmentation(SegmentationConfig(crop=True, max_points=64), VOCAB, shapes.categories)
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    assert len(samples) == sum(sum(map(task.usable, [t] * len(t.labels), range(len(t.labels))))
                               for t in map(shapes.target, range(len(shapes))))  # fmt: skip
    for i in range(len(samples)):
        sample = samples[0, i]
        assert len(sample.examples["segmentation"]) == 1
        for example in sample.examples["segmentation"]:
            (shown,) = task.shown(example, SIZE)
            x0, y0, x1, y1 = shown.box_xyxy
            points = np.concatenate(shown.polygons)
            assert (points.min(0) >= np.array([x0, y0]) - 1.5).all()
            assert (points.max(0) <= np.array([x1, y1]) + 1.5).all()
            assert max((x1 - x0) / SIZE[1], (y1 - y0) / SIZE[0]) > 0.3  # enlarged


@given(hnp.arrays(np.float64, (4,), elements=st.floats(1, 30)), st.floats(0, 0.45), st.integers(0, 1000))
def test_a_jittered_box_stays_near_and_inside(values, share, seed):
    box = np.array([values[0], values[1], values[0] + values[2], values[1] + values[3]])
    moved = jitter_box(box, share, (61, 61), np.random.default_rng(seed))
    assert (np.abs(moved - box) <= share * np.tile(values[2:], 2) + 1e-4).all()
    assert (moved[2:] > moved[:2]).all()


def test_without_jitter_nothing_more_is_drawn(shapes, tasks):
    plain = tasks["segmentation"].with_settings(closeup=False)
    rng, same = np.random.default_rng(1), np.random.default_rng(1)
    target = next(t for t in map(shapes.target, range(len(shapes))) if len(t.labels) > 2)
    plain.examples(target, (96, 96), rng)
    same.permutation([i for i in range(len(target.labels)) if plain.usable(target, i)])
    assert rng.bit_generator.state == same.bit_generator.state


def test_even_points_of_a_square_worked_by_hand():
    anticlockwise = np.array([[0.0, 0.0], [0.0, 4.0], [4.0, 4.0], [4.0, 0.0]])
    (ring,) = space_evenly([anticlockwise], 8)
    np.testing.assert_allclose(ring, [[0, 0], [2, 0], [4, 0], [4, 2], [4, 4], [2, 4], [0, 4], [0, 2]])
    small = np.array([[10.0, -5.0], [11.0, -5.0], [11.0, -4.0], [10.0, -4.0]])
    first, second = space_evenly([anticlockwise, small], 20)  # 16 points and 4, the higher one first
    assert len(first) == 4
    assert len(second) == 16
    np.testing.assert_allclose(first[0], [10, -5])


@given(st.integers(5, 60), st.integers(0, 10_000))
def test_even_points_lie_on_the_ring_at_equal_distances(number, seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    star = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(5, 30, (12, 1))
    (ring,) = space_evenly([star], number)
    assert len(ring) == number
    ends = np.roll(star, -1, axis=0)
    for point in ring:  # on one of the edges
        along = np.clip(((point - star) * (ends - star)).sum(1) / ((ends - star) ** 2).sum(1), 0, 1)
        assert np.hypot(*(star + along[:, None] * (ends - star) - point).T).min() < 1e-6
    perimeter = np.hypot(*(ends - star).T).sum()
    assert np.hypot(*(np.roll(ring, -1, axis=0) - ring).T).max() <= perimeter / number + 1e-6
    assert ring[0, 1] == pytest.approx(star[:, 1].min())


def test_a_table_of_tokens_gives_the_pixels_of_the_whole_input(folder, shapes):
    view = SequenceView(load_config(config_file("shapes.yaml"), data=str(folder)), "segmentation", 0)
    (example,) = view.examples
    (shown,) = view.task.shown(example, (96, 96))
    words = view.meanings(example.prompt.tolist(), example.closeup)
    found = [float(word.split("= ")[1].removesuffix(" px")) for word in words[1:5]]
    np.testing.assert_allclose(found, np.array(shown.box_xyxy)[[1, 0, 3, 2]], atol=0.06)
    assert f"{found[0]:.1f} px (prompt)" in view.text()


def test_a_point_outside_the_closeup_is_not_labelled(shapes, tasks):
    task = tasks["keypoint"]
    target = next(t for t in map(shapes.target, range(len(shapes))) if (t.keypoints[..., 2] > 0).any())
    (i, *_) = np.flatnonzero((target.keypoints[..., 2] > 0).any(axis=1))
    (k, *_) = np.flatnonzero(target.keypoints[i, :, 2] > 0)
    moved = target.keypoints.copy()
    x0, y0, x1, y1 = target.boxes_xyxy[i]
    moved[i, k, :2] = x1 + 3 * max(x1 - x0, y1 - y0), y1  # half of its size is kept on each side
    rng = np.random.default_rng(0)
    near, far = (task._example(replace(target, keypoints=each), i, SIZE, rng) for each in (target.keypoints, moved))
    assert (far.targets[2 * k : 2 * k + 2] == INVISIBLE).all()
    assert (near.targets[2 * k : 2 * k + 2] != INVISIBLE).all()
    others = np.delete(np.arange(len(near.targets)), [2 * k, 2 * k + 1])
    np.testing.assert_array_equal(far.targets[others], near.targets[others])


def test_equal_prompts_about_two_objects_draw_differently(model):
    predictor = Predictor(model)
    image = predictor.encode(np.zeros((64, 96, 3), np.uint8))
    category = next(c for c in model.categories if c.name == "star")
    boxes = [(10.0, 10.0, 30.0, 30.0), (50.0, 20.0, 70.0, 40.0)]
    first, second = predictor.tasks["segmentation"].requests(image, [Instance(box, category, 1.0) for box in boxes])
    np.testing.assert_array_equal(first.prompt, second.prompt)
    assert first.random_seed(0) != second.random_seed(0)
    assert first.random_seed(0) == replace(first).random_seed(0) != first.random_seed(1)
