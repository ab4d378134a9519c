"""Start a model from the weights of another: fine-tuning, with other classes too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.model.config import ModelConfig
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import find_checkpoint, read_config
from pix2seq.training.config import TrainConfig
from pix2seq.types import category_key
from pix2seq.vocab import CLASS_BASE

VOCAB_ROWS = ("decoder.token_embedding.weight", "decoder.output_embedding.weight", "decoder.output_bias")
POSITIONS = "decoder.position_embedding"


def with_model_of_start(config: TrainConfig) -> TrainConfig:
    """Settings with the model of the checkpoint in `config.init`, where they say nothing about the model themselves.

    Its words are left out: they come with the captions that are learned.
    """
    if config.init is None or config.model != ModelConfig():
        return config
    start, _, _ = read_config(find_checkpoint(Path(config.init)))
    vocab = start.vocab
    if vocab.num_text:
        vocab = replace(vocab, num_text=0, size=vocab.text_base)
    return replace(config, model=replace(start, vocab=vocab))


@torch.no_grad()
def start_from(model: Pix2Seq, start: Pix2Seq, name: str) -> str:
    """Copy the weights of `start` into `model`, and say in a line what became of its vocabulary.

    Rows of the vocabulary go by their meaning: classes and words by name, coordinates by their bin.
    What `start` does not know stays fresh. Raises `InputError` where anything else has another shape;
    `name` is what the message calls `start`.
    """
    ours, theirs = model.state_dict(), start.state_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        fits = key in ours and key in theirs and ours[key].shape[1:] == theirs[key].shape[1:]
        if not fits or (key not in (*VOCAB_ROWS, POSITIONS) and ours[key].shape != theirs[key].shape):
            raise InputError(f"init={name} is another model (see {key}); use model settings that equal its config.json")
    into, source, summary = _rows_by_meaning(model, start)
    for key, tensor in ours.items():
        if key in VOCAB_ROWS:
            tensor[into] = theirs[key][source].to(tensor)
        elif key == POSITIONS:
            length = min(len(tensor), len(theirs[key]))
            tensor[:length] = theirs[key][:length].to(tensor)
        else:
            tensor.copy_(theirs[key])
    return summary


def _rows_by_meaning(model: Pix2Seq, start: Pix2Seq) -> tuple[Tensor, Tensor, str]:
    """Ids of ours and of theirs that mean the same, and how many classes were found."""
    ours, theirs = model.config.vocab, start.config.vocab
    pairs = [(token, token) for token in range(CLASS_BASE)]
    if ours.num_bins == theirs.num_bins:
        pairs += [(ours.coord_base + i, theirs.coord_base + i) for i in range(ours.num_bins)]
    known = {category_key(category.name): category.label for category in start.categories}
    classes = [
        (CLASS_BASE + category.label, CLASS_BASE + known[category_key(category.name)])
        for category in model.categories
        if category_key(category.name) in known
    ]
    words: list[tuple[int, int]] = []
    if model.text is not None and start.text is not None:
        known_words = {token: token_id for token_id, token in enumerate(start.text.tokens)}
        words = [
            (ours.text_base + token_id, theirs.text_base + known_words[token])
            for token_id, token in enumerate(model.text.tokens)
            if token in known_words
        ]
    into, source = torch.tensor(pairs + classes + words).T
    summary = f"{len(classes)} of {len(model.categories)} classes were known by name"
    if ours.num_bins != theirs.num_bins:
        summary += f", coordinates are new ({theirs.num_bins} bins before)"
    if model.text is not None:
        summary += f", {len(words)} of {model.text.size} words were known"
    return into, source, summary
