"""The mmengine backbones under mmengine's Runner, under mmpretrain and in two processes, and the example configs."""

import copy
import itertools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equality import randomise, without_rules
from extras import needs
from torch import nn

needs("mmengine.runner")

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS
from mmengine.runner import Runner

import optinspired_plugins.mm  # noqa: F401

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "mm"
SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
COUNT = itertools.count()  # mmengine shares loggers between experiments of one name
SMALL = dict(type="HBNet", depth=20, layers=(1, 1, 1), channels=(16, 32, 64), out_indices=(2,))


@pytest.fixture
def config(digits_folder, monkeypatch):
    """The example of mmengine alone with a small network: 320 images, 20 steps an epoch."""
    monkeypatch.setenv("DATA", str(digits_folder))
    found = Config.fromfile(EXAMPLES / "hbnet20_folder.py")
    found.merge_from_dict({"train_cfg.max_epochs": 1, "train_dataloader.batch_size": 16, "log_level": "WARNING"})
    found.custom_hooks[0].momentum = 0.1
    return found


def train(config, folder, backbone=None, **changes):
    config = copy.deepcopy(config)
    config.merge_from_dict(changes)
    config.model.backbone = backbone or SMALL
    config.work_dir, config.experiment_name = str(folder), f"{folder.name}-{next(COUNT)}"
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def read(folder, name="epoch_1.pth"):
    return torch.load(folder / name, weights_only=False)


def accuracies(folder):
    lines = [line for file in sorted(folder.glob("*/vis_data/scalars.json")) for line in file.read_text().splitlines()]
    return [entry["accuracy"] for entry in map(json.loads, lines) if "accuracy" in entry]


# --- the Runner -------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """What a power cut is in these tests."""


