"""Asking by example: tokens, training pairs, joined memories, use, scores, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from boxed import boxed_target
from example_model import CONFIG, SIZE, VOCAB, untrained_model, untrained_predictor
from hypothesis import given
from hypothesis import strategies as st
from one_by_one import sums_one_by_one
from PIL import Image
from test_cli import one_line

from pix2seq import Pix2Seq
from pix2seq.cli import main
from pix2seq.data.companions import ObjectsByClass
from pix2seq.data.dataset import ClassMap
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.shards import write_shards
from pix2seq.data.loader import batches
from pix2seq.data.samples import SharedTrainingSet, TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate, measure, merge_measured
from pix2seq.examples import Example, OtherView, Readings, Sample, collate
from pix2seq.geometry.boxes import box_iou_xyxy
from pix2seq.metrics.correlation import matthews
from pix2seq.metrics.presence import Found, PresenceMetric
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.encoders.vit import VisionTransformer
from pix2seq.runtime.runner import Runner
from pix2seq.tasks.by_example import ByExample, Exam, Examples, Kind
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.request import Frame, Reference, Request
from pix2seq.tasks.shown import Shown, given_examples
from pix2seq.tokenizers.by_example import example_prompt
from pix2seq.tokenizers.slots import KINDS, OBJECT, comparison_choices, comparison_prompt, decode_list, encode_list
from pix2seq.training.initialize import initialize_from
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.step import TrainingModel
from pix2seq.types import Category, Instance
from pix2seq.vocab import EOS, NOISE

TINY = [
    "steps=4", "batch_size=3", "checkpoint_every=2", "keep_checkpoints=10", "log_every=1", "num_workers=0", "lr=1e-3",
    "eval_batch_size=4", "eval_images=4", "schedule.warmup_steps=2", "model.image_size=[64,64]",
    "model.encoder.name=vit", "model.encoder.stem=conv", "model.encoder.closeups=true", "model.encoder.dim=32",
    "model.encoder.num_layers=1", "model.encoder.num_heads=2", "model.encoder.mlp_dim=64", "model.decoder.dim=32",
    "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=64",
    "model.decoder.max_seq_len=64", "model.vocab.num_bins=32", "model.vocab.text_base=1040", "model.vocab.size=1040",
    "model.memory.references=2", "by_example.max_examples=2", "by_example.max_objects=8",
]  # fmt: skip


CUP, PEN = Category(1, 1, "cup"), Category(2, 2, "pen")


def target_of(boxes, labels, image_id, crowd=()):
    return boxed_target(boxes, labels, (100, 100), image_id=image_id, crowd=crowd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_example") / "shapes"
    write_shapes(folder, num_train=24, num_val=5, size=64, seed=3, max_objects=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def task(shapes):
    return ByExample(CONFIG, VOCAB, shapes.categories)


@pytest.fixture(scope="module")
def predictor():
    return untrained_predictor()


@pytest.fixture(scope="module")
def images(folder):
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.jpg"))[:4]]


def training_set(dataset, task, **options):
    augment = AugmentConfig(scale_min=0.9, scale_max=1.1)
    return TrainingSet(dataset, task, **{"size": SIZE, "augment": augment, "seed": 0} | options)


# Tokens


def test_tokens_worked_by_hand():
    boxes = np.array([[0, 0.5, 1, 1], [0.25, 0, 0.5, 0.75]])  # times 63: 0 31.5 63 63, 15.75 0 31.5 47.25
    one, other = [1000, 1032, 1063, 1063], [1016, 1000, 1032, 1047]
    prompt = example_prompt(15, np.array([2, 0]), boxes, VOCAB)
    assert prompt.tolist() == [15, 60, *one, 58, *other]
    assert comparison_prompt(prompt, boxes[1], VOCAB).tolist() == [15, 60, *one, 58, *other, *other]
    assert comparison_choices(range(1, 3)).tolist() == [[59, 61, NOISE, -1]]
    is_object = np.array([True, False, True, False])
    drawn = [
        encode_list(np.concatenate([boxes, boxes]), is_object, VOCAB, np.random.default_rng(seed), eos_weight=0.1)
        for seed in range(50)
    ]
    assert drawn[0].targets.tolist() == [*one, OBJECT, *other, NOISE, *one, OBJECT, *other, NOISE, EOS]
    np.testing.assert_allclose(drawn[0].weights, ([1] * 5 + [0] * 4 + [1]) * 2 + [0.1])
    read = [each.inputs[4::5] for each in drawn]
    assert {token for classes in read for token in classes.tolist()} == {OBJECT, NOISE}
    assert 0.1 < np.mean(np.array(read)[:, 0] == OBJECT) < 0.5  # the official draw includes noise twice
    assert all((each.inputs[:4] == one).all() for each in drawn)


def test_a_list_is_read_with_the_probability_of_an_object():
    ids = np.array(
        [1000, 1000, 1063, 1063, OBJECT, 1010, 1010, 1005, 1063, OBJECT, *[1016, 1000, 1032, 1047], NOISE, EOS]
    )
    best = np.full(16, OBJECT)
    found = decode_list(ids, best, np.log(np.linspace(0.01, 0.16, 16)), VOCAB)
    assert found.labels.tolist() == [1, 1, 1]
    assert found.readable.tolist() == [True, False, True]
    np.testing.assert_allclose(found.scores, [0.05, 0.1, 0.15], rtol=1e-5)


@given(st.lists(st.integers(0, 1200), max_size=40), st.data())
def test_any_ids_are_read_without_an_error(ids, data):
    best = data.draw(st.lists(st.integers(0, 1200), min_size=len(ids), max_size=len(ids)))
    found = decode_list(np.array(ids, np.int64), np.array(best, np.int64), np.zeros(len(ids)), VOCAB)
    boxes = found.boxes_yxyx[found.readable]
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert (found.labels[found.readable] >= 1).all()


# Training pairs


def test_objects_are_drawn_of_their_class_and_never_of_the_image_itself(shapes):
    objects, rng = ObjectsByClass(shapes), np.random.default_rng(0)
    labels = {int(label) for i in range(len(shapes)) for label in shapes.target(i).labels}
    assert set(objects.labels.tolist()) == labels
    drawn = {label: set() for label in labels}
    for label in labels:
        owners = {i for i in range(len(shapes)) if label in shapes.target(i).labels}
        for but in range(len(shapes)):
            for _ in range(8):
                found = objects.draw(label, rng, but_image_id=shapes.images[but].id)
                if found is None:
                    assert owners <= {but}
                    break
                assert found.image != but
                assert shapes.target(found.image).labels[found.object] == label
                drawn[label].add(tuple(found))
        everywhere = sum(int((shapes.target(i).labels == label).sum()) for i in owners)
        assert len(drawn[label]) >= 0.9 * everywhere
    assert objects.draw(10**6, rng, but_image_id=0) is None


def test_a_crowd_is_no_example(shapes):
    crowds = np.ones_like(shapes.annotations.iscrowd)
    dataset = replace(shapes, annotations=replace(shapes.annotations, iscrowd=crowds))
    assert not len(ObjectsByClass(dataset).labels)


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_as_many_pairs_as_set_have_what_is_asked_for(shapes, share):
    task = ByExample(replace(CONFIG, present_share=share, same_share=0.0), VOCAB, shapes.categories)
    objects, rng = ObjectsByClass(shapes), np.random.default_rng(0)
    present = []
    for i in [*range(len(shapes))] * 20:
        target = shapes.target(i)
        for image, number in task.companions(target, objects, rng):
            present.append(shapes.target(image).labels[number] in target.labels)
    assert len(present) > 1000
    assert np.mean(present) == pytest.approx(share, abs=0.05)


def test_sequences_list_all_objects_and_compare_some_with_examples(shapes, task):
    samples = training_set(shapes, task, augment=AugmentConfig(enabled=False))
    numbers = {np.asarray(Image.open(each.path).convert("RGB")).tobytes(): i for i, each in enumerate(shapes.images)}
    seen = {"like": 0, "unlike": 0, "several": 0, "slots": set(), "two": 0}
    for index in range(len(samples)):
        for epoch in range(3):
            sample = samples[epoch, index]
            target = shapes.target(int(samples.index[index, 0]))
            first, *comparisons = sample.examples["by_example"]
            listed = sorted(np.rint(each.box_xyxy).tolist() for each in task.shown(first, SIZE))
            expected = sorted(np.rint(target.boxes_xyxy).tolist())
            assert np.abs(np.array(listed) - np.array(expected)).max() <= 1
            assert (
                len(first.targets) == 5 * max(len(expected) + CONFIG.noise_objects, 0) + 1 <= 5 * CONFIG.max_objects + 1
            )
            assert first.prompt.tolist() == [15]
            assert first.closeup is None
            assert comparisons
            for example in comparisons:
                assert (len(example.prompt) - 5) // 5 == len(example.others) <= CONFIG.max_examples
                slots = example.prompt[1:-4:5].tolist()
                labels = [companion_label(shapes, numbers, sample, view) for view in example.others]
                meaning = dict(zip(slots, labels, strict=True))
                assert len(set(meaning.values())) == len(meaning)  # two slots never mean the same
                own = label_at(target, example.closeup)
                expected = [slot for slot, label in meaning.items() if label == own] or [NOISE]
                assert example.targets.tolist() == expected
                low, high, *rest = example.choices[0].tolist()
                assert (low, high, rest) == (min(meaning), max(meaning) + 1, [NOISE, -1])
                assert example.weights.tolist() == [CONFIG.comparison_weight]
                shown = task.shown(example, SIZE)
                assert len(shown) == (expected != [NOISE])
                for each in shown:
                    boxes = target.boxes_xyxy[target.labels == own]
                    assert box_iou_xyxy(np.array([each.box_xyxy]), boxes).max() > 0.6
                seen["like" if shown else "unlike"] += 1
                seen["several"] += len(example.others) > 1
                seen["two"] += len(meaning) > 1
                seen["slots"] |= set(meaning)
    assert seen["slots"] == set(KINDS)
    assert min(seen["several"], seen["two"]) > 10, seen
    assert 0.25 < seen["like"] / (seen["like"] + seen["unlike"]) < 0.6, seen


def test_sequences_about_an_object_share_its_memory(shapes, task):
    samples = training_set(shapes, task, augment=AugmentConfig(enabled=False))
    batch = collate([samples[0, index] for index in range(6)], ["by_example"])
    targets = [shapes.target(int(samples.index[index, 0])) for index in range(6)]
    assert len(batch.closeups) <= sum(len(target.labels) for target in targets) + 6 * CONFIG.max_examples
    assert len(batch.lengths) > len(batch.closeups)


def label_at(target, closeup):
    """The class of the object in the middle of a closeup of the image (64 x 64 pixels)."""
    middle = (closeup[:2] + closeup[2:])[::-1] / 2 * 64
    centres = (target.boxes_xyxy[:, :2] + target.boxes_xyxy[:, 2:]) / 2
    return int(target.labels[np.abs(centres - middle).sum(axis=1).argmin()])


def companion_label(shapes, numbers, sample, view):
    """The class of a companion's object; the image is known by its pixels."""
    number = numbers[sample.companions["by_example"][view.companion].tobytes()]
    return label_at(shapes.target(number), view.closeup)


