"""Google Cloud on loopback: a server of HTTPS that answers for *.googleapis.com.

A process finds it by a `sitecustomize` on its path, which leads connections to Google there and
refuses all others that would leave this machine; nothing in Ray or in Google's client is replaced.
An instance is what was asked for, with an address; an operation is done at once.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
Answer = tuple[int, Json]
NOT_FOUND: Answer = (404, {"error": {"code": 404, "message": "not found"}})
SITE = """import errno, os, socket

def there(host, port):
    host = host.decode() if isinstance(host, bytes) else str(host)
    if host.endswith(".googleapis.com"):
        return "127.0.0.1", int(os.environ["GOOGLE_PORT"])
    if host not in ("127.0.0.1", "localhost", "::1", "None"):
        with open(os.environ["GOOGLE_REFUSED"], "a") as file:
            print(host, file=file)
        raise OSError(errno.ENETUNREACH, f"{host} is beyond this test")
    return host, port

def connect(self, address, real=socket.socket.connect):
    inside = self.family not in (socket.AF_INET, socket.AF_INET6)
    return real(self, address if inside else (*there(*address[:2]), *address[2:]))

def getaddrinfo(host, port, *rest, real=socket.getaddrinfo, **options):
    return real(*there(host, port), *rest, **options)

socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""
DONE: Answer = (200, {"name": "operation", "status": "DONE"})


@dataclass
class Google:
    """One project, and what was asked of it."""

    project: str
    asked: list[tuple[str, str, Json]] = field(default_factory=list)
    """Method, host with path, body."""
    instances: dict[str, Json] = field(default_factory=dict)
    accounts: dict[str, Json] = field(default_factory=dict)
    policy: Json = field(default_factory=lambda: {"bindings": []})

    def inserted(self) -> list[Json]:
        """The instances that were asked for, in order."""
        return [
            body for how, what, body in self.asked if how == "POST" and _ends(what, "instances")
        ]

    def answer(self, method: str, url: str, body: Json) -> Answer:
        """Answer a request."""
        parts = urlsplit(url)
        self.asked.append((method, f"{parts.netloc}{parts.path}", body))
        host = parts.netloc.split(".")[0]
        if host == "oauth2":
            return 200, {"access_token": "token", "token_type": "Bearer", "expires_in": 3600}
        if host == "cloudresourcemanager":
            return self._projects(parts.path, body)
        if host == "iam":
            return self._accounts(method, parts.path, body)
        if host == "compute" and f"/projects/{self.project}/zones/" in parts.path:
            return self._compute(method, parts.path, parse_qs(parts.query), body)
        return NOT_FOUND

    def _projects(self, path: str, body: Json) -> Answer:
        if path.endswith(":getIamPolicy"):
            return 200, self.policy
        if path.endswith(":setIamPolicy"):
            self.policy = body["policy"]
            return 200, self.policy
        return 200, {"projectId": self.project, "lifecycleState": "ACTIVE"}

    def _accounts(self, method: str, path: str, body: Json) -> Answer:
        if method == "POST":
            email = f"{body['accountId']}@{self.project}.iam.gserviceaccount.com"
            self.accounts[email] = {"email": email, "projectId": self.project}
            return 200, self.accounts[email]
        found = self.accounts.get(path.rpartition("/")[2])
        return (200, found) if found else NOT_FOUND

    def _compute(self, method: str, path: str, query: dict[str, list[str]], body: Json) -> Answer:
        kind, _, rest = path.partition("/zones/")[2].partition("/")[2].partition("/")
        if kind == "operations":
            return DONE
        if kind == "instances" and not rest:
            return self._insert(body) if method == "POST" else self._listed(query["filter"][0])
        name, _, action = rest.partition("/")
        if kind != "instances" or name not in self.instances:
            return NOT_FOUND
        return self._instance(method, name, action, body)

    def _instance(self, method: str, name: str, action: str, body: Json) -> Answer:
        if method == "DELETE":
            del self.instances[name]
            return DONE
        instance = self.instances[name]
        if action == "setLabels":
            assert body["labelFingerprint"] == instance["labelFingerprint"]
            instance["labels"] = body["labels"]
            return DONE
        return 200, instance

    def _insert(self, body: Json) -> Answer:
        number = len(self.inserted())
        interface = body["networkInterfaces"][0] | {"networkIP": f"10.0.0.{number}"}
        outside = [each | {"natIP": f"203.0.113.{number}"} for each in interface["accessConfigs"]]
        known = {"status": "RUNNING", "labelFingerprint": "0"}
        known["networkInterfaces"] = [interface | {"accessConfigs": outside}]
        self.instances[body["name"]] = body | known
        return DONE

    def _listed(self, text: str) -> Answer:
        labels = dict(re.findall(r"\(labels\.(\S+) = (\S+?)\)", text))
        states = re.findall(r"\(status = (\w+)\)", text)
        found = [
            each
            for each in self.instances.values()
            if each["status"] in states and labels.items() <= each["labels"].items()
        ]
        return 200, {"items": found}


def _ends(what: str, kind: str) -> bool:
    return what.startswith("compute.") and what.endswith(f"/{kind}")


@contextmanager
def google(project: str, folder: Path) -> Iterator[tuple[Google, dict[str, str]]]:
    """Serve it; yields it with the environment of those who are to find it, logged in."""
    certificate, key, login = (folder / name for name in ("google.pem", "google.key", "login.json"))
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    line += ["-subj", "/CN=stand-in", "-addext", "subjectAltName=DNS:*.googleapis.com"]
    line += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(line, check=True, capture_output=True)
    user = {"client_id": "x", "client_secret": "x", "refresh_token": "x", "type": "authorized_user"}
    login.write_text(json.dumps(user))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    cloud, context = Google(project), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cloud))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "PYTHONPATH": f"{folder / 'site'}:{os.environ.get('PYTHONPATH', '')}",
        "HTTPLIB2_CA_CERTS": str(certificate),
        "GOOGLE_PORT": str(server.server_port),
        "GOOGLE_REFUSED": str(folder / "refused"),
        "GOOGLE_APPLICATION_CREDENTIALS": str(login),
        "GOOGLE_CLOUD_PROJECT": project,
    }
    try:
        yield cloud, environment
    finally:
        server.shutdown()
        server.server_close()


def _handler(cloud: Google) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            is_json = "json" in self.headers.get("Content-Type", "")
            body = json.loads(text) if text and is_json else {}
            url = f"https://{self.headers['Host']}{self.path}"
            status, answer = cloud.answer(self.command, url, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
