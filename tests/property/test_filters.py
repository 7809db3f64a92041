"""Filters: what is printed parses to the same, and matching is what a plain reading says."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.errors import InvalidArgument
from engine.fieldpaths import change_labels
from engine.filters import Operator, Selector, check_expressions, fields, matches, parse, parse_all, show

TEXTS = st.text(max_size=8) | st.text(alphabet='ab."\\/|,=!~ \n\xe9\U0001f600', max_size=8)
PATHS = st.lists(st.sampled_from(["labels", "name", "a", "b"]) | TEXTS, min_size=1, max_size=3).map(
    tuple
)
SELECTORS = st.builds(Selector, PATHS) | st.builds(
    Selector, PATHS, st.sampled_from([*Operator][1:]), TEXTS
)
FILTERS = st.lists(SELECTORS, max_size=3).map(tuple)


@given(FILTERS)
def test_what_is_shown_parses_to_the_same(filter_):
    assert parse(show(filter_)) == filter_


@given(st.text(max_size=12) | st.text(alphabet='ab.,=!~"/|\\ \t\nx0', max_size=12))
def test_any_text_is_a_filter_or_an_error_that_says_where(text):
    try:
        filter_ = parse(text)
    except InvalidArgument as error:
        where = str(error)
    else:
        where = "character 1" if parse(show(filter_)) == filter_ else "it changed"
    assert re.search(r"character [0-9]+", where)


VALUES = st.dictionaries(st.sampled_from(["name", "a.b"]), st.sampled_from(["", "x", "xy"]))
LABELS = st.dictionaries(st.sampled_from(["k", "k.l", "k/l"]), st.sampled_from(["x", "xy", "é"]))
ASKED = st.builds(
    Selector,
    st.sampled_from(
        [("name",), ("a", "b"), ("c",), ("labels", "k"), ("labels", "k", "l"), ("labels", "k/l")]
    ),
    st.sampled_from([*Operator]),
    st.sampled_from(["", "x", "^x$", "y", "(", "é"]),
)


@given(st.lists(st.lists(ASKED, min_size=1, max_size=3).map(tuple), max_size=3), VALUES, LABELS)
def test_matching_is_what_a_plain_reading_says(filters, values, labels):
    flat = {key: value for key, value in values.items() if value}
    flat.update((f"labels.{key}", value) for key, value in labels.items())

    def plain(selector):
        there = ".".join(selector.path) in flat
        value = flat.get(".".join(selector.path))
        if selector.operator == "~=":
            return there and selector.value != "(" and bool(re.search(selector.value, value))
        return {"": there, "==": value == selector.value, "!=": value != selector.value}[
            selector.operator
        ]

    expected = not filters or any(all(map(plain, filter_)) for filter_ in filters)
    assert matches(filters, fields(values, labels)) is expected


@pytest.mark.parametrize(
    ("text", "path", "operator", "value"),
    [
        ("name", ["name"], "", ""),
        (" name == x ", ["name"], "==", "x"),
        ('labels."a.b/c"==x', ["labels", "a.b/c"], "==", "x"),
        ('labels.containerd.io."gc.root"', ["labels", "containerd", "io", "gc.root"], "", ""),
        ("target.digest~=^sha256:ab", ["target", "digest"], "~=", "^sha256:ab"),
        ("name!=docker.io/library/a:1", ["name"], "!=", "docker.io/library/a:1"),
        (r'name=="a\"\\\n\t\x41\u00e9\U0001f600\101\xc3\xa9"', ["name"], "==", 'a"\\\n\tAé\U0001f600Aé'),
        (r'name=="\xff"', ["name"], "==", "\udcff"),
        (r"name~=/a\/b\d+|c,d/", ["name"], "~=", r"a/b\d+|c,d"),
        (r"name~=|a/b\.c|", ["name"], "~=", r"a/b\.c"),
        (r"name~=\d+$", ["name"], "~=", r"\d+$"),
        ("name==/etc", ["name"], "==", "/etc"),
        ("name==a=b", ["name"], "==", "a=b"),
    ],
)
def test_the_grammar(text, path, operator, value):
    assert parse(text) == (Selector(tuple(path), Operator(operator), value),)


def test_several_selectors():
    assert parse("a,b==1 , c!=2") == (
        Selector(("a",)),
        Selector(("b",), Operator.EQUAL, "1"),
        Selector(("c",), Operator.UNEQUAL, "2"),
    )
    assert parse("") == parse("  ") == ()
    assert matches(parse_all(["a==1", ""]), fields({}, {}))


@pytest.mark.parametrize(
    ("text", "at", "what"),
    [
        ("=", 1, "a field"),
        ("a=b", 2, "== != ~="),
        ("a===b", 2, "== != ~="),
        ("a==", 4, "a value"),
        ("a,", 3, "a field"),
        (",a", 1, "a field"),
        ("a b", 3, "== != ~="),
        ("a==b c", 6, "a comma"),
        ("a..b", 3, "a field"),
        ('a=="b', 4, "does not end"),
        ('a=="b\nc"', 4, "does not end"),
        (r'a=="b\qc"', 6, "escape"),
        (r'a=="\udc00"', 5, "no character"),
        (r'a=="\U00110000"', 5, "no character"),
        (r'a=="\777"', 5, "no character"),
        ("a~=/b", 4, "does not end"),
        ("a==b\x00c", 4, "in quotes"),
        ("é==b", 1, "a field"),
        ("a" * (limits.FILTER + 1), 1, "over"),
    ],
)
def test_an_error_says_where(text, at, what):
    with pytest.raises(InvalidArgument, match=f"character {at}: .*{re.escape(what)}"):
        parse(text)


def test_what_is_no_text_is_refused():
    with pytest.raises(InvalidArgument, match="character 2"):
        parse("a\ud800")


@pytest.mark.parametrize("bad", ["(", "a{99999999999}", "[[a]", "*"])
def test_a_bad_expression_matches_nothing(bad, recwarn):
    assert not matches([(Selector(("name",), Operator.LIKE, bad),)], fields({"name": "x"}, {}))
    assert not recwarn


@pytest.mark.parametrize(
    "endless",
    ["^(a+)+$", "^(a|aa)+$", "(a*)*b", "(?:a?){20,}", "(a{1,9}){1,9}", r"(a)\1", "(?=a)b", "(?<!a)b"],
)
def test_an_expression_that_may_take_for_ever_is_refused(endless):
    with pytest.raises(InvalidArgument, match="expression"):
        matches([(Selector(("name",), Operator.LIKE, endless),)], fields({"name": "a" * 34 + "b"}, {}))


@pytest.mark.parametrize(
    "honest",
    [r"^docker\.io/.*:v?[0-9]+$", "(a|b)?c*", "[ab]+", "(foo|bar)", "^(ab){2}", "(?i)A+", "(ab)+"],
)
def test_other_expressions_are_not(honest):
    filters = parse_all([show((Selector(("name",), Operator.LIKE, honest),))])
    check_expressions(filters)
    value = "docker.io/foo:v1 abab c"
    assert matches(filters, fields({"name": value}, {})) == bool(re.search(honest, value))


# -- field paths ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "changed"),
    [
        ([], {"b": "3", "c.d/e": "4"}),
        (["labels"], {"b": "3", "c.d/e": "4"}),
        (["labels.a"], {"b": "2"}),
        (["labels.b"], {"a": "1", "b": "3"}),
        (["labels.c.d/e", "labels.a"], {"b": "2", "c.d/e": "4"}),
    ],
)
def test_an_update_of_fields(paths, changed):
    assert change_labels({"a": "1", "b": "2"}, {"b": "3", "c.d/e": "4", "f": ""}, paths) == changed


@pytest.mark.parametrize("path", ["", "size", "labels.", "labelsa", "digest", "LABELS"])
def test_other_fields_cannot_be_changed(path):
    with pytest.raises(InvalidArgument, match="cannot be changed"):
        change_labels({}, {}, [path])


KEYS = st.text(alphabet=string.ascii_letters + "./", min_size=1, max_size=4)


@given(st.dictionaries(KEYS, st.just("1")), st.dictionaries(KEYS, st.sampled_from(["", "2"])))
def test_naming_each_label_changes_no_other(labels, wanted):
    changed = change_labels(labels, wanted, [f"labels.{key}" for key in wanted] or ["labels.none"])
    expected = {key: value for key, value in {**labels, **wanted}.items() if value}
    assert changed == expected
