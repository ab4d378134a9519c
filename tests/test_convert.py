"""Official checkpoints: the file format, the weight mapping, and the outputs of converted models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from official_format import (
    VALUE,
    checkpoint_tensors,
    official_variables,
    random_variables,
    slow_vit_forward,
    write_bundle,
)

from pix2seq import Pix2Seq, Predictor, convert_checkpoint
from pix2seq.cli import main
from pix2seq.convert.presets import PRESETS, preset_config
from pix2seq.convert.tf_bundle import TensorBundle
from pix2seq.convert.weight_map import canonical_name
from pix2seq.errors import InputError
from pix2seq.tasks.request import Frame

MODEL = {
    "name": "encoder_ar_decoder",
    "image_size": [32, 48],
    "max_seq_len": 40,
    "vocab_size": 230,
    "coord_vocab_shift": 140,
    "text_vocab_shift": 200,
    "use_cls_token": False,
    "shared_decoder_embedding": True,
    "decoder_output_bias": True,
    "patch_size": 8,
    "drop_path": 0.1,
    "drop_units": 0.1,
    "drop_att": 0.0,
    "dec_proj_mode": "mlp",
    "pos_encoding": "sin_cos",
    "pos_encoding_dec": "learned",
    "resnet_variant": "c1",
    "num_encoder_layers": 2,
    "dim_att": 24,
    "dim_mlp": 72,
    "num_heads": 3,
    "num_decoder_layers": 2,
    "dim_att_dec": 16,
    "dim_mlp_dec": 32,
    "num_heads_dec": 4,
}
RESNET = MODEL | {"resnet_depth": 50, "resnet_sk_ratio": 0.0, "resnet_width_multiplier": 0.0625}


def write_official(folder: Path, model, *, num_shards=1, seed=0):
    """Write a checkpoint and its config; return the prefix, the config's path and the variables."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = random_variables(model, seed)
    write_bundle(folder / "ckpt-7", checkpoint_tensors(variables), num_shards=num_shards)
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return folder / "ckpt-7", folder / "config.json", variables


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), min_size=1, max_size=30),
        st.one_of(st.binary(max_size=300), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=30,
    ),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_a_bundle_reads_what_was_written(tmp_path_factory, contents, num_shards, keys_per_block):
    prefix = tmp_path_factory.mktemp("bundle") / "ckpt"
    rng = np.random.default_rng(0)
    tensors = {
        key: value if isinstance(value, bytes) else rng.standard_normal(value).astype(np.float32)
        for key, value in contents.items()
    }
    write_bundle(prefix, tensors, num_shards=num_shards, keys_per_block=keys_per_block)
    bundle = TensorBundle(prefix)
    assert set(bundle.entries) == set(tensors)
    for key, value in tensors.items():
        bundle.verify(key)
        if not isinstance(value, bytes):
            np.testing.assert_array_equal(bundle.read(key), value)


