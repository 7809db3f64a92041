"""The registry of few words, taking pushes: uploads in parts, mounts, manifests, subjects.

Sync. As strict as one may be: a part has to begin where the last ended, what a manifest lists has to be
there, what is sent has to have its digest.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from engine.oci.digest import digest_of
from engine.oci.mediatypes import OCI_INDEX
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, response

__all__ = ["TakingRegistry"]

_PATH = re.compile(r"/v2/(.+)/(blobs/uploads|manifests|referrers)/([^/]*)\Z")
_BEGIN = re.compile(r"(\d+)-\d+\Z")


@dataclass
class TakingRegistry(FakeRegistry):
    """A registry to push to; `content` has what it took."""

    mounts: bool = True
    lists_referrers: bool = True
    kept: int | None = None
    """Bytes that stay of a body whose answer is a fault; None: it has no effect at all."""
    uploads: dict[str, bytearray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._now = threading.local()

    def _fault(self, asked: Asked) -> Fault | None:
        self._now.fault = super()._fault(asked)
        return self._now.fault  # type: ignore[no-any-return]

    def _good(self, asked: Asked) -> bytes:
        found = _PATH.match(asked.path)
        if not found or (self.realm and not self._may_read(asked)):
            return super()._good(asked)
        repository, kind, name = found.groups()
        if kind == "referrers":
            return self._referrers(repository, name)
        if kind == "blobs/uploads":
            return self._upload(repository, name, asked)
        return self._manifest(repository, name, asked) if asked.method == "PUT" else super()._good(asked)

    def _taken(self, body: bytes) -> bytes | None:
        """Return what stays of a body, None if what was asked for is not done at all."""
        if not self._now.fault:
            return body
        return None if self.kept is None else body[: self.kept]

    # -- blobs --------------------------------------------------------------------------------

    def _upload(self, repository: str, name: str, asked: Asked) -> bytes:
        query = parse_qs(asked.target.partition("?")[2])
        if asked.method == "POST":
            return self._begun(repository, query)
        if name not in self.uploads:
            return _refusal(404, "BLOB_UPLOAD_UNKNOWN")
        if asked.method == "PATCH":
            return self._added(repository, name, asked)
        if asked.method == "PUT":
            return self._ended(repository, name, asked, query["digest"][0])
        return self._state(repository, name, 204)

    def _begun(self, repository: str, query: dict[str, list[str]]) -> bytes:
        if self.mounts and "mount" in query:
            digest = query["mount"][0]
            blob = self.content.get(f"/{query['from'][0]}/blobs/{digest}")
            if blob:
                self.content[f"/{repository}/blobs/{digest}"] = blob
                return response(201, headers={"Docker-Content-Digest": digest})
        with self._lock:
            name = str(len(self.uploads) + 1)
            self.uploads[name] = bytearray()
        return self._state(repository, name, 202)

    def _added(self, repository: str, name: str, asked: Asked) -> bytes:
        upload = self.uploads[name]
        begin = _BEGIN.match(asked.headers.get("content-range", "0-0"))
        if not begin or int(begin[1]) != len(upload):
            return _refusal(416, "RANGE_INVALID")
        upload += self._taken(asked.body) or b""
        return self._state(repository, name, 202)

    def _ended(self, repository: str, name: str, asked: Asked, digest: str) -> bytes:
        body = self._taken(asked.body)
        data = bytes(self.uploads[name] + (body or b""))
        if body is not None:
            if digest_of(data) != digest:
                return _refusal(400, "DIGEST_INVALID")
            self.put(repository, "blobs", data, "application/octet-stream")
            self.uploads[name] = bytearray()
        return response(201, headers={"Docker-Content-Digest": digest})

    def _state(self, repository: str, name: str, status: int) -> bytes:
        there = len(self.uploads[name])
        location = f"/v2/{repository}/blobs/uploads/{name}?_state={there}"
        return response(status, headers={"Location": location, "Range": f"0-{max(0, there - 1)}"})

    # -- documents ----------------------------------------------------------------------------

    def _manifest(self, repository: str, name: str, asked: Asked) -> bytes:
        document = json.loads(asked.body)
        blobs = [document["config"], *document["layers"]] if "layers" in document else []
        listed = [f"/{repository}/blobs/{one['digest']}" for one in blobs if not one.get("urls")]
        listed += [f"/{repository}/manifests/{one['digest']}" for one in document.get("manifests", [])]
        if not all(path in self.content for path in listed):
            return _refusal(400, "MANIFEST_BLOB_UNKNOWN")
        digest = digest_of(asked.body)
        if self._taken(b"") is not None:
            self.put(repository, "manifests", asked.body, asked.headers["content-type"], name)
        headers = {"Docker-Content-Digest": digest}
        subject = document.get("subject")
        if subject and self.lists_referrers:
            headers["OCI-Subject"] = subject["digest"]
        return response(201, headers=headers)

    def _referrers(self, repository: str, digest: str) -> bytes:
        if not self.lists_referrers:
            return _refusal(404, "NOT_FOUND")
        found = []
        for path, (media_type, data) in self.content.items():
            if path.startswith(f"/{repository}/manifests/") and path.endswith(digest_of(data)):
                subject = json.loads(data).get("subject") or {}
                if subject.get("digest") == digest:
                    one = {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}
                    found.append(one)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        return response(200, json.dumps(index).encode(), {"Content-Type": OCI_INDEX})


def _refusal(status: int, code: str) -> bytes:
    return response(status, json.dumps({"errors": [{"code": code}]}).encode())
