"""A stand-in for the Hugging Face Hub: an HTTP server that keeps repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """Its newest commit, by the files."""
        return _oid(repr(sorted(self.files.items())).encode())


@dataclass
class Hub:
    """What the server holds, and how it misbehaves.

    Args:
        repos: The repositories by their names.
        refuses: Parts of paths that are answered with an HTTP status and a message.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    endpoint: str = ""
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a Hub on a free port of this machine inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer_file(with_body=False)

    def do_GET(self) -> None:
        parts = self._parts()
        is_of_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_of_api else parts[:2])
        if name not in self.hub.repos:
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "resolve" in parts:
            self._answer_file(with_body=True)
        elif is_of_api and len(parts) == 4:
            self._answer_info(self.hub.repos[name], name)
        elif "tree" in parts:
            files = self.hub.repos[name].files.items()
            self._answer([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files])
        else:
            self._answer({"error": f"no such path: {self.path}"}, 404)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts = self._parts()
        for part, (status, message) in self.hub.refuses.items():
            if part in self.path:
                self._answer({"error": message}, status, {"X-Error-Message": message})
                return
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(data))
        elif parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(data)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "commit" in parts:
            self._commit(f"{parts[2]}/{parts[3]}", data)
        else:
            self._answer({"error": f"no such path: {self.path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            self._answer({**url, "error": "You already created this model repo"}, 409)
            return
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=private)
        self._answer(url)

    def _commit(self, name: str, data: bytes) -> None:
        repo = self.hub.repos[name]
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                del repo.files[value["path"]]
        url = f"{self.hub.endpoint}/{name}/commit/{repo.commit}"
        self._answer({"commitUrl": url, "commitOid": repo.commit})

    def _answer_info(self, repo: Repo, name: str) -> None:
        siblings = [{"rfilename": path} for path in repo.files]
        self._answer({"id": name, "private": repo.private, "sha": repo.commit, "siblings": siblings, "tags": []})

    def _answer_file(self, *, with_body: bool) -> None:
        owner, name, _, _, *path = self._parts()
        repo = self.hub.repos[f"{owner}/{name}"]
        data = repo.files.get("/".join(path))
        if data is None:
            self._answer({}, 404, {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        self.send_response(200)
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{_oid(data)}"', "Content-Length": str(len(data))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _answer(
        self, body: object, status: int = 200, headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _parts(self) -> list[str]:
        return urlparse(self.path).path.strip("/").split("/")


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
