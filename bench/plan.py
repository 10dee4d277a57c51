"""The arrival plan: every arrival of a run, drawn from a seed before the run.

An open model: an arrival is due at its time whether or not earlier ones have been answered, so a
server that stalls is charged for all who came meanwhile.
"""

from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Final, NamedTuple

from bench.slo import Workload

DRAWS: Final = 5  # a placed order needs most: a customer, three products, and whether it is probed


class Arrival(NamedTuple):
    """One arrival; the scenario turns its draws into customers, products and orders."""

    due_s: float  # after the start of its stretch
    operation: str
    draws: tuple[float, ...]  # uniform on [0, 1), DRAWS of them
    number: int  # unique within the run


def plan_arrivals(workload: Workload, *, stretch: int, duration_s: float) -> list[Arrival]:
    """Draw the arrivals of one stretch: 0 is the run as asked for, 1 and on are its extensions.

    The same workload and stretch give the same arrivals, on every machine.
    """
    random = Random(f"{workload.seed}/{stretch}")  # noqa: S311  reproducible on purpose
    operations = sorted(workload.mix)
    weights = list(accumulate(workload.mix[operation] for operation in operations))
    arrivals: list[Arrival] = []
    due_s = 0.0
    while True:
        poisson = workload.arrivals == "poisson"
        due_s += random.expovariate(workload.rate) if poisson else 1 / workload.rate
        if due_s >= duration_s:
            return arrivals
        (operation,) = random.choices(operations, cum_weights=weights)
        draws = tuple(random.random() for _ in range(DRAWS))
        arrivals.append(Arrival(due_s, operation, draws, stretch << 32 | len(arrivals)))


def skewed_distinct(draws: Sequence[float], count: int) -> list[int]:
    """Turn draws into different indexes below `count`; one drawn twice gives way to the next."""
    taken: list[int] = []
    for draw in draws:
        index = skewed(draw, count)
        while index in taken:
            index = (index + 1) % count
        taken.append(index)
    return taken


def skewed(draw: float, count: int) -> int:
    """Turn a uniform draw into an index below `count`, log-uniform: index i about once per i + 1.

    That is Zipf's law with exponent 1 without a table: of ten thousand customers the first ten make
    a quarter of the orders.
    """
    return min(count, int((count + 1) ** draw)) - 1
