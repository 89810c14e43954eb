"""Padding to a square, with the processor configuration of CLIP ViT-L/14-336: no ink is lost and no token is gained."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaConfig

from vlsafe.core.assets import Origin
from vlsafe.core.presets import PAPER
from vlsafe.core.schema import Turn
from vlsafe.data.miniature.language import vocabulary
from vlsafe.evaluation.benchmarks.mm_safetybench import typo
from vlsafe.models import chat, checkpoints

CLIP_336 = {  # preprocessor_config.json of openai/clip-vit-large-patch14-336
    "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 336,
}  # fmt: skip
PHRASES = (
    "Watering tomato seedlings", "Peeling ripe bananas", "Folding paper cranes", "Tuning an old piano", "Knitting woollen socks",
    "Polishing brass door handles", "Sorting coloured buttons", "Baking rye bread at home", "Painting garden fences",
    "Flying kites",
)  # fmt: skip
SIZES = ((1024, 1324), (640, 480))


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """The padding processor of scale `paper`, as it comes back from a checkpoint's folder, and the cropping one."""
    home = tmp_path_factory.mktemp("hub")
    tokenizer = chat.build_tokenizer(vocabulary(), 2048)
    tokenizer.save_pretrained(home / "parent")
    (home / "tower").mkdir()
    (home / "tower" / "preprocessor_config.json").write_text(json.dumps(CLIP_336))
    origins = [Origin(str(home / name), kind="model") for name in ("parent", "tower")]
    assert PAPER.vision.pad
    for name, spec in (("pad", PAPER.vision), ("crop", dataclasses.replace(PAPER.vision, pad=False))):
        chat.hub_processor(*origins, "llama2", spec).save_pretrained(home / name)
        LlavaConfig().save_pretrained(home / name)
    return {name: checkpoints.load_processor(home / name) for name in ("pad", "crop")}


def drawn(phrase, width, height):
    """A redrawn TYPO picture as the lower part of a picture of a given size, as MM-SafetyBench puts it below another picture."""
    page, text = Image.new("RGB", (width, height), "white"), Image.open(io.BytesIO(typo(phrase, width, round(90 * width / 1024))))
    page.paste(text, (0, height - text.height))
    return page


def ink(processor, picture):
    """How much darker a picture is than an empty page of its size, in pixels of the original.

    Padding is equal on both; what the tower gets is put back to [0, 1] and to the picture's scale.
    """
    config = processor.image_processor
    pixels = config([picture, Image.new("RGB", picture.size, "white")], return_tensors="np")["pixel_values"].astype(float)
    drawn, empty = pixels * np.reshape(config.image_std, (1, 3, 1, 1))
    edge = max(picture.size) if getattr(config, "do_pad", False) else min(picture.size)
    return (empty - drawn).mean(0).sum() * (edge / 336) ** 2


@pytest.mark.parametrize("size", SIZES)
def test_the_ink_of_redrawn_pictures_reaches_the_tower_whole_where_it_is_padded(processors, size):
    kept = {name: [] for name in processors}
    for phrase in PHRASES:
        picture = drawn(phrase, *size)
        whole = (255 - np.asarray(picture, float)).mean(2).sum() / 255
        for name, processor in processors.items():
            kept[name].append(ink(processor, picture) / whole)
    assert min(kept["pad"]) > 0.99 and max(kept["pad"]) < 1.01
    assert max(kept["crop"]) < 0.95, "the crop loses ink of every one"


def test_a_single_line_alone_is_whole_where_it_is_padded_and_lost_where_it_is_cropped(processors):
    """TYPO pictures by themselves are 1024 pixels wide and one or two lines high."""
    for phrase in PHRASES:
        picture = Image.open(io.BytesIO(typo(phrase)))
        whole = (255 - np.asarray(picture, float)).mean(2).sum() / 255
        assert ink(processors["pad"], picture) / whole > 0.99 and ink(processors["crop"], picture) / whole < 0.6


@pytest.mark.parametrize("size", [*SIZES, (336, 336), (30, 900), (1, 1)])
def test_padding_changes_no_token_count_and_image_tokens_agrees_with_the_processor(processors, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    for processor in processors.values():
        inputs = chat.prompt_batch(processor, [(Turn("user", "what is it?"),)], [[buffer.getvalue()]])
        in_prompt = int((inputs["input_ids"] == processor.tokenizer.image_token_id).sum())
        assert [in_prompt] == chat.image_tokens(processor, [buffer.getvalue()]) == [576]
        assert inputs["pixel_values"].shape == (1, 3, 336, 336)


def test_padding_is_the_mean_colour_around_the_whole_picture(processors):
    """A white picture twice as high as wide: zero, the mean, left and right of it, and white between. LLaVA's expand2square."""
    pixels = processors["pad"].image_processor([Image.new("RGB", (400, 800), "white")], return_tensors="np")["pixel_values"][0]
    assert np.abs(pixels[:, :, [0, 80, 255, 335]]).max() < 0.02
    white = (1 - np.array(CLIP_336["image_mean"])) / CLIP_336["image_std"]
    assert np.allclose(pixels[:, :, 168], white[:, None], atol=1e-3)


def test_a_cropping_copy_for_stage_1_prepares_pictures_as_the_towers_own_processor(processors, tmp_path):
    """And what was saved before still pads: stage 1's checkpoints are examined and go on with padded pictures."""
    picture = drawn(PHRASES[0], 640, 480)
    processors["pad"].save_pretrained(tmp_path)
    LlavaConfig().save_pretrained(tmp_path)
    cropped = chat.cropping(checkpoints.load_processor(tmp_path))
    same, padded = (one.image_processor([picture], return_tensors="np")["pixel_values"]
                    for one in (processors["crop"], checkpoints.load_processor(tmp_path)))  # fmt: skip
    mine = cropped.image_processor([picture], return_tensors="np")["pixel_values"]
    assert np.array_equal(mine, same) and not np.array_equal(mine, padded)
