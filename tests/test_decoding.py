"""Decoding: all sequences parse, whatever the logits, and all ways of computing them give the same tokens."""

import re

import pytest
import torch
from hostile_decoder import KINDS, HostileDecoder, logits_of_kind
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

import pix2seq.model.decoding.generate as generation
import pix2seq.model.decoding.sampling as sampling_module
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.cpu_step import pack_linear
from pix2seq.model.decoding.generate import generate
from pix2seq.model.decoding.grammar import Allowed, BoxGrammar, KeypointGrammar, PolygonGrammar, TextGrammar
from pix2seq.model.decoding.kv_cache import KVCache
from pix2seq.model.decoding.sampling import sample, truncate_logits
from pix2seq.model.decoding.step import DecoderStep
from pix2seq.model.pix2seq import build_model
from pix2seq.vocab import Vocab

EOS, SEPARATOR, INVISIBLE, NOISE = 0, 5, 6, 4
CLASS_BASE, NUM_CLASSES = 7, 3  # labels 1 to 3 are ids 8 to 10
COORDS, NUM_BINS = 12, 6
TEXT, TEXT_END = 18, 24
VOCAB_SIZE = 25
SEEDS = 10_000


def continue_rows(kind, num_rows, grammar, *, max_new_tokens, eos_id, seed=0, **sampling):
    return generate(
        HostileDecoder(logits_of_kind(kind, seed), VOCAB_SIZE),
        torch.zeros(num_rows, 1, 1),
        torch.ones(num_rows, 1, dtype=torch.long),
        grammar=grammar,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        generator=torch.Generator().manual_seed(seed),
        **sampling,
    )


# Independent checkers of the languages: a sequence spelled as letters, and a regular expression.
LETTERS = {EOS: "E", SEPARATOR: "S", INVISIBLE: "I", NOISE: "N"}
LETTERS |= dict.fromkeys(range(CLASS_BASE + 1, CLASS_BASE + 1 + NUM_CLASSES), "k")
LETTERS |= dict.fromkeys(range(COORDS, COORDS + NUM_BINS), "c")
LETTERS |= dict.fromkeys(range(TEXT, TEXT_END), "t")


def spell(ids):
    return "".join(LETTERS.get(i, "?") for i in ids)


def without_padding(ids):
    """Return ids up to the first end token, which is also the padding."""
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


def check_boxes(ids, num_boxes):
    ids = without_padding(ids)
    assert re.fullmatch("(cccc[kN])*E?", spell(ids)), ids
    assert len(ids) <= 5 * num_boxes
    for start in range(0, len(ids) - 4, 5):
        y0, x0, y1, x1 = ids[start : start + 4]
        assert COORDS <= y0 < y1 < COORDS + NUM_BINS, ids
        assert COORDS <= x0 < x1 < COORDS + NUM_BINS, ids


def check_polygons(ids, max_points):
    assert re.fullmatch("(cc){3,}(SS(cc){3,})*EE*", spell(ids)), ids
    assert len(without_padding(ids)) <= 2 * max_points + 1


def check_keypoints(ids, num_points):
    assert re.fullmatch("(cc|II)*", spell(ids)), ids
    assert len(ids) == 2 * num_points


def check_text(ids, max_tokens):
    assert re.fullmatch("t+EE*", spell(ids)), ids
    assert len(without_padding(ids)) <= max_tokens


def boxes(num_boxes, *, ends=True):
    grammar = BoxGrammar(COORDS, NUM_BINS, CLASS_BASE, NUM_CLASSES, NOISE, EOS if ends else None)
    return grammar, 5 * num_boxes, EOS if ends else None, check_boxes


def polygons(max_points):
    grammar = PolygonGrammar(COORDS, NUM_BINS, SEPARATOR, EOS, max_points)
    return grammar, 2 * max_points + 1, EOS, check_polygons


