"""The recorded GPU step equals full passes. Without a GPU, its operations run one by one."""

import pytest
import torch
from test_decoding import MEMORY, PROMPTS, SHORT, expected_logprobs, tiny_model

import pix2seq.model.decoding.step
from pix2seq.model.decoding.generate import generate
from pix2seq.model.decoding.graph_step import GraphStep
from pix2seq.model.decoding.kv_cache import KVCache


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def made(monkeypatch):
    """Graph steps that were created in place of CPU steps."""
    steps = []
    monkeypatch.setattr(
        pix2seq.model.decoding.step, "CpuStep", lambda *args: steps.append(GraphStep(*args)) or steps[-1]
    )
    return steps


@pytest.mark.parametrize(("images", "prompts", "prompt_len"), [(1, 1, 1), (1, 3, 2), (4, 1, 2), (4, 3, 1)])
def test_graph_steps_equal_one_pass(model, made, images, prompts, prompt_len):
    memory, prompt = MEMORY[:images], PROMPTS[:images, :prompts, :prompt_len]
    out = model.generate(memory, prompt, max_new_tokens=24, eos_id=None)
    assert len(made) == 1
    torch.testing.assert_close(out.logprobs, expected_logprobs(model, memory, prompt, out.tokens), atol=1e-3, rtol=1e-3)


def test_graph_steps_in_bf16_stay_near_those_in_float32(model, made):
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(MEMORY, PROMPTS, max_new_tokens=24, eos_id=None)
    assert made[0].layers[0].qkv.weight.dtype == torch.bfloat16
    assert (out.logprobs - expected_logprobs(model, MEMORY, PROMPTS, out.tokens)).abs().mean() < 0.1


def test_the_content_of_empty_slots_does_not_matter(model, made, monkeypatch):
    allocate = KVCache.allocate

    def dirty(*args, **kwargs):
        cache = allocate(*args, **kwargs)
        for layer in cache.layers:
            layer.self_keys.fill_(torch.nan)
            layer.self_values.fill_(torch.inf)
        return cache

    clean = model.generate(MEMORY, PROMPTS, max_new_tokens=12, eos_id=None, temperature=0)
    monkeypatch.setattr(KVCache, "allocate", dirty)
    assert torch.equal(
        model.generate(MEMORY, PROMPTS, max_new_tokens=12, eos_id=None, temperature=0).tokens, clean.tokens
    )


@pytest.mark.parametrize("seed", range(3))
def test_dropping_finished_rows_changes_nothing(model, made, seed):
    found = [
        generate(
            model.decoder,
            MEMORY,
            PROMPTS,
            max_new_tokens=30,
            grammar=SHORT,
            eos_id=SHORT.eos_id,
            compact=compact,
            generator=torch.Generator().manual_seed(seed),
        )
        for compact in (True, False)
    ]
    assert len(made) > 2  # a new one each time that rows leave
    assert torch.equal(found[0].tokens, found[1].tokens)
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_a_recorded_graph_equals_one_pass(model, bf16):
    gpu = tiny_model().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        out = gpu.generate(MEMORY.cuda(), PROMPTS.cuda(), max_new_tokens=30, eos_id=SHORT.eos_id, grammar=SHORT)
    expected = expected_logprobs(model, MEMORY, PROMPTS, out.tokens.cpu())
    unfinished = (out.tokens != 0).cpu()
    error = (out.logprobs.cpu() - expected)[unfinished].abs()
    assert error.mean() < (0.1 if bf16 else 1e-3)
