"""An explicit-state model of the protocol of DESIGN section 4: evidence, not proof.

``python -m tests.model`` explores the small worlds (seconds), ``--large`` the large ones (minutes), ``--hole H9`` prints how
a hole comes about. The small ones are tests, in ``test_model.py``.

What it is. A state is the whole of Redis, SQL, every process and what nobody knows (``state.py``). A step is one atomic
thing: a script (``scripts.py``), an SQL transaction (``tables.py``), a fault (``faults.py``). Between any two steps of a
process all others may do anything, so every point between two I/Os is a pause of any length, and a process that is never
chosen again is dead. Exploration is breadth-first (``explore.py``), so a violation's trace is a shortest one. The promises
are ``invariants.py`` and the ``Violation``s that steps raise. Each rule of the protocol is a switch (``world.py``): with all on
no violation may be found (``configurations.py``), with one off its hole must come back (``holes.py``): so the model can fail.

Modelled: client (start, move, MISS and hydration, admission by NOSCRIPT / EPOCH / IDENTITY, DUP, OLD and its look-ups,
PARKED, durable waits, lost replies), flusher (contiguity, compare-and-set, letters, fold, trim, its memory of folds), evictor,
recovery in its five steps with all classes and their mending, the operator's retry and discard of letters. Redis restarting
with or without its tail, wiped, FLUSHALL, demoted and promoted again (the detour), slots migrating; SQL restored from an older
copy. Two of each process. Leases need no step: two flushers that both believe to hold one are two flushers.

Not modelled, or differently than it is:

- Data are the sequence of transition ids; patches, states, guards, increments, types, sizes and codecs are elsewhere.
- A batch holds one item; a lane of several moves, chunks in flight and group commit are sequences of single calls. A flush
  transaction is of one partition; the real one takes several, in order of their number.
- The flush transaction's writes happen at its commit; its compare-and-set before it, with the row's lock in between. Nobody
  else writes these rows meanwhile, so nothing lies between them. Isolation is that of single statements and of row locks.
- Time does not pass. The identity interval is the rule ``detour_takes_longer``: a detour makes every client's next call check,
  or (off) none. Heartbeats, deadlines, back-off and the brake (FULL) are left out: any waiting may end at any moment.
- A client's request is executed at once or not at all; a late original (delayed in a socket beyond its repetition) is left
  out: DESIGN promises nothing for it beyond the ring. A connection is a flag: does its next call check?
- Flusher, evictor and operator call scripts without loading them; they compare the identity in each, so it is only clients
  that a script loaded by somebody else can mislead. A recovery calls by EVAL.
- A recovery reads all of a partition's log and hashes in one script, and all rows it judges by in one statement.
- Redis goes back to one remembered copy (``save``, chosen at any moment), not to any earlier state; SQL likewise.
- An acknowledgement counts when the script has accepted, before the reply arrives: stricter than the promise.
- What an operator deletes by hand (XDEL, DEL), power loss below fsync, and several servers of a cluster are left out, but for
  a slot that migrates: identity changed, data kept, the target knowing the scripts already or not.
- *SQL behind* where letters or cold instances are in the way, and *diverged*, are mended as ``tables.py`` says; DESIGN is
  shorter there, and what it leaves open was filled in so that no violation is left.

Scopes are small: 1-2 partitions and instances, 2 clients, 2 flushers, 2-3 recoverers, at most 2 faults of Redis and 1 restore
of SQL. Symmetry is used where it is free: flushers and evictors have no names. A hole that needs more of anything is not found.
"""