def test_a_sample_is_a_function_of_seed_epoch_and_index(shapes, task):
    first, second = (training_set(shapes, task) for _ in range(2))
    for key in ((0, 3), (1, 3), (0, 4)):
        one = collate([first[key]], ["by_example"])
        _ = second[0, 7]  # what came before does not count
        other = collate([second[key]], ["by_example"])
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.readings.parts, other.readings.parts)
    assert not torch.equal(collate([first[0, 3]], ["by_example"]).tokens, collate([first[1, 3]], ["by_example"]).tokens)


def test_other_tasks_of_a_shared_image_go_on_as_they_are(shapes, task):
    detection = Detection(DetectionConfig(max_objects=6, noise_objects=2), VOCAB, shapes.categories)
    options = {"size": SIZE, "augment": AugmentConfig(scale_min=0.9, scale_max=1.1), "seed": 0}
    alone, together = (SharedTrainingSet(shapes, some, **options) for some in ([detection], [detection, task]))
    with_comparisons = 0
    for index in range(len(alone)):
        one, both = alone[0, index], together[0, index]
        np.testing.assert_array_equal(one.image, both.image)
        (expected,), (found,) = one.examples["detection"], both.examples["detection"]
        np.testing.assert_array_equal(expected.inputs, found.inputs)
        assert set(both.companions) <= {"by_example"}
        with_comparisons += len(both.examples["by_example"]) > 1
    assert with_comparisons > 0.9 * len(alone)
    batch = collate([together[0, i] for i in range(3)], ["detection", "by_example"])
    assert (batch.memory_index.diff() >= 0).all()
    assert (batch.readings.parts[:, 1:] < 0).all(1).any()  # detection reads its image alone


