"""GET /openapi.json, /docs and /problems/{code}: the contract, for machines and for people.

The pages are written here, once, when the process starts. Litestar's load their scripts from other
servers, and the packages that bring such scripts along bring another framework, or are stale; these
pages need no script at all, so they work wherever the service does.
"""

import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from typing import Any, Final

import msgspec
from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Scope

from app.http.access import needs_no_key
from app.http.exchange import path_parameter
from app.http.openapi import OVERVIEW, Node, build_document, problem_example
from app.http.operations import OPERATIONS
from app.http.problems import PROBLEMS, ProblemError
from app.http.replies import JSON, Headers, Reply

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid #ccd4dc;
       padding-top: 1rem }
code, pre { font: 14px/1.45 ui-monospace, monospace; background: #f2f5f8; border-radius: 3px }
code { padding: 0 .25em } h2 code { font-size: 1.1rem }
td:last-child code { overflow-wrap: anywhere }
pre { padding: .75rem; overflow-x: auto }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top;
       padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #e3e8ed }
nav li { list-style: none } nav ul { padding: 0 } .method { font-weight: 600 }
summary { cursor: pointer }
@media (prefers-color-scheme: dark) {
  body { color: #d9e1e8; background: #14191f } a { color: #8ab8ff }
  code, pre { background: #222b34 } h2, td, th { border-color: #313c47 }
}
"""

# Nothing is loaded, nothing is run, and the one style is known by its hash.
POLICY: Final = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'"
)
CACHING: Final = (b"cache-control", b"public, max-age=300")
HTML: Final[Headers] = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    CACHING,
]


def documentation_routes() -> list[HTTPRouteHandler]:
    """Return the handlers of this file."""
    document = build_document()
    schema = msgspec.json.encode(document)
    docs = docs_page(document).encode()
    problems = {code: problem_page(code).encode() for code in PROBLEMS}

    @get("/openapi.json", opt=needs_no_key())
    async def show_openapi() -> ASGIApp:
        return Reply(200, [JSON, CACHING], schema)

    @get("/docs", opt=needs_no_key())
    async def show_docs() -> ASGIApp:
        return Reply(200, [*HTML], docs)

    @get("/problems/{code:str}", opt=needs_no_key())
    async def show_problem(scope: Scope) -> ASGIApp:
        page = problems.get(path_parameter(scope, "code"))
        if page is None:
            raise ProblemError("not-found", "There is no such problem.")
        return Reply(200, [*HTML], page)

    return [show_openapi, show_docs, show_problem]


def docs_page(document: Node) -> str:
    """The OpenAPI document as one page."""
    contents: list[str] = []
    sections: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            anchor, title = operation["operationId"], f"{method.upper()} {path}"
            contents.append(
                f'<li><a href="#{anchor}"><code>{escape(title)}</code></a> '
                f"{escape(operation['summary'])}</li>"
            )
            sections.append(_section(document, title, operation))
    codes = _table(
        ("code", "status", "meaning"),
        (
            (
                f'<a href="/problems/{code}"><code>{code}</code></a>',
                kind.status,
                _text(kind.meaning),
            )
            for code, kind in PROBLEMS.items()
        ),
    )
    return _page(
        "Waybill",
        f'<p>{_text(OVERVIEW)}</p><p>For machines: <a href="/openapi.json">/openapi.json</a>. '
        f"Authenticate with <code>Authorization: Bearer &lt;key&gt;</code>.</p>"
        f"<nav><ul>{''.join(contents)}</ul></nav>{''.join(sections)}"
        f'<h2 id="problems">Problems</h2>{codes}',
    )


def problem_page(code: str) -> str:
    """What a problem's `type` leads to."""
    kind = PROBLEMS[code]
    used = [each for each in OPERATIONS if code in each.problems]
    retry = "may succeed later, sent again as it was" if kind.retryable else "will fail again"
    links = "".join(
        f'<li><a href="/docs#{each.operation_id}">{each.method} {escape(each.path)}</a></li>'
        for each in used
    )
    return _page(
        kind.title,
        f"<p>Status {kind.status}, code <code>{code}</code>. {_text(kind.meaning)}</p>"
        f"<p>The same request {retry}.</p>{_json(problem_example(code))}"
        f"<h2>Where it happens</h2><ul>{links or '<li>anywhere</li>'}</ul>",
    )


def _section(document: Node, title: str, operation: Node) -> str:
    scope = operation["security"][0]["key"][0] if operation["security"] else None
    parts = [
        f'<h2 id="{operation["operationId"]}"><code>{escape(title)}</code></h2>',
        f"<p>{_text(operation['description'])}</p>",
        f"<p>Scope: {f'<code>{scope}</code>' if scope else 'none, no key is needed'}</p>",
    ]
    if operation["parameters"]:
        rows = (
            (
                f"<code>{each['name']}</code>",
                each["in"] + (", required" if each["required"] else ""),
                _text(each.get("description", "")) + f" {_shape(each['schema'])}",
            )
            for each in operation["parameters"]
        )
        parts.append(f"<h3>Parameters</h3>{_table(('name', 'in', ''), rows)}")
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]
        parts.append("<h3>Body</h3>")
        parts.append(_fields(document, content["schema"]))
        for name, example in content["examples"].items():
            parts.append(f"<p>{escape(name)}:</p>{_json(example['value'])}")
    parts.append("<h3>Answers</h3>")
    parts.append(
        _table(
            ("status", ""),
            (
                (status, _answer(document, response))
                for status, response in operation["responses"].items()
            ),
        )
    )
    return "".join(parts)


def _answer(document: Node, response: Node) -> str:
    parts = [_text(response["description"])]
    headers = ", ".join(f"<code>{name}</code>" for name in response["headers"])
    parts.append(f"<br>Headers: {headers}")
    for content in response.get("content", {}).values():
        if "example" in content:
            parts.append(_json(content["example"]))
        for code in content.get("examples", {}):
            example = document["components"]["examples"][code]["value"]
            parts.append(f"<details><summary>{code}</summary>{_json(example)}</details>")
    return "".join(parts)


def _fields(document: Node, schema: Node) -> str:
    """A table per struct that a body is made of."""
    parts: list[str] = []
    open_names = [_name(schema)]
    for name in open_names:  # grows while it is read; each struct once
        struct = document["components"]["schemas"][name]
        for field in struct["properties"].values():
            inner = _name(field.get("items", field))
            if inner and inner not in open_names:
                open_names.append(inner)
        rows = (
            (
                f"<code>{field}</code>",
                "required" if field in struct.get("required", ()) else "",
                _shape(shape),
            )
            for field, shape in struct["properties"].items()
        )
        parts.append(f"<p><strong>{name}</strong>: {_text(struct.get('description', ''))}</p>")
        parts.append(_table(("field", "", ""), rows))
    return "".join(parts)


def _shape(schema: Node) -> str:
    """A schema in a few words."""
    return f"<code>{escape(msgspec.json.encode(schema).decode())}</code>"


def _name(schema: Node) -> str:
    return str(schema.get("$ref", "")).removeprefix("#/components/schemas/")


def _table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _json(value: Any) -> str:
    text = value if isinstance(value, str) else _indented(value)
    return f"<pre>{escape(text)}</pre>"


def _indented(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _text(text: str) -> str:
    """Escaped, with `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>"
    )
