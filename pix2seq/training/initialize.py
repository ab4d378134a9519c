"""Initialise a model from the weights of another, for fine-tuning, also with other classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.model.config import ModelConfig
from pix2seq.model.encoders.build import build_encoder
from pix2seq.model.encoders.encoder import Encoder
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import find_checkpoint, read_config
from pix2seq.training.config import TrainConfig
from pix2seq.types import category_key
from pix2seq.vocab import CLASS_BASE

REFERENCES = "reference_embedding"
# What a model may have and its source not, or the other way round.
ADDED = ("contrast.", "encoder.colour.", REFERENCES)
VOCAB_ROWS = ("decoder.token_embedding.weight", "decoder.output_embedding.weight", "decoder.output_bias")
POSITIONS = "decoder.position_embedding"


def with_init_model(config: TrainConfig) -> TrainConfig:
    """Return the settings with the model of the checkpoint `config.init`, unless they set the model themselves.

    `model.contrast` alone may be set beside it. The checkpoint's text tokens are left out, because those of a run come
    from its own captions.
    """
    contrast = config.model.contrast
    if config.init is None or config.model != ModelConfig(contrast=contrast):
        return config
    source, _, _ = read_config(find_checkpoint(Path(config.init)))
    vocab = source.vocab
    if vocab.num_text:
        vocab = replace(vocab, num_text=0, size=vocab.text_base)
    return replace(config, model=replace(source, vocab=vocab, contrast=contrast or source.contrast))


def initial_encoder(config: TrainConfig) -> Encoder:
    """Return the encoder that a run with these settings starts from, in evaluation mode.

    Raises `InputError` if the checkpoint `config.init` has another one.
    """
    torch.manual_seed(config.seed)  # as in a run, which builds its encoder first
    model = config.model
    encoder = build_encoder(model.encoder, model.image_size, model.positions, load_pretrained=config.init is None)
    if config.init is not None:
        source = Pix2Seq.from_pretrained(find_checkpoint(Path(config.init))).encoder
        try:
            encoder.load_state_dict(source.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{config.init} has another encoder ({reason}); leave model.encoder out") from None
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def initialize_from(model: Pix2Seq, source: Pix2Seq, name: str) -> str:
    """Copy the weights of `source` into `model`, and return one line that says how much of the vocabulary matched.

    Rows of the vocabulary are matched by meaning: classes and words by name, coordinates by bin. Rows without
    a match keep their fresh weights, and so does what `source` does not have of `ADDED`. Raises `InputError` if any
    other shape differs; the message calls `source` `name`.
    """
    ours, theirs = model.state_dict(), source.state_dict()
    for prefix in ADDED:
        if not all(any(key.startswith(prefix) for key in each) for each in (ours, theirs)):
            ours, theirs = (
                {key: tensor for key, tensor in each.items() if not key.startswith(prefix)} for each in (ours, theirs)
            )
    for key in sorted(ours.keys() | theirs.keys()):
        fits = key in ours and key in theirs and ours[key].shape[1:] == theirs[key].shape[1:]
        if not fits or (key not in (*VOCAB_ROWS, POSITIONS, REFERENCES) and ours[key].shape != theirs[key].shape):
            raise InputError(f"init={name} is another model (see {key}); use model settings that equal its config.json")
    to_rows, from_rows, summary = _matching_rows(model, source)
    for key, tensor in ours.items():
        if key in VOCAB_ROWS:
            tensor[to_rows] = theirs[key][from_rows].to(tensor)
        elif key in (POSITIONS, REFERENCES):
            length = min(len(tensor), len(theirs[key]))
            tensor[:length] = theirs[key][:length].to(tensor)
        else:
            tensor.copy_(theirs[key])
    return summary


def _matching_rows(model: Pix2Seq, source: Pix2Seq) -> tuple[Tensor, Tensor, str]:
    """Return ids of `model` and the ids of `source` with the same meaning, and a summary of the matches."""
    ours, theirs = model.config.vocab, source.config.vocab
    pairs = [(token, token) for token in range(CLASS_BASE) if token not in ours.other_tasks.values()]
    pairs += [
        (ours.other_tasks[name], theirs.other_tasks[name]) for name in ours.other_tasks.keys() & theirs.other_tasks
    ]
    if ours.num_bins == theirs.num_bins:
        pairs += [(ours.coord_base + i, theirs.coord_base + i) for i in range(ours.num_bins)]
    known = {category_key(category.name): category.label for category in source.categories}
    classes = [
        (CLASS_BASE + category.label, CLASS_BASE + known[category_key(category.name)])
        for category in model.categories
        if category_key(category.name) in known and category.label <= ours.max_label
    ]
    words: list[tuple[int, int]] = []
    if model.text is not None and source.text is not None:
        known_words = {token: token_id for token_id, token in enumerate(source.text.tokens)}
        words = [
            (ours.text_base + token_id, theirs.text_base + known_words[token])
            for token_id, token in enumerate(model.text.tokens)
            if token in known_words
        ]
    to_rows, from_rows = torch.tensor(pairs + classes + words).T
    summary = f"{len(classes)} of {len(model.categories)} classes were known by name"
    if ours.num_bins != theirs.num_bins:
        summary += f", coordinates are new ({theirs.num_bins} bins before)"
    if model.text is not None:
        summary += f", {len(words)} of {model.text.size} words were known"
    return to_rows, from_rows, summary
