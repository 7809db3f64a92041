"""How an image wants to be run: what tools write is read, what nothing could run is refused (M-15)."""

import json
from typing import Any

import pytest

from engine import limits
from engine.errors import InvalidArgument, Refused
from engine.oci.execution import Execution, parse_execution, split_user
from engine.oci.platform import Platform
from engine.oci.signals import parse_signal

AMD64 = {"architecture": "amd64", "os": "linux"}


def parsed(**run: Any) -> Execution:
    return parse_execution(json.dumps({**AMD64, "config": run}).encode())


def refused(**run: Any) -> str:
    with pytest.raises(Refused) as error:
        parsed(**run)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_all_of_it_is_read() -> None:
    """A config as docker's builder writes it, with what is of no matter here."""
    found = parsed(
        Hostname="",
        AttachStdin=False,
        Env=["PATH=/usr/bin:/bin", "EMPTY=", "LINES=a\nb", "A=b=c"],
        Entrypoint=["/docker-entrypoint.sh"],
        Cmd=["nginx", "-g", "daemon off;"],
        User="101:nginx",
        WorkingDir="/srv",
        Volumes={"/data": {}, "/logs": {}},
        ExposedPorts={"80/tcp": {}, "53/udp": {}, "9000": {}, "7000-7010/tcp": {}},
        StopSignal="SIGQUIT",
        Labels={"maintainer": "someone", "version": ""},
        Healthcheck={"Test": ["CMD", "true"]},
        OnBuild=None,
        Shell=["/bin/sh"],
        ArgsEscaped=True,
    )
    assert found == Execution(
        platform=Platform(os="linux", architecture="amd64"),
        user="101:nginx",
        env=("PATH=/usr/bin:/bin", "EMPTY=", "LINES=a\nb", "A=b=c"),
        entrypoint=("/docker-entrypoint.sh",),
        cmd=("nginx", "-g", "daemon off;"),
        working_dir="/srv",
        volumes=("/data", "/logs"),
        stop_signal="SIGQUIT",
        exposed_ports=("80/tcp", "53/udp", "9000", "7000-7010/tcp"),
        labels={"maintainer": "someone", "version": ""},
    )


@pytest.mark.parametrize(
    "config",
    [{}, {"config": None}, {"config": {}}, {"config": {"Env": None, "Cmd": None, "Volumes": None}}],
)
def test_what_it_does_not_say_is_empty(config: dict[str, Any]) -> None:
    found = parse_execution(json.dumps({**AMD64, "variant": "v3", **config}).encode())
    assert found == Execution(platform=Platform(os="linux", architecture="amd64", variant="v3"))


WRONG = [
    ({"Env": "PATH=/bin"}, "Expected `array`"),
    ({"Env": ["NOVALUE"]}, "'NOVALUE' is not KEY=VALUE"),
    ({"Env": ["=x"]}, "'=x' is not KEY=VALUE"),
    ({"Env": ["A=\0"]}, "in the environment has a NUL"),
    ({"Env": [1]}, "Expected `str`"),
    ({"Entrypoint": ["/bin/sh\0-x"]}, "has a NUL"),
    ({"Cmd": ["\0"]}, "has a NUL"),
    ({"Cmd": "sh"}, "Expected `array`"),
    ({"User": 0}, "Expected `str`"),
    ({"User": "0:0\n"}, "is not a user"),
    ({"User": "\0"}, "is not a user"),
    ({"User": "a:b:c"}, "is not a user"),
    ({"User": "a:"}, "is not a user"),
    ({"User": "-1"}, "-1 is no user or group"),
    ({"User": "+1"}, "+1 is no user or group"),
    ({"User": "4294967295"}, "is no user or group; their numbers go from 0 to 4294967294"),
    ({"User": "4294967296"}, "is no user or group"),  # CVE-2024-40635: root, once cut to 32 bits
    ({"User": "0:4294967296"}, "is no user or group"),
    ({"User": "9" * 200}, "is no user or group"),
    ({"User": "9" * 5000}, "too long"),
    ({"User": "a" * 257}, "too long"),
    ({"WorkingDir": "srv"}, "'srv' is not absolute"),
    ({"WorkingDir": "../srv"}, "is not absolute"),
    ({"Volumes": {"data": {}}}, "'data' is not absolute"),
    ({"Volumes": {"": {}}}, "volume without a path"),
    ({"Volumes": ["/data"]}, "Expected `object`"),
    ({"ExposedPorts": {"http": {}}}, "'http' is not a port"),
    ({"ExposedPorts": {"65536/tcp": {}}}, "is not a port"),
    ({"ExposedPorts": {"80/tcp/udp": {}}}, "is not a port"),
    ({"ExposedPorts": {"٣": {}}}, "is not a port"),
    ({"StopSignal": "SIGNOTHING"}, "is not a signal"),
    ({"StopSignal": "0"}, "is not a signal"),
    ({"StopSignal": "65"}, "is not a signal"),
    ({"StopSignal": "-9"}, "is not a signal"),
    ({"StopSignal": 9}, "Expected `str`"),
    ({"Labels": {"a": 5}}, "Expected `str`"),
    ({"env": ["A=b"]}, "in another case"),
]


