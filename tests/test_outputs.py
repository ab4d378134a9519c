"""What `predict` writes: never onto inputs or files of others, the same after any kill, and all that can be done."""

import json
import os
import random
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import dying
import numpy as np
import pytest
from forked import forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pix2seq.cli import main
from pix2seq.data.image import batch_by_pixels
from pix2seq.errors import InputError
from pix2seq.files import write_atomically
from pix2seq.infer.outputs import JOURNAL, Outputs, output_names

MODEL = Path(__file__).parent / "fixtures" / "checkpoint-0.1"
QUICK = ["--checkpoint", str(MODEL), "--task", "detection", "--device", "cpu", "--num-objects", "2"]


def write_images(folder, count, suffix=".png"):
    """Write small images, each of its own content and size."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"{i:02}{suffix}")
    return sorted(folder.iterdir())


def predict(*arguments):
    return main(["predict", *map(str, arguments), *QUICK])


def error(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "\n".join(lines)
    found = [line for line in lines if line.startswith("error: ")]
    assert len(found) == 1, lines
    return found[0]


def contents(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".png") and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_an_output_never_replaces_an_input(tmp_path, capsys):
    (image,) = write_images(tmp_path / "own", 1)
    before = image.read_bytes()
    for more in ([], ["--overwrite"]):
        assert predict(image, "--out", image.parent, *more) == 2
        assert f"{image} would replace {image}, which is read" in error(capsys)
        assert image.read_bytes() == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / image.name).symlink_to(image)
    assert predict(image, "--out", tmp_path / "link", "--overwrite") == 2
    assert "which is read" in error(capsys)
    assert list(image.parent.iterdir()) == [image]


def test_the_boxes_that_were_asked_about_stay(tmp_path, capsys):
    (image,) = write_images(tmp_path / "images", 1)
    boxes = tmp_path / "labels" / "00.json"
    boxes.parent.mkdir()
    boxes.write_text(json.dumps({"instances": [{"bbox": [1, 1, 9, 9], "category": "person"}]}))
    before = boxes.read_bytes()
    for given_boxes in (boxes, boxes.parent):
        arguments = [image, "--boxes", given_boxes, "--out", boxes.parent, "--overwrite", "--checkpoint", MODEL]
        assert main(["predict", *map(str, arguments), "--task", "segmentation"]) == 2
        assert "which is read" in error(capsys)
    assert boxes.read_bytes() == before


def test_the_files_of_a_checkpoint_stay(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (image,) = write_images(tmp_path / "images", 1)
    image = image.rename(image.with_name("config.png"))
    arguments = [image, "--out", model, "--checkpoint", model, "--overwrite", "--task", "detection"]
    assert main(["predict", *map(str, arguments)]) == 2
    assert "config.json, which is read" in error(capsys)
    assert (model / "config.json").read_bytes() == (MODEL / "config.json").read_bytes()


def test_a_file_of_somebody_else_is_replaced_only_with_overwrite(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 2), tmp_path / "out"
    out.mkdir()
    (out / "01.json").write_text("labels of labelme")
    assert predict(*images, "--out", out) == 2
    assert f"{out / '01.json'} would be replaced" in error(capsys)
    assert [path.name for path in out.iterdir()] == ["01.json"]
    assert predict(*images, "--out", out, "--overwrite") == 0
    assert json.loads((out / "01.json").read_text())["image"] == "01.png"


def test_own_files_are_replaced_unless_somebody_changed_them(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 2), tmp_path / "out"
    assert predict(*images, "--out", out) == 0
    first = contents(out)
    assert predict(*images, "--out", out, "--min-score", "0") == 0
    assert contents(out).keys() == first.keys()
    corrected = (out / "00.json").read_text().replace("00.png", "0.png")
    (out / "00.json").write_text(corrected)
    assert predict(*images, "--out", out) == 2
    assert f"{out / '00.json'} would be replaced" in error(capsys)
    assert (out / "00.json").read_text() == corrected


def test_a_folder_in_the_way_is_told_before_the_work(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 2), tmp_path / "out"
    (out / "01.json").mkdir(parents=True)
    assert predict(*images, "--out", out) == 2
    assert "01.json is in the way" in error(capsys)
    assert not (out / "00.json").exists()


def test_images_of_one_name_get_their_folders_in_front(tmp_path):
    (a,), (b,) = write_images(tmp_path / "x/a", 1), write_images(tmp_path / "x/b", 1, ".jpg")
    (other,) = write_images(tmp_path / "y", 1)
    other = other.rename(other.with_name("other.png"))
    out = tmp_path / "out"
    assert predict(a, b, other, "--out", out) == 0
    assert sorted(contents(out)) == ["a/00.json", "a/00.png", "b/00.json", "b/00.png", "other.json", "other.png"]
    assert json.loads((out / "b/00.json").read_text())["image"] == "00.jpg"


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["a/x.jpg", "b/x.jpg"], ["a/x", "b/x"]),
        (["a/img/x.jpg", "b/img/x.jpg", "b/y.jpg"], ["a/img/x", "b/img/x", "y"]),
        (["x.jpg", "b/x.jpg"], ["x", "b/x"]),
        (["x.jpg", "x.png"], ["x.jpg", "x.png"]),
        (["a/x.jpg", "a/x.png", "b/x.png"], ["a/x.jpg", "a/x.png", "b/x"]),
        (["a/X.jpg", "b/x.jpg"], ["a/X", "b/x"]),
        (["x.tar.jpg", "x.jpg"], ["x.tar", "x"]),
        (["x.jpg", "./x.jpg", "b/../x.jpg"], ["x"]),
    ],
)
def test_names_of_outputs(images, names):
    assert list(output_names(map(Path, images)).values()) == names


def test_names_that_cannot_be_told_apart_are_refused():
    with pytest.raises(InputError, match=r"x\.jpg and .*X\.JPG would both be written"):
        output_names([Path("x.jpg"), Path("X.JPG")])
    with pytest.raises(InputError, match="rename one"):
        output_names([Path("x.jpg"), Path("x.png"), Path("x.jpg.gif")])


@given(
    st.lists(st.tuples(*[st.sampled_from(["a", "b", "A", "x.y"])] * 3, st.sampled_from([".jpg", ".png"])), min_size=1)
)
def test_every_image_has_outputs_of_its_own(parts):
    images = [Path(*folders, name + suffix) for *folders, name, suffix in parts]
    try:
        names = output_names(images)
    except InputError:
        return
    assert len({name.casefold() for name in names.values()}) == len(names) == len(set(images))
    assert all(name.split("/")[-1] in (path.name, path.stem) for path, name in names.items())


def test_what_cannot_be_done_is_told_at_the_end_and_the_rest_is_done(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 40), tmp_path / "out"
    images[7].write_bytes(images[7].read_bytes()[:90])
    images[20].write_text("no image")
    gone = tmp_path / "gone.png"
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert predict(*images, gone, pipe, "x" * 5000, "--out", out, "--batch-size", "4") == 2
    line = error(capsys)
    assert all(name in line for name in ("07.png cannot be decoded", "20.png is not a readable image", "gone.png does"))
    assert "pipe.png is no regular file" in line
    assert "the other 38 of 43 images are done" in line
    assert len(contents(out)) == 2 * 38


def test_boxes_that_cannot_be_used_lose_no_other_image(tmp_path, capsys):
    images, out, boxes = write_images(tmp_path / "images", 8), tmp_path / "out", tmp_path / "boxes"
    boxes.mkdir()
    good = {"bbox": [1, 1, 9, 9], "category": "person", "score": 0.5}
    bad = {1: good | {"score": float("nan")}, 2: good | {"category": "unicorn"}, 3: good | {"bbox": [50, 50, 9, 9]}}
    bad |= {4: good | {"bbox": [10**400, 1, 2, 3]}, 5: good | {"score": 2}}
    for i in range(7):
        (boxes / f"{i:02}.json").write_text(json.dumps({"instances": [bad.get(i, good)]}))
    (boxes / "06.json").write_text("[" * 100_000)
    arguments = [*images, "--boxes", boxes, "--out", out, "--task", "segmentation", "--checkpoint", MODEL]
    assert main(["predict", *map(str, arguments)]) == 2
    line = error(capsys)
    for part in (
        "scores from 0 to 1",
        "unicorn",
        "inside the image",
        "no file of boxes",
        "06.json is no",
        "07.json does",
    ):
        assert part in line
    assert sorted(contents(out)) == ["00.json", "00.png"]


def test_written_json_holds_no_nan(tmp_path):
    from pix2seq.types import Caption

    assert json.dumps(Caption("x", float("-inf")).to_json(), allow_nan=False) == '{"text": "x", "score": null}'
    with pytest.raises(ValueError, match="JSON"):
        Outputs(tmp_path).write("a", "key", {"score": float("nan")}, Image.new("RGB", (1, 1)))


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_prediction_that_is_killed_anywhere_goes_on_and_loses_nothing(tmp_path, capfd, kills):
    images = write_images(tmp_path / "images", 12)
    assert predict(*images, "--out", tmp_path / "whole") == 0
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    arguments = [*map(str, images), "--out", str(out), "--resume", "--batch-size", "3", *QUICK]
    rng, finished = random.Random(0), []
    for kill in range(kills):
        if len(finished) > 12:  # begin again, so that every kill meets work
            shutil.rmtree(out)
            finished = []
        point = list(dying.PREDICTION_POINTS)[kill % 4]
        child = forked(dying.predict, arguments, point, rng.randint(1, 2 if point == "asking" else 5))
        child.start()
        child.join(600)
        assert child.exitcode == -signal.SIGKILL
        found = contents(out)
        assert all(whole[name] == content for name, content in found.items())
        assert all(name in found for name in finished)  # nothing is lost
        finished = list(found)
    assert predict(*images, "--out", out, "--resume") == 0
    assert contents(out) == whole
    assert sorted(path.name for path in out.iterdir() if path.name[0] == ".") == [JOURNAL]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capfd.readouterr()
    assert predict(*images, "--out", out, "--resume") == 0
    assert "12 of 12 files are done already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_resume_does_again_what_was_asked_otherwise(tmp_path, capsys):
    images, out = write_images(tmp_path / "images", 3), tmp_path / "out"
    assert predict(*images, "--out", out) == 0

    def done(*more):
        capsys.readouterr()
        assert predict(*images, "--out", out, "--resume", *more) == 0
        return int(capsys.readouterr().err.split(" of 3 files")[0].split()[-1])

    assert done() == 3
    assert done("--seed", "1") == 0
    assert done("--seed", "1") == 3
    write_images(tmp_path / "images", 1)  # written again: another time of modification
    os.utime(images[0], ns=(1, 1))
    assert done("--seed", "1") == 2
    (out / "01.png").unlink()
    assert done("--seed", "1") == 2
    for path in out.glob("02.*"):  # as if a kill had cut the line of the last image, before its files
        path.unlink()
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    kept, cut = [line for line in lines if '"02"' not in line], next(line for line in lines if '"02"' in line)
    (out / JOURNAL).write_text("[]\n5\n" + "".join(kept) + cut[:-9])
    assert done("--seed", "1") == 2
    assert done("--seed", "1") == 3


def test_resume_finishes_what_was_replaced_by_half(tmp_path, monkeypatch):
    images, out, calls = write_images(tmp_path / "images", 3), tmp_path / "out", []
    assert predict(*images, "--out", tmp_path / "expected", "--seed", "1") == 0
    assert predict(*images, "--out", out) == 0
    assert contents(out) != contents(tmp_path / "expected")

    def interrupted(path, content):
        calls.append(path)
        if len(calls) == 4:  # the new drawing of the second image is there, its JSON is still the old one
            raise KeyboardInterrupt
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("pix2seq.infer.outputs.write_atomically", interrupted)
        assert predict(*images, "--out", out, "--seed", "1") == 130
    assert predict(*images, "--out", out, "--seed", "1", "--resume") == 0
    assert contents(out) == contents(tmp_path / "expected")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=30), st.integers(1, 8))
def test_images_side_by_side_have_few_pixels(sizes, batch_size):
    parts = list(batch_by_pixels(sizes, batch_size, max_pixels=2000))
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    pixels = [[sizes[i][0] * sizes[i][1] for i in part] for part in parts]
    assert all(len(part) <= batch_size and (len(part) == 1 or sum(part) <= 2000) for part in pixels)
    for part, following in pairwise(pixels):  # no part could have been longer
        assert len(part) == batch_size or sum(part) + following[0] > 2000


def test_metrics_replace_only_metrics(tmp_path, shapes, capsys):
    (tmp_path / "notes.json").write_text("{}")
    annotations = next((shapes / "annotations").glob("instances_val*.json"))
    before = annotations.read_bytes()
    command = ["eval", "--checkpoint", str(MODEL), "--data", str(shapes), "--device", "cpu", "--task", "captioning"]
    for path, more, message in (
        (tmp_path / "notes.json", [], "holds no metrics"),
        (annotations, ["--overwrite"], "which is read"),
        (tmp_path, [], "is a folder"),
        (Path("/dev/null"), ["--overwrite"], "a pipe or a device"),
    ):
        assert main([*command, "--out", str(path), *more]) == 2
        assert message in error(capsys)
    assert annotations.read_bytes() == before
    assert (tmp_path / "notes.json").read_text() == "{}"
    for path, more in (
        (tmp_path / "new.json", []),
        (tmp_path / "new.json", []),
        (tmp_path / "notes.json", ["--overwrite"]),
    ):
        assert main([*command, "--out", str(path), *more]) == 0
        assert json.loads(path.read_text())["num_images"] == 4


def test_a_full_disk_does_not_lose_an_evaluation(tmp_path, monkeypatch, shapes, capsys):
    import errno

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pix2seq.evaluation.write_atomically", full)
    command = ["eval", "--checkpoint", str(MODEL), "--data", str(shapes), "--device", "cpu", "--task", "captioning"]
    assert main([*command, "--out", str(tmp_path / "m.json")]) == 2
    line = error(capsys)
    assert "disk full" in line
    assert '"captioning/BLEU-4": ' in line


def test_ghostscript_is_never_started(tmp_path, monkeypatch, capsys):
    (tmp_path / "holiday.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    assert predict(tmp_path / "holiday.jpg", "--out", tmp_path / "out") == 2
    assert "expected JPEG, MPO, PNG, WebP, TIFF, BMP, GIF or AVIF" in error(capsys)