def keypoints(num_points):
    return KeypointGrammar(COORDS, NUM_BINS, INVISIBLE), 2 * num_points, None, check_keypoints


def text(max_tokens):
    return TextGrammar(TEXT, TEXT_END, EOS, max_tokens), max_tokens, EOS, check_text


LANGUAGES = {"boxes": boxes, "polygons": polygons, "keypoints": keypoints, "text": text}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("language", "size"), [("boxes", 3), ("polygons", 9), ("keypoints", 5), ("text", 8)])
def test_ten_thousand_rows_of_any_logits_parse(language, size, kind):
    grammar, length, eos_id, check = LANGUAGES[language](size)
    out = continue_rows(kind, SEEDS, grammar, max_new_tokens=length, eos_id=eos_id)
    assert out.tokens.shape[1] <= length
    for ids in set(map(tuple, out.tokens.tolist())):
        check(ids, size)
    assert not out.logprobs.isnan().any()
    assert (out.logprobs <= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    language=st.sampled_from(list(LANGUAGES)),
    size=st.integers(3, 12),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    sampling=st.sampled_from(
        [{"temperature": 0}, {"temperature": 1e-20}, {"temperature": 50.0}, {"top_k": 1}, {"top_k": 3}, {"top_p": 1e-6}]
        + [{"top_p": 0.4}, {"top_k": 5, "top_p": 0.9, "temperature": 0.5}]
    ),
)
def test_any_way_of_sampling_parses(language, size, kind, seed, sampling):
    grammar, length, eos_id, check = LANGUAGES[language](size)
    out = continue_rows(kind, 40, grammar, max_new_tokens=length, eos_id=eos_id, seed=seed, **sampling)
    for ids in out.tokens.tolist():
        check(tuple(ids), size)


def test_boxes_without_an_end_fill_their_length():
    grammar, length, eos_id, check = boxes(4, ends=False)
    out = continue_rows("mixed", 500, grammar, max_new_tokens=length, eos_id=eos_id)
    for ids in out.tokens.tolist():
        assert len(ids) == 20
        check(tuple(ids), 4)
    assert not out.truncated.any()


def test_logits_that_are_no_numbers_leave_all_allowed_ids_equally_likely():
    grammar, length, eos_id, _ = keypoints(1)
    out = continue_rows("nan", SEEDS, grammar, max_new_tokens=length, eos_id=eos_id)
    share = out.tokens[:, 0].bincount(minlength=VOCAB_SIZE) / SEEDS
    expected = torch.zeros(VOCAB_SIZE)
    expected[[INVISIBLE, *range(COORDS, COORDS + NUM_BINS)]] = 1 / (NUM_BINS + 1)
    torch.testing.assert_close(share, expected, atol=0.02, rtol=0)
    assert (out.logprobs == -torch.inf).all()


def test_allowed_ids_are_a_range_and_single_ids_of_each_row():
    allowed = Allowed(
        low=torch.tensor([3, 5, 9]), high=torch.tensor([5, 5, 8]), singles=torch.tensor([[7, -1], [2, 7], [0, -1]])
    )
    expected = [{3, 4, 7}, {2, 7}, {0}]
    for row, ids in zip(allowed.forbids(torch.arange(10)), expected, strict=True):
        assert {i for i, forbidden in enumerate(row.tolist()) if not forbidden} == ids
    assert allowed.forbids(torch.tensor([7, 4, 0])).tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 0]]
    assert allowed.span() == (0, 8)
    assert [allowed.only(single).tolist() for single in (0, 2, 7)] == [[False, False, True], [False] * 3, [False] * 3]
    narrow = Allowed(low=torch.tensor([3]), high=torch.tensor([6]), singles=torch.tensor([[-1]]))
    assert narrow.span() == (3, 6)
    assert Allowed(torch.tensor([4]), torch.tensor([4]), torch.tensor([[6]])).span() == (6, 7)


