"""Run by several processes in test_distributed.py: save the results of some steps on random batches."""

import numpy as np
import torch
from one_by_one import random_sample
from torch.distributed.tensor import DTensor

from pix2seq.data.sampler import rank_slice
from pix2seq.examples import collate
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.training.distributed import full_tensor, join_ranks, local_tensor
from pix2seq.training.ema import Ema
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.step import TrainingModel, train_step
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=32, size=1040)
BATCH_SIZE = 8
FAULTY_STEP = 1
TASKS = ("detection", "captioning")


def tiny_model(stem):
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name="vit", stem=stem, stem_blocks=1, dim=32, num_layers=2, num_heads=2, mlp_dim=64, drop_path=0.0
    )
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64, dropout=0.0, drop_path=0.0)
    return build_model(ModelConfig(image_size=(32, 32), encoder=encoder, decoder=decoder, vocab=VOCAB)).train()


def random_batch(seed, part):
    """Return this rank's part of a batch of two tasks. Images differ in their sequences and scored tokens."""
    samples = []
    for number, name in enumerate(TASKS):
        rng = np.random.default_rng((seed, number))
        shares = np.linspace(0.1, 0.9, BATCH_SIZE)
        lengths = rng.integers(10, 25, (BATCH_SIZE, number + 1)).tolist()
        drawn = [random_sample(rng, {name: lengths[i]}, VOCAB.size, scored=shares[i]) for i in range(BATCH_SIZE)]
        samples += drawn[part]
    return collate(samples, TASKS)


class Sgd(torch.optim.SGD):
    """SGD of finite steps: only its fused form takes `found_inf`, but not with the shards of FSDP."""

    _step_supports_amp_scaling = True

    def step(self):
        assert not self.found_inf
        self.found_inf = None
        super().step()


def state(model, optimizer):
    """Return the weights, statistics and optimiser state."""
    values = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return [*model.state_dict().values(), *values]


def train(ranks, parallel, stem, trait=None):
    """Train three steps with two micro-batches each, with SGD to compare, because Adam magnifies rounding."""
    model = tiny_model(stem)
    training_model = TrainingModel(model, CrossEntropy(), ranks=ranks, parallel=parallel)
    if trait == "nan":
        optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    else:
        optimizer = Sgd(model.parameters(), lr=0.1, momentum=0.9)
    ema = Ema(model, 0.9)
    part = rank_slice(BATCH_SIZE, ranks.rank, ranks.size)
    if trait == "uneven" and ranks.size == 2:
        part = [slice(3), slice(3, BATCH_SIZE)][ranks.rank]
    steps = []
    for step in range(3):
        faulty = trait == "nan" and step == FAULTY_STEP and ranks.rank == ranks.size - 1
        hook = model.encoder.stem.register_forward_hook(lambda module, args, x: x * torch.nan) if faulty else None
        before = [local_tensor(tensor).clone() for tensor in state(model, optimizer)]
        micro_batches = [random_batch(10 * step + m, part) for m in range(2)]
        result = train_step(training_model, optimizer, micro_batches, {"captioning": 0.5}, max_grad_norm=1.0)
        after = [local_tensor(tensor) for tensor in state(model, optimizer)]
        changed = len(after) != len(before) or any(not torch.equal(*pair) for pair in zip(after, before, strict=True))
        if result.finite:
            ema.update(model, step + 1)
        if hook is not None:
            hook.remove()
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm, **result.losses}
        steps.append({name: value.item() for name, value in numbers.items()} | {"changed": changed})
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
