"""Sizes of networks and of candidates, and the penalty on the expected multiply-accumulates."""

import json

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import timm
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.strategy import Random
from numpy.random import RandomState
from torch.utils.flop_counter import FlopCounterMode
from trial_runs import STRATEGIES, TINY, sized

import timm_models  # noqa: F401
from nni_spaces import DARTS, AGDSpace, AlgorithmSpace, DARTSSpace, GumbelDARTS, HBSpace, run_trials, search
from nni_spaces.runs.search import SearchModule
from nni_spaces.runs.settings import SearchSettings
from optinspired_plugins.cells.genotype import load_genotype
from optinspired_plugins.counting import count_network

SMALL = dict(channels=4, cells=4, nodes=3)
SPACES = {
    "hb": lambda **options: HBSpace(**SMALL, **options),
    "agd": lambda **options: AGDSpace(**SMALL, **options),
    "ogm": lambda **options: AlgorithmSpace("ogm", **SMALL, **options),
}


@pytest.mark.parametrize("size", [32, (15, 9)])
def test_the_count_of_a_sample_is_that_of_its_network_in_timm(size):
    space, genotype = DARTSSpace(channels=4, cells=5), load_genotype("darts_v2")
    state = torch.get_rng_state()
    found = space.count(genotype.to_nni(), size)
    assert torch.equal(torch.get_rng_state(), state)
    network = timm.create_model("cellnet_cifar", genotype=genotype, cells=5, channels=4).eval()
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, height, width))
    assert found == (sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("kind", SPACES)
def test_the_count_of_a_sample_is_that_of_its_frozen_network(kind, stem):
    space, state, size = SPACES[kind](stem=stem), RandomState(0), (37, 22)
    counts = []
    for _ in range(2):
        sample = {label: choice.random(random_state=state) for label, choice in space.simplify().items()}
        counts.append(space.count(sample, size))
        assert counts[-1] == count_network(space.freeze(sample).to("meta"), (3, *size))
    assert counts[0].macs != counts[1].macs


def macs_of(space, size):
    return {label: {n: c.macs for n, c in row.items()} for label, row in space.candidate_counts(size).items()}


def test_candidates_without_products_cost_nothing():
    space = HBSpace(**SMALL, allowed={"normal/op_2_0": ["none", "sep_conv_3x3"]})
    table = macs_of(space, 8)
    assert table["normal/op_2_1"]["skip_connect"] == table["normal/op_2_1"]["max_pool_3x3"] == 0
    assert table["reduce/op_2_1"]["skip_connect"] > 0, "a shortcut with stride 2 has convolutions"
    # twice 3×3 depthwise and 1×1, at 8 × 8 with 4 channels, and at 2 × 2 with 16
    assert table["normal/op_2_0"] == {"sep_conv_3x3": 2 * (64 * 4 * (9 + 4) + 4 * 16 * (9 + 16)), "none": 0}
    assert all(row["none"] == 0 for label, row in table.items())


def supernet(strategy, space):
    module = strategy.configure_oneshot_module(SearchModule(0.1, 0.9, 3e-4, 1))
    module.training_module.set_model(strategy.mutate_model(space))
    return module


@pytest.mark.parametrize("strategy", [DARTS, GumbelDARTS])
@pytest.mark.parametrize("kind", SPACES)
def test_the_gradient_of_the_penalty_is_the_analytic_one(kind, strategy):
    """∂/∂α_j λ Σ_k p_k c_k = λ p_j (c_j − Σ_k p_k c_k) with p = softmax(α)."""
    module = supernet(strategy(mac_weight=3.0, image_size=8), SPACES[kind]())
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part in module.supernet_modules():
        found |= {part.label: part._arch_alpha} if kind != "agd" else dict(part._arch_alpha.items())
    with torch.no_grad():
        for alpha in found.values():
            alpha.copy_(torch.randn(alpha.shape, generator=generator))
    module._add_penalty_gradient()
    module._add_penalty_gradient()  # added to what is there
    for label, row in macs_of(module.model, 8).items():
        p, c = found[label].detach().softmax(-1), torch.tensor([*row.values()]) / 1e6
        torch.testing.assert_close(found[label].grad, 2 * 3.0 * p * (c - p @ c))
    assert all(alpha.grad is None for alpha in module.arch_parameters() if id(alpha) not in map(id, found.values()))


@pytest.mark.parametrize("weight", [0.0, 1e6])
def test_a_large_penalty_finds_cells_without_products(weight, tmp_path):
    settings = SearchSettings(
        data="digits", limit=64, batch_size=16, channels=2, cells=3, nodes=2, epochs=1, padding=0, alpha_lr=0.5,
        mac_weight=weight,
    )  # fmt: skip
    genotype = search(settings, tmp_path, accelerator="cpu")
    names = {edge.operation for node in genotype.normal for edge in node}
    free = {"max_pool_3x3", "avg_pool_3x3", "skip_connect", "neg_skip_connect"}
    assert (names <= free) == bool(weight)
    assert json.loads((tmp_path / "settings.json").read_text())["mac_weight"] == weight


def test_wrong_sizes_and_penalties_are_named():
    class Other(ModelSpace):
        def __init__(self):
            super().__init__()
            self.layer = LayerChoice([torch.nn.Linear(2, 2), torch.nn.ReLU()], label="layer")

    space = HBSpace(**SMALL)
    with pytest.raises(ValueError, match="sample has rule 'agd': must be 'hb', the rule of HBSpace"):
        space.count(load_genotype("darts_v2").to_nni())
    for size, message in ((0, "height=0: must be an integer ≥ 1"), ((8, 8, 8), r"size=\(8, 8, 8\): must be a side")):
        with pytest.raises(ValueError, match=message):
            space.candidate_counts(size)
    with pytest.raises(ValueError, match="mac_weight=-1: must be ≥ 0"):
        DARTS(mac_weight=-1, image_size=8)
    with pytest.raises(ValueError, match="mac_weight=1 with image_size=None: must be the side of the images"):
        DARTS(mac_weight=1)
    with pytest.raises(ValueError, match="mac_weight=1 with Other: must be 0, the costs are those of a CellSpace"):
        DARTS(mac_weight=1, image_size=8).mutate_model(Other())
    with pytest.raises(ValueError, match=r"mac_weight=-1\.0: must be ≥ 0"):
        SearchSettings(mac_weight=-1.0)


@pytest.mark.parametrize("name", ["random", "evolution"])
def test_a_filter_keeps_large_networks_from_being_trained(name, tmp_path):
    space = HBSpace(**TINY)
    seen = []

    def is_small(sample):
        seen.append(sample)
        return space.count(sample, 8).macs < 75_000

    ranked = run_trials(space, STRATEGIES[name](), sized(), tmp_path, 4, model_filter=is_small)
    assert len(ranked) == 4 < len(seen)
    assert all(is_small(trial.genotype.to_nni()) for trial in ranked)
    before = len(seen)
    again = run_trials(space, STRATEGIES[name](), sized(), tmp_path, 4, model_filter=is_small)
    assert again == ranked, "a resumed run asks the filter, and trains nothing"
    assert len(seen) > before


def test_a_filter_that_refuses_everything_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nni_spaces.trials.run.PATIENCE", 20)
    with pytest.raises(RuntimeError, match="model_filter: refused all of the last 20 networks"):
        run_trials(HBSpace(**TINY), Random(seed=0), sized(), tmp_path, 1, model_filter=lambda sample: False)
