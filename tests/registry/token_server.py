"""A token server whose tokens docker-registry takes: JSON Web Tokens, signed, each for one repository.

Sync; a thread of its own. `public/` is for all to read, all else for USER. OAuth2's POST and the older
GET are both answered, or the POST is not, as by many servers.
"""

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.compat.images import run
from tests.conftest import peer
from tests.registry.servers import PASSWORD, USER, Settings

__all__ = ["REFRESH", "TokenServer", "token_server"]

REFRESH = "refresh-me"
_ISSUER, _SERVICE = "token server of the tests", "registry of the tests"
_LIFE_S = 300


class TokenServer:
    """What it was asked, and how the registry that trusts it is to be set up."""

    def __init__(self, folder: Path, *, posts: bool) -> None:
        self.port = 0
        self.posts = posts
        self.asked: list[tuple[str, dict[str, str]]] = []
        """Method and parameters of each question."""
        self._key, self._certificate = folder / "token.key", folder / "token.pem"
        made = ("-keyout", self._key, "-out", self._certificate, "-subj", "/CN=tokens", "-days", 2)
        run(peer("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made)

    @property
    def settings(self) -> Settings:
        """Have a registry send its clients here."""
        realm = f"http://127.0.0.1:{self.port}/auth/token"
        bundle = str(self._certificate)
        about = {"realm": realm, "service": _SERVICE, "issuer": _ISSUER, "rootcertbundle": bundle}
        return {"auth": {"token": about}}

    def answer(self, method: str, asked: dict[str, str], user: str) -> tuple[int, dict[str, Any]]:
        """Return status and document for a question of `user`, "" if nobody said who it is."""
        self.asked.append((method, asked))
        if method == "POST" and not self.posts:
            return 405, {}
        if asked.get("grant_type") == "refresh_token":
            user = USER if asked["refresh_token"] == REFRESH else "?"
        elif "username" in asked:
            user = USER if (asked["username"], asked["password"]) == (USER, PASSWORD) else "?"
        if user == "?":
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong"}]}
        token = self._signed(self._allowed(asked.get("scope", ""), user))
        name = "access_token" if method == "POST" else "token"
        return 200, {name: token, "expires_in": _LIFE_S}

    @staticmethod
    def _allowed(scope: str, user: str) -> list[dict[str, Any]]:
        found = []
        for one in scope.split():
            kind, name, actions = one.split(":")
            wanted = set(actions.split(","))
            allowed = wanted if user else wanted & {"pull"} if name.startswith("public/") else set()
            if allowed:
                found.append({"type": kind, "name": name, "actions": sorted(allowed)})
        return found

    def _signed(self, access: list[dict[str, Any]]) -> str:
        pem = self._certificate.read_text().splitlines()
        chain = ["".join(line for line in pem if "-" not in line)]
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "aud": _SERVICE,
            "sub": "",
            "exp": now + _LIFE_S,
            "nbf": now - 10,
            "iat": now,
            "jti": "1",
            "access": access,
        }
        parts = [{"typ": "JWT", "alg": "RS256", "x5c": chain}, claims]
        text = ".".join(_web64(json.dumps(part).encode()) for part in parts)
        signing = (peer("openssl"), "dgst", "-sha256", "-sign", str(self._key))
        done = subprocess.run(signing, input=text.encode(), capture_output=True, check=True)
        return f"{text}.{_web64(done.stdout)}"


def _web64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def token_server(folder: Path, *, posts: bool = True) -> Iterator[TokenServer]:
    """Give out tokens for the length of the block."""
    server = TokenServer(folder, posts=posts)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(urlsplit(self.path).query)

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _answer(self, text: str) -> None:
            asked = {key: values[-1] for key, values in parse_qs(text).items()}
            asked["scope"] = " ".join(parse_qs(text).get("scope", []))
            given = self.headers.get("Authorization", "").removeprefix("Basic ")
            pair = base64.b64decode(given).decode()
            user = "" if not pair else USER if pair == f"{USER}:{PASSWORD}" else "?"
            status, value = server.answer(self.command, asked, user)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_words: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server.port = listener.server_address[1]
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
