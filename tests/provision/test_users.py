"""Who `USER[:GROUP]` is by the image's own lists: P-18, M-15, E-01."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.errors import EngineError, InvalidArgument, NotFound, Refused
from engine.provision.inside import open_rootfs
from engine.provision.users import Account, resolve_user
from tests.provision.hostile import KINDS, Host, fill

PASSWD = """root:x:0:0:root:/root:/bin/sh
# a comment
daemon:x:1:1::/usr/sbin:/usr/sbin/nologin
short:x:12:13
app:x:1000:1001:An App:/home/app:/bin/sh
app:x:5:5:again:/never:/bin/sh
1000:x:0:0:a trap:/root:/bin/sh
broken:x:
worse
far:x:4294967296:0::/:/bin/sh
odd.na+me:x:77:78::relative:/bin/sh
evil:x:79:80::/a\x1b[2J:/bin/sh
"""
GROUP = """root:x:0:
wheel:x:10:root,app
app:x:1001:
staff:x:50:other,app
almost:x:51:apple,myapp
app2:x:52:app
far:x:99999999999:app2
broken:x:app
1001:x:0:
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def root(host: Host) -> Iterator[int]:
    (host.rootfs / "etc").mkdir()
    (host.rootfs / "etc/passwd").write_text(PASSWD)
    (host.rootfs / "etc/group").write_text(GROUP)
    with open_rootfs(host.rootfs) as opened, host.unharmed():
        yield opened


def account(uid: int, gid: int, *more: int, home: str = "/") -> Account:
    return Account(uid=uid, gid=gid, groups=[gid, *more], home=home)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", account(0, 0, 10, home="/root")),
        ("root", account(0, 0, 10, home="/root")),
        ("0", account(0, 0, 10, home="/root")),
        ("app", account(1000, 1001, 10, 50, 52, home="/home/app")),
        ("1000", account(1000, 1001, 10, 50, 52, home="/home/app")),  # and not the trap
        ("001000", account(1000, 1001, 10, 50, 52, home="/home/app")),
        ("app:staff", account(1000, 50, home="/home/app")),
        ("app:7", account(1000, 7, home="/home/app")),
        ("1000:1001", account(1000, 1001, home="/home/app")),
        (":staff", account(0, 50, home="/root")),
        ("4000", account(4000, 0)),
        ("4000:app", account(4000, 1001)),
        ("4294967294:4294967294", account(4294967294, 4294967294)),
        ("short", account(12, 13)),
        ("odd.na+me", account(77, 78)),
        ("evil", account(79, 80)),
    ],
)
def test_users_are_whom_docker_takes_them_for(root: int, text: str, found: Account) -> None:
    """But a number is a number, whatever account has it for its name."""
    assert resolve_user(root, text) == found


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("nobody", NotFound, "no user 'nobody' in /etc/passwd; give a number"),
        ("app:nobody", NotFound, "no group 'nobody' in /etc/group; give a number"),
        ("broken", NotFound, "no user 'broken'"),
        ("worse", NotFound, "no user 'worse'"),
        ("app:broken", NotFound, "no group 'broken'"),
        (".*", NotFound, "no user '.*'"),
        ("odd.na+m", NotFound, "no user"),
        ("oddXna+me", NotFound, "no user"),
        ("far", Refused, "the ID 4294967296"),
        ("root:far", Refused, "the ID 99999999999"),
        ("-1", InvalidArgument, "-1 is no user"),
        ("0:-1", InvalidArgument, "-1 is no user"),
        ("4294967295", InvalidArgument, "is no user"),
        ("0:4294967296", InvalidArgument, "is no user"),
        ("0:0\n", InvalidArgument, "is not a user"),
        ("a:b:c", InvalidArgument, "is not a user"),
        ("root:", InvalidArgument, "is not a user"),
    ],
)
def test_m_15_who_is_nobody_is_said_to_be(
    root: int, text: str, kind: type[EngineError], says: str
) -> None:
    """M-15, with CVE-2024-40635."""
    with pytest.raises(kind) as error:
        resolve_user(root, text)
    assert says in str(error.value)


def test_an_image_without_lists_has_numbers(host: Host) -> None:
    with open_rootfs(host.rootfs) as root:
        assert resolve_user(root, "") == account(0, 0)
        assert resolve_user(root, "7:8") == account(7, 8)
        with pytest.raises(NotFound):
            resolve_user(root, "root")


@pytest.mark.root
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("path", ["etc/passwd", "etc/group", "etc"])
@pytest.mark.parametrize("user", ["0", "root", "root:root"])
def test_p_18_lists_that_are_none_are_refused_or_empty(
    host: Host, kind: str, path: str, user: str
) -> None:
    """Whoever somebody is, it is not the host that says so, and nothing waits."""
    fill(host, path, kind)
    with open_rootfs(host.rootfs) as root, host.unharmed():
        try:
            found = resolve_user(root, user)
        except (Refused, NotFound):
            return
        assert found == account(0, 0)


