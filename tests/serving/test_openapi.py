"""/openapi.json describes the server, and what it describes never breaks the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from serving.endpoints import ALL_ROUTES
from serving.http.openapi import document
from serving.protocol.base import ErrorBody
from serving.protocol.messages import MessagesError
from tests.serving.fakes import FakeEngine
from tests.serving.threaded import Server

API = schemathesis.openapi.from_dict(document(ALL_ROUTES))
OPERATIONS = {f"{found.ok().method} {found.ok().path}": found.ok() for found in API.get_all_operations()}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    live = Server(FakeEngine(max_model_len=64), receive_timeout=5.0)
    yield live
    live.close()


def _attack(operation: Any, server: Server, count: int) -> None:
    """Send `count` requests that the document allows, and some that it does not."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
            if operation.body
            else operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        )
    )
    def attack(case: Any) -> None:
        response = case.call(base_url=server.url, timeout=20)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            form = MessagesError if case.path.startswith("/v1/messages") else ErrorBody
            form.model_validate(response.json())
        assert server.engine.live == {}

    attack()


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_breaks_the_server(name: str, server: Server) -> None:
    _attack(OPERATIONS[name], server, 25 if OPERATIONS[name].body else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.body])
def test_no_request_breaks_the_server_in_many_tries(name: str, server: Server) -> None:
    _attack(OPERATIONS[name], server, 500)


def test_it_lists_every_route(server: Server) -> None:
    served = requests.get(server.url + "/openapi.json", timeout=10).json()
    for route in ALL_ROUTES:
        path = route.path.replace("{id:.+}", "{id}")
        operation = served["paths"][path][route.method.lower()]
        assert ("requestBody" in operation) == (route.request is not None)
        assert ("text/event-stream" in operation["responses"]["200"].get("content", {})) == route.streams
    events = served["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert events["x-event-schema"] == {"$ref": "#/components/schemas/ChatChunk"}
    assert "/openapi.json" in served["paths"] and "servers" not in served
    assert document(ALL_ROUTES, "/llm")["servers"] == [{"url": "/llm"}]


def test_every_reference_leads_somewhere() -> None:
    made = document(ALL_ROUTES)

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(made))
    assert len(found) > 20
    for reference in found:
        name = reference.removeprefix("#/components/schemas/")
        assert name in made["components"]["schemas"], reference
