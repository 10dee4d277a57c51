"""Every refusal: a rule said no. Safe to show, never retried; the HTTP statuses are not here."""

from typing import Any

from msgspec import Struct


class Fault(Struct, frozen=True):
    """One field that a rule objects to."""

    pointer: str  # RFC 6901, into the request's body
    code: str
    detail: str


class Refusal(Struct, frozen=True):
    """Why a command changed nothing.

    `code` is the stable public name, `detail` a sentence with the facts, `errors` the fields, and
    `facts` are further members of the problem document.
    """

    code: str
    detail: str
    errors: tuple[Fault, ...] = ()
    facts: dict[str, Any] = {}


def not_found(what: str, key: object) -> Refusal:
    return Refusal("not-found", f"There is no {what} {key}.")


def precondition_failed(*, expected: int, current: int) -> Refusal:
    """RFC 9110, 13.1.1: the client's copy is not the current one."""
    return Refusal(
        "precondition-failed",
        f"If-Match says version {expected}, the current one is {current}.",
        facts={"current_version": current},
    )


def invalid_transition(*, action: str, status: str) -> Refusal:
    return Refusal(
        "invalid-transition",
        f"An order that is {status} takes no {action}.",
        facts={"order_status": status},
    )


def unknown_customer(customer_id: object) -> Refusal:
    detail = f"There is no customer {customer_id}."
    return Refusal("unknown-customer", detail, (Fault("/customer_id", "unknown-customer", detail),))


def unknown_products(missing: list[tuple[int, str]]) -> Refusal:
    """`missing` holds (index of the line, sku)."""
    return Refusal(
        "unknown-product",
        "Some lines name a product that is not sold here.",
        tuple(
            Fault(f"/lines/{index}/sku", "unknown-product", f"There is no product {sku}.")
            for index, sku in missing
        ),
    )


def currency_mismatch(index: int, *, sku: str, asked: str, priced: str) -> Refusal:
    detail = f"{sku} is priced in {priced}, the order is in {asked}."
    return Refusal(
        "currency-mismatch", detail, (Fault(f"/lines/{index}/sku", "currency-mismatch", detail),)
    )


def total_mismatch(*, expected_cents: int, total_cents: int) -> Refusal:
    detail = f"The lines come to {total_cents}, not {expected_cents}."
    return Refusal(
        "total-mismatch",
        detail,
        (Fault("/expected_total_cents", "total-mismatch", detail),),
        {"total_cents": total_cents},
    )


def insufficient_stock(short: list[tuple[int, str, str, int, int]]) -> Refusal:
    """`short` holds (index of the line, sku, location, asked, available), in units."""
    return Refusal(
        "insufficient-stock",
        "There is not enough stock for some lines.",
        tuple(
            Fault(
                f"/lines/{index}/quantity",
                "insufficient-stock",
                f"{asked} of {sku} asked, {available} available at {location}.",
            )
            for index, sku, location, asked, available in short
        ),
        {
            "lines": [
                {
                    "line_no": index + 1,
                    "sku": sku,
                    "location": location,
                    "quantity": asked,
                    "available": available,
                }
                for index, sku, location, asked, available in short
            ]
        },
    )


def duplicate(field: str, value: str) -> Refusal:
    code = f"duplicate-{field.replace('_', '-')}"
    detail = f"{value} is taken."
    return Refusal(code, detail, (Fault(f"/{field}", code, detail),))


def stale_quantity(*, expected: int, on_hand: int) -> Refusal:
    detail = f"{on_hand} are on hand, not {expected}."
    return Refusal(
        "stale-quantity",
        detail,
        (Fault("/expected_on_hand", "stale-quantity", detail),),
        {"on_hand": on_hand},
    )


def would_breach_commitments(*, on_hand: int, committed: int) -> Refusal:
    """`on_hand` as it would become, `committed` = allocated + reserved - backorder limit."""
    return Refusal(
        "would-breach-commitments",
        f"{on_hand} on hand would not cover the {committed} that are promised.",
        facts={"committed": committed},
    )


def key_reused() -> Refusal:
    return Refusal(
        "idempotency-key-reused", "This Idempotency-Key came first with another request."
    )
