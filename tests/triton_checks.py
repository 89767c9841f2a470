"""Compares the Triton kernels with their plain forms, in a process of its own, and prints a JSON line about each.

TRITON_INTERPRET=1 python tests/triton_checks.py cpu     # Triton's interpreter
python tests/triton_checks.py cuda
"""

import itertools
import json
import sys

import torch

from optinspired_plugins.memory import channel_kernels as plain
from optinspired_plugins.memory import triton_kernels as fast

# Batch, channels, height, width, and channels of the wider images that an input is a slice of.
SHAPES = [(3, 24, 5, 7, 8), (2, 66, 13, 9, 0)]


class Checks:
    """The largest errors of each kernel, relative to the plain form."""

    def __init__(self, device, dtype, shape):
        self.device, self.dtype, self.errors = device, dtype, {}
        self.n, self.channels, self.height, self.width, self.more = shape
        torch.manual_seed(0)

    def images(self, more=0, scale=1.0, offset=0.0):
        x = torch.randn(self.n, self.channels + more, self.height, self.width) * scale + offset
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return x[:, : self.channels] if more else x

    def vector(self):
        return torch.randn(self.channels, device=self.device)

    def compare(self, name, found, expected):
        found, expected = found.double(), expected.double()
        error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        self.errors[name] = max(self.errors.get(name, 0.0), error if error == error else float("inf"))

    def run(self):
        x, g = self.images(self.more, 2.0, 3.0), self.images()
        weight, bias, factor = self.vector(), self.vector(), self.vector()
        affine = self.statistics(x, weight, bias)
        for f in (None, factor):
            self.compare("rectified", fast.rectified(x, affine, f), plain.rectified(x, affine, f))
        self.sums(x, g, affine)
        for rectify, through, f in itertools.product([False, True], [False, True], [None, factor]):
            self.gradients(x, g, affine, rectify, through, f)
        p, q = plain.Iterate(self.images(), self.images(0, 1e-3)), plain.Iterate(self.images())
        self.compare("dots", fast.dots(g, p, q), plain.dots(g, p, q))
        self.compare("dots", fast.dots(g, p), plain.dots(g, p))
        return self.errors

    def statistics(self, x, weight, bias):
        tracked = [plain.RunningStatistics(torch.zeros_like(bias), torch.ones_like(bias), 0.1) for _ in range(3)]
        affine = plain.normalization(x, weight, bias, 1e-5, tracked[0])
        self.compare("normalization", fast.normalization(x, weight, bias, 1e-5, tracked[1]), affine)
        of, count = torch.empty(2, 2, self.channels + 3, device=self.device), x.numel() // self.channels
        for module, out in zip((plain, fast), of):
            module.moments(x, out[:, 3:])
        self.compare("moments", of[1][:, 3:], of[0][:, 3:])
        again = fast.affine_of_moments(of[0][:, 3:], count, weight, bias, 1e-5, tracked[2])
        self.compare("affine_of_moments", again, affine)
        for other in tracked[1:]:
            self.compare("running mean", other.mean, tracked[0].mean)
            self.compare("running variance", other.var, tracked[0].var)
        return affine

    def sums(self, x, g, affine):
        wide, narrow = plain.Iterate(self.images(), self.images(0, 1e-3)), plain.Iterate(self.images(self.more))
        numbers = [0.5, 1.5, -1.0]
        factors = numbers, torch.tensor(numbers, device=self.device)
        terms = (), (wide,), (wide, narrow), (narrow, wide)
        for a, iterates, is_wide, f in itertools.product([None, affine], terms, [False, True], factors):
            expected = plain.add(f, x, a, *iterates, wide=is_wide)
            found = fast.add(f, x, a, *iterates, wide=is_wide)
            assert (found.low is None) == (expected.low is None)
            self.compare("wide add" if is_wide else "add", found.wide(), expected.wide())

    def gradients(self, x, g, affine, rectify, through, factor):
        totals = torch.ones(2, 2, self.channels + 5, device=self.device)
        expected, found = (
            module.gradient_sums(g, x, affine, rectify, through, factor, total)
            for module, total in zip((plain, fast), totals)
        )
        for name, a, b in zip(expected._fields, found, expected):
            self.compare(f"gradient of {name}", a, b)
        self.compare("total", totals[1], totals[0])
        for coefficients in (None, expected.coefficients):
            arguments = g, x, affine, coefficients, rectify, factor
            pair = [module.gradient_of_input(*arguments) for module in (fast, plain)]
            self.compare("gradient of input", *pair)
            into = self.images(5)
            copies = [torch.empty_like(into).copy_(into) for _ in range(2)]
            for module, copy in zip((fast, plain), copies):
                module.gradient_of_input(*arguments, copy)
            self.compare("added gradient of input", *copies)


def main(device):
    fast._PROGRAMS = 8  # several parts per channel even for small images
    for dtype, shape in itertools.product((torch.float32, torch.float16, torch.bfloat16), SHAPES):
        errors = Checks(device, dtype, shape).run()
        print(json.dumps({"dtype": str(dtype)[6:], "shape": shape, "errors": errors}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
