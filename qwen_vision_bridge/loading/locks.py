"""One lock around everything that is global to a process while a model is loaded, hooked or run.

Hooks and replaced methods sit on modules that threads share, diffusers' image sizes and transformers'
attention functions are module state, and accelerate's `init_empty_weights` patches `nn.Module` itself.
Whoever touches one of these holds `model_lock`, so calls from several threads wait for each other and none
sees half of another's changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

model_lock = threading.RLock()
"""Re-entrant: a method that holds it may enter context managers that take it again."""


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function while no other thread loads, hooks or runs a model."""

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with model_lock:
            return function(*args, **kwargs)

    return locked


@contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Replace attributes of a module or object inside the `with`; afterwards it is as before.

    A value that is derived from the attribute's present one must be computed while `model_lock` is held.
    """
    with model_lock:
        before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
        try:
            for name, value in attributes.items():
                setattr(owner, name, value)
            yield
        finally:
            for name in attributes.keys() & vars(owner).keys():
                if name in before:
                    setattr(owner, name, before[name])
                else:
                    delattr(owner, name)  # the class's own applies again
