"""Bad arguments are named with their value and what is allowed, before anything is allocated."""

import math

import pytest
import timm
import torch

NAN, INF = math.nan, math.inf
BAD = [
    ("hbnet50", dict(beta1=NAN), r"beta1=nan: must be a finite number"),
    ("hbnet50", dict(beta2=INF), r"beta2=inf: must be a finite number"),
    ("hbnet50", dict(beta1="fast"), r"beta1='fast': must be a finite number"),
    ("hbnet50", dict(beta2=True), r"beta2=True: must be a finite number"),
    ("hbnet50", dict(layers=(3, 4, 6)), r"layers=\(3, 4, 6\): must be a sequence of 4 integers ≥ 1"),
    ("hbnet50", dict(layers=(3, -4, 6, 3)), r"layers\[1\]=-4: must be an integer ≥ 1"),
    ("hbnet50", dict(layers=(3, INF, 6, 3)), r"layers\[1\]=inf: must be an integer ≥ 1"),
    ("hbnet50", dict(layers="3463"), r"layers='3463': must be a sequence"),
    ("hbnet50", dict(layers=50), r"layers=50: must be a sequence"),
    ("hbnet50", dict(num_classes=-1), r"num_classes=-1: must be an integer ≥ 0"),
    ("hbnet50", dict(num_classes=2.5), r"num_classes=2.5: must be an integer ≥ 0"),
    ("hbnet50", dict(in_chans=0), r"in_chans=0: must be an integer ≥ 1"),
    ("hbnet50", dict(output_stride=7), r"output_stride=7: must be one of 8, 16, 32"),
    ("hbnet50", dict(stem_type="shallow"), r"stem_type='shallow': must be one of '', 'deep', 'deep_tiered'"),
    ("hbnet50", dict(drop_path_rate=1.5), r"drop_path_rate=1.5: must be in \[0, 1\)"),
    ("hbnet50", dict(drop_rate=-0.1), r"drop_rate=-0.1: must be in \[0, 1\)"),
    ("hbnet50", dict(block=torch.nn.Linear), r"block=<class .*Linear'>: must be one of .*BottleneckTransform"),
    (
        "hbnet50",
        dict(aa_layer=timm.layers.BlurPool2d),
        r"stride_in_1x1=True with aa_layer: .* pass stride_in_1x1=False",
    ),
    ("hbnet50", dict(init_last=NAN), r"init_last=nan: must be a finite number"),
    ("hbnet50", dict(init_last=0.5, zero_init_last=True), r"init_last=0.5 with zero_init_last=True: pass one of them"),
    ("hbnet20", dict(init_last="small"), r"init_last='small': must be a finite number"),
    ("hbnet20", dict(learn_beta="false"), r"learn_beta='false': must be True or False"),
    ("hbnet20", dict(post_act="true"), r"post_act='true': must be True or False"),
    ("hbnet20", dict(zero_init_last="false"), r"zero_init_last='false': must be True or False"),
    ("hbnet20", dict(layers=(3, 3, 3, 3)), r"layers=\(3, 3, 3, 3\): must be a sequence of 3 integers"),
    ("hbnet20", dict(channels=(64, 32, 16)), r"channels=\(64, 32, 16\): must not decrease"),
    ("hbnet20", dict(num_classes=-1), r"num_classes=-1"),
    ("hbnet20", dict(beta1=NAN), r"beta1=nan"),
    ("hbnet50", dict(learn_beta="false"), r"learn_beta='false': must be True or False"),
    ("hbnet50", dict(post_act=0), r"post_act=0: must be True or False"),
    ("hbnet50", dict(stride_in_1x1="false"), r"stride_in_1x1='false': must be True or False"),
    ("hbnet50", dict(zero_init_last="false"), r"zero_init_last='false': must be True or False"),
    ("hbnet50", dict(avg_down="false"), r"avg_down='false': must be True or False"),
    ("hbnet50", dict(replace_stem_pool="false"), r"replace_stem_pool='false': must be True or False"),
    ("optnet50", dict(stride_in_1x1="false"), r"stride_in_1x1='false': must be True or False"),
    ("optnet20", dict(zero_init_last="false"), r"zero_init_last='false': must be True or False"),
    ("cellnet_cifar", dict(aux_head="false"), r"aux_head='false': must be True or False"),
    ("agdnet121", dict(learn_alpha="false"), r"learn_alpha='false': must be True or False"),
    ("agdnet121", dict(memory_efficient="false"), r"memory_efficient='false': must be True or False"),
    ("agdnet121", dict(aa_stem_only="false"), r"aa_stem_only='false': must be True or False"),
    ("agdnet40_k12", dict(learn_alpha="false"), r"learn_alpha='false': must be True or False"),
    ("agdnet121", dict(beta=NAN), r"beta=nan: must be a finite number"),
    ("agdnet121", dict(block_config=()), r"block_config=\(\): must be a sequence of one or more integers"),
    ("agdnet121", dict(block_config=(6, 0)), r"block_config\[1\]=0: must be an integer ≥ 1"),
    ("agdnet121", dict(growth_rate=0), r"growth_rate=0: must be an integer ≥ 1"),
    ("agdnet121", dict(bn_size=0), r"bn_size=0: must be an integer ≥ 1"),
    ("agdnet121", dict(num_classes=-1), r"num_classes=-1"),
    ("agdnet121", dict(in_chans=-3), r"in_chans=-3"),
    ("agdnet121", dict(stem_type="x"), r"stem_type='x': must be one of"),
    ("agdnet121", dict(proj_drop_rate=NAN), r"proj_drop_rate=nan: must be a finite number"),
    ("agdnet40_k12", dict(compression=0), r"compression=0: must be in \(0, 1\]"),
    ("agdnet40_k12", dict(compression=0.001), r"compression=0.001: leaves no channel"),
    ("agdnet40_k12", dict(bn_size=-1), r"bn_size=-1: must be an integer ≥ 0"),
    ("agdnet40_k12", dict(stem_chs=0), r"stem_chs=0: must be an integer ≥ 1"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_a_bad_argument_is_named_before_anything_is_allocated(name, kwargs, message, monkeypatch):
    def allocate(self, *args, **kwargs):
        raise AssertionError("a layer was built before the arguments were checked")

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", allocate)
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", ["hbnet18", "hbnet20"])
def test_a_normalisation_without_weight_starts_nowhere(name):
    with pytest.raises(ValueError, match=r"init_last=0.5: must be 1 with a norm_layer that has no weight"):
        timm.create_model(name, norm_layer=torch.nn.InstanceNorm2d, init_last=0.5)
    timm.create_model(name, norm_layer=torch.nn.InstanceNorm2d)


@pytest.mark.parametrize("name", ["hbnet50", "hbnet20", "agdnet121", "agdnet40_k12"])
def test_an_unknown_argument_is_a_type_error(name):
    with pytest.raises(TypeError, match="bta2"), torch.device("meta"):
        timm.create_model(name, bta2=-1.0)


@pytest.mark.parametrize(("name", "smallest"), [("agdnet121", 29), ("agdnet40_k12", 4)])
def test_the_smallest_image_is_known(name, smallest):
    model = timm.create_model(name).eval()
    assert torch.isfinite(model(torch.randn(1, 3, smallest, smallest))).all()
    for size, side in (((smallest - 1, smallest), "height"), ((smallest, smallest - 1), "width")):
        with pytest.raises(AssertionError, match=rf"image {side} {smallest - 1}: must be at least {smallest}"):
            model(torch.randn(1, 3, *size))


@pytest.mark.parametrize("name", ["hbnet20", "cellnet_cifar"])
def test_a_number_of_features_is_from_one_to_all_of_them(name):
    small = dict(layers=(1, 1, 1)) if name == "hbnet20" else dict(cells=3, channels=2)
    model = timm.create_model(name, **small).eval()
    x = torch.randn(1, 3, 8, 8)
    for count in (1, 4):
        assert len(model.forward_intermediates(x, indices=count, intermediates_only=True)) == count
    for count in (0, -1, 5, 10, True):
        message = rf"indices={count}: must be an integer from 1 to 4, or a list of positions"
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, indices=count)
        with pytest.raises(ValueError, match=message):
            model.prune_intermediate_layers(count)


@pytest.mark.parametrize("name", ["hbnet18", "hbnet20"])
def test_hbnet_takes_any_image(name):
    model = timm.create_model(name).eval()
    assert torch.isfinite(model(torch.randn(1, 3, 1, 1))).all()


@pytest.mark.parametrize(
    ("name", "other", "key"),
    [
        ("hbnet18", "hbnet34", "layer1.2.conv1.weight"),
        ("hbnet20", "hbnet50", "layer4"),
        ("agdnet121", "densenet121", ".alpha"),
        ("agdnet40_k12", "agdnet52_k12", "denselayer13"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_keys(name, other, key, tmp_path):
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=key):
        timm.create_model(name, checkpoint_path=tmp_path / "other.pth")
