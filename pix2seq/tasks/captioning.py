"""The captioning task: a sentence about the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from pix2seq.errors import InputError
from pix2seq.examples import Example
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import TextGrammar
from pix2seq.settings import NonNegativeFloat, PositiveInt, Range, ShareBelowOne
from pix2seq.tasks.request import EncodedImage, Request
from pix2seq.tasks.task import Judge, Task, TaskConfig, Verdict
from pix2seq.tokenizers.captioning import decode_caption, drop_inputs, encode_caption
from pix2seq.tokenizers.text import SentencePieceTokenizer, TextTokenizer, WordTokenizer
from pix2seq.types import Caption, Category, Target
from pix2seq.vocab import MAX_SIZE, PAD

if TYPE_CHECKING:
    from pix2seq.drawing import Canvas
    from pix2seq.metrics.calibration import TaskCalibration
    from pix2seq.metrics.captions import CaptionMetric


@dataclass(frozen=True)
class CaptioningConfig(TaskConfig):
    """How captioning is trained and asked."""

    section = "captioning"

    tokenizer: str = "words"  # words (nltk), sentencepiece (trained on the captions), or a sentencepiece model file
    # Most words or pieces of a vocabulary that is made from the captions.
    text_size: Annotated[int, Range(least=1, most=MAX_SIZE)] = 8000
    min_count: PositiveInt = 1  # times a word must appear to get into it
    captions_per_image: Annotated[int, Range(least=1, most=1000)] = 5  # of an image in a training step
    max_tokens: Annotated[int, Range(least=2, most=10_000)] = 128  # of a caption, end included
    eos_weight: NonNegativeFloat = 0.1  # loss weight of the end token
    input_drop: ShareBelowOne = 0.5  # share of the words that the decoder reads as the noise token
    truth_weight: NonNegativeFloat = 0.0  # in the reward: of being true, where the annotations can tell
    # Mirrored images: auto leaves out captions that name a side, always keeps them, never: no flips.
    flip: Literal["auto", "always", "never"] = "auto"


class Captioning(Task[CaptioningConfig]):
    """Sentences."""

    name = "captioning"
    hub_pipeline = "image-to-text"
    config_type = CaptioningConfig
    main_metric = "BLEU-4"
    learns_from = "caption"
    length_setting = "captioning.max_tokens"
    uses_classes = False
    reads_text = True

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model's text."""
        if self.text is None:
            raise ValueError("captioning needs a text tokenizer")
        return self.text

    @classmethod
    def make_text_tokenizer(
        cls, config: TaskConfig, captions: Sequence[str], words: Sequence[str] = ()
    ) -> TextTokenizer:
        """Make the tokenizer that the config asks for from captions and `words`, or read it from a file."""
        assert isinstance(config, CaptioningConfig)
        if config.tokenizer == "words":
            return WordTokenizer.build(captions, min_count=config.min_count, max_size=config.text_size, required=words)
        if config.tokenizer == "sentencepiece":
            return SentencePieceTokenizer.train([*captions, *words], config.text_size)
        path = Path(config.tokenizer)
        if not path.is_file():
            raise InputError(
                f"captioning.tokenizer is {config.tokenizer!r}; expected words, sentencepiece or a sentencepiece "
                "model file"
            )
        return SentencePieceTokenizer.from_file(path)

    @property
    def max_seq_len(self) -> int:
        """See `Task`."""
        return 1 + self.config.max_tokens

    @property
    def flips(self) -> bool:
        """See `Task`."""
        return self.config.flip != "never"

    def after_flip(self, target: Target) -> Target:
        """See `Task`."""
        return target if self.config.flip == "always" else super().after_flip(target)

    def examples(self, target: Target, size: tuple[int, int], rng: np.random.Generator) -> list[Example]:
        """Return a sequence for each of up to `captions_per_image` captions, drawn at random."""
        found = []
        for i in rng.permutation(len(target.captions))[: self.config.captions_per_image]:
            ids = encode_caption(target.captions[i], self.tokenizer, self.vocab, max_tokens=self.config.max_tokens)
            weights = np.ones(len(ids), np.float32)
            weights[-1] = self.config.eos_weight
            inputs = drop_inputs(ids, self.config.input_drop, rng)
            found.append(Example(self.prompt(), inputs, ids, weights))
        return found

    def grammar(self) -> TextGrammar:
        """Return the grammar: text, and an end after at least one token of it."""
        return TextGrammar(
            first_piece=self.vocab.text_base + self.tokenizer.first_piece,
            text_end=self.vocab.text_base + self.tokenizer.size,
            eos_id=self.vocab.text_base + self.tokenizer.eos_id,
            max_tokens=self.config.max_tokens,
        )

    def generation(self) -> GenerationConfig:
        """Return how a caption is generated."""
        grammar = self.grammar()
        return GenerationConfig(self.config.max_tokens, grammar=grammar, eos_id=grammar.eos_id, **self.sampling)

    def requests(self, image: EncodedImage, about: Any) -> list[Request]:
        """See `Task`."""
        return [Request(self.prompt(), self.generation())]

    def answers(
        self, image: EncodedImage, requests: Sequence[Request], completions: Sequence[Completion]
    ) -> list[Caption]:
        """Return one caption."""
        return [self.caption(completion) for completion in completions]

    def caption(self, completion: Completion) -> Caption:
        """Read a caption, and score it by the mean log-probability of its tokens, end included."""
        ids = completion.tokens[0]
        logprobs = completion.logprobs[0][ids != PAD].astype(np.float64)
        score = float(logprobs.mean()) if len(logprobs) else float("-inf")
        return Caption(decode_caption(ids, self.tokenizer, self.vocab), score, bool(completion.truncated[0]))

    def calibrated(self, answers: Sequence[Caption], calibration: TaskCalibration | None) -> list[Caption]:
        """Add the probability that a caption is true; its score stays."""
        if calibration is None:
            return list(answers)
        return [replace(each, probability=calibration.probability(each.confidence)) for each in answers]

    def generation_of(self, example: Example) -> GenerationConfig:
        """See `Task`."""
        return self.generation()

    def judge(self, captions: Sequence[Sequence[str]]) -> Judge:
        """Reward a caption by its CIDEr-D, and by `truth_weight` if it is true of the input."""
        from pix2seq.data.shapes.truth import is_true_of
        from pix2seq.metrics.caption_reward import CiderD

        cider, names = CiderD(captions), {label: category.name for label, category in self.categories.items()}

        def score(example: Example, completion: Completion, size: tuple[int, int]) -> Verdict:
            assert example.target is not None
            height, width = size
            target = replace(example.target, image=replace(example.target.image, width=width, height=height))
            rewards = []
            for ids in completion.tokens:
                text = decode_caption(ids, self.tokenizer, self.vocab)
                rewards.append(cider(text, target.captions))
                if self.config.truth_weight:
                    verdict = is_true_of(text, target, names=names)
                    if verdict is None:
                        raise InputError(
                            f"captioning.truth_weight: what is left of image {target.image.id} does not tell whether a "
                            "caption is true; train on generated shapes with augment.scale_max=1, or set it to 0"
                        )
                    rewards[-1] += self.config.truth_weight * verdict
            return Verdict(np.array(rewards))

        return score

    def questions(self, target: Target, found: Sequence[Any] | None) -> dict[str, Any]:
        """Leave out images without captions."""
        return {"": None} if target.captions else {}

    def metric(self, categories: Sequence[Category]) -> CaptionMetric:
        """Return caption scores, with the share of true captions where the images are generated ones."""
        from pix2seq.data.shapes.truth import is_true_of  # here, because asking needs no generator of images
        from pix2seq.metrics.captions import CaptionMetric

        return CaptionMetric(partial(is_true_of, names={category.label: category.name for category in categories}))

    def draw(self, canvas: Canvas, answers: Sequence[Caption]) -> None:
        """Write the captions below the image."""
        canvas.text(" / ".join(caption.text for caption in answers))

    def to_json(self, answers: Sequence[Caption]) -> dict[str, Any]:
        """See `Task`."""
        return {"captions": [caption.to_json() for caption in answers]}

    def summary(self, example: Example) -> str:
        """Return the caption itself."""
        return decode_caption(example.targets, self.tokenizer, self.vocab)

    def shown(self, example: Example, size: tuple[int, int]) -> list[Caption]:
        """See `Task`."""
        return [Caption(self.summary(example), 0.0)]
