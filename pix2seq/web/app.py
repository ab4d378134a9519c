"""The web page and the HTTP endpoint, as an ASGI application.

Requests are read side by side and answered one after another in a thread, so that memory and cores are those of one
image. Every error is a JSON object with one line, `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from pix2seq.data.image import NotAnImageError, TooManyPixelsError, read_image
from pix2seq.drawing import category_color
from pix2seq.errors import InputError
from pix2seq.predictor import Predictor
from pix2seq.web.answers import drawings_to_json, sequences_to_json, without_unlikely
from pix2seq.web.examples import ExampleImage
from pix2seq.web.limits import ExtraHeaders, Gate, Limits

PAGE = Path(__file__).parent / "page"
MAX_ABOUT = 10_000  # characters
STATUS: dict[type[Exception], int] = {
    NotAnImageError: 415,
    TooManyPixelsError: 413,
}  # of errors in the input; 422 for all others
HEADERS = {
    # The page loads nothing from anywhere else, and no other page shows it as its own.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

T = TypeVar("T")


class Error(BaseModel):
    """Why there is no answer."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The form cannot be read"},
    413: {"model": Error, "description": "Too many bytes or pixels"},
    415: {"model": Error, "description": "Not an image, or of a format that is not opened"},
    422: {"model": Error, "description": "A damaged image, or a field that cannot be used"},
    503: {"model": Error, "description": "Too many requests are waiting"},
    504: {"model": Error, "description": "No answer in time"},
}
EXAMPLE = {
    "image": "street.jpg",
    "width": 640,
    "height": 480,
    "instances": [{"bbox": [40.0, 20.0, 140.0, 290.0], "category_id": 1, "category": "person", "score": 0.93}],
    "captions": [{"text": "a person crosses a street", "score": -0.41}],
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "As the content of NAME.json", "content": {"application/json": {"example": EXAMPLE}}}
}


class Asker:
    """Asks the model, one request at a time."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self._thread = ThreadPoolExecutor(1, "pix2seq-asker")

    def predict(
        self,
        image: UploadFile,
        tasks: str,
        about: str | None,
        threshold: float,
        seed: int,
        with_sequences: bool,
        with_drawings: bool,
    ) -> bytes:
        """Answer a request as JSON. Raises `InputError` if it cannot be."""
        names = [name.strip() for name in tasks.split(",") if name.strip()] or list(self.predictor.tasks)
        for name in names:
            self.predictor.require(name)
        asked = {name: self.predictor.tasks[name] for name in names}
        texts = (
            {} if not about else {name: task.parse_about(about) for name, task in asked.items() if task.about_format}
        )
        if about and not texts:
            raise InputError(f"about was given, but none of {', '.join(names)} takes it; they ask about whole images")
        encoded = self.predictor.encode(read_image(image.file.read(), max_pixels=self.limits.max_pixels))
        questions = {name: [text] for name, text in texts.items()}
        (prediction,) = self.predictor.predict_batch([encoded], names, questions, seed=seed)
        prediction = without_unlikely(prediction, threshold)
        content: dict[str, Any] = {"image": image.filename or "image"} | prediction.to_json()
        if with_sequences:
            content["sequences"] = sequences_to_json(prediction, self.predictor.tasks)
        if with_drawings:
            content["drawings"] = drawings_to_json(prediction)
        return json.dumps(content, allow_nan=False).encode()

    async def run(self, request: Request, function: Callable[..., T], *args: Any) -> T:
        """Run a function in the thread, when it is free. A request whose client has gone or gives up is dropped."""
        future = asyncio.wrap_future(self._thread.submit(function, *args))
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=0.5)
                if not future.done() and await request.is_disconnected():
                    raise HTTPException(499, "the client has gone")
            return future.result()
        finally:
            future.cancel()  # what runs already runs to its end

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """When the server stops, drop what waits and end the thread."""
        yield
        self._thread.shutdown(wait=False, cancel_futures=True)


def make_app(predictor: Predictor, *, limits: Limits | None = None, examples: Sequence[ExampleImage] = ()) -> FastAPI:
    """Return an application that shows a model on a page, and answers `POST /predict`."""
    limits = limits or Limits()
    asker = Asker(predictor, limits)
    app = FastAPI(
        title="Pix2Seq",
        summary="Ask a trained model about images",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=asker.lifespan,
        responses={500: {"model": Error, "description": "An error of the server"}},
    )
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _form_error)
    app.add_exception_handler(Exception, _internal_error)
    app.add_middleware(Gate, limits=limits)
    app.add_middleware(ExtraHeaders, headers=HEADERS)

    @app.post("/predict", responses=ANSWER | ERRORS)
    async def predict(
        request: Request,
        image: Annotated[UploadFile, File(description="an image file")],
        tasks: Annotated[str, Form(description="names, separated by commas; by default all tasks")] = "",
        about: Annotated[str | None, Form(max_length=MAX_ABOUT, description="see `about_format` of /tasks")] = None,
        threshold: Annotated[float, Form(ge=0, le=1, description="least score of objects")] = 0.0,
        seed: Annotated[int, Form(ge=0, lt=2**64, description="of sampling")] = 0,
        sequences: Annotated[bool, Form(description="whether to add the tokens")] = False,
        drawings: Annotated[bool, Form(description="whether to add drawings of what is no object or caption")] = False,
    ) -> Response:
        """Ask tasks about an image."""
        options = (tasks, about, threshold, seed, sequences, drawings)
        return Response(await asker.run(request, asker.predict, image, *options), media_type="application/json")

    @app.get("/tasks")
    async def list_tasks() -> dict[str, Any]:
        """Return what the model can be asked, its classes, and the limits of this server."""
        return describe(predictor) | {"limits": asdict(limits)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Return at once, also while images are being answered."""
        return {"status": "ok", "device": str(predictor.model.device)}

    @app.get("/examples")
    async def list_examples() -> list[dict[str, str]]:
        """Return the names and addresses of images to try."""
        return [{"name": each.name, "url": f"/examples/{i}.jpg"} for i, each in enumerate(examples)]

    @app.get("/examples/{index}.jpg", response_class=Response)
    async def example(index: int) -> Response:
        """Return an image to try."""
        if not 0 <= index < len(examples):
            raise HTTPException(404, f"there is no example {index}; there are {len(examples)}, from 0")
        return Response(examples[index].content, media_type="image/jpeg")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def describe(predictor: Predictor) -> dict[str, Any]:
    """Return the tasks of a model with what they are asked about, and its classes with their colours."""
    known = {category.id: category for task in predictor.tasks.values() for category in task.categories.values()}
    return {
        "tasks": [
            {"name": name, "needs": task.needs, "about_format": task.about_format}
            for name, task in predictor.tasks.items()
        ],
        "categories": [
            category.to_json() | {"color": "#{:02x}{:02x}{:02x}".format(*category_color(category.name))}
            for category in known.values()
        ],
        "num_bins": predictor.model.config.vocab.num_bins,
        "image_size": predictor.model.config.image_size,
    }


def _failure(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(message.split())}, status)


async def _input_error(request: Request, error: Exception) -> JSONResponse:
    return _failure(STATUS.get(type(error), 422), str(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return _failure(error.status_code, error.detail)


async def _form_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    reasons = [f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors()]
    return _failure(422, f"{'; '.join(reasons)}; see /openapi.json")


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    return _failure(500, "an error of the server; its log says more")
