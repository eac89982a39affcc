"""The holes of ``protocol.md``: one world each, with the rule that closes it switched off.

A hole's world is a small scope in which its violation appears; the same scope with every rule on must be free of
violations (``mended``). Names begin with the number of ``protocol.md``. ``M`` are mistakes of this trade that have no number
there. ``F`` are findings of this model: holes of the protocol as DESIGN section 4 has it, or of the implementation as it
was read; each is told at its place.

Not among them, because it could not be made to break anything on its own: H4c (the recovery's reads unguarded). In the text
where it was found, *wiped* moved SQL's watermark back; in today's text no class does, what else a recovery writes to SQL is
compared there, and what it writes to Redis is guarded. H6b and the second half of H16 were found by analysis; H16's look-up
is here as F2 to F4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tests.model.starting import Seed, backed_up, rolled_back, saved_on_disk, sql_restored, start
from tests.model.state import IDLE_FLUSHER, Budget, State, put_hash, put_part
from tests.model.world import ALL, Op, Rules, World

START = Op("start", 0, "a")
MOVE = Op("move", 0, "b")
NEXT = Op("move", 0, "c")
NONE = Seed()
V1 = Seed(("a",))
V2 = Seed(("a", "b"))
U1 = Seed((), ("a",))
INEXACT = ALL - {"P9 exact"}
RECOVERED = (
    "reads epoch 1",
    "wants 2",
    "takes epoch 2",
    "reads the watermarks",
    "fences",
    "probes",
    "finds",
    "reports",
    "opens",
)
"""The steps of a recovery that finds a partition intact."""
REOPENED = (*RECOVERED[:7], "drops", *RECOVERED[7:])
"""The steps of one that finds its tail lost."""


@dataclass(frozen=True, slots=True)
class Hole:
    """A rule that is off, the promise that breaks, and where."""

    promise: str
    world: World

    @property
    def name(self) -> str:
        return self.world.name


def hole(promise: str, name: str, at: State, *clients: tuple[Op, ...], off: dict[str, Any], **scope: Any) -> Hole:
    return Hole(promise, World(name, at, clients, rules=Rules(**off), **scope))


def mended(one: Hole) -> World:
    """The same scope with every rule on. Where P8 is not asserted, the assumption about the interval stays lifted."""
    rules = Rules(detour_takes_longer="P8" in one.world.asserted)
    return replace(one.world, name=f"{one.name}, all rules on", rules=rules)


def _older(now: Seed, older: Seed, budget: Budget, **processes: Any) -> tuple[State, State]:
    """The same store with two histories of x."""
    return start(budget, seeds=(now,), **processes), start(budget, seeds=(older,))


def holes() -> list[Hole]:
    return [
        *_epochs(),
        *_redis_steps(),
        *_crossing(),
        *_sql_behind(),
        *_cold(),
        *_letters(),
        *_identity(),
        *_reports(),
        *_mistakes(),
        *_findings(),
    ]


def _epochs() -> list[Hole]:
    one = start(Budget(restart=1), flushers=1, recoverers=1)
    return [
        hole("P6", "H1 epoch compared in another row", one, (START,), off={"epoch_in_partition_rows": False}),
        hole(
            "P3", "H2 entries read before the fence", one, (START,), off={"log_read_admitted": False}, asserted=INEXACT,
        ),
        hole("P3", "H3 a drop leaves cold = 0", one, (START,), off={"drop_sets_cold": "never"}, asserted=INEXACT),
        hole(
            "P3", "H3 only `ready` sets cold",
            _tail_lost(), off={"drop_sets_cold": "ready"}, asserted=INEXACT,
        ),
    ]  # fmt: skip


def _tail_lost(clients: int = 0) -> State:
    """SQL has x v2, Redis has gone back to v1; SQL's backup too."""
    older = start(Budget(), seeds=(V1,))
    now = start(Budget(restore=1), seeds=(V2,), clients=clients, flushers=1, recoverers=2)
    return backed_up(rolled_back(now, older), older)


