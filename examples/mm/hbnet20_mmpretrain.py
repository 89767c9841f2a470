"""HBNet-20 in mmpretrain's image classifier, on a folder of images as in hbnet20_folder.py."""

custom_imports = dict(imports=["optinspired_plugins.mm"], allow_failed_imports=False)
default_scope = "mmpretrain"
data_root = "{{$DATA:runs/digits}}"

model = dict(
    type="ImageClassifier",
    backbone=dict(type="HBNet", depth=20, out_indices=(2,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=64, topk=(1,)),
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True),
)

pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(16, 16)),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="train", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_size=32,
    num_workers=0,
)
val_dataloader = dict(
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="val", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    batch_size=100,
    num_workers=0,
)
val_evaluator = dict(type="Accuracy", topk=(1,))

optim_wrapper = dict(
    constructor="NoWeightDecayOptimWrapperConstructor",  # not for α and β
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=10, by_epoch=True)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()
randomness = dict(seed=0)
