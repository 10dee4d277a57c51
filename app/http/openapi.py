"""The OpenAPI 3.1 document, made from the table of operations and the structs that are decoded.

Litestar's own schema is off: it knows neither the bodies, which handlers decode themselves, nor the
problem documents.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

from app.http.operations import CHANGED, OPERATIONS, ORDER_ID, REFUSED, Operation, Success
from app.http.problems import PROBLEMS, ParameterFault, document
from commands.refusals import Fault

Node = dict[str, Any]

VERSION: Final = "1.0.0"  # of the contract, not of the program
REF: Final = "#/components/schemas/{name}"
PROBLEM_TYPE: Final = "application/problem+json"
KEYED_HEADERS: Final = ("X-Request-Id", "RateLimit-Policy", "RateLimit")
RETRY_AFTER: Final = frozenset({"rate-limited"}) | {
    code for code, kind in PROBLEMS.items() if kind.retry_after_s is not None
}

# What a rule says is stored under the key like any answer, and is replayed.
RULED: Final = frozenset(
    {"not-found", "validation", "idempotency-key-reused", *(each.code for each in REFUSED)}
)

OVERVIEW: Final = (
    "Orders, stock and customers of one merchant. Commands are POSTs with an `Idempotency-Key`: "
    "send the same one again and you get the first answer again, and nothing happens twice. Each "
    "answer carries a `Consistency-Token`; send it with a read, and the read shows that command. "
    "Money is in minor units (`*_cents`) with a `currency`, times are RFC 3339 in UTC, unknown "
    "fields are refused. Every error is a problem document (RFC 9457) whose `code` is stable. GET "
    "may be HEAD. `X-Request-Id` and `traceparent` are taken up where they are sent."
)

# Header parameters: schema, required, and what they are for.
PARAMETERS: Final[Mapping[str, tuple[Node, bool, str]]] = {
    "Idempotency-Key": (
        {"type": "string", "pattern": r"^[\x21-\x7e]{1,255}$"},
        True,
        "Names what is to happen once. The first answer is kept for a day at least.",
    ),
    "If-Match": (
        {"type": "string"},
        False,
        "The ETag of the version that was seen; 412 if it is not the current one.",
    ),
    "If-None-Match": (
        {"type": "string"},
        False,
        "The ETag of the copy at hand; 304 if it is good.",
    ),
    "Consistency-Token": (
        {"type": "string", "pattern": r"^\d{1,10}\.\d{1,19}$"},
        False,
        "Of a command's answer: wait until the read shows that command, 2 seconds at most.",
    ),
    "Prefer": (
        {"type": "string"},
        False,
        "`wait=SECONDS` (30 at most); `handling=strict` for a 503 rather than a stale answer.",
    ),
}

HEADERS: Final[Mapping[str, str]] = {
    "X-Request-Id": "The request's own, or one that was made for it. It stands in the logs.",
    "RateLimit-Policy": "The key's quota `q` per window of `w` seconds.",
    "RateLimit": "About how much of it is left (`r`, as one of several processes sees it), and "
    "seconds to the next window (`t`).",
    "ETag": "The version of what the answer is about.",
    "Location": "Where what was made is found.",
    "Consistency-Token": "Send it with a read that must show this command.",
    "Idempotent-Replayed": "`true`: this is the first answer to this Idempotency-Key, once more.",
    "Preference-Applied": "What of `Prefer` was applied.",
    "Projection-Lag": "The answer may be so many seconds behind what was asked for.",
    "Link": '`rel="next"`: the next page.',
    "Retry-After": "Seconds to wait.",
    "WWW-Authenticate": "How to authenticate (RFC 6750).",
    "Allow": "The methods of this path.",
}

QUERY_PARAMETERS: Final[Mapping[str, str]] = {
    "cursor": "`next_cursor` of the page before, with the same filters and sort.",
    "limit": "Rows per page.",
    "placed_from": "From this time on. Mind that `+` is written `%2B` in a query.",
    "placed_to": "Before this time.",
    "sku": "Orders with this product, or levels of it.",
    "sort": "`-` is descending.",
}


def build_document() -> Node:
    """The whole document."""
    paths: dict[str, Node] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Waybill",
            "version": VERSION,
            "summary": "Order management.",
            "description": OVERVIEW,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "headers": {
                name: {"description": says, "schema": {"type": "string"}}
                for name, says in HEADERS.items()
            },
            "examples": {
                code: {"summary": kind.title, "value": problem_example(code)}
                for code, kind in PROBLEMS.items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key. The roles named at an operation are scopes.",
                }
            },
        },
    }


def problem_example(code: str) -> Node:
    """A document of this code, as it might be sent."""
    kind = PROBLEMS[code]
    detail, errors, facts = _EXAMPLES.get(code, (kind.meaning.split(". ")[0] + ".", (), {}))
    body = document(
        code,
        detail,
        instance="/v1/orders",
        request_id=str(ORDER_ID),
        trace_id=None,
        errors=errors,
        facts=facts,
    )
    return msgspec.json.decode(body, type=dict[str, Any])


_EXAMPLES: Final[dict[str, tuple[str, tuple[Fault | ParameterFault, ...], Mapping[str, Any]]]] = {
    **{each.code: (each.detail, each.errors, each.facts) for each in REFUSED},
    "validation": (
        "The body is not what is asked for here.",
        (Fault("/lines/0/quantity", "invalid", "Expected `int` >= 1"),),
        {},
    ),
    "invalid-parameter": (
        "A query parameter cannot be used.",
        (ParameterFault("limit", "invalid", "Expected `int` <= 100"),),
        {},
    ),
    "insufficient-scope": ("This key has no scope orders:write.", (), {"scope": "orders:write"}),
    "rate-limited": (
        "This key may send 600 requests a minute; the next begins in 12 s.",
        (),
        {"violated-policies": ["default"]},
    ),
}


def _schemas() -> Node:
    kinds: list[Any] = []
    for operation in OPERATIONS:
        kinds.extend([operation.body] if operation.body is not None else [])
        kinds.extend(
            type(each.example) for each in operation.successes if isinstance(each.example, Struct)
        )
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    fault = {
        "type": "object",
        "properties": {
            "pointer": {"type": "string", "description": "RFC 6901, into the body."},
            "parameter": {"type": "string", "description": "A query parameter or header."},
            "code": {"type": "string"},
            "detail": {"type": "string"},
        },
        "required": ["code", "detail"],
    }
    schemas["Problem"] = {
        "type": "object",
        "description": "RFC 9457. Some codes have further members, as their examples show.",
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "instance": {"type": "string", "format": "uri-reference"},
            "code": {"type": "string", "enum": sorted(PROBLEMS)},
            "retryable": {
                "type": "boolean",
                "description": "Sent again as it was, the request may succeed.",
            },
            "request_id": {"type": "string"},
            "trace_id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
            "errors": {"type": "array", "items": fault},
        },
        "required": [
            *("type", "title", "status", "detail", "instance"),
            *("code", "retryable", "request_id"),
        ],
    }
    return schemas


def _operation(operation: Operation) -> Node:
    responses: dict[str, Node] = {}
    for success in operation.successes:
        responses[str(success.status)] = _success(operation, success)
    for status, codes in _by_status(operation.problems).items():
        _add_problems(responses.setdefault(str(status), {"description": ""}), operation, codes)
    node: Node = {
        "operationId": operation.operation_id,
        "tags": [operation.path.split("/")[2] if operation.path[:4] == "/v1/" else "operations"],
        "summary": operation.summary,
        "description": operation.says,
        "security": [] if operation.scope is None else [{"key": [operation.scope]}],
        "parameters": _parameters(operation),
        "responses": dict(sorted(responses.items())),
    }
    if operation.body is not None:
        node["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _reference(operation.body),
                    "examples": {
                        name: {"value": msgspec.to_builtins(example)}
                        for name, example in operation.examples.items()
                    },
                }
            },
        }
    return node


def _parameters(operation: Operation) -> list[Node]:
    parameters: list[Node] = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    for name in operation.takes:
        schema, is_required, says = PARAMETERS[name]
        parameters.append(
            {
                "name": name,
                "in": "header",
                "required": is_required,
                "description": says,
                "schema": schema,
            }
        )
    if operation.query is not None:
        (_,), schemas = msgspec.json.schema_components([operation.query], ref_template=REF)
        for field, schema in schemas[operation.query.__name__]["properties"].items():
            name = "sku" if field == "skus" else field  # repeated, it becomes a list
            parameter: Node = {"name": name, "in": "query", "required": False, "schema": schema}
            if name in QUERY_PARAMETERS:
                parameter["description"] = QUERY_PARAMETERS[name]
            parameters.append(parameter)
    return parameters


def _success(operation: Operation, success: Success) -> Node:
    keyed = KEYED_HEADERS if operation.scope is not None else KEYED_HEADERS[:1]
    node: Node = {"description": success.says, "headers": _headers((*keyed, *success.headers))}
    example = success.example
    if isinstance(example, Struct):
        content = {"schema": _reference(type(example)), "example": msgspec.to_builtins(example)}
        node["content"] = {"application/json": content}
    elif isinstance(example, str):
        media_type = "text/html" if example.startswith("<") else "text/plain"
        content = {"schema": {"type": "string"}, "example": example}
        node["content"] = {media_type: content}
    elif example is not None:
        node["content"] = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return node


def _add_problems(node: Node, operation: Operation, codes: list[str]) -> None:
    names = ["X-Request-Id"]
    if operation.scope is not None and codes != ["unauthenticated"]:
        names += KEYED_HEADERS[1:]
    if RETRY_AFTER.intersection(codes):
        names.append("Retry-After")
    if {"unauthenticated", "insufficient-scope"}.intersection(codes):
        names.append("WWW-Authenticate")
    if "projection-lag" in codes:
        names.append("Projection-Lag")
    if "Idempotency-Key" in operation.takes and RULED.intersection(codes):
        names += CHANGED
    says = ", ".join(f"`{code}`" for code in codes)
    node["description"] = f"{node['description']} {says}".strip()
    node["headers"] = {**node.get("headers", {}), **_headers(names)}
    node.setdefault("content", {})[PROBLEM_TYPE] = {
        "schema": {"$ref": REF.format(name="Problem")},
        "examples": {code: {"$ref": f"#/components/examples/{code}"} for code in codes},
    }


def _by_status(codes: Iterable[str]) -> dict[int, list[str]]:
    grouped: dict[int, list[str]] = {}
    for code in codes:
        grouped.setdefault(PROBLEMS[code].status, []).append(code)
    return grouped


def _headers(names: Iterable[str]) -> Node:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _reference(kind: type[Struct]) -> Node:
    return {"$ref": REF.format(name=kind.__name__)}
