"""The house: layers, colours, owners of libraries, sizes. Each rule says why it is there."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("engine", "snapshotters")
    for path in sorted((TOP / package).rglob("*.py"))
}

# From the bottom up. A module may import from its own layer and from those below; the longest
# matching prefix counts.
LAYERS = {
    # vocabulary: loadable anywhere, instantly
    "engine": 0,
    "engine.errors": 0,
    "engine.labels": 0,
    "engine.expressions": 0,
    "engine.filters": 0,
    "engine.fieldpaths": 0,
    "engine.identifiers": 0,
    "engine.limits": 0,
    "engine.memory": 0,
    "engine.failpoints": 0,
    "engine.phases": 0,
    "engine.progress": 0,
    "engine.callables": 0,
    "engine.times": 0,
    "engine.oci": 0,
    # substrate: one owner for each foreign thing
    "engine.observing.tally": 1,
    "engine.observing.metering": 1,
    "engine.observing.metrics": 1,
    "engine.observing.waking": 1,
    "engine.observing.watching": 1,
    "engine.observing.listening": 5,
    "engine.observing.counting": 5,
    "engine.processes": 1,
    "engine.fs": 1,
    "engine.kv": 1,
    "engine.mount": 1,
    "engine.mounts": 1,
    # records and contracts
    "engine.root": 2,
    "engine.snapshots": 2,
    "engine.metadata": 2,
    "engine.provision.places": 2,  # what checks a store looks there too
    # stores and transforms
    "engine.content": 3,
    "engine.diff": 3,
    "engine.plugins": 3,
    "engine.testing": 3,
    "snapshotters": 4,
    # orchestration
    "engine.archive": 4,
    "engine.registry": 4,
    "engine.unpack": 4,
    "engine.gc": 4,
    "engine.fsck": 4,
    # composition, then surfaces
    "engine.mounts.claims": 5,
    "engine.mounts.mounting": 5,
    "engine.recovery": 5,
    "engine.doubts": 5,
    "engine.images.states": 5,
    "engine.stores": 5,
    "engine.accounting": 5,
    "engine.images.admitting": 5,
    "engine.images.occupied": 5,
    "engine.beside": 5,
    "engine.following": 5,
    "engine.images.facts": 5,
    "engine.images.service": 5,
    "engine.images.coordinating": 5,
    "engine.importing": 5,
    "engine.pulling": 5,
    "engine.pushing": 5,
    "engine.copying": 5,
    "engine.collecting": 5,
    "engine.explaining": 5,
    "engine.compacting": 5,
    "engine.app": 5,
    "engine.provision": 5,
    "engine.running": 5,
    "engine.cli": 6,
    "engine.__main__": 6,
}

ASYNC = {
    "engine.images.admitting",
    "engine.app",
    "engine.beside",
    "engine.collecting",
    "engine.images.coordinating",
    "engine.following",
    "engine.gc.scheduler",
    "engine.images.service",
    "engine.importing",
    "engine.pulling",
    "engine.observing.counting",
    "engine.observing.listening",
    "engine.observing.waking",
    "engine.observing.watching",
    "engine.pushing",
    "engine.copying",
    "engine.provision.destroying",
    "engine.provision.provisioner",
    "engine.running.attaching",
    "engine.running.containerizer",
    "engine.running.ending",
    "engine.running.launching",
    "engine.running.turns",
    "engine.running.executing",
    "engine.running.monitors",
    "engine.cli.attending",
    "engine.cli.executing",
    "engine.cli.launching",
    "engine.cli.running",
    "engine.cli.demo",
}
ASYNC |= {
    f"engine.unpack.{room}"
    for room in (
        "arrivals",
        "committer",
        "flights",
        "flusher",
        "layer_flight",
        "lease",
        "making",
        "pool",
        "slots",
        "twins",
        "unpacker",
        "workshop",
    )
}
ASYNC |= {
    f"engine.registry.{room}"
    for room in (
        "asking",
        "bandwidth",
        "client",
        "connections",
        "fetching",
        "lanes",
        "network",
        "ranges",
        "sending",
        "tokens",
        "uploading",
    )
}

PURE = {name for name in MODULES if name.startswith("engine.oci.")} | {
    "engine.errors",
    "engine.labels",
    "engine.expressions",
    "engine.filters",
    "engine.fieldpaths",
    "engine.identifiers",
    "engine.limits",
    "engine.observing.metrics",
    "engine.mounts.options",
    "engine.running.confinement",
    "engine.running.options",
    "engine.progress",
    "engine.archive.choosing",
    "engine.content.keeping",
    "engine.diff.tar",
    "engine.diff.budget",
    "engine.diff.layer",
    "engine.diff.outline",
    "engine.diff.pax",
    "engine.diff.rules",
    "engine.gc.mark",
    "engine.fsck.findings",
    "engine.metadata.events",
    "engine.metadata.nodes",
    "engine.metadata.resources",
    "engine.running.statuses",
    "engine.registry.addresses",
    "engine.registry.challenge",
    "engine.registry.credentials",
    "engine.registry.hosts",
    "engine.registry.protocol",
    "engine.registry.retrying",
    "engine.running.frames",
    "engine.running.jobs",
    "engine.times",
    "engine.kv.keys",
    "engine.unpack.plan",
    "engine.unpack.jobs",
}

OWNERS = {
    "lmdb": "engine.kv",  # transactions and buffers have rules that one place can keep
    "isal": "engine.diff.decompress",  # hostile bytes go in: one place to bound and to sandbox
    "zstandard": "engine.diff.decompress",
    "httpcore": "engine.registry",  # one place for what is sent to whom
    "click": "engine.cli",
    "rich": "engine.cli",
    "ctypes": ("engine.fs.kernel", "engine.mount", "engine.mounts.table"),  # system calls that os lacks
}
OWNER_EXCEPTIONS = {("engine.testing.archives", "zstandard")}  # it packs, the engine only unpacks

# Imports within functions: each with its reason.
LAZY = {("engine", "importlib")}  # the facade: importing a module below must not load all others


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute, so that a reader sees the layer"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in MODULES else str(node.module)


def for_types_only(name: str) -> set[ast.AST]:
    return {
        inner
        for node in ast.walk(tree(name))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def imports(name: str, *, with_types: bool = True) -> set[str]:
    left_out = set() if with_types else for_types_only(name)
    return {m for node in ast.walk(tree(name)) if node not in left_out for m in imported(node)}


def layer(name: str) -> int:
    while name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS[name]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"engine.fs.durable", "engine.fs.kernel"}))
def test_one_place_flushes(name: str) -> None:
    # Else a step would be missing from the order that docs/on-disk.md promises.
    asked = {node.attr for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)}
    asked |= {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
    assert not asked & {"fsync", "fdatasync", "sync", "syncfs"}, "use engine.fs.durable"


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_go_down(name: str) -> None:
    # One direction: whoever changes a module knows who can be affected.
    for target in imports(name, with_types=False) & MODULES.keys():
        assert layer(target) <= layer(name), f"{name} imports {target}, which is above it"


def test_engine_never_imports_a_backend() -> None:
    # Backends register by entry point: anyone's is as good as ours.
    for name in MODULES:
        if name.startswith("engine"):
            assert not any(m.startswith("snapshotters") for m in imports(name)), name


def test_no_cycles() -> None:
    # A cycle is one module in several files.
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"cycle: {' -> '.join((*path, name))}"
        if name in state:
            return
        state[name] = 1
        for target in sorted(imports(name, with_types=False) & MODULES.keys()):
            visit(target, (*path, name))
        state[name] = 2

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_no_import_within_a_function(name: str) -> None:
    # It would hide a cycle, or a slow start, until it strikes.
    for function in ast.walk(tree(name)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                for target in imported(node):
                    assert (name, target) in LAZY, f"{name} imports {target} in {function.name}"


@pytest.mark.parametrize("name", MODULES)
def test_each_library_has_one_owner(name: str) -> None:
    for target in imports(name):
        library = target.partition(".")[0]
        if library in OWNERS and (name, library) not in OWNER_EXCEPTIONS:
            owners = OWNERS[library]
            allowed = (owners,) if isinstance(owners, str) else owners
            assert any(f"{name}.".startswith(f"{owner}.") for owner in allowed), (
                f"{name} imports {library}, which {owners} owns"
            )


@pytest.mark.parametrize("name", MODULES)
def test_colours(name: str) -> None:
    # A contract of two colours would be two contracts; blocking calls on the loop stall everyone.
    libraries = {target.partition(".")[0] for target in imports(name)}
    if name in ASYNC:
        assert not libraries & {"lmdb", "hashlib", "tarfile"}, name
        assert "open" not in called(name), f"{name} opens files on the loop"
    else:
        assert "trio" not in libraries, f"{name} is not async but imports trio"
        assert not any(
            isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree(name))
        ) or (name.startswith("engine.cli")), name
    if name in PURE:
        io = {"os", "socket", "subprocess", "threading", "time", "pathlib", "tempfile", "lmdb"}
        assert not libraries & io, f"{name} is pure but imports {libraries & io}"
        assert "open" not in called(name), name


def called(name: str) -> set[str]:
    return {
        node.func.id
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_reads_the_environment_prints_or_exits(name: str) -> None:
    # A library that does is a library that surprises the process it is linked into.
    if name.startswith("engine.cli"):
        return
    text = MODULES[name].read_text(encoding="utf-8")
    assert "print" not in called(name), name
    for word in ("os.environ", "os.getenv", "sys.exit(", "sys.argv"):
        assert word not in text, f"{name} uses {word}"


def test_no_class_stands_twice() -> None:
    # Twins of two colours are what we left behind.
    seen: dict[str, str] = {}
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ClassDef):
                bare = node.name.lstrip("_").removeprefix("Async")
                if not node.name.startswith("_"):
                    assert bare not in seen, f"{node.name} is in {name} and {seen[bare]}"
                    seen[bare] = name


def test_each_label_key_stands_once() -> None:
    # A key that is written in two places is changed in one.
    for name, path in MODULES.items():
        if name != "engine.labels":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"[\"']containerd\.io/", text), f"{name} writes a label key"


def test_packages_are_inert() -> None:
    # Importing a leaf must not load a forest.
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "engine":
            assert len(tree(name).body) == 1, f"{path} has code"


@pytest.mark.parametrize("name", MODULES)
def test_rooms_are_small(name: str) -> None:
    lines = MODULES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450, f"{name} has {len(lines)} lines: is it two rooms?"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno - documented.count("\n")
            assert length <= 60, f"{name}.{node.name} has {length} lines"


@pytest.mark.parametrize("name", MODULES)
def test_a_room_says_what_it_is_for(name: str) -> None:
    documented = ast.get_docstring(tree(name))
    assert documented, f"{name} has no docstring"
    banned = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "core"}
    assert not banned & set(name.split(".")), name


def test_public_names_are_declared() -> None:
    # `__all__` is the contract of a module: it names only what is there.
    for name in MODULES:
        body = tree(name).body
        declared = [
            ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        for names in declared:
            defined = {target for node in ast.walk(tree(name)) for target in _defined(node)}
            assert set(names) <= defined, f"{name}: {set(names) - defined}"


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)


def test_every_dependency_is_one_that_the_design_knows() -> None:
    # Anything else needs a reason in the commit that adds it, and a change here.
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    allowed = {
        "lmdb",
        "trio",
        "zstandard",
        "isal",
        "msgspec",
        "click",
        "rich",
        "httpcore",
        "cryptography",
    }
    assert names <= allowed
