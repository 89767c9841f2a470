"""Feature maps: ``features_only``, ``forward_intermediates`` and ``prune_intermediate_layers`` of all networks.

timm's ``features_only`` wrappers checkpoint each child completely. Every batch then counts twice in the running
statistics, and the memory-saving forms of our stages are not used. The wrappers here take their place, also where
``feature_cls`` names one of timm's: they switch on the checkpointing of the stages.
"""

# No postponed annotations here: TorchScript reads the types of arguments.

from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.models import FeatureDictNet, FeatureGraphNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from optinspired_plugins._checks import check_one_of

from ._conversions import KeepsActivations
from ._host import build_model
from .stages.stem import is_reversible, recompute_chain

__all__ = [
    "DictFeatures",
    "GetterFeatures",
    "GraphFeatures",
    "HookFeatures",
    "Intermediates",
    "ListFeatures",
    "build_with_features",
]


class Intermediates:
    """Base of a network: timm's methods for intermediate feature maps.

    A network defines :meth:`feature_maps` and :meth:`cut`; with a final normalisation that is not part of the last map,
    also :meth:`normalise` and :meth:`drop_norm`.
    """

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the maps of ``feature_info``, in order."""
        raise NotImplementedError

    def cut(self, last: int) -> None:
        """Remove the layers after feature map ``last``."""
        raise NotImplementedError

    def normalise(self, x: Tensor) -> Tensor:
        """Return the features from the last feature map."""
        return x

    def drop_norm(self) -> None:
        """Remove what :meth:`normalise` does."""

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Return the features and the chosen intermediates.

        Intermediate 0 is the stem's, the others are the stages' or blocks'.

        Args:
            x: images.
            indices: the last n if an int, all if None, else a list of positions, which may be negative.
            norm: apply the final normalisation to the last intermediate, if it is not part of it.
            stop_early: stop at the last chosen intermediate, which is then returned as the features.
            output_fmt: ``"NCHW"``.
            intermediates_only: leave the features out.

        Raises:
            ValueError: an index or the format is out of range.
        """
        check_one_of("output_fmt", output_fmt, ("NCHW",))
        positions = check_feature_indices(indices, len(self.feature_info))
        features, intermediates = x, []
        for i, features in enumerate(self.feature_maps(x)):
            is_last = i == len(self.feature_info) - 1
            before, features = features, self.normalise(features) if is_last else features
            if i in positions:
                intermediates.append(features if norm else before)
            if stop_early and i == max(positions):
                break
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self: Any, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the layers after the last chosen intermediate, and the head; return the remaining indices.

        Args:
            indices: as for :meth:`forward_intermediates`.
            prune_norm: remove the final normalisation, if it is not part of the last intermediate. It goes in any case
                if a layer before it goes.
            prune_head: remove the classifier also where no other layer is removed.

        Raises:
            ValueError: an index is out of range.
        """
        positions = check_feature_indices(indices, len(self.feature_info))
        last = max(positions)
        is_cut = last < len(self.feature_info) - 1
        if is_cut:
            self.cut(last)
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if is_cut or prune_norm:
            self.drop_norm()
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return positions


def check_feature_indices(indices: Optional[Union[int, List[int]]], count: int) -> List[int]:
    """Return feature indices as non-negative positions; ValueError unless they are in range.

    An int n stands for the last n positions, and ``None`` for all.
    """
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if isinstance(indices, bool) or not 1 <= indices <= count:
            raise ValueError(f"indices={indices!r}: must be an integer from 1 to {count}, or a list of positions")
        return list(range(count - indices, count))
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"indices={indices!r}: must be integers from {-count} to {count - 1}, at least one")
    return [i % count for i in indices]


class _StageCheckpointing(KeepsActivations, nn.ModuleDict):
    """Checkpointing for a wrapper that calls its children in order.

    It switches on the checkpointing of each child, and recomputes the part of the stem after its last convolution.
    """

    recompute_stem: bool = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as the network's ``set_grad_checkpointing`` does."""
        self.recompute_stem = enable
        for child in self.children():
            of_child: Any = getattr(child, "set_grad_checkpointing", None)
            if of_child is not None:
                of_child(enable)
                continue
            for module in child.modules():
                if hasattr(module, "grad_checkpointing"):
                    module.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def _outputs(self, x: Tensor, names: Sequence[str]) -> Iterator[Tuple[str, Tensor]]:
        """Yield outputs of children by name, at least those in ``names``."""
        is_saving = self.recompute_stem or any(is_reversible(child) for child in self.children())
        start, end = self._stem_tail() if is_saving and torch.is_grad_enabled() else (0, 0)
        tail: List[nn.Module] = []
        for i, (name, child) in enumerate(self.named_children()):
            if not start <= i < end:
                x = child(x)
                yield name, x
                continue
            tail.append(child)
            if i == end - 1 or name in names:
                x = recompute_chain(tail, x)
                tail = []
                yield name, x

    def _stem_tail(self) -> Tuple[int, int]:
        """Return the range of children after the stem's last convolution."""
        children = list(self.children())
        is_stage = [any(hasattr(m, "grad_checkpointing") for m in child.modules()) for child in children]
        end = is_stage.index(True) if any(is_stage) else len(children)
        convolutions = [i for i in range(end) if any(isinstance(m, nn.Conv2d) for m in children[i].modules())]
        start = convolutions[-1] + 1 if convolutions else end
        return (start, end) if start < end else (0, 0)