def test_a_draw_is_where_the_running_sum_passes_the_noise():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0]).log().repeat(6, 1)
    noise = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24])
    assert sample(logits, noise=noise).tolist() == [0, 0, 2, 2, 3, 3]
    forbidden = torch.tensor([True, False, False, False, False]).repeat(6, 1)
    # The remaining probabilities are 0.6 and 0.4.
    assert sample(logits, noise=noise, forbidden=forbidden).tolist() == [2, 2, 2, 3, 3, 3]


def script(*rows):
    """Return a decoder that makes one given token per step likely in every row."""
    ids = torch.tensor(rows)
    steps = iter(range(ids.shape[1]))
    return HostileDecoder(lambda shape: one_hot(ids[:, next(steps)], shape[1]).float() * 50, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("language", "size", "rows", "cut"),
    [
        # With as many points as allowed, a row can only end. The second row of the second case could go on.
        ("polygons", 3, [[12, 13, 14, 14, 15, 15, 12]], [True]),
        ("polygons", 4, [[12] * 8 + [0], [12] * 6 + [0, 0, 0]], [True, False]),
        ("text", 4, [[18, 19, 20, 21], [18, 0, 0, 0], [18, 19, 0, 0], [18, 19, 20, 0]], [True, False, False, True]),
        ("boxes", 1, [[12, 12, 13, 13, 8], [0, 0, 0, 0, 0]], [True, False]),
        ("keypoints", 1, [[12, 12], [6, 6]], [False, False]),
    ],
)
def test_truncated_rows_are_those_that_did_not_end_by_themselves(language, size, rows, cut):
    grammar, length, eos_id, _ = LANGUAGES[language](size)
    out = generate(
        script(*rows),
        torch.zeros(len(rows), 1, 1),
        torch.ones(len(rows), 1, dtype=torch.long),
        grammar=grammar,
        max_new_tokens=length,
        eos_id=eos_id,
        temperature=0,
    )
    assert out.truncated.tolist() == cut


def test_without_a_grammar_a_row_is_cut_by_length_alone():
    rows = [[12, 12, 12], [12, 0, 12], [12, 12, 0]]
    arguments = {"memory": torch.zeros(3, 1, 1), "prompt": torch.ones(3, 1, dtype=torch.long), "temperature": 0}
    out = generate(script(*rows), **arguments, max_new_tokens=3)
    assert out.truncated.tolist() == [True, False, False]
    out = generate(script(*rows), **arguments, max_new_tokens=3, eos_id=None)
    assert out.truncated.tolist() == [False, False, False]


def tiny_model(max_seq_len=48):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=(32, 48),
        encoder=EncoderConfig(name="vit", dim=32, num_layers=1, num_heads=2, mlp_dim=64),
        decoder=DecoderConfig(dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_seq_len=max_seq_len),
        vocab=Vocab(num_bins=32, size=1040),
    )
    model = build_model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


MEMORY = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
PROMPTS = torch.randint(0, 1000, (4, 3, 2), generator=torch.Generator().manual_seed(2))
# A language of three pieces and an end, so that rows end early and at different times.
SHORT = TextGrammar(first_piece=30, text_end=33, eos_id=40, max_tokens=30)


