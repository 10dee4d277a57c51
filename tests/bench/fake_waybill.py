"""A tiny stand-in for the service: enough of its HTTP to be measured, and faults on demand.

Run as a process: prints its port, then serves until killed. Its argument is Faults as JSON.
"""

import asyncio
import json
import re
import sys
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import msgspec
from msgspec import Struct


class Faults(Struct):
    """What goes wrong."""

    freeze_after_s: float | None = None  # after the first order
    freeze_s: float = 2.0  # the whole server stands still
    visible_after_s: float = 0.0  # writes show late
    lose_every: int = 0  # every so many-th order is acknowledged and forgotten
    double_every: int = 0  # every so many-th order is placed twice


class Fake:
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.orders: dict[str, tuple[float, dict[str, Any]]] = {}  # id: (visible at, body)
        self.answers: dict[str, dict[str, Any]] = {}  # by idempotency key
        self.first_order_at: float | None = None

    async def answer(
        self, method: str, target: str, head: str, body: bytes
    ) -> tuple[int, Any, str]:
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if method == "POST" and url.path == "/v1/orders":
            return self.place(head, json.loads(body))
        if method == "POST" and url.path == "/v1/customers":
            return 201, {"customer_id": str(uuid4()), "version": 1}, ""
        if method == "POST":
            return 201, {"version": 1}, ""
        if url.path == "/v1/stock":
            return 200, {"data": [{"sku": query["sku"], "available": 7}], "meta": {}}, ""
        if url.path == "/v1/orders":
            return 200, self.list(query), ""
        return await self.read(url.path.rpartition("/")[2], head)

    def place(self, head: str, body: dict[str, Any]) -> tuple[int, Any, str]:
        now = time.monotonic()
        self.first_order_at = self.first_order_at or now
        key = re.search(r"Idempotency-Key: (\S+)", head)
        assert key is not None
        if key[1] not in self.answers:
            number = len(self.answers) + 1
            order = {
                "order_id": str(uuid4()),
                "number": number,
                "customer": {"customer_id": body["customer_id"]},
                "placed_at": datetime.now(UTC).isoformat(),
                "version": 1,
            }
            self.answers[key[1]] = order
            if not (self.faults.lose_every and number % self.faults.lose_every == 0):
                self.keep(order, now)
            if self.faults.double_every and number % self.faults.double_every == 0:
                self.keep({**order, "order_id": str(uuid4())}, now)
        return 201, self.answers[key[1]], "Consistency-Token: 1.7\r\n"

    def keep(self, order: dict[str, Any], now: float) -> None:
        self.orders[order["order_id"]] = (now + self.faults.visible_after_s, order)

    async def read(self, order_id: str, head: str) -> tuple[int, Any, str]:
        if order_id not in self.orders:
            return 404, {"code": "not-found"}, ""
        visible_at, order = self.orders[order_id]
        wait = re.search(r"Prefer: wait=(\d+)", head)
        if wait is not None:
            await asyncio.sleep(min(int(wait[1]), max(0.0, visible_at - time.monotonic())))
        if time.monotonic() < visible_at:
            return 503, {"code": "behind"}, "Projection-Lag: 1\r\n"
        return 200, order, ""

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        rows = [
            order
            for _, order in self.orders.values()
            if query.get("customer_id") in (None, order["customer"]["customer_id"])
            and order["placed_at"] >= query.get("placed_from", "")
        ]
        first, limit = int(query.get("cursor", 0)), int(query.get("limit", 20))
        more = str(first + limit) if first + limit < len(rows) else None
        return {"data": rows[first : first + limit], "meta": {"next_cursor": more}}

    def freeze_if_due(self) -> None:
        after_s = self.faults.freeze_after_s
        if after_s is None or self.first_order_at is None:
            return
        if time.monotonic() - self.first_order_at > after_s:
            self.faults.freeze_after_s = None
            time.sleep(self.faults.freeze_s)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, target, _ = head.split(" ", 2)
                length = re.search(r"Content-Length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                self.freeze_if_due()
                status, answer, headers = await self.answer(method, target, head, body)
                data = json.dumps(answer, separators=(",", ":")).encode()
                lines = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
                writer.write(lines.encode() + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def main() -> None:
    faults = msgspec.json.decode(sys.argv[1], type=Faults)
    server = await asyncio.start_server(Fake(faults).serve, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
