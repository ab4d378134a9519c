"""Captions filtered and written: what is kept is what matches, the report names the rest, the data stays as it was."""

import json
import shutil
from unittest import mock

import pytest
from colours import filled, seeing_colours
from PIL import Image
from random_model import OLD

from pix2seq import Predictor
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.types import Caption

CAPTIONS = {  # of each image, with the share of its pixels that is of that colour
    "red.png": {"Red.": 1.0, "Green and blue.": 0.0, "Nothing but red here": 1.0},
    "half.png": {"A red half.": 0.5, "A blue half.": 0.0},
    "blue.png": {"Green.": 0.0},
}
CHECKPOINT = ["--checkpoint", str(OLD), "--device", "cpu"]


@pytest.fixture(autouse=True)
def colours():
    with seeing_colours():
        yield


@pytest.fixture
def data(tmp_path):
    """Three images with captions and boxes for training, and one for validation."""
    folder = tmp_path / "data"
    for name in ("annotations", "train2017", "val2017"):
        (folder / name).mkdir(parents=True)
    for name, pixels in (("red", filled("red")), ("half", filled("red", share=0.5)), ("blue", filled("blue"))):
        Image.fromarray(pixels).save(folder / "train2017" / f"{name}.png")
    Image.fromarray(filled("green")).save(folder / "val2017" / "green.png")
    images = [{"id": i, "file_name": name, "width": 8, "height": 6} for i, name in enumerate(CAPTIONS, start=1)]
    texts = [(image["id"], text) for image in images for text in CAPTIONS[image["file_name"]]]
    captions = [{"id": 10 + i, "image_id": number, "caption": text} for i, (number, text) in enumerate(texts)]
    save(
        folder / "annotations/captions_train2017.json",
        {"info": {"year": 2026}, "images": images, "annotations": captions},
    )
    boxes = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "colour": "red", "iscrowd": 0}]
    kinds = [{"id": 7, "name": "thing"}]
    save(folder / "annotations/instances_train2017.json", {"images": images, "annotations": boxes, "categories": kinds})
    images = [{"id": 1, "file_name": "green.png", "width": 8, "height": 6}]
    captions = [{"id": 1, "image_id": 1, "caption": "Blue."}]
    save(folder / "annotations/captions_val2017.json", {"images": images, "annotations": captions})
    return folder


def save(path, content):
    path.write_text(json.dumps(content))


def load(path):
    return json.loads(path.read_text())


def run(command, data, out, *more):
    return main(["data", "captions", command, str(data), *CHECKPOINT, "--out", str(out), *more])


def captions_of(folder, split="train"):
    dataset = open_dataset(folder, split)
    targets = [dataset.target(i) for i in range(len(dataset))]
    return {target.image.path.name: list(target.captions) for target in targets}


def error_of(capsys, command, data, out, *more):
    assert run(command, data, out, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], ["Red.", "Nothing but red here", "A red half."]),
        (["--min-score", "0.51"], ["Red.", "Nothing but red here"]),
        (["--min-score", "0"], [text for texts in CAPTIONS.values() for text in texts]),
        (["--best", "1"], ["Red.", "A red half."]),
        (["--best", "1", "--min-score", "0"], ["Red.", "A red half.", "Green."]),
    ],
    ids=" ".join,
)
def test_captions_are_kept_by_score_and_rank_and_the_report_names_the_others(data, tmp_path, options, kept, capsys):
    out = tmp_path / "out"
    assert run("filter", data, out, "--batch-size", "2", *options) == 0
    content = load(out / "annotations/captions_train2017.json")
    assert [entry["caption"] for entry in content["annotations"]] == kept
    scores = {text: score for texts in CAPTIONS.values() for text, score in texts.items()}
    assert [entry["score"] for entry in content["annotations"]] == [scores[text] for text in kept]
    before = load(data / "annotations/captions_train2017.json")
    assert content["info"] == before["info"]
    assert content["images"] == before["images"]
    entries = {entry["caption"]: entry for entry in before["annotations"]}
    for entry in content["annotations"]:
        assert {name: entry[name] for name in ("id", "image_id")} == {
            name: entries[entry["caption"]][name] for name in ("id", "image_id")
        }
    report = load(out / "filter-report.json")
    assert {entry["caption"]: entry["score"] for entry in report["captions"]} == {
        text: score for text, score in scores.items() if text not in kept
    }
    least, best = report["min_score"], report["best"]
    for entry in report["captions"]:
        low = entry["score"] < least
        assert entry["reason"] == (f"its score is below {least:g}" if low else "one of this image is better"), best
        assert entry["file_name"].startswith("train2017/")
        assert entry["id"] == entries[entry["caption"]]["id"]
    assert report["kept"] == {"given": len(kept), "written": 0}
    assert report["dropped"] == {"given": 6 - len(kept), "written": 0}
    left = captions_of(out)
    assert report["num_images_without_captions"] == sum(not texts for texts in left.values())
    assert f"{len(kept)} captions kept and {6 - len(kept)} dropped" in capsys.readouterr().out


