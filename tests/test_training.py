"""Training: schedule, loss, accumulation, order, augmentation and settings; and a tiny model learns."""

import copy
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_by_one import sums_one_by_one

from pix2seq.data.image import read_image, warp_image
from pix2seq.data.sampler import EpochSampler
from pix2seq.data.shapes.person import KEYPOINTS
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import AugmentConfig, augmented_pixels, color_jitter, random_affine
from pix2seq.errors import InputError
from pix2seq.examples import Sample, collate
from pix2seq.geometry.affine import Affine, fit_affine
from pix2seq.geometry.keypoints import mirror_order
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks import get_task
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.training.config import load_config
from pix2seq.training.ema import Ema
from pix2seq.training.objective import CrossEntropy, token_losses
from pix2seq.training.optimizer import ScheduleConfig, build_optimizer, learning_rate
from pix2seq.training.step import TrainingModel, loss_factors, train_step
from pix2seq.types import Category, ImageRecord, Target
from pix2seq.vocab import Vocab

VOCAB = Vocab(num_bins=32, size=1040)
CATEGORIES = (Category(1, 1, "cat"), Category(2, 2, "dog"))


def target_of(boxes, labels=None, *, width=64, height=48, crowd=False, keypoints=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    sizes = boxes[:, 2:] - boxes[:, :2]
    return Target(
        image=ImageRecord(1, None, width, height),
        boxes_xyxy=boxes,
        labels=np.array(labels if labels is not None else [1] * count, np.int64),
        areas=sizes.prod(axis=1),
        iscrowd=np.full(count, crowd),
        annotation_ids=np.arange(1, count + 1),
        segmentations=tuple([b.reshape(2, 2)[[0, 1, 1]]] for b in boxes),
        keypoints=np.zeros((count, 0, 3), np.float32) if keypoints is None else keypoints,
    )


def tiny_model(stem="patch"):
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            image_size=(32, 32),
            encoder=EncoderConfig(name="vit", stem=stem, dim=32, num_layers=1, num_heads=2, mlp_dim=64, drop_path=0.0),
            decoder=DecoderConfig(
                dim=32, num_layers=1, num_heads=2, mlp_dim=64, max_seq_len=64, dropout=0.0, drop_path=0.0
            ),
            vocab=VOCAB,
        ),
        CATEGORIES,
    ).train()


def random_samples(size=4, seed=0, **settings):
    rng = np.random.default_rng(seed)
    task = Detection(DetectionConfig(**{"max_objects": 6, "noise_objects": 2} | settings), VOCAB, CATEGORIES)
    samples = []
    for i in range(size):
        corners = np.sort(rng.random((i % 3 + 1, 2, 2)) * 32, axis=1).reshape(-1, 4)
        target = target_of(corners, rng.integers(1, 3, len(corners)), width=32, height=32)
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        samples.append(Sample(image, {"detection": task.examples(target, (32, 32), rng)}, i))
    return samples


def random_batch(*args, **settings):
    return collate(random_samples(*args, **settings), ["detection"])


def step_and_gradients(samples, parts, objective=None):
    """Return the result of one step on the samples in `parts` micro-batches, and the gradients."""
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    size = len(samples) // parts
    names = sorted({name for sample in samples for name in sample.examples})
    split = [collate(samples[i : i + size], names) for i in range(0, len(samples), size)]
    training_model = TrainingModel(model, objective or CrossEntropy())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    result = train_step(training_model, optimizer, split, {}, max_grad_norm=0)
    return result, [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("name", ["linear", "cosine", "none"])
def test_the_schedule_equals_the_official_one(parity_ops, name):
    official = parity_ops[f"lr_{name}_base3e-5_warm100_total1000_end.01"]
    schedule = ScheduleConfig(name=name, warmup_steps=100, end_factor=0.01)
    ours = [learning_rate(step, 1000, 3e-5, schedule) for step in range(0, 1001, 25)]
    np.testing.assert_allclose(ours, official, rtol=2e-6, atol=1e-12)


def test_a_hold_keeps_the_peak_before_the_linear_decay():
    schedule = ScheduleConfig(name="linear", warmup_steps=10, hold=0.5, end_factor=0.0)
    rates = [learning_rate(step, 110, 1.0, schedule) for step in (5, 10, 59, 60, 85, 110)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.5, 0], atol=1e-12)


