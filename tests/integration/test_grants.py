"""The rights of a role of PostgreSQL: those that docs/operations.md names are enough, and one that is missing is named before
the flush that needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from statecache.cli import app
from statecache.core import errors
from statecache.durable import grants, leases, migrate, schema
from statecache.engine import doctor, letters, retention
from tests.support import refusing, servers
from tests.support.waiting import wait_until
from tests.support.worlds import World

pytestmark = pytest.mark.postgres
_PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


class Place(NamedTuple):
    """A database whose tables and store its owner has made, for roles that may nothing but connect."""

    server: servers.PostgresServer
    name: str

    def run(self, statement: str) -> None:
        """As the owner."""
        with self.server.connect(self.name) as connection:
            connection.execute(statement)

    def url(self, role: str) -> str:
        return re.sub("//[^@]*@", f"//{role}:secret@", self.server.url(self.name))


@pytest.fixture
def place(redis_url: str, private_postgres: servers.PostgresServer, namespace: str) -> Place:
    made = Place(private_postgres, private_postgres.create_database())
    with World(redis_url, private_postgres.url(made.name), namespace):
        pass
    made.run(f'REVOKE ALL ON DATABASE "{made.name}" FROM PUBLIC')
    made.run("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    for role in ("writer", "Reader"):
        made.run(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'secret'")
        made.run(f'GRANT CONNECT ON DATABASE "{made.name}" TO "{role}"')
        made.run(f'GRANT USAGE ON SCHEMA public TO "{role}"')
    return made


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, dict[str, Any]]]:
    def db_check(url: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = app.run(["db", "check", "--database-url", url, "--json"])
        told = capsys.readouterr()
        return code, json.loads(told.out or told.err.splitlines()[-1])

    return db_check


@pytest.fixture
def writer(redis_url: str, place: Place, namespace: str) -> Iterator[World]:
    """A client whose role has what is needed, each right by itself."""
    place.run(f'GRANT TEMPORARY ON DATABASE "{place.name}" TO writer')
    for table, rights in grants.NEEDED.items():
        place.run(f"GRANT {', '.join(rights)} ON {table} TO writer")
    with World(redis_url, place.url("writer"), namespace) as made:
        yield made


def _verdict(world: World) -> doctor.Check:
    (found,) = [check for check in doctor.examine(world.cache) if check.name == "database rights"]
    return found


def test_every_table_is_asked_for() -> None:
    assert set(grants.NEEDED) == {*schema.metadata.tables, migrate.VERSION_TABLE}


def test_the_rights_that_are_asked_for_are_enough(
    writer: World, place: Place, redis_url: str, namespace: str, tmp_path: Path, check: Any
) -> None:
    """Flushes of new and of known instances, dead letters, a recovery, flushers with leases, retention: nothing is refused."""
    writer.start("a", ["note"])
    writer.flush()
    writer.orders.transition("a", "note")
    writer.flush()
    with World(redis_url, place.server.url(place.name), namespace) as owner:
        refusing.refuse(owner.durable)
        for id in ("b", "c"):
            writer.start(id)
            writer.orders.transition(id, "note", reason=refusing.REASON)
        writer.flush()
        refusing.accept(owner.durable)
    letters.retry(writer.cache, "order", "b")
    letters.discard(writer.cache, "order", "c")
    writer.cache.recover()
    with writer.more(flusher=True, lease_seconds=1.0):
        wait_until(lambda: leases.look(writer.durable), "a flusher that holds leases")
        writer.orders.transition("a", "cancel", durability="durable")
    writer.flush()
    assert [step.instances for step in retention.run(writer.cache, timedelta(0), tmp_path)] == [1]
    writer.verify()
    assert _verdict(writer).verdict == doctor.OK
    assert check(place.url("writer"))[0] == 0


@pytest.mark.parametrize(
    ("taken", "named"),
    [
        ('TEMPORARY ON DATABASE "{}"', "TEMPORARY on the database"),
        ("DELETE ON statecache_transitions", "DELETE on statecache_transitions"),
        ("SELECT, INSERT ON statecache_checkpoints", "SELECT on statecache_checkpoints"),
        ("SELECT ON statecache_alembic", "SELECT on statecache_alembic"),
        ("USAGE ON SCHEMA public", "USAGE of any schema"),
    ],
)
def test_what_is_missing_is_named_and_the_advice_is_enough(
    writer: World, place: Place, check: Any, taken: str, named: str
) -> None:
    place.run(f"REVOKE {taken.format(place.name)} FROM writer")
    code, told = check(place.url("writer"))
    assert code in (1, 2)
    assert named in str(told)
    found = _verdict(writer) if "alembic" not in taken and "SCHEMA" not in taken else None
    assert found is None or (found.verdict == doctor.FAIL and named in found.found)
    advice = re.search(
        r"as the owner: (.*) \(docs/operations.md, Security\)", told.get("advice") or told["error"]["message"]
    )
    assert advice
    for statement in advice[1].split("; "):
        place.run(statement)
    assert check(place.url("writer"))[0] == 0
    assert _verdict(writer).verdict == doctor.OK


def test_the_flush_that_needs_a_temporary_table_says_where_to_look(writer: World, place: Place) -> None:
    """The first flush of an instance needs none; that of its next transition is refused until the right is there."""
    place.run(f'REVOKE TEMPORARY ON DATABASE "{place.name}" FROM writer')
    writer.start("a")
    writer.flush()
    writer.orders.transition("a", "note")
    with pytest.raises(errors.ConfigurationError, match="'statecache db check' tells what to grant"):
        writer.cache.flush(timeout=2.0)
    place.run(f'GRANT TEMPORARY ON DATABASE "{place.name}" TO writer')
    writer.flush_through()
    writer.verify()


def test_a_role_that_only_reads_is_told_so(
    writer: World, place: Place, redis_url: str, namespace: str, check: Any
) -> None:
    """It is what the web wants: a warning, not a failure. So does a store that has no roles: nothing is asked."""
    writer.start("a", ["note"])
    writer.flush()
    place.run('GRANT SELECT ON ALL TABLES IN SCHEMA public TO "Reader"')
    code, told = check(place.url("Reader"))
    assert (code, told["role"]) == (0, "Reader")
    assert "INSERT on statecache_transitions" in told["missing_rights"]
    with World(redis_url, place.url("Reader"), namespace, auto_recover=False) as reader:
        assert _verdict(reader).verdict == doctor.WARN
        assert "may only read" in _verdict(reader).found
        assert reader.orders.counts() == {"placed": 1}


def test_the_grants_of_the_page_are_enough(place: Place, check: Any) -> None:
    """As it shows them, for roles and a database with other names."""
    (shown,) = re.findall(r"```sql\n(.*?)```", _PAGE, re.DOTALL)
    assert "writer" in shown
    for name, ours in (("DATABASE statecache", f'DATABASE "{place.name}"'), ("reader", '"Reader"')):
        assert name in shown
        shown = shown.replace(name, ours)
    place.run(shown)
    assert (check(place.url("writer"))[0], check(place.url("writer"))[1]["missing_rights"]) == (0, [])
    code, told = check(place.url("Reader"))
    assert code == 0
    assert not [right for right in told["missing_rights"] if right.startswith(("SELECT", "USAGE"))]


def test_sqlite_has_no_roles(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with World(redis_url, sqlite_url, namespace) as world:
        assert grants.of_role(world.durable.database) is None
        assert "database rights" not in {check.name for check in doctor.examine(world.cache)}
