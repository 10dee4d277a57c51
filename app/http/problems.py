"""Problems: the one table from code to status, and how each becomes an RFC 9457 document."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from commands.refusals import Fault, Refusal

CONTENT_TYPE: Final = b"application/problem+json"
NAME_MAX: Final = 200  # characters of a client's own field name that are repeated to it


class Kind(Struct, frozen=True):
    """One code. `retryable`: the same request, with the same Idempotency-Key, may succeed later."""

    status: int
    title: str
    meaning: str
    retryable: bool = False
    retry_after_s: int | None = None


PROBLEMS: Final[dict[str, Kind]] = {
    "malformed-json": Kind(
        400, "Malformed JSON", "The body is not JSON in UTF-8. Nothing was read from it."
    ),
    "invalid-parameter": Kind(
        400,
        "Invalid parameter",
        "A query parameter or header is unknown, repeated, or has no usable value.",
    ),
    "idempotency-key-missing": Kind(
        400,
        "Idempotency-Key missing",
        "A command needs an Idempotency-Key header of 1 to 255 visible ASCII characters. Make one "
        "for each thing that is to happen once, and send the same one again when you retry.",
    ),
    "unauthenticated": Kind(
        401,
        "Not authenticated",
        "Send an API key that is known, not expired and not revoked: Authorization: Bearer <key>.",
    ),
    "insufficient-scope": Kind(
        403,
        "Insufficient scope",
        "The key is good, but it may not do this; `scope` is what it lacks.",
    ),
    "not-found": Kind(
        404,
        "Not found",
        "There is no such thing, or it belongs to somebody else. An order that was just placed is "
        "never denied: a read waits until it can be shown.",
    ),
    "method-not-allowed": Kind(
        405, "Method not allowed", "The Allow header names the methods of this path."
    ),
    "request-timeout": Kind(
        408,
        "Request timeout",
        "The body did not arrive within 10 seconds. Nothing was done.",
        retryable=True,
    ),
    "idempotency-in-progress": Kind(
        409,
        "Still in progress",
        "A request with this Idempotency-Key has not finished. Its answer will be stored: send the "
        "same one again.",
        retryable=True,
        retry_after_s=1,
    ),
    "insufficient-stock": Kind(
        409,
        "Insufficient stock",
        "Some lines ask for more than is available; `lines` says how much there is. Nothing was "
        "taken.",
    ),
    "total-mismatch": Kind(
        409,
        "Total mismatch",
        "The lines do not come to `expected_total_cents`: prices have changed. They come to "
        "`total_cents`.",
    ),
    "stale-quantity": Kind(
        409,
        "Stale quantity",
        "`expected_on_hand` is not what is on hand (any more); `on_hand` is. Count again.",
    ),
    "would-breach-commitments": Kind(
        409,
        "Would breach commitments",
        "The level would fall below what is promised to orders (`committed`).",
    ),
    "invalid-transition": Kind(
        409,
        "Invalid transition",
        "The order's status does not allow this. Its `allowed_actions` say what it does allow.",
    ),
    "duplicate-sku": Kind(409, "Duplicate SKU", "A product with this SKU is registered."),
    "duplicate-external-reference": Kind(
        409, "Duplicate external reference", "An order with this external reference exists."
    ),
    "precondition-failed": Kind(
        412,
        "Precondition failed",
        "If-Match does not name the current version. Read again, then decide.",
    ),
    "payload-too-large": Kind(413, "Payload too large", "A body may hold 1 MiB at most."),
    "unsupported-media-type": Kind(
        415, "Unsupported media type", "A body is sent as Content-Type: application/json."
    ),
    "validation": Kind(
        422,
        "Validation failed",
        "The body is JSON, and not what is asked for here. `errors` points at the fields.",
    ),
    "unknown-product": Kind(
        422, "Unknown product", "Some lines name a SKU that is not sold. `errors` points at them."
    ),
    "unknown-customer": Kind(
        422, "Unknown customer", "There is no such customer, or this key does not act for it."
    ),
    "currency-mismatch": Kind(
        422, "Currency mismatch", "A product is priced in another currency than the order's."
    ),
    "idempotency-key-reused": Kind(
        422,
        "Idempotency-Key reused",
        "This key came first with another request. Make a new key for a new request.",
    ),
    "precondition-required": Kind(
        428, "Precondition required", "Send If-Match with the version that you saw."
    ),
    "rate-limited": Kind(
        429,
        "Rate limited",
        "The key has spent its requests of this minute. Retry-After says when the next one begins.",
        retryable=True,
    ),
    "internal": Kind(
        500,
        "Internal error",
        "This is a bug of ours, and it is logged under `request_id`. A command that is sent again "
        "with the same Idempotency-Key is done once at most.",
    ),
    "overloaded": Kind(
        503,
        "Overloaded",
        "More work arrives than can be done. Nothing was done for this request.",
        retryable=True,
        retry_after_s=1,
    ),
    "outcome-unknown": Kind(
        503,
        "Outcome unknown",
        "The database was lost while the command ran. Send it again with the same Idempotency-Key: "
        "it is done once, and you get its answer.",
        retryable=True,
        retry_after_s=1,
    ),
    "projection-lag": Kind(
        503,
        "Projection lag",
        "The read model does not contain what was asked for yet. Projection-Lag says how many "
        "seconds it is behind.",
        retryable=True,
        retry_after_s=1,
    ),
    "unavailable": Kind(
        503,
        "Unavailable",
        "A part that this request needs cannot be reached. Nothing was done for it.",
        retryable=True,
        retry_after_s=2,
    ),
}


class ParameterFault(Struct, frozen=True):
    """One query parameter or header that cannot be used."""

    parameter: str
    code: str
    detail: str


class ProblemError(Exception):
    """Ends a request with a problem document. Raise it anywhere between the edge and a handler."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: Sequence[Fault | ParameterFault] = (),
        facts: Mapping[str, Any] | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.errors = errors
        self.facts = facts or {}
        kind = PROBLEMS[code]
        self.status = kind.status
        self.headers = list(headers)
        if kind.retry_after_s is not None:
            self.headers.append((b"retry-after", b"%d" % kind.retry_after_s))

    def document(self, *, instance: str, request_id: str, trace_id: str | None) -> bytes:
        return document(
            self.code,
            self.detail,
            instance=instance,
            request_id=request_id,
            trace_id=trace_id,
            errors=self.errors,
            facts=self.facts,
        )


