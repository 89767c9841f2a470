"""Every pair of options works with every kind of network, or is refused by an error that names them."""

import pytest
import timm
import torch
from extras import DROP_BLOCK
from test_timm_contract import HB_GENOTYPE

from timm_models import NETWORK_ALGORITHMS

BLUR = timm.layers.BlurPool2d
STAGED = {
    "drop path": dict(drop_path_rate=0.3),
    "drop block": dict(drop_block_rate=0.2),
    "zero_init_last": dict(zero_init_last=True),
    "init_last": dict(init_last=0.3),
    "final_norm": dict(final_norm=True),
    "init_last auto": dict(init_last="auto"),
    "features_only": dict(features_only=True),
    "checkpointing": {},
    "stride_in_1x1": dict(stride_in_1x1=False),
    "output_stride": dict(output_stride=8),
    "aa_layer": dict(aa_layer=BLUR, stride_in_1x1=False),
    "se": dict(block_args=dict(attn_layer="se")),
    "stem_type": dict(stem_type="deep"),
    "stem pool": dict(replace_stem_pool=True),
    "avg_down": dict(avg_down=True),
    "silu": dict(act_layer="silu"),
}
if DROP_BLOCK.args[0]:  # the pair would divide by zero
    del STAGED["drop block"]
HEAVY_BALL = {
    "memory": dict(memory="reversible"),
    "learn_beta": dict(learn_beta=True),
    "post_act": dict(post_act=True),
    "beta_lr_scale": dict(learn_beta=True, beta_lr_scale=1.0),
    "beta2=0": dict(beta2=0.0),
    "betas": dict(beta1=0.5, beta2=-0.7),
}
ALGORITHM = {"reading": dict(reading="residual")}
DENSE = {
    "beta=0": dict(beta=0.0),
    "learn_alpha": dict(learn_alpha=False),
    "proj_drop_rate": dict(proj_drop_rate=0.2),
    "drop_rate": dict(drop_rate=0.2),
    "bn_size": dict(bn_size=2),
    "features_only": dict(features_only=True),
    "checkpointing": {},
    "stem_type": dict(stem_type="deep"),
    "aa_layer": dict(aa_layer=BLUR),
    "aa everywhere": dict(aa_layer=BLUR, aa_stem_only=False),
    "memory_efficient": dict(memory_efficient=True),
    "compression": dict(compression=0.5),
    "silu": dict(act_layer="silu"),
}
CELLS = {
    "genotype": dict(genotype=HB_GENOTYPE),
    "drop path": dict(drop_path_rate=0.3),
    "drop_rate": dict(drop_rate=0.2),
    "aux_head": dict(aux_head=True),
    "features_only": dict(features_only=True),
    "checkpointing": {},
    "other cells": dict(cells=4),
    "in_chans": dict(in_chans=1),
}
FOUR = dict(layers=(2, 1, 3, 2), channels=(4, 4, 6, 8))
THREE = dict(layers=(2, 1, 3), channels=(4, 6, 8))
SMALL = {
    "hbnet18": (FOUR, STAGED | HEAVY_BALL),
    "hbnet50": (FOUR, STAGED | HEAVY_BALL),
    "hbnet20": (THREE, STAGED | HEAVY_BALL),
    "hbnet20_resnet": (THREE, STAGED | HEAVY_BALL),
    "optnet18": (FOUR, STAGED | ALGORITHM),
    "optnet50": (FOUR, STAGED | ALGORITHM),
    "optnet20": (THREE, STAGED | ALGORITHM),
    "agdnet121": (dict(block_config=(2, 1, 3, 2), growth_rate=8), DENSE),
    "agdnet40_k12": (dict(block_config=(2, 1, 3), growth_rate=4), DENSE),
    "cellnet_cifar": (dict(cells=3, channels=4), CELLS),
    "cellnet_imagenet": (dict(cells=3, channels=4), CELLS),
}
CASES = [
    *(name for name in SMALL if not name.startswith("optnet")),
    *(f"{name}-{algorithm}" for name in SMALL if name.startswith("optnet") for algorithm in NETWORK_ALGORITHMS),
]
QUICK = ["hbnet50", "hbnet20", "optnet50-admm", "optnet20-agd2", "agdnet121", "agdnet40_k12", "cellnet_cifar"]


