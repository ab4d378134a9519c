"""Fast bf16 attention for timm's models in training on the CPU.

PyTorch's fused attention computes its gradient in bf16 on the CPU slower than in float32; `pix2seq.model.layers.attend`
does not. timm offers no way to pass another attention function, and has many attention classes, all of which call
`F.scaled_dot_product_attention`. So the class of each attention module is replaced by a subclass whose `forward` sends
that call to `attend`. Weights and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pix2seq.model.layers import attend


def use_fast_attention(net: nn.Module) -> None:
    """Replace the class of every attention module inside `net`."""
    for module in net.modules():
        if getattr(module, "fused_attn", False):
            # Classes are hashable; mypy looks at the hash of their instances.
            module.__class__ = _with_attend(type(module))  # type: ignore[arg-type]


class _AttendMode(TorchFunctionMode):
    """Attention asked of PyTorch goes to `attend`, where it can."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
            return attend(*args)
        return func(*args, **kwargs)


class _WithAttend:
    """Mixed into timm's attention classes, all of which call PyTorch's fused attention."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        # A GPU's kernels need no help, and looking at every call costs time.
        if x.device.type != "cpu":
            return forward(x, *args, **kwargs)
        with _AttendMode():
            return forward(x, *args, **kwargs)


@cache
def _with_attend(attention: type) -> type:
    # A class, not a `forward` set on the module: that would stay bound to the original in a copy.
    return type(attention.__name__, (_WithAttend, attention), {})
