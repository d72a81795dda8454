"""What the user gave, by dotted key, with the place of each: the lines of the YAML, then the command line over them."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence, Set, Tuple

from .. import odd_characters
from ..errors import UserError
from . import yaml_lines
from .flags import Flag
from .keys import FIXED, INERT, KEYS, convert, find, suggestion, unknown_part


class Given:
    """The values of the YAML and the command line by dotted key, with where each was given.

    Attributes:
        path: the YAML file, for messages.
        entries, places: value and place of each given key.
        inert: the given keys that prediction does not read, in order.
        commanded: the keys that the command line (or a caller of `load`) gave.
        odd: of each given key whose value holds such a character, the first that only looks like one of YAML's.
    """

    def __init__(self, document: yaml_lines.Document):
        self.path = document.path
        self.entries: Dict[str, Any] = {}
        self.places: Dict[str, str] = {}
        self.inert: Dict[str, None] = {}
        self.commanded: Set[str] = set()
        self.odd: Dict[str, yaml_lines.OddCharacter] = {}
        for entry in document.entries:
            where_of = {**document.sections, entry.key: entry.where}
            self._take(entry.key, entry.value, entry.where, entry.plain, where_of, entry.odd)

    def take_command_line(self, flags: Sequence[Flag], options: Sequence[str]) -> None:
        """Add flags and `dotted.key=value` options, over what the YAML says.

        Raises:
            UserError: an unknown key, a wrong type, or one key given twice with different values.
        """
        given: Dict[str, Tuple[str, Any]] = {}
        for flag in flags:
            self._take_once(given, flag.key, flag.value, flag.name, True)
        for option in options:
            key, equals, text = option.partition("=")
            key = key.strip()
            if not equals or not key:
                raise UserError(f"{option!r} is not KEY=VALUE", "--options",
                                "Example: model.model_config.num_blocks=256")
            try:
                value, plain = yaml_lines.scalar(text)
            except ValueError as error:
                raise UserError(f"{key}: {text!r} {error}", "--options") from None
            self._take_once(given, key, value, "--options", plain)

    def _take_once(self, given: Dict[str, Tuple[str, Any]], key: str, value: Any, where: str, plain: bool) -> None:
        if key in given and given[key][1] != value:
            raise UserError(f"{key} is given twice: {given[key][1]} by {given[key][0]} and {value} by {where}",
                            "command line", "Keep one of them.")
        given[key] = (where, value)
        self.commanded.add(key)
        odd = odd_characters.first(value) if isinstance(value, str) else None
        self._take(key, value, where, plain, {}, odd and yaml_lines.OddCharacter(
            where, f"character {odd.place + 1} is {odd.what}", odd.fix))

    def _take(self, name: str, value: Any, where: str, plain: bool, where_of: Mapping[str, str],
              odd: Optional[yaml_lines.OddCharacter] = None) -> None:
        row = find(name)
        if row is None:
            if value in (None, {}) and any(known.startswith(f"{name}.") for known in KEYS):
                return  # a known section that is empty
            if any(known.startswith(f"{name}.") for known in KEYS):
                error = f"{name} is a section, not the value {value!r}"
                raise odd_error(error, odd) or UserError(error, where, "Indent its keys below it.")
            part = unknown_part(name)
            parent = part.rpartition(".")[0]
            if parent in KEYS:
                raise UserError(f"{parent} wants a value, not a section", where_of.get(parent, where))
            raise UserError(f"{part} is not a known key", where_of.get(part, where), suggestion(part))
        if row.name != name and row.role == FIXED:
            raise UserError(f"{row.name} is not supported", where_of.get(row.name, where), "Remove it.")
        try:
            converted = convert(row, value, plain) if row.name == name else value
        except ValueError as error:
            raise odd_error(f"{name} {error}", odd) or UserError(f"{name} {error}", where) from None
        if row.role == INERT:
            self.inert[row.name] = None
        self.entries[name] = converted
        self.places[name] = where
        self.odd.pop(name, None)
        if odd is not None:
            self.odd[name] = odd

    def has(self, name: str) -> bool:
        """Whether the key has a value; an empty one is none."""
        return self.entries.get(name) is not None


def odd_error(error: str, odd: Optional[yaml_lines.OddCharacter]) -> Optional[UserError]:
    """What is wrong with a value, when a character in it explains it."""
    return None if odd is None else UserError(f"{error}; {odd.what}", odd.where, odd.fix)
