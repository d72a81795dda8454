"""Jinja set up as Hugging Face does for chat templates: sandboxed, with their tags, filters and functions."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any, List, Mapping


class Refused(Exception):
    """The template cannot be rendered with these messages; says why."""


def render(template: str, variables: Mapping[str, Any], most_characters: int) -> str:
    """The text that `template` makes of `variables`.

    Args:
        template: Jinja source.
        variables: by name: `messages`, `tools`, `add_generation_prompt`, ...
        most_characters: a longer text is refused.

    Raises:
        Refused: the template is not valid, forbids these messages, makes too much of them, or leaves the sandbox.
    """
    import jinja2

    try:
        pieces: List[str] = []
        length = 0
        for piece in _compiled(template).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > most_characters:
                raise Refused(f"the chat template makes more than {most_characters} characters of these messages")
        return "".join(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"line {error.lineno} of the chat template: {error.message}") from None
    except jinja2.TemplateError as error:
        raise Refused(f"the chat template refuses these messages: {error.message}") from None
    except RecursionError:
        raise Refused("the chat template is nested too deeply, or calls itself without end") from None
    except MemoryError:
        raise Refused("the chat template needs more memory than a prompt can be worth") from None
    except SyntaxError as error:  # of the Python source that Jinja compiles it to
        raise Refused(f"the chat template cannot be compiled: {error.msg}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Refused(f"the chat template fails on these messages: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; a prompt just contains them."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        # Jinja's own filter escapes HTML, which is not what the models have seen.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
