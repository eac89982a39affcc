"""Programs of users, checked by mypy as they would check them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio
from statecache import Move, State, StateMachine
from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.core import errors, model

class Order(StateMachine):
    placed = State(initial=True)
    paid = State()
    pay = placed.to(paid)

async def pay(orders: AsyncMachineHandle, id: str) -> int:
    receipt = await orders.transition(id, "pay", {"method": "card"}, increment={"tries": 1}, durability="durable")
    reveal_type(receipt)
    return receipt.version

async def main() -> None:
    async with AsyncStateCache.connect(namespace="typed", flusher=True) as cache:
        reveal_type(cache)
        orders = await cache.machine(Order)
        await asyncio.gather(*[pay(orders, str(number)) for number in range(3)])
        reveal_type(await orders.start_many(["1", ("2", None)]))
        reveal_type(await orders.history("1"))
    opened = await AsyncStateCache.embedded("./data")
    reveal_type(opened)
    await opened.close()
"""
MISTAKES = """
from statecache.aio import AsyncMachineHandle

async def wrong(orders: AsyncMachineHandle) -> str:
    await orders.transition("1")
    receipt = await orders.start("1", 5)
    return receipt.version
"""


def test_a_typed_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    # A process of its own: mypy raises the recursion limit of the one it runs in.
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--cache-dir",
        "/dev/null",
        "--config-file",
        "",
    ]
    files = [str(tmp_path / "program.py"), str(tmp_path / "mistakes.py")]
    found = subprocess.run([*command, *files], capture_output=True, text=True).stdout
    told = [line.split(": ", 1)[1] for line in found.splitlines() if "program.py" in line]
    assert [line for line in told if line.startswith("error")] == []
    revealed = [line.partition('"')[2].rstrip('"') for line in told if "Revealed" in line]
    assert revealed == [
        "statecache.core.model.Receipt",
        "statecache.engine.aio.AsyncStateCache",
        "list[statecache.core.model.Receipt | statecache.core.errors.StateCacheError]",
        "list[statecache.core.model.Transition]",
        "statecache.engine.aio.AsyncStateCache",
    ]
    assert found.count("mistakes.py") == 3