def test_batches_are_the_same_from_workers(shapes, task):
    def some(num_workers):
        stream = batches([(training_set(shapes, task), 3)], num_workers=num_workers, start=1)
        found = [next(stream) for _ in range(3)]
        if hasattr(stream, "close"):
            stream.close()
        return found

    for one, other in zip(some(0), some(2), strict=True):
        for name in ("images", "tokens", "memory_index", "closeups", "targets", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.readings.memories, other.readings.memories)
        assert torch.equal(one.readings.places, other.readings.places)


def test_an_unreadable_companion_is_left_out(shapes, task, monkeypatch):
    samples = training_set(shapes, task, max_bad_share=1.0)
    read, own = samples._reader.read_image, None

    def only_own(record):
        if record.id != own:
            raise InputError("it is damaged")
        return read(record)

    monkeypatch.setattr(samples._reader, "read_image", only_own)
    own = shapes.images[int(samples.index[0, 0])].id
    with pytest.warns(UserWarning, match="it is damaged"):
        sample = samples[0, 0]
    assert not sample.companions
    assert len(sample.examples["by_example"]) == 1  # the list


def test_companions_get_the_labels_of_the_model_too():
    shown = target_of([(0, 0, 9, 9)], [2], 2)
    target = replace(target_of([(0, 0, 9, 9), (3, 3, 9, 9)], [1, 2], 1), companions=(shown,))
    mapped = ClassMap([CUP, PEN], [Category(1, 1, "pen"), Category(2, 2, "cup")]).to_model(target)
    assert mapped.labels.tolist() == [2, 1]
    assert mapped.companions[0].labels.tolist() == [1]


