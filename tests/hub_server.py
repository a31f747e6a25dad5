"""A Hugging Face Hub on the loopback interface: as much of its HTTP protocol as huggingface_hub speaks, and its faults.

Repositories, branches and commits are kept in memory. Large files are uploaded by Git LFS's protocol, and downloaded
from another host (`localhost` for `127.0.0.1`), as the Hub sends clients to its storage.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN, READ_ONLY = "hf_loopbackWriter", "hf_loopbackReader"


@dataclass
class Commit:
    """A commit: its parent, its title, and all files at it, by path; large ones by their SHA-256."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, "bytes | Large"]


@dataclass(frozen=True)
class Large:
    """A pointer to a large file."""

    oid: str
    size: int


@dataclass
class Repository:
    """Commits, oldest first, and the branches that name some of them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, "bytes | Large"]) -> Commit:
        """Add a commit to a branch."""
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{parent} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch or a hash names."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with the next requests of a method whose path matches.

    Attributes:
        status: Answered instead, with `headers`; with a `page`, as HTML.
        cut: The connection ends after so many bytes of the body: of the answer's, or of a PUT's or POST's own.
        lose: The request is done, and its answer lost.
        damage: Bytes of the answer's body are others, as many as they were.
        before: Called before the request is done.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    page: bool = False
    cut: int | None = None
    lose: bool = False
    damage: bool = False
    before: Callable[[], object] | None = None


class HubServer(ThreadingHTTPServer):
    """The Hub, in threads of this process; a context manager that stops it at its end."""

    daemon_threads = True

    def __init__(self) -> None:
        """Listen on a free port of the loopback interface."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.leaked: list[str] = []  # paths of the storage that were sent a token
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def inject(self, method: str, path: str, **kwargs: Any) -> Fault:
        """Let the next requests fail; see `Fault`."""
        self.faults.append(Fault(method, path, **kwargs))
        return self.faults[-1]

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault of this request, used up by it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """Make a repository, with the commit that the Hub begins one with."""
        self.repositories[repo_id] = repository = Repository(private)
        repository.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a revision's files, by path; nothing of a repository that is not there."""
        repository = self.repositories.get(repo_id)
        commit = repository.at(revision) if repository else None
        found = commit.files if commit else {}
        return {path: self.objects[file.oid] if isinstance(file, Large) else file for path, file in found.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {self.path_only}")
        self.fault = self.server.fault_of(self.command, self.path_only)
        length = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.cut is not None and length:
            self.rfile.read(min(self.fault.cut, length))
            return self._hang_up()
        self.body = (
            self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        if self.fault and self.fault.before:
            self.fault.before()
        if self.fault and self.fault.status:
            content = b"<html>" if self.fault.page else {"error": "as injected"}
            return self._answer(self.fault.status, content, self.fault.headers)
        with self.server.lock:
            for method, pattern, act in _ROUTES:
                found = re.fullmatch(pattern, self.path_only)
                if found and self.command in method.split():
                    return act(self, *found.groups())
        return self._answer(404, {"error": "no such page"})

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        if self.fault and self.fault.lose:
            return self._hang_up()
        if self.fault and self.fault.damage:
            body = body[:-16] + bytes(255 - byte for byte in body[-16:])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            return self._hang_up()
        self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._answer(
            status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        )

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self, owner: str) -> bool:
        """Whether the token may write, to its own name-space; else the refusal is sent."""
        if self._token not in (TOKEN, READ_ONLY):
            self._refuse(401, "Invalid username or password.")
        elif self._token == READ_ONLY or owner != "me":
            self._refuse(403, "you don't have the rights to write there")
        else:
            return True
        return False

    def _repository(self, repo_id: str) -> Repository | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self._token):
            self._refuse(404 if self._token else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def _commit_of(self, repo_id: str, revision: str | None) -> Commit | None:
        repository = self._repository(repo_id)
        commit = repository.at(revision or "main") if repository else None
        if repository and commit is None:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- What the routes do ---

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not self._may_write(repo_id.partition("/")[0]):
            return
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        self.server.create(repo_id, private=asked.get("visibility") == "private")
        self._answer(200, url)

    def _info(self, repo_id: str, revision: str | None = None) -> None:
        if commit := self._commit_of(repo_id, revision):
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            private = self.server.repositories[repo_id].private
            self._answer(200, {"id": repo_id, "sha": commit.sha, "private": private, "siblings": siblings})

    def _branch(self, repo_id: str, branch: str) -> None:
        if not self._may_write(repo_id.partition("/")[0]):
            return
        if repository := self._repository(repo_id):
            if branch in repository.branches:
                return self._refuse(409, f"Reference already exists: {branch}")
            start = (json.loads(self.body or b"{}")).get("startingPoint", "main")
            repository.branches[branch] = repository.at(start).sha
            self._answer(200, {})

    def _validate_card(self) -> None:
        """As the Hub: the metadata must be YAML, with a model-index that has what it must have."""
        try:
            _, front, _ = json.loads(self.body)["content"].split("---\n", 2)
            for model in yaml.safe_load(front).get("model-index", []):
                for result in model["results"]:
                    assert result["task"]["type"]
                    assert result["dataset"]["type"]
                    assert result["dataset"]["name"]
                    assert all(metric["type"] and metric["value"] is not None for metric in result["metrics"])
        except (ValueError, KeyError, AssertionError, yaml.YAMLError) as error:
            return self._answer(400, {"errors": [{"message": str(error)}]})
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, repo_id: str, revision: str) -> None:
        if not self._may_write(repo_id.partition("/")[0]):
            return
        if commit := self._commit_of(repo_id, revision):
            files = []
            for file in json.loads(self.body)["files"]:
                mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
                known = commit.files.get(file["path"])
                oid = {"oid": _etag(known)} if known is not None else {}
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
            self._answer(200, {"files": files})

    def _batch(self, repo_id: str) -> None:
        if not self._may_write(repo_id.partition("/")[0]):
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.storage}/{item['oid']}"}
            verify = {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify"}
            known = item["oid"] in self.server.objects
            objects.append(item if known else {**item, "actions": {"upload": upload, "verify": verify}})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refuse(400, "the content is not of this SHA-256")
        self.server.objects[oid] = self.body
        self._answer(200)

    def _verify(self, _: str) -> None:
        asked = json.loads(self.body)
        whole = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self._answer(200 if whole else 404, {})

    def _commit(self, repo_id: str, branch: str) -> None:
        if not self._may_write(repo_id.partition("/")[0]):
            return
        repository, head = self._repository(repo_id), self._commit_of(repo_id, branch)
        if repository is None or head is None:
            return
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", head.sha) != head.sha:
            return self._refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Large(value["oid"], value["size"])
            elif files.pop(value["path"], None) is None:
                return self._refuse(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = repository.commit(branch, header["value"]["summary"], files)
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit.sha}", "commitOid": commit.sha})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            return self._answer(
                404, None, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}
            )
        if isinstance(file, Large):
            there = {"Location": f"{self.server.storage}/{file.oid}"}
            linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
            return self._answer(302, None, headers | there | linked)
        self._send_range(file, headers | {"ETag": f'"{_etag(file)}"'})

    def _stored(self, oid: str) -> None:
        if self._token:
            self.server.leaked.append(oid)
        self._send_range(self.server.objects[oid], {"ETag": f'"{oid}"'})

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked:
            return self._answer(200, content, headers)
        start = int(asked[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206, content[start:], headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_card),
    ("GET", f"/api/models/{_REPO}", _Handler._info),
    ("GET", f"/api/models/{_REPO}/revision/(.+)", _Handler._info),
    ("POST", f"/api/models/{_REPO}/branch/(.+)", _Handler._branch),
    ("POST", f"/api/models/{_REPO}/preupload/(.+)", _Handler._preupload),
    ("POST", f"/api/models/{_REPO}/commit/(.+)", _Handler._commit),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler._batch),
    ("POST", f"/{_REPO}.git/info/lfs/verify", _Handler._verify),
    ("PUT", "/storage/(.+)", _Handler._put),
    ("GET HEAD", "/storage/(.+)", _Handler._stored),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
)


def _etag(file: "bytes | Large") -> str:
    """A large file's SHA-256, another one's name in Git."""
    return file.oid if isinstance(file, Large) else hashlib.sha1(b"blob %d\0" % len(file) + file).hexdigest()


@contextmanager
def hub_for_this_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that huggingface_hub speaks to in this process, with a token that may write, and an empty cache.

    huggingface_hub reads these constants at every call; its own environment variables it has read at import.
    """
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The same for a process to be started, by the variables that a user has."""
    return os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
