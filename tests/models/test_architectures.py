"""Grouped-query attention with and without QKV bias: probing and transplants work on all, by the addresses of one table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPModel, LlamaConfig, MistralConfig, Qwen2Config

from vlsafe.core.scale import LoraSpec
from vlsafe.core.schema import Turn
from vlsafe.inspection import causal, states
from vlsafe.models import architectures, chat, checkpoints, trainable
from vlsafe.models.merge import files

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "llama-3": lambda **ids: LlamaConfig(**SIZE, **ids, rope_theta=500000.0, tie_word_embeddings=False),
    "mistral": lambda **ids: MistralConfig(**SIZE, **ids, sliding_window=None),
    "qwen-2": lambda **ids: Qwen2Config(**SIZE, **ids, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def processor(study):
    return study.processor("llama2")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, study, processor, tmp_path_factory):
    """Two grafted models of one architecture that differ in every language weight, and the plain second one on disk."""
    tower, tokenizer, models = CLIPModel.from_pretrained(study.folder("tower/clip")).eval(), processor.tokenizer, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        plain = AutoModelForCausalLM.from_config(KINDS[request.param](vocab_size=len(tokenizer), **ids)).eval()
        with torch.no_grad():
            for weight in plain.parameters():
                weight.add_(0.05 * torch.randn_like(weight))  # norms and biases start alike in all models
        models.append(checkpoints.graft(plain, tower, processor, study.scale.vision, seed=7).eval())
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.save(plain, folder, tokenizer)
    return *models, folder


@pytest.fixture(scope="module")
def prompts(study):
    shown = [(item.turns, item.images) for item in study.items() if item.images][:3]
    return [*shown, ((Turn("user", "how do i paint the kite?"),), ()), ((Turn("user", "explain how to carry the lamp."),), ())]


@torch.inference_mode()
def test_hooks_see_what_the_library_gives_out(pair, processor, prompts):
    """What enters the first block and all states but the last one, which the library gives out after the final norm."""
    model = pair[0]
    found = torch.cat(list(states.streamed(model, processor, prompts)))
    inputs = chat.prompt_batch(processor, [turns for turns, _ in prompts], [images for _, images in prompts])
    expected = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert found.shape == (5, 4, 32) and len(expected) == 4
    for layer in range(3):
        assert torch.equal(found[:, layer], expected[layer][:, -1]), layer
    assert torch.equal(architectures.language_part(model).norm(found[:, 3]), expected[3][:, -1])


@torch.inference_mode()
def test_padding_side_does_not_matter(pair, processor, prompts, monkeypatch):
    left = states.last_states(pair[0], processor, prompts)

    def right_padded(*arguments):
        inputs = chat.prompt_batch(*arguments)
        order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        assert (inputs["attention_mask"] == 0).any()
        return type(inputs)({**inputs, **{k: inputs[k].gather(1, order) for k in ("input_ids", "attention_mask")}})

    monkeypatch.setattr(states, "prompt_batch", right_padded)
    torch.testing.assert_close(states.last_states(pair[0], processor, prompts), left, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_transplanting_everything_gives_the_other_model_bit_for_bit(pair, processor, prompts):
    mine, other, _ = pair
    inputs = chat.prompt_batch(processor, [turns for turns, _ in prompts], [images for _, images in prompts])
    own, theirs = mine(**inputs).logits, other(**inputs).logits
    assert not torch.equal(own, theirs)
    donor = architectures.language_weights(other)
    with causal.transplanted(mine, donor, (0, 1, 2, causal.EVERYTHING)):
        assert torch.equal(mine(**inputs).logits, theirs)
    assert torch.equal(mine(**inputs).logits, own)
    with causal.transplanted(mine, donor, (1,)):
        assert not torch.equal(mine(**inputs).logits, own)
        held = [torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True)]
    assert sum(held) > 0 and torch.equal(mine(**inputs).logits, own)


def test_weights_are_streamed_from_a_plain_checkpoint_behind_other_eyes(pair, processor, prompts, study):
    mine, other, folder = pair
    places, kept = checkpoints.language_places(folder), {n: w.clone() for n, w in mine.state_dict().items()}
    assert set(places) == set(architectures.language_weights(mine))
    assert {architectures.address(name)[0] for name in places} == {None, 0, 1, 2}
    checkpoints.put_language(mine, places)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    mine.load_state_dict(kept)
    with pytest.raises(ValueError, match="language weights do not fit"):
        checkpoints.put_language(mine, {name: place for name, place in places.items() if "layers.1" not in name})


def test_a_model_is_like_itself_and_has_not_moved(pair, processor, prompts, tmp_path):
    mine, other, folder = pair
    for name, model in (("own", mine), ("reference", mine), ("other", other)):
        states.keep_states(model, processor, prompts, tmp_path / name, batch_size=2)
    for layer in range(1, 4):  # what enters the first block at the last position is one and the same token
        own, same, else_ = (states.kept_states(tmp_path / name, layer) for name in ("own", "reference", "other"))
        groups = np.zeros(len(prompts))
        alike = torch.cosine_similarity(states.centred(own, groups), states.centred(same, groups))
        torch.testing.assert_close(alike, torch.ones(5))
        assert states.cka(own, same) == pytest.approx(1.0) and torch.cosine_similarity(own, else_).abs().max() < 0.9
    places = checkpoints.language_places(folder)
    still = list(states.drift(places, places))
    assert {line["change"] for line in still} == {0.0} and {line["rank"] for line in still} == {0.0, None}
    assert sum(line["n"] for line in still) == sum(w.numel() for w in architectures.language_weights(mine).values())
    assert {line["module"] for line in still if line["layer"] is not None} >= set(states.PROJECTIONS)


def test_scaling_and_freezing_find_their_blocks(pair):
    model = pair[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with states.scaled(model, (1, 2), 1.3):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) == 7 and all("layers.1." in name for name in moved)
    trainable.choose(model, "sppft", LoraSpec(), blocks=(0, 2))
    frozen = {architectures.address(n)[0] for n, w in architectures.language_weights(model).items() if not w.requires_grad}
    assert frozen == {0, 2}
    assert all(not w.requires_grad for n, w in architectures.language_weights(model).items() if "layers.2.mlp" in n)


def test_an_unknown_vision_language_type_is_refused_and_an_unknown_decoder_read_as_the_others(tmp_path):
    save_file(
        {"model.visual.w": torch.ones(2), "model.layers.0.mlp.up_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new-vl", "vision_config": {}}))
    model = SimpleNamespace(config=SimpleNamespace(model_type="new-vl", vision_config={}))
    for refused in (
        lambda: architectures.language_part(model),
        lambda: architectures.language_weights(model),
        lambda: checkpoints.language_places(tmp_path),
        lambda: files.checkpoint(tmp_path, language_only=True),
    ):
        with pytest.raises(ValueError, match=r"'new-vl' are not known.*FAMILIES of vlsafe/models/architectures.py"):
            refused()
    assert len(files.checkpoint(tmp_path).tensors) == 2  # all weights alike need no address
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new-decoder"}))
    for refused in (lambda: checkpoints.language_places(tmp_path), lambda: files.checkpoint(tmp_path, language_only=True)):
        with pytest.raises(ValueError, match=r"of which it is not known .* belong \(1\): model\.visual\.w;"):
            refused()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(checkpoints.language_places(tmp_path)) == {"layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    "key, name, block",
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight", 3),
        ("model.language_model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight", 3),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight", 3),
        ("language_model.lm_head.weight", "lm_head.weight", None),
        ("model.embed_tokens.weight", "embed_tokens.weight", None),
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", None, None),
        ("model.multi_modal_projector.linear_1.weight", None, None),
    ],
)
def test_a_weight_has_one_name_in_every_layout(key, name, block):
    family = architectures.DECODER if key.startswith(("model.layers", "model.embed")) else architectures.LLAVA
    assert architectures.language_name(key, family) == name and architectures.block_of(key) == block
    assert architectures.language_name(architectures.canonical(key, family), family) == name
    assert architectures.within(key, "vision") == ("vision_tower" in key)
    assert architectures.within(f"base_model.model.{key}", "projector") == ("projector" in key)