def _redis_steps() -> list[Hole]:
    one = start(Budget(restart=1), flushers=1, recoverers=1)
    unguarded = {"ready_guards_meta": False, "ready_guards_identity": False}
    behind = rolled_back(start(Budget(restart=1, save=1), seeds=(V2,), recoverers=1), start(Budget(), seeds=(V1,)))
    two = start(Budget(), recoverers=2, clients=0)
    return [
        hole("P8", "H4a `ready` without its guard", one, (START,), off=unguarded, asserted=INEXACT),
        hole("P8", "H4b `ready` blesses another server", behind, (NEXT,),
             off={"ready_guards_identity": False}, asserted=INEXACT),
        hole("P6", "H4d the fence goes back", two, off={"fence_only_raises": False}),
        hole("P9", "H15 the fence overwrites the identity", start(Budget(restart=1), recoverers=2), (START,),
             off={"fence_keeps_identity": False}),
        hole("P6", "H14 no owner", start(Budget(restore=1), recoverers=2, clients=0), off={"owner_token": False}),
    ]  # fmt: skip


def _crossing() -> list[Hole]:
    return [
        hole("P3", "H5 an epoch begins at 0 behind anything", start(Budget(restore=1), flushers=1, recoverers=2),
             (START, MOVE), off={"marks": False},
             played=("start x", *RECOVERED, "move x 'b': EPOCH", "reads epoch 2", "the one recorded", "loads",
                     "move x 'b': OK")),
        hole("P3", "H17 *intact* by order of ids", start(Budget(restart=1, restore=1), flushers=1, recoverers=2),
             (START,), off={"mark_behind_watermark": False}, asserted=INEXACT,
             played=("start x", "loads epoch 1", "reads 1-1", *RECOVERED[:4], "Redis restarts", *RECOVERED[4:])),
    ]  # fmt: skip


def _sql_behind() -> list[Hole]:
    three, two = Seed(("a", "b", "c")), Seed(("a", "b", "c"), hot=False)
    hot = sql_restored(
        start(Budget(), seeds=(three,), retained=False, clients=0, flushers=1, recoverers=2),
        start(Budget(), seeds=(V1,)),
    )
    cold = sql_restored(
        start(Budget(), seeds=(two,), retained=False, clients=0, flushers=1, recoverers=1), start(Budget(), seeds=(V1,))
    )
    trim = start(Budget(restore=1), flushers=1, recoverers=1)
    return [
        hole("P3", "H6a reconciled in the log", hot, off={"reconcile_in_sql": False}),
        hole("P3", "H6c watermark and rows apart", hot, off={"reconcile_one_tx": False}, asserted=INEXACT - {"P9"}),
        hole("P3", "H6d cold instances forgotten", cold, off={"reconcile_cold": False}),
        hole("P9", "H7 a late trim", trim, (START, MOVE), off={"trim_stamped": False}),
    ]


def _thawing() -> State:
    """x is cold, and SQL's backup does not know it."""
    now = start(Budget(restore=1, wipe=1), seeds=(Seed(("a",), hot=False),), flushers=1, recoverers=1)
    return backed_up(now, start(Budget()))


def _cold() -> list[Hole]:
    stale = sql_restored(
        start(Budget(), seeds=(V2,), clients=0, evictors=1, recoverers=1), start(Budget(), seeds=(V1,))
    )
    later = backed_up(
        start(Budget(restore=1), seeds=(V2,), clients=0, evictors=1, recoverers=1), start(Budget(), seeds=(V1,))
    )
    evicted, older = _older(Seed(("a", "b"), hot=False), Seed(("a",), hot=False), Budget(restore=1))
    both = start(Budget(), seeds=(Seed(("a",), hot=False),), clients=2, flushers=1, evictors=1)
    slow = backed_up(
        start(Budget(restore=1), seeds=(V1,), clients=1, flushers=1, evictors=1), start(Budget(), seeds=(V1,))
    )
    return [
        hole("P11", "H8a evicted by meta.watermark", stale, off={"evict_by": "meta watermark"}),
        hole("P11", "H8b evicted by SQL's watermark", start(Budget(), seeds=(V1,), flushers=1, evictors=1), (MOVE,),
             off={"evict_by": "sql watermark"}, poison=frozenset("b")),
        hole("P11", "H8c eviction without stamp", later, off={"evict_stamped": False}),
        hole("P3", "H9 hydrated from an older SQL", backed_up(evicted, older), (NEXT,), off={"evicted_to": False}),
        hole("P3", "H9 checkpoint first, watermark second", both, (MOVE,), (NEXT,),
             off={"lookup_snapshot": "checkpoint first"}),
        hole("P3", "H9 watermark first, checkpoint second", slow, (MOVE, NEXT),
             off={"lookup_snapshot": "watermark first"}),
        hole("P3", "H10 hydrate overwrites", both, (MOVE,), (NEXT,), off={"hydrate_only_absent": False}),
        hole("P3", "H10 hydrate without stamp", _thawing(), (MOVE,), off={"hydrate_stamped": False}, asserted=INEXACT),
        hole("P7", "H11 durable by comparing ids", start(Budget(restart=1), flushers=1, recoverers=1),
             (replace(START, durable=True),), off={"durable_by_row": False}, asserted=INEXACT),
    ]  # fmt: skip


