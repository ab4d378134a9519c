"""Random samples, and slow forms for comparison: the loss of each sequence alone, attention of one after another."""

import numpy as np
import torch
import torch.nn.functional as F

from pix2seq.examples import Example, Sample


def random_sample(rng, lengths, vocab_size, *, image_id=0, size=32, scored=0.7):
    """Return a noise image with sequences of these lengths, by task; a share `scored` of their tokens has a weight."""
    examples = {}
    for name, some in lengths.items():
        examples[name] = []
        for length in some:
            ids = rng.integers(1, vocab_size, length + 1)
            weights = np.where(rng.random(length) < scored, rng.random(length), 0).astype(np.float32)
            examples[name].append(Example(ids[:1], ids[1:], rng.integers(1, vocab_size, length), weights))
    return Sample(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), examples, image_id)


def sums_one_by_one(model, samples, label_smoothing=0.0):
    """Return what `CrossEntropy` computes, by task, with one pass for each sequence."""
    sums = {}
    for sample in samples:
        whole, maps = model.encode_with_maps(torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255)
        for name, examples in sample.examples.items():
            for example in examples:
                memory = whole
                if example.closeup is not None:
                    memory = model.look_closer(maps, torch.from_numpy(example.closeup)[None], [0])
                if example.others:
                    parts = [memory, *(memory_of(model, sample, name, view) for view in example.others)]
                    marks = [model.reference_embedding[i] for i in range(len(example.others))]
                    memory = torch.cat([memory, *(part + mark for part, mark in zip(parts[1:], marks, strict=True))], 1)
                tokens, targets, weights = map(torch.from_numpy, example.shifted())
                logits = model.decoder.logits(model.decoder(tokens[None], memory))[0]
                if example.choices is not None:
                    ids = torch.arange(logits.shape[1])
                    for row, (low, high, *singles) in enumerate(example.choices.tolist(), len(example.prompt) - 1):
                        possible = (ids >= low) & (ids < high) | torch.isin(ids, torch.tensor(singles))
                        logits[row] = logits[row].masked_fill(~possible, -torch.inf)
                losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
                sums[name] = sums.get(name, 0.0) + (losses * weights).sum()
    return sums


def memory_of(model, sample, name, view):
    """Return the memory (1, N, D) of what a sequence reads beside its image."""
    image = sample.image if view.companion is None else sample.companions[name][view.companion]
    whole, maps = model.encode_with_maps(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    return whole if view.closeup is None else model.look_closer(maps, torch.from_numpy(view.closeup)[None], [0])


def varlen_by_loop(q, k, v, q_borders, k_borders, longest_q, longest_k, **causal):
    """`varlen_attn` as its documentation says, one run after another."""
    assert causal in ({}, {"is_causal": True}, {"window_size": (-1, 0)})
    assert q_borders.dtype == k_borders.dtype == torch.int32
    assert longest_q >= q_borders.diff().max()
    assert longest_k >= k_borders.diff().max()
    out = []
    for i in range(len(q_borders) - 1):
        rows, keys = slice(*q_borders[i : i + 2].tolist()), slice(*k_borders[i : i + 2].tolist())
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys]))
    return torch.cat(out)
