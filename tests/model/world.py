"""A *world*: the rules of the protocol, each a switch, and the scope of one exploration.

A rule that is on is the protocol as DESIGN section 4 has it. Off (or at another word) it is the mistake that the earlier
text made, or that a careless implementation makes; the hole of ``protocol.md`` that it closes is named beside it. Names
beginning with ``F`` are findings of this model; they are told in ``configurations.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.model.state import Budget, State


@dataclass(frozen=True, slots=True)
class Rules:
    """The protocol, rule by rule."""

    # Epoch, owner, fence
    epoch_in_partition_rows: bool = True  # H1: step 1 writes every partition row; the flush compares that row
    owner_token: bool = True  # H14: an epoch is a number and an owner
    fence_only_raises: bool = True  # H4d: the fence refuses unless meta.epoch is lower
    fence_keeps_identity: bool = True  # H15: only `ready` writes the recorded identity
    probe_fenced: bool = True  # H4c: the recovery's reads are guarded
    ready_guards_meta: bool = True  # H4a: `ready` refuses unless meta is as the fence left it
    ready_guards_identity: bool = True  # H4b: ... and the server is the one that the fence met
    mark_names_watermark: bool = True  # F8: a mark names the higher of the log's last id and SQL's watermark
    marks: bool = True  # H5: an epoch begins with a mark that names the id before it

    # Admission
    stamped_scripts: bool = True  # every script refuses another epoch, owner, or what is not ready
    noscript_asks: bool = True  # NOSCRIPT is never answered by a blind reload
    first_call_checks: bool = True  # H13b: the first call on a new connection compares the identity
    detour_takes_longer: bool = True  # H13a: the stated assumption about the identity interval
    no_discard_since_backup: bool = True  # F12: assumption: SQL is not restored to before a letter was discarded
    away_loses_nothing: bool = True  # F10: assumption: a slot that migrates away and back loses nothing in between
    identity_always: bool = False  # H13a: `identity_check=always`
    checked_when_answered: bool = True  # F11: a check counts once it was answered well, not when it was sent
    stamp_held: bool = True  # F1: what was read under one epoch is sent with that epoch's stamp

    # Flush
    log_read_admitted: bool = True  # H2: the log is read by a stamped script
    watermark_compared: bool = True  # P5: the flush compares the watermark that it read
    watermark_with_rows: bool = True  # P5: cursor and rows in one transaction
    trim_stamped: bool = True  # H7
    trim_keeps_witness: bool = True  # H13: the entry at the watermark stays
    folds_dropped_on_epoch: bool = True  # the cache of folded checkpoints ends with the epoch

    # Letters
    letters_with_flush: bool = True  # H12a: waiting entries become letters in the same transaction
    parked_read_in_flush: bool = True  # H12a: who is parked is read behind the compare-and-set
    recovery_counts_letters: bool = True  # H12b
    hydrate_parks: bool = True  # H12c
    letters_wait: bool = True  # H12d: mended when the last entry is at or below the watermark
    letters_whole_queue: bool = True  # H12e
    recovery_drops_discarded: bool = True  # F9: a hash that holds a discarded transition may come back with a rollback
    poison_stops_one: bool = True  # P10: dead letters exist at all

    # Cold tier
    evict_by: str = "checkpoint"  # H8: or "meta watermark", "sql watermark"
    evict_stamped: bool = True  # H8
    evicted_to: bool = True  # H9: SQL's watermark must be at or above what Redis dropped
    lookup_snapshot: str = "one"  # H9: or "checkpoint first", "watermark first"
    hydrate_only_absent: bool = True  # H10
    hydrate_stamped: bool = True  # H10
    hydrate_brings_ring: bool = True  # P4
    drop_sets_cold: str = "drop"  # H3: or "ready", "never"

    # Retries and durability
    ring_checked: bool = True  # P4: duplicates are looked for inside the script
    old_answer: bool = True  # H16
    find_refusal_restarts: bool = True  # F2: a refused look-up of the log is no "not found"
    refusal_forgets_pin: bool = True  # F2: nor is the version that it was pinned to kept over an admission
    find_from_sql_watermark: bool = True  # F3: meta.watermark may be above SQL's
    find_in_letters: bool = True  # F4
    durable_by_row: bool = True  # H11

    # Classes of recovery
    intact_by_content: bool = True  # H13: the entry at the watermark carries SQL's transition id
    intact_needs_next: bool = True  # F8: *intact* also needs that what stands behind the watermark follows it
    mark_behind_watermark: bool = True  # H17
    reconcile_in_sql: bool = True  # H6a
    reconcile_one_tx: bool = True  # H6c
    reconcile_cold: bool = True  # H6d
    reconcile_counts_letters: bool = True  # F5
    diverged_drops_stale: bool = True  # F6
    loss_possible: bool = True  # H18
    report_resets_tail: bool = True  # H18: report and reset of the tail in one transaction
    behind_says_loss: bool = True  # F7: *SQL behind* always says that loss is possible


@dataclass(frozen=True, slots=True)
class Op:
    """What a client wants: ``start`` or ``move`` of an instance, under a transition id."""

    kind: str
    inst: int
    tid: str
    durable: bool = False
    retry: bool = False


ALL = frozenset({*(f"P{n}" for n in range(1, 13)), "P9 exact"})
"""What is asserted: the promises, and that reports never count more as lost than was."""


@dataclass(frozen=True, slots=True)
class World:
    """One configuration: rules, scope, and where the exploration starts.

    ``played`` steps are taken first, each the first one whose description contains the text: they put the interesting part
    near the start. ``reaches`` are texts of steps that a complete exploration must have taken, else it shows nothing.
    ``batches`` are the sizes in which a flusher may read, 0 being all. ``home`` is the partition of each instance.
    """

    name: str
    start: State
    clients: tuple[tuple[Op, ...], ...]
    home: tuple[int, ...] = (0,)
    rules: Rules = field(default_factory=Rules)
    poison: frozenset[str] = frozenset()
    ring: int = 2
    trim: bool = True
    batches: tuple[int, ...] = (0,)
    fold_cache: bool = False
    asserted: frozenset[str] = ALL
    played: tuple[str, ...] = ()
    reaches: tuple[str, ...] = ()

    @property
    def budget(self) -> Budget:
        return self.start.budget