def _letters() -> list[Hole]:
    poison = {"poison": frozenset("b")}
    plain = start(Budget(), seeds=(V1,), flushers=1)
    two = start(Budget(), seeds=(V1,), flushers=2)
    lost = start(Budget(restart=1, save=1), seeds=(V1,), flushers=1, recoverers=1)
    wiped = start(Budget(wipe=1), seeds=(V1,), flushers=1, recoverers=1)
    mending = start(Budget(), seeds=(V1,), flushers=1, operator=1)
    return [
        hole("P3", "H12a waiting entries are skipped", plain, (MOVE, NEXT), off={"letters_with_flush": False}, **poison),
        hole("P3", "H12a parked by what Redis says", two, (MOVE, NEXT),
             off={"parked_read_in_flush": False}, batches=(1,), **poison),
        hole("P3", "H12b recovery forgets letters", lost, (MOVE,), off={"recovery_counts_letters": False}, asserted=INEXACT,
             **poison),
        hole("P3", "H12c hydrated without its letters", wiped, (MOVE, NEXT), off={"hydrate_parks": False}, asserted=INEXACT,
             **poison),
        hole("P3", "H12d mended too early", mending, (MOVE, NEXT), off={"letters_wait": False}, batches=(1,), **poison),
        hole("P3", "H12e half a queue discarded", mending, (MOVE, NEXT), off={"letters_whole_queue": False}, **poison),
        hole("P10", "M one bad record stops all", plain, (MOVE,), off={"poison_stops_one": False}, **poison),
    ]  # fmt: skip


def _identity() -> list[Hole]:
    detour = start(Budget(detour=1), recoverers=1)
    empty = start(Budget())
    return [
        hole("P8", "H13a a detour within the interval", detour, (START, MOVE), off={"detour_takes_longer": False}),
        hole("P8", "H13b the first call does not ask",
             _flushed_cache(saved_on_disk(start(Budget(restart=1), seeds=(U1,)), empty)),
             (replace(START, tid="c"),), off={"first_call_checks": False}),
        hole("P3", "H13 *intact* without comparing content",
             start(Budget(detour=1), flushers=1, recoverers=1), (START, Op("start", 0, "c")),
             off={"detour_takes_longer": False, "intact_by_content": False}, asserted=INEXACT - {"P8", "P9"}),
    ]  # fmt: skip


def _flushed_cache(state: State) -> State:
    """The server's scripts were flushed: NOSCRIPT without any other fault."""
    return state._replace(redis=state.redis._replace(cache=frozenset()))


def _reports() -> list[Hole]:
    late = start(Budget(lost_reply=1), seeds=(V1,), clients=2, ring=1)
    return [
        hole("P4", "H16 the ring has moved on", late, (MOVE,), (NEXT,), off={"old_answer": False}, ring=1),
        hole("P9", "H18 a loss with class *intact*", start(Budget(restart=1), recoverers=1), (START,),
             off={"loss_possible": False}),
        hole("P9", "H18 report and reset apart", start(Budget(restart=1), flushers=1, recoverers=2), (START, MOVE),
             off={"report_resets_tail": False}, batches=(1,),
             played=("start x", "move x 'b': OK", "loads epoch 1", "reads 1-1", "begins", "commits", "Redis restarts")),
    ]  # fmt: skip


def _stale_folds() -> State:
    """A flusher remembers x as it was in an epoch that a wipe and a restore of SQL have undone."""
    at = start(Budget(), seeds=(V1,), flushers=2)
    stale = IDLE_FLUSHER._replace(folds=((0, ("a", "b")),))
    return at._replace(flushers=(IDLE_FLUSHER, stale))


