"""Read a YAML file into flat dotted keys, each with the line it stands on."""

import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Tuple

import yaml

from .errors import UserError, did_you_mean

_DEEPEST = 32
_LARGEST_FILE_BYTES = 4 * 2 ** 20
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """One value of a YAML file.

    Attributes:
        key: dotted path, `model.model_config.seq_length`.
        value: a scalar, a list, None, or {} for an empty section; never a filled section.
        where: `file.yaml:31`, the line of the key.
        plain: the value was written without quotes.
    """

    key: str
    value: Any
    where: str
    plain: bool


@dataclass(frozen=True)
class Document:
    """A YAML file: its values in file order, and where each section (mapping) begins."""

    path: str
    entries: Tuple[Entry, ...]
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
        if os.path.getsize(path) > _LARGEST_FILE_BYTES:
            raise UserError(f"{os.path.getsize(path)} bytes are too many for a configuration", path,
                            "Is this the right file?")
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", path, _nearest_file(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", path, "Is this the right file?") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    return parse(text, path)


def parse(text: str, path: str) -> Document:
    """Parse YAML `text`; `path` is only for messages. Raises like `read`."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise UserError("is empty", path, "Start from one of the predict_qwen1_5_*.yaml files.")
        if not isinstance(root, yaml.MappingNode):
            raise UserError("is not a list of `key: value` lines", _where(path, root), "Is this the right file?")
        sections: Dict[str, str] = {}
        entries = tuple(_walk(loader, root, path, "", sections, 0))
        return Document(path, entries, sections)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise UserError(f"not valid YAML: {error.problem or error.context}", where, _yaml_hint(text, mark)) from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", path, "Is this the right file?") from None
    finally:
        loader.dispose()


def scalar(text: str) -> Tuple[Any, bool]:
    """The value YAML gives to `text` (a scalar or a one-line list), and whether it was written without quotes.

    Raises:
        ValueError: `text` is not YAML, or is a mapping.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, True
        if isinstance(node, yaml.MappingNode):
            raise ValueError("is a section, not a value")
        return loader.construct_object(node, deep=True), _is_plain(node)
    except yaml.YAMLError as error:
        raise ValueError(f"is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    finally:
        loader.dispose()


def _walk(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str, prefix: str, sections: Dict[str, str],
          depth: int) -> Iterator[Entry]:
    if depth > _DEEPEST:
        raise UserError(f"sections nested more than {_DEEPEST} deep", _where(path, node),
                        "Does an alias point at itself?")
    for name, name_node, value_node in _pairs(loader, node, path):
        key = f"{prefix}{name}"
        where = _where(path, name_node)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            sections[key] = where
            yield from _walk(loader, value_node, path, f"{key}.", sections, depth + 1)
        elif isinstance(value_node, yaml.MappingNode):
            sections[key] = where
            yield Entry(key, {}, where, True)
        else:
            yield Entry(key, loader.construct_object(value_node, deep=True), where, _is_plain(value_node))


def _pairs(loader: yaml.SafeLoader, node: yaml.MappingNode, path: str) -> List[Tuple[str, yaml.Node, yaml.Node]]:
    """The pairs of one mapping, `<<` merges carried out, duplicates refused."""
    seen: Dict[str, int] = {}
    for name_node, _ in node.value:
        if name_node.tag == _MERGE:
            continue
        name = loader.construct_object(name_node) if isinstance(name_node, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise UserError(f"the key {getattr(name_node, 'value', name)} is not a word", _where(path, name_node),
                            "Put it in quotes if it is meant.")
        if name in seen:
            raise UserError(f"{name} is given twice; the first is on line {seen[name]}", _where(path, name_node),
                            "Keep one of them.")
        seen[name] = name_node.start_mark.line + 1
    if any(name_node.tag == _MERGE for name_node, _ in node.value):
        loader.flatten_mapping(node)
    # Merged pairs come first, so a later pair of the same name is the section's own and wins.
    merged = {loader.construct_object(name_node): (name_node, value_node) for name_node, value_node in node.value}
    return [(name, name_node, value_node) for name, (name_node, value_node) in merged.items()]


def _is_plain(node: yaml.Node) -> bool:
    return not (isinstance(node, yaml.ScalarNode) and node.style in ("'", '"', "|", ">"))


def _where(path: str, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _yaml_hint(text: str, mark: Any) -> str:
    lines = text.splitlines()
    if mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]:
        return "There is a tab on this line: YAML indents with spaces."
    return "Check the indentation, quotes and brackets around this line."


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
