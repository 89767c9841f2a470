"""What timm's own code would answer by naming its classes or by an assertion, answered in a user's terms."""

from __future__ import annotations

import inspect
from typing import Any, List, Optional, Set, Tuple, Type, TypeVar, Union

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ._checks import check_feature_indices, check_one_of

__all__ = ["build_model", "checks_features"]

Model = TypeVar("Model", bound=Type[nn.Module])


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
