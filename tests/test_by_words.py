"""Objects by words: sequences, prompts, answers, vocabulary, metric, evaluation and the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pix2seq import Predictor
from pix2seq.cli import main
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.formats.shards import ShardIndex, write_shards
from pix2seq.data.phrases import ADJECTIVES, is_held_out, phrase_words
from pix2seq.data.samples import TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.geometry.boxes import box_iou_xyxy
from pix2seq.metrics.correlation import matthews
from pix2seq.metrics.phrases import Asked, Found, PhraseMetric
from pix2seq.model.config import DecoderConfig, EncoderConfig, MemoryConfig, ModelConfig
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.results import Instances
from pix2seq.tasks.by_words import ByWords, ByWordsConfig
from pix2seq.tasks.request import Frame
from pix2seq.tasks.transcript import read_tokens
from pix2seq.tokenizers.by_words import description, description_prompt, phrase_prompt
from pix2seq.tokenizers.slots import KINDS, OBJECT, comparison_prompt
from pix2seq.tokenizers.text import UNK_ID, WordTokenizer
from pix2seq.training.config import load_config
from pix2seq.training.recipe import prepare
from pix2seq.vocab import EOS, NOISE, SEPARATOR, Vocab

SIZE = (64, 64)
CONFIG = ByWordsConfig(max_objects=8, max_words=16, phrases=4)
TINY = [
    *("model.image_size=[48,48]", "model.encoder.name=vit", "model.encoder.dim=16", "model.encoder.num_layers=1"),
    *("model.encoder.num_heads=2", "model.encoder.mlp_dim=16", "model.decoder.dim=16", "model.decoder.num_layers=1"),
    *("model.decoder.num_heads=2", "model.decoder.mlp_dim=16", "model.vocab.num_bins=48", "model.vocab.text_base=1100"),
    *("model.vocab.size=1100", "model.encoder.patch_size=16", "by_words.max_objects=8", "by_words.max_words=24"),
    "by_words.closeup=false",
    *("device=cpu", "bf16=false", "num_workers=0", "batch_size=4", "steps=2", "schedule.warmup_steps=1", "trackers=[]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "shapes"
    write_shapes(folder, num_train=12, num_val=5, size=64, seed=3, max_objects=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def text(shapes):
    words = phrase_words((c.name for c in shapes.categories), shapes.annotations.attribute_kinds)
    return WordTokenizer.build([], required=words)


@pytest.fixture(scope="module")
def vocab(text):
    return Vocab(num_bins=64, text_base=1100, size=1100).with_text(text.size)


@pytest.fixture(scope="module")
def task(shapes, text, vocab):
    return ByWords(CONFIG, vocab, shapes.categories, text)


@pytest.fixture(scope="module")
def predictor(shapes, text, vocab, task):
    torch.manual_seed(0)
    encoder = EncoderConfig(
        "vit", stem="conv", closeups=True, dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16
    )
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64)
    config = ModelConfig(SIZE, encoder=encoder, memory=MemoryConfig(references=1), decoder=decoder, vocab=vocab)
    model = build_model(config, shapes.categories, text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.task_settings = {"by_words": task.settings()}
    return Predictor(model)


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("worded") / "model"
    predictor.model.save_pretrained(path)
    return path


# The language


def test_prompts_and_descriptions_are_as_documented():
    vocab = Vocab(num_bins=11, text_base=1100, size=1110, num_text=10)
    assert phrase_prompt(16, 60, [5, 3], vocab).tolist() == [16, 60, 1105, 1103, SEPARATOR]
    box = np.array([0.0, 0.2, 0.5, 1.0])
    assert description_prompt(16, box, vocab).tolist() == [16, 1000, 1002, 1005, 1010, SEPARATOR]
    assert description([5, 3], vocab).tolist() == [1105, 1103, EOS]


def test_the_box_after_a_phrase_is_told_as_y_and_x(task):
    prompt = comparison_prompt(phrase_prompt(16, 60, [5, 3], task.vocab), np.array([0.25, 0.5, 0.75, 1.0]), task.vocab)
    told = [str(token) for token in read_tokens(task, prompt.tolist(), Frame.of_input((63, 126)))[-4:]]
    assert [(each[0], each.split(" = ")[1]) for each in told] == [
        *(("y", "16.0 px"), ("x", "64.0 px"), ("y", "47.0 px"), ("x", "126.0 px"))
    ]


# Learning


def samples_of(shapes, task, **augment):
    return TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(scale_min=0.9, scale_max=1.1, **augment), seed=0)


def kinds_of(examples):
    """The list, the descriptions and the comparisons of an image."""
    first, *rest = examples
    return first, [e for e in rest if e.choices is None], [e for e in rest if e.choices is not None]


def whose(ids, target, vocab):
    """The number of the object that the four ids of a box mean, of an input of 64 x 64 pixels."""
    box = vocab.coords(ids)[[1, 0, 3, 2]] * 64
    overlaps = box_iou_xyxy(box[None], target.boxes_xyxy)[0]
    assert overlaps.max() > 0.6
    return int(overlaps.argmax())


def test_training_sequences_list_describe_and_compare(shapes, task, vocab, text):
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    names = {category.label: category.name for category in shapes.categories}
    slots, answers, described = set(), [], 0
    for index in range(len(samples)):
        target = shapes.target(index)
        first, descriptions, comparisons = kinds_of(samples[0, index].examples["by_words"])
        assert first.prompt.tolist() == [16]
        assert first.targets[-1] == EOS
        groups = first.targets[:-1].reshape(-1, 5)
        listed = sorted(tuple(group[:4].tolist()) for group in groups if group[4] == OBJECT)
        assert listed == sorted(tuple(vocab.coord_ids(box[[1, 0, 3, 2]] / 64).tolist()) for box in target.boxes_xyxy)
        assert (groups[:, 4] == NOISE).sum() == CONFIG.noise_objects
        assert len(task.shown(first, SIZE)) == len(listed)
        assert len(descriptions) == min(CONFIG.descriptions, len(listed))
        for example in descriptions:
            assert example.prompt[[0, -1]].tolist() == [16, SEPARATOR]
            i = whose(example.prompt[1:5], target, vocab)
            words = set(text.decode(example.targets[:-1] - vocab.text_base).split())
            colour, texture = target.attributes[i]["colour"], target.attributes[i]["texture"]
            assert words - {"in"} == {colour, ADJECTIVES[texture], names[int(target.labels[i])]}
            assert task.shown(example, SIZE)[0].category.name in task.summary(example)
            described += 1
        for example in comparisons:
            prompt, slot = example.prompt[:-4], int(example.prompt[1])
            assert prompt[[0, -1]].tolist() == [16, SEPARATOR]
            assert slot in KINDS
            assert UNK_ID + vocab.text_base not in prompt
            assert len(example.prompt) + 1 <= task.max_seq_len
            assert example.targets.tolist() in ([slot], [NOISE])
            assert example.choices.tolist() == [[slot, slot + 1, NOISE, -1]]
            assert task.summary(example).endswith("no" if example.targets[0] == NOISE else "yes")
            # The whole image, whose coordinates the box has, and beside it the closeup of the object.
            i = whose(example.prompt[-4:], target, vocab)
            (beside,) = example.others
            assert example.closeup is None
            y0, x0, y1, x1 = (beside.closeup * 64).tolist()
            left, top, right, bottom = target.boxes_xyxy[i].tolist()
            assert x0 <= left + 1
            assert y0 <= top + 1
            assert x1 >= right - 1
            assert y1 >= bottom - 1
            assert len(task.shown(example, SIZE)) == (example.targets[0] != NOISE)
            slots.add(slot)
            answers.append(example.targets[0] != NOISE)
    assert len(slots) > 8
    assert described > 12
    assert 0.25 < np.mean(answers) < 0.55


def test_descriptions_do_not_tell_what_training_leaves_out(shapes, task, vocab, text):
    other = task.with_settings(unseen_share=0.5, descriptions=8)
    in_full = []
    for index in range(len(shapes)):
        target = shapes.target(index)
        _, descriptions, _ = kinds_of(other.examples(target, SIZE, np.random.default_rng(0)))
        for example in descriptions:
            i = whose(example.prompt[1:5], target, vocab)
            name = next(each.name for each in shapes.categories if each.label == target.labels[i])
            left_out = is_held_out((name, target.attributes[i]["colour"], target.attributes[i]["texture"]), 0.5)
            words = text.decode(example.targets[:-1] - vocab.text_base)
            assert (words == name) == left_out
            in_full.append(not left_out)
    assert {*in_full} == {True, False}


def test_a_class_alone_names_the_objects_of_the_class(shapes, task, vocab):
    """From phrases of one word, against the labels of the target."""
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    by_name = {category.name: category.label for category in shapes.categories}
    compared = 0
    for epoch in range(8):
        for index in range(len(samples)):
            target = shapes.target(index)
            for example in kinds_of(samples[epoch, index].examples["by_words"])[2]:
                phrase = task.summary(example).split(":")[0].strip("'").removeprefix("the ").removeprefix("a ")
                if phrase in by_name:
                    is_named = target.labels[whose(example.prompt[-4:], target, vocab)] == by_name[phrase]
                    assert (example.targets[0] != NOISE) == is_named
                    compared += 1
    assert compared > 15


def test_samples_are_a_function_of_seed_epoch_and_index(shapes, task):
    def told(epoch):
        examples = samples_of(shapes, task)[epoch, 3].examples["by_words"]
        return [(each.prompt.tolist(), each.inputs.tolist(), each.targets.tolist()) for each in examples]

    assert told(0) == told(0)
    assert told(0) != told(1)


# The vocabulary


def settings_of(folder, *more):
    return load_config(None, [f"data={folder}", "tasks=[by_words]", *TINY, *more])


def test_a_run_knows_the_words_of_its_phrases_and_no_others(folder, tmp_path):
    alone = prepare(settings_of(folder)).text
    assert {"striped", "grainy", "people", "persons", "circles", "leftmost"} & {*alone.tokens} == {
        *("striped", "grainy", "people", "persons", "circles")
    }
    assert "picture" not in alone.tokens  # of captions, which nothing of this run reads
    both = prepare(settings_of(folder, "tasks=[captioning,by_words]", "captioning.min_count=9")).text
    assert {"striped", "picture"} <= {*both.tokens}
    write_shards(read_coco(folder, "train"), tmp_path / "shards")
    sharded = settings_of(tmp_path / "shards", f"val_data={folder}")
    assert prepare(sharded).text.tokens == alone.tokens
    kinds = read_coco(folder, "train").annotations.attribute_kinds
    assert ShardIndex.read(tmp_path / "shards", "train").attributes == kinds


def test_captions_that_two_tasks_learn_from_count_once(folder):
    def words(tasks):
        return prepare(settings_of(folder, f"tasks=[{tasks}]", "captioning.min_count=9")).text.tokens

    assert (
        words("captioning")
        == words("captioning,matching")
        != prepare(settings_of(folder, "tasks=[captioning]", "captioning.min_count=5")).text.tokens
    )


def test_a_vocabulary_without_room_for_the_words_is_refused(folder):
    with pytest.raises(InputError, match=r"has no room for the .* words of phrases"):
        prepare(settings_of(folder, "tasks=[captioning,by_words]", "captioning.text_size=20"))


def test_data_without_captions_and_attributes_trains_and_is_evaluated(folder, tmp_path):
    plain = tmp_path / "plain"
    (plain / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (plain / f"{split}2017").symlink_to(folder / f"{split}2017")
        name = f"annotations/instances_{split}2017.json"
        content = json.loads((folder / name).read_text())
        content["annotations"] = [
            {key: value for key, value in each.items() if key not in ("colour", "texture")}
            for each in content["annotations"]
        ]
        (plain / name).write_text(json.dumps(content))
    out = tmp_path / "run"
    assert main(["train", "--task", "by_words", f"data={plain}", f"out={out}", *TINY]) == 0
    found = tmp_path / "metrics.json"
    assert main(["eval", "--checkpoint", str(out), "--data", str(plain), "--out", str(found)]) == 0
    metrics = json.loads(found.read_text())["metrics"]
    assert {"by_words/Acc@0.5", "by_words/AP50", "by_words/presence_MCC", "by_words/counting_error"} <= metrics.keys()
    assert "red" not in Pix2Seq.from_pretrained(out / "checkpoints" / "step-00000002").text.tokens


def test_a_run_starts_from_a_checkpoint_that_knows_none_of_the_words(folder, run, tmp_path):
    """The rows of known ids are taken over, those of new words are new; colours are added to an encoder without."""
    source = next(iter(sorted((run / "checkpoints").glob("step-*"))))
    old = Pix2Seq.from_pretrained(source)
    assert "striped" not in old.text.tokens
    content = json.loads((source / "config.json").read_text())["model"]
    parts = [(part, *each) for part in ("encoder", "decoder", "memory") for each in content[part].items()]
    model = [f"model.{part}.{key}={json.dumps(value)}" for part, key, value in parts]
    model += [f"model.vocab.{key}={content['vocab'][key]}" for key in ("num_bins", "coord_base", "text_base")]
    model += [f"model.vocab.size={content['vocab']['text_base']}", f"model.image_size={content['image_size']}"]
    rest = [each for each in TINY if not each.startswith("model.")]
    settings = [f"data={folder}", f"out={tmp_path / 'out'}", f"init={source}", *model, *rest, "lr=1e-9", "ema_decay=0"]
    settings += ["model.encoder.colour=true", "by_words.max_objects=3", "by_words.max_words=14", "eval_images=2"]
    assert main(["train", "--task", "by_words", *settings]) == 0
    new = Pix2Seq.from_pretrained(tmp_path / "out" / "checkpoints" / "step-00000002")
    assert "striped" in new.text.tokens
    rows = [new.decoder.token_embedding.weight, old.decoder.token_embedding.weight]
    word = [model.config.vocab.text_base + list(model.text.tokens).index("the") for model in (new, old)]
    torch.testing.assert_close(rows[0][word[0]], rows[1][word[1]], atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0][:100], rows[1][:100], atol=1e-6, rtol=0)
    images = torch.rand(2, 3, *new.config.image_size)
    torch.testing.assert_close(new.eval().encode(images), old.eval().encode(images), atol=1e-4, rtol=1e-4)


def test_colour_reaches_the_memory_of_its_patch(vocab):
    encoder = EncoderConfig("vit", dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16, colour=True)
    decoder = DecoderConfig(dim=32, num_layers=1, num_heads=2, mlp_dim=64)
    model = build_model(ModelConfig(SIZE, encoder=encoder, decoder=decoder, vocab=vocab)).eval()
    with torch.no_grad():
        model.encoder.stem.weight.zero_()  # the stem sees nothing
        model.encoder.colour.weight.normal_()
    grey = torch.full((1, 3, *SIZE), 0.5)
    red = grey.clone()
    red[:, 0, 16:32, 32:48] = 1.0  # the patch in row 1, column 2 of 4 x 4
    with torch.no_grad():
        features = [model.encoder(images)[0][0] for images in (grey, red)]
    changed = (features[0] != features[1]).any(dim=1)
    assert torch.nonzero(changed).ravel().tolist() == [6]
    torch.testing.assert_close(features[1][6] - features[0][6], model.encoder.colour.weight[:, 0] * 0.5)


# Asking


def test_find_answers_several_phrases_side_by_side_as_alone(predictor, shapes):
    image = predictor.encode(shapes.target(0).image.path)
    asked = ["striped star", "person in blue"]
    together = predictor.find(image, words=asked, threshold=0.0)
    assert isinstance(together, Instances)
    assert together.size == (64, 64)
    assert {each.category.name for each in together} == set(asked)
    assert [each.score for each in together] == sorted((each.score for each in together), reverse=True)
    alone = predictor.find(image, asked[0], threshold=0.0)
    assert [e.box_xyxy for e in alone] == [e.box_xyxy for e in together if e.category.name == asked[0]]
    least = float(np.median([each.score for each in together]))
    some = predictor.find(image, asked, threshold=least)
    assert [each.box_xyxy for each in some] == [each.box_xyxy for each in together if each.score >= least]


def test_scores_are_those_of_full_passes_over_the_image_and_the_closeup(predictor, shapes):
    task, model = predictor.tasks["by_words"], predictor.model
    image = predictor.encode(shapes.target(0).image.path)
    phrase = "striped red star"
    (listing,) = task.requests(image, [phrase])
    (completion,) = predictor._complete(task, [image], [[listing]], 0)
    found = {each.box_xyxy: each.score for each in predictor.find(image, phrase, threshold=0.0)}
    compared = task.follow_up(image, [listing], [completion])
    assert len(compared) == len(found) > 1
    words = [task.vocab.text_base + each for each in task.text.encode(phrase)]
    for request in compared:
        listed = request.subject.listed
        frame = image.frame()
        around = frame.to_input_yxyx(frame.around(np.array(listed.box_xyxy), 0.25).xyxy[None])
        at = task.vocab.coord_ids(frame.to_input_yxyx(np.array([listed.box_xyxy]))[0])
        tokens = torch.tensor([[16, KINDS[0], *words, SEPARATOR, *at]])
        with torch.no_grad():
            closeup = model.look_closer(tuple(m[None] for m in image.maps), torch.from_numpy(around).float(), [0])[0]
            memory = torch.cat([image.memory, closeup + model.reference_embedding[0]])[None]
            logits = model.decoder.logits(model.decoder(tokens, memory))[0, -1]
        share = float(logits[[KINDS[0], NOISE]].softmax(0)[0])
        assert found[listed.box_xyxy] == pytest.approx(listed.score * share, abs=1e-4)


def test_more_phrases_than_slots(predictor, shapes):
    image = shapes.target(0).image.path
    asked = [f"{colour} {name}" for colour in ("red", "blue") for name in ("star", "cross", "heart", "circle")] * 3
    found = predictor.find(image, asked, threshold=0.0)
    labels = {each.category.label for each in found}
    assert labels <= set(range(1, 25))
    assert max(labels) > len(KINDS)


def test_unknown_words_and_bad_phrases_are_refused_in_one_line(predictor, shapes):
    image = predictor.encode(shapes.target(0).image.path)
    with pytest.raises(InputError, match="never read the word 'strped'; the nearest that it did: striped"):
        predictor.find(image, "strped star")
    for words, reason in (
        ("", "no phrase, or an empty one"),
        ([], "no phrase, or an empty one"),
        ("red " * 20, "has more than 16 words"),
        (3, "a phrase or a list of phrases"),
        (None, "give what to look for, as examples or in words"),
    ):
        with pytest.raises(InputError, match=reason):
            predictor.find(image, words=words)
    with pytest.raises(InputError, match="has more than 16 words"):
        predictor.find(image, ["red " * 20])
    with pytest.raises(InputError, match="give some with --find"):
        predictor.ask("by_words", [image])


# Scores


def found(text, true, boxes, scores, unseen=False):
    asked = Asked(text, np.array(true, np.float64).reshape(-1, 4), unseen)
    return Found(asked, np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, np.float32), 0.5)


BOX, NEAR, LOW, FAR = [0, 0, 10, 10], [0, 0, 10, 8], [6, 0, 16, 10], [50, 50, 60, 60]  # LOW has an IoU of 1/4
ANSWERS = [
    found("right", [BOX], [NEAR, FAR], [0.9, 0.1]),  # right, and one found
    found("wrong", [BOX], [LOW, BOX], [0.8, 0.7]),  # the best is wrong, and two found
    found("silent", [BOX], [], []),  # none found
    found("absent", [], [FAR], [0.3]),  # rightly none
    found("invented", [], [FAR], [0.6]),  # wrongly one
    found("two", [BOX, FAR], [BOX, FAR], [0.95, 0.85]),  # not of one object
]


def test_scores_by_hand(shapes):
    metric = PhraseMetric()
    metric.add(shapes.target(0), ANSWERS)
    scores = metric.result().metrics
    assert scores["Acc@0.5"] == pytest.approx(1 / 3)
    assert scores["counting_error"] == pytest.approx((0 + 1 + 1 + 0 + 1 + 0) / 6)
    # There and said 3, there and silent 1, absent and said 1, absent and silent 1.
    assert scores["presence_MCC"] == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))
    # By score: BOX of two, NEAR (IoU 0.8), FAR of two, wrong, its BOX, invented, ...: 5 objects, 4 found at
    # precisions 1, 1, 1 and 4/5, which hold for recalls up to 0.6 and 0.8 of the 101 that COCO averages.
    assert scores["AP50"] == pytest.approx((61 + 20 * 0.8) / 101)
    assert scores["empty_where_absent"] == 1 / 2
    assert set(scores) == {"Acc@0.5", "AP50", "presence_MCC", "empty_where_absent", "counting_error"}


def test_unseen_phrases_are_scored_apart_and_metrics_merge(shapes):
    parts = [PhraseMetric(), PhraseMetric()]
    new = [found("new", [BOX], [BOX], [0.9], unseen=True), found("new", [BOX], [FAR], [0.9], unseen=True)]
    parts[0].add(shapes.target(0), ANSWERS)
    parts[1].add(shapes.target(1), new)
    parts[0].merge(parts[1])
    scores = parts[0].result().metrics
    assert scores["unseen/Acc@0.5"] == 0.5
    assert scores["seen/Acc@0.5"] == pytest.approx(1 / 3)
    assert scores["Acc@0.5"] == pytest.approx(2 / 5)
    assert scores["seen/counting_error"] == pytest.approx(2 / 4)  # of phrases that name something
    assert not any(
        name.startswith(("seen/presence", "unseen/presence", "seen/empty", "unseen/empty")) for name in scores
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_matthews_correlation_by_its_table(pairs):
    table = {(a, b): sum(pair == (a, b) for pair in pairs) for a in (True, False) for b in (True, False)}
    tp, fn, fp, tn = table[True, True], table[True, False], table[False, True], table[False, False]
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / np.sqrt(below) if below else None
    assert matthews(*np.array(pairs, bool).T) == (None if expected is None else pytest.approx(expected))


def test_evaluation_asks_by_the_annotations_half_in_vain(shapes, task):
    exams = [task.questions(shapes.target(i), None)[""] for i in range(len(shapes))]
    assert exams[0].asked[0].text == task.questions(shapes.target(0), None)[""].asked[0].text
    absent = [len(asked.boxes_xyxy) == 0 for exam in exams for asked in exam.asked]
    assert 0.4 < np.mean(absent) <= 0.5
    target = shapes.target(0)
    for asked in exams[0].asked:
        assert all((box == target.boxes_xyxy).all(axis=1).any() for box in asked.boxes_xyxy)


def test_evaluation_scores_a_perfect_answer_as_perfect(predictor, shapes, monkeypatch):
    def answers(self, image, requests, completions):
        asked = [each.subject[1] for each in requests[0].subject.listing.meanings]
        return [Found(each, each.boxes_xyxy, np.ones(len(each.boxes_xyxy), np.float32), 0.5) for each in asked]

    monkeypatch.setattr(ByWords, "answers", answers)
    metrics = evaluate(predictor, shapes, ["by_words"]).metrics
    expected = {"Acc@0.5": 1, "AP50": 1, "presence_MCC": pytest.approx(1), "counting_error": 0}
    assert {name: metrics[f"by_words/{name}"] for name in expected} == expected
    assert metrics["by_words/ms_per_phrase"] > 0


def test_combinations_that_training_leaves_out_are_asked_for_apart(shapes, task):
    other = task.with_settings(unseen_share=0.5)
    asked = [each for i in range(len(shapes)) for each in other.questions(shapes.target(i), None)[""].asked]
    assert {each.is_unseen for each in asked} == {True, False}
    assert all(len(each.boxes_xyxy) for each in asked if each.is_unseen)


# Commands


def test_predict_finds_what_is_asked_for(checkpoint, shapes, tmp_path, capsys):
    image = str(shapes.target(0).image.path)
    model = Pix2Seq.from_pretrained(checkpoint)
    model.task_settings["by_words"]["min_score"] = 0.0
    model.save_pretrained(tmp_path / "model")
    command = ["predict", image, "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path)]
    assert main([*command, "--find", "striped star", "--find", "people in blue"]) == 0
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert content["by_words"]
    assert {each["category"] for each in content["by_words"]} <= {"striped star", "people in blue"}
    assert main([*command, "--task", "by_words", "--about", "striped star; people in blue", "--overwrite"]) == 0
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["by_words"] == content["by_words"]
    capsys.readouterr()
    assert main([*command, "--find", "a strped star"]) == 2
    error = capsys.readouterr().err
    assert "striped" in error
    assert error.count("\n") == 1


def test_a_checkpoint_without_the_task_refuses_to_find(run, shapes, tmp_path, capsys):
    image = str(shapes.target(0).image.path)
    assert main(["predict", image, "--checkpoint", str(run), "--out", str(tmp_path), "--find", "x"]) == 2
    assert "has no task that finds objects by words" in capsys.readouterr().err


def test_eval_prints_the_scores(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    command = ["eval", "--checkpoint", str(checkpoint), "--data", str(folder), "--out", str(out)]
    assert main([*command, "--limit", "2"]) == 0
    assert {"by_words/AP50", "by_words/presence_MCC"} <= json.loads(out.read_text())["metrics"].keys()
    assert "presence_MCC" in capsys.readouterr().out


def test_the_task_takes_targets_of_other_classes(task, shapes):
    """The names in questions are those of the data, also where the model has none of its classes."""
    renamed = [replace(category, name="gizmo") for category in shapes.categories]
    known = WordTokenizer.build([], required=[*task.text.tokens[3:], "gizmo", "gizmos"])
    other = ByWords(CONFIG, task.vocab, (), known).with_data([], renamed)
    texts = [asked.text for i in range(4) for asked in other.questions(shapes.target(i), None)[""].asked]
    assert any("gizmo" in text for text in texts)
    assert not any("star" in text.split() for text in texts)


def test_a_checkpoint_that_must_be_told_what_to_look_for_says_so(checkpoint, shapes, tmp_path, capsys):
    image = str(shapes.target(0).image.path)
    assert main(["predict", image, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "by_words must be told what to look for; give --about, --find or --like" in line
    assert not list(tmp_path.glob("*.json"))
