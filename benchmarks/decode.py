"""Benchmark of decoding: this project, the same model without a cache, and Hugging Face's generate.

    python benchmarks/decode.py [--sizes deit-small-384 vit-b-640] [--batches 1 16] [--device cpu] [--json]

It runs on a CUDA GPU if there is one, else on the CPU. Weights are random, decoding is greedy and without an end
token, so that all contestants generate the same number of tokens. Contestants take turns, and medians are reported.
Decoding starts from the encoder's output and includes the work per image (projecting keys and values of memory). The
encoder is timed separately.

- `ours` decodes with the defaults of `Pix2Seq.generate`, with the log-probability of every token. bf16 means
  autocast, as in the predictor.
- `ours, no logprobs` leaves out log-probabilities, as Hugging Face's greedy decoding does.
- `uncached` runs the decoder over the full sequence for every token. It is timed once at each of five lengths, and
  the time of a sequence is the area under this curve.
- `hugging face` is VisionEncoderDecoderModel with a BertLMHeadModel as decoder: the same width, depth, heads,
  feed-forward width and vocabulary, cross-attention in every layer, and one more dense layer before the output. In
  bf16, its weights are bf16. Without transformers (`pip install pix2seq[bench]`) this column is left out.

`x HF` is the median ratio of wall times over turns; `best` is that of the fastest turns, and `CPU` that of processor
times. On a machine that others use too, use one thread (--threads 1): threads that wait for each other cost far more
than they gain, and their waiting counts as processor time.

Bandwidth: the bytes that a step must read (decoder weights, and keys and values of memory and of half the tokens, in
the requested type) over the time of a step, as a share of the bandwidth of `Tensor.sum` over as many bytes on this
machine. Memory: growth of the resident set during one decoding; on a GPU, growth of PyTorch's allocated memory.

`predict` takes one image of the size in configs/demo.yaml from a PNG file to objects with `Predictor.predict`. It is
compared with the encoder and as many bare steps of the decoder, without grammar, sampling, scores, files and resizing.
Results are written to benchmarks/results/ with the date; --json prints them as one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image
from torch import Tensor

from pix2seq.cli import run_guarded
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.generate import generate
from pix2seq.model.decoding.step import DecoderStep
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.predictor import Predictor
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT
from pix2seq.training.config import config_file, load_config
from pix2seq.vocab import Vocab

START_ID = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNCACHED_LENGTHS = 5
MIN_TURNS = 2
MAX_ENCODE_TURNS = 3
PREDICT_TURNS = 100
MEMORY_TOKENS = (100, 200, 400)
MEMORY_VOCABS = (3000, 12000)


@dataclass(frozen=True)
class Size:
    image: int  # pixels per side, in patches of 16
    encoder: EncoderConfig
    dim: int  # of the decoder, like all below
    num_heads: int
    num_layers: int = 6
    mlp_dim: int = 2048


def _vit(dim: int, num_heads: int) -> EncoderConfig:
    return EncoderConfig(name="vit", dim=dim, num_layers=12, num_heads=num_heads, mlp_dim=4 * dim)


SIZES = {
    "deit-small-384": Size(384, _vit(384, 6), dim=256, num_heads=8),
    "vit-b-640": Size(640, _vit(768, 12), dim=512, num_heads=16),
    "tiny": Size(64, EncoderConfig(name="vit", dim=64, num_layers=1, num_heads=2, mlp_dim=64), dim=64, num_heads=2),
}


def build(size: Size, vocab_size: int, tokens: int) -> Pix2Seq:
    """Build a model with random weights and positions for a start token and `tokens` more."""
    torch.manual_seed(0)
    decoder = DecoderConfig(
        dim=size.dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        mlp_dim=size.mlp_dim,
        max_seq_len=tokens + 1,
    )
    vocab = Vocab(num_bins=1000, size=vocab_size)
    config = ModelConfig(image_size=(size.image, size.image), encoder=size.encoder, decoder=decoder, vocab=vocab)
    return build_model(config).eval()


def build_hugging_face(size: Size, vocab_size: int, tokens: int) -> Any | None:
    """Build Hugging Face's model of that size, or return None if transformers is not installed."""
    try:
        import transformers
        from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    encoder = ViTConfig(
        hidden_size=size.encoder.dim,
        num_hidden_layers=size.encoder.num_layers,
        num_attention_heads=size.encoder.num_heads,
        intermediate_size=size.encoder.mlp_dim,
        image_size=size.image,
    )
    decoder = BertConfig(
        vocab_size=vocab_size,
        hidden_size=size.dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.mlp_dim,
        max_position_embeddings=tokens + 2,
        is_decoder=True,
        add_cross_attention=True,
    )
    return VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)).eval()