def expected_logprobs(model, memory, prompts, tokens):
    """Compute log-probabilities (R, T') in one pass over full sequences, without a cache."""
    rows = prompts.reshape(-1, prompts.shape[-1])
    memory = memory.repeat_interleave(len(rows) // len(memory), dim=0)
    with torch.inference_mode():
        hidden = model.decoder(torch.cat([rows, tokens], dim=1), memory)[:, rows.shape[1] - 1 : -1]
        return model.decoder.logits(hidden).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("prompt_len", [1, 2])
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 3), (2, 1), (4, 1), (4, 3)])
def test_steps_with_a_cache_equal_one_pass_without(model, images, prompts, prompt_len):
    memory, prompt = MEMORY[:images], PROMPTS[:images, :prompts, :prompt_len]
    out = model.generate(memory, prompt, max_new_tokens=24, eos_id=None)
    expected = expected_logprobs(model, memory, prompt, out.tokens)
    torch.testing.assert_close(out.logprobs, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("images", [1, 4])
def test_steps_in_bf16_stay_near_those_in_float32(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(MEMORY[:images], PROMPTS[:images, :1], max_new_tokens=24, eos_id=None)
        assert torch.is_autocast_enabled("cpu")
    expected = expected_logprobs(model, MEMORY[:images], PROMPTS[:images, :1], out.tokens)
    assert (out.logprobs - expected).abs().mean() < 0.1


def test_a_model_in_bf16_decodes(model, monkeypatch):
    half = tiny_model().bfloat16()
    out = half.generate(MEMORY.bfloat16(), PROMPTS, max_new_tokens=12, eos_id=None)
    expected = expected_logprobs(model, MEMORY, PROMPTS, out.tokens)
    assert (out.logprobs - expected).abs().mean() < 0.2
    monkeypatch.setattr(generation, "MIN_PARTIAL_OUTPUT", 0)
    grammar, check = KeypointGrammar(1000, 32, 6), re.compile("(cc|II){6}")
    out = generate(
        half.decoder, MEMORY.bfloat16(), PROMPTS, max_new_tokens=12, eos_id=None, grammar=grammar, with_logprobs=False
    )
    for ids in out.tokens.tolist():
        assert check.fullmatch("".join("I" if i == 6 else "c" if 1000 <= i < 1032 else "?" for i in ids))


@pytest.mark.parametrize("num_rows", [1, 3, 4, 16])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("packs", [False, True])
def test_packed_weights_give_the_same_products(num_rows, bf16, gelu, packs):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(900, 700, generator=generator), torch.randn(num_rows, 700, generator=generator)
    for bias in (None, torch.randn(900, generator=generator)):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        expected = torch.nn.functional.gelu(expected) if gelu else expected
        with torch.inference_mode():
            found = pack_linear(weight, bias, num_rows=num_rows, bf16=bf16, packs=packs, gelu=gelu)(x)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (0.01 if bf16 else 1e-5)


@pytest.fixture
def kept(monkeypatch):
    """The number of rows kept each time that finished rows were dropped."""
    found = []
    keep = KVCache.keep

    def spy(self, images, rows):
        found.append(len(rows))
        keep(self, images, rows)
        assert self.layers[0].memory_keys.shape[0] == len(images)

    monkeypatch.setattr(KVCache, "keep", spy)
    return found


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"top_k": 2}, {"temperature": 3.0, "top_p": 0.9}])
@pytest.mark.parametrize(("images", "prompts", "samples"), [(1, 1, 8), (4, 1, 1), (4, 3, 2)])
def test_dropping_finished_rows_changes_nothing(model, kept, sampling, images, prompts, samples):
    for seed in range(3):
        arguments = {
            "max_new_tokens": 30,
            "grammar": SHORT,
            "eos_id": SHORT.eos_id,
            "num_samples": samples,
            "score_range": (30, 33),
            **sampling,
        }
        found = [
            generate(
                model.decoder,
                MEMORY[:images],
                PROMPTS[:images, :prompts],
                compact=compact,
                generator=torch.Generator().manual_seed(seed),
                **arguments,
            )
            for compact in (True, False)
        ]
        for name in ("tokens", "logprobs", "best_tokens", "best_logprobs", "truncated"):
            torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), atol=1e-3, rtol=1e-3)
    if images > 1 and sampling != {"temperature": 0}:
        assert len(kept) > 3  # several times in a generation


