"""The task of matching: what is asked and learned, one-word changes, probabilities, and the scores of both."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_settings import TINY

from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.samples import TrainingSet
from pix2seq.data.shapes.captions import captions
from pix2seq.data.shapes.scene import CLASS_NAMES, Figure, make_scene
from pix2seq.data.shapes.truth import is_true
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.metrics.sentences import Examined, SentenceMetric, Statement, auroc, best, recalls
from pix2seq.model.decoding.completion import Completion
from pix2seq.predictor import Predictor
from pix2seq.tasks.matching import Matching, MatchingConfig
from pix2seq.tasks.request import EncodedImage
from pix2seq.tasks.word_changes import KINDS, WordChanges, plural
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Category, ImageRecord, Target
from pix2seq.vocab import NO, YES, Vocab

SIZE = 48
CATEGORIES = [Category(label, label, name) for label, name in enumerate(["cat", "dog", "bus", "person"], start=1)]
BOOKS = ["A cat left of two dogs.", "Three buses and a person in red.", "An orange cat.", "A blue dog at the top."]


def changes(*, known=lambda word: True):
    return WordChanges(["cat", "dog", "bus", "oval", "person", "orange"], known)


def all_draws(sentence, kind, **options):
    found = {changes().draw(sentence, kind, np.random.default_rng(seed), **options) for seed in range(400)}
    return found - {None}


def test_one_word_is_changed_for_another_of_its_kind():
    assert all_draws("A cat left of a dog", "side") == {"A cat right of a dog"}
    assert all_draws("At the top of two buses", "side") == {"At the bottom of two buses"}
    assert all_draws("Two cats", "number") == {f"{n} cats" for n in "Three Four Five Six Seven Eight Nine Ten".split()}
    assert all_draws("Two cats", "class") == {"Two dogs", "Two buses", "Two ovals"}
    assert all_draws("A cat", "class") == {"A dog", "A bus", "An oval"}
    assert all_draws("An oval", "class", avoid=["cat"]) == {"A dog", "A bus"}
    assert "an orange bus" in all_draws("a red bus", "colour")
    assert "A red bus" in all_draws("An orange bus", "colour")
    assert all_draws("a gray bus", "colour").isdisjoint({"a grey bus", "a gray bus"})


def test_kinds_are_those_of_words_that_can_be_changed():
    assert changes().kinds("Two red cats on the left") == ["class", "colour", "number", "side"] == list(KINDS)
    assert changes().kinds("A person stands there") == []
    assert changes().kinds("One catalogue, bright and topmost") == []
    assert changes(known=lambda word: word in ("cat", "red")).kinds("A red cat") == []  # no other word is known
    assert changes().draw("A person", "class", np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("bus", "buses"), ("cross", "crosses"), ("day", "days"), ("city", "cities"), ("star", "stars")],
)
def test_plurals(noun, expected):
    assert plural(noun) == expected


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_a_change_keeps_all_other_words(seed, kind):
    rng = np.random.default_rng(seed)
    words = WordChanges(CLASS_NAMES, lambda word: True)
    for text in captions(make_scene(rng, SIZE, 3), rng):
        changed = words.draw(text, kind, rng)
        assert (changed is not None) == (kind in words.kinds(text))
        if changed is None:
            continue
        pairs = list(zip(text.lower().split(), changed.lower().split(), strict=True))
        different = [pair for pair in pairs if pair[0] != pair[1] and not set(pair) <= {"a", "an"}]
        assert len(different) == 1, (text, changed)
        assert changed[0].isupper()


# Examples


def text_of(*sentences):
    return WordTokenizer.build([*sentences, *BOOKS])


def matching(text, categories=CATEGORIES, sentences=BOOKS, **config):
    task = Matching(
        MatchingConfig(max_tokens=30, **config),
        Vocab(num_bins=64, text_base=1100, size=1100).with_text(text.size),
        categories,
        text,
    )
    return task.with_data(sentences, categories)


def plain_target(captions, labels=(1,)):
    """An annotated image of which only the captions say what is true."""
    count = len(labels)
    return Target(
        ImageRecord(7, Path("a.png"), SIZE, SIZE),
        np.tile(np.float32([4, 4, 20, 20]), (count, 1)),
        np.array(labels),
        np.full(count, 256, np.float32),
        np.zeros(count, np.bool_),
        np.arange(count),
        (None,) * count,
        np.zeros((count, 0, 3), np.float32),
        captions=tuple(captions),
    )


def read(task, examples):
    """The sentences of examples, each with whether it is said to be true and its weight."""
    found = []
    for example in examples:
        assert example.prompt[0] == 17
        assert example.prompt[-1] == task.vocab.text_base + task.text.eos_id
        assert example.targets.tolist() in ([YES], [NO])
        text = task.text.decode((example.prompt[1:] - task.vocab.text_base).tolist())
        found.append((text, bool(example.targets[0] == YES), float(example.weights[0])))
    return found


def test_an_image_teaches_true_and_false_sentences_of_equal_weight():
    task = matching(text_of(), num_true=2, num_others=1, num_changed=3)
    own = ("A cat left of two dogs.", "An orange cat.")
    for seed in range(50):
        examples = task.examples(plain_target(own, (1, 2)), (SIZE, SIZE), np.random.default_rng(seed))
        found = read(task, examples)
        true = [text for text, is_true, _ in found if is_true]
        false = [text for text, is_true, _ in found if not is_true]
        assert sorted(true) == sorted(text.lower() for text in own)
        assert len(false) == 4
        assert set(false).isdisjoint(true)
        assert sum(weight for _, is_true, weight in found if not is_true) == pytest.approx(2)
        assert {weight for _, is_true, weight in found if is_true} == {1}
        others = [text for text in false if text in [each.lower() for each in BOOKS]]
        assert len(others) == 1
        assert not any("a dog" in text or "cats" in text for text in false if text not in others)  # the image has both
        sentences = [example.sentence for example in examples]
        assert [each is not None for each in sentences] == [is_true for _, is_true, _ in found]
        for example in examples[:2]:
            assert example.sentence.tolist() == example.prompt[1:].tolist()


def test_an_image_without_true_sentences_teaches_nothing():
    assert matching(text_of()).examples(plain_target(()), (SIZE, SIZE), np.random.default_rng(0)) == []


def test_an_image_whose_sentences_all_others_share_has_no_false_ones():
    task = matching(text_of(), sentences=["A person."], num_others=2, num_changed=1)
    found = read(task, task.examples(plain_target(["a person."]), (SIZE, SIZE), np.random.default_rng(0)))
    assert found == [("a person.", True, 1)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Forty images of one to five figures, with the figures of each as they were annotated."""
    from pix2seq.data.shapes import write_shapes

    folder = tmp_path_factory.mktemp("world")
    write_shapes(folder, num_train=40, num_val=10, size=SIZE, seed=4, max_objects=5, workers=1)
    return folder


