"""Run an exported model without PyTorch: `python -m pix2seq.runtime MODEL_DIR IMAGE --task ...`.

It needs NumPy, onnxruntime, Pillow, opencv-python-headless, omegaconf and safetensors, pycocotools for masks, and
sentencepiece for checkpoints with such a text model. Write the folder with `pix2seq export --format onnx`.
"""

from pix2seq.runtime.runner import Runner

__all__ = ["Runner"]
