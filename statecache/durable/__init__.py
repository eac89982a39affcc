"""The durable side: everything that speaks SQL. Nothing outside this package imports sqlalchemy, alembic or psycopg.

``store.DurableStore`` is the door; ``flush`` and ``recoveries`` hold the two kinds of write transactions that move epochs
and watermarks.
"""
