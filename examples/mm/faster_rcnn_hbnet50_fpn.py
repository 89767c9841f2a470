"""Faster R-CNN on HBNet-50, from mmdetection's base of the same detector.

mmdetection needs mmcv with compiled operators: docs/guide/mmengine.md. Not trained on its data set here.
"""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["optinspired_plugins.mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="HBNet",
        depth=50,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        init_cfg=dict(type="Pretrained", checkpoint="{{$WEIGHTS:hbnet50.pth}}"),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(constructor="NoWeightDecayOptimWrapperConstructor")  # not for α and β
