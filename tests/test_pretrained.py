"""Opening a checkpoint from a stranger: a config or weights that cannot be right are refused in a line, and quickly."""

import copy
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pix2seq import Pix2Seq, Predictor
from pix2seq.cli import main
from pix2seq.errors import InputError
from pix2seq.model.pretrained import find_checkpoint

OLD = Path(__file__).parent / "fixtures" / "checkpoint-0.1"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint, without the manifest that would reveal a change."""
    shutil.copytree(OLD, tmp_path / "model")
    (tmp_path / "model/manifest.json").unlink()
    return tmp_path / "model"


def edit(folder, *path, value):
    """Set an entry of config.json; a value of None with a path removes nothing."""
    content = json.loads((OLD / "config.json").read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))


def refusal(folder):
    """Return the line with which a checkpoint is refused, within five seconds of processor time."""
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        Predictor.from_pretrained(folder, device="cpu")
    assert time.process_time() - started < 5
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message or "this checkpoint's settings" in message or "config.json" in message
    return message


WRONG = [
    *[
        (("model", part, "dim"), value)
        for part in ("encoder", "decoder")
        for value in (0, -8, 2**40, 9, NAN, "x", None)
    ],
    *[(("model", part, "num_heads"), value) for part in ("encoder", "decoder") for value in (0, 3, 1.5)],
    *[(("model", part, "num_layers"), value) for part in ("encoder", "decoder") for value in (2, 10**6, 10**12, -1)],
    *[(("model", "image_size"), value) for value in ([32], [32, 32, 32], 32, "32", [32, None])],
    (("model", "encoder", "stem_blocks"), 10**9),
    (("model", "encoder", "stem"), "conv"),
    (("model", "encoder", "patch_size"), 0),
    (("model", "encoder", "name"), "vitt"),
    (("model", "encoder", "name"), "${oc.env:HOME}"),
    (("model", "decoder", "max_seq_len"), 10**9),
    (("model", "decoder", "surprise"), 1),
    (("model", "positions"), "imagined"),
    (("model", "vocab", "size"), 10**12),
    (("model", "vocab", "num_bins"), 1),
    (("model", "vocab", "num_text"), 5),
    (("model",), []),
    (("model",), None),
    (("categories",), {}),
    (("categories",), [5]),
    (("categories", 1, "label"), 1),
    (("categories", 1, "label"), 0),
    (("categories", 1, "label"), 10**9),
    (("categories", 1, "label"), "2"),
    (("categories", 1, "label"), True),
    (("categories", 1, "id"), NAN),
    (("categories", 1, "name"), 7),
    (("categories", 1, "name"), None),
    (("categories", 0, "keypoints"), [1] * 17),
    (("categories", 0, "skeleton"), [[0, 99]]),
    (("categories", 0, "skeleton"), [[0, -1]]),
    (("categories", 0, "skeleton"), [[0, INF]]),
    (("categories", 0, "skeleton"), [[0]]),
    *[(("tasks",), value) for value in ([], "detection", None, {"detection": 5}, {"detection": {"surprise": 1}})],
    (("tasks", "detection", "max_objects"), 10**9),
    (("tasks", "detection", "max_objects"), "many"),
    (("tasks", "detection", "top_p"), 2.0),
    (("tasks", "captioning", "tokenizer"), "${oc.env:HOME}"),
    *[(("format",), value) for value in (999, 0, -1, "1", None, True, 1.5, [])],
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_a_config_that_cannot_be_right_is_refused_in_a_line(folder, path, value):
    edit(folder, *path, value=value)
    refusal(folder)


def test_an_environment_variable_is_not_read_from_a_config(folder, monkeypatch):
    monkeypatch.setenv("PIX2SEQ_SECRET", "vit")
    edit(folder, "model", "encoder", "name", value="${oc.env:PIX2SEQ_SECRET}")
    assert "cannot refer to" in refusal(folder)


def test_a_task_of_a_later_release_is_left_out_with_a_warning(folder, capsys):
    content = json.loads((OLD / "config.json").read_text())
    content["tasks"]["telepathy"] = {"distance": 5}
    (folder / "config.json").write_text(json.dumps(content))
    predictor = Predictor.from_pretrained(folder, device="cpu")
    assert "telepathy" in capsys.readouterr().err
    with pytest.raises(InputError, match="no installed package provides the task telepathy"):
        predictor.ask("telepathy", [])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '"x"', "[" * 100_000, '{"a":' * 50_000, "\ufeff{}", "9" * 5000]
)
def test_a_config_that_is_no_config_is_refused_in_a_line(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    refusal(folder)


def test_a_pipe_instead_of_the_config_is_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match="no regular file"):
        Pix2Seq.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(NAN), "not finite"),
        (lambda t: t.index_fill_(0, torch.tensor([0]), INF), "not finite"),
        (lambda t: t.double().fill_(1e300), "not finite"),
        (lambda t: t.int(), "is torch.int32, expected torch.float32"),
        (lambda t: t > 0, "is torch.bool"),
        (lambda t: t.to(torch.complex64), "is torch.complex64"),
        (lambda t: t[:-1], "expected"),
    ],
)
def test_weights_that_cannot_be_right_are_refused_in_a_line(folder, change, message):
    weights = load_file(folder / "model.safetensors")
    for name in ("decoder.norm.weight", "encoder.norm.bias"):
        broken = copy.copy(weights)
        broken[name] = change(weights[name].clone())
        save_file(broken, folder / "model.safetensors")
        found = refusal(folder)
        assert message in found
        assert name in found


def test_half_precision_weights_are_taken(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, folder / "model.safetensors")
    model = Pix2Seq.from_pretrained(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_captions_need_the_words_and_other_tasks_do_not(folder):
    (folder / "text_vocab.json").unlink()
    predictor = Predictor.from_pretrained(folder, device="cpu")
    image = predictor.encode(torch.zeros(3, 8, 8))
    predictor.detect(image)
    with pytest.raises(InputError, match=r"captioning needs words.*text_vocab\.json"):
        predictor.caption(image)
    (folder / "text_vocab.json").write_text(json.dumps({"tokens": ["<pad>", "</s>", "<unk>", *map(str, range(99))]}))
    assert "has 102 ids, but the vocabulary" in refusal(folder)


def test_a_checkpoint_is_found_from_within_its_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert find_checkpoint(Path(".")) == Path(".")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    folder.rename(tmp_path / "checkpoints/step-00000001")
    assert find_checkpoint(Path(".")) == Path("checkpoints/step-00000001")
    for name in ("x" * 5000, "nul\0", "checkpoints/step-00000001/config.json"):
        assert main(["predict", "a.png", "--checkpoint", name]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1
        assert lines[0].startswith("error: checkpoint ")


def test_a_model_saves_over_another_only_when_complete(folder, tmp_path, monkeypatch):
    model = Pix2Seq.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pix2seq.model.pretrained.save_file", full)
        with pytest.raises(InputError, match="disk full"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written while saving a model"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
