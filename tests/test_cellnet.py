"""CellNet: the network of a genotype computes what the genotype says, at the published sizes."""

import copy

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from test_genotype import HB

from optinspired_plugins.cells.genotype import GENOTYPES, Edge, Genotype, load_genotype
from optinspired_plugins.cells.network import CellPlan
from optinspired_plugins.cells.plan import count_parameters
from timm_models import Cell, CellNet

OPTIONS = dict(num_classes=5, cells=4, channels=4)


def build(genotype="darts_v2", name="cellnet_cifar", **kwargs):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, genotype=genotype, **{**OPTIONS, **kwargs}).double())


def images(size=16):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# --- theorems ---------------------------------------------------------------------------------------------------------


def test_a_cell_of_f_identity_and_negative_identity_is_rule_26():
    """x_t = F(x_{t−1}) + x_{t−1} − x_{t−2}: HBNet as a genotype."""
    torch.manual_seed(0)
    cell = Cell(HB.normal, CellPlan((6, 6), 4, reduction=False, reduction_before=False)).double()
    s0, s1 = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64)
    x = [cell.preprocess0(s0), cell.preprocess1(s1)]
    for t in range(4):
        x.append(cell.ops[3 * t](x[-1]) + x[-1] - x[-2])
    torch.testing.assert_close(cell(s0, s1), torch.cat(x[2:], 1))


@pytest.mark.parametrize("genotype", ["darts_v1", "pc_darts_cifar", HB], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_is_what_its_genotype_says(genotype, training):
    """Against a plain reading: nodes are sums of operations of sources, outputs are concatenations."""
    net = build(genotype).train(training)
    reference = copy.deepcopy(net)

    def plain(x):
        s0 = s1 = reference.stem0(x)
        for i, cell in enumerate(reference.cells):
            edges = net.genotype.reduction if i in (1, 2) else net.genotype.normal
            states = [cell.preprocess0(s0), cell.preprocess1(s1)]
            ops = iter(cell.ops)
            for node in edges:
                states.append(sum(next(ops)(states[source]) for _, source in node))
            s0, s1 = s1, torch.cat(states[2:], 1)
        return reference.fc(s1.mean((2, 3)))

    assert_same_function(net, reference, images(), plain)


# --- golden figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genotype", "cifar", "imagenet"),
    [
        ("darts_v2", 3_349_342, 4_718_752),
        ("pc_darts_cifar", 3_634_678, 5_270_560),
        ("p_darts", 3_433_798, 4_944_352),
    ],
)
def test_published_networks_have_their_published_parameters(genotype, cifar, imagenet):
    for name, expected, head in (("cellnet_cifar", cifar, 476_426), ("cellnet_imagenet", imagenet, 1_260_776)):
        assert parameters(timm.create_model(name, genotype=genotype, device="meta")) == expected
        assert parameters(timm.create_model(name, genotype=genotype, aux_head=True, device="meta")) == expected + head
    assert count_parameters(GENOTYPES[genotype], 20, 36, 10) == cifar
    assert count_parameters(GENOTYPES[genotype], 14, 48, 1000, stem="imagenet") == imagenet


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_parameters_are_counted_without_a_network(stem):
    for genotype in (HB, GENOTYPES["darts_v1"], load_genotype("cifar10_hb_seed0")):
        for cells, channels, classes, in_chans in ((3, 4, 5, 1), (7, 6, 3, 4)):
            sizes = dict(cells=cells, channels=channels, in_chans=in_chans, stem=stem)
            net = CellNet(genotype, num_classes=classes, device="meta", **sizes)
            assert count_parameters(genotype, classes=classes, **sizes) == parameters(net)


