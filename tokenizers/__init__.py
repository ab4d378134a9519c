"""Convert labels to token ids and back, in one pure file per task; imported as `pix2seq.tokenizers`."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _load_hugging_face() -> None:
    """Replace this module by the installed package of the same name.

    In the repository's root, `import tokenizers` finds this folder first, also from packages that
    need Hugging Face's, such as `transformers`.
    """
    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            "Hugging Face's package tokenizers is not installed (pip install tokenizers); "
            f"{Path(__file__).parent} is part of this project and imported as pix2seq.tokenizers",
            name=__name__,
        )
    module = module_from_spec(spec)
    sys.modules[__name__] = module  # the import statement returns it and searches it for submodules
    spec.loader.exec_module(module)


if __name__ == "tokenizers":
    _load_hugging_face()
