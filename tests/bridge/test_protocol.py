"""Every bridge offers what the protocol names, and none is another in disguise."""

from __future__ import annotations

import inspect

import pytest

from cmai_fast.bridge import SUPPORTED, Bridge, DualBridge, EncoderDecoderBridge, ModelBridge, bridge_of
from families import FAMILIES, Family

PUBLIC = [name for name in (*vars(ModelBridge), *ModelBridge.__annotations__) if not name.startswith("_")]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


def test_supported_families_are_those_that_the_tests_run_over():
    assert tuple(f.name for f in FAMILIES) == SUPPORTED


@every_family
def test_a_bridge_has_all_of_the_protocol(family: Family):
    bridge = bridge_of(family.model())
    assert isinstance(bridge, ModelBridge)
    assert {"encode_image", "encode_text", "fuse", "losses", "needs", "text_model"} <= set(PUBLIC)
    for name in PUBLIC:
        assert getattr(bridge, name, "missing") != "missing", name
    assert set(bridge.needs) <= set(bridge.text_keys)
    vision = {id(p) for p in bridge.vision_parameters}
    assert vision and vision <= {id(p) for p in family.model().parameters()}
    assert not vision & {id(p) for p in bridge.text_model.parameters()}


@every_family
def test_a_bridge_takes_its_batch_by_name(family: Family):
    """What `inputs` hands out, `encode_text`, `fuse` and `losses` take."""
    bridge, batch = bridge_of(family.model()), family.batch(family.model(), family.samples())
    image, text = bridge.inputs(batch)
    features = bridge.encode_image(batch["pixel_values"], **image)
    loss, right = bridge.losses(features, **text)
    assert features.shape[::2] == (3, bridge.image_dim) and loss.shape == right.shape == (3,)
    assert bridge.encode_text(**text).shape == (3, bridge.text_dim)


def test_dual_encoders_and_encoder_decoders_are_no_generative_bridge():
    assert not issubclass(DualBridge, Bridge) and not issubclass(EncoderDecoderBridge, Bridge)
    for kind in (Bridge, DualBridge, EncoderDecoderBridge):
        assert not any("type: ignore[override]" in line for line in inspect.getsource(kind).splitlines())


def test_an_object_without_a_part_is_no_bridge():
    class NoText:
        encode_image = fuse = losses = None

    assert not isinstance(NoText(), ModelBridge)


@pytest.mark.parametrize("name", ["LLaVA", "CLIP", "ViT-GPT2"])
def test_images_of_the_wrong_size_name_the_model(name: str):
    family = next(f for f in FAMILIES if f.name == name)
    model = family.model()
    values = family.batch(model, family.samples())["pixel_values"][..., :-1]
    with pytest.raises(ValueError, match=rf"{type(model).__name__} reads \(N, 3, "):
        bridge_of(model).encode_image(values)
