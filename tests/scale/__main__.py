"""``make cold``: the cold tier at full size; prints the figures as JSON. Exit code 1 if an answer was wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.scale import coldtier
from tests.support import servers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__.splitlines()[0])
    plain = coldtier.Options()
    parser.add_argument("--instances", type=int, default=plain.instances)
    parser.add_argument("--room", type=int, default=plain.room, help="instances that Redis has room for")
    parser.add_argument("--operations", type=int, default=plain.operations, help="calls of the mixed load")
    parser.add_argument("--sql", choices=["sqlite", "postgres"], default=plain.sql)
    parser.add_argument("--server", choices=sorted(servers.FLAVOURS), default=plain.server)
    parser.add_argument("--seed", default=plain.seed)
    options = coldtier.Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="statecache-cold-") as folder:
        figures = coldtier.run(options, Path(folder), lambda text: print(text, file=sys.stderr, flush=True))
    print(msgspec.json.format(msgspec.json.encode(figures)).decode())
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
