"""The OpenAI API over an engine in this process: the official client unchanged, every refusal, every limit."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asking import CHAT, ENDLESS, HTTP, MESSAGES, wait_for
from local import LocalServer

from modelyard.engine import EngineOptions
from modelyard.serving.keys import add_key, read_keys


@pytest.fixture
def client(local: LocalServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=local.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    assert local.idle()


def post(local: LocalServer, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> httpx.Response:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"content-type": "application/json"} | kwargs.pop("headers", {})
    return HTTP.post(local.url + path, content=body, headers=headers, **kwargs)


def connect(local: LocalServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(local.url.rsplit(":", 1)[1])))


def head(length: int) -> bytes:
    """Of a request whose body of `length` bytes follows."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {length}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checking its status and shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "modelyard"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**common)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    assert len({c.id for c in chunks}) == 1


def test_completions_take_every_form_of_prompt(client: openai.OpenAI, local: LocalServer) -> None:
    ids = local.service.tokenizer.encode("The scheduler")
    answers = []
    for prompt in ("The scheduler", ids, ["The scheduler", "A request"], [ids, ids]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        answers.append([c.text for c in answer.choices])
        assert [c.index for c in answer.choices] == list(range(len(answer.choices)))
    assert answers[0] == answers[1] == answers[2][:1] == answers[3][:1] == answers[3][1:]


def test_completions_stream(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "prompt": ["The", "A"], "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**common)
    text = {0: "", 1: ""}
    for chunk in client.completions.create(**common, stream=True):
        text[chunk.choices[0].index] += chunk.choices[0].text
    assert [text[0], text[1]] == [c.text for c in whole.choices]


def test_n_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 4}
    first = client.chat.completions.create(**common)
    again = client.chat.completions.create(**common)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) == 3
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens < 20


def test_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = chat.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    assert len(entries.content) == 4
    for entry in entries.content:
        assert entry.logprob == max(t.logprob for t in entry.top_logprobs)
        assert entry.logprob < 0
    text = client.completions.create(model="tiny", prompt="The", max_tokens=4, temperature=0, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 4


def test_stop_strings(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    text = client.chat.completions.create(**common).choices[0].message.content or ""
    stop = text[3:6]
    cut = client.chat.completions.create(**common, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == text[: text.index(stop)]


def test_concurrent_greedy_answers_are_identical(client: openai.OpenAI) -> None:
    def ask(_: int) -> str:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16, temperature=0)
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(12)))) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e400}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": None}, "messages"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"top_logprobs": 50, "logprobs": True}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_fields_are_400_and_named(local: LocalServer, change: dict[str, Any], param: str | None) -> None:
    error = refusal(post(local, CHAT | change), 400)
    if param is not None:
        assert param in (error["param"] or "")
    assert "Value error" not in error["message"] and "constrained" not in error["message"] + (error["param"] or "")
    assert local.idle()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"\xff\xfe"',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 50_000,
    ],
)
def test_malformed_bodies_are_400(local: LocalServer, body: bytes) -> None:
    refusal(post(local, body), 400)


def test_a_body_that_is_not_called_json_is_explained(local: LocalServer) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl says of -d
    error = refusal(post(local, CHAT, headers=form), 400)
    assert "send the header content-type: application/json" in error["message"]


def test_a_field_of_many_types_is_explained_by_the_nearest(local: LocalServer) -> None:
    assert refusal(post(local, CHAT | {"stop": ["a", ""]}), 400)["param"] == "stop.1"
    assert "at most" in refusal(post(local, CHAT | {"stop": ["x"] * 10_000}), 400)["message"]
    empty = refusal(post(local, {"model": "tiny", "prompt": []}, "/v1/completions"), 400)
    assert "at least 1 item" in empty["message"]
    assert refusal(post(local, b'{"a": '), 400)["message"].startswith("the body is not JSON: ")