def _mistakes() -> list[Hole]:
    return [
        hole("P8", "M NOSCRIPT answered by a blind reload", start(Budget(restart=1)), (START, replace(START, tid="c")),
             off={"noscript_asks": False, "first_call_checks": False}),
        hole("P3", "M scripts without stamp", start(Budget(restart=1), flushers=1, recoverers=1), (START,),
             off={"stamped_scripts": False}, asserted=INEXACT),
        hole("P3", "M the witness is trimmed too",
             backed_up(start(Budget(restore=1), seeds=(V1,), flushers=1, recoverers=1), start(Budget(), seeds=(V1,))),
             (MOVE,), off={"trim_keeps_witness": False}),
        hole("P3", "M folds outlive their epoch", _stale_folds(), (NEXT, Op("move", 0, "d")),
             off={"folds_dropped_on_epoch": False}, fold_cache=True, batches=(1,)),
        hole("P5", "M two flushers, no compare-and-set", start(Budget(), flushers=2), (START,),
             off={"watermark_compared": False}),
        hole("P3", "M cursor in a transaction of its own", start(Budget(kill=1), flushers=1), (START,),
             off={"watermark_with_rows": False}),
        hole("P4", "M duplicates are looked for outside", start(Budget(lost_reply=1), seeds=(V1,)), (MOVE,),
             off={"ring_checked": False, "old_answer": False}),
        hole("P4", "M hydrated without its ring", start(Budget(lost_reply=1), seeds=(V1,), flushers=1, evictors=1), (MOVE,),
             off={"hydrate_brings_ring": False, "old_answer": False}),
    ]  # fmt: skip


