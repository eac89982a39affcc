"""The mistakes of the trade, each as a textual patch of the package, and the tests that must turn red.

A patch's old text must stand exactly once in its file: ``test_catalogue.py`` sees to it in every test run, so that a change
of the code takes its mutants along.
"""

from __future__ import annotations

from typing import NamedTuple

_LUA = "statecache/hot/lua"
_ITEM = f"{_LUA}/include/apply_item.lua"
_LONE = f"{_LUA}/include/apply_lone.lua"
_RARE = f"{_LUA}/include/apply_rare.lua"
_GUARD = f"{_LUA}/include/ready_or_fenced.lua"
_ELSEWHERE = "tests/integration/test_elsewhere.py::"
_CODES = "tests/lua/test_reply_codes.py::test_code_is_reached_and_writes_what_the_header_says"
_SCRIPTS = "tests/lua/test_partition_scripts.py::"
_APPLY = "tests/lua/test_apply.py::"
_HOLES = "tests/integration/test_holes.py::"
_CHAOS = "tests/integration/test_chaos_findings.py::"
_FLUSHER = "tests/integration/test_flusher.py::"
_RECOVERY = "tests/integration/test_recovery.py::"
_REVIEW = "tests/integration/test_review_findings.py::"
_CLIENT = "tests/integration/test_faults_client.py::"
_ORDER = "tests/integration/test_aio_order.py::"
_THREADS = "tests/integration/test_cache_batching.py::"
_LETTERS = "tests/integration/test_letters.py::"
_DURABILITY = "tests/integration/test_durability.py::"
_DURABLE = "tests/integration/test_durable_flush.py::"
_REFUSED = "tests/integration/test_refused_writes.py::"
_POINTS = "tests/crash/test_crash_points.py::test_dying_between_any_two_steps"


