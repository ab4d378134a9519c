"""Put faults into the code one at a time, and see whether the tests notice (mutation testing).

    make mutants [MUTANTS="--draw 50 --seed 1"]

The faults are those that people thought of, listed in benchmarks/mutants.toml, and a sample, drawn by a seed, of all
that mutmut generates for the files that pyproject.toml names. Faults in `raise` statements are left out: they change a
message. Each fault is put into a copy of the repository, and only the tests that run the changed lines are started, the
quickest first, until one fails. The copy has no reference arrays beside it, so the score is that of a bare clone. What
survives is printed; benchmarks/mutants.toml says why some of it is left alive. Dated results: benchmarks/results/.

Needs the extra `mutants`, and a system that forks.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import coverage
import pytest
from hypothesis import Phase, settings
from libcst.metadata import MetadataWrapper, PositionProvider
from machine import machine
from mutmut.configuration import config
from mutmut.mutation.file_mutation import create_mutations

ROOT = Path(__file__).resolve().parent.parent
LISTED = Path(__file__).with_suffix(".toml")  # faults by hand, and survivors that are known, with the reason
# Tests of single functions and of single steps. Others reach the same lines through whole runs, which take too long to
# be repeated for every fault.
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "augmentation caption_metrics ceiling closeups decoding detection_tokenizer keypoint_tokenizer metrics model "
        "segmentation_tokenizer settings skeletons task_answers task_examples text training training_speed vocab"
    ).split()
)
# Imported once, before processes are forked: they take seconds, and none of them imports pix2seq.
HEAVY = "albumentations cv2 nltk omegaconf pandas pycocotools.coco sentencepiece timm torch.utils.tensorboard".split()
SECONDS_OF_TESTS = 8  # processor time of the tests that are started for a fault
SLOWEST_TEST = 3.0  # seconds of processor time; slower tests are not started
MAX_BYTES = 8 << 30  # of memory of one process; a fault may ask for any amount


@dataclass(frozen=True)
class Fault:
    """A change of one file, and its first and last changed line, from 1."""

    file: str
    old: str  # the changed lines
    new: str
    lines: tuple[int, int]
    about: str = ""  # what it breaks, where a person wrote it
    source: str = field(default="", repr=False)  # the content of the changed file


@dataclass(frozen=True)
class Covered:
    """What the tests run when nothing is broken."""

    seconds: dict[str, float]  # processor time by test
    by_line: dict[str, dict[int, list[str]]]  # by file and line: tests that run it, and files whose fixtures do

    def tests(self, fault: Fault) -> list[str]:
        """Return the tests to start for a fault, the quickest first: those that run its lines, then its module."""
        lines = self.by_line.get(fault.file, {})
        first, last = fault.lines
        running = {name for line in range(first, last + 1) for name in lines.get(line, ())}
        if not running - {""}:  # code of a module or class runs once, when the first test imports it
            running |= {name for names in lines.values() for name in names}
        near = [name for name in self.seconds if name in running]
        setups = [name for name in self.seconds if name not in running and name.partition("::")[0] in running]
        chosen, total = [], 0.0
        for name in sorted(near, key=self.seconds.__getitem__) + sorted(setups, key=self.seconds.__getitem__):
            total += self.seconds[name]
            if total <= SECONDS_OF_TESTS and self.seconds[name] <= SLOWEST_TEST:
                chosen.append(name)
        return chosen


def draw_faults(tree: Path, count: int, seed: int) -> tuple[list[Fault], int]:
    """Draw faults from all that mutmut generates; return them, in the order of the code, and the number of all.

    A fault's place in the draw depends on itself alone, so that a seed draws mostly the same faults of changed code.
    """
    generated: list[tuple[bytes, str, str, str]] = []
    for path in _files(tree):
        code = path.read_text(encoding="utf-8")
        messages = [
            range(node.lineno, (node.end_lineno or node.lineno) + 1)
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Raise)
        ]
        file, starts = path.relative_to(tree).as_posix(), [0, *itertools.accumulate(map(len, code.splitlines(True)))]
        module, mutations, _, _ = create_mutations(file, code)
        positions = MetadataWrapper(module, unsafe_skip_copy=True).resolve(PositionProvider)
        alike: Counter[str] = Counter()
        for mutation in mutations:
            where = positions[mutation.original_node]
            if any(where.start.line in message for message in messages):
                continue
            first, last = (starts[edge.line - 1] + edge.column for edge in (where.start, where.end))
            new = module.code_for_node(mutation.mutated_node)
            words = "\0".join([str(seed), file, code[first:last], new])
            alike[words] += 1
            rank = hashlib.sha256(f"{words}\0{alike[words]}".encode()).digest()
            generated.append((rank, file, code, code[:first] + new + code[last:]))
    drawn: list[Fault] = []
    for _, file, code, changed in sorted(generated):
        fault = _fault(file, code, changed)
        if fault is not None and _compiles(changed):
            drawn.append(fault)
        if len(drawn) == count:
            break
    return sorted(drawn, key=lambda fault: (fault.file, fault.lines)), len(generated)


def listed_faults(tree: Path) -> list[Fault]:
    """Return the faults that people listed. Raises `ValueError` for one that does not fit the code any more."""
    found = []
    for entry in _listed()["fault"]:
        code = (tree / entry["file"]).read_text(encoding="utf-8")
        if code.count(entry["old"]) != 1:
            raise ValueError(
                f"{LISTED.name}: {entry['old']!r} occurs {code.count(entry['old'])} times in {entry['file']}"
            )
        fault = _fault(entry["file"], code, code.replace(entry["old"], entry["new"]), about=entry["about"])
        assert fault is not None
        found.append(fault)
    return found


def _listed() -> dict[str, list[dict[str, str]]]:
    listed: dict[str, list[dict[str, str]]] = tomllib.loads(LISTED.read_text(encoding="utf-8"))
    return listed


def _fault(file: str, code: str, changed: str, about: str = "") -> Fault | None:
    """Describe a change, None if nothing changed."""
    before, after = code.splitlines(), changed.splitlines()
    edits = [edit for edit in difflib.SequenceMatcher(None, before, after, False).get_opcodes() if edit[0] != "equal"]
    if not edits:
        return None
    first, last = edits[0], edits[-1]
    old, new = before[first[1] : last[2]], after[first[3] : last[4]]
    text = lambda lines: "\n".join(line.strip() for line in lines)  # noqa: E731
    return Fault(file, text(old), text(new), (first[1] + 1, max(last[2], first[1] + 1)), about, changed)


def _files(tree: Path) -> list[Path]:
    paths = [tree / path for path in config().source_paths]
    return sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


class _Recorder:
    """A pytest plugin that records which tests run which lines, and how long they take."""

    def __init__(self, tree: Path, out: Path) -> None:
        self.tree, self.out = tree, out
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{tree}/pix2seq/*", f"{tree}/tokenizers/*"]
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: set[str] = set()

    def pytest_sessionstart(self) -> None:
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._recorded(item, item.nodeid.partition("::")[0]))  # fixtures serve all tests of a file

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._recorded(item, item.nodeid))

    def _recorded(self, item: pytest.Item, context: str) -> Iterator[None]:
        self.coverage.switch_context(context)
        started = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] += time.process_time() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        by_line = {
            Path(file).relative_to(self.tree).as_posix(): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        seconds = {name: value for name, value in self.seconds.items() if name in self.passed}
        self.out.write_text(json.dumps({"seconds": seconds, "by_line": by_line}), encoding="utf-8")


class _Chosen:
    """A pytest plugin that runs these tests only, in this order. Hypothesis reports its first failure as it is."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests = tests

    def pytest_configure(self) -> None:
        quick = settings(settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
        settings.register_profile("mutants", quick)
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.tests if name in by_name]


