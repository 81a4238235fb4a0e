"""Replacing a function of a trainer only where it is the one that is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from masked_loss_triton.errors import UserError


def replace(owner: Any, name: str, expected: tuple[str, ...], tested: str, make: Callable[[Any], Any]) -> None:
    """Puts `make(original)` in place of `owner.name`. A second time is no error and puts the new one in place of the first.

    Args:
        owner: the class or module.
        name: of its function.
        expected: names of the parameters that the drop-in was written for, in order.
        tested: the trainer and the version it was tested with, for the message.

    Raises:
        UserError: where the function is missing or takes other parameters: a version whose loss may mean something else.
    """
    current = getattr(owner, name, None)
    original = getattr(current, "masked_loss_original", current)
    place = f"{getattr(owner, '__name__', owner)}.{name}"
    if not callable(original):
        raise UserError(f"{place} does not exist in this version of the trainer: this drop-in supports {tested}", 2)
    found = tuple(inspect.signature(original).parameters)
    if found != expected:
        raise UserError(f"{place} takes ({', '.join(found)}), not ({', '.join(expected)}): supported is {tested}", 2)
    replacement = make(original)
    replacement.masked_loss_original = original
    setattr(owner, name, replacement)
