"""What a request may say: OpenAI's JSON bodies checked field by field, and made `Prompt`s. Nothing is ignored.

A field is known and has an effect, or is known to have none (`user`, `metadata`, ...), or is refused by name. What sets
how a token is chosen goes through `Settings.changed`, the same table that checks the command line and files of prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from .. import strict_json
from ..errors import UserError, did_you_mean
from ..generation.session import Prompt, Session, Settings
from .refusal import Refusal

MOST_CHOICES = 128
MOST_PROMPTS = 256
MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
COMPLETION_TOKENS = 16
"""OpenAI's default for `max_tokens` of a completion; a chat's answer may fill what is left of seq_length."""
ROLES = ("system", "developer", "user", "assistant", "tool")

_SAMPLING = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                                     "frequency_penalty", "seed", "stop", "logit_bias", "no_repeat_ngram_size")}
_SAMPLING.update(max_tokens="max_new_tokens", max_completion_tokens="max_new_tokens", min_tokens="min_new_tokens")
"""Fields that set how a token is chosen or when to stop, and the setting that each one is."""
_NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_NEUTRAL: Dict[str, Tuple[Any, ...]] = {"store": (False,), "service_tier": ("auto", "default"), "suffix": ("",),
                                        "modalities": (["text"],), "reasoning_effort": ("none",),
                                        "audio": (), "prediction": (), "functions": (), "function_call": (),
                                        "web_search_options": (), "verbosity": ("medium",)}
"""OpenAI's fields that are not supported, with the values that ask for nothing."""
_REQUESTS_OWN = ("messages", "tools", "chat_template", "tokenizer", "self")
"""What `chat_template_kwargs` would replace in the making of a prompt."""
_SHARED = ("model", "stream", "stream_options", "n", "logprobs", "chat_template_kwargs")
_CHAT = frozenset((*_SHARED, *_SAMPLING, *_NO_EFFECT, "messages", "top_logprobs", "response_format", "tools",
                   "tool_choice", "parallel_tool_calls"))
_TEXT = frozenset((*_SHARED, *(name for name in _SAMPLING if name != "max_completion_tokens"), *_NO_EFFECT, "prompt",
                   "echo", "best_of")) - {"chat_template_kwargs"}


@dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
        chat: a conversation, otherwise texts to continue.
        prompts: what is continued, each `choices` times.
        choices: OpenAI's `n`.
        stream, include_usage: server-sent events, with a last one that carries the usage.
        echo: the answer begins with the prompt.
        logprobs: report this many likeliest tokens beside the chosen one; None reports nothing.
        grammar: what the answer must match, as llguidance has it; None for anything.
        tools: the conversation may call functions, so calls are looked for in the answer.
    """

    chat: bool
    prompts: Tuple[Prompt, ...]
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: Optional[int] = None
    grammar: Optional[str] = None
    tools: bool = False


def parse_json(body: bytes) -> Dict[str, Any]:
    """A request's body.

    Raises:
        Refusal: it is not a JSON object.
    """
    try:
        value = strict_json.loads(body.decode("utf-8"), once=True)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"The body is not UTF-8 (byte {error.start}).") from None
    except ValueError as error:
        raise Refusal(400, f"The body {error}.") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"The body must be a JSON object, not {_kind(value)}.")
    if b"\\u" in body:
        _check_characters(value)
    return value


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refusal(400, f"The body holds \\u{ord(error.object[error.start]):04x}, which is half of a character "
                           "(an unpaired surrogate).") from None


class CallReader:
    """Reads requests for one open session.

    Args:
        session: gives tokenizer, limits and the settings that hold where a request says nothing.
        settings: those settings.
        names: what the served model is called.
        compile_grammar: makes a grammar of a JSON schema (None: any JSON object), or of tools; raises `ValueError` for
            one that cannot be used; None where no grammar library is installed.
    """

    def __init__(self, session: Session, settings: Settings, names: Sequence[str],
                 compile_grammar: Optional["GrammarMaker"]):
        self._session = session
        self._settings = replace(settings, max_length=session.limits.seq_length)
        self._names = tuple(names)
        self._grammars = compile_grammar

    def chat(self, body: Mapping[str, Any]) -> Call:
        """`POST /v1/chat/completions`.

        Raises:
            Refusal: with the field that is wrong.
        """
        self._check_fields(body, _CHAT)
        settings, given = self._settings_of(body)
        logprobs = self._chat_logprobs(body)
        tools, grammar = self._tools(body)
        grammar = self._response_format(body, grammar)
        turns = messages(body.get("messages"))
        variables = _variables(body)
        try:
            prompt = self._session.chat_prompt(turns, _with_logprobs(settings, logprobs), "This conversation",
                                               tools, variables)
        except UserError as error:
            raise Refusal.of(error, "messages") from None
        prompt = self._fitted(prompt, given, None, "messages")
        return Call(True, (prompt,), logprobs=logprobs, grammar=grammar, tools=tools is not None, **self._shared(body))

    def text(self, body: Mapping[str, Any]) -> Call:
        """`POST /v1/completions`.

        Raises:
            Refusal: with the field that is wrong.
        """
        self._check_fields(body, _TEXT)
        if body.get("best_of") not in (None, body.get("n") or 1):  # as many as are wanted leaves nothing to choose
            raise Refusal(400, "best_of is not supported by this server.", "best_of", "unsupported_parameter")
        echo = bool(_typed(body, "echo", bool, "true or false"))
        nothing = echo and body.get("max_tokens") == 0  # only the prompt, with its log probabilities
        settings, given = self._settings_of({**body, "max_tokens": None} if nothing else body)
        logprobs = _count(body, "logprobs", 0, MOST_TOP_LOGPROBS)
        settings = _with_logprobs(settings, logprobs)
        if nothing:
            given["max_new_tokens"] = 0
        if echo and (nothing or logprobs is not None):
            settings = settings.changed({"prompt_logprobs": logprobs or 0})
        prompts = tuple(self._fitted(prompt, given, COMPLETION_TOKENS, "prompt")
                        for prompt in self._texts(body.get("prompt"), settings))
        return Call(False, prompts, echo=echo, logprobs=logprobs, **self._shared(body))

    def tokens(self, body: Mapping[str, Any]) -> List[int]:
        """`POST /tokenize`: the ids of a text, or of a conversation's prompt."""
        _only(body, ("model", "prompt", "messages", "tools", "add_special_tokens", "chat_template_kwargs"))
        self._check_model(body)
        if ("prompt" in body) == ("messages" in body):
            raise Refusal(400, "Give prompt or messages, one of them.", "prompt")
        tools = body.get("tools") or None
        if tools is not None:
            _function_names(tools)
        variables = _variables(body)
        try:
            if "messages" in body:
                made = self._session.chat_prompt(messages(body["messages"]), self._settings, "This conversation",
                                                 tools, variables)
            else:
                made = self._session.prompt(_text(body["prompt"], "prompt"), self._settings)
        except UserError as error:
            raise Refusal.of(error, "messages") from None
        return list(made.ids)

    def detokenized(self, body: Mapping[str, Any]) -> str:
        """`POST /detokenize`: the text of ids."""
        _only(body, ("model", "tokens"))
        self._check_model(body)
        ids = body.get("tokens")
        if not isinstance(ids, list) or not all(_is_id(token) for token in ids):
            raise Refusal(400, "tokens must be a list of token ids.", "tokens")
        self._check_ids(ids, "tokens")
        return self.text_of(ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """What ids stand for, U+FFFD where that is no UTF-8."""
        return b"".join(map(self._session.tokenizer.token_bytes, ids)).decode("utf-8", "replace")

    # --- fields

    def _check_fields(self, body: Mapping[str, Any], known: FrozenSet[str]) -> None:
        for name, value in body.items():
            if name in known or value is None:
                continue
            if name in _NEUTRAL:
                if value in _NEUTRAL[name]:
                    continue
                raise Refusal(400, f"{name} is not supported by this server.", name, "unsupported_parameter")
            hint = did_you_mean(name, known)
            raise Refusal(400, f"{name} is not a parameter of this endpoint.{' ' + hint if hint else ''}", name,
                          "unknown_parameter")
        self._check_model(body)
        if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
            raise Refusal(400, "Give max_completion_tokens or max_tokens, not both.", "max_tokens")

    def _check_model(self, body: Mapping[str, Any]) -> None:
        name = body.get("model")
        if name is not None and name not in self._names:
            raise Refusal(404, f"The model {str(name)[:200]!r} is not served here; {self._names[0]!r} is.", "model",
                          "model_not_found")

    def _settings_of(self, body: Mapping[str, Any]) -> Tuple[Settings, Dict[str, Any]]:
        """The settings, and those that the request gave itself."""
        given = {_SAMPLING[name]: body[name] for name in _SAMPLING if body.get(name) is not None}
        if "logit_bias" in given:
            self._check_ids(_biased(given["logit_bias"]), "logit_bias")
        seed = _count(body, "seed", -2 ** 63, 2 ** 63 - 1)  # OpenAI's range is wider than MindFormers'
        given.pop("seed", None)
        stops = given.get("stop")
        if isinstance(stops, list) and len(stops) > MOST_STOPS:
            raise Refusal(400, f"stop has {len(stops)} texts, at most {MOST_STOPS} are taken.", "stop")
        try:
            settings = self._settings.changed(given)
        except ValueError as error:
            setting = str(error).split(" ", 1)[0]
            field = next((name for name in body if _SAMPLING.get(name) == setting), setting)
            raise Refusal(400, f"{field} {str(error).split(' ', 1)[-1]}.", field) from None
        return settings if seed is None else replace(settings, seed=seed), given

    def _shared(self, body: Mapping[str, Any]) -> Dict[str, Any]:
        stream = bool(_typed(body, "stream", bool, "true or false"))
        options = _typed(body, "stream_options", dict, "an object") or {}
        if options and not stream:
            raise Refusal(400, "stream_options needs stream: true.", "stream_options")
        _only(options, ("include_usage", "include_obfuscation"), "stream_options.")
        if options.get("include_obfuscation"):
            raise Refusal(400, "stream_options.include_obfuscation is not supported by this server.",
                          "stream_options.include_obfuscation", "unsupported_parameter")
        return {"choices": _count(body, "n", 1, MOST_CHOICES) or 1, "stream": stream,
                "include_usage": bool(_typed(options, "include_usage", bool, "true or false"))}

    @staticmethod
    def _chat_logprobs(body: Mapping[str, Any]) -> Optional[int]:
        wanted = bool(_typed(body, "logprobs", bool, "true or false"))
        top = _count(body, "top_logprobs", 0, MOST_TOP_LOGPROBS)
        if top and not wanted:
            raise Refusal(400, "top_logprobs needs logprobs: true.", "top_logprobs")
        return (top or 0) if wanted else None

    def _texts(self, prompt: Any, settings: Settings) -> List[Prompt]:
        if isinstance(prompt, str) or isinstance(prompt, list) and prompt and all(_is_id(token) for token in prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise Refusal(400, "prompt must be a text, a list of token ids, or a list of either.", "prompt")
        if len(prompt) > MOST_PROMPTS:
            raise Refusal(400, f"prompt holds {len(prompt)} texts, at most {MOST_PROMPTS} are taken at once.", "prompt")
        made = []
        for number, item in enumerate(prompt):
            label = "The prompt" if len(prompt) == 1 else f"Prompt {number}"
            if isinstance(item, list) and all(_is_id(token) for token in item):
                self._check_ids(item, "prompt")
                made.append(Prompt(tuple(item), settings, frozenset(self._session.config.model.eos_token_id), label))
            else:
                made.append(self._session.prompt(_text(item, "prompt"), settings, label=label))
        return made

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        most = self._session.limits.vocab_size
        wrong = next((token for token in ids if not 0 <= token < most), None)
        if wrong is not None:
            raise Refusal(400, f"{param} holds the token id {wrong}; the model's ids are 0 to {most - 1}.", param)

    def _fitted(self, prompt: Prompt, given: Mapping[str, Any], default: Optional[int], param: str) -> Prompt:
        """The prompt with the limit on its answer, refused where both do not fit into the model's length."""
        most, length = self._session.limits.seq_length, len(prompt.ids)
        wanted = given.get("max_new_tokens", None)
        if length + (wanted if wanted is not None else 1) > most:
            asked = f" and {wanted} for the answer" if wanted is not None else ""
            raise Refusal(400, f"This model's maximum context length is {most} tokens, and the request has {length} in "
                               f"its {param}{asked}. Shorten it.", param, "context_length_exceeded")
        if wanted is None:
            wanted = min(default, most - length) if default is not None else most - length
        prompt = replace(prompt, settings=replace(prompt.settings, max_new_tokens=wanted))
        try:
            self._session.requests([prompt])
        except UserError as error:
            raise Refusal.of(error, param) from None
        return prompt

    # --- grammars

    def _response_format(self, body: Mapping[str, Any], grammar: Optional[str]) -> Optional[str]:
        wanted = _typed(body, "response_format", dict, "an object") or {"type": "text"}
        kind = wanted.get("type")
        if kind == "text":
            return grammar
        if kind not in ("json_object", "json_schema"):
            raise Refusal(400, "response_format.type must be text, json_object or json_schema.", "response_format")
        if grammar is not None:
            raise Refusal(400, "response_format and a required tool call exclude each other.", "response_format")
        schema: Optional[Mapping[str, Any]] = None
        if kind == "json_schema":
            outer = wanted.get("json_schema")
            schema = outer.get("schema") if isinstance(outer, dict) else None
            if not isinstance(schema, dict):
                raise Refusal(400, "response_format.json_schema.schema must be an object.", "response_format")
        return self._compiled(lambda maker: maker.json(schema), "response_format")

    def _tools(self, body: Mapping[str, Any]) -> Tuple[Optional[List[Any]], Optional[str]]:
        """The tools that the template is given, and the grammar that a forced call needs."""
        tools, choice = body.get("tools"), body.get("tool_choice")
        if not tools:
            if choice not in (None, "none", "auto"):
                raise Refusal(400, "tool_choice needs tools.", "tool_choice")
            return None, None
        names = _function_names(tools)
        template = self._session.tokenizer.chat_template or ""
        if "tools" not in template or "<tool_call>" not in template:
            raise Refusal(400, "This model's chat template has no tool calls (Qwen1.5 has none, Qwen2.5 does).",
                          "tools", "unsupported_parameter")
        if choice == "none":
            return None, None
        forced = _forced_tools(choice, names)
        if forced is None:
            return tools, None
        wanted = [tool["function"] for tool in tools if tool["function"]["name"] in forced]
        several = body.get("parallel_tool_calls") is not False and choice == "required"
        return tools, self._compiled(lambda maker: maker.tool_calls(wanted, several), "tools")

    def _compiled(self, make: Callable[["GrammarMaker"], str], param: str) -> str:
        if self._grammars is None:
            raise Refusal(400, f"{param} needs the llguidance package on the server, which is not installed.", param,
                          "unsupported_parameter")
        try:
            return make(self._grammars)
        except ValueError as error:
            raise Refusal(400, f"{param} cannot be used: {error}", param) from None


class GrammarMaker:
    """What makes grammars for `CallReader`; see grammar.py."""

    def json(self, schema: Optional[Mapping[str, Any]]) -> str:
        """The grammar of JSON values that the schema allows; None allows any object."""
        raise NotImplementedError

    def tool_calls(self, functions: Sequence[Mapping[str, Any]], several: bool) -> str:
        """The grammar of a call of one of these functions, or of several calls."""
        raise NotImplementedError


def messages(value: Any) -> List[Dict[str, Any]]:
    """A conversation as chat templates take it: content is text; `developer` is `system`, as OpenAI has it.

    Raises:
        Refusal: a message that is not one, or holds more than text.
    """
    if not isinstance(value, list) or not value:
        raise Refusal(400, "messages must be a list of at least one message.", "messages")
    made = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refusal(400, f"{where} must be an object with role and content.", where)
        role = message.get("role")
        if role not in ROLES:
            raise Refusal(400, f"{where}.role must be one of {', '.join(ROLES)}.", f"{where}.role")
        _only(message, ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations"), f"{where}.")
        content = message.get("content")
        if content is None:
            content = message.get("refusal")  # what the assistant said instead
        turn: Dict[str, Any] = {"role": "system" if role == "developer" else role,
                                "content": _content(content, where, bool(message.get("tool_calls")))}
        if message.get("tool_calls"):
            turn["tool_calls"] = [_past_call(call, f"{where}.tool_calls[{i}]") for i, call in
                                  enumerate(message["tool_calls"] if isinstance(message["tool_calls"], list)
                                            else [None])]
        if isinstance(message.get("name"), str):
            turn["name"] = message["name"]
        made.append(turn)
    return made


def _content(value: Any, where: str, may_be_empty: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and may_be_empty:
        return ""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                raise Refusal(400, f"{where}.content holds {kind or 'a part'!r}: this model reads text only.",
                              f"{where}.content")
        return "".join(part[part["type"]] for part in value)
    raise Refusal(400, f"{where}.content must be a text.", f"{where}.content")


def _past_call(call: Any, where: str) -> Dict[str, Any]:
    """A call that the assistant has made, its arguments as an object: that is what Qwen's templates print as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(400, f"{where}.function must have a name and arguments.", where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise Refusal(400, f"{where}.function.arguments is not JSON.", where) from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function_names(tools: Any) -> List[str]:
    names = []
    for number, tool in enumerate(tools if isinstance(tools, list) else [None]):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or not name.replace("-", "_").replace(".", "_").isidentifier():
            raise Refusal(400, f"tools[{number}] must be a function with a name.", f"tools[{number}]")
        names.append(name)
    return names


def _forced_tools(choice: Any, names: Sequence[str]) -> Optional[List[str]]:
    """The functions one of which must be called; None when none must."""
    if choice in (None, "auto"):
        return None
    if choice == "required":
        return list(names)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in names:
        raise Refusal(400, "tool_choice must be none, auto, required, or one of the tools.", "tool_choice")
    return [name]


def _with_logprobs(settings: Settings, logprobs: Optional[int]) -> Settings:
    # One likeliest token at least: the chosen one's own probability comes with it.
    return settings if logprobs is None else settings.changed({"logprobs": max(logprobs, 1)})


def _biased(value: Any) -> List[int]:
    """The token ids that a `logit_bias` speaks of."""
    if not isinstance(value, dict) or not all(
            len(key) < 10 and key.isascii() and key.isdigit() and str(int(key)) == key and type(bias) in (int, float)
            and -100 <= bias <= 100 for key, bias in value.items()):
        raise Refusal(400, "logit_bias must map token ids to numbers from -100 to 100.", "logit_bias")
    return list(map(int, value))


def _typed(body: Mapping[str, Any], name: str, kind: type, what: str) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refusal(400, f"{name} must be {what}, not {_kind(value)}.", name)
    return value


def _variables(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """`chat_template_kwargs`: what the template may use beside the request itself."""
    variables = _typed(body, "chat_template_kwargs", dict, "an object") or {}
    for name in _REQUESTS_OWN:
        if name in variables:
            raise Refusal(400, f"chat_template_kwargs cannot set {name}.", f"chat_template_kwargs.{name}")
    return variables


def _count(body: Mapping[str, Any], name: str, least: int, most: int) -> Optional[int]:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise Refusal(400, f"{name} must be a whole number from {least} to {most}.", name)
    return value


def _only(body: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    for name, value in body.items():
        if name not in known and value is not None:
            raise Refusal(400, f"{prefix}{name} is not known here.", f"{prefix}{name}", "unknown_parameter")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refusal(400, f"{name} must be a text, not {_kind(value)}.", name)
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object",
            type(None): "null"}[type(value)]
