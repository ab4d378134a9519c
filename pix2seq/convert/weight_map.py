"""Map official variables to our parameters.

Official names are compared by their canonical form: `model/decoder/ar_decoder.Stoken_embedding` and
`model/decoder/token_embedding` are the same variable, because Keras releases escape a slash in a name differently.

Shapes: D input width, E output width, H heads, d head width; official convolutions are (h, w, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pix2seq.model.config import ModelConfig

VALUE_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
# Variables that Keras names either after the attribute or after the name they were created with.
SAME_NAME = {
    "seq_pos_embedding": "seq_pos_emb",
    "vis_pos_embedding": "vis_pos_emb",
    "cls_token_embedding": "cls_token_emb",
}
OWN_NAMES = {
    "token_embedding",
    "inp_token_embedding",
    "outp_token_embedding",
    "outp_bias",
    *SAME_NAME.values(),
}


def canonical_name(key: str) -> str | None:
    """Return the canonical name of a checkpoint key, or None if it is not a variable of the model."""
    if not key.startswith("model/") or not key.endswith(VALUE_SUFFIX) or "/.OPTIMIZER_SLOT" in key:
        return None
    path = key.removeprefix("model/").removesuffix(VALUE_SUFFIX).replace(".S", "/").replace("..", ".")
    parts = [part.removeprefix("_") for part in path.split("/")]
    leaf = SAME_NAME.get(parts[-1], parts[-1])
    if leaf in OWN_NAMES:
        owner = parts[0] if parts[0] in ("encoder", "decoder") else "proj"
        return f"{owner}/{leaf}"
    return "/".join(parts)


@dataclass(frozen=True)
class Rule:
    """How to make parameters from variables."""

    ours: str  # regular expression; `official` refers to its groups
    official: tuple[str, ...]  # several variables are concatenated along the output axis
    convert: Callable[[Tensor, int], Tensor]  # takes one variable and the expected number of heads


def _as_is(x: Tensor, heads: int) -> Tensor:
    return x


def _dense(x: Tensor, heads: int) -> Tensor:
    return x.T


def _conv(x: Tensor, heads: int) -> Tensor:
    return x.permute(3, 2, 0, 1)


def _dense_as_conv(x: Tensor, heads: int) -> Tensor:
    return x.T[:, :, None, None]


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Convert a kernel (D, H, d) or bias (H, d) of queries, keys or values."""
    if x.shape[-2] != heads:
        raise ValueError(f"it has {x.shape[-2]} heads, the config says {heads}")
    return x.flatten(-2).T if x.ndim == 3 else x.flatten()


def _from_heads(x: Tensor, heads: int) -> Tensor:
    """Convert the kernel (H, d, E) of an attention output."""
    if x.shape[0] != heads:
        raise ValueError(f"it has {x.shape[0]} heads, the config says {heads}")
    return x.flatten(0, 1).T


def _norm(ours: str, official: str) -> list[Rule]:
    return [
        Rule(rf"{ours}\.weight", (f"{official}/gamma",), _as_is),
        Rule(rf"{ours}\.bias", (f"{official}/beta",), _as_is),
    ]


def _linear(ours: str, official: str) -> list[Rule]:
    return [
        Rule(rf"{ours}\.weight", (f"{official}/kernel",), _dense),
        Rule(rf"{ours}\.bias", (f"{official}/bias",), _as_is),
    ]


def _heads(ours: str, official: Sequence[str]) -> list[Rule]:
    return [
        Rule(rf"{ours}\.weight", tuple(f"{name}/kernel" for name in official), _to_heads),
        Rule(rf"{ours}\.bias", tuple(f"{name}/bias" for name in official), _to_heads),
    ]


def _attention_out(ours: str, official: str) -> list[Rule]:
    return [
        Rule(rf"{ours}\.weight", (f"{official}/kernel",), _from_heads),
        Rule(rf"{ours}\.bias", (f"{official}/bias",), _as_is),
    ]


def _mlp(ours: str, official: str) -> list[Rule]:
    return [
        *_norm(rf"{ours}mlp_norm", f"{official}/layernorms/0"),
        *_linear(rf"{ours}mlp\.expand", f"{official}/mlp_layers/0/dense1"),
        *_linear(rf"{ours}mlp\.contract", f"{official}/mlp_layers/0/dense2"),
    ]


def _conv_norm(ours: str, conv: str, norm: str) -> list[Rule]:
    names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    return [
        Rule(rf"{ours}\.conv\.weight", (f"{conv}/conv2d/kernel",), _conv),
        *(Rule(rf"{ours}\.norm\.{name}", (f"{norm}/bn/{official}",), _as_is) for name, official in names.items()),
    ]


