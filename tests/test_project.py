"""What keeps the project alive: workflows call make targets that exist, and a release agrees with itself."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load_release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts/release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The script on a copy of the files that it reads."""
    module = load_release()
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    card = tmp_path / "checkpoints/shapes/README.md"
    card.parent.mkdir(parents=True)
    card.write_text("# shapes\n\n## Licence\n\nApache-2.0\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def change(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def steps(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_that_exist(path):
    commands = [step["run"] for step in steps(path) if "run" in step]
    called = {word for command in commands for word in re.findall(r"\bmake ([a-z-]+)", command)}
    assert called <= TARGETS
    assert called
    assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+", step["uses"]) for step in steps(path) if "uses" in step)


def test_every_pull_request_is_linted_tested_and_its_docs_are_built():
    (path,) = (path for path in WORKFLOWS if path.name == "ci.yml")
    content = yaml.safe_load(path.read_text())
    assert "pull_request" in content[True]  # YAML 1.1 reads `on` as a truth value
    commands = {step["run"] for step in steps(path) if "run" in step}
    assert {"make lint", "make test", "make docs"} <= commands


def test_targets_are_phony_and_explained():
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (phony,) = re.findall(r"^\.PHONY: (help .*)$", text, re.MULTILINE)
    explained = set(re.findall(r"^([a-z-]+):.* ## ", text, re.MULTILINE))
    assert set(phony.split()) == TARGETS == explained


def test_the_tree_can_be_released_but_for_its_date(release):
    assert release.problems(None) == []
    ours = release.version()
    change(release.ROOT, "CHANGELOG.md", "not yet released", "2026-12-01")
    assert release.problems(f"v{ours}") == []


def test_each_disagreement_is_named(release):
    ours = release.version()
    assert "write the date of the release" in release.problems(f"v{ours}")[0]
    change(release.ROOT, "CHANGELOG.md", "not yet released", "2026-12-01")
    assert release.problems("v9.9.9") == [f"the tag is v9.9.9, but pyproject.toml says {ours}; expected v{ours}"]
    change(release.ROOT, "CITATION.cff", f"version: {ours}", "version: 8.0.0")
    (release.ROOT / "checkpoints/shapes/README.md").write_text("# shapes\n")
    change(release.ROOT, "pyproject.toml", f'version = "{ours}"', 'version = "7.0.0"')
    found = release.problems(None)
    assert len(found) == 3
    assert found[0].startswith("CHANGELOG.md has no section '## 7.0.0, DATE'")
    assert found[1] == "CITATION.cff says version 8.0.0, pyproject.toml 7.0.0"
    assert "no section 'Licence'" in found[2]


def test_the_notes_of_a_version_are_its_section_alone():
    notes = load_release().release_notes
    log = "# Log\n## 0.2.0, 2027-01-02\n\n- New.\n\n## 0.1.0, 2026-12-01\n\nFirst.\n\n- Old.\n\n## 0.0.1, 2026-01-01\n"
    assert notes(log, "0.2.0") == ("2027-01-02", "- New.")
    assert notes(log, "0.1.0") == ("2026-12-01", "First.\n\n- Old.")
    with pytest.raises(ValueError, match=r"says nothing about 0\.0\.1"):
        notes(log, "0.0.1")
    with pytest.raises(ValueError, match=r"no section '## 3\.0\.0, DATE'"):
        notes(log, "3.0.0")


def test_the_citation_names_both_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [each["url"].rpartition("/")[2] for each in cited["references"]] == ["2109.10852", "2206.07669"]
    assert cited["license"] == "Apache-2.0"