def test_all_else_of_the_data_is_there_without_a_copy_and_the_source_is_untouched(data, tmp_path):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    assert run("filter", data, out) == 0
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert captions_of(out) == {
        "red.png": ["Red.", "Nothing but red here"],
        "half.png": ["A red half."],
        "blue.png": [],
    }
    assert captions_of(out, "val") == {"green.png": ["Blue."]}
    target = open_dataset(out, "train").target(0)
    assert target.boxes_xyxy.tolist() == [[1, 1, 5, 5]]
    assert target.attributes[0]["colour"] == "red"
    links = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink())
    assert links == [
        "annotations/captions_val2017.json", "annotations/instances_train2017.json", "train2017", "val2017"
    ]  # fmt: skip
    moved = out.rename(tmp_path / "moved")
    assert captions_of(moved)["half.png"] == ["A red half."]


def test_data_of_other_layouts_and_of_a_filter_is_filtered_too(data, tmp_path):
    beside = tmp_path / "beside"
    shutil.copytree(data / "train2017", beside / "train")
    shutil.copy(data / "annotations/captions_train2017.json", beside / "train" / "captions.json")
    assert run("filter", beside, tmp_path / "a", "--min-score", "0.6") == 0
    assert captions_of(tmp_path / "a")["red.png"] == ["Red.", "Nothing but red here"]
    assert not (tmp_path / "a" / "train").is_symlink()
    assert (tmp_path / "a" / "train" / "red.png").is_symlink()
    assert run("filter", tmp_path / "a", tmp_path / "b", "--best", "1") == 0
    assert captions_of(tmp_path / "b") == {"red.png": ["Red."], "half.png": [], "blue.png": []}
    report = load(tmp_path / "b" / "filter-report.json")
    assert [entry["caption"] for entry in report["captions"]] == ["Nothing but red here"]


