"""Registration of ``timm_models`` without an import: ``timm.create_model("hbnet50")`` works once this is installed.

torch (2.5 and later) calls the entry points of the group ``torch.backends`` at the end of ``import torch``, and timm
imports torch before its models. ``install`` is one of these entry points.

1. It detects the search for ``timm.models`` in two places: a finder on ``sys.meta_path``, and a hook in
   ``sys.path_hooks`` for the folder of timm. The hook is for finders that other packages put before ours (lazy imports,
   jaxtyping, typeguard).
2. Then it watches the module ``timm``. After ``timm.models`` has been executed, Python sets it as an attribute of
   ``timm``, with any finder and loader.
3. Then ``timm_models`` is imported. This works for every import of timm, also after ``del sys.modules["timm"]``.

``timm_models`` is always the package beside this one, never another package with that name on ``sys.path``. During its
import it may import from ``timm``, but not use the finished package (``timm.create_model``).

An error in ``timm_models`` becomes one RuntimeWarning, and never breaks ``import timm`` or ``import torch``.

To disable the registration, set ``OPTINSPIRED_AUTOLOAD`` to 0, false, off or no, or ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``
for all entry points of torch; ``import timm_models`` then registers the models.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["install"]

_HOST = "timm.models"
_PARENT, _, _ATTRIBUTE = _HOST.partition(".")
_PLUGIN = "timm_models"
_SWITCH = "OPTINSPIRED_AUTOLOAD"
_OFF = ("0", "false", "off", "no")
_OLDEST_TIMM = "1.0.22"  # as in pyproject.toml

# timm.models.is_model of the timm that has our models: it differs after a new import of timm.
_registered_with: object = None


def install() -> None:
    """Import ``timm_models`` after the import of ``timm.models``, or now if that is already imported.

    Repeated calls have no effect. ``OPTINSPIRED_AUTOLOAD`` set to 0, false, off or no disables it, in upper or lower
    case.
    """
    if os.environ.get(_SWITCH, "").strip().lower() in _OFF:
        return
    if not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HostFinder())
        sys.path_hooks.insert(0, _find_in_folder)
        for path in [path for path in sys.path_importer_cache if os.path.basename(path) == _PARENT]:
            del sys.path_importer_cache[path]  # timm imports torch, so its folder was searched before the hook existed
    host = sys.modules.get(_HOST)
    if getattr(getattr(host, "__spec__", None), "_initializing", False):  # it is still being executed
        _watch()
    elif host is not None:
        _register()


class _HostFinder:
    """Meta-path finder that finds nothing, and detects the search for ``timm.models``."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Return None."""
        if fullname == _HOST:
            _watch()


def _find_in_folder(path: str) -> Any:
    """Return the finder of the other path hooks for a folder ``timm``, made to detect ``timm.models``."""
    if os.path.basename(path) != _PARENT:
        raise ImportError(f"path={path!r}: must be a folder called {_PARENT}")
    for hook in sys.path_hooks:
        try:
            finder = hook(path) if hook is not _find_in_folder else None
        except ImportError:
            continue
        if finder is not None:
            return _watching(finder)
    raise ImportError(f"path={path!r}: no finder")


def _watching(finder: Any) -> Any:
    """Replace ``find_spec`` of one finder object, if it allows attributes."""

    def find_and_watch(fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == _HOST:
            _watch()
        return find_spec(fullname, target)

    try:
        find_spec = finder.find_spec
        finder.find_spec = find_and_watch
    except AttributeError:
        pass  # importing timm is more important
    return finder


class _Watched(ModuleType):
    """Base class of the module ``timm`` until it has the attribute ``timm.models``."""


def _watch() -> None:
    """Call ``_register`` when the module ``timm`` gets the attribute ``timm.models``."""
    module = sys.modules.get(_PARENT)
    kind: Any = type(module)
    if not issubclass(kind, ModuleType) or issubclass(kind, _Watched):
        return

    class Watched(_Watched):
        def __setattr__(self, name: str, value: object) -> None:
            kind.__setattr__(self, name, value)
            if name == _ATTRIBUTE:
                self.__class__ = kind
                _register()

    with suppress(TypeError):  # a class with another layout; importing timm is more important
        module.__class__ = Watched


def _register() -> None:
    """Import ``timm_models``; an error becomes a warning, because timm works without it."""
    try:
        _import_plugin()
    except (Exception, SystemExit) as error:
        _warn(error)


def _import_plugin() -> None:
    """Import the ``timm_models`` beside this package, and reimport it for a new import of timm.

    Raises:
        ImportError: there is none, or another module has this name.
    """
    global _registered_with
    current = getattr(sys.modules.get(_HOST), "is_model", None)
    spec = _plugin_spec()
    module = sys.modules.get(_PLUGIN)
    if module is not None and os.path.realpath(_file_of(module)) != os.path.realpath(str(spec.origin)):
        raise ImportError(f"another module is called {_PLUGIN}: {_file_of(module)}")
    if _registered_with is not None and _registered_with is not current:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PLUGIN]:
            del sys.modules[name]
    _registered_with = current
    finder = _PluginFinder()
    sys.meta_path.insert(0, finder)
    try:
        # Not import_module: it may raise a deadlock error if another thread is importing the package.
        __import__(_PLUGIN)
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class _PluginFinder:
    """Meta-path finder of the package ``timm_models`` beside this one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of ``timm_models``; None for any other name."""
        return _plugin_spec() if fullname == _PLUGIN else None


def _plugin_spec() -> ModuleSpec:
    folder = os.path.dirname(os.path.dirname(__file__))  # or a zip archive
    spec = PathFinder.find_spec(_PLUGIN, [folder])
    if spec is None or spec.origin is None:  # a folder without __init__.py has no origin
        raise ModuleNotFoundError(f"there is no package {_PLUGIN} in {folder}")
    return spec


def _file_of(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "unknown")


def _warn(error: BaseException) -> None:
    cause = "".join(traceback.format_exception_only(error)).strip()
    message = (
        f"optinspired-plugins could not register its models with timm: {cause} (at {_location(error)}){_old_timm()}. "
        f"timm itself is not affected. `import {_PLUGIN}` shows the full traceback; {_SWITCH}=0 switches the "
        "registration off."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    except Exception:
        # Warnings are errors (python -W error), and importing timm must not fail.
        print(f"RuntimeWarning: {message}", file=sys.stderr)


def _old_timm() -> str:
    """Return a note if timm is older than pyproject.toml allows, else an empty string."""
    installed = str(getattr(sys.modules.get(_PARENT), "__version__", ""))
    versions = installed, _OLDEST_TIMM
    numbers = [[int(part) for part in version.split(".")[:3] if part.isdigit()] for version in versions]
    if not numbers[0] or numbers[0] >= numbers[1]:
        return ""
    return f"; timm {installed} is installed, and {_OLDEST_TIMM} or later is needed"


def _location(error: BaseException) -> str:
    """Return file:line of the error's innermost frame outside Python's import machinery."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    location = "unknown"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] != "importlib":
            location = f"{frame.f_code.co_filename}:{line}"
    return location
