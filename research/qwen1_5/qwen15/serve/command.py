"""`qwen15 serve`: an OpenAI-compatible server for one checkpoint, in one process or over the launcher's ranks."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from typing import Any, Callable, List, Optional, Sequence

from .. import interrupts  # noqa: F401  (before everything that imports NumPy, see there)
from ..command_line import Parser, whole_from
from ..config.describe import describe
from ..config.flags import add_flags
from ..config.load import config_of
from ..config.schema import Config
from ..errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from ..generation.session import Session, Settings
from ..reporting import LEVELS, Reporter, begin
from .desk import Desk, DeskLimits
from .refusal import Refusal

DEFAULT_MAX_BATCH = 16
_LOCAL = ("127.0.0.1", "::1", "localhost")
_CLOSE_S = 5.0
"""How long answers that are under way may take to leave the process when it ends."""
_STUCK_S = 1.0
"""A main thread that has not come to its signal handler for so long waits for a rank that has gone."""


def parser() -> Parser:
    """The command line."""
    prog = "qwen15 serve"
    made = Parser(prog, "Serve a checkpoint over OpenAI's HTTP API.", [
        f"{prog} --config predict_qwen1_5_0_5b_chat.yaml --load_checkpoint models/Qwen1.5-0.5B-Chat-ms",
        f"{prog} --load_checkpoint models/7b --host 0.0.0.0 --port 8000 --api_key KEY"])
    add_flags(made)
    add = made.add_argument_group("the server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every address of this machine "
                                            "(default 127.0.0.1)")
    add("--port", type=whole_from(0, 65535), default=8000, help="port to listen on, 0 for any free one (default 8000)")
    add("--api_key", type=_key, default=os.environ.get("QWEN15_API_KEY") or None, metavar="KEY",
        help="what clients must send; also read from QWEN15_API_KEY, which other users of the machine cannot see")
    add("--served_model_name", nargs="+", metavar="NAME",
        help="what the model is called (default: the checkpoint's folder)")
    add("--max_batch", type=whole_from(1, 4096), default=DEFAULT_MAX_BATCH, metavar="N",
        help=f"most answers that are generated at once (default {DEFAULT_MAX_BATCH})")
    add("--max_waiting", type=whole_from(0, 10 ** 6), default=256, metavar="N",
        help="most prompts that wait beside them; more are answered with 429 (default 256)")
    add("--max_body_mib", type=whole_from(1, 1024), default=8, metavar="N",
        help="longest request body in MiB (default 8)")
    add("--request_timeout_s", type=whole_from(1, 10 ** 6), metavar="N",
        help="longest time for one answer (default: no limit)")
    add("--drain_s", type=whole_from(0, 10 ** 6), default=30, metavar="N",
        help="how long answers may still take after Ctrl-C or SIGTERM (default 30; the launcher allows 2)")
    add("--allowed_origins", nargs="+", default=[], metavar="URL",
        help="web pages of other servers that may call this one (CORS)")
    add("--log_level", choices=LEVELS, default="info", help="what is said on stderr (default info)")
    add("--debug", action="store_true", help="show tracebacks; log level debug")
    return made


def _key(text: str) -> str:
    if not text or text != text.strip():
        raise argparse.ArgumentTypeError("must not be empty, begin or end with a blank: no client could send it")
    return text


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Serve until Ctrl-C (exit code 130) or SIGTERM (0).

    Raises:
        UserError: whatever the user can mend.
    """
    args = parser().parse_args(argv)
    level = "debug" if args.debug else args.log_level
    config = config_of(args)
    if args.print_config:
        print(describe(config))
        return EXIT_OK
    _require_libraries()
    report = begin(level, config.notes)
    session = Session.prepare(config)
    listener = _listen(args.host, args.port) if session.rank == 0 else None
    if listener is not None and args.api_key is None and args.host not in _LOCAL:
        report.warning(f"warning: anybody who reaches {args.host} can use this server: --api_key asks for a key")
    session.open(report.info, args.max_batch)
    assert session.engine is not None
    if listener is None:
        return _follow(session)
    return _serve(session, args, config, listener, report)


def _require_libraries() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
                        fix="Install the server's packages: pip install 'qwen15-mindspore[serve]'.")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a taken port is told before the model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"is not an address of this machine ({error.strerror or error})",
                        where=f"--host {host}") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(f"cannot listen here: {os.strerror(error.errno or 0)}", where=f"{host}:{port}",
                        fix="Choose another --port, or --port 0 for any free one.") from None
    listener.setblocking(False)
    return listener


