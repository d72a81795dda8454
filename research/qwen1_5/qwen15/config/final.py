"""The final value of every key with where it came from: given, else from the checkpoint, else the table's default."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from .given import Given
from .keys import KEYS, MODEL


class Final:
    """The account of a configuration while it is put together.

    Attributes:
        given: what the user said.
        values, sources: final value and origin of each key decided so far.
        notes: lines for the user.
    """

    def __init__(self, given: Given):
        self.given = given
        self.values: Dict[str, Any] = {}
        self.sources: Dict[str, str] = {}
        self.notes: List[str] = []

    def pick(self, name: str, *fallbacks: Tuple[Any, str]) -> Any:
        """The final value of a key: given, else the first fallback (value, origin) with a value, else the default."""
        if self.given.has(name):
            return self.put(name, self.given.entries[name], self.given.places[name])
        value, source = next((pair for pair in fallbacks if pair[0] is not None), (KEYS[name].default, "default"))
        return self.put(name, value, source)

    def model(self, name: str, *fallbacks: Tuple[Any, str]) -> Any:
        """`pick` for a key of model.model_config."""
        return self.pick(MODEL + name, *fallbacks)

    def put(self, name: str, value: Any, source: str) -> Any:
        """Decide a key; returns the value."""
        self.values[name], self.sources[name] = value, source
        return value

    def place(self, name: str) -> str:
        """`seq_length 8192 (file.yaml:31)` of a model_config key, for messages about two values."""
        return f"{name} {plainly(self.values[MODEL + name])} ({self.sources[MODEL + name]})"

    def nested(self) -> Dict[str, Any]:
        """All values, the given ones that nothing here decides included, nested as MindFormers wants them."""
        flat = {**self.given.entries, **self.values}
        flat.setdefault(MODEL + "type", "LlamaConfig")
        flat.setdefault("model.arch.type", "LlamaForCausalLM")
        flat.setdefault(MODEL + "qkv_has_bias", True)
        nested: Dict[str, Any] = {}
        for name, value in flat.items():
            self.sources.setdefault(name, self.given.places.get(name, "default"))
            if value is None:
                continue
            section = nested
            *path, last = name.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[last] = _for_mindformers(value)
        return nested


def plainly(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _for_mindformers(value: Any) -> Any:
    """Ids as one number when there is one."""
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return value