def test_a_task_without_classes_takes_more_of_them_than_there_are_ids():
    many = [Category(label, label, f"thing {label}") for label in range(1, 1392)]
    assert len(ByExample(CONFIG, VOCAB, many).categories) == 1391
    with pytest.raises(InputError, match="1391 classes need ids"):
        Detection(DetectionConfig(), VOCAB, many)


# Joined memories in training


def sample_with_views(rng, views, image_id):
    ids = rng.integers(1, 1100, (len(views), 8))
    examples = [
        Example(row[:3], row[3:], row[3:], np.ones(5, np.float32), others=each)
        for row, each in zip(ids, views, strict=True)
    ]
    pixels = rng.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    return Sample(pixels[0], {"by_example": examples}, image_id, {"by_example": list(pixels[1:])})


def test_a_batch_that_joins_memories_is_each_sequence_alone():
    model, rng = untrained_model(), np.random.default_rng(0)
    frame = np.array([0.1, 0.2, 0.7, 0.8], np.float32)
    views = [
        (),
        (OtherView(0),),
        (OtherView(1, frame), OtherView(None), OtherView(0)),
        (OtherView(0, np.array([0, 0, 0.5, 0.5], np.float32)), OtherView(1, frame)),
    ]
    samples = [sample_with_views(rng, views, 0), sample_with_views(rng, views[::-1], 1)]
    batch = collate(samples, ["by_example"])
    assert len(batch.images) == 6
    results = []
    for together in (True, False):
        model.zero_grad()
        total = (
            CrossEntropy()(model, batch)["by_example"][0] if together else sums_one_by_one(model, samples)["by_example"]
        )
        total.backward()
        results.append((total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert results[0][1]["reference_embedding"].abs().sum() > 0
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=1e-4)
    assert abs(float(results[0][0] - results[1][0])) < 1e-5 * abs(float(results[1][0]))


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True))
def test_parts_are_memories_at_places(readings):
    found = Readings.of(readings)
    pairs = list(zip(found.memories.tolist(), found.places.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    for reading, parts in zip(readings, found.parts.tolist(), strict=True):
        assert [pairs[part] for part in parts if part >= 0] == [(memory, place) for place, memory in enumerate(reading)]
        assert parts[len(reading) :] == [-1] * (len(parts) - len(reading))


def test_a_batch_of_one_memory_each_has_no_readings(shapes):
    detection = Detection(DetectionConfig(max_objects=6, noise_objects=2), VOCAB, shapes.categories)
    batch = collate([training_set(shapes, detection)[0, i] for i in range(3)], ["detection"])
    assert batch.readings is None


def test_every_step_has_a_gradient_for_the_places(shapes):
    detection = Detection(DetectionConfig(max_objects=6, noise_objects=2), VOCAB, shapes.categories)
    model = untrained_model().train()
    batch = collate([training_set(shapes, detection)[0, i] for i in range(3)], ["detection"])
    TrainingModel(model, CrossEntropy()).backward(batch, torch.ones(1), last=True)
    assert model.reference_embedding.grad.tolist() == [[0.0] * 32] * 3  # ranks wait for one of every weight


def test_a_model_without_places_starts_one_with_them(tmp_path):
    plain, other = untrained_model(references=0, seed=1), untrained_model(references=2)
    before = other.reference_embedding.clone()
    assert "reference_embedding" not in plain.state_dict()
    initialize_from(other, plain, "plain")
    assert torch.equal(other.reference_embedding, before)
    assert torch.equal(other.decoder.blocks[0].mlp.expand.weight, plain.decoder.blocks[0].mlp.expand.weight)
    more = untrained_model(references=3, seed=2)
    third = more.reference_embedding[2].clone()
    initialize_from(more, other, "other")
    assert torch.equal(more.reference_embedding, torch.cat([other.reference_embedding, third[None]]))
    initialize_from(plain, other, "other")  # and back
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(Pix2Seq.from_pretrained(tmp_path / "saved").reference_embedding, other.reference_embedding)


# Asking


def slowly(model, memory, prompt, generation):
    """Continue a prompt greedily, one full pass for each token."""
    ids = torch.from_numpy(prompt)[None]
    for _ in range(generation.max_new_tokens):
        with torch.no_grad():
            logits = model.decoder.logits(model.decoder(ids, memory))[0, -1]
        allowed = generation.grammar.allowed(ids[:, len(prompt) :])
        logits[allowed.forbids(torch.arange(len(logits)))[0]] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        if int(ids[0, -1]) == EOS:
            break
    return ids[0, len(prompt) :].numpy()


def read_by(model, closeup, image, frame):
    """The memory of an image, or of a frame of it."""
    if not closeup:
        return image.memory
    corners = torch.from_numpy(image.frame().to_input_yxyx(frame.xyxy[None])).float()
    with torch.no_grad():
        return model.look_closer(tuple(each[None] for each in image.maps), corners, [0])[0]


@pytest.mark.parametrize("closeup", [True, False])
def test_answers_are_those_of_full_passes(images, closeup):
    """A list by full passes over the image, and comparisons over the joined memories, one at a time."""
    predictor = untrained_predictor(config=replace(CONFIG, closeup=closeup, temperature=0.0))
    model, asked = predictor.model, predictor.tasks["by_example"]
    query, *others = predictor.encode_batch(images)
    whole, marks = query.frame(), model.reference_embedding.detach()
    for boxes in ([(3, 3, 40, 30)], [(3, 3, 40, 30), (10, 8, 60, 50)]):
        kinds = ("cup", "pen")[: len(boxes)]
        about = Examples(tuple(Shown(*each) for each in zip(others, boxes, kinds, strict=False)))
        (request,) = asked.requests(query, about)
        (completion,) = predictor._complete(asked, [query], [[request]], 0)
        expected = slowly(model, query.memory[None], request.prompt, request.generation)
        assert completion.tokens[0][: len(expected)].tolist() == expected.tolist()

        prompt = [15]
        examples = []
        for number, shown in enumerate(about.shown):
            frame = shown.image.frame().around(np.array(shown.box_xyxy), 0.25)
            within = frame if closeup else shown.image.frame()
            box = within.to_input_yxyx(np.array([shown.box_xyxy], np.float64))[0]
            prompt += [KINDS[number], *VOCAB.coord_ids(box)]
            examples.append(read_by(model, closeup, shown.image, frame) + marks[number])
        found = {each.box_xyxy: each for each in predictor.find(query, like=as_given(about), threshold=0.0)}
        assert found
        assert listed_boxes(expected, whole) >= set(found)
        compared = asked.follow_up(query, [request], [completion])
        assert len(compared) == len(found)
        for each in compared:
            box = np.array(each.subject.listed.box_xyxy)
            frame = whole.around(box, 0.25)
            at = (frame if closeup else whole).to_input_yxyx(box[None])[0]
            tokens = torch.tensor([[*prompt, *VOCAB.coord_ids(at)]])
            memory = torch.cat([read_by(model, closeup, query, frame), *examples])[None]
            with torch.no_grad():
                logits = model.decoder.logits(model.decoder(tokens, memory))[0, -1]
            shares = logits[[*KINDS[: len(boxes)], NOISE]].softmax(0)[:-1]
            answer = found[each.subject.listed.box_xyxy]
            assert answer.category.name == kinds[int(shares.argmax())]
            assert answer.score == pytest.approx(each.subject.listed.score * float(shares.max()), abs=1e-4)


def as_given(about):
    return {shown.name: (shown.image, shown.box_xyxy) for shown in about.shown}


def listed_boxes(ids, frame):
    """The boxes of a list in pixels of an image of 64 x 64."""
    groups = ids[: len(ids) // 5 * 5].reshape(-1, 5)
    corners = [frame.to_image_xy(VOCAB.coords(group[:4]).reshape(2, 2)).ravel() for group in groups]
    return {tuple(np.clip(box, 0, 64).tolist()) for box in corners}


def listing(ids, scores):
    """A list as the model says it, with the probability of an object at each token."""
    ids, logprobs = np.array([ids]), np.log([scores])
    return Completion(ids, np.zeros_like(logprobs), np.full_like(ids, OBJECT), logprobs, np.zeros(1, np.bool_))


def test_an_object_that_is_listed_twice_is_compared_once(predictor, images):
    task, image = predictor.tasks["by_example"], predictor.encode(images[0])
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.1, 0.12, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9], [0.2, 0.2, 0.4, 0.4]]
    ids = np.concatenate([[*VOCAB.coord_ids(np.array(box)), OBJECT] for box in boxes] + [[EOS]])
    scores = np.repeat([0.5, 0.9, 0.8, 0.05], 5)  # the last one is no object
    completion = Completion(
        ids[None],
        np.zeros((1, 21)),
        np.full((1, 21), OBJECT),
        np.log(np.append(scores, 1))[None],
        np.zeros(1, np.bool_),
    )
    about = Examples((Shown(image, (3, 3, 40, 30)),))
    compared = task.follow_up(image, task.requests(image, about), [completion])
    assert [each.subject.listed.score for each in compared] == pytest.approx([0.9, 0.8])
    assert task.follow_up(image, compared, [completion] * 2) == []
    parts = task.parts(image, task.requests(image, about)[0], completion)
    assert [(start, stop) for start, stop, _ in parts] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert parts[1][2].score == pytest.approx(0.9)


def test_an_image_without_objects_has_none_like_the_example(predictor, images):
    task, image = predictor.tasks["by_example"], predictor.encode(images[0])
    requests = task.requests(image, Examples((Shown(image, (3, 3, 40, 30)),)))
    nothing = Completion(
        np.array([[EOS]]), np.zeros((1, 1)), np.zeros((1, 1), int), np.zeros((1, 1)), np.zeros(1, np.bool_)
    )
    assert task.follow_up(image, requests, [nothing]) == []
    assert task.answers(image, requests, [nothing]) == []
    kinds = (Kind(7, Shown(image, (3, 3, 40, 30))), Kind(9, Shown(image, (5, 5, 30, 30)), is_unseen=True))
    exam = task.requests(image, Exam(kinds))
    assert task.answers(image, exam, [nothing]) == [Found(7, ()), Found(9, (), is_unseen=True)]


def test_an_answer_does_not_depend_on_what_else_is_asked(predictor, images):
    first, second, third, fourth = predictor.encode_batch(images)
    questions = [
        (first, Examples((Shown(second, (3, 3, 40, 30)),))),
        (first, Examples((Shown(third, (3, 3, 40, 30)),))),
        (second, Examples((Shown(second, (3, 3, 40, 30)), Shown(fourth, (5, 5, 20, 20), "other")))),
        (third, Examples((Shown(second, (3, 3, 40, 30)), Shown(first, (5, 5, 20, 20)), Shown(first, (30, 9, 60, 50))))),
    ]

    def ask(some):
        images, abouts = zip(*some, strict=True)
        return predictor.ask("by_example", images, abouts, seed=3, min_score=0.0)

    together = ask(questions)
    for question, found in zip(questions, together, strict=True):
        (alone,) = ask([question])
        assert [(each.box_xyxy, each.category) for each in alone] == [(each.box_xyxy, each.category) for each in found]
        np.testing.assert_allclose([each.score for each in alone], [each.score for each in found], atol=1e-5)
    assert together[0] != together[1]  # of another example


def test_an_image_is_encoded_once_however_often_it_is_an_example(predictor, images, monkeypatch):
    counted = []
    original = VisionTransformer.with_maps
    monkeypatch.setattr(VisionTransformer, "with_maps", lambda self, x: counted.append(len(x)) or original(self, x))
    query, held = predictor.encode(images[0]), predictor.encode(images[1])
    assert counted == [1, 1]
    for box in ((3, 3, 40, 30), (10, 8, 60, 50)):
        predictor.find(query, like=(held, box))
    predictor.find(query, like=(query, (3, 3, 40, 30)))
    assert counted == [1, 1]
    like = (images[2], (3, 3, 40, 30))
    predictor.find(query, like=[like, (images[2], (8, 8, 20, 20))])
    assert counted == [1, 1, 1]
    about = [given_examples(like)] * 2
    predictor.ask("by_example", [query, held], about)
    assert counted == [1, 1, 1, 1]


def test_kinds_have_the_names_that_a_user_gives(predictor, images):
    image, other = predictor.encode_batch(images[:2])
    one = predictor.find(image, like=(other, (3, 3, 40, 30)), threshold=0.0)
    assert {each.category.name for each in one} == {"example"}
    like = {"cup": (other, (3, 3, 40, 30)), "pen": [(other, (8, 8, 20, 20)), (image, (5, 5, 30, 30))]}
    two = predictor.find(image, like=like, threshold=0.0)
    assert {each.category.name for each in two} <= {"cup", "pen"}
    assert [each.score for each in two] == sorted((each.score for each in two), reverse=True)
    assert all(each.score >= 0.5 for each in predictor.find(image, like=like))
    assert predictor.find(image, like=like, threshold=0.0, seed=1).size == (64, 64)


def test_another_example_is_another_question(predictor, images):
    image, other, third = predictor.encode_batch(images[:3])
    frame = Frame(np.zeros(2), np.full(2, 30.0))
    generation = GenerationConfig(4)
    some = [
        Request(np.array([15, 57]), generation, references=references)
        for references in (
            (),
            (Reference(other),),
            (Reference(third),),
            (Reference(other, frame),),
            (Reference(other), Reference(third)),
            (Reference(third), Reference(other)),
        )
    ]
    assert (
        len({request.random_seed(0) for request in some}) == len({request.memory_key for request in some}) == len(some)
    )
    again = replace(other)  # the same pixels, encoded elsewhere
    assert some[1].random_seed(0) == replace(some[1], references=(Reference(again),)).random_seed(0)
    assert image.checksum != other.checksum


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (None, "give what to look for, as examples or in words"),
        ([], "give one, a list of them"),
        (3, "give one, a list of them"),
        ({"": ("cup.jpg", (0, 0, 1, 1))}, "named by text"),
        ([("cup.jpg",)], r"an example is \(image, box or polygon"),
        (("cup.jpg", (0, 0, 1)), "four numbers"),
        (("cup.jpg", (0, 0, "x", 1)), "four numbers"),
        (("cup.jpg", (0, 0, float("nan"), 1)), "four numbers"),
        (("nowhere.jpg", (0, 0, 1, 1)), "nowhere.jpg"),
        ((np.zeros((9, 9, 3), np.uint8), (5, 5, 5, 8)), "x1 > x0 and y1 > y0, inside its image of 9 x 9"),
        ((np.zeros((9, 9, 3), np.uint8), (20, 20, 30, 30)), "inside its image of 9 x 9"),
        ([(np.zeros((9, 9, 3), np.uint8), (1, 1, 5, 8))] * 4, "4 examples were given, but the model reads at most 3"),
    ],
)
def test_what_is_no_example_is_refused_in_a_line(predictor, images, like, message):
    with pytest.raises(InputError, match=message):
        predictor.find(images[0], like=like)


