from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from commands.stock import Shelf, Shelves

wishes = st.lists(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, max_size=5),
    max_size=12,
)


@given(wishes, st.integers(0, 6), st.integers(0, 3), st.integers(0, 3))
def test_no_run_of_orders_takes_more_than_the_shelf_allows(
    orders: list[list[tuple[str, int]]], on_hand: int, safety_stock: int, backorder_limit: int
) -> None:
    shelves = [Shelf(sku, "main", on_hand, 0, 0, safety_stock, backorder_limit, 1) for sku in "abc"]
    at = Shelves(shelves)
    taken: list[tuple[object, list[tuple[str, str, int]]]] = []
    for wanted in orders:
        order_id, lines = uuid4(), [(sku, "main", quantity) for sku, quantity in wanted]
        before = [shelf.allocated for shelf in shelves]
        short = at.allocate(order_id, lines)
        if short:
            assert [shelf.allocated for shelf in shelves] == before
        else:
            taken.append((order_id, lines))
        for shelf in shelves:
            assert shelf.allocated <= max(0, on_hand - safety_stock + backorder_limit)
            assert sum(share.quantity for share in shelf.moves) == shelf.allocated


@given(wishes)
def test_what_was_taken_can_be_given_back(orders: list[list[tuple[str, int]]]) -> None:
    shelves = [Shelf(sku, "main", 100, 0, 0, 0, 0, 1) for sku in "abc"]
    at = Shelves(shelves)
    for wanted in orders:
        order_id, lines = uuid4(), [(sku, "main", quantity) for sku, quantity in wanted]
        assert not at.allocate(order_id, lines)
        at.release(order_id, lines)
    assert [shelf.allocated for shelf in shelves] == [0, 0, 0]
