"""Every family of vision-language models, tiny and random: where its parts are, and a merge with a text parent that fits."""

import pytest
import torch
from families import CROSSED, NAMES, built, inputs, parent, saved
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vlsafe import cli
from vlsafe.inspection import states
from vlsafe.models import architectures, checkpoints
from vlsafe.models.architectures import EMBEDDING, HEAD
from vlsafe.models.merge import files
from vlsafe.models.merge.rules import How


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    """A model, a fitting text parent, and a folder with both, the model in both layouts."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model, text = built(name), parent(name, 1)
    for layout in ("memory", "hub"):
        saved(model, folder / layout, layout)
    saved(text, folder / "text")
    return name, model, text, folder


@torch.inference_mode()
@pytest.mark.parametrize("pictures", [False, True])
def test_hooks_see_what_the_library_gives_out(family, pictures):
    """What enters the first block and leaves every block but the last, whose output the library gives after the final norm.
    Mllama's blocks that attend to pictures are not counted: what leaves the one before is followed by what they put out."""
    name, model, _, _ = family
    found, batch = [], inputs(name, pictures)
    with states.hooked(model, lambda state: found.append(state.clone())):
        expected = list(model(**batch, output_hidden_states=True, use_cache=False).hidden_states)
    if name == "mllama" and pictures:
        expected = [state for i, state in enumerate(expected) if i - 1 not in CROSSED]
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(architectures.final_norm(model)(found[3]), expected[3])
    logits = architectures.read_out(model, found[3])
    assert torch.allclose(logits, model(**batch).logits, atol=1e-5)


def test_language_weights_are_the_text_parents_and_nothing_else(family):
    name, model, text, _ = family
    mine, theirs = architectures.language_weights(model), architectures.language_weights(text)
    assert set(mine) == set(theirs)
    assert {n for n, weight in mine.items() if weight.shape != theirs[n].shape} == ({EMBEDDING} if name == "mllama" else set())
    parts = (architectures.vision_part(model), architectures.projector_part(model))
    others = {id(weight) for part in parts for weight in part.parameters()}
    assert others and others.isdisjoint(map(id, mine.values()))
    rest = {n for n, weight in model.named_parameters() if id(weight) not in others | set(map(id, mine.values()))}
    crossed = {n for n in rest if any(f"layers.{block}." in n for block in CROSSED)} if name == "mllama" else set()
    beside = {"model.image_newline"} if name.startswith("llava_") else set()
    assert rest == crossed | beside and bool(crossed) == (name == "mllama")
    assert len(architectures.block_names(model)) == 2


