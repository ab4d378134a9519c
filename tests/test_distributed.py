"""Several processes train as one process does, and all of them skip a step that is not finite on any of them."""

import math

import pytest
import ranks
import torch
from forked import run_ranks

from pix2seq.cli import main
from pix2seq.training.distributed import Ranks

RUNS = ["ddp-patch", "ddp-conv", "fsdp-patch", "fsdp-conv", "ddp-conv-uneven", "ddp-conv-nan", "fsdp-patch-nan"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of all runs with two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(ranks.main, folder / "two.pt", *RUNS, folder=folder)
    return torch.load(folder / "two.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_rank():
    """Results with one process, with batches of 8 instead of 2 x 4."""
    return {run: ranks.train(Ranks(torch.device("cpu")), *run.split("-")) for run in ("ddp-patch", "ddp-conv")}


@pytest.mark.parametrize("run", RUNS[:5])
def test_two_processes_train_as_one_does(two_ranks, one_rank, run):
    two, one = two_ranks[run], one_rank[run.replace("fsdp", "ddp").removesuffix("-uneven")]
    for step_of_one, *steps_of_two in zip(*one["steps"], *two["steps"], strict=True):
        for step in steps_of_two:
            for name in ("loss", "detection", "captioning"):
                assert step[name] == pytest.approx(step_of_one[name], rel=1e-6)
            assert step["grad_norm"] == pytest.approx(step_of_one["grad_norm"], rel=1e-5)
    for kind in ("weights", "averages"):
        for name, tensor in one[kind].items():
            torch.testing.assert_close(two[kind][name], tensor, rtol=0, atol=3e-6, msg=f"{kind} {name}")


def test_fsdp_shards_every_weight_and_ddp_shards_none(two_ranks):
    assert two_ranks["fsdp-conv"]["num_sharded"] == two_ranks["fsdp-conv"]["num_parameters"] > 0
    assert two_ranks["ddp-conv"]["num_sharded"] == 0


@pytest.mark.parametrize("run", RUNS[5:])
def test_a_nan_on_one_rank_leaves_all_ranks_unchanged(two_ranks, run):
    first, second = two_ranks[run]["steps"]
    assert [step["changed"] for step in first] == [step["changed"] for step in second] == [True, False, True]
    assert not math.isfinite(first[1]["loss"] + first[1]["grad_norm"])
    assert all(tensor.isfinite().all() for tensor in two_ranks[run]["weights"].values())


def test_fewer_processes_than_requested_are_refused(tmp_path, capsys):
    assert main(["train", f"data={tmp_path}", f"out={tmp_path / 'run'}", "num_processes=2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: num_processes=2, but 1 was started; start training with: torchrun")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_with_one_process_every_exchange_returns_its_input():
    alone = Ranks(torch.device("cpu"))
    assert alone.first
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.gather("word") == ["word"]
    assert alone.on_first(lambda: 7) == 7
    assert torch.equal(alone.sum(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
