"""Caption scores against COCO's scorers, a slow second implementation from the papers, and hand-computed numbers."""

import json
import math
import sys
import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from pix2seq.errors import InputError
from pix2seq.metrics.captions import TOKENIZATION, caption_scores, caption_words

BLEU = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"]


@pytest.fixture(scope="module")
def left_out(shared):
    """COCO's captions by image: the first as the prediction, the others as references."""
    captions = {}
    for path in (shared / "data/coco_mini/annotations").glob("captions_*.json"):
        for entry in json.loads(path.read_text())["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    assert len(captions) == 120
    return {i: texts[1:] for i, texts in captions.items()}, {i: texts[0] for i, texts in captions.items()}


@pytest.fixture
def cocoeval():
    return pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")


def bleu_of_coco(references, predictions):
    from pycocoevalcap.bleu.bleu import Bleu

    truths = {i: [" ".join(caption_words(text)) for text in texts] for i, texts in references.items()}
    guesses = {i: [" ".join(caption_words(predictions.get(i, "")))] for i in references}
    scores, _ = Bleu(4).compute_score(truths, guesses, verbose=0)
    return scores


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_cider_d(references, predictions):
    """Section 8 of arXiv 1411.5726, with counts as term frequencies, as in COCO's code."""
    truths = {i: [caption_words(text) for text in texts] for i, texts in references.items()}
    total = 0.0
    for n in range(1, 5):
        seen_in = Counter()
        for texts in truths.values():
            seen_in.update({gram for words in texts for gram in ngrams(words, n)})

        def vector(words, n=n, seen_in=seen_in):
            return {g: count * math.log(len(truths) / max(1, seen_in[g])) for g, count in ngrams(words, n).items()}

        for i, texts in truths.items():
            words = caption_words(predictions.get(i, ""))
            guess = vector(words)
            for other in texts:
                truth = vector(other)
                lengths = math.hypot(*guess.values()) * math.hypot(*truth.values())
                common = sum(min(guess[g], truth[g]) * truth[g] for g in guess.keys() & truth.keys())
                penalty = math.exp(-((len(words) - len(other)) ** 2) / (2 * 6.0**2))
                total += penalty * common / lengths / len(texts) if lengths else 0.0
    return 10 * total / 4 / len(truths)


def slow_rouge_l(references, predictions):
    """Section 3 of arXiv 1504.00325: the best recall and the best precision, each over all references."""

    def common(a, b):
        row = {-1: 0} | dict.fromkeys(range(len(b)), 0)
        for word in a:
            old, row = row, {-1: 0}
            for j, other in enumerate(b):
                row[j] = old[j - 1] + 1 if word == other else max(old[j], row[j - 1])
        return row[len(b) - 1]

    scores = []
    for i, texts in references.items():
        words = caption_words(predictions.get(i, ""))
        lengths = [(common(words, truth), len(truth)) for truth in map(caption_words, texts)]
        recall = max(shared / length for shared, length in lengths)
        precision = max(shared for shared, _ in lengths) / len(words) if words else 0.0
        scores.append(2.44 * recall * precision / (recall + 1.44 * precision) if precision else 0.0)
    return sum(scores) / len(scores)


def test_bleu_equals_coco_and_nltk(left_out, cocoeval):
    references, predictions = left_out
    scores = caption_scores(references, predictions).metrics
    ours = [scores[name] for name in BLEU]
    assert ours == pytest.approx(bleu_of_coco(references, predictions), abs=1e-9)
    # nltk's corpus score has another definition for captions of fewer words.
    assert min(len(caption_words(text)) for text in predictions.values()) >= 4
    weights = [(1 / n,) * n for n in range(1, 5)]
    truths = [[caption_words(text) for text in references[i]] for i in predictions]
    nltk = corpus_bleu(truths, [caption_words(text) for text in predictions.values()], weights)
    assert ours == pytest.approx(nltk, abs=1e-12)
    assert 0.5 < ours[0] < 0.8
    assert 0.1 < ours[3] < 0.4


def test_bleu_equals_coco_with_short_and_missing_predictions(left_out, cocoeval):
    references, predictions = left_out
    cut = {i: " ".join(text.split()[: i % 7]) for i, text in predictions.items() if i % 5}
    result = caption_scores(references, cut)
    assert [result.metrics[name] for name in BLEU] == pytest.approx(bleu_of_coco(references, cut), abs=1e-9)
    assert result.num_without_prediction == sum(i % 5 == 0 for i in references) > 0


def test_cider_and_rouge_equal_a_second_implementation(left_out, cocoeval):
    references, predictions = left_out
    some = {i: text for i, text in predictions.items() if i % 9}
    some |= dict.fromkeys(list(some)[:3], "a a a")
    for guesses in (predictions, some):
        scores = caption_scores(references, guesses).metrics
        assert scores["CIDEr-D"] == pytest.approx(slow_cider_d(references, guesses), abs=1e-9)
        assert scores["ROUGE-L"] == pytest.approx(slow_rouge_l(references, guesses), abs=1e-9)
    assert caption_scores(references, predictions).metrics["CIDEr-D"] > 0.5


def test_scores_equal_hand_computed_ones(cocoeval):
    # BLEU: the example in section 2.1 of Papineni et al.; two of seven words match.
    references = {1: ["The cat is on the mat.", "There is a cat on the mat."], 2: ["x"]}
    scores = caption_scores({1: references[1]}, {1: "the the the the the the the"}).metrics
    assert scores["BLEU-1"] == pytest.approx(2 / 7)
    assert [scores[name] for name in BLEU[1:]] == [0, 0, 0]
    # CIDEr-D: `a` is in every image and has no weight; `cat` and `a cat` match; longer n-grams do not exist.
    scores = caption_scores({1: ["a cat"], 2: ["a dog"]}, {1: "a cat", 2: "a dog"}).metrics
    assert scores["CIDEr-D"] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    # ROUGE-L: three common words of four and of five.
    scores = caption_scores({1: ["a x c d e"]}, {1: "a b c d"}).metrics
    assert scores["ROUGE-L"] == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))
    # The brevity penalty: all words match, but the reference is twice as long.
    scores = caption_scores({1: ["a b c d e f g h"]}, {1: "a b c d"}).metrics
    assert [scores[name] for name in BLEU] == pytest.approx([math.exp(-1)] * 4)


