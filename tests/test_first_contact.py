"""What a newcomer types first: no arguments, --help, --version, and completion in a shell."""

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from pix2seq.cli import LABEL_FORMATS, SHELLS, _actions, main, make_parser
from pix2seq.data.formats.predictions import FORMATS

HEAVY = ("torch", "timm", "torchvision", "numpy", "cv2", "pandas", "PIL", "omegaconf", "yaml", "shtab")


def commands():
    """The words of every command, those of `data` included."""
    (top,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in top.choices.items():
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        yield [name]
        yield from ([name, each] for action in inner for each in action.choices)


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_a_command_without_arguments_shows_its_help(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {' '.join(['pix2seq', *arguments])} ")
    assert "COMMAND" in shown


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pix2seq {importlib.metadata.version('pix2seq')}\n"


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_ends_with_examples_that_parse(words):
    parser = make_parser()
    for word in words:
        (inner,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = inner.choices[word]
    *_, last = parser.format_help().strip().split("\n\n")
    head, *examples = last.splitlines()
    assert head == "examples:"
    assert examples
    for example in examples:
        typed = shlex.split(example.partition(" > ")[0].partition("#")[0])
        assert typed[: 1 + len(words)] == ["pix2seq", *words] or words == ["data"]
        args, others = make_parser().parse_known_args(typed[1:])
        assert hasattr(args, "run")
        assert all("=" in word for word in others)


def test_help_takes_less_than_a_second_and_loads_no_library():
    code = (
        "import json, os, sys\n"
        "from pix2seq.cli import main\n"
        "try: main(['predict', '--help'] if sys.argv[1:] else ['--help'])\n"
        "except SystemExit: pass\n"
        "times = os.times()\n"
        "print(json.dumps([times.user + times.system, sorted(sys.modules)]))"
    )
    for more in ([], ["predict"]):
        done = subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True, check=True)
        seconds, modules = json.loads(done.stdout.splitlines()[-1])
        assert not set(HEAVY) & set(modules)
        assert seconds < 1  # of a core, however busy the machine is


def test_options_name_the_formats_that_there_are():
    assert tuple(FORMATS) == LABEL_FORMATS


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("predict", "sequences", "min-score", "labelstudio"):
        assert word in script
    program = shutil.which(shell)
    if shell in ("bash", "zsh", "fish") and program is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True)


def test_bash_completes(capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    main(["completion", "bash"])
    ask = 'COMP_WORDS=(pix2seq pre); COMP_CWORD=1; _shtab_pix2seq pix2seq pre pix2seq; echo "${COMPREPLY[@]}"'
    script = f"{capsys.readouterr().out}\n{ask}"
    done = subprocess.run([bash], input=script, text=True, capture_output=True, env=os.environ)
    assert done.stdout.split() == ["predict"], done.stderr


def test_files_are_completed_where_a_path_is_expected():
    paths = [action for action in _actions(make_parser()) if action.type is not None and action.type.__name__ == "Path"]
    assert {"checkpoint", "data", "out"} <= {action.dest for action in paths}