def build(case, *options):
    """The network, or None if two of the options ask for different values of one argument."""
    name, _, algorithm = case.partition("-")
    small, known = SMALL[name]
    kwargs = dict(small, num_classes=5, **(dict(algorithm=algorithm) if algorithm else {}))
    own = {}
    for option in options:
        if any(own.get(key, value) != value for key, value in known[option].items()):
            return None
        own |= known[option]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs | own)
    if "checkpointing" in options:
        # timm's wrapper for CellNet's features has no such method, its others have.
        (model.model if "cellnet" in case and "features_only" in options else model).set_grad_checkpointing()
    return model


def sizes(case, options):
    """CIFAR's own size where the auxiliary head asks for it; sizes that are not a multiple of the stride elsewhere."""
    if "aux_head" in options:
        return [(32, 32) if "cifar" in case else (224, 224)]
    return [(32, 32), (33, 47)]


def fault_of(case, options, quick):
    """Return what is wrong with a network of these options; empty where it works or is refused as it should."""
    try:
        model = build(case, *options)
    except (ValueError, TypeError) as error:
        return fault_of_refusal(case, options, str(error))
    if model is None:
        return ""
    if "aux_head" in options:
        model.set_auxiliary_training()
    chans = 1 if "in_chans" in options else 3
    for size in sizes(case, options)[-1:] if quick else sizes(case, options):
        x = torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(1))
        for training in (True, False):
            model.train(training).zero_grad()
            out = model(x)
            parts = out if isinstance(out, (list, tuple)) else [out]
            torch.stack([part.square().mean() for part in parts]).sum().backward()
            unused = "aux_head" in options and not training
            without = [n for n, p in model.named_parameters() if p.grad is None and not (unused and "aux_head" in n)]
            broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            if without or broken or not all(part.isfinite().all() for part in parts):
                return f"{size}, training={training}: no gradient {without[:3]}, not finite {broken[:3]}"
    return ""


def fault_of_refusal(case, options, message):
    """An option that is refused alone is named; of two that are not, both are."""
    alone = [option for option in options if len(options) > 1 and refused(case, option)]
    known = SMALL[case.partition("-")[0]][1]
    named = [any(key in message for key in known[option]) for option in options]
    right = any(named) if alone or len(options) == 1 else all(named)
    return "" if right else f"refused by {message!r}"


def refused(case, option):
    try:
        build(case, option)
    except (ValueError, TypeError):
        return True
    return False


def pairs(case):
    options = list(SMALL[case.partition("-")[0]][1])
    return [(one, other) for i, one in enumerate(options) for other in options[i + 1 :]]


def assert_no_fault(case, combinations, quick):
    found = {options: fault_of(case, options, quick) for options in combinations}
    assert not any(found.values()), "\n".join(f"{options}: {fault}" for options, fault in found.items() if fault)


def alone(case):
    return [(option,) for option in SMALL[case.partition("-")[0]][1]]


@pytest.mark.parametrize("case", CASES)
def test_every_network_without_options(case):
    assert_no_fault(case, [()], quick=False)


@pytest.mark.parametrize("case", QUICK)
def test_every_option_alone_and_every_eighth_pair(case):
    assert_no_fault(case, [*alone(case), *pairs(case)[::8]], quick=True)


@pytest.mark.every_model
@pytest.mark.parametrize("case", CASES)
def test_every_option_and_every_pair(case):
    assert_no_fault(case, [*alone(case), *pairs(case)], quick=False)


def test_no_option_is_refused_everywhere():
    """Which would make its pairs tests of nothing."""
    for option in STAGED | HEAVY_BALL | ALGORITHM | DENSE | CELLS:
        assert not all(refused(name, option) for name in CASES if option in SMALL[name.partition("-")[0]][1]), option


@pytest.mark.parametrize("name", ["hbnet20", "optnet20"])
def test_the_cifar_nets_drop_blocks_as_timms_last_two_stages_do(name):
    def settings(stage):
        return [(b.drop_block.drop_prob, b.drop_block.block_size, b.drop_block.gamma_scale) for b in stage]

    ours = timm.create_model(name, drop_block_rate=0.2, layers=(2, 2, 2))
    theirs = timm.models.ResNet(timm.models.BasicBlock, (2, 2, 2, 2), drop_block_rate=0.2)
    assert settings(ours.layer2) == settings(theirs.layer3)
    assert settings(ours.layer3) == settings(theirs.layer4)
    assert {type(block.drop_block) for block in ours.layer1} == {torch.nn.Identity}
    with pytest.raises(ValueError, match=r"drop_block_rate=1.5: must be in \[0, 1\)"):
        timm.create_model(name, drop_block_rate=1.5)