@pytest.mark.parametrize("file", ["ckpt.index", "ckpt.data-00000-of-00002", "ckpt.data-00001-of-00002"])
def test_every_flipped_bit_and_every_cut_is_detected(tmp_path, file):
    rng = np.random.default_rng(1)
    tensors = {f"name {i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(1, 9)} | {"text": b"x" * 50}
    write_bundle(tmp_path / "ckpt", tensors, num_shards=2)
    path = tmp_path / file
    intact = path.read_bytes()

    def read_all():
        bundle = TensorBundle(tmp_path / "ckpt")
        for key in bundle.entries:
            bundle.verify(key)

    read_all()
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=file.split(".")[0]):
            read_all()
    for length in (0, 1, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(InputError):
            read_all()
    path.write_bytes(intact + b"\0")
    with pytest.raises(InputError):
        read_all()


def test_names_are_compared_in_canonical_form():
    for key in ("decoder/ar_decoder.Stoken_embedding", "decoder/ar_decoder/token_embedding", "decoder/token_embedding"):
        assert canonical_name(f"model/{key}{VALUE}") == "decoder/token_embedding"
    assert canonical_name(f"model/decoder/seq_pos_emb{VALUE}") == "decoder/seq_pos_emb"
    assert canonical_name(f"model/proj.Svis_pos_embedding{VALUE}") == "proj/vis_pos_emb"
    assert canonical_name(f"model/vis_pos_emb{VALUE}") == "proj/vis_pos_emb"
    assert canonical_name(f"model/a/mha/_key_dense/bias{VALUE}") == "a/mha/key_dense/bias"
    assert canonical_name(f"model/a/.OPTIMIZER_SLOT/optimizer/m{VALUE}") is None
    assert canonical_name(f"save_counter{VALUE}") is None


VIT_FLAGS = [
    {},
    {"dec_proj_mode": "linear_p", "shared_decoder_embedding": False, "decoder_output_bias": False},
    {"dec_proj_mode": "linear", "use_cls_token": True},
    {"use_cls_token": True, "pos_encoding": "learned", "pos_encoding_dec": "sin_cos"},
    {"image_size": [37, 50], "dim_mlp": 80, "dim_mlp_dec": 50},
]


@pytest.mark.parametrize("flags", VIT_FLAGS, ids=str)
def test_a_converted_vit_computes_the_official_outputs(tmp_path, flags):
    config = MODEL | flags
    prefix, path, variables = write_official(tmp_path, config, num_shards=2)
    convert_checkpoint(prefix, path, tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    rng = np.random.default_rng(2)
    image, tokens = rng.random((*config["image_size"], 3)), rng.integers(0, config["vocab_size"], 9)
    memory, logits = slow_vit_forward(config, variables, image, tokens)
    with torch.inference_mode():
        batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        np.testing.assert_allclose(model.encode(batch)[0].numpy(), memory, atol=2e-5)
        np.testing.assert_allclose(model(batch, torch.from_numpy(tokens)[None])[0].numpy(), logits, atol=2e-5)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("variant", ["standard", "c4"])
def test_a_converted_resnet_fills_every_parameter(tmp_path, depth, variant):
    config = RESNET | {"resnet_variant": variant, "resnet_depth": depth, "image_size": [70, 54]}
    prefix, path, variables = write_official(tmp_path, config)
    convert_checkpoint(prefix, path, tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    stride = 32 if variant == "standard" else 16
    assert model.encode(torch.rand(1, 3, 70, 54)).shape == (1, -(-70 // stride) * -(-54 // stride), 16)
    kept = sum(t.numel() for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked"))
    assert kept == sum(value.size for value in variables.values())


@pytest.mark.parametrize("name", ["vit", "resnet", "resnet-c"])
def test_converted_models_compute_the_recorded_arrays(shared, tmp_path, name):
    folder = shared / "parity" / name
    convert_checkpoint(folder / "ckpt-400", folder / "config.json", tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    arrays = np.load(folder / "model_io.npz")
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    tensor = lambda key: torch.from_numpy(arrays[key])  # noqa: E731
    with torch.inference_mode():
        logits = model(images, tensor("input_seq"))
        found = {
            "encoder_output": model.encoder(images)[0],
            "decoder_memory": model.encode(images),
            "logits": logits,
            "logits_instances": model(images, tensor("input_seq_instances")),
        }
        per_token = F.cross_entropy(logits.transpose(1, 2), tensor("loss_target"), reduction="none")
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), arrays[key], atol=1e-4, rtol=0, err_msg=key)
    np.testing.assert_allclose(per_token.numpy(), arrays["loss_per_token"], atol=1e-5)
    weights = tensor("loss_weights")
    mean = (per_token * weights).sum() / weights.sum()
    np.testing.assert_allclose(mean.numpy(), arrays["loss_mean"], atol=1e-5)
    prompts = {
        "detection": np.full((2, 1), 10),
        "captioning": np.full((2, 1), 13),
        "segmentation": arrays["segmentation_prompt"],
        "keypoint": arrays["keypoint_prompt"],
    }
    for task, prompt in prompts.items():
        expected = arrays[f"greedy_{task}_tokens"]
        out = model.generate(images, torch.from_numpy(prompt), max_new_tokens=expected.shape[1], top_k=1, eos_id=None)
        np.testing.assert_array_equal(out.tokens.numpy(), expected, err_msg=task)


FULL_SIZE = [("vit-b-640-coco", "vit_b_det640"), ("resnet-640-coco", "resnet_det640")]
TASK_MODELS = ["vit_det", "resnet_det", "vit_multitask", "resnetc_multitask", "variant_a", "variant_b"]


@pytest.mark.parametrize("name", TASK_MODELS)
def test_converted_models_compute_the_recorded_tasks(shared, tmp_path, name):
    folder = shared / "parity" / "tasks"
    convert_checkpoint(folder / "ckpt" / name / "ckpt-0", folder / "ckpt" / name / "config.json", tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    arrays = np.load(folder / f"model_{name}.npz")
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    tensor = lambda key: torch.from_numpy(arrays[key])  # noqa: E731
    with torch.inference_mode():
        found = {
            "encoder/output": model.encoder(images)[0],
            "encoded_for_decoder": model.encode(images),
            "teacher/logits": model(images, tensor("teacher/input_seq")),
            "teacher3d/logits": model(images, tensor("teacher3d/input_seq")),
        }
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), arrays[key], atol=1e-4, rtol=0, err_msg=key)
    calls = [key.removesuffix("/pred_seq") for key in arrays.files if "/call" in key and key.endswith("/pred_seq")]
    assert calls
    for call in calls:
        expected = arrays[f"{call}/pred_seq"]
        out = model.generate(
            images,
            tensor(f"{call}/prompt_seq"),
            max_new_tokens=expected.shape[1],
            top_k=1,
            num_samples=int(arrays[f"{call}/num_samples"]),
            eos_id=None,
        )
        np.testing.assert_array_equal(out.tokens.numpy(), expected, err_msg=call)
        logits = arrays[f"{call}/logits_topk_logits"][..., 0] - arrays[f"{call}/logits_logsumexp"]
        np.testing.assert_allclose(out.logprobs.numpy(), logits, atol=1e-4)


def test_keypoint_scores_are_the_official_ones(shared, tmp_path):
    folder = shared / "parity" / "tasks"
    convert_checkpoint(
        folder / "ckpt" / "vit_multitask" / "ckpt-0", folder / "ckpt" / "vit_multitask" / "config.json", tmp_path / "m"
    )
    model = Pix2Seq.from_pretrained(tmp_path / "m")
    task = Predictor(model).tasks["keypoint"]
    arrays = np.load(folder / "model_vit_multitask.npz")
    person = task.categories[1]
    config, frame = task.generation(person), Frame(np.zeros(2), np.ones(2))
    expected, classes = arrays["keypoint_detection/post/scores"], arrays["keypoint_detection/post/pred_classes"]
    out = model.generate(
        torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2),
        torch.from_numpy(arrays["keypoint_detection/call0/prompt_seq"]),
        max_new_tokens=config.max_new_tokens,
        top_k=1,
        score_range=config.score_range,
        score_without=config.score_without,
        eos_id=None,
    ).completions(1)
    checked = 0
    for row, label in enumerate(classes):
        if label == 1:  # the official code gives all others a score of 0
            assert task.scores(out[row], 0.5)[1] == pytest.approx(float(expected[row]), abs=1e-5)
            points = task.points(out[row], person, frame)
            theirs = arrays["keypoint_detection/post/pred_points"][row].reshape(-1, 2)[:, ::-1]
            # Random weights also predict ids that are not coordinates; the official code decodes them anyway.
            inside = ((theirs >= 0) & (theirs <= 1)).all(axis=1) & (points[:, 2] > 0)
            np.testing.assert_allclose(points[inside, :2], theirs[inside], atol=1e-5)
            checked += int(inside.sum())
    assert checked > 3


@pytest.mark.parametrize("name", TASK_MODELS)
def test_recorded_checkpoints_predict_all_their_tasks(shared, tmp_path, name):
    folder = shared / "parity" / "tasks"
    text_model = folder / "tokenizer" / "tiny_spm.model" if "multitask" in name else None
    arguments = [folder / "ckpt" / name / "ckpt-0", folder / "ckpt" / name / "config.json", tmp_path / "m"]
    convert_checkpoint(*arguments, text_model=text_model)
    predictor = Predictor.from_pretrained(tmp_path / "m", device="cpu")
    assert len(predictor.tasks) == (4 if text_model else 1)
    image = np.random.default_rng(0).integers(0, 255, (60, 100, 3)).astype(np.uint8)
    predictor.predict(image, list(predictor.tasks))
    if text_model:
        name_of_person = predictor.tasks["keypoint"].categories[1].name
        (found,) = predictor.keypoints(image, [[10, 10, 50, 50]], categories=name_of_person)
        assert found.keypoints.shape == (17, 3)


@pytest.mark.parametrize("name", ["vit", "resnet", "resnet-c"])
def test_our_list_of_official_variables_is_the_recorded_one(shared, name):
    config = json.loads((shared / "parity" / name / "config.json").read_text())
    recorded = {
        key: tuple(shape)
        for key, shape in config["variables"].items()
        if key.startswith("model/") and "OPTIMIZER_SLOT" not in key
    }
    ours = {f"model/{key}{VALUE}": shape for key, shape in official_variables(config["model"]).items()}
    assert ours == recorded


@pytest.mark.parametrize(
    ("preset", "shapes"), [("vit-b-640-coco", "vit_b_det640"), ("resnet-640-coco", "resnet_det640")]
)
def test_presets_have_the_published_variables(shared, preset, shapes):
    recorded = json.loads((shared / "parity" / "tasks" / "real_shapes" / f"{shapes}.json").read_text())
    model = preset_config(preset)["model"]
    assert {f"model/{key}": list(shape) for key, shape in official_variables(model).items()} == recorded["variables"]
    assert {key: recorded["config_model"][key] for key in model} == model


def test_presets_cover_all_published_checkpoints():
    assert len(PRESETS) == 18
    scores = [preset.coco_ap for preset in PRESETS.values() if preset.coco_ap is not None]
    assert (min(scores), max(scores)) == (39.1, 50.0)
    assert all(preset.location.startswith("gs://pix2seq/") for preset in PRESETS.values())


def test_a_converted_checkpoint_predicts(tmp_path):
    prefix, path, _ = write_official(tmp_path, MODEL | {"text_vocab_shift": 230})
    convert_checkpoint(prefix.parent, path, tmp_path / "out")
    predictor = Predictor.from_pretrained(tmp_path / "out", device="cpu")
    task = predictor.tasks["detection"]
    assert (task.config.top_p, task.config.num_objects, task.eos_id) == (0.4, 7, None)
    image = np.random.default_rng(0).integers(0, 255, (60, 100, 3)).astype(np.uint8)
    found = predictor.detect(image)
    assert found
    assert {instance.category.name for instance in found} <= {f"class {label}" for label in range(1, 40)}


def test_refused_conversions_write_nothing(tmp_path, capsys):
    prefix, path, variables = write_official(tmp_path / "in", MODEL)
    shard = Path(f"{prefix}.data-00000-of-00001")
    intact = shard.read_bytes()

    def refused(*needles, prefix=prefix, config=path, out="out"):
        code = main(["convert", str(prefix), "--config", str(config), "--out", str(tmp_path / out)])
        error = capsys.readouterr().err
        assert code == 2
        assert error.count("\n") == 1
        for needle in needles:
            assert needle in error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]

    shard.write_bytes(intact[:-9])
    refused("its index expects", str(shard))
    damaged = bytearray(intact)
    damaged[len(intact) // 2] ^= 4
    shard.write_bytes(damaged)
    refused("checksum", str(shard))
    shard.unlink()
    refused("does not exist", str(shard))
    shard.write_bytes(intact)
    refused("ckpt-8.index does not exist", prefix=prefix.with_name("ckpt-8"))

    def with_config(name, values):
        config = tmp_path / "in" / name
        config.write_text(values if isinstance(values, str) else json.dumps({"model": values}))
        return config

    refused("2 missing", "1 not used", config=with_config("a.json", MODEL | {"shared_decoder_embedding": False}))
    refused("heads", config=with_config("b.json", MODEL | {"num_heads": 4}))
    refused("missing in the checkpoint", config=with_config("c.json", MODEL | {"num_encoder_layers": 3}))
    refused("not used", config=with_config("d.json", MODEL | {"num_decoder_layers": 1}))
    refused("cannot fill", config=with_config("e.json", MODEL | {"vocab_size": 231}))
    refused("model.dim_att='x'", config=with_config("f.json", MODEL | {"dim_att": "x"}))
    refused("no model.num_heads", config=with_config("g.json", {k: v for k, v in MODEL.items() if k != "num_heads"}))
    refused("resnet_variant='c3'", config=with_config("h.json", RESNET | {"resnet_variant": "c3"}))
    refused("no readable JSON", config=with_config("i.json", "{"))
    refused("no section", config=with_config("j.json", '{"a": 1}'))
    refused("did you mean 'vit-b-640-coco'", config="vit-b-640-cocoa")
    refused("does not exist", config=tmp_path / "nowhere.json")

    refused("num_heads=5", config=with_config("k.json", MODEL | {"num_heads": 5}))
    refused("cannot be", config=with_config("l.json", MODEL | {"dim_mlp": 5}))
    task = {"name": "object_detection", "quantization_bins": [1]}
    refused("quantization_bins", config=with_config("m.json", json.dumps({"model": MODEL, "tasks": [task]})))
    task = {"name": "object_detection", "max_instances_per_image_test": "auto"}
    refused("'auto'", config=with_config("n.json", json.dumps({"model": MODEL, "tasks": [task]})))
    task = {"name": "object_detection", "top_p": 0.0}
    refused("top_p", config=with_config("o.json", json.dumps({"model": MODEL, "tasks": [task]})))

    fewer = {name: value for name, value in variables.items() if "stem_conv/bias" not in name}
    write_bundle(prefix, checkpoint_tensors(fewer))
    refused("1 missing", "encoder/stem_conv/bias")
    more = variables | {"encoder/extra/kernel": np.ones((2, 2), np.float32)}
    write_bundle(prefix, checkpoint_tensors(more))
    refused("1 not used", "encoder/extra/kernel")


def test_a_folder_with_other_files_is_not_written_into(tmp_path, capsys):
    prefix, path, _ = write_official(tmp_path / "in", MODEL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["convert", str(prefix), "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "not a converted checkpoint" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    # A second conversion replaces the first.
    for _ in range(2):
        assert main(["convert", str(prefix), "--config", str(path), "--out", str(tmp_path / "new")]) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name"), FULL_SIZE)
def test_full_size_models_compute_the_official_outputs(shared, tmp_path, preset, name):
    import importlib.util

    folder = shared / "parity" / "tasks"
    spec = importlib.util.spec_from_file_location("real_weights", folder / "real_weights.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    seed = json.loads((folder / "manifest.json").read_text())["real"][f"real_{name}.npz"]["seed"]
    names = {f"model/{key}": shape for key, shape in official_variables(preset_config(preset)["model"]).items()}
    write_bundle(tmp_path / "ckpt", {f"{key}{VALUE}": recipe.weight(key, shape, seed) for key, shape in names.items()})
    convert_checkpoint(tmp_path / "ckpt", preset, tmp_path / "out")
    model = Pix2Seq.from_pretrained(tmp_path / "out")
    arrays = np.load(folder / f"real_{name}.npz")
    image = recipe.image(seed, 640, 640)
    np.testing.assert_allclose(image[0, :4, :4], arrays["image_corner"], atol=1e-6)
    images = torch.from_numpy(image).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features, memory = model.encoder(images)[0][0], model.encode(images)[0]
        logits = model(images, torch.from_numpy(arrays["teacher_input_seq"]))
    np.testing.assert_allclose(features[::57].numpy(), arrays["encoder_output_rows"], atol=1e-3)
    np.testing.assert_allclose(memory[::57].numpy(), arrays["encoded_rows"], atol=1e-3)
    np.testing.assert_allclose(logits[..., ::61].numpy(), arrays["teacher_logits_stride"], atol=1e-3)
    expected = arrays["greedy_seq"]
    out = model.generate(
        images, torch.from_numpy(arrays["greedy_prompt"]), max_new_tokens=expected.shape[1], top_k=1, eos_id=None
    )
    np.testing.assert_array_equal(out.tokens.numpy(), expected)
