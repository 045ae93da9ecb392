"""LoRA adapters by model name in the API: listed, loaded when asked for, several in one batch, unknown ones refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from local import LocalServer
from safetensors.torch import save_file

from modelyard.engine.checkpoint import check_adapter
from modelyard.errors import DataError


def save_adapter(folder: Path, base: Path, seed: int) -> None:
    """A random LoRA adapter as PEFT writes it, without the seconds its import takes."""
    config = json.loads((base / "config.json").read_text())
    hidden, heads, random = config["hidden_size"], config["num_attention_heads"], torch.Generator().manual_seed(seed)
    rows = {"q_proj": hidden, "v_proj": config["num_key_value_heads"] * hidden // heads}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, count in rows.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, hidden, generator=random) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(count, 4, generator=random) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": list(rows), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("formal", "brief", "kind")):
        save_adapter(root / name, tiny_model, seed)
    shutil.copytree(root / "kind", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"junk")
    server = LocalServer(tiny_model, adapters={p.name: str(p) for p in sorted(root.iterdir())}, max_adapters=2)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt="The scheduler", max_tokens=12, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def test_adapters_are_models_of_their_own(server: LocalServer, client: openai.OpenAI) -> None:
    names = ["tiny", "brief", "broken", "formal", "kind"]
    assert [m.id for m in client.models.list()] == names
    assert client.models.retrieve("kind").to_dict()["parent"] == "tiny"
    assert server.engine.stats().adapters == ()
    alone = [ask(client, name) for name in ("tiny", "brief", "formal", "kind")]
    assert len(set(alone)) == 4
    assert server.engine.stats().adapters == ("formal", "kind"), "the one unused longest made room"
    with ThreadPoolExecutor(8) as pool:  # all three at once need more than two: nobody waits for another's end
        mixed = ["tiny", "tiny:brief", "formal", "tiny:kind"] * 2
        assert list(pool.map(lambda name: ask(client, name), mixed)) == alone * 2
    vectors = [client.embeddings.create(model=m, input="The scheduler").data[0].embedding for m in ("tiny", "brief")]
    assert vectors[0] != vectors[1]
    assert server.idle()


def test_what_is_no_adapter_is_refused(server: LocalServer, client: openai.OpenAI, tmp_path: Path) -> None:
    for name in ("tiny:nobody", "nobody", "other:brief", "tiny:", "tiny:tiny"):
        with pytest.raises(openai.NotFoundError) as error:
            ask(client, name)
        assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="cannot be loaded here") as bad:
        ask(client, "broken")
    assert "safetensors" not in str(bad.value), "where adapters lie is nobody's business"
    assert server.idle()
    with pytest.raises(DataError, match="not an adapter folder"):
        check_adapter(tmp_path)
