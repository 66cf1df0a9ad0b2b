"""Images and sound: what a processor makes of them, and inputs that are no token ids.

Processors are built from objects, offline: an image processor of a few pixels and the tests' own tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPProcessor,
    LlavaProcessor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from lensbridge import InputError, TransformerBridge

SIDE = {"height": 32, "width": 32}
IMAGE_TOKEN = 99
"""The id of the first token added to the tests' tokenizer."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def images() -> list[Tensor]:
    """Two pictures of different sizes, [3, height, width] of bytes."""
    pytest.importorskip("PIL", reason="image processors need pillow")
    seed = torch.Generator().manual_seed(6)
    shapes = ((3, 40, 48), (3, 32, 32))
    return [torch.randint(0, 256, s, generator=seed, dtype=torch.uint8) for s in shapes]


@pytest.fixture
def sound() -> list[list[float]]:
    """Two recordings of different lengths."""
    seed = torch.Generator().manual_seed(6)
    return [torch.randn(n, generator=seed).tolist() for n in (400, 320)]


@pytest.fixture
def llava_processor(new_tokenizer: Any) -> LlavaProcessor:
    """Sixteen patches and a class token an image."""
    tokenizer = new_tokenizer(padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_TOKEN
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=SIDE, crop_size=SIDE),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@pytest.fixture
def llava(tiny: Any, llava_processor: LlavaProcessor) -> TransformerBridge:
    """A tiny LLaVA with its processor."""
    model = tiny("llava", "vlm", image_token_index=IMAGE_TOKEN)
    return TransformerBridge(model, processor=llava_processor)


# --- text with images ---------------------------------------------------------------------------------------


def test_text_with_an_image(
    llava: Any, llava_processor: Any, images: list[Tensor], plain: Any
) -> None:
    """What the processor makes is what the model is given; the image matters, in every tower."""
    text = "<image>what is it"
    inputs = llava.prepare_multimodal_inputs(text, images=images[0])
    theirs = llava_processor(text=text, images=images[0], return_tensors="pt")
    assert set(inputs) == set(theirs)
    assert all(torch.equal(inputs[name], theirs[name]) for name in theirs)
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == 16
    model = llava.original_model
    expected = model(**theirs).logits
    logits, cache = llava.run_with_cache(**inputs)
    plain_run = llava(**inputs)
    assert torch.equal(plain_run, expected)
    assert plain.gap(logits, expected) < 5e-6
    assert cache["vision_blocks.0.hook_out"].shape == (1, 17, 64)
    assert cache["blocks.0.hook_out"].shape[:2] == inputs["input_ids"].shape
    other = llava.prepare_multimodal_inputs(text, images=images[1])
    assert plain.gap(llava(**other), expected) > 1e-5


def test_several_texts_and_images(llava: Any, images: list[Tensor], plain: Any) -> None:
    """A padded batch gives each row what it gives alone."""
    texts = ["<image>ab", "<image>what is it"]
    inputs = llava.prepare_multimodal_inputs(texts, images=images, padding=True)
    assert inputs["attention_mask"].min() == 0
    assert torch.equal(
        llava(**inputs)[1:],
        llava.original_model(
            **inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        ).logits[1:],
    )
    batch = llava(**inputs)
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        alone = llava.prepare_multimodal_inputs(text, images=image)
        length = alone["input_ids"].shape[1]
        assert plain.gap(batch[row, -length:], llava(**alone)[0]) < 1e-5


def test_text_alone_with_a_processor(llava: Any) -> None:
    """The processor's tokenizer is the bridge's, so plain text works too."""
    assert llava.tokenizer is llava.processor.tokenizer
    ids = llava.to_tokens("ab")
    assert torch.equal(llava("ab"), llava.original_model(ids).logits)
    inputs = llava.prepare_multimodal_inputs("ab")
    assert "pixel_values" not in inputs
    assert torch.equal(llava(**inputs), llava.original_model(inputs["input_ids"]).logits)


def test_keywords_reach_the_processor(llava: Any, images: list[Tensor]) -> None:
    """What else is given goes to the processor and wins."""
    inputs = llava.prepare_multimodal_inputs(
        "<image>ab", images=images[0], padding="max_length", max_length=40
    )
    assert inputs["input_ids"].shape == (1, 40)


def test_another_tokenizer_than_the_processors(
    tiny: Any, llava_processor: Any, tokenizer: Any
) -> None:
    """A tokenizer that is given is used for text; the processor keeps its own."""
    bridge = TransformerBridge(tiny("llava", "vlm"), tokenizer, llava_processor)
    assert bridge.tokenizer is tokenizer
    assert bridge.processor is llava_processor


def test_no_processor(tiny: Any, tokenizer: Any, images: list[Tensor]) -> None:
    """Without a processor there is an error that says what to do; a processor can be set later."""
    bridge = TransformerBridge(tiny("llava", "vlm", image_token_index=IMAGE_TOKEN), tokenizer)
    with pytest.raises(InputError, match=r"bridge\.processor = AutoProcessor"):
        bridge.prepare_multimodal_inputs("<image>ab", images=images[0])


