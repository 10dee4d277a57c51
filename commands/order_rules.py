"""What an order allows in which status: the one table that commands check and clients are shown."""

from typing import Final

ACTIONS: Final[dict[str, tuple[str, ...]]] = {
    "placed": ("cancel",),
    "cancelled": (),
}


def allowed_actions(status: str) -> tuple[str, ...]:
    return ACTIONS[status]
