"""Predictions as files that labelling tools import as pre-annotations: COCO, Label Studio, CVAT and YOLO.

Sources of the formats: cocodataset.org (format of data), labelstud.io/guide/predictions and task_format, docs.cvat.ai
(XML annotation format 1.1; Ultralytics YOLO) and docs.ultralytics.com/datasets. The docs say how each is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import yaml

from pix2seq.geometry.polygons import rasterize
from pix2seq.types import Category

LOCAL_FILES = "/data/local-files/?d="  # how Label Studio addresses files below its document root
POINT_SIZE = 0.5  # of a drawn keypoint in Label Studio, in per cent of the width


@dataclass(frozen=True)
class LabelledImage:
    """What was found in an image."""

    name: str  # path below the folder that all images lie in, with slashes
    width: int
    height: int
    instances: Sequence[Mapping[str, Any]]  # as in NAME.json
    captions: Sequence[str] = ()


def coco_files(images: Sequence[LabelledImage], categories: Sequence[Category]) -> dict[str, str]:
    """Return coco.json, which CVAT ("COCO 1.0", "COCO Keypoints 1.0"), Roboflow and others import."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        for found in image.instances:
            points = found["keypoints"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": found["category_id"],
                    "bbox": found["bbox"],
                    "area": _area(found, image),
                    "iscrowd": 0,
                    "segmentation": found["segmentation"],
                    **({"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])} if points else {}),
                    "score": found["score"],
                }
            )
    content = {
        "info": {"description": "Predictions by pix2seq"},
        "images": [
            {"id": number, "file_name": image.name, "width": image.width, "height": image.height}
            for number, image in enumerate(images, 1)
        ],
        "categories": [_coco_category(category) for category in categories],
        "annotations": annotations,
    }
    return {"coco.json": _json(content)}


def label_studio_files(images: Sequence[LabelledImage], categories: Sequence[Category]) -> dict[str, str]:
    """Return labelstudio.json, tasks with predictions, and labelstudio.xml, the labelling interface that they need."""
    tasks = []
    points_of = {category.id: category.keypoints for category in categories}
    for image in images:
        regions = [
            region
            for number, found in enumerate(image.instances)
            for region in _regions(number, found, image, points_of[found["category_id"]])
        ]
        if image.captions:
            value = {"text": list(image.captions)}
            regions.append({"id": "text", "from_name": "text", "to_name": "image", "type": "textarea", "value": value})
        scores = [found["score"] for found in image.instances]
        prediction = {"model_version": "pix2seq", "score": float(np.mean(scores)) if scores else 0.0, "result": regions}
        tasks.append({"data": {"image": LOCAL_FILES + quote(image.name)}, "predictions": [prediction]})
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    names = [category.name for category in categories]
    points = [f"{category.name}: {point}" for category in categories for point in category.keypoints]
    for tag, control, values in (
        ("RectangleLabels", "box", names),
        ("PolygonLabels", "mask", names),
        ("KeyPointLabels", "point", points),
    ):
        if values:
            labels = ElementTree.SubElement(view, tag, name=control, toName="image")
            for text in values:
                ElementTree.SubElement(labels, "Label", value=text)
    ElementTree.SubElement(view, "TextArea", name="text", toName="image")
    return {"labelstudio.json": _json(tasks), "labelstudio.xml": _xml(view, declared=False)}


def cvat_files(images: Sequence[LabelledImage], categories: Sequence[Category]) -> dict[str, str]:
    """Return cvat.xml, "CVAT for images 1.1". Polygons and skeletons of one object are a group."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for category in categories:
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = category.name
    points_of = {category.id: category.keypoints for category in categories}
    group = 0
    for number, image in enumerate(images):
        size = {"width": str(image.width), "height": str(image.height)}
        element = ElementTree.SubElement(root, "image", {"id": str(number), "name": image.name} | size)
        for order, found in enumerate(reversed(image.instances)):  # the best on top
            common = {"label": found["category"], "source": "auto", "occluded": "0", "z_order": str(order)}
            rings, points = found["segmentation"], found["keypoints"]
            if len(rings) + bool(points) > 1:
                group += 1
                common["group_id"] = str(group)
            for ring in rings:
                ElementTree.SubElement(element, "polygon", common, points=_pairs(ring))
            if points:
                skeleton = ElementTree.SubElement(element, "skeleton", common)
                for name, x, y, seen in zip(points_of[found["category_id"]], *_columns(points), strict=True):
                    place = {"label": name, "points": _pairs([x, y])}
                    flags = {"occluded": str(int(seen == 1)), "outside": str(int(seen == 0))}
                    ElementTree.SubElement(skeleton, "points", place | flags)
            if not rings and not points:
                x, y, width, height = found["bbox"]
                corners = {"xtl": x, "ytl": y, "xbr": x + width, "ybr": y + height}
                texts = {key: f"{value:.2f}" for key, value in corners.items()}
                ElementTree.SubElement(element, "box", common | texts)
    return {"cvat.xml": _xml(root)}


def yolo_files(images: Sequence[LabelledImage], categories: Sequence[Category]) -> dict[str, str]:
    """Return data.yaml, train.txt and a file of labels for each image, of one kind: polygons, keypoints or boxes.

    Polygons are written if any object has some, else keypoints; other objects then are left out, because a folder
    holds lines of one kind. Coordinates are shares of the image.
    """
    every = [found for image in images for found in image.instances]
    kind = next((kind for kind in ("segmentation", "keypoints") if any(found[kind] for found in every)), "bbox")
    numbers = {category.id: number for number, category in enumerate(categories)}
    num_points = max((len(category.keypoints) for category in categories), default=0)
    files = {}
    for image in images:
        scale = np.array([image.width, image.height], np.float64)
        lines = []
        for found in image.instances:
            x, y, width, height = found["bbox"]
            box = np.array([[x + width / 2, y + height / 2], [width, height]]) / scale
            rows = [box.ravel()]
            if kind == "segmentation":
                rows = [(np.reshape(ring, (-1, 2)) / scale).ravel() for ring in found[kind]]
            elif kind == "keypoints":
                points = np.zeros((num_points, 3))
                given = np.reshape(found[kind], (-1, 3))
                points[: len(given)] = given / [*scale, 1]
                rows = [np.concatenate([box.ravel(), points.ravel()])] if len(given) else []
            number = numbers[found["category_id"]]
            lines += [" ".join([str(number), *(f"{value:.6g}" for value in row)]) for row in rows]
        files[yolo_label_file(image.name)] = "".join(f"{line}\n" for line in lines)
    config: dict[str, Any] = {"path": ".", "train": "train.txt"}
    if kind == "keypoints":
        config["kpt_shape"] = [num_points, 3]
    config["names"] = {number: category.name for number, category in enumerate(categories)}
    listed = "".join(f"images/train/{image.name}\n" for image in images)
    head = {"yolo/data.yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "yolo/train.txt": listed}
    return head | files


def yolo_label_file(name: str) -> str:
    """Return the file of labels of an image."""
    return f"yolo/labels/train/{PurePosixPath(name).with_suffix('.txt')}"


FORMATS: dict[str, Callable[[Sequence[LabelledImage], Sequence[Category]], dict[str, str]]] = {
    "coco": coco_files,
    "labelstudio": label_studio_files,
    "cvat": cvat_files,
    "yolo": yolo_files,
}


def _regions(
    number: int, found: Mapping[str, Any], image: LabelledImage, points: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the regions of an object in Label Studio: its polygons, or else its box, and its keypoints."""
    scale = 100 / np.array([image.width, image.height])
    x, y, width, height = (np.reshape(found["bbox"], (2, 2)) * scale).ravel().tolist()
    name = found["category"]
    parts: list[tuple[str, str, dict[str, Any]]] = []
    for ring in found["segmentation"]:
        corners = (np.reshape(ring, (-1, 2)) * scale).tolist()
        parts.append(("mask", "polygonlabels", {"points": corners, "closed": True, "polygonlabels": [name]}))
    if not parts:
        box = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [name]}
        parts.append(("box", "rectanglelabels", box))
    if found["keypoints"]:
        for point, x, y, seen in zip(points, *_columns(found["keypoints"], scale), strict=True):
            value = {"x": x, "y": y, "width": POINT_SIZE, "keypointlabels": [f"{name}: {point}"]}
            parts += [("point", "keypointlabels", value)] if seen else []
    common = {"to_name": "image", "original_width": image.width, "original_height": image.height, "image_rotation": 0}
    return [
        {"id": f"{number}-{i}", "from_name": control, "type": kind, "value": value, "score": found["score"], **common}
        | ({"parentID": f"{number}-0"} if i else {})
        for i, (control, kind, value) in enumerate(parts)
    ]


