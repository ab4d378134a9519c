"""The four tasks: examples, answers and scores, against the official arrays and against slower ways."""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from one_by_one import sums_one_by_one
from pycocotools import mask as mask_utils

from pix2seq import Predictor
from pix2seq.data.annotations import WHOLE_IMAGE, contents, find_samples
from pix2seq.data.dataset import open_dataset, unite_categories
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.examples import collate
from pix2seq.geometry.affine import Affine
from pix2seq.geometry.boxes import padded_region
from pix2seq.geometry.keypoints import mirror_order
from pix2seq.geometry.polygons import rasterize
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.generate import Completion
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks import BUILT_IN, get_task
from pix2seq.tasks.captioning import CaptioningConfig
from pix2seq.tasks.detection import DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.objects import token_score, weighted_score
from pix2seq.tasks.request import Frame
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.tasks.task import Task
from pix2seq.tokenizers.captioning import decode_caption
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.training.initialize import initialize_from
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.step import TrainingModel, train_step
from pix2seq.types import Category, ImageRecord, Instance, Target
from pix2seq.vocab import EOS, TASK_IDS, Vocab

CONFIGS = {
    "detection": DetectionConfig(max_objects=6, noise_objects=2),
    "segmentation": SegmentationConfig(max_objects=4, max_points=20),
    "keypoint": KeypointConfig(),
    "captioning": CaptioningConfig(captions_per_image=3, max_tokens=30),
}
SIZE = (64, 64)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "shapes"
    write_shapes(folder, num_train=24, num_val=6, size=64, seed=3, workers=1)
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def text(shapes):
    return WordTokenizer.build(c for i in range(len(shapes)) for c in shapes.target(i).captions)


@pytest.fixture(scope="module")
def vocab(text):
    return Vocab(num_bins=64, text_base=1100, size=1100).with_text(text.size)


@pytest.fixture(scope="module")
def tasks(shapes, text, vocab):
    return {name: get_task(name)(CONFIGS[name], vocab, shapes.categories, text) for name in CONFIGS}


def new_model(shapes, text, vocab, tasks):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=SIZE,
        encoder=EncoderConfig("vit", dim=32, num_layers=1, num_heads=2, mlp_dim=64),
        decoder=DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64),
        vocab=vocab,
    )
    model = build_model(config, shapes.categories, text)
    model.task_settings = {name: task.settings() for name, task in tasks.items()}
    return model


@pytest.fixture
def model(shapes, text, vocab, tasks):
    return new_model(shapes, text, vocab, tasks)


def samples_of(shapes, task):
    return TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(scale_min=0.8, scale_max=1.2), seed=0)


def test_every_task_writes_sequences_that_fit_its_own_limits(shapes, tasks):
    for name, task in tasks.items():
        samples = samples_of(shapes, task)
        assert len(samples) > 5
        written = [example for i in range(len(samples)) for example in samples[0, i].examples[name]]
        assert len(written) >= len(samples) / 2
        for example in written:
            assert example.prompt[0] == TASK_IDS[name]
            assert len(example.prompt) == (6 if name in ("segmentation", "keypoint") else 1)
            assert len(example.inputs) == len(example.targets) == len(example.weights)
            assert len(example.prompt) + len(example.targets) <= task.max_seq_len
            assert (example.weights >= 0).all()


def test_keypoints_are_cut_out_one_object_a_sample(shapes, tasks):
    cropped = samples_of(shapes, tasks["keypoint"])
    assert (cropped.index[:, 1] >= 0).all()
    whole = samples_of(shapes, Keypoint(KeypointConfig(crop=False), tasks["keypoint"].vocab, shapes.categories))
    assert (whole.index[:, 1] == -1).all()
    counts = [
        int(((shapes.target(i).keypoints[..., 2] > 0).any(axis=1) & ~shapes.target(i).iscrowd).sum())
        for i in range(len(shapes))
    ]
    assert len(cropped) == sum(counts)
    assert len(whole) == sum(count > 0 for count in counts)


