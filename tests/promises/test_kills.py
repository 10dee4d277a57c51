from pathlib import Path

from tests.promises.kills import VICTIMS, kill_in_turn, verify
from tests.promises.stack import running_stack


async def test_acknowledged_orders_survive_the_death_of_any_process(tmp_path: Path) -> None:
    with running_stack(tmp_path / "d") as stack:
        ledger, _ = await kill_in_turn(stack, VICTIMS, rounds=1)
        assert len(ledger.acknowledged) > 0
        assert await verify(stack, ledger) == []
