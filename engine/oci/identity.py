"""Chain IDs: the names of stacks of layers (OCI image spec, config.md, "Layer ChainID"). Pure."""

from collections.abc import Sequence
from typing import NewType

from engine.oci.digest import Digest, digest_of

__all__ = ["ChainID", "chain_ids"]

ChainID = NewType("ChainID", str)


def chain_ids(diff_ids: Sequence[Digest]) -> list[ChainID]:
    """Return the chain ID of each prefix of `diff_ids`, the bottom layer's first."""
    chain: list[ChainID] = []
    for diff_id in diff_ids:
        name = digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id
        chain.append(ChainID(name))
    return chain