class Patch(NamedTuple):
    """Replace a text that stands once in a file."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """One mistake. ``tests`` are node ids; at least one must fail."""

    name: str
    patches: tuple[Patch, ...]
    tests: tuple[str, ...]


def _codes(script: str, *codes: str) -> tuple[str, ...]:
    return tuple(f"{_CODES}[real-{script}-{code}]" for code in codes)


_ADMISSION = ("EPOCH", "RECOVERING", "IDENTITY")

MUTANTS = [
    # --- the list of the trade -------------------------------------------------------------------------------------------
    Mutant(
        "offset in a separate transaction",
        (
            Patch(
                "statecache/engine/flusher.py",
                "        with self._counted(batches), self.durable.flush_transaction(limit_seconds) as transaction:\n"
                "            transaction.advance([batch.advance() for batch in batches])\n",
                "        with self.durable.flush_transaction(limit_seconds) as first:\n"
                "            first.advance([batch.advance() for batch in batches])\n"
                "        with self.durable.flush_transaction(limit_seconds) as transaction:\n",
            ),
        ),
        (f"{_POINTS}[flush]",),
    ),
    Mutant(
        "no epoch in the compare-and-set",
        (
            Patch(
                "statecache/durable/flush.py",
                '        _partitions.epoch == sa.bindparam("e"),\n'
                '        _partitions.owner == sa.bindparam("o"),\n'
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
                '        sa.bindparam("e", type_=sa.Integer) >= 0,\n'
                '        sa.bindparam("o", type_=sa.Text).is_not(None),\n'
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
            ),
        ),
        (f"{_HOLES}test_h1_flusher_that_read_before_the_recovery_commits_nothing",),
    ),
    Mutant(
        "no owner in the compare-and-set",
        (
            Patch(
                "statecache/durable/flush.py",
                '        _partitions.owner == sa.bindparam("o"),\n'
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
                '        sa.bindparam("o", type_=sa.Text).is_not(None),\n'
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
            ),
        ),
        (
            "tests/integration/test_durable_flush.py::test_another_flusher_went_ahead",
            f"{_HOLES}test_h14_epoch_that_is_taken_twice_is_not_the_same",
        ),
    ),
    Mutant(
        "watermark not compared",
        (
            Patch(
                "statecache/durable/flush.py",
                '        _partitions.watermark_seq == sa.bindparam("old_seq"),\n',
                '        sa.bindparam("old_seq", type_=sa.BigInteger) >= 0,\n',
            ),
        ),
        ("tests/mutants/test_more.py::test_a_slower_flusher_does_not_set_the_watermark_back",),
    ),
    Mutant(
        "compare-and-set dropped",
        (Patch("statecache/durable/flush.py", "            if changed != len(values):\n", "            if False:\n"),),
        (f"{_FLUSHER}test_overtaken_flusher_drops_what_it_read", f"{_DURABLE}test_another_flusher_went_ahead"),
    ),
    Mutant(
        "DO NOTHING in history",
        (
            Patch(
                "statecache/durable/sqlite.py",
                "VALUES ({', '.join(_ENTRY_VALUES)})\"",
                "VALUES ({', '.join(_ENTRY_VALUES)}) ON CONFLICT DO NOTHING\"",
            ),
        ),
        (f"{_LETTERS}test_a_row_that_is_in_history_already_is_not_swallowed[sqlite sync]",),
    ),
    Mutant(
        "trim before commit",
        (
            Patch(
                "statecache/engine/flusher.py",
                "            try:\n                parked = self._commit(batches)\n",
                "            try:\n"
                "                self._after(rows, batches)\n"
                "                parked = self._commit(batches)\n",
            ),
        ),
        (f"{_POINTS}[flush]",),
    ),
    Mutant(
        "WAIT on another connection",
        (
            Patch(
                "statecache/hot/store.py",
                '                confirmation.command(confirm) if confirm is not None else b"",\n',
                "",
            ),
            Patch(
                "statecache/hot/store.py",
                "        if confirm is not None and not confirmation.is_confirmed_by(line, confirm):\n"
                "            return confirmation.unconfirmed(outcomes)\n",
                "        if confirm is not None:\n"
                "            other = self.wires.take()\n"
                "            other.send(confirmation.command(confirm))\n"
                "            if not confirmation.is_confirmed_by(other, confirm):\n"
                "                outcomes = confirmation.unconfirmed(outcomes)\n"
                "            other.close()\n",
            ),
        ),
        (f"{_DURABILITY}test_replica_that_does_not_answer",),
    ),
    Mutant(
        "a duplicate writes nothing",
        (Patch(_ITEM, "        call('HSET', key, '@r', ring) -- a WAIT after this call speaks of this write\n", ""),),
        (f"{_DURABILITY}test_a_repetition_waits_for_a_write_of_its_own",),
    ),
    Mutant(
        "redis-py's default retries",
        (
            Patch(
                "statecache/hot/wire.py",
                "            retry=retry_class(NoBackoff(), 0),\n",
                "            retry=retry_class(NoBackoff(), 3),\n",
            ),
            Patch(
                "statecache/hot/wire.py",
                "    def call(self, packed: bytes) -> Any:\n        self.send(packed)\n        return self.read()\n",
                "    def call(self, packed: bytes) -> Any:\n"
                "        def once() -> Any:\n"
                "            self.send(packed)\n"
                "            return self.read()\n"
                "        def again(error: Exception) -> None:\n"
                "            self._connection.disconnect()\n"
                "            self._connection.connect()\n"
                "            self.__init__(self._connection)\n"
                "        return self._connection.retry.call_with_retry(once, again)\n",
            ),
        ),
        (f"{_CLIENT}test_a_wire_sends_once",),
    ),
    Mutant(
        "duplicate check outside the script",
        (
            Patch(_ITEM, "    if place then\n", "    if false then\n"),
            Patch(
                "statecache/core/flows.py",
                "                outcome = yield item\n",
                "                early = yield Find(item.partition, item.move.machine, item.id, None, item.transition_id)\n"
                "                if early is not None:\n"
                "                    return _receipt_of(request, early)\n"
                "                outcome = yield item\n",
            ),
            Patch(
                "statecache/core/flows.py",
                "    if request.guard is not None:\n        return None\n",
                "    if request:\n        return None\n",
            ),
        ),
        (f"{_CLIENT}test_two_processes_with_one_transition_id",),
    ),
    Mutant(
        "a recovery that a stranger's record is in the way of begins again under the next epoch only",
        (Patch("statecache/engine/recovery.py", "max(row.epoch, self.above, *(", "max(row.epoch, *("),),
        (f"{_CHAOS}test_garbage_under_an_id_of_its_own",),
    ),
    Mutant(
        "strangers' records hide a lost tail",
        (Patch("statecache/engine/lines.py", "        if hidden is not None:\n", "        if False:\n"),),
        (f"{_CHAOS}test_garbage_hides_no_lost_tail[probe]",),
    ),
    Mutant(
        "recovery without fence",
        (
            Patch(f"{_LUA}/fence.lua", "if ARGV[4] ~= '1' then\n", "if false then\n"),
            Patch(_GUARD, "  if fenced == '*' then return false end\n", "  if fenced ~= '' then return false end\n"),
            Patch(
                f"{_LUA}/ready.lua",
                "redis.call('HSET', meta, 'identity', ARGV[1], ",
                "redis.call('HSET', meta, 'epoch', EPOCH, 'owner', OWNER, 'identity', ARGV[1], ",
            ),
        ),
        (
            f"{_RECOVERY}test_call_in_the_middle_of_a_recovery",
            f"{_HOLES}test_h4a_redis_rolls_back_between_the_fence_and_a_step",
        ),
    ),
    Mutant(
        "NOSCRIPT answered by a plain reload",
        (
            Patch(
                "statecache/engine/admission.py",
                "            self._ensure_alone(deadline)\n",
                '            if code == "NOSCRIPT" and stamp.epoch:\n'
                "                with self._hot.wires.wire() as line:\n"
                "                    self._hot._load(line, stamp)\n"
                "                return\n"
                "            self._ensure_alone(deadline)\n",
            ),
            Patch(
                "statecache/hot/store.py",
                "        except redis.ResponseError as error:\n            self.wires.distrust(line)\n",
                "        except redis.ResponseError as error:\n",
            ),
        ),
        (f"{_CLIENT}test_unknown_scripts_are_not_simply_loaded_again",),
    ),
    Mutant(
        "epoch compared in another row",
        (
            Patch(
                "statecache/durable/flush.py",
                '        _partitions.epoch == sa.bindparam("e"),\n'
                '        _partitions.owner == sa.bindparam("o"),\n'
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
                "        sa.exists(\n"
                "            sa.select(schema.store.c.id).where(\n"
                '                schema.store.c.epoch == sa.bindparam("e"), schema.store.c.owner == sa.bindparam("o")\n'
                "            )\n"
                "        ),\n"
                '        _partitions.watermark_epoch == sa.bindparam("old_epoch"),\n',
            ),
        ),
        ("tests/mutants/test_more.py::test_an_open_recovery_ends_a_flush_that_waits_for_it",),
    ),
    Mutant(
        "recovery writes its epoch into the store's row only",
        (
            Patch(
                "statecache/durable/recoveries.py",
                '            [{"p": number, "e": own["epoch"], "o": own["owner"]} for number in numbers],\n',
                '            [{"p": -1 - number, "e": own["epoch"], "o": own["owner"]} for number in numbers],\n',
            ),
        ),
        (f"{_HOLES}test_h1_recovery_waits_for_an_open_flush_and_counts_it",),
    ),
    Mutant(
        "verify: history and checkpoint of two moments",
        (Patch("statecache/durable/store.py", "return self.database.pages(ask)", "return self.database.read(ask)"),),
        ("tests/integration/test_verify.py",),
    ),
    Mutant(
        "verify: a hash that stands behind passes for one that has moved on",
        (Patch("statecache/engine/verify.py", "reached <= _stand(hash_())[1]\n", "reached\n"),),
        ("tests/integration/test_verify.py",),
    ),
    Mutant(
        "nobody ends a COPY that stands still",
        (Patch("statecache/durable/engine.py", "                self._end_frozen()\n", "                pass\n"),),
        ("tests/integration/test_durable_recoveries.py",),
    ),
    Mutant(
        "unstamped trim",
        (Patch(f"{_LUA}/flushed.lua", "  local code = refusal(meta, here, '')\n", "  local code = false\n"),),
        (f"{_HOLES}test_h7_trim_that_comes_after_a_wipe_makes_no_meta", *_codes("flushed", *_ADMISSION)),
    ),
    Mutant(
        "hydrate that overwrites",
        (
            Patch(
                f"{_LUA}/hydrate.lua",
                "  elseif not all_absent and call('EXISTS', key) == 1 then\n",
                "  elseif false then\n",
            ),
        ),
        (f"{_HOLES}test_h10_slow_hydrator_overwrites_nothing", *_codes("hydrate", "EXISTS")),
    ),
    Mutant(
        "contiguity across epochs by 'starts at 0'",
        (
            Patch(
                "statecache/core/entry.py",
                "        return prev <= cursor < entry_id\n",
                "        return entry_id.seq == 0 and cursor < entry_id\n",
            ),
        ),
        (f"{_HOLES}test_h5_epochs_are_not_crossed_by_their_numbers",),
    ),
    # --- the flusher -----------------------------------------------------------------------------------------------------
    Mutant(
        "contiguity not checked",
        (
            Patch(
                "statecache/engine/batching.py",
                "        if not entry.follows(",
                "        if False and not entry.follows(",
            ),
        ),
        (f"{_FLUSHER}test_hole_stops_its_partition_and_the_others_go_on",),
    ),
    Mutant(
        "versions that do not go on get into history",
        (
            Patch(
                "statecache/engine/batching.py",
                "                fold.require_next(before.version if before else 0, self._groups[partition][instance])\n",
                "                pass\n",
            ),
        ),
        (f"{_FLUSHER}test_versions_that_do_not_go_on_are_put_aside[sqlite-2]",),
    ),
    Mutant(
        "a patch of some fields taken for all",
        (
            Patch(
                "statecache/core/fold.py",
                "(shape and found == shape)",
                "shape",
            ),
        ),
        ("tests/property/test_folding.py::test_fold_of_texts_is_that_of_values",),
    ),
    Mutant(
        "trim including the witness",
        (
            Patch(
                f"{_LUA}/flushed.lua",
                "redis.call('XTRIM', log, 'MINID', '=', trim_to)",
                "redis.call('XTRIM', log, 'MAXLEN', '=', 0)",
            ),
        ),
        (f"{_FLUSHER}test_trimming_leaves_the_witness",),
    ),
    Mutant(
        "the watermark in Redis may go back",
        (
            Patch(
                f"{_LUA}/flushed.lua",
                "    if m[1] and id_above(m[1], watermark) then watermark = m[1] end\n",
                "",
            ),
        ),
        (f"{_SCRIPTS}test_watermark_only_grows_and_the_witness_stays",),
    ),
    Mutant(
        "whether an instance is parked is not asked in SQL",
        (
            Patch(
                "statecache/engine/flusher.py",
                "            plan.put_aside(transaction.parked(plan.instances),",
                "            plan.put_aside(set(),",
            ),
        ),
        (f"{_LETTERS}test_moves_that_come_before_the_flag[sqlite sync]",),
    ),
    Mutant(
        "waiting entries are not kept",
        (
            Patch(
                "statecache/engine/flusher.py",
                "            for letter in plan.letters:\n",
                "            for letter in [one for one in plan.letters if not one.waiting]:\n",
            ),
        ),
        (f"{_LETTERS}test_one_refused_entry_stops_only_its_own_instance[sqlite sync]",),
    ),
    Mutant(
        "a refused entry stops its partition",
        (
            Patch(
                "statecache/engine/flusher.py",
                "                return self._put_aside(batches[0], error)\n",
                "                raise\n",
            ),
        ),
        (f"{_LETTERS}test_one_refused_entry_stops_only_its_own_instance[sqlite sync]",),
    ),
    Mutant(
        "checkpoints may go back",
        (
            Patch(
                "statecache/durable/sqlite.py",
                '    + " WHERE statecache_checkpoints.version < excluded.version"\n',
                "",
            ),
        ),
        (f"{_DURABLE}test_checkpoints_only_go_forward",),
    ),
    Mutant(
        "what was read ahead is used wherever SQL stands",
        (
            Patch(
                "statecache/engine/flusher.py",
                "        if any(found.get(row.partition) != row.watermark for row in rows):\n",
                "        if False:\n",
            ),
        ),
        (f"{_FLUSHER}test_what_was_read_ahead_is_not_used_behind_another_flusher",),
    ),
    Mutant(
        "a look ahead that found nothing is taken for the log",
        (
            Patch(
                "statecache/engine/flusher.py",
                "        if not any(batch.records for batch in batches):\n",
                "        if False:\n",
            ),
        ),
        (f"{_FLUSHER}test_a_steady_load_is_read_ahead_and_waits_for_no_pause",),
    ),
    Mutant(
        "the flusher forgets by age of the first fold, not of the last",
        (
            Patch(
                "statecache/engine/folds.py",
                "        pop = self._folds.pop\n",
                "        pop = self._folds.get\n",
            ),
        ),
        ("tests/unit/test_folds.py::test_who_has_not_moved_for_longest_goes_first",),
    ),
    Mutant(
        "the flusher remembers folds of an older epoch",
        (
            Patch(
                "statecache/engine/flusher.py",
                "    def _forget(self, pair: scripts.Stamp) -> None:\n        self._cache.clear()\n",
                "    def _forget(self, pair: scripts.Stamp) -> None:\n",
            ),
        ),
        ("tests/mutants/test_more.py::test_a_flusher_forgets_what_it_folded_before_a_recovery",),
    ),
    Mutant(
        "a stopped flusher keeps its locks",
        (Patch("statecache/durable/engine.py", '        cursor.connection.execute("SELECT 1")\n', "        pass\n"),),
        ("tests/mutants/test_more.py::test_postgresql_ends_a_transaction_that_stands_still",),
    ),
    # --- the apply script ------------------------------------------------------------------------------------------------
    Mutant(
        "ring searched unaligned",
        (Patch(_ITEM, "  while place and place % 8 ~= 1 do", "  while false do"),),
        (f"{_APPLY}test_token_across_two_others_is_no_hit", f"{_APPLY}test_token_is_found_behind_a_misaligned_hit"),
    ),
    Mutant(
        "FULL ignored",
        (
            Patch(
                _ITEM,
                "        if not rare.has_room(p) then line = 'FULL' break end\n      end\n      if expected ~= 0",
                "      end\n      if expected ~= 0",
            ),
        ),
        (*_codes("apply", "FULL"), f"{_APPLY}test_backlog_limit_counts_within_one_call"),
    ),
    Mutant(
        "FULL ignored for starts",
        (
            Patch(
                _ITEM,
                "        if not rare.has_room(p) then line = 'FULL' break end\n      end\n      if fields",
                "      end\n      if fields",
            ),
        ),
        ("tests/integration/test_backpressure.py::test_the_bound_holds_for_starts",),
    ),
    Mutant(
        "expected version not compared",
        (Patch(_ITEM, "  if expected ~= 0 and expected ~= version + 0 then", "  if false then"),),
        _codes("apply", "VERSION"),
    ),
    Mutant(
        "undeclared moves are taken",
        (
            Patch(
                _ITEM,
                "      if pair > pairs_end then line = 'STATE ' .. from .. ' ' .. version break end\n",
                "      if pair > pairs_end then pair = move[8] end\n",
            ),
        ),
        _codes("apply", "STATE"),
    ),
    Mutant(
        "parked instances go on",
        (Patch(_ITEM, "        if find(flags, 'p', 1, true) then line = 'PARKED' break end\n", ""),),
        (*_codes("apply", "PARKED"), f"{_LETTERS}test_who_waits_for_it_is_told[sqlite sync]"),
    ),
    Mutant(
        "a version that a guard has seen stands for a question to history",
        (
            Patch(
                _ITEM,
                "version - #ring / 8 > extras[1] then",
                "version - #ring / 8 > extras[1] and expected ~= version + 0 then",
            ),
        ),
        ("tests/integration/test_review_findings.py::test_repetition_of_a_guarded_call_is_applied_once",),
    ),
    Mutant(
        "what was discarded counts as long as the log holds it",
        (
            Patch(
                "statecache/engine/driver.py",
                "        return [one for one in entries if (one.machine, one.id, one.entry_id) not in gone]",
                "        return [one for one in entries if gone or one]",
            ),
        ),
        ("tests/integration/test_review_findings.py::test_repetition_of_what_was_discarded_is_applied",),
    ),
    Mutant(
        "a ring that dropped ids is believed",
        (
            Patch(
                _ITEM,
                "  if extras and extras[1] >= 0 and version - #ring / 8",
                "  if false and version - #ring / 8",
            ),
        ),
        (*_codes("apply", "OLD"), f"{_CLIENT}test_an_id_that_the_ring_has_dropped"),
    ),
    Mutant(
        "a cold partition's start needs no look at SQL",
        (
            Patch(
                _ITEM,
                "(cold ~= '0' and (absent == '' or rare.id_above(evicted_to, absent)))",
                "false",
            ),
        ),
        (
            f"{_APPLY}test_start_of_a_cold_partition_needs_a_look_at_sql",
            f"{_RECOVERY}test_start_in_the_lost_tail_is_not_started_again",
        ),
    ),
    Mutant(
        "`evicted_to` not compared by a start",
        (Patch(_ITEM, "(absent == '' or rare.id_above(evicted_to, absent))", "absent == ''"),),
        (f"{_APPLY}test_start_of_a_cold_partition_needs_a_look_at_sql",),
    ),
    Mutant(
        "apply admits another epoch",
        (Patch(f"{_LUA}/apply.lua", "((m[1] ~= EPOCH or m[2] ~= OWNER) and 'EPOCH')", "false"),),
        _codes("apply", "EPOCH"),
    ),
    Mutant(
        "apply admits another owner",
        (Patch(f"{_LUA}/apply.lua", "((m[1] ~= EPOCH or m[2] ~= OWNER) and 'EPOCH')", "(m[1] ~= EPOCH and 'EPOCH')"),),
        ("tests/lua/test_reply_codes.py::test_wrong_stamp_is_refused",),
    ),
    Mutant(
        "apply admits while it is recovering",
        (Patch(f"{_LUA}/apply.lua", "(m[3] ~= 'ready' and 'RECOVERING')", "false"),),
        _codes("apply", "RECOVERING"),
    ),
    Mutant(
        "apply admits another server",
        (Patch(f"{_LUA}/apply.lua", "(here and call('HGET', meta, 'identity') ~= here and 'IDENTITY')", "false"),),
        _codes("apply", "IDENTITY"),
    ),
    *[
        Mutant(
            f"a call of one item: {name}",
            (Patch(_LONE, old, new),),
            (f"tests/lua/test_{test}",),
        )
        for name, old, new, test in (
            (
                "another epoch is admitted",
                "m[1] ~= EPOCH or ",
                "",
                "apply_lone.py::test_whatever_it_meets[real-another epoch]",
            ),
            (
                "another owner is admitted",
                "m[2] ~= OWNER or ",
                "",
                "apply_lone.py::test_whatever_it_meets[real-another owner]",
            ),
            (
                "admitted while it is recovering",
                "m[3] ~= 'ready' or ",
                "",
                "apply_lone.py::test_whatever_it_meets[real-recovering]",
            ),
            (
                "the log has always room",
                " <= 0 then break",
                " <= -9999 then break",
                "apply_lone.py::test_whatever_it_meets[real-no room]",
            ),
            (
                "its id may be in the ring",
                " or find(ring, token, 1, true) then",
                " then",
                "apply_lone.py::test_any_run[real-1]",
            ),
            (
                "a parked instance moves",
                "(%d+) %d+ %d+$",
                "(%d+) %d+ %d+",
                "apply_lone.py::test_whatever_it_meets[real-parked]",
            ),
            (
                "the server is not compared",
                " or here then break",
                " then break",
                "reply_codes.py::test_code_is_reached_and_writes_what_the_header_says[real-apply-IDENTITY]",
            ),
            (
                "deadlines are not noted",
                "(deadlines[from] or deadlines[to])",
                "false",
                "apply_lone.py::test_any_run[real-1]",
            ),
            (
                "many fields are not counted",
                " or NARROW_MAX + fields > fields_max then",
                " then",
                "apply_lone.py::test_fields_of_any_number[real-257]",
            ),
            (
                "many fields are not marked",
                "  if new > 0 and",
                "  if false and",
                "apply_lone.py::test_fields_of_any_number[real-66]",
            ),
        )
    ],
    # --- admission in the other scripts ----------------------------------------------------------------------------------
    Mutant(
        "the guard admits another epoch and owner",
        (Patch(_GUARD, "  if m[1] ~= EPOCH or m[2] ~= OWNER then return 'EPOCH' end\n", ""),),
        _codes("evict", "EPOCH") + _codes("hydrate", "EPOCH") + _codes("ready", "EPOCH"),
    ),
    Mutant(
        "the guard admits another owner",
        (Patch(_GUARD, "  if m[1] ~= EPOCH or m[2] ~= OWNER then", "  if m[1] ~= EPOCH then"),),
        ("tests/lua/test_reply_codes.py::test_wrong_stamp_is_refused",),
    ),
    Mutant(
        "the guard admits any status",
        (Patch(_GUARD, "  if m[3] ~= (fenced == '' and 'ready' or 'recovering') then return 'RECOVERING' end\n", ""),),
        _codes("evict", "RECOVERING") + _codes("drop", "RECOVERING"),
    ),
    Mutant(
        "the guard admits another server",
        (Patch(_GUARD, "  if here ~= (fenced == '' and m[4] or fenced) then return 'IDENTITY' end\n", ""),),
        _codes("evict", "IDENTITY") + _codes("ready", "IDENTITY"),
    ),
    *[
        Mutant(
            f"{script} is not guarded",
            (Patch(f"{_LUA}/{script}.lua", old, new),),
            _codes(script, *_ADMISSION),
        )
        for script, old, new in (
            ("evict", "  refused[p] = refusal(KEYS[p], here, '')\n", ""),
            ("hydrate", "  refused[p] = refusal(KEYS[p], here, '')\n", ""),
            ("park", "  refused[p] = refusal(KEYS[p], here, '')\n", ""),
            ("read", "  local code = refusal(meta, here, fenced)\n", "  local code = false\n"),
            ("find", "local code = refusal(KEYS[1], identity(), '')\n", "local code = false\n"),
            ("probe", "local code = refusal(meta, identity(), ARGV[1])\n", "local code = false\n"),
            ("drop", "local code = refusal(meta, identity(), ARGV[1])\n", "local code = false\n"),
            ("ready", "local code = refusal(meta, identity(), ARGV[1])\n", "local code = false\n"),
        )
    ],
    Mutant(
        "admission compares no epoch",
        (Patch(f"{_LUA}/admit.lua", "  if m[1] ~= EPOCH or m[2] ~= OWNER then\n", "  if false then\n"),),
        _codes("admit", "EPOCH"),
    ),
    Mutant(
        "admission compares no identity",
        (Patch(f"{_LUA}/admit.lua", "(m[4] ~= here and 'IDENTITY')", "false"),),
        _codes("admit", "IDENTITY"),
    ),
    Mutant(
        "identity not compared on a new connection",
        (
            Patch(
                "statecache/hot/wire.py",
                "        return now if wire.fresh or now",
                "        return now if now",
            ),
        ),
        (f"{_HOLES}test_h13b_first_call_on_a_connection_compares_the_identity",),
    ),
    Mutant(
        "a connection is trusted from its first call on",
        (
            Patch(
                "statecache/hot/store.py",
                "        line.checks.append(due)",
                "        line.fresh = False\n        line.checks.append(due)",
            ),
        ),
        (f"{_HOLES}test_h13_all_calls_on_a_connection_compare_until_one_is_answered",),
    ),
    Mutant(
        "a refused connection is trusted when another is found true",
        (Patch("statecache/hot/wire.py", "        wire.fresh = not sent_at\n", "        wire.fresh = False\n"),),
        (f"{_HOLES}test_h13_all_calls_on_a_connection_compare_until_one_is_answered",),
    ),
    Mutant(
        "any reply answers the check that was sent last",
        (
            Patch(
                "statecache/hot/store.py",
                "        sent_at = line.checks.popleft()",
                "        sent_at = max(line.checks)\n        line.checks.popleft()",
            ),
        ),
        (
            f"{_HOLES}test_h13_reply_of_an_unchecked_call_says_nothing_of_the_check_behind_it",
            "tests/integration/test_aio_order.py::test_the_reply_of_an_unchecked_call_says_nothing_of_the_check_behind_it",
        ),
    ),
    Mutant(
        "a partition of another deployment is fenced",
        (
            Patch(
                f"{_LUA}/fence.lua", "if m[7] and m[7] ~= ARGV[1] then return 'FOREIGN deployment ' .. m[7] end\n", ""
            ),
        ),
        (f"{_SCRIPTS}test_fence_refuses_a_partition_of_others", *_codes("fence", "FOREIGN")),
    ),
    # --- the cold tier ---------------------------------------------------------------------------------------------------
    Mutant(
        "evict without version check",
        (
            Patch(
                f"{_LUA}/evict.lua",
                "  elseif not match(flags, 'p') and tonumber(hot_version) ~= version then\n",
                "  elseif false then\n",
            ),
        ),
        (f"{_SCRIPTS}test_evict_wants_the_checkpoints_version_and_a_watermark",),
    ),
    Mutant(
        "evict above the watermark",
        (Patch(f"{_LUA}/evict.lua", "  elseif id_above(entry_id, watermark) then\n", "  elseif false then\n"),),
        (f"{_SCRIPTS}test_evict_wants_the_checkpoints_version_and_a_watermark",),
    ),
    Mutant(
        "evict takes parked hashes",
        (Patch(f"{_LUA}/evict.lua", "  elseif match(flags, 'p') and unpark ~= 1 then\n", "  elseif false then\n"),),
        (f"{_SCRIPTS}test_parked_hash_is_evicted_only_to_unpark_it",),
    ),
    Mutant(
        "evict does not mark cold",
        (
            Patch(
                f"{_LUA}/evict.lua",
                "redis.call('HSET', KEYS[p], 'cold', '1', 'evicted_to', evicted[p])",
                "redis.call('HSET', KEYS[p], 'evicted_to', evicted[p])",
            ),
        ),
        ("tests/mutants/test_more.py::test_an_evicted_instance_comes_back",),
    ),
    Mutant(
        "`evicted_to` not compared by hydrate",
        (Patch(f"{_LUA}/hydrate.lua", "  elseif stale[p] then\n", "  elseif false then\n"),),
        (*_codes("hydrate", "STALE"), f"{_HOLES}test_h9_evicted_again_behind_the_look_up"),
    ),
    Mutant(
        "a warmer's watermark is of after its page",
        (
            Patch(
                "statecache/durable/engine.py",
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL",
                "SET LOCAL",
            ),
            Patch("statecache/durable/engine.py", '{_SQLITE_BEGIN: "BEGIN"}', "{}"),
        ),
        ("tests/integration/test_warming.py::test_moved_flushed_and_evicted_within_the_look",),
    ),
    Mutant(
        "`evicted_to` not compared by the flow",
        (
            Patch(
                "statecache/core/flows.py",
                "    if found.watermark < entry.EntryId.parse(evicted_to):\n",
                "    if False:\n",
            ),
        ),
        (
            f"{_HOLES}test_h9_sql_that_went_back_hydrates_nothing",
            f"{_HOLES}test_h9_sql_goes_back_between_apply_and_the_look_up",
        ),
    ),
    Mutant(
        "hydrated instances forget that they are parked",
        (Patch("statecache/core/flows.py", '("p" if parked else "")', '""'),),
        (f"{_LETTERS}test_a_parked_instance_is_not_evicted_and_comes_back_parked[sqlite sync]",),
    ),
    # --- recovery --------------------------------------------------------------------------------------------------------
    Mutant(
        "cold stays 0 after a lost tail",
        (
            Patch(
                f"{_LUA}/drop.lua",
                "redis.call('HSET', meta, 'cold', '1', 'evicted_to', evicted_to)",
                "redis.call('HSET', meta, 'evicted_to', evicted_to)",
            ),
        ),
        (
            f"{_RECOVERY}test_start_in_the_lost_tail_is_not_started_again",
            f"{_SCRIPTS}test_drop_marks_cold_even_without_a_name",
        ),
    ),
    Mutant(
        "fence overwrites the recorded identity",
        (
            Patch(
                f"{_LUA}/fence.lua",
                "  redis.call('HSET', meta, 'epoch', EPOCH, ",
                "  redis.call('HSET', meta, 'identity', identity(), 'epoch', EPOCH, ",
            ),
        ),
        (
            f"{_HOLES}test_h15_recoverer_that_dies_after_its_fence_hides_no_loss",
            f"{_SCRIPTS}test_fence_leaves_what_ready_must_judge",
        ),
    ),
    Mutant(
        "fence goes back",
        (Patch(f"{_LUA}/fence.lua", "if m[1] and tonumber(m[1]) >= tonumber(EPOCH) then", "if false then"),),
        (f"{_HOLES}test_h4d_paused_older_recoverer_fences_after_the_newer_is_ready", *_codes("fence", "NEWER")),
    ),
    Mutant(
        "report not in the transaction of the tails' reset",
        (
            Patch(
                "statecache/durable/recoveries.py",
                "finished_ms=now_ms, classes=classes, report=report_json)\n        )\n",
                "finished_ms=now_ms, classes=classes, report=report_json)\n        )\n"
                "    with store.database.transaction() as connection:\n",
            ),
        ),
        ("tests/mutants/test_more.py::test_the_report_and_the_tails_are_one_transaction",),
    ),
    Mutant(
        "what was rewritten is reported at the end only",
        (
            Patch(
                "statecache/durable/recoveries.py",
                "            tx.report(move.epoch, move.owner, report_json)\n",
                "",
            ),
        ),
        (f"{_POINTS}[recover SQL behind]",),
    ),
    Mutant(
        "*intact* by ids",
        (
            Patch(
                "statecache/engine/lines.py",
                "        if probed.at_watermark is not None and not self._same(row.partition, probed.at_watermark):\n",
                "        if False:\n",
            ),
        ),
        (f"{_HOLES}test_h13a_ids_that_were_given_twice_are_no_proof",),
    ),
    Mutant(
        "a letter at the watermark proves the line",
        (
            Patch(
                "statecache/engine/lines.py",
                "        return (TAIL_LOST, end) if self._is_history_above(row.partition, end) else (kind, last)\n",
                "        return kind, last\n",
            ),
        ),
        ("tests/crash/test_crash_points.py::test_the_same_older_redis_comes_back[recover diverged]",),
    ),
    Mutant(
        "*diverged* takes SQL's watermark back",
        (
            Patch(
                "statecache/engine/recovery.py",
                "            return max(row.watermark, probed.last), mend\n",
                "            return probed.last, mend\n",
            ),
        ),
        (f"{_REVIEW}test_diverged_log_that_comes_back_before_the_next_flush",),
    ),
    Mutant(
        "an entry is known by the id of one that was discarded",
        (
            Patch(
                "statecache/engine/lines.py",
                "                and (one.entry_id, one.version, one.transition_id) not in very\n",
                "                and (one.version, one.transition_id) not in {each[1:] for each in very}\n",
            ),
        ),
        (f"{_REVIEW}test_repetition_of_what_was_discarded_is_kept_when_the_log_diverges",),
    ),
    Mutant(
        "a mark below the watermark is passed over",
        (
            Patch(
                "statecache/engine/lines.py",
                "        if behind.is_mark and behind.prev < watermark:\n",
                "        if False:\n",
            ),
        ),
        (f"{_HOLES}test_h17_mark_of_an_unknown_recovery_below_the_watermark",),
    ),
    Mutant(
        "an unseen loss is not called possible",
        (
            Patch(
                "statecache/engine/recovery.py",
                "        untrue = not fenced.existed or fenced.recorded_identity != fenced.identity or self._strange(fenced)\n",
                "        untrue = False\n",
            ),
        ),
        (f"{_HOLES}test_h18_unseen_tail_is_reported_as_a_possible_loss",),
    ),
    Mutant(
        "an ambiguous take is taken for a failure",
        (
            Patch(
                "statecache/engine/recovery.py",
                "            if (taken.epoch, taken.owner) != (epoch, self.stamp.owner):\n                raise\n",
                "            raise\n",
            ),
        ),
        (f"{_RECOVERY}test_answer_to_the_take_is_lost",),
    ),
    # --- durability ------------------------------------------------------------------------------------------------------
    Mutant(
        "durable by comparing ids",
        (
            Patch(
                "statecache/engine/durability.py",
                "    if transition_id == receipt.transition_id:\n        return True\n",
                "    if transition_id == receipt.transition_id or watermark >= entry.EntryId.parse(receipt.entry_id):\n"
                "        return True\n",
            ),
        ),
        (f"{_DURABILITY}test_lost_is_not_durable",),
    ),
    Mutant(
        "WAIT's count is not looked at",
        (
            Patch(
                "statecache/hot/confirmation.py",
                "    return bool(counts >= confirm.replicas)\n",
                "    return True\n",
            ),
        ),
        (f"{_DURABILITY}test_replica_that_does_not_answer",),
    ),
    Mutant(
        "WAITAOF is believed under everysec everywhere",
        (
            Patch(
                "statecache/engine/durability.py",
                '        "valkey_version" not in facts\n        and wanted',
                "        wanted",
            ),
        ),
        (f"{_DURABILITY}test_fsync_under_everysec",),
    ),
    Mutant(
        "no-appendfsync-on-rewrite is not looked at",
        (
            Patch(
                "statecache/engine/durability.py",
                '    if wanted.get("no-appendfsync-on-rewrite") == "yes":\n',
                "    if False:\n",
            ),
        ),
        (f"{_DURABILITY}test_fsync_is_refused",),
    ),
    # --- clients ---------------------------------------------------------------------------------------------------------
    Mutant(
        "a repetition gets a new transition id",
        (
            Patch(
                "statecache/core/flows.py",
                '            item.retry = item.retry or code == "LOST"\n',
                '            item.token = str(attempt).rjust(8, "x") if code == "LOST" else item.token\n',
            ),
        ),
        (f"{_CLIENT}test_a_call_that_gets_lost_is_applied_once",),
    ),
    Mutant(
        "a connection is used again after a failure",
        (
            Patch(
                "statecache/hot/wire.py",
                "        else:\n            self._wires.lose(self._wire, error)\n",
                "        else:\n            self._wires.give_back(self._wire)\n",
            ),
        ),
        (f"{_CLIENT}test_a_cancelled_call_takes_its_connection_with_it",),
    ),
    Mutant(
        "the full id behind a ring's token is not compared",
        (Patch("statecache/core/flows.py", "    if known.transition_id != item.transition_id:\n", "    if False:\n"),),
        ("tests/mutants/test_more.py::test_two_ids_with_one_token",),
    ),
    # --- calls that travel together ------------------------------------------------------------------------------------------
    Mutant(
        "batch: an interrupted caller keeps its leadership",
        (
            Patch(
                "statecache/engine/batcher.py",
                "            self._abandon(item if mine is None else mine)\n",
                "            pass\n",
            ),
        ),
        (f"{_THREADS}test_interrupted_at_every_place",),
    ),
    Mutant(
        "batch: what an interruption cut short is not done again",
        (
            Patch(
                "statecache/engine/batcher.py",
                "            self._end(me, company, outcomes, error)\n",
                "            self._hand_over(me, again=True)\n",
            ),
        ),
        (f"{_THREADS}test_interrupted_at_every_place",),
    ),
    Mutant(
        "batch: a follower waits as long as its leader",
        (
            Patch(
                "statecache/engine/batcher.py",
                "-1.0 if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX)\n",
                "-1.0\n",
            ),
        ),
        (f"{_THREADS}test_a_followers_time_is_its_own",),
    ),
    Mutant(
        "a stream that ends with a chunk in flight gives its wire back",
        (
            Patch(
                "statecache/hot/store.py",
                "                if in_flight:\n                    line.close()\n                else:\n",
                "                if True:\n",
            ),
        ),
        ("tests/integration/test_cache.py::test_guards_look_while_chunks_before_them_are_in_flight",),
    ),
    Mutant(
        "guarded moves pile up without a bound",
        (
            Patch(
                "statecache/engine/driver.py",
                "                    put_off(held)\n",
                "                    unfinished.extend(_lanes(held))\n",
            ),
        ),
        (
            "tests/integration/test_cache.py::test_a_long_list_of_guarded_moves_is_looked_at_in_parts",
            "tests/integration/test_cache.py::test_guards_look_while_chunks_before_them_are_in_flight",
        ),
    ),
    Mutant(
        "batch: a second exchange leaves only when it is full",
        (
            Patch(
                "statecache/hot/gather.py",
                "min(self._items_max, (max(under_way, self._under_way) + 1) // 2)",
                "self._items_max",
            ),
        ),
        (
            f"{_ORDER}test_the_second_exchange_takes_half_of_the_callers",
            f"{_ORDER}test_a_second_call_need_not_wait_for_the_first",
        ),
    ),
    Mutant(
        "batch: a leader takes all that wait",
        (
            Patch(
                "statecache/engine/batcher.py",
                "min(self._items_max, -(-under_way // self._leaders_max))",
                "self._items_max",
            ),
        ),
        ("tests/integration/test_cache_batching.py::test_two_script_calls_are_in_flight",),
    ),
    Mutant(
        "batch: a short list is one chunk",
        (
            Patch(
                "statecache/engine/driver.py",
                "middle = start + (left + 1) // 2 if left > size // 4 else count",
                "middle = count",
            ),
        ),
        ("tests/integration/test_cache.py::test_a_short_list_leaves_in_two_halves",),
    ),
    Mutant(
        "batch: a guard looks before its turn",
        (
            Patch(
                "statecache/engine/aio.py",
                "            if request.guard is not None and not await",
                "            if False and not await",
            ),
        ),
        (f"{_ORDER}test_a_guard_looks_at_what_the_calls_before_it_left",),
    ),
    Mutant(
        "batch: a guard looks before the moves ahead of it in a bulk call",
        (
            Patch(
                "statecache/engine/driver.py",
                "                if type(one.wish) is flows.Hot and place:\n",
                "                if False:\n",
            ),
        ),
        ("tests/integration/test_cold_bulk.py::test_a_guard_behind_a_move_that_has_to_come_again",),
    ),
    Mutant(
        "batch: a call stands behind a repetition in one script call",
        (
            Patch(
                "statecache/hot/aio.py",
                '        return not ahead.retry and not ahead.pinned and "" not in ahead.move.targets\n',
                "        return True\n",
            ),
        ),
        (f"{_ORDER}test_a_repetition_is_not_overtaken_while_history_is_asked",),
    ),
    # --- claims and timeouts ---------------------------------------------------------------------------------------------
    Mutant(
        "claim: what somebody holds is given to another",
        (Patch(f"{_LUA}/claim.lua", "  if held and not same then return 'HELD '", "  if false then return 'HELD '"),),
        ("tests/integration/test_claims.py::test_only_the_holder_moves_it",),
    ),
    Mutant(
        "claim: tokens do not grow",
        (Patch(f"{_LUA}/claim.lua", "call('HINCRBY', KEYS[p], 'claims', 1)", "call('HINCRBY', KEYS[p], 'claims', 0)"),),
        ("tests/integration/test_claims.py::test_tokens_grow_with_each_grant",),
    ),
    Mutant(
        "claim: a late holder still moves it",
        (Patch(_RARE, "  if live and token == own then", "  if token == own then"),),
        ("tests/integration/test_claims.py::test_the_late_holder_is_refused_though_nobody_else_has_come",),
    ),
    Mutant(
        "timeout: leaving a state leaves its deadline",
        (Patch(_RARE, "      call('ZREM', due, name)\n", "    local _ = due\n"),),
        ("tests/integration/test_timeouts.py::test_entering_sets_and_leaving_clears",),
    ),
    Mutant(
        "an instance of many fields is not marked",
        (Patch(_ITEM, "  if new > 0 and now and not wide and", "  if false and"),),
        (f"{_APPLY}test_an_instance_becomes_wide_with_its_65th_field",),
    ),
    Mutant(
        "a hydrated instance of many fields is not marked",
        (Patch("statecache/core/flows.py", '"w" if field_count >', '"w" if 0 * field_count >'),),
        ("tests/integration/test_claims.py::test_an_instance_of_many_fields_stays_marked[sqlite]",),
    ),
    # --- a server that takes no writes -----------------------------------------------------------------------------------
    Mutant(
        "refused writes: what only reads is refused too",
        (
            Patch(
                "statecache/hot/scripts.py", "    if name in READERS if reads is None else reads:\n", "    if reads:\n"
            ),
        ),
        (f"{_SCRIPTS}test_what_only_reads_is_answered_by_a_server_that_takes_nothing",),
    ),
    Mutant(
        "refused writes: a demoted primary is read as if it were none",
        (
            Patch(
                f"{_LUA}/include/identity.lua",
                "if not string.find(text, '\\nrole:master",
                "if false and string.find(text, '\\nrole:master",
            ),
        ),
        ("tests/integration/test_failover.py::test_a_demoted_primary_is_not_what_it_was",),
    ),
    Mutant(
        "refused writes: a recovery takes its epoch first",
        (Patch("statecache/engine/recovery.py", "load=False, reads=self.dry_run)", "load=False)"),),
        (f"{_REFUSED}test_an_untrue_redis_is_recovered_when_it_takes_writes",),
    ),
    Mutant(
        "refused writes: a flusher that cannot tell Redis stops",
        (Patch("statecache/engine/flusher.py", "            untold = str(error)\n", "            raise\n"),),
        (f"{_REFUSED}test_what_was_acknowledged_gets_to_sql",),
    ),
    Mutant(
        "a brake holds that a clock from the future has set",
        (Patch(_RARE, "math.abs(at - m[3]) > 3000", "at - m[3] > 3000"),),
        ("tests/lua/test_apply_lone.py::test_whatever_it_meets",),
    ),
    Mutant(
        "an empty Redis passes for wiped, whoever flushes elsewhere",
        (Patch("statecache/engine/elsewhere.py", "if not row.epoch or not answer.empty:", "if answer.codes:"),),
        (f"{_ELSEWHERE}test_an_empty_redis_beside_a_flusher_at_another_one[sqlite]",),
    ),
    Mutant(
        "a single heartbeat proves another Redis",
        (Patch("statecache/engine/elsewhere.py", "PROVING_BEATS = 2", "PROVING_BEATS = 1"),),
        (f"{_ELSEWHERE}test_one_heartbeat_proves_nothing_and_two_only_behind_another_look[sqlite]",),
    ),
    Mutant(
        "a flusher that waits for a recovery sends heartbeats",
        (
            Patch(
                "statecache/engine/flusher.py",
                "(errors.UnavailableError, errors.RecoveringError, ",
                "(errors.UnavailableError, ",
            ),
        ),
        (f"{_ELSEWHERE}test_a_flusher_that_waits_for_a_recovery_sends_no_heartbeat[sqlite]",),
    ),
]
