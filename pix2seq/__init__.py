"""Pix2Seq in PyTorch: images to sequences of tokens to boxes, polygons, keypoints and captions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pix2seq.convert.checkpoint import convert_checkpoint
    from pix2seq.model.hub import push_to_hub
    from pix2seq.model.pix2seq import Pix2Seq
    from pix2seq.predictor import Predictor
    from pix2seq.tasks import register_task

__all__ = ["Pix2Seq", "Predictor", "convert_checkpoint", "push_to_hub", "register_task"]

_HOMES = {
    "Pix2Seq": "pix2seq.model.pix2seq",
    "Predictor": "pix2seq.predictor",
    "convert_checkpoint": "pix2seq.convert.checkpoint",
    "push_to_hub": "pix2seq.model.hub",
    "register_task": "pix2seq.tasks",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: torch and timm take seconds to import, and `pix2seq --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