def _findings() -> list[Hole]:
    """What this model found, in the protocol as DESIGN has it (D) or in the code as it was first read (C).

    - F1 (C) *One stamp for all threads.* A call goes out with the stamp that its process has now, not the one under which SQL
      was read. Thread 1 reads SQL; SQL is restored; a recovery ends; thread 2 is admitted to the new epoch; thread 1 trims,
      evicts or hydrates with the new stamp what it read before: H7, H8c and H10 again.
    - F2 (C) *A refused look-up.* ``OLD``, then the look-up in the log is refused (EPOCH: a false alarm's recovery), SQL has not
      flushed it: "not found", pinned to the version, admitted, applied twice.
    - F3 (C) The look-up begins at ``meta.watermark``, which is above SQL's after a restore: what lies between is not seen.
    - F4 (C) The look-up in SQL leaves out letters; the hash's flag may not be set yet.
    - F5 (D) *SQL behind* and open letters in the older copy: the reconciled row takes the version of a letter. Letters
      count as versions that SQL knows, and behind them the row is itself a letter.
    - F6 (D) *Diverged* must also drop hashes that SQL is ahead of although no entry of theirs is in the log.
    - F7 (D) *SQL behind* with a cold instance whose last entries are trimmed: nothing names what it lost, identity and owner
      are as recorded, the tail last seen went back too: a silent loss. This class always reports that loss is possible.
    - F8 (D) *Tail lost*, instances hydrated above the log's last id, then SQL restored to before: the mark's ``prev`` lies at
      or below the older watermark, so the log looks gapless, class *intact*, and a hash is ahead of all. The mark must name
      the higher of the log's last id and SQL's watermark; and *intact* must also ask that the next entry follows
      (else the flusher stops at the hole, and recovery after recovery finds nothing).
    - F9 (D) A discarded letter leaves no trace in SQL. A rollback to a moment before the flag or the drop brings its hash
      back, class *intact*: a tombstone must tell, and recovery drops the hashes it names.
    - F10 (D) A slot that migrates away and back while its tail is lost in between meets the old identity and the old scripts:
      not closed by any rule, only by an assumption.
    - F12 (D) A letter is discarded, its version given again, and SQL restored to before: the log, or the older SQL, brings the
      discarded transition back and two claim one version. Not closed by any rule here, only by an assumption. The flusher
      should then put the later one aside as a letter of its instance, not stop the partition (P10).
    - F11 (C, and D by the letter) *A check counts when it is sent.* After a detour thread 1's call compares and is refused;
      thread 2, or the next chunk in flight, sends within the interval of that check and is not compared: accepted. Only a
      check that was answered well may count, from the moment it was sent.
    """
    trim = start(Budget(restore=1), flushers=1, recoverers=1)
    evicting = backed_up(
        start(Budget(restore=1), seeds=(V2,), clients=0, evictors=1, recoverers=1), start(Budget(), seeds=(V1,))
    )
    discarded = backed_up(
        start(Budget(restore=1), seeds=(Seed(("a",), letters=("b",)),), operator=1), start(Budget(), seeds=(V1,))
    )
    again = replace(MOVE, retry=True)
    repeated = start(Budget(), seeds=(Seed(("a",), ("b", "c")),), recoverers=1, ring=1)
    restored = sql_restored(start(Budget(), seeds=(Seed(("a", "b", "c")),), ring=1), start(Budget(), seeds=(V1,)))
    untold = start(Budget(), seeds=(Seed(("a",), letters=("b", "c")),), ring=1)
    untold = _unflagged(untold)
    reopened = sql_restored(
        start(Budget(), seeds=(Seed(tuple("abcd")),), retained=False, clients=0, flushers=1, recoverers=1),
        start(Budget(), seeds=(Seed(("a",), letters=("b",)),)),
    )
    pair, home = (V2, NONE), (0, 0)
    split = saved_on_disk(
        start(Budget(detour=1), seeds=pair, home=home, flushers=1, recoverers=1),
        start(Budget(), seeds=(V1, NONE), home=home),
    )
    other = Seed(("d",))
    forgotten = sql_restored(
        start(Budget(), seeds=(Seed(("a", "b"), hot=False), other), home=home, retained=False, clients=0, recoverers=1),
        start(Budget(), seeds=(Seed(("a",), hot=False), NONE), home=home),
    )
    letter = Seed(("a",), letters=("b",))
    discarding = start(Budget(restart=1), seeds=(letter, other), home=home, recoverers=1, operator=1)
    discarding = _unflagged(discarding)
    discarding = saved_on_disk(discarding, discarding)
    losing = _tail_lost(clients=1)
    away = start(Budget(migrate=1, restart=1, back=1), seeds=(V1,))
    return [
        hole("P11", "F1 one stamp for all threads: trim", trim, (START, MOVE), off={"stamp_held": False}),
        hole("P11", "F1 one stamp for all threads: evict", evicting, off={"stamp_held": False}),
        hole("P3", "F1 one stamp for all threads: hydrate", _thawing(), (MOVE,), off={"stamp_held": False}, asserted=INEXACT),
        hole("P8", "F11 a check counts when it is sent", start(Budget(detour=1), clients=2), (START, NEXT),
             (replace(START, tid="d"),), off={"checked_when_answered": False},
             played=("client A: start x", "Redis is demoted")),
        hole("P3", "F12 a discard that SQL forgets", discarded, (NEXT,), off={"no_discard_since_backup": False},
             poison=frozenset("b")),
        hole("P4", "F2 a refused look-up taken for 'not found'", repeated, (again,), 
             off={"find_refusal_restarts": False, "refusal_forgets_pin": False}, ring=1),
        hole("P4", "F3 looked for behind meta.watermark", restored, (again,), off={"find_from_sql_watermark": False}, ring=1),
        hole("P4", "F4 letters not looked at", untold, (again,), off={"find_in_letters": False}, ring=1,
             poison=frozenset("b")),
        hole("P3", "F5 *SQL behind* does not count letters", reopened, off={"reconcile_counts_letters": False}),
        hole("P3", "F6 *diverged* keeps a hash that SQL is ahead of", split, (Op("start", 1, "d"),), home=home,
             off={"detour_takes_longer": False, "diverged_drops_stale": False}, asserted=INEXACT - {"P8"}),
        hole("P3", "F8 a mark forgets what SQL had", losing, (NEXT,), off={"mark_names_watermark": False},
             asserted=INEXACT, played=REOPENED),
        hole("P3", "F8 *intact* with a hole behind the watermark", losing, (NEXT,),
             off={"intact_needs_next": False}, asserted=INEXACT, played=REOPENED),
        hole("P3", "F9 a discarded transition comes back", discarding, (NEXT,), home=home, poison=frozenset("b"),
             off={"recovery_drops_discarded": False}),
        hole("P8", "F10 lost while the slot was away", away, (MOVE, NEXT), off={"away_loses_nothing": False}),
        hole("P9", "F7 *SQL behind* reports no loss", forgotten, off={"behind_says_loss": False}, home=home),
    ]  # fmt: skip


def _unflagged(state: State) -> State:
    """The flusher died before it marked the parked hash."""
    part = state.redis.parts[0]
    copy = part.hashes[0]
    assert copy is not None
    return state._replace(redis=put_part(state.redis, 0, put_hash(part, 0, copy._replace(parked=False))))


__all__ = ["Hole", "hole", "holes", "mended", "saved_on_disk"]
