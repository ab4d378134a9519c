"""The HTTP endpoint: the predictor's own answers, and one line with the right status for everything else."""

import builtins
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_model import OLD, random_model
from web_client import encoded, form, get, noise, png_header, predict, request, serving

import pix2seq.tasks
from pix2seq import Pix2Seq, Predictor
from pix2seq.cli import main
from pix2seq.web.app import PAGE
from pix2seq.web.examples import example_images
from pix2seq.web.limits import Limits

ROOT = Path(__file__).resolve().parent.parent
PIXELS = noise(60, 40)
IMAGE = encoded(PIXELS)
LIMITS = Limits(max_bytes=200_000, max_pixels=10_000, max_requests=4, timeout=30)


@pytest.fixture(scope="module")
def predictor():
    """A model of random weights that finds persons and writes captions."""
    predictor = Predictor(random_model(lambda category: category.keypoints, bias=6.0))
    predictor.configure(num_objects=8, min_box_score=0.0)
    return predictor


@pytest.fixture(scope="module")
def port(predictor):
    with serving(predictor, limits=LIMITS) as port:
        yield port


@pytest.fixture
def slow(predictor, monkeypatch):
    """Let answers wait for an event; count those that were begun."""
    event, original, begun = threading.Event(), Predictor.predict_batch, []

    def waiting(self, *args, **kwargs):
        begun.append(time.monotonic())
        assert event.wait(20)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Predictor, "predict_batch", waiting)
    yield event, begun
    event.set()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_answers_what_the_predictor_answers(predictor, port):
    expected = predictor.predict(PIXELS, list(predictor.tasks), seed=3).to_json()
    assert len(expected["instances"]) > 1
    answer = predict(port, IMAGE, seed=3)
    assert answer.status == 200
    assert answer.json == {"image": "street.jpg"} | json.loads(json.dumps(expected))
    some = predict(port, IMAGE, tasks="detection", seed=3).json
    assert some["captions"] == []
    scores = sorted(instance["score"] for instance in some["instances"])
    middle = scores[len(scores) // 2]
    likely = predict(port, IMAGE, tasks="detection", seed=3, threshold=middle + 1e-6).json["instances"]
    assert likely == [instance for instance in some["instances"] if instance["score"] > middle]
    assert 0 < len(likely) < len(scores)


def test_it_asks_about_what_a_user_names(predictor, port):
    about = "4,4,30,30 person; 10,2,50,38 person"
    expected = predictor.segment(PIXELS, [[4, 4, 30, 30], [10, 2, 50, 38]], categories="person")
    found = predict(port, IMAGE, tasks="segmentation", about=about, sequences=True).json
    polygons = {tuple(each["bbox"]): each["segmentation"] for each in found["instances"]}
    assert polygons == {tuple(each.to_json()["bbox"]): each.to_json()["segmentation"] for each in expected}
    assert [sequence["task"] for sequence in found["sequences"]] == ["segmentation"] * 2


def test_every_token_of_an_answer_leads_to_it(predictor, port):
    answer = predict(port, IMAGE, sequences=True).json
    width, height, seen = answer["width"], answer["height"], set()
    assert {sequence["task"] for sequence in answer["sequences"]} == set(predictor.tasks)
    for sequence in answer["sequences"]:
        for part in sequence["parts"]:
            tokens = sequence["response"][part["start"] : part["stop"]]
            if part["answer"] is None:
                assert sequence["task"] == "detection"  # an object that is none
                continue
            key, index = part["answer"]["key"], part["answer"]["index"]
            entry = answer[key][index]
            seen.add((sequence["task"], key, index))
            pixels = [token["pixel"] for token in tokens if "axis" in token]
            assert [token["axis"] for token in tokens if "axis" in token] == ["y", "x"] * (len(pixels) // 2)
            if sequence["task"] == "detection":
                y0, x0, y1, x1 = np.clip(pixels, 0, [height, width] * 2)
                assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.03)
                assert entry["category"] == tokens[4]["best"]["text"]
                assert entry["score"] == pytest.approx(tokens[4]["best"]["probability"], abs=1e-4)
            elif sequence["task"] == "captioning":
                ids = [token["id"] - 1016 for token in tokens]
                assert entry["text"] == predictor.model.text.decode(ids)
                logs = np.log([max(token["probability"], 1e-4) for token in tokens])
                assert entry["score"] == pytest.approx(logs.mean(), abs=0.5)
    assert {index for task, _, index in seen if task == "detection"} == set(range(len(answer["instances"])))
    assert ("captioning", "captions", 0) in seen
    assert len(json.dumps(answer)) < 500_000


def test_a_task_from_elsewhere_appears_by_itself(monkeypatch):
    spec = importlib.util.spec_from_file_location("counting", ROOT / "examples" / "counting.py")
    counting = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "counting", counting)
    spec.loader.exec_module(counting)
    monkeypatch.setattr(pix2seq.tasks, "_registered", {"counting": counting.Counting})
    model = Pix2Seq.from_pretrained(OLD)
    model.config = replace(model.config, vocab=model.config.vocab.with_tasks(["counting"]))
    model.task_settings["counting"] = {"max_count": 9}
    predictor = Predictor(model)
    with serving(predictor) as port:
        assert [task["name"] for task in get(port, "/tasks").json["tasks"]][-1] == "counting"
        answer = predict(port, IMAGE, tasks="counting", sequences=True, drawings=True).json
    counts = [count.to_json() for count in predictor.ask("counting", [PIXELS])[0]]
    assert answer["counting"] == counts
    assert answer["drawings"]["counting"].startswith("data:image/jpeg;base64,/9j/")
    parts = [sequence["parts"] for sequence in answer["sequences"]]
    assert parts == [[{"start": 0, "stop": 1, "answer": {"key": "counting", "index": i}}] for i in range(len(counts))]
    assert [int(each["response"][0]["text"]) for each in answer["sequences"]] == [count["count"] for count in counts]