def test_asking_without_an_example_is_refused(predictor, images):
    with pytest.raises(InputError, match="asked by examples"):
        predictor.ask("by_example", [images[0]])
    with pytest.raises(InputError, match="asked by examples"):
        predictor.ask("by_example", [images[0]], ["cup"])
    with pytest.raises(InputError, match="places for 3; ask for fewer"):
        predictor.configure(max_examples=4)


# Scores


def found(label, *scored):
    return Found(label, tuple(Instance(box, Category(1, 1, "asked"), score) for box, score in scored))


def test_scores_worked_by_hand():
    box, far = (0.0, 0.0, 20.0, 20.0), (60.0, 60.0, 90.0, 90.0)
    metric, other = PresenceMetric([CUP, PEN], 0.5), PresenceMetric([CUP, PEN], 0.5)
    # One cup, found, and one pen, missed.
    metric.add(target_of([box, far], [1, 2], 1), [found(1, (box, 0.9), (far, 0.2)), found(2, (far, 0.4))])
    # No pen, one found; the cup is not asked for, so that it is not missed.
    other.add(target_of([box], [1], 2), [found(2, (far, 0.8))])
    # A crowd of cups says nothing of how many there are.
    other.add(target_of([box], [1], 3, crowd=[0]), [found(1, (box, 0.9)), found(2)])
    metric.merge(other)
    scores = metric.result().metrics
    assert metric.all.counts == [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert scores["presence_MCC"] == pytest.approx(0.0)  # one each of right, missed, false and rightly none
    assert scores["counting_error"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert scores["empty_where_absent"] == pytest.approx(0.5)
    # Cups: the only one first: 1. Pens: the false one (0.8) before the right one (0.4): precision 0.5.
    assert scores["AP50"] == pytest.approx((1 + 0.5) / 2, abs=1e-6)


def test_kinds_that_training_left_out_are_scored_apart():
    box, far = (0.0, 0.0, 20.0, 20.0), (60.0, 60.0, 90.0, 90.0)
    metric, other = PresenceMetric([CUP, PEN], 0.5), PresenceMetric([CUP, PEN], 0.5)
    metric.add(target_of([box, far], [1, 2], 1), [found(1, (box, 0.9)), replace(found(2, (box, 0.9)), is_unseen=True)])
    other.add(target_of([box], [1], 2), [replace(found(2), is_unseen=True)])
    metric.merge(other)
    scores = metric.result().metrics
    assert scores["seen/AP50"] == pytest.approx(1)
    assert scores["unseen/AP50"] == 0
    assert scores["AP50"] == pytest.approx(0.5)
    assert scores["unseen/presence_MCC"] == pytest.approx(
        1
    )  # "there is one" and "there is none" are right, wherever it was found
    assert scores["unseen/counting_error"] == 0
    assert scores["seen/empty_where_absent"] is None


def test_matthews_correlation_by_its_formula():
    true = np.array([1] * 6 + [0] * 5, bool)
    said = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    hits, missed, false, rest = 4, 2, 1, 4
    expected = (hits * rest - false * missed) / np.sqrt(
        (hits + false) * (hits + missed) * (rest + false) * (rest + missed)
    )
    assert matthews(true, said) == pytest.approx(expected)
    assert matthews(true, true) == 1
    assert matthews(true, ~true) == -1
    assert matthews(true, np.ones_like(true)) is None
    assert matthews(true[:0], true[:0]) is None


def test_nothing_asked_scores_nothing():
    assert set(PresenceMetric([CUP], 0.5).result().metrics.values()) == {None}


def test_evaluation_asks_by_objects_of_other_images_and_is_the_same_again(predictor, shapes):
    asked = []

    def observe(task, question, target, image, answers, categories):
        asked.append((target.image.id, tuple((each.label, each.label in target.labels) for each in answers)))

    first = evaluate(predictor, shapes, ["by_example"], limit=12, batch_size=5, observe=observe)
    second = evaluate(predictor, shapes, ["by_example"], limit=12, batch_size=12)
    assert first.metrics == pytest.approx(second.metrics, abs=1e-6, nan_ok=True)
    present = [is_there for _, some in asked for _, is_there in some]
    assert 0.3 < np.mean(present) < 0.7
    assert len(asked) == 12
    parts = [measure(predictor, shapes, ["by_example"], part) for part in (range(5), range(5, 12))]
    merged = merge_measured(parts)["by_example", ""].result().metrics
    assert {f"by_example/{name}": value for name, value in merged.items()} == pytest.approx(first.metrics, abs=1e-6)


# The command line


def train(folder, out, *more):
    two = ["--task", "by_example,detection", "detection.max_objects=6", "detection.noise_objects=2"]
    return main(["train", *two, f"data={folder}", f"out={out}", *TINY, *more])


@pytest.fixture(scope="module")
def run(folder):
    out = folder.parent / "run"
    assert train(folder, out) == 0
    return out


def test_a_resumed_run_is_the_unbroken_one(folder, run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints/step-00000004")
    assert train(folder, out, "--resume", "auto") == 0
    one, other = (Pix2Seq.from_pretrained(each / "checkpoints/step-00000004").state_dict() for each in (run, out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_predict_takes_examples(folder, run, tmp_path, capsys):
    first, second, *_ = sorted(folder.rglob("*.jpg"))
    command = ["predict", str(first), "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--min-score", "0"]
    assert main([*command, "--like", f"{second}:3,3,40,30", "--like", f"{second}:10,8,60,50"]) == 0
    content = json.loads((tmp_path / "out" / f"{first.stem}.json").read_text())
    assert content["instances"] == []  # nothing else was asked
    assert {each["category"] for each in content["by_example"]} <= {"example"}
    assert main([*command, "--overwrite"]) == 0  # without an example, other tasks are asked
    assert "by_example" not in json.loads((tmp_path / "out" / f"{first.stem}.json").read_text())
    capsys.readouterr()
    for wrong, message in (
        (["--like", "3,3,40,30"], "expected examples as"),
        (["--like", f"{second}:3,3,40"], "expected examples as"),
        (["--like", f"{tmp_path / 'no.jpg'}:3,3,40,30"], "no.jpg"),
        (["--like", f"{second}:3,3,3,30"], "x1 > x0"),
        (["--like", f"{second}:3,3,40,30", "--about", "cup"], "--like is a form of --about"),
        (["--like", f"{second}:3,3,40,30", "--task", "detection"], "no task that finds objects by examples"),
    ):
        assert main([*command, *wrong, "--overwrite"]) == 2
        assert message in one_line(capsys)


def test_a_changed_example_is_asked_again(folder, run, tmp_path, capsys):
    first, second, *_ = sorted(folder.rglob("*.jpg"))
    example = tmp_path / "example.png"
    Image.open(second).save(example)
    command = ["predict", str(first), "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--resume"]
    command += ["--like", f"{example}:3,3,40,30"]
    assert main(command) == 0
    assert main(command) == 0
    assert "1 of 1 files are done" in capsys.readouterr().err
    Image.open(second).rotate(90).save(example)
    assert main(command) == 0
    assert "0 of 1 files are done" in capsys.readouterr().err


def test_training_refuses_what_examples_cannot_have(folder, tmp_path, capsys):
    write_shards(read_coco(folder, "train"), tmp_path / "shards")
    command = ["train", "--task", "by_example", f"out={tmp_path / 'run'}", *TINY]
    assert main([*command, f"data={folder}", "model.memory.references=1"]) == 2
    assert "reads up to 2 memories beside the first, but the model has places for 1" in one_line(capsys)
    assert main([*command, f"data={tmp_path / 'shards'}", f"val_data={folder}"]) == 2
    assert "shards, which are read in order" in one_line(capsys)


def test_an_exported_model_says_that_it_cannot(predictor, images):
    image = predictor.encode(images[0])
    asked = predictor.tasks["by_example"]
    first = asked.requests(image, Examples((Shown(image, (3, 3, 40, 30)),)))
    requests = asked.follow_up(image, first, predictor._complete(asked, [image], [first], 0))
    with pytest.raises(InputError, match="several memories at once, which an exported model cannot"):
        Runner.__new__(Runner)._complete(asked, image, requests, 0)
