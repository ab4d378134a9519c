"""Fast bf16 attention for training timm models on the CPU.

On the CPU, the backward pass of PyTorch's fused attention is slower in bf16 than in float32;
`pix2seq.model.layers.attend` is not. timm has many attention classes and no option for another attention function,
but all of them call `F.scaled_dot_product_attention`. So this module replaces the class of each attention module with
a subclass that redirects this call to `attend`. Weights and their names stay the same.
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
    """Replace the class of every attention module in `net`."""
    for module in net.modules():
        if getattr(module, "fused_attn", False):
            # Classes are hashable, but mypy looks at the hash of their instances.
            module.__class__ = _with_attend(type(module))  # type: ignore[arg-type]


class _AttendMode(TorchFunctionMode):
    """Redirect calls of PyTorch's fused attention to `attend`, unless they use an option that it lacks."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
            return attend(*args)
        return func(*args, **kwargs)


class _WithAttend:
    """A mixin for timm's attention classes, all of which call PyTorch's fused attention."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        # GPU kernels are fast already, and the mode costs time for every call.
        if x.device.type != "cpu":
            return forward(x, *args, **kwargs)
        with _AttendMode():
            return forward(x, *args, **kwargs)


@cache
def _with_attend(attention: type) -> type:
    # A `forward` set on the module instead would stay bound to the original in a copy.
    return type(attention.__name__, (_WithAttend, attention), {})
