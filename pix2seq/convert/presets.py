"""The published checkpoints: location, published AP and official config.

Reference: google-research/pix2seq, `README.md` and `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKET = "gs://pix2seq"


@dataclass(frozen=True)
class Preset:
    """One published checkpoint."""

    architecture: str
    image_size: int  # side in pixels; images are square
    kind: str  # coco: fine-tuned for detection; objects365: pre-trained; multitask: all four tasks
    location: str
    coco_ap: float | None  # published box AP on COCO val2017; None if only pre-trained


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet": {
        "resnet_variant": "standard",
        "resnet_depth": 50,
        "resnet_sk_ratio": 0.0,
        "resnet_width_multiplier": 1,
        "num_encoder_layers": 6,
        "dim_att": 256,
        "dim_mlp": 1024,
        "num_heads": 8,
        "num_decoder_layers": 6,
        "dim_att_dec": 256,
        "dim_mlp_dec": 1024,
        "num_heads_dec": 8,
    },
    "resnet-c": {
        "resnet_variant": "c4",
        "resnet_depth": 50,
        "resnet_sk_ratio": 0.0,
        "resnet_width_multiplier": 1,
        "num_encoder_layers": 12,
        "dim_att": 512,
        "dim_mlp": 2048,
        "num_heads": 16,
        "num_decoder_layers": 8,
        "dim_att_dec": 512,
        "dim_mlp_dec": 2048,
        "num_heads_dec": 16,
    },
    "vit-b": {
        "resnet_variant": "c1",
        "num_encoder_layers": 12,
        "dim_att": 768,
        "dim_mlp": 3072,
        "num_heads": 12,
        "num_decoder_layers": 6,
        "dim_att_dec": 512,
        "dim_mlp_dec": 2048,
        "num_heads_dec": 16,
    },
    "vit-l": {
        "resnet_variant": "c1",
        "num_encoder_layers": 24,
        "dim_att": 1024,
        "dim_mlp": 4096,
        "num_heads": 16,
        "num_decoder_layers": 8,
        "dim_att_dec": 512,
        "dim_mlp_dec": 2048,
        "num_heads_dec": 16,
    },
}

COCO_AP = {
    "resnet": {640: 39.1, 1024: 41.7, 1333: 42.6},
    "resnet-c": {640: 44.7, 1024: 46.9, 1333: 47.3},
    "vit-b": {640: 44.2, 1024: 46.5, 1333: 47.1},
    "vit-l": {640: 47.6, 1024: 49.2, 1333: 50.0},
}
MULTITASK_AP = {640: 44.2, 1024: 46.5}

TASKS: dict[str, dict[str, Any]] = {
    "object_detection": {"max_instances_per_image_test": 100, "top_k": 0, "top_p": 0.4, "temperature": 1.0},
    "instance_segmentation": {
        "max_points_per_object": 128,
        "top_k": 0,
        "top_p": 0.8,
        "temperature": 1.0,
        "ensemble_num_samples": 8,
        "ensemble_threshold": 0.5,
        "min_bbox_score": 0.0,
    },
    "keypoint_detection": {
        "top_k": 0,
        "top_p": 0.1,
        "temperature": 1.0,
        "crop_to_bbox": True,
        "crop_to_bbox_pad_scale": 0.5,
        "points_score_weight": 1.0,
        "eval_suppress_invisible_token": True,
        "min_bbox_score": 0.0,
    },
    "captioning": {"max_seq_len": 128, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
}


def _presets() -> dict[str, Preset]:
    presets = {}
    for architecture, scores in COCO_AP.items():
        stem = architecture.replace("-c", "c").replace("-", "_")  # resnet, resnetc, vit_b, vit_l
        location = f"{BUCKET}/obj365_pretrain/{stem}_640x640_b256_s400k"
        presets[f"{architecture}-640-objects365"] = Preset(architecture, 640, "objects365", location, None)
        for size, score in scores.items():
            location = f"{BUCKET}/coco_det_finetune/{stem}_{size}x{size}"
            presets[f"{architecture}-{size}-coco"] = Preset(architecture, size, "coco", location, score)
    for size, score in MULTITASK_AP.items():
        location = f"{BUCKET}/multi_task/ckpt/vit_b_{size}x{size}"
        presets[f"vit-b-{size}-multitask"] = Preset("vit-b", size, "multitask", location, score)
    return presets


PRESETS = _presets()


def preset_config(name: str) -> dict[str, Any]:
    """Return the official config of a published checkpoint: its `model` section, tasks and data set."""
    preset = PRESETS[name]
    multitask = preset.kind == "multitask"
    model = {
        "name": "encoder_ar_decoder",
        "image_size": [preset.image_size, preset.image_size],
        "max_seq_len": 512,
        "vocab_size": 35_000 if multitask else 3000,
        "coord_vocab_shift": 1000,
        "text_vocab_shift": 3000,
        "use_cls_token": False,
        "shared_decoder_embedding": True,
        "decoder_output_bias": True,
        "patch_size": 16,
        "drop_path": 0.1,
        "drop_units": 0.1,
        "drop_att": 0.0,
        "dec_proj_mode": "mlp",
        "pos_encoding": "sin_cos",
        "pos_encoding_dec": "learned",
        **ARCHITECTURES[preset.architecture],
    }
    names = TASKS if multitask else ["object_detection"]
    tasks = [{"name": task, "quantization_bins": 1000, **TASKS[task]} for task in names]
    dataset = "objects365" if preset.kind == "objects365" else "coco/2017_object_detection"
    return {"model": model, "tasks": tasks, "dataset": {"name": dataset}}


def preset_table() -> str:
    """Return a table of all presets for the terminal, one line each."""
    lines = [f"{'preset':26} {'COCO AP':>7}  checkpoint"]
    for name, preset in PRESETS.items():
        score = "-" if preset.coco_ap is None else f"{preset.coco_ap:.1f}"
        lines.append(f"{name:26} {score:>7}  {preset.location}")
    return "\n".join(lines)
