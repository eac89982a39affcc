"""What a process counts: the arithmetic, the labels, the registry, threads and forks. Stores are in test_metrics_live."""

from __future__ import annotations

import itertools
import os
import threading

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from statecache import metrics
from statecache.core import errors, model
from tests.support.interruptions import interrupted_at


def _receipt(event: str, duplicate: bool = False) -> model.Receipt:
    return model.Receipt("order", "1", event, "placed", "paid", 2, "1-1", 1, "t", duplicate)


def _meter(made: metrics.Metrics) -> metrics.MachineMeter:
    return metrics.MachineMeter(made, "order", ["pay", "ship"], "hot")


def _transitions(made: metrics.Metrics, event: str, outcome: str) -> float | None:
    labels = {"machine": "order", "event": event, "outcome": outcome}
    return made.registry.get_sample_value("statecache_transitions_total", labels)


@pytest.fixture
def made() -> metrics.Metrics:
    return metrics.Metrics(CollectorRegistry())


def test_single_calls_are_counted_and_timed(made: metrics.Metrics) -> None:
    meter = _meter(made)
    meter.done(_receipt("pay"), None, 0.0007)
    meter.done(_receipt("pay"), "durable", 0.3)
    meter.done(_receipt("pay", duplicate=True), None, 9.0)
    meter.refused("ship", errors.InvalidTransitionError("no"))
    assert _transitions(made, "pay", "ok") == 2
    assert _transitions(made, "pay", "duplicate") == 1
    assert _transitions(made, "ship", "invalid_transition") == 1
    hot = {"call": "one", "durability": "hot"}
    value = made.registry.get_sample_value
    assert value("statecache_transition_seconds_count", hot) == 2
    assert value("statecache_transition_seconds_sum", hot) == pytest.approx(9.0007)
    assert value("statecache_transition_seconds_bucket", {**hot, "le": "0.0005"}) == 0
    assert value("statecache_transition_seconds_bucket", {**hot, "le": "0.001"}) == 1
    assert value("statecache_transition_seconds_bucket", {**hot, "le": "5.0"}) == 1
    assert value("statecache_transition_seconds_bucket", {**hot, "le": "+Inf"}) == 2
    assert value("statecache_transition_seconds_count", {"call": "one", "durability": "durable"}) == 1


def test_bulk_calls_are_counted_by_item_and_timed_as_a_whole(made: metrics.Metrics) -> None:
    events = ["pay", "pay", "ship", "pay", None]
    results = [
        _receipt("pay"), _receipt("pay", duplicate=True), errors.NotFoundError("x"), _receipt("pay"),
        errors.InvalidDataError("y"),
    ]  # fmt: skip
    _meter(made).many(results, lambda index: events[index], "durable", 0.2)
    assert _transitions(made, "pay", "ok") == 2
    assert _transitions(made, "pay", "duplicate") == 1
    assert _transitions(made, "ship", "not_found") == 1
    assert _transitions(made, metrics.UNDECLARED, "invalid_data") == 1
    many = {"call": "many", "durability": "durable"}
    assert made.registry.get_sample_value("statecache_transition_seconds_count", many) == 1


@pytest.mark.parametrize("event", ["explode", "", "pay\n", 7, None, ["pay"]])
def test_an_undeclared_event_makes_no_label(made: metrics.Metrics, event: object) -> None:
    meter = _meter(made)
    meter.refused(event, errors.InvalidTransitionError("no such event"))
    meter.many([errors.InvalidDataError("no")], lambda index: event, None, 0.1)
    assert _transitions(made, metrics.UNDECLARED, "invalid_transition") == 1
    found = {
        sample.labels["event"]
        for family in made.registry.collect()
        for sample in family.samples
        if sample.name == "statecache_transitions_total"
    }
    assert found == {"@start", "pay", "ship", metrics.UNDECLARED}


def test_every_public_error_has_an_outcome() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.StateCacheError) and kind is not errors.StateCacheError:
            assert metrics.outcome_of(kind("x")) in metrics.OUTCOMES[2:-1], kind
    assert metrics.outcome_of(type("Own", (errors.UnavailableError,), {})("x")) == "unavailable"
    assert metrics.outcome_of(ValueError("x")) == "error"


