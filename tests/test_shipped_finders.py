"""The models of the repository that find what a phrase or an example says, on new images: they read the question."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pix2seq import Predictor
from pix2seq.data.companions import ObjectsByClass
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.phrases import COLOURS, Phrase
from pix2seq.data.shapes import write_shapes
from pix2seq.data.things import write_things
from pix2seq.geometry.boxes import box_iou_xyxy
from pix2seq.metrics.mask_reward import mask_iou
from pix2seq.tasks.outlines import visible_rings

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


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Scenes of coloured letters, which the model has not seen in training."""
    folder = tmp_path_factory.mktemp("letters")
    font = ImageFont.load_default(size=120)
    colours = ("red", "gold", "navy", "teal", "white", "purple", "black", "orange", "hotpink", "lime", "brown", "cyan")
    (folder / "cutouts").mkdir()
    for letter, colour in zip("ABEGHKMPRSXZ", colours, strict=True):
        canvas = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(canvas).text((64, 64), letter, fill=colour, font=font, anchor="mm", stroke_width=4)
        canvas.save(folder / "cutouts" / f"letter-{letter.lower()}.png")
    scenes = folder / "scenes"
    write_things(scenes, folder / "cutouts", num_train=1, num_val=24, size=128, seed=5, unseen_share=0.0, workers=1)
    return read_coco(scenes, "val")


def test_another_example_gets_another_answer(letters):
    """Each image is asked by an object of another image that is in it, and by one that is not."""
    predictor, objects = Predictor.from_pretrained(CHECKPOINTS / "by_example"), ObjectsByClass(letters)
    images = [predictor.encode(each.path) for each in letters.images]
    rng, found, empty, outlined = np.random.default_rng(0), [], [], []
    for index, image in enumerate(images):
        target = letters.target(index)
        for is_there, labels in (
            (True, np.unique(target.labels)),
            (False, np.setdiff1d(objects.labels, target.labels)),
        ):
            for label in rng.permutation(labels)[:3].tolist():
                drawn = objects.draw(label, rng, but_image_id=target.image.id)
                if drawn is None:
                    continue
                box = tuple(letters.target(drawn.image).boxes_xyxy[drawn.object].tolist())
                answers = predictor.find(image, like=(images[drawn.image], box))
                if is_there:
                    best = np.array([answers[0].box_xyxy if answers else (0, 0, 0, 0)], float)
                    overlaps = box_iou_xyxy(best, target.boxes_xyxy)[0] * (target.labels == label)
                    found.append(overlaps.max() >= 0.5)
                    if found[-1]:
                        truth = visible_rings(target, int(overlaps.argmax()), image.pixels.shape[:2])
                        outlined.append(mask_iou(answers[0].polygons, truth, image.pixels.shape[:2]))
                else:
                    empty.append(not answers)
    assert np.mean(found) > 0.5
    assert np.mean(empty) >= 0.7
    assert np.mean(outlined) > 0.5  # letters are thin
