"""What the format costs: true sequences, decoded and evaluated as if a model had written them."""

from dataclasses import replace

import numpy as np
import pytest

from pix2seq.data.formats.coco import read_coco
from pix2seq.data.transforms import transform_target
from pix2seq.geometry.affine import fit_affine
from pix2seq.geometry.polygons import rasterize, rle_to_mask
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.model.decoding.generate import Completion
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.request import Frame
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.types import Instance
from pix2seq.vocab import Vocab

SIZE = (640, 640)
BY_OBJECT = ("boxes_xyxy", "labels", "areas", "iscrowd", "annotation_ids", "segmentations", "keypoints")


@pytest.fixture(scope="module")
def dataset(shared):
    return read_coco(shared / "data" / "coco_mini", "val")


def written(tokens):
    zeros = np.zeros((1, len(tokens)), np.float32)
    return Completion(tokens[None], zeros, tokens[None], zeros, np.zeros(1, bool))


def frame_of(affine):
    """What an input of SIZE shows under an affine map from image to input."""
    return Frame(np.zeros(2), np.array([SIZE[1] / affine.scale_x, SIZE[0] / affine.scale_y]))


def answers(dataset, kind):
    """Instances by image id, decoded from what a task writes about the annotations."""
    vocab, rng = Vocab(), np.random.default_rng(0)
    if kind == "box":
        config = DetectionConfig(noise_objects=0, class_corruption="none")
        task = Detection(config, vocab, dataset.categories)
    elif kind == "mask":
        config = SegmentationConfig(max_objects=1000, num_samples=1, random_start=True)
        task = Segmentation(config, vocab, dataset.categories)
    else:
        config = KeypointConfig(crop=False, max_objects=1000, mask_inputs=False)
        task = Keypoint(config, vocab, dataset.categories)
    found = {}
    for index in range(len(dataset)):
        target = dataset.target(index)
        image = target.image
        affine = fit_affine((image.height, image.width), SIZE)
        frame = frame_of(affine)
        limits = (image.width, image.height)
        found[image.id] = []
        for example in task.examples(transform_target(target, affine, SIZE), SIZE, rng):
            out = written(example.targets)
            if kind == "box":
                found[image.id] += task.instances(out, frame, limits)
                continue
            # The prompt's own box: COCO's scores of masks and points do not look at it.
            y0, x0, y1, x1 = (vocab.coords(example.prompt[1:5]) * np.tile(frame.size[::-1], 2)).tolist()
            instance = Instance((x0, y0, x1, y1), task.categories[int(example.prompt[5]) - 100], 1.0)
            if kind == "mask":
                instance = replace(instance, polygons=task.mask(out.tokens, frame, limits)[0])
            else:
                instance = replace(instance, keypoints=task.points(out, instance.category, frame))
            found[image.id].append(instance)
    return found


@pytest.mark.parametrize(("kind", "least"), [("box", 0.990), ("mask", 0.986), ("keypoint", 0.999)])
def test_true_sequences_score_nearly_full_marks(dataset, kind, least):
    targets = [dataset.target(index) for index in range(len(dataset))]
    result = average_precision(targets, dataset.categories, answers(dataset, kind), kind=kind)
    print(f"{kind} AP {result.metrics['AP']:.4f}")
    assert result.metrics["AP"] >= least


def test_masks_come_back(dataset):
    """IoU of each mask with the annotation, both at the original size."""
    task = Segmentation(
        SegmentationConfig(max_objects=1, num_samples=1, random_start=False), Vocab(), dataset.categories
    )
    overlaps = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        image = target.image
        affine = fit_affine((image.height, image.width), SIZE)
        frame = frame_of(affine)
        for i, (segmentation, crowd) in enumerate(zip(target.segmentations, target.iscrowd, strict=True)):
            if crowd or not segmentation:
                continue
            one = replace(target, **{name: getattr(target, name)[i : i + 1] for name in BY_OBJECT})
            (example,) = task.examples(transform_target(one, affine, SIZE), SIZE, np.random.default_rng(0))
            rings, _ = task.mask(example.targets[None], frame, (image.width, image.height))
            ours = rasterize(rings, image.height, image.width)
            if isinstance(segmentation, dict):
                truth = rle_to_mask(segmentation)
            else:
                truth = rasterize(segmentation, image.height, image.width)
            if truth.any():
                overlaps.append((ours & truth).sum() / (ours | truth).sum())
    print(f"{len(overlaps)} masks: mean IoU {np.mean(overlaps):.4f}, 5th percentile {np.percentile(overlaps, 5):.4f}")
    assert np.mean(overlaps) >= 0.974
    assert np.percentile(overlaps, 5) >= 0.92
