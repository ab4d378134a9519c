"""An exported model, run without torch, computes and answers what PyTorch does: logits, then tokens, then results."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_model import OLD
from test_predictor import BOXES, IMAGES, same

from pix2seq import Pix2Seq, Predictor
from pix2seq.cli import main
from pix2seq.errors import InputError
from pix2seq.metrics.calibration import ScoreMap, TaskCalibration
from pix2seq.model.config import EncoderConfig
from pix2seq.model.decoding.completion import GenerationConfig
from pix2seq.model.decoding.grammar import BoxGrammar, KeypointGrammar, PolygonGrammar, TextGrammar
from pix2seq.model.decoding.sampling import sample as sample_in_torch
from pix2seq.model.pix2seq import build_model
from pix2seq.onnx_export import export_onnx
from pix2seq.runtime import Runner
from pix2seq.runtime import generate as runtime_generate
from pix2seq.runtime.__main__ import main as run_runtime
from pix2seq.runtime.generate import sample, uniform
from pix2seq.tasks.objects import Boxes
from pix2seq.tokenizers.text import EOS_ID
from pix2seq.vocab import EOS, INVISIBLE

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = {
    "closeups": EncoderConfig(
        name="vit", dim=32, num_layers=1, num_heads=2, mlp_dim=32, patch_size=8, stem="conv", stem_blocks=1,
        closeups=True,
    ),
    "deit": EncoderConfig(name="deit_tiny_patch16_224"),
}  # fmt: skip
ONE_ENCODER = pytest.mark.parametrize("exported", ["closeups"], indirect=True)
LOOKS = {"closeups": {"crop": False, "closeup": True}, "deit": {}}


def make_checkpoint(kind, folder):
    """A small model for all tasks; weights are large, so that answers differ."""
    old = Pix2Seq.from_pretrained(OLD)
    torch.manual_seed(1)
    model = build_model(
        replace(old.config, encoder=ENCODERS[kind]), old.categories, old.text, load_pretrained=False
    ).eval()
    for part in (model.decoder, model.projection):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.decoder.output_bias[[100 + category.label for category in model.categories]] += 3.0
        model.decoder.output_bias[[EOS, model.config.vocab.text_base + EOS_ID]] += 2.0  # so that lengths differ
        model.decoder.output_bias[INVISIBLE] += 5.0  # so that likelihoods without it differ
    model.task_settings = {name: dict(settings) for name, settings in old.task_settings.items()}
    for name in ("segmentation", "keypoint"):
        model.task_settings[name] |= LOOKS[kind]
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=list(ENCODERS))
def exported(request, tmp_path_factory):
    """A folder with `checkpoint`, and `onnx`, which was exported from it."""
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, folder / "checkpoint")
    export_onnx(folder / "checkpoint", folder / "onnx")
    return folder


@pytest.fixture
def pair(exported):
    """A predictor in PyTorch, and a runner of the same model."""
    predictor = Predictor.from_pretrained(exported / "checkpoint", device="cpu")
    return predictor, Runner(exported / "onnx", num_threads=1)


def test_memories_maps_and_closeups_are_those_of_the_model(pair):
    predictor, runner = pair
    for pixels in IMAGES:
        expected, found = predictor.encode(pixels), runner.encode(pixels)
        assert found.input_size == expected.input_size
        for there, here in zip([expected.memory, *expected.maps], [found.memory, *found.maps], strict=True):
            np.testing.assert_allclose(here, there.numpy(), atol=1e-4, rtol=0)
        if not expected.maps:
            continue
        frames = np.array([[0.1, 0.2, 0.6, 0.9], [-0.5, 0.4, 0.2, 1.1]], np.float32)
        with torch.inference_mode():
            maps = [each[None] for each in expected.maps]
            memories = predictor.model.look_closer(maps, torch.from_numpy(frames), [0, 0])
        np.testing.assert_allclose(runner.graphs.look_closer(frames, found.maps), memories.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("memories", "rows", "prompt"), [(1, 1, 1), (2, 3, 2), (3, 1, 6)])
def test_logits_with_a_cache_are_those_of_whole_sequences(pair, memories, rows, prompt):
    predictor, runner = pair
    decoder = predictor.model.decoder
    rng = np.random.default_rng(0)
    vocab_size, dim = decoder.token_embedding.weight.shape
    tokens = rng.integers(0, vocab_size, (memories, rows, prompt + 5))
    memory = rng.normal(size=(memories, len(runner.encode(IMAGES[0]).memory), dim)).astype(np.float32)
    with torch.inference_mode():
        hidden = decoder(torch.from_numpy(tokens).flatten(0, 1), torch.from_numpy(memory))
        expected = decoder.logits(hidden).numpy()[:, prompt - 1 :]
    logits, cache = runner.graphs.prefill(tokens[..., :prompt], memory)
    found = [logits]
    for position in range(prompt, tokens.shape[2]):
        found.append(runner.graphs.step(tokens[..., position], cache))
    np.testing.assert_allclose(np.stack(found, axis=1), expected, atol=1e-3, rtol=1e-5)


def completions(predictor, runner, task, pixels, boxes, seed):
    """What both generate for the same requests about an image, rows cut after their last token."""
    both = []
    for asker in (predictor, runner):
        asked, image = asker.tasks[task], asker.encode(pixels)
        about = asked.check_about(image, Boxes(boxes, "person")) if asked.needs else None
        requests = asked.requests(image, about)
        if asker is predictor:
            found = asker._complete(asked, [image], [requests], seed)
        else:
            found = asker._complete(asked, image, requests, seed)
        both.append(list(map(without_padding, found)))
    return both


def without_padding(completion):
    """The tokens, likelihoods, and other whole numbers of a completion, up to the end of its longest row."""
    width = max([1, *(completion.tokens.nonzero()[1] + 1)])
    floats, ids = [completion.logprobs], [completion.tokens]
    if completion.best_tokens is not None:
        floats.append(completion.best_logprobs)
        ids.append(completion.best_tokens)
    cut = [np.hstack([values[:, :width] for values in each]) for each in (floats, ids)]
    return completion.tokens[:, :width].tolist(), cut[0], [*cut[1].tolist(), completion.truncated.tolist()]


@pytest.mark.filterwarnings("ignore:.*an answer was cut")
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.95}], ids=str)
@pytest.mark.parametrize("task", ["detection", "segmentation", "keypoint", "captioning"])
def test_tokens_are_those_of_pytorch(pair, task, sampling):
    predictor, runner = pair
    for asker in pair:
        asker.tasks[task] = asker.tasks[task].with_settings(**sampling)
    lengths = set()
    for pixels, boxes in zip(IMAGES, BOXES, strict=True):
        expected, found = completions(predictor, runner, task, pixels, boxes, seed=5)
        assert len(found) == len(expected)
        for there, here in zip(expected, found, strict=True):
            assert here[0] == there[0]
            np.testing.assert_allclose(here[1], there[1], atol=1e-3)
            assert here[2] == there[2]
            lengths.add(len(here[0][0]))
    if task == "segmentation" and "top_p" in sampling:
        assert len(lengths) > 1


@pytest.mark.filterwarnings("ignore:.*an answer was cut")
def test_results_are_those_of_the_predictor(pair):
    for asker in pair:
        for name in asker.tasks:
            asker.tasks[name] = asker.tasks[name].with_settings(top_p=0.95)

    def answers(asker, pixels, boxes):
        yield asker.detect(pixels, seed=3)
        yield [asker.caption(pixels, seed=3)]
        yield asker.segment(pixels, boxes, categories="person", seed=3)
        yield asker.keypoints(pixels, boxes, categories="person", seed=3)
        yield asker.segment(pixels, asker.detect(pixels), seed=3)

    for pixels, boxes in zip(IMAGES, BOXES, strict=True):
        for expected, found in zip(*(answers(asker, pixels, boxes) for asker in pair), strict=True):
            assert [type(each) for each in found] == [type(each) for each in expected]
            assert all(map(same, found, expected))
        expected, found = (asker.predict(pixels, ["detection", "segmentation", "captioning"]) for asker in pair)
        flat = [answer for name in found for answer in found[name]]
        assert all(map(same, flat, [*expected.instances, *expected.captions]))


@ONE_ENCODER
def test_scores_are_calibrated_as_the_predictor_does_it(exported, tmp_path):
    folder = shutil.copytree(exported / "onnx", tmp_path / "onnx")
    content = json.loads((folder / "config.json").read_text())
    curve = ScoreMap("isotonic", (0.0, 0.2, 1.0), (0.1, 0.6, 0.9))
    maps = {name: TaskCalibration(0.5, 0.9, 0.5, (((), curve),)) for name in ("detection", "segmentation")}
    content["calibration"] = {name: each.to_json() for name, each in maps.items()}
    (folder / "config.json").write_text(json.dumps(content))
    predictor, runner = Predictor.from_pretrained(exported / "checkpoint", device="cpu"), Runner(folder, num_threads=1)
    raw = [each.score for each in predictor.detect(IMAGES[0])]
    predictor.calibration = maps
    for pixels in IMAGES:
        found = runner.detect(pixels)
        assert all(map(same, found, predictor.detect(pixels)))
        assert all(map(same, runner.segment(pixels, found), predictor.segment(pixels, found)))
    assert [each.raw_score for each in predictor.detect(IMAGES[0])] == pytest.approx(raw)
    assert [each.score for each in runner.detect(IMAGES[0])] != pytest.approx(raw)


@ONE_ENCODER
def test_a_task_may_ask_again_after_the_first_answers(pair):
    predictor, runner = pair

    def twice(image, requests, completions):
        """After one request, ask it twice, and nothing more after those."""
        return [] if len(requests) == 2 else [*requests, *requests]

    for asker in pair:
        asker.tasks["captioning"].follow_up = twice
    (expected,) = predictor.ask("captioning", [IMAGES[0]])
    found = runner.ask("captioning", IMAGES[0])
    assert len(found) == len(expected) == 2
    assert all(map(same, found, expected))
    exchange = predictor.predict(IMAGES[0], ["captioning"]).exchanges["captioning"]
    assert len(exchange.requests) == len(exchange.completions) == 3  # all that was asked and said is kept
    assert all(map(same, exchange.answers, expected))


@ONE_ENCODER
def test_finished_rows_leave_without_changing_others(pair, monkeypatch):
    _, runner = pair
    image, seed = runner.encode(IMAGES[0]), 7
    task = runner.tasks["segmentation"].with_settings(top_p=1.0, num_samples=4)
    requests = task.requests(image, task.check_about(image, Boxes(BOXES[0], "person")))
    sizes = []
    step = runner.graphs.step

    def counted(tokens, cache):
        sizes.append(tokens.size)
        return step(tokens, cache)

    monkeypatch.setattr(runner.graphs, "step", counted)
    dropping = runner._complete(task, image, requests, seed)
    assert len(set(sizes)) > 1
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(runtime_generate, "MAX_SHARE_LEFT", 0.0)
    for a, b in zip(dropping, runner._complete(task, image, requests, seed), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_array_equal(a.truncated, b.truncated)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
def test_random_numbers_are_those_of_pytorch(seed):
    """To the bit, as are the sums that a number is looked up in: a token more or less would be another answer."""
    expected = torch.rand((8, 257), generator=torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(uniform(seed, (8, 257)), expected.numpy())
    sums = runtime_generate._running_sum(expected.numpy() / 100)
    np.testing.assert_array_equal(sums, (expected / 100).cumsum(-1).numpy())


def example():
    """The task of examples/counting.py, as a module."""
    spec = importlib.util.spec_from_file_location("counting_example", ROOT / "examples" / "counting.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


GRAMMARS = [
    example().NumberGrammar(12, 17),
    BoxGrammar(12, 6, 7, 3, 4, 0),
    BoxGrammar(12, 6, 7, 3, 4, None),
    PolygonGrammar(12, 6, 5, 0, 6),
    KeypointGrammar(12, 6, 6),
    TextGrammar(18, 24, 0, 8),
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: type(grammar).__name__)
@given(data=st.data())
def test_grammars_allow_the_same_ids_in_numpy_and_torch(grammar, data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 14))
    ids = np.array(data.draw(st.lists(st.sampled_from([0, 4, 5, 6, 8, 12, 13, 17, 18, 23]), min_size=rows * length,
                                      max_size=rows * length)), np.int64).reshape(rows, length)  # fmt: skip
    here, there = grammar.allowed(ids), grammar.allowed(torch.from_numpy(ids))
    for name in ("low", "high", "singles"):
        found, expected = getattr(here, name), getattr(there, name)
        assert (found.dtype, expected.dtype) == (np.int64, torch.int64)
        np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(here.forbids(np.arange(25)), there.forbids(torch.arange(25)).numpy())
    np.testing.assert_array_equal(here.only(0), there.only(0).numpy())


SAMPLING = [
    {"temperature": 0.0}, {"top_k": 1}, {}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.4},
    {"top_p": 0.9, "top_k": 5, "temperature": 2.0}, {"top_p": 1e-6}, {"top_k": 100},
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_what_is_drawn_is_what_pytorch_draws(sampling):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 30)).astype(np.float32) * 3
    logits[::7, ::3], logits[1::7, ::4], logits[2::7] = np.nan, -np.inf, np.nan
    forbidden = rng.random(logits.shape) < 0.5
    forbidden[:, 5] = False
    noise = rng.random(len(logits)).astype(np.float32)
    expected = sample_in_torch(
        torch.from_numpy(logits), **sampling, forbidden=torch.from_numpy(forbidden), noise=torch.from_numpy(noise)
    )
    found = sample(logits, GenerationConfig(1, **sampling), forbidden, noise)
    np.testing.assert_array_equal(found, expected.numpy())


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ALLOWED and root not in sys.stdlib_module_names and not root.startswith("_"):
            raise ModuleNotFoundError(f"blocked: {name}", name=root)

ALLOWED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
from pix2seq.runtime.__main__ import main

sys.exit(main(sys.argv[1:]))
"""
# What the documentation tells to install, by the names that are imported.
NEEDED = "pix2seq numpy onnxruntime cv2 PIL omegaconf yaml antlr4 safetensors pycocotools".split()


