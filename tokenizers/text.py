"""Text tokenizers: words split by nltk, or the pieces of a sentencepiece model.

Ids run from 0 to `size` - 1; `captioning.py` adds the vocabulary's text offset. Both tokenizers built
here use 0 for padding, 1 for the end and 2 for unknown words, like the published sentencepiece model.
A checkpoint folder holds one of two files: `text_vocab.json` (words) or `text.model` (sentencepiece).

Reference: google-research/pix2seq, `data/tokenizer.py`; sentencepiece, arXiv 1808.06226.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from pix2seq.errors import InputError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
UNKNOWN = "\u2047"  # text of an unknown word: a double question mark, as in sentencepiece

WORD_FILE = "text_vocab.json"
SENTENCEPIECE_FILE = "text.model"

# ASCII punctuation, Latin-1 signs, general punctuation (dashes, curly quotes), CJK and full-width
# punctuation. Everything else belongs to words, also combining marks, which `\w` excludes.
_MARKS = r"!-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u2027\u2030-\u205e\u3001-\u303f\uff01-\uff0f"
_MARK = re.compile(f"[{_MARKS}]")
# English words that a left-right flip makes false. Others that only contain them ("bright", "upright") are true.
_SIDE = re.compile(r"\b(?:left|right)(?:most|ward|wards|hand|handed|side)?\b|clockwise\b", re.IGNORECASE)


class TextTokenizer(Hashable, Protocol):
    """The interface of a text tokenizer."""

    @property
    def size(self) -> int:
        """The number of ids, which start at 0."""

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""

    @property
    def tokens(self) -> Sequence[str]:
        """The text of each id."""

    @property
    def first_piece(self) -> int:
        """The first id of text; earlier ids are padding, begin, end or unknown."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids, up to the first `eos_id`; ids out of range are skipped. Never raises."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer for `load_text_tokenizer`, and remove any other one in the folder."""


def has_text_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint folder holds a tokenizer."""
    return any((folder / name).is_file() for name in (WORD_FILE, SENTENCEPIECE_FILE))


def load_text_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer of a checkpoint folder. Raises `InputError` if there is none, two, or a damaged one."""
    words, model = folder / WORD_FILE, folder / SENTENCEPIECE_FILE
    if words.is_file() and model.is_file():
        raise InputError(
            f"{folder} holds {WORD_FILE} and {SENTENCEPIECE_FILE}, expected one tokenizer; delete one of them"
        )
    if words.is_file():
        return WordTokenizer.from_file(words)
    if model.is_file():
        return SentencePieceTokenizer.from_file(model)
    raise InputError(
        f"{folder} holds no text tokenizer; expected {WORD_FILE} or {SENTENCEPIECE_FILE}: "
        "copy it from the checkpoint that training wrote"
    )


def names_side(text: str) -> bool:
    """Return whether an English text names a side (left, rightmost, left-hand), which a flip makes false."""
    return _SIDE.search(text) is not None


class WordTokenizer:
    """Lower-case words and punctuation marks, one token each.

    The token of a mark includes the spaces around it: `", "` touches the word before, `" ("` the word
    after, `"-"` both and `" - "` neither, so decoding needs no rules of typography. Decoding restores
    every character of a caption except for case, width of spaces and unknown words.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        """`tokens` are in the order of their ids, start with `SPECIAL_TOKENS` and have no duplicates."""
        self.tokens = tuple(tokens)
        self.size = len(self.tokens)
        self.eos_id = EOS_ID
        self.first_piece = len(SPECIAL_TOKENS)
        self._ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if self.tokens[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(f"a vocabulary starts with {list(SPECIAL_TOKENS)}, got {list(self.tokens[:3])}")
        if len(self._ids) != self.size:
            raise ValueError("a token occurs twice in the vocabulary; expected distinct tokens")
        self._is_mark = [_is_mark(token) for token in self.tokens]
        # If a mark never had these spaces in training, use its most frequent form.
        self._nearest: dict[str, int] = {}
        for token_id, token in enumerate(self.tokens):
            if self._is_mark[token_id]:
                self._nearest.setdefault(token.strip(" "), token_id)

    @classmethod
    def build(
        cls, captions: Iterable[str], *, min_count: int = 1, max_size: int = 32_000, required: Iterable[str] = ()
    ) -> WordTokenizer:
        """Build the vocabulary of captions: frequent tokens first, ties in alphabetical order.

        Tokens seen fewer than `min_count` times are left out, then the rarest until at most `max_size`
        ids remain, special ones included. Those of the texts `required` come first and are always kept.
        """
        if max_size <= len(SPECIAL_TOKENS):
            raise InputError(f"a vocabulary of {max_size} ids has no room for words; give at least 4")
        counts = Counter(token for caption in captions for token in _split_words(caption))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        needed = list(dict.fromkeys(token for text in required for token in _split_words(text)))
        if len(SPECIAL_TOKENS) + len(needed) > max_size:
            raise InputError(
                f"a vocabulary of {max_size} ids has no room for the {len(needed)} words of phrases; raise its size"
            )
        kept = list(dict.fromkeys([*needed, *(token for token, count in ranked if count >= min_count)]))
        if not kept:
            raise InputError(
                f"no word occurs {min_count} times in the captions, so the vocabulary is empty; "
                "check the data set, or lower min_count"
            )
        return cls([*SPECIAL_TOKENS, *kept][:max_size])

    @classmethod
    def from_file(cls, path: Path) -> WordTokenizer:
        """Read a file written by `save`. Raises `InputError` if it is damaged."""
        try:
            tokens = json.loads(path.read_text(encoding="utf-8"))["tokens"]
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise ValueError("tokens is not a list of strings")
            return cls(tokens)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); expected a JSON object with a list of tokens: "
                "copy it again from the checkpoint that training wrote"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end token."""
        return [self._ids.get(token, self._nearest.get(token.strip(" "), UNK_ID)) for token in _split_words(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids, up to the first end token; padding and ids out of range are skipped."""
        text = ""
        touches = True  # whether the next token follows without a space
        for token_id in map(int, ids):
            if token_id == EOS_ID:
                break
            if token_id == PAD_ID or not 0 <= token_id < self.size:
                continue
            token = UNKNOWN if token_id == UNK_ID else self.tokens[token_id]
            is_mark = self._is_mark[token_id]
            if not touches and not (is_mark and not token.startswith(" ")):
                text += " "
            text += token.strip(" ")
            touches = is_mark and not token.endswith(" ")
        return text

    def save(self, folder: Path) -> None:
        """Write `text_vocab.json`."""
        content = json.dumps({"tokens": self.tokens}, ensure_ascii=False, indent=0)
        _write_tokenizer(folder, WORD_FILE, f"{content}\n".encode())


