"""Callables by name, "module:attribute": how a value can say what a worker process has to call.

Sync (it imports). Names come from backends, never from an image.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from engine.errors import NotSupported

__all__ = ["named"]


def named(name: str) -> Callable[..., Any]:
    """Return the callable of that name. Raises NotSupported where it cannot be loaded."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), attribute)
        return found
    except Exception as error:  # anyone's package may be broken
        raise NotSupported(f"{name} cannot be loaded: {error}") from error
