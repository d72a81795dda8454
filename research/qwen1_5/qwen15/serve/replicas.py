"""`qwen15 serve` as a Ray Serve application: a gate before replicas of the model that come and go with the load.

A client reaches Ray's proxy, the proxy the `Gate`, the gate one of the `Replica`s. A replica is a whole server: it
reads requests, queues them at its desk and runs its engine. The gate carries HTTP to it and back, asks for the API key,
and tells a client whose replica has died in OpenAI's form; to Ray that is an exception like any other.

Ray is imported inside the functions that need it: only its clusters have it.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from typing import Any, AsyncIterator, Dict, List, Mapping, MutableMapping, Optional, Sequence

from .. import interrupts
from ..config.load import config_of
from ..errors import UserError, did_you_mean
from ..ray_environment import ENVIRONMENT
from .command import parser, web_of
from .refusal import Refusal

MODEL, GATE = "Model", "Gate"
"""The deployments, as `serve deploy`'s YAML and `serve status` name them."""
_RAYS_OWN = {"host": "http_options.host", "port": "http_options.port",
             "drain_s": f"graceful_shutdown_timeout_s of the deployment {MODEL}", "use_parallel": None}
"""Flags of `qwen15 serve` that Ray decides, and where it does."""
_SPARE = 64
"""Requests that a replica takes beyond what its desk queues: the desk tells a client that it is full, Ray would let it
wait."""
_HEAD = {"node:__internal_head__": 0.001}

Message = MutableMapping[str, Any]


def application(arguments: Mapping[str, Any]) -> Any:
    """What `serve deploy` and `serve run` build: `import_path: qwen15.serve.replicas:application`.

    Args:
        arguments: flags of `qwen15 serve` without their dashes, such as `load_checkpoint: /models/7b`; `options` is a
            mapping of configuration keys to values.

    Raises:
        UserError: a flag that does not exist or cannot be here, before anything is loaded.
    """
    from ray import serve

    argv = command_line(arguments)
    args = parser().parse_args(argv)
    config_of(args)
    replica = serve.deployment(Replica, name=MODEL, max_ongoing_requests=args.max_batch + args.max_waiting + _SPARE,
                               ray_actor_options={"num_cpus": 2, "runtime_env": {"env_vars": ENVIRONMENT}},
                               health_check_period_s=5)
    gate = serve.deployment(Gate, name=GATE, max_ongoing_requests=10 ** 5,
                            ray_actor_options={"num_cpus": 0, "resources": _HEAD})
    return gate.bind(replica.bind(argv), args.api_key, args.max_body_mib * 2 ** 20)


def command_line(arguments: Mapping[str, Any]) -> List[str]:
    """The flags as `qwen15 serve` has them.

    Raises:
        UserError: one that Ray decides.
    """
    known = [action.dest for action in parser()._actions]
    argv: List[str] = []
    for name, value in arguments.items():
        if name in _RAYS_OWN:
            place = _RAYS_OWN[name]
            raise UserError(f"{name} is not for a replica", where="args",
                            fix=f"Ray decides it: {place}." if place else "Every replica is one process: `replicas` "
                                "times the model, not one model over several.")
        if name not in known:
            raise UserError(f"{name} is not a flag of qwen15 serve", where="args", fix=did_you_mean(str(name), known))
        if isinstance(value, Mapping):
            argv += [f"--{name}", *(f"{key}={_text(item)}" for key, item in value.items())]
        elif isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(_text, value)]
        elif name == "debug":
            argv += ["--debug"] if value else []
        else:
            argv.append(f"--{name}={_text(value)}")
    return argv


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Replica:
    """A replica: one open session behind its own desk.

    Args:
        argv: flags of `qwen15 serve`; without `--threads` it uses as many as Ray has given it CPUs.
    """

    def __init__(self, argv: Sequence[str]):
        from ..generation.session import Session
        from ..reporting import Reporter, quiet_frameworks
        from .desk import Desk, DeskLimits
        from .loop import Loop
        from .replica_metrics import ReplicaMetrics

        _check_environment()
        args = parser().parse_args([*argv, *_threads(argv)])
        config = config_of(args)
        report = Reporter(args.log_level)
        quiet_frameworks(args.log_level)
        session = Session.prepare(config)
        session.open(report.info, args.max_batch)
        self._desk = Desk(DeskLimits(args.max_waiting, args.max_batch))
        self._metrics = ReplicaMetrics()
        self._application = web_of(session, args, config, self._desk, report, self._metrics).application()
        self._loop = Loop(session, self._desk)
        self._failure: Optional[str] = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        with interrupts.held():
            self._thread.start()

    async def answer(self, scope: Dict[str, Any], body: bytes) -> AsyncIterator[List[Message]]:
        """Run the web application on one request; ASGI's messages, those that came together in one list."""
        self._desk.attach(asyncio.get_running_loop())
        messages: "asyncio.Queue[Optional[Message]]" = asyncio.Queue()
        left = asyncio.Event()
        arrived = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if arrived:
                return arrived.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        running = asyncio.ensure_future(self._application({**scope, "type": "http"}, receive, send))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            ended = False
            while not ended:
                taken = [await messages.get()]
                while not messages.empty():
                    taken.append(messages.get_nowait())
                ended = taken[-1] is None
                made = [message for message in taken if message is not None]
                if made:
                    yield made
            running.result()
        finally:
            left.set()  # the application ends what still runs for a client that has left

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        self._metrics.refresh()
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine has ended: {self._failure or 'it was stopped'}")

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)
        if loop is not None:
            loop.stop(0)

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException as error:  # told to Ray by check_health
            self._failure = f"{type(error).__name__}: {error}"


