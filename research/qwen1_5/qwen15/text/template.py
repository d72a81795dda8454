"""Render a checkpoint's chat template as Hugging Face does, within limits of time, memory and length."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from ..errors import UserError
from . import template_engine
from .template_process import Renderer

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

_OWN_CHARACTERS = 2 ** 31
_renderer = Renderer()


def render(template: str, messages: Sequence[Mapping[str, Any]], *, tools: Optional[Sequence[Any]] = None,
           documents: Optional[Sequence[Any]] = None, add_generation_prompt: bool = False, where: object = None,
           **variables: Any) -> str:
    """The prompt text that `template` makes of `messages`.

    Args:
        template: Jinja source. A checkpoint's is rendered in a process of its own, which is ended after some seconds.
        messages: `{"role": ..., "content": ...}` each, oldest first; other keys are the template's business.
        tools, documents: passed on to the template.
        add_generation_prompt: end with the opening of the assistant's answer.
        where: where the template comes from, for error messages.
        variables: whatever else the template may use (`bos_token`, `enable_thinking`, ...), as JSON has it.

    Raises:
        UserError: the template is not valid, forbids these messages, leaves the sandbox, or asks for too much
            time, memory or text.
    """
    values = {"messages": messages, "tools": tools, "documents": documents,
              "add_generation_prompt": add_generation_prompt, **variables}
    try:
        if template == CHATML:
            return template_engine.render(template, values, _OWN_CHARACTERS)
        return _renderer.render(template, values)
    except template_engine.Refused as error:
        raise UserError(str(error), where or "chat template",
                        "Look at chat_template.jinja, or chat_template in tokenizer_config.json, and at each message: "
                        "it needs a role and a content that is text.") from None
