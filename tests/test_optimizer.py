"""Muon's update, which optimiser updates what, steps that a flag cancels, and state that survives a restart."""

import copy
import re
import shutil
from collections import Counter

import muon_ranks
import numpy as np
import pytest
import torch
from forked import run_ranks
from muon_ranks import numbers, set_gradients, state_with, train
from safetensors.torch import load_file
from test_cli import TINY, one_line
from tiny_run import tiny_state
from torch.utils._python_dispatch import TorchDispatchMode

from pix2seq.cli import main
from pix2seq.errors import InputError
from pix2seq.training.checkpoint import load_checkpoint, save_checkpoint
from pix2seq.training.config import load_config
from pix2seq.training.distributed import Ranks
from pix2seq.training.ema import Ema
from pix2seq.training.optimizer import Muon, build_optimizer, optimizer_step, orthogonalize

BOTH = pytest.mark.parametrize("name", ["adamw", "muon"])


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name


class Operations(TorchDispatchMode):
    """Count the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def orthogonalize_by_hand(matrix):
    """Five Newton-Schulz steps of Jordan's post, in float64."""
    x = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def muon_by_hand(weight, gradients, *, lr, weight_decay, momentum=0.95):
    """Return `weight` after Muon's steps, from Jordan's post and equation 4 of arXiv 2502.16982, in float64."""
    average = np.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + gradient
        update = orthogonalize_by_hand(gradient + momentum * average)  # Nesterov
        weight = weight - lr * (0.2 * np.sqrt(max(weight.shape)) * update + weight_decay * weight)
    return weight


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_matrices_are_made_orthogonal_as_published(shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape))
    ours = orthogonalize(torch.tensor(matrices), (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    np.testing.assert_allclose(ours, [orthogonalize_by_hand(matrix) for matrix in matrices], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_moves_matrices_as_published_and_as_torch_does(shape):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(3, *shape))
    gradients = rng.normal(size=(4, 3, *shape))
    ours = [torch.nn.Parameter(torch.tensor(matrix, dtype=torch.float32)) for matrix in matrices]
    theirs = copy.deepcopy(ours)
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1)
    torch_muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for parameter, gradient in zip([*ours, *theirs], [*step, *step], strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        torch_muon.step()
    for i, (parameter, reference) in enumerate(zip(ours, theirs, strict=True)):
        by_hand = muon_by_hand(matrices[i], gradients[:, i], lr=0.02, weight_decay=0.1)
        for expected in (reference.detach().numpy(), by_hand):
            error = np.abs(parameter.detach().numpy() - expected).max()
            assert error < 0.02 * np.abs(expected - matrices[i]).max()  # bf16 keeps 8 bits
        assert torch.equal(
            optimizer.state[parameter]["momentum_buffer"], torch_muon.state[reference]["momentum_buffer"]
        )


def test_muon_updates_linear_layers_and_adamw_the_rest():
    model = tiny_state().model
    optimizer = build_optimizer(model, name="muon", lr=1, weight_decay=0.1, betas=(0.9, 0.95))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, decayed, not_decayed = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0]
    block, cross = "encoder.blocks.0", "decoder.blocks.0.cross_attention"
    assert sorted(muon) == [
        *(f"{cross}.key_value.weight", f"{cross}.out.weight", f"{cross}.query.weight"),
        *("decoder.blocks.0.mlp.contract.weight", "decoder.blocks.0.mlp.expand.weight"),
        *("decoder.blocks.0.self_attention.out.weight", "decoder.blocks.0.self_attention.qkv.weight"),
        *(f"{block}.attention.out.weight", f"{block}.attention.qkv.weight"),
        *(f"{block}.mlp.contract.weight", f"{block}.mlp.expand.weight"),
        *("projection.linear.weight", "projection.mlp.contract.weight", "projection.mlp.expand.weight"),
    ]
    assert decayed == ["encoder.stem.weight"]
    assert {"decoder.token_embedding.weight", "decoder.position_embedding", "encoder.norm.weight"} < set(not_decayed)
    assert len(muon) + len(decayed) + len(not_decayed) == len(names)
    adamw = build_optimizer(model, name="adamw", lr=1, weight_decay=0.1, betas=(0.9, 0.95))
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {
        id(p) for group in optimizer.param_groups[:2] for p in group["params"]
    }


@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_flagged_step_changes_no_bit(name, value):
    state, undisturbed = state_with(name), state_with(name)
    for seed in range(2):
        before = numbers(state)
        set_gradients(state, seed, value)
        optimizer_step(state.optimizer, torch.ones(1))
        assert all(torch.equal(tensor, numbers(state)[key]) for key, tensor in before.items())
        for run, flag in ((state, torch.zeros(1)), (undisturbed, None)):
            set_gradients(run, seed)
            optimizer_step(run.optimizer, flag)
        assert_same_bits(numbers(state), numbers(undisturbed))
        moved = numbers(state)
        assert not any(torch.equal(tensor, moved[key]) for key, tensor in before.items() if key.startswith("weights/"))


@BOTH
def test_the_host_does_not_read_the_flag(name):
    state = state_with(name)
    flag = torch.zeros(())
    set_gradients(state, 0)
    optimizer_step(state.optimizer, flag)
    if name == "muon":
        state.optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)  # AdamW's kernel reads a tensor on the CPU
    with Operations() as operations:
        optimizer_step(state.optimizer, flag)
        state.ema.update(state.model, 1, 1 - flag)
    reads = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default"}
    assert not reads & set(operations.count)
    assert operations.count["aten._fused_adamw_.default"] == 2  # one per group


