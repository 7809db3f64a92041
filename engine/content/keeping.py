"""The labels that keep an image whole, under containerd's keys.

Pure.
"""

from collections.abc import Iterator

from engine import labels
from engine.content.image import ResolvedImage
from engine.oci.documents import Descriptor, Manifest

__all__ = ["kept_documents", "manifest_labels"]


def manifest_labels(manifest: Manifest) -> dict[str, str]:
    """Return the labels that keep what a manifest needs."""
    kept = {f"{labels.GC_REF_CONTENT}.config": manifest.config.digest}
    for position, layer in enumerate(manifest.layers):
        kept[f"{labels.GC_REF_CONTENT}.l.{position}"] = layer.digest
    return kept


def kept_documents(image: ResolvedImage) -> Iterator[tuple[Descriptor, dict[str, str]]]:
    """Yield the manifest and the indexes above it, each with its labels, in the order to store them.

    Parents after children, so that a label never names what is not there yet.
    """
    yield image.path[-1], manifest_labels(image.manifest)
    for above, below in zip(image.path[-2::-1], image.path[:0:-1], strict=True):
        # By digest, not by position: another platform, later, adds to these labels.
        yield above, {f"{labels.GC_REF_CONTENT}.m.{below.digest[-12:]}": below.digest}