def hugging_face_decode(model: Any, features: Tensor, tokens: int) -> Tensor:
    """Generate ids (B, 1 + tokens) with Hugging Face's model."""
    from transformers.modeling_outputs import BaseModelOutput

    return model.generate(
        encoder_outputs=BaseModelOutput(features),
        decoder_start_token_id=START_ID,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )


def decode(model: Pix2Seq, memory: Tensor, tokens: int, *, bf16: bool, with_logprobs: bool = True) -> Tensor:
    """Generate ids (B, tokens) from memory (B, N, D)."""
    prompt = torch.full((len(memory), 1), START_ID)
    with torch.autocast(memory.device.type, torch.bfloat16, enabled=bf16):
        return generate(
            model.decoder,
            memory,
            prompt,
            max_new_tokens=tokens,
            temperature=0,
            eos_id=None,
            with_logprobs=with_logprobs,
        ).tokens


def uncached_seconds(model: Pix2Seq, memory: Tensor, tokens: int, *, bf16: bool) -> float:
    """Return the time of all tokens if each runs the decoder over all tokens before, estimated from five lengths."""
    lengths = torch.linspace(1, tokens, UNCACHED_LENGTHS).round().long().tolist()
    times = []
    with torch.autocast(memory.device.type, torch.bfloat16, enabled=bf16):
        for length in lengths:
            ids = torch.full((len(memory), length), START_ID)
            times.append(seconds(lambda ids=ids: model.decoder.logits(model.decoder(ids, memory)[:, -1]).argmax(-1)))  # type: ignore[misc]
    return float(torch.trapezoid(torch.tensor(times), torch.tensor(lengths)))


