"""OptNet: networks of ResNet's shape for any optimisation algorithm, also a user's.

Each stage starts the algorithm at x_0 = S(u), the projected shortcut of its input u. A layer that the first step calls
at x_0 is ResNet's transition block, T_0(u) + S(u). All other calls have ∇f(z) = z − T(z), which gives (7), (11)-(14);
or ∇f(z) = −T(z), with ``reading="residual"``.

The transforms and names are ResNet's, so one ``resnet50`` state dict loads strictly into ``optnet50`` for every
algorithm with one gradient per step. Algorithms with several gradients (ADMM and DMRNet with two paths, the
extragradient method) have a transform for each call, in the order of calls: ``layer1.0`` is T'_0, ``layer1.1`` is T_0.

Paper: `Optimization-inspired Manual Architecture Design and Neural Architecture Search`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Callable, Dict, List, Sequence, Tuple, Type

from timm.models import generate_default_cfgs
from torch import nn

from optinspired_plugins._checks import check_layers, check_one_of
from optinspired_plugins.algorithms.methods import Algorithm, load_algorithm
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.probing import calls_at_start, layers_per_step
from optinspired_plugins.propagation.recorded import RecordedAlgorithm, record
from optinspired_plugins.propagation.tracing import READINGS, NotLinearError, trace_at_present

from ._cfgs import cifar_cfg, imagenet_cfg
from ._features import build_with_features
from ._host import SavesArguments, refuse_module_from_config, register_model
from .staged_resnet import CifarStagedResNet, StagedResNet
from .stages.algorithm import make_stage
from .stages.transforms import BasicTransform, BottleneckTransform

__all__ = ["CifarOptNet", "OptNet"]


class OptNet(SavesArguments, StagedResNet):
    """A network on timm's ResNet whose stages propagate by an algorithm.

    Args:
        block: ``BasicTransform`` or ``BottleneckTransform``.
        layers: steps in each of the four stages.
        algorithm: ``"gd"`` (7), ``"hb"`` (11) with β = 1, which is HBNet, ``"agd"`` (12), ``"agd2"`` (13), ``"admm"``
            (14), ``"dmrnet"`` (20) with ½; ``"tmm"``, ``"chebyshev"``, ``"ogm"``, ``"km"``, ``"halpern"`` of
            :mod:`optinspired_plugins.algorithms.faster`; ``"module:attribute"``; an object with ``init``, ``step`` and
            ``result``; or the data of a :class:`~optinspired_plugins.propagation.recorded.RecordedAlgorithm`, which
            timm's ``save_for_hf`` writes for an algorithm with constant coefficients. Each stage has a copy. The
            parameters of a module, or held by the object, are learned, without weight decay.
        reading: ``"fixed-point"``, the paper's ∇f(z) = z − T(z); or ``"residual"``, ∇f(z) = −T(z), with which a stage
            of T = 0 returns S(u). By it, ``"gd"`` is ResNet without its last activations, and a heavy ball momentum
            ResNet. T adds up with the weight 1/(1 − β): ``init_last="auto"`` allows for it.
        final_norm: as for :class:`~timm_models.staged_resnet.StagedResNet`. By default it is on with
            ``reading="residual"``, where nothing else bounds the stream of the identity paths.
        **kwargs: as for :class:`~timm_models.staged_resnet.StagedResNet`: ``stride_in_1x1``, ``init_last`` and timm's
            ``ResNet`` arguments.

    Raises:
        TypeError: the algorithm lacks a method; an argument is unknown.
        ValueError: the algorithm's name is unknown; one of its steps calls no layer, or returns a result of another
            shape or with infinite values; it has no residual reading; an argument is out of range. Nothing was
            allocated.
    """

    def __init__(
        self,
        block: Type[nn.Module],
        layers: Tuple[int, ...],
        algorithm: str | Mapping[str, Any] | Algorithm = "hb",
        reading: str = "fixed-point",
        final_norm: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_layers("layers", layers, stages=4)
        check_one_of("reading", reading, READINGS)
        rule = _load(algorithm)
        counts = layers_per_step(rule, max(layers))
        _check_reading(rule, reading, max(layers))
        kwargs["final_norm"] = reading == "residual" if final_norm is None else final_norm
        super().__init__(block, layers, **kwargs)
        self.saved_args = _as_data(algorithm, rule, max(layers))
        _propagate(self, rule, reading, counts, kwargs, lambda: StagedResNet(block, (2,) * 4, **kwargs))


class CifarOptNet(SavesArguments, CifarStagedResNet):
    """OptNet for 32×32 images: a 3×3 stem, three stages of two-layer transforms, 6n + 2 layers (§8).

    Args:
        layers: steps in each of the three stages.
        algorithm: as for :class:`OptNet`.
        reading: as for :class:`OptNet`.
        final_norm: as for :class:`OptNet`.
        **kwargs: as for :class:`~timm_models.staged_resnet.CifarStagedResNet`.

    Raises:
        TypeError: as for :class:`OptNet`.
        ValueError: as for :class:`OptNet`.
    """

    def __init__(
        self,
        layers: Tuple[int, ...] = (3, 3, 3),
        algorithm: str | Mapping[str, Any] | Algorithm = "hb",
        reading: str = "fixed-point",
        final_norm: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_layers("layers", layers, stages=3)
        check_one_of("reading", reading, READINGS)
        rule = _load(algorithm)
        counts = layers_per_step(rule, max(layers))
        _check_reading(rule, reading, max(layers))
        kwargs["final_norm"] = reading == "residual" if final_norm is None else final_norm
        super().__init__(layers, **kwargs)
        self.saved_args = _as_data(algorithm, rule, max(layers))
        _propagate(self, rule, reading, counts, kwargs, lambda: CifarStagedResNet((2,) * 3, **kwargs))


def _load(algorithm: object) -> Algorithm:
    if isinstance(algorithm, Mapping):
        return RecordedAlgorithm.from_dict(algorithm)
    return load_algorithm(algorithm, NETWORK_ALGORITHMS)


def _check_reading(algorithm: Algorithm, reading: str, steps: int) -> None:
    """Raise a ValueError if reading is "residual" and the input grows where T = 0."""
    if reading != "residual":
        return
    try:
        program = trace_at_present(copy.deepcopy(algorithm), steps, True, reading)
    except NotLinearError:
        return
    if abs(gain := program.gains()[0]) > 1 + 1e-6:
        raise ValueError(
            f"reading={reading!r}: where T = 0, {steps} steps of this algorithm multiply the input by {gain:g}, and it "
            "must stay where the gradient is 0; pass reading='fixed-point'"
        )


def _as_data(algorithm: object, rule: Algorithm, steps: int) -> Dict[str, Any]:
    """Return the argument as JSON data; empty if there is none."""
    if isinstance(algorithm, str) and algorithm in NETWORK_ALGORITHMS:
        return dict(algorithm=algorithm)
    try:
        return dict(algorithm=record(rule, steps).to_dict())
    except NotLinearError:
        return {}


def _propagate(
    net: StagedResNet,
    algorithm: Algorithm,
    reading: str,
    counts: Sequence[int],
    kwargs: Dict[str, Any],
    make_deeper: Callable[[], StagedResNet],
) -> None:
    """Replace every stage by a stage of the algorithm.

    ``make_deeper`` returns a network with a second block in every stage, for stages without a block to copy.
    """
    at_start = calls_at_start(algorithm, counts[0])
    stages = net.stages()
    lacking = not all(at_start) and any(len(blocks) == 1 and blocks[0].downsample is not None for blocks in stages)
    seconds = iter([blocks[1] for blocks in make_deeper().stages()] if lacking else [None] * len(stages))

    def stage(blocks: List[nn.Module]) -> nn.Module:
        second = next(seconds)
        layers = counts[: len(blocks)]
        transforms = _first_step(blocks, at_start, second)
        transforms += [T for block, count in zip(blocks[1:], layers[1:]) for T in _copies(block, [block] * count)]
        stage_algorithm = copy.deepcopy(algorithm)
        if isinstance(stage_algorithm, nn.Module):
            stage_algorithm.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        return make_stage(transforms, stage_algorithm, layers, reading)

    net.replace_stages(stage)
    if max(counts) > 1 or not all(at_start):
        net.init_weights()  # gives the copies different values
    else:
        net.start_transforms()


def _first_step(blocks: Sequence[Any], at_start: Sequence[bool], second: Any) -> List[Any]:
    """Return a first step's transforms: the transition block for calls at x_0."""
    # Calls at other points need a transform that keeps the shape.
    first = blocks[0]
    keeps_shape = blocks[1] if len(blocks) > 1 else first if first.downsample is None else second
    return _copies(first, [first if at else keeps_shape for at in at_start])


