"""The tensors of a run that is sharded over ranks: every rank writes and reads its own part of them.

A folder of safetensors files, one a rank, by torch.distributed.checkpoint. Any number of ranks can read
them, sharded otherwise or whole.

torch.distributed.checkpoint takes seconds to import, and most runs do without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this rank's part of `tensors` into the folder; all ranks call this together.

    Raises what failed on any rank, such as an `OSError`, on every rank.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _attempt(lambda: save(dict(tensors), storage_writer=writer))


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of the tensors in a folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: stored.size for name, stored in found.items() if isinstance(stored, TensorStorageMetadata)}


def load_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `tensors`, this rank's parts where they are sharded, in place; all ranks call this together."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    _attempt(lambda: load(dict(tensors), storage_reader=reader))


def _attempt(action: Callable[[], object]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        action()
    except CheckpointException as error:
        # It is no `Exception`, and holds what was raised rank by rank.
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error
