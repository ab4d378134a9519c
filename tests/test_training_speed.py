"""Optimisations of speed and memory do not change the gradients of a training step."""

import copy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from one_by_one import random_sample, sums_one_by_one
from torch.utils._python_dispatch import TorchDispatchMode

from pix2seq.errors import InputError
from pix2seq.examples import collate
from pix2seq.model import cpu_attention
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.encoders import timm_attention
from pix2seq.model.encoders.timm import TimmEncoder
from pix2seq.model.layers import attend
from pix2seq.model.pix2seq import build_model
from pix2seq.training import objective
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.step import TrainingModel, compile_model, train_step
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=32, size=1040)
VIT = {"name": "vit", "dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "dropout": 0.1}
DEIT = {"name": "deit_tiny_patch16_224"}


def tiny_model(encoder=None):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=(32, 32),
        encoder=EncoderConfig(**(encoder or VIT), drop_path=0.2),
        decoder=DecoderConfig(
            dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_seq_len=64, dropout=0.1, drop_path=0.2
        ),
        vocab=VOCAB,
    )
    return build_model(config).train()


TASKS = ["detection", "segmentation", "keypoint", "captioning"]


def random_samples(sequences=1):
    """Four images with so many sequences each, of about 20 tokens."""
    rng = np.random.default_rng(1)
    return [random_sample(rng, {"detection": rng.integers(15, 25, sequences)}, VOCAB.size) for _ in range(4)]


def random_batch(sequences=1):
    return collate(random_samples(sequences), ["detection"])


def four_tasks(seed=0):
    """Two images for each of four tasks, with sequences as long as the tasks' own."""
    rng = np.random.default_rng(seed)
    lengths = {"detection": [31], "segmentation": rng.integers(10, 40, 3), "keypoint": [40], "captioning": [8, 12]}
    return collate([random_sample(rng, {name: lengths[name]}, VOCAB.size) for name in TASKS for _ in range(2)], TASKS)


def loss_and_gradients(model, batch, *, bf16=False, **settings):
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = CrossEntropy(**settings)(model, batch)["detection"][0]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def attention_by_hand(q, k, v, allowed):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scores_at_once", [2**21, 3 * 2 * 24 * 24, 1])
def test_attention_in_bf16_has_the_gradient_of_the_formula(monkeypatch, is_causal, scores_at_once):
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", scores_at_once)
    draw = torch.Generator().manual_seed(0)
    num_keys = 24 if is_causal else 40
    inputs = [torch.randn(5, n, 2, 16, generator=draw).bfloat16().transpose(1, 2) for n in (24, num_keys, num_keys)]
    grad = torch.randn(5, 2, 24, 16, generator=draw).bfloat16()
    allowed = torch.ones(1, 1, 24, num_keys, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    ours = [x.clone().requires_grad_() for x in inputs]
    out = attend(*ours, is_causal=is_causal)
    out.backward(grad)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = attention_by_hand(*exact, allowed)
    expected.backward(grad.double())
    assert (out - expected).norm() < 0.01 * expected.norm()
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad - b.grad).norm() < 0.01 * b.grad.norm()


def test_timm_attention_is_redirected_in_copies_too(monkeypatch):
    calls = []
    monkeypatch.setattr(timm_attention, "attend", lambda q, k, v: calls.append(q.dtype) or attend(q, k, v))
    encoder = TimmEncoder("deit_tiny_patch16_224", image_size=(32, 32))
    images = torch.rand(2, 3, 32, 32)
    encoder(images)
    assert len(calls) == len(encoder.net.blocks)
    other = copy.deepcopy(encoder)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    assert (other(images)[0] == 0).all()
    assert len(calls) == 2 * len(encoder.net.blocks)


