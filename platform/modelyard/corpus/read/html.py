"""HTML pages to text: the main content by resiliparse, and what the page says about itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelyard.corpus.options import HtmlOptions

# Elements that nest as deep as they are written; p, li and the like close each other.
_NESTING = re.compile(
    r"<(/?)(?:div|span|ul|ol|dl|table|tbody|section|article|main|nav|aside|header|footer|blockquote|figure|center|"
    r"fieldset|form|details|menu|svg|g|math|object|template|select|button|label|ins|del|sub|sup|q|bdo|ruby)[\s>/]",
    re.IGNORECASE,
)
_ADDRESS = ("link[rel=canonical]", "href"), ('meta[property="og:url"]', "content")
_PUBLISHED = (
    ('meta[property="article:published_time"]', "content"), ('meta[name="date"]', "content"),
    ('meta[itemprop="datePublished"]', "content"), ("time[datetime]", "datetime"),
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Page:
    """The text of a page and its own title, address, date and language, each null when it does not say."""

    text: str
    title: str | None = None
    url: str | None = None
    published: str | None = None
    language: str | None = None


class TooDeep(Exception):
    """Elements nest deeper than `max_depth`: extraction takes time and memory with the square of the depth."""


def extract(html: str, options: HtmlOptions) -> Page:
    """The text and the particulars of a page. Any string is a page, also one without markup.

    Raises:
        TooDeep: elements nest deeper than `options.max_depth`.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    if (depth := nesting(html, options.max_depth)) > options.max_depth:
        raise TooDeep(f"elements nest {depth:,} deep")
    tree = HTMLTree.parse(html)
    text = extract_plain_text(
        tree, main_content=options.main_content, links=options.links, alt_texts=options.alt_texts,
        list_bullets=options.list_bullets, comments=options.comments, skip_elements=list(options.skip_elements),
    )  # fmt: skip
    document: Any = tree.document
    root = document.query_selector("html")
    language = _line(root.getattr("lang")) if root else None
    return Page(text, _line(tree.title), _first(document, _ADDRESS), _first(document, _PUBLISHED), language)


def nesting(html: str, enough: int) -> int:
    """How deep elements nest, at most; 0 when there are too few tags to exceed `enough`."""
    if html.count("<") <= 2 * enough:
        return 0
    closing = np.fromiter((bool(mark) for mark in _NESTING.findall(html)), bool)
    return int(np.cumsum(np.where(closing, -1, 1)).max(initial=0))


def _first(document: Any, places: tuple[tuple[str, str], ...]) -> str | None:
    for selector, attribute in places:
        found = document.query_selector(selector)
        if found is not None and (value := _line(found.getattr(attribute))):
            return value
    return None


def _line(value: str | None) -> str | None:
    """One line of at most 500 characters, or None when nothing is there."""
    return _CONTROL.sub(" ", value or "").strip()[:500] or None
