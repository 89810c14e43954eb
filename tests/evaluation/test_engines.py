"""The engine for GPUs, here on a CPU, decodes and ranks as the library and a plain forward pass do."""

import dataclasses
from types import SimpleNamespace

import families
import pytest
import torch
from transformers import BatchEncoding

from vlsafe.core.schema import Item, Turn
from vlsafe.evaluation import decoding, engines
from vlsafe.models import chat, checkpoints


@pytest.fixture(scope="module")
def tools(begun):
    folder = begun.checkpoints("projector/filtered")[-1]
    return checkpoints.load(folder), checkpoints.load_processor(folder), begun.items()


@pytest.mark.parametrize("pictured", [True, False])
def test_a_cache_of_fixed_size_gives_the_tokens_of_the_librarys(tools, pictured, monkeypatch):
    """Twice with one decoder, whose cache the second batch finds used; short and long prompts, some that end early."""
    model, processor, items = tools
    some = [item for item in items if bool(item.images) == pictured][:24]
    parts = some[::2], some[1::2]
    prompts = [chat.prompt_batch(processor, [i.turns for i in part], [i.images for i in part]) for part in parts]
    pad, ended = processor.tokenizer.pad_token_id, 0
    free = model.generate(**prompts[0], max_new_tokens=4, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(model.generation_config, "eos_token_id", end := int(free[:, -1].mode().values))  # ends some after 4
    decoder = decoding.Decoder(model, torch.tensor([end]), pad)
    for inputs in prompts:
        with torch.inference_mode():
            plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            ours = decoder(dict(inputs), 12)
        assert torch.equal(plain, ours[:, : plain.shape[1]]) and (ours[:, plain.shape[1] :] == pad).all()
        ended += int((plain == end).any(1).sum())
    assert ended


def test_the_engine_uses_it_where_the_model_is_on_a_gpu(tools, monkeypatch):
    """Answers are those of one prompt at a time."""
    model, processor, items = tools
    some = [item for item in items if item.scoring == "generated"][::5][:20]
    one = [response.text for response in engines.respond(model, processor, some, "m", 1, 8)]
    fixed = SimpleNamespace(count=0)

    def decoder(of, tokenizer):
        fixed.count += 1
        return decoding.Decoder(of, engines._stops(of, tokenizer), tokenizer.pad_token_id)

    monkeypatch.setattr(engines, "_decoder", decoder)
    assert [response.text for response in engines.respond(model, processor, some, "m", 8, 8)] == one and fixed.count == 1


def loss_of(model, processor, item, option):
    """Of a plain forward pass over prompt and answer together."""
    turns = (*item.turns, Turn("assistant", option))
    length = len(chat.answer_tokens(processor, turns, len(item.images), item.id))
    inputs = chat.prompt_batch(processor, [turns], [item.images])
    log_probs = model(**inputs).logits[0, :-1].log_softmax(-1)
    return -float(log_probs.gather(-1, inputs["input_ids"][0, 1:, None])[-length:].sum())


@pytest.mark.parametrize("kind", ["model", "ensemble"])
def test_a_prompt_is_read_once_for_all_its_options(tools, begun, kind):
    """With its picture, and the losses are those of prompt and answer together; options of unequal length, of one token too."""
    model, processor, items = tools
    if kind == "ensemble":
        model = engines.Ensemble(model, checkpoints.load(begun.checkpoints("projector/filtered")[0]), 0.3)
    of = [item for item in items if item.scoring == "likelihood" and item.images][:6] + [i for i in items if not i.images][:3]
    ranked = [dataclasses.replace(item, options=item.options or ("red.", "", "use the spoon and the wax.")) for item in of]
    seen, member = [], model.members[0] if kind == "ensemble" else model
    handle = member.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = engines.option_losses(model, processor, ranked, 12)
    handle.remove()
    assert sum(seen) == 6 and [len(row) for row in found] == [len(item.options) for item in ranked]
    with torch.inference_mode():
        plain = [[loss_of(model, processor, item, option) for option in item.options] for item in ranked]
    for row, by_hand in zip(found, plain, strict=True):
        assert row == pytest.approx(by_hand, abs=1e-4)
    one = dataclasses.replace(ranked[-1], options=("",))  # its end alone: no answer's token is read
    assert engines.option_losses(model, processor, [one], 4)[0] == pytest.approx([plain[-1][1]], abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_reads_options_as_it_would_have_written_them(name, monkeypatch):
    """A token after the other on the cache of one prompt, in a batch with a shorter one."""
    model, pad = families.built(name), 0
    prompts = {"a": [1, 5, 9, 14, 23, 8], "b": [1, 7, 11]}
    answers = {"yes": [31, 12, 2], "no": [33, 2], "": [2], "maybe": [40, 17, 26, 2]}

    def batch(processor, turns, images):
        ids = [prompts[of.text] for (of,) in turns]
        rows = [[pad] * (6 - len(row)) + row for row in ids]
        tokens = torch.tensor(rows)
        more = {"token_type_ids": torch.zeros_like(tokens)} if name == "paligemma" else {}
        return BatchEncoding({"input_ids": tokens, "attention_mask": (tokens != pad).long(), **more})

    monkeypatch.setattr(engines, "prompt_batch", batch)
    monkeypatch.setattr(engines, "_tokens", lambda processor, item, option: answers[option])
    items = [Item(place, "b", (Turn("user", place),), options=tuple(answers), scoring="likelihood") for place in prompts]
    found = engines.option_losses(model, None, items, 8)
    for losses, (_, prompt) in zip(found, prompts.items(), strict=True):
        for loss, answer in zip(losses, answers.values(), strict=True):
            output, by_hand = model(input_ids=torch.tensor([prompt]), use_cache=True), 0.0
            for token in answer:
                by_hand -= float(output.logits[0, -1].log_softmax(-1)[token])
                output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            assert loss == pytest.approx(by_hand, abs=1e-4), answer


def test_the_probability_of_refusal_is_that_of_the_first_words(tools, monkeypatch):
    """By the library's way of decoding, by the one for GPUs, and by a plain forward pass of one prompt."""
    model, processor, items = tools
    tokenizer, some = processor.tokenizer, [item for item in items if item.scoring == "generated"][::9][:8]
    words = set(tokenizer.convert_ids_to_tokens(engines.refusing(tokenizer)))
    assert {"i", "sorry"} <= words <= set(engines.REFUSING) and tokenizer.unk_token not in words
    plain = []
    for item in some:
        inputs = chat.prompt_batch(processor, [item.turns], [item.images])
        with torch.inference_mode():
            plain.append(float(model(**inputs).logits[0, -1].softmax(-1)[engines.refusing(tokenizer)].sum()))
    found = engines.respond(model, processor, some, "m", 8, 4)
    assert [response.refusal for response in found] == pytest.approx(plain, abs=1e-5) and len(set(plain)) > 1
    monkeypatch.setattr(engines, "_decoder", lambda m, t: decoding.Decoder(m, engines._stops(m, t), t.pad_token_id))
    assert [response.refusal for response in engines.respond(model, processor, some, "m", 8, 4)] == pytest.approx(plain, abs=1e-5)
