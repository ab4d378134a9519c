"""A model that compares images and sentences by colour, in place of one that has learned to: for tests of what uses it.

An image is embedded by its mean colour and matches a sentence by its share of pixels of the colour that it names.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np

from pix2seq import Predictor
from pix2seq.predictor import load_pixels
from pix2seq.results import Instances
from pix2seq.tasks.request import EncodedImage
from pix2seq.types import Category, Instance

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
FOUND = Category(1, 1, "object")


def pixels_of(image):
    return image.pixels if isinstance(image, EncodedImage) else load_pixels(image)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embed(predictor, images):
    return unit(np.stack([pixels_of(image).reshape(-1, 3).mean(axis=0) + 1 for image in images]))


def embed_text(predictor, sentences):
    return unit(np.stack([sum((np.array(COLOURS[word]) for word in named(text)), np.ones(3)) for text in sentences]))


def match(predictor, image, sentences):
    flat = pixels_of(image).reshape(-1, 3)
    share = {word: np.mean(np.all(flat == colour, axis=1)) for word, colour in COLOURS.items()}
    return np.array([max((share[word] for word in named(text)), default=0.0) for text in sentences])


def find(predictor, image, like=None, words=None):
    """The box around all pixels of a colour: of the first pixel in the example's box, or of the first word."""
    pixels = pixels_of(image)
    if like is not None:
        ((example, (x0, y0, _, _)),) = like
        colour = pixels_of(example)[int(y0), int(x0)]
    else:
        colour = COLOURS[named(words)[0]]
    ys, xs = np.nonzero(np.all(pixels == colour, axis=2))
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    found = [] if box is None else [Instance(tuple(map(float, box)), FOUND, 0.75)]
    return Instances(found, size=(pixels.shape[1], pixels.shape[0]))


def named(sentence):
    return [word for word in sentence.lower().strip(".").split() if word in COLOURS]


class SeeingColours:
    """What embedding needs of a predictor."""

    embed = embed


@contextmanager
def seeing_colours():
    """Let all predictors see colours; yield the number of images of each call of `embed`."""
    calls = []

    def counted(predictor, images):
        calls.append(len(images))
        return embed(predictor, images)

    able = dict.fromkeys(("can_match", "can_find_like", "can_find_words"), True)
    methods = {"embed": counted, "embed_text": embed_text, "match": match, "find": find}
    with mock.patch.multiple(Predictor, create=True, **methods, **able):
        yield calls


def filled(colour, size=(8, 6), *, other=(0, 0, 0), share=1.0):
    """Pixels of a colour by name; of the last columns, all but `share`, of another one."""
    width, height = size
    pixels = np.full((height, width, 3), COLOURS[colour], np.uint8)
    pixels[:, round(width * share) :] = other
    return pixels
