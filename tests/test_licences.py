"""The licences of the installed packages that the lock names: all of them let anyone use this project for anything."""

import importlib.metadata
import re

import pytest
from packaging.utils import canonicalize_name
from test_packaging import pinned

# As whole terms of a licence, by its SPDX name or in the words of older metadata. Of MPL, only changes of its own files
# have to be published.
ALLOWED = re.compile(
    r"(0BSD|BSD|FreeBSD|(the )?(2-|3-)?(clause )?BSD( license)?|BSD-[23]-Clause(-[A-Za-z]+)?|MIT( license)?"
    r"|MIT-CMU|HPND|Apache( Software License|[- ]2\.0( License)?)|LLVM-exception|ISC( License)?( \(ISCL\))?|Zlib"
    r"|CC0-1\.0|BSL-1\.0|Unlicense|PSF-2\.0|Python-2\.0|Python Software Foundation License|CNRI-Python|Unicode-3\.0"
    r"|NCSA|MPL-2\.0|Mozilla Public License 2\.0 \(MPL 2\.0\))",
    re.IGNORECASE,
)
# CUDA's libraries, which come with PyTorch for Linux: free to use and to pass on with a program.
NVIDIA = re.compile(r"(nvidia|cuda)-.*")
WITHOUT_METADATA = {"pycocoevalcap"}  # BSD, says the licence file in its repository


def licences(distribution: importlib.metadata.Distribution) -> list[str]:
    """The terms of a package's licence; the parts of an expression are told apart."""
    metadata = distribution.metadata
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    classifiers = [line for line in classifiers if line != "OSI Approved"]
    stated = metadata.get("License-Expression") or (metadata.get("License") or "").strip().split("\n")[0]
    if metadata.get("License-Expression") or not classifiers:
        return [term for term in re.split(r" AND | OR | WITH |[()]{1,2}(?= |$)|^\(+", stated) if term.strip()]
    return classifiers


def unknown_terms(name: str) -> list[str]:
    try:
        found = licences(importlib.metadata.distribution(name))
    except importlib.metadata.PackageNotFoundError:  # for another system or another version of Python
        return []
    if NVIDIA.fullmatch(name) or name in WITHOUT_METADATA:
        return []
    return [term.strip() for term in found if not ALLOWED.fullmatch(term.strip())] if found else ["none stated"]


def test_every_locked_package_has_a_licence_that_asks_for_nothing() -> None:
    found = {name: unknown_terms(name) for name in sorted({canonicalize_name(pin.name) for pin in pinned()})}
    assert {name: terms for name, terms in found.items() if terms} == {}


@pytest.mark.parametrize("text", ["GPL-3.0-only", "MIT AND AGPL-3.0", "LGPL-2.1 OR GPL-2.0", "Proprietary", "UNKNOWN"])
def test_other_licences_are_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        metadata = importlib.metadata.distribution("pytest").metadata

    del (
        Distribution.metadata["License-Expression"],
        Distribution.metadata["Classifier"],
        Distribution.metadata["License"],
    )
    Distribution.metadata["License-Expression"] = text
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    assert unknown_terms("some-package")