class DictFeatures(_StageCheckpointing, FeatureDictNet):
    """timm's ``FeatureDictNet``."""

    return_layers: Dict[str, str]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.recompute_stem = bool(getattr(model, "recompute_stem", False))

    def _collect(self, x: Tensor) -> Dict[str, Tensor]:
        if not torch.jit.is_scripting():
            return self._checkpointed(x)
        out: Dict[str, Tensor] = {}
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out

    @torch.jit.ignore
    def _checkpointed(self, x: Tensor) -> Dict[str, Tensor]:
        outputs = self._outputs(x, list(self.return_layers))
        return OrderedDict((self.return_layers[name], y) for name, y in outputs if name in self.return_layers)


class ListFeatures(DictFeatures, FeatureListNet):
    """timm's ``FeatureListNet``."""


class HookFeatures(_StageCheckpointing, FeatureHookNet):
    """timm's ``FeatureHookNet``."""

    feature_info: Any
    hooks: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        model.drop_norm()  # as timm drops the classifier
        super().__init__(model, *args, **kwargs)
        self.hooked = [name.replace(".", "_") for name in self.feature_info.module_name()]
        self.recompute_stem = bool(getattr(model, "recompute_stem", False))

    def forward(self, x: Tensor) -> Any:
        """Return the features, as a list or by index."""
        device = x.device
        self.hooks.get_output(device)  # drop the outputs of cells that a backward pass recomputed
        for _ in self._outputs(x, self.hooked):
            pass
        out = self.hooks.get_output(device)
        return out if self.return_dict else list(out.values())


class GetterFeatures(FeatureGetterNet):
    """timm's ``FeatureGetterNet``, with checkpointing."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as the network's ``set_grad_checkpointing`` does."""
        self.model.set_grad_checkpointing(enable)


class GraphFeatures(KeepsActivations, FeatureGraphNet):
    """timm's ``FeatureGraphNet``, which has no stages left to checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():  # with gradients, the forms of memory="reversible" have no graph
            super().__init__(*args, **kwargs)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """ValueError unless ``enable`` is False."""
        if enable:
            raise ValueError("feature_cls='fx' with checkpointing: a graph has no stages; pass another feature_cls")


# timm's wrappers and ours.
WRAPPERS: Dict[str, Tuple[Any, Any]] = {
    "list": (FeatureListNet, ListFeatures),
    "dict": (FeatureDictNet, DictFeatures),
    "getter": (FeatureGetterNet, GetterFeatures),
    "fx": (FeatureGraphNet, GraphFeatures),
    "hook": (FeatureHookNet, HookFeatures),
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
    """Build a network, with this module's wrappers for ``features_only``.

    Args:
        model_cls: the network.
        variant: its name in timm.
        pretrained: load weights.
        feature_indices: the default of ``out_indices``.
        flatten_sequential: the stages are the children of a ``Sequential``.
        is_chain: the only input of each child is the output of the child before; otherwise ``"list"`` and
            ``"dict"`` are not available.
        **kwargs: arguments of timm and of the network.

    Raises:
        ValueError: the network does not support ``feature_cls``; nothing was allocated.
    """
    feature_cfg: Dict[str, Any] = {}
    if kwargs.get("features_only"):
        wrapper = _wrapper(kwargs.pop("feature_cls", None), is_chain)
        feature_cfg = dict(out_indices=feature_indices, feature_cls=wrapper)
        if flatten_sequential and isinstance(wrapper, type) and issubclass(wrapper, (FeatureDictNet, FeatureHookNet)):
            feature_cfg["flatten_sequential"] = True
    return build_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _wrapper(choice: Any, is_chain: bool) -> Any:
    """Return the wrapper for a ``feature_cls``, or a user's own class."""
    if choice is None:
        choice = "list" if is_chain else "getter"
    choice = next((name for name, (timms, _) in WRAPPERS.items() if timms is choice), choice)
    if not isinstance(choice, str):
        return choice
    check_one_of("feature_cls", choice.lower(), [name for name in WRAPPERS if is_chain or name not in ("list", "dict")])
    return WRAPPERS[choice.lower()][1]
