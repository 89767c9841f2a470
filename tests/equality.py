"""Two networks compute the same function: outputs, input gradient and every parameter gradient."""

import copy

import torch


def assert_close_in_norm(got, expected, tolerance, what, floor=0.0):
    assert got.shape == expected.shape, what
    scale = max(expected.norm().item(), floor, torch.finfo(expected.dtype).tiny)
    error = (got - expected).norm().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def randomise(model, seed=0):
    """Give every parameter and running statistic a generic value, so that no term can vanish unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim <= 1:
                scale = 0.1 if name.rpartition(".")[2].startswith(("beta", "alpha")) else 0.3
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def output_and_gradients(model, x, forward=None):
    """Return {"output", "input", parameter names…} → value or gradient of a generic scalar of the output."""
    x = x.clone().requires_grad_()
    out = (forward or model)(x)
    # Drawn in one precision: what torch draws depends on it.
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad((out * weight).sum(), [x, *parameters])
    return {"output": out.detach(), "input": gradients[0], **dict(zip(names, gradients[1:]))}


def assert_same_function(model, reference, x, forward=None, tolerance=1e-10, buffers=True):
    """``reference`` (read by ``forward`` if given) gives what ``model`` gives, gradients and buffers included."""
    got = output_and_gradients(model, x)
    expected = output_and_gradients(reference, x, forward)
    assert expected.keys() <= got.keys()
    # Some gradients are 0 in theory (a bias in front of a normalisation) and rounding in practice.
    floor = 1e-4 * max(value.norm().item() for name, value in expected.items() if name != "output")
    for name, value in expected.items():
        assert_close_in_norm(got[name], value, tolerance, name, floor)
    own = dict(model.named_buffers())
    for name, buffer in without_rules(dict(reference.named_buffers())).items() if buffers else ():
        assert_close_in_norm(own[name].double(), buffer.double(), tolerance, name)


def without_rules(state):
    """What timm's networks have, too, in a state dict or a dict of buffers."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] != "rule"}


def twin(model):
    return copy.deepcopy(model)


def put_strides_back(model):
    """Give every stride that a stage took back to timm's convolutions, in place."""
    for stage in model.stages():
        if stage.stride > 1:
            blocks = [block for name, block in stage.named_children() if name.isdigit()]
            taken = [block.conv1 for block in blocks if block.conv1.in_channels == blocks[0].conv1.in_channels]
            for conv in (*taken, blocks[0].downsample[0]):
                conv.stride = (stage.stride, stage.stride)
            stage.stride = 1
    return model
