"""Ask an exported model about images, as `pix2seq.predictor.Predictor` asks a checkpoint.

Tasks make the questions and read the answers, which are of the same types and in pixels of the original image. With the
same seed, the same numbers are drawn as in PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pix2seq.data.image import ImageSource, read_image, warp_image
from pix2seq.errors import InputError
from pix2seq.geometry.affine import fit_affine
from pix2seq.model.decoding.completion import Completion, is_greedy
from pix2seq.runtime.generate import generate, uniform
from pix2seq.runtime.graphs import CPU, ExportedConfig, Floats, Graphs
from pix2seq.tasks import get_task, task_names
from pix2seq.tasks.objects import given_objects
from pix2seq.tasks.request import EncodedImage, Request
from pix2seq.tasks.task import Task
from pix2seq.types import Caption, Instance

MAX_ROWS = 512  # sequences that are decoded side by side
MAX_CROPS = 16  # crops that are encoded side by side
MAX_CLOSEUPS = 64  # closeups that are encoded side by side


class Runner:
    """An exported model with everything around it: reading, resizing, asking and reading the answers.

    What cannot be used raises `InputError`. Several threads may ask at the same time.
    """

    def __init__(self, folder: str | Path, *, num_threads: int | None = None, providers: Sequence[str] = CPU) -> None:
        """Open what `pix2seq export --format onnx` wrote.

        `num_threads` are those of one operation; by default onnxruntime takes all cores. `providers` are onnxruntime's.
        """
        folder = Path(folder)
        self.config = ExportedConfig.read(folder)
        self.graphs = Graphs(folder, num_threads=num_threads, providers=providers)
        known = task_names()
        self.tasks: dict[str, Task[Any]] = {
            name: get_task(name).from_settings(settings, self.config.vocab, self.config.categories, self.config.text)
            for name, settings in self.config.tasks.items()
            if name in known
        }

    def configure(self, task: str, **settings: Any) -> None:
        """Change settings of a task, such as `num_samples=1`.

        Raises `InputError` for one that is out of range or needs longer sequences than the model has.
        """
        changed = self._task(task).with_settings(**settings)
        if changed.max_seq_len > self.config.max_seq_len:
            raise InputError(
                f"{settings} of {task} needs sequences of {changed.max_seq_len} tokens, but this model ends at "
                f"{self.config.max_seq_len}; lower it"
            )
        self.tasks[task] = changed

    def encode(self, image: ImageSource) -> EncodedImage:
        """Read and encode one image: a path, encoded bytes, a PIL image, or an array (H, W, 3) or (H, W) of uint8."""
        pixels = read_image(image)
        memory, maps = self._encode_pixels([pixels])
        return EncodedImage(memory[0], pixels, self.config.image_size, tuple(each[0] for each in maps))

    def ask(self, task: str, image: EncodedImage | ImageSource, about: Any = None, *, seed: int = 0) -> list[Any]:
        """Ask a task about an image, and return its answers.

        `about` is what the task is asked about: `Boxes` or instances for tasks about objects, nothing for tasks about
        whole images. Without it, a task that needs another one asks about what that one finds. `seed`, 0 to 2**64 - 1,
        fixes what sampling draws.
        """
        asked = self._task(task)
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        if about is not None:
            about = asked.check_about(encoded, about)
        elif asked.needs:
            about = asked.subjects(self.ask(asked.needs[0], encoded, seed=seed))
        requests = asked.requests(encoded, about)
        completions = self._complete(asked, encoded, requests, seed)
        while further := asked.follow_up(encoded, requests, completions):
            requests, completions = further, self._complete(asked, encoded, further, seed)
        return asked.calibrated(asked.answers(encoded, requests, completions), self.config.calibration.get(task))

    def detect(self, image: EncodedImage | ImageSource, *, seed: int = 0) -> list[Instance]:
        """Return the objects of an image, best first."""
        return self.ask("detection", image, seed=seed)

    def segment(
        self,
        image: EncodedImage | ImageSource,
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Return objects with their masks: those of `boxes`, or all that `detect` finds.

        Boxes are instances, or numbers (N, 4) as x0, y0, x1, y1 in pixels of the image. Numbers need `categories`,
        one name for all or one for each, unless the model knows a single class.
        """
        about = None if boxes is None else given_objects(boxes, categories)
        return self.ask("segmentation", image, about, seed=seed)

    def keypoints(
        self,
        image: EncodedImage | ImageSource,
        boxes: Sequence[Instance] | ArrayLike | None = None,
        *,
        categories: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Instance]:
        """Return objects with their keypoints: those of `boxes`, or all that `detect` finds, if their class has some.

        For `boxes` and `categories`, see `segment`.
        """
        about = None if boxes is None else given_objects(boxes, categories)
        return self.ask("keypoint", image, about, seed=seed)

    def caption(self, image: EncodedImage | ImageSource, *, seed: int = 0) -> Caption:
        """Return a sentence about an image."""
        return self.ask("captioning", image, seed=seed)[0]

    def predict(
        self, image: EncodedImage | ImageSource, tasks: Sequence[str], *, seed: int = 0
    ) -> Mapping[str, list[Any]]:
        """Run several tasks on one image, encoding it once. Return their answers by task.

        Tasks about objects put their answers onto those of the task that finds the objects, under the name of that one.
        """
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        answers: dict[str, list[Any]] = {}
        for name in sorted(dict.fromkeys(tasks), key=lambda name: bool(self._task(name).needs)):
            task = self._task(name)
            found_by = task.needs[0] if task.needs else name
            if found_by not in answers:
                answers[found_by] = self.ask(found_by, encoded, seed=seed)
            if task.needs:
                refined = self.ask(name, encoded, task.subjects(answers[found_by]), seed=seed)
                answers[found_by] = task.merge(answers[found_by], refined)
        return answers

    def _task(self, name: str) -> Task[Any]:
        """Return a task. Raises `InputError` if the model does not know it, or lacks the words that it needs."""
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "no task"
            raise InputError(f"this model was not trained for {name}; it knows {known}")
        if self.tasks[name].reads_text and self.config.text is None:
            raise InputError(f"{name} needs words, but there is no text tokenizer beside the graphs; export again")
        return self.tasks[name]

    def _encode_pixels(self, images: Sequence[Any]) -> tuple[Floats, list[Floats]]:
        """Memories and maps of images (H, W, 3) of any sizes."""
        size = self.config.image_size
        inputs = np.stack([warp_image(pixels, fit_affine(pixels.shape[:2], size), size) for pixels in images])
        return self.graphs.encode(np.ascontiguousarray(inputs.transpose(0, 3, 1, 2), np.float32) / np.float32(255))

    def _complete(
        self, task: Task[Any], image: EncodedImage, requests: Sequence[Request], seed: int
    ) -> list[Completion]:
        """Answer the requests about an image, those of one kind side by side, and return completions in order.

        Warns if an answer was cut at its length.
        """
        if any(request.references for request in requests):
            raise InputError(
                f"{task.name} reads several memories at once, which an exported model cannot; use a checkpoint"
            )
        kinds: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            whole = request.region is None and request.closeup is None
            kinds.setdefault((request.generation, request.num_samples, len(request.prompt), whole), []).append(i)
        completions: dict[int, Completion] = {}
        for (_, num_samples, _, whole), members in kinds.items():
            size = max(MAX_ROWS // num_samples, 1)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                some = self._continue(image, [requests[i] for i in batch], whole, seed)
                completions |= zip(batch, some, strict=True)
        if any(completion.truncated.any() for completion in completions.values()):
            longest = max(request.generation.max_new_tokens for request in requests)
            warnings.warn(f"{task.name}: an answer was cut; {task.cut_hint(longest)}", stacklevel=3)
        return [completions[i] for i in range(len(requests))]

    def _continue(self, image: EncodedImage, requests: Sequence[Request], whole: bool, seed: int) -> list[Completion]:
        """Answer requests of one kind: all about the `whole` image, or each about a part of it."""
        config, num_samples = requests[0].generation, requests[0].num_samples
        memory = image.memory[None] if whole else self._memories(image, requests)
        rows = np.repeat([request.prompt for request in requests], num_samples, axis=0)
        noise = None
        if not is_greedy(config.temperature, config.top_k):
            shape = (num_samples, config.max_new_tokens)
            noise = np.concatenate([uniform(request.random_seed(seed), shape) for request in requests])
        out = generate(self.graphs, memory, rows.reshape(len(memory), -1, rows.shape[1]), config, noise)
        return out.split(len(requests))

    def _memories(self, image: EncodedImage, requests: Sequence[Request]) -> Floats:
        """Memories (B, N, D) of the parts of an image that requests are about."""
        if requests[0].closeup is None:
            crops = [image.pixels[y0:y1, x0:x1] for x0, y0, x1, y1 in (r.region for r in requests if r.region)]
            parts = [self._encode_pixels(crops[i : i + MAX_CROPS])[0] for i in range(0, len(crops), MAX_CROPS)]
        else:
            corners = np.stack([request.closeup.xyxy for request in requests if request.closeup is not None])
            frames = image.frame().to_input_yxyx(corners).astype(np.float32)
            parts = [
                self.graphs.look_closer(frames[i : i + MAX_CLOSEUPS], image.maps)
                for i in range(0, len(frames), MAX_CLOSEUPS)
            ]
        return np.concatenate(parts)
