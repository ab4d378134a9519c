"""The joined model: an image encoder, a projection to memory, and one decoder for every task.

Shapes: B images, H and W pixels, N memory tokens, D decoder width, I sequences an image, T tokens,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pix2seq.data.target import Category
from pix2seq.errors import InputError
from pix2seq.model.config import EncoderConfig, ModelConfig
from pix2seq.model.decoder import Decoder
from pix2seq.model.encoder import Encoder, TimmEncoder, VisionTransformer
from pix2seq.model.generate import Generated, generate
from pix2seq.model.grammar import Grammar
from pix2seq.model.layers import NORM_EPS, DropPath, FeedForward, init_weights
from pix2seq.model.positions import PositionKind, fourier_1d, grid_codes, sequence_codes
from pix2seq.vocab import Vocab

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CODE_INIT_SCALE = 0.05


class MemoryProjection(nn.Module):
    """Encoder features to what the decoder attends to, with their 2D positions added again.

    Positions that passed through the encoder are blurred by its attention; the decoder, whose every
    answer is a place, learns far faster from fresh ones. Reference: `models/ar_model.py`, mode `mlp`.
    """

    def __init__(
        self, in_dim: int, dim: int, mlp_dim: int, dropout: float, drop_path: float, positions: PositionKind
    ) -> None:
        super().__init__()
        self.positions = positions
        self.linear = nn.Linear(in_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, N, in_dim) on a grid of N places to memory (B, N, dim)."""
        x = self.norm(self.linear(features))
        x = x + grid_codes(self.positions, *grid, x.shape[-1]).to(x)
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class Pix2Seq(nn.Module):
    """Images and token ids to logits. Knows ids and features, and no task.

    `categories` and `task_settings` travel with the weights, so that whoever opens a checkpoint can
    name what its class ids mean and ask as it was trained; the model itself does not read them.
    """

    def __init__(
        self,
        encoder: Encoder,
        projection: MemoryProjection,
        decoder: Decoder,
        config: ModelConfig,
        categories: Sequence[Category] = (),
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder
        self.projection = projection
        self.decoder = decoder
        self.config = config
        self.categories = tuple(categories)
        self.task_settings: dict[str, dict[str, Any]] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.output_bias.device

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), floats in [0, 1] with sides divisible by the stride, to memory (B, N, D)."""
        stride = self.encoder.stride
        height, width = images.shape[-2:]
        if height % stride or width % stride:
            raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {stride}")
        features, grid = self.encoder(images)
        return self.projection(features, grid)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: logits (B, T, V) for tokens (B, T), or (B * I, T, V) for tokens (B, I, T)."""
        return self.decoder.logits(self.hidden(images, tokens))

    def hidden(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states (B * I, T, D) in front of the output layer, for losses that need few logits."""
        return self.decoder(tokens.reshape(-1, tokens.shape[-1]), self.encode(images))

    def generate(
        self,
        images_or_memory: Tensor,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        grammar: Grammar | None = None,
        num_samples: int = 1,
        score_range: tuple[int, int] | None = None,
        eos_id: int | None = 0,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Continue prompts (B, P) or (B, I, P) on images (B, 3, H, W) or memory (B, N, D).

        See `pix2seq.model.generate.generate`.
        """
        with torch.inference_mode():
            memory = self.encode(images_or_memory) if images_or_memory.ndim == 4 else images_or_memory
        return generate(
            self.decoder,
            memory,
            prompt.to(memory.device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            grammar=grammar,
            num_samples=num_samples,
            score_range=score_range,
            eos_id=eos_id,
            generator=generator,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, making the folder where needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config_json(), indent=2) + "\n", encoding="utf-8")

    def config_json(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "format": 1,
            "model": dataclasses.asdict(self.config),
            "categories": [category.to_json() for category in self.categories],
            "tasks": self.task_settings,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Pix2Seq:
        """Open a folder with config.json and model.safetensors, in evaluation mode on the CPU.

        Raises `InputError` where a file is missing or damaged, and where the two do not fit.
        """
        folder = Path(folder)
        config, categories, task_settings = read_config(folder)
        model = build_model(config, categories, load_pretrained=False)
        model.task_settings = task_settings
        weights = _read_weights(folder / WEIGHTS_FILE)
        expected = model.state_dict()
        problems = [f"{name} missing" for name in sorted(expected.keys() - weights.keys())]
        problems += [f"{name} unknown" for name in sorted(weights.keys() - expected.keys())]
        problems += [
            f"{name} is {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & weights.keys())
            if weights[name].shape != expected[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {'; '.join(problems[:3])}{more}; "
                "use the two files of one checkpoint"
            )
        model.load_state_dict(weights)
        return model.eval()


def build_model(config: ModelConfig, categories: Sequence[Category] = (), *, load_pretrained: bool = True) -> Pix2Seq:
    """A model with fresh weights, or timm's for the encoder where its config asks and `load_pretrained`."""
    if config.positions not in ("sincos", "fourier"):
        raise InputError(f"model.positions is {config.positions!r}; expected sincos or fourier")
    positions: PositionKind = config.positions  # type: ignore[assignment]
    encoder = build_encoder(config.encoder, config.image_size, positions, load_pretrained=load_pretrained)
    dec = config.decoder
    projection = MemoryProjection(encoder.dim, dec.dim, dec.mlp_dim, dec.dropout, dec.drop_path, positions)
    decoder = Decoder(
        vocab_size=config.vocab.size,
        dim=dec.dim,
        num_layers=dec.num_layers,
        num_heads=dec.num_heads,
        mlp_dim=dec.mlp_dim,
        max_seq_len=dec.max_seq_len,
        dropout=dec.dropout,
        drop_path=dec.drop_path,
    )
    if positions == "fourier":
        _start_from_codes(decoder, config.vocab)
    return Pix2Seq(encoder, projection, decoder, config, categories)


@torch.no_grad()
def _start_from_codes(decoder: Decoder, vocab: Vocab) -> None:
    """Let the decoder start as something that looks where it points and says where it looks.

    Coordinate embeddings begin as the codes of their places on both axes, so that neighbouring bins
    are neighbours and speak the language of memory's places. Queries and keys of cross-attention
    begin equal, so that a coordinate attends to its place, and values pass through unchanged, so that
    the place attended to comes out as a coordinate. Sequence positions begin as sinusoids, in which
    "the token before" is the same turn everywhere. From random weights all of this has to be found
    first, and until then nothing else is learned.
    """
    dim = decoder.token_embedding.weight.shape[1]
    place = fourier_1d(torch.arange(vocab.num_bins) / (vocab.num_bins - 1), dim // 2)
    bins = decoder.token_embedding.weight[vocab.coord_base : vocab.coord_end]
    bins.copy_(CODE_INIT_SCALE * torch.cat([place, place], dim=1))
    decoder.position_embedding.copy_(CODE_INIT_SCALE * sequence_codes(decoder.max_seq_len, dim))
    for block in decoder.blocks:
        block.cross_attention.start_as_lookup()


def build_encoder(
    config: EncoderConfig, image_size: tuple[int, int], positions: PositionKind, *, load_pretrained: bool
) -> Encoder:
    """The encoder that a config names."""
    if config.name != "vit":
        return TimmEncoder(
            config.name,
            image_size=image_size,
            pretrained=config.pretrained and load_pretrained,
            drop_path=config.drop_path,
        )
    if config.stem not in ("patch", "conv"):
        raise InputError(f"model.encoder.stem is {config.stem!r}; expected patch or conv")
    return VisionTransformer(
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        mlp_dim=config.mlp_dim,
        patch_size=config.patch_size,
        stem=config.stem,  # type: ignore[arg-type]
        stem_blocks=config.stem_blocks,
        positions=positions,
        dropout=config.dropout,
        drop_path=config.drop_path,
    )


def read_config(folder: Path) -> tuple[ModelConfig, tuple[Category, ...], dict[str, dict[str, Any]]]:
    """Model settings, categories and task settings in a checkpoint's config.json. Raises `InputError` if unreadable."""
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), content["model"]))
        categories = tuple(Category.from_json(entry) for entry in content["categories"])
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no checkpoint: it has no {CONFIG_FILE}; give a folder that training or convert wrote"
        ) from None
    except (ValueError, KeyError, TypeError, OSError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is no config of this project: {reason}; use a folder that training wrote") from error
    assert isinstance(config, ModelConfig)
    return config, categories, content.get("tasks", {})


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a folder that training or convert wrote") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); the file is damaged: copy or train it again") from error