@torch.inference_mode()
def test_with_its_parents_weights_a_model_reads_text_as_the_parent_does(family):
    """PaliGemma attends to a whole prompt in both directions, its parent does not."""
    name, _, text, folder = family
    both = built(name, 5)
    checkpoints.put_language(both, checkpoints.language_places(folder / "text"))
    batch = inputs(name, pictures=False)
    more = {"token_type_ids": torch.ones_like(batch["input_ids"])} if name == "paligemma" else {}
    if name == "paligemma":
        assert not torch.allclose(both(**batch).logits, text(**batch).logits, atol=1e-3)
        assert torch.allclose(both(**batch, **more, labels=batch["input_ids"]).logits, text(**batch).logits, atol=1e-5)
    else:
        assert torch.allclose(both(**batch).logits, text(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("layout", ["memory", "hub"])
def test_files_of_both_layouts_have_the_names_in_memory(family, layout):
    _, model, _, folder = family
    kind, keys = architectures.family_of(folder / layout), load_file(folder / layout / "model.safetensors")
    memory = set(load_file(folder / "memory" / "model.safetensors"))
    assert {architectures.canonical(key, kind) for key in keys} == memory
    assert all(architectures.part_of(key, kind) for key in keys)
    for unknown in ("model.something.weight", "layers.0.mlp.up_proj.weight", "norm.weight"):
        assert architectures.part_of(unknown, kind) is None
    places, weights = checkpoints.language_places(folder / layout), architectures.language_weights(model)
    assert set(places) == set(weights)
    assert all(torch.equal(checkpoints.read_tensor(places[n]), weight) for n, weight in weights.items())


@pytest.mark.parametrize("layout", ["memory", "hub"])
@pytest.mark.parametrize("padding", [0, 4])
def test_merging_the_language_model_alone(family, layout, padding, tmp_path, capsys):
    """Language weights equal the formula, rows that the parent lacks and all other weights are A's, and the result loads."""
    name, _, text, folder = family
    if padding:
        text = parent(name, 1, padding)
        saved(text, tmp_path / "text")
    b = tmp_path / "text" if padding else folder / "text"
    call = ["merge", "linear", str(folder / layout), str(b), "--ratio", "0.3", "--language-only", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 0
    line = capsys.readouterr().out
    before, after = load_file(folder / layout / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kind, theirs = architectures.family_of(folder / layout), architectures.language_weights(text)
    assert list(before) == list(after)
    merged = 0
    for key, value in before.items():
        inside = architectures.language_name(key, kind)
        if inside is None:
            assert torch.equal(after[key], value), key
            continue
        merged += 1
        rows = len(theirs[inside])
        assert torch.equal(after[key][:rows], torch.lerp(value[:rows], theirs[inside].detach(), 0.3)), key
        assert torch.equal(after[key][rows:], value[rows:]), key
    assert (
        merged == len(theirs) and f"{len(before)} tensors: {merged} merged, 0 copied, {len(before) - merged} left alone" in line
    )
    assert ("the first 68 rows, the other 4 are A's" in line) == (bool(padding) and name != "mllama")
    assert ("the first 60 rows, the other" in line) == (bool(padding) and name == "mllama")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.isfinite(loaded(**inputs(name)).logits).all()


def test_tied_and_untied_but_equal_heads_are_one(tmp_path):
    """The head in a second tensor that is equal to the embedding is left out or filled in; another one is refused."""
    saved(built("smolvlm"), tmp_path / "a")  # tied
    tied, untied = parent("smolvlm", 1), parent("smolvlm", 1, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    saved(tied, tmp_path / "tied")
    saved(untied, tmp_path / "equal")
    torch.nn.init.normal_(untied.lm_head.weight)
    saved(untied, tmp_path / "different")
    results = {}
    for b in ("tied", "equal"):
        files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / b}, tmp_path / f"out-{b}", How(0.5), language_only=True)
        results[b] = load_file(tmp_path / f"out-{b}" / "model.safetensors")
    assert results["tied"].keys() == results["equal"].keys() and HEAD not in results["tied"]
    assert all(torch.equal(value, results["equal"][key]) for key, value in results["tied"].items())
    with pytest.raises(ValueError, match=r"one tensor in a for embedding and head, two that differ in b \(1\): lm_head\.weight"):
        files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / "different"}, tmp_path / "x", How(0.5), language_only=True)
    saved(built("idefics3"), tmp_path / "two")  # untied
    saved(tied, tmp_path / "headless")
    config = tmp_path / "headless" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(ValueError, match=r"only in a, not in b \(1\): lm_head\.weight"):
        files.merge("linear", {"a": tmp_path / "two", "b": tmp_path / "headless"}, tmp_path / "x", How(0.5), language_only=True)
    with pytest.raises(ValueError, match=r"has embed_tokens\.weight alone of embedding and head, and its config does not tie"):
        checkpoints.language_places(tmp_path / "headless")
    files.merge("linear", {"a": tmp_path / "two", "b": tmp_path / "tied"}, tmp_path / "y", How(1.0), language_only=True)
    after = load_file(tmp_path / "y" / "model.safetensors")
    assert torch.equal(after[HEAD], tied.lm_head.weight) and torch.equal(
        after[f"model.text_model.{EMBEDDING}"], tied.lm_head.weight
    )
    mine, model = architectures.language_weights(built("smolvlm", 3)), built("smolvlm", 4)
    assert HEAD not in mine
    checkpoints.put_language(model, checkpoints.language_places(tmp_path / "equal"))
    assert torch.equal(architectures.language_part(model).embed_tokens.weight, tied.lm_head.weight)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not embed_tokens\.weight, and the other model has one tensor"):
        checkpoints.put_language(model, checkpoints.language_places(tmp_path / "different"))


@pytest.mark.parametrize("name", NAMES)
def test_drift_from_a_parent_whose_vocabulary_is_padded_differently(name, tmp_path):
    """None where a model has the parent's weights, in the rows that both have; the others stay the model's."""
    model, text = built(name), parent(name, 1, padding=4)
    saved(text, tmp_path / "text")
    places, before = (
        checkpoints.language_places(tmp_path / "text"),
        architectures.language_part(model).embed_tokens.weight.clone(),
    )
    checkpoints.put_language(model, places)
    after = architectures.language_part(model).embed_tokens.weight
    rows = text.config.vocab_size
    assert torch.equal(after[:rows], text.model.embed_tokens.weight) and torch.equal(after[rows:], before[rows:])
    saved(model, tmp_path / "model", "hub")
    lines = list(states.drift(places, checkpoints.language_places(tmp_path / "model"), with_rank=False))
    assert {line["change"] for line in lines} == {0.0}
    assert sum(line["n"] for line in lines) == sum(weight.numel() for weight in text.parameters())
    saved(built(name, 3), tmp_path / "other")
    assert all(line["change"] > 0 for line in states.drift(places, checkpoints.language_places(tmp_path / "other"), False))


def test_a_parent_of_another_kind_is_refused(tmp_path):
    saved(built("llava_next"), tmp_path / "a")
    for name, kind in (("llava", "llama"), ("qwen2_vl", "qwen2")):
        saved(parent(name), tmp_path / name)
        with pytest.raises(ValueError, match=rf"has a decoder of the type '{kind}', a one of 'mistral'"):
            files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / name}, tmp_path / "x", How(0.5), language_only=True)
        assert not (tmp_path / "x").exists()


def test_another_vision_language_model_as_partner_gives_its_language_model(tmp_path):
    """Two layouts, two families: LLaVA-NeXT with LLaVA's blocks; old and new names of `image_newline` in a whole merge."""
    one, other = built("llava_next", 0, text_config=built("llava").config.text_config.to_dict()), built("llava", 1)
    saved(one, tmp_path / "a", "hub")
    saved(other, tmp_path / "b")
    files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "out", How(1.0), language_only=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["image_newline"], one.model.image_newline)
    assert torch.equal(after["language_model.model.norm.weight"], other.model.language_model.norm.weight)
    assert torch.equal(after["multi_modal_projector.linear_1.weight"], one.model.multi_modal_projector.linear_1.weight)
    saved(built("llava_next", 2, text_config=one.config.text_config.to_dict()), tmp_path / "new")
    result = files.merge("linear", {"a": tmp_path / "a", "b": tmp_path / "new"}, tmp_path / "whole", How(0.5))
    assert result["merged"] == result["changed"] == len(after)
