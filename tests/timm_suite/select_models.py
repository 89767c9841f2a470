"""Pytest plug-in that points timm's own test file at the models named in ``SUITE_MODELS``.

The file asks ``timm.list_models`` what to test. The answer is narrowed to our names; where it asks by module (the
models with ``forward_intermediates``), each of our families answers for the module of timm's that it extends.
``SUITE_OPTIONS`` has arguments of models, for networks of fewer layers.
"""

import json
import os

import timm

NAMES = set(os.environ["SUITE_MODELS"].split())
EXTENDS = {"hbnet": "resnet", "optnet": "resnet", "agdnet": "densenet", "cellnet": "resnet"}

OPTIONS = json.loads(os.environ["SUITE_OPTIONS"])

_list_models, _create_model = timm.list_models, timm.create_model


def _narrowed(filter="", module="", pretrained=False, **kwargs):
    found = [n for n in _list_models(filter, pretrained=pretrained, **kwargs) if n.split(".")[0] in NAMES]
    return [n for n in found if not module or EXTENDS[n[: n.index("net") + 3]] in module]


def _shallow(name, *args, **kwargs):
    return _create_model(name, *args, **OPTIONS.get(name, {}), **kwargs)


timm.list_models, timm.create_model = _narrowed, _shallow


def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        return isinstance(name, str) and name.split(".")[0] in NAMES

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
