"""A small server of the Hugging Face Hub on the loopback: repositories made, files committed, and read by HEAD and GET.

It speaks what huggingface_hub asks for when a file is pushed or downloaded: create, validate-yaml, preupload, the LFS batch
with its PUT, commit, and resolve with redirects, ETags and error codes.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


class Hub:
    """Repositories by name: each has branches, which are lists of commits, and a commit has its files."""

    def __init__(self):
        self.repos, self.private, self.large, self.asked = {}, set(), {}, []
        self.sizes = {}  # what HEAD says of a file, where that is not the truth
        self.url = ""

    def commit(self, name, branch, files, message=""):
        branches = self.repos[name]
        before = branches[branch]
        made = {**(before[-1]["files"] if before else {}), **files}
        oid = hashlib.sha1(json.dumps([message, len(before), sorted(made)]).encode() + b"".join(made.values())).hexdigest()
        branches[branch] = [*before, {"oid": oid, "files": made, "message": message}]
        return oid

    def at(self, name, revision):
        """The commit of a branch, or of an object id."""
        branches = self.repos[name]
        if revision in branches:
            return branches[revision][-1] if branches[revision] else {"oid": "0" * 40, "files": {}}
        found = [each for commits in branches.values() for each in commits if each["oid"] == revision]
        return found[0] if found else None


@contextmanager
def served(hub):
    """The hub behind a port of the loopback; `hub.url` is its address."""

    class Handler(Answers):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError):
                self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, b"", X_Error_Code=code, X_Error_Message=code)

    def parts(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("User-Agent", "")))
        return path.strip("/").split("/")

    @property
    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self):
        hub, body = self.hub, self.body
        match self.parts():
            case _ if not self.known:
                self.refuse(401, "Unauthorized")
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                made = name not in hub.repos
                hub.repos.setdefault(name, {"main": []})
                if made and (asked.get("private") or asked.get("visibility") == "private"):
                    hub.private.add(name)
                self.answer(200 if made else 409, {"url": f"{hub.url}/{name}"})
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _] if f"{owner}/{name}" in hub.repos:
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]
                self.answer(200, {"files": [{**each, "shouldIgnore": False} for each in files]})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer(200, {"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "branch", branch]:
                branches = hub.repos[f"{owner}/{name}"]
                made = branch not in branches
                branches.setdefault(branch, [*branches["main"]])
                self.answer(200 if made else 409, {})
            case ["api", "models", owner, name, "commit", branch] if branch in hub.repos.get(f"{owner}/{name}", ()):
                self.committed(f"{owner}/{name}", branch, body)
            case _:
                self.refuse(404, "RepoNotFound")

    def committed(self, name, branch, body):
        hub, files, message = self.hub, {}, ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "lfsFile":
                assert hashlib.sha256(hub.large[value["oid"]]).hexdigest() == value["oid"]
                files[value["path"]] = hub.large[value["oid"]]
            else:
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
        oid = hub.commit(name, branch, files, message)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

    def do_PUT(self):
        *_, oid = self.parts()
        self.hub.large[oid] = self.body
        self.answer(200)

    def do_HEAD(self):
        self.read()

    def do_GET(self):
        self.read()

    def read(self):
        hub = self.hub
        match self.parts():
            case ["large", oid] if oid in hub.large and not self.headers.get("Authorization"):
                self.answer(200, hub.large[oid], ETag=f'"{oid}"')
            case [owner, name, "resolve", revision, *path]:
                self.resolved(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.refuse(404, "EntryNotFound")

    def resolved(self, name, revision, path):
        hub = self.hub
        if name not in hub.repos or (name in hub.private and not self.known):
            return self.refuse(401 if not self.known else 404, "RepoNotFound")
        commit = hub.at(name, revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in commit["files"]:
            return self.refuse(404, "EntryNotFound")
        content = commit["files"][path]
        of_commit = {"X_Repo_Commit": commit["oid"]}
        if path in hub.sizes:
            of_commit["X_Linked_Size"] = hub.sizes[path]
        if path.endswith(".safetensors"):  # as large files are: elsewhere, behind a redirect
            oid = hashlib.sha256(content).hexdigest()
            hub.large[oid] = content
            elsewhere = hub.url.replace("127.0.0.1", "localhost")  # a server that is not to get the token
            linked = {"X_Linked_Size": len(content), "X_Linked_Etag": f'"{oid}"', "Location": f"{elsewhere}/large/{oid}"}
            return self.answer(302, b"", **linked | of_commit)
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **of_commit)