def _follow(session: Session) -> int:
    """The other ranks: they end when rank 0 does, not with a signal of their own, so that its answers can be
    completed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    assert session.engine is not None
    session.engine.follow()
    return EXIT_OK


def _serve(session: Session, args: argparse.Namespace, config: Config,
           listener: socket.socket, report: Reporter) -> int:
    from .loop import Loop
    from .metrics import Metrics

    assert session.engine is not None
    desk = Desk(DeskLimits(args.max_waiting, args.max_batch))
    web = web_of(session, args, config, desk, report, Metrics())
    thread = _Thread(listener, desk, web.application(), args.debug)
    loop = Loop(session, desk)
    ended: List[int] = []

    def end(number: int, _frame: Any) -> None:
        if ended and number == signal.SIGINT:
            raise KeyboardInterrupt
        ended.append(number)
        loop.stop(args.drain_s)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    wake = signal.set_wakeup_fd(thread.alarm, warn_on_full_buffer=False)
    try:
        thread.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{web.names[0]} is served at http://{shown}:{port}/v1 (a page to chat at http://{shown}:{port}/)",
              file=sys.stderr, flush=True)
        loop.run()
    finally:
        thread.stop()
        signal.set_wakeup_fd(wake)
        for number, handler in before.items():
            signal.signal(number, handler)
    report.info("the server has ended")
    return EXIT_INTERRUPTED if ended and ended[0] == signal.SIGINT else EXIT_OK


def _name_of(config: Config) -> str:
    path = os.path.abspath(config.load_checkpoint or "")
    return os.path.basename(path if os.path.isdir(path) else os.path.dirname(path)) or "qwen"


def web_of(session: Session, args: argparse.Namespace, config: Config, desk: Desk, report: Reporter,
           metrics: Any) -> Any:
    """The web side of an open session: the endpoints over `desk`, with the command line's limits.

    Args:
        metrics: a `metrics.Metrics`, or what counts like one.
    """
    from .app import Web, WebOptions
    from .protocol import CallReader

    assert session.engine is not None
    engine, grammars = session.engine, None
    try:
        from .grammar import Grammars
    except ImportError:
        report.info("llguidance is not installed: response_format and forced tool calls are refused")
    else:
        grammars = Grammars(session.tokenizer, session.limits.vocab_size, sorted(session.chat_stop_ids))
    metrics.watch("running_prompts", "Answers that are generated now", lambda: desk.running)
    metrics.watch("waiting_prompts", "Prompts that wait", lambda: desk.waiting)
    metrics.watch("kv_cache_blocks", "Blocks of the KV cache", lambda: session.limits.num_blocks)
    metrics.watch("kv_cache_free_blocks", "Blocks that are free or only kept for their content",
                  lambda: engine.pool.free_blocks)
    metrics.watch("put_back_total", "Requests that lost their blocks to older ones and were computed again",
                  lambda: engine.scheduler.put_back)
    if engine.speculation is not None:
        metrics.watch("guessed_tokens_total", "Guesses of next tokens that were checked", lambda: engine.guessed_tokens)
        metrics.watch("accepted_tokens_total", "Guesses that were right, each a token without a step of its own",
                      lambda: engine.accepted_tokens)
    names = tuple(args.served_model_name or [_name_of(config)])
    options = WebOptions(names=names, api_key=args.api_key, body_bytes=args.max_body_mib * 2 ** 20,
                      request_s=args.request_timeout_s, origins=tuple(args.allowed_origins),
                      max_model_len=session.limits.seq_length, tell=report.info, debug=args.debug)
    reader = CallReader(session, Settings.of(session.config), names, grammars)
    constraint = grammars.constraint if grammars is not None else lambda grammar: None
    return Web(desk, reader, session.tokenizer, metrics, constraint, options)


class _Thread:
    """The web server in its own thread.

    Attributes:
        alarm: file descriptor that signals are written to. The main thread runs no handler while it waits inside
            MindSpore for a rank that has gone, so this thread tells the clients in its place.
    """

    def __init__(self, listener: socket.socket, desk: Desk, application: Any, debug: bool):
        import uvicorn

        from .connection import Connection

        if not debug:  # a request that fails is told in a line of our own, without a traceback
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        self._server = uvicorn.Server(uvicorn.Config(
            application, http=Connection, log_config=None, access_log=False, lifespan="off", ws="none",
            server_header=False,
            timeout_graceful_shutdown=int(_CLOSE_S)))
        self._listener, self._desk = listener, desk
        self._heard, self._alarm = socket.socketpair()
        for end in (self._heard, self._alarm):
            end.setblocking(False)
        self.alarm = self._alarm.fileno()
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)
        self._ready = threading.Event()

    def start(self) -> None:
        """Returns when it listens."""
        with interrupts.held():  # Ctrl-C belongs to the main thread
            self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Let answers leave, and end."""
        self._server.should_exit = True
        self._thread.join(_CLOSE_S + 1.0)

    def _run(self) -> None:
        import asyncio

        async def serve() -> None:
            loop = asyncio.get_running_loop()
            self._desk.attach(loop)
            loop.add_reader(self._heard, lambda: self._signalled(loop.call_later))
            self._ready.set()
            await self._server.serve(sockets=[self._listener])

        asyncio.run(serve())

    def _signalled(self, call_later: Callable[..., Any]) -> None:
        if signal.SIGTERM in self._heard.recv(64):
            call_later(_STUCK_S, self._check)

    def _check(self) -> None:
        if self._desk.closing is None:  # the main thread has not reached its handler yet
            self._desk.give_up(Refusal(503, "The server is shutting down: another of its workers is gone.",
                                       code="server_failed"))
