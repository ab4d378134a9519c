"""Folders, patterns and videos on the command line of `predict`."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_outputs import error, predict, write_images

from pix2seq.errors import InputError
from pix2seq.infer.inputs import find_inputs
from pix2seq.infer.outputs import Outputs
from pix2seq.infer.video import VideoReader, VideoWriter


def write_video(path, levels, fps=5.0, size=(64, 48)):
    """Write frames of one grey each; MPEG-4 keeps them to a few levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for level in levels:
        writer.write(np.full((size[1], size[0], 3), level, np.uint8))
    writer.release()
    return path


def levels_of(path, stride=1):
    return [(frame.number, int(frame.pixels.mean())) for frame in VideoReader(path, stride=stride)]


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_frame_of_a_stride_is_read_in_order(tmp_path, stride):
    path = write_video(tmp_path / "a.mp4", range(0, 200, 20))
    read = levels_of(path, stride)
    assert [number for number, _ in read] == list(range(0, 10, stride))
    assert all(abs(level - 20 * number) < 6 for number, level in read)


def test_colours_are_red_green_blue(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))  # OpenCV: blue, green, red
    writer.release()
    red, green, blue = next(iter(VideoReader(tmp_path / "a.mp4"))).pixels.mean(axis=(0, 1))
    assert red > 200 > 60 > max(green, blue)


def test_a_video_gives_json_by_frame_and_a_drawn_video(tmp_path, capsys):
    clip = write_video(tmp_path / "clips/a.mp4", range(0, 140, 20))
    out = tmp_path / "out"
    assert predict(clip, "--out", out, "--stride", "3", "--batch-size", "2", "--min-score", "0") == 0
    content = json.loads((out / "a.json").read_text())
    facts = {"video": "a.mp4", "width": 64, "height": 48, "fps": 5.0, "num_frames": 7, "stride": 3}
    assert {key: content[key] for key in facts} == facts
    assert [(frame["frame"], frame["seconds"]) for frame in content["frames"]] == [(0, 0.0), (3, 0.6), (6, 1.2)]
    assert all(0 < len(frame["instances"]) <= 2 for frame in content["frames"])
    drawn = VideoReader(out / "a.mp4")
    assert drawn.fps == pytest.approx(5 / 3, abs=1e-3)
    frames = [frame.pixels for frame in drawn]
    assert [frame.shape for frame in frames] == [(384, 512, 3)] * 3
    assert max(frame.std() for frame in frames) > 1  # boxes are drawn on grey
    assert not list(out.glob(".partial*"))
    before = (out / "a.mp4").stat().st_mtime_ns
    assert predict(clip, "--out", out, "--stride", "3", "--min-score", "0", "--resume") == 0
    assert "1 of 1 files are done already" in capsys.readouterr().err
    assert (out / "a.mp4").stat().st_mtime_ns == before
    assert predict(clip, "--out", out, "--stride", "2", "--min-score", "0", "--resume") == 0
    assert len(json.loads((out / "a.json").read_text())["frames"]) == 4
    (out / "a.mp4").write_bytes(b"my own")
    assert predict(clip, "--out", out) == 2
    assert "a.mp4 would be replaced" in error(capsys)


def test_a_broken_video_does_not_lose_the_others(tmp_path, capsys):
    clip = write_video(tmp_path / "clips/a.mp4", [10, 20])
    (tmp_path / "clips/broken.mp4").write_bytes(clip.read_bytes()[:200])
    (image,) = write_images(tmp_path / "clips/images", 1)
    assert predict(tmp_path / "clips", "--out", tmp_path / "out") == 2
    assert "broken.mp4 cannot be opened as a video" in error(capsys)
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.name[0] != "."}
    assert written == {"a.mp4", "a.json", f"{image.stem}.png", f"{image.stem}.json"}


@pytest.mark.parametrize("more", [["--format", "coco"], ["--boxes", "{tmp}"]])
def test_what_is_for_images_is_refused_for_videos(tmp_path, capsys, more):
    clip = write_video(tmp_path / "a.mp4", [10])
    assert predict(clip, "--out", tmp_path / "out", *(word.format(tmp=tmp_path) for word in more)) == 2
    assert "is for images" in error(capsys)


def test_a_drawn_video_has_one_even_size(tmp_path):
    from PIL import Image

    writer = VideoWriter(tmp_path / "a.mp4", 5.0)
    for size in ((51, 37), (51, 60), (51, 20)):
        writer.add(Image.new("RGB", size))
    writer.close()
    shapes = [frame.pixels.shape for frame in VideoReader(tmp_path / "a.mp4")]
    assert shapes == [(38, 52, 3)] * 3


def test_folders_and_patterns_stand_for_images_and_videos(tmp_path, monkeypatch):
    for name in (
        "b/2.jpg",
        "b/1.PNG",
        "b/deep/3.webp",
        "b/clip.MP4",
        "b/notes.txt",
        "b/.hidden.jpg",
        "a[1].jpg",
        "c.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)

    def found(*names):
        return [path.as_posix() for path in find_inputs(map(Path, names))]

    assert found("b") == ["b/1.PNG", "b/2.jpg", "b/clip.MP4", "b/deep/3.webp"]
    assert found("c.jpg", "b/*.jpg", "c.jpg") == ["c.jpg", "b/2.jpg"]
    assert found("**/*.webp") == ["b/deep/3.webp"]
    assert found("a[1].jpg") == ["a[1].jpg"]  # a file of that name, not a pattern
    assert found("nowhere.jpg") == ["nowhere.jpg"]  # reading it says that it does not exist
    Outputs(tmp_path / "b").write_files("deep/3", "key", {".webp": b"drawing"})
    assert found("b") == ["b/1.PNG", "b/2.jpg", "b/clip.MP4"]
    assert found("b/deep/3.webp") == ["b/deep/3.webp"]
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no image"), ("*.gif", "no file matches")):
        with pytest.raises(InputError, match=message):
            found(name)


def test_drawings_of_an_earlier_run_are_no_images(tmp_path):
    images = tmp_path / "images"
    write_images(images, 2, ".bmp")
    for _ in range(2):
        assert predict(images, "--out", images / "out") == 0
        assert sorted(path.name for path in (images / "out").glob("*.png")) == ["00.png", "01.png"]
        assert predict(images, "--out", images) == 0
    assert len(list(images.glob("*.png"))) == 2
