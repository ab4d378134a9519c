"""Decoding several tasks in one call: every prompt gets the result it would get alone."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pix2seq.model.decoding.generate as generation
from pix2seq import Pix2Seq, Predictor, convert_checkpoint
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.generate import GenerationConfig, generate_mixed
from pix2seq.model.decoding.grammar import TextGrammar
from pix2seq.model.decoding.kv_cache import KVCache
from pix2seq.model.decoding.rows import arrange_rows
from pix2seq.model.decoding.step import DecoderStep
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.objects import Boxes
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.tokenizers.instance import instance_prompts
from pix2seq.tokenizers.text import SPECIAL_TOKENS, WordTokenizer
from pix2seq.types import Category
from pix2seq.vocab import EOS, Vocab

PERSON = Category(1, 1, "person", ("nose", "left_hand", "right_hand"))
ARROW = Category(2, 2, "arrow", ("tip", "tail"))
CATEGORIES = (PERSON, ARROW, Category(3, 3, "heart"))
WORDS = WordTokenizer([*SPECIAL_TOKENS, "a", "person", "and", "an", "arrow"])
VOCAB = Vocab(num_bins=16, text_base=1020, num_text=8, size=1030)
TASKS = {
    "detection": Detection(DetectionConfig(max_objects=4, noise_objects=1), VOCAB, CATEGORIES),
    "segmentation": Segmentation(SegmentationConfig(max_points=8), VOCAB, CATEGORIES),
    "keypoint": Keypoint(KeypointConfig(crop=False), VOCAB, CATEGORIES),
    "captioning": Captioning(CaptioningConfig(max_tokens=9), VOCAB, CATEGORIES, WORDS),
}
BOX = np.array([[0.1, 0.2, 0.7, 0.9]])
FIELDS = ("tokens", "logprobs", "best_tokens", "best_logprobs")


def prompt(task, boxes, category):
    """The prompt about one object."""
    return instance_prompts(task, boxes, np.array([category.label]), VOCAB)[0]


# A list of objects, a mask, three points, two points, a sentence.
PROMPTS = [
    torch.from_numpy(prompt)
    for prompt in (
        TASKS["detection"].prompt(),
        prompt("segmentation", BOX, PERSON),
        prompt("keypoint", BOX, PERSON),
        prompt("keypoint", BOX / 2, ARROW),
        TASKS["captioning"].prompt(),
    )
]
CONFIGS = [
    TASKS["detection"].generation(),
    TASKS["segmentation"].generation(),
    TASKS["keypoint"].generation(PERSON),
    TASKS["keypoint"].generation(ARROW),
    TASKS["captioning"].generation(),
]
MEMORY = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=(32, 32),
        encoder=EncoderConfig(name="vit", dim=32, num_layers=1, num_heads=2, mlp_dim=64),
        decoder=DecoderConfig(dim=32, num_layers=2, num_heads=4, mlp_dim=64, max_seq_len=32),
        vocab=VOCAB,
    )
    model = build_model(config, CATEGORIES, WORDS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.task_settings = {name: task.settings() for name, task in TASKS.items()}
    return model


def sampling(name):
    """Return the configs of the five prompts with one of several ways of sampling."""
    changes = {
        "greedy": {"temperature": 0.0},
        "as each task samples": {},
        "free": {"temperature": 1.3, "top_k": 0, "top_p": 1.0},
        "truncated": {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    }[name]
    return [replace(config, **changes) for config in CONFIGS]


def seeded(count):
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def assert_equals_alone(found, row, alone):
    """Check that each row is the result alone, then padding."""
    for i in range(len(alone.tokens)):
        width = alone.tokens.shape[1]
        for name in FIELDS:
            expected = getattr(alone, name)
            if expected is not None:
                tolerance = {"rtol": 0, "atol": 0} if name.endswith("tokens") else {"rtol": 1e-3, "atol": 1e-4}
                torch.testing.assert_close(getattr(found, name)[row + i, :width], expected[i], **tolerance)
        assert not found.tokens[row + i, width:].any()
        assert not found.logprobs[row + i, width:].any()
        assert found.truncated[row + i] == alone.truncated[i]


@pytest.mark.parametrize("how", ["greedy", "as each task samples", "free", "truncated"])
@pytest.mark.parametrize(("num_images", "num_samples"), [(1, 1), (3, 1), (2, 3)])
def test_tasks_in_one_batch_get_what_each_gets_alone(model, how, num_images, num_samples):
    configs, count = sampling(how), len(PROMPTS)
    found = model.generate_mixed(
        MEMORY[:num_images],
        PROMPTS * num_images,
        configs * num_images,
        num_samples=num_samples,
        generator=seeded(num_images * count),
    )
    assert len(found.tokens) == num_images * count * num_samples
    for image in range(num_images):
        for i, (prompt, config) in enumerate(zip(PROMPTS, configs, strict=True)):
            number = image * count + i
            alone = model.generate(
                MEMORY[image : image + 1],
                prompt[None],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                grammar=config.grammar,
                num_samples=num_samples,
                score_range=config.score_range,
                score_steps=config.score_steps,
                with_logprobs=config.with_logprobs,
                score_without=config.score_without,
                eos_id=config.eos_id,
                generator=seeded(num_images * count)[number],
            )
            assert_equals_alone(found, number * num_samples, alone)


def test_prompts_of_any_lengths_get_what_each_gets_alone(model):
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 1000, (length,), generator=generator) for length in (3, 1, 7, 2, 3, 12)]
    for eos_id, length in ((None, 10), (0, 16)):
        config = GenerationConfig(length, temperature=0.0, eos_id=eos_id)
        found = model.generate_mixed(MEMORY[:2], prompts, [config] * 6)
        for row, prompt in enumerate(prompts):
            image = row // 3
            alone = model.generate(
                MEMORY[image : image + 1], prompt[None], max_new_tokens=length, temperature=0, eos_id=eos_id
            )
            assert_equals_alone(found, row, alone)


def test_dropping_finished_rows_of_a_mixed_batch_changes_nothing(model, monkeypatch):
    left = []
    keep = KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda self, images, rows: (left.append(len(rows)), keep(self, images, rows)))
    arguments = {"prompts": PROMPTS * 3, "configs": sampling("as each task samples") * 3, "num_samples": 2}
    found, kept = (
        generate_mixed(model.decoder, MEMORY, **arguments, generator=seeded(3), compact=compact)
        for compact in (True, False)
    )
    assert len(left) > 2
    for name in (*FIELDS, "truncated"):
        torch.testing.assert_close(getattr(found, name), getattr(kept, name), atol=1e-3, rtol=1e-3)


def test_a_row_may_still_read_its_prompt_when_all_others_have_ended(model):
    ends = TextGrammar(first_piece=5, text_end=6, eos_id=0, max_tokens=2)  # one word, an end
    long = torch.arange(10, 20)
    configs = [GenerationConfig(2, grammar=ends), GenerationConfig(4, temperature=0.0, eos_id=None)]
    for compact in (True, False):
        found = generate_mixed(model.decoder, MEMORY[:1], [torch.tensor([10]), long], configs, compact=compact)
        assert found.tokens[0].tolist() == [5, 0, 0, 0]
        alone = model.generate(MEMORY[:1], long[None], max_new_tokens=4, temperature=0, eos_id=None)
        assert found.tokens[1].tolist() == alone.tokens[0].tolist()


def test_computing_only_the_allowed_part_of_the_output_layer_gives_the_same_tokens(model, monkeypatch):
    configs = [replace(config, with_logprobs=False, score_range=None) for config in CONFIGS]
    full = model.generate_mixed(MEMORY[:1], PROMPTS, configs, generator=seeded(1))
    parts = []
    logits = DecoderStep.logits

    def spy(self, hidden, ids=None):
        parts.append(ids)
        return logits(self, hidden, ids)

    monkeypatch.setattr(generation, "MIN_PARTIAL_OUTPUT", 0)
    monkeypatch.setattr(DecoderStep, "logits", spy)
    part = model.generate_mixed(MEMORY[:1], PROMPTS, configs, generator=seeded(1))
    # The first column is a box corner or the end of the list, and a word. The other rows still read their prompts.
    assert parts[0] == slice(0, 1028)
    torch.testing.assert_close(part.tokens, full.tokens, rtol=0, atol=0)


def alone(model, memory, prompt, config, num_samples, generator):
    return generate_mixed(
        model.decoder, memory[None], [prompt], [config], num_samples=num_samples, generator=[generator]
    )


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=14),
    num_samples=st.integers(1, 2),
    compact=st.booleans(),
)
@example(asked=[(4, 1), *[(which, 2) for which in range(5)], (0, 1), *[(4, 2)] * 5], num_samples=1, compact=True)
def test_prompts_of_any_images_in_any_order_get_what_each_gets_alone(model, asked, num_samples, compact):
    configs = sampling("as each task samples")
    found = generate_mixed(
        model.decoder,
        MEMORY,
        [PROMPTS[which] for which, _ in asked],
        [configs[which] for which, _ in asked],
        memory_index=[image for _, image in asked],
        num_samples=num_samples,
        generator=seeded(len(asked)),
        compact=compact,
    )
    assert len(found.tokens) == len(asked) * num_samples
    for number, ((which, image), generator) in enumerate(zip(asked, seeded(len(asked)), strict=True)):
        expected = alone(model, MEMORY[image], PROMPTS[which], configs[which], num_samples, generator)
        assert_equals_alone(found, number * num_samples, expected)


def test_the_order_of_prompts_does_not_change_the_numbers_of_an_image(model):
    config = GenerationConfig(6, eos_id=None)
    prompts = [torch.tensor([10 + i]) for i in range(6)]
    in_order = generate_mixed(model.decoder, MEMORY, prompts, [config] * 6, generator=seeded(3)).tokens
    order = [4, 0, 5, 2, 1, 3]
    mixed = generate_mixed(
        model.decoder,
        MEMORY,
        [prompts[i] for i in order],
        [config] * 6,
        memory_index=[i // 2 for i in order],
        generator=seeded(3),
    ).tokens
    assert torch.equal(mixed, in_order[order])


@pytest.mark.parametrize(
    ("counts", "images", "size"),
    [
        ([3, 3, 3], [0, 1, 2], 3),
        ([0, 2, 0], [1], 2),
        ([4, 4, 3, 2], [0, 1, 2, 3], 4),  # 3 fillers of 16
        ([1, 1, 1, 10], [0, 1, 2, *[3] * 5], 2),  # 3 of 16; slots of 3 would need 8 of 21
        ([5, 1], [0, 0, 0, 1], 2),
        ([40], [0], 40),
    ],
)
def test_at_most_a_quarter_of_the_rows_are_fillers(counts, images, size):
    memory_index = [image for image, count in enumerate(counts) for _ in range(count)][::-1]
    found, order = arrange_rows(memory_index, 2)
    assert found == images
    assert len(order) == 2 * size * len(images)
    assert sorted(order[order >= 0].tolist()) == list(range(2 * len(memory_index)))
    assert int((order < 0).sum()) <= len(order) / 4
    for image, rows in zip(found, order.view(len(images), -1), strict=True):
        assert {memory_index[row // 2] for row in rows.tolist() if row >= 0} == {image}


def test_completions_are_the_rows_of_each_prompt_as_arrays(model):
    for scored in (True, False):
        configs = [replace(config, score_range=config.score_range if scored else None) for config in CONFIGS]
        found = model.generate_mixed(MEMORY[:1], PROMPTS, configs, num_samples=3, generator=seeded(1))
        completions = found.completions(3)
        assert len(completions) == len(PROMPTS)
        assert (completions[0].best_tokens is not None) == scored
        for number, completion in enumerate(completions):
            for name, array in vars(completion).items():
                expected = getattr(found, name, None)  # nothing is embedded here
                if expected is not None:
                    np.testing.assert_array_equal(array, expected[3 * number : 3 * number + 3].numpy())
    with pytest.raises(ValueError, match="equal division"):
        found.completions(2)


def test_prompts_and_configs_must_fit_the_images(model):
    config = GenerationConfig(3)
    with pytest.raises(ValueError, match="3 prompts were given for 2 images"):
        model.generate_mixed(MEMORY[:2], [torch.tensor([10])] * 3, [config] * 3)
    with pytest.raises(ValueError, match="1 configs were given for 2 prompts"):
        model.generate_mixed(MEMORY[:2], [torch.tensor([10])] * 2, [config])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        GenerationConfig(0)
    with pytest.raises(ValueError, match="3 generators were given for 1 images and 2 prompts"):
        model.generate_mixed(MEMORY[:1], [torch.tensor([10])] * 2, [config] * 2, generator=seeded(3))
    for wrong in ([0], [0, 1, 2], [-1, 0]):
        with pytest.raises(ValueError, match="memory_index needs one of 0 to 1 for each of 2 prompts"):
            model.generate_mixed(MEMORY[:2], [torch.tensor([10])] * 2, [config] * 2, memory_index=wrong)


@pytest.mark.parametrize("name", ["vit", "resnet", "resnet-c"])
def test_without_a_grammar_four_tasks_in_one_call_give_the_official_greedy_tokens(shared, tmp_path, name):
    folder = shared / "parity" / name
    convert_checkpoint(folder / "ckpt-400", folder / "config.json", tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    arrays = np.load(folder / "model_io.npz")
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    prompts, configs, expected = [], [], []
    for image in range(len(images)):
        asked = [("detection", [[10]]), ("captioning", [[13]])]
        asked += [(task, arrays[f"{task}_prompt"][image].tolist()) for task in ("segmentation", "keypoint")]
        for task, some in asked:
            tokens = arrays[f"greedy_{task}_tokens"].reshape(len(images), len(some), -1)[image]
            prompts += [torch.tensor(prompt) for prompt in some]
            configs += [GenerationConfig(tokens.shape[1], top_k=1, eos_id=None)] * len(some)
            expected += list(tokens)
    found = model.generate_mixed(images, prompts, configs).tokens.numpy()
    for row, tokens in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row[: len(tokens)], tokens)
        assert not row[len(tokens) :].any()


IMAGE = np.random.default_rng(5).integers(0, 256, (48, 48, 3), np.uint8)


def test_a_predictor_warns_of_cut_answers(model):
    predictor = Predictor(model)
    image = predictor.encode(IMAGE)
    captioning = predictor.tasks["captioning"]
    predictor.tasks["captioning"] = captioning.with_settings(max_tokens=2)  # a word and the end, which is forced
    with pytest.warns(UserWarning, match=r"captioning: .* cut; .* captioning.max_tokens ends answers after 2 tokens"):
        caption = predictor.caption(image)
    assert caption.truncated
    assert set(caption.to_json()) == {"text", "score"}  # the file's format is fixed

    endless = copy.deepcopy(model)
    with torch.no_grad():
        endless.decoder.output_bias[EOS] = -1e9
    predictor = Predictor(endless)
    with pytest.warns(UserWarning, match="detection: .* full after 4 objects: ask for more with --num-objects"):
        assert len(predictor.detect(image)) == 4
    predictor.configure(num_objects=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(predictor.detect(image)) == 6


def test_a_small_skeleton_beside_a_large_one_is_scored_by_its_own_points(model):
    predictor = Predictor(model)
    predictor.tasks["keypoint"] = task = predictor.tasks["keypoint"].with_settings(temperature=0.0)
    image = predictor.encode(IMAGE)
    boxes = np.array([[4, 8, 40, 44], [10, 10, 30, 20]])
    found = predictor.keypoints(image, boxes, categories=["person", "arrow"])
    subjects = task.check_about(image, Boxes(boxes, ["person", "arrow"]))
    for request, category in zip(task.requests(image, subjects), (PERSON, ARROW), strict=True):
        assert request.generation.max_new_tokens == 2 * len(category.keypoints)
        (alone,) = model.generate_mixed(
            image.memory[None], [torch.from_numpy(request.prompt)], [request.generation]
        ).completions(1)
        (instance,) = (each for each in found if each.category.name == category.name)
        assert instance.keypoint_score == pytest.approx(task.scores(alone, 1.0)[0], abs=1e-5)
