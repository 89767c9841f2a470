"""Strategies of one-shot searches: in NNI's own experiment, gradients of both orders, steps and optimisers."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from extras import needs

needs("nni", "sklearn")

from nni.nas.evaluator.pytorch import Classification
from nni.nas.experiment import NasExperiment
from nni.nas.oneshot.pytorch.differentiable import DartsLightningModule
from nni.nas.strategy import DARTS as StockDARTS
from nni.nas.strategy import GumbelDARTS as StockGumbelDARTS
from nni.nas.strategy import RandomOneShot
from pytorch_lightning.core.optimizer import LightningOptimizer

from nni_spaces import DARTS, AGDSpace, DARTSSpace, GumbelDARTS, HBSpace, HeavyBallInit
from nni_spaces.runs.data import make_loaders, read_images
from nni_spaces.runs.search import SearchModule
from nni_spaces.strategies.differentiable import _weight_steps

EXPERIMENTS = {"hb": HBSpace, "agd": AGDSpace, "darts": DARTSSpace}
SGD = partial(torch.optim.SGD, momentum=0.9)


def experiment(space, strategy, tmp_path, monkeypatch, optimizer=torch.optim.Adam):
    """NNI's own experiment on the digits."""
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(0)
    data = read_images("digits", 64)
    loaders = make_loaders(data, 16, 0, padding=0)
    evaluator = Classification(
        train_dataloaders=loaders[0], val_dataloaders=loaders[1], num_classes=10, max_epochs=1, accelerator="cpu",
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        optimizer=optimizer,
    )  # fmt: skip
    run = NasExperiment(space, evaluator, strategy)
    run.config.experiment_working_directory = tmp_path / "nni"
    try:
        run.run()
        return run.export_top_models(formatter="dict")
    finally:
        run.stop()  # or NNI does it at exit, when logging is gone


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERIMENTS)
@pytest.mark.parametrize(
    "strategy",
    [DARTS, lambda: DARTS(order=2), GumbelDARTS, StockDARTS, StockGumbelDARTS, RandomOneShot],
    ids=["first", "second", "gumbel", "stock first", "stock gumbel", "random"],
)
def test_nnis_own_experiment_takes_space_and_strategy(strategy, kind, tmp_path, monkeypatch):
    """With NNI's own evaluator; its strategies too."""
    strategy, options = strategy(), dict(channels=2, cells=3, nodes=2, in_chans=1)
    if kind == "hb" and isinstance(strategy, StockDARTS):
        options["initialization"] = HeavyBallInit()
    space = EXPERIMENTS[kind](**options)
    (sample,) = experiment(space, strategy, tmp_path, monkeypatch, SGD)
    assert space.genotype(sample).rule == space.rule
    assert space.freeze(sample)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


class Quadratic(SearchModule):
    """A loss with a known second-order gradient: ½ Σ (w − α)² on training, ½ Σ w² on validation batches."""

    def training_step(self, batch, batch_idx):
        w, alpha = self.model.w, self.model.alpha
        self.model.seen += 1  # as running statistics do
        return 0.5 * ((w - alpha) ** 2).sum() if batch == "train" else 0.5 * (w**2).sum() + alpha.sum()


def quadratic(momentum=0.0):
    """NNI's module with our step around the quadratic."""
    module = object.__new__(DARTS.module_type)
    torch.nn.Module.__init__(module)
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    net.alpha = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
    net.register_buffer("seen", torch.zeros(1))
    module.training_module = Quadratic(0.1, momentum, 0.0, 1)
    module.training_module.set_model(net)
    module.arch_parameters = lambda: [net.alpha]
    return module, net


def test_first_order_gradient_is_alphas_alone():
    module, net = quadratic()
    module.penalty = None
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    module._first_order_gradient("train", 0)
    assert torch.equal(net.alpha.grad, net.alpha.detach() - net.w.detach())
    assert net.w.grad is None, "the step that α takes costs no gradient of the weights"


