"""How the benchmarks judge their samples and print them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import harness, report
from benchmarks.harness import Measure, own_at_least, own_at_most, ratio_at_least, ratio_at_most


def test_a_ratio_is_judged_by_the_median_of_its_pairs() -> None:
    """The pair in which the machine was slow has both sides slow; medians of sides taken apart would say 0.5."""
    measure = Measure(
        "rate", "/s", [10.0, 40.0, 90.0], "peer", [5.0, 80.0, 30.0], (ratio_at_least(2), ratio_at_most(1))
    )
    told = report.document_of(measure, "valkey9")
    assert told["ratio"] == [2.0, 0.5, 3.0]
    assert [(one["value"], one["met"]) for one in told["targets"]] == [(2.0, True), (2.0, False)]
    assert report.verdict(told) == "met, **behind**"


def test_a_bound_on_our_own_figure_needs_no_peer() -> None:
    told = report.document_of(Measure("CPU", "us/item", [9.0, 12.0, 10.0], targets=(own_at_most(10),)), "valkey9")
    assert (told["ratio"], told["targets"][0]["met"]) == ([], True)
    assert report.line(told) == "CPU | 10 (9 - 12) us/item |  |  | <= 10 us/item | met"


def test_a_figure_that_is_behind_says_so_and_what_the_machine_has_to_do_with_it() -> None:
    """The machine has half of the speed of the one where the targets were set: rates and CPU time are told by it too."""
    speed = report.document_of(Measure("rate", "/s", [50.0, 40.0, 60.0], "there", [100.0] * 3), "valkey9")
    rate = Measure("rate", "/s", [60.0], "peer", [10.0], (ratio_at_least(10), own_at_least(100), own_at_least(130)))
    cost = Measure("CPU", "us/item", [19.0], targets=(own_at_most(10), own_at_most(9), own_at_most(20)))
    wait = Measure("lag", "s", [1.5], targets=(own_at_most(1),))
    rows = [
        {"name": name, "title": "", "note": "", "error": "", "measures": measures}
        for name, measures in (
            ("machine.server", [speed]),
            ("a.row", [report.document_of(one, "valkey9") for one in (rate, cost, wait)]),
        )
    ]
    assert report.speed_of(rows) == 0.5
    assert [report.verdict(measure, 0.5) for measure in rows[1]["measures"]] == [
        "**behind**, **behind** (at this machine's speed met), **behind**",
        "**behind** (at this machine's speed met), **behind**, met",
        "**behind**",
    ]
    assert (report.speed_of(rows[1:]), report.verdict(rows[1]["measures"][1])) == (0, "**behind**, **behind**, met")


def test_a_target_of_another_server_is_not_judged() -> None:
    measure = Measure(
        "bulk", "us", [1.3], "few", [1.0], (ratio_at_most(1.2, only="valkey9"), ratio_at_most(1.35, only="redis7"))
    )
    assert [one["limit"] for one in report.document_of(measure, "redis7")["targets"]] == [1.35]


@pytest.mark.parametrize(
    ("value", "text"),
    [(123456.7, "123,457"), (99.96, "100"), (12.34, "12.3"), (1.5, "1.5"), (0.012345, "0.0123"), (0, "0")],
)
def test_numbers_have_three_digits_that_matter(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_percentile_is_a_sample() -> None:
    assert harness.percentile([3, 1, 2, 4], 50) == 2
    assert harness.percentile(range(1, 101), 99) == 99
    assert harness.percentile([5], 99) == 5


def test_sides_run_in_turn_and_in_reversed_order_every_other_round() -> None:
    ran: list[str] = []
    bench = harness.Bench(None, "quick", lambda text: None)  # type: ignore[arg-type] # no server is asked for
    first, second = bench.in_turn(lambda: ran.append("a") or 1, lambda: ran.append("b") or 2, rounds=3, warm=False)
    assert (ran, first, second) == (["a", "b", "b", "a", "a", "b"], [1, 1, 1], [2, 2, 2])


def test_the_table_is_put_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.TABLE_BEGIN}\nold\n{report.TABLE_END}\nafter\n")
    report.put_into(page, "new\n")
    assert page.read_text() == f"before\n{report.TABLE_BEGIN}\n\nnew\n\n{report.TABLE_END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        report.put_into(page, "new")


def test_the_committed_reference_run_is_the_table_of_the_page() -> None:
    folder = Path(command.__file__).parent
    document = report.read(folder / "results" / "reference.json")
    page = (folder.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.render(document) in page, "python -m benchmarks --render FILE --into docs/performance.md"
    assert {one["name"] for one in document["rows"]} <= {one.name for one in harness.rows()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing-of-that-name"], "matches no row"),
        (["--only", "("], "not a regular expression"),
        (["--quick", "--full"], "not allowed with"),
        (["--into", "page.md"], "--into goes with --render"),
        (["--render", "absent.json"], "cannot be read"),
    ],
)
def test_bad_usage_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"format": 99, "rows": []}'])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not the JSON of a run"):
        report.read(path)


def test_rows_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--only", "^flush", "--json"]) == 0
    listed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [one.name for one in harness.rows("^flush")]
