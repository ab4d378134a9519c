"""Which COCO annotation files belong to a split.

Files are taken from `annotations/`, from the data folder and from folders of a split, in this order. A name says its
kind (`instances`, `person_keypoints`, `captions`; without one it has objects) and its split: `instances_val2017.json`,
`val_coco.json`, `valid/_annotations.coco.json`. Of several files for one split, the best one by this rule is taken:

1. the name asked for: `train`, then another word for it: `val`, `valid`, `validation`;
2. a year: `train2017`, of several the latest;
3. anything else, such as `train_v2`, if it is the only one;
4. for `train`, a file that names no split, such as `result.json` or `instances_default.json`, if it is the only one.

Other kinds are taken with the same name of the split, else with rule 1. A file whose name has the words of two splits
belongs to neither. The choice is reported where others were left out, and `annotations=FILE` chooses another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pix2seq.data.splits import WORDS, is_known, words_for
from pix2seq.errors import InputError

KINDS = ("instances", "person_keypoints", "captions")
_OTHERS = ("panoptic", "stuff", "image_info")  # COCO's files of other tasks
_NOISE = r"person_keypoints?|keypoints?|captions?|instances?|annotations?|labels?|coco"
_HEAD_BYTES = 300


@dataclass(frozen=True)
class CocoFiles:
    """The annotation files of a split."""

    files: dict[str, Path]  # by kind, in the order of `KINDS`
    split: str  # its name in the first file, such as `train2017` for `train`
    left_out: tuple[Path, ...] = ()  # other files that could be meant

    @property
    def first(self) -> Path:
        """The file that counts if files disagree."""
        return next(iter(self.files.values()))


@dataclass(frozen=True)
class _Candidate:
    path: Path
    kind: str
    split: str  # as in the name, lower case; empty if it names none
    variant: str  # the name without its kind


def find_files(root: Path, split: str, annotations: str | Path | None = None) -> CocoFiles | None:
    """Return the annotation files of a split, None if there are none.

    `annotations` chooses one file, absolute or below `root`; files of other kinds with the same split go with it.
    Raises `InputError` if that file does not exist, or if several files could be meant and no rule chooses.
    """
    candidates = list(_candidates(root, split))
    if annotations is not None:
        path = root / annotations
        if not path.is_file():
            raise InputError(f"annotations={annotations}: {path} is no file; give a COCO file, from {root} or in full")
        chosen = _candidate(path, split, 0)
        others = [c for c in candidates if chosen.split and c.split == chosen.split and c.kind != chosen.kind]
        return _pick([chosen, *others], chosen.split or split)
    ranks = {c: rank for c in candidates if (rank := _rank(c.split, split)) is not None}
    some = list(ranks)
    if not some and split in words_for(WORDS[0][0]):
        some = [c for c in candidates if not c.split]
    if not some:
        return None
    main = [c for c in some if c.kind == min((c.kind for c in some), key=KINDS.index)]
    least = min((ranks[c] for c in main if c in ranks), default=None)
    best = [c for c in main if ranks.get(c) == least]
    if len({c.split or c.variant for c in best}) > 1:
        listed = ", ".join(c.path.relative_to(root).as_posix() for c in best)
        raise InputError(
            f"{root} has several annotation files that may be those of split {split!r}: {listed}; choose with "
            "annotations=FILE, or --annotations FILE"
        )
    name = best[0].split
    same = [c for c in some if c.split == name]
    plain = [c for c in some if c.split in words_for(split)]
    rest = some if name in words_for(split) and len({c.split for c in some} - {name}) == 1 else []
    return _pick([*best, *same, *plain, *rest], name or split, some)


def find_coco_splits(root: Path) -> list[str]:
    """Return the names of the splits that have annotation files: train, val and test first, then others."""
    candidates = list(_candidates(root))
    splits, taken = [], set()
    for name, *_ in WORDS:
        of_split = [c for c in candidates if _rank(c.split, name) is not None]
        taken.update(of_split)
        splits += [name] if of_split else []
    if WORDS[0][0] not in splits and any(not c.split for c in candidates):
        return [WORDS[0][0], *splits, *sorted({c.split for c in candidates if c.split and c not in taken})]
    return splits + sorted({c.variant for c in candidates if c not in taken})


def _pick(candidates: Sequence[_Candidate], split: str, among: Sequence[_Candidate] = ()) -> CocoFiles:
    """Take the first file of each kind; the rest of `among` is left out."""
    files: dict[str, Path] = {}
    for kind in KINDS:
        of_kind = [c for c in candidates if c.kind == kind]
        if of_kind:
            files[kind] = of_kind[0].path
    among = sorted(among, key=lambda c: KINDS.index(c.kind))
    left_out = dict.fromkeys(c.path for c in among if c.path not in files.values())
    return CocoFiles(files, split, tuple(left_out))


def _candidates(root: Path, split: str = "") -> Iterator[_Candidate]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    places = [(0, path) for path in folders if path.name.lower() in ("annotations", "annotation")]
    places.append((1, root))
    places += [(2, path) for path in folders if is_known(path.name) or path.name == split]
    for place, folder in places:
        for path in sorted(folder.glob("*.json"), key=lambda path: (not path.name.startswith(KINDS), path.name)):
            if not path.name.startswith(_OTHERS) and (path.name.startswith(KINDS) or _looks_like_coco(path)):
                yield _candidate(path, split, place)


def _candidate(path: Path, split: str, place: int) -> _Candidate:
    stem = path.stem.lower()
    kind = next((kind for kind in KINDS[1:] if kind.rpartition("_")[2].rstrip("s") in stem), KINDS[0])
    variant = re.sub(_NOISE, "", stem).strip("-_. ") or stem
    name = _split_in(variant, split.lower())
    if not name and place == 2:
        name = path.parent.name.lower()
    return _Candidate(path, kind, name, variant)


def _split_in(variant: str, split: str) -> str:
    """Return the part of a file's name that names a split: from its word on, all of it where it is unclear, or none."""
    words = [word for group in WORDS for word in group]
    groups = {group for group in WORDS if any(word in variant for word in group)}
    if len(groups) > 1 and variant != split:
        return variant
    bounded = "|".join([*([re.escape(split)] if split else []), *(rf"{word}(?![a-z])" for word in words)])
    found = re.search(rf"(?<![a-z0-9])({bounded})", variant)
    if found:
        return variant[found.start() :]
    return variant if groups else ""


def _rank(name: str, split: str) -> tuple[int, int] | None:
    """Return how well a name fits a split, less is better; None if it is that of another one."""
    words = words_for(split)
    if name in words:
        return 0, words.index(name)
    for word in words if name else ():
        rest = name.removeprefix(word)
        if rest != name and re.fullmatch(r"[-_]?\d+", rest) and is_known(split) and not split[-1].isdigit():
            return 1, -int(rest.lstrip("-_"))
        if rest != name and not rest[0].isalnum() and sum(any(w in name for w in group) for group in WORDS) < 2:
            return 2, 0
    return None


def _looks_like_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return True  # its reader says what is wrong
    return re.match(rb'\s*\{\s*"(info|licenses|images|annotations|categories|type)"', head) is not None
