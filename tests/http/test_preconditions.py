import asyncio

import pytest

from tests.http.conftest import Client, Shop


@pytest.fixture
async def cancel_path(shop: Shop) -> str:
    await shop.product(on_hand=5)
    order_id = (await shop.order(await shop.customer())).json()["order_id"]
    return f"/v1/orders/{order_id}/cancel"


@pytest.mark.parametrize("if_match", ['"v1"', "*", '"v0", "v1"', '"x", W/"v9", "v1"'])
async def test_the_current_version_is_acted_on(
    client: Client, cancel_path: str, if_match: str
) -> None:
    answer = await client.post(cancel_path, {"reason": "r"}, If_Match=if_match)
    assert answer.status_code == 200


async def test_another_version_is_refused(client: Client, cancel_path: str) -> None:
    for if_match in ['"v2"', '"v0"']:
        answer = await client.post(cancel_path, {"reason": "r"}, If_Match=if_match)
        assert (answer.status_code, answer.json()["code"]) == (412, "precondition-failed"), if_match
        assert answer.json()["current_version"] == 1, if_match
        assert answer.headers["etag"] == '"v1"', if_match


async def test_what_names_no_version_never_matches(client: Client, cancel_path: str) -> None:
    for if_match in ['W/"v1"', '"1"', "v1", "", '"v1', '"v99999999999"']:
        answer = await client.post(cancel_path, {"reason": "r"}, If_Match=if_match)
        assert (answer.status_code, answer.json()["code"]) == (412, "precondition-failed"), if_match


async def test_of_two_writers_with_one_etag_one_wins(client: Client, cancel_path: str) -> None:
    answers = await asyncio.gather(
        *(client.post(cancel_path, {"reason": "r"}, If_Match='"v1"') for _ in range(2))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 412]


async def test_stock_levels_have_versions_too(client: Client, shop: Shop) -> None:
    await shop.product(on_hand=5)
    path = "/v1/stock/MUG/main/adjustments"
    body = {"delta": 1, "reason": "r"}
    assert (await client.post(path, body, If_Match='"v1"')).headers["etag"] == '"v2"'
    assert (await client.post(path, body, If_Match='"v1"')).status_code == 412