@pytest.mark.parametrize("name", ["data/coco_mini", "data/bccd", None])
def test_what_can_be_learned_from_is_told_for_all_images_as_for_each(shapes, tasks, shared, name):
    dataset = open_dataset(shared / name, "train") if name else shapes
    for task in [*tasks.values(), tasks["keypoint"].with_settings(crop=False)]:
        task = type(task)(task.config, Vocab(), dataset.categories, task.text)
        expected = [
            (image, WHOLE_IMAGE if index is None else index)
            for image in range(len(dataset))
            for index in task.samples(dataset.target(image))
        ]
        crop = task.crop_padding is not None
        found = find_samples(dataset.annotations, task.learns_from, each_object=crop)
        assert found.tolist() == [list(pair) for pair in expected]
        for image in range(len(dataset)):
            target = dataset.target(image)
            assert (task.learns_from in contents(target)) == bool(task.samples(target))


def test_masks_that_are_run_lengths_are_learned_from_and_crowds_are_not(vocab):
    mask = np.zeros((40, 50), np.uint8, order="F")
    mask[10:20, 5:30] = 1
    rle = mask_utils.encode(mask)
    target = Target(
        image=ImageRecord(1, None, 50, 40),
        boxes_xyxy=np.array([[5, 10, 30, 20]] * 2, np.float32),
        labels=np.array([1, 1]),
        areas=np.array([250, 250], np.float32),
        iscrowd=np.array([False, True]),
        annotation_ids=np.array([1, 2]),
        segmentations=(rle, rle),
        keypoints=np.zeros((2, 0, 3), np.float32),
    )
    task = Segmentation(SegmentationConfig(num_samples=1), vocab, (Category(1, 1, "cat"),))
    assert task.samples(target) == [None]
    moved = transform_target(target, Affine(1.26, 1.575), (63, 63))
    (example,) = task.examples(moved, (63, 63), np.random.default_rng(0))
    ((ring,), _) = task.mask(example.targets[None], frame(50, 40), (50, 40))
    found = rasterize([ring], 40, 50)
    assert (found & (mask > 0)).sum() / (found | (mask > 0)).sum() > 0.9
    alone = replace(target, iscrowd=np.array([True, True]))
    assert task.samples(alone) == []


def test_captions_come_back_from_their_targets(shapes, tasks, vocab, text):
    samples = TrainingSet(shapes, tasks["captioning"], size=SIZE, augment=AugmentConfig(flip=0.0), seed=0)
    for index in range(6):
        captions = shapes.target(int(samples.index[index, 0])).captions
        examples = samples[0, index].examples["captioning"]
        assert len(examples) == min(3, len(captions))
        for example in examples:
            decoded = decode_caption(example.targets, text, vocab)
            is_cut = example.targets[-1] != EOS
            assert any(c.lower().startswith(decoded) if is_cut else c.lower() == decoded for c in captions)


def first_samples(shapes, tasks, count=4):
    """Return the first samples of every task."""
    found = {name: samples_of(shapes, task) for name, task in tasks.items()}
    return {name: [samples[0, i] for i in range(count)] for name, samples in found.items()}


def joined(lists):
    return list(chain.from_iterable(lists))


def test_a_batch_of_four_tasks_costs_what_each_sequence_costs_alone(shapes, tasks, model):
    samples = joined(first_samples(shapes, tasks).values())
    batch = collate(samples, list(tasks))
    assert max(len(sample.examples.get("segmentation", [])) for sample in samples) > 1
    sums = CrossEntropy()(model.eval(), batch)
    torch.testing.assert_close({name: total for name, (total, _) in sums.items()}, sums_one_by_one(model, samples))
    for name, (_, count) in sums.items():
        scored = [e.weights.sum() for sample in samples for e in sample.examples.get(name, [])]
        assert count == pytest.approx(sum(scored), rel=1e-6)


def test_images_without_sequences_cost_nothing(shapes, tasks, model):
    (first, *others) = first_samples(shapes, tasks)["segmentation"]
    samples = [replace(first, examples={"segmentation": []}), *others]
    sums = CrossEntropy()(model.eval(), collate(samples, ["segmentation"]))
    torch.testing.assert_close(sums["segmentation"][0], sums_one_by_one(model, others)["segmentation"])
    (total, count) = CrossEntropy()(model, collate(samples[:1], ["segmentation"]))["segmentation"]
    assert total == count == 0
    total.backward()  # other ranks wait for its gradients


