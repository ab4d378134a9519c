"""Batch normalisation over the batch of all ranks, also on the CPU.

PyTorch's `SyncBatchNorm` needs GPUs. Without synchronisation, the result of training would depend on how many
processes share a batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on every rank's summand, so gradients are summed too."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Tensor:
        return _all_reduce(grads[0])


def _all_reduce(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


class HostSyncBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all ranks' images (B, C, H, W); B may differ between ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        count = _all_reduce(torch.tensor(x.numel() / x.shape[1]))
        mean = _Sum.apply(x32.sum(dim=(0, 2, 3))) / count
        centred = x32 - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norms(module: nn.Module) -> None:
    """Make every `nn.BatchNorm2d` in the module use the statistics of all ranks. Names and weights stay the same."""
    if next(module.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = HostSyncBatchNorm
