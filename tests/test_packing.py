"""Sequences end to end: each is computed as if it were alone, for any lengths, and padding never shows."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from one_by_one import random_sample, varlen_by_loop

from pix2seq.examples import collate
from pix2seq.model import packing
from pix2seq.model.decoder import Decoder
from pix2seq.model.layers import DropPath
from pix2seq.model.packing import MIN_LENGTH_SHARE, Groups, Layout

CPU = torch.device("cpu")
VOCAB_SIZE, DIM, NUM_KEYS = 40, 16, 6
# The lengths of each image's sequences.
IMAGES = st.lists(st.lists(st.integers(1, 30), max_size=4), min_size=1, max_size=5).filter(any)
SOME = [[3, 12, 5], [], [9], [1, 1, 12]]


@pytest.fixture(scope="module", autouse=True)
def several_groups():
    """Let few tokens of padding be free, so that short sequences make several groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "FREE_PADDING", 8)
        yield


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder(vocab_size=VOCAB_SIZE, dim=DIM, num_layers=2, num_heads=2, mlp_dim=32, max_seq_len=30)


def packed(images, seed=0):
    """Return a batch with sequences of these lengths, its layout, and memory (B, N, D)."""
    rng = np.random.default_rng(seed)
    batch = collate([random_sample(rng, {"task": lengths}, VOCAB_SIZE) for lengths in images], ["task"])
    memory = torch.randn(len(images), NUM_KEYS, DIM, generator=torch.Generator().manual_seed(seed))
    return batch, Layout(batch.lengths, batch.memory_index, len(images), CPU), memory


@settings(max_examples=40)
@given(IMAGES)
@example(SOME)
@example([[7]])
@example([[], [1]])
@example([[8, 8], [8, 8], [8, 8]])
def test_sequences_end_to_end_equal_each_alone(decoder, images):
    batch, layout, memory = packed(images)
    cotangent = torch.randn(len(batch.tokens), DIM, generator=torch.Generator().manual_seed(1))
    cotangent /= cotangent.norm()
    results = []
    for together in (True, False):
        decoder.zero_grad()
        memory = memory.detach().requires_grad_()
        if together:
            hidden = decoder.forward_packed(batch.tokens, batch.positions, layout, memory)
        else:
            rows = zip(batch.tokens.split(batch.lengths.tolist()), batch.memory_index.tolist(), strict=True)
            hidden = torch.cat([decoder(tokens[None], memory[i : i + 1])[0] for tokens, i in rows])
        hidden.backward(cotangent)
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), gradients | {"memory": memory.grad}))
    assert len(results[0][1]) == len(list(decoder.parameters()))  # all but the output bias, and the memory
    torch.testing.assert_close(results[0], results[1], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("images", [SOME, [[10, 9, 8, 7]], [[4, 4], [4, 4]]], ids=str)
def test_a_token_is_seen_by_itself_and_later_ones_of_its_sequence_alone(decoder, images):
    batch, layout, memory = packed(images)
    sequence = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.lengths)
    with torch.no_grad():
        before = decoder.forward_packed(batch.tokens, batch.positions, layout, memory)
        for at in range(len(batch.tokens)):
            tokens = batch.tokens.clone()
            tokens[at] = (tokens[at] + 1) % VOCAB_SIZE
            after = decoder.forward_packed(tokens, batch.positions, layout, memory)
            seers = (sequence == sequence[at]) & (batch.positions >= batch.positions[at])
            assert ((after != before).any(1) == seers).all(), at


def test_a_token_reads_the_memory_of_its_own_image_alone(decoder):
    batch, layout, memory = packed(SOME)
    image = torch.repeat_interleave(batch.memory_index, batch.lengths)
    assert torch.equal(layout.image_of_token, image)
    with torch.no_grad():
        before = decoder.forward_packed(batch.tokens, batch.positions, layout, memory)
        for changed in range(len(SOME)):
            other = memory.clone()
            other[changed] += 1
            after = decoder.forward_packed(batch.tokens, batch.positions, layout, other)
            assert ((after != before).any(1) == (image == changed)).all()