def test_reductions_come_after_one_and_two_thirds():
    for cells in (3, 5, 8, 20):
        net = timm.create_model("cellnet_cifar", cells=cells, channels=2, device="meta")
        strides = [[getattr(m, "stride", 1) for m in cell.ops.modules()] for cell in net.cells]
        reductions = [i for i, found in enumerate(strides) if 2 in found or (2, 2) in found]
        assert reductions == [cells // 3, 2 * cells // 3]


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_genotype_is_given_by_object_name_or_file(tmp_path):
    HB.save(tmp_path / "g.json")
    for genotype in (HB, str(tmp_path / "g.json"), tmp_path / "g.json"):
        assert build(genotype).genotype == HB
    assert timm.create_model("cellnet_cifar", cells=3, channels=2).genotype == GENOTYPES["darts_v2"]


def test_the_auxiliary_head_speaks_in_training_where_it_was_asked_to():
    net = build(aux_head=True, channels=4)
    net.set_auxiliary_training()
    logits, auxiliary = net.train()(images(32))
    assert logits.shape == auxiliary.shape == (2, 5)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(images(32)).shape == (2, 5)
    middle = net.forward_cells(images(32))[1]
    assert middle.shape[-1] == 8
    net.reset_classifier(3)
    assert [out.shape for out in net.train()(images(32))] == [(2, 3), (2, 3)]
    assert all(p.requires_grad for p in net.parameters())
    large = build(name="cellnet_imagenet", aux_head=True).train()
    large.set_auxiliary_training()
    assert large(images(224))[1].shape == (2, 5)


def test_without_being_asked_the_auxiliary_head_changes_nothing():
    """Scripts take the output for logits, and DDP refuses a parameter that waits for a gradient in vain."""
    net, plain = build(aux_head=True), build()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "aux_head" not in k})
    torch.testing.assert_close(net.train()(images(32)), plain.train()(images(32)))
    for asked in (False, True, False):
        net.set_auxiliary_training(asked)
        net.reset_classifier(3)
        net.zero_grad()
        outputs = net(images(32))
        sum(out.sum() for out in (outputs if asked else [outputs])).backward()
        waiting = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert waiting == []
        assert all(p.requires_grad == asked for p in net.aux_head.parameters())
    plain.set_auxiliary_training(False)
    with pytest.raises(ValueError, match="enable=True without an auxiliary head"):
        plain.set_auxiliary_training()
    with pytest.raises(ValueError, match="enable='yes': must be True or False"):
        net.set_auxiliary_training("yes")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_classifiers_are_like_the_network_around_them(training, dtype):
    net = build(aux_head=True).to(dtype).train(training)
    for num_classes, pool in ((3, None), (2, "catavgmax")):
        net.reset_classifier(num_classes, pool)
        assert all(m.training == training for m in net.modules())
        assert all(p.dtype == dtype for p in net.parameters())
    features = net.forward_features(images().to(dtype))
    assert net.forward_head(features, pre_logits=True).shape[1] == net.head_hidden_size == 2 * net.num_features
    assert build(global_pool="catavgmax").head_hidden_size == 2 * net.num_features
    net.reset_classifier(0)
    assert net.aux_head is None


@pytest.mark.parametrize("aux_head", [False, True])
def test_a_traced_graph_scripts(aux_head):
    net = build(aux_head=aux_head).eval()
    net.set_auxiliary_training(aux_head)
    scripted = torch.jit.script(torch.fx.symbolic_trace(net))
    torch.testing.assert_close(scripted(images()), net(images()))


@pytest.mark.parametrize("name", ["cellnet_cifar", "cellnet_imagenet"])
def test_a_pruned_network_ends_at_its_last_feature(name):
    x = images(64)
    for i, feature in enumerate(build(name=name).eval().forward_intermediates(x, intermediates_only=True)):
        net = build(name=name).eval()
        assert net.prune_intermediate_layers([i]) == [i]
        out = net.forward_features(x)
        torch.testing.assert_close(out, feature)
        assert out.shape[1] == net.num_features
        out.sum().backward()
        assert all(p.grad is not None for p in net.parameters()), "a parameter without use"


