"""Models of the Hugging Face Hub, against a stand-in that speaks its HTTP interface on this machine."""

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
import yaml
from http_server import serving
from test_outputs import MODEL

from pix2seq import Pix2Seq, Predictor, push_to_hub
from pix2seq.errors import InputError
from pix2seq.export import Scored, _front_matter
from pix2seq.model.hub import local_folder

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: name -> file -> bytes."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    asked: ClassVar[list[str]] = []
    tokens: ClassVar[set[str | None]] = set()

    def log_message(self, *_):
        pass

    def _send(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code="RepoNotFound"):
        self._send({"error": code}, 404, X_Error_Code=code)

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        self.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, kind, revision = match.groups()
            files = self.repositories.get(name)
            if files is None:
                return self._missing()
            if revision not in (None, "main", SHA):
                return self._missing("RevisionNotFound")
            if kind == "tree":
                entries = [{"type": "file", "path": f, "size": len(b), "oid": _oid(b)} for f, b in files.items()]
                return self._send(entries)
            return self._send({"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, _, file = match.groups()
            content = self.repositories.get(name, {}).get(file)
            if content is None:
                return self._missing("EntryNotFound")
            return self._send(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=SHA)
        return self._missing()

    do_HEAD = do_GET

    def do_POST(self):
        self.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            self.repositories.setdefault(name, {})
            return self._send({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._send({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._send(
                {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{SHA}", "commitOid": SHA, "success": True}
            )
        if self.path.startswith("/api/validate-yaml"):
            return self._send({"errors": [], "warnings": []})
        return self._missing()


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with no model; downloads are cached below `tmp_path`."""
    Hub.repositories, Hub.asked, Hub.tokens = {}, [], set()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_XET_CACHE", str(tmp_path / "xet"), raising=False)
    monkeypatch.chdir(tmp_path)
    with serving(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield Hub


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_model_is_opened_by_its_name(hub):
    hub.repositories["ann/cats"] = files_of(MODEL) | {"train.py": b"import os", "pytorch_model.bin": b"x" * 1000}
    predictor = Predictor.from_pretrained("ann/cats", device="cpu", token="hf_secret")
    local = Predictor.from_pretrained(MODEL, device="cpu")
    assert [c.name for c in predictor.model.categories] == [c.name for c in local.model.categories]
    asked = " ".join(hub.asked)
    assert "model.safetensors" in asked
    assert "train.py" not in asked
    assert "pytorch_model.bin" not in asked  # only what a checkpoint has, above all no code and no pickle
    assert "Bearer hf_secret" in hub.tokens
    hub.asked.clear()
    Pix2Seq.from_pretrained("ann/cats", revision=SHA)  # cached by commit
    assert not [line for line in hub.asked if line.startswith("GET") and "safetensors" in line]


def test_a_local_folder_wins(hub, tmp_path):
    hub.repositories["runs/mine"] = files_of(MODEL)
    shutil.copytree(MODEL, tmp_path / "runs/mine")
    assert local_folder("runs/mine") == Path("runs/mine")
    assert local_folder("runs/mime") == Path("runs/mime")  # beside it: a slip of the pen, which nobody else need know
    assert local_folder(tmp_path / "a/b") == tmp_path / "a/b"
    assert local_folder("a/b/c") == Path("a/b/c")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("bob/none", None, "neither a folder nor a model on the hub"),
        ("ann/cats", "v9", "no revision 'v9'"),
        ("ann/text", None, "no config.json and no model.safetensors"),
        ("ann/a--b", None, "no name on the hub"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, name, revision, message):
    hub.repositories |= {"ann/cats": files_of(MODEL), "ann/text": {"README.md": b"a story"}}
    with pytest.raises(InputError, match=message) as error:
        Pix2Seq.from_pretrained(name, revision=revision)
    assert "\n" not in str(error.value)


def test_without_a_network_a_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="no folder ann/cats, and the hub did not answer") as error:
        Predictor.from_pretrained("ann/cats")
    assert "\n" not in str(error.value)


def test_what_is_pushed_comes_back_without_the_files_of_others(hub, tmp_path):
    folder = tmp_path / "shared"
    shutil.copytree(MODEL, folder)
    (folder / "README.md").write_text("# cats\n")
    (folder / "notes.txt").write_text("private")
    address = push_to_hub(folder, "ann/cats", token="hf_secret")
    assert "ann/cats" in address
    assert hub.repositories["ann/cats"].keys() == {"README.md", "config.json", "model.safetensors"} | {
        path.name for path in MODEL.iterdir() if path.name.startswith("text")
    }
    ours, theirs = Pix2Seq.from_pretrained(folder), Pix2Seq.from_pretrained("ann/cats")
    assert all((a == b).all() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(InputError, match="expected USER/NAME"):
        push_to_hub(folder, "cats")
    with pytest.raises(InputError, match=r"has no config\.json"):
        push_to_hub(tmp_path, "ann/cats")


def test_a_card_opens_with_what_the_hub_reads():
    model = Pix2Seq.from_pretrained(MODEL)
    scored = Scored({"AP": 0.25, "AP50": 0.5, "APs": 0.1, "AR100": None}, 10, "10 images: of split val")
    first, *lines, last, empty = _front_matter(model, "cats", scored, "Apache-2.0")
    assert (first, last, empty) == ("---", "---", "")
    content = yaml.safe_load("\n".join(lines))
    assert content["license"] == "apache-2.0"
    assert content["pipeline_tag"] == "object-detection"
    assert {"pix2seq", "detection"} <= set(content["tags"])
    (entry,) = content["model-index"]
    assert entry["results"][0]["dataset"]["name"] == "10 images: of split val"
    assert [(m["type"], m["value"]) for m in entry["results"][0]["metrics"]] == [("AP", 0.25), ("AP50", 0.5)]
    huggingface_hub.ModelCardData(
        **{key.replace("-", "_"): value for key, value in content.items() if key != "model-index"}
    )
    other = yaml.safe_load("\n".join(_front_matter(model, "cats", None, "only for cats")[1:-2]))
    assert (other["license"], "model-index" in other) == ("other", False)