def _coco_category(category: Category) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": category.id, "name": category.name, "supercategory": ""}
    if category.keypoints:
        entry["keypoints"] = list(category.keypoints)
        entry["skeleton"] = [[a + 1, b + 1] for a, b in category.skeleton]  # COCO counts from 1
    return entry


def _area(found: Mapping[str, Any], image: LabelledImage) -> float:
    """Return the area of an object's mask, or of its box if it has none, in square pixels."""
    if found["segmentation"]:
        rings = [np.reshape(ring, (-1, 2)) for ring in found["segmentation"]]
        return float(rasterize(rings, image.height, image.width).sum())
    return round(found["bbox"][2] * found["bbox"][3], 2)


def _columns(points: Sequence[float], scale: Iterable[float] = (1.0, 1.0)) -> list[list[float]]:
    """Return x, y and visibility of keypoints x, y, v, ..."""
    return (np.reshape(points, (-1, 3)) * [*scale, 1.0]).T.tolist()


def _pairs(values: Sequence[float]) -> str:
    return ";".join(f"{x:.2f},{y:.2f}" for x, y in zip(values[::2], values[1::2], strict=True))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _xml(root: ElementTree.Element, *, declared: bool = True) -> str:
    """Return the text of an XML file; Label Studio refuses an interface with a declaration of its encoding."""
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="utf-8"?>\n' if declared else ""
    return f"{head}{ElementTree.tostring(root, encoding='unicode')}\n"
