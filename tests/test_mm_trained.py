"""Examples of a detector and a segmentor, trained by their libraries: where mmcv has compiled operators."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import needs
from PIL import Image

needs("mmengine.runner", "mmdet", "mmseg")
pytest.importorskip(
    "mmcv._ext", reason="mmcv-lite has no compiled operators: docs/guide/mmengine.md", exc_type=ImportError
)

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

import optinspired_plugins.mm  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples" / "mm"
SIDE = 128


def draw_rectangles(folder, count, seed):
    """Write images of one bright rectangle each in dim noise, their masks, and their boxes in COCO's format."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
        width, height = rng.integers(32, 96, 2)
        left, top = rng.integers(0, SIDE - width), rng.integers(0, SIDE - height)
        pixels[top : top + height, left : left + width] = rng.integers(160, 255, 3)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[top : top + height, left : left + width] = 1
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=SIDE, height=SIDE))
        box = [int(value) for value in (left, top, width, height)]
        annotations.append(dict(id=i, image_id=i, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=0))
    categories = [dict(id=1, name="rectangle")]
    text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (folder / "boxes.json").write_text(text)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A config of the examples on drawn images, with a short schedule."""
    for part, count in (("train", 48), ("val", 16)):
        draw_rectangles(tmp_path / part, count, seed=count)
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "hbnet50.pth"))
    torch.manual_seed(0)
    torch.save(MODELS.build(dict(type="HBNet", depth=50)).state_dict(), tmp_path / "hbnet50.pth")

    def read(file, **dataset):
        config = Config.fromfile(EXAMPLES / file)
        for part in ("train", "val"):
            loader = config[f"{part}_dataloader"]
            loader.update(batch_size=4 if part == "train" else 1, num_workers=0, persistent_workers=False)
            loader.dataset.update(data_root=str(tmp_path / part), **dataset)
            for step in loader.dataset.pipeline:
                if "scale" in step:
                    step.scale = (SIDE, SIDE)
        config.param_scheduler = []
        config.optim_wrapper.optimizer.lr = 0.01
        config.default_hooks.logger.interval = 1
        config.randomness, config.work_dir = dict(seed=0), str(tmp_path / "run")
        return config

    return read


def train(config):
    """Train and return what was logged."""
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    runner = Runner.from_cfg(config)
    assert runner.model.backbone.body.layer1.grad_checkpointing
    runner.train()
    files = Path(config.work_dir).glob("*/vis_data/scalars.json")
    logged = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 72
    assert np.isfinite(losses).all()
    return logged


@pytest.mark.slow
def test_the_detector_learns_to_find_rectangles(example, tmp_path):
    boxes = dict(ann_file="boxes.json", data_prefix=dict(img="images"), metainfo=dict(classes=("rectangle",)))
    config = example("faster_rcnn_hbnet50_fpn.py", **boxes)
    config.val_evaluator.ann_file = str(tmp_path / "val" / "boxes.json")
    config.model.backbone.update(frozen_stages=-1, norm_eval=False)  # the weights are random
    config.model.roi_head.bbox_head.num_classes = 1
    config.model.train_cfg.rcnn.sampler.num = 32  # of 512 regions an image
    for part in (config.model.train_cfg.rpn_proposal, config.model.test_cfg.rpn):
        part.max_per_img = 64  # of 1,000
    config.train_cfg.max_epochs = config.train_cfg.val_interval = 6
    (precision,) = (entry["coco/bbox_mAP_50"] for entry in train(config) if "coco/bbox_mAP_50" in entry)
    assert precision > 0.1, "a detector that learned nothing finds no rectangle"


@pytest.mark.slow
def test_the_segmentor_learns_to_find_rectangles(example):
    masks = dict(data_prefix=dict(img_path="images", seg_map_path="masks"), img_suffix=".png", seg_map_suffix=".png")
    names = dict(classes=("noise", "rectangle"), palette=((0, 0, 0), (255, 255, 255)))
    config = example("pspnet_hbnet50_d8.py", type="BaseSegDataset", metainfo=names, reduce_zero_label=False, **masks)
    for step in config.train_dataloader.dataset.pipeline:
        if "crop_size" in step:
            step.crop_size = (64, 64)
    config.model.data_preprocessor.size = (64, 64)
    for head in (config.model.decode_head, config.model.auxiliary_head):
        head.num_classes, head.norm_cfg = 2, dict(type="BN")  # one process without a GPU
    config.train_cfg.max_iters = config.train_cfg.val_interval = 72
    (overlap,) = (entry["mIoU"] for entry in train(config) if "mIoU" in entry)
    assert overlap > 60, "one class everywhere overlaps with less than half of two"
