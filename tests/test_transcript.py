"""What tokens stand for, by hand: words, pixels, probabilities, and the answers that they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pix2seq import Predictor
from pix2seq.model.decoding.generate import Completion, GenerationConfig
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.request import EncodedImage, Exchange, Frame, Request
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.tasks.transcript import read_tokens, transcribe
from pix2seq.tokenizers.by_example import example_prompt
from pix2seq.tokenizers.prompted import outline_prompt
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Category, Instance
from pix2seq.vocab import EOS, INVISIBLE, NOISE, PAD, SEPARATOR, Vocab

VOCAB = Vocab(num_bins=11, size=1011)  # bin b is at b tenths
CAT, DOG = Category(1, 7, "cat"), Category(2, 3, "dog")
IMAGE = EncodedImage(torch.zeros(1, 4), np.zeros((200, 100, 3), np.uint8), (40, 20))  # 100 wide, 200 high: no padding


def detection(**settings):
    return Detection(DetectionConfig(noise_objects=0, **settings), VOCAB, [CAT, DOG])


def words(task, ids, frame):
    return [str(token) for token in read_tokens(task, ids, frame)]


def said(ids, best=None, likelihoods=None):
    """A completion of one sample, with the best class and its probability at every step."""
    tokens = np.array([ids], np.int64)
    scores = np.zeros_like(tokens, np.float32) if likelihoods is None else np.log(np.array([likelihoods], np.float32))
    best_tokens = tokens if best is None else np.full_like(tokens, best[0])
    return Completion(
        tokens, scores, best_tokens, np.full(tokens.shape, math.log(best[1] if best else 1.0)), np.zeros(1, bool)
    )


def test_coordinates_are_y_and_x_in_turn_in_pixels_of_the_frame():
    frame = Frame(np.array([10.0, 20.0]), np.array([100.0, 200.0]))
    # y: 5 / 10 * 200 + 20; x: 10 / 10 * 100 + 10; y: 20; x: 2 / 10 * 100 + 10
    expected = ["task:detection", "y bin:5 = 120.0 px", "x bin:10 = 110.0 px", "y bin:0 = 20.0 px", "x bin:2 = 30.0 px"]
    ids = [10, 1005, 1010, 1000, 1002, 101, NOISE, EOS, 600]
    assert words(detection(), ids, frame) == [*expected, "class cat", "noise", "end", "class 500"]


@pytest.mark.parametrize("gap", [SEPARATOR, INVISIBLE])
def test_a_separator_takes_the_position_of_a_coordinate(gap):
    frame = Frame(np.zeros(2), np.array([10.0, 10.0]))
    tokens = read_tokens(detection(), [1001, 1002, gap, gap, 1003, 1004, gap, 1005], frame)
    last = "x" if gap == INVISIBLE else "y"  # one separator alone ends a ring, or comes before one
    assert [token.axis for token in tokens] == ["y", "x", None, None, "y", "x", None, last]


def test_an_outline_in_a_prompt_starts_with_y():
    frame = Frame(np.zeros(2), np.array([10.0, 20.0]))
    boxes, ring = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.1, 0.2], [0.3, 0.4], [0.3, 0.2]])
    examples = example_prompt(15, np.zeros(1, np.int64), boxes, VOCAB, outlines=[[ring, ring]], short_points=9)
    points = np.array([[0.5, 0.5]])
    clicks = outline_prompt(
        14, points, np.ones(1, bool), VOCAB, box_yxyx=boxes[0], previous=[ring, ring], short_points=9
    )
    for prompt in (examples, clicks):
        tokens = [token for token in read_tokens(detection(), prompt.tolist(), frame) if token.axis is not None]
        assert [token.axis for token in tokens] == ["y", "x"] * (len(tokens) // 2)
        assert len(tokens) == 16 + 2 * (prompt is clicks)


def test_a_list_of_objects_is_told_apart_with_the_answer_of_each():
    task = detection()
    ids = [1001, 1002, 1003, 1004, 101, 1005, 1005, 1005, 1006, NOISE, 1000, 1000, 1010, 1010, NOISE, EOS, PAD, PAD]
    completion = said(ids, best=(102, 0.25))
    request = Request(task.prompt(), task.generation())
    exchange = Exchange([request], [completion], task.answers(IMAGE, [request], [completion]))
    (transcript,) = transcribe(task, IMAGE, exchange)
    assert [token.id for token in transcript.response] == ids[:16]  # the end is said, padding is not
    assert [(part.start, part.stop) for part in transcript.parts] == [(0, 5), (5, 10), (10, 15)]
    first, second, third = (part.answer for part in transcript.parts)
    assert first.box_xyxy == pytest.approx((20, 20, 40, 60))
    assert second is None  # no height
    assert (third.box_xyxy, third.category, third.score) == ((0, 0, 100, 200), DOG, pytest.approx(0.25))
    assert [token.probability for token in transcript.response] == [None] * 16  # not computed
    scored = [token.best for token in transcript.response]
    assert [i for i, best in enumerate(scored) if best] == [4, 9, 14]
    assert scored[14] == ("dog", pytest.approx(0.25))


def test_a_box_in_the_padding_says_no_answer():
    task = detection()
    narrow = replace(IMAGE, pixels=np.zeros((200, 20, 3), np.uint8))  # a fifth of the input's width
    completion = said([1001, 1003, 1009, 1009, 101], best=(101, 1.0))
    assert task.parts(narrow, Request(task.prompt(), task.generation()), completion) == [(0, 5, None)]


def test_tokens_about_an_object_belong_to_it_and_are_read_in_its_frame():
    task = Segmentation(SegmentationConfig(num_samples=2), VOCAB, [CAT, DOG])
    cat = Instance((10.0, 20.0, 30.0, 60.0), CAT, 0.5)
    frame = Frame(np.array([10.0, 20.0]), np.array([20.0, 40.0]))
    request = Request(np.array([11, 1000, 1000, 1010, 1010, 101]), task.generation(), subject=cat, closeup=frame)
    samples = np.array([[1000, 1005, 1010, 1010, 1010, 1000, EOS], [1001] * 7])
    scores = np.log(np.array([[0.5, 0.25, 1, 1, 1, 1, 0.125], [1] * 7], np.float32))
    completion = Completion(samples, scores, None, None, np.zeros(2, bool))
    (transcript,) = transcribe(task, IMAGE, Exchange([request], [completion], []))
    assert [str(token) for token in transcript.response[:2]] == ["y bin:0 = 20.0 px", "x bin:5 = 20.0 px"]
    assert [token.probability for token in transcript.response] == pytest.approx([0.5, 0.25, 1, 1, 1, 1, 0.125])
    assert transcript.num_samples == 1  # as the request says
    assert transcript.frame_xyxy == (10, 20, 30, 60)
    (part,) = transcript.parts
    assert (part.start, part.stop, part.answer) == (0, 7, cat)


def test_text_is_read_word_by_word_and_by_default_all_of_it_is_the_answer():
    text = WordTokenizer.build(["a cat sits"], min_count=1, max_size=20)
    vocab = Vocab(num_bins=11, text_base=1100, num_text=text.size, size=1100 + text.size)
    task = Captioning(CaptioningConfig(), vocab, [CAT], text)
    ids = [1100 + token for token in [*text.encode("a cat"), text.eos_id]]
    request = Request(task.prompt(), GenerationConfig(9, eos_id=ids[-1]))
    (transcript,) = transcribe(task, IMAGE, Exchange([request], [said([*ids, PAD, PAD])], []))
    assert [token.text for token in transcript.response[:2]] == ["a", "cat"]
    assert len(transcript.response) == 3
    (part,) = transcript.parts
    assert (part.start, part.stop, part.answer.text) == (0, 3, "a cat")


def test_what_was_asked_and_said_comes_with_every_prediction():
    from random_model import OLD
    from test_predictor import BOXES, IMAGES

    predictor = Predictor.from_pretrained(OLD, device="cpu")
    found = predictor.predict(IMAGES[0], list(predictor.tasks))
    assert set(found.exchanges) == set(predictor.tasks)
    for name, exchange in found.exchanges.items():
        assert len(exchange.requests) == len(exchange.completions)
        transcripts = transcribe(predictor.tasks[name], found.image, exchange)
        assert [len(each.prompt) for each in transcripts] == [len(each.prompt) for each in exchange.requests]
    given = predictor.predict(IMAGES[0], ["segmentation"], BOXES[0], categories="person")
    assert list(given.exchanges) == ["segmentation"]  # boxes that are given are not asked for
