"""The contrast of images and sentences: its loss, its queue, its embeddings, over ranks and after a resume."""

import math
from dataclasses import replace

import contrast_ranks
import numpy as np
import pytest
import torch
from contrast_ranks import EMBED_DIM, random_samples, tiny_model
from forked import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_settings import TINY

from pix2seq import Pix2Seq
from pix2seq.cli import main
from pix2seq.errors import InputError
from pix2seq.examples import OtherView, collate
from pix2seq.model.config import ContrastConfig
from pix2seq.model.pix2seq import build_model
from pix2seq.predictor import Predictor
from pix2seq.training.config import load_config
from pix2seq.training.contrast import NO_KEY, ContrastiveLoss, Queue, contrastive_loss
from pix2seq.training.distributed import Ranks
from pix2seq.training.initialize import initialize_from, with_init_model
from pix2seq.training.objective import CrossEntropy
from pix2seq.training.step import TrainingModel, train_step

ALONE = Ranks(torch.device("cpu"))
COMPARED = [*TINY, "captioning.max_tokens=24", "matching.max_tokens=24", "model.contrast.dim=16", "augment.scale_max=1"]


def unit(rng, count, dim=3):
    return torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, dim))).float(), dim=-1)


def loss_by_loops(images, sentences, owners, keys, scale, own, queue):
    """The contrastive loss, one sentence after another, with plain numbers."""
    says = {i: {k for o, k in zip(owners, keys, strict=True) if o == i} for i in range(len(images))}
    queued = [(q, w, k) for q, w, k in zip(*queue, strict=True) if k != NO_KEY]
    total = 0.0
    for s in own:
        image = owners[s]
        right = math.exp(scale * float(sentences[s] @ images[image]))
        wrong_images = sum(
            math.exp(scale * float(sentences[s] @ images[i])) for i in range(len(images)) if keys[s] not in says[i]
        )
        wrong_images += sum(math.exp(scale * float(sentences[s] @ q)) for q, _, k in queued if k != keys[s])
        wrong_sentences = sum(
            math.exp(scale * float(images[image] @ sentences[t]))
            for t in range(len(sentences))
            if keys[t] not in says[image]
        )
        wrong_sentences += sum(math.exp(scale * float(images[image] @ w)) for _, w, k in queued if k not in says[image])
        total -= (math.log(right / (right + wrong_images)) + math.log(right / (right + wrong_sentences))) / 2
    return total


def test_two_pairs_by_hand():
    """Similarities 1 and 0 at scale ln 3: each right answer has 3 of 3 + 1 shares, in both directions."""
    images = sentences = torch.eye(2)
    scale = torch.tensor([math.log(3)])
    queue = Queue.empty(0, 2, torch.device("cpu"))
    loss = contrastive_loss(
        images, sentences, torch.tensor([0, 1]), torch.tensor([7, 8]), scale, own=slice(0, 2), queue=queue
    )
    assert loss.item() == pytest.approx(2 * math.log(4 / 3))


@given(st.integers(0, 2**32 - 1))
def test_the_loss_equals_a_slow_one(seed):
    rng = np.random.default_rng(seed)
    num_images, count = int(rng.integers(1, 5)), int(rng.integers(1, 7))
    owners = np.sort(rng.integers(0, num_images, count))
    keys = rng.integers(0, 5, count)
    images, sentences = unit(rng, num_images), unit(rng, count)
    queue = Queue(unit(rng, 4), unit(rng, 4), torch.from_numpy(rng.integers(NO_KEY, 5, 4)))
    first, last = sorted(rng.integers(0, count + 1, 2).tolist())
    loss = contrastive_loss(
        images, sentences, torch.from_numpy(owners), torch.from_numpy(keys), torch.tensor([3.0]),
        own=slice(first, last), queue=queue,
    )  # fmt: skip
    plain = (queue.images, queue.sentences, queue.keys.tolist())
    slow = loss_by_loops(images, sentences, owners.tolist(), keys.tolist(), 3.0, range(first, last), plain)
    assert loss.item() == pytest.approx(slow, rel=1e-4, abs=1e-5)