def test_a_step_of_four_tasks_encodes_and_decodes_once(shapes, tasks, model, monkeypatch):
    seen = []
    encode, decode = model.encode_with_maps, model.decoder.forward_packed
    monkeypatch.setattr(model, "encode_with_maps", lambda images: seen.append(len(images)) or encode(images))
    monkeypatch.setattr(model.decoder, "forward_packed", lambda *args: seen.append("decoded") or decode(*args))
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0, betas=(0.9, 0.95))
    batch = collate(joined(first_samples(shapes, tasks).values()), list(tasks))
    train_step(TrainingModel(model, CrossEntropy()), optimizer, [batch], {}, max_grad_norm=1)
    assert seen == [4 * 4, "decoded"]


def test_one_image_may_teach_several_tasks(shapes, tasks, model):
    found = first_samples(shapes, tasks)
    pairs = zip(found["detection"], found["captioning"], strict=True)
    shared = [replace(a, examples={**a.examples, **b.examples}) for a, b in pairs]
    batch = collate(shared, ["detection", "captioning"])
    assert batch.image_ids["detection"] == batch.image_ids["captioning"] == tuple(s.image_id for s in shared)
    sums = CrossEntropy()(model.eval(), batch)
    torch.testing.assert_close({name: total for name, (total, _) in sums.items()}, sums_one_by_one(model, shared))


def test_one_pass_gives_the_losses_and_gradients_of_one_pass_per_task(shapes, tasks, text, vocab):
    samples = first_samples(shapes, tasks)
    weights = {"detection": 0.5, "segmentation": 2.0, "keypoint": 0.0, "captioning": 1.0}

    def step(*names):
        model = new_model(shapes, text, vocab, tasks).eval()  # without dropout; it has no batch norm
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        batch = collate(joined(samples[name] for name in names), names)
        result = train_step(TrainingModel(model, CrossEntropy()), optimizer, [batch], weights, max_grad_norm=0)
        return result, [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]

    together, gradient_of_all = step(*weights)
    alone = {name: step(name) for name in weights}
    assert list(together.losses) == list(weights)
    for name in weights:
        torch.testing.assert_close(together.losses[name], alone[name][0].losses[name], atol=1e-5, rtol=0)
    expected = sum(weights[name] * together.losses[name] for name in weights)
    torch.testing.assert_close(together.loss, expected, atol=1e-5, rtol=0)
    for index, value in enumerate(gradient_of_all):
        torch.testing.assert_close(value, sum(parts[1][index] for parts in alone.values()), atol=1e-5, rtol=1e-4)


def test_likelihoods_and_boxes_are_joined_as_published(parity_ops):
    logits, tokens = torch.from_numpy(parity_ops["wscore_logits"]), torch.from_numpy(parity_ops["wscore_seq"])
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    likelihoods = token_score(tokens, logprobs).reshape(len(parity_ops["wscore_box_scores"]), -1).mean(axis=1)
    for weight in (0.0, 0.3, 1.0):
        ours = [
            weighted_score(float(box), float(value), weight)
            for box, value in zip(parity_ops["wscore_box_scores"], likelihoods, strict=True)
        ]
        np.testing.assert_allclose(ours, parity_ops[f"wscore_out_{weight}"], atol=1e-6)


def test_crops_are_the_official_ones(shared):
    arrays = np.load(shared / "parity" / "tasks" / "pure_crop_to_bbox.npz")
    checked = 0
    for case in sorted({key.split("/")[0] for key in arrays.files}):
        height, width = arrays[f"{case}/in/image_size"].tolist()
        order = np.argsort(-arrays[f"{case}/in/scores"], kind="stable")
        for rank, index in enumerate(order):
            if f"{case}/out/{rank}_crop_offset" not in arrays.files:
                continue
            y0, x0, y1, x1 = arrays[f"{case}/in/bbox"][index] * np.array([height, width, height, width], np.float32)
            region = padded_region(np.array([x0, y0, x1, y1]), width, height, float(arrays[f"{case}/in/pad_scale"]))
            top, left = arrays[f"{case}/out/{rank}_crop_offset"].tolist()
            rows, columns = arrays[f"{case}/out/{rank}_crop_size"].tolist()
            assert region == (left, top, left + columns, top + rows)
            checked += 1
    assert checked >= 5


def completion(tokens, best=None):
    tokens = np.asarray(tokens)
    zeros = np.zeros(tokens.shape, np.float32)
    return Completion(tokens, zeros, tokens if best is None else np.asarray(best), zeros, np.zeros(len(tokens), bool))


