"""A run stays one run: what may change when it resumes, what is refused, and what is kept of each part of it."""

import json
import os
import shutil
import signal
from dataclasses import fields

import pytest
import yaml
from test_checkpoint import save_steps
from test_cli import TINY, one_line

import pix2seq.training.checkpoint as checkpoint_module
from pix2seq import Pix2Seq
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.fingerprint import fingerprint
from pix2seq.data.formats.shards import write_shards
from pix2seq.data.shapes import write_shapes
from pix2seq.model.pretrained import list_checkpoints, newest_checkpoint
from pix2seq.training.checkpoint import mark_best, read_best, set_aside
from pix2seq.training.config import TrainConfig
from pix2seq.training.log import Report
from pix2seq.training.resume import FIXED, TAKEN
from pix2seq.training.stop import StopRequest

SETTINGS = [*TINY, "steps=4", "eval_every=2", "trackers=[]", "eval_images=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "shapes"
    write_shapes(folder, num_train=8, num_val=2, size=48, seed=4, max_objects=3, workers=1)
    return folder


def train(data, out, *more, resume="auto"):
    return main(["train", "--resume", str(resume), f"data={data}", f"out={out}", *SETTINGS, *more])


@pytest.fixture(scope="module")
def finished(data):
    out = data.parent / "finished"
    assert train(data, out) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("change", "message", "fixed"),
    [
        (["model.vocab.num_bins=31"], "model.vocab.num_bins=31 (the run has 32)", True),
        (["model.image_size=[32,32]"], "model.image_size=[32, 32] (the run has [32, 48])", True),
        (["model.decoder.num_heads=4"], "model.decoder.num_heads=4 (the run has 2)", True),
        (["--task", "keypoint"], 'tasks=["keypoint"] (the run has ["detection"])', True),
        (["optimizer=muon"], "optimizer=muon (the run has adamw)", True),
        (["freeze=encoder"], "freeze=encoder (the run has null)", True),
        (["lr=0.01"], "lr=0.01 (the run has 0.001)", False),
        (["seed=5"], "seed=5 (the run has 0)", False),
        (["batch_size=2"], "batch_size=2 (the run has 4)", False),
        (["augment.flip=0.1"], "augment.flip=0.1 (the run has 0.5)", False),
        (["detection.noise_objects=3"], "detection.noise_objects=3 (the run has 2)", False),
        (["bf16=false"], "bf16=false (the run has true)", False),
        (["init=elsewhere", "model.decoder.dim=32"], "init=elsewhere (the run has null)", False),
    ],
)
def test_another_setting_is_refused_with_both_values(run, data, capsys, monkeypatch, change, message, fixed):
    before = files(run)
    monkeypatch.setattr("pix2seq.training.loop.prepare", None)  # refused before any data are read
    for more in ([], ["--accept-changes"]) if fixed else ([],):
        assert train(data, run, "steps=9", *more, *change) == 2
        error = one_line(capsys)
        assert message in error
        assert ("--accept-changes" in error) is not fixed
    assert files(run) == before


def test_what_may_change_is_taken_and_the_rest_on_request_and_all_of_it_is_on_record(run, data, capsys):
    first = (run / "config.yaml").read_text()
    more = ["steps=5", "log_every=2", "keep_checkpoints=9"]
    assert train(data, run, *more) == 0
    assert "steps=5 (the run has 4)" in capsys.readouterr().out
    second = (run / "config.yaml").read_text()
    assert train(data, run, *more, "steps=6", "lr=0.01", "seed=5", "--accept-changes") == 0
    changed = [line for line in log(run) if line["kind"] == "changed"]
    assert [line["step"] for line in changed] == [4, 5]
    assert changed[0]["settings"] == {"steps": [4, 5], "log_every": [1, 2]} | {"keep_checkpoints": [10, 9]}
    assert changed[1]["settings"] == {"lr": [0.001, 0.01], "seed": [0, 5], "steps": [5, 6]}
    assert (run / "config-until-step-00000004.yaml").read_text() == first
    assert (run / "config-until-step-00000005.yaml").read_text() == second
    assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == 0.01
    # The run has these settings now: the old ones are the ones that differ.
    assert train(data, run, *more, "steps=7") == 2
    assert "lr=0.001 (the run has 0.01), seed=0 (the run has 5)" in one_line(capsys)
    assert [line["step"] for line in log(run) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_its_own_config_resumes_a_run_without_a_word(run, data):
    first = (run / "config.yaml").read_text()
    assert main(["train", "--resume", "auto", "--config", str(run / "config.yaml"), f"out={run}"]) == 0
    assert not [line for line in log(run) if line["kind"] == "changed"]
    assert first.replace(str(data.parent / "finished"), str(run)) == (run / "config.yaml").read_text()


def test_every_setting_has_a_rule_that_exists():
    assert {*TAKEN, *FIXED} <= {field.name for field in fields(TrainConfig)}
    assert not TAKEN & FIXED


def test_data_are_compared_by_content_not_by_path(run, data, tmp_path, capsys):
    moved = shutil.copytree(data, tmp_path / "moved")
    assert train(moved, run, "steps=5") == 0
    named = "annotations/instances_train2017.json"
    assert train(moved, run, "steps=5", f"annotations={named}") == 0
    assert train(moved, run, "steps=5", f"annotations={moved / named}") == 0
    path = moved / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] -= 0.5
    path.write_text(json.dumps(content))
    before = files(run)
    assert train(moved, run, "steps=6", "--accept-changes") == 2
    error = one_line(capsys)
    assert error.count("8 images, sha256") == 2
    assert "training data of detection=" in error
    assert files(run) == before


