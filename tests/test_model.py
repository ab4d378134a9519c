"""The model: shapes, causality, cached against uncached, single images against batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pix2seq import Pix2Seq
from pix2seq.errors import InputError
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.sampling import sample, truncate_logits
from pix2seq.model.pix2seq import build_model
from pix2seq.model.positions import fourier_1d, fourier_2d, sequence_encodings, sincos_1d, sincos_2d
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=32, size=1040)


def tiny_model(**encoder):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=(32, 48),
        encoder=EncoderConfig(**{"name": "vit", "dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64} | encoder),
        decoder=DecoderConfig(dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_seq_len=64),
        vocab=VOCAB,
    )
    model = build_model(config).eval()
    # Fresh weights give nearly equal logits, which would hide mistakes.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


IMAGES = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, VOCAB.size, (3, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("grid", ["4x6x48", "40x40x64", "1x9x32"])
def test_position_encodings_equal_the_official_ones(parity_ops, grid):
    height, width, dim = map(int, grid.split("x"))
    np.testing.assert_allclose(sincos_2d(height, width, dim).numpy(), parity_ops[f"sincos_{grid}"], atol=2e-6)


def test_position_encodings_of_a_single_position_are_finite():
    assert torch.isfinite(sincos_1d(1, 8)).all()
    assert torch.isfinite(fourier_1d(torch.zeros(1), 2)).all()


def fourier_by_hand(position, dim):
    """Half a cycle to 16 cycles across the image, in equal ratios."""
    count = dim // 2
    cycles = [0.5 * 32 ** (i / (count - 1)) for i in range(count)]
    return [math.sin(2 * math.pi * position * c) for c in cycles] + [
        math.cos(2 * math.pi * position * c) for c in cycles
    ]


@pytest.mark.parametrize(("height", "width", "dim"), [(2, 5, 12), (4, 3, 16), (1, 6, 12)])
def test_fourier_encodings_by_hand_on_any_grid(height, width, dim):
    expected = [
        fourier_by_hand((y + 0.5) / height, dim // 2) + fourier_by_hand((x + 0.5) / width, dim // 2)
        for y in range(height)
        for x in range(width)
    ]
    torch.testing.assert_close(fourier_2d(height, width, dim), torch.tensor(expected), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="even width, got 3"):
        fourier_1d(torch.zeros(1), 3)


def test_sequence_positions_have_waves_of_six_to_thousands_of_tokens():
    dim, length = 8, 50
    rates = [1000 ** -(i / 4) for i in range(4)]
    expected = [[math.sin(t * r) for r in rates] + [math.cos(t * r) for r in rates] for t in range(length)]
    torch.testing.assert_close(sequence_encodings(length, dim), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "encoder",
    [
        {"stem": "patch"},
        {"stem": "conv"},
        {"name": "deit_tiny_patch16_224"},
        {"name": "deit_tiny_distilled_patch16_224"},
        {"name": "resnet10t"},
    ],
    ids=str,
)
def test_every_kind_of_encoder_takes_any_rectangle_of_patches(encoder):
    model = tiny_model(**encoder)
    for height, width in [(32, 48), (64, 32), (96, 64)]:
        height, width = (
            max(side, model.encoder.stride) // model.encoder.stride * model.encoder.stride for side in (height, width)
        )
        memory = model.encode(torch.rand(2, 3, height, width))
        assert memory.shape == (2, height * width // model.encoder.stride**2, 32)
    with pytest.raises(ValueError, match="do not divide"):
        model.encode(torch.rand(1, 3, 33, 48))


def test_an_unknown_encoder_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'deit_tiny_patch16_224'"):
        tiny_model(name="deit_tiny_patch16_22")


def test_pretrained_weights_that_cannot_be_loaded_end_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = EncoderConfig(name="vit_tiny_patch16_384", pretrained=True)
    with pytest.raises(InputError, match="pretrained weights of 'vit_tiny_patch16_384' could not be loaded"):
        build_model(ModelConfig(image_size=(64, 64), encoder=config, vocab=VOCAB))


def test_sequences_of_one_image_do_not_see_each_other(model):
    together = torch.stack([TOKENS, TOKENS.flip(0)], dim=1)  # (B, 2, T)
    logits = model(IMAGES, together)
    assert logits.shape == (6, 12, VOCAB.size)
    torch.testing.assert_close(logits[0::2], model(IMAGES, TOKENS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1::2], model(IMAGES, TOKENS.flip(0)), atol=1e-4, rtol=1e-4)


def test_no_position_sees_later_ones(model):
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB.size
    torch.testing.assert_close(model(IMAGES, TOKENS)[:, :7], model(IMAGES, changed)[:, :7])


def uncached_greedy(model, images, prompt, count):
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(images, tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompt.shape[1] :]


def test_cached_generation_equals_uncached(model):
    with torch.inference_mode():
        expected = uncached_greedy(model, IMAGES, TOKENS[:, :3], 20)
    out = model.generate(IMAGES, TOKENS[:, :3], max_new_tokens=20, temperature=0, eos_id=None)
    torch.testing.assert_close(out.tokens, expected, rtol=0, atol=0)
    with torch.inference_mode():
        logits = model(IMAGES, torch.cat([TOKENS[:, :3], expected], 1))[:, 2:-1]
    logprobs = logits.log_softmax(-1).gather(-1, expected[..., None])[..., 0]
    torch.testing.assert_close(out.logprobs, logprobs, atol=1e-4, rtol=1e-4)


def test_a_batch_equals_its_images_one_by_one(model):
    images = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    prompt = torch.full((5, 1), 10)
    together = model.generate(images, prompt, max_new_tokens=24, temperature=0, eos_id=None).tokens
    alone = [
        model.generate(images[i : i + 1], prompt[:1], max_new_tokens=24, temperature=0, eos_id=None).tokens
        for i in range(5)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_rows_come_out_image_by_image_prompt_by_prompt_sample_by_sample(model):
    prompts = TOKENS[:, None, :2].repeat(1, 2, 1)
    prompts[:, 1] += 1
    out = model.generate(IMAGES, prompts, max_new_tokens=6, temperature=0, num_samples=2, eos_id=None).tokens
    assert out.shape == (12, 6)
    for image in range(3):
        for prompt in range(2):
            single = model.generate(
                IMAGES[image : image + 1], prompts[image, prompt][None], max_new_tokens=6, temperature=0, eos_id=None
            )
            for copy in range(2):
                torch.testing.assert_close(out[image * 4 + prompt * 2 + copy], single.tokens[0], rtol=0, atol=0)


def test_encoded_memory_can_stand_in_for_images(model):
    with torch.inference_mode():
        memory = model.encode(IMAGES)
    prompt = TOKENS[:, :1]
    a = model.generate(memory, prompt, max_new_tokens=8, temperature=0)
    b = model.generate(IMAGES, prompt, max_new_tokens=8, temperature=0)
    torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=0)


class Script(torch.nn.Module):
    """A decoder that predicts given ids, whatever it reads."""

    def __init__(self, ids):
        super().__init__()
        self.ids = torch.tensor(ids)

    def new_cache(self, memory, *, rows_per_image, num_slots):
        self.reads = 0
        return None

    def step(self, tokens, cache):
        self.reads += 1
        return F.one_hot(self.ids[:, self.reads - 1], 20).float() * 50

    def logits(self, hidden):
        return hidden


def test_a_finished_row_stays_padded_and_the_last_one_stops_the_loop():
    from pix2seq.model.decoding.generate import generate

    decoder = Script([[5, 0, 7, 8, 9], [5, 6, 7, 0, 9]])
    out = generate(
        decoder,
        torch.zeros(2, 1, 1),
        torch.ones(2, 1, dtype=torch.long),
        max_new_tokens=5,
        temperature=0,
        score_range=(4, 7),
    )
    assert out.tokens.tolist() == [[5, 0, 0, 0], [5, 6, 7, 0]]
    assert (out.logprobs[0, 2:] == 0).all()
    assert out.best_tokens[1, :2].tolist() == [5, 6]
    assert decoder.reads == 4


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="64 positions"):
        model.generate(IMAGES, TOKENS[:, :1], max_new_tokens=100, eos_id=None)


@pytest.mark.parametrize(
    ("k", "p"), [(0, 0.1), (0, 0.4), (0, 0.8), (0, 0.999), (1, 1.0), (5, 1.0), (20, 0.5), (0, 1e-6)]
)
def test_truncation_keeps_what_the_official_code_keeps(parity_ops, k, p):
    kept = truncate_logits(torch.from_numpy(parity_ops["top_logits_in"]), top_k=k, top_p=p).isfinite()
    np.testing.assert_array_equal(kept.numpy(), parity_ops[f"top_logits_keep_k{k}_p{p}"])


def kept_by_hand(logits, k, p):
    """The largest k with ties, then as many of the likeliest as have at most p together; always the first."""
    if k:
        least = sorted(logits, reverse=True)[: min(k, len(logits))][-1]
        logits = [x if x >= least else -math.inf for x in logits]
    total = sum(math.exp(x) for x in logits)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept, reached = {order[0]}, 0.0
    for i in order:
        reached += math.exp(logits[i]) / total
        if logits[i] > -math.inf and (p == 1 or reached <= p):
            kept.add(i)
    return kept


@pytest.mark.parametrize(("k", "p"), [(0, 0.1), (0, 0.4), (0, 0.8), (0, 1.0), (1, 1.0), (5, 1.0), (9, 0.5), (999, 0.9)])
@pytest.mark.parametrize("size", [12, 400])  # few ids are sorted, of many the likeliest are searched first
@pytest.mark.parametrize("scale", [0.05, 2.0])
def test_truncation_keeps_what_sorting_by_hand_keeps(k, p, size, scale):
    logits = torch.randn(20, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    truncated = truncate_logits(logits, top_k=k, top_p=p)
    for row, original in zip(truncated, logits, strict=True):
        kept = kept_by_hand(original.tolist(), k, p)
        assert {i for i, value in enumerate(row.tolist()) if value > -math.inf} == kept
        assert all(row[i] == original[i] for i in kept)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    share = sample(logits, generator=generator).bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    sharper = sample(logits, temperature=0.5, generator=generator).bincount(minlength=3) / 20_000
    torch.testing.assert_close(sharper, torch.tensor([25, 9, 4]) / 38, atol=0.02, rtol=0)
    assert (sample(logits, temperature=0) == 0).all()
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(logits, **wrong)


def test_a_saved_model_comes_back_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    again = Pix2Seq.from_pretrained(tmp_path / "a")
    with torch.inference_mode():
        torch.testing.assert_close(again(IMAGES, TOKENS), model(IMAGES, TOKENS), rtol=0, atol=0)
    assert again.config == model.config


def test_damaged_checkpoints_end_in_one_line(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="damaged"):
        Pix2Seq.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        Pix2Seq.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        Pix2Seq.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a checkpoint"):
        Pix2Seq.from_pretrained(tmp_path / "nowhere")


def test_a_checkpoint_of_another_vocabulary_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"size": 1040', '"size": 1050')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"token_embedding.*expected \(1050, 32\)"):
        Pix2Seq.from_pretrained(tmp_path)
