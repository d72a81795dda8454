"""Render a checkpoint's chat template: Jinja in a sandbox, with the settings that Hugging Face renders it with."""

import datetime
import functools
import json
from typing import Any, Mapping, Optional, Sequence

from ..errors import UserError

# What Qwen1.5's chat checkpoints carry as their template; used when a checkpoint has none.
CHATML = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def render(template: str, messages: Sequence[Mapping[str, Any]], *, tools: Optional[Sequence[Any]] = None,
           documents: Optional[Sequence[Any]] = None, add_generation_prompt: bool = False, where: object = None,
           **variables: Any) -> str:
    """The prompt text that `template` makes of `messages`.

    Args:
        template: Jinja source.
        messages: `{"role": ..., "content": ...}` each, oldest first; other keys are the template's business.
        tools, documents: passed on to the template.
        add_generation_prompt: end with the opening of the assistant's answer.
        where: where the template comes from, for error messages.
        variables: whatever else the template may use (`bos_token`, `enable_thinking`, ...).

    Raises:
        UserError: the template is not valid, forbids these messages, or does what the sandbox forbids.
    """
    import jinja2

    where = where or "chat template"
    try:
        return _compiled(template).render(messages=messages, tools=tools, documents=documents,
                                          add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno} of the chat template: {error.message}", where,
                        "Correct chat_template in tokenizer_config.json.") from error
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages: {error.message}", where) from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"the chat template fails on these messages: {type(error).__name__}: {error}", where,
                        "Each message needs a role and a content that is text.") from error


@functools.lru_cache(maxsize=32)
def _compiled(template: str):
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; a prompt just contains them."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML, which is not what the models have seen.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
