"""A model of random weights whose answers differ: the checkpoint of release 0.1, four tasks, drawn anew."""

from pathlib import Path

import torch

from pix2seq import Pix2Seq

OLD = Path(__file__).parent / "fixtures" / "checkpoint-0.1"  # written by 14286fe: four tasks, random weights


def random_model(likely=lambda category: True, bias=3.0):
    """Return the model; `bias` makes the classes likelier that `likely` accepts."""
    model = Pix2Seq.from_pretrained(OLD)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.decoder.output_bias[[100 + category.label for category in model.categories if likely(category)]] += bias
    return model
