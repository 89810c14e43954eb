import dataclasses
import json

import pytest
import torch

from vlsafe.core.presets import MINI
from vlsafe.core.scale import Corpora
from vlsafe.core.schema import Item, Turn, messages
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import World
from vlsafe.evaluation.engines import option_losses, respond
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.training import datasets, trainers

CHAT, MIXED = MINI.backbones["mini-chat"], Corpora(text_only_share=0.3, howtos=0.4)


def test_a_grafted_model_is_its_parent_on_text(study):
    parent = checkpoints.load(study.folder("parent/aligned"))
    graft = checkpoints.load(study.checkpoints("projector/filtered")[0])
    prompt = torch.randint(12, 200, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(parent(prompt).logits, graft(prompt).logits)


def test_stage_1_moves_the_projector_and_stage_2_leaves_the_tower_alone(study):
    for name, still in (
        ("projector/filtered", ("language_model", "lm_head", "vision_tower")),
        ("instruct/filtered-full", ("vision_tower",)),
    ):
        start = study.checkpoints("projector/filtered")[0 if name.startswith("projector") else -1]
        before = checkpoints.load(start).state_dict()
        after = checkpoints.load(study.checkpoints(name)[-1]).state_dict()
        assert set(before) == set(after)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert moved and not [key for key in moved if any(part in key for part in still)]
        assert any("multi_modal_projector" in key for key in moved)


def test_checkpoints_are_ordinary_hugging_face_folders(study):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

    AutoModelForCausalLM.from_pretrained(study.folder("parent/aligned"))
    assert AutoTokenizer.from_pretrained(study.folder("parent/aligned")).chat_template
    CLIPModel.from_pretrained(study.folder("tower/clip"))
    last = study.checkpoints("instruct/filtered-full")[-1]
    AutoModelForImageTextToText.from_pretrained(last)
    assert AutoProcessor.from_pretrained(last, backend="pil").chat_template
    assert [p.name for p in study.checkpoints("instruct/filtered-full")] == ["step-000002", "step-000003", "step-000005"]


def test_loading_a_partial_checkpoint_is_refused(study, tmp_path):
    from safetensors.torch import load_file, save_file

    last = study.checkpoints("instruct/filtered-full")[-1]
    weights = load_file(last / "model.safetensors")
    weights.pop(next(key for key in weights if "layers.1" in key))
    (tmp_path / "config.json").write_text((last / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        checkpoints.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        checkpoints.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["llama2", "tulu"])
def test_only_assistant_tokens_carry_loss_row_by_row(study, name):
    world = World(0)
    rng = world.rng("loss")
    tokenizer = chat.build_tokenizer(study_vocabulary(), 256)
    tokenizer.chat_template = chat.template(name)
    processor = chat.build_processor(tokenizer, 32, 8, "full")
    pool = corpora.paint(world, 51, 0.0, rng)
    rows = corpora.instruction_rows(world, pool, 20, MIXED, 0, rng) + corpora.alignment_chats(world, 20, CHAT, rng)
    for row in rows:
        conversation = [{**m, "content": [dict(b) for b in m["content"]]} for m in messages(row.turns, len(row.images))]
        for block in (block for message in conversation for block in message["content"]):
            if block["type"] == "image":
                block["image"] = chat.open_picture(row.images[0])
        encoded = processor.apply_chat_template(
            conversation,
            tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
        )  # fmt: skip
        with_loss = encoded["input_ids"][encoded["assistant_masks"].bool()]
        answers = [turn.text for turn in row.turns if turn.role == "assistant"]
        expected = [i for text in answers for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        assert with_loss.tolist() == expected
        assert (encoded["input_ids"] == tokenizer.bos_token_id).sum() == (len(answers) if name == "llama2" else 1)


def study_vocabulary():
    from vlsafe.data.miniature.language import vocabulary

    return vocabulary()


def test_an_interrupted_training_ends_with_the_same_bits(study, tmp_path):
    """Full fine-tuning with pictures: the case in which the Trainer's own resume silently starts again."""
    start = study.checkpoints("projector/filtered")[-1]
    world = World(0)
    pool = corpora.paint(world, 51, 0, world.rng("p"))
    rows = datasets.chat_dataset(corpora.instruction_rows(world, pool, 40, MIXED, 0, world.rng("r")), True)
    fit = study.scale.instruct

    def trained(folder, stop=None):
        model = checkpoints.load(start)
        trainable.choose(model, "full", study.scale.lora)

        def progress(step):
            if step == stop:
                raise KeyboardInterrupt

        losses = trainers.sft(model, checkpoints.load_processor(start), rows, fit, folder, 0, (2, 4), progress)
        return losses, model.state_dict()

    losses, whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=3)
    # what a kill in the middle of the next checkpoint leaves behind must not be taken for one
    (tmp_path / "cut" / "checkpoint-4").mkdir()
    (tmp_path / "cut" / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    resumed_losses, resumed = trained(tmp_path / "cut")
    assert resumed_losses[-3:] == losses[-3:]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_batched_answers_equal_one_at_a_time(study):
    folder = study.checkpoints("instruct/filtered-full")[-1]
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    items = study.items()[::3]
    many = respond(model, processor, items, "m", 16, 6)
    one = respond(model, processor, items, "m", 1, 6)
    assert [r.item for r in many] == [item.id for item in items]
    assert [r.text for r in many] == [r.text for r in one]


@pytest.mark.parametrize("name", ["parent/aligned", "instruct/filtered-full"])
def test_batched_ranking_equals_one_at_a_time(study, name):
    """Options of unequal length, prompts of unequal length, text alone and with pictures."""
    folder = study.checkpoints(name)[-1]
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    items = [item for item in study.items() if item.group == "likelihood"]
    options = ("red.", "use the spoon and the wax.", "no", "it is on the left.")
    plain = [item for item in study.items() if not item.images][:5]
    items = (items if checkpoints.is_multimodal(folder) else []) + plain
    items = [dataclasses.replace(item, options=item.options or options, scoring="likelihood") for item in items]
    many, one = (option_losses(model, processor, items, size) for size in (16, 1))
    assert len(many) == len(items)
    for a, b, item in zip(many, one, items, strict=True):
        assert len(a) == len(item.options) and a == pytest.approx(b, abs=2e-4)
    letters = [response.text for response in respond(model, processor, items, "m", 16, 6)]
    assert letters == ["ABCD"[losses.index(min(losses))] for losses in one]


def test_the_loss_of_an_option_is_the_models_loss_on_the_answer(study):
    """Against the model's own loss with labels on the answer and its EOS."""
    folder = study.folder("parent/aligned")
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    item = Item("i", "b", (Turn("user", "what is it?"),), options=("red.", "use the spoon."), scoring="likelihood")
    for option, loss in zip(item.options, option_losses(model, processor, [item], 4)[0], strict=True):
        ids = chat.prompt_batch(processor, [(*item.turns, Turn("assistant", option))], [()])["input_ids"]
        answer = [*processor(option)["input_ids"], processor.eos_token_id]
        assert ids[0, -len(answer) :].tolist() == answer
        labels = ids.clone()
        labels[:, : -len(answer)] = -100
        with torch.inference_mode():
            assert loss == pytest.approx(len(answer) * float(model(ids, labels=labels).loss), abs=1e-4)


def test_last_positions_do_not_depend_on_the_padding_side():
    assert chat.last_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])).tolist() == [3, 3, 1]
    with pytest.raises(ValueError, match="no tokens at all"):
        chat.last_positions(torch.tensor([[0, 0]]))


def test_manifests_name_no_place_of_this_machine(study):
    text = json.dumps(json.loads((study.folder("instruct/filtered-full") / "manifest.json").read_text()))
    assert str(study.root) not in text
