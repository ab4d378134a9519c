"""The architecture, checked on syntax trees: which room imports which, who names a task, what needs only NumPy.

A room is a module or package right below `pix2seq`. Each test lists all offenders as `file:line: what`.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]

# From low to high. A room may import itself, lower rooms, and rooms of its own level unless bars keep them apart.
LEVELS = [
    "errors files device settings",
    "types",
    "vocab",
    "geometry",
    "tokenizers drawing charts results",
    "examples",
    "data | model | metrics",
    "tasks",
    "session",
    "predictor convert runtime",
    "evaluation rehearsal",
    "training",
    "sequences infer demo export onnx_export report calibrate train search caption_filter",
    "web",
    "cli",
]
# Of the lower rooms.
MODEL_USES = ("errors", "files", "device", "settings", "types", "vocab", "geometry", "tokenizers.text")
LAZY_ROOM = "cli"  # it imports inside functions to keep --help quick; those imports may go anywhere
NUMPY_ONLY = ("vocab", "geometry", "tokenizers")
NOT_NUMPY_ONLY = "tokenizers.text"  # it reads sentencepiece models

TASK = re.compile(
    r"(?<![a-z_-])(detection|segmentation|keypoint|captioning|prompted|by_example|by_words|matching)(?![a-z_])"
    r"|\b(Detection|Segmentation|Keypoint|Captioning|Prompted|ByExample|ByWords|Matching)(Config)?\b"
)
TASK_ROOMS = ("tasks", "tokenizers", "configs", "train", "convert", "vocab", "metrics")
NAMED = ("detect", "segment", "keypoints", "caption")  # each names its task
CLICKED = ("click", "everything", "session")  # these too
SAID = ("match", "embed_text")
CAN = ("can_match", "can_find_like", "can_find_words")
FOUND = ("find",)
TASK_METHODS = {"pix2seq.predictor": NAMED + CLICKED + SAID + CAN + FOUND, "pix2seq.runtime.runner": NAMED}
COCO_KEY = "segmentation"  # a key of COCO's files, allowed in the rooms and methods below
COCO_ROOMS = ("data.formats", "data.shapes", "data.things")
COCO_METHODS = {"pix2seq.types": "to_json", "pix2seq.results": "to_coco"}


def read_modules():
    """Path and syntax tree of each module by its import name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            modules[name] = path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))
    return modules


MODULES = read_modules()


def within(module, rooms):
    return any(f"{module}.".startswith(f"pix2seq.{room}.") for room in rooms)


def is_ours(name):
    return name.split(".")[0] == "pix2seq"


def nodes(tree, skips=lambda node: False):
    """The nodes below `tree`, without those that `skips` names, and without main guards, which only scripts run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)) and not skips(node):
            yield node
            yield from nodes(node, skips)


def is_function(node):
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imports(module, skips=lambda node: False):
    """The modules that a module imports, each with the line of its first import."""
    found = {}
    for node in nodes(MODULES[module][1], skips):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{MODULES[module][0]}:{node.lineno}: relative import"
            modules = [f"{node.module}.{name}" for name in names]
            names = [module if module in MODULES else node.module for module in modules]
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def may_import(module, imported):
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms.replace("|", "").split()}
    room, target = module.split(".")[1], (*imported.split("."), "")[1]
    if target not in level:
        return False  # the package itself, which hides the module, or a room without a level
    if room == "model" != target:
        return within(imported, MODEL_USES)
    beside = level[target] == level[room] and "|" not in LEVELS[level[room]]
    return room == target or level[target] < level[room] or beside


def report(offenders):
    lines = list(dict.fromkeys(offenders))
    assert not lines, "\n".join(["", *lines])


def test_imports_never_climb():
    report(
        f"{path}:{line}: imports {name}"
        for module, (path, _) in MODULES.items()
        if module != "pix2seq"  # it lists what users import
        for name, line in imports(module, is_function if within(module, [LAZY_ROOM]) else lambda node: False).items()
        if is_ours(name) and not may_import(module, name)
    )


def test_no_imports_form_a_circle():
    graph = {module: imports(module) for module in MODULES if module != "pix2seq"}

    def find_path(start, goal, seen):
        if start == goal or start in seen:
            return [goal] if start == goal else None
        seen.add(start)
        rests = (find_path(step, goal, seen) for step in graph.get(start, {}))
        return next(([start, *rest] for rest in rests if rest), None)

    report(
        f"{MODULES[module][0]}:{line}: {' -> '.join([module, *path])}"
        for module, imported in graph.items()
        for name, line in imported.items()
        if (path := find_path(name, module, set()))
    )


def texts(node):
    """What a node says: a string without spaces, an attribute, a field, an argument, a class or a module."""
    match node:
        case ast.Constant(value=str(text)):
            return [] if re.search(r"\s", text) else [text]
        case ast.Attribute(attr=name) | ast.AnnAssign(target=ast.Name(id=name)) | ast.keyword(arg=str(name)):
            return [name]
        case ast.Name(id=name):
            return [name] if name[0].isupper() else []
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names):
            return [f"{module}.{alias.name}" for alias in names]
    return []


def names_of_tasks(module):
    def skips(node):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return is_docstring or (is_function(node) and getattr(node, "name", "") in TASK_METHODS.get(module, ()))

    path, tree = MODULES[module]
    methods = [node for node in ast.walk(tree) if getattr(node, "name", "") == COCO_METHODS.get(module, 0)]
    says_keys = {id(node) for part in ([tree] if within(module, COCO_ROOMS) else methods) for node in ast.walk(part)}
    for node in nodes(tree, skips):
        for text in filter(TASK.search, texts(node)):
            if text != COCO_KEY or id(node) not in says_keys:
                yield f"{path}:{node.lineno}: {text}"


def test_only_the_rooms_of_tasks_name_one():
    report(line for module in MODULES if not within(module, TASK_ROOMS) for line in names_of_tasks(module))


def test_vocab_geometry_and_tokenizers_load_only_numpy():
    def skips(node):
        return is_function(node) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))

    todo = [module for module in MODULES if within(module, NUMPY_ONLY) and not within(module, [NOT_NUMPY_ONLY])]
    needed_by = {module: module for module in todo}
    offenders = []
    while todo:
        module = todo.pop()
        for name, line in imports(module, skips).items():
            if is_ours(name):  # importing a module runs the packages around it too
                loaded = [name[: end.start()] for end in re.finditer(r"\.|$", name)]
                todo += [other for other in loaded if other not in needed_by]
                needed_by = dict.fromkeys(loaded, needed_by[module]) | needed_by
            elif name.split(".")[0] not in {*sys.stdlib_module_names, "numpy"}:
                offenders.append(f"{MODULES[module][0]}:{line}: imports {name}, for {needed_by[module]}")
    report(offenders)
