"""A hub on this machine: Hugging Face's protocol and ModelScope's for one folder of models, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_BYTES = 4096
"""Files from here on are kept as large files are: under their SHA-256."""


class Hub:
    """`with Hub(folder) as hub`: models are folders OWNER/NAME below `folder`; `hub.url` is for HF_ENDPOINT.

    Attributes:
        asked: (method, path) of every request.
        status: file or model -> status it is answered with.
        cut: file -> after how many bytes its connection is closed, once or for ever (`cut_for_ever`).
        wrong: file -> bytes sent in place of its own, under its own digest.
        token: what has to be sent along; None for nothing.
    """

    def __init__(self, folder):
        self.folder = folder
        self.asked, self.status, self.cut, self.wrong = [], {}, {}, {}
        self.cut_for_ever = False
        self.token = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def downloads(self):
        """Files whose contents were asked for."""
        return [path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path]

    def modelscope_downloads(self):
        """As `downloads`, by ModelScope's protocol."""
        return [path.rpartition("FilePath=")[2] for method, path in self.asked
                if method == "GET" and "FilePath=" in path]

    # -- the protocol

    def answer(self, request):
        path, query = unquote(urlsplit(request.path).path), parse_qs(urlsplit(request.path).query)
        self.asked.append((request.command, unquote(request.path) if query else path))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._refuse(request, 401)
        elif path.startswith("/api/v1/"):
            self._modelscope(request, path, {name: values[0] for name, values in query.items()})
        elif path.startswith("/api/models/"):
            self._describe(request, path)
        else:
            self._send_file(request, path)

    def _describe(self, request, path):
        model, _, rest = re.sub("^/api/models/", "", path).partition("/revision/")
        tree = re.fullmatch(r"([^/]+/[^/]+)/tree/([^/]+).*", model)
        if tree:
            model, rest = tree[1], tree[2]
        folder = self.folder / model
        if model in self.status or not (folder / "config.json").exists():
            self._refuse(request, self.status.get(model, 404), "RepoNotFound" if model not in self.status else "")
        elif rest not in ("", "main", COMMIT):
            self._refuse(request, 404, "RevisionNotFound")
        else:
            files = [self._entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
            about = {"id": model, "modelId": model, "sha": COMMIT, "private": False, "tags": [], "siblings": files,
                     "downloads": 0}
            self._reply(request, 200, json.dumps(list(map(_in_tree, files)) if tree else about).encode())

    def _entry(self, path, folder):
        content = path.read_bytes()
        entry = {"rfilename": path.relative_to(folder).as_posix(), "size": len(content), "blobId": _git(content)}
        if len(content) >= LARGE_BYTES:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _send_file(self, request, path):
        parts = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if parts is None:
            return self._refuse(request, 404)
        model, revision, name = parts.groups()
        file = self.folder / model / name
        if name in self.status:
            return self._refuse(request, self.status[name])
        if revision not in ("main", COMMIT):
            return self._refuse(request, 404, "RevisionNotFound")
        if not file.exists():
            return self._refuse(request, 404, "EntryNotFound")
        content = file.read_bytes()
        large = len(content) >= LARGE_BYTES
        digest = hashlib.sha256(content).hexdigest() if large else _git(content)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if large:
            headers.update({"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'})
        content = self.wrong.get(name, content)
        begin = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        status = 200
        if begin and request.command == "GET":
            first = int(begin[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        self._reply(request, status, content, headers, self.cut.get(name) if request.command == "GET" else None)
        if request.command == "GET" and not self.cut_for_ever:
            self.cut.pop(name, None)

    def _modelscope(self, request, path, query):
        """ModelScope's list of a repository's files, and one of them, whole or from a byte on."""
        asked = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", path)
        if asked is None:
            return self._reply(request, 200, b'{"Code": 200, "Success": true, "Data": {}}')
        model, folder = asked[1], self.folder / asked[1]
        if model in self.status or not (folder / "config.json").exists() or query.get("Revision") != "master":
            return self._refuse(request, self.status.get(model, 404))
        if asked[2]:
            files = [self._entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
            listed = [{"Path": file["rfilename"], "Type": "blob", "Size": file["size"],
                       "Sha256": hashlib.sha256((folder / file["rfilename"]).read_bytes()).hexdigest()}
                      for file in files]
            answer = {"Code": 200, "Success": True, "Data": {"Files": listed}}
            return self._reply(request, 200, json.dumps(answer).encode())
        name = query.get("FilePath", "")
        if name in self.status or not (folder / name).is_file():
            return self._refuse(request, self.status.get(name, 404))
        content, headers = self.wrong.get(name, (folder / name).read_bytes()), {"Accept-Ranges": "bytes"}
        begin = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if begin:
            headers["Content-Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
            content = content[int(begin[1]):]
        self._reply(request, 206 if begin else 200, content, headers, self.cut.get(name))
        if not self.cut_for_ever:
            self.cut.pop(name, None)
        return None

    def _refuse(self, request, status, code=""):
        self._reply(request, status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})

    def _reply(self, request, status, content, headers=(), cut=None):
        request.send_response(status)
        for name, value in dict(headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if cut is not None:
            request.wfile.write(content[:cut])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
            return
        request.wfile.write(content)


def _in_tree(entry):
    """A file as /tree/ lists it."""
    listed = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
    if "lfs" in entry:
        listed["lfs"] = {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 134}
    return listed


def _git(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
