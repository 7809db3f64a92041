"""The bounds, each with why it is what it is: a test by the constant would pass ten times as high."""

from engine import limits
from engine.diff.budget import Budget

MIB, GIB = 1 << 20, 1 << 30

BOUNDS = {
    "MANIFEST": (4 * MIB, "what containerd takes; registries take no more"),
    "CONFIG": (8 * MIB, "a thousand times a usual one: histories and labels grow"),
    "JSON_DEPTH": (32, "documents have some 6 levels; no parser's stack ends before"),
    "JSON_TOKENS": (
        700_000,
        "values in memory take 100 bytes each: 70 MB; honest documents have 500,000",
    ),
    "JSON_WIDE": (8 * MIB, "text outside ASCII takes four times its size"),
    "INDEX_DEPTH": (8, "indexes in indexes; tools write 2"),
    "INDEX_BLOBS": (100_000, "twenty platforms have hundreds; so many take 60 MiB"),
    "INDEXES": (1000, "each is read and parsed once: seconds"),
    "INDEX_ENTRIES": (10_000, "platforms times tags of one archive"),
    "DIFFERENCES": (1000, "of a snapshot that lost all its files nobody wants to see each"),
    "RECOVERY_S": (5.0, "who opens a store wants to work; the rest is a collection's"),
    "LAYERS": (500, "overlayfs mounts no more (OVL_MAX_STACK)"),
    "REFERENCE": (255, "the longest name that registries take"),
    "ARCHIVE_ENTRIES": (100_000, "a `docker save` of a thousand images has 30,000"),
    "ARCHIVE_NAME": (4096, "PATH_MAX"),
    "ARCHIVE_FOLDER_NAME": (1024, "a blob's name has 141 bytes with sha512; openat2 takes 4095 at once"),
    "ARCHIVE_NAMES": (16 * MIB, "100,000 blobs with 77 bytes each, twice"),
    "ARCHIVE_TWINS": (GIB, "comparing reads both: seconds"),
    "ARCHIVE_LIST": (20 * MIB, "what containerd takes; 10,000 images with 25 layers each"),
    "ARCHIVE_DOCUMENTS": (128 * MIB, "10,000 images with 12 KiB of documents each"),
    "ARCHIVE_LINKS": (16, "old docker links once"),
    "MONITOR_ENDS_S": (20, "it writes one file then; a busy machine takes some seconds"),
    "IMAGE": (256 * GIB, "the largest images, with models, have 100 GiB"),
    "IMAGE_ENTRIES": (8_000_000, "four layers at their bound"),
    "LAYER": (64 * GIB, "the largest layers, a model each, have 50 GiB"),
    "LAYER_ENTRIES": (2_000_000, "a worker of 550 MiB, as measured with LAYER_NAMES"),
    "LAYER_DIRECTORIES": (500_000, "270 MiB of a worker, as measured"),
    "LAYER_NAMES": (256 * MIB, "128 bytes for each entry that there may be"),
    "LAYER_LINK_STEPS": (8_000_000, "seconds; honest layers have thousands"),
    "LAYER_ENTRY_STEPS": (4096, "as many folders as PATH_MAX allows, twice; honest links take some 20"),
    "FILE": (16 * (1 << 40) - 4096, "the largest file of ext4 (with blocks of 4 KiB)"),
    "SPARSE_PARTS": (1 << 20, "as in Go's archive/tar; 16 MiB of numbers"),
    "STREAMS": (
        1024,
        "honest ones give 64 KiB and more (bgzip, pigz); beginning one takes microseconds",
    ),
    "AFTER_END": (MIB, "tools pad archives to 10 KiB"),
    "EXTENSION": (MIB, "as in Go's archive/tar"),
    "EXTENSIONS_IN_ROW": (16, "tools write two or three"),
    "PAX_RECORDS": (160, "XATTRS and what bsdtar writes of each file"),
    "PATH_DEPTH": (512, "half of what PATH_MAX allows with names of 3 letters"),
    "NAME": (255, "NAME_MAX"),
    "LINK_TARGET": (4095, "PATH_MAX without its NUL"),
    "LINKS_FOLLOWED": (255, "as in securejoin, which umoci and containerd use"),
    "XATTRS": (128, "tools write three"),
    "XATTR_BYTES": (64 * 1024, "XATTR_SIZE_MAX"),
    "XZ_MEMORY": (128 * MIB, "`xz -9` asks for 65 MiB"),
    "RUN_WORDS": (10_000, "images have some ten; variables of a whole cluster's services are thousands"),
    "RUN_BYTES": (MIB, "the kernel takes a quarter of the stack's limit: 2 MiB; images have some KiB"),
    "RUN_VOLUMES": (200, "images have up to ten; the worst paths take 30 ms each: 6 s"),
    "RUN_PORTS": (3 << 16, "`EXPOSE 16384-32768/udp` lists each; so many are all of tcp, udp and sctp"),
    "RUN_LABELS": (10_000, "tools write tens"),
    "RUN_LABEL_BYTES": (4 * MIB, "buildpacks describe all their layers in one: hundreds of KiB"),
    "ACCOUNTS": (10 * MIB, "what containerd takes; a directory's 100,000 people have as much"),
    "ACCOUNT_GROUPS": (1 << 16, "NGROUPS_MAX"),
    "INSIDE_PATH": (4000, "PATH_MAX less a part of what is written before it"),
    "INSIDE_STEPS": (512, "as deep as a layer may be; each is looked up from the top: 30 ms"),
    "CHALLENGE": (16 * 1024, "real ones have some hundred characters; parsing is linear"),
    "CHALLENGE_PARAMETERS": (64, "real ones have three"),
    "TOKEN": (MIB, "tokens of clouds have some KiB"),
    "TOKEN_LIFE_S": (60, "the least that the distribution spec's token server may give"),
    "TOKEN_LIFE_MOST_S": (24 * 3600, "one that was revoked is asked for again within a day"),
    "ERROR_BODY": (64 * 1024, "an error document has some hundred bytes"),
    "MEDIA_TYPE": (255, "RFC 6838 allows no more; it goes into labels, of which each has 4096"),
    "HOSTS": (16, "more than lanes, each with 10 idle connections and some KiB of TLS"),
    "PULLERS": (100, "of some 120 bytes each, in a record that every pull writes anew"),
    "REDIRECTS": (5, "registries lead to their storage in one or two"),
    "TARGET": (64 * 1024, "signed URLs have some KiB"),
    "ATTEMPTS": (5, "with backoff some seconds; then a person should look"),
    "RETRY_AFTER_S": (60, "beyond that nobody waits before a command"),
    "CONNECT_S": (30, "as in containerd"),
    "PINNED_S": (300, "a pull takes minutes; a registry that moved is found by the next"),
    "ANSWER_S": (30, "as in containerd"),
    "PROGRESS_BYTES": (64 * 1024, "a kilobyte a second: below that a host holds us up"),
    "PROGRESS_S": (60, "a modem's pause; beyond it is a stall"),
    "FETCHES": (12, "two batches of 8 MiB each in memory: 192 MiB"),
    "FETCHES_OF_HOST": (8, "registries complain of more; others are left some"),
    "FETCHES_OF_IMAGE": (6, "as skopeo; docker and containerd have 3"),
    "RANGES_FROM": (32 * MIB, "some eight ranges: below, a second connection is hardly under way"),
    "RANGE": (4 * MIB, "at 100 MB/s twice a far round trip; 12 of them take 48 MiB"),
    "RANGE_RATE": (
        25 * MIB,
        "six such fill a gigabit; over 100 MB/s and 20 ms ranges cost a tenth of a pull",
    ),
    "RANGE_ALONE": (64 * MIB, "a round trip between two of them is a fiftieth of the time"),
    "FINISH": (10 * MIB, "docker's registry hashes what came in once more, object stores move it"),
    "PUSH_WHOLE": (MIB, "configs and small layers: one request is quicker than resuming could be"),
    "PUSH_PART": (
        32 * MIB,
        "below what proxies in front of registries commonly take (Cloudflare: 100 MB)",
    ),
    "DOCUMENTS": (128 * MIB, "as many as an archive may have; a manifest has some KiB"),
    "KNOWN_IMAGES": (20_000, "20 MiB; a store of so many is listed without reading documents again"),
    "REMOVE_DELAY_S": (180, "as in Nomad"),
    "CONTAINER_LOOK_S": (
        0.05,
        "a person sees no wait, and 20 reads of one record a second cost nothing",
    ),
    "PULLS": (8, "each has up to 6 layers on their way, of the engine's 12"),
    "PULL_STALL_S": (300, "as in containerd's CRI"),
    "LOG": (10 * MIB, "as kubelet has it; twice that of each container is kept"),
    "LOG_LINE": (64 * 1024, "four times that of containerd; longer ones come in parts"),
    "CLIENTS": (64, "people at terminals; 16 MiB of a monitor"),
    "CLIENT_BEHIND": (
        256 * 1024,
        "four reads: a client on this machine has no reason to be further behind",
    ),
    "STDIN_AHEAD": (256 * 1024, "as much as the other way"),
    "RUNTIME_S": (60.0, "some milliseconds; to kill what frees much memory, seconds"),
    "START_GRACE_S": (2.0, "a start takes 20 ms; one that hangs, as on a lost disk, is killed"),
    "CGROUP_EMPTY_S": (
        10.0,
        "a killed process frees its memory first; beyond that it hangs in the kernel",
    ),
    "LAST_OUTPUT_S": (2.0, "what is in a pipe is read in milliseconds"),
    "LAST_OUTPUT": (4 * MIB, "four times what a pipe holds (pipe-max-size)"),
    "FAREWELL_S": (
        10.0,
        "one who looks on and takes longer is stuck; the exit code is in its file by then",
    ),
    "EVENTS": (10_000, "some MiB; a store of that many images, removed at once"),
    "REFERRERS": (1000, "signatures and SBOMs of one image are tens"),
    "REFERRER_PAGES": (100, "a page has tens"),
    "CREDENTIALS_FILE": (MIB, "docker's config.json has some KiB"),
    "CREDENTIAL_PROGRAM_S": (30, "it may ask a key ring, not a person"),
    "FLUSH_EVERY_S": (
        0.5,
        "a flush of what a layer writes in that time takes less; more often it costs",
    ),
    "FLUSH_AFTER_S": (60, "twice what the kernel takes to write by itself (dirty_expire_centisecs)"),
    "COLLECT_WAIT_S": (30, "one of a million records takes 15 s, and tells meanwhile that it gets on"),
    "INGEST_LIFE_S": (24 * 3600, "as in containerd"),
    "FILTER": (10_000, "one line of a shell; parsing and matching it stay far below a second"),
    "LEASE_LIFE_S": (24 * 3600, "as in containerd"),
    "CLOCK_DRIFT_S": (60, "NTP steps clocks by less; what lives by the clock lives for minutes"),
    "CLOCK_GRACE_S": (900, "a clock that was set wrong is set right by then"),
    "VERIFIED_PAGES": (1 << 24, "of 64 GiB: 32 MiB of memory, two bytes for each"),
    "USE_NOTED_S": (60, "ages that a policy goes by are minutes; a write for each use is no gain"),
    "POLICY_EVERY_S": (300, "as in kubelet"),
    "ZSTD_WINDOW": (128 * MIB, "`zstd --long=27`, what the zstd command takes unasked"),
}


def test_bounds_are_what_they_should_be() -> None:
    found = {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and name not in {"MIB", "GIB"}
    }
    assert found == {name: value for name, (value, _) in BOUNDS.items()}


def test_650_000_ordinary_paths_are_no_problem() -> None:
    # As in node_modules: 100 bytes each, in 60,000 folders, were all of it kept.
    budget = Budget()
    for number in range(650_000):
        budget.entry()
        budget.kept(100)
        if number % 11 == 0:
            budget.folder()
            budget.kept(100)
