"""A fake decoder with given logits, to test generation."""

import torch

KINDS = ["random", "minus infinity", "nan", "infinity", "1e4", "mixed"]


class HostileDecoder(torch.nn.Module):
    """A decoder with the logits that `draw` returns for (rows, vocabulary)."""

    def __init__(self, draw, vocab_size):
        super().__init__()
        self.draw = draw
        self.vocab_size = vocab_size

    def new_cache(self, memory, *, rows_per_image, num_slots):
        return None

    def step(self, tokens, cache):
        return self.draw((len(tokens), self.vocab_size))

    def logits(self, hidden):
        return hidden


def logits_of_kind(kind, seed):
    """Return a function from (rows, vocabulary) to new logits of one of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        normal = torch.randn(shape, generator=generator)
        if kind == "mixed":
            odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0])
            picked = odd[torch.randint(len(odd), shape, generator=generator)]
            return torch.where(torch.rand(shape, generator=generator) < 0.5, picked, normal)
        return {
            "random": normal * 4,
            "minus infinity": torch.full(shape, -torch.inf),
            "nan": torch.full(shape, torch.nan),
            "infinity": torch.full(shape, torch.inf),
            "1e4": normal * 1e4,
        }[kind]

    return draw
