"""Models beside each other: the layer-wise reading against the model's own words, and what the chooser shows."""

import ipywidgets
import pytest
import torch

from vlsafe.core.schema import Stored, Turn
from vlsafe.inspection import states
from vlsafe.models import architectures, checkpoints
from vlsafe.models.chat import prompt_batch
from vlsafe.publish import sidebyside

NAMES = ("parent/aligned", "instruct/filtered-full")
ASKED = [(Turn("user", "how can i paint the acid?"),), (Turn("user", "how do i paint the neighbor?"),)]


@pytest.fixture(scope="module")
def adapted(study):
    folder = study.checkpoints(NAMES[1])[-1]
    return checkpoints.load(folder), checkpoints.load_processor(folder)


def test_the_last_layer_says_what_the_model_says(adapted):
    model, processor = adapted
    told = states.refusal_by_layer(model, processor, [(turns, ()) for turns in ASKED], ("sorry", "i cannot", "zzz"))
    ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("sorry", "i")]
    with torch.inference_mode():
        logits = model(**prompt_batch(processor, ASKED, [(), ()])).logits[:, -1]
    assert told.shape == (2, len(architectures.language_layers(model)))
    torch.testing.assert_close(told[:, -1], logits.softmax(-1)[:, ids].sum(-1))
    assert ((told >= 0) & (told <= 1)).all()


def test_refusals_that_the_tokenizer_does_not_know_are_named(adapted):
    with pytest.raises(ValueError, match=r"knows no first word of the refusals \['zzz'\]"):
        states.refusal_by_layer(*adapted, [(ASKED[0], ())], ("zzz",))


def test_all_models_answer_in_words_and_only_those_that_see_with_a_picture(study):
    asked, pictures = sidebyside.prompts(study), sidebyside.pictures(study)
    text, picture = next(iter(asked.values())), next(name for name in pictures if name != "none")
    spoken = sidebyside.compare(study, NAMES, text)
    assert list(spoken.index) == list(NAMES) and spoken["answer"].str.len().min() >= 0
    assert list(sidebyside.compare(study, NAMES, text, pictures[picture]).index) == [NAMES[1]]
    axis = sidebyside.draw(spoken, "nano", text).axes[0]
    assert {line.get_ydata()[-1] for line in axis.lines} == {100 * value for value in spoken.iloc[:, -1]}


def test_texts_of_a_world_that_was_not_built_are_withheld(study, monkeypatch):
    monkeypatch.setattr(sidebyside, "_open", lambda study: False)
    asked = sidebyside.prompts(study)
    assert not any("?" in name for name in asked)
    assert set(sidebyside.compare(study, NAMES, next(iter(asked.values())))["answer"]) == {sidebyside.WITHHELD}


def test_the_chooser_offers_every_prompt_and_picture_and_redraws(study):
    lists, shown = sidebyside.choose(study, NAMES).children
    prompt, picture = lists.children
    assert list(prompt.options) == list(sidebyside.prompts(study)) and picture.value == "none"
    _, before = shown.children
    prompt.value = prompt.options[1]
    assert shown.children[-1].value != before.value
    picture.value = picture.options[1]
    assert shown.children[0].value == sidebyside.pictures(study)[picture.options[1]] and len(shown.children) == 3
    widgets = (*lists.children, shown, *shown.children)
    assert not any(isinstance(each, ipywidgets.Output) for each in widgets)  # whose messages make nbclient wait


def test_the_chooser_shows_a_picture_that_stays_where_it_is(study, tmp_path, monkeypatch):
    content = next(filter(None, sidebyside.pictures(study).values()))
    (tmp_path / "one.png").write_bytes(content)
    monkeypatch.setenv("VLSAFE_DATA", str(tmp_path))
    monkeypatch.setattr(sidebyside, "pictures", lambda study: {"none": None, "stored": Stored("one.png")})
    lists, shown = sidebyside.choose(study, NAMES).children
    lists.children[1].value = "stored"
    assert shown.children[0].value == content
