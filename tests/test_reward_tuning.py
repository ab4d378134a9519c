"""Reward tuning: what is sampled is what is learned from, and the better answers become likelier."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import run_ranks
from safetensors.torch import load_file
from test_cli import one_line

from pix2seq.cli import main
from pix2seq.data.dataset import ClassMap, open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.errors import InputError
from pix2seq.examples import Example, Sample, collate
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.generate import Completion, GenerationConfig
from pix2seq.model.decoding.grammar import KeypointGrammar
from pix2seq.model.packing import Layout
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.tasks import get_task
from pix2seq.tasks.task import Confidence, Task, TaskConfig, Verdict
from pix2seq.tokenizers.captioning import encode_caption
from pix2seq.training.config import config_file, load_config
from pix2seq.training.initialize import with_init_model
from pix2seq.training.objective import memories, token_losses
from pix2seq.training.optimizer import build_optimizer
from pix2seq.training.recipe import prepare
from pix2seq.training.reward import PolicyGradient, RewardConfig, Rewards, advantages, answers_to_learn
from pix2seq.training.step import TrainingModel, train_step
from pix2seq.vocab import NOISE, Vocab

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(config_file("reward_shapes.yaml"))
ALL = ["detection", "segmentation", "keypoint", "captioning"]
QUICK = ["num_workers=0", "trackers=[]", "log_every=1", "eval_images=1", "batch_size=4", "bf16=false"]
QUICK += ["reward.num_samples=3", "schedule.warmup_steps=0", "device=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "shapes"
    write_shapes(folder, num_train=12, num_val=2, size=96, seed=3, max_objects=4, person_share=0.4, workers=1)
    return folder


@pytest.fixture(scope="module")
def checkpoint():
    return str(ROOT / "checkpoints/shapes")


@pytest.fixture(scope="module")
def rewards(data, checkpoint):
    """Rewards of the shipped model, for all tasks."""
    model = Pix2Seq.from_pretrained(checkpoint)
    settings = [f"data={data}", f"init={checkpoint}", "augment.scale_min=0.8", "augment.scale_max=1.2"]
    recipe = prepare(with_init_model(load_config(CONFIG, settings)))
    tasks = {name: get_task(name).from_model(model) for name in ALL}
    own = Rewards(model, tasks, recipe.train_data, RewardConfig(num_samples=3), seed=0, bf16=False)
    own.samples = [recipe.samples[0][0, i] for i in range(8)]
    return own


def kept(samples):
    return collate(samples, ALL, keep_samples=True)


def test_the_advantage_is_over_the_mean_of_the_others():
    assert advantages(np.array([1.0, 2.0, 6.0])).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert advantages(np.array([2.0, 2.0])).tolist() == [0, 0]


@pytest.mark.parametrize("task", ALL)
def test_recomputed_log_probabilities_are_the_sampled_ones(rewards, task):
    """One teacher-forced pass over the answers, whole images and closeups, against decoding token by token."""
    samples = [replace(each, examples={task: each.examples.get(task, [])}) for each in rewards.samples]
    batch, again = compare_log_probabilities(rewards, kept(samples), task)
    if task in ("segmentation", "keypoint"):
        assert len(again.closeups) == len(batch.closeups)


def compare_log_probabilities(rewards, batch, task):
    """Draw answers to the prompts of a batch of one task, and expect the same log-probabilities from one pass."""
    drawn = rewards.draw(batch, 0, with_logprobs=True)
    assert len(drawn) > 2
    answers = [{task: []} for _ in batch.samples]
    sampled = []
    for asked, completion in drawn:
        even = Verdict(np.arange(3.0))  # any rewards that give every answer a weight but the middle one
        for i, answer in enumerate(answers_to_learn(asked.example, completion, even, rewards._generation(asked))):
            row = 2 * i
            answers[asked.image][task].append(answer)
            sampled.append(completion.logprobs[row, : len(answer.inputs)])
            np.testing.assert_array_equal(answer.inputs, completion.tokens[row, : len(answer.inputs)])
    pairs = zip(batch.samples, answers, strict=True)
    again = collate([replace(s, examples=e) for s, e in pairs], [task], images=batch.images)
    model = rewards.model
    with torch.no_grad():
        memory = memories(model, again.images, again)
        layout = Layout(again.lengths, again.memory_index, len(memory), memory.device)
        hidden = model.decoder.forward_packed(again.tokens, again.positions, layout, memory)
        recomputed = -token_losses(model.decoder, hidden[again.scored], again.targets)
    torch.testing.assert_close(recomputed, torch.from_numpy(np.concatenate(sampled)), rtol=0, atol=1e-4)
    return batch, again


def test_what_is_drawn_depends_on_step_and_image_and_not_on_its_neighbours(rewards):
    def drawn(samples, step, wanted):
        """The answers to a sample, without padding, which depends on others."""
        found = rewards.draw(kept(samples), step)
        mine = [(asked.task, asked.number, c.tokens) for asked, c in found if samples[asked.image] is wanted]
        return [(task, number, [[t for t in row if t] for row in rows.tolist()]) for task, number, rows in mine]

    one = rewards.samples[2]
    alone = drawn([one], 7, one)
    assert alone == drawn(rewards.samples[:4], 7, one) == drawn([rewards.samples[5], one], 7, one)
    assert alone != drawn([one], 8, one)
    twin = replace(one, image_id=one.image_id + 1)  # the same pixels and prompts
    assert alone != drawn([twin], 7, twin)


def said(ids, best=None):
    """A completion of one answer, sure of every token."""
    tokens, sure = np.asarray(ids)[None], np.zeros((1, len(ids)), np.float32)
    return Completion(tokens, sure, tokens if best is None else best, sure, np.zeros(1, np.bool_))


def test_the_annotated_answer_to_a_moved_image_has_the_highest_reward(rewards):
    """So the target reached the reward as the augmentation moved it, in the frame that the answer is read in."""
    counted = dict.fromkeys(ALL, 0)
    for sample in rewards.samples:
        for task, examples in sample.examples.items():
            for example in examples:
                verdict = rewards.judges[task](example, said(example.targets), (96, 96))
                (value,) = verdict.rewards
                if task == "detection":
                    assert value > 0.7 * len(example.target.labels)
                    real = example.targets[4::5] > NOISE
                    true = verdict.confidence.shares[0, 4::5][: real.sum()]
                    assert real.sum() == len(example.target.labels)
                    assert (true > 0.7).all()
                elif task == "captioning":
                    backwards = said(example.targets[::-1].copy())
                    assert value > rewards.judges[task](example, backwards, (96, 96)).rewards[0]
                else:
                    assert value > 0.8, task
                counted[task] += 1
    assert min(counted.values()) > 2


def test_a_point_that_is_called_invisible_is_worth_nothing(rewards):
    example = next(e for s in rewards.samples for e in s.examples.get("keypoint", []))
    judge = rewards.judges["keypoint"]
    (value,) = judge(example, said(np.full(34, 41), best=example.targets[None]), (96, 96)).rewards
    assert value == 0


def tiny_model():
    torch.manual_seed(0)
    encoder = EncoderConfig(name="vit", dim=16, num_layers=1, num_heads=2, mlp_dim=32, patch_size=16, drop_path=0.0)
    decoder = DecoderConfig(dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_seq_len=16, dropout=0.5, drop_path=0.0)
    vocab = Vocab(num_bins=8, size=1016)
    return build_model(ModelConfig(image_size=(32, 32), encoder=encoder, decoder=decoder, vocab=vocab)).eval()


class Toy:
    """Some numbers; the reward is the share of the best sequence's numbers at their places."""

    reads_text = False

    def __init__(self, *best):
        self.best, self.config = np.array(best), TaskConfig()

    def judge(self, captions):
        return lambda example, completion, size: Verdict((completion.tokens == self.best).mean(1))

    def generation_of(self, example):
        grammar = KeypointGrammar(coord_base=1000, num_bins=8, invisible_id=41)
        return GenerationConfig(len(self.best), grammar=grammar, eos_id=None, top_p=0.1, temperature=0.0)


