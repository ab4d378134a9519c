"""Text tokenizers and captions against the official arrays and their documented properties."""

import io
import json
import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.errors import InputError
from pix2seq.tokenizers.captioning import decode_caption, drop_inputs, encode_caption
from pix2seq.tokenizers.text import (
    EOS_ID,
    SENTENCEPIECE_FILE,
    UNKNOWN,
    WORD_FILE,
    SentencePieceTokenizer,
    WordTokenizer,
    load_text_tokenizer,
)
from pix2seq.vocab import NOISE, Vocab

CAPTIONS = [
    "A dog, on a mat.",
    "two dogs sit beside the man's red-and-white boat",
    'A sign that says "STOP!" (at 8:25).',
    "a cat and a dog; the cat sleeps",
]
WORDS = WordTokenizer.build(CAPTIONS)
PIECES = SentencePieceTokenizer.train(CAPTIONS, 60)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [WORDS, PIECES], ids=["words", "pieces"])


def vocab_for(tokenizer):
    return Vocab(num_text=tokenizer.size, size=3000 + tokenizer.size)


def as_written(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def coco_captions(shared):
    paths = (shared / "data/coco_mini/annotations").glob("captions_*.json")
    texts = [entry["caption"] for path in sorted(paths) for entry in json.loads(path.read_text())["annotations"]]
    assert len(texts) == 600
    return texts


@pytest.fixture(scope="module")
def official(shared):
    """Load the recorded model and, for every text, a mapping of its recorded arrays."""
    folder = shared / "parity/tasks"
    arrays = np.load(folder / "pure_tokenizer.npz")
    cases = sorted({name.split("/")[0] for name in arrays.files if "/" in name})
    rows = [{key: arrays[f"{case}/{key}"] for key in ("in/text", "out/ids", "out/roundtrip")} for case in cases]
    for row, case in zip(rows, cases, strict=True):
        row["clipped"], row["detokenized"] = arrays[f"{case}/out/clipped_ids"], arrays[f"{case}/out/detokenized"]
        row["predicted"] = arrays[f"{case}/in/pred_seq"]
    tokenizer = SentencePieceTokenizer.from_file(folder / "tokenizer/tiny_spm.model")
    assert tokenizer.size == arrays["vocab_size"]
    return tokenizer, rows


def test_the_official_texts_get_the_official_ids(official):
    tokenizer, rows = official
    assert len(rows) == 24
    for row in rows:
        text = str(row["in/text"])
        assert [*tokenizer.encode(text), tokenizer.eos_id] == row["out/ids"].tolist()
        assert tokenizer.decode(row["out/ids"]) == str(row["out/roundtrip"])
        assert tokenizer.decode(row["clipped"]) == str(row["detokenized"])


def test_official_predictions_of_text_are_read_the_same(official):
    tokenizer, rows = official
    vocab = vocab_for(tokenizer)
    num_texts = 0
    for row in rows:
        ids = row["predicted"]
        # The official code clips other ids to the first and last text id; ours skips them.
        if ((ids == 0) | ((ids >= 3000) & (ids < 3128))).all():
            num_texts += 1
            assert decode_caption(ids, tokenizer, vocab) == str(row["detokenized"])
            # Two of the recorded predictions were cut and have no end token.
            if 3001 in ids:
                written = encode_caption(str(row["in/text"]), tokenizer, vocab)
                assert written.tolist() == ids[: len(written)].tolist()
    assert num_texts >= 10


def test_dropped_inputs_equal_the_official_ones_given_the_same_draws(shared):
    arrays = np.load(shared / "parity/tasks/pure_seg_kp_cap_preprocess_batched.npz")
    cases = sorted({name.split("/")[0] for name in arrays.files if name.startswith("cap_")})
    rates = set()

    class Recorded:
        def random(self, shape):
            # A rate of 0 made no draws.
            draws = [arrays[name] for name in arrays.files if name.startswith(f"{case}/tape/")]
            drawn = draws[0] if draws else np.zeros(shape)
            assert drawn.shape == shape
            return drawn

    for case in cases:
        captions = arrays[f"{case}/in/captions"]
        prompt = np.full((*captions.shape[:-1], 1), 13)
        inputs = np.concatenate([prompt, captions], axis=-1)[..., :-1]
        rate = float(arrays[f"{case}/in/input_seq_drop_rate"])
        rates.add(rate)
        np.testing.assert_array_equal(drop_inputs(inputs, rate, Recorded()), arrays[f"{case}/out/input_seq"])
    assert rates == {0.0, 0.5, 0.9}


def test_inputs_are_dropped_at_the_given_rate():
    inputs = np.full((100, 200), 3005)
    dropped = drop_inputs(inputs, 0.5, np.random.default_rng(0))
    assert set(np.unique(dropped)) == {NOISE, 3005}
    assert abs((dropped == NOISE).mean() - 0.5) < 0.02
    assert (drop_inputs(inputs, 1.0, np.random.default_rng(0)) == NOISE).all()
    assert (inputs == 3005).all()


def test_words_restore_every_coco_caption(coco_captions):
    tokenizer = WordTokenizer.build(coco_captions)
    for caption in coco_captions:
        assert tokenizer.decode(tokenizer.encode(caption)) == as_written(caption).lower()


def test_words_restore_coco_captions_except_for_rare_words(coco_captions):
    tokenizer = WordTokenizer.build(coco_captions, min_count=3)
    known = set(tokenizer.tokens)
    num_words = num_unknown = 0
    for caption in coco_captions:
        # The words of captions that have only letters can be found without the tokenizer.
        words = caption.lower().split()
        if all(word.isalpha() for word in words):
            expected = [word if word in known else UNKNOWN for word in words]
            num_words, num_unknown = num_words + len(words), num_unknown + expected.count(UNKNOWN)
            assert tokenizer.decode(tokenizer.encode(caption)).split() == expected
    assert num_words > 500
    assert 0 < num_unknown < 0.2 * num_words


def test_pieces_restore_every_coco_caption(coco_captions):
    tokenizer = SentencePieceTokenizer.train(coco_captions, 500)
    assert tokenizer.size == 500
    for caption in coco_captions:
        assert tokenizer.decode(tokenizer.encode(caption)) == as_written(caption)


@given(st.text(max_size=60))
def test_words_restore_any_text_they_were_built_from(text):
    text += " end"
    tokenizer = WordTokenizer.build([text])
    expected = as_written(unicodedata.normalize("NFC", text.lower()))
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@TOKENIZERS
@given(data=st.data())
def test_captions_of_known_words_survive_the_round_trip(tokenizer, data):
    words = [word.strip(".,;!()\"'").lower() for caption in CAPTIONS for word in caption.split()]
    words = [word for word in words if word.isalpha()]
    caption = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=20)))
    vocab = vocab_for(tokenizer)
    ids = encode_caption(caption, tokenizer, vocab)
    assert decode_caption(ids, tokenizer, vocab) == caption
    # Tokens after the end are ignored.
    assert decode_caption(np.append(ids, ids), tokenizer, vocab) == caption
    assert decode_caption(np.append(ids[:-1], [0, *ids]), tokenizer, vocab) == caption