DAMAGED = encoded(PIXELS, "JPEG")[:-300]
BAD = {
    "no image": (422, {"image": None}, "image: Field required"),
    "no form": (422, {"raw": (b"{}", {"Content-Type": "application/json"})}, "image: Field required"),
    "a form that breaks off": (400, {"raw": (b"--x\r\nContent-", {"Content-Type": "multipart/form-data"})}, "boundary"),
    "no image file": (415, {"image": b"<svg></svg>"}, "expected JPEG, MPO, PNG"),
    "an empty file": (415, {"image": b""}, "not a readable image"),
    "a damaged image": (422, {"image": DAMAGED}, "cannot be decoded"),
    "an image without pixels": (422, {"image": png_header(50, 50)}, "cannot be decoded"),
    "an image that is too large": (413, {"image": png_header(101, 100)}, "101x100 pixels, the limit is 10000"),
    "an image beyond Pillow's limit": (413, {"image": png_header(60000, 60000)}, "pixels"),
    "too many bytes": (413, {"image": bytes(200_001)}, "larger than 200000 bytes"),
    "an unknown task": (422, {"tasks": "detecton"}, "not trained for detecton"),
    "boxes that cannot be read": (422, {"tasks": "segmentation", "about": "1,2 x"}, "x0, y0, x1, y1"),
    "boxes for a caption": (422, {"tasks": "captioning", "about": "1,2,3,4 person"}, "takes it"),
    "a class that is unknown": (422, {"tasks": "segmentation", "about": "1,2,9,9 dgo"}, "unknown category 'dgo'"),
    "a threshold": (422, {"threshold": "2"}, "threshold: Input should be less than or equal to 1"),
    "a threshold that is no number": (422, {"threshold": "nan"}, "threshold: "),
    "a seed": (422, {"seed": "-1"}, "seed: "),
    "a huge seed": (422, {"seed": "1" + "0" * 30}, "seed: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_with_the_right_status(case, port):
    status, fields, message = BAD[case]
    fields = {"image": IMAGE} | fields
    raw = fields.pop("raw", None) or form(fields.pop("image"), fields)
    assert message in request(port, "POST", "/predict", *raw).error(status)
    assert predict(port, IMAGE, tasks="detection").status == 200


def test_bytes_are_counted_where_no_header_says_how_many(port):
    body, headers = form(bytes(400_000), {})
    chunks = (body[start : start + 5000] for start in range(0, len(body), 5000))
    assert "larger" in request(port, "POST", "/predict", chunks, headers).error(413)


def test_paths_that_do_not_exist_get_a_line_too(port):
    assert get(port, "/nothing").error(404)
    assert get(port, "/predict").error(405)
    assert get(port, "/examples/0.jpg").error(404)
    assert get(port, "/docs").error(404)
    assert get(port, "/page/../app.py").error(404)


def test_a_bug_gets_a_line_and_the_server_goes_on(port, monkeypatch):
    monkeypatch.setattr(Predictor, "predict_batch", lambda *args, **kwargs: 1 / 0)
    assert "error of the server" in predict(port, IMAGE).error(500)
    monkeypatch.undo()
    assert predict(port, IMAGE, tasks="detection").status == 200


def test_more_requests_than_allowed_are_told_to_come_back(port, slow):
    event, begun = slow
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(predict, port, IMAGE, tasks="detection") for _ in range(4)]
        until(lambda: predict(port, IMAGE, tasks="detection").status == 503 if len(begun) else False)
        refused = predict(port, IMAGE, tasks="detection")
        assert "the limit is 4" in refused.error(503)
        assert refused.headers["retry-after"] == "1"
        assert get(port, "/health").json["status"] == "ok"
        assert len(begun) == 1  # one at a time
        event.set()
        assert [each.result().status for each in waiting] == [200] * 4
    assert predict(port, IMAGE, tasks="detection").status == 200


def test_a_request_that_takes_too_long_is_given_up_and_those_behind_it_are_never_begun(predictor, slow):
    event, begun = slow
    with serving(predictor, limits=replace(LIMITS, timeout=0.3)) as port, ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda _: predict(port, IMAGE, tasks="detection"), range(3)))
        assert {"there was no answer within 0.3 s; try again later"} == {reply.error(504) for reply in replies}
        assert len(begun) == 1
        event.set()
        until(lambda: predict(port, IMAGE, tasks="detection").status == 200)


