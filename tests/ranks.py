"""Run by torchrun in test_distributed.py: save the results of some steps on random batches."""

import sys

import torch
from torch.distributed.tensor import DTensor

from pix2seq.data.sampler import rank_slice
from pix2seq.examples import Batch
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.training.distributed import full_tensor, join_ranks, local_tensor
from pix2seq.training.ema import Ema
from pix2seq.training.step import TaskBatches, TrainingModel, train_step
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=32, size=1040)
BATCH_SIZE = 8
FAULTY_STEP = 1


def tiny_model(stem):
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name="vit", stem=stem, stem_blocks=1, dim=32, num_layers=2, num_heads=2, mlp_dim=64, drop_path=0.0
    )
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64, dropout=0.0, drop_path=0.0)
    return build_model(ModelConfig(image_size=(32, 32), encoder=encoder, decoder=decoder, vocab=VOCAB)).train()


def random_batch(seed, part, *, sequences):
    """Return this rank's part of a batch that is the same on all ranks. Images differ in their scored tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH_SIZE, sequences, 20)
    images = torch.randint(256, (BATCH_SIZE, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens, targets = (torch.randint(1000, 1032, shape, generator=generator) for _ in range(2))
    weights = (torch.rand(shape, generator=generator) < torch.linspace(0.1, 0.9, BATCH_SIZE)[:, None, None]).float()
    return Batch(images[part], tokens[part], targets[part], weights[part], tuple(range(BATCH_SIZE))[part])


def train(ranks, parallel, stem, trait=None):
    """Train three steps of two tasks with two micro-batches each, with SGD, because Adam magnifies rounding."""
    model = tiny_model(stem)
    training_model = TrainingModel(model, ranks=ranks, parallel=parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = Ema(model, 0.9)
    part = rank_slice(BATCH_SIZE, ranks.rank, ranks.size)
    if trait == "uneven" and ranks.size == 2:
        part = [slice(3), slice(3, BATCH_SIZE)][ranks.rank]
    steps = []
    for step in range(3):
        faulty = trait == "nan" and step == FAULTY_STEP and ranks.rank == ranks.size - 1
        hook = model.encoder.stem.register_forward_hook(lambda module, args, x: x * torch.nan) if faulty else None
        before = {name: local_tensor(tensor).clone() for name, tensor in model.state_dict().items()}
        tasks = [
            TaskBatches(name, weight, [random_batch(100 * i + 10 * step + m, part, sequences=i + 1) for m in range(2)])
            for i, (name, weight) in enumerate([("detection", 1.0), ("captioning", 0.5)])
        ]
        result = train_step(training_model, optimizer, tasks, max_grad_norm=1.0)
        changed = any(not torch.equal(local_tensor(t), before[name]) for name, t in model.state_dict().items())
        if result.finite:
            ema.update(model, step + 1)
        if hook is not None:
            hook.remove()
        steps.append({"loss": result.loss.item(), "grad_norm": result.grad_norm.item(), "changed": changed})
    return {
        "steps": ranks.gather(steps),
        "weights": {name: full_tensor(tensor).clone() for name, tensor in model.state_dict().items()},
        "averages": {name: full_tensor(tensor).clone() for name, tensor in ema.weights.items()},
        "num_sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "num_parameters": len(list(model.parameters())),
    }


def main(out, *runs):
    """Run each PARALLEL-STEM, with a NaN on the last rank after -nan, and parts of 3 and 5 images after -uneven."""
    with join_ranks("cpu") as ranks:
        results = {run: train(ranks, *run.split("-")) for run in runs}
        if ranks.first:
            torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