def test_p_18_lists_are_bounded(host: Host) -> None:
    """As much as may be, as bad as may be, in seconds and without much memory."""
    (host.rootfs / "etc").mkdir()
    size = limits.ACCOUNTS - 100
    for users, groups in (
        (b"\n" * size, b"\n" * size),
        (b"a:x:1:1\n" * (size // 8), b"a:x:1:b\n" * (size // 8)),
        (b":" * size, b"a:x:1:" + b"," * (size - 6)),
        (b"x" * size, b"g" * size),
    ):
        (host.rootfs / "etc/passwd").write_bytes(users + b"\nme:x:5:6::/me:/bin/sh\n")
        (host.rootfs / "etc/group").write_bytes(groups + b"\nmine:x:7:me\n")
        with open_rootfs(host.rootfs) as root:
            start = time.process_time()
            assert resolve_user(root, "me") == account(5, 6, 7, home="/me")
            assert resolve_user(root, "me:mine") == account(5, 7, home="/me")
            assert resolve_user(root, "5") == account(5, 6, 7, home="/me")
            assert time.process_time() - start < 10
    for name in ("passwd", "group"):
        with (host.rootfs / "etc" / name).open("ab") as file:
            file.write(b"\n" * 100)
        with (
            open_rootfs(host.rootfs) as root,
            pytest.raises(Refused, match=f"{name} of the image is over"),
        ):
            resolve_user(root, "me")
        os.truncate(host.rootfs / "etc" / name, 0)


def test_p_18_groups_are_bounded(host: Host) -> None:
    """The kernel takes 65,536 of one process."""
    (host.rootfs / "etc").mkdir()
    (host.rootfs / "etc/passwd").write_text("me:x:5:6::/me:/bin/sh\n")
    lines = "".join(f"g:x:{number}:me\n" for number in range(limits.ACCOUNT_GROUPS + 1))
    (host.rootfs / "etc/group").write_text(lines)
    with open_rootfs(host.rootfs) as root, pytest.raises(Refused, match="in over 65536 groups"):
        resolve_user(root, "me")


TROJAN = "import os; os.mkdir({place!r})\n"
LOOK = """
import sys
from pathlib import Path
from engine.provision.inside import open_rootfs
from engine.provision.users import resolve_user
with open_rootfs(Path(sys.argv[1])) as root:
    print(resolve_user(root, "app"))
    maps = Path("/proc/self/maps").read_text()
assert sys.argv[1] not in maps
assert "libnss" not in maps
"""


def test_e_01_nothing_of_the_image_is_loaded(host: Host, root: int) -> None:
    """No name service library, and no module of its Python, wherever it runs."""
    place = host.victim / "owned"
    for name in ("encodings/idna.py", "encodings/latin_1.py", "pwd.py", "re.py", "sitecustomize.py"):
        for below in ("usr/lib/python3", "usr/lib/python3.11", ""):
            path = host.rootfs / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TROJAN.format(place=str(place)))
    for folder in ("lib", "lib/x86_64-linux-gnu", "usr/lib"):
        (host.rootfs / folder).mkdir(parents=True, exist_ok=True)
        (host.rootfs / folder / "libnss_files.so.2").write_bytes(b"\x7fELF")
    (host.rootfs / "etc/nsswitch.conf").write_text("passwd: evil files\ngroup: evil files\n")
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOOK, host.rootfs],
        cwd=host.rootfs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "uid=1000, gid=1001" in done.stdout


# -- the law --------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b", "ab", "7", "root"])
NUMBERS = st.sampled_from(["0", "7", "07", "42", ""])
LINES = st.one_of(
    st.builds("{}:x:{}:{}::/{}:/bin/sh".format, WORDS, NUMBERS, NUMBERS, WORDS),
    st.builds("{}:x:{}".format, WORDS, NUMBERS),
    st.sampled_from(["", "#", ":::", "a", "+::::::"]),
)
MEMBERS = st.lists(WORDS, max_size=3).map(",".join)
GROUPS = st.one_of(
    st.builds("{}:x:{}:{}".format, WORDS, NUMBERS, MEMBERS),
    st.sampled_from(["", "#", "a:x", "a:x:7", ":::"]),
)


def numbered(text: str) -> bool:
    return text.isdigit()


def model(users: list[str], groups: list[str], user: str, group: str) -> Account | None:
    """Read line by line and word by word, as a person would; None for who is not there."""
    name, uid, gid, home = "", int(user) if numbered(user) else -1, 0, "/"
    for line in users:
        name_, _, uid_, gid_, *rest = [*line.split(":"), "", "", ""]
        if not (name_ and numbered(uid_) and numbered(gid_)):
            continue
        if int(uid_) == int(user) if numbered(user) else name_ == user:
            name, uid, gid = name_, int(uid_), int(gid_)
            home = (rest[1] if len(rest) > 4 else "") or "/"
            break
    if uid < 0:
        return None
    lines = [line.split(":") for line in groups]
    if group and not numbered(group):
        found = [int(parts[2]) for parts in lines if parts[0] == group and numbered("".join(parts[2:3]))]
        return account(uid, found[0], home=home) if found else None
    if group:
        return account(uid, int(group), home=home)
    more = [
        int(parts[2])
        for parts in lines
        if len(parts) > 3 and numbered(parts[2]) and name and name in parts[3].split(",")
    ]
    return account(uid, *dict.fromkeys([gid, *more]), home=home)


@given(
    users=st.lists(LINES, max_size=5),
    groups=st.lists(GROUPS, max_size=5),
    user=WORDS,
    group=st.one_of(st.just(""), WORDS),
)
def test_p_18_lists_are_read_as_a_person_would(
    users: list[str], groups: list[str], user: str, group: str
) -> None:
    """The first line that names somebody in full counts."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "etc").mkdir()
        (Path(folder) / "etc/passwd").write_text("\n".join(users))
        (Path(folder) / "etc/group").write_text("\n".join(groups))
        with open_rootfs(Path(folder)) as root:
            wanted = model(users, groups, user, group)
            text = f"{user}:{group}" if group else user
            if wanted is None:
                with pytest.raises(NotFound):
                    resolve_user(root, text)
            else:
                assert resolve_user(root, text) == wanted
