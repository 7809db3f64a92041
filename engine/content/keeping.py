"""The labels that keep an image whole, under containerd's keys.

Pure.
"""

from collections.abc import Iterator, Sequence

from engine import labels
from engine.content.closure import Closure
from engine.content.image import ResolvedImage
from engine.oci.documents import Descriptor, Manifest

__all__ = ["is_kept", "kept_documents", "kept_of_all", "manifest_labels", "required"]


def manifest_labels(manifest: Manifest, *, layers: bool = True) -> dict[str, str]:
    """Return the labels that keep what a manifest needs; without `layers` they let go of those."""
    kept = {f"{labels.GC_REF_CONTENT}.config": manifest.config.digest}
    for position, layer in enumerate(manifest.layers):
        kept[f"{labels.GC_REF_CONTENT}.l.{position}"] = layer.digest if layers else ""
    return kept


def kept_documents(
    path: Sequence[Descriptor], manifest: Manifest, *, layers: bool = True
) -> Iterator[tuple[Descriptor, dict[str, str]]]:
    """Yield a manifest and the indexes above it, each with its labels, in the order to store them.

    `path` leads to the manifest, the topmost index first. Parents come after children, so that a label
    never names what is not there yet. Without `layers` those are let go.
    """
    yield path[-1], manifest_labels(manifest, layers=layers)
    for above, below in zip(path[-2::-1], path[:0:-1], strict=True):
        yield above, dict([_listed(below)])


def kept_of_all(
    found: Closure, *, but_layers_of: Manifest | None
) -> list[tuple[Descriptor, dict[str, str]]]:
    """Return the documents of a closure as `kept_documents` does, but the layers of one are let go."""
    kept = []
    for document in found.documents.values():
        match document.content:
            case Manifest() as manifest:
                about = manifest_labels(manifest, layers=manifest != but_layers_of)
            case index:
                about = dict(_listed(one) for one in index.manifests)
        kept.append((document.descriptor, about))
    return kept


def _listed(entry: Descriptor) -> tuple[str, str]:
    # By digest, not by position: another platform, later, adds to these labels.
    return f"{labels.GC_REF_CONTENT}.m.{entry.digest[-12:]}", entry.digest


def is_kept(about: labels.Labels) -> bool:
    """Say whether a manifest or an index keeps what it needs, by its labels: all of that came in."""
    return any(key.startswith(labels.GC_REF_CONTENT) for key in about)


def required(image: ResolvedImage, about: labels.Labels) -> list[Descriptor]:
    """Return what of an image has to be here, by the labels of its manifest.

    That may hold its config and not a layer: then the layer's blob was let go once it was unpacked.
    """
    kept = {value for key, value in about.items() if key.startswith(labels.GC_REF_CONTENT)}
    is_told = image.manifest.config.digest in kept
    layers = [layer for layer in image.manifest.layers if layer.digest in kept or not is_told]
    return [*image.path, image.manifest.config, *layers]
