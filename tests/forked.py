"""Work in a process of its own that has imported already what this one has: an import takes longer than most work."""

from __future__ import annotations

import json
import os
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
