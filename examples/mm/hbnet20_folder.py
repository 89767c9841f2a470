"""HBNet-20 on a folder of images, with mmengine only.

The environment variable DATA names a folder with train/<class>/ and val/<class>/.
"""

custom_imports = dict(imports=["optinspired_plugins.mm", "folder"], allow_failed_imports=False)
data_root = "{{$DATA:runs/digits}}"

model = dict(type="Classifier", num_classes=10, backbone=dict(type="HBNet", depth=20, out_indices=(2,)))

train_dataloader = dict(
    dataset=dict(type="Folder", root=data_root + "/train", size=16),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    batch_size=32,
    num_workers=0,
)
val_dataloader = dict(
    dataset=dict(type="Folder", root=data_root + "/val", size=16),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    batch_size=100,
    num_workers=0,
)
val_evaluator = dict(type="Accuracy")

optim_wrapper = dict(
    constructor="NoWeightDecayOptimWrapperConstructor",  # not for α and β
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=10, by_epoch=True)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict()

default_hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="accuracy", rule="greater"))
custom_hooks = [dict(type="EMAHook", momentum=0.01, update_buffers=True)]
randomness = dict(seed=0)
