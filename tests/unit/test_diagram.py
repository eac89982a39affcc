"""Pictures of machines: the whole text, and what would break the grammar of each language."""

from __future__ import annotations

import pytest

from statecache.core import diagram, document, errors
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec

ORDER = document.from_text("""
name: order
states:
  placed: {initial: true, title: Placed by the customer}
  paid: {}
  cancelled: {final: true}
events:
  pay: {from: placed, to: paid, guard: is_covered}
  poll: {from: paid, to: paid}
  cancel: {from: [placed, paid], to: cancelled, title: Give up}
""")


def titled(title: str, name: str = "a") -> MachineSpec:
    return MachineSpec(
        name="odd",
        states=(StateSpec(name=name, title=title, initial=True),),
        events=(EventSpec(name="go", title=title, transitions=(TransitionSpec(source=name, target=name),)),),
    )


def test_mermaid() -> None:
    assert diagram.mermaid(ORDER) == (
        "stateDiagram-v2\n"
        '    state "Placed by the customer" as placed\n'
        "    [*] --> placed\n"
        "    placed --> paid : pay #91;is_covered#93;\n"
        "    paid --> paid : poll\n"
        "    placed --> cancelled : Give up\n"
        "    paid --> cancelled : Give up\n"
        "    cancelled --> [*]\n"
    )


def test_mermaid_with_a_highlight() -> None:
    assert diagram.mermaid(ORDER, highlight="paid") == diagram.mermaid(ORDER) + (
        "    classDef here fill:#ffd54f,stroke:#333,color:#000\n    class paid here\n"
    )
    with pytest.raises(errors.DefinitionError, match="machine 'order' has no state 'lost' to highlight"):
        diagram.mermaid(ORDER, highlight="lost")


def test_mermaid_titles_are_escaped() -> None:
    assert diagram.mermaid(titled('a "b"; c:\n<d> #e {f} --> é')) == (
        "stateDiagram-v2\n"
        '    state "a #34;b#34;#59; c#58; #60;d#62; #35;e #123;f#125; --#62; é" as a\n'
        "    [*] --> a\n"
        "    a --> a : a #34;b#34;#59; c#58; #60;d#62; #35;e #123;f#125; --#62; é\n"
    )


def test_mermaid_words_are_no_states() -> None:
    machine = titled("End", "end").model_copy(update={"states": (StateSpec(name="end", initial=True),)})
    assert diagram.mermaid(machine, highlight="end") == (
        "stateDiagram-v2\n"
        '    state "end" as S_end\n'
        "    [*] --> S_end\n"
        "    S_end --> S_end : End\n"
        "    classDef here fill:#ffd54f,stroke:#333,color:#000\n"
        "    class S_end here\n"
    )


def test_dot() -> None:
    assert diagram.dot(ORDER) == (
        'digraph "order" {\n'
        "    rankdir=LR;\n"
        "    node [shape=box, style=rounded];\n"
        '    "" [shape=point];\n'
        '    "placed" [label="Placed by the customer"];\n'
        '    "paid" [label="paid"];\n'
        '    "cancelled" [label="cancelled", peripheries=2];\n'
        '    "" -> "placed";\n'
        '    "placed" -> "paid" [label="pay [is_covered]"];\n'
        '    "paid" -> "paid" [label="poll"];\n'
        '    "placed" -> "cancelled" [label="Give up"];\n'
        '    "paid" -> "cancelled" [label="Give up"];\n'
        "}\n"
    )


def test_dot_titles_are_escaped() -> None:
    assert '    "a" [label="a \\"b\\" \\\\N c"];\n' in diagram.dot(titled('a "b" \\N\nc'))
