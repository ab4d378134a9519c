"""A server of a model for the time of a test, and a client that says what came back."""

import http.client
import io
import json
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from pix2seq.web.app import make_app


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def error(self, status):
        """The line of an error of this status."""
        assert self.status == status, self.body[:500]
        assert list(self.json) == ["error"]
        assert "\n" not in self.json["error"]
        return self.json["error"]


@contextmanager
def serving(predictor, **settings):
    """Serve a predictor from a thread; yield the port."""
    server = uvicorn.Server(uvicorn.Config(make_app(predictor, **settings), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def request(port, method, path, body=None, headers=None, timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def get(port, path):
    return request(port, "GET", path)


def form(image, fields):
    """A form with an image, as browsers send it: body and headers."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
    ]
    if image is not None:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="street.jpg"\r\n\r\n'
        parts += [head.encode(), image, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def predict(port, image, *, timeout=60, **fields):
    return request(port, "POST", "/predict", *form(image, fields), timeout=timeout)


def encoded(pixels, kind="PNG", **settings):
    """An image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **settings)
    return stream.getvalue()


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png_header(width, height):
    """A PNG that says its size and has no pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
