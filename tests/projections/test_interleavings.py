from tests.projections.interleavings import Verdict, run_on

EVENTS = 4_000


async def test_only_the_snapshot_cursor_delivers_each_event_once_and_in_order(
    postgres_url: str,
) -> None:
    verdicts = await run_on(postgres_url, events=EVENTS, seed=1)
    assert verdicts["snapshot"] == Verdict(0, 0, 0)
    assert verdicts["id > last"].lost > 0
    assert verdicts["xid < xmin"].lost == 0
    assert verdicts["xid < xmin"].inverted > 0
