"""Training speed of this project in float32 and bf16, against the usual form of earlier PyTorch implementations.

    python benchmarks/train.py [--steps 5] [--threads 2] [--json]

- `ours` is `train_step` with DeiT-small at 384 pixels and a decoder with 6 layers, width 256, 8 heads, feed-forward
  2048 and vocabulary 3000, in float32 and with bf16 autocast; dropout and stochastic depth have their defaults.
- `baseline` has the same encoder and decoder sizes in the usual form: timm's DeiT, a post-norm
  `nn.TransformerDecoder`, float32, every sequence padded to 300 tokens, logits at every position, cross entropy that
  ignores padding, and AdamW with its defaults.
- `ours, 100 objects` trains as configs/detection_coco.yaml does, on sequences filled with noise objects up to 100
  objects, 501 tokens in all. The baseline has no such row, because its sequences end at 300 tokens.

All rows but the last use the same sequences: the objects of an image and an end token, without noise objects. The
number of objects is drawn with a seed from COCO's distribution (`OBJECTS`); longer sequences are cut at 300 tokens.
Pixels are noise, and reading images is not measured. Each contestant runs in its own process. They take turns: one
warm-up step and one timed step of 8 images each. Medians are reported. `x baseline` is the median over turns of the
ratio of wall times, and `CPU` of CPU times; prefer `CPU` if others use the machine. Peak memory is that of the
process. Stages are shares of a separately timed step.

With a GPU, ViT-B at 640 pixels is trained too: images/s, memory, and the share of the rate that a large bf16 matrix
product reaches on the same card. --loss-memory adds the peak memory of loss and gradient for 16 x 500 scored tokens
and a vocabulary of 35,000, in chunks as trained and all at once (4 GB). Results go to benchmarks/results/, dated;
--json prints one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pix2seq.cli import run_guarded
from pix2seq.examples import Batch, Example, Sample, collate
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoder import Decoder
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT, add_noise_objects, encode_objects, random_boxes
from pix2seq.training import objective
from pix2seq.training.memory import keep_freed_memory
from pix2seq.training.objective import CrossEntropy, token_losses
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.step import TrainingModel, train_step
from pix2seq.vocab import PAD, TASK_IDS, Vocab

VOCAB = Vocab(num_bins=1000, size=3000)
NUM_LABELS = 80
BATCH_SIZE = 8
BASELINE_TOKENS = 300
MAX_OBJECTS = 100  # of configs/detection_coco.yaml
# Number of images, of 120 from COCO 2017, by their number of non-crowd objects (mean 8.5; all of train2017: 7.3).
OBJECTS = dict(
    enumerate(
        [9, 16, 10, 14, 12, 6, 4, 5, 2, 5, 3, 5, 2, 2, 5, 2, 3, 2, 1, 3, 2, 1, 1, 0, 0, 0, 0, 2, 0, 0, 0, 1, 1, 1],
        start=1,
    )
)
BASELINE, OURS, OURS_BF16, FILLED = "baseline", "ours, float32", "ours, bf16", "ours, bf16, 100 objects"


@dataclass(frozen=True)
class Size:
    image: int  # side in pixels
    encoder: str  # timm name
    dim: int  # of the decoder, as are all below
    num_heads: int
    num_layers: int = 6
    mlp_dim: int = 2048


SIZES = {
    "deit-small-384": Size(384, "deit_small_patch16_224", dim=256, num_heads=8),
    "vit-b-640": Size(640, "vit_base_patch16_224", dim=512, num_heads=16),
    "tiny": Size(64, "deit_tiny_patch16_224", dim=64, num_heads=2, num_layers=1, mlp_dim=64),
}


class Baseline(nn.Module):
    """The usual form, which computes every position, also padding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        import timm

        self.encoder = timm.create_model(size.encoder, img_size=size.image, num_classes=0)
        self.bottleneck = nn.Linear(self.encoder.num_features, size.dim)
        num_patches = self.encoder.patch_embed.num_patches
        self.memory_positions = nn.Parameter(0.02 * torch.randn(num_patches, size.dim))
        self.embedding = nn.Embedding(VOCAB.size, size.dim, padding_idx=PAD)
        self.positions = nn.Parameter(0.02 * torch.randn(BASELINE_TOKENS - 1, size.dim))
        layer = nn.TransformerDecoderLayer(size.dim, size.num_heads, size.mlp_dim, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, size.num_layers)
        self.output = nn.Linear(size.dim, VOCAB.size)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) and tokens (B, T) to logits (B, T, V)."""
        features = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        memory = self.bottleneck(features) + self.memory_positions
        is_padding = torch.zeros(tokens.shape).masked_fill(tokens == PAD, -torch.inf)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embedding(tokens) + self.positions
        return self.output(self.decoder(x, memory, tgt_mask=causal, tgt_key_padding_mask=is_padding))


def baseline_step(size: Size) -> Callable[[Batch], Any]:
    """Return the baseline's training step."""
    model = Baseline(size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)

    def step(batch: Batch) -> None:
        # The end token is that of padding.
        rows = nn.utils.rnn.pad_sequence(batch.tokens.split(batch.lengths.tolist()), True, PAD)
        rows = F.pad(rows, (0, BASELINE_TOKENS - rows.shape[1]), value=PAD)
        logits = model(batch.images.float() / 255, rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def build(size: Size) -> tuple[Pix2Seq, torch.optim.Optimizer]:
    """Build our model of a size, with fresh weights, and its optimiser."""
    decoder = DecoderConfig(
        dim=size.dim, num_layers=size.num_layers, num_heads=size.num_heads, mlp_dim=size.mlp_dim, max_seq_len=512
    )
    image_size = (size.image, size.image)
    config = ModelConfig(image_size=image_size, encoder=EncoderConfig(size.encoder), decoder=decoder, vocab=VOCAB)
    model = build_model(config).to("cuda" if torch.cuda.is_available() and size.image >= 640 else "cpu").train()
    return model, build_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))