def test_a_processor_set_later(tiny: Any, llava_processor: Any, images: list[Tensor]) -> None:
    """bridge.processor can be set at any time, as the error suggests."""
    bridge = TransformerBridge(tiny("llava", "vlm", image_token_index=IMAGE_TOKEN))
    bridge.processor = llava_processor
    inputs = bridge.prepare_multimodal_inputs("<image>ab", images=images[0])
    assert torch.equal(bridge(**inputs), bridge.original_model(**inputs).logits)


def test_texts_against_images(tiny: Any, new_tokenizer: Any, images: list[Tensor]) -> None:
    """CLIP: texts and images together, and what both towers' points show of them."""
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size=SIDE, crop_size=SIDE), tokenizer=new_tokenizer()
    )
    model = tiny("clip", "contrastive")
    bridge = TransformerBridge(model, processor=processor)
    inputs = bridge.prepare_multimodal_inputs(["a cat", "no"], images=images, padding=True)
    expected = model(**inputs).logits_per_image
    with bridge.hooks(fwd_hooks=[("vision_blocks.1.hook_out", lambda x, hook: x.clone())]):
        assert torch.equal(model(**inputs).logits_per_image, expected)
    names = ["blocks.0.hook_in", "vision_blocks.0.hook_in"]
    _, cache = bridge.run_with_cache(names_filter=names, return_type=None, **inputs)
    assert cache[names[0]].shape == (2, 5, 64)
    assert cache[names[1]].shape == (2, 17, 64)


# --- images and sound by themselves -------------------------------------------------------------------------


def test_images_by_position(tiny: Any, images: list[Tensor]) -> None:
    """A vision model takes pixel values as its input; its logits are [batch, label]."""
    model = tiny("vit", "vision")
    bridge = TransformerBridge(model)
    pixels = ViTImageProcessorPil(size=SIDE)(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    _, cache = bridge.run_with_cache(pixels, return_type=None, names_filter="blocks.1.hook_out")
    assert cache["resid_post", 1].shape[0] == 2
    assert torch.equal(bridge(pixels), model(pixel_values=pixels).logits)
    assert torch.equal(bridge(pixel_values=pixels), model(pixel_values=pixels).logits)


def test_features_by_position(tiny: Any, new_tokenizer: Any, sound: list[list[float]]) -> None:
    """Whisper takes what its feature extractor makes, by position or name, with decoder ids or without."""
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=500, n_fft=512)
    processor = WhisperProcessor(feature_extractor=extractor, tokenizer=new_tokenizer())
    model = tiny("whisper", "speech")
    bridge = TransformerBridge(model, processor=processor)
    made = processor(sound, sampling_rate=16000, return_tensors="pt")
    features = made["input_features"]
    assert features.shape == (2, 16, 32)
    ids = torch.tensor([[4, 20, 30], [4, 21, 31]])
    expected = model(input_features=features, decoder_input_ids=ids).logits
    assert torch.equal(bridge(features, decoder_input_ids=ids), expected)
    assert torch.equal(bridge(input_features=features, decoder_input_ids=ids), expected)
    _, cache = bridge.run_with_cache(
        features, decoder_input_ids=ids, names_filter=["encoder_blocks.0.hook_in", "*.hook_out"]
    )
    assert cache["encoder_blocks.0.hook_in"].shape == (2, 16, 64)
    assert torch.equal(
        bridge(features), model(input_features=features, decoder_input_ids=ids[:, :1]).logits
    )


def test_samples_by_position(tiny: Any, sound: list[list[float]], plain: Any) -> None:
    """wav2vec2 takes samples, by position or name."""
    model = tiny("wav2vec2", "ctc")
    bridge = TransformerBridge(model)
    extractor = Wav2Vec2FeatureExtractor()
    made = extractor(sound[:1], sampling_rate=16000, return_tensors="pt")
    expected = model(made["input_values"]).logits
    assert torch.equal(bridge(made["input_values"]), expected)
    assert torch.equal(bridge(input_values=made["input_values"]), expected)
    found = bridge.run_with_hooks(
        made["input_values"], fwd_hooks=[("blocks.1.hook_out", lambda x, hook: plain.noisy(x))]
    )
    path = bridge.architecture.blocks[1].path
    assert torch.equal(
        found, plain.edited(model, {"input_values": made["input_values"]}, path, plain.noisy)
    )


def test_sound_is_no_text(tiny: Any) -> None:
    """Keywords that the model does not know are refused by name."""
    bridge = TransformerBridge(tiny("llama"))
    with pytest.raises(InputError, match="pixel_values"):
        bridge(torch.tensor([[8, 9]]), pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="input_features"):
        bridge(input_features=torch.zeros(1, 16, 32))