def test_tools_reach_the_template_unless_told_none(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = local.service.tokenizer
    monkeypatch.setattr(tokenizer, "template", "ask {{ tools[0].function.name if tools else '' }}")
    monkeypatch.setattr(tokenizer, "_compiled", None)
    tools = {"tools": [{"type": "function", "function": {"name": "weather " * 9}}], "max_tokens": 1}
    lengths = [
        post(local, CHAT | tools | choice).json()["usage"]["prompt_tokens"]
        for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"})
    ]
    assert lengths[0] == lengths[1] > lengths[2] + 9


def test_unknown_model_is_404(local: LocalServer) -> None:
    assert refusal(post(local, CHAT | {"model": "gpt-9"}), 404)["code"] == "model_not_found"


def test_unknown_route_and_method(local: LocalServer) -> None:
    refusal(HTTP.get(local.url + "/v2/nothing"), 404)
    wrong = HTTP.get(local.url + "/v1/chat/completions")
    refusal(wrong, 405)
    assert wrong.headers["allow"] == "POST"


def test_overlong_prompts_are_400(local: LocalServer) -> None:
    long = CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]}
    assert refusal(post(local, long), 400)["code"] == "context_length_exceeded"
    refusal(post(local, {"model": "tiny", "prompt": ""}, "/v1/completions"), 400)
    refusal(post(local, {"model": "tiny", "prompt": [999_999]}, "/v1/completions"), 400)


