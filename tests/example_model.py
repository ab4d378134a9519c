"""A tiny model of random weights that is asked by examples, and answers with nonsense."""

import torch

from pix2seq import Predictor
from pix2seq.model.config import DecoderConfig, EncoderConfig, MemoryConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks.by_example import ByExample, ByExampleConfig
from pix2seq.types import Category
from pix2seq.vocab import Vocab

SIZE = (64, 64)
VOCAB = Vocab(num_bins=64, text_base=1100, size=1100)
CONFIG = ByExampleConfig(max_objects=6, max_examples=3, noise_objects=2, top_p=1.0)


def untrained_model(*, config=CONFIG, references=3, seed=0):
    """Weights are drawn so that answers to different examples differ."""
    torch.manual_seed(seed)
    encoder = EncoderConfig(
        "vit", stem="conv", closeups=True, dim=32, num_layers=1, num_heads=2, mlp_dim=64, patch_size=16, drop_path=0.0
    )
    decoder = DecoderConfig(dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_seq_len=64, dropout=0.0, drop_path=0.0)
    settings = ModelConfig(
        SIZE, encoder=encoder, memory=MemoryConfig(references=references), decoder=decoder, vocab=VOCAB
    )
    model = build_model(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    categories = [Category(1, 1, "object")]
    model.task_settings = {"by_example": ByExample(config, VOCAB, categories).settings()} if references else {}
    return model.eval()


def untrained_predictor(**options):
    return Predictor(untrained_model(**options))
