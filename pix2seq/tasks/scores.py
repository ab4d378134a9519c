"""What a sequence is worth as an answer. Reference: google-research/pix2seq, `compute_weighted_scores`.

Shapes: R rows, T tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pix2seq.vocab import PAD


def token_score(tokens: Tensor, logprobs: Tensor) -> NDArray[np.float64]:
    """Mean likelihood (R,) of the tokens (R, T) that are no padding; 0 for a row without any."""
    counted = (tokens != PAD).cpu().numpy()
    likelihoods = np.exp(logprobs.double().cpu().numpy()) * counted
    return likelihoods.sum(axis=1) / np.maximum(counted.sum(axis=1), 1)


def weighted_score(box_score: float, likelihood: float, weight: float) -> float:
    """`weight` of the likelihood of an object's sequence, the rest of its box's score."""
    return weight * likelihood + (1 - weight) * box_score
