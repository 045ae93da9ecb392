"""Options of the deduplications: equal texts, near-copies, repeated paragraphs, equal meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modelyard.recipe.schema import Options

Keep = Literal["first", "longest", "quality"]
_KEEP = "who stays: first in input order, longest in bytes, or the best `quality` score"


class ExactOptions(Options):
    """Removes documents whose text is equal byte for byte (128-bit BLAKE2b)."""

    method: Literal["exact"] = "exact"
    keep: Keep = Field("first", description=_KEEP)


class MinHashOptions(Options):
    """Removes near-duplicates: MinHash-LSH proposes pairs, exact Jaccard decides (Broder 1997)."""

    method: Literal["minhash"] = "minhash"
    jaccard: float = Field(0.8, gt=0, le=1, description="similarity of shingle sets from which one document goes")
    shingle: Literal["word", "character"] = Field("word", description="what a shingle is made of")
    size: int | None = Field(None, ge=1, le=64, description="length of a shingle; null = 5 words or 20 characters")
    permutations: int = Field(112, ge=8, le=1024, description="MinHash values a document; 112 as in FineWeb")
    recall: float = Field(
        0.98, gt=0, lt=1, description="share of pairs exactly at the threshold that the bands must propose; own choice"
    )
    verify: Literal["kept", "chain", "estimate"] = Field(
        "kept",
        description="kept: a document goes only when its exact similarity to one that stays reaches `jaccard`; "
        "chain: clusters are joined by exactly verified pairs and all but the best of a cluster go, at the risk that "
        "through a chain of small differences texts go that resemble nothing that stays; estimate: sharing a band is "
        "enough, no text is compared, at the risk that most of what goes is no near-copy at all (74 % of it on 4,250 "
        "pages of documentation)",
    )
    keep: Keep = Field("first", description=_KEEP)
    seed: int = Field(1, ge=0, description="seed of the permutations")

    @property
    def length(self) -> int:
        """Words or characters in a shingle."""
        return self.size or (5 if self.shingle == "word" else 20)

    @property
    def bands(self) -> tuple[int, int]:
        """(bands, rows): the most rows a band for which a pair at the threshold still meets `recall`.

        A pair of similarity s shares a band with probability 1 - (1 - s^rows)^bands. More rows mean
        fewer useless candidates; verification makes those cost time only, never a wrong removal.
        """
        for rows in range(min(self.permutations, 32), 0, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.jaccard**rows) ** bands >= self.recall:
                return bands, rows
        return self.permutations, 1


class ParagraphOptions(Options):
    """Cuts paragraphs or lines out of documents where another document (or the same, before) has the same bytes.

    As CCNet does for its paragraphs (Wenzek et al. 2020, arXiv:1911.00359), but on the bytes as they are, by a
    128-bit BLAKE2b digest instead of 64 bits of SHA-1. A document of which nothing is left goes.
    """

    method: Literal["paragraphs"] = "paragraphs"
    unit: Literal["paragraph", "line"] = Field(
        "paragraph", description="what is compared: runs of lines between blank ones, or single lines"
    )
    min_length: int = Field(
        100, ge=1, description="shorter ones stay wherever they are, bytes without blanks at the ends; own choice"
    )
    keep: Keep = Field("first", description="whose copy stays: of the first document, the longest, the best `quality`")


class SemanticOptions(Options):
    """Removes documents that mean the same: embeddings, k-means, cosine inside a cluster.

    SemDeDup (Abbas et al. 2023, arXiv:2303.09540), with every removal verified against a document that stays.
    """

    method: Literal["semantic"] = "semantic"
    model: str = Field(
        min_length=1, description="folder of a sentence-embedding model: config.json, safetensors, tokenizer; local"
    )
    checksum: str | None = Field(
        None, description="xxh3-128 of the model's files; filled in, so that another model is another result"
    )
    cosine: float = Field(
        0.95, gt=0, le=1, description="cosine of embeddings from which one document goes; SemDeDup: 1 - its epsilon"
    )
    clusters: int | None = Field(
        None, ge=1, description="k-means clusters; null = half the square root of the documents; own choice"
    )
    iterations: int = Field(10, ge=1, le=1000, description="k-means iterations, on a sample; own choice")
    max_tokens: int = Field(
        256, ge=8, le=8192, description="tokens of a document that are embedded, from its start; 256 as MiniLM's"
    )
    keep: Keep = Field("first", description=_KEEP)
    seed: int = Field(1, ge=0, description="seed of the clusters")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("model"), str):
            return value
        from modelyard.corpus.embedding_files import model_checksum

        found = model_checksum(value["model"])
        if value.get("checksum") not in (None, found):
            raise ValueError(
                f"the files at {value['model']} have checksum {found}, the recipe says {value['checksum']}"
            )
        return {**value, "checksum": found}


DedupMethod = ExactOptions | MinHashOptions | ParagraphOptions | SemanticOptions
DedupOptions = Annotated[DedupMethod, Field(discriminator="method")]
