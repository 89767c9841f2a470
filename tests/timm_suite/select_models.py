"""Pytest plug-in that points timm's own test file at the models named in ``SUITE_MODELS``.

The file asks ``timm.list_models`` what to test. The answer is narrowed to our names; where it asks by module (the
models with ``forward_intermediates``), each of our families answers for the module of timm's that it extends.
"""

import os

import timm

NAMES = set(os.environ["SUITE_MODELS"].split())
EXTENDS = {"hbnet": "resnet", "optnet": "resnet", "agdnet": "densenet", "cellnet": "resnet"}

_list_models = timm.list_models


def _narrowed(filter="", module="", pretrained=False, **kwargs):
    found = [n for n in _list_models(filter, pretrained=pretrained, **kwargs) if n.split(".")[0] in NAMES]
    return [n for n in found if not module or EXTENDS[n[: n.index("net") + 3]] in module]


timm.list_models = _narrowed


def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        return isinstance(name, str) and name.split(".")[0] in NAMES

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
