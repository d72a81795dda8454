"""The web side: OpenAI's endpoints over the desk, with limits on whatever a client sends or fails to read."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from importlib import resources
from typing import (
    Any,
    AsyncIterator,
    Awaitable,
    Callable,
    Dict,
    List,
    Mapping,
    MutableMapping,
    Optional,
    Tuple,
)

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..generation.session import numbered
from .answers import Answers, pairs
from .desk import Desk, Event, Ticket
from .metrics import Metrics
from .protocol import Call, CallReader, parse_json
from .refusal import Refusal

KEEP_ALIVE_S = 15.0
"""A stream that has nothing to say says so this often: proxies and clients give up on silent connections."""
BODY_S = 30.0
"""A request's body has to arrive within this time."""
DISCARD_S, DISCARD_TIMES = 5.0, 8
"""How long, and how many times the limit, of a body that is too long is read before it is refused."""
SEND_S = 60.0
"""A client that takes nothing for so long has left."""
_OPEN_PATHS = ("/", "/health")


@dataclass(frozen=True)
class WebOptions:
    """How the web side behaves.

    Attributes:
        names: what the model is called, the first in answers.
        api_key: what clients must send as `Authorization: Bearer ...`; None asks for nothing.
        body_bytes: longest body.
        request_s: longest time for one answer; None for as long as it takes.
        origins: web pages of other servers that may call this one (CORS).
        max_model_len: the model's context in tokens, told with its name.
        tell: takes the one line that each request leaves in the log.
        debug: tell the traceback of a defect.
    """

    names: Tuple[str, ...]
    api_key: Optional[str]
    body_bytes: int
    request_s: Optional[float]
    origins: Tuple[str, ...]
    max_model_len: int
    tell: Callable[[str], None]
    debug: bool = False