def test_the_loss_is_the_weighted_sum_of_cross_entropies_of_all_positions():
    model, samples = tiny_model().eval(), random_samples()
    batch = collate(samples, ["detection"])
    sums = CrossEntropy()(model, batch)
    torch.testing.assert_close({name: total for name, (total, _) in sums.items()}, sums_one_by_one(model, samples))
    weights = sum(example.weights.sum() for sample in samples for example in sample.examples["detection"])
    assert sums["detection"][1] == CrossEntropy().counts(batch)["detection"] == pytest.approx(weights)


@pytest.mark.parametrize(("key", "smoothing"), [("xent_xent", 0.0), ("xent_xent@0.1", 0.1)])
def test_token_losses_are_the_official_ones(parity_ops, key, smoothing):
    logits, targets = torch.from_numpy(parity_ops["xent_logits"]), torch.from_numpy(parity_ops["xent_target"])
    decoder = SimpleNamespace(logits=lambda hidden: hidden, output_weight=torch.empty(logits.shape[-1], 1))
    ours = token_losses(decoder, logits.flatten(0, -2), targets.flatten(), smoothing)
    np.testing.assert_allclose(ours.numpy(), parity_ops[key].ravel(), atol=1e-5, rtol=1e-5)


def test_neither_prompts_nor_noise_coordinates_are_scored():
    batch = random_batch()
    lengths = batch.lengths.tolist()
    all_targets, all_weights = torch.full_like(batch.tokens, -1), torch.zeros(len(batch.tokens))
    all_targets[batch.scored], all_weights[batch.scored] = batch.targets, batch.weights
    assert (batch.weights > 0).all()
    parts = zip(*(x.split(lengths) for x in (batch.tokens, all_targets, all_weights)), strict=True)
    for tokens, targets, weights in parts:
        assert tokens[0] == 10
        assert (targets[-1].item(), weights[-1].item()) == (0, pytest.approx(0.1))
        assert len(tokens) % 5 == 1
        for start in range(0, len(tokens) - 1, 5):
            is_noise = targets[start + 4] == 30
            assert weights[start : start + 5].tolist() == ([0, 0, 0, 0, 1] if is_noise else [1] * 5)


def test_one_batch_of_eight_and_four_of_two_give_one_gradient():
    samples = random_samples(8)
    for i in (2, 3, 4):  # micro-batches have one task, the other or both
        samples[i] = replace(samples[i], examples={"other": samples[i].examples["detection"]})
    (one, gradients), (four, others) = (step_and_gradients(samples, parts) for parts in (1, 4))
    assert list(one.losses) == ["detection", "other"]
    torch.testing.assert_close(four.loss, one.loss)
    torch.testing.assert_close(four.losses, one.losses)
    torch.testing.assert_close(others, gradients, atol=2e-6, rtol=1e-4)


def test_gradients_are_clipped_to_the_norm():
    model = tiny_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    training_model = TrainingModel(model, CrossEntropy())
    norm = train_step(training_model, optimizer, [random_batch()], {}, max_grad_norm=0.01).grad_norm
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm > 0.01
    assert math.isclose(float((after - before).norm()), 0.01, rel_tol=1e-3)


def test_a_loss_that_is_not_finite_is_that_of_its_task_alone():
    samples = random_samples()
    examples = samples[1].examples["detection"]
    faulty = [replace(example, weights=example.weights * np.float32(np.nan)) for example in examples]
    samples[1] = replace(samples[1], examples={"other": faulty})
    result, _ = step_and_gradients(samples, 1)
    assert result.losses["detection"].isfinite()
    assert result.losses["other"].isnan()
    assert not result.finite


class SquaredNorms:
    """An objective without tokens: the mean squared norm of an image's memory."""

    state: ClassVar = {}

    def counts(self, batch):
        return {"norm": float(len(batch.images))}

    def __call__(self, model, batch):
        memory = model.encode(batch.images.float() / 255)
        return {"norm": (memory.square().sum(-1).mean(-1).sum(), float(len(memory)))}


