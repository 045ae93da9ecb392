"""The range test as a command: a rate for a recipe's own stage, or what is missing for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from training_stage import artifact

from modelyard.errors import RecipeError
from modelyard.stages import api
from modelyard.stages.rate import range_test_of

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from training_parts import write_tokens

STAGES = """
name: rates
root: {root}
stages:
  base:
    kind: pretrain
    inputs: {{tokens: {tokens}}}
    model: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
                       num_attention_heads: 2}}}}
    global_batch: 8
    steps: 5
"""


def test_a_rate_is_suggested_for_a_stage_of_a_recipe(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", 60, 10)
    (tokens / "manifest.json").write_text(artifact(tokens, "tokenize").manifest.model_dump_json())
    path = tmp_path / "recipe.yaml"
    path.write_text(STAGES.format(root=tmp_path / "root", tokens=tokens))
    recipe = api.load(path)
    result, page = range_test_of(recipe, None, 1e-4, 1.0, 30)
    assert 1e-3 < result.suggestion < 0.4
    assert "suggested learning_rate" in Path(page).read_text()
    with pytest.raises(RecipeError, match="'tuned' is no pre-training stage"):
        range_test_of(recipe, "tuned", 1e-4, 1.0, 30)
    text = path.read_text().replace(str(tokens), "words")
    more = "  words: {kind: tokenize, inputs: {corpus: corpus}}\n  corpus: {kind: curate, inputs: {files: [FILE]}}\n"
    path.write_text(text + more.replace("FILE", str(path)))
    with pytest.raises(RecipeError, match="inputs of base are not there yet: words"):
        range_test_of(api.load(path), "base", 1e-4, 1.0, 30)
