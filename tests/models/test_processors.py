"""Prompts of every family as its own processor makes them, from files as the hub has them; answers do not depend on the batch."""

import official
import processors
import pytest
import torch
from families import NAMES

from vlsafe.core.schema import Example, Item, Turn
from vlsafe.evaluation import engines
from vlsafe.inspection import states
from vlsafe.models import chat, checkpoints
from vlsafe.models.merge import fisher

PICTURE = official.picture((40, 60, 80), (20, 24))


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    folder = processors.published(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, checkpoints.load_processor(folder)


@pytest.mark.parametrize("pictures", [(), (PICTURE,)])
def test_inputs_are_those_of_the_librarys_own_way(family, pictures):
    """A conversation with the picture in it, tokenised by the library: BOS once, placeholders expanded, pixels alike."""
    name, _, processor = family
    images = [{"type": "image", "image": chat.open_picture(data)} for data in pictures]
    message = {"role": "user", "content": [*images, {"type": "text", "text": "what is it"}]}
    own = chat.prompt_batch(processor, [(Turn("user", "what is it"),)], [pictures])
    if name == "paligemma" and not pictures:  # its processor refuses words alone
        assert processor.tokenizer.decode(own["input_ids"][0]) == "<s>user: what is it\nassistant: \n"
        assert not own["token_type_ids"].any()  # read in both directions, padded or not
        return
    options = dict(tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    if name == "smolvlm":  # the library's way asks what does videos, which needs torchvision
        writer, template = processor.tokenizer, processor.chat_template
        text = writer.apply_chat_template([message], chat_template=template, add_generation_prompt=True, tokenize=False)
        options = dict(add_special_tokens=False, return_tensors="pt")
        library = processor(text=[text], images=[[of["image"] for of in images]] if images else None, **options)
    else:
        library = processor.apply_chat_template([message], **options)
    assert set(library) - set(own) <= {"labels"}
    assert all(torch.equal(own[key], library[key]) for key in own)
    assert own["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1


def test_an_answer_to_paligemma_is_refused_where_it_would_be_read_as_prompt(family):
    name, folder, processor = family
    row = Example("1", "rows", (Turn("user", "what is it"), Turn("assistant", "a thing")))
    if name == "paligemma":
        with pytest.raises(ValueError, match="both directions"):
            fisher.diagonal(checkpoints.load(folder), processor, [row])
    else:
        assert chat.prompt_batch(processor, [row.turns], [()])["input_ids"].shape[1]


def test_answers_in_a_batch_are_those_to_one_prompt_at_a_time(family):
    _, folder, processor = family
    model, turns = checkpoints.load(folder), [(Turn("user", f"what is {'a very ' * i}odd thing"),) for i in range(6)]
    items = [Item(str(i), "xstest", of, (PICTURE,) if i % 2 else ()) for i, of in enumerate(turns)]
    alone, together = (engines.respond(model, processor, items, "m", size, 8) for size in (1, 6))
    assert alone == together
    prompts = [(item.turns, item.images) for item in items]
    one, all_at_once = (states.last_states(model, processor, prompts, size) for size in (1, 6))
    assert torch.allclose(one, all_at_once, atol=1e-4) and not torch.allclose(one[0], one[1], atol=1e-2)


def test_what_a_processor_is_made_of_does_not_need_torchvision(family):
    name, folder, processor = family
    kind, _ = processors.SETTINGS[name]
    assert type(processor).__name__ == f"{kind}Processor" and type(processor.image_processor).__name__.endswith("Pil")
    (folder / "processor_config.json").unlink()  # older repositories name no class: it follows from the model's type
    assert type(checkpoints.load_processor(folder)).__name__ == f"{kind}Processor"