def toy_batch(toy):
    ids = np.array([1000] * len(toy.best))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    example = Example(np.array([10]), ids, ids, np.ones(len(ids), np.float32))
    return collate([Sample(image, {"toy": [example]}, i) for i, image in enumerate(images)], ["toy"], keep_samples=True)


def test_the_best_sequence_of_a_toy_is_reached():
    model, toy = tiny_model(), Toy(1003, 1006)
    batch = toy_batch(toy)
    rewards = Rewards(model, {"toy": toy}, {}, RewardConfig(num_samples=8, likelihood_weight=0), seed=0, bf16=False)
    training = TrainingModel(model, PolicyGradient())
    optimizer = build_optimizer(model, name="adamw", lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    losses = []
    for step in range(220):
        result = train_step(training, optimizer, [rewards.sample(batch, step)], {}, 1.0)
        losses.append(float(result.loss))
    assert np.mean(losses[:5]) > -0.3  # minus the mean reward: 1 of 8 numbers is right by chance
    assert np.mean(losses[-5:]) < -0.95
    out = model.generate(batch.images.float() / 255, torch.full((2, 1), 10), **vars(toy.generation_of(None)))
    assert out.tokens.tolist() == [[1003, 1006]] * 2


def test_the_gradient_is_that_of_the_log_probabilities_times_the_advantages():
    """A sum of its own for each answer, with plain autograd; two tokens of each are taught a confidence."""
    model, toy = tiny_model(), Toy(1003, 1006, 1001, 1007)
    batch = toy_batch(toy)
    ids, shares = np.zeros((4, 4), np.int64), np.zeros((4, 4))
    ids[:, 0], shares[:, 0] = 1002, 0.75
    ids[:, 2], shares[:, 2] = 41, 1.0
    toy.judge = lambda captions: (
        lambda example, completion, size: Verdict(
            np.array([0.0, 1.0, 5.0, 2.0]), Confidence(ids, shares, otherwise=41, weight=1.5)
        )
    )
    rewards = Rewards(model, {"toy": toy}, {}, RewardConfig(num_samples=4, likelihood_weight=0.5), seed=0, bf16=False)
    drawn = rewards.draw(batch, 0)
    sampled = rewards.sample(batch, 0)
    assert sampled.counts == (8.0, 2.0)  # answers, annotated sequences
    training = TrainingModel(model, PolicyGradient())
    factors = torch.tensor([1 / 8, 0.5 / 2])
    sums = training.backward(sampled, factors, last=True)
    assert sums[0].item() == pytest.approx(-2 * 8)  # minus the rewards of both images
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    def log_probs(image, tokens, choices=None):
        images = batch.images[image : image + 1].float() / 255
        logits = model(images, torch.tensor([[10, *tokens[:-1]]]))[0]
        shut = torch.tensor([[choices is not None and i not in choices[row] for i in range(1016)] for row in range(4)])
        return logits.masked_fill(shut, -torch.inf).log_softmax(-1)

    def choices(tokens):
        """Two coordinates or the invisible token twice."""
        pairs = [[41] if tokens[i] == 41 else range(1000, 1008) for i in (0, 2)]
        return [[*range(1000, 1008), 41], pairs[0], [*range(1000, 1008), 41], pairs[1]]

    loss = torch.zeros(())
    for asked, completion in drawn:
        for tokens, advantage in zip(completion.tokens, [-8 / 3, -4 / 3, 4, 0], strict=True):
            table = log_probs(asked.image, tokens.tolist(), choices(tokens))
            loss = loss - advantage * (table[1, tokens[1]] + table[3, tokens[3]]) / 8
            loss = loss - 1.5 * (0.75 * table[0, 1002] + 0.25 * table[0, 41] + table[2, 41]) / 8
        table = log_probs(asked.image, [1000] * 4)
        loss = loss - 0.5 * table[:, 1000].sum() / 2
    loss.backward()
    for found, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def train(data, checkpoint, out, *more, resume="auto"):
    fixed = ["--objective", "reward", "--config", CONFIG, "--resume", resume]
    return ["train", *fixed, "lr=5e-5", f"data={data}", f"init={checkpoint}", f"out={out}", *QUICK, *more]


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(data, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(train(data, checkpoint, out, "steps=4", "checkpoint_every=2", "keep_checkpoints=9")) == 0
    return out


def test_a_run_logs_rewards_and_the_share_of_sampling(finished):
    lines = log(finished)
    assert len(lines) == 4
    for line in lines:
        assert "loss/detection" not in line  # its loss_weight is 0: it is held by its likelihood alone
        parts = [line[f"loss/{name}"] * (0.3 if name == "keypoint" else 1) for name in ALL if name != "detection"]
        weights = {name: 0.05 if name in ("detection", "keypoint") else 0.01 for name in ALL}
        parts += [weight * line[f"loss/{name}/likelihood"] for name, weight in weights.items()]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
        assert -1 <= line["loss/segmentation"] < 0
        assert 0 < line["sampling_share"] < 1


def test_a_run_resumes_to_the_bit(finished, data, checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("step-00000004", "best"):
        shutil.rmtree(out / "checkpoints" / name, ignore_errors=True)
    assert main(train(data, checkpoint, out, "steps=4", "checkpoint_every=2", "keep_checkpoints=9")) == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(each / "checkpoints/step-00000004" / name) for each in (out, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs | ours), name
    for ours, theirs in zip(log(out), log(finished), strict=True):
        assert {k: ours[k] for k in ours if "loss" in k} == {k: theirs[k] for k in theirs if "loss" in k}


def succeed(command):
    assert main(command) == 0


def test_two_processes_learn_as_one_does(finished, data, checkpoint, tmp_path):
    out = tmp_path / "two"
    run_ranks(succeed, train(data, checkpoint, out, "steps=2", "checkpoint_every=2"), folder=tmp_path)
    for two, one in zip(log(out), log(finished)[:2], strict=True):
        for name in (key for key in one if "loss" in key):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel=fsdp", "objective=reward samples with full weights, so set parallel=ddp"),
        ("label_smoothing=0.1", "objective=reward has no use for label_smoothing"),
        ("init=null", "objective=reward tunes a model that was trained by likelihood; give init=CHECKPOINT"),
        ("reward.num_samples=1", "reward.num_samples must be at least 2, got 1"),
    ],
)
def test_settings_that_rewards_cannot_take_are_refused(data, checkpoint, tmp_path, capsys, setting, message):
    assert main(train(data, checkpoint, tmp_path / "run", setting)) == 2
    assert message in one_line(capsys)


def test_a_task_without_a_reward_and_images_without_truth_are_refused(rewards):
    with pytest.raises(InputError, match="counting has no reward; train it with objective=likelihood"):
        Task.judge(SimpleNamespace(name="counting"), [])
    example = next(e for s in rewards.samples for e in s.examples.get("captioning", []))
    task = rewards.tasks["captioning"].with_settings(truth_weight=1.0)
    unknown = replace(example, target=replace(example.target, attributes=()))
    with pytest.raises(InputError, match=r"captioning.truth_weight: what is left of image \d+ does not tell"):
        task.judge([])(unknown, said(example.targets), (96, 96))


def test_truth_adds_its_weight_to_a_true_caption(rewards, data):
    dataset, task = open_dataset(data, "train"), rewards.tasks["captioning"]
    target = ClassMap(dataset.categories, rewards.model.categories).to_model(dataset.target(0))
    plain, with_truth = (task.with_settings(truth_weight=weight).judge([]) for weight in (0.0, 3.0))
    more = []
    for text in (target.captions[0], "there is a purple castle"):
        ids = encode_caption(text, task.tokenizer, task.vocab, max_tokens=40)
        example = Example(task.prompt(), ids, ids, np.ones(len(ids), np.float32), target=target)
        with_weight, without = (judge(example, said(ids), (96, 96)).rewards[0] for judge in (with_truth, plain))
        more.append(with_weight - without)
    assert more == [3.0, 0.0]
