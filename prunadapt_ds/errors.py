"""What can go wrong, and the exit code with which each error ends the process (on every rank).

Exit codes: 0 done, 2 user error, 3 parity failure, 4 ranks disagree, 75 stopped with a checkpoint, 130 interrupted without one,
1 anything else.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 4, 20, 10
_SHORT.maxstring = _SHORT.maxother = 300
MOST_CHARACTERS = 1000  # of a remedy, which may quote a cell or another library


@dataclass(frozen=True)
class Problem:
    """One mistake of the user: the field, its value, and what to write instead. As text it is one line of limited length."""

    field: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        remedy = " ".join(self.remedy.split())
        if len(remedy) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            remedy = f"{remedy[:half]} ... {remedy[-half:]}"
        return f"{' '.join(self.field.split())}={_SHORT.repr(self.value)}: {remedy}"


class PrunadaptError(Exception):
    """Base of the errors that end a run with a message instead of a traceback."""

    exit_code = 1


class UserError(PrunadaptError):
    """Something the user can fix. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]):
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def beside(self, work: Callable[[], Any]) -> UserError:
        """This error, together with the problems of the UserError that `work` raises, if it does."""
        try:
            work()
        except UserError as other:
            return UserError((*self.problems, *other.problems))
        return self

    def __reduce__(self) -> Any:  # ranks send errors to each other
        return type(self), (self.problems,)


class LaunchError(UserError):
    """Ranks cannot find each other. Each process sees this alone, before there is a group that could share it."""


class ParityError(PrunadaptError):
    """The exported model does not compute what the trained model computes."""

    exit_code = 3


class Interrupted(PrunadaptError):
    """The run was asked to stop; a checkpoint is written, and the same command goes on from there."""

    exit_code = 75


class RanksDisagree(PrunadaptError):
    """Two ranks hold different values of something that must be the same everywhere."""

    exit_code = 4


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Run the `work` of a program with a single process; returns its exit code, 0 if `work` returns None.

    A PrunadaptError is printed on standard error. Programs with several ranks use `entry.guarded`.
    """
    try:
        return work() or 0
    except PrunadaptError as error:
        print(message(error), file=sys.stderr)
        return error.exit_code


def message(error: PrunadaptError) -> str:
    """What a program prints about an error on standard error: one line, or one per problem under a heading."""
    if isinstance(error, Interrupted):
        return str(error)
    return f"error: {error}" if len(str(error).splitlines()) == 1 else f"errors:\n{error}"
