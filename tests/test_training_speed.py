"""Optimisations of speed and memory do not change the gradients of a training step."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pix2seq.errors import InputError
from pix2seq.examples import Batch
from pix2seq.model import cpu_attention
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.encoders import timm_attention
from pix2seq.model.encoders.timm import TimmEncoder
from pix2seq.model.layers import attend
from pix2seq.model.pix2seq import build_model
from pix2seq.training import step
from pix2seq.training.step import compile_model, sequence_loss
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


def random_batch(sequences=1):
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(1, VOCAB.size, (2, 4, sequences, 20), generator=draw)
    weights = torch.rand(tokens.shape, generator=draw) * (torch.rand(tokens.shape, generator=draw) > 0.3)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return Batch(images, tokens, targets, weights, (0, 1, 2, 3))


def loss_and_gradients(model, batch, *, bf16=False, **settings):
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = sequence_loss(model, batch, **settings)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def attention_by_hand(q, k, v, allowed):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kind", ["plain", "causal", "mask of each image", "mask of all"])
@pytest.mark.parametrize("scores_at_once", [2**21, 3 * 2 * 24 * 24, 1])
def test_attention_in_bf16_has_the_gradient_of_the_formula(monkeypatch, kind, scores_at_once):
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", scores_at_once)
    draw = torch.Generator().manual_seed(0)
    num_keys = 40 if kind == "plain" else 24
    inputs = [torch.randn(5, n, 2, 16, generator=draw).bfloat16().transpose(1, 2) for n in (24, num_keys, num_keys)]
    grad = torch.randn(5, 2, 24, 16, generator=draw).bfloat16()
    allowed = torch.ones(1, 1, 24, num_keys, dtype=torch.bool)
    if kind == "causal":
        allowed = allowed.tril()
    elif kind != "plain":
        rows = 1 if kind == "mask of all" else 5
        allowed = (torch.rand(rows, 1, 24, 24, generator=draw) > 0.5) | torch.eye(24, dtype=torch.bool)

    ours = [x.clone().requires_grad_() for x in inputs]
    out = attend(*ours, is_causal=kind == "causal", mask=allowed if kind.startswith("mask") else None)
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
    monkeypatch.setattr(step, "LOGITS_AT_ONCE", rows_at_once * VOCAB.size + 3)
    model, batch = tiny_model().eval(), random_batch()
    loss, gradients = loss_and_gradients(model, batch, label_smoothing=smoothing)
    model.zero_grad()
    logits = model(batch.images / 255, batch.tokens).flatten(0, 1)
    losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", label_smoothing=smoothing)
    full = (losses * batch.weights.flatten()).sum()
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
    num_logits = int((batch.weights > 0).sum()) * VOCAB.size
    at_once = 5 * VOCAB.size
    largest_weight = max(p.numel() for p in model.parameters())
    monkeypatch.setattr(step, "LOGITS_AT_ONCE", at_once)
    with LargestTensor() as largest:
        loss_and_gradients(model, batch)
    assert largest.numel <= max(at_once, largest_weight) < num_logits
    monkeypatch.setattr(step, "LOGITS_AT_ONCE", num_logits)
    with LargestTensor() as largest:
        loss_and_gradients(model, batch)
    assert largest.numel == num_logits


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
