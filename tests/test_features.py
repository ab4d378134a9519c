"""A frozen encoder stays as it is, and training from its stored features learns what the live run learns."""

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import frozen_ranks
import numpy as np
import pytest
import safetensors.torch
import torch
from forked import forked, run_ranks
from safetensors.torch import load_file
from test_cli import TINY, one_line

import pix2seq.data.features
from pix2seq.cli import main
from pix2seq.data.dataset import open_dataset
from pix2seq.data.features import FeatureStore, Variants
from pix2seq.data.shapes import write_shapes
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.geometry.affine import Affine, fit_affine
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.training.config import load_config
from pix2seq.training.distributed import Ranks
from pix2seq.training.recipe import prepare, store_features

NUM = 12
SIZE = (32, 48)
IMAGE_BYTES = 6 * 32 * 2  # 2 x 3 patches of width 32 in float16
SETTINGS = [*TINY, "bf16=false", "device=cpu", "trackers=[]", "ema_decay=0.9"]
NO_DROPOUT = ["model.decoder.dropout=0", "model.decoder.drop_path=0"]
CONV = ["model.encoder.stem=conv", "model.encoder.stem_blocks=1"]  # batch norms


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "shapes"
    write_shapes(folder, num_train=NUM, num_val=2, size=48, seed=1, workers=1)
    return folder


@pytest.fixture(scope="module")
def stored(data):
    out = data.parent / "stored"
    assert main(["data", "features", str(data), str(out), "--encoder", "vit", *SETTINGS]) == 0
    return out


def config(data, *settings):
    return load_config(None, [f"data={data}", "steps=6", *SETTINGS, *settings])


def train(data, out, *settings):
    return main(["train", f"data={data}", f"out={out}", "--resume", "auto", *SETTINGS, *settings])


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def state(out, step=6):
    folder = out / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors"), load_file(folder / "state.safetensors")


# A frozen encoder


@pytest.mark.parametrize("more", [CONV, ["model.encoder.drop_path=0.5", "model.encoder.dropout=0.5"]])
def test_a_frozen_encoder_keeps_its_weights_and_has_no_optimizer_state(data, tmp_path, more):
    assert train(data, tmp_path / "one", "freeze=encoder", "steps=1", "checkpoint_every=1", *more) == 0
    assert train(data, tmp_path / "six", "freeze=encoder", *more) == 0
    (_, start), (averaged, end) = state(tmp_path / "one", 1), state(tmp_path / "six")
    encoder = [name for name in end if name.startswith("weights/encoder.")]
    assert encoder
    for name in encoder:  # weights, and running statistics of batch norms
        assert torch.equal(start[name], end[name]), name
        assert torch.equal(averaged[name.removeprefix("weights/")], end[name]), name
    assert any(not torch.equal(start[name], end[name]) for name in start if name.startswith("weights/decoder."))
    model = Pix2Seq.from_pretrained(tmp_path / "six/checkpoints/step-00000006")
    trained = [name for name, _ in model.named_parameters() if not name.startswith("encoder.")]
    assert len([name for name in end if name.endswith("/exp_avg")]) == len(trained)


def test_the_frozen_encoder_is_in_evaluation_mode_while_the_rest_trains(data, tmp_path):
    from pix2seq.training.distributed import Ranks
    from pix2seq.training.loop import _Trainer

    settings = config(data, f"out={tmp_path}", "freeze=encoder", *CONV)
    model = _Trainer(settings, prepare(settings), Ranks(torch.device("cpu"))).state.model
    for _ in range(2):
        assert not any(module.training for module in model.encoder.modules())
        assert all(module.training for part in (model.projection, model.decoder) for module in part.modules())
        model.eval()
        assert not model.decoder.training
        model.train()
    seen = []
    model.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    assert model.encode(torch.rand(1, 3, *SIZE)).requires_grad
    assert seen == [False]


def test_other_parts_cannot_be_frozen():
    with pytest.raises(InputError, match=r"Invalid value 'encodr', expected one of \['encoder'\] \(freeze\)"):
        load_config(None, ["freeze=encodr"])


def test_a_run_cannot_resume_with_another_freeze(data, tmp_path, capsys):
    assert train(data, tmp_path / "a", "steps=2") == 0
    assert train(data, tmp_path / "a", "freeze=encoder") == 2
    assert "freeze=encoder (the run has null)" in one_line(capsys)