@TOKENIZERS
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 3200), max_size=40))
def test_decoding_never_raises_and_skips_ids_outside_the_text(tokenizer, ids):
    vocab = vocab_for(tokenizer)
    text = decode_caption(np.array(ids, np.int64), tokenizer, vocab)
    end = next((position for position, token in enumerate(ids) if token in (0, 3000 + EOS_ID)), len(ids))
    is_text = [token for token in ids[:end] if 3000 <= token < 3000 + tokenizer.size]
    assert text == decode_caption(np.array(is_text, np.int64), tokenizer, vocab)
    assert text == tokenizer.decode([token - 3000 for token in ids[:end]])


def test_marks_keep_their_spaces():
    for caption in CAPTIONS:
        assert WORDS.decode(WORDS.encode(caption)) == caption.lower()
    # The captions have no comma between spaces and a dash only between words, so the known form is used.
    assert WORDS.decode(WORDS.encode("a cat , a dog - the man")) == "a cat, a dog-the man"
    assert WORDS.decode(WORDS.encode("a zebra on a mat.")) == f"a {UNKNOWN} on a mat."


def test_frequent_words_come_first_and_ties_in_alphabetical_order():
    tokens = WordTokenizer.build(["b b c. a", "c b a", "d"]).tokens
    assert tokens == ("<pad>", "</s>", "<unk>", "b", "a", "c", ". ", "d")
    assert WordTokenizer.build(["d", "c b a", "b b c. a"]).tokens == tokens
    assert WordTokenizer.build(["b b c. a", "c b a", "d"], min_count=2).tokens[3:] == ("b", "a", "c")
    assert WordTokenizer.build(["b b c. a", "c b a", "d"], max_size=5).tokens[3:] == ("b", "a")


