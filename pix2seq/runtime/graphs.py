"""The folder of an exported model: its settings, and its graphs, which onnxruntime runs.

Shapes: B memories, I rows that read the same memory, R = B * I rows, P prompt tokens, t cached tokens, H heads, d head
width, N memory tokens, D width, V vocabulary size, C channels of a map, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.errors import InputError
from pix2seq.files import read_json
from pix2seq.metrics.calibration import TaskCalibration
from pix2seq.tokenizers.text import TextTokenizer, has_text_tokenizer, load_text_tokenizer
from pix2seq.types import Category
from pix2seq.vocab import Vocab

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.bin"
FORMAT = 1  # of the folder
CPU = ("CPUExecutionProvider",)
EXPORT = "write it with pix2seq export --format onnx"

Floats = NDArray[np.float32]


def graph_file(name: str) -> str:
    """Return the file of a graph: `encoder`, `closeup`, `prefill` or `step`."""
    return f"{name}.onnx"


@dataclass(frozen=True)
class ExportedConfig:
    """What an exported model's ids mean, and how it is asked."""

    image_size: tuple[int, int]  # height, width of the input
    max_seq_len: int
    vocab: Vocab
    categories: tuple[Category, ...]
    tasks: dict[str, dict[str, Any]]  # settings of each task
    text: TextTokenizer | None
    calibration: dict[str, TaskCalibration]  # by task

    @classmethod
    def read(cls, folder: Path) -> ExportedConfig:
        """Read config.json and the text tokenizer. Raises `InputError` if the folder holds no exported model."""
        path = folder / CONFIG_FILE
        try:
            content = read_json(path)
            if "onnx" not in content:
                raise InputError(f"{folder} is a checkpoint; {EXPORT}")
            found = content["onnx"]["format"]
            if type(found) is not int or not 1 <= found <= FORMAT:
                raise InputError(f"{path} has format {found}, this release reads {FORMAT}; use the one that wrote it")
            model = content["model"]
            height, width = map(int, model["image_size"])
            return cls(
                (height, width),
                int(model["decoder"]["max_seq_len"]),
                Vocab(**model["vocab"]),
                tuple(map(Category.from_json, content["categories"])),
                {str(name): dict(settings) for name, settings in content["tasks"].items()},
                load_text_tokenizer(folder) if has_text_tokenizer(folder) else None,
                {str(name): TaskCalibration.from_json(each) for name, each in content.get("calibration", {}).items()},
            )
        except FileNotFoundError:
            raise InputError(f"{folder} holds no exported model: there is no {CONFIG_FILE}; {EXPORT}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {EXPORT}") from None


class Graph:
    """One graph; inputs and outputs are arrays in the graph's order."""

    def __init__(self, path: Path, options: Any, providers: Sequence[str]) -> None:
        """Raises `InputError` if the file is missing or damaged."""
        import onnxruntime

        if not path.is_file():
            raise InputError(f"{path} is missing; {EXPORT}")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # onnxruntime's own classes are not public
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path} cannot be loaded ({reason}); {EXPORT}") from None
        self.inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, *arrays: NDArray[Any]) -> list[Floats]:
        """Compute all outputs."""
        return self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))


@dataclass
class Cache:
    """Keys and values between steps, in the order in which the step takes them."""

    length: int  # t
    of_tokens: list[Floats]  # keys, then values of each layer, (B, I, H, t, d)
    of_memory: list[Floats]  # keys, then values of each layer, (B, H, N, d)

    def keep(self, memories: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Keep these memories (B',), and of each the rows (B', I')."""
        self.of_tokens = [each[memories[:, None], rows] for each in self.of_tokens]
        self.of_memory = [each[memories] for each in self.of_memory]


class Graphs:
    """All graphs of an exported model."""

    def __init__(self, folder: Path, *, num_threads: int | None = None, providers: Sequence[str] = CPU) -> None:
        """`num_threads` of a single operation; None: onnxruntime's choice. Raises `InputError` if one is damaged."""
        try:
            import onnxruntime
        except ImportError:
            raise InputError("an exported model needs the package onnxruntime; install it") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        # Threads that wait give up their core: beside other busy processes, spinning would take it from them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        load = [folder / graph_file(name) for name in ("encoder", "prefill", "step", "closeup")]
        self._encoder, self._prefill, self._step = (Graph(path, options, providers) for path in load[:3])
        self._closeup = Graph(load[3], options, providers) if load[3].is_file() else None
        self._num_layers = (len(self._step.inputs) - 2) // 4

    def encode(self, images: Floats) -> tuple[Floats, list[Floats]]:
        """Return memory (B, N, D) and maps (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""
        memory, *maps = self._encoder(images)
        return memory, maps

    def look_closer(self, frames: Floats, maps: Sequence[Floats]) -> Floats:
        """Return memories (F, N, D) of frames (F, 4), `yxyx` in [0, 1] of one image, from its maps (C, h, w)."""
        if self._closeup is None:
            raise InputError(f"{graph_file('closeup')} is missing from the exported model; {EXPORT}")
        return self._closeup(frames, *(each[None] for each in maps))[0]

    def prefill(self, prompts: NDArray[np.int64], memory: Floats) -> tuple[Floats, Cache]:
        """Return the logits (R, V) after prompts (B, I, P) on memory (B, N, D), and a new cache."""
        logits, *cache = self._prefill(prompts, memory)
        split = 2 * self._num_layers
        return logits, Cache(prompts.shape[2], cache[:split], cache[split:])

    def step(self, tokens: NDArray[np.int64], cache: Cache) -> Floats:
        """Read the next tokens (B, I), add them to the cache, and return the logits (R, V) after them."""
        position = np.array([cache.length], np.int64)
        logits, *cache.of_tokens = self._step(tokens[..., None], position, *cache.of_tokens, *cache.of_memory)
        cache.length += 1
        return logits