def figures_by_id(folder, split):
    """The figures of each image from the data set's own JSON, in its pixels."""
    content = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {image["id"]: [] for image in content["images"]}
    for each in content["annotations"]:
        x, y, w, h = each["bbox"]
        box = (x, y, x + w, y + h)
        found[each["image_id"]].append(Figure(names[each["category_id"]], each["colour"], "", box, area=each["area"]))
    return found


def mirrored(figures):
    return [
        replace(f, box_xyxy=(SIZE - f.box_xyxy[2], f.box_xyxy[1], SIZE - f.box_xyxy[0], f.box_xyxy[3])) for f in figures
    ]


@pytest.mark.parametrize(("scale", "flip"), [(1.0, 0.0), (1.0, 1.0), (0.6, 0.0), (0.6, 1.0)])
def test_true_and_false_sentences_of_generated_images_are_that(world, scale, flip):
    """Whatever the affine map, by the figures of the data set's own file, mirrored by hand."""
    dataset = open_dataset(world, "train")
    text = WordTokenizer.build(dataset.annotations.all_captions())
    task = matching(text, dataset.categories, dataset.annotations.all_captions(), num_others=3, num_changed=6)
    augment = AugmentConfig(flip=flip, scale_min=scale, scale_max=scale)
    samples = TrainingSet(dataset, task, size=(64, 64), augment=augment, seed=0)
    figures = figures_by_id(world, "train")
    counts = {True: 0, False: 0}
    for index in range(len(samples)):
        sample = samples[0, index]
        seen = mirrored(figures[sample.image_id]) if flip else figures[sample.image_id]
        for said, answer, _ in read(task, sample.examples["matching"]):
            assert is_true(said, seen, SIZE) == answer, said
            counts[answer] += 1
    assert counts[False] > 2 * counts[True] > 50