def test_case_and_punctuation_are_ignored(left_out):
    references, predictions = left_out
    plain = caption_scores(references, predictions)
    louder = {i: f'"{text.strip(". ").upper()}" ...!' for i, text in predictions.items()}
    assert caption_scores(references, louder).metrics == plain.metrics


def test_words_are_split_as_in_the_penn_treebank():
    assert caption_words("A man's dog can't SIT, on (a) t-shirt. The end.") == (
        "a man 's dog ca n't sit on a t-shirt the end".split()
    )
    assert caption_words("It\u2019s \u201c8:25\u201d \u2013 \u2026 ok") == ["it", "'s", "8:25", "ok"]
    assert caption_words("...") == caption_words("") == []


def test_a_perfect_corpus_has_the_highest_scores(cocoeval):
    references = {1: ["a small dog on a mat", "an animal"], 2: ["two red kites fly high"], 3: ["a cat eats some fish"]}
    scores = caption_scores(references, {i: texts[0] for i, texts in references.items()}).metrics
    assert [scores[name] for name in (*BLEU, "ROUGE-L")] == pytest.approx([1.0] * 5)
    del references[1][1]
    scores = caption_scores(references, {i: texts[0] for i, texts in references.items()}).metrics
    assert scores["CIDEr-D"] == pytest.approx(10.0)


def test_empty_and_missing_predictions_score_zero_without_a_warning():
    references = {1: ["a dog on a mat"], 2: ["a cat on a roof"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predictions in ({}, {1: ""}, {1: "...", 2: ""}, {1: "zebra"}):
            result = caption_scores(references, predictions)
            assert set(result.metrics.values()) <= {0.0, None}
            assert [result.metrics[name] for name in BLEU] == [0, 0, 0, 0]
            assert (result.num_images, result.num_without_prediction) == (2, 2 - len(predictions))
        # Words in common, but no two in a row.
        scores = caption_scores(references, {1: "mat dog", 2: "roof cat"}).metrics
    assert scores["BLEU-1"] > 0
    assert scores["BLEU-2"] == scores["BLEU-4"] == 0


def test_images_without_references_are_left_out_and_unknown_ones_refused():
    references = {1: ["a dog on a mat"], 2: [], 3: ["!"]}
    result = caption_scores(references, {1: "a dog on a mat", 2: "a cat", 3: "a cow"})
    assert (result.num_images, result.metrics["BLEU-4"]) == (1, 1.0)
    assert result.metrics["CIDEr-D"] is None
    with pytest.raises(InputError, match=r"1 of 2 .*\(ids 7\)") as raised:
        caption_scores(references, {1: "a dog", 7: "a cat"})
    assert "\n" not in str(raised.value)
    nothing = caption_scores({}, {})
    assert set(nothing.metrics.values()) == {None}
    assert nothing.num_images == 0


def test_without_pycocoevalcap_only_bleu_is_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    references = {1: ["a dog on a mat"], 2: ["a cat on a roof"]}
    result = caption_scores(references, {1: "a dog on a mat", 2: "a cat on a roof"})
    assert result.metrics == {"BLEU-1": 1, "BLEU-2": 1, "BLEU-3": 1, "BLEU-4": 1, "CIDEr-D": None, "ROUGE-L": None}
    assert result.summary() == "BLEU-4 1.000"
    assert "CIDEr-D      -" in result.text()


def test_a_result_names_its_tokenization(cocoeval):
    references = {1: ["a dog on a mat"], 2: ["a cat on a roof"]}
    result = caption_scores(references, {1: "a dog on a mat"})
    content = json.loads(json.dumps(result.to_json()))
    assert content["tokenization"] == TOKENIZATION
    assert (content["num_images"], content["num_without_prediction"]) == (2, 1)
    assert list(content["metrics"]) == [*BLEU, "CIDEr-D", "ROUGE-L"]
    assert result.summary().startswith("BLEU-4 0.368, CIDEr-D 5.0")
    assert TOKENIZATION in result.text()


TEXTS = st.lists(st.sampled_from("a b c dog. , \u00e9 \u2014 it's".split()), max_size=8).map(" ".join) | st.text()


@given(st.dictionaries(st.integers(0, 5), st.tuples(st.lists(TEXTS, max_size=3), TEXTS)))
def test_any_captions_get_scores_in_range(cases):
    result = caption_scores({i: texts for i, (texts, _) in cases.items()}, {i: text for i, (_, text) in cases.items()})
    for name, value in result.metrics.items():
        assert value is None or 0 <= value <= (10 if name == "CIDEr-D" else 1) + 1e-9
