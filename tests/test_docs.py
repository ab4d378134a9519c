"""The README and the pages of docs/: their commands and Python run, their links lead somewhere, the site builds.

Commands run in a folder of their own on tiny images and a tiny model. `SMALLER` and `FILES` say what stands in for the
sizes and files that a page names. Commands that need the network or minutes are read by the real parser only.
"""

import dataclasses
import importlib.util
import json
import logging
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
from colours import seeing_colours
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_site
from nbclient import NotebookClient
from PIL import Image
from test_videos import write_video
from tiny_settings import ALL, TINY

import pix2seq.tasks
from pix2seq import Predictor, cli, register_task
from pix2seq.data.shapes import write_shapes
from pix2seq.drawing import Chip, draw_chips
from pix2seq.model.config import DecoderConfig, EncoderConfig
from pix2seq.sequences import SequenceView
from pix2seq.tasks.captioning import CaptioningConfig
from pix2seq.training.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("pix2seq", "make", "pip", "uv", "torchrun", "gsutil", "python")
PIP_OPTIONS = {"--no-deps", "--torch-backend", "cpu"}
TESTED_ELSEWHERE = {"your-data.md": "tests/test_your_data.py"}

# Options at the end of a command win over those before. Commands make and use one tiny model, but for those that start
# from the model of checkpoints/shapes.
SHORT = ["steps=2", "checkpoint_every=2", "trackers=[]", "device=cpu"]
MODEL = [*TINY, "model.encoder.stem=patch", "model.encoder.stem_blocks=0", *SHORT]
SMALLER = {
    "train": MODEL,
    "eval": ["--device", "cpu"],
    "predict": ["--device", "cpu"],
    "data shapes": ["--train", "20", "--val", "3", "--size", "48", "--workers", "1"],
    "data things": ["--train", "2", "--val", "2", "--size", "48", "--workers", "1"],
    "data sequences": ["device=cpu"],
    "data features": MODEL,
    "data captions": ["--device", "cpu"],
    "index": ["--device", "cpu"],
    "search": ["--device", "cpu"],
    "data answers": ["--limit", "2", "--device", "cpu"],
    # Probabilities need 100 answers, some of them right.
    "calibrate": ["--checkpoint", "checkpoints/shapes", "--split", "train", "--out", "calibrated", "--device", "cpu"],
}
FEW = [*SHORT, "batch_size=4", "num_workers=0", "eval_images=2", "eval_batch_size=2"]
FROM_SHAPES = {
    "configs/detection_voc.yaml": FEW,
    "configs/prompted_shapes.yaml": [*FEW, "prompted.grid=2", "prompted.max_clicks=2", "prompted.num_samples=2"],
    "configs/matching_shapes.yaml": FEW,
    "configs/by_words_shapes.yaml": FEW,
    "configs/by_example_shapes.yaml": FEW,
    "configs/reward_shapes.yaml": FEW,
    "configs/reward_clicks.yaml": FEW,
}
FILES = ["street.jpg", "garden.png", "image.png", "a.jpg", "b.jpg", "photos/c.jpg", "photos/d.jpg", "more/e.png"]
DATA = ["shapes", "MY_DATA", "COCO", "corrected"]
# Commands with these words are read by the parser only; the reason follows.
NOT_RUN = {
    "onnx": "it is exported once, see `exported`",
    "USER/NAME": "the hub is on the network; tests/test_hub.py has one of its own",
    "convert": "the published checkpoint is on the network; tests/test_convert.py converts smaller ones",
    "demo": "tests/test_shipped_model.py runs it",
    "serve": "it runs until it is stopped",
}


