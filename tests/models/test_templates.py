"""Our chat templates write what the originals write, and exactly the answers and their EOS carry loss."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlsafe.core.schema import Turn, messages
from vlsafe.models import chat

CASES = json.loads((Path(__file__).parents[1] / "cases_templates.json").read_text())
SAID = {"system": " Be kind.", "user": "What is a mug? ", "assistant": "A cup."}


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer like Llama's: pieces carry the space before a word, a line break is a token of its own, nothing is added."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first", split=True)]
    )
    core.decoder = decoders.Metaspace()
    text = [rendered for cases in CASES.values() for _, rendered in cases]
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    core.train_from_iterator([*text, "A cup. bread"] * 5, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize(("name", "roles", "text"), [(name, *case) for name, cases in CASES.items() for case in cases])
def test_a_template_writes_what_the_original_writes(pieces, name, roles, text):
    pieces.chat_template = chat.template(name)
    turns = [Turn(role, SAID[role]) for role in roles.split(",")]
    for said in (messages(turns), [{"role": turn.role, "content": turn.text} for turn in turns]):
        written = pieces.apply_chat_template(said, tokenize=False, add_generation_prompt=turns[-1].role != "assistant")
        assert written == text


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_on_the_answers_and_their_ends(pieces, name):
    pieces.chat_template = chat.template(name)
    said = (("user", "What is a mug?"), ("assistant", "A cup."), ("user", "And?"), ("assistant", "A cup. A cup."))
    turns = [Turn(role, text) for role, text in said]
    encoded = pieces.apply_chat_template(messages(turns), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert ids[0] == pieces.bos_token_id and not mask[0]
    learned = pieces.decode([token for token, on in zip(ids, mask, strict=True) if on])
    assert learned.replace(" ", "") == "Acup.</s>Acup.Acup.</s>"
    assert all(on for token, on in zip(ids, mask, strict=True) if token == pieces.eos_token_id)
    assert ids.count(pieces.bos_token_id) == (2 if name.startswith("llama2") else 1)


def test_a_picture_stands_before_the_first_request_in_every_template(pieces):
    for name in CASES:
        pieces.chat_template = chat.template(name)
        written = pieces.apply_chat_template(messages([Turn("user", "What?")], 1), tokenize=False, add_generation_prompt=True)
        assert written.count("<image>\nWhat?") == 1


def test_an_unknown_template_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown chat template 'llama9'; .*llama2, llama2-neutral, .*tulu, vicuna"):
        chat.template("llama9")


def test_what_was_written_for_one_template_is_not_taken_for_another(pieces):
    """Remembered by what a processor writes, not by which processor it is."""
    turns, writer = (Turn("user", "open the box"),), pieces
    written = {}
    for name in ("llama2", "tulu", "llama2"):
        writer.chat_template = chat.template(name)
        text = writer.apply_chat_template(messages(turns, 0), add_generation_prompt=True, tokenize=False)
        assert chat.rendered(writer, turns, 0) == text and chat.rendered(writer, list(turns), 0) == text
        written[name] = text
    assert written["llama2"] != written["tulu"]
    writer.chat_template = chat.template("llama2").replace("[INST]", "[ASK]")
    assert "[ASK]" in chat.rendered(writer, turns, 0)


@pytest.mark.xfail(strict=True, reason="every trained miniature reads them so; mended with the next world (LOG.md, 2026-11-28)")
def test_the_miniatures_tokenizer_knows_the_markers_of_its_templates():
    """The library takes one of two arguments for tokens of one's own; the markers, passed in the other, are split into words."""
    tokenizer = chat.build_tokenizer(["hello"], 64)
    for marker in chat.MARKERS:
        assert tokenizer(marker)["input_ids"] == [tokenizer.convert_tokens_to_ids(marker)]
