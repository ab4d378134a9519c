"""Check that a release can go out, and print its notes: `make release-check`, `make release-notes`.

python scripts/release.py check --tag v0.1.0    # without --tag: everything but the tag and the date
python scripts/release.py notes
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
HEADING = re.compile(r"^## (?P<version>\S+?), (?P<date>.+)$", re.MULTILINE)
UNRELEASED = "not yet released"
FIRST_STEPS = """
import sys
from pathlib import Path
import numpy as np
from pix2seq import Predictor
import pix2seq
assert Path(pix2seq.__file__).is_relative_to(sys.prefix), f"{pix2seq.__file__} is not that of {sys.prefix}"
predictor = Predictor.from_pretrained(sys.argv[1], device="cpu")
print(len(predictor.detect(np.zeros((96, 96, 3), np.uint8))), "objects in a black image")
"""


def version() -> str:
    """Return the version that pyproject.toml says."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"])


def release_notes(changelog: str, wanted: str) -> tuple[str, str]:
    """Return the date and the text of a version's section. Raises `ValueError` if there is none, or nothing in it."""
    headings = list(HEADING.finditer(changelog))
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        if heading["version"] == wanted:
            text = changelog[heading.end() : following.start() if following else None].strip()
            if not text:
                raise ValueError(f"CHANGELOG.md says nothing about {wanted}")
            return heading["date"], text
    raise ValueError(
        f"CHANGELOG.md has no section '## {wanted}, DATE'; it has {[each['version'] for each in headings]}"
    )


def card_problems(folder: Path) -> list[str]:
    """Return what a checkpoint's folder lacks of a model card."""
    card = folder / "README.md"
    if not card.is_file():
        return [f"{folder.name} has no README.md"]
    text = card.read_text("utf-8")
    return [f"the card of {folder.name} has no section {name!r}" for name in ("Licence",) if f"## {name}" not in text]


def problems(tag: str | None) -> list[str]:
    """Return what is wrong with version, tag, change log, citation and model cards."""
    found, ours = [], version()
    try:
        date, _ = release_notes((ROOT / "CHANGELOG.md").read_text("utf-8"), ours)
    except ValueError as error:
        found.append(str(error))
    else:
        if tag and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            found.append(f"CHANGELOG.md says '{ours}, {date}'; write the date of the release, YYYY-MM-DD")
    if tag and tag != f"v{ours}":
        found.append(f"the tag is {tag}, but pyproject.toml says {ours}; expected v{ours}")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"]
    if str(cited) != ours:
        found.append(f"CITATION.cff says version {cited}, pyproject.toml {ours}")
    for folder in sorted((ROOT / "checkpoints").iterdir()):
        found += card_problems(folder)
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command and end with one line if it fails."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(command, cwd=cwd, env=environment, check=False).returncode:
        sys.exit(f"error: {command[0]} failed")


def check_packages(dist: Path) -> None:
    """Build wheel and sdist, and use the wheel in a new environment outside the checkout."""
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist)  # the wheel is built from the sdist
    (wheel,), (sdist,) = list(dist.glob("*.whl")), list(dist.glob("*.tar.gz"))
    uv = shutil.which("uv")
    if uv:
        run("uvx", "twine@6.2.0", "check", "--strict", wheel, sdist)
    else:
        print("uv is not installed: twine check is left out")
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder)
        python = outside / "venv/bin/python"
        locked = ("--require-hashes", "-r", ROOT / "requirements.txt")
        if uv:
            run(uv, "venv", "--quiet", "--python", sys.executable, outside / "venv")
            install: tuple[str | Path, ...] = (uv, "pip", "install", "--quiet", "--python", python)
        else:
            run(sys.executable, "-m", "venv", outside / "venv")
            install = (python, "-m", "pip", "install", "--quiet")
        run(*install, *locked)
        run(*install, "--no-deps", wheel)
        run(python.with_name("pix2seq"), "--help", cwd=outside)
        run(python.with_name("pix2seq"), "data", "shapes", "shapes", "--train", "4", "--val", "2", cwd=outside)
        run(python.with_name("pix2seq"), "data", "check", "shapes", cwd=outside)
        for checkpoint in sorted((ROOT / "checkpoints").iterdir()):
            run(python, "-c", FIRST_STEPS, checkpoint, cwd=outside)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="version, tag, change log, cards and packages")
    check.add_argument("--tag", help="that the release will have; it must be v and the version")
    commands.add_parser("notes", help="print the section of CHANGELOG.md about this version")
    args = parser.parse_args()
    if args.command == "notes":
        print(release_notes((ROOT / "CHANGELOG.md").read_text("utf-8"), version())[1])
        return
    found = problems(args.tag)
    if found:
        sys.exit("\n".join(f"error: {line}" for line in found))
    check_packages(ROOT / "dist")
    print(f"{version()} can be released: dist/")


if __name__ == "__main__":
    main()