def _copies(block: Any, models: Sequence[Any]) -> List[Any]:
    """Return copies of ``models`` with the shortcut and drop path of a block."""
    shortcut, block.downsample = block.downsample, None
    copies = [model if model is block and i == 0 else copy.deepcopy(model) for i, model in enumerate(models)]
    for other in copies:
        other.drop_path = copy.deepcopy(block.drop_path)
    copies[0].downsample = shortcut
    return copies


def _create_optnet(variant: str, pretrained: bool = False, **kwargs: Any) -> OptNet:
    refuse_module_from_config("algorithm", kwargs)
    return build_with_features(OptNet, variant, pretrained, **kwargs)


def _create_cifar_optnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    refuse_module_from_config("algorithm", kwargs)
    return build_with_features(CifarOptNet, variant, pretrained, feature_indices=(0, 1, 2, 3), **kwargs)


default_cfgs = generate_default_cfgs(
    {f"optnet{depth}.untrained": imagenet_cfg(first_conv="conv1", classifier="fc") for depth in (18, 34, 50, 101)}
    | {f"optnet{depth}.untrained": cifar_cfg(first_conv="conv1", classifier="fc") for depth in (20, 56, 110)}
)


@register_model
def optnet18(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-18."""
    model_args = dict(block=BasicTransform, layers=(2, 2, 2, 2))
    return _create_optnet("optnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet34(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-34."""
    model_args = dict(block=BasicTransform, layers=(3, 4, 6, 3))
    return _create_optnet("optnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet50(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-50."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 6, 3))
    return _create_optnet("optnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet101(pretrained: bool = False, **kwargs: Any) -> OptNet:
    """OptNet-101."""
    model_args = dict(block=BottleneckTransform, layers=(3, 4, 23, 3))
    return _create_optnet("optnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet20(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-20 for CIFAR, n = 3."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_optnet("optnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet56(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-56 for CIFAR, n = 9."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_optnet("optnet56", pretrained, **dict(model_args, **kwargs))


@register_model
def optnet110(pretrained: bool = False, **kwargs: Any) -> CifarOptNet:
    """OptNet-110 for CIFAR, n = 18."""
    model_args = dict(layers=(18, 18, 18))
    return _create_cifar_optnet("optnet110", pretrained, **dict(model_args, **kwargs))
