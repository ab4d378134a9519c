"""Choice of the device to compute on."""

from __future__ import annotations

import torch

from pix2seq.errors import InputError


def pick_device(name: str) -> torch.device:
    """Return the device `name`; `auto` prefers a GPU. Raises `InputError` if the device cannot be used."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device that models run on")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); try device=cpu or device=auto") from None
    return device