class Web:
    """The application.

    Args:
        desk: where requests go.
        reader: checks them.
        metrics: what is counted.
        constraint: makes the constraint of a grammar.
        options: see `WebOptions`.
        healthy: None while the engine serves, else why it does not.
    """

    def __init__(self, desk: Desk, reader: CallReader, tokenizer: Any, metrics: Metrics,
                 constraint: Callable[[str], Any], options: WebOptions):
        self._desk, self._reader, self._tokenizer = desk, reader, tokenizer
        self._metrics, self._constraint, self._options = metrics, constraint, options
        self._created = int(time.time())

    def application(self) -> Any:
        """The ASGI application."""
        routes = [Route("/", self._page), Route("/health", self._health), Route("/metrics", self._show_metrics),
                  Route("/v1/models", self._models), Route("/v1/models/{name:path}", self._model),
                  Route("/v1/chat/completions", self._chat, methods=["POST"]),
                  Route("/v1/completions", self._completions, methods=["POST"]),
                  Route("/tokenize", self._tokenize, methods=["POST"]),
                  Route("/detokenize", self._detokenize, methods=["POST"])]
        handlers: Dict[Any, Any] = {Refusal: self._refused, HTTPException: self._http_error, Exception: self._defect}
        middleware = [Middleware(CORSMiddleware, allow_origins=list(self._options.origins), allow_methods=["*"],
                                 allow_headers=["*"])] if self._options.origins else []
        middleware.append(Middleware(_Guard, web=self))
        return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)

    # --- small endpoints

    async def _page(self, request: Request) -> Response:
        page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")})

    async def _health(self, request: Request) -> Response:
        if self._desk.closing is not None:
            return JSONResponse({"status": self._desk.closing}, status_code=503)
        return JSONResponse({"status": "ok", "running": self._desk.running, "waiting": self._desk.waiting})

    async def _show_metrics(self, request: Request) -> Response:
        text, kind = self._metrics.text()
        return Response(text, media_type=kind)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._options.names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._options.names:
            raise Refusal(404, f"The model {name[:200]!r} is not served here.", "model", "model_not_found")
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> Dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "qwen15",
                "max_model_len": self._options.max_model_len}

    async def _tokenize(self, request: Request) -> Response:
        ids = await run_in_threadpool(self._reader.tokens, await self._body(request))
        return JSONResponse({"count": len(ids), "max_model_len": self._options.max_model_len, "tokens": ids})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": await run_in_threadpool(self._reader.detokenized, await self._body(request))})

    # --- answers

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, self._reader.chat)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, self._reader.text)

    async def _answer(self, request: Request, read: Callable[[Mapping[str, Any]], Call]) -> Response:
        body = await self._body(request)
        # Off the event loop: tokenising a long text takes time, and other streams must go on.
        call = await run_in_threadpool(read, body)
        each = pairs(call)
        prompts = tuple(numbered([call.prompts[prompt] for prompt, _ in each]))
        constraints = tuple(self._constraint(call.grammar) if call.grammar is not None else None for _ in each)
        ticket = Ticket(prompts, constraints, whole=not call.stream)
        self._desk.submit(ticket)
        answers = Answers(call, self._options.names[0], self._tokenizer.token_bytes,
                          lambda number: self._reader.text_of(call.prompts[number].ids))
        request.state.note = lambda: _note(answers, ticket)
        if call.stream:
            return StreamingResponse(self._stream(call, ticket, answers, request), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return await self._whole(ticket, answers, request)

    async def _stream(self, call: Call, ticket: Ticket, answers: Answers, request: Request) -> AsyncIterator[str]:
        """The answer as server-sent events. Starlette closes this generator when the client leaves."""
        ended = False
        try:
            for chunk in answers.first_chunks():
                yield _event(chunk)
            async for event in self._events(ticket):
                if event is None:
                    yield ": waiting\n\n"
                    continue
                for chunk in _taken(answers, event):
                    yield _event(chunk)
            ended = True
            if call.include_usage:
                yield _event(answers.usage_chunk())
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            ended = True
            request.state.failed = refusal.status
            yield _event(refusal.body)
        finally:
            self._close(ticket, answers, ended)

    async def _whole(self, ticket: Ticket, answers: Answers, request: Request) -> Response:
        async def collect() -> None:
            async for event in self._events(ticket):
                if event is not None:
                    _taken(answers, event)

        collecting = asyncio.ensure_future(collect())
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)
            collecting.result()
            return JSONResponse(answers.whole())
        finally:
            ended = collecting.done()
            for task in (collecting, leaving):
                task.cancel()
            self._close(ticket, answers, ended)

    async def _events(self, ticket: Ticket) -> AsyncIterator[Optional[Event]]:
        """What comes for a ticket until all its prompts have ended; None when there was nothing for a while.

        Raises:
            Refusal: one of its prompts failed, or its time is over.
        """
        left = len(ticket.prompts)
        while left:
            wait_s = KEEP_ALIVE_S
            if self._options.request_s is not None:
                rest_s = ticket.arrived_s + self._options.request_s - time.monotonic()
                if rest_s <= 0:
                    raise Refusal(504, f"The answer took longer than {self._options.request_s:g} s, which is this "
                                       f"server's limit.",
                                  code="timeout")
                wait_s = min(wait_s, rest_s)
            try:
                event = await asyncio.wait_for(ticket.events.get(), wait_s)
            except asyncio.TimeoutError:
                yield None
                continue
            if event.refusal is not None:
                raise event.refusal
            left -= event.finish_reason is not None
            yield event

    def _close(self, ticket: Ticket, answers: Answers, ended: bool) -> None:
        """Count a request that is over, and end what still runs for it."""
        self._desk.close(ticket, all(choice.finish_reason is not None for choice in answers.choices))
        if not ended:
            self._metrics.aborted.inc()
        usage = answers.usage()
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.cached_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        self._metrics.generated_tokens.inc(usage["completion_tokens"])
        now = time.monotonic()
        self._metrics.request_s.observe(now - ticket.arrived_s)
        if ticket.first_token_s is not None:
            self._metrics.first_token_s.observe(ticket.first_token_s - ticket.arrived_s)
            if usage["completion_tokens"] > 1:
                self._metrics.token_s.observe((now - ticket.first_token_s) / (usage["completion_tokens"] - 1))

    # --- requests

    async def _body(self, request: Request) -> Dict[str, Any]:
        return parse_json(await read_body(request, self._options.body_bytes))

    @property
    def names(self) -> Tuple[str, ...]:
        """What the model is called."""
        return self._options.names

    def check_key(self, path: str, header: bytes) -> None:
        """Refuse a request without the key; see the function."""
        check_key(self._options.api_key, path, header)

    async def _refused(self, request: Request, error: Any) -> Response:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    async def _http_error(self, request: Request, error: Any) -> Response:
        told = {404: f"There is no {request.url.path[:200]} here.",
                405: f"{request.url.path[:200]} is not for {request.method}."}
        refusal = Refusal(error.status_code, told.get(error.status_code, str(error.detail)))
        return JSONResponse(refusal.body, status_code=error.status_code, headers=error.headers)

    async def _defect(self, request: Request, error: Exception) -> Response:
        self._options.tell(f"error: {request.url.path}: {type(error).__name__}: {error}"[:500])
        return JSONResponse(Refusal(500, "The server failed on this request.").body, status_code=500)

    def told(self, scope: Mapping[str, Any], status: int, took_s: float) -> None:
        """A request is over: the log's line."""
        endpoint = scope["path"] if scope["path"] in self._known else "other"
        self._metrics.requests.labels(endpoint, str(status)).inc()
        client = scope.get("client") or ("?", 0)
        state = scope.get("state") or {}
        note = state.get("note")
        failed = state.get("failed")
        line = f"{client[0]} {scope['method']} {endpoint} {failed or status} {took_s:.3f} s"
        if endpoint not in ("/health", "/metrics"):
            self._options.tell(f"{line}{', ' + note() if note else ''}")

    _known = frozenset(("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions",
                        "/tokenize", "/detokenize"))


