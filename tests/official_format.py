"""Official checkpoints from scratch: TensorFlow's file format, variable names and a slow forward pass.

Written from the format's description and the official code's structure, independently of `pix2seq.convert`,
so that the two can disagree.
"""

import struct
from pathlib import Path

import google_crc32c
import numpy as np

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(items: list[tuple[bytes, bytes]], restart_every: int) -> bytes:
    """A table block: keys share prefixes with the previous key, except at restarts."""
    data, restarts, last = bytearray(), [], b""
    for index, (key, value) in enumerate(items):
        shared = 0
        if index % restart_every == 0:
            restarts.append(len(data))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    for restart in restarts or [0]:
        data += struct.pack("<I", restart)
    return bytes(data + struct.pack("<I", len(restarts or [0])))


def write_bundle(prefix: Path, tensors: dict, *, num_shards: int = 1, keys_per_block: int = 7) -> dict[bytes, bytes]:
    """Write arrays (or bytes, as a scalar string) as PREFIX.index and shards, in turn; return the index's entries."""
    entries = {}
    files = [open(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}", "wb") for shard in range(num_shards)]  # noqa: SIM115
    for index, key in enumerate(sorted(tensors)):
        value, file = tensors[key], files[index % num_shards]
        if isinstance(value, bytes):
            dtype, shape = 7, ()
            lengths = struct.pack("<I", len(value))
            head = struct.pack("<I", masked_crc(lengths))
            data = varint(len(value)) + head + value
            crc = masked_crc(lengths + head + value)
        else:
            dtype = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}[value.dtype.name]
            shape, data = value.shape, np.ascontiguousarray(value).tobytes()
            crc = masked_crc(data)
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in shape))
        entry = b"\x08" + varint(dtype) + b"\x12" + varint(len(dims)) + dims
        if index % num_shards:
            entry += b"\x18" + varint(index % num_shards)
        if file.tell():
            entry += b"\x20" + varint(file.tell())
        entry += b"\x28" + varint(len(data)) + b"\x35" + struct.pack("<I", crc)
        entries[key.encode()] = entry
        file.write(data)
    for file in files:
        file.close()
    entries[b""] = b"\x08" + varint(num_shards) + b"\x1a\x02\x08\x01"
    Path(f"{prefix}.index").write_bytes(index_table(entries, keys_per_block))
    return entries


def index_table(entries: dict[bytes, bytes], keys_per_block: int = 7) -> bytes:
    """Return the content of PREFIX.index: keys and values as a table with the right checksums."""
    items = sorted(entries.items())
    out, index_items = bytearray(), []

    def append(data: bytes) -> bytes:
        handle = varint(len(out)) + varint(len(data))
        out.extend(data + b"\x00" + struct.pack("<I", masked_crc(data + b"\x00")))
        return handle

    for start in range(0, len(items), keys_per_block):
        part = items[start : start + keys_per_block]
        index_items.append((part[-1][0] + b"~", append(block(part, restart_every=3))))
    meta = append(block([], 1))
    footer = meta + append(block(index_items, 1))
    return bytes(out) + footer.ljust(40, b"\x00") + struct.pack("<Q", 0xDB4775248B80FB57)


def norm(name, dim):
    return {f"{name}/gamma": (dim,), f"{name}/beta": (dim,)}


def dense(name, dim_in, dim_out):
    return {f"{name}/kernel": (dim_in, dim_out), f"{name}/bias": (dim_out,)}


