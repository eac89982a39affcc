"""YAML read strictly: plain JSON values with the line of each, and written so that it reads back as it was.

Refused: duplicate keys, keys that are no text, tags, anchors and aliases (one document could unfold to gigabytes), a
second document. Plain scalars mean what they mean in JSON (see ``document``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from statecache.core import errors
from statecache.core.wording import shown

_PREFIX = "tag:yaml.org,2002:"
_NUMBER_START = list("-+.0123456789")
_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", _NUMBER_START),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", _NUMBER_START),
    ("float", r"(?:[-+]?\.inf|\.nan)", _NUMBER_START),
)

Path = tuple[str | int, ...]


class Tree(NamedTuple):
    """The value of a document, and the line of each of its keys and items by path."""

    value: Any
    lines: dict[Path, int]

    def line_of(self, path: Path) -> int:
        """The line of the deepest part of ``path`` that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call] # types-PyYAML gives it no types
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", event.start_mark)
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    """Quotes what YAML 1.1 or our reader would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _name, _pattern, _first in _SCALARS:
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_PREFIX + _name, re.compile(rf"^{_pattern}$"), _first)


def read(text: str, source: str) -> Tree:
    """Parse one document whose top is a mapping. Raises ``DefinitionError`` naming ``source``, line and rule."""
    lines: dict[Path, int] = {}
    try:
        reader = _Reader(text)
        try:
            node = reader.get_single_node()
            value = None if node is None else _plain(reader, node, (), lines)
        finally:
            reader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise errors.DefinitionError(f"{source}:{line}: this is no valid YAML: {reason}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise errors.DefinitionError(
            f"{source}:{line}: this is no valid YAML: the character {chr(error.character)!r} is not allowed"
        ) from error
    except RecursionError as error:
        raise errors.DefinitionError(f"{source}: this is no machine: it is nested too deep to be read") from error
    if value is None:
        raise errors.DefinitionError(f"{source}: the file is empty: a machine was expected")
    if not isinstance(value, dict):
        raise errors.DefinitionError(f"{source}:1: keys such as 'name' and 'states' were expected, not {shown(value)}")
    return Tree(value, lines)


def _plain(reader: _Reader, node: Any, path: Path, lines: dict[Path, int]) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
        result: dict[str, Any] = {}
        for key, mark, item in _pairs(reader, node):
            if key in result:
                problem = f"the key {key!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, mark)
            lines[(*path, key)] = mark.line + 1
            result[key] = _plain(reader, item, (*path, key), lines)
        return result
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
        items: list[Any] = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_plain(reader, item, (*path, index), lines))
        return items
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_PREFIX) in ("null", "bool", "int", "float", "str"):
        return _scalar(reader, node)
    raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not supported", node.start_mark)


def _pairs(reader: _Reader, node: Any) -> Iterator[tuple[str, Any, Any]]:
    for key_node, item in node.value:
        key = _scalar(reader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(_source(key_node))} is refused: keys are text", key_node.start_mark
            )
        yield key, key_node.start_mark, item


def _source(node: Any) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else f"a {node.id}"


def _scalar(reader: _Reader, node: Any) -> Any:
    try:
        return reader.construct_object(node)
    except (ValueError, KeyError) as error:  # a tag written out before a text that does not fit it: `!!int x`
        raise yaml.constructor.ConstructorError(
            None, None, f"{shown(node.value)} does not fit the tag {node.tag!r}", node.start_mark
        ) from error


def write(document: dict[str, Any]) -> str:
    """Return the document as YAML: keys in their order, the innermost collections on one line."""
    return yaml.dump(document, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