def test_another_objective_trains_and_splits_over_micro_batches():
    (one, gradients), (four, others) = (step_and_gradients(random_samples(8), n, SquaredNorms()) for n in (1, 4))
    assert list(one.losses) == ["norm"]
    torch.testing.assert_close(four.loss, one.loss)
    torch.testing.assert_close(others, gradients, atol=2e-6, rtol=1e-4)
    model, batch = tiny_model(), random_batch()
    training_model = TrainingModel(model, SquaredNorms())
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    losses = [train_step(training_model, optimizer, [batch], {}, max_grad_norm=0).loss.item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("fault", ["nan in a loss", "inf in a gradient"])
def test_a_step_that_is_not_finite_changes_nothing_to_the_bit(fault):
    model, batches = tiny_model("conv"), [random_batch(seed=seed) for seed in range(2)]
    training_model = TrainingModel(model, CrossEntropy())
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))

    def state():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step():
        return train_step(training_model, optimizer, batches, {}, max_grad_norm=1.0)

    def differs(ours, theirs):
        (ours, ours_optimizer), (theirs, theirs_optimizer) = ours, theirs
        pairs = [(ours[name], theirs[name]) for name in theirs]
        for index, values in theirs_optimizer["state"].items():
            pairs += [(ours_optimizer["state"][index][name], value) for name, value in values.items()]
        return [not torch.equal(a, b) for a, b in pairs]

    assert step().finite
    before, calls = state(), []
    if fault == "nan in a loss":  # of the second micro-batch only
        hook = model.decoder.norm.register_forward_hook(
            lambda module, args, x: calls.append(0) or (x * torch.nan if len(calls) == 2 else x)
        )
    else:
        hook = model.decoder.norm.weight.register_hook(lambda grad: grad * torch.inf)
    result = step()
    hook.remove()
    assert not result.finite
    assert result.loss.isfinite() == (fault == "inf in a gradient")
    assert not any(differs(state(), before))
    assert all(p.grad is None for p in model.parameters())
    assert step().finite
    assert sum(differs(state(), before)) > len(before[0])


def test_norms_biases_and_embeddings_do_not_decay():
    model = tiny_model()
    decayed, kept = (
        group["params"] for group in build_optimizer(model, lr=1, weight_decay=0.1, betas=(0.9, 0.95)).param_groups
    )
    assert all(p.ndim >= 2 for p in decayed)
    assert any(p is model.decoder.token_embedding.weight for p in kept)
    assert len(decayed) + len(kept) == len(list(model.parameters()))


def test_the_moving_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, 0.9)
    torch.nn.init.ones_(model.weight)
    ema.update(model, 1)  # decay (1 + 1) / (10 + 1)
    assert math.isclose(ema.weights["weight"].item(), 1 - 2 / 11, rel_tol=1e-6)
    ema.update(model, 10_000)
    assert math.isclose(ema.weights["weight"].item(), 1 - 2 / 11 * 0.9, rel_tol=1e-6)


