"""YAML settings: what is read, and that any text ends soon, as a value or in one line."""

import os
import string
import time

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pix2seq.errors import InputError
from pix2seq.training.config import load_config
from pix2seq.training.yaml_file import MAX_BYTES, parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
ATTACKS = [
    *(
        BOMB,
        "&a [*a]",
        "a: &a {b: *a}",
        "[" * 100_000,
        "{a: " * 10_000,
        "- " * 5_000,
        "!!int x",
        "!!int ''",
        "!!bool x",
    ),
    *("!!float x", "!!timestamp x", "!!binary x", "!!set {a, b}", "!!python/object/apply:os.getcwd []", "1" * 5000),
    *("0b_", "a\0b", "\udc80", "a: b: c", "*a", "? [1]\n: 2", "%YAML 9.9\n---\na", "--- a\n--- b", "\t- a", "'"),
]


def reason(text):
    """Return why a text has no value, or an empty string."""
    try:
        parse_yaml(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_ends_soon_and_in_one_line(text, tmp_path):
    started = time.process_time()
    assert "\n" not in reason(text)
    assert time.process_time() - started < 5
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.yaml"):
        read_yaml(path)
    with pytest.raises(InputError) as caught:
        load_config(None, [f"lr={text}"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_settings_are_read_as_people_write_them():
    text = "steps: 10\nlr: 1e-4\nout: 2026-11-28\nbad: 2001-13-45\nbase: &b {x: 0x10}\nmore: {<<: *b, y: 2.5}\nno: ~"
    assert parse_yaml(text) == {
        "steps": 10,
        "lr": 1e-4,
        "out": "2026-11-28",
        "bad": "2001-13-45",
        "base": {"x": 16},
        "more": {"x": 16, "y": 2.5},
        False: None,  # YAML 1.1 reads the key as a truth value
    }
    assert load_config(None, ["out=2026-11-28"]).out == "2026-11-28"
    assert parse_yaml("") is None


@given(st.recursive(st.integers() | st.booleans() | st.text(string.ascii_letters), st.lists, max_leaves=20))
def test_plain_values_are_read_as_pyyaml_reads_them(value):
    text = yaml.safe_dump({"a": value})
    assert parse_yaml(text) == yaml.safe_load(text)


@given(st.text(alphabet="-:[]{}&*!|>'\"%@`#,? \n\tab01._~<=", max_size=200))
@example("a: !!null b")
def test_any_text_is_a_value_or_one_line(text):
    assert "\n" not in reason(text)


def test_a_pipe_or_a_large_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, reason in ((tmp_path / "pipe.yaml", "a device or a pipe"), ("/dev/zero", "a device or a pipe")):
        with pytest.raises(InputError, match=reason):
            read_yaml(path)
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="bytes, more than"):
        read_yaml(tmp_path / "large.yaml")
