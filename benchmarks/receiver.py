"""What bringing an image here takes at least: `python -m benchmarks.receiver HOST/REPOSITORY:TAG`.

Its layers come at once, over a connection each, and are thrown away.
"""

import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from engine.oci.mediatypes import OCI_MANIFEST
from engine.oci.reference import parse_reference

_PIECE = 1 << 20


def main(name: str) -> None:
    """Receive an image."""
    reference = parse_reference(name)
    about = partial(_document, reference.domain, f"/v2/{reference.path}")
    manifest = about(f"manifests/{reference.tag}")
    about(f"blobs/{manifest['config']['digest']}")
    with ThreadPoolExecutor(len(manifest["layers"]) or 1) as threads:
        receive = partial(_receive, reference.domain, f"/v2/{reference.path}")
        layers = {layer["digest"]: layer["size"] for layer in manifest["layers"]}
        for size, received in zip(layers.values(), threads.map(receive, layers), strict=True):
            assert size == received


def _document(host: str, base: str, path: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(host)
    connection.request("GET", f"{base}/{path}", headers={"Accept": OCI_MANIFEST})
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def _receive(host: str, base: str, digest: str) -> int:
    connection = http.client.HTTPConnection(host)
    connection.request("GET", f"{base}/blobs/{digest}")
    answer = connection.getresponse()
    piece, received = bytearray(_PIECE), 0
    while count := answer.readinto(piece):
        received += count
    connection.close()
    return received


if __name__ == "__main__":
    main(sys.argv[1])
