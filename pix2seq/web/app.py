"""The web page and the HTTP endpoint, as an ASGI application.

Requests are read side by side and answered one after another in a thread, so that memory and cores are those of one
image. Every error is a JSON object with one line, `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.exceptions import HTTPException as StarletteHTTPException

from pix2seq.data.image import NotAnImageError, TooManyPixelsError, read_image
from pix2seq.data.image_index import ImageIndex
from pix2seq.drawing import category_color
from pix2seq.errors import InputError
from pix2seq.predictor import Predictor
from pix2seq.search import search
from pix2seq.types import Clicks, ObjectMask
from pix2seq.web.answers import drawings_to_json, sequences_to_json, without_unlikely
from pix2seq.web.examples import ExampleImage
from pix2seq.web.folder import ImageFolder, NoSuchImageError, media_type
from pix2seq.web.images import KeptImages, NotKeptError
from pix2seq.web.limits import ExtraHeaders, Gate, Limits

PAGE = Path(__file__).parent / "page"
MAX_ABOUT = 10_000  # characters
MAX_POINTS = 10_000  # clicks, or points of a polygon
MAX_EXAMPLES = 64  # boxes to find the like of; models read fewer
MAX_WORDS = 1000  # characters
MAX_RESULTS = 100
FAR = (-1e6, 1e6)  # pixels, beyond any image
STATUS: dict[type[Exception], int] = {
    NotAnImageError: 415,
    TooManyPixelsError: 413,
    NotKeptError: 410,
    NoSuchImageError: 404,
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


class KeptImage(BaseModel):
    """An image that is kept for clicks, until others need its place."""

    id: str
    width: int
    height: int


class Question(BaseModel):
    """Clicks on a kept image. They and the previous answer are all that the answer depends on."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(max_length=64, description="its id, from /images")
    task: str = Field(max_length=100, description="one with `takes_clicks`, see /tasks")
    points: list[tuple[FiniteFloat, FiniteFloat]] | None = Field(
        None, max_length=MAX_POINTS, description="x, y in pixels; without points and box, all objects are asked for"
    )
    labels: list[bool] | None = Field(None, description="whether each point lies on the object; by default all do")
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = Field(None, description="x0, y0, x1, y1")
    previous: list[list[FiniteFloat]] = Field(
        [], max_length=MAX_POINTS, description="polygons x, y, x, y, ... of the answer to all clicks but the last"
    )
    num_candidates: int | None = Field(None, ge=1, description="masks to return at most; by default as trained")
    seed: int = Field(0, ge=0, lt=2**64, description="of sampling")

    def clicks(self) -> Clicks | None:
        """Return the clicks, None for all objects. Raises `InputError` for what is no polygon."""
        if self.points is None and self.box is None:
            return None
        points = tuple(self.points or ())
        labels = (True,) * len(points) if self.labels is None else tuple(self.labels)
        if sum(map(len, self.previous)) > 2 * MAX_POINTS or any(len(ring) % 2 for ring in self.previous):
            raise InputError(f"a polygon is x, y, x, y, ..., and all have at most {MAX_POINTS} points together")
        rings = tuple(np.array(ring, np.float64).reshape(-1, 2).clip(*FAR).astype(np.float32) for ring in self.previous)
        return Clicks(points, labels, self.box, rings, self.num_candidates)


class Example(BaseModel):
    """An object of a kept image."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(max_length=64, description="its id, from /images")
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] = Field(description="x0, y0, x1, y1 in pixels")


class Wanted(BaseModel):
    """What to find in a kept image: objects like those of examples, or what words name."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(max_length=64, description="its id, from /images")
    like: list[Example] = Field([], max_length=MAX_EXAMPLES)
    words: str = Field("", max_length=MAX_WORDS, description="such as: striped star")


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The form cannot be read"},
    413: {"model": Error, "description": "Too many bytes or pixels"},
    415: {"model": Error, "description": "Not an image, or of a format that is not opened"},
    422: {"model": Error, "description": "A damaged image, or a field that cannot be used"},
    503: {"model": Error, "description": "Too many requests are waiting"},
    504: {"model": Error, "description": "No answer in time"},
}
GONE: dict[int | str, dict[str, Any]] = {410: {"model": Error, "description": "The image is not kept any more"}}
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

OBJECTS = {name: EXAMPLE[name] for name in ("width", "height", "instances")}
FOUND: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Objects, best first, as in NAME.json",
        "content": {"application/json": {"example": OBJECTS}},
    }
}
HIT = {"file": "2026/street.jpg", "score": 0.41, "match": 0.93, "url": "/indexed/17", "thumbnail": "data:image/jpeg,"}
HITS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Images, best first", "content": {"application/json": {"example": {"results": [HIT]}}}},
    404: {"model": Error, "description": "The server has no index, or not this image"},
}
MASK = ObjectMask((40.0, 20.0, 180.0, 310.0), [np.array([[40, 20], [180, 20], [110, 310]], np.float32)], 0.9).to_json()
MASKS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Masks, best first", "content": {"application/json": {"example": {"masks": [MASK]}}}}
}


