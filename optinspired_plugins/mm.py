"""HBNet, AGDNet, OptNet and CellNet as backbones of mmengine.

They work in mmpretrain, mmdetection and mmsegmentation, which are based on it. Importing this module registers them in
mmengine's root ``MODELS``. A config imports it by ``custom_imports``, or by the full name of the type:

    custom_imports = dict(imports=["optinspired_plugins.mm"], allow_failed_imports=False)
    backbone = dict(type="HBNet", depth=50, init_cfg=dict(type="Pretrained", checkpoint="hbnet50.pth"))
    backbone = dict(type="optinspired_plugins.mm.HBNet", depth=50)

They are the ``features_only`` networks of :mod:`timm_models`, with the same feature maps, to the bit. A constructor of
optimiser wrappers excludes their coefficients from weight decay:

    optim_wrapper = dict(constructor="NoWeightDecayOptimWrapperConstructor")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import timm
from timm.models import group_parameters, load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.serialization import safe_globals

import timm_models  # noqa: F401  registers the names also where the entry point is switched off
from optinspired_plugins._checks import check_bool, check_one_of
from optinspired_plugins._extras import from_extra
from timm_models.stages.checkpoint_rules import is_rule

with from_extra("mm"):
    from mmengine.model import BaseModule, PretrainedInit, update_init_info
    from mmengine.optim import DefaultOptimWrapperConstructor
    from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ["AGDNet", "Backbone", "CellNet", "HBNet", "NoWeightDecayOptimWrapperConstructor", "OptNet"]

InitCfg = Union[None, Dict[str, Any], List[Dict[str, Any]]]

HEADS = ("fc", "classifier", "aux_head")
FILE_HINT = "weights are named by init_cfg=dict(type='Pretrained', checkpoint='a local file')"


class _Placeholder:
    """The placeholder of an object in a checkpoint; it does nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# mmengine's checkpoints hold a history of losses. torch reads its objects as these placeholders of the same names.
PLACEHOLDERS: List[Any] = [
    type(name, (_Placeholder,), {"__module__": module})
    for module, names in {
        "mmengine.logging.history_buffer": ["HistoryBuffer"],
        "builtins": ["getattr"],
        "numpy": ["dtype", "ndarray"],
        "numpy.core.multiarray": ["_reconstruct", "scalar"],
        "numpy._core.multiarray": ["_reconstruct", "scalar"],
    }.items()
    for name in names
]