def _check_environment() -> None:
    """See that the environment is what MindSpore needs here.

    Raises:
        UserError: MindSpore cannot be imported into this process, because of the protobuf that Ray has loaded.
    """
    (name, value), = ENVIRONMENT.items()
    if os.environ.get(name) != value:
        raise UserError("MindSpore cannot be loaded beside Ray's protobuf", where="runtime_env",
                        fix=f"Give the application `runtime_env: {{env_vars: {{{name}: {value}}}}}`, as ray_serve.yaml "
                            "does.")


def _threads(argv: Sequence[str]) -> List[str]:
    """A replica computes on the CPUs that Ray has given it."""
    import ray

    if any(word.split("=")[0] == "--threads" for word in argv):
        return []
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return [f"--threads={max(1, int(cpus))}"]


class Gate:
    """What clients reach.

    Args:
        model: handle of the deployment MODEL.
        api_key: what clients must send, None for nothing.
        body_bytes: longest body.
    """

    def __init__(self, model: Any, api_key: Optional[str], body_bytes: int):
        self._model = model.options(stream=True)
        self._api_key, self._body_bytes = api_key, body_bytes

    async def __call__(self, request: Any) -> Any:
        """Answer one HTTP request."""
        from starlette.responses import JSONResponse, StreamingResponse

        from .app import check_key, read_body

        try:
            scope = _carried(request.scope)
            check_key(self._api_key, scope["path"], request.headers.get("authorization", "").encode("latin-1"))
            if scope["path"] == "/metrics":
                raise Refusal(404, "Every replica's figures are among Ray's own metrics, as ray_qwen15_...; its "
                                   "dashboard names the addresses.")
            body = await read_body(request, self._body_bytes) if request.method == "POST" else b""
            messages = self._messages(scope, body)
            start = await messages.__anext__()
        except Refusal as refusal:
            return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)
        is_stream = any(name == b"content-type" and value.startswith(b"text/event-stream")
                        for name, value in start["headers"])
        response = StreamingResponse(_pieces(messages, is_stream), status_code=start["status"])
        response.raw_headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
        return response

    async def _messages(self, scope: Dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The replica's messages one by one.

        Raises:
            Refusal: the replica, or Ray, has failed.
        """
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        answer = self._model.answer.remote(scope, body)
        ended = False
        try:
            async for several in answer:
                for message in several:
                    yield message
            ended = True
        except BackPressureError:
            ended = True
            raise Refusal(429, "Too many requests are waiting. Try again later.", code="queue_full",
                          retry_after_s=5) from None
        except RayActorError:
            ended = True
            raise Refusal(503, "The replica that worked on this request is gone. Send it again.",
                          code="replica_failed", retry_after_s=1) from None
        except (RayError, RayServeException):
            ended = True
            raise Refusal(500, "The server failed on this request.") from None
        finally:
            if not ended:  # the client has left
                answer.cancel()


async def _pieces(messages: AsyncIterator[Message], is_stream: bool) -> AsyncIterator[bytes]:
    """The body. A stream that breaks off ends with the error; anything else breaks off visibly."""
    try:
        async for message in messages:
            if message.get("body"):
                yield message["body"]
    except Refusal as refusal:
        if not is_stream:
            raise
        yield f"data: {json.dumps(refusal.body)}\n\n".encode()


def _carried(scope: Mapping[str, Any]) -> Dict[str, Any]:
    """What of a request's ASGI scope goes to a replica, as if it were served at the root."""
    root, path = scope.get("root_path", ""), scope["path"]
    if root and path.startswith(root):
        path = path[len(root):] or "/"
    return {"http_version": scope.get("http_version", "1.1"), "method": scope["method"], "path": path, "root_path": "",
            "raw_path": path.encode(), "query_string": scope.get("query_string", b""), "scheme": scope["scheme"],
            "headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]],
            "client": tuple(scope["client"]) if scope.get("client") else None,
            "server": tuple(scope["server"]) if scope.get("server") else None}
