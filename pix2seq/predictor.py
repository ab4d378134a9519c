"""Ask a trained model about pictures: encode once, ask many things.

Results are in pixels of the original picture (x right, y down, after its EXIF orientation), with the
same types whatever came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pix2seq.affine import fit_affine
from pix2seq.data.image import read_image
from pix2seq.data.target import Instance
from pix2seq.device import pick_device
from pix2seq.errors import InputError
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.tasks import TASKS
from pix2seq.tasks.detection import Detection
from pix2seq.tokenizers.detection import TOKENS_PER_OBJECT
from pix2seq.training.checkpoint import find_checkpoint

ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the decoder sees it, and as people do. Held by the caller."""

    memory: Tensor  # (N, D)
    pixels: NDArray[np.uint8]  # (H, W, 3), the picture itself
    canvas_size: tuple[float, float]  # width, height in original pixels of the model's whole input, padding included

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return self.pixels.shape[1], self.pixels.shape[0]


class Predictor:
    """A model with everything around it: reading, resizing, asking and reading the answers."""

    def __init__(self, model: Pix2Seq, *, bf16: bool = False) -> None:
        self.model = model.eval()
        self.bf16 = bf16
        self.tasks = {
            name: TASKS[name].from_settings(model, settings) for name, settings in model.task_settings.items()
        }

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str = "auto", bf16: bool = False) -> Self:
        """Open a checkpoint folder, or the newest checkpoint of a run folder."""
        model = Pix2Seq.from_pretrained(find_checkpoint(Path(path)))
        return cls(model.to(pick_device(device)), bf16=bf16)

    def encode(self, image: ImageLike) -> EncodedImage:
        """Read and encode one picture: a path, a PIL image, an array (H, W, 3) or (H, W) of uint8, or a
        tensor (3, H, W) of uint8 or of floats in [0, 1]."""
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[ImageLike]) -> list[EncodedImage]:
        """As `encode`, for several pictures of any sizes in one pass."""
        pictures = [load_pixels(image) for image in images]
        size = self.model.config.image_size
        affines = [fit_affine(pixels.shape[:2], size) for pixels in pictures]
        inputs = np.stack([affine.image(pixels, size) for affine, pixels in zip(affines, pictures, strict=True)])
        batch = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self.model.device).float() / 255
        with torch.inference_mode(), self._autocast():
            memory = self.model.encode(batch)
        return [
            EncodedImage(rows, pixels, (size[1] / affine.scale_x, size[0] / affine.scale_y))
            for rows, pixels, affine in zip(memory, pictures, affines, strict=True)
        ]

    def detect(self, image: EncodedImage | ImageLike, *, seed: int = 0) -> list[Instance]:
        """Objects of one picture, best first."""
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        return self.detect_batch([encoded], seed=seed)[0]

    def detect_batch(self, images: Sequence[EncodedImage], *, seed: int = 0) -> list[list[Instance]]:
        """As `detect`, for several encoded pictures in one pass. `seed` fixes what sampling draws."""
        task = self._task("detection")
        memory = torch.stack([image.memory for image in images])
        prompt = torch.from_numpy(task.prompt()).expand(len(images), -1)
        with torch.inference_mode(), self._autocast():
            out = self.model.generate(
                memory,
                prompt,
                max_new_tokens=task.max_new_tokens,
                temperature=task.config.temperature,
                top_k=task.config.top_k,
                top_p=task.config.top_p,
                grammar=task.grammar(),
                score_range=task.score_range,
                eos_id=task.eos_id,
                generator=torch.Generator(memory.device).manual_seed(seed),
            )
        return [task.instances(out, row, np.array(image.canvas_size), image.size) for row, image in enumerate(images)]

    def set_num_objects(self, num_objects: int) -> None:
        """Ask for this many objects from now on, whether or not the model would end before."""
        task = self._task("detection")
        config = replace(task.config, num_objects=num_objects)
        self.tasks["detection"] = Detection(config, self.model.config.vocab, self.model.categories)
        if self.tasks["detection"].max_seq_len > self.model.decoder.max_seq_len:
            most = (self.model.decoder.max_seq_len - 2) // TOKENS_PER_OBJECT
            raise InputError(f"{num_objects} objects are more than this checkpoint can list; ask for at most {most}")

    def _task(self, name: str) -> Detection:
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "no task"
            raise InputError(f"this checkpoint was not trained for {name}; it knows {known}")
        return self.tasks[name]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)


def load_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Any accepted form of a picture to uint8 pixels (H, W, 3). Raises `InputError` for all others."""
    if not isinstance(image, Tensor):
        return read_image(image)
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"expected a tensor (3, H, W), got one of shape {tuple(image.shape)}")
    values = image.detach().cpu()
    if values.dtype != torch.uint8:
        if not values.is_floating_point() or values.min() < 0 or values.max() > 1:
            raise InputError("expected a tensor of uint8, or of floats in [0, 1]")
        values = (values.float() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())
