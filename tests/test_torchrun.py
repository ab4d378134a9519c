"""`torchrun -m pix2seq.cli train`: a run resumes with any number of processes, with DDP or FSDP."""

import json
import shutil
import signal
import subprocess
import sys
import time

import dying
import torch
from forked import run_ranks
from safetensors.torch import load_file
from test_kill import arguments

from pix2seq.cli import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pix2seq.cli"]
# Without dropout and warm-up, which depend on the number of processes and of steps.
PLAIN = ["model.encoder.drop_path=0", "model.decoder.dropout=0", "model.decoder.drop_path=0"]
PLAIN += ["schedule.name=none", "schedule.warmup_steps=0", "lr=1e-4", "eval_every=0", "num_workers=0"]


def settings(shapes, out, *more):
    return arguments(shapes, out, *PLAIN, *more)


def last_step(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return max(line["step"] for line in lines if line["kind"] == "train")


def test_a_run_resumes_with_other_numbers_of_processes(shapes, tmp_path):
    """Two processes with DDP until SIGTERM, then two with FSDP, then one, compared with one process after SIGTERM."""
    out, plain = tmp_path / "run", tmp_path / "plain"
    command = [*TORCHRUN, "train", *settings(shapes, out, "steps=100000", "checkpoint_every=100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or "train" not in (out / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[1]
    assert process.returncode != 0
    assert "stopped by SIGTERM after step" in said
    (stopped,) = (out / "checkpoints").iterdir()
    step = int(stopped.name.removeprefix("step-"))
    assert step == last_step(out)
    shutil.copytree(out, plain)

    run_ranks(dying.train, settings(shapes, out, f"steps={step + 2}", "parallel=fsdp"), folder=tmp_path)
    sharded = out / "checkpoints" / f"step-{step + 2:08d}"
    assert len(list((sharded / "state").iterdir())) == 2
    assert not (sharded / "state.safetensors").exists()
    assert all(path.suffix in (".json", ".safetensors") for path in sharded.rglob("*") if path.is_file())
    for folder in (out, plain):
        assert main(["train", *settings(shapes, folder, f"steps={step + 4}")]) == 0
    name = f"checkpoints/step-{step + 4:08d}/model.safetensors"
    ours, theirs = load_file(out / name), load_file(plain / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():  # losing Adam's moments would move weights by 1e-4 per step
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=3e-5)