@ONE_ENCODER
def test_the_command_runs_without_torch_and_prints_what_predict_writes(exported, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "image.png")
    paths = [str(exported / "onnx"), str(tmp_path / "image.png"), "--draw", str(tmp_path / "drawn")]
    command = [sys.executable, "-c", BLOCKER, ",".join(NEEDED), *paths, "--seed", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    predictor = Predictor.from_pretrained(exported / "checkpoint", device="cpu")
    expected = predictor.predict(IMAGES[0], list(predictor.tasks), seed=4).to_json()
    assert content.pop("image") == "image.png"
    assert content.keys() == expected.keys()
    assert [each["bbox"] for each in content["instances"]] == [each["bbox"] for each in expected["instances"]]
    assert [each["category"] for each in content["instances"]] == [each["category"] for each in expected["instances"]]
    assert content["captions"][0]["text"] == expected["captions"][0]["text"]
    assert Image.open(tmp_path / "drawn" / "image.png").size[0] >= 512


@ONE_ENCODER
def test_what_prefill_and_step_share_is_stored_once(exported):
    stored = (exported / "onnx" / "weights.bin").stat().st_size
    assert stored <= (exported / "checkpoint" / "model.safetensors").stat().st_size


@ONE_ENCODER
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no folder", r"there is no config\.json; write it with pix2seq export --format onnx"),
        ("checkpoint", r"is a checkpoint; write it with pix2seq export --format onnx"),
        ("newer", r"config\.json has format 2, this release reads 1"),
        ("no vocabulary", r"config\.json is damaged \(KeyError: 'vocab'\)"),
        ("no step", r"step\.onnx is missing; write it"),
        ("cut step", r"step\.onnx cannot be loaded \(.*\); write it"),
        ("no weights", r"\.onnx cannot be loaded \(.*\); write it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_a_line(exported, tmp_path, capsys, change, message):
    folder = tmp_path / "model"
    if change != "no folder":
        shutil.copytree(exported / ("checkpoint" if change == "checkpoint" else "onnx"), folder)
    if change in ("newer", "no vocabulary"):
        content = json.loads((folder / "config.json").read_text())
        content["onnx"]["format"] = 2 if change == "newer" else 1
        if change == "no vocabulary":
            del content["model"]["vocab"]
        (folder / "config.json").write_text(json.dumps(content))
    elif change in ("no step", "no weights"):
        (folder / {"no step": "step.onnx", "no weights": "weights.bin"}[change]).unlink()
    elif change == "cut step":
        (folder / "step.onnx").write_bytes((folder / "step.onnx").read_bytes()[:-1000])
    assert run_runtime([str(folder), "image.png"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@ONE_ENCODER
def test_questions_that_cannot_be_asked_are_refused(pair):
    _, runner = pair
    image = runner.encode(IMAGES[0])
    with pytest.raises(InputError, match="was not trained for counting; it knows detection, segmentation"):
        runner.ask("counting", image)
    with pytest.raises(InputError, match="seed is -1; expected a whole number"):
        runner.detect(image, seed=-1)
    with pytest.raises(InputError, match="x1 > x0"):
        runner.segment(image, [[5, 5, 5, 9]], categories="person")
    with pytest.raises(InputError, match="needs sequences of 502 tokens, but this model ends at 64"):
        runner.configure("detection", num_objects=100)
    runner.configure("segmentation", num_samples=1)
    assert all(instance.rle is None for instance in runner.segment(image, BOXES[0], categories="person"))
    runner.config = replace(runner.config, text=None)
    with pytest.raises(InputError, match="captioning needs words, but there is no text tokenizer"):
        runner.caption(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx", "--dtype", "float16"], "unknown dtype of --format onnx: 'float16'"),
        (["--dtype", "int8"], "unknown dtype of --format checkpoint: 'int8'"),
        (["--format", "onnx", "--licence", "MIT"], "are for a card, which only --format checkpoint has"),
    ],
)
def test_options_of_another_format_are_refused(tmp_path, capsys, options, message):
    assert main(["export", str(OLD), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"need the package onnxscript; install pix2seq\[onnx\]"):
        export_onnx(OLD, tmp_path / "out")


@ONE_ENCODER
def test_int8_takes_a_quarter_for_each_matrix_and_computes_nearly_the_same(exported, tmp_path, monkeypatch):
    """Weights round to a 254th of the largest of their column, so what is computed differs, but not by much."""
    graphs = {path.stem: onnx.load(path) for path in (exported / "onnx").glob("*.onnx")}
    monkeypatch.setattr("pix2seq.onnx_export.export_graphs", lambda model: graphs)  # exporting again takes seconds
    export_onnx(exported / "checkpoint", tmp_path / "int8", dtype="int8")
    exact, rounded = Runner(exported / "onnx"), Runner(tmp_path / "int8")
    for pixels in IMAGES:
        expected, found = exact.encode(pixels).memory, rounded.encode(pixels).memory
        assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    stored = {}
    for initializer in onnx.load(tmp_path / "int8" / "step.onnx").graph.initializer:
        stored[initializer.data_type] = stored.get(initializer.data_type, 0) + int(np.prod(initializer.dims))
    matrices = sum(module.weight.numel() for module in linear_layers(exported / "checkpoint"))
    assert stored[onnx.TensorProto.INT8] >= matrices
    assert rounded.detect(IMAGES[0]) is not None


def linear_layers(checkpoint):
    """What a decoder step multiplies with: all linear layers but the projections of memory, and the output layer."""
    decoder = Pix2Seq.from_pretrained(checkpoint).decoder
    names = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    return [decoder.get_submodule(name) for name in names if "key_value" not in name] + [decoder.token_embedding]
