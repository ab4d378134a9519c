"""Read official configs: the `model` section as our `ModelConfig`, and the task sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pix2seq.convert.presets import PRESETS, preset_config
from pix2seq.errors import InputError, unknown_name
from pix2seq.files import read_json
from pix2seq.model.config import DecoderConfig, EncoderConfig, MemoryConfig, ModelConfig
from pix2seq.vocab import Vocab

NUM_BINS = 1000  # of all published models
POSITIONS: dict[str, Literal["sincos", "learned"]] = {"sin_cos": "sincos", "learned": "learned"}
STAGES = {"standard": 4, "c4": 3}


def read_official_config(name: str | Path) -> dict[str, Any]:
    """Read a preset by name, or a JSON file with the official `model` section and optional tasks."""
    if str(name) in PRESETS:
        return preset_config(str(name))
    path = Path(name)
    if not path.is_file() and path.suffix != ".json":
        raise unknown_name("config", str(name), sorted(PRESETS))
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist; give a JSON file or one of {', '.join(PRESETS)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"config {path} has no section `model`; give the official config as JSON, or a preset")
    return content


def model_config(official: Mapping[str, Any]) -> ModelConfig:
    """Return the model that an official config describes. Raises `InputError` if it is not supported."""
    try:
        return _model_config(official)
    except InputError:
        raise
    except ValueError as error:  # a setting is out of the range of a model
        raise InputError(f"config describes a model that cannot be built: {error}") from None


def _model_config(official: Mapping[str, Any]) -> ModelConfig:
    section = _Section(official["model"])
    if section.text("name", "encoder_ar_decoder") != "encoder_ar_decoder":
        raise InputError(f"config describes the model {official['model']['name']!r}; expected encoder_ar_decoder")
    height, width = section.pair("image_size")
    dim, dim_dec = section.number("dim_att"), section.number("dim_att_dec")
    # The official code stores MLP widths as integer ratios.
    ratio, ratio_dec = section.number("dim_mlp") // dim, section.number("dim_mlp_dec") // dim_dec
    mode = section.choice("dec_proj_mode", ("linear", "linear_p", "mlp"))
    positions = POSITIONS[section.choice("pos_encoding", POSITIONS)]
    dropout, drop_path = section.rate("drop_units"), section.rate("drop_path")
    encoder = EncoderConfig(
        **_backbone(section),
        dim=dim,
        num_layers=section.number("num_encoder_layers"),
        num_heads=section.number("num_heads"),
        mlp_dim=dim * ratio,
        class_token=section.flag("use_cls_token"),
        dropout=dropout,
        drop_path=drop_path,
    )
    decoder = DecoderConfig(
        dim=dim_dec,
        num_layers=section.number("num_decoder_layers"),
        num_heads=section.number("num_heads_dec"),
        mlp_dim=dim_dec * ratio_dec,
        max_seq_len=section.number("max_seq_len"),
        positions=POSITIONS[section.choice("pos_encoding_dec", POSITIONS)],
        tied_embedding=section.flag("shared_decoder_embedding"),
        output_bias=section.flag("decoder_output_bias"),
        dropout=dropout,
        drop_path=drop_path,
    )
    memory = MemoryConfig(positions=mode != "linear", mlp=mode == "mlp", mlp_dim=dim_dec * ratio)
    return ModelConfig((height, width), encoder, memory, decoder, positions, _vocab(section, official))


def _backbone(section: _Section) -> dict[str, Any]:
    variant = section.choice("resnet_variant", ("c1", *STAGES))
    if variant == "c1":
        return {"name": "vit", "patch_size": section.number("patch_size")}
    if section.rate("resnet_sk_ratio", 0.0) > 0:
        raise InputError("config has resnet_sk_ratio above 0; selective kernels are not supported")
    return {
        "name": "resnet",
        "resnet_depth": section.number("resnet_depth"),
        "resnet_stages": STAGES[variant],
        "resnet_width": section.rate("resnet_width_multiplier", upper=64.0),
    }


def _vocab(section: _Section, official: Mapping[str, Any]) -> Vocab:
    size, coord_base = section.number("vocab_size"), section.number("coord_vocab_shift")
    text_base = section.number("text_vocab_shift")
    given = [task["quantization_bins"] for task in official_tasks(official) if "quantization_bins" in task]
    if any(not isinstance(bins, int) or bins != given[0] for bins in given):
        raise InputError(f"config has tasks with quantization_bins {given}; expected one integer for all")
    num_bins = given[0] if given else min(NUM_BINS, text_base - coord_base, size - coord_base)
    try:
        return Vocab(num_bins, max(size - text_base, 0), coord_base, text_base, size)
    except (ValueError, TypeError) as error:
        raise InputError(f"config has an invalid vocabulary: {error}") from None


def official_tasks(official: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the task sections of an official config; an empty list if it has only a model."""
    tasks = official.get("tasks") or ([official["task"]] if isinstance(official.get("task"), dict) else [])
    return [task for task in tasks if isinstance(task, dict)]


class _Section:
    """The `model` section, read key by key so that errors name the wrong value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise InputError(f"config has no model.{key}; give the official config this checkpoint was trained with")
        return value

    def _wrong(self, key: str, expected: str) -> InputError:
        return InputError(f"config has model.{key}={self.values.get(key)!r}; expected {expected}")

    def number(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(key, "an integer of at least 1")
        return value

    def rate(self, key: str, default: float | None = None, *, upper: float = 1.0) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= upper:
            raise self._wrong(key, f"a number of 0 to {upper:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, default))

    def choice(self, key: str, known: Any) -> str:
        value = self._get(key)
        if value not in known:
            raise self._wrong(key, f"one of {', '.join(known)}")
        return str(value)

    def pair(self, key: str) -> tuple[int, int]:
        value = self._get(key)
        sides = list(value) if isinstance(value, list | tuple) else []
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise self._wrong(key, "[height, width] in pixels")
        return sides[0], sides[1]