def frame(width, height):
    """An input that shows an image of this size and nothing else."""
    return Frame(np.zeros(2), np.array([width, height], float))


@given(data=st.data())
def test_no_answer_makes_decoding_raise(tasks, data):
    vocab = tasks["detection"].vocab
    ids = data.draw(hnp.arrays(np.int64, (3, 24), elements=st.integers(0, vocab.size - 1)))
    out = completion(ids, data.draw(hnp.arrays(np.int64, (3, 24), elements=st.integers(0, vocab.size - 1))))
    padded, limits = frame(80, 70), (75, 70)
    for instance in tasks["detection"].instances(out, padded, limits):
        x0, y0, x1, y1 = instance.box_xyxy
        assert 0 <= x0 < x1 <= 75
        assert 0 <= y0 < y1 <= 70
    for ring in tasks["segmentation"].mask(ids, padded, limits)[0]:
        assert len(ring) >= 3
        assert (ring >= 0).all()
        assert (ring <= limits).all()
    category = next(c for c in tasks["keypoint"].categories.values() if c.keypoints)
    points = tasks["keypoint"].points(out, category, padded)
    assert points.shape == (len(category.keypoints), 3)
    assert np.isfinite(points).all()
    caption = tasks["captioning"].caption(out)
    assert isinstance(caption.text, str)
    assert caption.score <= 0


def test_masks_vote(vocab, shapes):
    task = Segmentation(SegmentationConfig(num_samples=4, threshold=0.5), vocab, shapes.categories)
    base = vocab.coord_base

    def square(side):
        return [base, base, base, base + side, base + side, base + side, base + side, base, EOS]

    # In an image of 63 pixels a bin is a pixel. Sides 10, 20, 20 and 40: half of the votes reach 20.
    samples = np.array([square(10), square(20), square(20), square(40)])
    (ring,), rle = task.mask(samples, frame(63, 63), (63, 63))
    assert mask_utils.decode(rle).sum() == 20 * 20
    assert ring.min() == 0
    assert ring.max() == 20


def test_points_are_clipped_to_the_image_by_its_own_sides(vocab):
    category = Category(1, 1, "cat", ("nose", "tail", "paw"))
    task = Keypoint(KeypointConfig(suppress_invisible=False), vocab, (category,))
    base = vocab.coord_base
    # y, x of each point in an input that shows 126 x 126, of which the image has 120 x 40.
    out = completion([[base, base + 63, base + 63, base + 20, 41, 41]])
    found = task.answer(Instance((0, 0, 9, 9), category, 0.5), out, frame(126, 126), (120, 40))
    np.testing.assert_allclose(found.keypoints, [[120, 0, 2], [40, 40, 2], [0, 0, 0]], atol=1e-4)


def test_points_called_invisible_get_their_likeliest_place(vocab):
    category = Category(1, 1, "cat", ("nose", "tail"))
    base = vocab.coord_base
    out = completion([[base + 63, base, 41, 41]], [[base + 1, base + 1, base + 21, base + 42]])
    points = Keypoint(KeypointConfig(), vocab, (category,)).points(out, category, frame(63, 126))
    np.testing.assert_allclose(points, [[0, 126, 2], [42, 42, 1]], atol=1e-4)
    kept = Keypoint(KeypointConfig(suppress_invisible=False), vocab, (category,)).points(out, category, frame(63, 126))
    np.testing.assert_allclose(kept, [[0, 126, 2], [0, 0, 0]], atol=1e-4)