def _pytest(tree: Path, files: Sequence[str], plugin: object, cpu_seconds: float) -> None:
    """Run tests of a copy in this process, which is a forked one, and end it with pytest's exit code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 6))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path[:] = [
        str(tree),
        *(entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "benchmarks")),
    ]
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[plugin]))


def _start(tree: Path, files: Sequence[str], plugin: object, cpu_seconds: float) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, files, plugin, cpu_seconds))
    process.start()
    return process


def copy_repository(folder: Path) -> Path:
    """Copy the files that git knows, with the folders beside pix2seq/ in their places as subpackages."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for name in ("tokenizers", "train", "infer", "configs"):
        (tree / "pix2seq" / name).symlink_to(Path("..") / name)
    return tree


def record(tree: Path) -> Covered:
    """Run the tests on the code as it is. Raises `RuntimeError` if one fails."""
    out = tree.parent / "covered.json"
    files = [name for name in TESTS if (tree / name).exists()]
    process = _start(tree, files, _Recorder(tree, out), cpu_seconds=3600)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"tests fail before any fault:\n{_output(tree)}")
    content = json.loads(out.read_text(encoding="utf-8"))
    by_line = {file: {int(line): names for line, names in lines.items()} for file, lines in content["by_line"].items()}
    return Covered(content["seconds"], by_line)


def require_survival(fault: Fault, covered: Covered, tree: Path) -> None:
    """Raise `RuntimeError` if the tests of a fault fail without it: then every fault would seem to be killed."""
    tests = covered.tests(fault)
    process = _start_tests(tree, tests, _limit(tests, covered))
    process.join()
    if process.exitcode:
        raise RuntimeError(f"tests fail in a copy without a fault:\n{_output(tree)}")