def _resnet(bottleneck: bool) -> list[Rule]:
    branch = "conv_relu_dropblock_layers" if bottleneck else "conv2d_bn_layers"
    step = 3 if bottleneck else 2  # the official list has dropout layers between bottleneck convolutions
    shortcut = "projection_layers" if bottleneck else "shortcut_layers"
    stem = "encoder/resnet/initial_conv_relu_max_pool"
    block, theirs = r"encoder\.stem\.0\.stages\.(\d+)\.(\d+)", r"encoder/resnet/block_groups/\1/layers/\2"
    rules = [
        *_conv_norm(r"encoder\.stem\.0\.stem", f"{stem}/0", f"{stem}/2"),
        *_conv_norm(rf"{block}\.shortcut", f"{theirs}/{shortcut}/0", f"{theirs}/{shortcut}/1"),
        Rule(r"encoder\.stem\.2\.weight", ("encoder/stem_projection/kernel",), _dense_as_conv),
        Rule(r"encoder\.stem\.2\.bias", ("encoder/stem_projection/bias",), _as_is),
    ]
    for index in range(3 if bottleneck else 2):
        names = (f"{theirs}/{branch}/{step * index}", f"{theirs}/{branch}/{step * index + 1}")
        rules += _conv_norm(rf"{block}\.convs\.{index}", *names)
    return rules


def _rules(config: ModelConfig) -> list[Rule]:
    enc, dec = r"encoder/transformer_encoder/enc_layers/\1", r"decoder/decoder/dec_layers/\1"
    ours_enc, ours_dec = r"encoder\.blocks\.(\d+)\.", r"decoder\.blocks\.(\d+)\."
    three = ("query_dense", "key_dense", "value_dense")
    embedding = "token_embedding" if config.decoder.tied_embedding else "inp_token_embedding"
    rules = [
        Rule(r"encoder\.stem\.weight", ("encoder/stem_conv/kernel",), _conv),
        Rule(r"encoder\.stem\.bias", ("encoder/stem_conv/bias",), _as_is),
        *_norm(r"encoder\.stem_norm", "encoder/stem_ln"),
        Rule(r"encoder\.class_token", ("encoder/cls_token_emb",), _as_is),
        Rule(r"encoder\.positions\.table", ("encoder/vis_pos_emb",), _as_is),
        *_norm(rf"{ours_enc}attention_norm", f"{enc}/mha_ln"),
        *_heads(rf"{ours_enc}attention\.qkv", [f"{enc}/mha/{name}" for name in three]),
        *_attention_out(rf"{ours_enc}attention\.out", f"{enc}/mha/output_dense"),
        *_mlp(ours_enc, f"{enc}/mlp"),
        *_norm(r"encoder\.norm", "encoder/output_ln"),
        *_linear(r"projection\.linear", "proj"),
        *_norm(r"projection\.norm", "proj_ln"),
        Rule(r"projection\.positions\.table", ("proj/vis_pos_emb",), _as_is),
        *_mlp(r"projection\.", "proj_mlp"),
        Rule(r"decoder\.token_embedding\.weight", (f"decoder/{embedding}",), _as_is),
        Rule(r"decoder\.output_embedding\.weight", ("decoder/outp_token_embedding",), _as_is),
        Rule(r"decoder\.output_bias", ("decoder/outp_bias",), _as_is),
        Rule(r"decoder\.position_embedding", ("decoder/seq_pos_emb",), _as_is),
        *_norm(rf"{ours_dec}self_norm", f"{dec}/self_ln"),
        *_heads(rf"{ours_dec}self_attention\.qkv", [f"{dec}/self_mha/{name}" for name in three]),
        *_attention_out(rf"{ours_dec}self_attention\.out", f"{dec}/self_mha/output_dense"),
        *_norm(rf"{ours_dec}cross_norm", f"{dec}/cross_ln"),
        *_heads(rf"{ours_dec}cross_attention\.query", [f"{dec}/cross_mha/query_dense"]),
        *_heads(rf"{ours_dec}cross_attention\.key_value", [f"{dec}/cross_mha/{name}" for name in three[1:]]),
        *_attention_out(rf"{ours_dec}cross_attention\.out", f"{dec}/cross_mha/output_dense"),
        *_mlp(ours_dec, f"{dec}/mlp"),
        *_norm(r"decoder\.norm", "decoder/output_ln"),
    ]
    return rules + _resnet(config.encoder.resnet_depth >= 50)


def plan(parameters: Sequence[str], config: ModelConfig) -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """Return, for each of our parameters, its rule and the canonical names of its source variables."""
    compiled = [(re.compile(rule.ours), rule) for rule in _rules(config)]
    found = {}
    for name in parameters:
        for pattern, rule in compiled:
            match = pattern.fullmatch(name)
            if match:
                found[name] = (rule, tuple(match.expand(official) for official in rule.official))
                break
        else:
            raise KeyError(f"no rule for parameter {name}")
    return found


def make_parameter(name: str, rule: Rule, variables: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """Make one of our parameters from official variables. Raises `ValueError` if heads or widths do not match."""
    heads = (config.encoder if name.startswith("encoder.") else config.decoder).num_heads
    parts = []
    for official, variable in variables.items():
        try:
            parts.append(rule.convert(variable, heads))
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{official} of shape {tuple(variable.shape)} does not match: {error}") from None
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
