"""A run that is killed anywhere and resumed ends with the same bits as an undisturbed one."""

import json
import os
import random
import signal
import time

import dying
import pytest
from forked import forked

SETTINGS = [
    *(
        "steps=8",
        "batch_size=4",
        "accumulate=2",
        "checkpoint_every=3",
        "eval_every=4",
        "eval_batch_size=2",
        "log_every=1",
    ),
    *("bf16=false", "device=cpu", "trackers=[]", "model.image_size=[32,32]", "model.encoder.name=vit"),
    *("model.encoder.stem=conv", "model.encoder.stem_blocks=0", "model.encoder.dim=32", "model.encoder.num_layers=1"),
    *("model.encoder.num_heads=2", "model.encoder.mlp_dim=32", "model.encoder.drop_path=0.2"),
    *("model.decoder.dim=32", "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=32"),
    *("model.decoder.max_seq_len=32", "model.decoder.dropout=0.1", "model.vocab.num_bins=32", "model.vocab.size=1100"),
    *("detection.max_objects=4", "detection.noise_objects=1"),
]
# How, where and at which call a run is killed, by its number of workers; a step has two micro-batches. Each run resumes
# from what the previous one saved. Each signal comes at each point, with workers or without.
KILLS = {
    0: [
        (signal.SIGKILL, "between micro-batches", 3),
        (signal.SIGTERM, "saving", 1),
        (signal.SIGKILL, "evaluating", 2),
        (signal.SIGTERM, "waiting for data", 1),
        (signal.SIGKILL, "updating weights", 1),
    ],
    2: [
        (signal.SIGTERM, "between micro-batches", 3),
        (signal.SIGKILL, "saving", 1),
        (signal.SIGTERM, "evaluating", 2),
        (signal.SIGKILL, "waiting for data", 4),
        (signal.SIGTERM, "updating weights", 1),
        (signal.SIGKILL, "saving", 2),
    ],
}


def arguments(shapes, out, *more):
    return ["--resume", "auto", f"data={shapes}", f"out={out}", *SETTINGS, *more]


def exit_code(process):
    process.start()
    process.join(600)
    assert not process.is_alive()
    return process.exitcode


def outcome(out):
    """Return the final weights, raw and averaged, and every number in the log that does not depend on time."""
    folder = out / "checkpoints" / "step-00000008"
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "state.safetensors")}
    timing = ("images_per_second", "minutes", "minutes_left", "data_wait_share", "memory_mb")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return files, [{name: value for name, value in line.items() if name not in timing} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert exit_code(forked(dying.train, arguments(shapes, out, "num_workers=0"))) == 0
    files, log = outcome(out)
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in log if line["kind"] == "eval"] == [4, 8]
    return files, log


@pytest.mark.parametrize("num_workers", KILLS)
def test_a_run_that_is_killed_anywhere_resumes_to_the_same_result(shapes, undisturbed, tmp_path, num_workers):
    options = arguments(shapes, tmp_path / "run", f"num_workers={num_workers}")
    for signum, point, call in KILLS[num_workers]:
        expected = -signal.SIGKILL if signum == signal.SIGKILL else 128 + signal.SIGTERM
        assert exit_code(forked(dying.train, options, point, call, signum)) == expected, point
    assert exit_code(forked(dying.train, options)) == 0
    files, log = outcome(tmp_path / "run")
    assert log == undisturbed[1]
    assert files == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_twenty_deaths_at_random_instructions_change_nothing(shapes, undisturbed, tmp_path, num_workers):
    """Runs die until 20 have died; each that comes to its end, however often it died before, has the same result."""
    rng = random.Random(num_workers)
    deaths = finished = 0
    while deaths < 20 or not finished:
        out = tmp_path / f"run-{finished}"
        options = arguments(shapes, out, f"num_workers={num_workers}", "checkpoint_every=1")
        code = exit_code(forked(dying.train_for, options, rng.uniform(0.05, 2.0)))
        assert code in (0, -signal.SIGPROF)
        if code == 0:
            files, log = outcome(out)
            assert log == undisturbed[1]
            assert files == undisturbed[0]
            finished += 1
        deaths += code != 0
    print(f"{deaths} deaths, {finished} finished runs")


@pytest.mark.parametrize("point", dying.KILL_POINTS)
def test_sigterm_saves_the_step_it_comes_in(shapes, tmp_path, point):
    call = {"between micro-batches": 9, "updating weights": 5, "waiting for data": 9}.get(point, 1)
    options = arguments(shapes, tmp_path / "run", "num_workers=0", "checkpoint_every=4")
    child = forked(dying.train, options, point, call, signal.SIGTERM)
    assert exit_code(child) == 128 + signal.SIGTERM
    # Step 5 if the signal comes while it runs; step 4 if it waits for data, or while step 4 is evaluated or saved.
    step = 5 if point in ("between micro-batches", "updating weights") else 4
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"))[-1] == f"step-{step:08d}"


def test_sigterm_does_not_wait_for_data_that_hangs(shapes, tmp_path):
    options = arguments(shapes, tmp_path / "run", "num_workers=1", "seed=3")
    hanging = tmp_path / "hanging"
    child = forked(dying.train_with_a_hanging_image, options, 0, hanging)
    child.start()
    while not hanging.exists():
        assert child.is_alive()
        time.sleep(0.1)
    time.sleep(1)  # until the run waits for that image, too
    os.kill(child.pid, signal.SIGTERM)
    child.join(300)
    assert child.exitcode == 128 + signal.SIGTERM
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 1