class SentencePieceTokenizer:
    """A sentencepiece model.

    Any model with an end token works. sentencepiece's default special ids (unknown 0, begin 1, end 2)
    differ from the published ones; the end token is that of the model, and a begin token is never
    written. A model without an end token is refused, because a caption could not stop.
    """

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a `.model` file. Raises `InputError` if it is damaged or has no end token."""
        import sentencepiece  # here, because words do not need it

        self._model = model
        damaged = InputError(f"its {len(model)} bytes are not a sentencepiece model; train one, or copy it again")
        if not model:  # sentencepiece accepts it and fails later
            raise damaged
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.size: int = self._processor.get_piece_size()
            for piece in range(self.size):
                self._processor.decode([piece])  # a piece that is not UTF-8 would raise only once it is generated
        except (RuntimeError, ValueError):
            raise damaged from None
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise InputError(
                "the sentencepiece model has no end token (its eos_id is -1), so a caption could not end; "
                "train it with --eos_id=1"
            )

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceTokenizer:
        """Read a `.model` file. Raises `InputError` if it cannot be used."""
        try:
            return cls(path.read_bytes())
        except OSError as error:
            reason = error.strerror or str(error)
        except InputError as error:
            reason = str(error)
        raise InputError(f"{path} cannot be used: {reason}")

    @classmethod
    def train(cls, captions: Iterable[str], size: int, *, character_coverage: float = 1.0) -> SentencePieceTokenizer:
        """Train a unigram model of at most `size` ids; the same captions give the same model.

        `character_coverage` is the share of the captions' characters that get an id; set it below one
        for languages of thousands of characters.
        """
        import sentencepiece

        sentences = [text for text in map(_replace_surrogates, captions) if text.strip()]
        if not sentences:
            raise InputError("the data set has no captions to train a sentencepiece model on; check its caption files")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=size,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                character_coverage=character_coverage,
                hard_vocab_limit=False,
                num_threads=1,  # a fixed order of sums gives the same result every time
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).rpartition("] ")[2].split()) or "no reason given"
            raise InputError(
                f"sentencepiece cannot make {size} ids of {len(sentences)} captions ({reason}); try another size"
            ) from None
        return cls(model.getvalue())

    @cached_property
    def first_piece(self) -> int:
        """The first id of text."""
        special = [i for i in range(self.size) if self._processor.is_control(i) or self._processor.is_unknown(i)]
        return next(i for i in range(self.size + 1) if i not in special)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of each id."""
        return tuple(self._processor.id_to_piece(token_id) for token_id in range(self.size))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end token."""
        return self._processor.encode(_replace_surrogates(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of any ids, up to the first end token; ids out of range are skipped."""
        readable: list[int] = []
        for token_id in map(int, ids):
            if token_id == self.eos_id:
                break
            if 0 <= token_id < self.size:
                readable.append(token_id)
        return self._processor.decode(readable)

    def save(self, folder: Path) -> None:
        """Write `text.model`."""
        _write_tokenizer(folder, SENTENCEPIECE_FILE, self._model)


def _split_words(text: str) -> list[str]:
    """Split a text into the tokens of `WordTokenizer`: lower-case words, and marks with the spaces around them."""
    # Both ends of a text count as spaces.
    text = f" {' '.join(unicodedata.normalize('NFC', _replace_surrogates(text).lower()).split())} "
    tokens: list[str] = []
    for start, end in _word_splitter().span_tokenize(text):
        token = text[start:end]
        if _is_mark(token):
            before = " " if text[start - 1] == " " else ""
            after = " " if text[end] == " " else ""
            token = before + token + after
        tokens.append(token)
    return tokens


@cache
def _word_splitter() -> Any:
    # Imported here because nltk takes seconds and most tasks have no text.
    from nltk.tokenize import RegexpTokenizer

    return RegexpTokenizer(rf"[^ {_MARKS}]+|[{_MARKS}]")


def _is_mark(token: str) -> bool:
    return _MARK.fullmatch(token.strip(" ")) is not None


def _replace_surrogates(text: str) -> str:
    # JSON can hold halves of surrogate pairs; files and sentencepiece models cannot.
    return text.encode("utf-8", "replace").decode("utf-8")


def _write_tokenizer(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    for other in {WORD_FILE, SENTENCEPIECE_FILE} - {name}:
        (folder / other).unlink(missing_ok=True)
