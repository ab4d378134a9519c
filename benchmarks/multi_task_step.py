"""A training step of four tasks, before it was one pass and after.

    python benchmarks/multi_task_step.py [--json] [--before FOLDER] [--large]

"Before" is commit 14286fe, where each task took a pass of its own over padded rows; it is taken from git, or from a
folder that holds its tree. Each form runs in a process of its own, in turns, on the same samples. Every batch has new
lengths, as in training. On a GPU, steps are recorded CUDA graphs, and `eager` is the same without. `ratio` is images a
second after divided by before, without shared images. `ratio_shared` is the same with `share_images=true`, where an
image counts once for each task that learns from it. The model is that of configs/multi_task_shapes.yaml with 16 images
each of detection and segmentation and 8 each of keypoints and captions a step, or with `--large` one of 16.75 million
parameters at 128 px with 64 and 32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "14286fe"
TASKS = ["detection", "segmentation", "keypoint", "captioning"]
BESIDE = ("tokenizers", "train", "infer", "configs")  # subpackages that lie beside the package
LARGE = [
    "model.image_size=[128,128]", "model.encoder={name: vit, stem: conv, stem_blocks: 2, dim: 384, num_layers: 2, "
    "num_heads: 6, mlp_dim: 1536, patch_size: 16, drop_path: 0.0}", "model.decoder={dim: 256, num_layers: 4, "
    "num_heads: 8, mlp_dim: 1024, max_seq_len: 320, dropout: 0.0, drop_path: 0.0}",
    "model.vocab={num_bins: 128, text_base: 1200, size: 1200}", "detection={max_objects: 16, noise_objects: 4}",
    "segmentation={max_objects: 8, max_points: 128}", "batch_size=64", "keypoint.batch_size=32",
    "captioning={captions_per_image: 5, max_tokens: 48}",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--before", type=Path, help=f"folder with the tree of {BEFORE}; by default taken from git")
    parser.add_argument("--large", action="store_true", help="16.75 million parameters, 192 images a step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, default=6, help="different steps, each of new lengths")
    parser.add_argument("--rounds", type=int, default=3, help="turns over all of them")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--without-shared", action="store_true", help="leave out shared images")
    parser.add_argument("--eager", action="store_true", help="also without CUDA graphs")
    parser.add_argument("--child", choices=("before", "after", "shared", "eager"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = compare(args, Path(scratch))
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run the forms in turns; return medians and ratios."""
    trees = {"before": take_before(args.before, scratch), "after": link_tree(ROOT, scratch / "after")}
    trees |= {"shared": trees["after"]} if not args.without_shared else {}
    trees |= {"eager": trees["after"]} if args.eager else {}
    data = scratch / "shapes"
    command = [sys.executable, "-m", "pix2seq.cli", "data", "shapes", str(data), "--train", "600", "--val", "2"]
    size = "128" if args.large else "96"
    subprocess.run([*command, "--size", size], check=True, env=environment(trees["after"]), capture_output=True)
    children = {form: start(args, form, tree, data) for form, tree in trees.items()}
    ready = {form: json.loads(ask(child)) for form, child in children.items()}
    times: dict[str, list[float]] = {form: [] for form in children}
    for _ in range(args.rounds):
        for form, child in children.items():
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            times[form] += json.loads(ask(child))
    for child in children.values():
        child.communicate()
    medians = {form: statistics.median(some) for form, some in times.items()}
    rates = {form: ready[form]["images"] / medians[form] for form in times}
    return {
        "ratio": round(rates["after"] / rates["before"], 3),
        "ratio_shared": round(rates["shared"] / rates["before"], 3) if "shared" in rates else None,
        "device": ready["after"]["device"],
        "torch": ready["after"]["torch"],
        "images_per_second": {form: round(rate, 1) for form, rate in rates.items()},
        "ms_per_step_median": {form: round(1000 * value, 2) for form, value in medians.items()},
        "ms_per_step_mean": {form: round(1000 * statistics.fmean(some), 2) for form, some in times.items()},
        "images_per_step": {form: ready[form]["images"] for form in times},
        "first_loss": {form: ready[form]["loss"] for form in times},
        "parameters": ready["after"]["parameters"],
        "command": " ".join(["python", *sys.argv]),
    }


def take_before(folder: Path | None, scratch: Path) -> Path:
    """The tree of the commit before, ready to be imported."""
    if folder is None:
        folder = scratch / "checkout"
        folder.mkdir()
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return link_tree(folder, scratch / "before")


def link_tree(source: Path, target: Path) -> Path:
    """A folder from which `import pix2seq` finds the package of `source`, with the subpackages that lie beside it."""
    shutil.copytree(source / "pix2seq", target / "pix2seq")
    for name in BESIDE:
        shutil.copytree(source / name, target / "pix2seq" / name)
    return target


def environment(tree: Path) -> dict[str, str]:
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}


def start(args: argparse.Namespace, form: str, tree: Path, data: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", form, "--data", str(data)]
    command += ["--device", args.device, "--batches", str(args.batches)]
    command += ["--large"] * args.large + (["--threads", str(args.threads)] if args.threads else [])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=tree, env=environment(tree), **pipes)  # type: ignore[call-overload]


