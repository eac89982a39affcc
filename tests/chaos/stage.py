"""Where a chaos run plays: the servers, the proxies before them, the client processes, and the folder with the evidence."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.chaos import client, databases, ledger
from tests.chaos.checker import Report, Restore
from tests.support import processes, proxy, servers, waiting

PARTITIONS = 4
NAMESPACE = "chaos"


class Player:
    """One client process and its ledger."""

    def __init__(self, orders: client.Orders, log: Path) -> None:
        self.orders = orders
        self.process = processes.Process([sys.executable, "-m", "tests.chaos.client", _json(orders)], log)
        self.paused = False

    def kill(self) -> None:
        self.process.end(signal.SIGKILL)

    def pause(self) -> None:
        self.process.send(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        self.process.send(signal.SIGCONT)
        self.paused = False


def _json(orders: client.Orders) -> str:
    return msgspec.json.encode(orders).decode()


class Stage:
    """The servers of one run, and the players of its current round."""

    def __init__(self, folder: Path, *, sql: str, server: str, aof: str) -> None:
        self.folder = folder
        self.ledgers = folder
        self.aof = aof
        settings = {"appendonly": "no"} if aof == "no" else {"appendfsync": aof}
        self.redis = servers.ValkeyServer(servers.redis_binary(server), folder / "redis", settings).start()
        self.link = proxy.Proxy(self.redis.port)
        self.database: databases.Database = (
            databases.Postgres(folder) if sql == "postgres" else databases.Sqlite(folder)
        )
        self.players: dict[str, Player] = {}
        self.prefix = ""
        self.reports: dict[tuple[int, str, int], Report] = {}
        self.restores: list[Restore] = []
        self.foreign = 0
        self.snapshot: Path | None = None
        self.client = "mixed"
        self.durable_share = 0.2
        self.flush_interval_ms = 50
        self._numbers: dict[str, int] = {}
        self.random = random.Random(0)

    def close(self) -> None:
        for name in list(self.players):
            self.dismiss(name)
        self.link.close()
        self.redis.stop()
        self.database.close()

    def begin(self, number: int, dice: random.Random) -> None:
        """Begin a round: with instances, ledgers and copies of its own."""
        self.random = dice
        self.prefix = f"r{number}-"
        self.durable_share = dice.choice([0.02, 0.2])
        self.flush_interval_ms = dice.choice([20, 50, 400])
        self.ledgers = self.folder / f"ledgers-{number}"
        self.ledgers.mkdir(exist_ok=True)
        self.snapshot = None
        self.restores = []
        self.foreign = 0
        self.database.forget_copy()

    # --- players -----------------------------------------------------------------------------------------------------

    def cast(self, role: str, place: str, seed: int) -> Player:
        """Start a client process in a place (``writer0``); its name tells it from those that had the place before."""
        number = self._numbers[place] = self._numbers.get(place, 0) + 1
        name = f"{place}-{number}"
        before = self.players.get(place)
        orders = client.Orders(
            role, name, seed, self.link.url(self.redis.url), self.database.client_url, NAMESPACE, PARTITIONS,
            str(self.ledgers / f"{name}.jsonl"), self.prefix, durable_share=self.durable_share,
            flush_interval_ms=self.flush_interval_ms,
            successor_of=before.orders.ledger if before is not None and role == "writer" else "",
            is_async=role in ("writer", "reader") and (self.client == "async" or (self.client == "mixed" and seed % 2 == 1)),
        )  # fmt: skip
        self.players[place] = Player(orders, self.folder / f"{place}.log")
        return self.players[place]

    def wait_for_players(self) -> None:
        """Until each has written its first line: before that it is still starting."""
        writing = [player for player in self.players.values() if player.orders.role in ("writer", "reader")]
        waiting.wait_until(
            lambda: all(
                Path(player.orders.ledger).exists() and Path(player.orders.ledger).stat().st_size for player in writing
            ),
            "every client works",
            60.0,
        )

    def dismiss(self, place: str) -> None:
        """End a player in order."""
        player = self.players.pop(place)
        if player.process.alive:
            player.process.end(signal.SIGTERM, signal.SIGKILL, timeout_seconds=30.0)

    # --- copies ------------------------------------------------------------------------------------------------------

    def take_snapshot(self) -> None:
        """Copy the server's files as a crash at this moment would leave them."""
        target = self.folder / "snapshot"
        shutil.rmtree(target, ignore_errors=True)
        if self.aof == "no":
            with self.redis.client() as connection:
                connection.save()
        self.redis.pause()
        try:
            shutil.copytree(self.redis.data, target)
        finally:
            self.redis.resume()
        self.snapshot = target

    def swap_snapshot(self) -> None:
        """The killed server's files become those of the snapshot."""
        assert self.snapshot is not None
        shutil.rmtree(self.redis.data)
        shutil.copytree(self.snapshot, self.redis.data)

    def restore_sql(self) -> None:
        restored = self.database.restore(self._collect)
        if restored is not None:
            self.restores.append(Restore(*restored))

    # --- reports -----------------------------------------------------------------------------------------------------

    def collect_reports(self) -> None:
        """Remember what recoveries have reported: an older copy of SQL would forget it."""
        self._collect(self.database.query(databases.RECOVERIES))

    def _collect(self, rows: list[tuple[Any, ...]]) -> None:
        for epoch, owner, started_ms, ended_ms, text in rows:
            if not text:
                continue
            for part in msgspec.json.decode(text)["partitions"]:
                report = Report(
                    epoch, owner, part["partition"], part["kind"], started_ms, ended_ms, part["tail_seen_ms"],
                    part["lost_at_least"], part["loss_possible"], part["reconciled"], part["parked"],
                )  # fmt: skip
                self.reports[epoch, owner, part["partition"]] = report

    # --- healing -----------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """End every fault."""
        self.link.pass_through()
        if self.database.link is not None:
            self.database.link.pass_through()
        self.database.back()
        if not self.redis.alive:
            self.redis.start()
        self.redis.resume()
        with self.redis.client(socket_timeout=20.0) as connection:
            waiting.wait_until(connection.ping, "the server answers after the round")
            connection.config_set("maxmemory", 0)
        for place, player in list(self.players.items()):
            if not player.process.alive:
                if player.orders.role in ("flusher", "writer"):
                    self.cast(player.orders.role, place, self.random.getrandbits(32))
            elif player.paused:
                player.resume()

    def ledger_lines(self, role: str) -> dict[str, list[ledger.Line]]:
        """The ledgers of a role in this round, by client."""
        found = {}
        for path in sorted(self.ledgers.glob(f"{role}*.jsonl")):
            found[path.stem] = list(ledger.read(path))
        return found
