"""What a run survives or refuses: pickles, a second run, the network, full and read-only disks."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_run import tiny_state

from pix2seq import Pix2Seq, convert_checkpoint
from pix2seq.cli import main
from pix2seq.errors import InputError
from pix2seq.files import MANIFEST_FILE, find_damage, write_manifest
from pix2seq.model.pretrained import list_checkpoints, newest_checkpoint
from pix2seq.training.checkpoint import load_checkpoint
from pix2seq.training.run_lock import run_lock

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "steps=2", "batch_size=2", "checkpoint_every=1", "log_every=1", "num_workers=0", "eval_batch_size=4",
    "device=cpu", "schedule.warmup_steps=1", "model.image_size=[32,32]", "model.encoder.name=vit",
    "model.encoder.stem=patch", "model.encoder.dim=8", "model.encoder.num_layers=1", "model.encoder.num_heads=2",
    "model.encoder.mlp_dim=8", "model.decoder.dim=8", "model.decoder.num_layers=1", "model.decoder.num_heads=2",
    "model.decoder.mlp_dim=8", "model.decoder.max_seq_len=64", "model.vocab.num_bins=32", "model.vocab.size=1040",
    "detection.max_objects=5", "detection.noise_objects=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("safety") / "run"
    assert main(["train", f"data={shapes}", f"out={out}", *TINY]) == 0
    return out


def one_line(text):
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def evil(tmp_path):
    """A pickle; fails at the end if somebody has unpickled it."""
    mark = tmp_path / "executed"
    content = pickle.dumps(Evil(mark))
    pickle.loads(content).close()
    assert mark.exists()
    mark.unlink()
    yield content
    assert not mark.exists()


@pytest.fixture
def poisoned(run, tmp_path):
    """A copy of the run without manifests, which would reveal a changed file."""
    folder = tmp_path / "poisoned"
    shutil.copytree(run, folder)
    for path in folder.rglob(MANIFEST_FILE):
        path.unlink()
    return folder


def test_a_pickle_instead_of_the_weights_is_not_opened(evil, poisoned, shapes, tmp_path, capsys):
    folder = list_checkpoints(poisoned)[-1]
    (folder / "model.safetensors").write_bytes(evil)
    (folder / "pytorch_model.bin").write_bytes(evil)
    (tmp_path / "model.pt").write_bytes(evil)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        Pix2Seq.from_pretrained(folder)
    image = str(next((shapes / "val2017").iterdir()))
    for command in (
        ["predict", image, "--checkpoint", str(folder), "--out", str(tmp_path / "out")],
        ["eval", "--data", str(shapes), "--checkpoint", str(folder)],
        ["train", f"data={shapes}", f"out={tmp_path / 'new'}", *TINY, f"init={folder}"],
        ["train", f"data={shapes}", f"out={poisoned}", *TINY, "--resume", str(folder)],
        ["predict", image, "--checkpoint", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out")],
        ["predict", image, "--checkpoint", str(folder / "pytorch_model.bin"), "--out", str(tmp_path / "out")],
        ["train", f"data={shapes}", f"out={tmp_path / 'new'}", *TINY, f"init={tmp_path / 'model.pt'}"],
        ["train", f"data={shapes}", f"out={poisoned}", *TINY, "--resume", str(tmp_path / "model.pt")],
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        one_line(capsys.readouterr().err)
    for path in folder.parent.iterdir():
        (path / "model.safetensors").write_bytes(evil)
    assert main(["train", f"data={shapes}", f"out={poisoned}", *TINY, "--resume", "auto"]) == 2
    assert "are damaged" in one_line(capsys.readouterr().err)


def test_a_pickle_instead_of_the_state_is_not_opened(evil, poisoned):
    folder = list_checkpoints(poisoned)[-1]
    (folder / "state.safetensors").write_bytes(evil)
    with pytest.raises(InputError, match=r"state\.safetensors cannot be read"):
        load_checkpoint(tiny_state(), folder)
    write_manifest(folder)  # an attacker can also write a matching manifest
    with pytest.raises(InputError, match="cannot resume from"):
        load_checkpoint(tiny_state(), folder)


def test_a_pickle_instead_of_a_tensorflow_checkpoint_is_not_opened(evil, tmp_path):
    for name in ("ckpt-1.index", "ckpt-1.data-00000-of-00001", "model.pt", "model.bin"):
        (tmp_path / name).write_bytes(evil)
    for prefix in ("ckpt-1", "model.pt", "model.bin"):
        with pytest.raises(InputError) as caught:
            convert_checkpoint(tmp_path / prefix, "resnet_640_obj365", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


HOLD = """
import sys, time
from pathlib import Path
from pix2seq.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(out):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    out = tmp_path / "run"
    holder = start_holder(out)
    try:
        with pytest.raises(InputError, match=rf"in use by process {holder.pid} on {os.uname().nodename}") as caught:
            run_lock(out).__enter__()
        assert "\n" not in str(caught.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(2):
        with run_lock(out), pytest.raises(InputError, match=f"process {os.getpid()} on"), run_lock(out):
            pass


def hold_and_fork(out, pipe):
    context = multiprocessing.get_context("fork")
    with run_lock(out):
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        pipe.send(worker.pid)
        time.sleep(60)


def test_workers_that_outlive_a_killed_run_do_not_lock_its_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=hold_and_fork, args=(tmp_path, theirs))
    child.start()
    worker = ours.recv()
    try:
        with pytest.raises(InputError, match="in use"):
            run_lock(tmp_path).__enter__()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        os.kill(worker, 0)  # is still running
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_disk_without_locks_gets_a_pid_file_that_a_dead_process_does_not_hold(tmp_path, monkeypatch):
    import errno
    import fcntl

    def unsupported(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_lock(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), run_lock(tmp_path):
        pass
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    content = {"pid": dead.pid, "host": os.uname().nodename}
    (tmp_path / ".lock.pid").write_text(json.dumps(content))
    with run_lock(tmp_path):
        pass
    (tmp_path / ".lock.pid").write_text(json.dumps(content | {"host": "elsewhere"}))
    with pytest.raises(InputError, match=rf"on elsewhere .*remove {tmp_path}/\.lock\.pid"), run_lock(tmp_path):
        pass


COMMANDS = """
import sys
from pathlib import Path

import pix2seq.demo
from pix2seq.cli import main
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.vocab import Vocab

out, *tiny = sys.argv[1:]
pix2seq.demo.NUM_TRAIN, pix2seq.demo.NUM_VAL = 4, 2
assert main(["demo", "--train", "--out", out, *tiny]) == 0  # makes data, trains, evaluates and predicts
assert main(["demo", "--checkpoint", f"{out}/run", "--images", "3", "--out", out]) == 0
data, image = f"{out}/shapes", str(next(Path(out, "shapes/val2017").iterdir()))
assert main(["train", f"data={data}", f"out={out}/again", *tiny, "num_workers=1"]) == 0
for command in (["eval", "--data", data], ["predict", image, "--out", f"{out}/p"]):
    assert main([*command, "--checkpoint", f"{out}/again"]) == 0
# A model with an encoder that timm could download: opening it needs only its own files.
model = build_model(
    ModelConfig(
        image_size=(32, 32),
        encoder=EncoderConfig(name="test_vit", pretrained=True),
        decoder=DecoderConfig(dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_seq_len=64),
        vocab=Vocab(num_bins=32, size=1040),
    ),
    load_pretrained=False,
)
model.save_pretrained(f"{out}/timm")
pix2seq.Pix2Seq.from_pretrained(f"{out}/timm")
print("done")
"""


def without_network(tmp_path, *command):
    """Run Python without network access. Returns the finished process and the log of attempts to use the network."""
    log = tmp_path / "network.txt"
    paths = [str(ROOT / "tests" / "no_network"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"NETWORK_LOG": str(log), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("NO_ALBUMENTATIONS_UPDATE", None)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)
    return done, log.read_text() if log.exists() else ""


def test_the_network_block_logs_a_request_even_if_its_error_is_swallowed(tmp_path):
    request = "import urllib.request as u\ntry: u.urlopen('http://192.0.2.1/')\nexcept OSError: print('swallowed')"
    done, attempts = without_network(tmp_path, "-c", request)
    assert done.stdout == "swallowed\n"
    assert "192.0.2.1" in attempts
    done, attempts = without_network(tmp_path, "-c", "import socket; socket.socket().connect(('192.0.2.2', 80))")
    assert "may not use the network" in done.stderr
    assert "socket.connect" in attempts


def test_train_eval_predict_and_demo_make_no_network_call(tmp_path):
    done, attempts = without_network(tmp_path, "-c", COMMANDS, str(tmp_path / "demo"), *TINY)
    assert attempts == ""
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr[-3000:]


def on_a_small_disk(tmp_path, size, script):
    """Run a Python script in its own mount namespace, beside a folder `disk` on a disk of `size` bytes."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    mount = f"mount -t tmpfs -o size={size} tmpfs disk"
    probe = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], cwd=tmp_path, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"mounts are not allowed here: {probe.stderr.strip()}")
    command = f'{mount} && exec "$0" script.py'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])},
    )


needs_unshare = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")


@needs_unshare
def test_a_full_or_read_only_disk_ends_a_run_in_one_line_and_it_resumes_later(tmp_path, shapes):
    done = on_a_small_disk(
        tmp_path,
        "2m",
        f"""
        import shutil, subprocess, sys
        from pathlib import Path
        import pix2seq.training.checkpoint as checkpoint
        from pix2seq.cli import main

        def names():
            return sorted(path.name for path in Path("disk/run/checkpoints").iterdir())

        train = ["train", "data={shapes}", "out=disk/run", *{TINY!r}, "steps=4", "--resume", "auto"]
        Path("disk/ballast").write_bytes(bytes(600_000))
        assert main(train) == 2
        kept = names()
        assert kept == ["step-00000001"], kept
        Path("disk/more").write_bytes(bytes(shutil.disk_usage("disk").free - 150_000))
        checkpoint.free_bytes = lambda path: 1 << 40  # as if nobody had checked before
        assert main(train) == 2
        assert names() == kept
        subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
        assert main(train) == 2
        assert names() == kept
        subprocess.run(["mount", "-o", "remount,rw,size=64m", "disk"], check=True)
        assert main(train) == 0
        assert names()[-1] == "step-00000004"
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    before, halfway, read_only = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for error in (before, halfway):
        assert "disk full at disk/run while saving step 2" in error
        assert "bytes needed" in error
    assert "folder disk/run is read-only" in read_only
    assert "from step 1" in done.stdout


@needs_unshare
def test_read_only_outputs_are_refused_before_the_work(tmp_path):
    done = on_a_small_disk(
        tmp_path,
        "1m",
        """
        import subprocess
        from pathlib import Path
        from pix2seq.errors import InputError
        from pix2seq.files import output_file, output_folder
        from pix2seq.training.run_lock import run_lock

        Path("disk/old.json").write_text("")
        Path("fixed.json").write_text("")
        subprocess.run(["mount", "--bind", "disk/old.json", "fixed.json"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", "fixed.json"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
        for open_output in (output_folder, lambda path: run_lock(path).__enter__()):
            for path in ("disk", "disk/new"):
                try:
                    open_output(Path(path))
                except InputError as error:
                    print(error)
        for path in ("disk/new.json", "disk/old.json", "fixed.json"):
            try:
                output_file(Path(path))
            except InputError as error:
                print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7
    assert all("give another" in line for line in done.stdout.splitlines())


def test_resume_skips_a_checkpoint_with_a_flipped_bit(run, shapes, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    first, second = list_checkpoints(out)
    content = bytearray((second / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (second / "state.safetensors").write_bytes(content)
    assert main(["train", f"data={shapes}", f"out={out}", *TINY, "--resume", str(second)]) == 2
    assert "step-00000002 is damaged: state.safetensors" in one_line(capsys.readouterr().err)
    assert main(["train", f"data={shapes}", f"out={out}", *TINY, "--resume", "auto"]) == 0
    captured = capsys.readouterr()
    assert "step-00000002 is damaged and skipped" in captured.err
    assert "from step 1" in captured.out
    assert newest_checkpoint(out) == second
    assert find_damage(first) is None
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2]
