"""Alerts, their tests and runbooks, and the dashboard: judged by promtool, and held to the metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from statecache import metrics
from tests.support import prometheus

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config" / "prometheus"
DASHBOARDS = ROOT / "config" / "grafana" / "dashboards"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((CONFIG / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
OF_PROMETHEUS = {"job", "instance", "role", "le"}
"""Labels that Prometheus or its configuration add."""


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Every query of every dashboard with its panel's title, those of annotations and variables too."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield panel["title"], target["expr"]
        for annotation in board["annotations"]["list"]:
            yield annotation["name"], annotation["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield variable["name"], variable["query"]["query"]


QUERIES = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in RULES)]


def family_of(name: str) -> metrics.Family | None:
    """The metric that a name in a query belongs to."""
    if name in metrics.FAMILIES and metrics.FAMILIES[name].kind != metrics.HISTOGRAM:
        return metrics.FAMILIES[name]
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    found = metrics.FAMILIES.get(base)
    return found if found is not None and base != name and found.kind == metrics.HISTOGRAM else None


@pytest.mark.parametrize(
    ("where", "query"), QUERIES, ids=[f"{index}-{where}" for index, (where, _) in enumerate(QUERIES)]
)
def test_queries_name_metrics_and_labels_that_exist(where: str, query: str) -> None:
    names = set(re.findall(r"\bstatecache_\w+", query))
    assert names, query
    families = {name: family_of(name) for name in names}
    assert None not in families.values(), (where, families)
    for name, selector in re.findall(r"\b(statecache_\w+)(?:\{([^}]*)\})?", query):
        family = families[name]
        assert family is not None
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= {*family.labels, *OF_PROMETHEUS}, query
    known = {label for family in families.values() if family for label in family.labels} | OF_PROMETHEUS
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query)
    assert {label.strip() for group in grouped for label in group.split(",")} <= known, query


def test_words_in_selectors_are_words_that_occur() -> None:
    """An alert on a misspelt outcome would never fire."""
    said = {
        "outcome": set(metrics.OUTCOMES),
        "setting": {"maxmemory_policy", "appendonly", "aof_writes"},
        "result": {"moved", "idle", "stopped", "failed"},
        "cause": {"recovery", "discarded"},
        "call": {"one", "many"},
    }
    for _, query in QUERIES:
        for label, words in re.findall(r"(\w+)=~?\"([^\"$]*)\"", query):
            assert set(words.split("|")) <= said[label], query


def test_legends_tell_series_apart_and_units_are_those_of_the_query() -> None:
    """A second store, or a second query of another kind in the same panel."""
    for path in DASHBOARDS.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            field = panel.get("fieldConfig", {"overrides": ()})
            units = {
                override["matcher"]["options"]: change["value"]
                for override in field["overrides"]
                for change in override["properties"]
            }
            for target in panel.get("targets", ()):
                is_one = re.match(r"(sum|max|min)\(", target["expr"])
                left = None if is_one else re.search(r"\bby \(([^)]*)\)", target["expr"])
                labels = set(left.group(1).split(", ")) - {"le"} if left else set()
                assert labels == set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])), panel["title"]
                is_rate = "rate(" in target["expr"] and not re.search("histogram_quantile| / ", target["expr"])
                assert (units.get(target["refId"], field["defaults"]["unit"]) == "ops") == is_rate, panel["title"]


@pytest.mark.needs("promtool")
def test_promtool_is_content_with_rules_and_configuration() -> None:
    prometheus.promtool("check", "rules", CONFIG / "alerts.yml")
    prometheus.promtool("check", "config", CONFIG / "prometheus.yml")


@pytest.mark.needs("promtool")
def test_alerts_fire_and_stay_silent() -> None:
    prometheus.promtool("test", "rules", CONFIG / "alerts_test.yml", cwd=CONFIG)


def test_every_alert_is_tested_both_ways() -> None:
    fired, silent = set(), set()
    for test in yaml.safe_load((CONFIG / "alerts_test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fired if case["exp_alerts"] else silent).add(case["alertname"])
    assert fired == silent == {rule["alert"] for rule in RULES}


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    headings = re.findall(r"^### (.+)$", page.partition("## Runbooks")[2], re.MULTILINE)
    assert headings == list(dict.fromkeys(headings))
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert path == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert rule["alert"] in headings
    assert set(headings) == {rule["alert"] for rule in RULES}


def test_panels_do_not_overlap_and_say_their_source() -> None:
    for path in DASHBOARDS.glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells
            assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
        assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config" / "grafana" / "provisioning").rglob("*.yaml")), ids=lambda p: p.name
)
def test_provisioning_files_are_of_version_1(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["apiVersion"] == 1
