"""Checkpoints: bit-exact, complete or absent, verified, rotated, and safe from a crash at any point."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import assert_at_step, set_step, tiny_state

from pix2seq import Pix2Seq
from pix2seq.errors import InputError
from pix2seq.files import find_damage
from pix2seq.model.pretrained import find_checkpoint, list_checkpoints, newest_checkpoint
from pix2seq.training.checkpoint import load_checkpoint, mark_best, read_best, save_checkpoint, take_snapshot

FILES = ("config.json", "model.safetensors", "state.json", "state.safetensors")


def save_steps(out, *steps, keep=10):
    state = tiny_state()
    folders = []
    for step in steps:
        set_step(state, step)
        folders.append(save_checkpoint(state, out, keep=keep))
    return folders


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def flip_a_bit(path, seed=0):
    content = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(len(content))
    content[position] ^= 1 << seed % 8
    path.write_bytes(content)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_is_restored_to_the_bit(tmp_path, ema):
    state = tiny_state(7, ema=ema)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    folder = save_checkpoint(state, tmp_path, keep=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    other = tiny_state(1, ema=ema)
    load_checkpoint(other, folder)
    assert_at_step(other, 7)
    weights = Pix2Seq.from_pretrained(folder).state_dict()
    assert all((tensor == (7.5 if ema else 7)).all() for tensor in weights.values())


@pytest.mark.parametrize("chosen", [None, False, True])
def test_the_choice_of_threads_is_restored(tmp_path, chosen):
    state = tiny_state(7)
    state.one_thread = chosen
    other = tiny_state(1)
    other.one_thread = not chosen
    load_checkpoint(other, save_checkpoint(state, tmp_path, keep=1))
    assert other.one_thread is chosen


def test_a_checkpoint_without_a_manifest_opens(tmp_path):
    (folder,) = save_steps(tmp_path, 8)
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "state.safetensors")
    tensors["rng/cpu"] = torch.get_rng_state()  # older checkpoints contain it
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text('{"step": 8, "seconds": 4.0}')
    state = tiny_state(1)
    load_checkpoint(state, find_checkpoint(tmp_path))
    assert (state.step, state.seconds, state.skipped) == (8, 4.0, 0)
    with (folder / "state.safetensors").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"damaged: state\.safetensors"):
        load_checkpoint(state, folder)


def test_a_snapshot_shares_its_tensors_with_the_run():
    state = tiny_state(1)
    snapshot = take_snapshot(state)
    live = {tensor.data_ptr() for tensor in [*state.model.state_dict().values(), *state.ema.weights.values()]}
    live |= {tensor.data_ptr() for values in state.optimizer.state.values() for tensor in values.values()}
    assert all(tensor.data_ptr() in live for tensor in snapshot.tensors.values())
    assert all(tensor.data_ptr() in live for tensor in snapshot.weights.values())


def test_the_manifest_holds_size_and_sha256_of_every_file(tmp_path):
    (folder,) = save_steps(tmp_path, 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert tuple(files) == FILES
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("damage", ["bit", "short", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_reported_refused_and_skipped(tmp_path, capsys, name, damage):
    old, new = save_steps(tmp_path, 1, 2)
    path = new / name
    if damage == "bit":
        flip_a_bit(path)
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert name in find_damage(new)
    with pytest.raises(InputError, match=rf"damaged: {name}") as caught:
        load_checkpoint(tiny_state(), new)
    one_line(caught)
    assert newest_checkpoint(tmp_path) == old
    # A folder without config.json is not a checkpoint; any other damage is reported.
    assert ("step-00000002 is damaged" in capsys.readouterr().err) == ((name, damage) != ("config.json", "gone"))
    if name in ("config.json", "model.safetensors"):  # the files that prediction reads
        assert find_checkpoint(tmp_path) == old
        if damage != "gone":
            with pytest.raises(InputError, match="damaged"):
                find_checkpoint(new)
    else:
        assert find_checkpoint(tmp_path) == new
    flip_a_bit(old / "model.safetensors")
    flip_a_bit(new / "manifest.json", seed=1)
    with pytest.raises(InputError, match=r"all \d checkpoints .* are damaged"):
        newest_checkpoint(tmp_path)


def test_a_copy_on_another_disk_verifies(tmp_path):
    (folder,) = save_steps(tmp_path, 3)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # with new modification times
    assert find_damage(copy, quick=True) is None
    flip_a_bit(copy / "state.safetensors")
    assert find_damage(copy, quick=True) is not None


def test_the_newest_are_kept_without_counting_damaged_ones(tmp_path):
    folders = save_steps(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    flip_a_bit(folders[2] / "state.safetensors")
    save_steps(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    save_steps(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_run_resumed_from_an_older_step_keeps_what_it_saves(tmp_path):
    save_steps(tmp_path, 1, 2, 9)
    save_steps(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000009"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "average", "optimizer"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, where, bad):
    save_steps(tmp_path, 1, keep=1)
    state = tiny_state(2)
    with torch.no_grad():
        parameter = state.model.decoder.token_embedding.weight
        tensors = {
            "weights": parameter,
            "average": state.ema.weights["decoder.token_embedding.weight"],
            "optimizer": state.optimizer.state[parameter]["exp_avg_sq"],
        }
        tensors[where][-1, -1] = bad
    with pytest.raises(InputError, match="not finite at step 2") as caught:
        save_checkpoint(state, tmp_path, keep=1)
    one_line(caught)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("links", [True, False])
def test_the_best_stays_when_its_step_is_rotated_out(tmp_path, monkeypatch, links):
    if not links:

        def refuse(self, target):
            raise OSError("no hard links")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    for step, value, won in ((1, 0.5, True), (2, 0.4, False), (3, float("nan"), False), (4, None, False)):
        (folder,) = save_steps(tmp_path, step, keep=1)
        assert mark_best(tmp_path, folder, "AP", value) is won
    assert names(tmp_path) == ["best", "step-00000004"]
    best = tmp_path / "checkpoints" / "best"
    assert read_best(tmp_path) == {"checkpoint": "step-00000001", "metric": "AP", "value": 0.5}
    state = tiny_state()
    load_checkpoint(state, find_checkpoint(best))
    assert_at_step(state, 1)
    assert (Pix2Seq.from_pretrained(best).decoder.token_embedding.weight == 1.5).all()
    assert mark_best(tmp_path, folder, "AP", 0.5) is False
    assert mark_best(tmp_path, folder, "AP", 0.6) is True
    assert mark_best(tmp_path, folder, "loss", 3.0, higher_is_better=False) is True
    assert mark_best(tmp_path, folder, "loss", 4.0, higher_is_better=False) is False
    assert mark_best(tmp_path, folder, "loss", 2.0, higher_is_better=False) is True
    assert read_best(tmp_path) == {"checkpoint": "step-00000004", "metric": "loss", "value": 2.0}
    assert names(tmp_path) == ["best", "step-00000004"]
    assert list_checkpoints(tmp_path) == [folder]


def test_a_damaged_best_is_replaced(tmp_path):
    first, second = save_steps(tmp_path, 1, 2)
    assert mark_best(tmp_path, first, "AP", 0.9)
    flip_a_bit(tmp_path / "checkpoints/best/model.safetensors")
    assert mark_best(tmp_path, second, "AP", 0.1)
    assert find_damage(tmp_path / "checkpoints/best") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_every_file_is_on_the_disk_before_its_folder_is_renamed(tmp_path, monkeypatch):
    calls = []
    rename, fsync = Path.rename, os.fsync

    def recorded_rename(self, target):
        calls.append(f"rename {self.name} {target.name}")
        return rename(self, target)

    def recorded_fsync(descriptor):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    (folder,) = save_steps(tmp_path, 1)
    renamed = calls.index("rename .partial-step-00000001 step-00000001")
    assert {*FILES, ".partial-manifest.json", ".partial-step-00000001"} <= set(calls[:renamed])
    assert "checkpoints" in calls[renamed:]
    calls.clear()
    mark_best(tmp_path, folder, "AP", 0.5)
    renamed = calls.index("rename .partial-best best")
    assert {*FILES, "manifest.json", "best.json", ".partial-best"} <= set(calls[:renamed])
    assert "checkpoints" in calls[renamed:]


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_at(monkeypatch, number):
    """Raise at rename, mkdir or rmtree call number `number` and after it. Returns the list of calls."""
    calls = []

    def dying(real):
        def call(*args, **kwargs):
            calls.append(real.__name__)
            if len(calls) == number and real.__name__ == "rmtree" and Path(args[0]).is_dir():
                max(Path(args[0]).iterdir()).unlink()  # remove half of the folder
            if len(calls) >= number:
                raise Crash
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    return calls


@pytest.mark.parametrize("step", [4, 5])  # replaces a checkpoint, and adds one
def test_a_crash_at_any_call_loses_nothing(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and a process crash does not need it
    for number in range(1, 100):
        out = tmp_path / str(number)
        folders = save_steps(out, 3, 4)
        assert mark_best(out, folders[0], "AP", 0.1)
        state = tiny_state(step)
        state.seconds = -1.0
        with monkeypatch.context() as patched:
            calls = crash_at(patched, number)
            try:
                folder = save_checkpoint(state, out, keep=2)
                mark_best(out, folder, "AP", 0.2)
            except Crash:
                crashed = True
            else:
                crashed = False
        restored = tiny_state()
        assert {find_damage(folder) for folder in list_checkpoints(out)} == {None}
        newest = newest_checkpoint(out)
        load_checkpoint(restored, newest)
        if restored.seconds == -1.0:
            restored.seconds = step / 2
            assert_at_step(restored, step)
        else:
            assert_at_step(restored, 4)
        load_checkpoint(restored, find_checkpoint(out / "checkpoints" / "best"))
        assert restored.step in (3, step)
        save_steps(out, 6, keep=1)  # also removes the leftovers
        assert mark_best(out, newest_checkpoint(out), "AP", 0.3)
        assert names(out) == ["best", "step-00000006"]
        if not crashed:
            break
    assert number > 8, calls


def save_forever(out, pipe):
    torch.set_num_threads(1)
    state = tiny_state()
    found = list_checkpoints(out)
    step = int(found[-1].name[-8:]) if found else 0
    pipe.send(step)
    while True:
        step += 1
        set_step(state, step)
        for _ in range(2):  # the second replaces the first
            folder = save_checkpoint(state, out, keep=2)
        mark_best(out, folder, "AP", float(step))
        pipe.send(step)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_save_leaves_the_last_finished_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    state = tiny_state()
    marked = 0
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=save_forever, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        done = ours.recv()
        for _ in range(rng.randrange(3)):
            done = marked = ours.recv()
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        try:
            while True:
                done = marked = ours.recv()
        except EOFError:
            pass
        for folder in list_checkpoints(tmp_path):
            assert find_damage(folder) is None
        newest = newest_checkpoint(tmp_path)
        if newest is None:
            assert done == 0
            continue
        load_checkpoint(state, newest)
        assert_at_step(state, state.step)
        assert state.step in (done, done + 1)
        if marked:
            load_checkpoint(state, find_checkpoint(tmp_path / "checkpoints" / "best"))
            assert_at_step(state, state.step)
            assert marked <= state.step <= done + 1
    assert marked > 0


def test_a_disk_with_too_little_space_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, keep=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("pix2seq.training.checkpoint.write_checkpoint", None)  # a call would raise TypeError
    with pytest.raises(InputError, match=r"disk full at .* while saving step 2: \d+ bytes needed, 1000 free") as caught:
        save_checkpoint(tiny_state(2), tmp_path, keep=1)
    assert "--resume auto" in one_line(caught)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("limit", [0, 100, 20_000, 200_000])  # in the middle of each file
def test_a_write_that_fails_halfway_keeps_the_older_checkpoints(tmp_path, limit):
    (folder,) = save_steps(tmp_path, 1, keep=1)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert max(sizes) > limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = tiny_state(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match=r"disk full at .* while saving step 2") as caught:
            save_checkpoint(state, tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(caught)
    assert names(tmp_path) == ["step-00000001"]
    assert find_damage(folder) is None
    save_checkpoint(state, tmp_path, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="cannot be written while saving step 2") as caught:
        save_checkpoint(tiny_state(2), tmp_path, keep=1)
    one_line(caught)
