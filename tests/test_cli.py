"""The commands people type, on a tiny run: train, resume, evaluate, predict, and every kind of bad input."""

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pix2seq import Pix2Seq, Predictor
from pix2seq.cli import _positive, _seed, _share, main
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError, shortened

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "steps=6", "batch_size=4", "checkpoint_every=2", "keep_checkpoints=10", "log_every=1", "num_workers=0", "lr=1e-3",
    "eval_batch_size=4", "schedule.warmup_steps=2", "model.image_size=[32,48]", "model.encoder.name=vit",
    "model.encoder.dim=32", "model.encoder.num_layers=1", "model.encoder.num_heads=2", "model.encoder.mlp_dim=64",
    "model.decoder.dim=32", "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=64",
    "model.decoder.max_seq_len=64", "model.vocab.num_bins=32", "model.vocab.size=1040", "detection.max_objects=10",
    "detection.noise_objects=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "shapes"
    write_shapes(folder, num_train=12, num_val=6, size=48, seed=1, workers=1)
    return folder


@pytest.fixture(scope="module")
def run(data):
    out = data.parent / "run"
    assert main(["train", "--task", "detection", f"data={data}", f"out={out}", *TINY]) == 0
    return out


def one_line(capsys):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_a_run_leaves_checkpoints_logs_and_its_settings(run, data):
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["best", "step-00000002", "step-00000004", "step-00000006"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[0]["lr"] == 0
    assert all(np.isfinite(line["loss"]) for line in train)
    assert lines[-1]["kind"] == "eval"
    assert list((run / "tensorboard").iterdir())
    model = Pix2Seq.from_pretrained(run / "checkpoints" / names[-1])
    assert model.categories[0].name == "person"
    assert model.task_settings["detection"]["max_objects"] == 10
    assert f"data: {data}" in (run / "config.yaml").read_text()


def test_a_resumed_run_ends_as_an_unbroken_one_to_the_bit(run, data, capsys):
    broken = data.parent / "broken"
    shutil.copytree(run, broken)
    for name in ("step-00000004", "step-00000006"):
        shutil.rmtree(broken / "checkpoints" / name)
    assert main(["train", "--resume", "auto", f"data={data}", f"out={broken}", *TINY]) == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints/step-00000006" / name) for folder in (broken, run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    capsys.readouterr()
    assert main(["train", f"data={data}", f"out={run}", *TINY]) == 2
    assert "--resume auto" in one_line(capsys)


def test_eval_writes_metrics(run, data, tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path / "m.json")]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["num_images"] == 6
    assert 0 <= metrics["metrics"]["AP"] <= 1
    assert metrics["metrics"].keys() >= {"APs", "AR100", "F1@0.5", "threshold@0.5:0.95", "detection/ECE"}
    assert "category" in capsys.readouterr().out


def test_predict_writes_json_and_png_for_every_image(run, data, tmp_path):
    images = sorted((data / "val2017").iterdir())[:3]
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path), "--batch-size", "2", "--num-objects", "3"]
    assert main(["predict", *map(str, images), *arguments]) == 0
    for path in images:
        content = json.loads((tmp_path / f"{path.stem}.json").read_text())
        assert (content["image"], content["width"], content["height"]) == (path.name, 48, 48)
        assert len(content["instances"]) <= 3
        for instance in content["instances"]:
            x, y, w, h = instance["bbox"]
            assert min(w, h) > 0
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= 48.01
            assert set(instance) == {"bbox", "category_id", "category", "score", "segmentation", "keypoints"}
        Image.open(tmp_path / f"{path.stem}.png").verify()


def test_one_unreadable_image_does_not_lose_the_others(run, data, tmp_path, capsys):
    good = next((data / "val2017").iterdir())
    (tmp_path / "bad.jpg").write_bytes(good.read_bytes()[:400])
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "bad.jpg"), str(good), "--checkpoint", str(run), "--out", str(out)]) == 2
    assert "bad.jpg" in one_line(capsys)
    assert (out / f"{good.stem}.json").is_file()