def test_a_part_of_a_generated_image_teaches_nothing(world):
    dataset = open_dataset(world, "train")
    task = matching(WordTokenizer.build(dataset.annotations.all_captions()), dataset.categories)
    for scale, expected in ((1.3, {0}), (1.0, {5})):
        augment = AugmentConfig(flip=0.0, scale_min=scale, scale_max=scale)
        samples = TrainingSet(dataset, task, size=(SIZE, SIZE), augment=augment, seed=0)
        assert {len(samples[0, index].examples["matching"]) for index in range(10)} <= expected | {4}


def test_a_sample_depends_on_seed_epoch_and_index_only(world):
    dataset = open_dataset(world, "train")
    text = WordTokenizer.build(dataset.annotations.all_captions())
    task = matching(text, dataset.categories, dataset.annotations.all_captions())
    one, two = (TrainingSet(dataset, task, size=(SIZE, SIZE), augment=AugmentConfig(), seed=5) for _ in range(2))
    said = [read(task, samples[epoch, 3].examples["matching"]) for samples in (one, two) for epoch in (0, 1)]
    assert said[0] == said[2] != said[1] == said[3]


# Asking


def completion(yes, no):
    return Completion(np.array([[YES]]), np.float32([[yes]]), np.array([[NO]]), np.float32([[no]]), np.array([False]))


IMAGE = EncodedImage(torch.zeros(1, 1), np.zeros((SIZE, SIZE, 3), np.uint8), (SIZE, SIZE))


@pytest.mark.parametrize(
    ("yes", "no", "expected"),
    [(np.log(0.3), np.log(0.1), 0.75), (np.log(0.1), np.log(0.3), 0.25), (-np.inf, -1, 0), (-1, -np.inf, 1),
     (-np.inf, -np.inf, 0.5), (-2000, -1, 0)],
)  # fmt: skip
def test_the_score_is_the_share_of_yes_among_yes_and_no(yes, no, expected):
    task = matching(text_of())
    requests = task.requests(IMAGE, ["a cat"])
    (match,) = task.answers(IMAGE, requests, [completion(yes, no)])
    assert match.text == "a cat"
    assert match.score == pytest.approx(expected, abs=1e-6)
    assert match.to_json() == {"text": "a cat", "score": pytest.approx(expected, abs=1e-6)}


def test_what_is_no_list_of_sentences_is_refused():
    task = matching(text_of())
    for about in ("a cat", [1], 3, ["a cat", " "], [np.zeros(4)]):
        with pytest.raises(InputError):
            task.check_about(IMAGE, about)
    with pytest.raises(InputError, match="asked about sentences"):
        task.requests(IMAGE, None)
    assert task.parse_about(" a cat; two dogs ;") == ["a cat", "two dogs"]
    assert task.check_about(IMAGE, task.parse_about("a cat")) == ["a cat"]