def step_bytes(model: Pix2Seq, memory: Tensor, tokens: int, item_size: int) -> int:
    """Return the bytes that a step in the middle of a sequence must read."""
    decoder = model.decoder
    # Keys and values of memory are projected in advance; the output layer reads the full embedding.
    weights = sum(p.numel() for p in decoder.parameters()) - decoder.position_embedding.numel()
    weights -= sum(block.cross_attention.key_value.weight.numel() for block in decoder.blocks)
    batch, num_memory, dim = memory.shape
    return item_size * (weights + 2 * len(decoder.blocks) * batch * dim * (num_memory + tokens // 2))


def read_bandwidth(num_bytes: int) -> float:
    """Return the bytes per second of reading `num_bytes` repeatedly."""
    numbers = torch.ones(max(num_bytes // 4, 1))
    return num_bytes / median(seconds(numbers.sum) for _ in range(9))


def copy_bandwidth(num_bytes: int) -> float:
    """Return the bytes per second, read and written, of copying `num_bytes`."""
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    return 2 * num_bytes / median(seconds(lambda: target.copy_(source)) for _ in range(5))


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall time of one call, including all its work on the GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _synchronize() -> None:
    if _on_gpu():
        torch.cuda.synchronize()


def peak_growth(function: Callable[[], Any]) -> int | None:
    """Return the peak growth in bytes of the memory in use during one call, or None if Linux does not report it."""
    if _on_gpu():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - allocated
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else reused memory is not counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def measure(name: str, batch: int, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the rows of the table for one size, batch size and type."""
    size, tokens, bf16 = SIZES[name], args.tokens, dtype == "bfloat16"
    model = build(size, args.vocab, tokens)
    num_patches = (size.image // 16) ** 2
    memory = torch.randn(batch, num_patches, size.dim)
    images = torch.rand(batch, 3, size.image, size.image)

    def encode() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            model.encode(images)

    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: decode(model, memory, tokens, bf16=bf16),
        "ours, no logprobs": lambda: decode(model, memory, tokens, bf16=bf16, with_logprobs=False),
    }
    encoders: dict[str, Callable[[], Any]] = {"ours": encode}
    theirs = build_hugging_face(size, args.vocab, tokens)
    if theirs is not None:
        theirs = theirs.to(DTYPES[dtype])
        features = torch.randn(batch, num_patches, size.encoder.dim, dtype=DTYPES[dtype])
        pixels = images.to(DTYPES[dtype])
        contestants["hugging face"] = lambda: hugging_face_decode(theirs, features, tokens)
        encoders["hugging face"] = lambda: theirs.encoder(pixels)
    with torch.inference_mode():
        memories = {who: peak_growth(run) for who, run in contestants.items()}  # also warms up
        times: dict[str, list[float]] = {who: [] for who in contestants}
        cpu_times: dict[str, list[float]] = {who: [] for who in contestants}
        until = time.perf_counter() + args.budget
        for turn in range(args.repeats):
            if turn >= MIN_TURNS and time.perf_counter() > until:
                break
            for who, run in contestants.items():
                started = time.process_time()
                times[who].append(seconds(run))
                cpu_times[who].append(time.process_time() - started)
        if not args.no_uncached:
            memories["uncached"] = None
            times["uncached"] = [uncached_seconds(model, memory, tokens, bf16=bf16)]
        encoding = {who: encode_seconds(run, args) for who, run in encoders.items()}
    num_bytes = step_bytes(model, memory, tokens, DTYPES[dtype].itemsize)
    bandwidth = read_bandwidth(num_bytes)
    rows = []
    for who, spent in times.items():
        decoding = median(spent)
        encoder = encoding["hugging face" if who == "hugging face" else "ours"]
        rows.append(
            {
                "size": name,
                "batch": batch,
                "dtype": dtype,
                "who": who,
                "tokens_per_second": batch * tokens / decoding,
                "decode_seconds": spent,
                "decode_cpu_seconds": cpu_times.get(who),
                "encode_seconds": encoder,
                "ms_per_image": 1000 * (decoding + encoder) / batch,
                "peak_memory_mb": None if memories[who] is None else memories[who] / 2**20,  # type: ignore[operator]
                "bandwidth_share": num_bytes / (decoding / tokens) / bandwidth,
                "step_mb": num_bytes / 2**20,
                "read_gb_per_second": bandwidth / 1e9,
            }
        )
    if "hugging face" in times:
        for row in rows:
            row["times_hugging_face"] = _ratio(times["hugging face"], times[row["who"]])
            row["times_hugging_face_best"] = min(times["hugging face"]) / min(times[row["who"]])
            if row["who"] in cpu_times:
                row["times_hugging_face_cpu"] = _ratio(cpu_times["hugging face"], cpu_times[row["who"]])
    return rows


def bytes_per_token(memory: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """Return the bytes per additional token in a row, between successive lengths, for each vocabulary size."""
    found: dict[int, list[float]] = {}
    for shorter, longer in itertools.pairwise(memory):
        if shorter["vocab"] == longer["vocab"] and None not in (shorter["peak_bytes"], longer["peak_bytes"]):
            tokens = longer["rows"] * (longer["tokens"] - shorter["tokens"])
            found.setdefault(longer["vocab"], []).append((longer["peak_bytes"] - shorter["peak_bytes"]) / tokens)
    return found


def encode_seconds(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Return the median time of an encoder over as many turns as a quarter of the budget allows."""
    spent = [seconds(run)]
    while len(spent) < min(args.repeats, MAX_ENCODE_TURNS) and sum(spent) < args.budget / 4:
        spent.append(seconds(run))
    return median(spent)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median speedup over turns, as the load of the machine is similar within a turn."""
    if len(theirs) != len(ours):
        return median(theirs) / median(ours)
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def memory_growth(name: str, *, rows: int) -> list[dict[str, Any]]:
    """Measure the peak memory of decoding for several numbers of tokens and two vocabulary sizes."""
    found = []
    for vocab_size in MEMORY_VOCABS:
        model = build(SIZES[name], vocab_size, max(MEMORY_TOKENS))
        memory = torch.randn(1, 16, SIZES[name].dim).expand(rows, -1, -1)
        decode(model, memory, 2, bf16=False)
        peaks = [peak_growth(lambda t=t, m=model, x=memory: decode(m, x, t, bf16=False)) for t in MEMORY_TOKENS]  # type: ignore[misc]
        for tokens, peak in zip(MEMORY_TOKENS, peaks, strict=True):
            found.append({"vocab": vocab_size, "tokens": tokens, "rows": rows, "peak_bytes": peak})
    return found


def predict_overhead(turns: int) -> dict[str, Any]:
    """Compare `Predictor.predict` with the encoder and the decoder steps that it needs."""
    config = load_config(config_file("demo.yaml"), data="-", out="-")
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    model.task_settings = {"detection": asdict(config.detection)}
    predictor = Predictor(model)
    predictor.configure(num_objects=config.detection.max_objects)  # a fixed number, even with random weights
    tokens = TOKENS_PER_OBJECT * config.detection.max_objects
    height, width = config.model.image_size
    inputs = torch.rand(1, 3, height, width)
    memory = model.encode(inputs).detach()

    def steps() -> None:
        step = DecoderStep(model.decoder, model.decoder.new_cache(memory, rows_per_image=1, num_slots=tokens))
        token = torch.tensor([[START_ID]])
        for _ in range(tokens):
            token = step.logits(step.read(token)).argmax(-1, keepdim=True)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "image.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(path)
        parts: dict[str, Callable[[], Any]] = {
            "predict": lambda: predictor.predict(path, ["detection"]),
            "encoder": lambda: model.encode(inputs),
            "steps": steps,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(turns + MIN_TURNS):
            for name, run in parts.items():
                spent = seconds(run)
                if turn >= MIN_TURNS:  # earlier turns warm up
                    times[name].append(spent)
    needed = [encoder + stepping for encoder, stepping in zip(times["encoder"], times["steps"], strict=True)]
    return {
        "image_size": [height, width],
        "tokens": tokens,
        **{f"{name}_ms": 1000 * median(spent) for name, spent in times.items()},
        "times_encoder_and_steps": _ratio(times["predict"], needed),
    }


def describe_machine() -> dict[str, Any]:
    """Describe the machine, and what is compared with."""
    found = machine() | {"gpu": torch.cuda.get_device_name() if _on_gpu() else None}
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except ImportError:
        found["transformers"] = None
    return found


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["deit-small-384", "vit-b-640"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="batch sizes in images")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=200, help="tokens per image")
    parser.add_argument("--vocab", type=int, default=3000, help="size of the vocabulary")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant, within --budget")
    parser.add_argument("--budget", type=float, default=90, help="seconds after which only the second turn may start")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--no-uncached", action="store_true", help="skip the model without a cache")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory of several lengths and vocabularies")
    parser.add_argument("--no-predict", action="store_true", help="skip Predictor.predict on one image")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to test the benchmark; writes no file")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-decode.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.batches, args.tokens, args.repeats = ["tiny"], [1, 4], 20, 2
    torch.set_default_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    say = sys.stderr if args.json else sys.stdout
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "benchmark": "decode",
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python benchmarks/decode.py", *argv]),
        "machine": describe_machine(),
        "read_gb_per_second": read_bandwidth(2**28) / 1e9,
        "copy_gb_per_second": copy_bandwidth(2**28) / 1e9,
        "rows": [],
    }
    print(result["machine"], file=say)
    print(f"256 MiB: read {result['read_gb_per_second']:.1f} GB/s, copy {result['copy_gb_per_second']:.1f}", file=say)
    if result["machine"]["transformers"] is None:
        result["note"] = "transformers is not installed: no column for Hugging Face; pip install pix2seq[bench]"
        print(result["note"], file=say)
    columns = (
        "size",
        "batch",
        "dtype",
        "who",
        "tokens/s",
        "x HF",
        "x HF, best",
        "x HF, CPU",
        "ms/image",
        "peak MiB",
        "bandwidth",
    )
    print("".join(f"{name:>18}" for name in columns), file=say)
    for name in args.sizes:
        for batch in args.batches:
            for dtype in args.dtypes:
                for row in measure(name, batch, dtype, args):
                    result["rows"].append(row)
                    print(_line(row), file=say, flush=True)
    if not args.no_memory:
        result["memory"] = memory_growth(args.sizes[0], rows=max(args.batches))
        for row in result["memory"]:
            peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f} MiB"
            print(f"{row['rows']} rows, vocabulary {row['vocab']}, {row['tokens']} tokens: {peak}", file=say)
        result["bytes_per_token"] = bytes_per_token(result["memory"])
        for vocab, found in result["bytes_per_token"].items():
            grows = ", then ".join(f"{growth / 1024:.1f} KiB" for growth in found)
            print(f"vocabulary {vocab}: each more token in a row takes {grows}", file=say)
    if not args.no_predict:
        result["predict"] = found = predict_overhead(MIN_TURNS if args.quick else PREDICT_TURNS)
        size = "x".join(str(side) for side in found["image_size"])
        print(
            f"predict, {size} px, {found['tokens']} tokens: {found['predict_ms']:.1f} ms, encoder "
            f"{found['encoder_ms']:.1f} ms, steps {found['steps_ms']:.1f} ms: {found['times_encoder_and_steps']:.2f} "
            "times these two",
            file=say,
        )
    if args.out is not None or not args.quick:
        path = args.out or Path(__file__).parent / "results" / f"{now:%Y-%m-%d}-decode.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=say)
    if args.json:
        print(json.dumps(result))


def _line(row: dict[str, Any]) -> str:
    cells = [str(row[name]) for name in ("size", "batch", "dtype", "who")]
    cells.append(f"{row['tokens_per_second']:.0f}")
    for name in ("times_hugging_face", "times_hugging_face_best", "times_hugging_face_cpu"):
        cells.append(f"{row[name]:.2f}" if name in row else "-")
    cells.append(f"{row['ms_per_image']:.0f}")
    cells.append("-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.1f}")
    cells.append(f"{row['bandwidth_share']:.0%}")
    return "".join(f"{cell:>18}" for cell in cells)


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))