@HOOKS.register_module(force=True)
class PowerCut(Hook):
    """Ends a training in the third epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == 2 and batch_idx == 3:
            raise Interrupted


@pytest.mark.slow
def test_a_resumed_training_is_an_uninterrupted_one(config, tmp_path, monkeypatch):
    config.train_cfg.max_epochs = 4
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", custom_hooks=[*config.custom_hooks, dict(type="PowerCut")])
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        train(config, tmp_path / "parts", resume=True)
    monkeypatch.setenv(SWITCH, "1")  # torch 2.6 and later; documented, not patched
    with pytest.warns(UserWarning, match=SWITCH):
        train(config, tmp_path / "parts", resume=True)
    whole, parts = read(tmp_path / "whole", "epoch_4.pth"), read(tmp_path / "parts", "epoch_4.pth")
    for kind in ("state_dict", "ema_state_dict"):
        assert whole[kind].keys() == parts[kind].keys()
        for name, value in whole[kind].items():
            assert torch.equal(value, parts[kind][name]), name
    assert accuracies(tmp_path / "parts") == accuracies(tmp_path / "whole")
    assert len(accuracies(tmp_path / "whole")) == 4
    assert accuracies(tmp_path / "whole")[-1] > 60, "it has learned something"


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(config, tmp_path):
    runner = train(config, tmp_path / "run", **{"train_cfg.max_epochs": 3})
    found = accuracies(tmp_path / "run")
    (best,) = (tmp_path / "run").glob("best_accuracy_epoch_*.pth")
    assert best.name == f"best_accuracy_epoch_{found.index(max(found)) + 1}.pth"
    assert runner.message_hub.get_info("best_score") == pytest.approx(max(found))
    # What was saved is what was evaluated: the moving average, which a backbone reads again without trusting the file.
    settings = dict(type="Pretrained", checkpoint=str(best), prefix="backbone.")
    backbone = MODELS.build(dict(SMALL, init_cfg=settings))
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, read(tmp_path / "run", best.name)["state_dict"][f"backbone.{name}"])


@HOOKS.register_module(force=True)
class Recorder(Hook):
    """Remembers the weights behind every step."""

    seen = []

    def before_train(self, runner):
        Recorder.seen = [_values(runner.model)]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        Recorder.seen.append(_values(runner.model))


def _values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_the_moving_average_is_one(config, tmp_path):
    momentum = 0.25
    hooks = [dict(type="EMAHook", momentum=momentum, update_buffers=True), dict(type="Recorder")]
    runner = train(config, tmp_path / "run", custom_hooks=hooks)
    saved = read(tmp_path / "run")
    for name, last in Recorder.seen[-1].items():
        average = Recorder.seen[1][name]  # the first update copies
        for step in Recorder.seen[2:]:
            average = (1 - momentum) * average + momentum * step[name]
        torch.testing.assert_close(saved["state_dict"][name], average, rtol=1e-4, atol=1e-5)
        assert torch.equal(saved["ema_state_dict"][f"module.{name}"], last)
    assert runner.iter == len(Recorder.seen) - 1 == 20


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [SMALL, dict(type="AGDNet", depth=40, block_config=(2, 2, 2), out_indices=(2,))])
def test_options_of_the_backbone_under_the_runner(backbone, config, tmp_path):
    """Frozen stages and running statistics stay as they were, the rest moves, with_cp or not."""
    start = MODELS.build(dict(backbone))
    torch.save(randomise(start).state_dict(), tmp_path / "start.pth")
    backbone = dict(backbone, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "start.pth")))

    def moved(name, **options):
        train(config, tmp_path / name, dict(backbone, **options), custom_hooks=[dict(type="Recorder")])
        state = read(tmp_path / name)["state_dict"]
        return {k for k, v in start.state_dict().items() if not torch.equal(state[f"backbone.{k}"], v)}

    everything = moved("plain")
    assert everything == set(without_rules(start.state_dict()))
    frozen = moved("frozen", frozen_stages=1)
    first = ("body.conv1", "body.bn1", "body.layer1", "body.features_conv0", "body.features_denseblock1")
    assert frozen == {name for name in everything if not name.startswith(first)}
    norm_eval = moved("norm_eval", norm_eval=True)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert norm_eval == {name for name in everything if not name.endswith(statistics)}
    # Equal gradients are test_mm's; here a rounding error may turn a ReLU, and the ways part.
    assert moved("with_cp", with_cp=True) == everything


# --- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mmpretrain_trains_a_classifier(digits_folder, tmp_path, monkeypatch):
    needs("mmpretrain")
    monkeypatch.setenv("DATA", str(digits_folder))
    config = Config.fromfile(EXAMPLES / "hbnet20_mmpretrain.py")
    config.log_level = "WARNING"
    runner = train(config, tmp_path / "run", **{"train_cfg.max_epochs": 5, "train_dataloader.batch_size": 16})
    assert runner.message_hub.get_scalar("val/accuracy/top1").current() > 40
    model = runner.model.eval()
    batch = next(iter(runner.train_dataloader))
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode="loss")
    assert losses["loss"].requires_grad
    (features,) = model.backbone(data["inputs"])
    logits = model.head.fc(features.mean((2, 3)))
    labels = torch.cat([sample.gt_label for sample in data["data_samples"]])
    torch.testing.assert_close(losses["loss"], nn.functional.cross_entropy(logits, labels))
    predictions = model(**data, mode="predict")
    assert [sample.pred_label.item() for sample in predictions] == logits.argmax(1).tolist()


def test_mmpretrains_own_wrapper_of_timm_builds_the_names():
    needs("mmpretrain")
    from mmpretrain.models import TIMMBackbone

    x = torch.randn(2, 3, 32, 32)
    ours = MODELS.build(dict(SMALL, out_indices=(0, 1, 2))).eval()
    options = {k: v for k, v in SMALL.items() if k in ("layers", "channels")}
    theirs = TIMMBackbone("hbnet20", features_only=True, out_indices=(1, 2, 3), **options)
    theirs.eval()
    theirs.timm_model.load_state_dict(ours.body.state_dict())
    assert all(map(torch.equal, ours(x), theirs(x)))
    for name in ("agdnet40_k12", "optnet20", "cellnet_cifar"):
        assert TIMMBackbone(name)(x)[-1].ndim == 4


def test_a_conversion_to_sync_bn_keeps_activations_in_mmpretrains_own_wrapper_too():
    needs("mmpretrain")
    from mmpretrain.models import TIMMBackbone

    theirs = randomise(TIMMBackbone("agdnet40_k12", block_config=(2, 2, 2)))
    ours = randomise(MODELS.build(dict(type="AGDNet", depth=40, block_config=(2, 2, 2), out_indices=(2,))))
    x = torch.randn(2, 3, 32, 32)
    for backbone in (theirs, ours):
        backbone.eval()
        before = backbone(x)[-1]
        converted = convert_sync_batchnorm(nn.Sequential(backbone))
        converted.eval()
        assert torch.allclose(converted(x)[-1], before, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "library", "channels", "strides"),
    [
        ("faster_rcnn_hbnet50_fpn.py", "mmdet", (256, 512, 1024, 2048), (4, 8, 16, 32)),
        ("pspnet_hbnet50_d8.py", "mmseg", (256, 512, 1024, 2048), (4, 8, 8, 8)),
    ],
)
def test_configs_of_libraries_that_need_compiled_operators(file, library, channels, strides, tmp_path, monkeypatch):
    """Merged with the library's base and built up to the backbone: no detector runs without mmcv's operators."""
    needs(library)
    source = MODELS.build(dict(type="HBNet", depth=50))
    torch.save(source.state_dict(), tmp_path / "hbnet50.pth")
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "hbnet50.pth"))
    config = Config.fromfile(EXAMPLES / file)
    assert config.model.type in ("FasterRCNN", "EncoderDecoder")
    assert config.train_dataloader.batch_size
    assert config.model.get("pretrained") is None
    backbone = MODELS.build(config.model.backbone)
    backbone.init_weights()
    assert torch.equal(backbone.body.conv1.weight, source.body.conv1.weight)
    assert backbone.out_channels == channels
    assert backbone.out_strides == strides
    assert [x.shape[1:] for x in backbone(torch.zeros(2, 3, 64, 64))] == [
        (c, 64 // s, 64 // s) for c, s in zip(channels, strides)
    ]
    if library == "mmdet":
        assert tuple(config.model.neck.in_channels) == channels
    else:
        heads = [config.model.decode_head, config.model.auxiliary_head]
        assert [head.in_channels for head in heads] == [channels[head.in_index] for head in heads]


# --- processes --------------------------------------------------------------------------------------------------------

FAMILIES = [
    dict(type="HBNet", depth=50, layers=(2, 2, 2, 2), channels=(8, 8, 8, 8), with_cp=True),
    dict(type="AGDNet", growth_rate=4, block_config=(2, 3, 2, 2), frozen_stages=1),
    dict(type="OptNet", depth=18, channels=(8, 8, 8, 8)),
    dict(type="CellNet", cells=6, channels=4),
]


def _two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = torch.randn(2, 2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for cfg in FAMILIES:
        torch.manual_seed(0)
        model = MMDistributedDataParallel(MODELS.build(dict(cfg, out_indices=(1, 2))), find_unused_parameters=False)
        for step in images:  # an unused parameter of the first would be an error of the second
            model.zero_grad()
            sum(feature.square().mean() for feature in model(step[rank])).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_no_unused_parameter(tmp_path):
    mp.spawn(_two_ranks, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b in zip(first, second):
        assert a
        assert all(map(torch.equal, a, b))


@MODEL_WRAPPERS.register_module(force=True)
class OnCPU(nn.Module):
    """Instead of DDP, which takes a SyncBatchNorm on a GPU alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def _synchronised(rank, folder, backbone):
    """A Runner with sync_bn, in a process group. It wants a GPU: torch is told that there is one."""
    import folder as components  # noqa: F401  registers the classifier

    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.cuda.set_device = lambda device: None
    method = dict(init_method=f"file://{folder}/store", rank=0, world_size=1)
    runner = Runner(
        dict(type="Classifier", num_classes=3, backbone=backbone),
        work_dir=f"{folder}/work",
        launcher="pytorch",
        env_cfg=dict(dist_cfg=dict(backend="gloo", **method)),
        cfg=dict(sync_bn="torch", model_wrapper_cfg=dict(type="OnCPU")),
        log_level="ERROR",
    )
    model = runner.model.module.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    randomise(model)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.save((model.backbone.state_dict(), x, model.backbone(x)), f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES[:2], ids=lambda cfg: cfg["type"])
def test_a_runner_with_sync_bn_changes_no_output(backbone, tmp_path):
    """In evaluation: torch's SyncBatchNorm trains on GPUs alone."""
    mp.spawn(_synchronised, args=(tmp_path, backbone), nprocs=1)
    state, x, outputs = torch.load(tmp_path / "found.pt")
    plain = MODELS.build(backbone).eval()
    plain.load_state_dict(state)
    for output, expected in zip(outputs, plain(x)):
        # The Runner's process has one thread. A lost activation is a difference of the size of the output.
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
