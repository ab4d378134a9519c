"""Serve a model: `pix2seq serve`."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pix2seq.data.image_index import ImageIndex
from pix2seq.demo import find_model
from pix2seq.errors import InputError
from pix2seq.model.hub import local_folder
from pix2seq.model.pretrained import find_checkpoint, fingerprint
from pix2seq.predictor import Predictor

GRACE = 5  # seconds that requests get to end when the server is stopped


def serve(
    checkpoint: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    examples: Path | None = None,
    index: Path | None = None,
    limits: Mapping[str, Any] | None = None,
    device: str = "auto",
    bf16: bool = False,
) -> None:
    """Show a model on a web page, and answer over HTTP, until the process is interrupted.

    `checkpoint` is by default that of the index, or the one of the repository. `examples` is a folder of images to try,
    `index` that of a folder to search, `limits` are those of `Limits`. Raises `InputError` if there is no model, if the
    index is of another one, if the address cannot be used, or without the extra `web`.
    """
    try:
        import uvicorn

        from pix2seq.web.app import make_app
        from pix2seq.web.examples import example_images
        from pix2seq.web.limits import Limits
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}, which is not installed: pip install pix2seq[web]") from None
    searched = None if index is None else ImageIndex(index)
    if searched is not None and checkpoint is None:
        checkpoint = Path(searched.checkpoint)
    folder = find_checkpoint(local_folder(find_model(checkpoint)))
    if searched is not None:
        searched.check_model(fingerprint(folder))
    predictor = Predictor.from_pretrained(folder, device=device, bf16=bf16)
    app = make_app(
        predictor,
        limits=Limits(**(limits or {})),
        examples=example_images(predictor, examples),
        index=searched,
    )
    with _listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        print(f"Open http://{shown}:{listener.getsockname()[1]} in a browser; Ctrl-C stops the server", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `InputError` if the address is taken or not of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}:{port} ({reason}); choose another --port or --host") from None
