"""``features_only`` networks whose checkpointing is the stages' own.

timm's wrappers checkpoint their children as a whole, so that every batch counts twice in the running statistics, and
know nothing of the memory-saving forms of our stages. These classes take their place, also where ``feature_cls`` names
one of timm's.
"""

# No postponed annotations here: TorchScript reads the types of arguments.

from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from optinspired_plugins.memory.recompute import recompute

from ._checks import check_one_of
from ._conversions import KeepsActivations
from ._host import build_model

__all__ = ["DictFeatures", "GetterFeatures", "GraphFeatures", "HookFeatures", "ListFeatures", "build_with_features"]


class _StagesOwn(KeepsActivations, nn.ModuleDict):
    """Checkpointing for a wrapper that calls its children in order.

    It switches the children's own forms, and computes again what the stem has behind its last convolution.
    """

    recompute_stem: bool = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward, as the whole network's ``set_grad_checkpointing`` does."""
        self.recompute_stem = enable
        for child in self.children():
            whole: Any = getattr(child, "set_grad_checkpointing", None)
            if whole is not None:
                whole(enable)
                continue
            for module in child.modules():
                if hasattr(module, "grad_checkpointing"):
                    module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def _run(self, x: Tensor, wanted: Sequence[str]) -> Iterator[Tuple[str, Tensor]]:
        """Yield outputs of children by name, at least those that are wanted."""
        start, end = self._stem_tail() if self.recompute_stem and torch.is_grad_enabled() else (0, 0)
        tail: List[nn.Module] = []
        for i, (name, child) in enumerate(self.named_children()):
            if not start <= i < end:
                x = child(x)
                yield name, x
                continue
            tail.append(child)
            if i == end - 1 or name in wanted:
                x = _recompute_chain(tail, x)
                tail = []
                yield name, x

    def _stem_tail(self) -> Tuple[int, int]:
        """Return where what the stem has behind its last convolution begins and ends, (0, 0) for nothing."""
        children = list(self.children())
        is_stage = [any(hasattr(m, "grad_checkpointing") for m in child.modules()) for child in children]
        end = is_stage.index(True) if any(is_stage) else len(children)
        convolutions = [i for i in range(end) if any(isinstance(m, nn.Conv2d) for m in children[i].modules())]
        start = convolutions[-1] + 1 if convolutions else end
        return (start, end) if start < end else (0, 0)


def _recompute_chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, keeping x alone. What a single one keeps is its input."""
    if len(modules) == 1:
        return modules[0](x)
    chain = nn.Sequential(*modules)
    return recompute(chain, chain, x)


class DictFeatures(_StagesOwn, FeatureDictNet):
    """timm's ``FeatureDictNet``."""

    return_layers: Dict[str, str]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.recompute_stem = bool(getattr(model, "recompute_stem", False))

    def _collect(self, x: Tensor) -> Dict[str, Tensor]:
        if not torch.jit.is_scripting():
            return self._collected(x)
        out: Dict[str, Tensor] = {}
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out

    @torch.jit.ignore
    def _collected(self, x: Tensor) -> Dict[str, Tensor]:
        steps = self._run(x, list(self.return_layers))
        return OrderedDict((self.return_layers[name], y) for name, y in steps if name in self.return_layers)


class ListFeatures(DictFeatures, FeatureListNet):
    """timm's ``FeatureListNet``."""


class HookFeatures(_StagesOwn, FeatureHookNet):
    """timm's ``FeatureHookNet``."""

    feature_info: Any
    hooks: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.hooked = [name.replace(".", "_") for name in self.feature_info.module_name()]
        self.recompute_stem = bool(getattr(model, "recompute_stem", False))

    def forward(self, x: Tensor) -> Any:
        """Return the features, as a list or by index."""
        device = x.device
        self.hooks.get_output(device)  # what a cell that was computed again has left there
        for _ in self._run(x, self.hooked):
            pass
        out = self.hooks.get_output(device)
        return out if self.return_dict else list(out.values())


class GetterFeatures(FeatureGetterNet):
    """timm's ``FeatureGetterNet``, which has no checkpointing."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward, as the network in it does."""
        self.model.set_grad_checkpointing(enable)


class GraphFeatures(KeepsActivations, FeatureGraphNet):
    """timm's ``FeatureGraphNet``, which has no stages left that could be computed again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():  # the forms that memory="reversible" takes without gradients have a graph
            super().__init__(*args, **kwargs)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """ValueError unless ``enable`` is False."""
        if enable:
            raise ValueError("feature_cls='fx' with checkpointing: a graph has no stages; pass another feature_cls")


CLASSES: Dict[str, Any] = {
    "list": ListFeatures,
    "dict": DictFeatures,
    "getter": GetterFeatures,
    "fx": GraphFeatures,
    "hook": HookFeatures,
}
TIMMS: Dict[str, Any] = {
    "list": FeatureListNet,
    "dict": FeatureDictNet,
    "getter": FeatureGetterNet,
    "fx": FeatureGraphNet,
    "hook": FeatureHookNet,
}


def build_with_features(
    model_cls: Any,
    variant: str,
    pretrained: bool = False,
    feature_indices: Sequence[int] = (0, 1, 2, 3, 4),
    flatten_sequential: bool = False,
    is_chain: bool = True,
    **kwargs: Any,
) -> Any:
    """Return timm's ``build_model_with_cfg`` of a network, with ``features_only`` a wrapper of this module.

    Args:
        model_cls: the network.
        variant: its name in timm.
        pretrained: load weights.
        feature_indices: the default of ``out_indices``.
        flatten_sequential: the stages are the children of a ``Sequential``.
        is_chain: each child's only input is the output of the one before; else there is no ``"list"`` and ``"dict"``.
        **kwargs: timm's and the network's.

    Raises:
        ValueError: ``feature_cls`` is none that the network has; nothing was allocated.
    """
    feature_cfg: Dict[str, Any] = {}
    if kwargs.get("features_only"):
        wrapper = _wrapper(kwargs.pop("feature_cls", None), model_cls, is_chain)
        feature_cfg = dict(out_indices=feature_indices, feature_cls=wrapper)
        if flatten_sequential and isinstance(wrapper, type) and issubclass(wrapper, (FeatureDictNet, FeatureHookNet)):
            feature_cfg["flatten_sequential"] = True
    return build_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _wrapper(chosen: Any, model_cls: Any, is_chain: bool) -> Any:
    """Return the class for a ``feature_cls``; one that is not timm's is taken as it is."""
    if chosen is None:
        chosen = "list" if is_chain else "getter"
    chosen = next((name for name, timms in TIMMS.items() if timms is chosen), chosen)
    if not isinstance(chosen, str):
        return chosen
    possible = [name for name in CLASSES if is_chain or name not in ("list", "dict")]
    if not hasattr(model_cls, "forward_intermediates"):  # of an older timm's DenseNet
        possible.remove("getter")
    check_one_of("feature_cls", chosen.lower(), possible)
    return CLASSES[chosen.lower()]
