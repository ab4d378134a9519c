"""What a server takes on: how large and how many requests, and for how long. Others get an error of one line."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER = 10  # seconds for which the body of a refused request is read, and thrown away


@dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    max_bytes: int = 20 * 2**20  # of a request
    max_pixels: int = 2**25  # of an image, 34 megapixels; one image is decoded at a time
    max_requests: int = 16  # that are received, waiting or being answered
    timeout: float = 60.0  # seconds from the first byte of a request to its answer
    max_kept_images: int = 32  # encoded images that wait for clicks
    max_kept_bytes: int = 2**28  # of them all; the last one is kept whatever its size


class Gate:
    """Refuse requests with a body when there are too many (503), the body is too large (413) or time is up (504).

    Bodies are counted as they arrive, whatever their headers say.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            length = int(Headers(scope=scope).get("content-length", "0"))
        except ValueError:
            length = 0  # it is counted on arrival
        if length > self.limits.max_bytes:
            await self._refuse(413, self._too_large(), scope, receive, send)
        elif self.num_open >= self.limits.max_requests:
            message = f"{self.num_open} requests are waiting, the limit is {self.limits.max_requests}; try again soon"
            await self._refuse(503, message, scope, receive, send)
        else:
            self.num_open += 1
            try:
                await self._answer(scope, receive, send)
            finally:
                self.num_open -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self.limits.timeout):
                await self.app(scope, self._counting(receive), noted)
        except TimeoutError:
            if not started:
                message = f"there was no answer within {self.limits.timeout:g} s; try again later"
                await self._refuse(504, message, scope, receive, send)

    def _counting(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.limits.max_bytes:
                await _discard(receive)
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the request is larger than {self.limits.max_bytes} bytes; send a smaller image"

    async def _refuse(self, status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        if status != 504:
            await _discard(receive)
        headers = {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {})
        await JSONResponse({"error": message}, status, headers)(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, for some seconds: most clients only look at a response after they sent everything."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body", False):
                pass


class ExtraHeaders:
    """Add headers to every response."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self.app, self.headers = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)