@pytest.fixture(scope="module")
def matcher(world, tmp_path_factory):
    """A run of a few steps with embeddings."""
    out = tmp_path_factory.mktemp("matcher") / "run"
    settings = [*TINY, "matching.max_tokens=24", "model.contrast.dim=16", "augment.scale_max=1", "lr=1e-2"]
    assert main(["train", "--task", "matching", f"data={world}", f"out={out}", *settings]) == 0
    return out


@pytest.fixture(scope="module")
def predictor(matcher):
    return Predictor.from_pretrained(matcher, device="cpu")


def test_a_match_is_what_the_models_logits_say(predictor, world):
    path = next((world / "val2017").iterdir())
    sentences = ["A red star.", "There are two circles and one person.", "Nothing."]
    scores = predictor.match(path, sentences)
    image = predictor.encode(path)
    task, model = predictor.tasks["matching"], predictor.model
    for sentence, score in zip(sentences, scores, strict=True):
        ids = [17, *(model.text.encode(sentence)), model.text.eos_id]
        tokens = torch.tensor([ids[:1] + [token + model.config.vocab.text_base for token in ids[1:]]])
        with torch.inference_mode():
            logits = model.decoder.logits(model.decoder(tokens, image.memory[None]))[0, -1]
        assert score == pytest.approx(logits[[NO, YES]].softmax(-1)[1].item(), abs=1e-5)
        assert predictor.match(image, [sentence])[0] == pytest.approx(score, abs=1e-6)
    assert predictor.match(image, []).shape == (0,)
    assert task.about_format == "sentences, separated by semicolons"


def test_sentences_are_matched_on_the_command_line(matcher, world, tmp_path):
    path = next((world / "val2017").iterdir())
    arguments = ["predict", str(path), "--checkpoint", str(matcher), "--task", "matching", "--out", str(tmp_path)]
    assert main([*arguments, "--about", "a red star; two circles"]) == 0
    content = json.loads((tmp_path / f"{path.stem}.json").read_text())
    assert [each["text"] for each in content["matching"]] == ["a red star", "two circles"]
    assert all(0 <= each["score"] <= 1 for each in content["matching"])
    assert (tmp_path / f"{path.stem}.png").exists()


