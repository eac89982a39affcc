"""``python -m benchmarks``: run rows, print the table, keep the samples. Falling behind a target is told, and no error."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import harness, report
from benchmarks.servers import Servers, machine_facts, postgres_version
from tests.support import servers as wheels

RESULTS = Path(__file__).parent / "results"


def main(words: Sequence[str] | None = None) -> int:
    """Exit code 0: all chosen rows ran; 1: one failed; 2: bad usage."""
    parser = _parser()
    options = parser.parse_args(words)
    try:
        if options.render:
            return _render(options)
        if options.into:
            raise ValueError("--into goes with --render FILE")
        try:
            chosen = harness.rows(options.only)
        except re.error as error:
            raise ValueError(f"--only {options.only!r} is not a regular expression: {error}") from None
        if not chosen:
            raise ValueError(f"--only {options.only!r} matches no row; 'python -m benchmarks --list' names them")
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        return _list(chosen, options.json)
    return _run(chosen, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name matches (a regular expression)")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="a smoke test: every row in small, figures mean nothing")
    scale.add_argument("--full", action="store_true", help="1,000,000 instances, minutes under load: about an hour")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="samples of each side (by row: 2 to 9)")
    parser.add_argument("--server", choices=sorted(wheels.FLAVOURS), default="valkey9", help="the server (valkey9)")
    parser.add_argument("--aof", action="store_true", help="with its append-only file on (everysec), for all sides")
    parser.add_argument("--json", action="store_true", help="print the JSON document instead of the table")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the JSON goes (benchmarks/results/TIME.json)"
    )
    parser.add_argument("--remark", default="", help="a word on the machine for the page, such as 'shared with others'")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the table of an earlier run, run nothing")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --render: put it between the page's marks")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} rounds measure nothing: give 1 or more")
    return number


def _list(rows: Sequence[harness.Row], as_json: bool) -> int:
    if as_json:
        print(json.dumps([{"name": one.name, "title": one.title} for one in rows]))
    else:
        for one in rows:
            print(f"{one.name:28} {one.title}")
    return 0


def _render(options: argparse.Namespace) -> int:
    document = report.read(options.render)
    if options.into:
        report.put_into(options.into, report.render(document))
    else:
        print(json.dumps(document) if options.json else report.render(document), end="\n" if options.json else "")
    return 0


def _run(rows: Sequence[harness.Row], options: argparse.Namespace) -> int:
    begun, started = time.monotonic(), datetime.now(UTC)
    scale = "quick" if options.quick else "full" if options.full else "default"
    document: dict[str, Any] = {
        "format": report.FORMAT, "started": started.strftime("%Y-%m-%d %H:%M UTC"), "scale": scale,
        "remark": options.remark, "seconds": 0.0, "machine": {}, "rows": [],
    }  # fmt: skip
    path = options.output or RESULTS / f"{started:%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Servers(options.server, aof=options.aof) as servers:
        try:
            document["machine"] = {**machine_facts(servers), "postgresql": postgres_version(servers)}
        except wheels.ServerError as error:
            _say(f"no server to run on: {error}")
            return 1
        servers.end_row()
        for place, one in enumerate(rows):
            told = _one(servers, scale, one, f"[{place + 1}/{len(rows)}] {one.name}", options)
            document["rows"].append(told)
            document["seconds"] = time.monotonic() - begun
            path.write_text(
                json.dumps(document, indent=1) + "\n", encoding="utf-8"
            )  # a run cut short keeps what it has
    text = json.dumps(document) if options.json else report.render(document)
    print(text)
    if not options.json:
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"samples: {path}", file=sys.stderr)
    return 1 if any(one["error"] for one in document["rows"]) else 0


def _one(servers: Servers, scale: str, one: harness.Row, place: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a row; an error of it is told in its place, and the others go on."""
    begun = time.monotonic()
    bench = harness.Bench(servers, scale, _progress(place), options.rounds)
    measures: list[dict[str, Any]] = []
    error = ""
    try:
        for measure in one.run(bench):
            told = report.document_of(measure, options.server)
            measures.append(told)
            _say(f"{place}: {report.line(told)}")
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        _say(f"{place}: failed: {error}")
    finally:
        servers.end_row()
    return {
        "name": one.name, "title": one.title, "note": bench.note, "seconds": round(time.monotonic() - begun, 2),
        "error": error, "measures": measures,
    }  # fmt: skip


def _progress(place: str) -> Callable[[str], None]:
    """A line that is written over, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{place}: {text}", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