def test_other_validation_data_are_taken_on_request(run, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "other")
    path = other / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    assert train(other, run, "steps=5") == 2
    assert "validation data of detection=2 images" in one_line(capsys)
    mark_best(run, run / "checkpoints/step-00000004", "AP", 2.0)
    assert train(other, run, "steps=5", "--accept-changes") == 0
    # Values of other validation data, or of more images, do not compare.
    assert read_best(run / "aside-001")["value"] == 2.0
    assert read_best(run)["checkpoint"] == "step-00000005"
    mark_best(run, run / "checkpoints/step-00000005", "AP", 2.0)
    assert train(other, run, "steps=6", "eval_images=1") == 0
    assert names(run / "aside-002") == ["best"]
    assert read_best(run)["checkpoint"] == "step-00000006"


def test_other_classes_are_named(run, data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path / "other")
    for path in (other / "annotations").glob("instances_*.json"):
        content = json.loads(path.read_text())
        content["categories"][1]["name"] = "gizmo"
        path.write_text(json.dumps(content))
    assert train(other, run, "steps=5", "--accept-changes") == 2
    error = one_line(capsys)
    assert "=gizmo (the run has " in error
    assert "state_dict" not in error


def test_a_fingerprint_sees_every_part_of_the_annotations(data, tmp_path):
    seen = {fingerprint(open_dataset(data, "train")), fingerprint(open_dataset(data, "val"))}

    def change(name, key, value):
        folder = shutil.copytree(data, tmp_path / f"{len(seen)}")
        path = folder / f"annotations/{name}_train2017.json"
        content = json.loads(path.read_text())
        entry = next(a for a in content["annotations"] if not a.get("iscrowd") and (key != "keypoints" or a[key]))
        entry[key] = value(entry[key])
        path.write_text(json.dumps(content))
        seen.add(fingerprint(open_dataset(folder, "train")))

    change("instances", "category_id", lambda number: number % 2 + 1)
    change("instances", "segmentation", lambda rings: [[x + 0.25 for x in ring] for ring in rings])
    change("instances", "area", lambda area: area / 2)
    change("person_keypoints", "keypoints", lambda values: [values[0] + 0.5, *values[1:]])
    change("captions", "caption", str.swapcase)
    assert len(seen) == 7
    copied = shutil.copytree(data, tmp_path / "copied")
    assert fingerprint(open_dataset(copied, "train")) in seen


def test_a_fingerprint_of_shards_is_that_of_their_bytes(data, tmp_path):
    pytest.importorskip("webdataset")
    dataset = open_dataset(data, "train")
    one, same, other = (
        write_shards(dataset, tmp_path / str(i), samples_per_shard=size) for i, size in enumerate((4, 4, 3))
    )
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_a_run_past_its_steps_says_so_and_ends(run, data, capsys):
    before = files(run)
    assert train(data, run, "steps=2") == 0
    assert "step 4 of 2" in capsys.readouterr().out
    assert files(run) == before


def test_a_checkpoint_of_an_earlier_release_resumes_but_not_as_another_model(run, data, capsys):
    for folder in list_checkpoints(run):
        (folder / "manifest.json").unlink()
        position = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(
            json.dumps({name: position[name] for name in ("step", "seconds", "skipped")})
        )
    assert train(data, run, "steps=5", "model.vocab.num_bins=31") == 2
    assert "model.vocab.num_bins=31 (the run has 32)" in one_line(capsys)
    assert train(data, run, "steps=5", "--task", "keypoint") == 2
    assert "tasks" in one_line(capsys)
    assert train(data, run, "steps=5", "lr=0.01") == 0
    assert names(run)[-1] == "step-00000005"


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(run, data, capsys):
    finished = files(run / "checkpoints/step-00000004")
    old_log = (run / "log.jsonl").read_text()
    mark_best(run, run / "checkpoints/step-00000004", "AP", 2.0)  # better than any
    arguments = ["steps=3", "lr=0.01", "--accept-changes"]
    assert train(data, run, *arguments, resume=run / "checkpoints/step-00000002") == 0
    assert "aside-001" in capsys.readouterr().out
    assert names(run) == ["best", "step-00000002", "step-00000003"]
    assert read_best(run)["checkpoint"] == "step-00000003"
    aside = run / "aside-001"
    assert names(aside) == ["best", "step-00000004"]
    assert files(aside / "checkpoints/step-00000004") == finished
    assert (aside / "log.jsonl").read_text() == old_log
    assert newest_checkpoint(run).name == "step-00000003"
    # The part that was set aside is a run: one can predict with it, and go on from it.
    Pix2Seq.from_pretrained(newest_checkpoint(aside))
    assert train(data, run, "steps=4", resume=aside) == 0
    assert names(run) == ["best", "step-00000004"]  # evaluated again, because the log is that of the other part
    assert names(run / "aside-002") == ["best", "step-00000002", "step-00000003"]


