"""Sequences for people who look at them: what a token stands for, where it lies, and which answer it is part of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pix2seq.model.decoding.completion import Completion
from pix2seq.tasks.request import EncodedImage, Exchange, Frame, Request
from pix2seq.tasks.task import Task
from pix2seq.vocab import CLASS_BASE, INVISIBLE, PAD, SEPARATOR


@dataclass(frozen=True)
class Token:
    """One id of a sequence, in words."""

    id: int
    kind: str  # the first word of `Vocab.meaning`: task, class, bin, text, end, noise, ...
    text: str  # what is said: the name of a task or class, the number of a bin, a piece of text
    axis: str | None = None  # of a coordinate: y or x
    pixel: float | None = None  # of a coordinate, in pixels
    probability: float | None = None  # under the model; None: given, or not computed
    best: tuple[str, float] | None = None  # the likeliest answer of its kind with its probability, where one was scored

    def __str__(self) -> str:
        """Describe the token in a few words: `class star`, `y bin:12 = 48.4 px`."""
        if self.axis is not None:
            return f"{self.axis} {self.kind}:{self.text} = {self.pixel:.1f} px"
        if self.kind == "text":
            return f"text {self.text!r}"
        separator = " " if self.kind == "class" else ":"
        return self.kind if self.kind == self.text else f"{self.kind}{separator}{self.text}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values without those that are None."""
        value: dict[str, Any] = {"id": self.id, "kind": self.kind, "text": self.text}
        if self.axis is not None and self.pixel is not None:
            value |= {"axis": self.axis, "pixel": round(self.pixel, 2)}
        if self.probability is not None:
            value["probability"] = round(self.probability, 4)
        if self.best is not None:
            value["best"] = {"text": self.best[0], "probability": round(self.best[1], 4)}
        return value


@dataclass(frozen=True)
class Part:
    """Tokens of a response that say one answer."""

    start: int  # the first of them, counted from the first token of the response
    stop: int  # one past the last
    answer: Any  # as `Task.parts` reads it; None: these tokens say no answer


@dataclass(frozen=True)
class Transcript:
    """One request and what the model said, token by token. Of several samples, it is the first."""

    prompt: list[Token]
    response: list[Token]
    parts: list[Part]
    frame_xyxy: tuple[float, float, float, float]  # what coordinates are relative to, in pixels of the image
    num_samples: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without `Part.answer`."""
        return {
            "prompt": [token.to_json() for token in self.prompt],
            "response": [token.to_json() for token in self.response],
            "parts": [{"start": part.start, "stop": part.stop} for part in self.parts],
            "frame": [round(side, 2) for side in self.frame_xyxy],
            "num_samples": self.num_samples,
        }


def transcribe(task: Task[Any], image: EncodedImage, exchange: Exchange) -> list[Transcript]:
    """Return what a task asked about an image, and what the model said."""
    pairs = zip(exchange.requests, exchange.completions, strict=True)
    return [_transcript(task, image, request, completion) for request, completion in pairs]


def read_tokens(task: Task[Any], ids: Sequence[int], frame: Frame) -> list[Token]:
    """Say what the ids of a sequence stand for. Coordinates are y and x in turn, in pixels of what `frame` is in."""
    tokens: list[Token] = []
    axis = 0
    for i, token_id in enumerate(ids):
        token = read_token(task, token_id)
        is_coord = task.vocab.coord_base <= token_id < task.vocab.coord_end
        if is_coord:
            share = float(task.vocab.coords(np.array([token_id]))[0])
            x, y = frame.to_image_xy(np.array([share, share])).tolist()
            token = replace(token, axis="yx"[axis], pixel=(y, x)[axis])
        # Two separators between rings take the position of a point, as an invisible point does; one alone takes none.
        between_rings = token_id == SEPARATOR and SEPARATOR in (*ids[max(i - 1, 0) : i], *ids[i + 1 : i + 2])
        axis = 1 - axis if is_coord or between_rings or token_id == INVISIBLE else 0
        tokens.append(token)
    return tokens


def read_token(task: Task[Any], token_id: int) -> Token:
    """Say what an id stands for, wherever it is."""
    kind, _, text = task.vocab.meaning(token_id).partition(":")
    label, text_id = token_id - CLASS_BASE, token_id - task.vocab.text_base
    if kind == "class" and label in task.categories:
        text = task.categories[label].name
    elif kind == "text" and task.text is not None and text_id < task.text.size:
        text = task.text.tokens[text_id]
    return Token(token_id, kind, text or kind)


def _transcript(task: Task[Any], image: EncodedImage, request: Request, completion: Completion) -> Transcript:
    said = _spoken(completion.tokens[0], request)
    frame = request.frame(image)
    tokens = read_tokens(task, [*request.prompt.tolist(), *said], frame)
    prompt, response = tokens[: len(request.prompt)], tokens[len(request.prompt) :]
    scored = [_with_scores(task, token, request, completion, step) for step, token in enumerate(response)]
    parts = [
        Part(start, min(stop, len(said)), answer) for start, stop, answer in task.parts(image, request, completion)
    ]
    x0, y0, x1, y1 = frame.xyxy.tolist()
    return Transcript(prompt, scored, parts, (x0, y0, x1, y1), request.num_samples)


def _spoken(ids: NDArray[np.integer], request: Request) -> list[int]:
    """Return the ids that a row said, with its end token and without padding."""
    padding = np.flatnonzero(ids == PAD)
    length = len(ids) if not len(padding) else int(padding[0]) + (request.generation.eos_id == PAD)
    said: list[int] = ids[:length].tolist()
    return said


def _with_scores(task: Task[Any], token: Token, request: Request, completion: Completion, step: int) -> Token:
    """Add the probabilities that the model gave at a step of the first sample."""
    if request.generation.with_logprobs:
        token = replace(token, probability=float(np.exp(completion.logprobs[0, step])))
    if (
        completion.best_tokens is not None
        and completion.best_logprobs is not None
        and request.generation.is_scored(step)
    ):
        best = read_token(task, int(completion.best_tokens[0, step]))
        token = replace(token, best=(best.text, float(np.exp(completion.best_logprobs[0, step]))))
    return token
