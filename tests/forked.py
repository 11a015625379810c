"""Work in a process of its own that has imported already what this one has: an import takes longer than most work."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What `work()` returns, which JSON must be able to say; whatever else it changes stays in the fork."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with open(write, "w") as answer:
                answer.write(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as answer:
        said = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "the fork failed; its traceback is in what the test printed"
    return json.loads(said)


def together(work: Callable[[], Any], count: int) -> list[int]:
    """The exit codes of `count` forks that call `work()` with the environment that `torchrun` gives its processes, and
    that are stopped as there if one of them fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children: dict[int, int] = {}
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # the usual way aborts now and then: a thread of gloo's is still there
        children[child] = rank
    codes = [0] * count
    left = dict(children)
    while left:
        child, status = os.wait()
        codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes
