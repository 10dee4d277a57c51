"""The cheap client, and the yardsticks it measures."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import wire
from bench.catalogue import Preloaded
from bench.limits import bare_server
from bench.pgbench import SCRIPT, find_pgbench
from tests.bench.fake_waybill import Faults

ROOT = Path(__file__).parents[2]
GET = b"GET /v1/orders/1 HTTP/1.1\r\nHost: x\r\n\r\n"
SAME_OPTIONS = {"interface", "loop", "http", "websockets", "backlog", "backpressure"}


@pytest.mark.parametrize("app", ["raw", "litestar"])
def test_a_yardstick_answers_with_the_bytes_it_was_given(app: str) -> None:
    with bare_server(app, b'{"a":1}') as (url, _):
        reply = wire.ask(url, GET, patience_s=5)
        assert (reply.status, reply.body) == (200, b'{"a":1}')
        assert wire.header(reply, b"content-type") == "application/json"
        done = wire.saturate(url, connections=4, seconds=0.2, wanted=200, next_request=lambda: GET)
    assert done.requests > 10
    assert done.generator_us > 0


def test_answers_in_pieces_are_put_together() -> None:
    replies: list[wire.Reply] = []
    connection = wire.Connection(lambda _, reply: replies.append(reply))
    for piece in (b"HTTP/1.1 201 Created\r\nConte", b"nt-Length: 5\r\nA: b\r\n\r\nhe", b"llo"):
        connection.data_received(piece)
    (reply,) = replies
    assert (reply.status, reply.body, wire.header(reply, b"a")) == (201, b"hello", "b")


def test_answers_that_are_not_wanted_are_an_error(fake: Callable[[Faults], str]) -> None:
    url = fake(Faults())
    with pytest.raises(wire.WireError, match="404"):
        wire.saturate(url, connections=2, seconds=0.1, wanted=200, next_request=lambda: GET)


def test_the_yardsticks_are_served_like_the_service() -> None:
    ours, theirs = (granian_options(ROOT / path) for path in ("app/serve.py", "bench/bare.py"))
    assert {name: ours[name] for name in SAME_OPTIONS} == {
        name: theirs[name] for name in SAME_OPTIONS
    }


def granian_options(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Server"
    )
    return {
        each.arg: ast.unparse(
            constants.get(each.value.id, each.value)
            if isinstance(each.value, ast.Name)
            else each.value
        )
        for each in call.keywords
        if each.arg is not None
    }


def test_pgbench_is_in_the_wheel_and_the_script_names_what_is_loaded() -> None:
    assert find_pgbench().exists()
    catalogue = Preloaded(1, 1, 1).catalogue()
    assert catalogue.skus == ["BENCH-000000"]
    assert catalogue.customers == ["00000000-0000-7000-8000-000000000001"]
    assert "'BENCH-' || lpad(:a::text, 6, '0')" in SCRIPT.read_text()
    assert "'70008000000000000001'" in SCRIPT.read_text()