def our_step(model: Pix2Seq, optimizer: torch.optim.Optimizer, *, bf16: bool) -> Callable[[Batch], Any]:
    """Return the training step of `pix2seq train`."""
    wrapped = TrainingModel(model, CrossEntropy(), bf16=bf16)
    return lambda batch: train_step(wrapped, optimizer, [batch], {}, max_grad_norm=1.0)


def make_batch(size: Size, seed: int, *, fill_to: int = 0, batch_size: int = BATCH_SIZE) -> Batch:
    """Make images with as many objects as in COCO, filled up to `fill_to` with noise objects."""
    rng = np.random.default_rng(seed)
    samples = []
    counts = rng.choice(list(OBJECTS), batch_size, p=np.array(list(OBJECTS.values())) / sum(OBJECTS.values()))
    for image_id, count in enumerate(counts.tolist()):
        # Leave room for the end token.
        count = min(count, MAX_OBJECTS if fill_to else (BASELINE_TOKENS - 2) // TOKENS_PER_OBJECT)
        boxes = random_boxes(count, rng)
        boxes, labels = add_noise_objects(boxes, rng.integers(1, NUM_LABELS + 1, count), max(fill_to - count, 0), rng)
        response = encode_objects(boxes, labels, VOCAB, rng, num_labels=NUM_LABELS, eos_weight=None if fill_to else 0.1)
        example = Example(np.array([TASK_IDS["detection"]]), response.inputs, response.targets, response.weights)
        image = rng.integers(0, 256, (size.image, size.image, 3), dtype=np.uint8)
        samples.append(Sample(image, {"detection": [example]}, image_id))
    return collate(samples, ["detection"])


def contestant(pipe: Connection, who: str, size: Size, num_threads: int) -> None:
    """Run two steps for every seed received; after `None`, send stage shares and peak memory."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    if who == BASELINE:
        step = baseline_step(size)
    else:
        keep_freed_memory()
        model, optimizer = build(size)
        step = our_step(model, optimizer, bf16=who != OURS)
    fill_to = MAX_OBJECTS if who == FILLED else 0
    while (seed := pipe.recv()) is not None:
        batch = make_batch(size, seed, fill_to=fill_to)
        step(batch)
        started, started_cpu = time.perf_counter(), time.process_time()
        step(batch)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        counts = {"tokens": len(batch.scored), "length": int(batch.lengths.max())}
        pipe.send({"seconds": seconds, "cpu_seconds": cpu_seconds, **counts})
    peak = _peak_memory()
    stages = (
        None if who == BASELINE else stage_shares(model, optimizer, make_batch(size, 0, fill_to=fill_to), who != OURS)
    )
    pipe.send({"peak_bytes": peak, "stages": stages})


def stage_shares(model: Pix2Seq, optimizer: torch.optim.Optimizer, batch: Batch, bf16: bool) -> dict[str, float]:
    """Return the share of a step's time for each stage, timed around methods."""
    loss_of = CrossEntropy()
    loss_of(model, batch)["detection"][0].backward()  # allocates the memory again, as a warm-up
    model.zero_grad(set_to_none=True)
    spent = {"encoder": 0.0, "decoder": 0.0}

    def timed(method: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            started = time.perf_counter()
            result = method(*args)
            spent[name] += time.perf_counter() - started
            return result

        return call

    methods = [(model, "encode", "encoder"), (model.decoder, "forward_packed", "decoder")]
    for owner, name, stage in methods:
        setattr(owner, name, timed(getattr(owner, name), stage))
    times = [time.perf_counter()]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, count = loss_of(model, batch)["detection"]
    times.append(time.perf_counter())
    (loss / count).backward()
    times.append(time.perf_counter())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    for owner, name, _ in methods:
        delattr(owner, name)
    forward, backward, update = np.diff(times).tolist()
    spent |= {"loss": forward - sum(spent.values()), "backward": backward, "optimizer": update}
    return {name: seconds / (times[-1] - times[0]) for name, seconds in spent.items()}


def _peak_memory() -> int | None:
    """Return the peak resident size of this process in bytes, or None without Linux's /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    except OSError:
        return None


def compare(size: Size, *, num_steps: int, num_threads: int) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for who in (BASELINE, OURS, OURS_BF16, FILLED):
        pipes[who], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=contestant, args=(theirs, who, size, num_threads), daemon=True))
        processes[-1].start()
        theirs.close()
    turns: dict[str, list[dict[str, Any]]] = {who: [] for who in pipes}
    for seed in range(num_steps):
        for who, pipe in pipes.items():
            pipe.send(seed)
            turns[who].append(pipe.recv())
    rows = []
    for who, pipe in pipes.items():
        pipe.send(None)
        seconds = median(turn["seconds"] for turn in turns[who])
        rows.append(
            {
                "who": who,
                "images_per_second": BATCH_SIZE / seconds,
                "scored_tokens_per_second": sum(t["tokens"] for t in turns[who])
                / sum(t["seconds"] for t in turns[who]),
                "times_baseline": _ratio(turns, who, "seconds"),
                "times_baseline_cpu": _ratio(turns, who, "cpu_seconds"),
                "turns": turns[who],
                **pipe.recv(),
            }
        )
    for process in processes:
        process.join()
    return rows


def _ratio(turns: dict[str, list[dict[str, Any]]], who: str, unit: str) -> float:
    """Return the speed relative to the baseline, in pairs of turns, which share the machine's other load."""
    pairs = zip(turns[BASELINE], turns[who], strict=True)
    return median(theirs[unit] / ours[unit] for theirs, ours in pairs)


def loss_memory(num_threads: int) -> dict[str, int | None]:
    """Return the peak memory growth in bytes during the output layer's bf16 loss, in chunks and all at once."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in ("in pieces", "whole"):
        pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=_take_loss, args=(theirs, name == "whole", num_threads), daemon=True)
        process.start()
        found[name] = pipe.recv()
        process.join()
    return found


def _take_loss(pipe: Connection, at_once: bool, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    num_scored, vocab_size, dim = 16 * 500, 35_000, 256
    if at_once:
        objective.LOGITS_AT_ONCE = num_scored * vocab_size
    decoder = Decoder(vocab_size=vocab_size, dim=dim, num_layers=1, num_heads=8, mlp_dim=dim, max_seq_len=500)
    hidden = torch.randn(num_scored, dim, requires_grad=True)
    targets = torch.randint(vocab_size, (num_scored,))
    before = _peak_memory()
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(decoder, hidden, targets, 0.1).sum()
    loss.backward()
    after = _peak_memory()
    pipe.send(None if before is None or after is None else after - before)


def gpu_row(size: Size, *, num_steps: int, batch_size: int) -> dict[str, Any]:
    """Measure bf16 training on the GPU, with sequences filled up to 100 objects."""
    model, optimizer = build(size)
    step = our_step(model, optimizer, bf16=True)
    batch = make_batch(size, 0, fill_to=MAX_OBJECTS, batch_size=batch_size).to(model.device)
    step(batch)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    times = [_gpu_seconds(lambda: step(batch)) for _ in range(num_steps)]
    a = torch.randn(8192, 8192, device=model.device, dtype=torch.bfloat16)
    torch.mm(a, a)
    matrix_rate = 2 * 8192**3 / median(_gpu_seconds(lambda: torch.mm(a, a)) for _ in range(10))
    return {
        "device": torch.cuda.get_device_name(),
        "batch_size": batch_size,
        "images_per_second": batch_size / median(times),
        "tflop_per_step": counter.get_total_flops() / 1e12,
        "matrix_tflop_per_second": matrix_rate / 1e12,
        "share_of_matrix_rate": counter.get_total_flops() / median(times) / matrix_rate,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _gpu_seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="turns per contestant")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default: PyTorch's choice"
    )
    parser.add_argument(
        "--loss-memory", action="store_true", help="measure the memory of a loss over a large vocabulary"
    )
    parser.add_argument("--gpu-batch", type=int, default=32, help="images per step on the GPU")
    parser.add_argument("--quick", action="store_true", help="a smoke test with a tiny model; writes no file")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-train.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    say = sys.stderr if args.json else sys.stdout
    now = datetime.now(UTC)
    size = "tiny" if args.quick else "deit-small-384"
    result: dict[str, Any] = {
        "benchmark": "train",
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python benchmarks/train.py", *argv]),
        "machine": machine(args.threads),
        "size": size,
        "batch_size": BATCH_SIZE,
    }
    print(result["machine"], file=say, flush=True)
    result["rows"] = compare(SIZES[size], num_steps=args.steps, num_threads=args.threads)
    columns = ("images/s", "tokens/s", "x baseline", "CPU", "peak MiB")
    print(f"{'':26}" + "".join(f"{name:>12}" for name in columns), file=say)
    for row in result["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        cells = [f"{row[name]:.2f}" for name in ("images_per_second", "scored_tokens_per_second")]
        cells += [f"{row['times_baseline']:.2f}", f"{row['times_baseline_cpu']:.2f}", peak]
        print(f"{row['who']:26}" + "".join(f"{cell:>12}" for cell in cells), file=say)
    for row in result["rows"][1:]:
        print(f"{row['who']}: " + ", ".join(f"{name} {share:.0%}" for name, share in row["stages"].items()), file=say)
    if args.loss_memory:
        result["loss_memory"] = loss_memory(args.threads)
        print(f"loss of 16 x 500 tokens, vocabulary 35,000, peak bytes: {result['loss_memory']}", file=say)
    if torch.cuda.is_available() and not args.quick:
        result["gpu"] = gpu_row(SIZES["vit-b-640"], num_steps=args.steps, batch_size=args.gpu_batch)
        print(result["gpu"], file=say)
    if args.out is not None or not args.quick:
        path = args.out or Path(__file__).parent / "results" / f"{now:%Y-%m-%d}-train.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=say)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
