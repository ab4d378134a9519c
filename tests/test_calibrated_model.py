"""A calibrated checkpoint: what is asked of it, what is drawn, what its files hold; and the report of an evaluation."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_model import OLD, random_model
from test_calibration import KNOWN, graded_of

from pix2seq import Predictor
from pix2seq.calibrate import Calibrated, calibrate, write_calibration
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError
from pix2seq.infer.predict import predict_files, read_boxes
from pix2seq.metrics.calibration import CalibrationReport, ScoreMap, TaskCalibration
from pix2seq.model.pretrained import find_checkpoint
from pix2seq.tasks.objects import Boxes

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "checkpoints" / "shapes"
IMAGE = np.random.default_rng(3).integers(0, 256, (40, 60, 3)).astype(np.uint8)
# The class `circle`, if it is known, goes by a map that turns the order of classes round.
MAPS = (
    ((), ScoreMap("temperature", (0.0, 1.0), (0.5, 1.0))),
    (("circle",), ScoreMap("isotonic", (0.0, 0.5, 1.0), (0.0, 0.1, 0.4))),
)
CALIBRATION = {name: TaskCalibration(0.51, 0.9, 0.5, MAPS) for name in ("detection", "segmentation", "captioning")}


@pytest.fixture(scope="module")
def plain():
    return Predictor(random_model())


@pytest.fixture(scope="module")
def calibrated():
    model = random_model()
    model.calibration = {name: each.to_json() for name, each in CALIBRATION.items()}
    return Predictor(model)


def mapped(instance, task="detection"):
    return CALIBRATION[task].probability(instance.score, instance.category.name)


def test_scores_are_probabilities_and_the_raw_ones_stay_to_be_seen(plain, calibrated):
    before, after = plain.detect(IMAGE), calibrated.detect(IMAGE)
    assert len({instance.category.name for instance in before}) > 1
    expected = sorted((replace(i, score=mapped(i), raw_score=i.score) for i in before), key=lambda i: -i.score)
    assert after == expected
    assert after[0].to_json()["raw_score"] == round(after[0].raw_score, 6)
    assert "raw_score" not in before[0].to_json()


def test_which_boxes_are_asked_about_does_not_depend_on_the_calibration(plain, calibrated):
    assert all(i.raw_score < 0.05 < 0.5 < i.score for i in calibrated.detect(IMAGE) if i.category.name != "circle")
    assert calibrated.segment(IMAGE) == plain.segment(IMAGE) == []  # `min_box_score` is 0.05


@pytest.fixture
def all_boxes(plain, calibrated, monkeypatch):
    """Ask about every found box."""
    for predictor in (plain, calibrated):
        monkeypatch.setattr(predictor, "tasks", dict(predictor.tasks))
        predictor.configure(min_box_score=0.0)


def test_masks_are_those_of_the_plain_model_with_scores_of_their_own(plain, calibrated, all_boxes):
    before, after = plain.segment(IMAGE), calibrated.segment(IMAGE)
    by_box = {(i.box_xyxy, i.category.name): i for i in before}
    assert len(after) == len(before) > 1
    for each in after:
        one = by_box[each.box_xyxy, each.category.name]
        assert (each.score, each.raw_score, each.rle) == (pytest.approx(mapped(one)), one.score, one.rle)
        assert 0 <= each.mask_agreement <= 1
    again = calibrated.segment(IMAGE, boxes=calibrated.detect(IMAGE))
    kept = [i for i in again if by_box.get((i.box_xyxy, i.category.name))]
    assert [(i.score, i.raw_score) for i in kept] == [(i.score, i.raw_score) for i in after]


def test_answers_about_given_boxes_are_not_calibrated(plain, calibrated):
    ask = [[2, 2, 40, 30]], plain.model.categories[0].name
    (given,) = calibrated.segment(IMAGE, boxes=ask[0], categories=ask[1])
    assert (given.score, given.raw_score) == (1.0, None)
    (again,) = calibrated.ask("segmentation", [IMAGE], [Boxes(*ask, [0.25])])[0]
    assert (again.score, again.raw_score) == (0.25, None)


def test_a_task_that_is_not_calibrated_keeps_its_scores(plain, calibrated, all_boxes):
    person = next(category for category in plain.model.categories if category.keypoints)
    (before,), (after,) = (
        each.keypoints(IMAGE, boxes=[replace(each.detect(IMAGE)[0], box_xyxy=(0.0, 0.0, 30.0, 30.0), category=person)])
        for each in (plain, calibrated)
    )
    assert (before.score, before.raw_score) == (after.score, after.raw_score) == (before.keypoint_score, None)


def test_a_caption_gets_a_probability_beside_its_score(plain, calibrated):
    before, after = plain.caption(IMAGE), calibrated.caption(IMAGE)
    assert after == replace(before, probability=pytest.approx(0.5 + 0.5 * np.exp(before.score)))
    assert after.to_json()["probability"] == pytest.approx(after.probability, abs=1e-6)
    assert "probability" not in before.to_json()


def test_objects_with_masks_keep_the_score_of_their_box(calibrated, all_boxes):
    calibrated.configure(score_weight=1.0)  # so that a mask's own score is another one
    found = calibrated.detect(IMAGE)
    prediction = calibrated.predict(IMAGE, ["segmentation"])
    assert any(i.polygons for i in prediction.instances)
    assert [(i.score, i.raw_score) for i in prediction.instances] == [(i.score, i.raw_score) for i in found]


def test_what_is_drawn_is_of_the_checkpoints_threshold(plain, calibrated):
    assert calibrated.thresholds == {"detection": 0.51, "segmentation": 0.51, "captioning": 0.51, "keypoint": 0.3}
    prediction = calibrated.predict(IMAGE, ["detection"])
    scores = [i.score for i in prediction.instances]
    assert min(scores) < 0.51 < max(scores)
    assert [i.score for i in prediction.likely] == [score for score in scores if score >= 0.51]
    assert prediction.draw().tobytes() == prediction.draw(min_score=0.51).tobytes()
    assert prediction.draw().tobytes() != prediction.draw(min_score=0.0).tobytes()
    assert set(plain.thresholds.values()) == {0.3}


def test_files_for_labelling_tools_hold_what_is_drawn(calibrated, tmp_path):
    calibrated.model.save_pretrained(tmp_path / "model")
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    predict_files(
        [tmp_path / "a.png"], checkpoint=tmp_path / "model", out=tmp_path / "out", tasks=["detection"],
        label_format="coco", device="cpu",
    )  # fmt: skip
    own = json.loads((tmp_path / "out" / "a.json").read_text())["instances"]
    written = json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"]
    likely = [each["bbox"] for each in own if each["score"] >= 0.51]
    assert 0 < len(likely) < len(own)
    assert [each["bbox"] for each in written] == likely


def test_written_objects_are_asked_about_by_their_raw_scores(calibrated, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(calibrated.predict(IMAGE, ["detection"]).to_json()))
    read = read_boxes(path).scores
    assert read == pytest.approx([i.raw_score for i in calibrated.detect(IMAGE)], abs=1e-6)


def test_a_calibration_goes_where_the_model_goes(calibrated, tmp_path):
    calibrated.model.save_pretrained(tmp_path / "copy")
    again = Predictor.from_pretrained(tmp_path / "copy", device="cpu")
    assert again.calibration == CALIBRATION
    assert again.detect(IMAGE) == calibrated.detect(IMAGE)


@pytest.mark.parametrize(
    "content",
    [3, [], {"detection": 3}, {"detection": {}}, {"detection": KNOWN.to_json() | {"threshold": -1}}],
)
def test_a_broken_calibration_is_refused_in_a_line(content, tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "broken")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"calibration": content}))
    with pytest.raises(InputError, match="run pix2seq calibrate again") as caught:
        Predictor.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def result_of(name):
    report = CalibrationReport.of(graded_of([0.5], [True]))
    return Calibrated(name, CALIBRATION[name], "isotonic, one map", report, report, True)


def test_writing_changes_the_config_alone_and_leaves_a_whole_checkpoint(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert write_calibration(folder, [result_of("detection")]) == folder
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {"config.json", "manifest.json"}
    assert find_checkpoint(folder) == folder  # its manifest agrees
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert new == old | {"calibration": {"detection": CALIBRATION["detection"].to_json()}}


def test_a_copy_holds_the_model_and_not_the_state_of_its_training(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "model")
    (folder / "state.json").write_text("{}")
    (folder / "state").mkdir()
    before = (folder / "config.json").read_bytes()
    out = write_calibration(folder, [result_of("detection")], tmp_path / "out")
    expected = {path.name for path in OLD.iterdir() if path.name != "manifest.json"}
    assert {path.name for path in out.iterdir()} == expected
    assert (folder / "config.json").read_bytes() == before
    assert set(Predictor.from_pretrained(out, device="cpu").calibration) == {"detection"}


def test_calibrating_twice_begins_from_raw_scores(plain, calibrated, tmp_path):
    write_shapes(tmp_path, num_train=0, num_val=2, size=32, seed=0, easy=True, workers=1)
    dataset = open_dataset(tmp_path, "val")
    with pytest.raises(InputError, match="is calibrated already"):
        calibrate(calibrated, dataset)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Some images, and the repository's model as it was trained (`raw`) and calibrated on them (`model`)."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_shapes(folder / "data", num_train=0, num_val=30, seed=11, workers=1)
    raw = shutil.copytree(SHAPES, folder / "raw")
    content = json.loads((raw / "config.json").read_text())
    del content["calibration"]
    (raw / "config.json").write_text(json.dumps(content))
    arguments = ["--checkpoint", str(raw), "--data", str(folder / "data"), "--device", "cpu"]
    assert main(["calibrate", *arguments, "--out", str(folder / "model"), "--precision", "0.9"]) == 0
    return folder


def evaluated(world, checkpoint, *more):
    arguments = ["--checkpoint", str(checkpoint), "--data", str(world / "data"), "--device", "cpu"]
    assert main(["eval", *arguments, "--out", str(world / "metrics.json"), *more]) == 0
    return json.loads((world / "metrics.json").read_text())


def test_the_command_calibrates_what_it_measures(world):
    before = evaluated(world, world / "raw", "--task", "detection,segmentation")
    after = evaluated(world, world / "model", "--task", "detection,segmentation")
    question = "segmentation/found_boxes"
    by_class = [[row["AP"] for row in each["scores"][question]["per_class"]] for each in (before, after)]
    assert by_class[0] == by_class[1]
    assert after["metrics"]["segmentation/ECE"] < before["metrics"]["segmentation/ECE"]
    # Of boxes, whose answers stay the same ones; calibrated masks are asked about other boxes.
    assert after["metrics"]["detection/Brier"] <= before["metrics"]["detection/Brier"]
    stored = json.loads((world / "model" / "config.json").read_text())["calibration"]
    assert {"detection", "segmentation", "keypoint"} >= set(stored) >= {"detection", "segmentation"}
    assert stored["detection"]["precision"] >= 0.9
    # The rest of the folder is the model as it was.
    assert (world / "model" / "model.safetensors").read_bytes() == (SHAPES / "model.safetensors").read_bytes()


def test_a_report_is_one_page_with_every_task_and_nothing_to_load(world):
    page = world / "report.html"
    content = evaluated(world, world / "model", "--html", str(page), "--charts", str(world / "charts"), "--limit", "3")
    html = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|<script|<link', html)
    for name in content["scores"]:
        assert f"<h2>{name}</h2>" in html
    # Three images may have no person, whose keypoints are asked about.
    assert html.count("<h3>Worst images</h3>") >= len([name for name in content["scores"] if "keypoint" not in name])
    pairs = re.findall(r"<figcaption>(\S+): (truth|[0-9.]+)</figcaption>", html)
    assert len(pairs) % 2 == 0
    assert all(pairs[i][0] == pairs[i + 1][0] and pairs[i][1] == "truth" for i in range(0, len(pairs), 2))
    assert str(world / "model") in html
    assert "pix2seq " in html
    assert f"<td>{content['metrics']['AP']:.3f}</td>" in html
    charts = {path.name for path in (world / "charts").iterdir()}
    assert charts >= {"detection.precision-recall.svg", "detection.confusion.svg", "detection.reliability.svg"}
    assert evaluated(world, world / "model", "--html", str(page), "--task", "detection", "--limit", "1")  # replaced


def test_a_report_replaces_no_other_file(world, tmp_path, capsys):
    page = tmp_path / "mine.html"
    page.write_text("my own page")
    arguments = ["--checkpoint", str(SHAPES), "--data", str(world / "data"), "--html", str(page)]
    assert main(["eval", *arguments]) == 2
    assert "is no report" in capsys.readouterr().err
    assert page.read_text() == "my own page"


def test_too_few_answers_are_refused(world, tmp_path, capsys):
    arguments = ["--checkpoint", str(SHAPES), "--data", str(world / "data"), "--limit", "1", "--out", str(tmp_path)]
    assert main(["calibrate", *arguments, "--device", "cpu"]) == 2
    assert "give more images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