class Backbone(BaseModule):
    """A timm network without its head that returns a tuple of feature maps.

    ``out_channels`` and ``out_strides`` describe the maps. Stages that no output needs are removed.

    Args:
        name: the network's name in timm.
        in_channels: channels of the images.
        out_indices: positions of the outputs to return, rising; all if None. Output i has stride 4 · 2^i, at most
            ``output_stride``; the networks for CIFAR have outputs 0, 1 and 2, of stride 1, 2 and 4.
        frozen_stages: −1 freezes nothing, 0 the stem, i the stem and all layers up to output i − 1. Frozen parameters
            get no gradient, and frozen modules stay in evaluation.
        norm_eval: batch normalisations use their running statistics in training, too.
        with_cp: checkpointing: save memory in the backward pass, as ``set_grad_checkpointing`` does.
        init_cfg: mmengine's. ``Pretrained`` takes ``checkpoint``, a local file, and ``prefix``, the backbone's place
            in it. The file may be timm's (``.pth``, ``.pth.tar``, ``.safetensors``; a moving average is preferred) or
            mmengine's. Only tensors and plain values are read; other objects are never created. A classifier is left
            out; all other keys must fit.
        **options: arguments of the timm network.

    Raises:
        TypeError: an option is unknown.
        ValueError: an argument is out of range; nothing was allocated.
    """

    _is_init: bool

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        out_indices: Optional[Sequence[int]] = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: InitCfg = None,
        **options: Any,
    ) -> None:
        if options.get("pretrained"):
            raise ValueError(
                f"pretrained={options['pretrained']!r}: must be None, also in the base's model; {FILE_HINT}"
            )
        check_bool("norm_eval", norm_eval)
        check_bool("with_cp", with_cp)
        _pretrained_cfg(init_cfg)
        super().__init__(init_cfg)
        self.name, self.options = name, dict(options, in_chans=in_channels)
        features = self._meta_network().feature_info
        self._first = int(features[0]["reduction"] < 4)  # a stem of stride 1 or 2 is no output
        self.out_indices = _check_indices(out_indices, len(features) - self._first)
        self.frozen_stages = _check_frozen(frozen_stages, len(features) - self._first)
        self.norm_eval = norm_eval
        indices = tuple(i + self._first for i in self.out_indices)
        self.body = timm.create_model(name, features_only=True, out_indices=indices, **self.options)
        self.out_channels: Tuple[int, ...] = tuple(self.body.feature_info.channels())
        self.out_strides: Tuple[int, ...] = tuple(self.body.feature_info.reduction())
        if with_cp:
            self.body.set_grad_checkpointing()
        for part in self._frozen_modules():
            part.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Return a feature map for each index, shape (batch, channels, height / stride, width / stride)."""
        return tuple(self.body(x))

    def train(self, mode: bool = True) -> Backbone:
        """Switch to training or evaluation; frozen modules stay in evaluation."""
        super().train(mode)
        for part in self._frozen_modules():
            part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Register a child; a frozen one is put into evaluation.

        mmengine's conversion to ``SyncBatchNorm`` calls this method with new modules in training.
        """
        super().add_module(name, module)
        self.train(self.training)

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; without one, initialise as mmengine does.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a checkpoint, or belongs to another network.
        """
        pretrained = _pretrained_cfg(self.init_cfg)
        if pretrained is None or self._is_init:
            super().init_weights()
            return
        path = str(pretrained["checkpoint"])
        self._load(_select(_read(path), pretrained.get("prefix"), path), path)
        self._is_init = True
        if hasattr(self, "_params_init_info"):  # of the surrounding model
            update_init_info(self, init_info=f"loaded from {path}")

    def no_weight_decay(self) -> Set[str]:
        """Return the names of parameters without weight decay: the coefficients."""
        names = self._meta_network().no_weight_decay()
        return {name for name, _ in self.named_parameters() if _timm_key(name) in names}

    def get_layer_depth(self, param_name: str, prefix: str = "") -> Tuple[int, int]:
        """Return a parameter's depth, and the number of depths.

        As in timm's layer decay the stem has depth 0, and each block, dense layer or cell the next depth. Layers after
        the backbone have the last depth, with AGDNet's last normalisation.

        Args:
            param_name: the parameter's name in the complete model.
            prefix: the backbone's place in it.

        Raises:
            ValueError: the backbone has no such parameter.
        """
        depths, last = self._depths
        if not param_name.startswith(prefix):
            return last, last + 1
        name = param_name.removeprefix(prefix)
        if name not in depths:
            raise ValueError(f"param_name={param_name!r}: must be a parameter of {self.name} with {prefix!r} before it")
        return depths[name], last + 1

    @cached_property
    def _depths(self) -> Tuple[Dict[str, int], int]:
        """The depth of each parameter, and of the layers after the backbone.

        The latter is the depth of timm's classifier, or one more than the last stage's if stages are removed.
        """
        net = self._meta_network()
        all_depths = group_parameters(net, net.group_matcher(), reverse=True)
        depths = {name: all_depths[_timm_key(name)] for name, _ in self.named_parameters()}
        return depths, min(max(depths.values()) + 1, max(all_depths.values()))

    def _load(self, state_dict: Mapping[str, Tensor], path: str) -> None:
        """Load weights of the complete network or of the backbone."""
        weights = {_timm_key(key): value for key, value in state_dict.items()}
        own = {_timm_key(key): value for key, value in self.body.state_dict().items()}
        complete = self._meta_network().state_dict()
        common = [key for key in own if key in weights and not is_rule(key)]
        shapes = {key: (tuple(weights[key].shape), tuple(own[key].shape)) for key in common}
        faults = {
            "missing": [key for key in own if key not in weights and not is_rule(key)],
            "unknown": [key for key in weights if key not in complete and key.split(".")[0] not in HEADS],
            "of another shape": [f"{key} {got}, not {shape}" for key, (got, shape) in shapes.items() if got != shape],
        }
        if any(faults.values()):
            text = "; ".join(f"{len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys)
            hint = ". prefix='backbone.' takes the backbone of a whole model" if faults["unknown"] else ""
            raise ValueError(f"checkpoint={path!r}: must hold the weights of {self.name}; {text}{hint}")
        fitting = {key: weights[_timm_key(key)] for key in self.body.state_dict() if _timm_key(key) in weights}
        try:
            self.body.load_state_dict({key: value for key, value in fitting.items() if is_rule(key)}, strict=False)
        except RuntimeError as error:  # the rules differ
            raise ValueError(f"checkpoint={path!r}: must hold the weights of {self.name}; {error}") from error
        self.body.load_state_dict(fitting)

    def _meta_network(self) -> Any:
        """Return the complete network on the meta device, without values."""
        return timm.create_model(self.name, device="meta", **self.options)

    def _frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the frozen modules, from the stem on."""
        if self.frozen_stages < 0:
            return
        end = self.body.feature_info.module_name(max(self._first + self.frozen_stages - 1, 0)).replace(".", "_")
        for name, part in _parts(self.body):
            yield part
            if name == end:
                return


