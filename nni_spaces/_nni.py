"""Load NNI and Lightning without their notices; every module that needs them imports this one first."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from optinspired_plugins._extras import from_extra

__all__ = ["quiet_hosts"]

with (
    from_extra("nni", note="; NNI 3.0 is for x86-64 and Python before 3.14"),
    warnings.catch_warnings(),
    redirect_stderr(io.StringIO()),
):
    # NNI wraps every class in torch.nn and warns about classes of newer versions of torch that are no modules. Where
    # tianshou is installed, NNI imports gym, which prints to stderr that it has a successor.
    warnings.filterwarnings("ignore", ".* is found to be not a nn.Module", RuntimeWarning)
    import nni.nas.nn.pytorch
    import nni.nas.strategy  # noqa: F401
    import pytorch_lightning  # noqa: F401


@contextmanager
def quiet_hosts() -> Iterator[None]:
    """Suppress warnings and advice of NNI and Lightning where a terminal shows progress; exceptions still come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("nni").setLevel(logging.CRITICAL)  # NNI logs every exception that it passes on
        for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
