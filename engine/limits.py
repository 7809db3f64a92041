"""The bounds on everything that an image decides: sizes, counts and depths.

Pure. One place, so that a reviewer can check them all. Bytes unless the name says otherwise.
"""

MIB = 1 << 20
GIB = 1 << 30

MANIFEST = 4 * MIB  # containerd resolves up to about 4 MiB
CONFIG = 8 * MIB
JSON_DEPTH = 32
# Strings, opening brackets, colons and commas of a document. 20 MiB of a docker archive's names of
# layers have 500,000, 10,000 entries of an index with platforms and annotations as many.
JSON_TOKENS = 700_000
JSON_WIDE = 8 * MIB  # of a document with characters outside ASCII
INDEX_DEPTH = 8
INDEX_ENTRIES = 10_000
INDEX_BLOBS = 100_000  # of all its manifests together, where all are asked for
INDEXES = 1000  # without a platform, that lie within one another and are looked through
LAYERS = 500  # the kernel mounts at most 500 lower layers
REFERENCE = 255
MEDIA_TYPE = 255  # RFC 6838, 4.2: 127 on either side

ARCHIVE_ENTRIES = 100_000  # files in an OCI or docker archive, not in a layer
ARCHIVE_NAME = 4096  # the longest path of a file in such an archive, PATH_MAX
ARCHIVE_FOLDER_NAME = 1024  # the longest name of a file that is looked up in a folder
ARCHIVE_NAMES = 16 * MIB  # names and links of all files there; a blob's name has 77 bytes
ARCHIVE_TWINS = 1 * GIB  # files there that repeat a name, and are compared with the first
ARCHIVE_LIST = 20 * MIB  # `manifest.json` of a docker archive; as in containerd
ARCHIVE_DOCUMENTS = 128 * MIB  # manifests, indexes and configs of all images; one has some 12 KiB
ARCHIVE_LINKS = 16  # symlinks followed by name inside a docker archive

IMAGE = 256 * GIB  # uncompressed, all layers together
IMAGE_ENTRIES = 8_000_000
LAYER = 64 * GIB  # uncompressed
LAYER_ENTRIES = 2_000_000
LAYER_DIRECTORIES = 500_000  # their attributes are held in memory until the layer ends
# Bytes of names, links and folders' xattrs that a layer keeps in memory. 2,000,000 entries with names
# of 128 bytes each, so many, make a worker of 550 MiB, of 815 MiB where one folder has them all.
LAYER_NAMES = 256 * MIB
LAYER_LINK_STEPS = 8_000_000  # folders walked through because of links, over a whole layer
LAYER_ENTRY_STEPS = 4096  # the same, over one entry
FILE = (1 << 44) - 4096  # with its holes: the largest that ext4 holds, so that no host decides
DIFFERENCES = 1000  # told of one snapshot that is not as its layer made it; the rest is like them
SPARSE_PARTS = 1 << 20  # of one file, as in Go's archive/tar
# Of gzip, xz or bzip2 in a row that may be small; beyond that each must give 512 bytes on average.
STREAMS = 1024
AFTER_END = 1 * MIB  # bytes after the end of a layer's archive
EXTENSION = 1 * MIB  # one pax or GNU long-name header, as in Go's archive/tar
EXTENSIONS_IN_ROW = 16
PAX_RECORDS = 160  # per entry, on average over an archive: XATTRS and the 20 or so that bsdtar writes
PATH_DEPTH = 512
NAME = 255
LINK_TARGET = 4095
LINKS_FOLLOWED = 255
XATTRS = 128
XATTR_BYTES = 64 * 1024  # names and values of one file together
ZSTD_WINDOW = 128 * MIB
XZ_MEMORY = 128 * MIB  # to unpack an archive; what `xz -9` packs takes 65 MiB

# What an image wants to be run with.
RUN_WORDS = 10_000  # its environment and command
RUN_BYTES = 1 * MIB  # of these
RUN_VOLUMES = 200
RUN_PORTS = 3 << 16  # exposed
RUN_LABELS = 10_000
RUN_LABEL_BYTES = 4 * MIB
ACCOUNTS = 10 * MIB  # `/etc/passwd` or `/etc/group` of a root file system, as in containerd
ACCOUNT_GROUPS = 1 << 16  # of one user
INSIDE_PATH = 4000  # bytes of a path within a root file system
INSIDE_STEPS = 512  # names looked up for one such path, those that links add among them