def test_stochastic_depth_drops_a_branch_for_all_sequences_of_an_image():
    batch, layout, _ = packed(SOME)
    drop = DropPath(0.5).train()
    torch.manual_seed(0)
    dropped = torch.stack([drop(torch.ones(len(batch.tokens), 1), layout.image_of_token, 4)[:, 0] for _ in range(200)])
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    for image in (0, 2, 3):
        tokens = dropped[:, layout.image_of_token == image]
        assert (tokens == tokens[:, :1]).all()
        assert 0.35 < (tokens[:, 0] > 0).float().mean() < 0.65
    assert (dropped[:, 0] != dropped[:, -1]).any()


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(lambda x: np.array(x, np.int64))


@given(LENGTHS)
def test_groups_hold_every_token_once_and_little_padding(lengths):
    groups = Groups.of(lengths, CPU)
    num_tokens, num_slots = int(lengths.sum()), sum(rows * length for rows, length in groups.shapes)
    assert groups.slots.shape == (num_tokens,)
    assert groups.tokens.shape == (num_slots,)
    assert len(groups.slots.unique()) == num_tokens
    assert torch.equal(groups.tokens[groups.slots], torch.arange(num_tokens))
    filled = torch.zeros(num_slots, dtype=torch.bool).index_fill(0, groups.slots, True)
    assert groups.filled is None if filled.all() else torch.equal(groups.filled[:, 0], filled)
    for runs, (rows, longest) in zip(groups.runs, groups.shapes, strict=True):
        padding = rows * longest - int(lengths[runs].sum())
        assert padding < packing.FREE_PADDING or lengths[runs].min() >= MIN_LENGTH_SHARE * longest
    assert sorted(torch.cat(groups.runs).tolist()) == np.flatnonzero(lengths).tolist()
    starts = np.cumsum(lengths) - lengths
    for (tokens, runs, (rows, longest)), is_filled in zip(
        groups.split(groups.tokens), filled.split([rows * length for rows, length in groups.shapes]), strict=True
    ):
        assert len(runs) == rows
        assert longest == lengths[runs].max()
        for run, row, real in zip(runs, tokens.view(rows, longest), is_filled.view(rows, longest), strict=True):
            assert torch.equal(row[real], starts[run] + torch.arange(int(lengths[run])))
            assert real[: lengths[run]].all()  # a run fills its row from the left


@given(LENGTHS)
def test_what_is_padded_comes_back(lengths):
    groups = Groups.of(lengths, CPU)
    x = torch.randn(int(lengths.sum()), 3)
    assert torch.equal(groups.unpad(groups.pad(x)), x)


@pytest.mark.parametrize("lengths", [[3, 5, 4, 0, 1], [2, 2], [4]], ids=str)
def test_gradients_go_through_padding(lengths):
    groups = Groups.of(np.array(lengths), CPU)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 2, dtype=torch.float64, generator=draw, requires_grad=True)
    slots = torch.randn(len(groups.tokens), 2, dtype=torch.float64, generator=draw, requires_grad=True)
    assert torch.autograd.gradcheck(groups.unpad, slots)
    assert torch.autograd.gradcheck(lambda x, y: groups.unpad(groups.pad(x).sin() * y), (x, slots))


@given(IMAGES, st.integers(0, 2**32 - 1))
def test_a_batch_says_where_everything_is(images, seed):
    rng = np.random.default_rng(seed)
    tasks = ["one", "two"]
    samples = [
        random_sample(rng, {"one": lengths[:2], "two": lengths[2:]} if i % 2 else {"two": lengths}, 40, image_id=10 + i)
        for i, lengths in enumerate(images)
    ]
    batch = collate(samples, tasks)
    examples = [
        (i, name, e) for i, sample in enumerate(samples) for name, some in sample.examples.items() for e in some
    ]
    arrays = [e.shifted() for _, _, e in examples]
    assert batch.lengths.tolist() == [len(tokens) for tokens, _, _ in arrays]
    assert batch.memory_index.tolist() == [i for i, _, _ in examples]
    np.testing.assert_array_equal(batch.tokens, np.concatenate([tokens for tokens, _, _ in arrays]))
    np.testing.assert_array_equal(batch.positions, np.concatenate([np.arange(len(tokens)) for tokens, _, _ in arrays]))
    weights = np.concatenate([weights for _, _, weights in arrays])
    scored = np.flatnonzero(weights)
    np.testing.assert_array_equal(batch.scored, scored)
    np.testing.assert_array_equal(batch.weights, weights[scored])
    np.testing.assert_array_equal(batch.targets, np.concatenate([targets for _, targets, _ in arrays])[scored])
    names = np.concatenate(
        [[name] * len(tokens) for (_, name, _), (tokens, _, _) in zip(examples, arrays, strict=True)]
    )
    assert [tasks[i] for i in batch.task_index] == names[scored].tolist()
    assert batch.counts == pytest.approx([weights[names == name].sum(dtype=np.float64) for name in tasks], rel=1e-6)
    odd = tuple(10 + i for i in range(len(images)) if i % 2)
    assert batch.image_ids == {"one": odd, "two": tuple(10 + i for i in range(len(images)))}
    for image, sample in zip(batch.images, samples, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), sample.image)


