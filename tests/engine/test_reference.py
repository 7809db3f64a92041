"""Image references: what is one, what it means, and its short form."""

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.oci.reference import familiar, parse_reference

SHA256 = "sha256:" + "0" * 64
SHA512 = "sha512:" + "f" * 128

MEANINGS = {
    "alpine": "docker.io/library/alpine:latest",
    "alpine:3.20": "docker.io/library/alpine:3.20",
    "library/alpine": "docker.io/library/alpine:latest",
    "bitnami/redis": "docker.io/bitnami/redis:latest",
    "a/b/c": "docker.io/a/b/c:latest",
    "docker.io/alpine": "docker.io/library/alpine:latest",
    "quay.io/a/b:v1": "quay.io/a/b:v1",
    "localhost/a": "localhost/a:latest",
    "localhost:5000/a": "localhost:5000/a:latest",
    "host:5000/a:b": "host:5000/a:b",
    "[::1]:5000/a": "[::1]:5000/a:latest",
    "HOST/a": "HOST/a:latest",
    f"a@{SHA256}": f"docker.io/library/a@{SHA256}",
    f"a:1@{SHA256}": f"docker.io/library/a:1@{SHA256}",
    f"q.io/a@{SHA512}": f"q.io/a@{SHA512}",
    "a__b/c-d.e--f": "docker.io/a__b/c-d.e--f:latest",
    "a:" + "t" * 128: "docker.io/library/a:" + "t" * 128,
}


@pytest.mark.parametrize(("text", "full"), MEANINGS.items(), ids=lambda text: text[:40])
def test_meaning(text, full):
    assert str(parse_reference(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "Alpine",
        "quay.io/Alpine",
        "a:",
        "a:.x",
        "a:-x",
        "a:t/x",
        "a:" + "t" * 129,
        "a@",
        "a@sha256:abc",
        "a@md5:" + "0" * 32,
        f"a@{SHA256.upper()}",
        f"a@{SHA256}@{SHA256}",
        "/a",
        "a/",
        "a//b",
        "quay.io/",
        "../a",
        "a/../b",
        "a/.b",
        "a_",
        "a___b",
        "a\n",
        "a:1\n",
        "a\0",
        "quay.io:port/a",
        "quay.io:123456/a",
        "-host.io/a",
        "https://quay.io/a",
        "é",
        "a:é",
        "a/" + "b" * 255,
    ],
    ids=ascii,
)
def test_refused(text):
    with pytest.raises(InvalidArgument) as raised:
        parse_reference(text)
    assert str(raised.value).isprintable()


FAMILIAR = {
    "docker.io/library/alpine:latest": "alpine:latest",
    "docker.io/bitnami/redis:7": "bitnami/redis:7",
    "quay.io/library/a:1": "quay.io/library/a:1",
    f"docker.io/library/a@{SHA256}": f"a@{SHA256}",
    # Shorter forms of these would mean other images.
    "docker.io/library/a/b:1": "library/a/b:1",
    "docker.io/library/localhost/b:1": "library/localhost/b:1",
    "docker.io/localhost/b:1": "docker.io/localhost/b:1",
    "docker.io/x.y/b:1": "docker.io/x.y/b:1",
}


@pytest.mark.parametrize(("full", "short"), FAMILIAR.items())
def test_familiar(full, short):
    assert familiar(full) == short


_WORD = st.from_regex(r"[a-z0-9]{1,4}(?:(?:\.|_|__|-)[a-z0-9]{1,3})?", fullmatch=True)
_PATH = st.lists(_WORD | st.sampled_from(["library", "localhost"]), min_size=1, max_size=3).map("/".join)
_DOMAIN = st.sampled_from(["", "docker.io/", "localhost/", "host:5000/", "quay.io/", "[::1]/", "Host/"])
_TAG = st.just("") | st.from_regex(r":\w[\w.-]{0,8}", fullmatch=True).filter(str.isascii)
_DIGEST = st.sampled_from(["", "", f"@{SHA256}", f"@{SHA512}"])
_REFERENCES = st.builds("{}{}{}{}".format, _DOMAIN, _PATH, _TAG, _DIGEST)


@given(_REFERENCES)
def test_full_form_means_itself(text):
    full = parse_reference(text)
    assert parse_reference(str(full)) == full


@given(_REFERENCES)
def test_familiar_form_means_the_same(text):
    """What a listing shows can be typed back, and never names another image."""
    full = parse_reference(text)
    assert parse_reference(familiar(str(full))) == full


_ODD = st.sampled_from([*"aA0-._:/@[]% \n\0é\u0661", "", "..", "//", "::", "@sha256:", ":1\n"])


@st.composite
def _spoilt(draw: st.DrawFn) -> str:
    """Return a reference with something else in one place: now and then it is still one."""
    text = draw(_REFERENCES)
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(_ODD) + text[at + draw(st.integers(0, 1)) :]


@given(_spoilt() | st.text(max_size=40))
def test_any_text_is_a_reference_or_an_invalid_argument(text):
    try:
        found = parse_reference(text)
    except InvalidArgument:
        event("refused")
        return
    event("a reference")
    assert str(found).isascii()
    assert str(found).isprintable()
    assert not {" ", "\n", "%"} & set(str(found))
    assert parse_reference(str(found)) == found
