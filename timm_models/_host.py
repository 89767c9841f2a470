"""timm's registry, its builder, and the config.json of its models."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from typing import Any, Callable, Dict, Mapping, Optional, Set, TypeVar

from timm.models import build_model_with_cfg, is_model, model_entrypoint
from timm.models import register_model as register_with_timm
from torch import nn

__all__ = ["SavesArguments", "build_model", "refuse_module_from_config", "register_all", "register_model"]

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])

PACKAGE = __name__.partition(".")[0]

# Entry points by name, collected until all are defined; None once they are registered.
_waiting: Optional[Dict[str, Callable[..., nn.Module]]] = {}


def register_model(entry_point: EntryPoint) -> EntryPoint:
    """Collect an entry point for :func:`register_all`."""
    if _waiting is None:  # the module is being reloaded
        register_with_timm(entry_point)
    else:
        _waiting[entry_point.__name__] = entry_point
    return entry_point


def register_all() -> None:
    """Register the entry points with timm.

    A name that another package has registered stays with that package, and a warning is given. It comes before any
    registration, so that none is made where warnings are errors.
    """
    global _waiting
    owners = {name: model_entrypoint(name).__module__ for name in _waiting or {} if is_model(name)}
    conflicts = {name: owner for name, owner in owners.items() if owner.partition(".")[0] != PACKAGE}
    if conflicts:
        names = ", ".join(f"{name} (of {owner})" for name, owner in conflicts.items())
        warnings.warn(f"timm has other models under names of {PACKAGE}, and keeps them: {names}", stacklevel=2)
    entry_points, _waiting = _waiting or {}, None
    for name, entry_point in entry_points.items():
        if name not in conflicts:
            register_with_timm(entry_point)


_NO_ARGUMENTS: Mapping[str, Any] = {}


class SavesArguments:
    """Base of a network that saves its arguments as data.

    From 1.0.31 on timm sets ``_model_args`` to the caller's arguments, and ``save_for_hf`` writes them into the config
    from which ``local-dir:`` and ``hf-hub:`` build the network. The entries of ``saved_args`` replace them.
    """

    __jit_unused_properties__ = ["_model_args"]
    saved_args = _NO_ARGUMENTS  # not annotated: TorchScript would then ignore the annotations of the subclasses

    @property
    def _model_args(self) -> Dict[str, Any]:
        return {**self.__dict__.get("caller_args", {}), **self.saved_args}

    @_model_args.setter
    def _model_args(self, arguments: Mapping[str, Any]) -> None:
        self.caller_args = dict(arguments)


# True where timm passes the arguments of a config separately; older versions mix them with the caller's.
_CONFIG_IS_SEPARATE = "pretrained_model_args" in inspect.signature(build_model_with_cfg).parameters


def refuse_module_from_config(name: str, kwargs: Mapping[str, Any]) -> None:
    """ValueError if an argument from a config.json would import a module.

    Such a config comes with a model from ``local-dir:`` or ``hf-hub:``.

    Args:
        name: the argument.
        kwargs: the keyword arguments that timm's ``create_model`` passes to an entry point.
    """
    value = kwargs.get(name)
    if not isinstance(value, str) or ":" not in value:
        return
    if _CONFIG_IS_SEPARATE:
        # Identity: an equal string that the caller passed is trusted.
        refused = (kwargs.get("pretrained_model_args") or {}).get(name) is value
        advice = f"if you trust the module, pass {name}={value!r} yourself"
    else:
        cfg = kwargs.get("pretrained_cfg")
        refused = isinstance(cfg, Mapping) and cfg.get("source") in ("local-dir", "hf-hub")
        advice = f"if you trust the module, pass an object as {name}"
    if refused:
        raise ValueError(f"{name}={value!r}: must not name a module in a model's config.json; {advice}")


def build_model(model_cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a model with timm's ``build_model_with_cfg``.

    Raises:
        TypeError: the class does not have an argument; the message names the variant and the arguments it takes.
    """

    def construct(**arguments: Any) -> nn.Module:
        allowed = _arguments(model_cls)
        unknown = sorted(arguments.keys() - allowed)
        if unknown:
            raise TypeError(f"{variant}: unknown argument {', '.join(unknown)}; it takes {', '.join(sorted(allowed))}")
        return model_cls(**arguments)

    return build_model_with_cfg(construct, variant, pretrained, **kwargs)


def _arguments(model_cls: type) -> Set[str]:
    """Return the keyword arguments of a class and its bases."""
    names: Set[str] = set()
    for cls in model_cls.__mro__:
        names |= {field.name for field in fields(cls.__dict__["rule_class"])} if "rule_class" in cls.__dict__ else set()
        if "__init__" in cls.__dict__:
            parameters = list(inspect.signature(cls.__dict__["__init__"]).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return names
