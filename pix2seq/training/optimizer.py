"""AdamW, or Muon with AdamW, and the learning rate as a function of the step.

References: google-research/pix2seq, `WarmUpAndDecay`; Muon: https://kellerjordan.github.io/posts/muon/ and
arXiv 2502.16982.

No step waits for the device. To capture one in a CUDA graph, set `capturable` to True and `lr` to a 0-dim tensor on
the device in every parameter group, and fill that tensor in place before each replay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from pix2seq.settings import NonNegativeInt, Settings, Share, ShareBelowOne
from pix2seq.training.distributed import local_tensor

OptimizerName = Literal["adamw", "muon"]
NOT_DECAYED = (  # embeddings by name
    "position_embedding", "reference_embedding", "pos_embed", "positions.table", "class_token", "cls_token",
)  # fmt: skip
STACK_NUMBERS = 2**24  # in one stack of matrices, 64 MiB in float32; larger matrices keep a GPU busy one by one


def build_optimizer(
    model: nn.Module, *, name: OptimizerName = "adamw", lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Build the optimiser `name` with weight decay on matrices and kernels, but not on norms, biases and embeddings.

    `muon` updates the weights of linear layers by Muon and all others by AdamW with `betas`, at the same learning rate.
    Parameters without a gradient, which are frozen, are left out.
    The official code decays every variable. That also pulls norm gains and rarely seen embedding rows
    towards zero, which brings no benefit.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for key, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        if parameter.ndim < 2 or id(parameter) in embeddings or key.endswith(NOT_DECAYED):
            not_decayed.append(parameter)
        else:
            (matrices if name == "muon" and id(parameter) in linear else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if name == "adamw":
        return adamw
    return MuonAdamW(Muon(matrices, lr=lr, weight_decay=weight_decay), adamw)


def optimizer_step(optimizer: torch.optim.Optimizer, found_inf: Tensor | None = None) -> None:
    """Update the weights once, unless `found_inf` is 1; then neither weights nor state change.

    `found_inf` is one float32 number on the device of the weights: 1.0 where the loss or a gradient is not finite,
    else 0.0. The host does not read it. Both optimisers of `build_optimizer` support it, and torch's fused ones.
    """
    assert found_inf is None or getattr(optimizer, "_step_supports_amp_scaling", False), "would ignore found_inf"
    optimizer.found_inf = None if found_inf is None else found_inf.reshape(())  # type: ignore[attr-defined]
    optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor on a device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class MuonAdamW(torch.optim.Optimizer):
    """Muon for its matrices and AdamW for the other parameters, with the groups and the state of one optimiser."""

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # torch's mark of an optimiser that takes `found_inf`

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self._optimizers: list[Any] = [muon, adamw]
        self._num_muon_groups = len(muon.param_groups)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters; see `optimizer_step`."""
        count = self._num_muon_groups
        for optimizer, groups in zip(
            self._optimizers, (self.param_groups[:count], self.param_groups[count:]), strict=True
        ):
            # Shared anew at every step, because `load_state_dict` replaces both.
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer_step(optimizer, self.found_inf)


class Muon(torch.optim.Muon):
    """torch's Muon with a step for GPUs and FSDP. Updates are as large as AdamW's, so both can share `lr`.

    torch's own step launches about 23 kernels per matrix, reads a learning rate on the device and has no `found_inf`.
    On sharded matrices it needs 11 to 16 exchanges between ranks for each, and fails for some shapes. This step
    handles all matrices of one shape at once, with one exchange.

    Shapes: K matrices of M rows, of which this rank holds m, and N columns.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, nesterov=True, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices; see `optimizer_step`."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                size = max(STACK_NUMBERS // shape.numel(), 1)
                for start in range(0, len(matrices), size):
                    self._update(matrices[start : start + size], group)

    def _update(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        weights = [local_tensor(matrix) for matrix in matrices]
        averages = [local_tensor(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        gradient = torch.stack([local_tensor(matrix.grad) for matrix in matrices if matrix.grad is not None])
        weight, average = torch.stack(weights), torch.stack(averages)  # (K, m, N)

        new_average = average.lerp(gradient, 1 - momentum)
        update = gradient.lerp(new_average, momentum).bfloat16()
        update = _gather(update, matrices[0])  # (K, M, N)
        update = orthogonalize(update, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"])
        update = _shard(update, matrices[0]).float()
        scale = 0.2 * math.sqrt(max(matrices[0].shape))  # match_rms_adamw, from arXiv 2502.16982
        new_weight = weight * (1 - lr * group["weight_decay"]) - update * (lr * scale)
        if self.found_inf is not None:  # selected, not multiplied, because 0 * NaN is NaN
            skip = self.found_inf.bool()
            new_average = torch.where(skip, average, new_average)
            new_weight = torch.where(skip, weight, new_weight)
        torch._foreach_copy_(averages, list(new_average))
        torch._foreach_copy_(weights, list(new_weight))


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float) -> Tensor:
    """Move the singular values of matrices (K, M, N) towards 1 by Newton-Schulz steps, in the dtype of `matrices`."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # so that x @ x.mT is the smaller product
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _gather(shards: Tensor, like: Tensor) -> Tensor:
    """Return full matrices (K, M, N) from this rank's shards (K, m, N) of matrices sharded as `like` is."""
    if not isinstance(like, DTensor):
        return shards
    shape = torch.Size((len(shards), *like.shape))
    stride = (like.shape.numel(), like.shape[1], 1)
    stack = DTensor.from_local(shards, like.device_mesh, _stacked(like), run_check=False, shape=shape, stride=stride)
    return stack.full_tensor()


def _shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shards (K, m, N) of full matrices (K, M, N), the inverse of `_gather`."""
    if not isinstance(like, DTensor):
        return full
    stack = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return stack.redistribute(placements=_stacked(like)).to_local()


def _stacked(like: DTensor) -> list[Any]:
    """Return the placements of a stack of matrices sharded as `like` is."""
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Linear warm-up to the peak, then an optional hold at the peak, then decay."""

    section = "schedule"

    name: Literal["linear", "cosine", "none"] = "linear"
    warmup_steps: NonNegativeInt = 500
    hold: ShareBelowOne = 0.0  # share of the steps after warm-up that stay at the peak; 0 as published
    end_factor: Share = 0.01  # learning rate at the last step, as a share of the peak


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the update after `step` finished ones; with warm-up it is 0 at step 0."""
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "none":
        return peak
    share = min((step - schedule.warmup_steps) / max(total_steps - schedule.warmup_steps, 1), 1.0)
    progress = max(share - schedule.hold, 0.0) / (1 - schedule.hold)
    remaining = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.end_factor + (1 - schedule.end_factor) * remaining)