def test_captions_and_images_that_cannot_be_used_are_dropped_with_the_reason(data, tmp_path):
    path = data / "annotations/captions_train2017.json"
    content = load(path)
    content["annotations"] += [
        {"id": 90, "image_id": 99, "caption": "Red."}, {"id": 91, "image_id": 1, "caption": " "},
        {"id": 92, "image_id": [1], "caption": "Red."}, {"id": 93, "image_id": 1}, "nonsense",
    ]  # fmt: skip
    content["images"].append({"id": 5, "file_name": "gone.png", "width": 8, "height": 6})
    content["annotations"].append({"id": 94, "image_id": 5, "caption": "Red."})
    save(path, content)
    (data / "train2017/half.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run("filter", data, out) == 0
    report = load(out / "filter-report.json")
    reasons = {entry["id"]: entry["reason"] for entry in report["captions"]}
    assert [reasons[number] for number in (90, 91, 92, 93, 94)] == [
        "no such image", "no caption", "no such image", "no caption", "no such image",
    ]  # fmt: skip
    assert reasons[None] == "no caption"
    assert "half.png is not a readable image" in reasons[13]
    kept = load(out / "annotations/captions_train2017.json")["annotations"]
    assert [entry["caption"] for entry in kept] == ["Red.", "Nothing but red here"]


def said(texts):
    """A `caption` that says one text after another by the seed, the same about every image; `+` ends a cut one."""

    def caption(self, image, *, seed, top_p):
        assert top_p == 0.8
        text = texts[seed % len(texts)]
        return Caption(text.removesuffix("+"), -0.1, text.endswith("+"))

    return mock.patch.object(Predictor, "caption", caption)


def test_written_captions_are_added_with_their_scores_and_without_repeats(data, tmp_path):
    out = tmp_path / "out"
    with said(["Very red.", "red", "blue blue blue+", "Very  red", "A blue thing."]):
        assert run("write", data, out, "--per-image", "5", "--top-p", "0.8", "--seed", "5") == 0
    content = load(out / "annotations/captions_train2017.json")
    given = load(data / "annotations/captions_train2017.json")["annotations"]
    assert content["annotations"][: len(given)] == given
    added = content["annotations"][len(given) :]
    assert [(entry["image_id"], entry["caption"], entry["score"]) for entry in added] == [
        (1, "Very red.", 1), (1, "A blue thing.", 0),
        (2, "Very red.", 0.5), (2, "red", 0.5), (2, "A blue thing.", 0),
        (3, "Very red.", 0), (3, "red", 0), (3, "A blue thing.", 1),
    ]  # fmt: skip
    assert all(entry["written"] for entry in added)
    numbers = [entry["id"] for entry in content["annotations"]]
    assert len(set(numbers)) == len(numbers)
    report = load(out / "write-report.json")
    assert report["added"] == {"given": 0, "written": 8}
    assert report["left_out"] == {"captions that were cut or empty": 3, "captions that the image had": 4}
    assert [entry["caption"] for entry in report["captions"]] == [entry["caption"] for entry in added]
    assert captions_of(out)["blue.png"] == ["Green.", "Very red.", "red", "A blue thing."]

    assert run("filter", out, tmp_path / "filtered") == 0
    report = load(tmp_path / "filtered" / "filter-report.json")
    assert (report["kept"], report["dropped"]) == ({"given": 3, "written": 4}, {"given": 3, "written": 4})
    assert captions_of(tmp_path / "filtered")["blue.png"] == ["A blue thing."]
    assert {entry["written"] for entry in report["captions"]} == {True, False}


def test_images_without_any_captions_get_some(data, tmp_path):
    (data / "annotations/captions_train2017.json").unlink()
    with said(["Red.", "Blue."]):
        assert run("write", data, tmp_path / "out", "--per-image", "1", "--top-p", "0.8") == 0
    assert captions_of(tmp_path / "out") == {name: ["Red."] for name in CAPTIONS}


def test_a_writer_that_cannot_match_gives_no_scores(data, tmp_path):
    with said(["Something."]), mock.patch.object(Predictor, "can_match", False, create=True):
        assert run("write", data, tmp_path / "out", "--top-p", "0.8") == 0
    content = load(tmp_path / "out/annotations/captions_train2017.json")
    assert [entry for entry in content["annotations"] if "score" in entry] == []
    assert captions_of(tmp_path / "out")["blue.png"] == ["Green.", "Something."]


def test_a_real_writer_samples_by_the_seed(data, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with mock.patch.object(Predictor, "can_match", False, create=True):
            assert run("write", data, tmp_path / name, "--per-image", "2", "--seed", str(seed)) == 0
        report = load(tmp_path / name / "write-report.json")
        texts.append([entry["caption"] for entry in report["captions"]])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2] or not texts[0]


def test_bad_input_ends_in_one_line_and_leaves_nothing(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in error_of(capsys, "filter", tmp_path / "nowhere", out)
    assert "no COCO captions of split 'test'" in error_of(capsys, "filter", data, out, "--split", "test")
    assert "expected a number from 0 to 1" in error_of(capsys, "filter", data, out, "--min-score", "2")
    assert "not an empty folder" in error_of(capsys, "filter", data, data)
    path = data / "annotations/captions_train2017.json"
    content = load(path)
    for damaged, message in (
        ("{", "no readable JSON"),
        ("[]", "no list of images"),
        (json.dumps({"images": content["images"]}), "no list of annotations"),
        (json.dumps(content | {"images": [{"id": 1, "file_name": "other.png"}]}), "none of the 1 images"),
    ):
        path.write_text(damaged)
        assert message in error_of(capsys, "filter", data, out)
    path.unlink()
    assert "no COCO captions of split 'train'" in error_of(capsys, "filter", data, out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data"]


def test_what_fails_on_the_way_leaves_no_folder(data, tmp_path):
    def failing(self, image, sentences):
        raise RuntimeError("the model")

    with mock.patch.object(Predictor, "match", failing, create=True), pytest.raises(RuntimeError):
        run("filter", data, tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data"]
