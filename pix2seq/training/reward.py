"""Reward tuning: the model answers the prompts of a batch several times, and the better answers become likelier.

A step has two turns. `Rewards.sample` draws K answers to each prompt with the fast decoding of inference, scores them
by their task's reward, and makes a batch of them. The loss of an answer is minus its log-probability times its
advantage: its reward less the mean reward of the other answers to the prompt. This is REINFORCE with a leave-one-out
baseline, as in arXiv 2302.08242. The step then recomputes the log-probabilities in one pass with teacher forcing, as it
does for annotated sequences, but among the ids that the grammar allowed, which answers are drawn from. Without that,
each answer would also move the share of all that is not allowed: 5 % a token for boxes of checkpoints/shapes.

Shapes: K samples of a prompt, T tokens of an answer, T' tokens of the longest one.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.shards import ShardIndex
from pix2seq.examples import Batch, Example, Placed, collate, place
from pix2seq.model.decoding.completion import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import NONE, Grammar
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.settings import NonNegativeFloat, Range, Settings
from pix2seq.tasks.task import Confidence, Judge, Task, Verdict
from pix2seq.training.objective import CrossEntropy, memories
from pix2seq.vocab import PAD

MAX_ROWS = 512  # answers that are drawn side by side
MAX_CACHE_BYTES = 2**31  # keys and values of answers that are drawn side by side


@dataclass(frozen=True)
class RewardConfig(Settings):
    """Settings of `objective=reward`."""

    section = "reward"

    num_samples: Annotated[int, Range(least=2, most=256)] = 6  # answers to each prompt
    # Of the log-probability of annotated sequences, which holds the model. Most advantages are below 1, and those of
    # masks below 0.1, so more would train by likelihood.
    likelihood_weight: NonNegativeFloat = 0.01
    # By task, in place of `likelihood_weight` times its loss_weight. A task with loss_weight 0 is not rewarded; it is
    # held where it is by its likelihood alone.
    likelihood_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)


@dataclass(frozen=True)
class SampledBatch(Batch):
    """A batch of sampled answers. `counts` are numbers of sequences: the loss of one is a sum over its tokens."""

    rewards: Mapping[str, float] = field(default_factory=dict)  # sum over the answers of each task


@dataclass(frozen=True)
class PolicyGradient(CrossEntropy):
    """The objective of sampled answers: its value is minus the mean reward, and its gradient is made to raise that."""

    def __call__(self, model: Pix2Seq, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """See `Objective`."""
        assert isinstance(batch, SampledBatch)
        rewards = batch.rewards
        return {
            name: (total - total.detach() - rewards[name] if name in rewards else total, count)
            for name, (total, count) in super().__call__(model, batch).items()
        }


class Rewards:
    """Draws and scores the answers that a model learns from."""

    def __init__(
        self,
        model: Pix2Seq,
        tasks: Mapping[str, Task[Any]],
        data: Mapping[str, Dataset | ShardIndex],
        config: RewardConfig,
        *,
        seed: int,
        bf16: bool,
    ) -> None:
        """`data` are the training splits of the tasks. Raises `InputError` if a task has no reward."""
        self.model, self.tasks, self.config, self.seed, self.bf16 = model, tasks, config, seed, bf16
        self.judges: dict[str, Judge] = {
            name: task.judge(_captions_by_image(data[name]) if task.reads_text else []) for name, task in tasks.items()
        }

    def likelihood_weights(self, loss_weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of the likelihood of annotated sequences, from those of the tasks."""
        return {likelihood_name(name): self._likelihood_weight(name, each) for name, each in loss_weights.items()}

    def _likelihood_weight(self, task: str, loss_weight: float) -> float:
        return self.config.likelihood_weights.get(task, self.config.likelihood_weight * loss_weight)

    def sample(self, batch: Batch, step: int) -> SampledBatch:
        """Answer the prompts of a batch that kept its samples, and return the answers as a batch to learn from.

        What is drawn for an image depends on the seed, the step and the image.
        """
        answers: list[dict[str, list[Example]]] = [{} for _ in batch.samples]
        counts: Counter[str] = Counter()
        rewards = {name: 0.0 for name in batch.tasks if self._is_rewarded(name)}
        for asked, completion in self.draw(batch, step):
            verdict = self.judges[asked.task](asked.example, completion, self.model.config.image_size)
            counts[asked.task] += len(verdict.rewards)
            rewards[asked.task] += float(verdict.rewards.sum())
            learned = answers_to_learn(asked.example, completion, verdict, self._generation(asked))
            answers[asked.image].setdefault(asked.task, []).extend(learned)
        weights = {name: self.tasks[name].config.loss_weight for name in batch.tasks}
        held = [name for name, weight in weights.items() if self._likelihood_weight(name, weight)]
        names = [*rewards, *map(likelihood_name, held)]
        for sample, learned_of in zip(batch.samples, answers, strict=True):
            for name in (name for name in sample.examples if name in held):
                learned_of[likelihood_name(name)] = list(sample.examples[name])
                counts[likelihood_name(name)] += len(sample.examples[name])
        samples = [replace(sample, examples=some) for sample, some in zip(batch.samples, answers, strict=True)]
        joined = collate(samples, names, images=batch.images)
        values = {each.name: getattr(joined, each.name) for each in fields(Batch)}
        values["counts"] = tuple(float(counts[name]) for name in names)
        return SampledBatch(**values, rewards=rewards)

    @torch.inference_mode()
    def draw(self, batch: Batch, step: int, *, with_logprobs: bool = False) -> list[tuple[Placed, Completion]]:
        """Answer all prompts of a batch, with all that their grammars allow, at temperature 1.

        The model must be in evaluation mode. Log-probabilities are the model's own, if asked for.
        """
        model, num_samples = self.model, self.config.num_samples
        assert not model.training
        placed = [each for each in place(batch.samples)[0] if self._is_rewarded(each.task)]
        found: list[tuple[Placed, Completion]] = []
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            memory = memories(model, batch.images.to(model.device), batch)
            for start in range(0, len(placed), at_once := self._prompts_at_once()):
                some = placed[start : start + at_once]
                first, last = some[0].memory, some[-1].memory
                out = model.generate_mixed(
                    memory[first : last + 1],
                    [torch.from_numpy(each.example.prompt) for each in some],
                    [replace(self._generation(each), with_logprobs=with_logprobs) for each in some],
                    memory_index=[each.memory - first for each in some],
                    num_samples=num_samples,
                    generator=[self._generator(step, batch.samples[each.image].image_id, each) for each in some],
                )
                found += zip(some, out.completions(num_samples), strict=True)
        return found

    def _is_rewarded(self, task: str) -> bool:
        return self.tasks[task].config.loss_weight > 0

    def _prompts_at_once(self) -> int:
        decoder = self.model.decoder
        width = decoder.token_embedding.weight.shape[1]
        row_bytes = 2 * len(decoder.blocks) * width * decoder.max_seq_len * (2 if self.bf16 else 4)
        return max(min(MAX_ROWS, MAX_CACHE_BYTES // row_bytes) // self.config.num_samples, 1)

    def _generation(self, asked: Placed) -> GenerationConfig:
        generation = self.tasks[asked.task].generation_of(asked.example)
        return replace(generation, temperature=1.0, top_k=0, top_p=1.0, score_without=None)

    def _generator(self, step: int, image_id: int, asked: Placed) -> torch.Generator:
        entropy = (self.seed, step, image_id % 2**64, zlib.crc32(asked.task.encode()), asked.number)
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def likelihood_name(task: str) -> str:
    """Return the name of the loss of a task's annotated sequences, beside that of its rewards."""
    return f"{task}/likelihood"


def advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each of K rewards less the mean of the others."""
    return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))


def answers_to_learn(
    example: Example, completion: Completion, verdict: Verdict, generation: GenerationConfig
) -> list[Example]:
    """Return the sampled answers to an example's prompt, with their advantages as the weights of their tokens.

    Tokens that say how sure the model is are taught instead. An answer that would teach nothing is left out.
    """
    found = []
    choices = None if generation.grammar is None else choices_of(generation.grammar, completion.tokens)
    for i, advantage in enumerate(advantages(verdict.rewards).tolist()):
        ids = response(completion.tokens[i], generation)
        answer = Example(example.prompt, ids, ids, np.full(len(ids), advantage, np.float32), example.closeup)
        if choices is not None:
            answer = replace(answer, choices=choices[i, : len(ids)])
        if verdict.confidence is not None:
            answer = _with_confidence(answer, verdict.confidence, i)
        if answer.weights.any() or answer.second is not None:
            found.append(answer)
    return found


def choices_of(grammar: Grammar, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which ids a grammar allowed at each of the tokens (K, T'), as the `choices` (K, T', 4) of examples."""
    ids = torch.from_numpy(tokens)
    found = np.full((*tokens.shape, 4), NONE, np.int64)
    for step in range(tokens.shape[1]):
        allowed = grammar.allowed(ids[:, :step])
        columns = torch.column_stack([allowed.low, allowed.high, allowed.singles])
        found[:, step, : columns.shape[1]] = columns.numpy()
    return found


def response(tokens: NDArray[np.int64], generation: GenerationConfig) -> NDArray[np.int64]:
    """Return the ids (T,) of a continuation (T',) with its end token, if it has one, and without padding."""
    ends = np.flatnonzero(tokens == generation.eos_id)
    return tokens[: ends[0] + 1] if len(ends) else tokens[: generation.max_new_tokens]


def _with_confidence(answer: Example, confidence: Confidence, i: int) -> Example:
    """Replace the weights of tokens that sample `i` is taught, by two targets: the true id, and otherwise."""
    ids, shares = confidence.ids[i, : len(answer.inputs)], confidence.shares[i, : len(answer.inputs)]
    taught = ids != PAD
    return replace(
        answer,
        targets=np.where(taught, ids, answer.targets),
        weights=np.where(taught, confidence.weight * shares, answer.weights).astype(np.float32),
        second=(
            np.full(len(ids), confidence.otherwise),
            (confidence.weight * (1 - shares) * taught).astype(np.float32),
        ),
    )


def _captions_by_image(dataset: Dataset | ShardIndex) -> list[list[str]]:
    """Return the captions of each image; of shards, whose captions lie in one list, each caption by itself."""
    if isinstance(dataset, ShardIndex):
        return [[text] for text in dataset.captions()]
    owners = iter(dataset.annotations.caption_owner.tolist())
    return [list(texts) for _, texts in groupby(dataset.annotations.all_captions(), key=lambda _: next(owners))]