def test_a_penalty_is_part_of_alphas_loss():
    module, net = quadratic()
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    module.export_probs, logged = dict, {}
    module.log_dict = logged.update
    module.penalty = lambda loss, probs: (loss + 3 * net.alpha.sum(), {"size": 3.0})
    module._first_order_gradient("train", 0)
    assert torch.equal(net.alpha.grad, net.alpha.detach() - net.w.detach() + 3)
    assert logged == {"penalty/size": 3.0}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_moves_alpha_behind_the_warm_up_and_clips_the_weights(epoch):
    module, net = quadratic()
    module._fabric, module._trainer = None, SimpleNamespace(current_epoch=epoch)
    module.warmup_epochs, module.gradient_clip_val, module.order, module.penalty = 1, 5.0, 1, None
    module.log_prob_every_n_step = 2
    module.resample = module.advance_lr_schedulers = lambda *args: None
    module.manual_backward = lambda loss, inputs: loss.backward(inputs=inputs)
    adam, clipped = torch.optim.Adam([net.alpha], 0.1), []
    module.architecture_optimizers = lambda: adam

    def advance(loss, batch_idx, clip):
        clipped.append(clip)
        assert not net.alpha.requires_grad
        assert net.w.requires_grad

    module.advance_optimization = advance
    start = net.alpha.detach().clone()
    module.training_step({"train": "train", "val": "val"}, 1)
    assert clipped == [5.0]
    torch.testing.assert_close(net.alpha.detach(), start - 0.1 * epoch)  # Adam's first step


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_gradient(momentum):
    """d/dα L_val(w − ξ (m v + ∇L_train(w, α) + λ w), α) = 1 + ξ w'."""
    module, net = quadratic(momentum)
    sgd = torch.optim.SGD([net.w], 0.1, momentum=momentum, weight_decay=0.01)
    buffer = torch.tensor([0.5, 0.25], dtype=torch.float64)
    if momentum:
        sgd.state[net.w]["momentum_buffer"] = buffer
    module.optimizers = lambda: [sgd]
    module._second_order_gradient("train", "val", 0)
    w, alpha = net.w.detach(), net.alpha.detach()
    assert w.tolist() == [1.0, -2.0], "the weights are put back"
    assert net.seen == 0, "and so are statistics"
    ahead = w - 0.1 * (momentum * buffer * bool(momentum) + (w - alpha) + 0.01 * w)
    torch.testing.assert_close(net.alpha.grad, 1 + 0.1 * ahead, rtol=1e-8, atol=1e-8)


def test_second_order_steps_by_the_settings_of_each_parameter_group():
    """d/dα L_val(w − Σ_g ξ_g (m_g v + ∇L_train + λ_g w), α) = 1 + ξ_g w'_g, each by its group."""
    module = object.__new__(DARTS.module_type)
    torch.nn.Module.__init__(module)
    net = torch.nn.Module()
    net.w = torch.nn.ParameterList(torch.tensor([value], dtype=torch.float64) for value in (1.0, -2.0))
    net.alpha = torch.nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))

    class Groups(SearchModule):
        def training_step(self, batch, batch_idx):
            w, alpha = torch.cat(list(self.model.w)), self.model.alpha
            return 0.5 * ((w - alpha) ** 2).sum() if batch == "train" else 0.5 * (w**2).sum() + alpha.sum()

    module.training_module = Groups(0.1, 0, 0, 1)
    module.training_module.set_model(net)
    settings = [dict(lr=0.1, momentum=0.9, weight_decay=0.01), dict(lr=0.5, momentum=0.0, weight_decay=0.2)]
    sgd = torch.optim.SGD([dict(params=[w], **group) for w, group in zip(net.w, settings)], 1.0)
    sgd.state[net.w[0]]["momentum_buffer"] = torch.tensor([0.5], dtype=torch.float64)
    module.optimizers = lambda: [sgd]
    module.arch_parameters = lambda: [net.alpha]
    module._second_order_gradient("train", "val", 0)
    first = 1.0 - 0.1 * (0.9 * 0.5 + (1.0 - 0.3) + 0.01 * 1.0)
    second = -2.0 - 0.5 * ((-2.0 - 0.7) + 0.2 * -2.0)
    expected = torch.tensor([1 + 0.1 * first, 1 + 0.5 * second], dtype=torch.float64)
    torch.testing.assert_close(net.alpha.grad, expected, rtol=1e-8, atol=1e-8)


