"""Walks all pages of an LMDB file: each is reachable once or free, in order, and holds what it should.

Sync. The file is read, not mapped, so that no damage of it harms this process.
"""

import os
from typing import cast

from lmdb import verify

from engine import limits
from engine.errors import os_errors
from engine.kv.environment import Environment

__all__ = ["page_troubles"]


def page_troubles(environment: Environment) -> list[str] | None:
    """Return what is wrong with a file's pages, None where that cannot be told.

    That is so if someone writes meanwhile, and of a file that has more pages than are kept account of.
    """
    path, before = environment.path, environment.transactions()
    with os_errors(f"store {path}"):
        if (path / "data.mdb").stat().st_size > limits.VERIFIED_PAGES * environment.page:
            return None
        try:
            found = cast("list[str]", verify.verify(os.fspath(path)))  # type: ignore[no-untyped-call]
        except verify.VerifyError as error:
            found = [str(error)]
    # A transaction writes to free pages, and those are not read.
    return found if environment.transactions() == before else None
