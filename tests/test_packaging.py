"""The wheel matches the tree, lock and imports match pyproject.toml, scripts and both packages `tokenizers` work."""

import ast
import configparser
import email
import importlib.metadata
import itertools
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FOLDERS = {folder: package for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}


def run_python(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, text=True, capture_output=True, check=False)


def source_files(folder: str) -> Iterator[Path]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            yield path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built without network from a copy, because setuptools leaves a build folder in the tree."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in [*FOLDERS, "tests"]:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    result = run_python("-c", build, dist, cwd=tree)
    assert result.returncode == 0, result.stderr
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_contains_exactly_the_mapped_folders_under_their_import_names(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in source_files(folder)
    }
    got = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert got == expected, "differences are folders or files that pyproject.toml does not list under [tool.setuptools]"


def test_the_wheel_has_metadata_licence_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"pix2seq": "pix2seq.cli:main"}


def locked_lines() -> list[str]:
    """The requirements in the lock, each with its hashes."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace("\\\n", "")
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def pinned() -> list[Requirement]:
    return [Requirement(line.split(" --hash=")[0]) for line in locked_lines()]


def test_every_line_of_the_lock_is_an_exact_version() -> None:
    loose = [str(pin) for pin in pinned() if pin.url or [spec.operator for spec in pin.specifier] != ["=="]]
    assert loose == []


def test_every_line_of_the_lock_has_hashes_and_setup_asks_for_them() -> None:
    assert [
        line for line in locked_lines() if not re.fullmatch(r"[^ ]+( ; .*?)?( --hash=sha256:[0-9a-f]{64})+", line)
    ] == []
    assert "--require-hashes -r requirements.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("sys_platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_one_allowed_version_of_every_dependency(python: str, sys_platform: str) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": sys_platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[sys_platform],
        "os_name": "nt" if sys_platform == "win32" else "posix",
        "platform_machine": "arm64" if sys_platform == "darwin" else "x86_64",
        "platform_python_implementation": "CPython",
    }
    versions: dict[str, list[str]] = {}
    for pin in pinned():
        if pin.marker is None or pin.marker.evaluate(environment):
            versions.setdefault(canonicalize_name(pin.name), []).extend(spec.version for spec in pin.specifier)
    assert [name for name, found in versions.items() if len(found) > 1] == []
    for text in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        wanted = Requirement(text)
        found = versions.get(canonicalize_name(wanted.name), [])
        assert found, f"{text} is not in requirements.txt: run `make lock`"
        assert wanted.specifier.contains(found[0]), f"{text} is pinned to {found[0]}: run `make lock`"


def imported_names(path: Path, *, nested: bool) -> set[str]:
    """Top-level names that a file imports at module level, and with `nested` also in functions and conditions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {PROJECT["name"]}


def distribution_names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_every_imported_package_is_a_declared_dependency() -> None:
    required = distribution_names(PROJECT["dependencies"])
    optional = required.union(*map(distribution_names, PROJECT["optional-dependencies"].values()))
    providers = importlib.metadata.packages_distributions()  # cv2 -> opencv-python-headless, PIL -> pillow

    beside = {path.stem for folder in ["tests", "benchmarks"] for path in (ROOT / folder).glob("*.py")}

    def undeclared(path: Path, allowed: set[str], *, nested: bool) -> list[str]:
        return [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in sorted(imported_names(path, nested=nested) - beside)
            if allowed.isdisjoint(map(canonicalize_name, providers.get(name, [])))
        ]

    # serve() imports the other modules of web/, and says what is missing.
    web = required | distribution_names(PROJECT["optional-dependencies"]["web"])
    package = [path for folder in FOLDERS for path in source_files(folder) if path.suffix == ".py"]
    developers = [path for folder in ["tests", "benchmarks"] for path in source_files(folder) if path.suffix == ".py"]
    found: set[str] = set()
    for path in package:
        found.update(undeclared(path, web if path.parent.name == "web" else required, nested=False))
    found |= {line for path in [*package, *developers] for line in undeclared(path, optional, nested=True)}
    assert sorted(found) == []


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "train").glob("[a-z]*.py")))
def test_a_training_script_is_the_command_for_its_task(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("pix2seq.cli.main", called.append)
    monkeypatch.setattr(sys, "argv", [f"train/{script}.py", "lr=1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train" / f"{script}.py"), run_name="__main__")
    assert called == [["train", *([] if script == "multi_task" else ["--task", script]), "lr=1"]]


def test_from_the_root_both_packages_named_tokenizers_import() -> None:
    code = """
import tokenizers
import pix2seq.tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

tokenizer = tokenizers.Tokenizer(WordLevel({"a": 0, "cat": 1}, unk_token="a"))
tokenizer.pre_tokenizer = Whitespace()
print(tokenizer.encode("a cat").ids)
for module in (tokenizers, pix2seq.tokenizers):
    print(module.__spec__.name)
    print(module.__file__)
"""
    result = run_python("-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    ids, their_name, their_file, our_name, our_file = result.stdout.splitlines()
    assert ids == "[0, 1]"
    assert (their_name, our_name) == ("tokenizers", "pix2seq.tokenizers")
    assert Path(their_file).resolve().parent != ROOT / "tokenizers"
    assert Path(our_file).resolve().parent == ROOT / "tokenizers"


def test_without_hugging_faces_package_the_name_tokenizers_is_not_found() -> None:
    code = "import sys; sys.path.insert(0, ''); import tokenizers"
    result = run_python("-I", "-S", "-c", code, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ModuleNotFoundError: Hugging Face's package tokenizers is not")
    assert "pip install tokenizers" in result.stderr
