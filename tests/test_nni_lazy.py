"""Importing nni_spaces loads no host; its exports load what they need."""

import subprocess
import sys

import pytest
from extras import needs

import nni_spaces


def loaded_by(code):
    code += "\nimport sys\nprint(*{'nni', 'pytorch_lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["nni_spaces", "nni_spaces.runs.data", "nni_spaces.runs.settings"])
def test_images_and_settings_load_no_host(module):
    assert loaded_by(f"import {module}") == []


def test_all_exports_are_there_and_search_and_retrain_are_functions():
    needs("nni")
    for name in nni_spaces.__all__:
        assert getattr(nni_spaces, name).__module__ == f"nni_spaces.{nni_spaces._EXPORTS[name]}", name
    code = "from nni_spaces import retrain, search\nimport nni_spaces.runs.search\nassert callable(retrain)"
    assert loaded_by(f"{code}\nfrom nni_spaces import search\nassert callable(search)") != []


def test_a_name_that_is_no_export_is_refused():
    with pytest.raises(AttributeError, match="'nni_spaces' has no attribute 'newton'; it offers AGDSpace"):
        nni_spaces.newton  # noqa: B018


def test_what_needs_nni_names_the_extra():
    code = """if True:
        import sys
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] == "nni" else find(name, *args)
        import nni_spaces
        try:
            nni_spaces.HBSpace
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        "no module named 'nni': needs the extra 'nni', pip install '.[nni]' in a clone; NNI 3.0 is for x86-64"
        in done.stdout
    )