def test_predictions_do_not_depend_on_the_form_of_the_image_or_on_its_batch(run, data):
    predictor = Predictor.from_pretrained(run, device="cpu")
    path = sorted((data / "val2017").iterdir())[0]
    pixels = np.asarray(Image.open(path))
    forms = [
        path,
        str(path),
        Image.open(path),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    ]
    answers = [predictor.detect(form) for form in forms]
    assert all([i.box_xyxy for i in answer] == [i.box_xyxy for i in answers[0]] for answer in answers)
    odd = np.zeros((5, 300, 3), np.uint8)
    for encoded in predictor.encode_batch([odd, pixels[:1, :1]]):
        for instance in predictor.detect(encoded):
            assert instance.box_xyxy[2] <= encoded.size[0]
            assert instance.box_xyxy[3] <= encoded.size[1]
    with pytest.raises(InputError, match="shape"):
        predictor.encode(torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--task", "detecton"], "did you mean 'detection'"),
        (["train", "data=nowhere"], "nowhere does not exist"),
        (["train"], "no data was given"),
        (["train", "lrr=1"], "did you mean 'lr'"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "device=tpu", "data={data}"], "device 'tpu' cannot be used"),
        (["train", "data={data}", "model.encoder.name=deit_small_patch16_22"], "did you mean"),
        (["train", "data={data}", "model.decoder.max_seq_len=20"], "max_seq_len=20"),
        (["train", "data={data}", "model.image_size=[100,100]"], "100x100"),
        (["eval", "--checkpoint", "nowhere", "--data", "{data}"], "nowhere does not exist"),
        (["eval", "--checkpoint", "{run}", "--data", "{empty}"], "has no annotations"),
        (["eval", "--checkpoint", "{run}", "--data", "{data}", "--split", "test"], "split 'test'"),
        (["predict", "--checkpoint", "{run}"], "no image"),
        (["predict", "nowhere.jpg", "--checkpoint", "{run}", "--out", "{empty}"], "nowhere.jpg does not exist"),
        (["predict", "{run}/config.yaml", "--checkpoint", "{run}", "--out", "{empty}"], "not a readable image"),
        (["predict", "a.jpg", "--checkpoint", "{empty}"], "neither config.json nor checkpoints"),
        (["predict", "a.jpg", "--checkpoint", "{run}", "--task", "x"], "unknown task 'x'"),
        (["predict", "a.jpg", "--checkpoint", "{run}", "--num-objects", "0"], "at least 1"),
        (
            ["predict", "a.jpg", "--checkpoint", "{run}", "--num-objects", "500"],
            "give a smaller num_objects",
        ),
        (["data", "check", "{empty}"], "has no annotations"),
        (["data", "shapes", "{data}"], "not an empty folder"),
        (["data", "shapes", "x", "--size", "4"], "32 to 2048"),
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["predct"], "unknown command 'predct'; did you mean 'predict'?"),
        (["data", "chck"], "did you mean 'check'?"),
        (
            ["predict", "a.jpg", "--chekpoint", "x"],
            "option of pix2seq predict: '--chekpoint'; did you mean '--checkpoint'",
        ),
        (["predict", "a.jpg", "--checkpoint", "x", "--format", "coc"], "unknown --format 'coc'; did you mean 'coco'"),
        (["predict", "a.jpg", "--checkpoint", "x", "--stride", "0"], "at least 1"),
        (["eval", "-z", "--checkpoint", "x", "--data", "y"], "unrecognized arguments: -z"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_line_and_exit_code_2(run, data, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    names = {"data": data, "run": run, "empty": tmp_path / "empty"}
    filled = [argument.format(**names) for argument in arguments]
    if arguments[:1] == ["train"] and "data={data}" in arguments:
        overridden = {a.split("=")[0] for a in filled}
        filled += [setting for setting in TINY if setting.split("=")[0] not in overridden]
    assert main(filled) == 2
    assert message in one_line(capsys)


def test_a_bad_annotation_is_dropped_in_training_and_named_by_the_check(data, tmp_path, capsys):
    folder = tmp_path / "shapes"
    shutil.copytree(data, folder)
    path = folder / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][0] = float("nan")
    content["annotations"][1]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    assert main(["data", "check", str(folder)]) == 0
    report = capsys.readouterr().out
    assert "1 x box is not four numbers (dropped)" in report
    assert f"annotation {content['annotations'][1]['id']} " in report
    assert main(["train", f"data={folder}", f"out={tmp_path / 'run'}", *TINY, "steps=1"]) == 0
    assert "2 annotations or images of split 'train' have defects" in capsys.readouterr().err


def test_a_checkpoint_of_other_classes_is_refused(run, tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val/a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "annotations": [],
        "categories": [{"id": 1, "name": "unicorn"}],
    }
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    assert main(["eval", "--checkpoint", str(run), "--data", str(tmp_path)]) == 2
    assert "unicorn" in one_line(capsys)


def test_the_scripts_and_the_command_are_the_same(run, data, tmp_path, monkeypatch, capsys):
    image = next((data / "val2017").iterdir())
    script = [sys.executable, "infer/predict.py", "--image", str(image), "--task", "detection"]
    a, b = (["--checkpoint", str(run), "--out", str(tmp_path / name)] for name in "ab")
    subprocess.run([*script, *a], check=True, cwd=ROOT, capture_output=True)
    assert main(["predict", str(image), *b]) == 0
    assert (tmp_path / "a" / f"{image.stem}.json").read_text() == (tmp_path / "b" / f"{image.stem}.json").read_text()
    monkeypatch.setattr(sys, "argv", ["train/detection.py", "lrr=1"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train/detection.py"), run_name="__main__")
    assert one_line(capsys).startswith("error: unknown setting 'lrr'")


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (_seed, {"0": 0, str(2**64 - 1): 2**64 - 1}, ["-1", str(2**64), "1.5", "x"]),
        (_share, {"0": 0.0, "1": 1.0, "0.25": 0.25}, ["-0.01", "1.01", "nan", "x"]),
        (_positive, {"1": 1, "70000": 70_000}, ["0", "-1", "2.0", "x"]),
    ],
    ids=["seed", "share", "positive"],
)
def test_numbers_of_options_have_limits(read, good, bad):
    assert {text: read(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a .* got '{text}'"):
            read(text)


def test_long_lists_in_messages_end_in_a_number():
    assert shortened([]) == []
    assert shortened([1, "b", 3], 3) == ["1", "b", "3"]
    assert shortened("abcd", 3) == ["a", "b", "c", "and 1 more"]
    assert shortened(range(9)) == ["0", "1", "2", "3", "4", "and 4 more"]
