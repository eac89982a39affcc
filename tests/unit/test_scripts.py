"""Loading and stamping of the scripts, and that Python knows every code that their headers declare."""

from __future__ import annotations

import re

import pytest

from statecache.core import items
from statecache.hot import scripts

STAMP = scripts.Stamp(7, "owner-7")
ADMISSION = {"EPOCH", "RECOVERING", "IDENTITY"}
KNOWN = {
    "admit": {"OK", *ADMISSION},  # engine/admission.py
    "apply": {  # core/flows.py: test_flows.py walks these
        "OK", "DUP", "OLD", "MISS", "EXISTS", "STATE", "VERSION", "FULL", "PARKED", "FENCED", "DATA", "TYPE",
        *ADMISSION,
    },
    "claim": {  # core/claims.py
        "OK", "HELD", "FENCED", "STATE", "PARKED", "MISS", "TYPE", *ADMISSION,
    },
    "due": {"OK", *ADMISSION},
    "drop": {"OK", *ADMISSION},
    "evict": {"OK", "GONE", "KEPT", "TYPE", *ADMISSION},
    "fence": {"OK", "NEWER", "FOREIGN"},
    "find": {"OK", *ADMISSION},
    "flushed": {"OK", *ADMISSION},
    "hydrate": {"OK", "EXISTS", "STALE", *ADMISSION},
    "park": {"OK", "GONE", "TYPE", *ADMISSION},
    "probe": {"OK", *ADMISSION},
    "read": {"OK", *ADMISSION},
    "ready": {"OK", "TAKEN", *ADMISSION},
    "remind": {"OK", "KEPT", *ADMISSION},
}  # fmt: skip


@pytest.mark.parametrize("name", scripts.NAMES)
def test_header_and_python_know_the_same_codes(name: str) -> None:
    assert scripts.reply_codes(name) == KNOWN[name]


def test_codes_of_admission_are_those_of_the_scripts_and_one_of_the_client() -> None:
    assert {*ADMISSION, "NOSCRIPT"} == items.ADMISSION_CODES


@pytest.mark.parametrize("name", scripts.NAMES)
@pytest.mark.parametrize("emulated", [False, True])
def test_text_is_complete_and_includes_each_part_once(name: str, emulated: bool) -> None:
    text = scripts.stamped(name, STAMP, emulated).text
    assert "@include" not in text
    for helper in ("function identity", "function id_above", "function last_id", "function refusal"):
        assert text.count(helper) <= 1
    assert ("emulated:run_id" in text) <= emulated
    for used in re.findall(r"\b(identity|id_above|last_id|refusal|kept)\(", text):
        assert f"function {used}(" in text


def test_stamp_decides_the_sha() -> None:
    """A script's SHA belongs to one epoch of one owner: a client of another one calls another script."""
    shas = {
        scripts.stamped("apply", stamp, False).sha
        for stamp in (STAMP, scripts.Stamp(8, "owner-7"), scripts.Stamp(7, "owner-8"))
    }
    assert len(shas) == 3
    assert scripts.stamped("apply", STAMP, False) is scripts.stamped("apply", scripts.Stamp(7, "owner-7"), False)
    assert f"local EPOCH, OWNER = '{STAMP.epoch}', '{STAMP.owner}'" in scripts.stamped("apply", STAMP, False).text


@pytest.mark.parametrize("name", scripts.NAMES)
def test_scripts_neither_scan_nor_name_keys_of_their_own(name: str) -> None:
    """Plain Redis, one slot: no KEYS, no SCAN; every key comes from KEYS or is built from a declared prefix."""
    text = scripts.stamped(name, STAMP, False).text
    assert not re.search(r"call\('(KEYS|SCAN|SELECT|EVAL|PUBLISH|FLUSHALL|FLUSHDB)'", text)
    assert "{" not in "".join(re.findall(r"call\('[A-Z]+', '([^']*)'", text))