def test_a_batch_without_sequences_scores_nothing(decoder):
    batch, layout, memory = packed([[], []])
    assert batch.lengths.tolist() == [1]
    assert len(batch.scored) == len(batch.targets) == len(batch.weights) == 0
    assert batch.counts == (0.0,)
    assert decoder.forward_packed(batch.tokens, batch.positions, layout, memory).isfinite().all()


@pytest.mark.parametrize("takes_is_causal", [True, False], ids=["torch 2.11", "torch 2.15"])
@pytest.mark.parametrize("images", [SOME, [[7]], [[], [1], []], [[8, 8], [8, 8]]], ids=str)
def test_the_form_for_gpus_asks_varlen_attn_for_the_same(decoder, monkeypatch, images, takes_is_causal):
    batch, layout, memory = packed(images)
    expected = decoder.forward_packed(batch.tokens, batch.positions, layout, memory)
    monkeypatch.setattr("pix2seq.model.packing._has_varlen", lambda x: True)
    monkeypatch.setattr("pix2seq.model.packing._takes_is_causal", lambda: takes_is_causal)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
    found = decoder.forward_packed(batch.tokens, batch.positions, layout, memory)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# The parts that each reading joins, of seven memories.
READINGS = [(0,), (0, 3), (1, 3, 4), (2,), (2, 5), (5, 2, 6, 0)]


@pytest.mark.parametrize("varlen", [False, True], ids=["groups", "varlen"])
@pytest.mark.parametrize(
    "lengths", [[[4], [9, 3], [2], [], [7, 7], [1]], [[5]] * 6, [[], [3], [], [], [], []]], ids=str
)
def test_sequences_that_join_memories_equal_each_on_its_memories_end_to_end(decoder, monkeypatch, lengths, varlen):
    flat = torch.tensor([length for some in lengths for length in some])
    reading = torch.tensor([i for i, some in enumerate(lengths) for _ in some])
    parts = torch.tensor([[*each, *[-1] * (4 - len(each))] for each in READINGS])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (int(flat.sum()),), generator=draw)
    positions = torch.cat([torch.arange(length) for length in flat.tolist()])
    cotangent = torch.randn(len(tokens), DIM, generator=draw)
    cotangent /= cotangent.norm()
    memory = torch.randn(7, NUM_KEYS, DIM, generator=draw)
    results = []
    for together in (True, False):
        decoder.zero_grad()
        memory = memory.detach().requires_grad_()
        if together:
            if varlen:
                monkeypatch.setattr("pix2seq.model.packing._has_varlen", lambda x: True)
                monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
            layout = Layout(flat, reading, len(READINGS), CPU, parts=parts)
            hidden = decoder.forward_packed(tokens, positions, layout, memory)
        else:
            hidden = torch.cat(
                [
                    decoder(each[None], memory[list(READINGS[i])].flatten(0, 1)[None])[0]
                    for each, i in zip(tokens.split(flat.tolist()), reading.tolist(), strict=True)
                ]
            )
        hidden.backward(cotangent)
        gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), gradients | {"memory": memory.grad}))
    torch.testing.assert_close(results[0], results[1], atol=5e-5, rtol=1e-5)


def test_each_memory_is_projected_once_however_many_sequences_join_it(decoder, monkeypatch):
    rows = []
    project = decoder.blocks[0].cross_attention.key_value
    hook = project.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    parts = torch.tensor([[0, 2], [1, 2], [0, 1]])
    layout = Layout(torch.tensor([3, 3, 3]), torch.tensor([0, 1, 2]), 3, CPU, parts=parts)
    with torch.no_grad():
        decoder.forward_packed(torch.arange(9), torch.arange(3).repeat(3), layout, torch.randn(3, NUM_KEYS, DIM))
    hook.remove()
    assert rows == [3]