def test_declared_events_are_there_before_they_happen(made: metrics.Metrics) -> None:
    """``increase()`` does not see the step from nothing to 1: counters begin at 0."""
    _meter(made)
    assert [_transitions(made, event, "ok") for event in ("@start", "pay", "ship")] == [0, 0, 0]
    assert made.registry.get_sample_value("statecache_hydrations_total") == 0


def test_threads_lose_nothing(made: metrics.Metrics) -> None:
    meter, receipt = _meter(made), _receipt("pay")

    def count() -> None:
        for _ in range(5000):
            meter.done(receipt, None, 0.001)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _transitions(made, "pay", "ok") == 20_000


def test_a_forked_child_begins_at_zero_though_the_lock_was_held(made: metrics.Metrics) -> None:
    """Thread A holds the lock of the numbers; thread B forks. In the child nobody will ever release that lock."""
    meter, held, go_on = _meter(made), threading.Event(), threading.Event()
    meter.done(_receipt("pay"), None, 0.001)

    def hold() -> None:
        with made.lock:
            held.set()
            go_on.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        meter.done(_receipt("ship"), None, 0.001)
        os._exit(0 if (_transitions(made, "pay", "ok"), _transitions(made, "ship", "ok")) == (0, 1) else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _transitions(made, "pay", "ok") == 1


def test_one_registry_has_one_set_of_metrics() -> None:
    registry = CollectorRegistry()
    assert metrics.of(registry) is metrics.of(registry)
    assert metrics.of(None) is metrics.default() is metrics.of(metrics.default())
    assert metrics.of(CollectorRegistry()) is not metrics.of(registry)
    with pytest.raises(errors.ConfigurationError, match="metrics = str is refused"):
        metrics.of("9100")  # type: ignore[arg-type]


def test_one_registry_shows_one_store(made: metrics.Metrics) -> None:
    value = made.registry.get_sample_value
    ends = [
        made.watch("a", lambda epoch=epoch: [metrics.Reading("statecache_epoch", (), epoch)])  # type: ignore[misc]
        for epoch in (7, 8)
    ]
    assert value("statecache_epoch") == 8
    with pytest.raises(errors.ConfigurationError, match="shows the store a already"):
        made.watch("b", list)
    ends[1]()
    assert value("statecache_epoch") == 7
    ends[0]()
    assert value("statecache_epoch") is None
    made.watch("b", lambda: [metrics.Reading("statecache_epoch", (), 9)])
    assert value("statecache_epoch") == 9


def test_families_of_both_kinds_keep_the_conventions() -> None:
    for name, family in metrics.FAMILIES.items():
        assert name.startswith("statecache_")
        assert name.endswith("_total") == (family.kind == metrics.COUNTER)
        assert family.help.endswith((".", ").")), name
        assert not {"id", "instance", "entry"} & set(family.labels), name


def test_handlers_calls_at_every_place_of_its_threads(made: metrics.Metrics) -> None:
    """A signal's handler counts, under a label of its own too, and reads, while its thread does: the lock was held for ever."""
    meter = _meter(made)
    for work in (lambda: meter.done(_receipt("pay"), None, 0.1), lambda: list(made.collect())):
        for nth in itertools.count(1):
            before = _transitions(made, "ship", "ok") or 0.0

            def handler(nth: int = nth) -> None:
                meter.done(_receipt("ship"), None, 0.1)
                made.add("statecache_jobs_total", 1, f"job{nth}", "finished")
                list(made.collect())

            met = interrupted_at(nth, metrics.__file__, work, handler)
            assert _transitions(made, "ship", "ok") == before + met
            if not met or nth > 40:
                assert nth > 3
                break


def test_handlers_text_in_the_midst_of_its_threads_is_refused(made: metrics.Metrics) -> None:
    """prometheus_client's registry has a lock, too, which nobody can ask whose it is."""
    refused: list[Exception] = []

    def handler() -> None:
        try:
            made.text()
        except errors.UnavailableError as error:
            refused.append(error)

    assert interrupted_at(1, prometheus_client.registry.__file__, made.text, handler)
    assert "set a flag in the handler" in str(refused[0])
    assert b"statecache_transitions_total" in made.text()
