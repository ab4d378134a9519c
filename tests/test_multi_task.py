"""Four tasks by the commands people type, on a tiny run."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_settings import ALL, TINY

from pix2seq import Pix2Seq
from pix2seq.cli import main
from pix2seq.data.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent


def test_every_task_has_its_own_loss_in_the_log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 4
    for line in train:
        parts = [line[f"loss/{name}"] for name in ALL.split(",")]
        assert np.isfinite(parts).all()
        assert line["loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2] + parts[3], rel=1e-4)
        assert line["images"] == line["step"] * (4 + 2 + 4 + 4)
    assert "segmentation/true_boxes/AP50" in lines[-1]
    assert "captioning/BLEU-4" in lines[-1]


def test_a_mix_resumes_to_the_bit(run, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000004")
    assert main(["train", "--task", ALL, "--resume", "auto", f"data={data}", f"out={broken}", *TINY]) == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints/step-00000004" / name) for folder in (broken, run))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_words_travel_with_the_checkpoint(run):
    folder = run / "checkpoints" / "step-00000004"
    assert (folder / "text_vocab.json").is_file()
    model = Pix2Seq.from_pretrained(folder)
    assert model.text.size == model.config.vocab.num_text
    assert set(model.task_settings) == set(ALL.split(","))


def test_eval_scores_every_task(run, data, tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path / "m.json")]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    for name in ("AP50", "segmentation/found_boxes/AP50", "keypoint/true_boxes/AP50", "captioning/BLEU-1"):
        assert name in metrics
    assert "captioning" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--task", "captioning"]) == 0
    assert "AP50" not in capsys.readouterr().out


def test_predict_writes_one_json_and_one_image(run, data, tmp_path):
    image = sorted((data / "val2017").iterdir())[0]
    command = ["predict", "--image", str(image), "--checkpoint", str(run), "--task", ALL, "--out", str(tmp_path)]
    assert main([*command, "--num-objects", "4"]) == 0
    content = json.loads((tmp_path / f"{image.stem}.json").read_text())
    assert set(content) == {"image", "width", "height", "instances", "captions"}
    assert [set(caption) for caption in content["captions"]] == [{"text", "score"}]
    for instance in content["instances"]:
        for ring in instance["segmentation"]:
            assert len(ring) >= 6
            assert len(ring) % 2 == 0
        assert len(instance["keypoints"]) % 3 == 0
    assert Image.open(tmp_path / f"{image.stem}.png").size[1] > 512  # the caption stands below
    assert main(["predict", str(image), "--checkpoint", str(run), "--task", "captioning", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / f"{image.stem}.json").read_text())["instances"] == []


def test_images_without_captions_are_left_out_of_their_scores(run, data, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(data, some)
    file = some / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    first = content["annotations"][0]["image_id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    file.write_text(json.dumps(content))
    command = ["eval", "--checkpoint", str(run), "--data", str(some), "--out", str(tmp_path / "m.json")]
    assert main([*command, "--num-samples", "1"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["scores"]["captioning"]["num_images"] == 4
    file.unlink()
    assert main(command) == 0
    assert set(json.loads((tmp_path / "m.json").read_text())["scores"]) >= {"detection", "keypoint/true_boxes"}


def test_boxes_may_come_from_a_file(run, data, tmp_path, capsys):
    image = sorted((data / "val2017").iterdir())[0]
    given = {"instances": [{"bbox": [4, 5, 20, 30], "category": "person", "score": 0.5}]}
    (tmp_path / f"{image.stem}.json").write_text(json.dumps(given))
    command = ["predict", str(image), "--checkpoint", str(run), "--task", "segmentation,keypoint"]
    assert main([*command, "--boxes", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    (found,) = json.loads((tmp_path / "out" / f"{image.stem}.json").read_text())["instances"]
    assert (found["bbox"], found["score"], len(found["keypoints"])) == ([4, 5, 20, 30], 0.5, 51)
    (tmp_path / f"{image.stem}.json").write_text("{}")
    assert main([*command, "--boxes", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is no file of boxes" in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_refused_before_the_work(run, data, tmp_path, capsys):
    image = sorted((data / "val2017").iterdir())[0]
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        ["predict", str(image), "--checkpoint", str(run), "--out", str(file)],
        ["eval", "--checkpoint", str(run), "--data", str(data), "--out", str(tmp_path)],
        ["train", f"data={data}", f"out={file}/run", *TINY],
    ):
        assert main(command) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
    assert file.read_text() == "mine"


def test_fine_tuning_takes_the_model_of_its_start(run, data, tmp_path):
    kept = [setting for setting in TINY if not setting.startswith("model.")]
    settings = [f"data={data}", f"out={tmp_path / 'run'}", f"init={run}", *kept, "steps=1"]
    assert main(["train", "--task", "detection", *settings]) == 0
    start, model = (
        Pix2Seq.from_pretrained(f)
        for f in (run / "checkpoints/step-00000004", tmp_path / "run/checkpoints/step-00000001")
    )
    assert model.config.encoder == start.config.encoder
    assert model.config.vocab.num_text == 0


@pytest.mark.parametrize("task", ALL.split(","))
def test_every_task_trains_alone_by_its_own_script(data, tmp_path, monkeypatch, task):
    script = ROOT / "train" / f"{task}.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"data={data}", f"out={tmp_path / 'run'}", *TINY, "steps=1"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    model = Pix2Seq.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert list(model.task_settings) == [task]


def test_fine_tuning_keeps_words_and_classes(run, data, tmp_path, capsys):
    settings = [f"data={data}", f"out={tmp_path / 'run'}", f"init={run}", *TINY, "steps=1", "lr=1e-9"]
    assert main(["train", "--task", "captioning", *settings]) == 0
    assert "words were known" in capsys.readouterr().out
    first = Pix2Seq.from_pretrained(run / "checkpoints" / "step-00000004")
    second = Pix2Seq.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert second.text.tokens == first.text.tokens
    vocab = first.config.vocab
    used = [*range(100), *(100 + category.label for category in first.categories)]
    used += [*range(vocab.coord_base, vocab.coord_end), *range(vocab.text_base, vocab.size)]
    ours, theirs = second.decoder.token_embedding.weight[used], first.decoder.token_embedding.weight[used]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_tasks_may_come_from_different_folders(data, tmp_path):
    other = tmp_path / "other"
    write_shapes(other, num_train=6, num_val=3, size=48, seed=9, workers=1)
    file = other / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["id"] += 100  # numbered differently, and one class more
    for annotation in content["annotations"]:
        annotation["category_id"] += 100
    content["categories"].append({"id": 7, "name": "unicorn"})
    file.write_text(json.dumps(content))
    (other / "annotations" / "person_keypoints_train2017.json").unlink()
    settings = [f"data.detection={data}", f"data.segmentation={other}", f"out={tmp_path / 'run'}", *TINY, "steps=1"]
    assert main(["train", "--task", "detection,segmentation", *settings]) == 0
    model = Pix2Seq.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000001")
    names = [category.name for category in model.categories]
    assert len(names) == len(set(names)) == len(content["categories"])
    assert "unicorn" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "detection,dance"], "unknown task 'dance'"),
        (["--task", "captioning", "captioning.tokenizer=nowhere.model"], "expected words, sentencepiece"),
        (["--task", "captioning", "model.vocab.num_text=5", "model.vocab.size=2000"], "raise it"),
        (["--task", "segmentation", "segmentation.max_points=100"], "lower segmentation.max_points"),
        (["--task", "detection,segmentation", "data=null", "data.detection=x"], "no data was given for segmentation"),
        (["--task", "keypoint", "keypoint.top_p=2"], "top_p"),
        (["--task", "segmentation", "segmentation.batch_size=0"], "batch_size must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(data, tmp_path, capsys, arguments, message):
    settings = [f"data={data}", f"out={tmp_path / 'run'}", *TINY]
    names, given = arguments[:2], arguments[2:]
    if any(setting.startswith("data") for setting in given):
        settings = settings[1:]
    assert main(["train", *names, *settings, *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize("task", ALL.split(","))
def test_sequences_can_be_seen(data, tmp_path, capsys, task):
    out = tmp_path / "sequence.png"
    command = ["data", "sequences", str(data), "--task", task, "--index", "2", "--out", str(out)]
    assert main([*command, *TINY]) == 0
    text = capsys.readouterr().out
    assert f"task:{task} (prompt)" in text
    expected = {"detection": "noise", "segmentation": "bin:", "keypoint": "class person", "captioning": "text '"}[task]
    assert expected in text
    Image.open(out).verify()
    assert main(["data", "sequences", str(data), "--task", task, "--index", "999", *TINY]) == 2
    assert "there is no sample 999" in capsys.readouterr().err
