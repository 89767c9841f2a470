"""The start of a favoured α: how far it is from the others, and where weight decay leads it."""

import math
import sys

import pytest
import torch
from extras import needs

needs("nni")

from nni_spaces import DARTS, SearchSettings
from nni_spaces.runs.search import INITIALIZATIONS, make_space, start_logit
from nni_spaces.runs.settings import INITIALIZATIONS as NAMES
from nni_spaces.spaces.initialization import AlgorithmInit
from nni_spaces.strategies.differentiable import _ArchitectureStep

# Of §9.3: 50 epochs of half of 50,000 images in batches of 64.
STEPS, RATE, DECAY = 50 * 390, 3e-4, 1e-3


class Alphas(_ArchitectureStep):
    """One α without a gradient."""

    def __init__(self, start, decay_to):
        self.alpha = torch.nn.Parameter(torch.tensor(start))
        self.alpha_start, self.alpha_decay_to = [torch.tensor(start)], decay_to
        self.alpha_weight_decay, self.alpha_betas, self.arc_learning_rate = DECAY, (0.5, 0.999), RATE

    def arch_parameters(self):
        return [self.alpha]

    def path(self, steps):
        """Yield α after every step."""
        adam = self.configure_architecture_optimizers()
        for _ in range(steps):
            self.alpha.grad = torch.zeros_like(self.alpha)
            self._decay_to_start()
            adam.step()
            yield self.alpha.detach().clone()


def weight(logit):
    return 1 / (1 + 8 * math.exp(-logit))


def test_decay_alone_takes_a_favoured_operation_to_the_others():
    """Adam's steps have the length of its rate whatever the gradient's size: 5 − k · 3e-4 until α is near 0."""
    path = torch.stack(list(Alphas([5.0, 0.0], "zero").path(STEPS)))[:, 0]
    assert weight(5) == pytest.approx(0.949, abs=1e-3)
    assert weight(path[int(0.6 * STEPS)].item()) == pytest.approx(0.42, abs=0.02)
    assert weight(path[-1].item()) == pytest.approx(0.12, abs=0.02)


def test_decay_to_the_start_leaves_it():
    for alpha in Alphas([5.0, 0.0], "start").path(100):
        assert alpha.tolist() == [5.0, 0.0]
    moved = Alphas([5.0, 0.0], "start")
    with torch.no_grad():
        moved.alpha.copy_(torch.tensor([3.0, 1.0]))
    *_, last = moved.path(1000)
    assert last.tolist() == pytest.approx([3.3, 0.7], abs=0.05)


def test_an_unknown_end_of_the_decay_is_named():
    with pytest.raises(ValueError, match="alpha_decay_to='mean': must be one of 'zero', 'start'"):
        DARTS(alpha_decay_to="mean")
    with pytest.raises(ValueError, match="alpha_decay_to='mean': must be one of zero, start"):
        SearchSettings(alpha_decay_to="mean")


@pytest.mark.parametrize(
    ("steps", "rate", "logit"),
    [(STEPS, RATE, 5.0), (128, 0.02, 2.56), (64, 0.01, math.log(8)), (1, 1e-9, math.log(8)), (10**9, 1.0, 5.0)],
)
def test_the_favourite_starts_as_far_away_as_alpha_can_travel(steps, rate, logit):
    settings = SearchSettings(space="hb", initialization="heavy-ball", alpha_lr=rate, channels=2, cells=3)
    assert start_logit(settings, steps) == pytest.approx(logit)
    assert weight(start_logit(settings, steps)) >= 0.5 - 1e-9
    assert make_space(settings, 10, 1, steps).initialization.logit == pytest.approx(logit)


@pytest.mark.parametrize(
    "options", [dict(initialization="heavy-ball"), dict(algorithm="ogm", initialization="algorithm")]
)
def test_a_given_start_is_kept(options):
    settings = SearchSettings(**options, logit=1.5, channels=2, cells=3)
    assert make_space(settings, 10, 1, 10).initialization.logit == 1.5
    with pytest.raises(ValueError, match="logit=0: must be finite and > 0"):
        SearchSettings(logit=0)


# --- a user's initialisation ------------------------------------------------------------------------------------------

OWN = """
import torch
from nni_spaces import AlgorithmInit

class FewSkips:
    def alpha(self, rule, slot, names):
        return torch.tensor([-1.0 if "skip" in name else 0.0 for name in names])

close = AlgorithmInit(0.5)
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_start.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_start", raising=False)


def test_the_names_of_the_settings_are_those_of_the_table():
    assert tuple(INITIALIZATIONS) == NAMES


@pytest.mark.parametrize("name", ["FewSkips", "close"])
def test_an_initialisation_is_named_by_module_and_attribute(name, own):
    settings = SearchSettings(initialization=f"own_start:{name}", channels=2, cells=3, nodes=1)
    space = make_space(settings, 10, 1)
    assert settings.initialization == f"own_start:{name}", "as it is recorded"
    if name == "close":
        assert space.initialization == AlgorithmInit(0.5)
        return
    net = DARTS().mutate_model(space)
    rows = [dict(zip([*net.operations, "none"], p.tolist())) for p in net.parameters() if p.shape == (9,)]
    assert rows
    assert all(row["skip_connect"] == row["neg_skip_connect"] == -1 for row in rows)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_start:missing", ValueError, "initialization='own_start:missing': module own_start has no attribute miss"),
        ("own_start:number", TypeError, "initialization=3 has no method alpha"),
        ("no_start:FewSkips", ModuleNotFoundError, "no_start"),
    ],
)
def test_a_wrong_initialisation_is_named(name, error, message, own):
    with pytest.raises(error, match=message):
        make_space(SearchSettings(initialization=name, channels=2, cells=3), 10, 1)


@pytest.mark.parametrize("name", ["FewSkips", "own_start:", ":FewSkips", None])
def test_a_name_without_module_or_attribute_is_refused_by_the_settings(name):
    with pytest.raises(
        ValueError, match=f"initialization={name!r}: must be one of heavy-ball, .*, or module:attribute"
    ):
        SearchSettings(initialization=name)


def test_an_own_initialisation_has_its_own_logit():
    with pytest.raises(ValueError, match=r"logit=2\.0 with initialization='own_start:close': must be left out"):
        SearchSettings(initialization="own_start:close", logit=2.0)
