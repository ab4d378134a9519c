"""The log of a run: one line per record, none twice, even after kills; and trackers."""

import json
import resource
import subprocess
import sys
import types

import pytest

from pix2seq.errors import InputError
from pix2seq.training.log import RunLog
from pix2seq.training.trackers import make_trackers


def read(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps(out, kind="train"):
    return [line["step"] for line in read(out) if line["kind"] == kind]


def write(out, first, last, **settings):
    with RunLog(out, trackers=(), **settings) as log:
        for step in range(first, last + 1):
            log.write(step, "train", {"loss": 1 / step})
            if step % 2 == 0:
                log.write(step, "eval", {"AP": step / 10, "AR": None})


def test_a_line_has_six_digits_and_null_for_undefined_values(tmp_path):
    with RunLog(tmp_path, trackers=()) as log:
        log.write(1, "train", {"loss": 0.123456789, "AP": None})
        log.event(2, "skipped", image_ids=[3, 4], reason="loss is nan")
    assert read(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 0.123457, "AP": None},
        {"step": 2, "kind": "skipped", "image_ids": [3, 4], "reason": "loss is nan"},
    ]


def test_a_resumed_run_reads_as_one(tmp_path):
    write(tmp_path / "unbroken", 1, 9)
    write(tmp_path / "broken", 1, 7)  # killed; its last checkpoint is from step 4
    write(tmp_path / "broken", 5, 9, start=4)
    assert read(tmp_path / "broken") == read(tmp_path / "unbroken")
    assert steps(tmp_path / "broken") == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_the_log_knows_the_last_evaluation(tmp_path):
    write(tmp_path, 1, 5)
    done = steps(tmp_path, "eval")
    for start in range(6):
        with RunLog(tmp_path / "new", start=start, trackers=()) as log:
            assert log.evaluated == 0
    for start in (5, 4, 3, 2, 1, 0):
        with RunLog(tmp_path, start=start, trackers=()) as log:
            assert log.evaluated == max((step for step in done if step <= start), default=0)


def test_a_run_from_step_0_drops_the_log_of_a_run_that_saved_nothing(tmp_path):
    write(tmp_path, 1, 3)
    write(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_torn_last_line_is_dropped(tmp_path, start):
    write(tmp_path, 1, 6)
    content = (tmp_path / "log.jsonl").read_bytes()
    for cut in range(len(content) - 120, len(content) + 1):  # the last two and a half lines
        (tmp_path / "log.jsonl").write_bytes(content[:cut])
        expected = [line for line in content[:cut].split(b"\n")[:-1] if json.loads(line)["step"] <= start]
        with RunLog(tmp_path, start=start, trackers=()) as log:
            log.write(7, "train", {"loss": 1.0})
        assert (tmp_path / "log.jsonl").read_bytes().split(b"\n")[:-2] == expected
        assert read(tmp_path)[-1] == {"step": 7, "kind": "train", "loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_reported_in_one_line_and_keeps_earlier_lines(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, trackers=()) as log:
        log.write(1, "train", {"loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 10, hard))
        try:
            with pytest.raises(InputError, match=r"disk full at .* while logging step 2") as caught:
                log.write(2, "train", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    with RunLog(tmp_path, start=2, trackers=()):
        assert steps(tmp_path) == [1]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer.event_file_writer import AtomicCounter

    # Files of one second are read in the order of this number as text, and 10 would come before 9.
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write(step, "train", {"loss": float(step)})
    with RunLog(tmp_path, start=2) as log:
        for step in (3, 4, 5):
            log.write(step, "train", {"loss": 10.0 * step})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


class FakeRun:
    """Stands for the result of `wandb.init` and `trackio.init`."""

    def __init__(self, settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch):
    module = types.ModuleType(request.param)
    module.runs = []

    def init(**settings):
        module.runs.append(FakeRun(settings))
        return module.runs[-1]

    module.init, module.finish = init, lambda: module.runs[-1].finish()
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_a_tracker_gets_numbers_by_kind_and_a_resumed_run_continues_it(tmp_path, fake):
    name = fake.__name__
    with RunLog(tmp_path, trackers=(name,), config={"lr": 0.1}) as log:
        log.write(1, "train", {"loss": 0.5, "AP": None})
        log.write(1, "eval", {"AP": 0.25})
        log.event(1, "skipped", image_ids=[1])
    with RunLog(tmp_path, trackers=(name,), start=1):
        pass
    first, second = fake.runs
    assert first.logged == [(1, {"train/loss": 0.5}), (1, {"eval/AP": 0.25})]
    assert first.finished
    assert second.finished
    assert first.settings["config"] == {"lr": 0.1}
    key = "id" if name == "wandb" else "name"
    assert first.settings[key] == second.settings[key]
    assert second.settings["resume"] == "allow"
    if name == "wandb":
        assert first.settings["mode"] == "offline"
    assert not (tmp_path / "tensorboard").exists()


def test_an_unknown_or_missing_tracker_is_reported_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        make_trackers(["tensorbord"], tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(InputError, match="pip install wandb") as caught:
        make_trackers(["wandb"], tmp_path)
    assert "\n" not in str(caught.value)


ALLOCATE_200_MB = """
from pix2seq.training.memory import memory_mb
before = memory_mb()["memory_mb"]
block = bytearray(200_000_000)
block[::4096] = b"x" * len(block[::4096])
print(before, memory_mb()["memory_mb"])
"""


def test_reported_memory_grows_by_what_is_allocated():
    # In its own process, because this one may free memory of earlier tests.
    printed = subprocess.run([sys.executable, "-c", ALLOCATE_200_MB], capture_output=True, text=True, check=True).stdout
    before, after = map(float, printed.split())
    assert before > 50
    if sys.platform.startswith("linux"):
        assert after - before == pytest.approx(200, abs=30)
