"""One optimiser step.

Shapes: B images, I sequences an image, T tokens, S scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.tasks.example import Batch


def sequence_loss(model: Pix2Seq, batch: Batch) -> Tensor:
    """Sum over tokens of weight times cross entropy, a scalar in float32.

    Only scored places meet the output layer: padding, prompts and the coordinates of noise objects
    would cost a row of V logits each and count for nothing.
    """
    images = batch.images.to(model.device).float() / 255
    hidden = model.hidden(images, batch.tokens).flatten(0, 1)  # (B * I * T, D)
    weights = batch.weights.flatten()
    scored = weights.nonzero()[:, 0]
    logits = model.decoder.logits(hidden[scored]).float()  # (S, V)
    losses = F.cross_entropy(logits, batch.targets.flatten()[scored], reduction="none")
    return (losses * weights[scored]).sum()


def train_step(
    model: Pix2Seq,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    max_grad_norm: float,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Update the weights once; the loss is per scored token, however the step is split.

    Returns the loss and the gradient's norm before clipping, as scalar tensors on the model's device.
    """
    device = model.device
    batches = [batch.to(device) for batch in micro_batches]
    num_scored = torch.stack([batch.weights.sum() for batch in batches]).sum().clamp(min=1e-9)
    total = torch.zeros((), device=device)
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = sequence_loss(model, batch) / num_scored
        loss.backward()
        total += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else torch.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW. Matrices and kernels decay; norms, biases and embeddings do not.

    The official code decays every variable; pulling norm gains and rarely seen embedding rows
    towards zero helps nobody.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        is_embedding = id(parameter) in embeddings or name.endswith(("position_embedding", "pos_embed"))
        (kept if parameter.ndim < 2 or is_embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