@pytest.mark.parametrize(("run", "says"), WRONG, ids=[str(row)[:40] for row, _ in WRONG])
def test_m_15_what_nothing_could_run_is_refused(run: dict[str, Any], says: str) -> None:
    """M-15, with CVE-2024-40635 and CVE-2026-46680: typed, and named by what is wrong with it."""
    assert says in refused(**run)


BEYOND = [
    {"Env": [f"N{number}=" for number in range(limits.RUN_WORDS + 1)]},
    {"Env": ["A=" + "x" * limits.RUN_BYTES]},
    {"Cmd": ["x" * 1000] * (limits.RUN_BYTES // 1000)},
    {"Cmd": ["é" * (limits.RUN_BYTES // 2)]},
    {"Volumes": {f"/{number}": {} for number in range(limits.RUN_VOLUMES + 1)}},
    {"ExposedPorts": {f"{port % 65536}/{port}": {} for port in range(limits.RUN_PORTS + 1)}},
    {"Labels": {str(number): "" for number in range(limits.RUN_LABELS + 1)}},
    {"Labels": {"a": "x" * limits.RUN_LABEL_BYTES}},
]


@pytest.mark.parametrize("run", BEYOND, ids=lambda run: next(iter(run)))
def test_m_15_what_no_image_has_is_refused(run: dict[str, Any]) -> None:
    """Counts and bytes."""
    assert "over " in refused(**run)


def test_m_15_what_real_images_have_is_far_below() -> None:
    """An image of a telephone exchange exposes a range, buildpacks have labels like documents."""
    found = parsed(
        Env=[f"SERVICE_{number}_HOST=10.0.0.1" for number in range(5000)],
        ExposedPorts={f"{port}/udp": {} for port in range(16384, 32769)},
        Labels={"io.buildpacks.buildpack.layers": "x" * (600 << 10)},
        Volumes={f"/var/lib/{number}": {} for number in range(50)},
    )
    assert len(found.exposed_ports) == 16385


def test_a_user_is_taken_apart() -> None:
    assert split_user("") == ("", "")
    assert split_user("0") == (0, "")
    assert split_user("007:010") == (7, 10)
    assert split_user("4294967294:www-data") == (4294967294, "www-data")
    assert split_user(":staff") == ("", "staff")
    assert split_user("DOMAIN\\user name") == ("DOMAIN\\user name", "")
    assert split_user("²") == ("²", "")


def test_signals_are_written_in_many_ways() -> None:
    same = ("15", "TERM", "SIGTERM", "sigterm", "Term", "015")
    assert {parse_signal(text) for text in same} == {15}
    assert parse_signal("SIGRTMIN+3") == 37  # how systemd is told to halt
    assert (parse_signal("RTMIN"), parse_signal("RTMAX-1"), parse_signal("64")) == (34, 63, 64)
    for text in (
        "",
        "SIG",
        "SIGSIGTERM",
        "RTMIN-1",
        "RTMAX+1",
        "RTMIN+31",
        "1.5",
        "٣",
        "TERM\n",
        "1000",
    ):
        with pytest.raises(InvalidArgument, match="is not a signal"):
            parse_signal(text)
