"""How the networks meet timm: its registry, its builder, the config.json that it writes and reads, its features."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple, Type, TypeVar, Union

from timm.models import build_model_with_cfg, is_model, model_entrypoint
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from ._checks import check_feature_indices, check_one_of

__all__ = [
    "SavesArguments",
    "build_model",
    "check_is_no_module_of_a_config",
    "checks_features",
    "register_all",
    "register_model",
]

Model = TypeVar("Model", bound=Type[nn.Module])
EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])

PACKAGE = __name__.partition(".")[0]

# Entry points by name that wait for the last of them to be defined; None once they are registered.
_waiting: Optional[Dict[str, Callable[..., nn.Module]]] = {}


def register_model(entry_point: EntryPoint) -> EntryPoint:
    """Decorator of an entry point: timm's, once :func:`register_all` is called. So timm knows all names or none."""
    if _waiting is None:  # somebody reloads the module
        register_with_timm(entry_point)
    else:
        _waiting[entry_point.__name__] = entry_point
    return entry_point


def register_all() -> None:
    """Register the entry points with timm. A name that another package has is left to it, with a warning before.

    Where the warning is an error, none is registered.
    """
    global _waiting
    owners = {name: model_entrypoint(name).__module__ for name in _waiting or {} if is_model(name)}
    taken = {name: owner for name, owner in owners.items() if owner.partition(".")[0] != PACKAGE}
    if taken:
        names = ", ".join(f"{name} (of {owner})" for name, owner in taken.items())
        warnings.warn(f"timm has other models under names of {PACKAGE}, and keeps them: {names}", stacklevel=2)
    entry_points, _waiting = _waiting or {}, None
    for name, entry_point in entry_points.items():
        if name not in taken:
            register_with_timm(entry_point)


_NO_ARGUMENTS: Mapping[str, Any] = {}


class SavesArguments:
    """Base of a network: timm saves data in the place of the files and objects that it was made from.

    From 1.0.31 on timm sets ``_model_args`` to the arguments as they were given, and ``save_for_hf`` writes them into
    the config from which ``local-dir:`` and ``hf-hub:`` make the network again. Those in ``own_args`` replace them.
    """

    __jit_unused_properties__ = ["_model_args"]
    own_args = _NO_ARGUMENTS  # not annotated: TorchScript would take the annotations of this class alone

    @property
    def _model_args(self) -> Dict[str, Any]:
        return {**self.__dict__.get("given_args", {}), **self.own_args}

    @_model_args.setter
    def _model_args(self, arguments: Mapping[str, Any]) -> None:
        self.given_args = dict(arguments)


# timm says which arguments a config has; an older one mixes them with the caller's.
_SAYS_WHICH = "pretrained_model_args" in inspect.signature(build_model_with_cfg).parameters


def check_is_no_module_of_a_config(name: str, kwargs: Mapping[str, Any]) -> None:
    """ValueError if an argument would import a module, and is from the config.json of ``local-dir:`` or ``hf-hub:``.

    Args:
        name: the argument.
        kwargs: what timm's ``create_model`` gives an entry point.
    """
    value = kwargs.get(name)
    if not isinstance(value, str) or ":" not in value:
        return
    if _SAYS_WHICH:
        # The same object: a caller who gives an equal string has seen it.
        refused = (kwargs.get("pretrained_model_args") or {}).get(name) is value
        advice = f"if you trust the module, pass {name}={value!r} yourself"
    else:
        cfg = kwargs.get("pretrained_cfg")
        refused = isinstance(cfg, Mapping) and cfg.get("source") in ("local-dir", "hf-hub")
        advice = f"if you trust the module, pass an object as {name}"
    if refused:
        raise ValueError(f"{name}={value!r}: must not name a module in a model's config.json; {advice}")


def build_model(model_cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """Return timm's ``build_model_with_cfg`` of the arguments.

    Raises:
        TypeError: an argument that is left for the class is none of it; the message names the model asked for.
    """

    def construct(**arguments: Any) -> nn.Module:
        allowed = _arguments(model_cls)
        unknown = sorted(arguments.keys() - allowed)
        if unknown:
            raise TypeError(f"{variant}: unknown argument {', '.join(unknown)}; it takes {', '.join(sorted(allowed))}")
        return model_cls(**arguments)

    return build_model_with_cfg(construct, variant, pretrained, **kwargs)


def _arguments(model_cls: type) -> Set[str]:
    """The keyword arguments of a class, and of the next one for as long as they are passed on."""
    found: Set[str] = set()
    for cls in model_cls.__mro__:
        if "__init__" in cls.__dict__:
            parameters = list(inspect.signature(cls.__dict__["__init__"]).parameters.values())[1:]
            found |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return found


def checks_features(cls: Model) -> Model:
    """Class decorator: an index of a feature out of range is a ``ValueError``, as everywhere here.

    What the host's class does not have stays away: timm 1.0.22's DenseNet has no intermediates.
    """
    forward, prune = (getattr(cls, name, None) for name in ("forward_intermediates", "prune_intermediate_layers"))

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Return timm's features and intermediates; ValueError for an index or a format out of range."""
        check_one_of("output_fmt", output_fmt, ("NCHW",))
        check_feature_indices(indices, len(self.feature_info))
        return forward(self, x, indices, norm, stop_early, output_fmt, intermediates_only)  # type: ignore[misc]

    def prune_intermediate_layers(
        self: Any, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drop what timm drops behind the last chosen intermediate; ValueError for an index out of range."""
        check_feature_indices(indices, len(self.feature_info))
        return prune(self, indices, prune_norm, prune_head)  # type: ignore[misc]

    for host, method in ((forward, forward_intermediates), (prune, prune_intermediate_layers)):
        if host is not None:
            setattr(cls, method.__name__, method)
    return cls