def attention(name, dim, heads):
    inner = (heads, dim // heads)
    shapes = {f"{name}/_output_dense/kernel": (*inner, dim), f"{name}/_output_dense/bias": (dim,)}
    for part in ("query", "key", "value"):
        shapes |= {f"{name}/_{part}_dense/kernel": (dim, *inner), f"{name}/_{part}_dense/bias": inner}
    return shapes


def mlp(name, dim, ratio):
    return (
        norm(f"{name}/layernorms/0", dim)
        | dense(f"{name}/mlp_layers/0/dense1", dim, dim * ratio)
        | dense(f"{name}/mlp_layers/0/dense2", dim * ratio, dim)
    )


def resnet_variables(config):
    bottleneck = config["resnet_depth"] >= 50
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[config["resnet_depth"]]
    root, width = "encoder/resnet", config["resnet_width_multiplier"]
    shapes = {}

    def conv_bn(conv, bn, size, dim_in, dim_out):
        shapes[f"{conv}/conv2d/kernel"] = (size, size, dim_in, dim_out)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{bn}/bn/{name}"] = (dim_out,)

    stem = f"{root}/initial_conv_relu_max_pool"
    conv_bn(f"{stem}/0", f"{stem}/2", 7, 3, int(64 * width))
    dim = int(64 * width)
    for group in range(3 if config["resnet_variant"] == "c4" else 4):
        inner = int(64 * 2**group * width)
        outer = inner * (4 if bottleneck else 1)
        for layer in range(blocks[group]):
            name = f"{root}/block_groups/{group}/layers/{layer}"
            if bottleneck:
                if layer == 0:
                    conv_bn(f"{name}/projection_layers/0", f"{name}/projection_layers/1", 1, dim, outer)
                branch = f"{name}/conv_relu_dropblock_layers"
                conv_bn(f"{branch}/0", f"{branch}/1", 1, dim, inner)
                conv_bn(f"{branch}/3", f"{branch}/4", 3, inner, inner)
                conv_bn(f"{branch}/6", f"{branch}/7", 1, inner, outer)
            else:
                if layer == 0:
                    conv_bn(f"{name}/shortcut_layers/0", f"{name}/shortcut_layers/1", 1, dim, outer)
                conv_bn(f"{name}/conv2d_bn_layers/0", f"{name}/conv2d_bn_layers/1", 3, dim, inner)
                conv_bn(f"{name}/conv2d_bn_layers/2", f"{name}/conv2d_bn_layers/3", 3, inner, inner)
            dim = outer
    return shapes | dense("encoder/stem_projection", dim, config["dim_att"])


def official_variables(config) -> dict[str, tuple[int, ...]]:
    """Return names (without `model/` and the suffix) and shapes of all variables of an official model."""
    enc, dec = config["dim_att"], config["dim_att_dec"]
    ratio, ratio_dec = config["dim_mlp"] // enc, config["dim_mlp_dec"] // dec
    patch = config["patch_size"]
    if config["resnet_variant"] == "c1":
        owner = "vit"
        shapes = {"encoder/stem_conv/kernel": (patch, patch, 3, enc), "encoder/stem_conv/bias": (enc,)}
        rows, columns = (side // patch for side in config["image_size"])
    else:
        owner = "rest"
        shapes = resnet_variables(config)
        stride = 16 if config["resnet_variant"] == "c4" else 32
        rows, columns = (-(-side // stride) for side in config["image_size"])
    shapes |= norm("encoder/stem_ln", enc) | norm("encoder/output_ln", enc)
    if config["use_cls_token"]:
        shapes[f"encoder/{owner}.Scls_token_embedding"] = (1, enc)
    if config["pos_encoding"] == "learned":
        shapes[f"encoder/{owner}.Svis_pos_embedding"] = (rows * columns, enc)
        if config["dec_proj_mode"] != "linear":
            shapes["proj.Svis_pos_embedding"] = (rows * columns, dec)
    for layer in range(config["num_encoder_layers"]):
        name = f"encoder/transformer_encoder/enc_layers/{layer}"
        shapes |= attention(f"{name}/mha", enc, config["num_heads"]) | norm(f"{name}/mha_ln", enc)
        shapes |= mlp(f"{name}/mlp", enc, ratio)
    shapes |= dense("proj", enc, dec) | norm("proj_ln", dec)
    if config["dec_proj_mode"] == "mlp":
        shapes |= mlp("proj_mlp", dec, ratio)
    size = config["vocab_size"]
    for name in ["token"] if config["shared_decoder_embedding"] else ["inp_token", "outp_token"]:
        shapes[f"decoder/ar_decoder.S{name}_embedding"] = (size, dec)
    if config["decoder_output_bias"]:
        shapes["decoder/ar_decoder.Soutp_bias"] = (size,)
    if config["pos_encoding_dec"] == "learned":
        shapes["decoder/ar_decoder.Sseq_pos_embedding"] = (config["max_seq_len"], dec)
    for layer in range(config["num_decoder_layers"]):
        name = f"decoder/decoder/dec_layers/{layer}"
        shapes |= attention(f"{name}/self_mha", dec, config["num_heads_dec"]) | norm(f"{name}/self_ln", dec)
        shapes |= attention(f"{name}/cross_mha", dec, config["num_heads_dec"]) | norm(f"{name}/cross_ln", dec)
        shapes |= mlp(f"{name}/mlp", dec, ratio_dec)
    return shapes | norm("decoder/output_ln", dec)


def random_variables(config, seed=0) -> dict[str, np.ndarray]:
    """Return random values for all variables, none of them 0 or 1, which could hide mistakes."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in official_variables(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("moving_variance"):
            values[name] = (0.5 + np.abs(noise)).astype(np.float32)
        elif name.endswith("gamma"):
            values[name] = (1 + 0.2 * noise).astype(np.float32)
        else:
            values[name] = (0.3 if len(shape) == 1 else 0.15) * noise
    return values


def checkpoint_tensors(variables: dict[str, np.ndarray]) -> dict:
    """Return the content of a checkpoint: the variables, an optimizer slot, counters and the object graph."""
    tensors: dict = {f"model/{name}{VALUE}": value for name, value in variables.items()}
    some = next(iter(variables))
    tensors[f"model/{some}/.OPTIMIZER_SLOT/optimizer/m{VALUE}"] = np.ones_like(variables[some])
    tensors[f"optimizer/learning_rate{VALUE}"] = np.float32(0.1)
    tensors[f"save_counter{VALUE}"] = np.int64(1)
    tensors["_CHECKPOINTABLE_OBJECT_GRAPH"] = b"some bytes of a graph" * 30
    return tensors


def layer_norm(v, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * v[f"{name}/gamma"] + v[f"{name}/beta"]


def gelu(x):
    erf = np.vectorize(__import__("math").erf)
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def feed_forward(v, name, x):
    h = layer_norm(v, f"{name}/layernorms/0", x)
    h = gelu(h @ v[f"{name}/mlp_layers/0/dense1/kernel"] + v[f"{name}/mlp_layers/0/dense1/bias"])
    return x + h @ v[f"{name}/mlp_layers/0/dense2/kernel"] + v[f"{name}/mlp_layers/0/dense2/bias"]


def attend(v, name, x, context, causal):
    q, k, w = (
        np.einsum("td,dhe->the", y, v[f"{name}/_{part}_dense/kernel"]) + v[f"{name}/_{part}_dense/bias"]
        for part, y in (("query", x), ("key", context), ("value", context))
    )
    scores = np.einsum("qhe,khe->hqk", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores += np.triu(np.full(scores.shape[1:], -1e9), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = np.einsum("hqk,khe->qhe", scores, w)
    return np.einsum("qhe,hed->qd", out, v[f"{name}/_output_dense/kernel"]) + v[f"{name}/_output_dense/bias"]


def sincos(length, dim):
    position = np.arange(length) / (length - 1) * 6.2831852
    rates = 10_000.0 ** (-2 * np.arange(dim // 2) / dim)
    return np.concatenate([np.sin(position[:, None] * rates), np.cos(position[:, None] * rates)], 1)


def sincos_2d(rows, columns, dim):
    y = np.repeat(sincos(rows, dim // 2)[:, None], columns, 1)
    x = np.repeat(sincos(columns, dim // 2)[None], rows, 0)
    return np.concatenate([y, x], -1).reshape(rows * columns, dim)


def slow_vit_forward(config, v, image, tokens):
    """Return memory and logits of the official ViT model for one image (H, W, 3) and tokens (T,), in float64."""
    v = {name: value.astype(np.float64) for name, value in v.items()}
    patch = config["patch_size"]
    rows, columns = (side // patch for side in config["image_size"])
    patches = image[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
    kernel = v["encoder/stem_conv/kernel"].reshape(patch * patch * 3, -1)
    x = patches.reshape(rows * columns, -1) @ kernel + v["encoder/stem_conv/bias"]
    learned = config["pos_encoding"] == "learned"
    codes = v["encoder/vit.Svis_pos_embedding"] if learned else sincos_2d(rows, columns, config["dim_att"])
    x = layer_norm(v, "encoder/stem_ln", x) + codes
    if config["use_cls_token"]:
        x = np.concatenate([v["encoder/vit.Scls_token_embedding"], x])
    for layer in range(config["num_encoder_layers"]):
        name = f"encoder/transformer_encoder/enc_layers/{layer}"
        h = layer_norm(v, f"{name}/mha_ln", x)
        x = feed_forward(v, f"{name}/mlp", x + attend(v, f"{name}/mha", h, h, False))
    x = layer_norm(v, "encoder/output_ln", x)
    x = layer_norm(v, "proj_ln", x @ v["proj/kernel"] + v["proj/bias"])
    if config["dec_proj_mode"] != "linear":
        codes = v["proj.Svis_pos_embedding"] if learned else sincos_2d(rows, columns, config["dim_att_dec"])
        x[-rows * columns :] += codes
        if config["dec_proj_mode"] == "mlp":
            x = feed_forward(v, "proj_mlp", x)
    memory = x

    shared = config["shared_decoder_embedding"]
    embedding = v["decoder/ar_decoder.Stoken_embedding" if shared else "decoder/ar_decoder.Sinp_token_embedding"]
    output = embedding if shared else v["decoder/ar_decoder.Soutp_token_embedding"]
    if config["pos_encoding_dec"] == "learned":
        positions = v["decoder/ar_decoder.Sseq_pos_embedding"]
    else:
        positions = sincos(config["max_seq_len"], config["dim_att_dec"])
    y = embedding[tokens] + positions[: len(tokens)]
    for layer in range(config["num_decoder_layers"]):
        name = f"decoder/decoder/dec_layers/{layer}"
        h = layer_norm(v, f"{name}/self_ln", y)
        y = y + attend(v, f"{name}/self_mha", h, h, True)
        y = y + attend(v, f"{name}/cross_mha", layer_norm(v, f"{name}/cross_ln", y), memory, False)
        y = feed_forward(v, f"{name}/mlp", y)
    logits = layer_norm(v, "decoder/output_ln", y) @ output.T
    if config["decoder_output_bias"]:
        logits = logits + v["decoder/ar_decoder.Soutp_bias"]
    return memory, logits
