"""PSPNet on HBNet-50 with output stride 8, from mmsegmentation's base of the same segmentor.

mmsegmentation needs mmcv with compiled operators: docs/guide/mmengine.md. Not trained on its data set here.
"""

_base_ = "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py"

custom_imports = dict(imports=["optinspired_plugins.mm"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="HBNet",
        depth=50,
        output_stride=8,
        with_cp=True,
        init_cfg=dict(type="Pretrained", checkpoint="{{$WEIGHTS:hbnet50.pth}}"),
    ),
    decode_head=dict(in_channels=2048),
    auxiliary_head=dict(in_channels=1024),
)
sync_bn = "torch"
optim_wrapper = dict(constructor="NoWeightDecayOptimWrapperConstructor")  # not for α and β
