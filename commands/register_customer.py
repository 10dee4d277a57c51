"""Register customers: somebody can order from now on."""

from datetime import datetime
from typing import Final

from uuid_utils.compat import uuid7

from commands import outbox
from commands.command import Batch, Command, Connection, Email, Outcome, Submission, Text
from commands.events import CustomerRegistered
from commands.outbox import Cause


class RegisterCustomer(Command, frozen=True):
    """A person or firm that orders. The e-mail address need not be unique: guests come again."""

    email: Email
    name: Text


async def register_customers(
    batch: Batch[RegisterCustomer], *, connection: Connection, now: datetime
) -> list[Outcome]:
    """One outcome per command, in order; refuses nothing. The transaction is the caller's."""
    events = [register_customer(each, now) for each in batch]
    await connection.execute(
        INSERT_CUSTOMERS,
        [event.customer_id for event in events],
        [event.email for event in events],
        [event.name for event in events],
        now,
    )
    causes = [Cause(each.principal.owner, each.traceparent) for each in batch]
    await outbox.append(connection, list(zip(events, causes, strict=True)))
    return list(events)


def register_customer(
    submission: Submission[RegisterCustomer], now: datetime
) -> CustomerRegistered:
    return CustomerRegistered(
        version=1,
        occurred_at=now,
        customer_id=uuid7(),
        name=submission.command.name,
        email=submission.command.email,
    )


# $1..$3 arrays, one element per customer; $4 the time.
INSERT_CUSTOMERS: Final = """
INSERT INTO customers (customer_id, email, name, version, registered_at, updated_at)
SELECT customer_id, email, name, 1, $4, $4
FROM unnest($1::uuid[], $2::text[], $3::text[]) AS t (customer_id, email, name)
"""