def ask(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"a process of the benchmark ended with code {child.wait()}")
    return line


def run_child(args: argparse.Namespace) -> None:
    """Prepare batches, then time a step of each whenever asked."""
    import torch

    from pix2seq.device import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory(args.child)
    step, images, parameters = (steps_before if args.child == "before" else steps_after)(args, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    loss = step(0)
    for _ in range(2):  # set up libraries, and record the steps of a GPU
        for i in range(args.batches):
            step(i)
    wait()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = {"images": images, "device": name, "torch": torch.__version__, "loss": loss, "parameters": parameters}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        times = []
        for i in range(args.batches):
            started = time.perf_counter()
            step(i)
            wait()
            times.append(time.perf_counter() - started)
        print(json.dumps(times), flush=True)


def keep_freed_memory(form: str) -> None:
    """As a run does on the CPU."""
    if form == "before":
        from pix2seq.training.allocator import keep_freed_memory as keep  # type: ignore[import-not-found]
    else:
        from pix2seq.training.memory import keep_freed_memory as keep
    keep()


def prepare_run(args: argparse.Namespace) -> tuple[Any, Any]:
    from pix2seq.training.config import load_config
    from pix2seq.training.recipe import prepare

    # A child runs in its tree, whose config names no setting that its package does not have.
    path, overrides = (None, LARGE) if args.large else ("pix2seq/configs/multi_task_shapes.yaml", [])
    if args.child != "shared":  # tasks that share images have as many of them
        overrides = [*overrides, f"captioning.batch_size={32 if args.large else 8}"]
    if args.child != "before":
        overrides = [*overrides, f"share_images={str(args.child == 'shared').lower()}"]
    config = load_config(path, overrides, tasks=TASKS, data=str(args.data))
    return config, prepare(config)


def steps_before(args: argparse.Namespace, device: Any) -> tuple[Any, int, int]:
    """The form of the commit before: batches of each task apart."""
    import torch

    from pix2seq.model.pix2seq import build_model
    from pix2seq.tasks.example import collate  # type: ignore[import-not-found]
    from pix2seq.training.step import Learner, TaskBatches, build_optimizer, train_step  # type: ignore[attr-defined]

    config, recipe = prepare_run(args)
    torch.manual_seed(0)
    model = build_model(replace_vocab(config, recipe), recipe.categories, recipe.text).to(device).train()
    learner = Learner(model, bf16=True)
    optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    sizes = {samples.task.name: config.batch_size_of(samples.task.name) for samples in recipe.samples}
    steps = []
    for i in range(args.batches):
        tasks = []
        for samples in recipe.samples:
            size = sizes[samples.task.name]
            batch = collate([samples[0, (i * size + k) % len(samples)] for k in range(size)])
            tasks.append(TaskBatches(samples.task.name, 1.0, [pinned(batch, device)]))
        steps.append(tasks)

    def step(i: int) -> float | None:
        result = train_step(learner, optimizer, steps[i], max_grad_norm=1.0)
        return result.loss.item() if device.type == "cpu" else None

    return step, sum(sizes.values()), sum(p.numel() for p in model.parameters())


def steps_after(args: argparse.Namespace, device: Any) -> tuple[Any, int, int]:
    """The form of today: all tasks in one batch."""
    import torch

    from pix2seq.examples import collate
    from pix2seq.model.pix2seq import build_model
    from pix2seq.training.objective import CrossEntropy
    from pix2seq.training.optimizer import build_optimizer
    from pix2seq.training.recorded_step import BUCKET, RecordedStep
    from pix2seq.training.step import TrainingModel, train_step

    config, recipe = prepare_run(args)
    torch.manual_seed(0)
    model = build_model(replace_vocab(config, recipe), recipe.categories, recipe.text).to(device).train()
    training_model = TrainingModel(model, CrossEntropy(), bf16=True)
    recorded = device.type == "cuda" and args.child != "eager"
    step_form: Any = RecordedStep() if recorded else train_step
    optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))
    steps, images = [], 0
    for i in range(args.batches):
        some = []
        for samples in recipe.samples:
            size = config.batch_size_of(samples.tasks[0])
            some += [samples[0, (i * size + k) % len(samples)] for k in range(size)]
        images += sum(len(sample.examples) for sample in some)
        steps.append(pinned(collate(some, TASKS, bucket=BUCKET if recorded else 1), device))

    def step(i: int) -> float | None:
        result = step_form(training_model, optimizer, [steps[i]], {}, 1.0)
        return result.loss.item() if device.type == "cpu" else None

    return step, images // args.batches, sum(p.numel() for p in model.parameters())


def replace_vocab(config: Any, recipe: Any) -> Any:
    from dataclasses import replace

    return replace(config.model, vocab=recipe.vocab)


def pinned(batch: Any, device: Any) -> Any:
    return batch.pin_memory() if device.type == "cuda" else batch


if __name__ == "__main__":
    main()