@MODELS.register_module()
class HBNet(Backbone):
    """HBNet (16).

    Args:
        depth: 18, 34, 50, 101 or 152; 20, 32, 44, 56 or 110 for images of CIFAR's size.
        **kwargs: as for :class:`Backbone`, and timm's for ``hbnet50``: ``beta1``, ``beta2``, ``learn_beta``,
            ``post_act``, ``init_last``, ``memory="reversible"``, ``stride_in_1x1``, ``output_stride``, ….
    """

    def __init__(self, depth: int = 50, **kwargs: Any) -> None:
        check_one_of("depth", depth, (18, 34, 50, 101, 152, 20, 32, 44, 56, 110))
        super().__init__(f"hbnet{depth}", **kwargs)


@MODELS.register_module()
class AGDNet(Backbone):
    """AGDNet (18), (21).

    Args:
        depth: 121, 161, 169 or 201; 40 or 52, with k = 12, for images of CIFAR's size.
        **kwargs: as for :class:`Backbone`, and timm's for ``agdnet121``: ``beta``, ``learn_alpha``, ….
    """

    def __init__(self, depth: int = 121, **kwargs: Any) -> None:
        check_one_of("depth", depth, (121, 161, 169, 201, 40, 52))
        super().__init__(f"agdnet{depth}" if depth > 100 else f"agdnet{depth}_k12", **kwargs)


@MODELS.register_module()
class OptNet(Backbone):
    """The network of an algorithm.

    Args:
        depth: 18, 34, 50 or 101; 20, 56 or 110 for images of CIFAR's size.
        **kwargs: as for :class:`Backbone`, and timm's for ``optnet50``: ``algorithm``, ``output_stride``, ….
    """

    def __init__(self, depth: int = 50, **kwargs: Any) -> None:
        check_one_of("depth", depth, (18, 34, 50, 101, 20, 56, 110))
        super().__init__(f"optnet{depth}", **kwargs)


