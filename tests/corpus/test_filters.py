"""Decontamination, classifier, toxicity and identity groups: against slow twins, and what each leaves for the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_twins import words_for_shingles
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus.arrow import buffers
from modelyard.corpus.audit import removed
from modelyard.corpus.classifier import Classifier, Examples, TrainSettings, auc, load, platt, train
from modelyard.corpus.filter_options import ClassifyOptions, DecontaminateOptions, GroupsOptions, ToxicityOptions
from modelyard.corpus.items import evaluation_items
from modelyard.corpus.kernels.phrases import Phrases
from modelyard.corpus.step import split
from modelyard.corpus.steps import groups
from modelyard.corpus.steps.classify import Classify
from modelyard.corpus.steps.decontaminate import Decontaminate
from modelyard.corpus.steps.toxicity import Toxicity
from modelyard.errors import DataError

ITEM = "How many apples does Tom have when he gives three of his seven apples to Ann and eats one?"
NEUTRAL = "the of and to in is that it was for on are as with his they at be this from"
WORD = st.sampled_from(["a", "B", "c-d", "été", "字x", "e.", "--", "9_9", "…"])


def phrases(texts: list[str], n: int, least: int) -> Phrases:
    return Phrases.build(*buffers(pa.array(texts, pa.large_string())), n, least)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(WORD, max_size=7).map(" ".join), min_size=1, max_size=4),
    st.lists(st.lists(WORD, max_size=9).map(" ".join), max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_phrases_find_what_a_slow_search_finds(items: list[str], texts: list[str], n: int, least: int) -> None:
    wanted = set()
    for number, item in enumerate(items):
        words = words_for_shingles(item)
        length = min(n, len(words))
        for i in range(len(words) - length + 1 if length >= min(least, n) else 0):
            gram = words[i : i + length]
            for d, text in enumerate(texts):
                found = words_for_shingles(text)
                wanted |= {(d, number, j) for j in range(len(found) - length + 1) if found[j : j + length] == gram}
    data, offsets = buffers(pa.array(texts, pa.string()))
    hits, totals = phrases(items, n, least).find(data, offsets)
    assert totals.tolist() == [len(words_for_shingles(t)) for t in texts]
    got = {
        (d, i, len(words_for_shingles(data[offsets[d] : s].tobytes().decode()))) for d, i, s, _ in hits.tolist()
    }  # fmt: skip
    assert got == wanted


def test_equal_hashes_of_other_words_are_no_hit() -> None:
    made = phrases(["one two three", "four five six"], 3, 1)
    made.bounds[:3] = made.bounds[3:6]  # the words behind the hash of the first phrase are now those of the second
    hits, _ = made.find(*buffers(pa.array(["one two three"])))
    assert not len(hits)


@pytest.fixture
def evaluation(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "math.jsonl").write_text(
        json.dumps({"q": ITEM, "a": "3"}) + "\n" + json.dumps({"q": "too short"}) + "\n"
    )
    return (str(tmp_path / "math.jsonl"),)


def contaminated() -> str:
    filler = "Plain words that stand in no test and go on for a while. " * 12
    return (
        f"{filler}HOW MANY apples, does Tom have when he gives three of his seven apples to Ann and eats one? {filler}"
    )


def test_decontaminate_drops_with_the_item_in_the_audit(documents: Any, evaluation: tuple[str, ...]) -> None:
    step = Decontaminate(DecontaminateOptions(against="tests"), evaluation)
    kept, gone = split(step(documents(contaminated(), "clean text", ITEM[:40])))
    assert kept["text"].to_pylist() == ["clean text", ITEM[:40]] and "detail" not in kept.column_names
    audit = removed(gone, step.name).to_pylist()
    assert [(r["reason"], r["detail"]) for r in audit] == [("contaminated", "math.jsonl:1")]
    assert dict(step.counts) == {"contaminated": 1, "math.jsonl:1/documents": 1}


def test_decontaminate_cuts_or_tags(documents: Any, evaluation: tuple[str, ...]) -> None:
    step = Decontaminate(DecontaminateOptions(against="tests", mode="cut", context=20), evaluation)
    kept, gone = split(step(documents(contaminated(), ITEM)))
    assert gone["reason"].to_pylist() == ["contaminated_short"] and gone["text"].to_pylist() == [ITEM]
    text = kept["text"][0].as_py()
    assert "apples" not in text and text.startswith("Plain words") and text.endswith("a while. ")
    assert len(contaminated()) - len(ITEM) - 60 < len(text) < len(contaminated()) - len(ITEM) - 30
    tags = Decontaminate(DecontaminateOptions(against="tests", mode="annotate", ngram=5), evaluation)(
        documents(ITEM, "x")
    )
    assert tags["contamination"].to_pylist() == [len(words_for_shingles(ITEM)) - 4, 0]
    assert split(tags)[0].num_rows == 2
    many = Decontaminate(DecontaminateOptions(against="tests", min_hits=8), evaluation)
    assert split(many(documents(ITEM)))[0].num_rows == 1


def test_evaluation_files_of_every_format_and_their_faults(tmp_path: Path) -> None:
    pq.write_table(pa.table({"q": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("first\nparagraph\n\nsecond")
    (tmp_path / "c.json").write_text('[{"q": ["x", {"t": "y"}]}]')
    uris = tuple(str(tmp_path / n) for n in ("a.parquet", "b.txt", "c.json"))
    assert list(evaluation_items(uris, ())) == [
        ("a.parquet:1", "one"), ("a.parquet:2", "two"), ("b.txt:1", "first\nparagraph"), ("b.txt:2", "second"),
        ("c.json:1", "x"), ("c.json:1", "y"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no text in the fields question"):
        list(evaluation_items(uris[:1], ("question",)))
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        list(evaluation_items((str(tmp_path / "d.jsonl"),), ()))


def sentences(seed: int, words: list[str], number: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, 30)) for _ in range(number)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Classifier]:
    common = NEUTRAL.split()
    examples = Examples(bits=14)
    good = sentences(1, [*common, "theorem", "proof", "lemma"], 400)
    bad = sentences(2, [*common, "buy", "cheap", "click"], 300)
    for label, texts in ((1, good), (0, bad)):
        ids = [f"{label}-{n}" for n in range(len(texts))]
        examples.add(pa.array(texts), ids, np.full(len(texts), label), 0.3)
    made = train(examples, TrainSettings())
    folder = tmp_path_factory.mktemp("model")
    made.save(str(folder))
    return tuple(str(p) for p in folder.iterdir()), made


def test_the_classifier_separates_calibrates_and_survives_its_files(model: Any) -> None:
    uris, made = model
    held = made.about["held_out"]
    assert held["auc"] > 0.99 and held["accuracy"] > 0.95 and held["calibration_error"] < 0.1
    loaded = load(uris)
    texts = pa.array(["a proof of the theorem", "click to buy cheap", ""])
    assert np.array_equal(loaded(texts), made(texts)) and loaded(texts)[0] > 0.8 > 0.2 > loaded(texts)[1]
    with pytest.raises(DataError, match="no classifier"):
        load(uris[:1])


def test_scores_are_the_sum_over_distinct_words_and_pairs(model: Any) -> None:
    """A slow twin with one weight that is not zero at a time: each distinct feature counts once, at unit length."""
    made = model[1]
    parts = ["lemma", "proof", "lemma", "proof"]  # 2 words, and the pairs lemma proof, proof lemma
    whole = made.raw(pa.array([" ".join(parts)]))[0] - made.bias
    single = [made.raw(pa.array([w]))[0] - made.bias for w in ("lemma", "proof")]
    pairs = [made.raw(pa.array([p]))[0] - made.bias for p in ("lemma proof", "proof lemma")]
    sums = [p * np.sqrt(3) - sum(single) for p in pairs]
    assert whole == pytest.approx((sum(single) + sum(sums)) / 2, abs=1e-4)


def test_measures_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 200), np.round(rng.random(200), 1)
    pairs = [(g > b) + 0.5 * (g == b) for g in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    raw = rng.normal(size=20_000)
    truth = (rng.random(20_000) < 1 / (1 + np.exp(-(2 * raw - 1)))).astype(int)
    assert platt(raw, truth) == pytest.approx((2, -1), abs=0.15)


def test_classify_by_threshold_by_pareto_and_by_tag(documents: Any, model: Any) -> None:
    table = documents("a proof of the theorem", "click to buy cheap")
    kept, gone = split(Classify(ClassifyOptions(model="m"), model[0])(table))
    assert kept["text"].to_pylist() == ["a proof of the theorem"]
    assert gone["reason"].to_pylist() == ["classify_low_score"] and gone["classifier_score"][0].as_py() < 0.2
    assert split(Classify(ClassifyOptions(model="m", mode="annotate"), model[0])(table))[0].num_rows == 2
    many = documents(*["some of the words that it was"] * 4000)
    step = Classify(ClassifyOptions(model="m", mode="pareto", alpha=2.0), model[0])
    first, again = split(step(many))[0], split(step(many.slice(1000)))[0]
    score = first["classifier_score"][0].as_py()
    assert first.num_rows / 4000 == pytest.approx((2 - score) ** -2.0, abs=0.03)
    assert again["id"].to_pylist() == [i for i in first["id"].to_pylist() if int(i, 16) >= 1000]
    other = split(Classify(ClassifyOptions(model="m", mode="pareto", alpha=2.0, seed=1), model[0])(many))[0]
    assert other["id"].to_pylist() != first["id"].to_pylist()


def test_toxicity_by_lists_of_the_language_and_by_classifier(documents: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("grumblefoot\nrotten egg\n")
    (tmp_path / "de").write_text("# a list\nBlödkopp\ngift\n")
    lists = (str(tmp_path / "en.txt"), str(tmp_path / "de"))
    texts = ["You GRUMBLEFOOT!", "a rotten egg", "a gift for you", "Gift", "rotten but egg", "click to buy cheap"]
    languages = ["en", "en", "en", "de", "en", "en"]
    table = documents(*texts, language=languages)
    step = Toxicity(ToxicityOptions(words="lists"), lists, ())
    _, gone = split(step(table))
    assert gone["text"].to_pylist() == ["You GRUMBLEFOOT!", "a rotten egg", "Gift"]
    assert set(gone["reason"].to_pylist()) == {"toxic_words"} and step.counts["toxic_words"] == 3
    assert split(Toxicity(ToxicityOptions(words="lists", min_share=0.4), lists, ())(table))[1].num_rows == 2
    both = Toxicity(ToxicityOptions(words="lists", model="m", threshold=0.5, mode="annotate"), lists, model[0])
    tagged = both(table)
    assert tagged["reason"].null_count == 6 and tagged["toxic_words"].to_pylist() == [1, 1, 0, 1, 0, 0]
    assert tagged["toxicity"][5].as_py() < 0.5
    with pytest.raises(ValueError, match="needs `words`"):
        ToxicityOptions()


def test_groups_are_named_and_counted_by_what_becomes_of_them(documents: Any) -> None:
    table = groups.Groups(GroupsOptions())(documents("Muslim women met", "A deaf man", "a gray stone"))
    assert table["identity_groups"].to_pylist() == ["muslim,women", "disabled,men", ""]
    kept, gone = table.slice(0, 1), table.slice(1, 2)
    assert groups.count("dedup", kept, gone) == {
        "muslim/kept": 1, "women/kept": 1, "disabled/dropped": 1, "men/dropped": 1,
        "(none)/dropped": 1,
    }  # fmt: skip
    own = groups.Groups(GroupsOptions(terms={"stones": ("gray stone",)}))(documents("the GRAY stone", "women"))
    assert own["identity_groups"].to_pylist() == ["stones", ""]
