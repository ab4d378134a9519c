"""A run skips steps that are not finite, and keeps the best checkpoint by its metric."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_cli import TINY, one_line

import pix2seq.training.objective
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.evaluation import EvalResult
from pix2seq.training.config import load_config
from pix2seq.training.loop import _Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop") / "shapes"
    write_shapes(folder, num_train=12, num_val=2, size=48, seed=1, workers=1)
    return folder


def train(data, out, *more):
    return main(["train", "--resume", "auto", f"data={data}", f"out={out}", *TINY, *more])


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_a_loss_that_stays_non_finite_ends_the_run_which_resumes_from_its_last_weights(
    data, tmp_path, monkeypatch, capsys
):
    original = pix2seq.training.objective.token_losses
    calls = 0

    def nan_from_the_fourth_call(*args):
        nonlocal calls
        calls += 1
        return original(*args) * (torch.nan if calls >= 4 else 1)

    monkeypatch.setattr(pix2seq.training.objective, "token_losses", nan_from_the_fourth_call)
    options = ["steps=9", "max_skipped=3", "checkpoint_every=2"]
    assert train(data, tmp_path, *options) == 2
    assert "no finite loss and gradient in 3 steps in a row, the last in step 6 (loss nan" in one_line(capsys)
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [4, 5, 6]
    dataset = open_dataset(data, "train")
    ids = {image.id for image in dataset.images}
    for line in skipped:
        (by_task,) = line["image_ids_by_rank"]
        (batch,) = by_task["detection"]
        assert len(batch) == 4
        assert set(batch) <= ids
    monkeypatch.setattr(pix2seq.training.objective, "token_losses", original)
    assert train(data, tmp_path, *options) == 0
    weights = load_file(tmp_path / "checkpoints/step-00000009/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_single_non_finite_steps_are_skipped_and_do_not_add_up(data, tmp_path, monkeypatch):
    original = pix2seq.training.objective.token_losses
    calls = 0

    def inf_every_other_call(*args):
        nonlocal calls
        calls += 1
        return original(*args) * (torch.inf if calls % 2 else 1)

    monkeypatch.setattr(pix2seq.training.objective, "token_losses", inf_every_other_call)
    assert train(data, tmp_path, "max_skipped=2") == 0
    assert json.loads((tmp_path / "checkpoints/step-00000006/state.json").read_text())["skipped"] == 3


@pytest.mark.parametrize(("metric", "expected"), [("AP", "step-00000004"), ("AR100", "step-00000002")])
def test_the_best_checkpoint_is_chosen_by_best_metric(data, tmp_path, monkeypatch, metric, expected):
    values = [{"AP": 0.1, "AR100": 0.9}, {"AP": 0.5, "AR100": 0.8}, {"AP": 0.3, "AR100": 0.7}]
    of = EvalResult.of
    monkeypatch.setattr(EvalResult, "of", lambda *args, **kwargs: replace(of(*args, **kwargs), metrics=values.pop(0)))
    assert train(data, tmp_path, "eval_every=2", "keep_checkpoints=1", f"best_metric={metric}") == 0
    assert checkpoints(tmp_path) == ["best", "step-00000006"]
    best = json.loads((tmp_path / "checkpoints/best/best.json").read_text())
    assert (best["checkpoint"], best["metric"]) == (expected, metric)
    position = json.loads((tmp_path / "checkpoints/best/state.json").read_text())
    assert position["step"] == int(expected.removeprefix("step-"))


def test_an_unknown_best_metric_is_reported_after_the_run_is_saved(data, tmp_path, capsys):
    assert train(data, tmp_path, "steps=2", "best_metric=AQ") == 2
    assert "best_metric=AQ is not a metric of this run; it has AP, " in one_line(capsys)
    assert checkpoints(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], True),
        (["cuda_graphs=false"], False),
        (["optimizer=muon"], False),
        (["bf16=false"], False),
        (["compile=true"], False),
        (["accumulate=2"], False),
        (["model.encoder.closeups=true"], False),  # a recording would read those of another batch
    ],
)
def test_steps_are_recorded_only_where_a_recording_has_all_that_changes(settings, expected):
    config = load_config(None, ["cuda_graphs=true", *settings])
    trainer = SimpleNamespace(
        config=config, ranks=SimpleNamespace(device=torch.device("cuda"), size=1), rewards=None, _has_contrast=False
    )
    assert _Trainer._records_steps(trainer) is expected
    trainer.ranks.size = 2
    assert not _Trainer._records_steps(trainer)