def test_running_statistics_are_averaged_and_counts_are_copied():
    model = torch.nn.BatchNorm1d(1)
    ema = Ema(model, 0.5)
    model.running_mean.fill_(4.0)
    model.running_var.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    ema.update(model, 1_000)
    assert ema.weights["running_mean"].item() == pytest.approx(2.0)
    assert ema.weights["running_var"].item() == pytest.approx(2.0)  # between 1 and 3
    assert ema.weights["num_batches_tracked"].item() == 7
    ema.update(model, 1_000, finite=torch.tensor(0.0))
    assert ema.weights["running_mean"].item() == pytest.approx(2.0)
    ema.update(model, 1_000, finite=torch.tensor(1.0))
    assert ema.weights["running_mean"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("at_once", [2**24, 40])
def test_token_losses_and_their_gradients_are_those_of_pytorch(monkeypatch, smoothing, at_once):
    monkeypatch.setattr("pix2seq.training.objective.LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(7, 11, generator=generator), torch.rand(7, generator=generator)
    targets = torch.randint(0, 11, (7,), generator=generator)
    decoder = SimpleNamespace(logits=lambda hidden: hidden, output_weight=torch.empty(11, 1))
    found = []
    for losses in (
        lambda x: token_losses(decoder, x, targets, smoothing),
        lambda x: torch.nn.functional.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing),
    ):
        leaf = logits.clone().requires_grad_()
        values = losses(leaf)
        (values * weights).sum().backward()
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(*found)
    assert token_losses(decoder, logits, targets).tolist() == token_losses(decoder, logits, targets, 0.0).tolist()
    assert CrossEntropy() == CrossEntropy(label_smoothing=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_token_losses_among_choices_are_those_of_the_choices_alone(smoothing):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    choices = torch.tensor([[2, 5, 9, -1], [0, 2**20, -1, -1], [7, 7, 1, 3]])
    possible, targets = [[2, 3, 4, 9], list(range(11)), [1, 3]], torch.tensor([9, 6, 1])
    decoder = SimpleNamespace(logits=lambda hidden: hidden, output_weight=torch.empty(11, 1))
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    token_losses(decoder, leaf, targets, smoothing, choices).sum().backward()
    for row, ids in enumerate(possible):
        target = torch.tensor(ids.index(int(targets[row])))
        torch.nn.functional.cross_entropy(other[row, ids], target, label_smoothing=smoothing).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_features_are_projected_in_place_of_encoding_images(monkeypatch, dtype):
    model, batch = tiny_model(), random_batch()
    features = torch.randn(len(batch.images), 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    (ours, _) = CrossEntropy()(model, replace(batch, images=features))["detection"]
    monkeypatch.setattr(model, "encode_with_maps", lambda images: (model.project(features.float()), ()))
    torch.testing.assert_close(ours, CrossEntropy()(model, batch)["detection"][0])


def test_losses_are_divided_by_their_counts_and_weighted():
    objective = SimpleNamespace(counts=lambda batch: batch)
    training_model = SimpleNamespace(objective=objective, ranks=SimpleNamespace(sum=lambda x: x))
    batches = [{"a": 3.0, "b": 0.0, "c": 1.0}, {"a": 5.0, "b": 0.0, "c": 1.0}]
    names, factors = loss_factors(training_model, batches, {"a": 4.0, "b": 2.0})
    assert names == ["a", "b", "c"]
    assert factors.dtype == torch.float32
    np.testing.assert_allclose(factors[:, [0, 2]], [[1 / 8, 1 / 2], [4 / 8, 1 / 2]])
    assert factors[:, 1].isfinite().all()  # a task without scored tokens has a sum of zero


def test_losses_and_gradients_are_those_of_the_formula():
    samples = random_samples(4)
    samples[1] = replace(samples[1], examples={"other": samples[1].examples["detection"]})
    counts = Counter()
    for sample in samples:
        counts.update({name: float(sum(e.weights.sum() for e in some)) for name, some in sample.examples.items()})
    model = tiny_model()
    sums = sums_one_by_one(model, samples)
    expected = sums["detection"] / counts["detection"] + 3 * sums["other"] / counts["other"]
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    batches = [collate(samples[:2], ["detection", "other"]), collate(samples[2:], ["detection", "other"])]
    result = train_step(TrainingModel(model, CrossEntropy()), optimizer, batches, {"other": 3.0}, max_grad_norm=0)
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.losses, {name: sums[name].detach() / counts[name] for name in result.losses})
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    torch.testing.assert_close(result.grad_norm, norm, atol=1e-5, rtol=1e-4)
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_matrix_products_run_in_bf16_if_asked(bf16):
    model, seen = tiny_model(), []
    model.decoder.blocks[0].mlp.expand.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    training_model = TrainingModel(model, CrossEntropy(), bf16=bf16)
    sums = training_model.backward(random_batch(), torch.ones(1), last=True)
    assert seen == [torch.bfloat16 if bf16 else torch.float32]
    assert (sums.dtype, sums.requires_grad) == (torch.float32, False)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_tiny_model_overfits_four_images():
    model, batch = tiny_model(), random_batch(4, noise_objects=0, class_corruption="none", order="corner")
    optimizer = build_optimizer(model, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.95))
    training_model = TrainingModel(model, CrossEntropy())
    losses = [train_step(training_model, optimizer, [batch], {}, max_grad_norm=1.0).loss.item() for _ in range(150)]
    assert losses[0] > 5
    assert losses[-1] < 0.1


def test_every_epoch_shows_every_image_once_and_a_resumed_stream_continues():
    def take(start, count):
        stream = iter(EpochSampler(10, 4, seed=3, start=start))
        return [next(stream) for _ in range(count)]

    batches = take(0, 5)
    seen = [key for batch in batches for key in batch]
    assert sorted(seen) == [(epoch, index) for epoch in (0, 1) for index in range(10)]
    assert [index for epoch, index in seen if epoch == 0] != [index for epoch, index in seen if epoch == 1]
    assert take(3, 2) == batches[3:]


def test_mirrored_boxes_and_keypoints_equal_the_official_ones(parity_ops):
    mirror = Affine(1.0, 1.0).then_mirror(1.0)
    boxes = mirror.boxes(parity_ops["flip_boxes_in"][:, [1, 0, 3, 2]])[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(boxes, parity_ops["flip_boxes_out"], atol=1e-6)
    points = parity_ops["flip_keypoints_in"].reshape(-1, 17, 2)
    # The official code also mirrors invisible points, which y = -3 marks before and after.
    mirrored = mirror.points(points[..., ::-1])[..., ::-1][:, mirror_order(KEYPOINTS)]
    np.testing.assert_allclose(mirrored.reshape(-1, 34), parity_ops["flip_keypoints_out"], atol=1e-6)


def test_a_flipped_person_keeps_left_and_right():
    keypoints = np.zeros((1, 17, 3), np.float32)
    keypoints[0, 1], keypoints[0, 2] = (40, 10, 2), (20, 10, 1)  # left and right eye
    target = target_of([[10, 5, 60, 40]], keypoints=keypoints)
    order = mirror_order(KEYPOINTS)
    moved = transform_target(target, Affine(1.0, 1.0).then_mirror(64), (48, 64), mirror_orders={1: order})
    assert moved.keypoints[0, 1].tolist() == [44, 10, 1]
    assert moved.keypoints[0, 2].tolist() == [24, 10, 2]


SIDES = st.integers(1, 200)


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_flipping_moves_boxes_points_and_pixels_alike(height, width, seed):
    rng = np.random.default_rng(seed)
    affine = random_affine((height, width), (64, 96), AugmentConfig(flip=1.0), rng)
    box = np.array([0.2, 0.3, 0.6, 0.9]) * [width, height, width, height]
    corners = affine.points(box.reshape(2, 2))
    moved = affine.boxes(box)
    np.testing.assert_allclose(moved, [*corners.min(0), *corners.max(0)], rtol=1e-5)
    np.testing.assert_allclose(affine.inverse().boxes(moved), box, atol=1e-2)


def test_a_box_stays_around_its_pixels_through_jitter_crop_and_flip():
    image = np.zeros((80, 120, 3), np.uint8)
    image[20:50, 30:90] = 255
    target = target_of([[30, 20, 90, 50]], width=120, height=80)
    for seed in range(50):
        affine = random_affine((80, 120), (64, 64), AugmentConfig(), np.random.default_rng(seed))
        moved = transform_target(target, affine, (64, 64))
        pixels = warp_image(image, affine, (64, 64))[..., 0] > 170
        if not len(moved.boxes_xyxy):
            assert pixels.sum() <= 64
            continue
        x0, y0, x1, y1 = moved.boxes_xyxy[0]
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        if len(rows):
            np.testing.assert_allclose(
                [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], [x0, y0, x1, y1], atol=1.01
            )


def test_objects_cropped_away_go_and_keypoints_outside_become_unlabelled():
    keypoints = np.array([[[5, 5, 2], [60, 40, 1]], [[1, 1, 2], [2, 2, 2]]], np.float32)
    target = target_of([[4, 4, 62, 44], [0, 0, 3, 3]], [1, 2], keypoints=keypoints)
    moved = transform_target(target, Affine(1, 1, -4, -4), (32, 32))
    assert moved.labels.tolist() == [1]
    assert moved.boxes_xyxy.tolist() == [[0, 0, 32, 32]]
    assert moved.keypoints.tolist() == [[[1, 1, 2], [0, 0, 0]]]
    assert len(transform_target(target, Affine(1, 1, -4, -4), (32, 32), min_visible=0.5).labels) == 0


def test_eval_resizing_equals_the_official_one(shared):
    arrays = np.load(shared / "parity" / "preprocess.npz")
    names = {name.rsplit("_", 1)[0] for name in arrays.files if name.endswith("_image")}
    assert len(names) == 8
    for name in names:
        file, size = name.rsplit("_", 1)
        height, width = map(int, size.split("x"))
        image = read_image(shared / "data" / "coco_mini" / "val2017" / file)
        affine = fit_affine(image.shape[:2], (height, width))
        scaled = np.array([image.shape[0] * affine.scale_y, image.shape[1] * affine.scale_x])
        np.testing.assert_array_equal(scaled.round(6), arrays[f"{name}_unpadded_hw"])
        difference = warp_image(image, affine, (height, width)) / 255 - arrays[f"{name}_image"].astype(np.float32)
        assert np.abs(difference).mean() < 0.004
        fractions = np.array([[0, 0, 1, 1], [0.1, 0.25, 0.9, 0.5]])  # xyxy of the recorded yxyx boxes
        pixels = affine.boxes(fractions * np.array([image.shape[1], image.shape[0]] * 2))
        ours = (pixels / [width, height, width, height])[:, [1, 0, 3, 2]]
        np.testing.assert_allclose(ours, arrays[f"{name}_bbox_yxyx"], atol=1e-6)


def test_a_small_flipped_image_stays_at_the_top_left():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :10, 0], image[:, 10:, 1] = 250, 250  # left red, right green
    config = AugmentConfig(flip=1.0, scale_min=0.5, scale_max=0.5)
    affine = random_affine((10, 20), (40, 40), config, np.random.default_rng(0))
    pixels = warp_image(image, affine, (40, 40))
    assert (pixels[:10, 20:] == 76).all()  # padding, round(0.3 * 255)
    assert (pixels[10:] == 76).all()
    assert pixels[:10, 1:9].mean(axis=(0, 1)).tolist() == [0, 250, 0]
    assert pixels[:10, 11:19].mean(axis=(0, 1)).tolist() == [250, 0, 0]
    target = target_of([[0, 2, 4, 6]], width=20, height=10)
    assert transform_target(target, affine, (40, 40)).boxes_xyxy.tolist() == [[16, 2, 20, 6]]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_color_jitter_leaves_the_padding_as_it_is_in_evaluation(flip):
    image = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    config = AugmentConfig(
        flip=flip, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.4, scale_min=0.7, scale_max=0.7
    )
    changed = 0
    for seed in range(5):
        affine = random_affine((30, 60), (64, 64), config, np.random.default_rng(seed))
        plain = warp_image(image, affine, (64, 64))
        pixels = augmented_pixels(image, affine, (64, 64), config, np.random.default_rng(seed))
        seen = np.zeros((64, 64), bool)
        seen[:22, :44] = True  # 0.7 of 32 x 64, cut to whole pixels
        assert (pixels[~seen] == 76).all()
        assert (plain[~seen] == 76).all()
        changed += int((pixels[seen] != plain[seen]).any())
        visible = color_jitter(np.ascontiguousarray(plain[:22, :44]), config, np.random.default_rng(seed))
        if not flip:
            np.testing.assert_array_equal(pixels[:22, :44], visible)
    assert changed == 5


def test_color_jitter_depends_only_on_its_generator():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    config = AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4)
    draws = [color_jitter(image, config, np.random.default_rng(seed)) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(draws[0], draws[2])
    assert (draws[0] != draws[1]).any()
    assert color_jitter(image, AugmentConfig(), np.random.default_rng(0)) is image


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lrr=3", "did you mean 'lr'"),
        ("model.encoder.dims=3", "did you mean 'model.encoder.dim'"),
        ("top_p=0.3", "did you mean 'detection.top_p'"),
        ("lr=abc", "lr"),
        ("lr=-1", "lr must be positive"),
        ("steps", "key=value"),
        ("detection.order=big", "'random', 'area', 'corner'"),
        ("batch_size=0", "at least 1"),
        ("accumulate=5", "does not divide"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_helpful_line(setting, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config(None, [setting])
    assert "\n" not in str(caught.value)


def test_settings_override_the_file_and_the_saved_file_repeats_the_run(tmp_path):
    from pix2seq.training.config import config_yaml

    (tmp_path / "a.yaml").write_text("lr: 1e-3\ndetection: {top_p: 0.5}\nmodel: {image_size: [64, 96]}\n")
    config = load_config(tmp_path / "a.yaml", ["detection.noise_objects=3", "data=here"])
    assert (config.lr, config.detection.top_p, config.model.image_size) == (1e-3, 0.5, (64, 96))
    (tmp_path / "b.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "b.yaml") == config


def test_every_config_builds_its_model():
    from importlib import resources

    files = [f for f in resources.files("pix2seq.configs").iterdir() if f.name.endswith(".yaml")]
    assert files
    for file in files:
        config = load_config(str(file), ["model.encoder.pretrained=false"])
        with torch.device("meta"):
            model = build_model(config.model, CATEGORIES)
        for name in config.tasks:
            task = get_task(name)(config.task(name), config.model.vocab, CATEGORIES)
            assert task.max_seq_len <= model.decoder.max_seq_len, (file.name, name)
        assert config.model.image_size[0] % model.encoder.stride == 0, file.name
