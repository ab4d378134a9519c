"""Pix2Seq in PyTorch: pictures to sequences of tokens to boxes, polygons, keypoints and captions."""

from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.predictor import Predictor

__all__ = ["Pix2Seq", "Predictor"]