class Asker:
    """Asks the model, one request at a time."""

    def __init__(self, predictor: Predictor, limits: Limits, folder: ImageFolder | None) -> None:
        self.predictor, self.limits, self.folder = predictor, limits, folder
        self._thread = ThreadPoolExecutor(1, "pix2seq-asker")
        self._kept = KeptImages(limits.max_kept_images, limits.max_kept_bytes)  # the thread's own

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
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        names = names or [name for name, task in self.predictor.tasks.items() if about or not task.needs_about]
        for name in names:
            self.predictor.require(name)
        asked = {name: self.predictor.tasks[name] for name in names}
        texts = (
            {} if not about else {name: task.parse_about(about) for name, task in asked.items() if task.about_format}
        )
        if about and not texts:
            raise InputError(f"about was given, but none of {', '.join(names)} takes it; they ask about whole images")
        for name in texts:
            if asked[name].takes_examples:  # which would name files of this machine
                raise InputError(f"{name} is not asked by /predict; keep both images by /images, and ask /find")
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

    def keep(self, image: UploadFile) -> KeptImage:
        """Encode an image and keep it for clicks. The same file has the same id, and is encoded once."""
        content = image.file.read()
        name = hashlib.sha256(content).hexdigest()
        if name not in self._kept:
            self._kept.add(name, self.predictor.encode(read_image(content, max_pixels=self.limits.max_pixels)))
        width, height = self._kept.get(name).size
        return KeptImage(id=name, width=width, height=height)

    def click(self, question: Question) -> bytes:
        """Answer clicks as JSON. Raises `InputError` if they cannot be."""
        self.predictor.require(question.task)
        if not self.predictor.tasks[question.task].takes_clicks:
            raise InputError(f"{question.task} takes no clicks; see takes_clicks of /tasks")
        image, clicks = self._kept.get(question.image), question.clicks()
        about = None if clicks is None else [clicks]
        (masks,) = self.predictor.ask(question.task, [image], about, seed=question.seed)
        return json.dumps({"masks": [mask.to_json() for mask in masks]}, allow_nan=False).encode()

    def find(self, wanted: Wanted) -> bytes:
        """Answer with the objects that are wanted as JSON. Raises `InputError` if they cannot be asked for."""
        if bool(wanted.like) == bool(wanted.words.strip()):
            raise InputError("what to find is given by like or by words; give one of them")
        image = self._kept.get(wanted.image)
        if wanted.like:
            like = [(self._kept.get(example.image), example.box) for example in wanted.like]
            found = self.predictor.find(image, like=like)
        else:
            found = self.predictor.find(image, words=wanted.words)
        width, height = image.size
        content = {"width": width, "height": height, "instances": [each.to_json() for each in found]}
        return json.dumps(content, allow_nan=False).encode()

    def search(self, text: str, image: UploadFile | None, top: int, match: bool) -> bytes:
        """Answer a search of the folder as JSON. Raises `InputError` if there is none, or nothing to look for."""
        if self.folder is None:
            raise NoSuchImageError("this server searches no folder; start it with --index INDEX")
        pixels = None if image is None else read_image(image.file.read(), max_pixels=self.limits.max_pixels)
        sentence = text if text.strip() else None
        hits = search(self.predictor, self.folder.index, sentence=sentence, image=pixels, top=top, match=match)
        return json.dumps({"results": [self.folder.to_json(hit) for hit in hits]}, allow_nan=False).encode()

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


def make_app(
    predictor: Predictor,
    *,
    limits: Limits | None = None,
    examples: Sequence[ExampleImage] = (),
    index: ImageIndex | None = None,
) -> FastAPI:
    """Return an application that shows a model on a page, and answers over HTTP; `index` is of a folder to search."""
    limits = limits or Limits()
    folder = None if index is None else ImageFolder(index, max_pixels=limits.max_pixels)
    asker = Asker(predictor, limits, folder)
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

    @app.post("/images", responses=ERRORS)
    async def keep(request: Request, image: Annotated[UploadFile, File(description="an image file")]) -> KeptImage:
        """Encode an image, and keep it for clicks until others need its place."""
        return await asker.run(request, asker.keep, image)

    @app.post("/clicks", responses=MASKS | ERRORS | GONE)
    async def click(request: Request, question: Question) -> Response:
        """Return the masks that clicks can mean, best first."""
        return Response(await asker.run(request, asker.click, question), media_type="application/json")

    @app.post("/find", responses=FOUND | ERRORS | GONE)
    async def find(request: Request, wanted: Wanted) -> Response:
        """Find the objects of a kept image that are like an example, or that words name."""
        return Response(await asker.run(request, asker.find, wanted), media_type="application/json")

    @app.post("/search", responses=HITS | ERRORS)
    async def search_folder(
        request: Request,
        text: Annotated[str, Form(max_length=MAX_WORDS, description="a sentence that is true of the images")] = "",
        image: Annotated[UploadFile | None, File(description="or an image that they are like")] = None,
        top: Annotated[int, Form(ge=1, le=MAX_RESULTS, description="images to return")] = 24,
        match: Annotated[bool, Form(description="whether matching orders what the embedding finds")] = True,
    ) -> Response:
        """Search the folder that the server has an index of."""
        return Response(await asker.run(request, asker.search, text, image, top, match), media_type="application/json")

    @app.get("/indexed/{number}", response_class=FileResponse, responses={404: HITS[404]})
    def indexed(number: int) -> FileResponse:
        """Return an image of the folder."""
        if folder is None:
            raise HTTPException(404, "this server searches no folder")
        path = folder.path(number)
        return FileResponse(path, media_type=media_type(path))

    @app.get("/tasks")
    async def list_tasks() -> dict[str, Any]:
        """Return what the model can be asked, its classes, and the limits of this server."""
        return describe(predictor) | {"index": folder and folder.describe(), "limits": asdict(limits)}

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
            {
                "name": name,
                "needs": task.needs,
                "about_format": task.about_format,
                "needs_about": task.needs_about,
                "takes_clicks": task.takes_clicks,
            }
            for name, task in predictor.tasks.items()
        ],
        "categories": [
            category.to_json() | {"color": "#{:02x}{:02x}{:02x}".format(*category_color(category.name))}
            for category in known.values()
        ],
        "finds": {"like": predictor.can_find_like, "words": predictor.can_find_words},
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