def test_a_long_caption_is_cut_and_still_ends():
    vocab = vocab_for(WORDS)
    ids = encode_caption("a dog and a cat", WORDS, vocab, max_tokens=4)
    assert decode_caption(ids, WORDS, vocab) == "a dog and"
    assert (len(ids), ids[-1], ids.dtype) == (4, 3001, np.int64)
    assert encode_caption("a dog", WORDS, vocab, max_tokens=1).tolist() == [3001]
    assert len(encode_caption("a dog " * 99, WORDS, vocab)) == 128
    with pytest.raises(ValueError, match="max_tokens is 0"):
        encode_caption("a dog", WORDS, vocab, max_tokens=0)
    with pytest.raises(ValueError, match="but the vocabulary only"):
        encode_caption("a dog", WORDS, Vocab(num_text=WORDS.size - 1, size=4000))
    assert encode_caption("", WORDS, vocab).tolist() == [3001]
    with pytest.raises(ValueError, match="at least 1"):
        encode_caption("a dog", WORDS, vocab, max_tokens=0)
    with pytest.raises(ValueError, match="only 5 for text"):
        encode_caption("a dog", WORDS, Vocab(num_text=5, size=3005))


@TOKENIZERS
def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    (WORDS if tokenizer is PIECES else PIECES).save(tmp_path / "new")
    tokenizer.save(tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 1
    loaded = load_text_tokenizer(tmp_path / "new")
    # Data loader workers get a pickled copy.
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer)
        assert (other.size, other.eos_id) == (tokenizer.size, 1)
        for caption in CAPTIONS:
            assert other.encode(caption) == tokenizer.encode(caption)
            assert other.decode(other.encode(caption)) == tokenizer.decode(tokenizer.encode(caption))


def test_training_again_gives_the_same_model(tmp_path):
    PIECES.save(tmp_path)
    again = SentencePieceTokenizer.train(CAPTIONS, 60)
    again.save(tmp_path / "again")
    assert (tmp_path / SENTENCEPIECE_FILE).read_bytes() == (tmp_path / "again" / SENTENCEPIECE_FILE).read_bytes()


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    for tokenizer in (WORDS, PIECES, WordTokenizer.build(["a \ud83d dog"])):
        assert "dog" in tokenizer.decode(tokenizer.encode("a \ud83d dog"))
        tokenizer.save(tmp_path)


def test_a_model_with_other_special_ids_uses_its_own_end_token():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    vocab = vocab_for(tokenizer)
    ids = encode_caption("a cat and a dog", tokenizer, vocab)
    assert (tokenizer.eos_id, ids[-1]) == (2, 3002)
    assert UNKNOWN in tokenizer.decode([0])  # its unknown words are id 0
    assert decode_caption(np.append(ids, ids), tokenizer, vocab) == "a cat and a dog"


def test_a_model_without_an_end_token_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(InputError, match="no end token"):
        SentencePieceTokenizer(model.getvalue())


DAMAGED_WORDS = [
    "",
    "{",
    "[]",
    "null",
    '{"tokens": "abc"}',
    '{"tokens": [1, 2, 3]}',
    '{"words": []}',
    '{"tokens": ["a\\n", "b", "c"]}',
    '{"tokens": ["<pad>", "</s>", "<unk>", "a", "a"]}',
    "\udcff",
]


@pytest.mark.parametrize("content", DAMAGED_WORDS)
def test_a_damaged_vocabulary_gives_an_error_of_one_line(content, tmp_path):
    (tmp_path / WORD_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=WORD_FILE) as raised:
        load_text_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_damaged_model_gives_an_error_of_one_line(tmp_path):
    PIECES.save(tmp_path)
    path = tmp_path / SENTENCEPIECE_FILE
    valid = path.read_bytes()
    no_utf8 = valid.replace("\u2581a".encode(), b"\xe2\xff\x81a")
    assert no_utf8 != valid
    for damaged in (b"", b"no model", bytes(500), valid[: len(valid) // 2], valid[:-1], b"<html>" + valid, no_utf8):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=SENTENCEPIECE_FILE) as raised:
            load_text_tokenizer(tmp_path)
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_or_with_two_is_refused(tmp_path):
    with pytest.raises(InputError, match="no text tokenizer"):
        load_text_tokenizer(tmp_path / "absent")
    WORDS.save(tmp_path)
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(b"")
    with pytest.raises(InputError, match="expected one"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(InputError, match="absent"):
        SentencePieceTokenizer.from_file(tmp_path / "absent.model")


def test_empty_captions_are_refused():
    with pytest.raises(InputError, match="captions"):
        WordTokenizer.build(["", "  "])
    with pytest.raises(InputError, match="no word occurs 9 times"):
        WordTokenizer.build(CAPTIONS, min_count=9)
    for captions in ([], ["", "  "], ["\u200b", "\n"]):
        with pytest.raises(InputError, match="captions"):
            SentencePieceTokenizer.train(captions, 60)
    with pytest.raises(InputError, match="5 ids of 4 captions") as raised:
        SentencePieceTokenizer.train(CAPTIONS, 5)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="no room"):
        WordTokenizer.build(CAPTIONS, max_size=3)
