"""Read a YAML file into flat dotted keys, each with the line it stands on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import yaml

from .. import odd_characters
from ..errors import UserError, did_you_mean
from ..json_file import decoded
from ..text_file import read_small

_DEEPEST = 32
_DEEPEST_NODE = 100  # brackets and sections together
_MOST_SECTIONS = 10000
_LARGEST_FILE_BYTES = 4 * 2 ** 20
_MERGE = "tag:yaml.org,2002:merge"
_WORD = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Gives up at a depth, instead of at Python's own limit: PyYAML's time grows with the square of the depth, and
    MindSpore raises the limit tenfold."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST_NODE:
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class OddCharacter(NamedTuple):
    """A character in a value that only looks like one of YAML's (`odd_characters`): file and line, what it is and at
    which column, what to write instead."""

    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class YamlValue:
    """One value of a YAML file.

    Attributes:
        key: dotted path, `model.model_config.seq_length`.
        value: a scalar, a list, None, or {} for an empty section; never a filled section.
        where: `file.yaml:31`, the line of the key.
        plain: the value was written without quotes.
        odd: the first character of the value that only looks like one of YAML's.
    """

    key: str
    value: Any
    where: str
    plain: bool
    odd: Optional[OddCharacter] = None


@dataclass(frozen=True)
class Document:
    """A YAML file: its values in file order, and where each section (mapping) begins."""

    path: str
    entries: Tuple[YamlValue, ...]
    sections: Dict[str, str]


def read(path: str) -> Document:
    """Read the YAML file `path`.

    Raises:
        UserError: the file is missing, is not UTF-8 or not YAML, its top is not a mapping, or a key is given twice;
            with file and line.
    """
    try:
        if os.path.isdir(path):
            raise UserError("is a folder, not a YAML file", path, _nearest_file(path))
        text = decoded(read_small(path, _LARGEST_FILE_BYTES, "a configuration"), path)
    except FileNotFoundError:
        raise UserError("no such file", path, _nearest_file(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    return parse(text.lstrip("\ufeff"), path)


def parse(text: str, path: str) -> Document:
    """Parse YAML `text`; `path` is only for messages. Raises like `read`."""
    try:
        return _parse(text, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        odd = _odd_character(text, path, error.problem_mark, error.context_mark)
        if odd is not None:
            raise odd from None
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise UserError(f"not valid YAML: {error.problem or error.context}", where,
                        "Check the indentation, quotes and brackets around this line.") from None
    except yaml.reader.ReaderError as error:
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"not valid YAML: the character U+{error.character:04X} is not allowed", where,
                        "Remove it.") from None
    except RecursionError:
        raise UserError("brackets nested too deeply", path, "Is this the right file?") from None


def _parse(text: str, path: str) -> Document:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise UserError("is empty", path, "Start from one of the predict_qwen1_5_*.yaml files.")
        if not isinstance(root, yaml.MappingNode):
            raise _odd_character(text, path, root.start_mark, root.end_mark) or UserError(
                "is not a list of `key: value` lines", _where(path, root), "Is this the right file?")
        sections: Dict[str, str] = {}
        entries = tuple(_walk(loader, root, path, "", sections, 0))
        return Document(path, entries, sections)
    finally:
        loader.dispose()


def scalar(text: str) -> Tuple[Any, bool]:
    """The value YAML gives to `text` (a scalar or a one-line list), and whether it was written without quotes.

    Raises:
        ValueError: `text` is not YAML, or is a mapping.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, True
        if isinstance(node, yaml.MappingNode):
            raise ValueError("is a section, not a value")
        return _construct(loader, node), _is_plain(node)
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise ValueError("has brackets nested too deeply") from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """The Python value of a node. Raises ValueError where a tag such as `!!float` and the text do not go together."""
    try:
        return loader.construct_object(node, deep=True)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        # PyYAML's constructors take for granted that the text has the form of its tag, and fail in as many ways.
        raise ValueError(f"{getattr(node, 'value', '')!r} is not a {node.tag.rpartition(':')[2]}") from None


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str, prefix: str, sections: Dict[str, str],
          depth: int) -> Iterator[YamlValue]:
    # Aliases can make a short file endless or enormous.
    if depth > _DEEPEST or len(sections) > _MOST_SECTIONS:
        limit = f"{_DEEPEST} deep" if depth > _DEEPEST else f"{_MOST_SECTIONS} in all"
        raise UserError(f"too many sections, more than {limit}", _where(path, node), "Does an alias point at itself?")
    for name, name_node, value_node in _pairs(loader, node, path):
        key = f"{prefix}{name}"
        where = _where(path, name_node)
        odd = odd_characters.first(name)
        if odd is not None:
            raise UserError(f"column {name_node.start_mark.column + odd.place + 1} is {odd.what}", where, odd.fix)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            sections[key] = where
            yield from _walk(loader, value_node, path, f"{key}.", sections, depth + 1)
        elif isinstance(value_node, yaml.MappingNode):
            sections[key] = where
            yield YamlValue(key, {}, where, True)
        else:
            try:
                value = _construct(loader, value_node)
            except ValueError as error:
                raise UserError(f"{key}: {error}", where) from None
            yield YamlValue(key, value, where, _is_plain(value_node), _odd_in(value_node, path))


