"""Power cuts, page by page: every state that LMDB's files could be left in, opened and checked.

`workload` does things to a store under strace, `trace` reads what it wrote, `disk` builds what a cut
leaves of that, `checking` opens it. `python -m tests.power --images 100000` sees more than the suite.
"""