def test_lone_surrogates_do_not_break_the_server(local: LocalServer) -> None:
    response = post(local, b'{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert response.status_code in (200, 400)
    assert local.idle()


def test_large_bodies_are_413_without_being_read(local: LocalServer) -> None:
    refusal(post(local, b"x" * 200_000), 413)

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    response = HTTP.post(local.url + "/v1/chat/completions", content=endless())
    refusal(response, 413)
    with connect(local) as raw:  # 100 MB, of which not a byte is sent: the answer comes at once
        raw.sendall(head(100_000_000))
        assert raw.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_trickles_in_is_given_up(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelyard.serving.middleware.BODY_SECONDS", 0.4)
    with connect(local) as raw:
        raw.sendall(head(1000))
        answer = b""
        raw.settimeout(0.05)
        for _ in range(1000):
            raw.sendall(b" ")
            with suppress(TimeoutError):
                answer = raw.recv(1000)
                break
        assert answer.startswith(b"HTTP/1.1 408")
    assert local.idle()


def test_a_full_queue_is_429_with_retry_after(local: LocalServer) -> None:
    local.engine.pause()  # who has a place keeps it, however slowly the others come
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(post, local, CHAT | {"max_tokens": 4}) for _ in range(40)]
        wait_for(lambda: sum(a.done() for a in asked) >= 28, "a refusal of all but twelve")
        local.engine.resume()
        codes = [a.result() for a in asked]
    refused = [r for r in codes if r.status_code == 429]
    assert len(refused) == 28
    assert all(r.headers["retry-after"] == "1" for r in refused)
    assert refusal(refused[0], 429)["type"] == "rate_limit_error"
    assert {r.status_code for r in codes} == {200, 429}
    assert local.idle()


def test_disconnects_abort_whole_and_streamed(local: LocalServer) -> None:
    before = local.engine.stats().aborted_total
    for stream in (False, True):
        body = json.dumps(CHAT | ENDLESS | {"max_tokens": 2000, "stream": stream}).encode()
        with connect(local) as raw:
            raw.sendall(head(len(body)) + body)
            wait_for(lambda: local.engine.stats().running, "an answer in the making", every=0.001)
            if stream:
                raw.recv(100)
        assert local.idle()
    assert local.engine.stats().aborted_total == before + 2


def test_timeouts_are_504_or_an_error_event(tiny_model: Path) -> None:
    server = LocalServer(tiny_model, EngineOptions(max_sequences=1, threads=1), timeout=0.2)
    try:
        body = CHAT | ENDLESS | {"max_tokens": 2000}
        server.engine.pause()
        assert refusal(post(server, body), 504)["code"] == "timeout"
        server.engine.resume()
        server.service.timeout = 3.0
        lines = []
        with HTTP.stream("POST", server.url + "/v1/chat/completions", json=body | {"stream": True}) as response:
            for line in response.iter_lines():
                lines += [line] if line else []
                if len(lines) == 1:
                    server.engine.pause()
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        server.engine.resume()
        assert server.idle()
    finally:
        server.stop()


def test_keys_are_asked_for_and_not_stored(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    key = add_key(file, "alice")
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    server = LocalServer(tiny_model, EngineOptions(max_sequences=1, threads=1), keys=read_keys(file))
    try:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": key}):
            assert refusal(post(server, CHAT, headers=header), 401)["code"] == "invalid_api_key"
        assert refusal(HTTP.get(server.url + "/metrics"), 401)
        assert HTTP.get(server.url + "/healthz").status_code == 200
        with openai.OpenAI(base_url=server.url + "/v1", api_key=key) as client:
            assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).choices
    finally:
        server.stop()


def test_metrics_and_pages(local: LocalServer) -> None:
    post(local, CHAT | {"max_tokens": 3})
    post(local, CHAT | {"max_tokens": 0})
    long = {"model": "tiny", "prompt": "a prompt of more than a block of tokens, asked twice " * 2, "max_tokens": 1}
    for _ in range(2):
        assert HTTP.post(local.url + "/v1/completions", json=long).status_code == 200
    text = HTTP.get(local.url + "/metrics").text
    values = dict(re.findall(r"^(modelyard_\S+) ([0-9.e+-]+)$", text, re.MULTILINE))
    assert float(values['modelyard_requests_total{code="200",endpoint="/v1/chat/completions"}']) >= 1
    assert float(values['modelyard_errors_total{type="invalid_request_error"}']) >= 1
    assert float(values['modelyard_tokens_total{direction="completion"}']) >= 3
    assert float(values["modelyard_time_to_first_token_seconds_count"]) >= 1
    assert values["modelyard_replicas"] == "1.0" and values["modelyard_kv_used_ratio"] == "0.0"
    stats = local.engine.stats()
    hits = stats.prefix_hit_tokens_total / stats.prefix_asked_tokens_total
    assert 0 < hits < 1 and float(values["modelyard_prefix_hit_ratio"]) == pytest.approx(hits)
    assert HTTP.get(local.url + "/healthz").json()["status"] == "ok"
    assert "<title>modelyard chat</title>" in HTTP.get(local.url + "/").text


def test_embeddings(client: openai.OpenAI, local: LocalServer) -> None:
    texts = ["The scheduler decides", "a step has a token budget", "The scheduler decides"]
    found = client.embeddings.create(model="tiny", input=texts)  # the official client asks for base64
    vectors = [item.embedding for item in found.data]
    assert vectors[0] == vectors[2] != vectors[1]
    assert all(abs(sum(x * x for x in v) - 1) < 1e-4 for v in vectors)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 3
    one = HTTP.post(local.url + "/v1/embeddings", json={"model": "tiny", "input": texts[0]}).json()
    assert one["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-6)
    for bad in ({"input": []}, {"input": ""}, {"input": "x", "dimensions": 4}, {"input": "word " * 3000}):
        assert HTTP.post(local.url + "/v1/embeddings", json={"model": "tiny", **bad}).status_code == 400, bad
    assert local.idle()


def test_answers_match_what_was_asked_for(client: openai.OpenAI, local: LocalServer) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    text = post(local, CHAT | {"regex": "[a-c]{3}", "max_tokens": 20}).json()["choices"][0]["message"]["content"]
    assert re.fullmatch("[a-c]{3}", text)
    for change in ({"response_format": {"type": "json_schema"}}, {"regex": "(["},
                   {"regex": "a", "response_format": {"type": "json_object"}}):  # fmt: skip
        assert post(local, CHAT | change).status_code == 400, change
    assert local.idle()


def test_constraints_nothing_can_satisfy_are_400(local: LocalServer) -> None:
    pytest.importorskip("llguidance")
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}  # shows after its first token
    for schema in ({"type": "nonsense"}, {"type": "integer", "minimum": 5, "maximum": 3}, {"enum": []}, {"$ref": "#"},
                   {"const": 1, "type": "string"}, {"$ref": "#/nowhere"}, endless):  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        error = refusal(post(local, CHAT | {"response_format": form}), 400)
        assert error["param"] == "response_format", schema
    for regex in ("[^\\s\\S]", "a{1000000}"):  # nothing; too large to follow
        assert refusal(post(local, CHAT | {"regex": regex}), 400)["param"] == "regex"
    assert local.idle()


def test_openapi_describes_the_requests(local: LocalServer) -> None:
    document = HTTP.get(local.url + "/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(document["paths"])
    for name in ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "stream"):
        field = document["components"]["schemas"]["ChatRequest"]["properties"][name]
        assert {"type": "null"} in field["anyOf"], name
    assert post(local, CHAT | {"presence_penalty": None, "n": None, "max_tokens": 1}).status_code == 200