def test_drop_path_drops_operations_and_spares_bare_identities():
    identities = ((Edge("skip_connect", 0), Edge("neg_skip_connect", 1)),)
    net = build(Genotype("agd", identities, ((Edge("sep_conv_3x3", 0), Edge("skip_connect", 1)),)), drop_path_rate=0.99)
    normal, reduction = net.train().cells[:2]
    assert normal.droppable == [False, False]
    assert reduction.droppable == [True, True], "a reduction is an operation"
    s0, s1 = torch.randn(1, 12, 8, 8, dtype=torch.float64), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    assert normal(s0, s0).any()
    assert sum(reduction(s0, s1).any().item() for _ in range(20)) < 10
    net.set_drop_path_rate(0.0)
    a, b = net(images()), net(images())
    torch.testing.assert_close(a, b)
    net.set_drop_path_rate(0.5)
    torch.manual_seed(0)
    assert not torch.equal(net(images()), net(images()))
    assert torch.equal(net.eval()(images()), net(images()))


def test_weight_decay_and_layer_decay_know_cells():
    assert build().no_weight_decay() == set()
    matcher = build().group_matcher()
    assert timm.models.group_parameters(build(), matcher)[0]
    coarse = timm.models.group_parameters(build(), build().group_matcher(coarse=True))
    assert {name.split(".")[1] for name in coarse[1]} == {"0"}
    assert {name.split(".")[1] for name in coarse[2]} == {"1"}
    assert {name.split(".")[1] for name in coarse[3] if name.startswith("cells")} == {"2", "3"}


def test_layer_decay_tells_cell_12_from_cell_1():
    net = build(cells=14, channels=2)
    depths = timm.models.group_parameters(net, net.group_matcher(), reverse=True)
    of_cells = [depths[name] for name, _ in net.named_parameters() if name.startswith("cells.")]
    assert of_cells == sorted(of_cells)
    assert len(set(of_cells)) == 14


def test_checkpointing_covers_every_cell_of_either_forward(monkeypatch):
    calls, net, x = [], build().train(), images()
    monkeypatch.setattr(
        "timm_models.cellnet.recompute", lambda module, cell, *states: calls.append(cell) or cell(*states)
    )
    for forward in (net.forward_features, net.forward_intermediates):
        for enable, expected in ((False, []), (True, list(net.cells))):
            calls.clear()
            net.set_grad_checkpointing(enable)
            forward(x)
            assert calls == expected


@pytest.mark.parametrize(("index", "cells"), [(0, 0), (1, 1), (2, 2), (3, 4)])
def test_an_early_stop_leaves_later_cells_out(index, cells):
    net, ran = build().eval(), []
    for cell in net.cells:
        cell.register_forward_hook(lambda cell, *_: ran.append(cell))
    net.forward_intermediates(images(), indices=[index], stop_early=True)
    assert ran == list(net.cells)[:cells]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(genotype="nonsense"), ValueError, "genotype='nonsense': must be a JSON file or one of"),
        (dict(genotype=3), TypeError, "genotype=3: must be a Genotype"),
        (dict(cells=2), ValueError, "cells=2: must be an integer ≥ 3"),
        (dict(channels=1), ValueError, "channels=1: must be an integer ≥ 2"),
        (dict(stem="deep"), ValueError, "stem='deep': must be one of 'cifar', 'imagenet'"),
        (dict(drop_path_rate=1.0), ValueError, r"drop_path_rate=1.0: must be in \[0, 1\)"),
        (dict(num_classes=-1), ValueError, "num_classes=-1: must be an integer ≥ 0"),
        (dict(aux_head=True, num_classes=0), ValueError, "aux_head=True with num_classes=0"),
        (dict(nonsense=1), TypeError, "nonsense"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("cellnet_cifar", **options)


def test_positions_of_features_are_checked():
    net = build()
    with pytest.raises(ValueError, match=r"indices=\[4\]: must be integers from -4 to 3"):
        net.forward_intermediates(images(), indices=[4])
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        net.forward_intermediates(images(), output_fmt="NLC")


def test_a_file_of_a_search_is_a_models_argument():
    """What --model-kwargs passes is a string."""
    assert isinstance(timm.create_model("cellnet_cifar", genotype="p_darts", cells=3, channels=2), CellNet)