def test_what_an_image_draws_does_not_depend_on_its_batch(model):
    arguments = {"max_new_tokens": 30, "grammar": SHORT, "eos_id": SHORT.eos_id, "num_samples": 2}

    def draw(images, order):
        generators = [torch.Generator().manual_seed(i) for i in order]
        return model.generate(MEMORY[images], PROMPTS[images], generator=generators, **arguments).tokens

    together = draw([0, 1, 2, 3], [0, 1, 2, 3]).unflatten(0, (4, 6))
    swapped = draw([2, 0], [2, 0]).unflatten(0, (2, 6))
    for image, other in [(2, swapped[0]), (0, swapped[1])]:
        alone = draw([image], [image])
        for found in (other, alone):
            width = min(found.shape[1], together.shape[2])
            torch.testing.assert_close(found[:, :width], together[image, :, :width], rtol=0, atol=0)
            assert not found[:, width:].any()
            assert not together[image, :, width:].any()
    with pytest.raises(ValueError, match="2 generators were given for 1 images"):
        model.generate(MEMORY[:1], PROMPTS[:1], generator=[torch.Generator()] * 2, **arguments)


def test_what_a_row_draws_does_not_depend_on_the_rows_behind_it(model):
    few, many = (
        model.generate(
            MEMORY[:n], PROMPTS[:n, 0], max_new_tokens=20, eos_id=None, generator=torch.Generator().manual_seed(3)
        ).tokens
        for n in (2, 4)
    )
    torch.testing.assert_close(many[:2], few, rtol=0, atol=0)


def test_samples_of_a_prompt_differ(model):
    out = model.generate(MEMORY[:1], PROMPTS[:1, 0], max_new_tokens=8, num_samples=6, eos_id=None)
    assert len(set(map(tuple, out.tokens.tolist()))) == 6


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}])
def test_only_the_allowed_part_of_the_output_layer_gives_the_same_tokens(model, monkeypatch, sampling):
    grammar = BoxGrammar(1000, 32, 40, 5, 46, 0)
    arguments = {"max_new_tokens": 30, "grammar": grammar, "score_range": (41, 46), **sampling}

    def run(**more):
        generator = torch.Generator().manual_seed(5)
        return generate(model.decoder, MEMORY, PROMPTS, generator=generator, **arguments, **more)

    full = run()
    parts = []
    logits = DecoderStep.logits

    def spy(self, hidden, ids=None):
        parts.append(ids)
        return logits(self, hidden, ids)

    monkeypatch.setattr(generation, "MIN_PARTIAL_OUTPUT", 0)
    monkeypatch.setattr(DecoderStep, "logits", spy)
    part = run(with_logprobs=False, score_steps=(5, 4))
    # A corner or the end, the other coordinate of the corner, ..., and the full vocabulary at scored steps.
    assert parts[:2] == [slice(0, 1031), slice(1000, 1031)]
    assert parts[4] is None
    torch.testing.assert_close(part.tokens, full.tokens, rtol=0, atol=0)
    torch.testing.assert_close(part.best_tokens[:, 4::5], full.best_tokens[:, 4::5], rtol=0, atol=0)
    torch.testing.assert_close(part.best_logprobs[:, 4::5], full.best_logprobs[:, 4::5], atol=1e-4, rtol=1e-4)
    assert (part.best_logprobs[:, :4] == -torch.inf).all()
    assert (part.logprobs == 0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.8, 0.99])
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
def test_a_nucleus_found_among_the_likeliest_is_that_of_all(monkeypatch, top_p, scale):
    logits = torch.randn(60, 400, generator=torch.Generator().manual_seed(0)) * scale
    logits[::3] = logits[::3].round()  # ties
    few = truncate_logits(logits, top_p=top_p)
    one_by_one = torch.cat([truncate_logits(row[None], top_p=top_p) for row in logits])
    monkeypatch.setattr(sampling_module, "NUM_CANDIDATES", 400)
    torch.testing.assert_close(few, truncate_logits(logits, top_p=top_p), rtol=0, atol=0)
    torch.testing.assert_close(few, one_by_one, rtol=0, atol=0)