def test_matrices_of_one_shape_are_updated_together():
    counts = []
    for number in (1, 5):
        parameters = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(number)]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0)
        for parameter in parameters:
            parameter.grad = torch.randn(6, 4)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_a_tensor_as_learning_rate_moves_weights_as_a_number_does():
    runs = [state_with("muon"), state_with("muon")]
    for group in runs[1].optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for run in runs:
        set_gradients(run, 0)
        optimizer_step(run.optimizer)
    ours, theirs = (numbers(run) for run in runs)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-7)


def test_an_optimizer_that_would_ignore_the_flag_is_refused():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="would ignore found_inf"):
        optimizer_step(torch.optim.SGD(layer.parameters(), lr=1), torch.ones(()))


def test_averages_stay_where_a_step_was_not_finite():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    flagged, plain = Ema(model, 0.9), Ema(model, 0.9)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    for step in (1, 2, 50):
        before = copy.deepcopy(flagged.weights)
        broken = copy.deepcopy(model)
        broken[1].running_mean.fill_(torch.nan)
        flagged.update(broken, step, torch.tensor(0.0))
        assert_same_bits(flagged.weights, before)
        flagged.update(model, step, torch.tensor([True]))
        plain.update(model, step)
        for name, average in plain.weights.items():
            torch.testing.assert_close(flagged.weights[name], average, rtol=1e-6, atol=0)
    assert flagged.weights["1.num_batches_tracked"] == 1


@BOTH
def test_a_run_is_restored_to_the_bit(tmp_path, name):
    state, other = state_with(name), state_with(name)
    for seed in range(2):
        set_gradients(state, seed)
        optimizer_step(state.optimizer)
        state.step += 1
    folder = save_checkpoint(state, tmp_path, keep=1)
    set_gradients(other, 7)
    optimizer_step(other.optimizer)
    load_checkpoint(other, folder)
    assert_same_bits(numbers(other), numbers(state))
    for run in (state, other):
        for group in run.optimizer.param_groups:
            group["lr"] = 5e-3
        set_gradients(run, 3)
        optimizer_step(run.optimizer)
    assert_same_bits(numbers(other), numbers(state))


@pytest.mark.parametrize(("written", "resumed"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_checkpoint_of_the_other_optimizer_is_refused(tmp_path, written, resumed):
    state = state_with(written)
    set_gradients(state, 0)
    optimizer_step(state.optimizer)
    folder = save_checkpoint(state, tmp_path, keep=1)
    other = state_with(resumed)
    before = numbers(other)
    with pytest.raises(InputError, match=f"cannot resume from .*: its optimizer is {written}; use the settings"):
        load_checkpoint(other, folder)
    assert_same_bits(numbers(other), before)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match=r"Invalid value 'moun', expected one of \['adamw', 'muon'\] \(optimizer\)"):
        load_config(None, ["optimizer=moun"])


def test_a_resumed_muon_run_ends_as_an_unbroken_one_to_the_bit(shapes, tmp_path, capsys):
    def train(out, *more):
        settings = [f"data={shapes}", f"out={tmp_path / out}", *TINY, "model.image_size=[32,32]", *more]
        return main(["train", "--resume", "auto", *settings])

    assert train("run", "optimizer=muon") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    for name in ("step-00000004", "step-00000006"):
        shutil.rmtree(tmp_path / "broken/checkpoints" / name)
    assert train("broken", "optimizer=muon") == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(tmp_path / out / "checkpoints/step-00000006" / name) for out in ("run", "broken"))
        assert_same_bits(ours, theirs)
    assert any(key.endswith("/momentum_buffer") for key in ours)
    assert train("run", "steps=8") == 2
    assert re.search("optimizer.*muon.*adamw|optimizer.*adamw.*muon", one_line(capsys))


def test_sharded_runs_step_and_resume_as_one_process_does(tmp_path):
    run_ranks(muon_ranks.main, tmp_path, folder=tmp_path)
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    one = train(Ranks(torch.device("cpu")), tmp_path / "one")
    assert (one["num_sharded"], two["num_sharded"]) == (0, len(list(state_with("muon").model.parameters())))
    for result in (one, two):
        assert_same_bits(result["resumed"], result["unbroken"])
    for name, tensor in one["unbroken"].items():  # an update is about 2e-3, and rounding to bf16 moves it by 1e-5
        torch.testing.assert_close(two["unbroken"][name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.gpu
@BOTH
def test_a_flagged_step_on_a_gpu_waits_for_nothing(name):
    state = state_with(name)
    state.model.cuda()
    state.optimizer = build_optimizer(state.model, name=name, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    state.ema = Ema(state.model, 0.9)
    for group in state.optimizer.param_groups:
        group["lr"] = torch.tensor(1e-2, device="cuda")
    for value in (1.0, 1.0, torch.nan):
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        flag = torch.tensor(float(value != value), device="cuda")
        before = numbers(state)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer_step(state.optimizer, flag)
            state.ema.update(state.model, 1, 1 - flag)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = numbers(state)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
