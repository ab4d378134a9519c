"""Indexing a folder and searching it: exact, always up to date, whatever a process is killed in, and never a half."""

import json
import os
import shutil
import signal
from unittest import mock

import dying
import numpy as np
import pytest
import torch
from colours import COLOURS, embed, filled, seeing_colours
from forked import forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_model import OLD

from pix2seq import Predictor, demo
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.image_index import ImageIndex, Stamp
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError
from pix2seq.search import Update, open_index, search, update_index

# As they are without `seeing_colours`.
TRAINED = {
    name: getattr(Predictor, name) for name in ("embed", "embed_text", "match", "can_match") if hasattr(Predictor, name)
}


@pytest.fixture(autouse=True)
def calls():
    with seeing_colours() as calls:
        yield calls


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained(OLD, device="cpu")


@pytest.fixture
def photos(tmp_path):
    """A red image, one that is half red, one of another hue, and a green one in a folder below."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    write(folder / "red.png", filled("red"))
    write(folder / "half.png", filled("red", share=0.5))
    write(folder / "pink.png", np.full((5, 7, 3), (250, 10, 10), np.uint8))
    write(folder / "more" / "green.png", filled("green"))
    return folder


def write(path, pixels):
    Image.fromarray(pixels).save(path)


def index(folder, out, *more):
    return main(["index", str(folder), "--checkpoint", str(OLD), "--out", str(out), "--device", "cpu", *more])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def stored(out):
    """The embedding of each image, by name; fails if one is there twice."""
    found = ImageIndex(out)
    if not len(found):
        return {}
    vectors = torch.cat([shard.embeddings for shard in found._shards])[found.rows].numpy()
    counted = [found._names[row] for row in found.rows]
    assert len(set(counted)) == len(counted) == len(found)
    return dict(zip(counted, vectors, strict=True))


def agrees(out, folder):
    """Whether an index has the images of a folder, each once, with the embedding of what is in the file now."""
    found = stored(out)
    assert sorted(found) == names(folder)
    for name, vector in found.items():
        expected = embed(None, [np.asarray(Image.open(folder / name))])[0]
        np.testing.assert_allclose(vector.astype(np.float32), expected, atol=2e-3)
    return True


def error_of(capsys, arguments):
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=9), max_size=5), st.integers(1, 20), st.data())
def test_the_nearest_images_are_those_of_a_search_in_double_precision(tmp_path_factory, files, count, data):
    out = ImageIndex.create(tmp_path_factory.mktemp("index"), root=OLD, checkpoint=OLD, model="m")
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    expected = {}
    for numbers in filter(None, files):
        vectors = rng.normal(size=(len(numbers), 4)).astype(np.float32)
        out.add([Stamp(f"{number}.jpg", 1, 1) for number in numbers], vectors)
        expected |= zip([f"{number}.jpg" for number in numbers], vectors.astype(np.float16), strict=True)
    query = rng.normal(size=4).astype(np.float32)
    for each in (out, ImageIndex(out.folder)):
        assert len(each) == len(expected)
        found = each.nearest(query, count)
        scores = {name: float(vector.astype(np.float64) @ query) for name, vector in expected.items()}
        assert [score for _, score in found] == pytest.approx(sorted(scores.values(), reverse=True)[:count], abs=1e-5)
        assert [score for _, score in found] == pytest.approx([scores[name] for name, _ in found], abs=1e-5)
        assert len({name for name, _ in found}) == len(found)


def test_only_new_and_changed_images_are_embedded_again_and_removed_ones_leave(photos, tmp_path, calls, capsys):
    out = tmp_path / "index"
    assert index(photos, out, "--batch-size", "3") == 0
    assert agrees(out, photos)
    assert calls == [3, 1]
    assert index(photos, out) == 0
    assert calls == [3, 1]
    assert "4 images: 0 new, 0 changed, 0 removed, 0 unreadable" in capsys.readouterr().out
    write(photos / "red.png", filled("blue"))
    write(photos / "new.png", filled("blue", share=0.5))
    (photos / "half.png").unlink()
    assert index(photos, out) == 0
    assert calls == [3, 1, 2]
    assert "4 images: 1 new, 1 changed, 1 removed, 0 unreadable" in capsys.readouterr().out
    assert agrees(out, photos)
    same = (photos / "new.png").stat()
    os.utime(photos / "new.png", ns=(same.st_atime_ns, same.st_mtime_ns + 1))  # as after a change to as many bytes
    assert index(photos, out) == 0
    assert calls == [3, 1, 2, 1]
    assert agrees(out, photos)


def test_unreadable_images_are_named_and_left_out_and_nothing_else_is(photos, tmp_path, capsys):
    out = tmp_path / "index"
    content = (photos / "red.png").read_bytes()
    (photos / "cut.png").write_bytes(content[:50])
    assert index(photos, out) == 0
    shown = capsys.readouterr()
    assert [line for line in shown.err.splitlines() if "warning: " in line and "cut.png" in line]
    assert "4 images: 4 new, 0 changed, 0 removed, 1 unreadable" in shown.out
    assert "cut.png" not in stored(out)
    (photos / "cut.png").write_bytes(content)
    (photos / "red.png").write_bytes(content[:50])
    assert index(photos, out) == 0
    assert "4 images: 1 new, 0 changed, 1 removed, 1 unreadable" in capsys.readouterr().out
    assert sorted(stored(out)) == ["cut.png", "half.png", "more/green.png", "pink.png"]


KILLS = [
    *(("embedding", 2), ("writing a file", 1), ("replacing a file", 3), ("joining files", 1), ("removing a file", 1)),
    *(("embedding", 4), ("removing a file", 2), ("writing a file", 3)),
]


def test_an_index_that_is_killed_anywhere_goes_on_and_counts_nothing_twice(tmp_path):
    """One run after another is killed, and the folder changes before each; at the end all is as if none had been."""
    folder, out = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    rng = np.random.default_rng(0)
    known = []
    for turn, (point, call) in enumerate(KILLS):
        for number in range(7):
            write(folder / f"{turn}-{number}.png", rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        for name in known[:2]:
            write(folder / name, rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        for name in known[2:3]:
            (folder / name).unlink()
        process = forked(dying.index, folder, out, point, call)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, point
        if (out / "index.json").exists():
            known = [name for name in sorted(stored(out)) if (folder / name).exists()]
    assert list(out.glob(".partial-*"))
    process = forked(dying.index, folder, out)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert agrees(out, folder)
    shards = ImageIndex(out)._shards
    assert not list(out.glob(".partial-*"))
    assert sum(len(shard.images) for shard in shards) == len(names(folder))  # nothing is left of what was replaced
    assert max(len(shard.images) for shard in shards) == 4


def test_a_kill_costs_no_more_than_the_images_of_one_file(photos, tmp_path, predictor, calls, monkeypatch):
    for number in range(8):
        write(photos / f"{number}.png", filled("blue", share=number / 10))
    monkeypatch.setattr("pix2seq.search.SHARD_IMAGES", 4)
    out = open_index(tmp_path / "index", photos, checkpoint=OLD, model="m")
    original = ImageIndex.add

    def dying_add(self, *arguments):
        original(self, *arguments)
        if len(self) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(ImageIndex, "add", dying_add)
    with pytest.raises(KeyboardInterrupt):
        update_index(predictor, out, batch_size=2)
    monkeypatch.setattr(ImageIndex, "add", original)
    calls.clear()
    update = update_index(predictor, ImageIndex(out.folder), batch_size=2)
    assert update == Update(12, 4, 0, 0, {})
    assert sum(calls) == 4


def test_small_files_are_joined(photos, tmp_path, predictor):
    out = tmp_path / "index"
    for number in range(4):
        write(photos / f"{number}.png", filled("blue", share=number / 10))
        update_index(predictor, open_index(out, photos, checkpoint=OLD, model="m"))
        assert len(list(out.glob("*.safetensors"))) == 1
    assert agrees(out, photos)
    for path in photos.rglob("*.png"):
        path.unlink()
    write(photos / "last.png", filled("red"))
    assert update_index(predictor, ImageIndex(out)).num_removed == 8
    assert list(stored(out)) == ["last.png"]


def test_another_model_or_folder_is_refused_in_a_line(photos, tmp_path, capsys):
    out, other = tmp_path / "index", tmp_path / "other"
    shutil.copytree(OLD, other)
    (other / "manifest.json").unlink()
    config = json.loads((other / "config.json").read_text())
    config["model"]["image_size"] = [48, 48]
    (other / "config.json").write_text(json.dumps(config))
    assert index(photos, out) == 0
    for command in (["index", str(photos), "--out", str(out)], ["search", str(out), "red"]):
        message = error_of(capsys, [*command, "--checkpoint", str(other)])
        assert "written with another model" in message
        assert str(OLD) in message
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "a.png", filled("red"))
    arguments = ["index", str(tmp_path / "more"), "--checkpoint", str(OLD), "--out", str(out)]
    assert f"is the index of {photos}" in error_of(capsys, arguments)
    assert agrees(out, photos)


def test_a_folder_that_was_moved_is_not_embedded_again(photos, tmp_path, calls):
    out = tmp_path / "index"
    assert index(photos, out) == 0
    moved = photos.rename(tmp_path / "moved")
    assert index(moved, out) == 0
    assert calls == [4]
    assert ImageIndex(out).root == moved
    assert agrees(out, moved)


def test_matching_orders_what_the_contrast_finds(photos, tmp_path, predictor):
    out = open_index(tmp_path / "index", photos, checkpoint=OLD, model="m")
    update_index(predictor, out)
    # By mean colour pink is nearer to red than half red and half black is; of its pixels, none is quite red.
    by_contrast = search(predictor, out, sentence="A red thing.", match=False)
    assert [hit.name for hit in by_contrast[-2:]] == ["pink.png", "more/green.png"]
    assert {hit.match for hit in by_contrast} == {None}
    assert [hit.score for hit in by_contrast] == sorted((hit.score for hit in by_contrast), reverse=True)
    by_match = search(predictor, out, sentence="A red thing.")
    assert [hit.name for hit in by_match[:2]] == ["red.png", "half.png"]
    assert [hit.match for hit in by_match] == pytest.approx([1, 0.5, 0, 0])
    assert {hit.name: hit.score for hit in by_match} == {hit.name: hit.score for hit in by_contrast}
    few = search(predictor, out, sentence="A red thing.", num_candidates=1, top=1)
    assert [hit.name for hit in few] == [by_contrast[0].name]
    assert len(search(predictor, out, sentence="red", num_candidates=1, top=3)) == 3
    like = search(predictor, out, image=filled("green", size=(3, 9)), top=2)
    assert like[0].name == "more/green.png"
    assert like[0].score == pytest.approx(1, abs=1e-3)
    assert like[1].score < 0.9


def test_a_candidate_that_is_gone_is_left_out_with_a_warning(photos, tmp_path, predictor, capsys):
    out = open_index(tmp_path / "index", photos, checkpoint=OLD, model="m")
    update_index(predictor, out)
    (photos / "red.png").unlink()
    assert search(predictor, out, sentence="red")[0].name == "half.png"
    assert "red.png does not exist" in capsys.readouterr().err


def test_a_search_writes_json_and_a_contact_sheet(photos, tmp_path, capsys):
    out, found = tmp_path / "index", tmp_path / "found"
    assert index(photos, out) == 0
    capsys.readouterr()
    arguments = ["search", str(out), "--out", str(found), "--device", "cpu"]
    assert main([*arguments, "something red", "--top", "3"]) == 0
    content = json.loads((found / "results.json").read_text())
    assert content["query"] == {"sentence": "something red"}
    assert (content["folder"], content["num_images"]) == (str(photos), 4)
    assert [each["file"] for each in content["results"]] == ["red.png", "half.png", content["results"][2]["file"]]
    assert content["results"][1]["match"] == pytest.approx(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [each["file"] for each in content["results"]]
    sheet = np.asarray(Image.open(found / "results.png"))
    assert sheet.shape[1] == 3 * 512 + 2 * 8
    columns = [sheet[:300, start : start + 512] for start in (0, 520)]
    shares = [np.mean(np.all(column == COLOURS["red"], axis=2)) for column in columns]
    assert shares == pytest.approx([1, 0.5], abs=0.1)  # enlarged, with a soft edge
    image = photos / "more" / "green.png"
    assert main([*arguments, "--image", str(image), "--top", "1"]) == 0  # its own files may be replaced
    content = json.loads((found / "results.json").read_text())
    assert content["query"] == {"image": str(image)}
    assert [set(each) for each in content["results"]] == [{"file", "score"}]


def test_bad_questions_and_indexes_end_in_one_line(photos, tmp_path, capsys):
    out, found = tmp_path / "index", tmp_path / "found"
    assert index(photos, out) == 0
    arguments = ["search", str(out), "--out", str(found)]
    for words in ([], ["  "], ["red", "--image", str(photos / "red.png")]):
        assert "either a sentence or an image" in error_of(capsys, [*arguments, *words])
    assert "nowhere.jpg does not exist" in error_of(capsys, [*arguments, "--image", "nowhere.jpg"])
    assert "is no index" in error_of(capsys, ["search", str(photos), "red"])
    assert "is no index" in error_of(capsys, ["search", str(photos / "red.png"), "red"])
    assert "nowhere does not exist" in error_of(capsys, ["index", "nowhere", "--checkpoint", str(OLD), "--out", "x"])
    (tmp_path / "empty").mkdir()
    arguments_empty = ["index", str(tmp_path / "empty"), "--checkpoint", str(OLD), "--out", str(tmp_path / "x")]
    assert "holds no image" in error_of(capsys, arguments_empty)
    found.mkdir(exist_ok=True)
    (found / "results.json").write_text('{"mine": 1}')
    assert "no search wrote it" in error_of(capsys, [*arguments, "red"])
    assert json.loads((found / "results.json").read_text()) == {"mine": 1}
    assert main([*arguments, "red", "--overwrite"]) == 0
    capsys.readouterr()
    (shard,) = out.glob("*.safetensors")
    whole = shard.read_bytes()
    for damaged in (
        whole[:-5],
        b"",
        whole.replace(b"red.png", b"../red."),
        whole.replace(b"more/green", b"/ome/green"),
    ):
        shard.write_bytes(damaged)
        assert f"{shard} cannot be read" in error_of(capsys, [*arguments, "red"])
    shard.unlink()
    assert index(photos, out) == 0
    assert agrees(out, photos)
    for content, message in (
        ("[]", "no file of an index"),
        ("{", "no readable JSON"),
        ('{"format": 2}', "has format 2"),
    ):
        (out / "index.json").write_text(content)
        assert message in error_of(capsys, [*arguments, "red"])


def test_an_index_of_other_numbers_is_refused(tmp_path):
    out = ImageIndex.create(tmp_path / "index", root=OLD, checkpoint=OLD, model="m")
    out.add([Stamp("a.jpg", 1, 1)], np.ones((1, 4), np.float32))
    with pytest.raises(InputError, match="embeddings of 4 numbers"):
        out.nearest(np.ones(3, np.float32), 1)


def test_what_predict_and_videos_wrote_is_not_indexed(photos, tmp_path, calls):
    predict = ["predict", str(photos / "red.png"), "--checkpoint", str(OLD), "--task", "captioning"]
    assert main([*predict, "--out", str(photos / "answers"), "--device", "cpu"]) == 0
    (photos / "clip.mp4").write_bytes(b"no video")
    assert index(photos, tmp_path / "index") == 0
    assert sorted(stored(tmp_path / "index")) == ["half.png", "more/green.png", "pink.png", "red.png"]


@pytest.mark.skipif(not hasattr(Predictor, "embed"), reason="the predictor has no embedding yet")
def test_a_trained_model_finds_an_image_by_its_caption(tmp_path):
    """The methods of the predictor itself, in place of the colours of this file."""
    with mock.patch.multiple(Predictor, **TRAINED):
        predictor = Predictor.from_pretrained(demo.CHECKPOINT, device="cpu")
        if not predictor.can_match:
            pytest.skip("the model of the repository was not trained to match")
        write_shapes(tmp_path / "shapes", num_train=0, num_val=60, size=96, seed=5, workers=1)
        dataset = open_dataset(tmp_path / "shapes", "val")
        out = open_index(tmp_path / "index", tmp_path / "shapes", checkpoint=demo.CHECKPOINT, model="m")
        update_index(predictor, out)
        targets = [dataset.target(i) for i in range(0, 60, 6)]
        found = [search(predictor, out, sentence=target.captions[0], top=10) for target in targets]
        names = [target.image.path.relative_to(tmp_path / "shapes").as_posix() for target in targets]
        # By chance, one image in six is among ten of sixty.
        assert sum(name in [hit.name for hit in hits] for name, hits in zip(names, found, strict=True)) >= 6
        like = search(predictor, out, image=targets[0].image.path, top=1)
        assert like[0].name == names[0]
        assert like[0].score > 0.99