def test_a_queue_holds_the_newest_pairs_in_order():
    queue = Queue.empty(3, 1, torch.device("cpu"))
    for start, stop in ((0, 2), (2, 4), (4, 9)):
        numbers = torch.arange(start, stop)
        queue.add(numbers[:, None].float(), -numbers[:, None].float(), numbers)
        newest = list(range(max(stop - 3, 0), stop))
        padded = [NO_KEY] * (3 - len(newest)) + newest
        assert queue.keys.tolist() == padded
        assert queue.images[:, 0].tolist() == [max(key, 0) for key in padded]
    assert (queue.sentences == -queue.images).all()


def sentence_alone(model, tokens):
    """The embedding of one sentence (L,), by the decoder's parts and without attention to memory."""
    decoder = model.decoder
    x = decoder.token_embedding(tokens) + decoder.position_embedding[: len(tokens)]
    for block in decoder.blocks:
        q, k, v = (part.unflatten(-1, (2, -1)) for part in block.self_attention.qkv(block.self_norm(x)).chunk(3, -1))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        x = x + block.self_attention.out(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
        x = x + block.mlp(block.mlp_norm(x))
    state = model.contrast.sentence(decoder.norm(x)[-1])
    return state / state.norm()


def test_sentences_side_by_side_are_embedded_as_alone():
    model = tiny_model().eval()
    torch.manual_seed(1)
    sentences = [torch.randint(1, 1040, (length,)) for length in (5, 1, 17, 5, 30)]
    together = model.embed_sentences(torch.cat(sentences), torch.tensor([len(each) for each in sentences]))
    for vector, tokens in zip(together, sentences, strict=True):
        torch.testing.assert_close(vector, sentence_alone(model, tokens), rtol=0, atol=1e-5)


def test_an_image_is_pooled_by_a_query():
    model = tiny_model().eval()
    memory = torch.randn(2, 4, 32)
    part = model.contrast
    query = part.attention.query(part.query).unflatten(-1, (2, -1))
    for vector, one in zip(model.embed_images(memory), memory, strict=True):
        keys, values = (each.unflatten(-1, (2, -1)) for each in part.attention.key_value(one).chunk(2, -1))
        shares = (torch.einsum("hd,khd->hk", query, keys) / 4).softmax(-1)
        pooled = part.attention.out(torch.einsum("hk,khd->hd", shares, values).flatten())
        pooled = part.image(pooled + part.mlp(part.mlp_norm(pooled)))
        torch.testing.assert_close(vector, pooled / pooled.norm(), rtol=0, atol=1e-5)


def test_the_loss_of_a_batch_is_that_of_its_images_and_sentences_alone():
    model = tiny_model().eval()
    samples = random_samples(3)
    batch = collate(samples, [contrast_ranks.TASK], bucket=64)
    objective = CrossEntropy(contrast=ContrastiveLoss(ALONE, Queue.empty(0, EMBED_DIM, ALONE.device)))
    sums = objective(model, batch)
    told = [(i, e.sentence) for i, s in enumerate(samples) for e in s.examples["matching"] if e.sentence is not None]
    pixels = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in samples]).float() / 255
    sentences = torch.stack([sentence_alone(model, torch.from_numpy(ids)) for _, ids in told])
    keys = [hash(ids.tobytes()) for _, ids in told]
    assert len(set(keys)) < len(keys)  # some are equal
    images = model.embed_images(model.encode(pixels))
    slow = loss_by_loops(
        images.detach(), sentences.detach(), [i for i, _ in told], keys, 1 / 0.07, range(len(told)), ([], [], [])
    )
    loss, count = sums["contrast"]
    assert loss.item() == pytest.approx(slow, rel=1e-4)
    assert count == len(told)
    without = CrossEntropy()(model, batch)["matching"]
    assert sums["matching"][0].item() == pytest.approx(without[0].item(), rel=1e-6)


