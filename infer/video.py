"""Read frames of a video, and write the drawings of them as another, with OpenCV."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pix2seq.errors import InputError

CODEC = "mp4v"  # MPEG-4, which every build of OpenCV can write
FPS = 25.0  # of videos that do not say


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    number: int  # from 0
    pixels: NDArray[np.uint8]  # (H, W, 3), upright


class VideoReader:
    """The frames of a video, every `stride`-th of them."""

    def __init__(self, path: Path, *, stride: int = 1) -> None:
        """Raises `InputError` if it cannot be opened."""
        if not os.path.isfile(path):
            raise InputError(f"{path} {'is no file' if os.path.lexists(path) else 'does not exist'}; check the path")
        self.path, self.stride = path, stride
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise InputError(
                f"{path} cannot be opened as a video; expected one that FFmpeg reads, such as MP4 in H.264"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else FPS
        self.num_listed = max(int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)  # as the file says; 0: it does not
        self.num_read = 0

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames. Raises `InputError` if there is none."""
        while self._capture.grab():
            number, self.num_read = self.num_read, self.num_read + 1
            if number % self.stride == 0:
                decoded, bgr = self._capture.retrieve()
                if not decoded:
                    break
                yield Frame(number, np.ascontiguousarray(bgr[..., ::-1]))
        self._capture.release()
        if not self.num_read:
            raise InputError(f"{self.path} has no frame that can be decoded; convert it, for example to MP4 in H.264")


class VideoWriter:
    """A video of images, all at the size of the first one; later ones are cut, or filled with white, below."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.num_written = 0
        self._writer: Any = None
        self._size = (0, 0)

    def add(self, image: Image.Image) -> None:
        """Append an image. Raises `InputError` if the file cannot be written."""
        if self._writer is None:
            self._size = (image.width + image.width % 2, image.height + image.height % 2)  # the codec halves colours
            self._writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*CODEC), self.fps, self._size)
            if not self._writer.isOpened():
                raise InputError(f"{self.path} cannot be written as a video; check the folder and the disk")
        canvas = Image.new("RGB", self._size, "white")
        canvas.paste(image)
        self._writer.write(np.ascontiguousarray(np.asarray(canvas)[..., ::-1]))
        self.num_written += 1

    def close(self) -> None:
        """Complete the file. Raises `InputError` if it lacks frames, of which OpenCV does not tell."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        num_frames = VideoReader(self.path).num_listed
        if num_frames != self.num_written:
            raise InputError(f"{self.path} has {num_frames} of {self.num_written} frames; check the space on the disk")