@MODELS.register_module()
class CellNet(Backbone):
    """The network of a genotype. Its stem is its output 0.

    Args:
        genotype: a genotype, the name of a published one, or a JSON file.
        stem: ``"imagenet"``, or ``"cifar"`` for images of that size.
        **kwargs: as for :class:`Backbone`, and timm's for ``cellnet_imagenet``: ``cells``, ``channels``, ….
    """

    def __init__(self, genotype: Any = "darts_v2", stem: str = "imagenet", **kwargs: Any) -> None:
        check_one_of("stem", stem, ("imagenet", "cifar"))
        super().__init__(f"cellnet_{stem}", genotype=genotype, **kwargs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class NoWeightDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default, with ``no_weight_decay`` of networks.

    Args:
        optim_wrapper_cfg: mmengine's.
        paramwise_cfg: mmengine's; its learning rates also apply to these parameters.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None) -> None:
        # mmengine creates groups of parameters only if an option is set; this one takes shared parameters once.
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": True, **(paramwise_cfg or {})})

    def add_params(self, params: List[Dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Add the parameters of a module, one group each."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # a part of the model
            return
        exempt = {
            network.get_parameter(name)
            for network in module.modules()
            if hasattr(network, "no_weight_decay")
            for name in network.no_weight_decay()  # type: ignore[operator]
        }
        for group in params:
            if not exempt.isdisjoint(group["params"]):
                group["weight_decay"] = 0.0


def _check_indices(indices: Any, count: int) -> Tuple[int, ...]:
    if indices is None:
        return tuple(range(count))
    is_sequence = isinstance(indices, Sequence) and not isinstance(indices, str)
    values = tuple(indices) if is_sequence else ()
    is_valid = bool(values) and not any(isinstance(i, bool) or i not in range(count) for i in values)
    if not is_valid or sorted(set(values)) != [*values]:
        raise ValueError(f"out_indices={indices!r}: must be rising integers from 0 to {count - 1}, at least one")
    return values


def _check_frozen(stages: Any, count: int) -> int:
    if isinstance(stages, bool) or stages not in range(-1, count + 1):
        raise ValueError(f"frozen_stages={stages!r}: must be an integer from -1 to {count}")
    return stages


def _pretrained_cfg(init_cfg: Any) -> Optional[Dict[str, Any]]:
    """Return the part of ``init_cfg`` that names a checkpoint."""
    parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [] if init_cfg is None else [init_cfg]
    if not all(isinstance(part, dict) and "type" in part for part in parts):
        raise ValueError(f"init_cfg={init_cfg!r}: must be a dict with a type, or a list of them; {FILE_HINT}")
    pretrained = [dict(part) for part in parts if part["type"] in ("Pretrained", PretrainedInit)]
    if not pretrained:
        return None
    unknown = sorted(pretrained[-1].keys() - {"type", "checkpoint", "prefix", "map_location"})
    if unknown:
        raise ValueError(f"init_cfg has {', '.join(unknown)}: with type='Pretrained' it takes checkpoint and prefix")
    checkpoint = pretrained[-1].get("checkpoint")
    if not isinstance(checkpoint, (str, Path)) or not str(checkpoint) or "://" in str(checkpoint):
        raise ValueError(f"checkpoint={checkpoint!r}: must be a local file; nothing is downloaded")
    return pretrained[-1]


def _read(path: str) -> Dict[str, Tensor]:
    """Return the state dict in a file of tensors and plain values."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint={path!r}: must be an existing file")
    message = f"checkpoint={path!r}: must be a state dict, or a file of timm's or mmengine's that holds one"
    try:
        with safe_globals(PLACEHOLDERS):
            state_dict = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # the readers of the formats raise many types
        raise ValueError(f"{message} ({error})") from error
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(message)
    return state_dict


def _select(state_dict: Dict[str, Tensor], prefix: Optional[str], path: str) -> Dict[str, Tensor]:
    """Return the entries below a prefix."""
    if not prefix:
        return state_dict
    start = prefix.rstrip(".") + "."
    entries = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
    if not entries:
        starts = sorted({key.split(".")[0] for key in state_dict})
        raise ValueError(f"prefix={prefix!r}: must begin keys of {path!r}, which begin with {_some(starts)}")
    return entries


def _timm_key(key: str) -> str:
    """Return the complete network's key for a backbone's key."""
    return re.sub(r"^features_", "features.", key.removeprefix("body.").removeprefix("model."))


def _parts(body: Any) -> Iterator[Tuple[str, nn.Module]]:
    """Yield the modules of a ``features_only`` network in order of use."""
    for name, child in getattr(body, "model", body).named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}_{key}", part) for key, part in child.named_children())
        else:
            yield name, child


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
