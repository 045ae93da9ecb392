"""Language identification: against py3langid's own classifier, over lengths and scripts, and what is dropped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from modelyard.corpus import language_model
from modelyard.corpus.arrow import buffers
from modelyard.corpus.kernels import language as kernels
from modelyard.corpus.options import LANGUAGES, LanguageOptions, StepOptions
from modelyard.corpus.step import build
from modelyard.corpus.steps.language import Language

SENTENCES = {
    "en": "The committee decided that the old library should be kept open for everybody who lives in the town.",
    "de": "Der Ausschuss hat beschlossen, dass die alte Bibliothek für alle Bewohner der Stadt geöffnet bleiben soll.",
    "fr": "Le comité a décidé que la vieille bibliothèque resterait ouverte à tous les habitants de la ville.",
    "es": "El comité decidió que la vieja biblioteca debía seguir abierta para todos los habitantes de la ciudad.",
    "pl": "Komitet postanowił, że stara biblioteka powinna pozostać otwarta dla wszystkich mieszkańców miasta.",
    "ru": "Комитет решил, что старая библиотека должна оставаться открытой для всех жителей города.",
    "uk": "Комітет вирішив, що стара бібліотека має залишатися відкритою для всіх мешканців міста.",
    "el": "Η επιτροπή αποφάσισε ότι η παλιά βιβλιοθήκη πρέπει να μείνει ανοιχτή για όλους τους κατοίκους της πόλης.",
    "ja": "委員会は、町に住むすべての人のために古い図書館を開いておくことを決めました。",
    "zh": "委员会决定，旧图书馆应该继续向住在城里的所有人开放。",
    "ar": "قررت اللجنة أن تبقى المكتبة القديمة مفتوحة لجميع سكان المدينة.",
    "hi": "समिति ने निर्णय लिया कि पुराना पुस्तकालय शहर के सभी निवासियों के लिए खुला रहना चाहिए।",
    "tr": "Komite, eski kütüphanenin kasabada yaşayan herkes için açık kalması gerektiğine karar verdi.",
}


def step(**options: Any) -> Language:
    found = build(StepOptions.model_validate({"language": options}))
    assert isinstance(found, Language)
    return found


def test_sentences_of_many_scripts_are_named(documents: Any) -> None:
    table = step(mode="annotate")(documents(*SENTENCES.values()))
    assert table["language"].to_pylist() == list(SENTENCES)
    assert min(table["language_score"].to_pylist()) > 0.7 and "reason" not in table.column_names
    capitals = step(mode="annotate")(documents(*(text.upper() for text in SENTENCES.values())))
    assert capitals["language"].to_pylist() == list(SENTENCES)


def test_what_is_foreign_or_uncertain_is_dropped_with_a_reason(documents: Any) -> None:
    german = step(languages=["de", "en"], threshold=0.5)
    table = german(documents(SENTENCES["de"], SENTENCES["fr"], "", "\u2603", SENTENCES["en"] + SENTENCES["pl"]))
    reasons = table["reason"].to_pylist()
    assert reasons[:4] == [None, "language_fr", "language_uncertain", "language_uncertain"]
    assert table["language"].to_pylist()[2] == "und" and table["language_score"].to_pylist()[2] == 0
    assert german.counts["de/documents"] == 1 and german.counts["fr/documents"] == 1
    again = step(mode="annotate")(table.drop_columns(["reason"]))
    assert again.column_names.count("language") == 1
    assert step()(documents()).num_rows == 0


def test_scores_equal_those_of_py3langid(prose: list[str]) -> None:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    rng = random.Random(1)
    pieces = [text[:: rng.choice([1, 1, 7])][: rng.randint(5, 400)].lower() for text in prose[:60]]
    pieces += [text[: rng.randint(10, 80)] for text in SENTENCES.values()]
    reference = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model = language_model.load()
    raw = kernels.scores(
        *buffers(pa.array(pieces)), 10**6, model.moves, model.rows, model.outputs, model.table, model.prior
    )
    chances, names = model.merged(raw)
    for piece, row in zip(pieces, chances, strict=True):
        expected = dict(reference.rank(piece))
        np.testing.assert_allclose(row, [expected[name] for name in names], rtol=2e-2, atol=2e-3)


def test_a_long_document_is_judged_by_four_places(documents: Any) -> None:
    menu = "Inicio Noticias Deportes Contacto Iniciar sesión Suscríbete ahora " * 8
    text = menu + SENTENCES["en"] * 200
    assert step(mode="annotate")(documents(text))["language"].to_pylist() == ["en"]
    rng = random.Random(2)
    cut = [(text * 3)[: 2048 + rng.randint(0, 5000)] for text in SENTENCES.values()]
    assert step(mode="annotate")(documents(*cut))["language"].to_pylist() == list(SENTENCES)


def test_codes_are_those_of_the_model_and_others_are_refused() -> None:
    assert set(language_model.load().codes) == set(LANGUAGES) and list(LANGUAGES) == sorted(LANGUAGES)
    with pytest.raises(ValidationError, match="'eng' is no language of the model; there are: ace af"):
        LanguageOptions(languages=("eng",))