COLLECT_WAIT_S = 30  # for another collection of the same namespace that does not get on
FLUSH_EVERY_S = 0.5  # while layers are written; between two flushes, however long one takes
FLUSH_AFTER_S = 60.0  # what was not flushed; the kernel has written it by then (30 s by default)
RECOVERY_S = 5.0  # seconds that whoever opens a store after a crash puts it in order for, at most
VERIFIED_PAGES = 1 << 24  # of an LMDB file, 64 GiB: two bytes of memory for each
INGEST_LIFE_S = 24 * 3600  # of an ingest that nobody writes, as in containerd
FILTER = 10_000  # characters of one filter, a regular expression in it among them; from a caller
PULLERS = 100  # credentials of which it is noted that they got an image: those that did so last
LEASE_LIFE_S = 24 * 3600  # of a lease whose maker does not say, as in containerd
KNOWN_IMAGES = 20_000  # of which it is remembered what their documents say, 1 KiB each
REMOVE_DELAY_S = 180.0  # from an image's last release to its removal, as in Nomad
MONITOR_ENDS_S = 20  # after all processes of its container were killed
CONTAINER_LOOK_S = 0.05  # between two looks at a container that another makes or removes, at most
PULLS = 8  # of different images at once, for those who hold them
PULL_STALL_S = 300.0  # of a pull without progress, as in containerd's CRI
# That the time of day may be ahead or behind of what passed: beyond, it was set anew,
CLOCK_DRIFT_S = 60
CLOCK_GRACE_S = 900  # and nothing expires for so long
EVENTS = 10_000  # that wait for one who listens; he is told how many he missed
USE_NOTED_S = 60  # between two notes that an image was used
POLICY_EVERY_S = 300  # between two tries to free a full disk, as in kubelet

LOG = 10 * MIB  # of what a container writes, in each of two files
LOG_LINE = 64 * 1024  # of what a container writes, that is joined to one line
CLIENTS = 64  # that are sent what a container writes
CLIENT_BEHIND = 256 * 1024  # of what a container writes, held for a client; then the container waits
STDIN_AHEAD = 256 * 1024  # of what a client writes to a container, held until that reads it
RUNTIME_S = 60.0  # for a command of an OCI runtime
START_GRACE_S = 2.0  # for a runtime to end whose start nobody waits for any more
LAST_OUTPUT_S = 2.0  # after a container's end, while someone outside holds its output open
LAST_OUTPUT = 4 * MIB  # read of it then
CGROUP_EMPTY_S = 10.0  # for killed processes to leave their cgroup
FAREWELL_S = 10.0  # after a container's end, for clients but the first to take what it wrote last

# What a registry decides.
CHALLENGE = 16 * 1024  # characters of what a host asks for credentials with
CHALLENGE_PARAMETERS = 64
TOKEN = 1 * MIB  # a token server's answer
TOKEN_LIFE_S = 60  # at least, whatever it says: the distribution spec's default
TOKEN_LIFE_MOST_S = 24 * 3600
ERROR_BODY = 64 * 1024  # read of an answer that is an error
REDIRECTS = 5
TARGET = 64 * 1024  # characters of a URL that an answer names
HOSTS = 16  # of which idle connections are kept
ATTEMPTS = 5  # of one request, and of a blob that hardly gets on
RETRY_AFTER_S = 60  # the longest that a host may have us wait; beyond that it is unavailable
CONNECT_S = 30
PINNED_S = 300  # that the addresses of a name are not asked for anew
ANSWER_S = 30  # from the request to the header of an answer, as in containerd
FINISH = 10 * MIB  # a second, of an upload that a host hashes or moves before it answers to the end
PROGRESS_BYTES = 64 * 1024  # of a body that is on its way, in each
PROGRESS_S = 60
FETCHES = 12  # bodies of blobs at once, of an engine; each has at most two batches of 8 MiB in memory
FETCHES_OF_HOST = 8
FETCHES_OF_IMAGE = 6
RANGES_FROM = 32 * MIB  # bytes of a blob that are missing; fewer are asked for at once
RANGE = 4 * MIB  # of a blob that is asked for in several ranges; of each so much is in memory
RANGE_RATE = 25 * MIB  # bytes a second of one connection from which on others are no gain
RANGE_ALONE = 64 * MIB
PUSH_WHOLE = 1 * MIB  # sent in one request with the end of its upload; one that breaks off begins anew
PUSH_PART = 32 * MIB  # sent at once to a host, or a proxy before it, that does not take more
DOCUMENTS = 128 * MIB  # manifests and indexes of all of an image, in memory at once
REFERRERS = 1000
REFERRER_PAGES = 100
CREDENTIALS_FILE = 1 * MIB
CREDENTIAL_PROGRAM_S = 30
