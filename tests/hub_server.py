"""A small Hub for tests, in a process of its own: repositories, LFS uploads, commits, downloads and faults on demand.

``python -m tests.hub_server`` prints its address and serves until it is killed. POST /_faults sets a list of
``[part of "METHOD /path", status, "drop", "drop answer" or "someone commits", times]``; GET /_log returns requests and
repositories.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "s3cretTokenOfATest" * 2
LARGE = (".safetensors",)
REPOS: dict[str, dict[str, Any]] = {}
STORED: dict[str, bytes] = {}
LOG: list[str] = []
FAULTS: list[list[Any]] = []


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
    if path.endswith(LARGE):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: Any = None, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        content = raw if raw is not None else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def fault(self, line: str) -> Any:
        for one in FAULTS:
            if one[0] in line and one[2] > 0:
                one[2] -= 1
                return one[1]
        return None

    def handle_any(self) -> None:
        place = urlsplit(self.path)
        path, query, body = unquote(place.path), parse_qs(place.query), self.body()
        if path == "/_faults":
            FAULTS[:] = json.loads(body)
            return self.answer()
        if path == "/_log":
            shown = {name: {**repo, "branches": {b: sorted(f) for b, f in repo["branches"].items()}}
                     for name, repo in REPOS.items()}  # fmt: skip
            return self.answer({"log": LOG, "repos": shown})
        LOG.append(f"{self.command} {path}")
        found = self.fault(LOG[-1])
        if found == "someone commits":
            REPOS[path.split("/", 3)[3].partition("/preupload")[0]]["branches"]["main"] |= {"theirs.txt": b"between"}
            found = None
        if found == "drop answer":
            self.wfile = io.BytesIO()  # the request is served, its answer is lost
            self.route(path, query, body)
        if found in ("drop", "drop answer"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if found is not None:
            return self.refuse(found, "", f"status {found} for {self.headers.get('Authorization')}")
        writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml"
        if writes and path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid username or password.")
        return self.route(path, query, body)

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        base = f"http://{self.headers['Host']}"
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            wrong = "license: no-such-licence" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of [apache-2.0, mit]'}] if wrong else []
            return self.answer({"errors": errors, "warnings": []}, 400 if wrong else 200)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            REPOS.setdefault(name, {"private": private, "branches": {"main": {}}, "commits": []})
            return self.answer({"url": f"{base}/{name}", "name": name, "id": name})
        if path == "/_lfs/verify":
            return self.answer()
        if path.startswith("/_lfs/"):
            STORED[path.rpartition("/")[2]] = body
            return self.answer()
        if at := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in STORED:
                    one["actions"] = {"upload": {"href": f"{base}/_lfs/{one['oid']}"},
                                      "verify": {"href": f"{base}/_lfs/verify"}}  # fmt: skip
            return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        if at := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.+))?)?", path):
            return self.repository(base, at[1], at[2], at[3], query, body)
        if at := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(at[1], at[2], at[3])
        return self.refuse(404, "", f"no route {path}")

    def files_of(self, name: str, revision: str | None) -> dict[str, bytes] | None:
        """Return a revision's files: of a branch, or of the commit at the end of one."""
        repo = REPOS.get(name)
        if repo is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        for branch, files in repo["branches"].items():
            if revision in (None, branch, self.sha(files)):
                return files
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted((k, git_id(v)) for k, v in files.items())).encode()).hexdigest()

    def repository(self, base: str, name: str, what: str | None, rest: str | None, query: Any, body: bytes) -> None:
        if what == "branch":
            REPOS[name]["branches"].setdefault(rest, dict(REPOS[name]["branches"]["main"]))
            return self.answer()
        revision = (rest or "main").split("/")[0] if what == "tree" else rest
        files = self.files_of(name, revision)
        if files is None:
            return None
        if what == "preupload":
            rows = []
            for one in json.loads(body)["files"]:
                held, large = files.get(one["path"]), one["path"].endswith(LARGE)
                oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_id(held)
                rows.append({"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                             "oid": oid})  # fmt: skip
            return self.answer({"files": rows, "commitOid": self.sha(files)})
        if what == "commit":
            return self.commit(base, name, revision or "main", query, [json.loads(line) for line in body.splitlines()])
        entries = [entry(path, content) for path, content in sorted(files.items())]
        if what == "tree":
            return self.answer(entries)
        card = re.match(rb"^---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        data = yaml.safe_load(card[1]) if card else {}
        return self.answer({
            "_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": self.sha(files),
            "private": REPOS[name]["private"], "gated": False, "disabled": False, "tags": data.get("tags", []),
            "cardData": data, "downloads": 0, "likes": 0, "lastModified": "2026-11-01T00:00:00.000Z",
            "createdAt": "2026-11-01T00:00:00.000Z", "siblings": [{"rfilename": one["path"]} for one in entries],
        })  # fmt: skip

    def commit(self, base: str, name: str, branch: str, query: Any, rows: list[dict[str, Any]]) -> None:
        repo = REPOS[name]
        files = dict(repo["branches"][branch])
        parent = rows[0]["value"].get("parentCommit")
        if parent and parent != self.sha(files):
            return self.refuse(412, "", "The expected parent commit is not the current one")
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = STORED[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        pull = query.get("create_pr") == ["1"]
        repo["branches"]["refs/pr/1" if pull else branch] = files
        repo["commits"].append(rows[0]["value"]["summary"])
        made = {"success": True, "commitUrl": f"{base}/{name}/commit/{self.sha(files)}", "commitOid": self.sha(files)}
        return self.answer({**made, **({"pullRequestUrl": f"{base}/{name}/discussions/1"} if pull else {})})

    def download(self, name: str, revision: str, path: str) -> None:
        files = self.files_of(name, revision)
        if files is None:
            return None
        commit = {"X_Repo_Commit": self.sha(files)}
        if path not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **commit)
        found = entry(path, files[path])
        large = found.get("lfs", {}).get("oid")
        tags = {"X_Linked_Etag": f'"{large}"', "X_Linked_Size": str(found["size"])} if large else {}
        return self.answer(raw=files[path], ETag=f'"{large or found["oid"]}"', **commit, **tags)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
