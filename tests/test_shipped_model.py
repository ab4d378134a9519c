"""What makes, describes and shows the model that comes with the repository, on a tiny run."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_settings import ALL

from pix2seq import Pix2Seq, Predictor, demo
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.export import Scored, describe_data, export_model
from pix2seq.predictor import Prediction
from pix2seq.tasks.request import EncodedImage
from pix2seq.training.config import load_config
from pix2seq.types import Caption, Category, ImageRecord, Instance, Target

HIGH = ("0.75", "0.95", "0.5:0.95")  # overlaps of which a card tells less


@pytest.fixture(scope="module")
def exported(run, data, tmp_path_factory):
    """The run's model in half precision, with a card of metrics, which lie beside it."""
    out = tmp_path_factory.mktemp("shipped") / "exported"
    metrics = out.parent / "metrics.json"
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--out", str(metrics)]) == 0
    half = ["--dtype", "float16", "--metrics", str(metrics), "--eval-data", str(data), "--licence", "Apache-2.0"]
    assert main(["export", str(run), "--out", str(out), *half]) == 0
    return out


def test_an_export_has_half_the_bytes_and_the_same_model(run, exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "text_vocab.json", "training.yaml",
    ]  # fmt: skip
    full = Pix2Seq.from_pretrained(next((run / "checkpoints").glob("step-*")))
    half = Pix2Seq.from_pretrained(exported)
    stored = load_file(exported / "model.safetensors")
    for name, tensor in full.state_dict().items():
        assert stored[name].dtype == (torch.float16 if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(half.state_dict()[name], tensor.half().float() if tensor.is_floating_point() else tensor)
        assert half.state_dict()[name].dtype == tensor.dtype  # float32 again
    assert half.task_settings == full.task_settings
    assert half.text.tokens == full.text.tokens
    assert Predictor.from_pretrained(exported).detect(np.zeros((32, 32, 3), np.uint8)) is not None


def test_captions_are_checked_with_the_classes_of_the_data_set(exported, data, monkeypatch):
    """Captioning alone needs no classes of its own, so a model may number them otherwise, or know none."""
    predictor, dataset = Predictor.from_pretrained(exported), open_dataset(data, "val")
    predictor.model.categories = ()
    truths = iter([[Caption(dataset.target(index).captions[0], 0.0)] for index in range(len(dataset))])
    monkeypatch.setattr(predictor, "ask", lambda name, images, about, *, seed: [next(truths) for _ in images])
    assert evaluate(predictor, dataset, ["captioning"]).metrics["captioning/true"] == 1


def test_weights_too_large_for_half_precision_are_refused(exported, tmp_path):
    model = Pix2Seq.from_pretrained(exported)
    with torch.no_grad():
        next(model.parameters()).fill_(70_000)
    with pytest.raises(InputError, match=r"7e\+04, too large for torch.float16"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)


def test_the_card_says_what_the_run_was(run, data, exported):
    card = (exported / "README.md").read_text()
    metrics = json.loads((exported.parent / "metrics.json").read_text())["metrics"]
    line = json.loads([text for text in (run / "log.jsonl").read_text().splitlines() if '"train"' in text][-1])
    assert card.startswith("---\nlibrary_name: pix2seq\n")  # for the Hugging Face Hub
    assert "\n---\n\n# exported\n" in card
    assert f"| training | {line['step']} steps, {line['images']:.0f} images" in card
    assert "seed 0 |" in card
    assert (
        "16 images of split train; Generated shapes, train, seed 1; written by `pix2seq data shapes DIR --train 16"
        in card
    )
    assert "Measured on 5 images of split val; Generated shapes, val, seed 1" in card
    rows = dict(re.findall(r"^\| (\S+) \| ([\d.]+) \|$", card, re.M))
    details = {"AP75", "APs", "APm", "APl", "AR", "AR1", "AR10", "AR50", "AR75", "AR100", "ARs", "ARm", "ARl", "Brier"}
    details |= {f"{kind}@{iou}" for kind in ("precision", "recall", "threshold") for iou in ("0.5", *HIGH)}
    details |= {f"F1@{iou}" for iou in HIGH}
    main_ones = {name for name, value in metrics.items() if value is not None and name.split("/")[-1] not in details}
    assert rows == {name: f"{metrics[name]:.3f}" for name in main_ones}
    assert {"AP", "AP50", "segmentation/true_boxes/AP50", "captioning/BLEU-4"} <= set(rows)
    assert "captioning/true" in rows
    assert "person" in card
    assert card.endswith("## Licence\n\nApache-2.0\n")
    assert f"stored as float16, {(exported / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in card


def test_a_card_says_that_only_some_images_were_scored(run, exported, data):
    scored = Scored({"AP": 0.5, "AR100": None}, 2, describe_data(data, "val"))
    export_model(run, exported.parent / "again", scored=scored)
    card = (exported.parent / "again/README.md").read_text()
    assert "Measured on the first 2 of 5 images of split val;" in card
    assert "stored as float32" in card
    assert "Licence" not in card


def test_the_exported_settings_repeat_the_run_and_hold_no_path(run, data, exported):
    again = load_config(exported / "training.yaml", data=str(data), out=str(run))
    assert again == load_config(run / "config.yaml")
    for path in exported.glob("*.*"):
        assert path.suffix == ".safetensors" or str(data.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--metrics", "M"], "belong together"),
        (["--metrics", "config.json", "--eval-data", "DATA"], "is no file of metrics"),
        (["--out", "RUN"], "is the run itself"),
        (["RUN2"], "is not of a run"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
    ],
)
def test_a_wrong_export_ends_in_one_line(run, data, exported, tmp_path, change, message, capsys):
    words = {"RUN": str(run), "RUN2": str(exported), "DATA": str(data), "config.json": str(exported / "config.json")}
    source = [] if change == ["RUN2"] else [str(run)]
    assert main(["export", *source, "--out", str(tmp_path / "x"), *(words.get(word, word) for word in change)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_demo_names_the_command_as_it_must_be_typed(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "pix2seq"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert demo.typed_command() == "bin/pix2seq"
    monkeypatch.setenv("PATH", str(program.parent))
    assert demo.typed_command() == "pix2seq"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert demo.typed_command() == "pix2seq"


def test_the_demo_shows_new_images_and_scores_them(exported, tmp_path, capsys):
    out = tmp_path / "demo"
    command = ["demo", "--checkpoint", str(exported), "--images", "5", "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    table = (out / "table.txt").read_text()
    assert table in said
    assert "pix2seq demo --train" in said
    content = json.loads((out / "metrics.json").read_text())
    assert content["num_images"] == 5
    assert "captioning/true" in content["metrics"]
    assert Image.open(out / "demo.png").width > 4 * 500
    captions = json.loads((out / "images/annotations/captions_val2017.json").read_text())["annotations"]
    assert table.count("  truth  ") == 5
    assert all(f"  truth  {captions[5 * i]['caption']}\n" in table for i in range(5))
    assert len(re.findall(r"^  model  .*\((?:true|false)\)$", table, re.M)) == 5
    first = next((out / "images/val2017").iterdir()).read_bytes()
    assert main([*command, "--seed", "3"]) == 0  # again, into the same folder
    assert next((out / "images/val2017").iterdir()).read_bytes() != first


def test_the_demo_without_a_model_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "CHECKPOINT", tmp_path / "none")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pix2seq demo --train" in line
    assert not (tmp_path / "demo").exists()


def test_the_demo_keeps_folders_that_are_not_its_own(exported, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert main(["demo", "--checkpoint", str(exported), "--out", str(tmp_path)]) == 2
    assert main(["demo", "--train", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("holds no earlier demo") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("words", [["--train", "--seed", "1"], ["steps=3"]])
def test_options_of_the_other_demo_are_refused(words, capsys):
    assert main(["demo", *words]) == 2
    assert "demo --train takes key=value settings" in capsys.readouterr().err


def test_found_objects_are_counted_once_and_by_class():
    cat, dog = Category(1, 1, "cat"), Category(2, 2, "dog")
    target = Target(
        ImageRecord(1, Path("1.png"), 100, 100),
        boxes_xyxy=np.array([[0, 0, 10, 10], [50, 50, 70, 70], [20, 0, 30, 10]], np.float32),
        labels=np.array([1, 1, 2]),
        areas=np.array([100, 400, 100], np.float32),
        iscrowd=np.zeros(3, np.bool_),
        annotation_ids=np.arange(3),
        segmentations=(None,) * 3,
        keypoints=np.zeros((3, 0, 3), np.float32),
    )
    answers = [
        Instance((0, 0, 10, 10), cat, 0.9),  # found
        Instance((0, 0, 10, 9), cat, 0.8),  # the same object again: wrong
        Instance((20, 0, 30, 10), cat, 0.7),  # of another class: wrong
        Instance((50, 50, 70, 61), cat, 0.6),  # 220 of 400: found
        Instance((20, 0, 30, 10), dog, 0.2),  # not likely enough to be shown
    ]
    image = EncodedImage(torch.zeros(1, 1), np.zeros((100, 100, 3), np.uint8), (100, 100))
    prediction = Prediction(image, {"detection": answers}, {})
    assert demo.count_found(target, prediction, {1: "cat", 2: "dog"}) == (2, 2)


def test_the_repositorys_checkpoints_are_small_and_the_demos_images_are_new():
    if not (demo.CHECKPOINT / "config.json").is_file():
        pytest.skip("checkpoints/shapes is not trained yet")
    folder = demo.CHECKPOINT.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6
    assert Pix2Seq.from_pretrained(demo.CHECKPOINT).task_settings.keys() >= set(ALL.split(","))
    card = (demo.CHECKPOINT / "README.md").read_text()
    seeds = {int(seed) for seed in re.findall(r"pix2seq data shapes [^`]*--seed (\d+)", card)}
    assert len(seeds) >= 2  # of training and of the scores
    assert demo.SEED not in seeds
    assert "## Licence" in card


def test_the_checkpoint_is_looked_for_beside_the_package():
    assert Path(__file__).resolve().parent.parent / "checkpoints" / "shapes" == demo.CHECKPOINT
