"""A hub on loopback, with the requests that `huggingface_hub` makes: lists of files, and files in parts."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders of files as repositories.

    Attributes:
        repositories: owner/name -> folder.
        statuses: owner/name -> (HTTP status, X-Error-Code) of the answer instead.
        cut: name of a file -> how often its transfer ends half way.
        asked: (method, path, Range or "") of every request.
        sent: name of a file -> bytes of it that were sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.statuses: dict[str, tuple[int, str]] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """Ignores clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range") or ""))
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(.*))?$", path)
        name, rest = found[1], found[2] or ""
        if name in self.server.statuses:
            status, code = self.server.statuses[name]
            return self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
        if name not in self.server.repositories:
            return self._answer(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        folder = self.server.repositories[name]
        if rest.startswith("resolve/"):
            return self._file(folder / rest.split("/", 2)[2])
        if rest.startswith("tree/"):
            return self._answer(200, json.dumps([self._entry(folder, file) for file in self._files(folder)]).encode())
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in self._files(folder)]
        answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}
        return self._answer(200, json.dumps(answer | {"tags": [], "downloads": 0, "likes": 0}).encode())

    def _files(self, folder: Path) -> list[Path]:
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def _entry(self, folder: Path, file: Path) -> dict:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        status = 206 if begin else 200
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        part = content[begin:]
        if self.command == "GET" and self.server.cut.get(file.name, 0) > 0:
            self.server.cut[file.name] -= 1
            sent = part[: len(part) // 2]
            self._headers(status, len(part), headers)
            self.wfile.write(sent)
            self.wfile.flush()
            self.close_connection = True
        else:
            sent = part
            self._answer(status, part, headers)
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(sent)

    def _headers(self, status: int, length: int, headers: dict) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(length), "Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.end_headers()

    def _answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self._headers(status, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)
