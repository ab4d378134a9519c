"""Run by several processes in test_contrast.py: train some steps on images and sentences that are compared."""

from dataclasses import replace

import numpy as np
import torch
from one_by_one import random_sample
from ranks import BATCH_SIZE, VOCAB, Sgd

from pix2seq.data.sampler import rank_slice
from pix2seq.examples import collate
from pix2seq.model.config import ContrastConfig, DecoderConfig, EncoderConfig, MemoryConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.training.contrast import ContrastiveLoss, Queue
from pix2seq.training.distributed import full_tensor, join_ranks
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.step import TrainingModel, train_step

TASK = "matching"
EMBED_DIM = 16


def tiny_model(references=0):
    torch.manual_seed(0)
    encoder = EncoderConfig(name="vit", dim=32, num_layers=1, num_heads=2, mlp_dim=64, drop_path=0.0)
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64, dropout=0.0, drop_path=0.0)
    memory, contrast = MemoryConfig(references=references), ContrastConfig(EMBED_DIM)
    config = ModelConfig((32, 32), encoder=encoder, memory=memory, decoder=decoder, vocab=VOCAB, contrast=contrast)
    return build_model(config).train()


def random_samples(seed):
    """Return images with up to two sentences each, some of which several images have; the first three have none."""
    rng = np.random.default_rng(seed)
    known = [rng.integers(1, VOCAB.size, length) for length in (3, 5, 6, 9, 12)]
    samples = []
    for number in range(BATCH_SIZE):
        sample = random_sample(rng, {TASK: [4, 7]}, VOCAB.size, image_id=number)
        count = 0 if number < 3 else int(rng.integers(1, 3))
        examples = [
            replace(example, sentence=known[int(rng.integers(len(known)))] if i < count else None)
            for i, example in enumerate(sample.examples[TASK])
        ]
        samples.append(replace(sample, examples={TASK: examples}))
    return samples


def train(ranks, parallel, uneven=None):
    """Train three steps with two micro-batches each. With `uneven`, the first rank has no sentence."""
    model = tiny_model()
    queue = Queue.empty(20, EMBED_DIM, ranks.device)
    objective = CrossEntropy(contrast=ContrastiveLoss(ranks, queue))
    training_model = TrainingModel(model, objective, ranks=ranks, parallel=parallel)
    optimizer = Sgd(model.parameters(), lr=0.1, momentum=0.9)
    part = rank_slice(BATCH_SIZE, ranks.rank, ranks.size)
    if uneven is not None and ranks.size == 2:
        part = [slice(3), slice(3, BATCH_SIZE)][ranks.rank]
    steps = []
    for step in range(3):
        micro_batches = [collate(random_samples(10 * step + m)[part], [TASK]) for m in range(2)]
        result = train_step(training_model, optimizer, micro_batches, {"contrast": 0.5}, max_grad_norm=1.0)
        steps.append({"grad_norm": result.grad_norm.item()} | {k: v.item() for k, v in result.losses.items()})
    return {
        "steps": ranks.gather(steps),
        "weights": {name: full_tensor(tensor).clone() for name, tensor in model.state_dict().items()},
        "queue": {name: tensor.clone() for name, tensor in queue.state.items()},
    }


def main(out, *runs):
    """Run each PARALLEL or PARALLEL-uneven."""
    with join_ranks("cpu") as ranks:
        results = {run: train(ranks, *run.split("-")) for run in runs}
        if ranks.first:
            torch.save(results, out)