class _Guard:
    """Around every request: the API key, the time a client may take to read, and the log's line."""

    def __init__(self, app: Any, web: Web):
        self._app, self._web = app, web

    async def __call__(self, scope: Dict[str, Any], receive: Callable[[], Awaitable[Any]],
                       send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start_s, status = time.monotonic(), [499]
        scope.setdefault("state", {})

        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await asyncio.wait_for(send(message), SEND_S)

        try:
            app = self._app
            try:
                self._web.check_key(scope["path"], dict(scope["headers"]).get(b"authorization", b""))
            except Refusal as refusal:
                app = JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)
            await app(scope, receive, sent)
        except (asyncio.TimeoutError, ClientDisconnect):
            status[0] = 499
        finally:
            self._web.told(scope, status[0], time.monotonic() - start_s)


def check_key(key: Optional[str], path: str, header: bytes) -> None:
    """Refuse a request whose Authorization header is not `Bearer` and the key in UTF-8, compared in constant time.

    Raises:
        Refusal: the path asks for the key, and the header does not have it.
    """
    if key is None or path in _OPEN_PATHS:
        return
    scheme, _, given = header.partition(b" ")
    if not hmac.compare_digest(given.strip(), key.encode()) or scheme.lower() != b"bearer":
        raise Refusal(401, "Wrong or missing API key: send it as Authorization: Bearer KEY.", code="invalid_api_key")


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request, of at most so many bytes.

    Raises:
        Refusal: it is too long, too slow, or not JSON by its header.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "Send the body as JSON, with the header Content-Type: application/json.")
    try:
        body = await asyncio.wait_for(_read(request, most), BODY_S)
    except asyncio.TimeoutError:
        raise Refusal(408, f"The body did not arrive within {BODY_S:g} s.") from None
    if body is None:
        raise Refusal(413, f"The body is longer than {most} bytes, which is this server's limit.",
                      code="body_too_large")
    return body


async def _read(request: Request, most: int) -> Optional[bytes]:
    """The body; None for one that is too long, which is read on for a while: a client that still sends hears no
    answer."""
    body, size, until = bytearray(), 0, 0.0
    async for piece in request.stream():
        size += len(piece)
        if size <= most:
            body += piece
            continue
        body.clear()
        until = until or time.monotonic() + DISCARD_S
        if time.monotonic() > until or size > DISCARD_TIMES * most:
            break
    return bytes(body) if size <= most else None


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _taken(answers: Answers, event: Event) -> List[Dict[str, Any]]:
    return answers.take(event.choice, event.text, event.entries, event.finish_reason, event.usage, event.prompt_entries)


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _note(answers: Answers, ticket: Ticket) -> str:
    usage = answers.usage()
    first = ""
    if ticket.first_token_s is not None:
        first = f", first token after {ticket.first_token_s - ticket.arrived_s:.3f} s"
    return (f"{usage['prompt_tokens']} prompt tokens ({usage['prompt_tokens_details']['cached_tokens']} cached), "
            f"{usage['completion_tokens']} generated{first}")
