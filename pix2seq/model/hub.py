"""Models on the Hugging Face Hub: download one to load it, upload a folder that `pix2seq export` wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pix2seq.errors import InputError
from pix2seq.model.pretrained import CONFIG_FILE, WEIGHTS_FILE
from pix2seq.tokenizers.text import SENTENCEPIECE_FILE, WORD_FILE

FILES = (CONFIG_FILE, WEIGHTS_FILE, WORD_FILE, SENTENCEPIECE_FILE, "training.yaml", "README.md")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(path: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Return a path that exists, or the folder in the cache to which a model of the hub, USER/NAME, is downloaded.

    A path is local if the folder above it exists: a slip of the pen in the name of a run is asked of nobody. `revision`
    is a branch, tag or commit of the hub. Raises `InputError` if the hub cannot be reached, has no such model or
    revision, or the model is none of this project.
    """
    name = Path(path).as_posix()
    if not _NAME.fullmatch(name) or os.path.exists(Path(path).parent):
        return Path(path)
    with _hub_errors(name, revision):
        from huggingface_hub import snapshot_download

        # Asked for by name, so that nothing else of a repository is downloaded, whatever it holds.
        found = snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(FILES), endpoint=os.environ.get("HF_ENDPOINT")
        )
    folder = Path(found)
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{name} on the hub is no model of pix2seq: it has no {' and no '.join(missing)}")
    return folder


def push_to_hub(
    folder: str | Path,
    name: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model of pix2seq",
) -> str:
    """Upload the model in a folder, as `pix2seq export` writes it, as USER/NAME, and return its address.

    The repository is created if there is none. Of the folder, only the files of a model are uploaded: weights, config,
    words, settings and card. Raises `InputError` if there is no model, or the hub refuses it.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} has no {file}; give a folder that pix2seq export wrote")
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name on the hub; expected USER/NAME")
    with _hub_errors(name, revision, uploads=True):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, allow_patterns=list(FILES), commit_message=message
        )
    return str(address)


@contextmanager
def _hub_errors(name: str, revision: str | None, *, uploads: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into an `InputError` of one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{name} asks for its terms to be accepted; do so on its page, and give a token") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name} is neither a folder nor a model on the hub that this token may see; check the name, or log in"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} on the hub has no revision {revision!r}; name a branch, tag or commit") from None
    except errors.HFValidationError as error:
        raise InputError(f"{name!r} is no name on the hub: {error}") from None
    except errors.LocalTokenNotFoundError:
        raise InputError("the hub wants to know who you are; give a token, set HF_TOKEN, or log in") from None
    except Exception as error:
        # httpx's errors of connections, and their kin, have no type in common that all releases raise.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"{name} was not uploaded:" if uploads else f"there is no folder {name}, and"
        raise InputError(
            f"{what} the hub did not answer as expected ({reason}); check the name and the network"
        ) from error
