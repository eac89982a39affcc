"""What a run found: its JSON document, its verdicts, its Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Measure, Target

FORMAT = 1
_SPEED_ROW = "machine.server"
_SCALED = ("/s", "us/item", "us/transition")
TABLE_BEGIN = "<!-- the table below is generated: python -m benchmarks --render FILE --into docs/performance.md -->"
TABLE_END = "<!-- end of the generated table -->"


def document_of(measure: Measure, flavour: str) -> dict[str, Any]:
    """One measure with its raw samples and verdicts."""
    return {
        "name": measure.name,
        "unit": measure.unit,
        "own": [float(value) for value in measure.own],
        "peer_name": measure.peer_name,
        "peer": [float(value) for value in measure.peer],
        "ratio": [float(value) for value in measure.ratios],
        "targets": [_judged(measure, target) for target in measure.targets if target.only in ("", flavour)],
    }


def _judged(measure: Measure, target: Target) -> dict[str, Any]:
    value = measure.value(target.of)
    return {
        "of": target.of, "op": target.op, "limit": target.limit, "value": value, "met": target.met_by(value),
    }  # fmt: skip


def render(document: dict[str, Any]) -> str:
    """The Markdown of a run: its machine, its table, the rows' notes."""
    lines = [*_machine(document), "", *_table(document["rows"]), "", *_notes(document["rows"])]
    return "\n".join(lines) + "\n"


def _machine(document: dict[str, Any]) -> list[str]:
    machine = document["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in machine["valkey_settings"].items() if value)
    sql = ", ".join(f"{name} {value}" for name, value in machine["postgresql_settings"].items())
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    speed = speed_of(document["rows"])
    measures = [measure for one in document["rows"] for measure in one["measures"]]
    met = [target["met"] for measure in measures for target in measure["targets"]]
    nearly = sum(_met_at(measure, target, speed) for measure in measures for target in measure["targets"])
    there = (
        f"; {nearly} more would be at {number(speed)} of the speed of the machine where they were set" if speed else ""
    )
    return [
        f"Run of {document['started']}, scale `{document['scale']}`, {document['seconds'] / 60:.0f} minutes. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']}, "
        f"{machine['python']}; load average before {machine['load_average_before']}"
        f"{', ' + document['remark'] if document['remark'] else ''}.",
        "",
        f"{machine['server']} ({settings}); {machine['postgresql']} ({sql}). Packages: {packages}.",
        "",
        f"Targets met: {sum(met)} of {len(met)}{there}.",
    ]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| row | figure | statecache | peer | ratio | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    speed = speed_of(rows)
    for one in rows:
        head = f"`{one['name']}` {one['title']}"
        if one["error"]:
            lines.append(f"| {head} | | | | | | **failed**: {one['error']} |")
        for measure in one["measures"]:
            lines.append(f"| {head} | {line(measure, speed)} |")
            head = ""
    return lines


def speed_of(rows: Sequence[dict[str, Any]]) -> float:
    """How fast the run's machine is, beside the one where the targets were set; 0 if the run did not measure it."""
    for one in rows:
        if one["name"] == _SPEED_ROW and one["measures"] and one["measures"][0]["ratio"]:
            return statistics.median(one["measures"][0]["ratio"])
    return 0.0


def _met_at(measure: dict[str, Any], target: dict[str, Any], speed: float) -> bool:
    """Whether a target that is behind would be met on a machine of that speed; only for a rate or CPU time of our own."""
    if target["met"] or not speed or target["of"] == "ratio" or measure["unit"] not in _SCALED:
        return False
    if target["op"] == "<=":
        return bool(target["value"] <= target["limit"] / speed)
    return bool(target["value"] >= target["limit"] * speed)


def line(measure: dict[str, Any], speed: float = 0.0) -> str:
    """The cells of one measure."""
    unit = measure["unit"]
    own = f"{spread(measure['own'])} {unit}"
    peer = f"{measure['peer_name']}: {spread(measure['peer'])} {unit}" if measure["peer"] else ""
    ratio = spread(measure["ratio"]) if measure["ratio"] else ""
    return " | ".join([measure["name"], own, peer, ratio, targets(measure), verdict(measure, speed)])


def targets(measure: dict[str, Any]) -> str:
    words = []
    for target in measure["targets"]:
        unit = " x" if target["of"] == "ratio" else f" {measure['unit']}"
        words.append(f"{target['op']} {number(target['limit'])}{unit}")
    return ", ".join(words)


def verdict(measure: dict[str, Any], speed: float = 0.0) -> str:
    """Behind is behind; beside it stands whether it would be met at the speed of this machine."""
    words = []
    for target in measure["targets"]:
        scaled = " (at this machine's speed met)" if _met_at(measure, target, speed) else ""
        words.append("met" if target["met"] else f"**behind**{scaled}")
    return ", ".join(words)


def spread(samples: Sequence[float]) -> str:
    """Median (smallest - largest)."""
    if len(samples) == 1:
        return number(samples[0])
    return f"{number(statistics.median(samples))} ({number(min(samples))} - {number(max(samples))})"


def number(value: float) -> str:
    """Three digits that matter, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"- `{one['name']}`: {one['note']}." for one in rows if one["note"]]


def read(path: Path) -> dict[str, Any]:
    """Read a run. Raises ``ValueError`` for a file that is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = document["format"] == FORMAT and "rows" in document
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path} is not the JSON of a run: give a file that 'python -m benchmarks' wrote")
    return document


def put_into(page: Path, text: str) -> None:
    """Replace what stands between a page's two marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the marks of the generated table: {TABLE_BEGIN!r} and {TABLE_END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")
