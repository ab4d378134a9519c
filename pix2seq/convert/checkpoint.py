"""Convert an official checkpoint to a folder for `Pix2Seq.from_pretrained`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pix2seq.convert.official_config import model_config, read_official_config
from pix2seq.convert.official_tasks import categories_of, task_settings
from pix2seq.convert.tf_bundle import TensorBundle
from pix2seq.convert.weight_map import canonical_name, make_parameter, plan
from pix2seq.errors import InputError, shortened
from pix2seq.model.config import ModelConfig
from pix2seq.model.pix2seq import Pix2Seq, build_model
from pix2seq.model.pretrained import CONFIG_FILE, WEIGHTS_FILE, write_checkpoint
from pix2seq.tasks import get_task
from pix2seq.tokenizers.text import SENTENCEPIECE_FILE, SentencePieceTokenizer

UNCONVERTED = ".num_batches_tracked"  # batch norm counters, which TensorFlow does not have
MAX_SHOWN = 5  # names in a message; the rest are counted


def convert_checkpoint(
    prefix: str | Path, config: str | Path, out: str | Path, *, text_model: str | Path | None = None
) -> None:
    """Read the checkpoint PREFIX.index with its shards, and write a folder for `Pix2Seq.from_pretrained`.

    `config` is the name of a preset (`pix2seq.convert.presets`) or a JSON file with the official `model`
    section. `text_model` is the sentencepiece model of a captioning checkpoint; without it, captioning is
    left out. Every variable must be used and every parameter filled. Raises `InputError` if files are
    missing, damaged or do not match; then nothing is written.
    """
    out = Path(out)
    _check_out(out)
    official = read_official_config(config)
    settings = model_config(official)
    tokenizer = None
    if text_model is not None:
        if not Path(text_model).is_file():
            raise InputError(
                f"{text_model} is not a file; give the sentencepiece model the checkpoint was trained with"
            )
        tokenizer = SentencePieceTokenizer.from_file(Path(text_model))
        if tokenizer.size > settings.vocab.num_text:
            raise InputError(
                f"{text_model} has {tokenizer.size} pieces, but the model has room for {settings.vocab.num_text}; "
                "give the sentencepiece model it was trained with"
            )
    bundle = TensorBundle(checkpoint_prefix(Path(prefix)))
    weights = read_weights(bundle, settings)
    model = _skeleton(settings)
    model.task_settings = task_settings(official, settings, captions=tokenizer is not None)
    model.categories = categories_of(official, settings.vocab, keypoints="keypoint" in model.task_settings)
    model.text = tokenizer
    for name in model.task_settings:
        get_task(name).from_model(model)  # refuses settings that nobody could use
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Write beside the target and move when complete, so that a failed conversion leaves nothing.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / out.name
            write_checkpoint(folder, model.config_json(), weights)
            if tokenizer is not None:
                tokenizer.save(folder)
            if out.exists():
                out.rename(Path(scratch) / "old")
            folder.rename(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}); give another folder as --out") from None


def checkpoint_prefix(path: Path) -> Path:
    """Return PREFIX from PREFIX, PREFIX.index, a folder with one checkpoint, or a folder that names its newest."""
    if path.suffix == ".index":
        return path.with_suffix("")
    if not path.is_dir():
        return path
    found = sorted(file.with_suffix("") for file in path.glob("*.index"))
    state = path / "checkpoint"
    if state.is_file():
        for line in state.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            newest = path / Path(value.strip().strip('"')).name
            if key == "model_checkpoint_path" and newest in found:
                return newest
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} checkpoints (*.index); give one of them as {path}/PREFIX")
    return found[0]


def read_weights(bundle: TensorBundle, config: ModelConfig) -> dict[str, Tensor]:
    """Return our parameters from the variables of a checkpoint. Raises `InputError` listing all mismatches."""
    keys: dict[str, str] = {}
    for key in bundle.entries:
        name = canonical_name(key)
        if name is None:
            bundle.verify(key)
        elif name in keys:
            raise InputError(f"{bundle.index_path} has two variables for {name}: {keys[name]} and {key}")
        else:
            keys[name] = key

    expected = _skeleton(config).state_dict()
    mapping = plan([name for name in expected if not name.endswith(UNCONVERTED)], config)
    sources = [official for _, officials in mapping.values() for official in officials]
    problems = _listed("missing in the checkpoint", [name for name in sources if name not in keys])
    problems += _listed("not used", sorted(keys.keys() - set(sources)))
    if problems:
        raise InputError(
            f"the checkpoint {bundle.index_path} and the config do not match: {'; '.join(problems)}; "
            "give the config it was trained with"
        )

    weights = {name: torch.zeros_like(t, device="cpu") for name, t in expected.items() if name.endswith(UNCONVERTED)}
    for name, (rule, officials) in mapping.items():
        variables = {official: _tensor(bundle, keys[official]) for official in officials}
        try:
            weights[name] = make_parameter(name, rule, variables, config)
        except ValueError as error:
            problems.append(str(error))
            continue
        if weights[name].shape != expected[name].shape:
            shapes = ", ".join(f"{official} {tuple(variable.shape)}" for official, variable in variables.items())
            problems.append(f"{shapes} cannot fill {name} {tuple(expected[name].shape)}")
    if problems:
        raise InputError(
            f"the checkpoint {bundle.index_path} and the config do not match: {'; '.join(shortened(problems))}; "
            "give the config it was trained with"
        )
    return weights


def _tensor(bundle: TensorBundle, key: str) -> Tensor:
    values = bundle.read(key)
    if not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"{key} in {bundle.index_path} has dtype {values.dtype}, expected floating point numbers")
    return torch.from_numpy(values.astype(np.float32, copy=False).copy())


def _skeleton(config: ModelConfig) -> Pix2Seq:
    """Build the model without allocating its weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error")  # PyTorch warns about layers of width 0
            return build_model(config, load_pretrained=False)
    except (ValueError, UserWarning) as error:
        raise InputError(f"config describes a model that cannot be built: {error}") from None


def _check_out(out: Path) -> None:
    ours = {CONFIG_FILE, WEIGHTS_FILE, SENTENCEPIECE_FILE}
    if (
        (out.exists() and not out.is_dir())
        or out.is_symlink()
        or (out.is_dir() and {file.name for file in out.iterdir()} - ours)
    ):
        raise InputError(f"{out} exists and is not a converted checkpoint; give a new folder as --out")


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {what} ({', '.join(shortened(names))})"] if names else []
