"""Runs steps on fake CUDA tensors in a process of its own, and prints a JSON line about each.

python tests/fake_cuda_sweep.py bfloat16-channels_last,float32-channels_last hbnet20 '{"memory": "reversible"}' …
"""

import itertools
import json
import sys
import traceback
from contextlib import ExitStack
from unittest.mock import patch

import fake_cuda

fake_cuda.install()  # before torch

import timm
import torch
import torch.nn.functional as F
from fake_kernels import fake_kernels

import timm_models
from timm_models.stages import nesterov

STAGES = (timm_models.HeavyBallStage, timm_models.ProgramStage, timm_models.AlgorithmStage, timm_models.NesterovBlock)


def layout_of(x):
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return "channels_last" if last else "contiguous_format"


def facts(name, options, dtype, layout):
    """Take a training step and a pass in evaluation; return dtypes and layouts."""
    checkpointing, fused, calls = options.pop("checkpointing", False), options.pop("fused", False), []
    kind = torch.float32 if dtype == "float32" else getattr(torch, dtype)
    model = timm.create_model(name, num_classes=7, **options).train()
    side = 64 if timm.get_pretrained_cfg(name).input_size[-1] > 64 else 32
    if checkpointing:
        model.set_grad_checkpointing()
    with ExitStack() as stack:
        backward = stack.enter_context(fake_cuda.fake_cuda())
        kernel = stack.enter_context(patch.object(nesterov, "dense_block", wraps=nesterov.dense_block))
        if fused:
            stack.enter_context(fake_kernels(lambda name, *_: calls.append(name)))
            stack.enter_context(patch("timm_models.stages.fused.WORTHWHILE", 0))
        fake_cuda.to_fake(model, getattr(torch, layout))
        outputs, gradients = [], []

        def watch(module, args, output):
            outputs.append((str(output.dtype)[6:], layout_of(output), tuple(output.shape)))
            if output.requires_grad:
                output.register_hook(lambda g: gradients.append((str(g.dtype)[6:], layout_of(g))))

        for module in model.modules():
            if isinstance(module, STAGES):
                module.register_forward_hook(watch)
        x = torch.empty(2, 3, side, side).contiguous(memory_format=getattr(torch, layout)).requires_grad_()
        with torch.autocast("cuda", kind, enabled=kind != torch.float32):
            logits = model(x)
            loss = F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
        backward(loss)
        missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.device.type != "cuda"]
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", kind, enabled=kind != torch.float32):
            evaluated = model(x.detach())
    return {
        "logits": [str(logits.dtype)[6:], str(evaluated.dtype)[6:], list(logits.shape), list(evaluated.shape)],
        "stages": sorted({d for d, *_ in outputs}),
        "layouts": sorted({f for _, f, shape in outputs if shape[2] > 1} | {f for _, f in gradients}),
        "gradients": sorted({d for d, _ in gradients}),
        "missing": missing,
        "dense_block": kernel.called,
        "kernels": sorted(set(calls)),
        "input": [str(x.grad.dtype)[6:], layout_of(x.grad)],
    }


def main(kinds, *cases):
    for kind, (name, options) in itertools.product(kinds.split(","), zip(cases[::2], cases[1::2])):
        try:
            found = facts(name, json.loads(options), *kind.split("-"))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-1500:]}
        print(json.dumps({"kind": kind, "name": name, "options": options, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
