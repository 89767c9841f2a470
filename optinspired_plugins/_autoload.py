"""Registration of ``timm_models`` without an import: ``timm.create_model("hbnet50")`` works once this is installed.

torch (2.5 and later) calls the entry points of the group ``torch.backends`` at the end of ``import torch``, and timm
imports torch before its models. ``install`` is such an entry point. It places a finder on ``sys.meta_path`` that finds
``timm.models`` as Python would have, has ``timm_models`` imported right after ``timm.models`` has executed, and then
leaves. ``timm_models`` may therefore import from ``timm`` but not use the finished package (``timm.create_model``) at
its own import.

A fault of ``timm_models`` becomes one RuntimeWarning and never breaks ``import timm`` or ``import torch``.

To switch it off, set ``OPTINSPIRED_AUTOLOAD=0``, or ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` for every entry point of
torch's; ``import timm_models`` then registers the models.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from _thread import get_ident
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

_HOST = "timm.models"
_PLUGIN = "timm_models"
_SWITCH = "OPTINSPIRED_AUTOLOAD"


def install() -> None:
    """Have ``timm_models`` imported once ``timm.models`` is; at once if it already was. Calling it again adds nothing.

    Does nothing if the environment variable ``OPTINSPIRED_AUTOLOAD`` is 0.
    """
    if os.environ.get(_SWITCH) == "0":
        return
    if _is_imported(_HOST):
        _register()
    elif not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())


class _HostFinder:
    """Meta-path finder of ``timm.models`` alone: the spec the other finders give, followed by ``_register``."""

    def __init__(self) -> None:
        self._asking: set[int] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of ``timm.models`` that the other finders give; None for any other name."""
        # A finder that asks the others in its turn gets None from here, or the two would ask each other for ever.
        if fullname != _HOST or get_ident() in self._asking:
            return None
        self._asking.add(get_ident())
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._asking.discard(get_ident())
        if spec is not None:
            self._follow(spec.loader)
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None

    def _follow(self, loader: object) -> None:
        """Shadow ``exec_module`` on this loader object until it has run; its type and other methods stay."""

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # A loader of a zip archive serves many modules.
            if module.__name__ == _HOST:
                vars(loader).pop("exec_module", None)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

        try:
            execute = loader.exec_module  # type: ignore[attr-defined]
            vars(loader).setdefault("exec_module", exec_module)
        except (AttributeError, TypeError):
            return  # A loader without exec_module or attributes of its own: finding timm comes first.


def _is_imported(name: str) -> bool:
    """Whether the module is there and has executed to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _register() -> None:
    """Import ``timm_models``; a fault becomes a warning, because timm works without it."""
    try:
        # Not import_module: where another thread is at it already, that may raise a deadlock error and this does not.
        __import__(_PLUGIN)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    cause = "".join(traceback.format_exception_only(error)).strip()
    message = (
        f"optinspired-plugins could not register its models with timm: {cause} (at {_location(error)}). timm itself "
        f"is not affected. `import {_PLUGIN}` shows the full traceback; {_SWITCH}=0 switches the registration off."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    except Exception:
        # Warnings are errors here (python -W error), and importing timm must not fail for one.
        print(f"RuntimeWarning: {message}", file=sys.stderr)


def _location(error: Exception) -> str:
    """Return file:line of the error's innermost frame outside Python's import machinery."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    location = "unknown"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] != "importlib":
            location = f"{frame.f_code.co_filename}:{line}"
    return location
