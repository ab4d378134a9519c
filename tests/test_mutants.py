"""The list of faults for mutation testing fits the code."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTED = tomllib.loads((ROOT / "benchmarks" / "mutants.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", LISTED["fault"], ids=lambda fault: fault["about"])
def test_every_listed_fault_changes_one_line_of_the_code(fault):
    code = (ROOT / fault["file"]).read_text(encoding="utf-8")
    assert code.count(fault["old"]) == 1, f"adapt this fault in benchmarks/mutants.toml to {fault['file']}"
    compile(code.replace(fault["old"], fault["new"]), fault["file"], "exec")
    assert fault["old"] != fault["new"]
