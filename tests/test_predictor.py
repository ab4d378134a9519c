"""Asking: batched over everything that is asked, the same whatever else is asked, and old checkpoints open."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from random_model import OLD, random_model

from pix2seq import Pix2Seq, Predictor
from pix2seq.data.image import read_image
from pix2seq.errors import InputError
from pix2seq.model.decoding.generate import GenerationConfig
from pix2seq.model.pix2seq import Pix2Seq as Model
from pix2seq.tasks.objects import Boxes
from pix2seq.tasks.request import EncodedImage
from pix2seq.types import Instance

RNG = np.random.default_rng(3)
IMAGES = [RNG.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((40, 60), (64, 30), (20, 20), (33, 50))]
# The middle of each image's objects: six, none, one and three.
BOXES = [[[2 * i, i, 2 * i + 20, i + 15] for i in range(count)] for count in (6, 0, 1, 3)]


@pytest.fixture
def predictor():
    return Predictor(random_model())


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


BOX = [[1, 2, 30, 35]]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.encode(None), "expected an image as a path"),
        (lambda p: p.encode(5), "got int"),
        (lambda p: p.encode([IMAGES[0]]), "got list"),
        (lambda p: p.encode(b"no image"), "not a readable image"),
        (lambda p: p.encode(np.zeros((0, 5, 3), np.uint8)), "no pixels"),
        (lambda p: p.encode(np.zeros((5, 5, 3))), "expected an array of uint8"),
        (lambda p: p.encode(torch.zeros(3, 0, 5)), "with pixels"),
        (lambda p: p.encode(torch.zeros(3, 5)), "with pixels"),
        (lambda p: p.encode(torch.full((3, 5, 5), float("nan"))), r"floats in \[0, 1\]"),
        (lambda p: p.encode(torch.full((3, 5, 5), 1.5)), r"floats in \[0, 1\]"),
        (lambda p: p.encode(torch.zeros(3, 5, 5, dtype=torch.int64)), r"floats in \[0, 1\]"),
        (lambda p: p.encode_batch("a.jpg"), "expected a list of images, got one str"),
        (lambda p: p.encode_batch(IMAGES[0]), "got one ndarray"),
        (lambda p: p.ask("detection", IMAGES[0]), "got one ndarray"),
        (lambda p: p.ask("detection", p.encode(IMAGES[0])), "got one EncodedImage"),
        (lambda p: p.ask("telepathy", []), "not trained for telepathy"),
        (lambda p: p.ask(None, []), "not trained for None"),
        (lambda p: p.ask("segmentation", IMAGES[:1], "person"), "expected a list of what to ask about"),
        (lambda p: p.ask("segmentation", IMAGES[:1], [5]), "asked about Boxes or a list of instances"),
        (lambda p: p.ask("segmentation", IMAGES[:1], [["person"]]), "asked about Boxes or a list of instances"),
        (lambda p: p.segment(IMAGES[0], [[1, 2, 3]], categories="person"), r"numbers \(N, 4\)"),
        (lambda p: p.segment(IMAGES[0], [[1, 2, 3, 4], [1]], categories="person"), r"numbers \(N, 4\)"),
        (lambda p: p.segment(IMAGES[0], "abcd", categories="person"), r"numbers \(N, 4\)"),
        (lambda p: p.segment(IMAGES[0], [[10**400, 2, 3, 4]], categories="person"), r"numbers \(N, 4\)"),
        (lambda p: p.segment(IMAGES[0], [[1, 2, float("nan"), 4]], categories="person"), "finite"),
        (lambda p: p.segment(IMAGES[0], [[5, 5, 1, 1]], categories="person"), "x1 > x0"),
        (lambda p: p.segment(IMAGES[0], [[500, 5, 510, 9]], categories="person"), "inside the image"),
        (lambda p: p.segment(IMAGES[0], BOX, categories=3), "categories must be a name"),
        (lambda p: p.segment(IMAGES[0], BOX, categories=[3]), "categories must be a name"),
        (lambda p: p.segment(IMAGES[0], BOX, categories=["person"] * 2), "with 2 categories"),
        (lambda p: p.segment(IMAGES[0], BOX, categories="unicorn"), "unknown category 'unicorn'"),
        (lambda p: p.segment(IMAGES[0], BOX), "boxes need categories"),
        (lambda p: p.segment(IMAGES[0], [instance(p), [1, 2, 3, 4]]), "boxes mix 1 instances with others"),
        (lambda p: p.predict(IMAGES[0], ["telepathy"]), "not trained for telepathy"),
        (lambda p: p.predict_batch(IMAGES[:1], "detection"), "expected a list of tasks"),
        (lambda p: p.predict_batch(IMAGES[:1], ["detection"], {"telepathy": [1]}), "not trained for telepathy"),
        (lambda p: p.predict_batch(IMAGES[:2], ["segmentation"], {"segmentation": [[]]}), "2 images were given with 1"),
        *[(lambda p, seed=seed: p.detect(IMAGES[0], seed=seed), "seed is") for seed in (2**64, -1, 1.5, None, "1")],
        (lambda p: p.configure(num_objects=0), "at least 1|from 1"),
        (lambda p: p.configure(num_objects="many"), "settings of detection cannot be used"),
        (lambda p: p.configure(top_p=float("nan")), "cannot be used"),
        (lambda p: Predictor("a folder"), "expected a Pix2Seq, got str"),
        (lambda p: p.detect(EncodedImage(torch.zeros(4, 16), IMAGES[0], (32, 32))), "encoded by another model"),
        (lambda p: p.detect(EncodedImage(torch.zeros(4, 8), IMAGES[0], (64, 64))), "encoded by another model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_asked_is_refused_in_a_line(predictor, ask, message):
    with pytest.raises(InputError, match=message) as caught:
        ask(predictor)
    assert "\n" not in str(caught.value)


def instance(predictor, **changes):
    category = predictor.model.categories[0]
    return Instance(**{"box_xyxy": (1.0, 2.0, 30.0, 35.0), "category": category, "score": 0.5} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_xyxy": (float("nan"), 0, 5, 5)}, "finite"),
        ({"box_xyxy": (0, 0, float("inf"), 5)}, "finite"),
        ({"box_xyxy": (9, 9, 5, 5)}, "x1 > x0"),
        ({"box_xyxy": (0, 0, 5)}, r"numbers \(N, 4\)"),
        ({"box_xyxy": (-90, 0, -5, 5)}, "inside the image"),
        ({"score": float("nan")}, "scores from 0 to 1"),
        ({"score": 1.5}, "scores from 0 to 1"),
    ],
)
def test_instances_are_checked_like_boxes(predictor, changes, message):
    for task in ("segmentation", "keypoint"):
        with pytest.raises(InputError, match=message):
            predictor.ask(task, IMAGES[:1], [[instance(predictor), instance(predictor, **changes)]])


def test_instances_are_clipped_to_the_image_and_keep_the_rest(predictor):
    image = predictor.encode(IMAGES[0])  # 60 pixels wide, 40 high
    given = instance(predictor, box_xyxy=(-5.0, 2.0, 99.0, 99.0), mask_score=0.25)
    (checked,) = predictor.tasks["segmentation"].check_about(image, [given])
    assert (checked.box_xyxy, checked.score, checked.mask_score) == ((0, 2, 60, 40), 0.5, 0.25)


def test_empty_lists_give_empty_lists(predictor):
    assert predictor.encode_batch([]) == []
    assert predictor.ask("detection", []) == predictor.ask("segmentation", [], []) == []
    assert predictor.predict_batch([], ["detection", "captioning"]) == []
    assert predictor.predict(IMAGES[0], []).instances == []
    assert predictor.segment(IMAGES[0], []) == predictor.segment(IMAGES[0], np.zeros((0, 4))) == []


def test_a_model_in_training_mode_is_not_asked(predictor):
    image = predictor.encode(IMAGES[0])
    before = predictor.detect(image)
    predictor.model.decoder.train()  # a part is enough
    for ask in (lambda: predictor.detect(image), lambda: predictor.encode(IMAGES[0])):
        with pytest.raises(InputError, match=r"training mode.*model\.eval"):
            ask()
    predictor.model.eval()
    assert all(same(a, b) for a, b in zip(predictor.detect(image), before, strict=True))


def test_answers_longer_than_the_model_are_refused_when_it_is_opened():
    model = Pix2Seq.from_pretrained(OLD)
    model.task_settings["detection"]["max_objects"] = 1000
    with pytest.raises(InputError, match=r"config.json needs sequences of 5002 tokens.*lower detection.max_objects"):
        Predictor(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.encode(torch.zeros(3, 32, 32)),
        lambda m: m.encode(torch.zeros(1, 4, 32, 32)),
        lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.zeros(2, 1, dtype=torch.int64)),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1)),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.tensor([[-1]])),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.tensor([[10**6]])),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.tensor(10)),
        lambda m: m(torch.zeros(1, 3, 32, 32), torch.full((1, 65), 10)),
        lambda m: m.generate(torch.zeros(1, 4, 9), torch.tensor([[10]]), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4), torch.tensor([[10]]), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([10]), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10.0]]), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10**6]]), max_new_tokens=5),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=0),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=10**12),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=5, num_samples=0),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=5, temperature=float("nan")),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=5, top_p=0.0),
        lambda m: m.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=5, top_k=-1),
        lambda m: m.generate_mixed(torch.zeros(1, 4, 8), [torch.tensor([[10]])], [GenerationConfig(5)]),
        lambda m: m.generate_mixed(torch.zeros(1, 4, 8), [torch.tensor([10])], [GenerationConfig(64 + 1)]),
    ],
)
def test_the_model_says_what_it_does_not_accept(call):
    with pytest.raises(ValueError, match=r"must|needs|longer|at least"):
        call(Pix2Seq.from_pretrained(OLD))


def test_the_last_token_of_the_longest_sequence_is_generated():
    model = Pix2Seq.from_pretrained(OLD)
    out = model.generate(torch.zeros(1, 4, 8), torch.tensor([[10]]), max_new_tokens=64, eos_id=None)
    assert out.tokens.shape == (1, 64)


def test_eight_threads_answer_as_one_and_leave_the_process_as_it_was(predictor, tmp_path, monkeypatch):
    paths = []
    for i, pixels in enumerate(IMAGES * 4):
        paths.append(tmp_path / f"{i}{('.png', '.tif')[i % 2]}")
        Image.fromarray(pixels).save(paths[-1])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    filters = list(warnings.filters)

    def answer(path):
        with pytest.raises(InputError, match="damaged"):
            read_image(tmp_path / "cut.png")
        return predictor.predict(path, ["detection", "captioning"]).to_json()

    alone = [answer(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(answer, paths)) == alone
    assert warnings.filters == filters
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


FORKED = """
import os, sys, torch
torch.set_num_threads(2)
from pix2seq import Pix2Seq, Predictor
predictor = Predictor(Pix2Seq.from_pretrained(sys.argv[1]))
# Large enough that both threads take part, in the parent and in the child.
image = (torch.arange(3 * 600 * 600) % 251).to(torch.uint8).view(3, 600, 600)
large = torch.rand(700, 700)
(large @ large).sigmoid_()
expected = [found.to_json() for found in predictor.detect(image)]
encoded = predictor.encode(image)
children = []
for ask in (lambda: predictor.detect(image), lambda: predictor.detect(encoded)):
    children.append(os.fork())
    if not children[-1]:
        found = ask()
        (large @ large).sigmoid_()
        os._exit(0 if [each.to_json() for each in found] == expected and torch.get_num_threads() == 1 else 1)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_answers_as_its_parent():
    process = subprocess.Popen(
        [sys.executable, "-c", FORKED, str(OLD)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.communicate(timeout=600)[0] == "[0, 0] 2\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_predictor_on_a_gpu_is_refused_after_a_fork(predictor, monkeypatch):
    monkeypatch.setattr(Pix2Seq, "device", torch.device("cuda"))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(InputError, match="came through a fork"):
        predictor.encode(IMAGES[0])