@pytest.fixture
def predictor(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Predictor(model)


IMAGE = np.random.default_rng(0).integers(0, 255, (50, 80, 3)).astype(np.uint8)


def test_a_chain_asks_about_what_was_detected_and_encodes_once(predictor, monkeypatch):
    calls = []
    encode = predictor.model.encode_with_maps
    monkeypatch.setattr(predictor.model, "encode_with_maps", lambda images: calls.append(len(images)) or encode(images))
    image = predictor.encode(IMAGE)
    prediction = predictor.predict(image, ["detection", "segmentation", "captioning"])
    assert calls == [1]
    found = predictor.detect(image)
    assert [i.box_xyxy for i in prediction.instances] == [i.box_xyxy for i in found]
    assert [i.score for i in prediction.instances] == [i.score for i in found]
    asked = [i for i in prediction.instances if i.score >= 0.05]
    assert all(i.mask_score is not None for i in asked)
    assert len(prediction.captions) == 1
    assert prediction.captions[0].text


def test_boxes_may_come_from_the_user(predictor):
    boxes = [[10, 10, 40, 30], [0, 0, 80, 50]]
    segmented = predictor.segment(IMAGE, boxes, categories=["person", "heart"])
    assert sorted(i.category.name for i in segmented) == ["heart", "person"]
    pointed = predictor.keypoints(IMAGE, boxes, categories=["person", "heart"])
    assert [i.category.name for i in pointed] == ["person"]
    assert pointed[0].keypoints.shape[1] == 3
    assert (pointed[0].keypoints[:, 0] <= 80).all()
    again = predictor.keypoints(IMAGE, pointed)
    np.testing.assert_array_equal(again[0].keypoints, pointed[0].keypoints)
    assert predictor.segment(IMAGE, []) == []
    for wrong, message in (
        ([[10, 10, 5, 30]], "x1 > x0"),
        ([[100, 10, 120, 30]], "inside the image"),
        ([[1, 2, 3]], "finite numbers"),
        ([[1, 2, float("nan"), 4]], "finite numbers"),
    ):
        with pytest.raises(InputError, match=message):
            predictor.segment(IMAGE, wrong, categories="person")
    with pytest.raises(InputError, match="need categories"):
        predictor.segment(IMAGE, boxes)
    with pytest.raises(InputError, match="did you mean 'person'"):
        predictor.segment(IMAGE, boxes, categories="persona")
    with pytest.raises(InputError, match="1 categories"):
        predictor.segment(IMAGE, boxes, categories=["person"])


def test_answers_do_not_depend_on_how_many_objects_are_asked_about_at_once(predictor, monkeypatch):
    predictor.tasks["segmentation"] = Segmentation(
        SegmentationConfig(max_points=20, num_samples=1, temperature=0),
        predictor.model.config.vocab,
        predictor.model.categories,
    )
    boxes = np.array([[x, y, x + 20, y + 15] for x in range(0, 60, 12) for y in range(0, 35, 10)], float)
    image = predictor.encode(IMAGE)
    together = predictor.segment(image, boxes, categories="person")
    monkeypatch.setattr("pix2seq.predictor.MAX_ROWS", 3)
    apart = predictor.segment(image, boxes, categories="person")
    assert [i.box_xyxy for i in together] == [i.box_xyxy for i in apart]
    for a, b in zip(together, apart, strict=True):
        assert len(a.polygons) == len(b.polygons)
        for ring_a, ring_b in zip(a.polygons, b.polygons, strict=True):
            np.testing.assert_array_equal(ring_a, ring_b)


def test_a_mirror_knows_each_class_by_its_own_skeleton():
    points = np.zeros((2, 4, 3), np.float32)
    points[..., 0] = [10, 20, 30, 40]
    points[..., 2] = 2
    target = Target(
        image=ImageRecord(1, None, 100, 50),
        boxes_xyxy=np.array([[0, 0, 50, 50]] * 2, np.float32),
        labels=np.array([1, 2]),
        areas=np.ones(2, np.float32),
        iscrowd=np.zeros(2, bool),
        annotation_ids=np.arange(2),
        segmentations=(None, None),
        keypoints=points,
    )
    orders = {1: mirror_order(("nose", "left_ear", "right_ear", "tail")), 2: mirror_order(("front", "back"), [])}
    moved = transform_target(target, Affine(1, 1).then_mirror(100), (50, 100), mirror_orders=orders)
    assert moved.keypoints[0, :, 0].tolist() == [90, 70, 80, 60]
    assert moved.keypoints[1, :, 0].tolist() == [90, 80, 70, 60]
    unknown = transform_target(target, Affine(1, 1).then_mirror(100), (50, 100), mirror_orders={1: orders[1]})
    np.testing.assert_array_equal(unknown.keypoints[0], moved.keypoints[0])
    assert not unknown.keypoints[1].any()  # which side each is on is not known
    upright = transform_target(target, Affine(1, 1), (50, 100), mirror_orders={})
    assert upright.keypoints[1, :, 0].tolist() == [10, 20, 30, 40]


def test_voted_masks_keep_their_holes(vocab, shapes):
    task = Segmentation(SegmentationConfig(num_samples=2, threshold=1.0), vocab, shapes.categories)
    base = vocab.coord_base
    outer = [base, base, base, base + 30, base + 30, base + 30, base + 30, base]
    inner = [base + 10, base + 10, base + 20, base + 10, base + 20, base + 20, base + 10, base + 20]
    # The second sample goes around the hole by a bridge.
    bridged = [*outer, base, base, *inner, *inner[:2]]
    samples = np.array([[*outer, EOS] + [0] * (len(bridged) - len(outer)), [*bridged, EOS]])
    _, rle = task.mask(samples, frame(63, 63), (63, 63))
    assert mask_utils.decode(rle)[15, 15] == 0
    assert mask_utils.decode(rle)[5, 5] == 1


def test_tasks_by_name_or_nothing(predictor):
    with pytest.raises(InputError, match="segmentaton"):
        predictor.predict(IMAGE, ["segmentaton"])
    assert predictor.predict(IMAGE, "captioning").captions
    with pytest.raises(InputError, match="no keypoints"):
        predictor.keypoints(IMAGE, [[1, 2, 30, 40]], categories="heart")
    assert predictor.segment(IMAGE, np.zeros((0, 4))) == []


def test_classes_of_several_data_sets_are_joined_by_name():
    first = (Category(1, 7, "Cat"), Category(3, 9, "dog"))
    second = (Category(1, 1, "person", ("nose",), ()), Category(2, 2, " cat "))
    third = (Category(5, 5, "dog", ("tail",), ()),)
    united = unite_categories([first, second, third])
    assert [(c.label, c.name) for c in united] == [(1, "Cat"), (3, "dog"), (4, "person")]
    assert united[1].keypoints == ("tail",)
    assert unite_categories([first]) == first
    with pytest.raises(InputError, match="different keypoints for 'Dog'"):
        unite_categories([third, (Category(1, 1, "Dog", ("paw",)),)])


def test_fine_tuning_carries_rows_over_by_name(shapes, text, vocab, tasks):
    start = new_model(shapes, text, vocab, tasks)
    old = start.categories
    renamed = (Category(1, 1, old[2].name), Category(2, 2, "unicorn"), Category(3, 3, old[0].name))
    words = WordTokenizer([*text.tokens[:3], "unicorn", *text.tokens[5:9]])
    model = build_model(start.config, renamed, words)
    fresh = model.decoder.token_embedding.weight.detach().clone()
    summary = initialize_from(model, start, "somewhere")
    assert summary == "2 of 3 classes were known by name, 7 of 8 words were known"
    ours, theirs = model.decoder.token_embedding.weight, start.decoder.token_embedding.weight
    torch.testing.assert_close(ours[101], theirs[100 + old[2].label], rtol=0, atol=0)
    torch.testing.assert_close(ours[103], theirs[100 + old[0].label], rtol=0, atol=0)
    torch.testing.assert_close(ours[102], fresh[102], rtol=0, atol=0)
    torch.testing.assert_close(ours[1000:1064], theirs[1000:1064], rtol=0, atol=0)
    torch.testing.assert_close(ours[1103], fresh[1103], rtol=0, atol=0)
    torch.testing.assert_close(ours[1104:1108], theirs[1105:1109], rtol=0, atol=0)
    torch.testing.assert_close(model.decoder.blocks[1].mlp.expand.weight, start.decoder.blocks[1].mlp.expand.weight)
    wider = build_model(
        ModelConfig(image_size=SIZE, encoder=start.config.encoder, decoder=DecoderConfig(dim=64), vocab=vocab)
    )
    with pytest.raises(InputError, match="is another model"):
        initialize_from(wider, start, "somewhere")


def test_instances_in_json(shapes):
    instance = Instance((1, 2, 4, 8), shapes.categories[0], 0.5, mask_score=0.25)
    content = json.loads(json.dumps(instance.to_json()))
    assert content["bbox"] == [1, 2, 3, 6]
    assert content["mask_score"] == 0.25
    assert "keypoint_score" not in content


def test_tasks_say_whether_someone_must_tell_what_to_look_for():
    told = {name for name in BUILT_IN if Task.needs_about.fget(get_task(name))}
    assert told == {"by_example", "by_words", "matching"}