class CrashingRenames:
    """Stands for `Path.rename` in a process that dies at call `number`."""

    def __init__(self, number):
        self.number, self.calls = number, 0

    def __call__(self, path, target):
        self.calls += 1
        if self.calls == self.number:
            raise KeyboardInterrupt
        os.rename(path, target)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_crash_while_setting_aside_loses_and_mixes_nothing(tmp_path, monkeypatch, elsewhere):
    """After a crash at any rename, resuming again the same way ends with all checkpoints, old and new ones apart."""
    for number in range(1, 9):
        out = tmp_path / str(number)
        folders = save_steps(out, 1, 2, 3, 4)
        mark_best(out, folders[2], "AP", 0.5)
        (out / "log.jsonl").write_text("{}\n")
        resumed = save_steps(tmp_path / f"other-{number}", 2)[0] if elsewhere else folders[1]
        renames = CrashingRenames(number)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_module.Path, "rename", lambda path, target, go=renames: go(path, target))
            try:
                set_aside(out, resumed, 2)
            except KeyboardInterrupt:
                best = read_best(out)
                assert best is None or newest_checkpoint(out).name >= best["checkpoint"]
        set_aside(out, resumed, 2)
        kept = [] if elsewhere else ["step-00000001", "step-00000002"]
        assert names(out) == kept
        moved = [name for folder in sorted(out.glob("aside-*")) for name in names(folder)]
        assert sorted(moved) == sorted({"best", *(folder.name for folder in folders)} - set(kept))
        assert set_aside(out, resumed, 2) is None
        if renames.calls < number:
            break
    assert number > 3


def test_a_converted_checkpoint_cannot_be_resumed(run, data, tmp_path, capsys):
    plain = tmp_path / "plain"
    Pix2Seq.from_pretrained(newest_checkpoint(run)).save_pretrained(plain)
    assert train(data, tmp_path / "new", resume=plain) == 2
    assert "no training state" in one_line(capsys)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"step": -1, "seconds": 0}', '{"step": true, "seconds": 0}', '{"step": 2, "seconds": NaN}']
    + ['{"step": 2, "seconds": 0, "settings": 3}', "[" * 100_000, '{"step": 2.5, "seconds": 0}'],
)
def test_a_wrong_position_is_one_line(run, data, capsys, content):
    for folder in list_checkpoints(run):
        (folder / "manifest.json").unlink()
        (folder / "state.json").write_text(content)
    assert train(data, run, "steps=5") == 2
    assert "state.json" in one_line(capsys)


def test_all_files_of_a_checkpoint_have_one_mode(run):
    modes = {path.stat().st_mode for path in newest_checkpoint(run).iterdir() if path.name != "manifest.json"}
    assert len(modes) == 1


@pytest.fixture
def heeds_ctrl_c():
    """Sets Python's handler of SIGINT, which a process that was started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_after_sigterm_does_not_interrupt_the_save(heeds_ctrl_c):
    before = signal.getsignal(signal.SIGINT)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
    except KeyboardInterrupt:  # would end the whole session of pytest
        pytest.fail("Ctrl-C was not ignored")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)


def test_the_best_is_kept_before_the_log_says_that_its_step_was_evaluated(data, tmp_path, monkeypatch):
    """A run that dies between the two would else resume without its best."""
    real = Report.evaluation
    found = []

    def dying(self, state, result):
        found.append(read_best(tmp_path / "run"))
        if state.step == 2:
            raise KeyboardInterrupt
        real(self, state, result)

    monkeypatch.setattr(Report, "evaluation", dying)
    assert train(data, tmp_path / "run", "steps=2") == 130
    assert found[0]["checkpoint"] == "step-00000002"
    monkeypatch.setattr(Report, "evaluation", real)
    assert train(data, tmp_path / "run", "steps=2") == 0
    assert [line["step"] for line in log(tmp_path / "run") if line["kind"] == "eval"] == [2]
