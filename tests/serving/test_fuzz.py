"""The OpenAPI document against the server: requests drawn from it, good and bad, break neither it nor its promises."""

from __future__ import annotations

import os
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from local import LocalServer

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("MODELYARD_FUZZ_EXAMPLES", "10"))
"""Requests an operation and a way of drawing them (as the document says, and against it)."""


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_drawn_from_the_document(local: LocalServer, mode: str) -> None:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    described = requests.get(local.url + "/openapi.json").json()
    for part in described["components"]["schemas"].values():
        fields = part.get("properties", {})
        if "model" in fields:  # other names are 404s, which say nothing of other fields
            fields["model"] = {"type": "string", "enum": ["tiny"]}
        if "max_tokens" in fields:  # short answers: the time goes to more requests
            fields["max_tokens"] |= {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 6}]}
            part["required"].append("max_tokens")
    document = schemathesis.openapi.from_dict(described)
    session = requests.Session()
    # What fields mean together (stream_options without stream, ids of a vocabulary) no document can say.
    excluded = [positive_data_acceptance]
    for found in document.get_all_operations():
        operation = found.ok()
        if mode == "negative" and not operation.body:
            continue

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(schemathesis.GenerationMode(mode)))
        def hold(case: Any) -> None:
            answer = case.call(base_url=local.url, session=session, timeout=60)
            # A body beyond the size limit is refused before anybody looks at what is wrong with it.
            if answer.status_code != 413:
                case.validate_response(answer, excluded_checks=excluded)

        hold()
    assert local.idle()
