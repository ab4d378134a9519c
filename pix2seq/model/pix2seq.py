"""The complete model: an image encoder, a projection to memory, and one decoder for every task.

Shapes: B images, H and W pixels, N memory tokens, D decoder width, I sequences per image, T tokens,
V vocabulary size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.errors import InputError, shortened
from pix2seq.files import report_write_errors
from pix2seq.model.closeups import sample_maps
from pix2seq.model.config import ModelConfig
from pix2seq.model.contrast import Contrast
from pix2seq.model.decoder import Decoder
from pix2seq.model.decoding.completion import GenerationConfig
from pix2seq.model.decoding.generate import Generated, generate, generate_mixed
from pix2seq.model.encoders.build import build_encoder
from pix2seq.model.encoders.encoder import Encoder, Maps
from pix2seq.model.hub import local_folder
from pix2seq.model.layers import NORM_EPS, DropPath, FeedForward, init_weights
from pix2seq.model.packing import Layout
from pix2seq.model.positions import GridPositions, fourier_1d, sequence_encodings
from pix2seq.model.pretrained import (
    CALIBRATION_KEY,
    CONFIG_FILE,
    FORMAT,
    WEIGHTS_FILE,
    as_stored,
    read_calibration,
    read_config,
    read_weights,
    write_checkpoint,
)
from pix2seq.tokenizers.text import TextTokenizer, has_text_tokenizer, load_text_tokenizer
from pix2seq.types import Category
from pix2seq.vocab import Vocab

ENCODING_INIT_SCALE = 0.05
REFERENCE_INIT_STD = 0.5


class MemoryProjection(nn.Module):
    """Projection from encoder features to memory, which adds their 2D positions again.

    The encoder's attention blurs the positions it was given. The decoder predicts positions, and learns far
    faster from fresh ones. Reference: `models/ar_model.py`. Its mode `linear` has neither positions nor the
    feed-forward layer, `linear_p` has positions, `mlp` has both.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        *,
        positions: GridPositions | None,
        mlp_dim: int | None,
        dropout: float,
        drop_path: float,
    ) -> None:
        """Without `positions` none are added; without `mlp_dim` there is no feed-forward layer."""
        super().__init__()
        self.linear = nn.Linear(in_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.positions = positions
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS) if mlp_dim else None
        self.mlp = FeedForward(dim, mlp_dim, dropout) if mlp_dim else None
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project features (B, N, in_dim) to memory (B, N, dim). A class token comes first, without a position."""
        x = self.norm(self.linear(features))
        if self.positions is not None:
            encodings = self.positions(*grid, x.device).to(x)
            x = x + F.pad(encodings, (0, 0, x.shape[1] - len(encodings), 0))
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return x


class Pix2Seq(nn.Module):
    """A model from images and token ids to logits. It knows ids and features, but no tasks.

    `categories`, `text` and `task_settings` are saved with the weights, so that a checkpoint says what its ids
    mean and how to prompt it. The model does not read them.
    """

    def __init__(
        self,
        encoder: Encoder,
        projection: MemoryProjection,
        decoder: Decoder,
        config: ModelConfig,
        categories: Sequence[Category] = (),
        text: TextTokenizer | None = None,
        contrast: Contrast | None = None,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder
        self.projection = projection
        self.decoder = decoder
        self.contrast = contrast
        self.config = config
        self.reference_embedding: nn.Parameter | None = None
        if config.memory.references:
            self.reference_embedding = nn.Parameter(torch.empty(config.memory.references, config.decoder.dim))
            nn.init.trunc_normal_(self.reference_embedding, std=REFERENCE_INIT_STD)
        self.categories = tuple(categories)
        self.text = text
        self.task_settings: dict[str, dict[str, Any]] = {}
        self.calibration: dict[str, dict[str, Any]] = {}  # by task, as `TaskCalibration.to_json` gives it
        self.encoder_is_frozen = False

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.token_embedding.weight.device

    def block_list(self) -> list[nn.Module]:
        """Return the blocks of encoder and decoder, which are compiled and sharded one by one."""
        return [*self.encoder.block_list(), *self.decoder.blocks]

    def freeze_encoder(self) -> None:
        """Keep the encoder as it is: it gets no gradients, and stays in evaluation mode while the rest trains."""
        self.encoder_is_frozen = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for a frozen encoder."""
        super().train(mode)
        if self.encoder_is_frozen:
            self.encoder.eval()
        return self

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Set whether Transformer blocks recompute their activations in the backward pass.

        This takes a fraction of the memory for about a third more arithmetic. Gradients, and dropout, stay the same.
        """
        self.encoder.set_activation_checkpointing(enabled and not self.encoder_is_frozen)
        self.decoder.blocks.checkpointing = enabled

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W), floats in [0, 1], as memory (B, N, D).

        H and W must be those of `config.image_size` or divisible by the encoder's stride. Raises `ValueError` for
        tensors of other shapes or types; the range of the values is not checked.
        """
        return self.encode_with_maps(images)[0]

    def encode_with_maps(self, images: Tensor) -> tuple[Tensor, Maps]:
        """Return what `encode` does, and the maps for `look_closer`; none if the encoder makes no closeups."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floats (B, 3, H, W) in [0, 1], got {images.dtype} of shape {tuple(images.shape)}"
            )
        stride = self.encoder.stride
        height, width = images.shape[-2:]
        if (height % stride or width % stride) and (height, width) != tuple(self.config.image_size):
            raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {stride}")
        with self._encoder_grad():
            features, grid, maps = self.encoder.with_maps(images)
        return self.projection(features, grid), maps

    def look_closer(self, maps: Maps, frames: Tensor, image_index: Sequence[int]) -> Tensor:
        """Return memories (R, N, D) of frames (R, 4) within images, each as if its part were an image of its own.

        They are made from the finer `maps` of the images, without encoding anything again. A frame is `yxyx` in [0, 1]
        of its image, `image_index[i]`. It should have the aspect ratio of `config.image_size`, and may reach
        beyond the image, where there is nothing. Needs `encoder.closeups`.
        """
        grid = self.encoder.grid(*self.config.image_size)
        with self._encoder_grad():
            features = self.encoder.look_closer(sample_maps(maps, frames, image_index, grid))
        return self.projection(features, grid)

    def at_places(self, memories: Tensor, places: Tensor) -> Tensor:
        """Mark memories (Q, N, D) by the places (Q,) at which a sequence reads them, before they are joined.

        Place 0 is what the sequence is about and is not marked; 1 to `config.memory.references` are references. A
        sequence then reads the tokens of its parts end to end, (B, K * N, D).
        """
        assert self.reference_embedding is not None
        marks = F.pad(self.reference_embedding, (0, 0, 1, 0))
        return memories + marks.to(memories.dtype).index_select(0, places)[:, None]

    def _encoder_grad(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen)

    def project(self, features: Tensor) -> Tensor:
        """Project encoder features (B, N, encoder.dim) of images of `config.image_size` to memory (B, N, D)."""
        return self.projection(features, self.encoder.grid(*self.config.image_size))

    def embed_images(self, memory: Tensor) -> Tensor:
        """Return unit vectors (B, E) of images with memory (B, N, D). Raises `ValueError` without `model.contrast`."""
        return self._contrast().embed_images(memory)

    def embed_sentences(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return unit vectors (S, E) of sentences, whose tokens (L,) lie end to end; `lengths` (S,) in host memory.

        A sentence ends with its end token. Raises `ValueError` without `model.contrast`.
        """
        contrast, numbers = self._contrast(), lengths.numpy()
        layout = Layout(lengths, torch.arange(len(lengths)), len(lengths), tokens.device)
        starts = np.cumsum(numbers) - numbers
        positions = np.arange(len(tokens)) - np.repeat(starts, numbers)
        at = torch.from_numpy(np.concatenate([positions, starts + numbers - 1])).to(tokens.device, non_blocking=True)
        hidden = self.decoder.forward_packed(tokens, at[: len(tokens)], layout, None)
        return contrast.embed_states(hidden.index_select(0, at[len(tokens) :]))

    def contrast_scale(self) -> Tensor:
        """Return what the loss multiplies similarities by, (1,). Raises `ValueError` without `model.contrast`."""
        return self._contrast().scale

    def _contrast(self) -> Contrast:
        if self.contrast is None:
            raise ValueError("the model makes no embeddings; train one with model.contrast.dim=128")
        return self.contrast

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T), or (B * I, T, V) for tokens (B, I, T), with teacher forcing."""
        return self.decoder.logits(self.hidden(images, tokens))

    def hidden(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return hidden states (B * I, T, D) before the output layer, for losses that need few logits."""
        if tokens.ndim not in (2, 3) or len(tokens) != len(images):
            raise ValueError(f"tokens must be (B, T) or (B, I, T) of {len(images)} images, got {tuple(tokens.shape)}")
        self._check_ids(tokens)
        return self.decoder(tokens.reshape(-1, tokens.shape[-1]), self.encode(images))

    def generate(
        self,
        images_or_memory: Tensor,
        prompt: Tensor,
        *,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **settings: Any,
    ) -> Generated:
        """Continue prompts (B, P) or (B, I, P) on images (B, 3, H, W) or memory (B, N, D), all in the same way.

        `settings` are the fields of `GenerationConfig`: `max_new_tokens`, `temperature`, `top_p`, `grammar` and others.
        See `pix2seq.model.decoding.generate.generate`. Raises `ValueError` for tensors of other shapes or types, and
        for settings that are out of range or need longer sequences than the model has.
        """
        if prompt.ndim not in (2, 3):
            raise ValueError(f"prompts must be (B, P) or (B, I, P), got {tuple(prompt.shape)}")
        self._check_generation([prompt.flatten()], [GenerationConfig(**settings)], prompt.shape[-1])
        memory = self._memory(images_or_memory)
        prompt = prompt.to(memory.device)
        return generate(self.decoder, memory, prompt, num_samples=num_samples, generator=generator, **settings)

    def generate_mixed(
        self,
        images_or_memory: Tensor,
        prompts: Sequence[Tensor],
        configs: Sequence[GenerationConfig],
        *,
        memory_index: Sequence[int] | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Generated:
        """Continue prompts (P,) of any lengths and tasks side by side, each by its own config.

        Prompt i reads image or memory `memory_index[i]`; by default, all images have the same number of prompts, in
        the order of images. See `pix2seq.model.decoding.generate.generate_mixed`. Raises `ValueError` as `generate`.
        """
        self._check_generation(prompts, configs)
        memory = self._memory(images_or_memory)
        return generate_mixed(
            self.decoder,
            memory,
            prompts,
            configs,
            memory_index=memory_index,
            num_samples=num_samples,
            generator=generator,
        )

    def _memory(self, images_or_memory: Tensor) -> Tensor:
        """Return memory (B, N, D) as it is, or that of images (B, 3, H, W)."""
        width = self.decoder.token_embedding.weight.shape[1]
        if images_or_memory.ndim == 3 and images_or_memory.shape[-1] != width:
            raise ValueError(f"memory must be (B, N, {width}), got shape {tuple(images_or_memory.shape)}")
        with torch.inference_mode():
            return images_or_memory if images_or_memory.ndim == 3 else self.encode(images_or_memory)

    def _check_generation(
        self, prompts: Sequence[Tensor], configs: Sequence[GenerationConfig], length: int | None = None
    ) -> None:
        """Raise `ValueError` if prompts, of `length` tokens if given, or their continuations do not fit the model."""
        for prompt in prompts:
            if prompt.ndim != 1 or not len(prompt):
                raise ValueError(f"a prompt needs at least one token, got shape {tuple(prompt.shape)}")
        if prompts:
            self._check_ids(torch.cat(list(prompts)))
        for prompt, config in zip(prompts, configs, strict=False):  # their number is checked later
            # The last token is not read.
            self.decoder.check_length((len(prompt) if length is None else length) + config.max_new_tokens - 1)

    def _check_ids(self, tokens: Tensor) -> None:
        size = self.config.vocab.size
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be ids, got {tokens.dtype}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(f"ids must lie in 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}")

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors and the text tokenizer, if any; create the folder if needed.

        Floating-point weights are stored as `dtype`; a model that is loaded has float32 again. Raises `InputError` if
        one is too large for it, the disk is full or the folder cannot be written to.
        """
        weights = {name: as_stored(name, tensor, dtype) for name, tensor in self.state_dict().items()}
        with report_write_errors(Path(folder), "saving a model", then="save it again"):
            write_checkpoint(Path(folder), self.config_json(), weights)
            if self.text is not None:
                self.text.save(Path(folder))

    def config_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "format": FORMAT,
            "model": dataclasses.asdict(self.config),
            "categories": [category.to_json() for category in self.categories],
            "tasks": self.task_settings,
            **({CALIBRATION_KEY: self.calibration} if self.calibration else {}),
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Pix2Seq:
        """Load a model from a folder with config.json and model.safetensors, in evaluation mode on the CPU.

        USER/NAME is downloaded from the Hugging Face Hub if there is no such folder; see `pix2seq.model.hub`.
        Raises `InputError` if a file is missing or damaged, if a value is out of range, or if the weights do not fit
        the config or are not finite. Nothing of the folder is executed.
        """
        folder = local_folder(folder, revision=revision, token=token)
        config, categories, task_settings = read_config(folder)
        text = load_text_tokenizer(folder) if has_text_tokenizer(folder) else None
        if text is not None and text.size > config.vocab.num_text:
            raise InputError(
                f"the text tokenizer in {folder} has {text.size} ids, but the vocabulary in {CONFIG_FILE} holds "
                f"{config.vocab.num_text}; use the files of one checkpoint"
            )
        weights = read_weights(folder / WEIGHTS_FILE)
        _check_fit(config, weights, folder)
        model = build_model(config, categories, text, load_pretrained=False)
        model.task_settings, model.calibration = task_settings, read_calibration(folder)
        model.load_state_dict(weights)
        broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise InputError(
                f"{folder / WEIGHTS_FILE} holds numbers that are not finite in {broken[0]} and {len(broken) - 1} other "
                "tensors; use an earlier checkpoint"
            )
        return model.eval()


def _check_fit(config: ModelConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise `InputError` unless the weights are those of the model that the config describes.

    The model is built without data, so that no number in the config decides about memory before it fits the weights.
    """
    encoder = config.encoder
    own_layers = encoder.num_layers + encoder.stem_blocks if encoder.name in ("vit", "resnet") else 0
    try:
        if config.decoder.num_layers + own_layers > len(weights):  # building as many would take minutes
            raise ValueError(f"{config.decoder.num_layers} + {own_layers} layers for {len(weights)} tensors")
        with torch.device("meta"):
            expected = build_model(config, load_pretrained=False).state_dict()
    except Exception as error:  # timm's hundreds of models, and torch, refuse bad sizes each in their own way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{folder / CONFIG_FILE} describes no model that can be built: {reason}; use a folder that training wrote"
        ) from error
    problems = [f"{name} missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} unknown" for name in sorted(weights.keys() - expected.keys())]
    for name in sorted(expected.keys() & weights.keys()):
        found, wanted = weights[name], expected[name]
        if found.shape != wanted.shape:
            problems.append(f"{name} is {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        elif found.dtype != wanted.dtype and not (found.is_floating_point() and wanted.is_floating_point()):
            problems.append(f"{name} is {found.dtype}, expected {wanted.dtype}")
    if problems:
        raise InputError(
            f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {'; '.join(shortened(problems, 3))}; "
            "use the two files of one checkpoint"
        )


def build_model(
    config: ModelConfig,
    categories: Sequence[Category] = (),
    text: TextTokenizer | None = None,
    *,
    load_pretrained: bool = True,
) -> Pix2Seq:
    """Build a model with fresh weights. The encoder gets timm's if its config asks for them and `load_pretrained`."""
    positions = config.positions
    encoder = build_encoder(config.encoder, config.image_size, positions, load_pretrained=load_pretrained)
    dec, mem = config.decoder, config.memory
    projection = MemoryProjection(
        encoder.dim,
        dec.dim,
        positions=GridPositions(positions, dec.dim, encoder.grid(*config.image_size)) if mem.positions else None,
        mlp_dim=(mem.mlp_dim or dec.mlp_dim) if mem.mlp else None,
        dropout=dec.dropout,
        drop_path=dec.drop_path,
    )
    decoder = Decoder(
        vocab_size=config.vocab.size,
        dim=dec.dim,
        num_layers=dec.num_layers,
        num_heads=dec.num_heads,
        mlp_dim=dec.mlp_dim,
        max_seq_len=dec.max_seq_len,
        learned_positions=dec.positions == "learned",
        tied_embedding=dec.tied_embedding,
        output_bias=dec.output_bias,
        dropout=dec.dropout,
        drop_path=dec.drop_path,
    )
    if positions == "fourier":
        _init_coordinates(decoder, config.vocab)
    contrast = None
    if config.contrast is not None:  # last, so that the others draw the same weights with it and without
        contrast = Contrast(dec.dim, dec.num_heads, dec.mlp_dim, config.contrast.dim)
    return Pix2Seq(encoder, projection, decoder, config, categories, text, contrast)


@torch.no_grad()
def _init_coordinates(decoder: Decoder, vocab: Vocab) -> None:
    """Initialise the decoder to attend where a coordinate points and to predict the position it attends to.

    Coordinate embeddings start as the encodings of their bin on both axes, so that neighbouring bins are similar,
    and similar to memory's encodings at that position. Queries and keys of cross-attention start equal, so that a
    coordinate attends to its position. Values pass through unchanged, so that the output is the encoding of the
    position attended to. Sequence positions start as sinusoids, in which "the previous token" is the same rotation
    everywhere. From random weights, the model has to find all of this before it learns anything else.
    """
    dim = decoder.token_embedding.weight.shape[1]
    encodings = fourier_1d(torch.arange(vocab.num_bins) / (vocab.num_bins - 1), dim // 2)
    bins = decoder.token_embedding.weight[vocab.coord_base : vocab.coord_end]
    bins.copy_(ENCODING_INIT_SCALE * torch.cat([encodings, encodings], dim=1))
    if isinstance(decoder.position_embedding, nn.Parameter):
        decoder.position_embedding.copy_(ENCODING_INIT_SCALE * sequence_encodings(decoder.max_seq_len, dim))
    for block in decoder.blocks:
        block.cross_attention.init_as_lookup()