def test_evaluation_scores_statements_and_both_searches(matcher, predictor, world, tmp_path):
    out = tmp_path / "metrics.json"
    assert (
        main(["eval", "--checkpoint", str(matcher), "--data", str(world), "--task", "matching", "--out", str(out)]) == 0
    )
    metrics = json.loads(out.read_text())["metrics"]
    searches = [f"matching/{way}/R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert {"matching/accuracy", "matching/AUROC", "matching/colour/accuracy", *searches} <= metrics.keys()
    # The same by the public methods and plain loops.
    dataset = open_dataset(world, "val")
    figures = figures_by_id(world, "val")
    targets = [dataset.target(i) for i in range(len(dataset))]
    images = predictor.embed([target.image.path for target in targets])
    texts = sorted({text for target in targets for text in target.captions})
    sentences = predictor.embed_text(texts)
    found = 0
    for text, vector in zip(texts, sentences, strict=True):
        first = targets[int(np.argmax(images @ vector))]
        found += is_true(text, figures[first.image.id], SIZE)
    assert metrics["matching/text_to_image/R@1"] == pytest.approx(found / len(texts))
    assert metrics["matching/image_to_text/R@10"] >= metrics["matching/image_to_text/R@1"]


def test_the_statements_of_an_exam_are_true_and_false_as_they_say(world):
    dataset = open_dataset(world, "val")
    text = WordTokenizer.build(dataset.annotations.all_captions())
    task = matching(text, dataset.categories, dataset.annotations.all_captions())
    figures = figures_by_id(world, "val")
    kinds = set()
    for index in range(len(dataset)):
        target = dataset.target(index)
        exam = task.questions(target, None)[""]
        assert exam == task.questions(target, None)[""]
        for statement in exam.statements:
            assert is_true(statement.text, figures[target.image.id], SIZE) == statement.is_true
            kinds.add(statement.false_by)
            if statement.changed_from is not None:
                assert exam.statements[statement.changed_from].is_true
    assert kinds == {None, "other", *KINDS}


# Scores


class Says:
    """What is true of an image: sentences with its letter."""

    def __init__(self, letter):
        self.letter = letter

    def say(self, text):
        return self.letter in text


def truth_of(target):
    return Says("xyz"[target.image.id]) if target.image.id < 3 else None


def examined(statements, scores, image=None, sentences=()):
    return Examined(
        tuple(Statement(*each) for each in statements),
        np.array(scores, np.float64),
        None if image is None else np.float32(image),
        np.array(sentences, np.float32),
    )


def target_with_id(image_id):
    target = plain_target(["a"])
    return replace(target, image=replace(target.image, id=image_id))


def test_accuracies_by_hand():
    metric = SentenceMetric(truth_of)
    statements = [("p",), ("q",), ("r", "colour", 0), ("s", "side", 1), ("t", "other")]
    metric.add(target_with_id(0), [examined(statements, [0.9, 0.2, 0.1, 0.8, 0.4])])
    metric.add(target_with_id(1), [examined([("p",), ("r", "colour", 0)], [0.7, 0.6])])
    # True: 2 of 3 right. False: colour right and wrong, side wrong, other right: 2 of 4.
    metrics = metric.result().metrics
    assert metrics["accuracy"] == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert metrics["colour/accuracy"] == pytest.approx((2 + 1) / 4)  # with p and p, which were right
    assert metrics["side/accuracy"] == pytest.approx(0)  # with q, which was wrong
    # Pairs of a true and a false one in order: 0.9 above all 4; 0.2 above 0.1; 0.7 above 3.
    assert metrics["AUROC"] == pytest.approx((4 + 1 + 3) / 12)
    assert not any("R@" in name for name in metrics)


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=8))
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [(p > n) + (p == n) / 2 for p, n in product(positive, negative)]
    expected = sum(pairs) / len(pairs) if pairs else None
    assert auroc(positive, negative) == (expected if expected is None else pytest.approx(expected))


def test_recalls_by_hand():
    """Three images and their sentences on a line of directions: what is nearest is known."""
    angles = {0: 0.0, 1: 1.0, 2: 2.0}
    told = {0: [("x near 1", 0.9)], 1: [("y", 1.1), ("xy", 0.4)], 2: [("z far", 0.1)]}
    vector = lambda angle: [np.cos(angle), np.sin(angle)]  # noqa: E731
    metric, other = SentenceMetric(truth_of), SentenceMetric(truth_of)
    for number, sentences in told.items():
        answer = examined(
            [(text,) for text, _ in sentences], [1] * len(sentences), vector(angles[number]),
            [vector(angle) for _, angle in sentences],
        )  # fmt: skip
        (metric if number else other).add(target_with_id(number), [answer])
    metric.merge(other)
    metrics = metric.result().metrics
    # Nearest images: x near 1 -> 1, wrong; y -> 1; xy -> 0, of which it is true though it was told of 1; z far -> 0.
    assert metrics["text_to_image/R@1"] == pytest.approx(2 / 4)
    assert metrics["text_to_image/R@5"] == 1
    # Nearest sentences: 0 -> z far, wrong; 1 -> x near 1 and y alike far, the first told wins: x near 1, wrong; 2 -> y.
    assert metrics["image_to_text/R@1"] == 0
    assert metrics["image_to_text/R@5"] == 1


def test_the_best_are_the_most_similar_first():
    rng = np.random.default_rng(0)
    queries, found = rng.normal(size=(2000, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    tops = best(queries, found)
    for query, top in list(zip(queries, tops, strict=True))[::97]:
        assert top == sorted(range(30), key=lambda i: -float(found[i] @ query))[:10]
    assert recalls("a", [[False, True], [False, False]]) == {"a/R@1": 0, "a/R@5": 0.5, "a/R@10": 0.5}
