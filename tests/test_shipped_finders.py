"""The models of the repository that find what a phrase or an example says, on new images: they read the question."""

from pathlib import Path

import numpy as np
import pytest

from pix2seq import Predictor
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.phrases import COLOURS, Phrase
from pix2seq.data.shapes import write_shapes
from pix2seq.geometry.boxes import box_iou_xyxy

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finders") / "shapes"
    write_shapes(folder, num_train=0, num_val=20, size=128, seed=20261201, max_objects=4, workers=1)
    return read_coco(folder, "val")


def best(found, name):
    """The best answer to a phrase: its score and its box."""
    some = [each for each in found if each.category.name == name]
    return (some[0].score, some[0].box_xyxy) if some else (0.0, (0, 0, 0, 0))


def test_phrases_are_read_word_by_word(shapes):
    """Each object that is alone in its class is asked for truly, in another colour and as another class."""
    predictor, rng = Predictor.from_pretrained(CHECKPOINTS / "by_words"), np.random.default_rng(0)
    names = {category.label: category.name for category in shapes.categories}
    right, by_colour, by_class = [], [], []
    for index in range(len(shapes)):
        target = shapes.target(index)
        image = predictor.encode(target.image.path)
        for i, label in enumerate(target.labels.tolist()):
            if (target.labels == label).sum() > 1:
                continue
            colour = target.attributes[i]["colour"]
            other = rng.choice([each for each in COLOURS if each != colour])
            absent = rng.choice([name for key, name in names.items() if key not in target.labels])
            phrases = [Phrase(names[label], colour), Phrase(names[label], other), Phrase(absent, colour)]
            true, wrong_colour, wrong_class = (phrase.text() for phrase in phrases)
            found = predictor.find(image, [true, wrong_colour, wrong_class], threshold=0.0)
            score, box = best(found, true)
            right.append(box_iou_xyxy(np.array([box], float), target.boxes_xyxy[[i]])[0, 0] >= 0.5)
            by_colour.append(score > best(found, wrong_colour)[0])
            by_class.append(score > best(found, wrong_class)[0])
    assert len(right) > 30
    assert np.mean(right) > 0.8
    assert np.mean(by_colour) > 0.85
    assert np.mean(by_class) > 0.85