def test_training_a_timm_encoder_in_bf16_follows_float32():
    model = tiny_model(DEIT).eval()  # gradients without dropout
    _, exact = loss_and_gradients(model, random_batch())
    _, half = loss_and_gradients(model, random_batch(), bf16=True)
    for name, gradient in exact.items():
        if name.endswith("qkv.weight"):
            assert F.cosine_similarity(gradient.flatten(), half[name].flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_the_loss_in_chunks_has_the_gradients_of_the_full_loss(monkeypatch, smoothing, rows_at_once):
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", rows_at_once * VOCAB.size + 3)
    model, samples = tiny_model().eval(), random_samples()
    loss, gradients = loss_and_gradients(model, collate(samples, ["detection"]), label_smoothing=smoothing)
    model.zero_grad()
    full = sums_one_by_one(model, samples, smoothing)["detection"]
    full.backward()
    torch.testing.assert_close(loss, full.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that is created, also in the backward pass."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_the_logits_of_all_positions_are_never_in_memory(monkeypatch):
    model, batch = tiny_model(), random_batch()
    num_logits = len(batch.scored) * VOCAB.size
    at_once = 5 * VOCAB.size
    largest_weight = max(p.numel() for p in model.parameters())
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", at_once)
    with LargestTensor() as largest:
        loss_and_gradients(model, batch)
    assert largest.numel <= max(at_once, largest_weight) < num_logits
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", num_logits)
    with LargestTensor() as largest:
        loss_and_gradients(model, batch)
    assert largest.numel == num_logits


class CountOperations(TorchDispatchMode):
    """Counts the operations that reach the device, also in the backward pass. Views are free and left out."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def stepper(model, **settings):
    """Return a function that takes a training step of four tasks on its batches."""
    training_model = TrainingModel(model, CrossEntropy(), **settings)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    return lambda *batches: train_step(training_model, optimizer, batches, {"captioning": 0.5}, max_grad_norm=1.0)


@pytest.mark.parametrize(("bf16", "most"), [(False, 500), (True, 760)])
def test_a_step_of_four_tasks_takes_few_operations(bf16, most):
    step = stepper(tiny_model(), bf16=bf16)
    step(four_tasks())  # makes the optimiser's state and what is computed once
    counts = []
    for seed in (1, 2):
        with CountOperations() as operations:
            step(four_tasks(seed))
        counts.append(operations.count)
    assert max(counts) <= most


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    step = stepper(tiny_model().cuda(), bf16=True)
    batches = [four_tasks(seed).pin_memory() for seed in range(4)]  # new lengths at every step
    step(*batches[:2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(*batches[2:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.finite


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("encoder", [VIT, DEIT], ids=["vit", "deit"])
def test_activation_checkpointing_saves_less_and_gives_the_same_gradients(encoder, sequences, bf16):
    model, batch = tiny_model(encoder), random_batch(sequences)
    runs = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, c=count: c.append(x.numel()) or x, lambda x: x):
            result = loss_and_gradients(model, batch, bf16=bf16)
        runs.append((sum(count), *result))
    assert runs[1][0] < 0.7 * runs[0][0]
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=0, atol=0)
    torch.testing.assert_close(runs[1][2], runs[0][2], rtol=0, atol=0)


@pytest.mark.parametrize("encoder", [VIT, DEIT, {"name": "resnet10t"}], ids=str)
def test_compiling_keeps_the_names_of_weights(encoder):
    model = tiny_model(encoder)
    names = list(model.state_dict())
    compile_model(model)
    assert list(model.state_dict()) == names
    assert model.decoder.blocks[0]._compiled_call_impl is not None


def test_compiling_without_a_compiler_is_reported(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        compile_model(tiny_model())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("encoder", [VIT, DEIT], ids=["vit", "deit"])
def test_a_compiled_model_has_the_same_gradients(encoder):
    model = tiny_model(encoder).eval()
    expected_loss, expected = loss_and_gradients(model, random_batch())
    compile_model(model)
    loss, gradients = loss_and_gradients(model, random_batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_kept_memory_causes_no_page_faults():
    count_faults = """
import resource, torch
from pix2seq.training.memory import keep_freed_memory
if keep_freed_memory():
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # the heap settles
    before = faults()
    for _ in range(10):
        torch.ones(2**24)
    print(faults() - before)
"""
    run = subprocess.run([sys.executable, "-c", count_faults], capture_output=True, text=True, check=True)
    if not run.stdout:
        pytest.skip("no glibc")
    assert int(run.stdout) < 1000  # 64 MiB are 16384 pages of 4 KiB