def test_images_are_embedded_alone_where_sequences_read_them_joined():
    model = tiny_model(references=1).eval()
    objective = CrossEntropy(contrast=ContrastiveLoss(ALONE, Queue.empty(0, EMBED_DIM, ALONE.device)))
    samples = random_samples(3)
    plain = collate(samples, [contrast_ranks.TASK])
    # The last image is read beside the first one by a sequence of that.
    first, *others, last = samples
    joined = replace(first.examples["matching"][0], others=(OtherView(0),))
    first = replace(first, examples={"matching": [joined]}, companions={"matching": [last.image]})
    batch = collate([first, *others], [contrast_ranks.TASK])
    assert batch.readings is not None
    plain = replace(collate([samples[0], *others], [contrast_ranks.TASK], images=batch.images), readings=None)
    expected, found = (objective(model, each)["contrast"][0].item() for each in (plain, batch))
    assert found == pytest.approx(expected, rel=1e-5)


def test_embeddings_learn_which_sentence_belongs_to_which_image():
    model = tiny_model()
    samples = random_samples(0)
    objective = CrossEntropy(contrast=ContrastiveLoss(ALONE, Queue.empty(0, EMBED_DIM, ALONE.device)))
    training_model = TrainingModel(model, objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    batch = collate(samples, [contrast_ranks.TASK])
    losses = [train_step(training_model, optimizer, [batch], {}, 1.0).losses["contrast"].item() for _ in range(60)]
    assert losses[0] > 1
    assert losses[-1] < 0.1


RUNS = ["ddp", "fsdp", "ddp-uneven"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrast_ranks")
    run_ranks(contrast_ranks.main, folder / "two.pt", *RUNS, folder=folder)
    return torch.load(folder / "two.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_rank():
    return contrast_ranks.train(ALONE, "ddp")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_compare_as_one_does(two_ranks, one_rank, run):
    two = two_ranks[run]
    for of_one, *of_two in zip(*one_rank["steps"], *two["steps"], strict=True):
        for step in of_two:
            assert step == pytest.approx(of_one, rel=1e-5)
    for name, tensor in one_rank["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=0, atol=3e-6, msg=name)
    assert two["queue"]["keys"].tolist() == one_rank["queue"]["keys"].tolist()
    assert (one_rank["queue"]["keys"] != NO_KEY).all()
    for name in ("images", "sentences"):
        torch.testing.assert_close(two["queue"][name], one_rank["queue"][name], rtol=0, atol=1e-5)


def test_a_step_that_is_not_finite_leaves_the_queue():
    model = tiny_model()
    queue = Queue.empty(5, EMBED_DIM, ALONE.device)
    training_model = TrainingModel(model, CrossEntropy(contrast=ContrastiveLoss(ALONE, queue)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = collate(random_samples(0), [contrast_ranks.TASK])
    assert train_step(training_model, optimizer, [batch], {}, 1.0).finite
    before = {name: tensor.clone() for name, tensor in queue.state.items()}
    assert (before["keys"] != NO_KEY).all()
    model.projection.register_forward_hook(lambda module, args, out: out * torch.nan)
    assert not train_step(training_model, optimizer, [batch], {}, 1.0).finite
    for name, tensor in queue.state.items():
        assert torch.equal(tensor, before[name])


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """A run of four steps of two tasks that share images, with embeddings and a queue."""
    out = tmp_path_factory.mktemp("compared") / "run"
    assert main(train_arguments(data, out)) == 0
    return out


def train_arguments(data, out, *more):
    return [
        "train", "--task", "captioning,matching", f"data={data}", f"out={out}", *COMPARED, "share_images=true",
        "contrast.queue=32", *more,
    ]  # fmt: skip


def test_a_run_resumes_to_the_bit_with_its_queue(data, compared, tmp_path):
    out = tmp_path / "run"
    assert main(train_arguments(data, out, "steps=2")) == 0
    assert main([*train_arguments(data, out), "--resume", "auto"]) == 0
    name = "checkpoints/step-00000004/state.safetensors"
    ours, theirs = load_file(out / name), load_file(compared / name)
    assert {"objective/images", "objective/sentences", "objective/keys"} <= ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    assert (ours["objective/keys"] != NO_KEY).sum() > 16  # more than the two last steps can have put there


def test_a_queue_of_another_size_starts_anew(data, compared, tmp_path, capsys):
    arguments = train_arguments(data, tmp_path / "run", "contrast.queue=6", "steps=5", "checkpoint_every=5")
    resumed = ["--resume", str(compared / "checkpoints" / "step-00000004")]
    assert main([*arguments, *resumed]) == 2
    assert "contrast.queue=6 (the run has 32)" in capsys.readouterr().err
    assert main([*arguments, *resumed, "--accept-changes"]) == 0
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000005" / "state.safetensors")
    assert state["objective/keys"].shape == (6,)


def test_a_checkpoint_embeds_images_and_sentences(compared, data):
    predictor = Predictor.from_pretrained(compared, device="cpu")
    images = sorted((data / "val2017").iterdir())[:3]
    vectors = predictor.embed(images)
    assert vectors.shape == (3, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(predictor.embed([predictor.encode(images[1])]), vectors[1:2], atol=1e-5)
    sentences = ["A red star.", "There are two circles and one person in blue, with more.", "?"]
    texts = predictor.embed_text(sentences)
    assert texts.shape == (3, 16)
    for text, vector in zip(sentences, texts, strict=True):
        np.testing.assert_allclose(predictor.embed_text([text])[0], vector, atol=1e-5)
    assert predictor.embed([]).shape == predictor.embed_text([]).shape == (0, 16)


def test_a_model_without_embeddings_says_so(run):
    predictor = Predictor.from_pretrained(run, device="cpu")
    for ask in (lambda: predictor.embed([np.zeros((8, 8, 3), np.uint8)]), lambda: predictor.embed_text(["a star"])):
        with pytest.raises(InputError, match=r"makes no embeddings; train one with model\.contrast\.dim=128"):
            ask()


def test_embeddings_without_a_task_that_tells_sentences_are_refused(data, tmp_path, capsys):
    arguments = [f"data={data}", f"out={tmp_path / 'run'}", *COMPARED]
    assert main(["train", "--task", "detection", *arguments]) == 2
    assert "compares images with sentences, and detection tells none" in capsys.readouterr().err


def test_a_task_without_sentences_keeps_the_embeddings(data, compared, tmp_path):
    out = tmp_path / "run"
    plain = [each for each in TINY if not each.startswith("model.")]
    assert main(["train", "--task", "detection", f"data={data}", f"out={out}", f"init={compared}", *plain]) == 0
    before, after = (Pix2Seq.from_pretrained(next((each / "checkpoints").glob("*4"))) for each in (compared, out))
    assert after.contrast is not None
    for name, tensor in before.contrast.state_dict().items():
        assert torch.equal(after.contrast.state_dict()[name], tensor)
    assert not torch.equal(after.projection.linear.weight, before.projection.linear.weight)


def test_embeddings_are_added_to_a_model_without(run):
    config = load_config(None, [f"init={run}", "model.contrast.dim=24"], tasks=["matching"])
    settings = with_init_model(config).model
    source = Pix2Seq.from_pretrained(next((run / "checkpoints").glob("*4")))
    assert settings.contrast == ContrastConfig(24)
    assert replace(settings, contrast=None, vocab=source.config.vocab) == source.config
    model = build_model(replace(source.config, contrast=ContrastConfig(24)), source.categories, source.text)
    fresh = model.contrast.query.clone()
    initialize_from(model, source, "run")
    assert torch.equal(model.contrast.query, fresh)
    assert torch.equal(model.decoder.token_embedding.weight[:100], source.decoder.token_embedding.weight[:100])
    initialize_from(source, model, "other")  # and it can be left out
