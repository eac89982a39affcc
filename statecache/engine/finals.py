"""Which states of a machine's version are final: for the flusher, which writes it into each checkpoint."""

from __future__ import annotations

import logging
import time

from statecache.core import definition, errors
from statecache.core.spec import MachineSpec, readable
from statecache.durable.store import DurableStore

_log = logging.getLogger(__name__)
_UNKNOWN_SECONDS = 5.0
"""For so long a machine that was not registered, or whose definition could not be read, is not asked for again."""
_UNKNOWN_MAX = 1000


def states(durable: DurableStore, machine: str) -> set[str]:
    """The states that any registered version of a machine has; not those of definitions that cannot be read."""
    specs = [readable(row.spec) for row in durable.machines() if row.name == machine]
    return {state.name for spec in specs if spec is not None for state in spec.states}


class Finals:
    """The final states by machine and version, as SQL has them registered; those of definitions at hand are noted. For any
    thread."""

    def __init__(self, durable: DurableStore) -> None:
        self._durable = durable
        self._known: dict[tuple[str, int], frozenset[str]] = {}
        self._unknown: dict[tuple[str, int], float] = {}
        """Versions whose final states nobody could tell, and when they are asked for again."""
        self._unreadable: set[tuple[str, int]] = set()

    def note(self, machine: definition.Definition) -> None:
        """Remember the final states of a definition that was registered."""
        self._known[machine.name, machine.version] = machine.finals

    def __call__(self, machine: str, version: int) -> frozenset[str]:
        """The final states of a registered machine's version. None while it is not registered, or has a definition that this
        version of statecache cannot read: other machines' entries are flushed with these, and must not wait for it."""
        known = self._known.get((machine, version))
        if known is None and self._unknown.get((machine, version), 0.0) < time.monotonic():
            known = self._registered(machine, version)
            if known is not None:
                self._known[machine, version] = known
                return known
            if len(self._unknown) >= _UNKNOWN_MAX:  # names are input
                self._unknown.clear()
            self._unknown[machine, version] = time.monotonic() + _UNKNOWN_SECONDS
        return known or frozenset()

    def _registered(self, machine: str, version: int) -> frozenset[str] | None:
        found = self._durable.machine(machine, version)
        if found is None:
            return None
        try:
            return definition.of(MachineSpec.model_validate_json(found[2])).finals
        except (ValueError, RecursionError, errors.DefinitionError) as error:
            if (machine, version) not in self._unreadable:
                self._unreadable.add((machine, version))
                _log.error(
                    "the definition of machine %s, version %d, cannot be read (was it registered by a newer statecache?): none "
                    "of its states counts as final: %s", machine, version, error, extra={"machine": machine},
                )  # fmt: skip
            return None
