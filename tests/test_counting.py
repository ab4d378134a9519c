"""A task from elsewhere: examples/counting.py, installed as a package of its own, through every command."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_ranks
from PIL import Image

import pix2seq.tasks
from pix2seq import Pix2Seq, Predictor, register_task
from pix2seq.cli import main
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError
from pix2seq.tasks import get_task, task_names
from pix2seq.tasks.task import Task, TaskConfig
from pix2seq.training.config import load_config
from pix2seq.vocab import Vocab

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "counting.py"
TINY = [
    "steps=4", "batch_size=4", "checkpoint_every=2", "log_every=1", "num_workers=0", "lr=1e-3", "eval_batch_size=4",
    "schedule.warmup_steps=2", "model.image_size=[32,48]", "model.encoder.name=vit", "model.encoder.dim=32",
    "model.encoder.num_layers=1", "model.encoder.num_heads=2", "model.encoder.mlp_dim=64", "model.decoder.dim=32",
    "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=64",
    "model.decoder.max_seq_len=64", "model.vocab.num_bins=32", "model.vocab.size=1040", "detection.max_objects=10",
    "detection.noise_objects=2", "counting.max_count=9", "trackers=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of an installed package with the task; it says so where it is imported."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "counting.py").write_text(EXAMPLE.read_text() + '\nprint("counting was imported")\n')
    info = folder / "pix2seq_counting-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pix2seq-counting\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[pix2seq.tasks]\ncounting = counting:Counting\n")
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    """The package is there for one test, and gone afterwards."""
    monkeypatch.syspath_prepend(str(package))
    pix2seq.tasks._installed.cache_clear()
    yield package
    pix2seq.tasks._registered.pop("counting", None)
    sys.modules.pop("counting", None)
    pix2seq.tasks._installed.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counting") / "shapes"
    write_shapes(folder, num_train=16, num_val=6, size=48, seed=1, workers=1)
    return folder


def command(arguments, package, **environment):
    """A command in a process of its own that has the package."""
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        cwd=package,
        timeout=600,
        check=False,
    )


def run_with(package, arguments):
    """Run a command with the package, in a process that has not looked for packages yet."""
    sys.path.insert(0, str(package))
    raise SystemExit(main(arguments))


@pytest.fixture(scope="module")
def run(package, data):
    """A run of detection and counting over two processes."""
    out = data.parent / "run"
    arguments = ["train", "--task", "detection,counting", f"data={data}", f"out={out}", *TINY]
    run_ranks(run_with, package, arguments, folder=data.parent)
    return out


def test_it_trains_and_its_metric_is_merged_over_two_ranks(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss/counting"] for line in lines if line["kind"] == "train"]).all()
    (scored,) = (line for line in lines if line["kind"] == "eval")
    assert 0 <= scored["counting/accuracy"] <= 1
    assert "AP50" in scored
    assert json.loads((run / "checkpoints/best/best.json").read_text())["metric"] == "AP"


def test_its_id_is_kept_by_name_and_a_resumed_run_goes_on_with_it(run, data, tmp_path, installed):
    vocab = Pix2Seq.from_pretrained(run / "checkpoints/step-00000004").config.vocab
    assert vocab.other_tasks == {"counting": 18}
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints/step-00000004")
    command = ["train", "--task", "detection,counting", "--resume", "auto", f"data={data}", f"out={resumed}", *TINY]
    assert main(command) == 0
    assert Pix2Seq.from_pretrained(resumed / "checkpoints/step-00000004").config.vocab == vocab


def test_two_processes_count_what_one_counts(run, data, tmp_path, installed):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    out = tmp_path / "metrics.json"
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--out", str(out), "--bf16"]) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert metrics["counting/accuracy"] == pytest.approx(lines[-1]["counting/accuracy"], abs=1e-5)
    # Every class is asked about in every image.
    predictor = Predictor.from_pretrained(run, device="cpu", bf16=True)
    dataset, right, asked = read_coco(data, "val"), 0, 0
    for index in range(len(dataset)):
        target = dataset.target(index)
        (counts,) = predictor.ask("counting", [target.image.path])
        for count in counts:
            asked += 1
            right += count.count == min((target.labels[~target.iscrowd] == count.category.label).sum(), 9)
    assert asked == len(dataset) * len(dataset.categories)
    assert metrics["counting/accuracy"] == pytest.approx(right / asked, abs=1e-6)


def test_it_answers_about_a_class_in_json_and_in_a_drawing(run, data, tmp_path, installed, capsys):
    image = sorted((data / "val2017").iterdir())[0]
    command = ["predict", str(image), "--checkpoint", str(run), "--out", str(tmp_path)]
    assert main([*command, "--task", "counting", "--about", "star"]) == 0
    content = json.loads((tmp_path / f"{image.stem}.json").read_text())
    (answer,) = content["counting"]
    assert (answer["category"], content["instances"], content["captions"]) == ("star", [], [])
    assert 0 <= answer["count"] <= 9
    assert 0 < answer["score"] <= 1
    assert Image.open(tmp_path / f"{image.stem}.png").size[1] > 512  # the answer stands below the image
    assert main([*command, "--about", "star"]) == 0  # beside detection, which takes no --about
    assert set(json.loads((tmp_path / f"{image.stem}.json").read_text())) >= {"counting", "instances"}
    for wrong, message in (
        (["--about", "sta"], "did you mean 'star'"),
        (["--task", "detection", "--about", "star"], "none"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_its_sequences_can_be_seen(data, tmp_path, installed, capsys):
    out = tmp_path / "seen.png"
    assert main(["data", "sequences", str(data), "--task", "counting", "--out", str(out), *TINY]) == 0
    text = capsys.readouterr().out
    assert "task:counting (prompt)" in text
    assert " x " in text
    Image.open(out).verify()


def test_its_sequences_say_what_is_there(data, installed):
    task = get_task("counting")(get_task("counting").config_type(), Vocab(other_tasks={"counting": 18}), ())
    dataset = read_coco(data, "train")
    task = type(task)(task.config, task.vocab, dataset.categories)
    for index in range(len(dataset)):
        target = dataset.target(index)
        examples = task.examples(target, (48, 48), np.random.default_rng(index))
        assert 2 <= len(examples) <= 4
        for example in examples:
            label = int(example.prompt[1]) - 100
            assert example.prompt.tolist() == [18, 100 + label]
            assert int(example.targets[0]) - 1000 == int((target.labels == label).sum())
        assert {int((target.labels == int(e.prompt[1]) - 100).sum()) > 0 for e in examples} == {True, False}


def test_help_lists_it_without_an_import(package):
    done = command(["-m", "pix2seq.cli", "train", "--help"], package)
    assert "by_words, matching, counting" in " ".join(done.stdout.split())
    assert "was imported" not in done.stdout
    code = "import sys; from pix2seq.cli import main; main(['predict', '--help'])"
    done = command(["-c", f"try:\n {code}\nexcept SystemExit:\n print('torch' in sys.modules)"], package)
    assert done.stdout.split()[-1] == "False"


def test_without_it_a_checkpoint_opens_and_says_what_is_missing(run, data, tmp_path, capsys):
    image = sorted((data / "val2017").iterdir())[0]
    assert main(["predict", str(image), "--checkpoint", str(run), "--out", str(tmp_path)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "counting" in warnings[0]
    assert "instances" in json.loads((tmp_path / f"{image.stem}.json").read_text())
    with pytest.raises(InputError, match="no installed package provides the task counting"):
        Predictor.from_pretrained(run, device="cpu").ask("counting", [image])
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--task", "counting"]) == 2
    assert "unknown task 'counting'" in capsys.readouterr().err


def test_a_class_can_be_registered_by_hand(tmp_path, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    counting = importlib.import_module("counting")
    assert register_task(counting.Counting) is counting.Counting
    try:
        assert "counting" in task_names()
        assert load_config(None, ["counting.max_count=3"], tasks=["counting"]).task("counting").max_count == 3
        with pytest.raises(InputError, match=r"did you mean 'counting.max_count'"):
            load_config(None, ["counting.max_cuont=3"])
    finally:
        pix2seq.tasks._registered.pop("counting")
        sys.modules.pop("counting")
    with pytest.raises(InputError, match="unknown task 'counting'"):
        load_config(None, tasks=["counting"])


def task_class(**attributes):
    return type("Other", (Task,), {"config_type": TaskConfig} | attributes)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (int, "expected a subclass of Task"),
        (task_class(name="two words"), "expected a word"),
        (task_class(name="detection"), "give Other another name"),
        (task_class(name="other", config_type=dict), "expected a subclass of TaskConfig"),
    ],
)
def test_what_is_no_task_cannot_be_registered(task, message):
    with pytest.raises(ValueError, match=message):
        register_task(task)


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pix2seq.tasks]\nshapeless = nowhere:Task\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pix2seq.tasks._installed.cache_clear()
    try:
        assert "shapeless" in task_names()
        with pytest.raises(InputError, match="task 'shapeless' of package broken cannot be imported"):
            get_task("shapeless")
        assert main(["train", "--task", "shapeless"]) == 2
    finally:
        monkeypatch.undo()
        pix2seq.tasks._installed.cache_clear()


def test_ids_of_tasks_from_elsewhere_move_with_their_names(run, data, tmp_path, installed):
    """Fine-tuning keeps the row of the task's id, whatever id it has in the new model."""
    start = Pix2Seq.from_pretrained(run / "checkpoints/step-00000004")
    settings = [f"data={data}", f"out={tmp_path / 'run'}", f"init={run}", *TINY, "steps=1", "lr=1e-12"]
    assert main(["train", "--task", "counting", *settings]) == 0
    model = Pix2Seq.from_pretrained(tmp_path / "run/checkpoints/step-00000001")
    ours = model.decoder.token_embedding.weight[model.config.vocab.task_id("counting")]
    torch.testing.assert_close(ours, start.decoder.token_embedding.weight[18], atol=1e-6, rtol=0)