# Live and stored


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 0.0)])
@pytest.mark.parametrize("more", [[], CONV, ["model.encoder.class_token=true"]], ids=["patch", "conv", "class token"])
def test_losses_from_stored_features_are_those_of_the_live_encoder(data, tmp_path, dtype, tolerance, more):
    settings = ["augment.enabled=false", *more]
    store_features(config(data, *settings), tmp_path / "features", dtype=dtype)
    assert train(data, tmp_path / "live", "freeze=encoder", *settings) == 0
    assert train(data, tmp_path / "stored", f"features={tmp_path / 'features'}", *settings) == 0
    live, from_features = losses(tmp_path / "live"), losses(tmp_path / "stored")
    assert len(live) == 6
    np.testing.assert_allclose(from_features, live, rtol=0, atol=tolerance)
    if dtype == "float32":
        for ours, theirs in zip(state(tmp_path / "stored"), state(tmp_path / "live"), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_features_of_a_checkpoint_train_with_init(data, tmp_path, capsys):
    assert train(data, tmp_path / "first", "steps=2") == 0
    out = tmp_path / "features"
    arguments = ["data", "features", str(data), str(out), "--checkpoint", str(tmp_path / "first")]
    assert main([*arguments, "bf16=false", "device=cpu"]) == 0
    capsys.readouterr()
    assert train(data, tmp_path / "other", f"features={out}") == 2  # the fresh encoder is another one
    error = one_line(capsys)
    assert f"features={out} are of another encoder (vit, weights " in error
    assert "init=CHECKPOINT" in error
    assert train(data, tmp_path / "run", f"features={out}", f"init={tmp_path / 'first'}") == 0


def test_a_killed_run_from_features_resumes_to_the_bit(data, stored, tmp_path):
    settings = [f"features={stored}", "num_workers=1"]
    assert train(data, tmp_path / "run", *settings) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "broken/checkpoints" / f"step-{step:08d}")
    assert train(data, tmp_path / "broken", *settings) == 0
    for ours, theirs in zip(state(tmp_path / "broken"), state(tmp_path / "run"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_worker_processes_get_the_files_and_not_their_content(data, stored):
    (samples,) = prepare(config(data, f"features={stored}")).samples
    expected = samples[0, 5]
    assert expected.image.dtype == np.float16
    content = pickle.dumps(samples)
    assert expected.image.tobytes() not in content
    np.testing.assert_array_equal(pickle.loads(content)[0, 5].image, expected.image)


def test_two_processes_train_a_frozen_encoder_as_one_does(data, stored, tmp_path):
    base = " ".join([f"data={data}", *SETTINGS, "lr=1e-2", "augment.enabled=false", *NO_DROPOUT])
    runs = [f"{base} freeze=encoder", f"{base} features={stored}"]
    runs = [f"{run} parallel={parallel}" for parallel in ("ddp", "fsdp") for run in runs]
    alone = [frozen_ranks.train(Ranks(torch.device("cpu")), run.split()) for run in runs]
    run_ranks(frozen_ranks.main, tmp_path / "out.pt", *runs, folder=tmp_path)
    for one, two in zip(alone, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        assert one["kept"]
        assert two["kept"]
        assert one["num_states"] == two["num_states"]
        np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
        np.testing.assert_allclose(one["losses"], alone[0]["losses"], rtol=0, atol=1e-3)


# The files


def test_sizes_are_as_told(stored, data, capsys):
    out = stored.parent / "sizes"
    store_features(config(data), out, shard_bytes=5 * IMAGE_BYTES)
    told = capsys.readouterr().out
    assert f"{NUM} images, 1 x 6 features of 32 numbers in float16: {IMAGE_BYTES} bytes an image" in told
    assert f"{NUM * IMAGE_BYTES} bytes (0.00 GB) in 3 files" in told  # batches of 4 images
    files = sorted(out.glob("*.safetensors"))
    assert [len(load_file(path)["images"]) for path in files] == [4, 4, 4]
    index = json.loads((out / "features-train.json").read_text())
    assert [shard["bytes"] for shard in index["shards"]] == [path.stat().st_size for path in files]
    assert (index["num_features"], index["dim"], index["grid"]) == (6, 32, [2, 3])
    assert not list(out.glob(".partial*"))


def test_a_full_disk_is_reported_before_anything_is_written(data, tmp_path):
    with (
        mock.patch.object(pix2seq.data.features, "free_bytes", return_value=1000),
        pytest.raises(InputError, match=f"needs {NUM * IMAGE_BYTES} bytes, 1000 are free; free space"),
    ):
        store_features(config(data), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def store_and_die(data, out, calls):
    """Write features, and kill the process in the middle of file number `calls`."""
    original = safetensors.torch.save_file
    done = 0

    def dying(tensors, path, metadata):
        nonlocal done
        done += 1
        original(tensors, path, metadata=metadata)
        if done == calls:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(safetensors.torch, "save_file", dying):
        store_features(config(data), out, shard_bytes=4 * IMAGE_BYTES)


def test_a_killed_writer_goes_on_with_the_files_that_are_whole(data, tmp_path):
    out = tmp_path / "killed"
    for calls in (2, 1):
        process = forked(store_and_die, data, out, calls)
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in out.glob("features-*")] == ["features-train-00000.safetensors"]
    with pytest.raises(InputError, match=r"has no features-train.json; write it with: pix2seq data features DATA"):
        FeatureStore(out, "train")
    first = (out / "features-train-00000.safetensors").stat().st_mtime_ns
    os.truncate(shutil.copy(out / "features-train-00000.safetensors", out / "features-train-00001.safetensors"), 400)
    store_features(config(data), out, shard_bytes=4 * IMAGE_BYTES)
    assert (out / "features-train-00000.safetensors").stat().st_mtime_ns == first
    store_features(config(data), tmp_path / "unbroken", shard_bytes=4 * IMAGE_BYTES)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "unbroken").iterdir())
    assert all((out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes() for name in names)


def test_features_of_another_kind_are_not_mixed(data, stored):
    for other in (["seed=1"], ["bf16=true"], ["model.image_size=[32,32]"]):
        with pytest.raises(InputError, match=r"features of another encoder, of other data or with other settings"):
            store_features(config(data, *other), stored)


def test_the_index_is_refused_if_it_is_newer_or_damaged(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "copy")
    path = tmp_path / "copy/features-train.json"
    content = path.read_text()
    path.write_text(content.replace('"format": 1', '"format": 2', 1))
    with pytest.raises(InputError, match="has format 2, this release reads up to 1"):
        FeatureStore(path.parent, "train")
    path.write_text(content[:-20])
    with pytest.raises(InputError, match="is not an index of features"):
        FeatureStore(path.parent, "train")


@pytest.mark.parametrize("damage", ["truncated", "missing", "overwritten"])
def test_a_damaged_file_is_refused(stored, data, tmp_path, capsys, damage):
    shutil.copytree(stored, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("*.safetensors")
    size = path.stat().st_size
    if damage == "truncated":
        os.truncate(path, size - 1)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * size)
    assert train(data, tmp_path / "run", f"features={path.parent}") == 2
    error = one_line(capsys)
    assert str(path) in error
    assert "remove it and write the rest again" in error


# What they are of


def test_variants_are_augmented_and_labels_move_with_them(data, tmp_path):
    settings = config(data, "augment.hue=0.1", "augment.scale_min=0.5", "augment.scale_max=1.5")
    store = store_features(settings, tmp_path / "features", augmentations=3, dtype="float32")
    variants = Variants(SIZE, settings.augment, count=3)
    dataset = open_dataset(data, "train")
    encoder = pix2seq.training.recipe.initial_encoder(settings)
    maps = set()
    for number in range(NUM):
        image = dataset.images[number]
        pixels = pix2seq.data.features.read_record_image(image)
        stored_image = store.read(image)
        drawn = {stored_image.draw(np.random.default_rng(seed))[0] for seed in range(30)}
        assert len(drawn) == 3
        maps |= drawn
        for variant, (warped, affine) in enumerate(variants.of(pixels, number)):
            assert Affine(*stored_image.affines[variant].tolist()) == affine
            features, _ = encoder(torch.from_numpy(warped.copy()).permute(2, 0, 1)[None].float() / 255)
            torch.testing.assert_close(stored_image.features[variant], features[0], rtol=1e-4, atol=1e-5)
    assert len(maps) > 2 * NUM
    assert any(affine.scale_x < 0 for affine in maps)
    (samples,) = prepare(replace(settings, features=str(tmp_path / "features"))).samples
    index, _ = samples.index[5].tolist()
    for epoch in range(8):
        rng = np.random.default_rng((samples.seed, epoch, 5))
        affine, features = store.read(dataset.images[index]).draw(rng)
        moved = transform_target(dataset.target(index), affine, SIZE, mirror_orders=samples.maker.mirror_orders)
        expected = samples.task.examples(samples.maker.target(moved), SIZE, rng)
        sample = samples[epoch, 5]
        np.testing.assert_array_equal(sample.image, features)
        for ours, theirs in zip(sample.examples["detection"], expected, strict=True):
            np.testing.assert_array_equal(ours.targets, theirs.targets)


def test_one_augmentation_is_the_resize_of_the_evaluation(data, stored):
    store = FeatureStore(stored, "train")
    for image in open_dataset(data, "train").images:
        affine, features = store.read(image).draw(np.random.default_rng(0))
        assert affine == fit_affine((image.height, image.width), SIZE)
        assert features.shape == (6, 32)


def test_equal_variants_are_refused():
    with pytest.raises(InputError, match=r"3 augmentations with augment\.enabled=false would all be the same"):
        Variants(SIZE, AugmentConfig(enabled=False), count=3)


def test_variants_of_no_scale_are_refused():
    with pytest.raises(InputError, match=r"no scale is left from 0\.3 to 0\.1; set augment\.scale_min"):
        Variants(SIZE, AugmentConfig(scale_max=0.1), count=3)


def test_an_unreadable_image_is_left_out_and_skipped_as_in_a_live_run(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    dataset = open_dataset(copy, "train")
    bad = dataset.images[3]
    bad.path.write_bytes(bad.path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="left out: "):
        store = store_features(config(copy), tmp_path / "features", shard_bytes=4 * IMAGE_BYTES)
    assert len(store) == NUM - 1
    settings = config(copy, "augment.enabled=false")
    (live,) = prepare(settings).samples
    (from_features,) = prepare(replace(settings, features=str(tmp_path / "features"))).samples
    for samples in (live, from_features):
        with pytest.warns(UserWarning, match="skipped in training"):
            assert samples[0, 3].image_id == dataset.images[4].id


def test_features_without_an_image_of_the_data_are_refused(data, stored, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (path,) = (copy / "annotations").glob("instances_train*.json")
    content = json.loads(path.read_text())
    for image in content["images"][:2]:
        shutil.copy(copy / "train2017" / image["file_name"], copy / "train2017" / f"new_{image['file_name']}")
        image["id"], image["file_name"], old = image["id"] + 1000, f"new_{image['file_name']}", image["id"]
        for annotation in content["annotations"]:
            annotation["image_id"] += 1000 * (annotation["image_id"] == old)
    path.write_text(json.dumps(content))
    assert train(copy, tmp_path / "run", f"features={stored}") == 2
    assert "and 1 more of the data at its size; they are of other data" in one_line(capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.image_size=[32,32]"], "are of images at 32x48, but model.image_size is 32x32; set model.image_size="),
        (["seed=1"], "are of another encoder (vit, weights "),
        (["model.encoder.num_heads=4"], "are of another encoder (vit, weights "),
        (["tasks=[keypoint]"], "keypoint crops around objects, but features="),
        (["tasks=[detection,segmentation]", "data={detection: DATA, segmentation: COPY}"], "are of one data folder"),
        (["train_split=val"], "has no features-val.json; write it with: pix2seq data features DATA"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(data, stored, tmp_path, capsys, settings, message):
    if "COPY" in settings[-1]:
        shutil.copytree(data, tmp_path / "copy")
        settings[-1] = settings[-1].replace("DATA", str(data)).replace("COPY", str(tmp_path / "copy"))
    assert train(data, tmp_path / "run", f"features={stored}", "model.decoder.max_seq_len=512", *settings) == 2
    assert message in one_line(capsys)


def test_mirrored_features_are_refused_for_a_task_that_does_not_flip(data, tmp_path, capsys):
    out = tmp_path / "features"
    settings = ["tasks=[captioning]", "captioning.flip=never", "captioning.max_tokens=16"]
    for flip, code in (("1.0", 2), ("0.0", 0)):
        shutil.rmtree(out, ignore_errors=True)
        command = ["data", "features", str(data), str(out), "--encoder", "vit", "--augmentations", "2"]
        assert main([*command, *SETTINGS, f"augment.flip={flip}"]) == 0
        capsys.readouterr()
        assert train(data, tmp_path / f"run{flip}", f"features={out}", "steps=1", *settings) == code
        if code:
            assert "captioning does not learn from mirrored images, but features=" in one_line(capsys)


def test_shards_are_refused(data, stored, tmp_path, capsys):
    pytest.importorskip("webdataset")
    assert main(["data", "shard", str(data), str(tmp_path / "shards")]) == 0
    shards = tmp_path / "shards"
    capsys.readouterr()
    assert train(shards, tmp_path / "run", f"features={stored}", f"val_data={data}") == 2
    assert "holds shards, but features belong to single images; give data=FOLDER" in one_line(capsys)
    assert main(["data", "features", str(shards), str(tmp_path / "out"), "--encoder", "vit", *SETTINGS]) == 2
    assert "holds shards, but features belong to single images" in one_line(capsys)
