"""History of an instance with 100 transitions, all in PostgreSQL, against the same query through SQLAlchemy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import sqlalchemy as sa

from benchmarks import hot
from benchmarks.harness import Bench, Measure, ratio_at_most, row
from benchmarks.workload import Fleet


@row("history.100", "`history` of an instance with 100 transitions")
def history(bench: Bench) -> Iterator[Measure]:
    servers = bench.servers
    url = servers.postgres_database()
    fleet = Fleet(servers.cache(url), bench.pick(4, 200, 2000))
    length = bench.pick(10, 100, 100)
    fleet.write([fleet.move(place) for place in range(len(fleet.ids)) for _ in range(length - 1)])
    fleet.flush()
    engine = sa.create_engine(url)
    servers.closing(_Disposing(engine))
    table = sa.Table("statecache_transitions", sa.MetaData(), autoload_with=engine)
    query = (
        sa.select(table)
        .where(table.c.machine == "order", table.c.id == sa.bindparam("wanted"))
        .order_by(table.c.version)
    )
    wanted = itertools.cycle(fleet.ids)

    def theirs() -> list[object]:
        with engine.connect() as connection:
            return list(connection.execute(query, {"wanted": next(wanted)}).all())

    def ours() -> list[object]:
        return list(fleet.orders.history(next(wanted)))

    if len(ours()) != length or len(theirs()) != length:
        raise ValueError("the two histories are not of the wanted length")
    blocks = hot.interleaved(bench, bench.pick(20, 200, 1000), ours, theirs)
    bench.note = f"{len(fleet.ids)} instances of {length} transitions each; ours also asks Redis for the newest version"
    yield hot.of_percentile("p50", 50, blocks, 0, 1, "SQLAlchemy Core", ratio_at_most(1.5))
    yield hot.of_percentile("p99", 99, blocks, 0, 1, "SQLAlchemy Core")


class _Disposing:
    def __init__(self, engine: sa.Engine) -> None:
        self.close = engine.dispose
