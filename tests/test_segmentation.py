"""The networks as encoders of segmentation_models_pytorch."""

import pytest
import torch
from extras import needs

needs("segmentation_models_pytorch")

import segmentation_models_pytorch as smp

SMALL = {
    "tu-hbnet18": {},
    "tu-optnet18": dict(algorithm="agd"),
    "tu-agdnet121": dict(block_config=(2, 2, 2, 2), growth_rate=8),
}


def build(decoder, encoder, **options):
    torch.manual_seed(0)
    model = getattr(smp, decoder)(encoder, encoder_weights=None, classes=3, **SMALL[encoder], **options)
    return model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", SMALL)
@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet"])
def test_decoders_train_them(decoder, encoder):
    model, images = build(decoder, encoder)
    masks = model(images)
    masks.square().mean().backward()
    assert masks.shape == (2, 3, 64, 64)
    assert all(p.grad is not None for p in model.decoder.parameters())
    stem = next(p for name, p in model.encoder.named_parameters() if "conv" in name)
    assert stem.grad.norm() > 0


@pytest.mark.parametrize("encoder", ["tu-hbnet18", "tu-optnet18"])
def test_dilated_encoders(encoder):
    model, images = build("DeepLabV3Plus", encoder, encoder_output_stride=16)
    assert model.encoder(images)[-1].shape[-1] == 4
    assert model(images).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("encoder", SMALL)
def test_checkpointing_keeps_the_gradients(encoder):
    gradients = []
    for saves in (False, True):
        model, images = build("FPN", encoder)
        model.double().encoder.model.set_grad_checkpointing(saves)
        model(images.double()).square().mean().backward()
        gradients.append([p.grad for p in model.encoder.parameters() if p.grad is not None])
    assert gradients[0]
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, stored, rtol=1e-8, atol=1e-10)