def judge(faults: Sequence[Fault], covered: Covered, tree: Path, jobs: int) -> list[str]:
    """Return for each fault whether it was killed, timed out, survived, or is run by no test."""
    trees = [tree, *(Path(shutil.copytree(tree, tree.with_name(f"tree{i}"), symlinks=True)) for i in range(1, jobs))]
    sys.dont_write_bytecode = True  # a file of the same second and size would be taken for the one before
    verdicts = [""] * len(faults)
    waiting = list(enumerate(faults))
    running: dict[Path, tuple[int, Fault, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, fault = waiting.pop(0)
            tests = covered.tests(fault)
            if not tests:
                verdicts[number] = "not run by a test"
                _tell(verdicts[number], fault)
                continue
            free = next(each for each in trees if each not in running)
            (free / fault.file).write_text(fault.source, encoding="utf-8")
            limit = _limit(tests, covered)
            running[free] = (number, fault, _start_tests(free, tests, limit), time.monotonic() + 20 * limit)
        connection.wait([process.sentinel for _, _, process, _ in running.values()], timeout=5)
        for each, (number, fault, process, deadline) in list(running.items()):
            if process.is_alive() and time.monotonic() < deadline:
                continue
            verdicts[number] = _verdict(process)
            _tell(verdicts[number], fault)
            shutil.copy2(tree.parent / "clean" / fault.file, each / fault.file)
            del running[each]
    return verdicts


def _start_tests(tree: Path, tests: Sequence[str], limit: float) -> BaseProcess:
    return _start(tree, list(dict.fromkeys(name.partition("::")[0] for name in tests)), _Chosen(tests), limit)


def _limit(tests: Sequence[str], covered: Covered) -> float:
    """Seconds of processor time after which tests are taken to hang."""
    return 20 + 5 * sum(covered.seconds[name] for name in tests)


def _output(tree: Path) -> str:
    return (tree / "output.txt").read_text(encoding="utf-8", errors="replace")[-4000:]


def _verdict(process: BaseProcess) -> str:
    timed_out = process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what the tests started
    process.join()
    if timed_out:
        return "timed out"
    return "survived" if process.exitcode == pytest.ExitCode.OK else "killed"


def _tell(verdict: str, fault: Fault) -> None:
    shown = "" if verdict == "killed" else f" {fault.file}:{fault.lines[0]}\n- {fault.old}\n+ {fault.new}"
    print(f"{verdict}{shown}", flush=True)


def summary(
    faults: Sequence[Fault], verdicts: Sequence[str], reasons: Mapping[tuple[str, str, str], str]
) -> dict[str, Any]:
    """Count verdicts, and list what is alive. A fault that times out counts as killed."""
    counts = Counter(verdicts)
    alive = [
        {key: value for key, value in asdict(fault).items() if key != "source" and value}
        | {"verdict": verdict, "reason": reasons.get((fault.file, fault.old, fault.new), "")}
        for fault, verdict in zip(faults, verdicts, strict=True)
        if verdict not in ("killed", "timed out")
    ]
    killed = counts["killed"] + counts["timed out"]
    return {
        "faults": len(faults),
        "killed": killed,
        "timed_out": counts["timed out"],
        "score": killed / max(len(faults), 1),
        "alive": alive,
    }


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", type=int, default=200, help="generated faults to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults to try side by side")
    parser.add_argument("--alive", type=Path, metavar="JSON", help="try only what was alive in an earlier result")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    os.chdir(ROOT)  # where mutmut looks for its settings
    for name in HEAVY:
        importlib.import_module(name)
    os.environ["CI"] = "1"  # hypothesis draws the same examples every time

    with tempfile.TemporaryDirectory() as folder:
        tree = copy_repository(Path(folder).resolve())
        shutil.copytree(tree, tree.with_name("clean"), symlinks=True)
        started = time.perf_counter()
        listed = listed_faults(tree)
        drawn, generated = draw_faults(tree, args.draw, args.seed)
        print(f"{len(listed)} faults by hand, {len(drawn)} of {generated} generated ones", flush=True)
        if args.alive:
            earlier = json.loads(args.alive.read_text(encoding="utf-8"))
            alive = {(a["file"], a["old"], a["new"]) for part in ("by_hand", "drawn") for a in earlier[part]["alive"]}
            listed, drawn = ([f for f in some if (f.file, f.old, f.new) in alive] for some in (listed, drawn))
        covered = record(tree)
        print(
            f"{len(covered.seconds)} tests pass, in {sum(covered.seconds.values()):.0f} s of processor time", flush=True
        )
        faults = [*listed, *drawn]
        for fault in faults[:1]:
            require_survival(fault, covered, tree)
        verdicts = judge(faults, covered, tree, args.jobs)
    reasons = {(e["file"], e["old"], e["new"]): e["reason"] for e in _listed().get("alive", [])}
    result = {
        "benchmark": "mutants",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python benchmarks/mutants.py", *argv]),
        "machine": machine(),
        "seed": args.seed,
        "tests": len(covered.seconds),
        "generated": generated,
        "by_hand": summary(listed, verdicts[: len(listed)], reasons),
        "drawn": summary(drawn, verdicts[len(listed) :], reasons),
        "seconds": round(time.perf_counter() - started),
    }
    print(f"by hand {result['by_hand']['score']:.3f}, drawn {result['drawn']['score']:.3f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1:])
