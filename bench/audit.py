"""The zero-loss audit: every acknowledged order is there, exactly once, in both read models.

An order whose outcome is unknown is first asked for again with its key: the answer tells what
became of it, and from then on it is held to the same promise.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from bench.catalogue import AskAll
from bench.requests import Requests
from bench.scenario import Ledger
from bench.slo import AUDITED_MAX
from bench.verdict import Audit

WAIT_S: Final = 5  # for the read models to catch up with the last order
ROUNDS_MAX: Final = 3  # times that a read without an answer is asked again
PAGE: Final = 100  # the most that a list gives
PAGES_MAX: Final = 2 * AUDITED_MAX // PAGE  # orders of others may stand among ours


def audit(ledger: Ledger, requests: Requests, ask_all: AskAll, customers: Sequence[str]) -> Audit:
    """Read back every order of the run, and count all orders of its customers since it began.

    `customers` order from this run alone, so an order of theirs that nobody asked for is one too
    many.
    """
    in_doubt = _ask_again(ledger, ask_all)
    acked = Counter(ledger.orders)
    missing, unread = _read_each(sorted(acked), requests, ask_all)
    listed = _list_since(ledger, requests, ask_all, frozenset(customers))
    if listed is None:
        return Audit(acked=len(acked), missing=len(missing), doubled=0, unchecked=len(acked))
    # An order still in doubt may exist, once.
    unasked = listed.total() - (listed & Counter(set(acked))).total() - in_doubt
    return Audit(
        acked=len(acked),
        missing=len(missing | (acked.keys() - listed.keys())),
        doubled=acked.total() - len(acked) + max(0, unasked),
        unchecked=in_doubt + unread,
    )


def _ask_again(ledger: Ledger, ask_all: AskAll) -> int:
    """Settle the orders in doubt; returns how many stay so."""
    for _ in range(ROUNDS_MAX):
        open_requests = dict(ledger.open)
        for number, answer in zip(open_requests, ask_all(open_requests.values()), strict=True):
            ledger.settle(number, answer)
    return len(ledger.open)


def _read_each(
    order_ids: Sequence[str], requests: Requests, ask_all: AskAll
) -> tuple[set[str], int]:
    """Return the orders that are not there, and the number of those that could not be read."""
    missing: set[str] = set()
    pending = list(order_ids)
    for _ in range(ROUNDS_MAX):
        answers = ask_all(requests.get(f"/v1/orders/{each}", wait_s=WAIT_S) for each in pending)
        unread: list[str] = []
        for order_id, answer in zip(pending, answers, strict=True):
            if answer.status == 404 or (
                answer.status == 200 and order_id.encode() not in answer.body
            ):
                missing.add(order_id)
            elif answer.status != 200:
                unread.append(order_id)
        pending = unread
    return missing, len(pending)


def _list_since(
    ledger: Ledger, requests: Requests, ask_all: AskAll, customers: frozenset[str]
) -> Counter[str] | None:
    """Count the orders of `customers` since the run began; None if the list cannot be read."""
    counted: Counter[str] = Counter()
    if ledger.first_placed_at is None:
        return counted
    first = f"/v1/orders?sort=placed_at&limit={PAGE}&placed_from={quote(ledger.first_placed_at)}"
    path = first
    for _ in range(PAGES_MAX):
        (answer,) = ask_all([requests.get(path, token=ledger.token, wait_s=WAIT_S)])
        if answer.status != 200 or answer.is_behind:
            return None
        page: dict[str, Any] = answer.json()
        for order in page["data"]:
            if order["customer"]["customer_id"] in customers:
                counted[order["order_id"]] += 1
        cursor = page["meta"].get("next_cursor")
        if cursor is None:
            return counted
        path = f"{first}&cursor={quote(cursor)}"
    return None
