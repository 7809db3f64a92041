"""Commands on images: import, images, image inspect|tag|rm, unpack."""

import json
from pathlib import Path
from typing import Any

import click

from engine import limits, plugins
from engine.app import Engine
from engine.cli.context import Context, as_json, platform_option, snapshotter_option
from engine.cli.output import age, human_bytes, print_json, print_table, progress, say, short
from engine.content.image import ResolvedImage
from engine.errors import EngineError, NotFound, NotSupported
from engine.kv.schema import Image
from engine.oci.platform import Platform
from engine.oci.reference import familiar
from engine.stores import Stores
from engine.unpack.unpacker import Unpacked

__all__ = ["COMMANDS"]

_replace = click.option("--replace", is_flag=True, help="Let a name move to another image.")


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@click.option("--name", help="Name of the image, instead of what its archive says.")
@snapshotter_option
@platform_option
@click.option("--no-unpack", is_flag=True, help="Only store the image.")
@_replace
@as_json
@click.pass_obj
def import_(
    context: Context,
    path: Path,
    name: str | None,
    snapshotter: str | None,
    platform: Platform,
    no_unpack: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Import an OCI layout folder, an OCI archive or a docker archive, and unpack it."""

    async def work(engine: Engine) -> list[Image]:
        backend = None if no_unpack else snapshotter or _default(engine.stores)
        with progress() as report:
            return await engine.import_image(
                path,
                name=name,
                snapshotter=backend,
                platform=platform,
                replace=replace,
                report=report,
            )

    images = context.run(work, create=True)
    if as_json:
        print_json([{"name": image.name, "digest": image.target.digest} for image in images])
    else:
        for image in images:
            say(f"imported {familiar(image.name)} ({short(image.target.digest)})")


def _default(stores: Stores) -> str:
    try:
        return plugins.default_name(stores.root)
    except NotSupported as error:
        raise NotSupported(f"{error}; add --no-unpack to only store the image") from None


@click.command("images")
@as_json
@click.pass_obj
def list_images(context: Context, as_json: bool) -> None:
    """List the images; one that is damaged with what is wrong with it."""
    with context.reading() as stores:
        rows = [_summary(stores, image) for image in stores.images.walk()]
        rows += [_unknown | {"name": d.name, "error": d.error} for d in stores.images.damaged()]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "UPDATED", "UNPACKED"),
        [
            (
                familiar(row["name"]),
                short(row["digest"]) or "-",
                row["platform"],
                str(row["layers"]),
                human_bytes(row["size"]),
                age(row["updated"]) if row["updated"] else "-",
                ", ".join(row["unpacked"]) or row.get("error", "-"),
            )
            for row in rows
        ],
    )


_unknown: dict[str, Any] = {
    "name": "",
    "digest": "",
    "created": 0,
    "updated": 0,
    "platform": "-",
    "layers": 0,
    "size": 0,
    "unpacked": {},
}


def _summary(stores: Stores, image: Image) -> dict[str, Any]:
    about = _unknown | {
        "name": image.name,
        "digest": image.target.digest,
        "created": image.created,
        "updated": image.updated,
    }
    try:
        return about | _details(stores, stores.resolve(image.target))
    except NotFound:
        return about  # imported for another platform than this host's
    except EngineError as error:
        return about | {"error": str(error)}


def _details(stores: Stores, resolved: ResolvedImage) -> dict[str, Any]:
    manifest = resolved.manifest
    parts = (*resolved.path, manifest.config, *manifest.layers)
    return {
        "platform": str(resolved.config.platform),
        "layers": len(manifest.layers),
        "size": sum({part.digest: part.size for part in parts}.values()),
        "unpacked": stores.unpacked_into(resolved),
    }


@click.group("image")
def image_group() -> None:
    """Inspect, tag and remove images."""


@image_group.command("inspect")
@click.argument("name")
@platform_option
@as_json
@click.pass_obj
def inspect(context: Context, name: str, platform: Platform, as_json: bool) -> None:
    """Show what an image is made of; with --json also its config."""
    with context.reading() as stores:
        image = stores.images.get(name)
        resolved = stores.resolve(image.target, platform)
        config = stores.content.read_all(resolved.manifest.config.key, limits.CONFIG)
        unpacked = stores.unpacked_into(resolved)
    if as_json:
        print_json(
            {
                "name": image.name,
                "target": image.target,
                "platform": str(resolved.config.platform),
                "manifest": resolved.manifest,
                "config": json.loads(config),
                "chain_ids": resolved.chain,
                "unpacked": unpacked,
            }
        )
        return
    print_table(
        ("IMAGE", familiar(image.name)),
        [
            ("digest", image.target.digest),
            ("platform", str(resolved.config.platform)),
            ("created", resolved.config.created or "-"),
            ("config", resolved.manifest.config.digest),
            ("unpacked", ", ".join(unpacked) or "-"),
        ],
    )
    click.echo()
    print_table(
        ("LAYER", "SIZE", "PACKED", "CHAIN ID"),
        [
            (layer.descriptor.digest, human_bytes(layer.descriptor.size), layer.compression, chain)
            for layer, chain in zip(resolved.layers, resolved.chain, strict=True)
        ],
    )


@image_group.command("tag")
@click.argument("name")
@click.argument("new_name")
@_replace
@click.pass_obj
def tag(context: Context, name: str, new_name: str, replace: bool) -> None:
    """Give an image another name."""
    with context.stores() as stores:
        stores.images.put_all({new_name: stores.images.get(name).target}, replace=replace)


@image_group.command("rm")
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def remove(context: Context, names: tuple[str, ...]) -> None:
    """Remove image names; `lamina gc` then frees what only they kept."""
    with context.stores() as stores:
        for name in names:
            stores.images.remove(name)


@click.command("unpack")
@click.argument("name", metavar="IMAGE")
@snapshotter_option
@platform_option
@click.option("--strict", is_flag=True, help="Refuse a media type that disagrees with the bytes.")
@as_json
@click.pass_obj
def unpack(
    context: Context,
    name: str,
    snapshotter: str | None,
    platform: Platform,
    strict: bool,
    as_json: bool,
) -> None:
    """Unpack an image into snapshots; what is there already is not done again."""

    async def work(engine: Engine) -> Unpacked:
        with progress() as report:
            return await engine.unpack(
                name, snapshotter=snapshotter, platform=platform, strict=strict, report=report
            )

    result = context.run(work)
    if as_json:
        print_json(result)
        return
    for note in result.mistyped:
        say(note)
    left_out = f", {result.xattrs_left_out} xattrs left out" if result.xattrs_left_out else ""
    say(
        f"unpacked {result.applied} of {result.layers} layers: {result.entries} entries, "
        f"{human_bytes(result.bytes_unpacked)}{left_out}"
    )
    click.echo(result.chain_id)


COMMANDS = (import_, list_images, image_group, unpack)
