"""What starts containers is started once: a Python of one's own for each would take longer than runc."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import trio

from engine.running.monitors import open_monitors
from tests.monitors.monitored import Bundle
from tests.processes import until

pytestmark = pytest.mark.root


def _has_ended(bundle: Bundle) -> bool:
    return not bundle.running()


def test_one_reaper_starts_one_after_the_other(bundle: Callable[..., Bundle]):
    async def work() -> None:
        async with open_monitors() as monitors:
            monitors.prepare()
            reaper = monitors._reaper
            assert reaper
            for _ in range(3):
                one = bundle("/bin/true")
                await monitors.start(one.launch)
                await trio.to_thread.run_sync(until, partial(_has_ended, one))
                one.delete()
                # It waits for the next, also while there is none.
                assert monitors._reaper is reaper
                assert os.waitpid(reaper._pid, os.WNOHANG) == (0, 0)  # noqa: ASYNC222  it does not wait

    trio.run(work)