def _pairs(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str) -> List[Tuple[str, yaml.Node, yaml.Node]]:
    """The pairs of one mapping, `<<` merges carried out, duplicates refused."""
    seen: Dict[str, int] = {}
    for name_node, _ in node.value:
        if name_node.tag == _MERGE:
            continue
        name = name_node.value
        if name_node.tag != _WORD:
            shown = name if isinstance(name_node, yaml.ScalarNode) else "in brackets"
            raise UserError(f"the key {shown} is not a word", _where(path, name_node),
                            "Put it in quotes if it is meant.")
        if name in seen:
            raise UserError(f"{name} is given twice; the first is on line {seen[name]}", _where(path, name_node),
                            "Keep one of them.")
        seen[name] = name_node.start_mark.line + 1
    if any(name_node.tag == _MERGE for name_node, _ in node.value):
        loader.flatten_mapping(node)
    # Merged pairs come first, so a later pair of the same name is the section's own and wins.
    merged = {str(name_node.value): (name_node, value_node) for name_node, value_node in node.value}
    return [(name, name_node, value_node) for name, (name_node, value_node) in merged.items()]


def _is_plain(node: yaml.Node) -> bool:
    return not (isinstance(node, yaml.ScalarNode) and node.style in ("'", '"', "|", ">"))


def _odd_in(node: yaml.Node, path: str) -> Optional[OddCharacter]:
    text, begin, end = node.start_mark.buffer, node.start_mark.pointer, node.end_mark.pointer
    odd = odd_characters.first(text[begin:end])
    if odd is None:
        return None
    before = text[:begin + odd.place].split("\n")
    return OddCharacter(f"{path}:{len(before)}", f"column {len(before[-1]) + 1} is {odd.what}", odd.fix)


def _where(path: str, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _odd_character(text: str, path: str, *marks: Any) -> Optional[UserError]:
    """What only looks right on the lines at `marks`, or before them, where a value goes on to the next line."""
    lines = text.split("\n")
    for number in sorted({line for mark in marks if mark is not None for line in (mark.line - 1, mark.line)}):
        odd = odd_characters.outside_quotes(lines[number]) if 0 <= number < len(lines) else None
        if odd is not None:
            return UserError(f"not valid YAML: column {odd.place + 1} is {odd.what}", f"{path}:{number + 1}", odd.fix)
    return None


def _nearest_file(path: str) -> str:
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    except OSError:
        return f"The folder {folder} does not exist either."
    near = did_you_mean(os.path.basename(path), names)
    if near:
        return near
    return f"YAML files there: {', '.join(names[:8])}." if names else f"There is no YAML file in {folder}."
