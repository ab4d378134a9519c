"""A tiny model of random weights that answers clicks, with nonsense."""

import torch

from pix2seq import Predictor
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks.prompted import Prompted, PromptedConfig
from pix2seq.types import Category
from pix2seq.vocab import Vocab

SIZE = (64, 64)
VOCAB = Vocab(num_bins=64, text_base=1100, size=1100)
CONFIG = PromptedConfig(max_clicks=6, max_points=24, even_points=12, short_points=6, grid=3, num_samples=4)


def untrained_predictor(categories=(), *, varied=False):
    """With `varied` weights, answers to different clicks differ."""
    categories = categories or (Category(1, 1, "object"),)
    torch.manual_seed(0)
    encoder = EncoderConfig(
        "vit", stem="conv", closeups=True, dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16
    )
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=100)
    model = build_model(ModelConfig(SIZE, encoder=encoder, decoder=decoder, vocab=VOCAB), categories)
    model.task_settings = {"prompted": Prompted(CONFIG, VOCAB, categories).settings()}
    if varied:
        torch.manual_seed(2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return Predictor(model)
