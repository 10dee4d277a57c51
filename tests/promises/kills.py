"""Kill every process in turn under load, then check that each acknowledged order is there, once.

    python -m tests.promises.kills --rounds 10

Clients place orders with an Idempotency-Key and repeat a request, under the same key, until it is
answered. A round kills PostgreSQL, the web process, the worker and Valkey one after the other and
measures how long until an order placed after the kill was acknowledged, and read back with its
token. At the end the write side is held against the clients' own ledger, and every read model
against the write side.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from uuid import uuid4

import asyncpg
import httpx
from msgspec import Struct

from app.settings import ROOT
from tests.commands.conftest import violations
from tests.promises.stack import Stack, Victim, running_stack

CLIENTS = 8
BETWEEN_KILLS_S = 2.0
GIVE_UP_S = 30.0  # of one order, tries included
VICTIMS: tuple[Victim, ...] = get_args(Victim)


class Ledger(Struct):
    """What the clients know. Keys are idempotency keys."""

    acknowledged: dict[str, str] = {}  # key -> order id
    attempts: int = 0
    replayed: int = 0
    abandoned: int = 0


class Recovery(Struct):
    """How long after one kill the service did its work again, in seconds."""

    victim: Victim
    order_s: float
    read_s: float


class Client:
    """One shop: its own connection, one request at a time."""

    def __init__(self, stack: Stack, customer_id: str, ledger: Ledger) -> None:
        self._http = httpx.AsyncClient(
            base_url=stack.url,
            headers={"Authorization": f"Bearer {stack.api_key}"},
            timeout=10,
        )
        self._customer_id = customer_id
        self._ledger = ledger

    async def place(self) -> httpx.Response | None:
        """Place one order, whatever it takes; None if it took too long."""
        key, deadline = str(uuid4()), time.monotonic() + GIVE_UP_S
        body = {
            "customer_id": self._customer_id,
            "currency": "EUR",
            "lines": [{"sku": "KILL-1", "quantity": 1}, {"sku": "KILL-2", "quantity": 2}],
        }
        while time.monotonic() < deadline:
            self._ledger.attempts += 1
            try:
                answer = await self._http.post(
                    "/v1/orders", json=body, headers={"Idempotency-Key": key}
                )
            except httpx.TransportError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code == 201:
                self._ledger.acknowledged[key] = answer.json()["order_id"]
                self._ledger.replayed += "Idempotent-Replayed" in answer.headers
                return answer
            assert answer.status_code in {409, 429, 500, 502, 503}, (
                answer.status_code,
                answer.text,
            )
            assert answer.status_code != 500, answer.text
            await asyncio.sleep(0.05)
        self._ledger.abandoned += 1
        return None

    async def read_back(self, placed: httpx.Response) -> bool:
        """Whether the order is readable, with its token, strictly."""
        try:
            answer = await self._http.get(
                f"/v1/orders/{placed.json()['order_id']}",
                headers={
                    "Consistency-Token": placed.headers["Consistency-Token"],
                    "Prefer": "wait=1, handling=strict",
                },
            )
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    async def close(self) -> None:
        await self._http.aclose()


async def set_up(stack: Stack) -> str:
    """Two products with stock for every order that could be placed; returns a customer."""
    async with httpx.AsyncClient(
        base_url=stack.url, headers={"Authorization": f"Bearer {stack.api_key}"}, timeout=10
    ) as http:
        for sku in ("KILL-1", "KILL-2"):
            product = {"sku": sku, "name": sku, "price_cents": 100, "currency": "EUR"}
            stock = {"delta": 100_000_000, "reason": "delivery"}
            for path, body in (
                ("/v1/products", product),
                (f"/v1/stock/{sku}/main/adjustments", stock),
            ):
                answer = await http.post(path, json=body, headers={"Idempotency-Key": str(uuid4())})
                assert answer.status_code == 201, answer.text
        answer = await http.post(
            "/v1/customers",
            json={"email": "ada@example.org", "name": "Ada"},
            headers={"Idempotency-Key": str(uuid4())},
        )
        return str(answer.json()["customer_id"])


async def recover(stack: Stack, victim: Victim, probe: Client) -> Recovery:
    """Kill, then time the first order placed, and read, after it."""
    killed_at = time.monotonic()
    assert stack.kill(victim) > 0, f"no {victim} to kill"
    placed = await probe.place()
    assert placed is not None, f"no order within {GIVE_UP_S} s of killing {victim}"
    order_s = time.monotonic() - killed_at
    while not await probe.read_back(placed):
        assert time.monotonic() < killed_at + GIVE_UP_S, f"unreadable after killing {victim}"
        await asyncio.sleep(0.01)
    return Recovery(victim, order_s, time.monotonic() - killed_at)


async def kill_in_turn(
    stack: Stack, victims: Sequence[Victim], rounds: int
) -> tuple[Ledger, list[Recovery]]:
    """The load, and the kills."""
    ledger, stop = Ledger(), asyncio.Event()
    customer_id = await set_up(stack)

    async def shop() -> None:
        client = Client(stack, customer_id, ledger)
        while not stop.is_set():
            await client.place()
        await client.close()

    shops = [asyncio.create_task(shop()) for _ in range(CLIENTS)]
    probe = Client(stack, customer_id, ledger)
    recoveries: list[Recovery] = []
    for _ in range(rounds):
        for victim in victims:
            await asyncio.sleep(BETWEEN_KILLS_S)
            recoveries.append(await recover(stack, victim, probe))
    stop.set()
    await asyncio.gather(*shops)
    await probe.close()
    return ledger, recoveries


# Rows: what is wrong with the read models once they have caught up; none when all is well.
DIFFERENCES = """
SELECT 'order_view' AS what, o.order_id::text AS which
FROM orders AS o LEFT JOIN order_view AS v USING (order_id)
WHERE v.version IS DISTINCT FROM o.version
UNION ALL
SELECT 'order_list', o.order_id::text
FROM orders AS o LEFT JOIN order_list AS v USING (order_id)
WHERE v.version IS DISTINCT FROM o.version
UNION ALL
SELECT 'stock_availability', s.sku
FROM stock_levels AS s LEFT JOIN stock_availability AS v USING (sku, location)
WHERE (v.version, v.on_hand, v.allocated, v.reserved)
      IS DISTINCT FROM (s.version, s.on_hand, s.allocated, s.reserved)
