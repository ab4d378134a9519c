"""Asking: batched over everything that is asked, the same whatever else is asked, and old checkpoints open."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2seq import Pix2Seq, Predictor
from pix2seq.errors import InputError
from pix2seq.model.pix2seq import Pix2Seq as Model
from pix2seq.tasks.objects import Boxes

OLD = Path(__file__).parent / "fixtures" / "checkpoint-0.1"  # written by 14286fe: four tasks, random weights
RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 60), (64, 30), (20, 20), (33, 50))]
# The middle of each image's objects: six, none, one and three.
BOXES = [[[2 * i, i, 2 * i + 20, i + 15] for i in range(count)] for count in (6, 0, 1, 3)]


@pytest.fixture
def predictor():
    model = Pix2Seq.from_pretrained(OLD)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that answers differ
    with torch.no_grad():
        model.decoder.output_bias[[100 + category.label for category in model.categories]] += 3.0
    return Predictor(model)


@pytest.fixture
def calls(monkeypatch):
    """The number of prompts of each call of `generate_mixed`."""
    made = []
    original = Model.generate_mixed

    def counting(self, memory, prompts, *args, **kwargs):
        made.append(len(prompts))
        return original(self, memory, prompts, *args, **kwargs)

    monkeypatch.setattr(Model, "generate_mixed", counting)
    return made


def same(a, b):
    """Whether two answers are equal, arrays included, and scores up to rounding."""
    a, b = a.to_json(), b.to_json()
    scores = [key for key in a if "score" in key]
    return all(a[key] == (pytest.approx(b[key], abs=1e-5) if key in scores else b[key]) for key in a)


def test_a_checkpoint_of_an_earlier_release_computes_what_it_did():
    model = Pix2Seq.from_pretrained(OLD)
    image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    logits = model(image, torch.tensor([[10, 1003, 1005, 1010, 1012, 101]]))[0, [0, 5]][:, [30, 101, 1000, 1015, 1020]]
    # As the release that wrote it printed them.
    expected = [
        [-0.06715923547744751, -0.04114820808172226, -0.09400631487369537, -0.03963411599397659, 0.015568499453365803],
        [-0.060118649154901505, -0.0349871963262558, -0.119827501475811, -0.016883062198758125, 0.021322650834918022],
    ]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-6, rtol=0)
    predictor = Predictor.from_pretrained(OLD, device="cpu")
    assert list(predictor.tasks) == ["detection", "segmentation", "keypoint", "captioning"]
    found = predictor.predict(IMAGES[0], list(predictor.tasks), BOXES[0], categories="person")
    assert len(found.instances) == 6
    assert all(instance.keypoints.shape == (17, 3) for instance in found.instances)
    assert len(found.captions) == 1


def test_a_newer_checkpoint_is_refused_in_a_line(tmp_path):
    folder = tmp_path / "new"
    shutil.copytree(OLD, folder)
    (folder / "manifest.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(InputError, match=r"config.json has format 2, this release reads up to 1"):
        Predictor.from_pretrained(folder)


@pytest.mark.parametrize("task", ["detection", "segmentation", "keypoint", "captioning"])
def test_an_answer_does_not_depend_on_what_else_is_asked(predictor, monkeypatch, task):
    predictor.configure(top_p=1.0, temperature=1.5)
    about = None
    if predictor.tasks[task].needs:
        about = [Boxes(boxes, "person") for boxes in BOXES]
    encoded = predictor.encode_batch(IMAGES)
    together = predictor.ask(task, encoded, about, seed=5)
    alone = [
        predictor.ask(task, [image], None if about is None else [each], seed=5)[0]
        for image, each in zip(encoded, about or IMAGES, strict=True)
    ]
    monkeypatch.setattr("pix2seq.predictor.MAX_ROWS", 3)
    in_pieces = predictor.ask(task, encoded[::-1], None if about is None else about[::-1], seed=5)[::-1]
    assert [len(answers) for answers in together] == ([6, 0, 1, 3] if about else [len(a) for a in alone])
    for three in zip(together, alone, in_pieces, strict=True):
        assert all(len(answers) == len(three[0]) for answers in three)
        assert all(same(a, b) and same(a, c) for a, b, c in zip(*three, strict=True))
    other = predictor.ask(task, encoded, about, seed=6)
    assert not all(same(a, b) for some in zip(together, other, strict=True) for a, b in zip(*some, strict=False))


def test_an_object_is_answered_alike_beside_others_and_alone(predictor):
    image = predictor.encode(IMAGES[0])
    together = predictor.segment(image, BOXES[0], categories="person", seed=1)
    for box in BOXES[0]:
        (alone,) = predictor.segment(image, [box], categories="person", seed=1)
        (same_one,) = (each for each in together if each.box_xyxy == alone.box_xyxy)
        assert same(alone, same_one)


def test_objects_and_samples_of_all_images_go_into_one_call(predictor, calls):
    encoded = predictor.encode_batch(IMAGES)
    predictor.ask("segmentation", encoded, [Boxes(boxes, "person") for boxes in BOXES])
    assert calls == [10]
    calls.clear()
    predictor.ask("keypoint", encoded, [Boxes(boxes, "person") for boxes in BOXES])
    assert calls == [10]
    calls.clear()
    predictor.predict_batch(encoded, ["detection", "captioning"])
    assert calls == [4, 4]


def test_batches_keep_to_the_memory_they_may_take(predictor, calls, monkeypatch):
    encoded = predictor.encode_batch(IMAGES)
    about = [Boxes(boxes, "person") for boxes in BOXES]
    tokens = 6 + predictor.tasks["segmentation"].max_new_tokens
    row = 2 * 1 * 8 * 4 * tokens  # keys and values of one layer, eight wide, in float32
    memory = 2 * 1 * 8 * 4 * encoded[0].memory.shape[0]
    monkeypatch.setattr("pix2seq.predictor.MAX_CACHE_BYTES", 4 * row + 2 * memory)
    predictor.ask("segmentation", encoded, about)
    assert max(calls) <= 2  # two masks are drawn for each object
    assert sum(calls) == 10


def test_settings_reach_every_task_that_has_them(predictor):
    predictor.configure(num_samples=1, top_p=0.5)
    assert predictor.tasks["segmentation"].config.num_samples == 1
    assert {task.config.top_p for task in predictor.tasks.values()} == {0.5}
    with pytest.raises(InputError, match=r"none of this checkpoint's tasks .* has the setting nonsense"):
        predictor.configure(nonsense=1)
    with pytest.raises(InputError, match="num_objects=100 needs sequences of 502 tokens"):
        predictor.configure(num_objects=100)


def test_objects_can_be_named_in_words(predictor):
    task = predictor.tasks["segmentation"]
    image = predictor.encode(IMAGES[0])
    about = task.check_about(image, task.parse_about("1,2,30,40 person; 0,0,10,10 heart"))
    assert [(i.box_xyxy, i.category.name) for i in about] == [((1, 2, 30, 40), "person"), ((0, 0, 10, 10), "heart")]
    with pytest.raises(InputError, match="cannot be read; expected objects as"):
        task.parse_about("a person")
    with pytest.raises(InputError, match="takes no --about"):
        predictor.tasks["detection"].parse_about("person")
    with pytest.raises(InputError, match="2 images were given with 1"):
        predictor.ask("segmentation", IMAGES[:2], [Boxes([], "person")])