def blocks(page, language):
    """The fenced blocks of a language in a page; commands have none."""
    fenced = re.findall(r"^```([a-z]*)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(page):
    """The commands of a page as lists of words."""
    lines = [line for text in blocks(page, "") for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def given(words):
    """What a command gives to `pix2seq`, under torchrun too; nothing if it is another command."""
    if words[0] == "pix2seq":
        return words[1:]
    return words[words.index("pix2seq.cli") + 1 :] if "pix2seq.cli" in words else []


def arguments(page):
    """What `pix2seq` is given by the commands of a page."""
    return list(filter(None, map(given, commands(page))))


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def smaller(words):
    """A command with the options that make it small."""
    kind = " ".join(words[: 2 if words[0] == "data" else 1])
    for config in FROM_SHAPES.keys() & set(words) if kind == "train" else ():
        return [*words, *FROM_SHAPES[config]]
    return [*words, *SMALLER.get(kind, [])]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_without_a_language_hold_commands_that_exist(page):
    """`make` targets, folders and locked packages that pip installs, and nothing that no test knows."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for words in commands(page):
        assert words[0] in COMMANDS, (
            f"{shlex.join(words)}: give the block a language, as in ```text, or add the command"
        )
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        elif "pip" in words[:2]:
            for word in set(words[words.index("install") + 1 :]) - PIP_OPTIONS - locked:
                folder, _, wanted = word.rstrip("]").partition("[")
                assert (ROOT / folder / "pyproject.toml").is_file()
                assert set(filter(None, wanted.split(","))) <= extras


@pytest.fixture
def read_only(monkeypatch):
    """Let commands be parsed, and return what was parsed in place of running it."""
    parsed = []
    read = cli._Parser.parse_known_args

    def parse(self, args=None, namespace=None):
        found, others = read(self, args, namespace)
        if hasattr(found, "run"):
            found.run = parsed.append
        return found, others

    monkeypatch.setattr(cli._Parser, "parse_known_args", parse)
    return parsed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_the_parser_takes(page, read_only, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    counting = {"counting"} - set(pix2seq.tasks.task_names())
    for words in arguments(page):
        if words[-1] == "--help" or (counting and "counting" in shlex.join(words)):
            continue  # run below
        assert cli.main(words) == 0, capsys.readouterr().err
        args = read_only[-1]
        if hasattr(args, "settings") and getattr(args, "config", None):
            load_config(args.config, args.settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Images, a model of all tasks that learned from them, and files under the names that pages use."""
    folder = tmp_path_factory.mktemp("docs")
    write_shapes(folder / "shapes", num_train=20, num_val=3, size=48, seed=11, workers=1)
    assert cli.main(smaller(["train", "--task", ALL, f"data={folder / 'shapes'}", f"out={folder / 'run'}"])) == 0
    return folder


@pytest.fixture(scope="module")
def clicker(tiny):
    """A model that is asked by clicks."""
    return _from_shapes(tiny, "prompted")


@pytest.fixture(scope="module")
def matcher(tiny):
    """A model that compares images and sentences."""
    return _from_shapes(tiny, "matching")


@pytest.fixture(scope="module")
def reader(tiny):
    """A model that is asked by words."""
    return _from_shapes(tiny, "by_words")


@pytest.fixture(scope="module")
def by_example(tiny):
    """A model that is asked by examples."""
    return _from_shapes(tiny, "by_example")


def _from_shapes(tiny, task):
    settings = [f"data={tiny / 'shapes'}", f"out={tiny / task}", f"init={ROOT / 'checkpoints/shapes'}"]
    assert cli.main(smaller(["train", "--config", f"configs/{task}_shapes.yaml", *settings])) == 0
    return tiny / task


@pytest.fixture(scope="module")
def exported(tiny):
    """The tiny model as ONNX graphs."""
    assert cli.main(["export", str(tiny / "run"), "--format", "onnx", "--out", str(tiny / "onnx")]) == 0
    return tiny / "onnx"


@pytest.fixture
def comparing():
    """Predictors that compare images and sentences, by colour, and find all sentences likely."""

    def match(predictor, image, sentences):
        return np.full(len(sentences), 0.9)

    with seeing_colours(), mock.patch.object(Predictor, "match", match):
        yield


@pytest.fixture
def workplace(page, tiny, tmp_path, monkeypatch, request):
    """A folder that looks as if the user had followed the page so far."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("configs", *(f"checkpoints/{each.name}" for each in (ROOT / "checkpoints").iterdir()), "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoints/vit-b").symlink_to(tiny / "run")  # as if converted
    for name in DATA:
        (tmp_path / name).symlink_to(tiny / "shapes")
    for name in ("mine", "first"):
        shutil.copytree(tiny / "run", tmp_path / "runs" / name)
    if "runs/prompted" in page.read_text("utf-8"):
        shutil.copytree(request.getfixturevalue("clicker"), tmp_path / "runs/prompted")
    if "runs/matching" in page.read_text("utf-8"):
        shutil.copytree(request.getfixturevalue("matcher"), tmp_path / "runs/matching")
    if "runs/words" in page.read_text("utf-8"):
        shutil.copytree(request.getfixturevalue("reader"), tmp_path / "runs/words")
    if "MY_CUTOUTS" in page.read_text("utf-8"):
        (tmp_path / "MY_CUTOUTS").mkdir()
        for colour in ("red", "blue"):
            Image.new("RGBA", (40, 30), colour).save(tmp_path / "MY_CUTOUTS" / f"{colour}-card_01.png")
    if "runs/by_example" in page.read_text("utf-8"):
        shutil.copytree(request.getfixturevalue("by_example"), tmp_path / "runs/by_example")
    if "shapes-onnx" in page.read_text("utf-8"):
        (tmp_path / "shapes-onnx").symlink_to(request.getfixturevalue("exported"))
    write_video(tmp_path / "clip.mp4", [50, 100, 150, 200, 250, 200])
    for name, path in zip(FILES, sorted((tiny / "shapes/train2017").iterdir()), strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(path).resize((480, 400)).save(tmp_path / name)
    person = {"bbox": [40, 20, 140, 290], "category_id": 1, "category": "person", "score": 0.9}
    content = {"image": "street.jpg", "width": 480, "height": 400, "instances": [person], "captions": []}
    (tmp_path / "street.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    if "photos-index" in page.read_text("utf-8"):
        request.getfixturevalue("comparing")
    if any("photos-index" in text for text in blocks(page, "python")):
        assert cli.main(["index", "photos", "--checkpoint", "runs/mine", "--out", "photos-index"]) == 0
    return tmp_path


@pytest.fixture
def counting():
    """The worked example of a task, registered for one test."""
    spec = importlib.util.spec_from_file_location("counting", ROOT / "examples/counting.py")
    module = sys.modules["counting"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_task(module.Counting)
    yield
    pix2seq.tasks._registered.pop("counting")
    del sys.modules["counting"]


RUN = [page for page in PAGES if page.name not in TESTED_ELSEWHERE and any(arguments(page))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_commands_of_a_page_run(page, workplace, counting, capsys):
    printed = ""
    for command in commands(page):
        if command[:2] == ["python", "-m"]:
            assert importlib.import_module(f"{command[2]}.__main__").main(command[3:]) == 0, capsys.readouterr().err
        words = given(command)
        if not words or NOT_RUN.keys() & set(words):
            continue
        if words[-1] == "--help":
            with pytest.raises(SystemExit, match="0"):
                cli.main(words)
            continue
        for word in words:  # what an earlier page, or an earlier command, wrote
            out = Path(word.removeprefix("out="))
            if word.startswith("out=") or (words[:2] in (["data", "shapes"], ["data", "things"]) and word == words[2]):
                out.unlink() if out.is_symlink() else shutil.rmtree(out, ignore_errors=True)
        words = [re.sub("=FILE$", f"={printed}", word) for word in words]
        assert cli.main(smaller(words)) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
        printed = capsys.readouterr().out.strip().rpartition("\n")[2]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_of_a_page_runs(page, workplace):
    for text in blocks(page, "python"):
        exec(compile(text, name_of(page), "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")], ids=name_of
)
def test_links_of_pages_outside_the_site_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert missing == []


def test_images_of_sequences_are_small():
    images = list((ROOT / "docs").glob("sequence-*.jpg"))
    assert len(images) == 4
    assert all(path.stat().st_size < 150_000 for path in images)


def test_the_notebook_runs_from_top_to_bottom():
    notebook = nbformat.read(ROOT / "docs/tour.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # so that a change shows what changed
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert not [output for output in shown if output.get("name") == "stderr" and "Warning" in output["text"]]


# The site


class Page(HTMLParser):
    """The text of a page's table cells, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.loads, self.cell = [], [], None
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        elif tag in ("script", "img", "iframe"):
            self.loads.append(attributes.get("src") or "")
        elif tag == "link" and attributes.get("rel") != "canonical":
            self.loads.append(attributes.get("href") or "")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, text):
        if self.cell:
            self.rows[-1][-1] += text


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_site(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, repo_url="https://example.org/it")
    try:
        build(config)
    finally:
        logging.getLogger("mkdocs").handlers.clear()
    return folder


def test_the_site_builds_without_a_warning_and_needs_no_network(site):
    pages = [site / path.relative_to(ROOT / "docs").with_suffix(".html") for path in PAGES[2:]]
    assert all(page.is_file() for page in pages)
    loads = {load for page in pages for load in Page(page).loads}
    assert [load for load in loads if re.match("(https?:)?//", load)] == []
    assert not (site / "hooks.py").exists()


def test_links_to_files_of_the_repository_lead_there(site):
    text = (site / "tasks/segmentation.html").read_text() + (site / "adding-a-task.html").read_text()
    assert 'href="https://example.org/it/blob/main/examples/counting.py"' in text
    assert 'href="../' not in (site / "adding-a-task.html").read_text()


def test_the_page_of_settings_has_every_key_with_its_default_range_and_meaning(site):
    rows = {row[0]: row[1:] for row in Page(site / "settings.html").rows if row}
    assert rows["lr"] == ["0.0001", "number, above 0 to 1,000", "peak, reached after warm-up"]
    assert rows["steps"] == ["10000", "whole number, from 1 to 1,000,000,000", "optimiser steps"]
    assert rows["detection.noise_objects"] == [
        "null",
        "whole number, from 0 to 10,000, or null",
        "Invented objects a sequence; none given: fill up to max_objects, as published.",
    ]
    assert rows["model.image_size"][:2] == ["[640, 640]", "2 values of whole number, from 1 to 8,192"]
    assert rows["model.contrast"][:2] == ["null", "the settings of that section, or null"]
    assert rows["model.contrast.dim"][0] == "128"
    assert rows["captioning.flip"][1] == "auto, always, never"
    assert rows["captioning.temperature"][0] == "1.0"  # of the base class
    assert rows["trackers"][:2] == ["[tensorboard]", "list of tensorboard, wandb, trackio"]

    def keys(config, prefix=""):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            inner = dataclasses.is_dataclass(value)
            yield from keys(value, f"{prefix}{field.name}.") if inner else [prefix + field.name]

    expected = set(keys(load_config(None)))
    assert expected <= rows.keys()
    for own in (TrainConfig, EncoderConfig, DecoderConfig, CaptioningConfig):
        assert {field.name for field in dataclasses.fields(own)} <= {key.split(".")[-1] for key in rows} | {
            "schedule", "augment", "model",
        }  # fmt: skip


# The drawing of tokens


def test_a_sheet_has_a_chip_for_each_token_with_its_meaning(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr("pix2seq.sequences.draw_chips", lambda parts: drawn.extend(parts) or Image.new("RGB", (8, 8)))
    settings = [f"data={tiny / 'shapes'}", *TINY, "augment.enabled=false"]
    view = SequenceView(load_config(None, settings, tasks=["detection"]), "detection", 0)
    view.sheet()
    title, prompt, *chips = drawn
    (example,) = view.examples
    assert title == view.task.summary(example)
    assert (prompt.token, prompt.meaning, prompt.is_prompt, prompt.counts) == (10, "detection", True, False)
    assert [chip.token for chip in chips] == example.targets.tolist()
    assert [chip.counts for chip in chips] == (example.weights > 0).tolist()
    height, width = view.sample.image.shape[:2]
    for start in range(0, len(chips) - 1, 5):  # the last one is the end
        y0, x0, y1, x1, name = chips[start : start + 5]
        for chip, axis, side in ((y0, "y", height), (x0, "x", width), (y1, "y", height), (x1, "x", width)):
            assert chip.meaning == f"{axis} {(chip.token - 1000) / 31 * side:.0f}"
        label = name.token - 100
        assert name.meaning == ("noise" if name.token == 30 else view.task.categories[label].name)
        assert [chip.ends_line for chip in (y0, x0, y1, x1, name)] == [False] * 4 + [True]
    assert (chips[-1].token, chips[-1].meaning) == (0, "end")


def test_chips_are_filled_hollow_or_bordered_and_wrap():
    red = (200, 0, 0)
    chips = [Chip(1000, "y 1", red, True), Chip(1000, "y 1", red, False), Chip(11, "task", red, False, is_prompt=True)]
    pixels = np.asarray(draw_chips(chips, width=200))
    row = pixels[6]  # above the numbers, inside the border
    is_red = (row == red).all(axis=1)
    ends = np.flatnonzero(np.diff(np.r_[0, is_red, 0]))
    runs = list(zip(ends[::2], ends[1::2], strict=True))
    widths = [stop - start for start, stop in runs]
    assert len(runs) == 4  # a filled chip, the two borders of a hollow one, a filled prompt between black borders
    assert widths[1] == widths[2] == 2
    assert min(widths[0], widths[3]) > 20
    assert (row[runs[3][0] - 1] == 0).all()
    one_line, heights = draw_chips([chips[0]], width=200).height, []
    for many in (chips[:1] * 4, chips[:1] * 5, [dataclasses.replace(chips[0], ends_line=True), chips[0]]):
        heights.append(draw_chips(many, width=200).height)
    assert heights == [one_line, one_line + 46, one_line + 46]
    assert draw_chips(["word " * 40, chips[0]], width=600).height > one_line + 48  # two lines of text


def test_tokens_without_a_file_to_draw_are_refused(tiny, capsys):
    assert cli.main(["data", "sequences", str(tiny / "shapes"), "--tokens", *TINY]) == 2
    assert "say where with --out FILE" in capsys.readouterr().err
