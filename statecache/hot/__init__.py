"""The hot store: Redis or Valkey. The only package that imports redis.

Keys of a partition (spelled by ``core/keys.py``):

``{ns:pp}:meta``, a hash:

=============  =========================================================================================================
epoch, owner   the incarnation of the hot data set and the token of the recovery that made it
status         ``ready`` or ``recovering``
identity       the server that was found true: ``run_id master_replid2 second_repl_offset``
deployment     the UUID that SQL holds too: a Redis and a database that do not belong together refuse to work
protocol       the version of these layouts
partitions     the partition count of the store
watermark      entry id up to which everything is in SQL (only a copy: SQL's is the true one)
kept           entries at or below the watermark still in the log
limit          entries behind the watermark above which writers get ``FULL``: the flusher's brake
limit_at       when the flusher set it (ms): once it has not for 3 s, ``limit_max`` counts
limit_max      the hard bound of the backlog, which absorbs an outage of SQL
prev           the id before the epoch's mark
carry          entries behind the watermark when the epoch began, used while the watermark is of an epoch before prev's
cold           ``0``: nothing of the partition is cold, a start needs no look-up in SQL
evicted_to     the highest entry id ever dropped from Redis with its hash
report         a copy of the last recovery report
claims         how many claims this epoch has given: the second half of their tokens
=============  =========================================================================================================

``{ns:pp}:log``, the stream of entries (``core/entry.py``); ``{ns:pp}:due`` and ``{ns:pp}:claims``, sorted sets of
``machine:id`` by the ms of a deadline (``hot/deadlines.py``) or of a claim's end (``hot/claims.py``);
``{ns:pp}:i:<machine>:<id>``, a hash per instance:

=====  ============================================================================
@      ``state version entry_id created machine_version updated[ flags]``; flags: ``p`` parked, ``c`` claimed,
       ``w`` wide: more than 64 data fields
@r     the last 8 transition ids as tokens of 8 characters, newest last
@c     ``token end nonce worker`` of a claim, there when ``@`` says so; the end in ms
name   the JSON text of a data field
=====  ============================================================================
"""
