"""Slow twins of the kernels in plain Python: the same definitions, written with strings, sets and lists."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from modelyard.corpus.kernels.text import _TERMINALS

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def words_for_shingles(text: str) -> list[str]:
    """Words as MinHash sees them."""
    pattern = "[\u3040-\u9fff]|(?:[a-zA-Z0-9_]|[^\x00-\xbf\u2000-\u207f\u3000-\u303f\u3040-\u9fff])+"
    return [re.sub("[A-Z]", lambda m: m.group().lower(), w) for w in re.findall(pattern, text)]


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """Set of word n-grams; a shorter text is one shingle."""
    words = words_for_shingles(text)
    if not words:
        return set()
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def character_shingles(text: str, n: int) -> set[str]:
    """Set of character n-grams with runs of blanks as one and none at the front."""
    plain = re.sub("[A-Z]", lambda m: m.group().lower(), re.sub("[\t-\r ]+", " ", text)).lstrip(" ")
    return {plain[i : i + n] for i in range(max(len(plain) - n + 1, 1))} if plain else set()


def jaccard(a: set[Any], b: set[Any]) -> float:
    """|A and B| / |A or B|."""
    return len(a & b) / len(a | b) if a or b else 0.0


def removals(sets: list[set[Any]], threshold: float) -> dict[int, tuple[int, float]]:
    """Greedy removal over all pairs: document -> (kept twin, similarity), most similar twin first."""
    kept: list[int] = []
    gone: dict[int, tuple[int, float]] = {}
    for d, mine in enumerate(sets):
        similar = [(jaccard(mine, sets[k]), -k) for k in kept]
        best = max(similar, default=(0.0, 0))
        if sets[d] and best[0] >= threshold:
            gone[d] = (-best[1], best[0])
        else:
            kept.append(d)
    return gone


def lines_of(text: str) -> list[str]:
    """Lines without their ends; the last is not counted when empty."""
    lines = re.split("\r\n|[" + _BREAKS + "]", text)
    return lines[:-1] if lines[-1] == "" else lines


def _duplicates(items: list[str]) -> tuple[int, int]:
    seen: set[str] = set()
    count = chars = 0
    for item in items:
        if item in seen:
            count, chars = count + 1, chars + len(item)
        seen.add(item)
    return count, chars


def _top(words: list[str], n: int) -> int:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return count * (sum(map(len, gram)) + n - 1)


def _repeated(words: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    i = chars = 0
    while i < len(words) - n + 1:
        gram = tuple(words[i : i + n])
        if gram in seen:
            chars += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return chars


def c4_verdict(line: str) -> str:
    """First C4 rule a stripped line breaks, or keep (all rules on, the authors' thresholds)."""
    words = line.split()
    lower = re.sub("[A-Z]", lambda m: m.group().lower(), line)
    if any(len(w) > 1000 for w in words):
        return "long"
    if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
        return "terminal"
    if len(words) < 3:
        return "few"
    for phrase in ("lorem ipsum", "javascript", "{"):
        if phrase in lower:
            return phrase
    return "policy" if any(p in lower for p in _POLICIES) else "keep"


def statistics(text: str, symbol: Any) -> dict[str, int]:
    """The statistics of the quality kernel that have an independent definition here."""
    words, lines = text.split(), lines_of(text)
    real = [w for w in words if any(not symbol(c) for c in w)]
    filled = [line for line in lines if line.strip()]
    solid = [line for line in lines if line]
    blocks, current = [], []
    for line in [*lines, ""]:
        if line:
            current.append(line)
        elif current:
            blocks.append("\n".join(current))
            current = []
    verdicts = [c4_verdict(line.strip()) for line in solid]
    result = {
        "chars": len(text), "words": len(words), "real_words": len(real), "real_word_chars": sum(map(len, real)),
        "alphabetic_words": sum(any(c.isalpha() for c in w) for w in words),
        "stop_words": len(STOP_WORDS & set(words)), "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("\u2026"), "lines": len(lines),
        "bullet_lines": sum(line.lstrip().startswith(("\u2022", "-")) for line in lines),
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "\u2026")) for line in lines),
        "filled_lines": len(filled), "punctuated_lines": sum(line.endswith(tuple(_TERMINALS)) for line in filled),
        "short_lines": sum(len(line) <= 30 for line in filled), "filled_duplicate_chars": _duplicates(filled)[1],
        "repetition_lines": len(solid), "duplicate_lines": _duplicates(solid)[0],
        "duplicate_line_chars": _duplicates(solid)[1], "paragraphs": len(blocks),
        "duplicate_paragraphs": _duplicates(blocks)[0], "duplicate_paragraph_chars": _duplicates(blocks)[1],
        "c4_lines": verdicts.count("keep"), "c4_lorem": verdicts.count("lorem ipsum"), "c4_curly": verdicts.count("{"),
    }  # fmt: skip
    result |= {f"top_{n}gram": _top(words, n) for n in (2, 3, 4)}
    return result | {f"duplicate_{n}gram": _repeated(words, n) for n in range(5, 11)}


def clean(text: str, blank_lines: int | None) -> str:
    """Normalization of white space and control characters, mode `lines`."""
    text = re.sub("\r\n|[\r\x0b\x0c\x85\u2028\u2029]", "\n", text)
    text = re.sub("[\u00a0\u2000-\u200a\u202f\u3000]", " ", text)
    text = re.sub("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\ufeff]", "", text)
    text = re.sub("[ \t]+(?=\n|$)", "", text)
    text = re.sub(r"^\n+", "", text)
    text = re.sub(r"\n+$", "", text)
    if blank_lines is not None:
        text = re.sub(f"\n{{{blank_lines + 2},}}", "\n" * (blank_lines + 1), text)
    return re.sub(r"[ \t]+$", "", text) if text.strip(" \t") else ""
