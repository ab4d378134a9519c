"""Write a trained model as ONNX graphs for `pix2seq.runtime`, which needs no PyTorch.

The folder holds config.json as in a checkpoint, with an entry `onnx`; the text tokenizer, if there is one; the graphs;
and their weights in one file, so that what prefill and step share lies there once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from pix2seq.errors import InputError
from pix2seq.files import output_folder, report_write_errors, write_atomically
from pix2seq.model.onnx_graphs import CloseupGraph, EncoderGraph, PrefillGraph, StepGraph
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import CONFIG_FILE, find_checkpoint
from pix2seq.runtime.graphs import FORMAT, WEIGHTS_FILE, graph_file

if TYPE_CHECKING:
    import onnx

DTYPES = ("float32", "int8")
# What PyTorch's exporter writes without conversion; it has every operator that the graphs need, and runtimes have read
# it since 2023.
OPSET = 18
TOLERANCE = 1e-4  # of graphs in float32 to the model itself
MIN_SHARED_BYTES = 1024  # smaller weights stay within their graph


def export_onnx(checkpoint: Path, out: Path, *, dtype: str = "float32") -> None:
    """Write the graphs of a checkpoint, or of the newest one of a run, into `out`, with what is needed to run them.

    `int8` stores the matrices of linear layers with 8 bits, a scale for each column; the rest stays float32. Graphs in
    float32 are run once and compared with the model. Raises `InputError` if there is no checkpoint.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            import_module(package)
        except ImportError:
            raise InputError(f"ONNX graphs need the package {package}; install pix2seq[onnx]") from None
    folder = find_checkpoint(checkpoint)
    if out.resolve() in (folder.resolve(), checkpoint.resolve()):
        raise InputError(f"{out} is the checkpoint itself; give another folder with --out")
    model = Pix2Seq.from_pretrained(folder)
    graphs = export_graphs(model)
    if dtype == "int8":
        graphs = {name: quantized(graph) for name, graph in graphs.items()}
    output_folder(out)
    with report_write_errors(out, "exporting a model", then="export again"):
        write_graphs(graphs, out)
        if model.text is not None:
            model.text.save(out)
        config = model.config_json() | {"onnx": {"format": FORMAT, "opset": OPSET, "dtype": dtype}}
        write_atomically(out / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def export_graphs(model: Pix2Seq) -> dict[str, onnx.ModelProto]:
    """Return a model's graphs by name. Raises `RuntimeError` if onnxruntime computes something else than the model."""
    model.eval()
    height, width = model.config.image_size
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    memory, maps = model.encode_with_maps(images)
    layers = len(model.decoder.blocks)
    images_dim, rows_dim, frames_dim = Dim("images"), Dim("rows"), Dim("frames")
    prompt_dim, cached_dim = Dim("prompt", max=model.decoder.max_seq_len), Dim("cached")
    of_tokens, of_memory = {0: images_dim, 1: rows_dim, 3: cached_dim}, {0: images_dim}
    per_layer = {"keys": of_tokens, "values": of_tokens, "memory_keys": of_memory, "memory_values": of_memory}

    graphs = {
        "encoder": _export(
            EncoderGraph(model),
            {"images": images},
            {"images": {0: images_dim}},
            ["memory", *_numbered("map", len(maps))],
        )
    }
    if maps:
        frames = torch.tensor([[0.1, 0.2, 0.6, 0.7], [-0.2, 0.5, 0.3, 1.0], [0.0, 0.0, 1.0, 1.0]])
        graphs["closeup"] = _export(
            CloseupGraph(model),
            {"frames": frames, "maps": [each[:1] for each in maps]},
            {"frames": {0: frames_dim}, "maps": [{} for _ in maps]},
            ["memory"],
        )
    tokens = torch.arange(2 * 3 * 4).view(2, 3, 4) % model.config.vocab.size
    prefill = PrefillGraph(model.decoder)
    graphs["prefill"] = _export(
        prefill,
        {"tokens": tokens, "memory": memory},
        {"tokens": {0: images_dim, 1: rows_dim, 2: prompt_dim}, "memory": {0: images_dim}},
        ["logits", *(name for part in per_layer for name in _numbered(part, layers))],
    )
    _, *cache = prefill(tokens, memory)
    graphs["step"] = _export(
        StepGraph(model.decoder),
        {"tokens": tokens[..., :1], "position": torch.tensor([4]), **dict(zip(per_layer, cache, strict=True))},
        {"tokens": {0: images_dim, 1: rows_dim}, "position": {}}
        | {part: [dims] * layers for part, dims in per_layer.items()},
        ["logits", *_numbered("longer_keys", layers), *_numbered("longer_values", layers)],
    )
    return graphs


def quantized(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with the matrices of its linear layers as 8-bit integers, which are multiplied as such."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        # It warns of graphs without this mark of its own constant folding, which PyTorch's exporter has done.
        onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})
        onnx.save(graph, whole)
        quantize_dynamic(
            whole, small, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(small)


def write_graphs(graphs: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """Write NAME.onnx for each graph, and the weights of all of them in one file, equal ones once."""
    from onnx.external_data_helper import set_external_data

    written: dict[bytes, tuple[int, int]] = {}  # offset and length of weights by their sha256
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for name, graph in graphs.items():
            for tensor in graph.graph.initializer:
                content = tensor.raw_data
                if len(content) < MIN_SHARED_BYTES:
                    continue
                key = hashlib.sha256(content).digest()
                if key not in written:
                    file.write(bytes(-file.tell() % 64))  # aligned, so that it can be mapped into memory
                    written[key] = (file.tell(), len(content))
                    file.write(content)
                offset, length = written[key]
                set_external_data(tensor, WEIGHTS_FILE, offset=offset, length=length)
                tensor.ClearField("raw_data")
            (folder / graph_file(name)).write_bytes(graph.SerializeToString())


def _export(
    module: nn.Module, inputs: Mapping[str, Any], dynamic: Mapping[str, Any], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Return the graph of a module, after comparing what both compute from `inputs`."""
    import onnxruntime

    expected = _flat(module(**inputs))  # before the export, so that fixed positions are computed as numbers
    names: list[str] = []
    for name, value in inputs.items():
        names += [name] if isinstance(value, Tensor) else _numbered(name, len(value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*axis name")  # of a size that several inputs share
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            dynamic_shapes=dict(dynamic),
            input_names=names,
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    for node in graph.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(names, _flat(tuple(inputs.values())), strict=True)}
    for name, tensor, found in zip(outputs, expected, session.run(list(outputs), feed), strict=True):
        difference = float(np.abs(tensor.numpy() - found).max())
        if not difference <= TOLERANCE:  # NaN is not
            raise RuntimeError(f"{name} of {type(module).__name__} differs by {difference} in onnxruntime")
    return graph


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" for i in range(count)]


def _flat(values: Any) -> list[Tensor]:
    """Return the tensors of nested tuples and lists in order."""
    return [values] if isinstance(values, Tensor) else [tensor for value in values for tensor in _flat(value)]