def refused(
    refusal: Refusal, *, instance: str, request_id: str, trace_id: str | None
) -> tuple[int, bytes]:
    """Status and document of a rule's refusal."""
    body = document(
        refusal.code,
        refusal.detail,
        instance=instance,
        request_id=request_id,
        trace_id=trace_id,
        errors=refusal.errors,
        facts=refusal.facts,
    )
    return PROBLEMS[refusal.code].status, body


def document(
    code: str,
    detail: str,
    *,
    instance: str,
    request_id: str,
    trace_id: str | None,
    errors: Sequence[Fault | ParameterFault],
    facts: Mapping[str, Any],
) -> bytes:
    """RFC 9457, section 3. `instance` is the path; `request_id` tells its occurrences apart."""
    kind = PROBLEMS[code]
    members: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "retryable": kind.retryable,
        "request_id": request_id,
    }
    if trace_id is not None:
        members["trace_id"] = trace_id
    if errors:
        members["errors"] = errors
    members.update(facts)
    return _encoder.encode(members)


_encoder: Final = msgspec.json.Encoder()


def unreadable(error: ValueError | RecursionError) -> ProblemError:
    """What msgspec said about a body: not JSON at all, or not the JSON that is asked for."""
    if not isinstance(error, msgspec.ValidationError):
        reason = "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        return ProblemError("malformed-json", f"The body cannot be read: {reason}.")
    what, pointer, code = located(error)
    return ProblemError(
        "validation", "The body is not what is asked for here.", errors=[Fault(pointer, code, what)]
    )


def located(error: msgspec.ValidationError) -> tuple[str, str, str]:
    """Sentence, JSON pointer (RFC 6901) and code of what msgspec objects to.

    msgspec ends its text with " - at `$.lines[0]`", and an unknown or missing field is named before
    that; the pointer is the field's own.
    """
    text = str(error)
    what, _, place = text.rpartition(" - at `$")
    if not what:
        what, place = text, ""
    pointer = "".join(f"/{name or index}" for name, index in _STEP.findall(place))
    code = "invalid"
    for marker, marked in _FIELD_CODES.items():
        if what.startswith(marker):
            name = what.removeprefix(marker).removesuffix("`")[:NAME_MAX]
            pointer += "/" + name.replace("~", "~0").replace("/", "~1")
            code, what = marked, f"{marker}{name}`"
    return what, pointer, code


_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")
_FIELD_CODES: Final = {
    "Object contains unknown field `": "unknown-field",
    "Object missing required field `": "missing-field",
}