def test_a_body_that_does_not_arrive_ends_in_time(predictor):
    body, headers = form(IMAGE, {})
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    with (
        serving(predictor, limits=replace(LIMITS, timeout=0.3)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as stalled,
    ):
        stalled.sendall(head.encode() + body[:100])
        assert b" 504 " in stalled.recv(1000).split(b"\r\n")[0]


def test_a_client_that_goes_away_is_forgotten(port, slow):
    event, begun = slow

    def is_accepted():
        try:
            assert predict(port, IMAGE, tasks="detection", timeout=0.2).status == 503
        except TimeoutError:
            return True  # it was waiting for an answer
        return False

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(predict, port, IMAGE, tasks="detection")
        until(lambda: begun)
        for _ in range(9):  # there is room for three
            until(is_accepted)
        event.set()
        assert first.result().status == 200
    assert predict(port, IMAGE, tasks="detection").status == 200
    assert len(begun) < 9


def test_the_description_and_the_page_need_nothing_from_elsewhere(predictor, port):
    paths = get(port, "/openapi.json").json["paths"]
    gets = {"/tasks", "/health", "/examples", "/examples/{index}.jpg", "/indexed/{number}"}
    assert set(paths) == {"/predict", "/images", "/clicks", "/find", "/search"} | gets
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(paths["/predict"]["post"]["responses"])
    page = get(port, "/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    files = sorted(PAGE.iterdir())
    assert len(files) >= 5
    for path in files:
        assert get(port, f"/page/{path.name}").body == path.read_bytes()
        addresses = re.findall(r"https?://[^\s\"')]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path


def test_examples_fit_the_model(predictor, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "b.png").write_bytes(IMAGE)
    (folder / "a.png").write_bytes(encoded(noise(20, 30)))
    (folder / "notes.txt").write_text("no image")
    named = example_images(predictor, folder)
    assert [each.name for each in named] == ["a", "b"]
    with serving(predictor, examples=named) as port:
        assert [each["url"] for each in get(port, "/examples").json] == ["/examples/0.jpg", "/examples/1.jpg"]
        assert predict(port, get(port, "/examples/0.jpg").body, tasks="detection").json["width"] == 20
    assert len(example_images(predictor, None)) == 8  # its classes are those of the generated images
    other = Predictor(Pix2Seq.from_pretrained(OLD))
    other.tasks = {name: _renamed(task) for name, task in other.tasks.items()}
    assert example_images(other, None) == []
    for path in (folder / "none", tmp_path):
        assert main(["serve", "--checkpoint", str(OLD), "--examples", str(path), "--port", "0"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path} ")


def test_serve_ends_with_a_line_if_it_cannot_start(capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        assert main(["serve", "--checkpoint", str(OLD), "--port", number]) == 2
        assert f"cannot listen on 127.0.0.1:{number}" in capsys.readouterr().err
    assert main(["serve", "--checkpoint", str(OLD), "--host", "no.such.host.invalid"]) == 2
    assert "choose another --port or --host" in capsys.readouterr().err
    assert main(["serve", "--port", "70000"]) == 2
    assert "a port from 0 to 65535" in capsys.readouterr().err
    monkeypatch.setattr("pix2seq.demo.CHECKPOINT", tmp_path)
    assert main(["serve"]) == 2
    assert "--checkpoint" in capsys.readouterr().err
    original = builtins.__import__

    def without_uvicorn(name, *args, **kwargs):
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_uvicorn)
    assert main(["serve", "--checkpoint", str(OLD)]) == 2
    assert "pip install pix2seq[web]" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hundred_requests_eight_at_once_all_get_an_answer_or_a_line(tmp_path):
    large = encoded(np.full((5000, 5000, 3), 128, np.uint8))  # 75 MB of pixels in a small file
    kinds = {
        "good": (IMAGE, 200), "large": (large, 200), "huge": (png_header(7000, 7000), 413),
        "bytes": (bytes(2**20 + 1), 413), "text": (b"no image", 415), "cut": (DAMAGED, 422),
    }  # fmt: skip
    todo = ["good"] * 140 + ["large"] * 6 + ["huge"] * 14 + ["bytes"] * 12 + ["text"] * 14 + ["cut"] * 14
    random.Random(0).shuffle(todo)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "no_network"), os.environ.get("PYTHONPATH", "")]),
        "NETWORK_LOG": str(tmp_path / "network.txt"),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pix2seq.cli",
        "serve",
        "--checkpoint",
        OLD,
        "--port",
        "0",
        "--max-bytes",
        "1048576",
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+) ", process.stdout.readline())[1])

        def send(kind):
            reply = predict(port, kinds[kind][0], tasks="detection,captioning")
            return kind, reply.status, reply.json

        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(send, [*kinds, "large"]))
            before = _peak_memory(process.pid)
            replies = first + list(pool.map(send, todo[len(first) :]))
            after = _peak_memory(process.pid)
        assert len(replies) == 200
        assert [(kind, status) for kind, status, _ in replies if status != kinds[kind][1]] == []
        expected = next(answer for kind, _, answer in replies if kind == "good")
        for kind, status, answer in replies:
            assert (list(answer) == ["error"]) == (status != 200)
            assert kind != "good" or answer == expected
        assert after - before < 150 * 2**20  # two of the large images
        assert get(port, "/health").json["status"] == "ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().splitlines()[-1] == "stopped"
        assert not (tmp_path / "network.txt").exists()
    finally:
        process.kill()
        process.wait()


def _peak_memory(process):
    """Bytes that a process held at most; 0 where the system does not say."""
    status = Path(f"/proc/{process}/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def _renamed(task):
    """The same task for classes of other names."""
    categories = [replace(category, name=f"my {category.name}") for category in task.categories.values()]
    return type(task)(task.config, task.vocab, categories, task.text)