def weights():
    """Two parameter groups of settings of their own."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator)) for _ in range(2)]


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_step_of_second_order_is_the_one_that_torch_takes(momentum, decay, before):
    first, second = weights()
    groups = [dict(params=[first], momentum=momentum, weight_decay=decay), dict(params=[second], lr=0.5)]
    sgd = torch.optim.SGD(groups, 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(before + 1):
        for w in (first, second):
            w.grad = torch.randn(3, dtype=torch.float64, generator=generator)
        start = [w.detach().clone() for w in (first, second)]
        pairs = [(w, group) for group in sgd.param_groups for w in group["params"]]
        steps = _weight_steps(sgd, pairs, [first.grad, second.grad])
        sgd.step()
    for w, old, step in zip((first, second), start, steps):
        torch.testing.assert_close(old - step, w.detach(), rtol=1e-14, atol=1e-15)


class OwnSGD(torch.optim.SGD):
    """An optimiser that may do anything."""


OTHERS = {
    "Adam": lambda w: [torch.optim.Adam(w)],
    "AdamW": lambda w: [torch.optim.AdamW(w)],
    "RMSprop": lambda w: [torch.optim.RMSprop(w, momentum=0.9)],
    "OwnSGD": lambda w: [OwnSGD(w, 0.1)],
    "SGD with nesterov": lambda w: [torch.optim.SGD(w, 0.1, momentum=0.9, nesterov=True)],
    "SGD with dampening": lambda w: [torch.optim.SGD(w, 0.1, momentum=0.9, dampening=0.5)],
    "SGD with maximize": lambda w: [torch.optim.SGD([dict(params=w[:1]), dict(params=w[1:], maximize=True)], 0.1)],
    "SGD and SGD": lambda w: [torch.optim.SGD(w[:1], 0.1), torch.optim.SGD(w[1:], 0.1)],
    "nothing": lambda w: [],
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_step_that_the_second_order_does_not_know_is_refused(name, wrapped):
    module, net = quadratic()
    adam = torch.optim.Adam([net.alpha])
    adam.is_arch_optimizer = True
    found = [*OTHERS[name](weights()), adam]
    found = [LightningOptimizer(optimizer) for optimizer in found] if wrapped else found
    module.optimizers = lambda: found if len(found) > 1 else found[0]  # as Lightning has it
    message = rf"order=2 with weights trained by {name}: must be one torch.optim.SGD, without dampening, maximize, n"
    with pytest.raises(ValueError, match=message):
        module._second_order_gradient("train", "val", 0)


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_the_optimiser_of_nnis_classification_is_refused_before_training(warmup_epochs, tmp_path, monkeypatch):
    space = AGDSpace(channels=2, cells=3, nodes=1, in_chans=1)
    monkeypatch.setattr(DARTS.module_type, "training_step", lambda self, batch, batch_idx: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"order=2 with weights trained by Adam: must be one torch\.optim\.SGD"):
        experiment(space, DARTS(order=2, warmup_epochs=warmup_epochs), tmp_path, monkeypatch)


def test_architecture_parameters_have_the_order_of_the_modules():
    """NNI's is that of a set of objects; Adam's moments of a resumed search would go to other parameters."""
    kept, stock = [], []  # kept, so that each has addresses of its own
    for _ in range(5):
        model = DARTS().mutate_model(AGDSpace(channels=2, cells=4, nodes=2))
        module = object.__new__(DARTS.module_type)
        torch.nn.Module.__init__(module)
        module.training_module = torch.nn.Module()
        module.training_module.model = model
        kept.append(module)
        found = {id(p): n for n, p in model.named_parameters()}
        ours, stocks = (
            [found[id(p)] for p in order(module)]
            for order in (DARTS.module_type.arch_parameters, DartsLightningModule.arch_parameters)
        )
        assert len(ours) == len(set(ours)) == 2 * (5 + 2)
        assert ours == [name for name in found.values() if name in ours]
        assert set(ours) == set(stocks)
        stock.append(stocks)
    assert any(order != ours for order in stock)


def test_alphas_optimiser_has_the_papers_hyperparameters():
    strategy = DARTS()
    module = strategy.configure_oneshot_module(SearchModule(0.1, 0.9, 3e-4, 1))
    module.training_module.set_model(strategy.mutate_model(HBSpace(channels=2, cells=3, nodes=2)))
    adam = module.configure_architecture_optimizers()
    (group,) = adam.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert module.gradient_clip_val == 5.0
    assert len(group["params"]) == 2 * 6
