import re
from typing import Any

import msgspec
import pytest

from app.http.documentation import docs_page, problem_page
from app.http.operations import OPERATIONS, REFUSED
from app.http.problems import PROBLEMS
from commands import refusals
from tests.http.conftest import Client
from tests.http.contract import DOCUMENT, validate


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"\$ref":"#/([^"]+)"', msgspec.json.encode(DOCUMENT).decode()))
    assert references
    for reference in references:
        target: Any = DOCUMENT
        for step in reference.split("/"):
            target = target[step]


def test_every_operation_has_examples_of_everything() -> None:
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                assert body["examples"], path
            for status, response in operation["responses"].items():
                for content in response.get("content", {}).values():
                    assert "example" in content or content["examples"], (path, status)


def test_every_example_is_what_its_schema_says() -> None:
    for methods in DOCUMENT["paths"].values():
        for operation in methods.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for example in body.get("examples", {}).values():
                validate(body["schema"]["$ref"], example["value"])
            for response in operation["responses"].values():
                content = response.get("content", {}).get("application/json", {})
                if "$ref" in content.get("schema", {}):
                    validate(content["schema"]["$ref"], content["example"])
    for example in DOCUMENT["components"]["examples"].values():
        validate("#/components/schemas/Problem", example["value"])


def test_bodies_take_no_unknown_field() -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            schema = DOCUMENT["components"]["schemas"][operation.body.__name__]
            assert schema["additionalProperties"] is False
            for example in operation.examples.values():
                msgspec.convert(msgspec.to_builtins(example), operation.body)


def test_operation_ids_are_unique() -> None:
    ids = [each.operation_id for each in OPERATIONS]
    assert len(ids) == len(set(ids))


def test_every_refusal_has_a_status_and_every_problem_a_place() -> None:
    makers = [
        name
        for name, value in vars(refusals).items()
        if callable(value) and getattr(value, "__module__", "") == "commands.refusals"
    ]
    made = {each.code for each in REFUSED} | {"not-found", "idempotency-key-reused"}
    assert made | {"validation"} <= PROBLEMS.keys()
    functions = {name for name in makers if name not in {"Fault", "Refusal"}}
    assert len(functions) == len(made) - 1, "a refusal is missing here; `duplicate` makes two"
    used = {code for operation in OPERATIONS for code in operation.problems}
    # Those of paths and methods that are no operation, and of PATCH, which nothing takes yet.
    assert PROBLEMS.keys() - used == {"method-not-allowed", "precondition-required"}


async def test_the_document_is_served_as_it_is_built(stranger: Client) -> None:
    answer = await stranger.get("/openapi.json")
    assert answer.json() == DOCUMENT
    assert answer.json()["openapi"].startswith("3.1")


@pytest.mark.parametrize("page", ["docs", *PROBLEMS])
def test_a_page_loads_nothing_from_anywhere(page: str) -> None:
    html = docs_page(DOCUMENT) if page == "docs" else problem_page(page)
    assert not re.search(r"https?:|//[a-z]|<script|<link|<img|@import|url\(", html), page
    assert set(re.findall(r'href="([^"]*)"', html)) <= {
        "/openapi.json",
        *(f"#{each.operation_id}" for each in OPERATIONS),
        *(f"/docs#{each.operation_id}" for each in OPERATIONS),
        *(f"/problems/{code}" for code in PROBLEMS),
    }


async def test_the_pages_are_served(stranger: Client) -> None:
    docs = await stranger.get("/docs")
    assert docs.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    for operation in OPERATIONS:
        assert f'id="{operation.operation_id}"' in docs.text
    for code in PROBLEMS:
        assert (await stranger.get(f"/problems/{code}")).status_code == 200
    assert (await stranger.get("/problems/no-such-code")).status_code == 404
