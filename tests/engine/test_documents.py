"""Strict parsing of manifests, indexes and configs: attack rows M-01, M-02, M-03, M-06, M-09, M-11."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.errors import Refused
from engine.oci.documents import NotAnImage, decode_json, parse_config, parse_index, parse_manifest
from engine.oci.platform import Platform
from tests.engine.image_files import AMD64, CONFIG, DOCKER_LIST, INDEX, LAYER, MANIFEST

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def descriptor(media_type=LAYER, digest=A, size=10, **more):
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def manifest(**changes):
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, C),
        "layers": [descriptor()],
    }
    return {**value, **changes}


def index(**changes):
    value = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(MANIFEST)]}
    return {**value, **changes}


def config(**changes):
    return {**AMD64, "rootfs": {"type": "layers", "diff_ids": [A]}, **changes}


def encode(value) -> bytes:
    return json.dumps(value).encode()


def with_member(value, text: str) -> bytes:
    """Return the JSON object with one more member, written as it stands."""
    return encode(value)[:-1] + b"," + text.encode() + b"}"


# -- what is right ----------------------------------------------------------------------------


def test_manifest_is_read():
    found = parse_manifest(encode(manifest()), MANIFEST)
    assert found.config.key == C
    assert [layer.key for layer in found.layers] == [A]


def test_media_type_may_be_left_out():
    """OCI 1.0 images do not embed it; the descriptor alone decides then."""
    value = manifest()
    del value["mediaType"]
    assert parse_manifest(encode(value), MANIFEST).layers


def test_unknown_members_are_left_alone():
    value = manifest(artifactType="x/y", subject=descriptor(MANIFEST, B), extra={"a": [1, 2.5]})
    assert parse_manifest(encode(value), MANIFEST).layers


def test_free_form_keys_are_anybodys():
    """Labels and annotations belong to their authors: `Size` or `OS` there is not a trick."""
    annotations = {"Layers": "x", "Digest": "y"}
    assert parse_manifest(encode(manifest(annotations=annotations)), MANIFEST).annotations == annotations
    value = config(
        config={"Labels": {"Architecture": "x", "Size": "1"}, "Volumes": {"/Data": {}}},
        history=[{"Created": "x"}],
        container_config={"Labels": {"OS": "rhel", "Created": "today"}},
    )
    assert parse_config(encode(value), 1).diff_ids == [A]


@pytest.mark.parametrize("none", [[], None], ids=str)
def test_no_layers_is_an_image(none):
    """Go writes a slice without a value as null."""
    assert parse_manifest(encode(manifest(layers=none)), MANIFEST).layers == []
    assert parse_config(encode(config(rootfs={"type": "layers", "diff_ids": none})), 0).diff_ids == []
    assert parse_index(encode(index(manifests=none))).manifests == []


_NULLS = {
    "annotations": None,
    "artifactType": None,
    "mediaType": None,
    "subject": None,
    "manifests": None,
    "fsLayers": None,
}


def test_null_is_absent_wherever_a_value_may_be():
    platform = {**AMD64, "variant": None, "os.version": None, "os.features": None}
    entry = descriptor(MANIFEST, annotations=None, platform=platform, urls=None, data=None)
    found = parse_index(encode(index(annotations={"a": None, "b": "c"}, manifests=[entry])))
    assert found.manifests[0].platform == Platform(os="linux", architecture="amd64")
    assert found.annotations == {"b": "c"}
    silent = encode(index(mediaType=None, manifests=[descriptor(MANIFEST, platform=None)]))
    assert parse_index(silent).manifests[0].platform is None
    assert parse_manifest(encode(manifest(**_NULLS)), MANIFEST).annotations == {}
    members = ("variant", "os.version", "os.features", "created", "history", "config", "author")
    assert parse_config(encode(config(**dict.fromkeys(members))), 1).variant == ""


def test_a_key_of_another_document_may_have_any_case():
    """Old docker wrote `Size` into configs; only what is read of a document can be mistaken there."""
    value = config(Size=12, Created="2015", MediaType="x", Layers=[], Digest="y", Manifests=[])
    assert parse_config(encode(value), 1).diff_ids == [A]
    assert parse_manifest(encode(manifest(RootFS={}, Architecture="x", Platform={})), MANIFEST).layers
    assert parse_index(encode(index(OS="linux", Digest="x", Size=1))).manifests
    assert parse_manifest(encode(manifest(layers=[descriptor(Config={}, Layers=[])])), MANIFEST).layers


def test_the_digest_of_an_entry_is_checked_where_it_is_used():
    """An entry with a digest of an unknown kind says nothing of those beside it."""
    entries = [descriptor(MANIFEST, "sha1:" + "a" * 40), descriptor(MANIFEST)]
    bad, good = parse_index(encode(index(manifests=entries))).manifests
    assert good.key == A
    with pytest.raises(Refused, match="not a sha256 or sha512 digest"):
        bad.key  # noqa: B018


_EMPTY = "application/vnd.oci.empty.v1+json"
_COSIGN = "application/vnd.dev.cosign.simplesigning.v1+json"

OTHERS = {
    "a chart": (
        manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json", C)),
        "its config is 'application/vnd.cncf.helm.config.v1+json'",
    ),
    "an artifact": (
        manifest(config=descriptor(_EMPTY, C), artifactType="application/x-notes"),
        "its type is 'application/x-notes'",
    ),
    "an artifact without a type": (manifest(config=descriptor(_EMPTY, C)), f"its config is '{_EMPTY}'"),
    "a signature": (manifest(layers=[descriptor(_COSIGN)]), f"its layers are '{_COSIGN}'"),
}


@pytest.mark.parametrize(("value", "reason"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_image_says_what_it_is(value, reason):
    with pytest.raises(NotAnImage) as raised:
        parse_manifest(encode(value), MANIFEST)
    assert raised.value.reason == reason
    assert str(raised.value) == f"manifest is not a container image: {reason}"


def test_an_image_may_have_a_type_and_strange_layers():
    encrypted = manifest(layers=[descriptor(f"{LAYER}+gzip+encrypted")])
    assert parse_manifest(encode(encrypted), MANIFEST).layers, "it is an image all the same"
    assert parse_manifest(encode(manifest(artifactType="x/y")), MANIFEST).layers
    assert parse_manifest(encode(manifest(layers=[descriptor(), descriptor(_COSIGN)])), MANIFEST).layers


# -- M rows -----------------------------------------------------------------------------------

_V1 = "application/vnd.docker.distribution.manifest.v1+json"

MANIFESTS = {
    "M-01 manifests beside layers": encode(manifest(manifests=[])),
    "M-01 fsLayers beside layers": encode(manifest(fsLayers=[])),
    "M-01 index without layers": encode({**index(), "mediaType": MANIFEST}),
    "M-01 other media type embedded": encode(manifest(mediaType=INDEX)),
    "M-01 docker media type embedded": encode(manifest(mediaType=_V1)),
    "M-01 schema 1": encode(manifest(schemaVersion=1)),
    "M-01 schema as text": encode(manifest(schemaVersion="2")),
    "M-01 schema missing": encode({k: v for k, v in manifest().items() if k != "schemaVersion"}),
    "M-01 config missing": encode({k: v for k, v in manifest().items() if k != "config"}),
    "M-01 layers missing": encode({k: v for k, v in manifest().items() if k != "layers"}),
    "M-02 layers and Layers": with_member(manifest(), '"Layers":[]'),
    "M-02 LAYERS alone": encode(manifest()).replace(b'"layers"', b'"LAYERS"'),
    "M-02 Digest in a descriptor": encode(manifest(layers=[descriptor(Digest=B)])),
    "M-02 Size in the config's": encode(manifest(config=descriptor(CONFIG, C, Size=1))),
    "M-02 MediaType": with_member(manifest(), '"MediaType":"x"'),
    "M-02 duplicate layers": with_member(manifest(), '"layers":[]'),
    "M-02 duplicate, escaped": with_member(manifest(), '"\\u006cayers":[]'),
    "M-02 duplicate unknown key": with_member(manifest(), '"x":1,"x":2'),
    "M-02 duplicate in an annotation": with_member(manifest(), '"annotations":{"x":"1","x":"2"}'),
    "M-02 NUL in a key": with_member(manifest(), '"layers\\u0000":[]'),
    "M-02 byte order mark": b"\xef\xbb\xbf" + encode(manifest()),
    "M-02 UTF-16": json.dumps(manifest()).encode("utf-16"),
    "M-02 trailing data": encode(manifest()) + b"{}",
    "M-02 trailing NUL": encode(manifest()) + b"\0",
    "M-02 comment": b"/* */" + encode(manifest()),
    "M-02 trailing comma": encode(manifest())[:-1] + b",}",
    "M-02 single quotes": encode(manifest()).replace(b'"', b"'"),
    "M-02 NaN": with_member(manifest(), '"x":NaN'),
    "M-02 infinity": with_member(manifest(), '"x":-Infinity'),
    "M-02 size 1e3": encode(manifest()).replace(b'"size": 10', b'"size": 1e3'),
    "M-02 size 10.0": encode(manifest()).replace(b'"size": 10', b'"size": 10.0'),
    "M-02 size true": encode(manifest(layers=[descriptor(size=True)])),
    "M-02 size text": encode(manifest(layers=[descriptor(size="10")])),
    "M-02 size null": encode(manifest(layers=[descriptor(size=None)])),
    "M-02 size 2^63": encode(manifest(layers=[descriptor(size=1 << 63)])),
    "M-02 size of 5000 digits": with_member(manifest(), '"x":' + "9" * 5000),
    "M-02 half a surrogate pair": with_member(manifest(), '"x":"\\ud800"'),
    "M-02 half a surrogate pair as key": with_member(manifest(), '"\\udfff":1'),
    "M-02 not UTF-8": with_member(manifest(), '"x":"y"').replace(b"y", b"\xff"),
    "M-02 overlong UTF-8": with_member(manifest(), '"x":"y"').replace(b"y", b"\xc0\xaf"),
    "M-02 nested 100 deep": with_member(manifest(), '"x":' + "[" * 100 + "]" * 100),
    "M-02 nested 100000 deep": with_member(manifest(), '"x":' + "[" * 10**5 + "]" * 10**5),
    "M-02 objects 100000 deep": with_member(manifest(), '"x":' + '{"a":' * 10**5 + "1" + "}" * 10**5),
    "M-02 array": b"[]",
    "M-02 null": b"null",
    "M-02 nothing": b"",
    "M-02 layers with a long s": with_member(manifest(), '"layer\\u017f":[]'),
    "M-02 Layers beside null": encode(manifest(layers=None, Layers=[descriptor()])),
    "M-02 config null": encode(manifest(config=None)),
    "M-02 media type null": encode(manifest(layers=[descriptor(None)])),
    "M-02 layers an object": encode(manifest(layers={"0": descriptor()})),
    "M-02 layer null": encode(manifest(layers=[None])),
    "M-02 annotation a number": encode(manifest(annotations={"a": 1})),
    "M-03 over 4 MiB": encode(manifest()) + b" " * limits.MANIFEST,
    "M-03 size -1": encode(manifest(layers=[descriptor(size=-1)])),
    "M-03 config size -1": encode(manifest(config=descriptor(CONFIG, C, -1))),
    "M-03 501 layers": encode(manifest(layers=[descriptor()] * 501)),
    "M-06 md5": encode(manifest(layers=[descriptor(digest="md5:" + "a" * 32)])),
    "M-06 sha1": encode(manifest(config=descriptor(CONFIG, "sha1:" + "a" * 40))),
    "M-06 sha384": encode(manifest(layers=[descriptor(digest="sha384:" + "a" * 96)])),
    "M-06 sha256 too short": encode(manifest(layers=[descriptor(digest=A[:-1])])),
    "M-06 sha256 with 128 digits": encode(manifest(layers=[descriptor(digest="sha256:" + "a" * 128)])),
    "M-06 upper case": encode(manifest(layers=[descriptor(digest=A.upper())])),
    "M-06 newline at the end": encode(manifest(layers=[descriptor(digest=A + "\n")])),
    "M-06 path as digest": encode(manifest(layers=[descriptor(digest="sha256:../../etc/passwd")])),
    "M-06 empty": encode(manifest(layers=[descriptor(digest="")])),
    "M-09 empty config": encode(manifest(config=descriptor("application/vnd.oci.empty.v1+json", C))),
    "M-09 layer as config": encode(manifest(config=descriptor(LAYER, C))),
    "M-09 artifact": encode(manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json", C))),
}


@pytest.mark.parametrize("data", MANIFESTS.values(), ids=MANIFESTS)
def test_manifest_is_refused(data):
    with pytest.raises(Refused) as raised:
        parse_manifest(data, MANIFEST)
    assert str(raised.value).isprintable()


INDEX_ROWS = {
    "M-01 layers beside manifests": encode(index(layers=[])),
    "M-01 config beside manifests": encode(index(config=descriptor(CONFIG, C))),
    "M-01 fsLayers beside manifests": encode(index(fsLayers=[])),
    "M-01 manifest type embedded": encode(index(mediaType=MANIFEST)),
    "M-01 docker list embedded": encode(index(mediaType=DOCKER_LIST)),
    "M-01 schema 1": encode(index(schemaVersion=1)),
    "M-02 Manifests": with_member(index(), '"Manifests":[]'),
    "M-02 duplicate manifests": with_member(index(), '"manifests":[]'),
    "M-02 Platform of an entry": encode(index(manifests=[descriptor(MANIFEST, Platform={})])),
    "M-02 OS of a platform": encode(index(manifests=[descriptor(MANIFEST, platform={"OS": "linux"})])),
    "M-03 over 4 MiB": encode(index()) + b" " * limits.MANIFEST,
    "M-03 size -1": encode(index(manifests=[descriptor(MANIFEST, size=-1)])),
    "M-03 10001 manifests": encode(index(manifests=[descriptor(MANIFEST)] * 10_001)),
    "M-02 manifest null": encode(index(manifests=[None])),
    "M-01 Layers beside manifests": encode(index(Layers=[])),
}


@pytest.mark.parametrize("data", INDEX_ROWS.values(), ids=INDEX_ROWS)
def test_index_is_refused(data):
    with pytest.raises(Refused):
        parse_index(data, INDEX)


def _rootfs(**changes):
    return encode(config(rootfs={"type": "layers", "diff_ids": [A], **changes}))


CONFIGS = {
    "M-02 rootfs and RootFS": with_member(config(), '"RootFS":{}'),
    "M-02 Diff_ids": encode(config(rootfs={"type": "layers", "diff_ids": [A], "Diff_IDs": [B]})),
    "M-02 duplicate rootfs": with_member(config(), '"rootfs":{}'),
    "M-02 Architecture": with_member(config(), '"Architecture":"arm64"'),
    "M-02 nested 100000 deep": with_member(config(), '"x":' + "[" * 10**5 + "]" * 10**5),
    "M-03 over 8 MiB": encode(config()) + b" " * limits.CONFIG,
    "M-11 more diff IDs than layers": _rootfs(diff_ids=[A, B]),
    "M-11 fewer diff IDs than layers": _rootfs(diff_ids=[]),
    "M-11 diff IDs missing": encode(config(rootfs={"type": "layers"})),
    "M-11 diff IDs null": _rootfs(diff_ids=None),
    "M-11 rootfs missing": encode(AMD64),
    "M-11 rootfs type missing": encode(config(rootfs={"diff_ids": [A]})),
    "M-11 rootfs type empty": _rootfs(type=""),
    "M-11 rootfs type other": _rootfs(type="layers+base"),
    "M-11 upper case": _rootfs(diff_ids=[A.upper()]),
    "M-11 md5": _rootfs(diff_ids=["md5:" + "a" * 32]),
    "M-11 a number": _rootfs(diff_ids=[1]),
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS)
def test_config_is_refused(data):
    with pytest.raises(Refused):
        _ = parse_config(data, 1).diff_ids


@pytest.mark.parametrize("media_type", ["", INDEX, _V1, LAYER, MANIFEST + " ", MANIFEST.upper()])
def test_m_01_only_manifest_types_are_manifests(media_type):
    with pytest.raises(Refused):
        parse_manifest(encode(manifest(mediaType=media_type)), media_type)


@pytest.mark.parametrize("media_type", ["", MANIFEST, _V1, CONFIG])
def test_m_01_only_index_types_are_indexes(media_type):
    with pytest.raises(Refused):
        parse_index(encode(index(mediaType=media_type)), media_type)


def test_m_03_size_zero_is_a_size():
    empty = descriptor(
        digest="sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", size=0
    )
    assert parse_manifest(encode(manifest(layers=[empty])), MANIFEST).layers[0].size == 0


def test_m_03_bytes_are_counted_not_characters():
    text = '"' + "é" * 600 + '"'
    with pytest.raises(Refused, match="over 1000 bytes"):
        decode_json(text.encode(), "it", 1000)
    assert decode_json(text.encode(), "it", 1202) == "é" * 600


# -- laws -------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from([A, MANIFEST, INDEX]),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(
            st.sampled_from(["layers", "config", "manifests", "size", "digest", "mediaType", "x"]), below
        )
    ),
    max_leaves=20,
)


@given(_JSON)
def test_any_json_is_parsed_or_refused(value):
    """Nothing but Refused ever comes out of a document, whatever is in it."""
    for parse in (
        lambda data: parse_manifest(data, MANIFEST),
        lambda data: parse_index(data, INDEX),
        lambda data: parse_config(data, 1),
    ):
        for document in (value, manifest(layers=value), index(manifests=value), config(rootfs=value)):
            try:
                parse(encode(document))
            except Refused:
                continue


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(data):
    try:
        value = decode_json(data, "it")
    except Refused:
        return
    assert value == json.loads(data.decode())


def _other_case(key: str) -> st.SearchStrategy[str]:
    return st.lists(st.booleans(), min_size=len(key), max_size=len(key)).map(
        lambda upper: "".join(c.upper() if up else c.lower() for c, up in zip(key, upper, strict=True))
    )


@given(
    st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests"]).flatmap(_other_case)
)
def test_m_02_no_variant_of_a_key_is_overlooked(key):
    """Go's decoder takes any case: a key that it would read must not be skipped here."""
    data = with_member(manifest(), f"{json.dumps(key)}:[]")
    with pytest.raises(Refused):
        parse_manifest(data, MANIFEST)


@given(st.integers(1, 60))
def test_m_02_depth_has_one_limit(depth):
    data = b"[" * depth + b"]" * depth
    if depth <= limits.JSON_DEPTH:
        decode_json(data, "it")
    else:
        with pytest.raises(Refused, match="nested"):
            decode_json(data, "it")