UNION ALL
SELECT 'parked', aggregate_id FROM projection_parked
"""


async def verify(stack: Stack, ledger: Ledger) -> list[str]:
    """Every difference between what clients were told, the write side, and the read models."""
    async with asyncpg.create_pool(stack.postgres_url, min_size=1, max_size=2) as pool:
        deadline = time.monotonic() + GIVE_UP_S
        while rows := await pool.fetch(DIFFERENCES):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        wrong = [f"{row['what']} differs at {row['which']}" for row in rows]
        wrong += [f"{what}: {which}" for what, which in await violations(pool)]
        stored = {row["order_id"] for row in await pool.fetch("SELECT order_id::text FROM orders")}
        lost = set(ledger.acknowledged.values()) - stored
        wrong += [f"acknowledged and lost: {order_id}" for order_id in sorted(lost)]
        if len(set(ledger.acknowledged.values())) != len(ledger.acknowledged):
            wrong.append("two keys were answered with one order")
        placed = await pool.fetchval(
            "SELECT count(*) FROM orders WHERE order_id IN "
            "(SELECT order_id FROM order_lines WHERE sku = 'KILL-1')"
        )
        if not len(ledger.acknowledged) <= placed <= len(ledger.acknowledged) + ledger.abandoned:
            wrong.append(f"{placed} orders for {len(ledger.acknowledged)} acknowledged ones")
    return wrong + await asyncio.to_thread(audit, stack)


def audit(stack: Stack) -> list[str]:
    """What the operator's audit says; nothing when it is clean."""
    done = subprocess.run(
        [sys.executable, "-m", "workers", "projections", "audit"],
        cwd=ROOT,
        env={"WAYBILL_POSTGRES_URL": stack.postgres_url, "WAYBILL_REDIS_URL": stack.redis_url},
        capture_output=True,
        text=True,
        check=False,
    )
    return [f"audit: {done.stdout}{done.stderr}"] if done.returncode else []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, running_stack(Path(directory) / "d") as stack:
        ledger, recoveries = asyncio.run(kill_in_turn(stack, VICTIMS, rounds))
        wrong = asyncio.run(verify(stack, ledger))
    print(
        f"{len(ledger.acknowledged)} orders acknowledged in {ledger.attempts} attempts, "
        f"{ledger.replayed} of them by replay, {ledger.abandoned} abandoned"
    )
    for victim in VICTIMS:
        orders = sorted(each.order_s for each in recoveries if each.victim == victim)
        reads = sorted(each.read_s for each in recoveries if each.victim == victim)
        print(
            f"{victim:9} killed {len(orders)} times: order taken after "
            f"{orders[len(orders) // 2]:.2f} s (worst {orders[-1]:.2f}), "
            f"readable after {reads[len(reads) // 2]:.2f} s (worst {reads[-1]:.2f})"
        )
    print("\n".join(wrong) or "nothing lost, nothing doubled, every read model equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
