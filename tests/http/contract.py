"""The OpenAPI document as a judge: every answer that a test sees must be one that it promises."""

import re
from functools import cache
from typing import Any, Final

import httpx
import msgspec
from jsonschema import Draft202012Validator

from app.http.openapi import PROBLEM_TYPE, build_document

DOCUMENT: Final[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(build_document()))
# Of every answer there is, or of the server, and so not documented at each operation.
UNSPOKEN: Final = frozenset(
    {"content-type", "content-length", "cache-control", "vary", "connection", "date", "server"}
    | {"content-security-policy", "x-content-type-options"}
)


def operation_of(method: str, path: str) -> dict[str, Any] | None:
    """The operation that takes this request; None: there is none, so 404 or 405 is due."""
    for template, methods in DOCUMENT["paths"].items():
        if _pattern(template).fullmatch(path) and method.lower() in methods:
            found: dict[str, Any] = methods[method.lower()]
            return found
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{\w+\}", "[^/]+", template))


@cache
def validator(reference: str) -> Draft202012Validator:
    """Of a schema in the document, by its JSON pointer."""
    return Draft202012Validator({"$ref": reference, "components": DOCUMENT["components"]})


def validate(reference: str, value: Any) -> None:
    """Raises jsonschema.ValidationError."""
    validator(reference).validate(value)  # pyright: ignore[reportUnknownMemberType]


async def judge(response: httpx.Response) -> None:
    """An httpx response hook.

    Raises:
        AssertionError: the answer is not one that the document promises.
    """
    await response.aread()
    request = response.request
    method = "GET" if request.method == "HEAD" else request.method
    operation = operation_of(method, request.url.path)
    is_problem = response.headers["content-type"] == PROBLEM_TYPE if response.content else False
    assert response.headers["x-request-id"]
    if is_problem:
        judge_problem(response)
    if operation is None:
        assert is_problem, "what no operation takes is answered by a problem"
        assert response.status_code in {401, 404, 405, 429, 503}
        return
    name = f"{operation['operationId']} {response.status_code}"
    promised = operation["responses"].get(str(response.status_code))
    assert promised is not None, f"{name} is not documented"
    spoken = {header for header in response.headers if header not in UNSPOKEN}
    unspoken = spoken - {header.lower() for header in promised["headers"]}
    assert not unspoken, f"{name}: {unspoken} is not documented"
    if not response.content:
        return
    media_type = response.headers["content-type"].split(";")[0]
    content = promised["content"].get(media_type)
    assert content is not None, f"{name}: {media_type} is not documented"
    if is_problem:
        assert response.json()["code"] in content["examples"], f"{name}: {response.json()['code']}"
    elif media_type == "application/json" and "$ref" in content["schema"]:
        validate(content["schema"]["$ref"], response.json())


def judge_problem(response: httpx.Response) -> None:
    problem = response.json()
    validate("#/components/schemas/Problem", problem)
    assert problem["status"] == response.status_code
    assert problem["type"] == f"/problems/{problem['code']}"
    replayed = response.headers.get("idempotent-replayed") == "true"
    assert replayed or problem["request_id"] == response.headers["x-request-id"]
