"""A policy: says that it does not know."""

from cmai_fast.arm.policies import policy


@policy("shrug", label="Say that it is unknown")
def shrug(case):
    return case.decision("I do not know", "shrug")
