"""Training from shards: the same from a folder and over http, and a run that resumes where it stopped."""

import multiprocessing
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler
from itertools import islice

import numpy as np
import pytest
import torch
from http_server import serving
from safetensors.torch import load_file
from tiny_settings import ALL, TINY

from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.formats.shards import ShardIndex, read_shard
from pix2seq.data.loader import batches
from pix2seq.data.samples import TrainingStream
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.vocab import Vocab

pytest.importorskip("webdataset")
NUM = 22


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): ...


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "shapes"
    write_shapes(folder, num_train=NUM, num_val=3, size=48, seed=1, workers=1)
    return folder


@pytest.fixture(scope="module")
def shards(data):
    out = data.parent / "shards"
    assert main(["data", "shard", str(data), str(out), "--split", "train", "--samples-per-shard", "4"]) == 0
    return out


@pytest.fixture(scope="module")
def address(shards):
    with serving(partial(Quiet, directory=shards)) as address:
        yield address


def stream(location, task=Detection, config=None, **options):
    index = ShardIndex.read(location, "train")
    task = task(config or DetectionConfig(max_objects=10), Vocab(), index.categories)
    return TrainingStream(index, task, size=(32, 32), augment=AugmentConfig(), seed=5, **{"mix": 2} | options)


def take(samples, count, *, batch_size=3, **options):
    found = batches([(samples, batch_size)], **options)
    try:
        return list(islice(found, count))
    finally:
        getattr(found, "close", lambda: None)()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for batch, other in zip(ours, theirs, strict=True):
        assert batch.image_ids == other.image_ids
        for name in ("images", "tokens", "lengths", "memory_index", "scored", "targets", "weights"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_resumes_where_it_stopped_also_over_http(shards, address, num_workers):
    complete = take(stream(shards), 17, num_workers=num_workers)
    assert_same(take(stream(address), 17, num_workers=num_workers), complete)
    for start in (1, 6, 13):  # the last is in the second epoch for every reader
        assert_same(take(stream(address), 4, num_workers=num_workers, start=start), complete[start : start + 4])
    assert not multiprocessing.active_children()


def test_each_rank_and_worker_reads_its_own_images(shards, data):
    # 6 shards and 4 readers: the first 2 batches of each rank have no image twice.
    options = {"batch_size": 4, "num_workers": 2, "world_size": 2}
    parts = [take(stream(shards), 2, **options, rank=rank) for rank in range(2)]
    ids = [i for batches_of_rank in parts for batch in batches_of_rank for i in batch.image_ids["detection"]]
    assert len(ids) == len(set(ids)) == 8
    with pytest.raises(InputError, match=r"6 shards of split 'train', too few for 8 readers"):
        take(stream(shards), 1, batch_size=8, num_workers=4, world_size=2)


def test_each_epoch_crops_an_image_around_a_random_object(shards, data):
    samples = stream(shards, Keypoint, KeypointConfig())
    dataset = open_dataset(data, "train")
    people = [i for i in range(NUM) if (dataset.target(i).keypoints[..., 2] > 0).any()]
    assert len(samples) == len(people)
    found = list(islice(samples.read(0, 1), 2 * len(people)))
    assert sorted(s.image_id for s in found) == sorted([dataset.images[i].id for i in people] * 2)
    first, second = ({s.image_id: s for s in part} for part in (found[: len(people)], found[len(people) :]))
    assert any(not np.array_equal(first[i].image, second[i].image) for i in first)
    again = list(islice(samples.read(0, 1, start=3), 4))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(again, found[3:7], strict=True))


def test_a_missing_shard_gives_an_error_of_one_line(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "some")
    for number in range(3):
        (tmp_path / f"some/train-00000{number}.tar").unlink()
    for num_workers in (0, 2):
        with pytest.raises(InputError, match=r"train-00000\d\.tar cannot be read: No such file") as caught:
            take(stream(tmp_path / "some"), 20, num_workers=num_workers)
        assert "\n" not in str(caught.value)


def test_a_run_over_http_resumes_to_the_bit(data, address, tmp_path):
    options = ["train", "--task", ALL, f"data={address}", f"val_data={data}", *TINY, "num_workers=2", "steps=4"]
    complete, broken = tmp_path / "complete", tmp_path / "broken"
    assert main([*options, f"out={complete}"]) == 0
    shutil.copytree(complete, broken)
    shutil.rmtree(broken / "checkpoints/step-00000004")
    assert main([*options, f"out={broken}", "--resume", "auto"]) == 0
    for name in ("model.safetensors", "state.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints/step-00000004" / name) for folder in (broken, complete))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_shards_are_refused_if_single_images_are_needed(shards, data, tmp_path, capsys):
    for command, message in [
        (["train", f"data={shards}", f"out={tmp_path / 'out'}", *TINY], "give val_data=FOLDER"),
        (["data", "sequences", str(shards), f"val_data={data}", *TINY], "name the data set itself"),
        (["data", "shard", str(data), str(shards), "--split", "train"], "exists"),
    ]:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_shards_hold_the_images_in_order(shards):
    index = ShardIndex.read(shards, "train")
    assert [shard.num_samples for shard in index.shards] == [4, 4, 4, 4, 4, 2]
    numbers = [number for shard in index.shards for number, _, _ in read_shard(index.location, shard)]
    assert numbers == list(range(NUM))
