from collections import Counter

import numpy as np
import pytest

from vlsafe.core.schema import Example, Item, Turn, content_digest, from_row, to_row
from vlsafe.data.miniature import corpora, language, pictures
from vlsafe.data.miniature.language import Action, World, harm, kind, vocabulary
from vlsafe.evaluation import examine
from vlsafe.models.chat import build_tokenizer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_are_disjoint_and_stratified(seed):
    splits = World(seed).splits
    for by in splits.values():
        dealt = [action for actions in by.values() for action in actions]
        assert len(dealt) == len(set(dealt))
    harmful = splits["harmful"]
    assert len(harmful["test"]) >= 100
    for part in ("verb", "thing"):
        trained = Counter(getattr(action, part) for action in harmful["train"])
        assert min(trained[getattr(action, part)] for action in harmful["test"]) >= 2
    assert all(harm(action) for actions in harmful.values() for action in actions)


def test_worlds_differ_between_seeds_and_repeat_within():
    assert World(0).splits == World(0).splits
    assert World(0).splits != World(1).splits
    assert World(0).answer(Action("kill", "process")) != World(1).answer(Action("paint", "egg"))


def test_harm_belongs_to_the_pair():
    assert harm(Action("kill", "neighbor")) == "violence"
    assert kind(Action("kill", "process")) == "homonym"
    assert kind(Action("avoid", "bomb")) == "safe_context"
    assert kind(Action("paint", "neighbor")) == "plain"
    assert kind(Action("carry", "bomb")) is None


def test_every_text_of_the_world_survives_the_tokenizer():
    world = World(7)
    rng = world.rng("test")
    tokenizer = build_tokenizer(vocabulary(), 256)
    assert tokenizer.eos_token_id != 2  # CLIP's legacy pooling
    texts = [" ".join(text) for text in corpora.pretraining_texts(world, 2000, rng)]
    texts += [turn.text for row in corpora.alignment_chats(world, 500, 0.4, 0.1, (), rng) for turn in row.turns]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == " ".join(text.split())


def test_held_out_renderings_never_occur_in_training():
    """Same scene, same stream: the place of the glyph differs between the two kinds of rendering, always."""
    scene = pictures.Scene("apple", "red")
    lit = {}
    for held_out in (False, True):
        rng = np.random.default_rng(0)
        drawn = [pictures.draw(scene, 0, rng, held_out) for _ in range(60)]
        lit[held_out] = {_place(png) for png in drawn}
    assert lit[False] and lit[True] and not lit[False] & lit[True]


def _place(png):
    from vlsafe.models.chat import open_picture

    bright = np.asarray(open_picture(png))[..., 0] > 130
    return int(bright.any(0).argmax()), int(bright.any(1).argmax())


def test_training_rows_never_contain_a_test_prompt():
    world = World(3)
    rng = world.rng("x")
    pool = corpora.paint(world, 102, 0.01, rng)
    rows = corpora.instruction_rows(world, pool, 800, 0.5, 0.02, rng)
    rows += corpora.alignment_chats(world, 800, 0.4, 0.1, (), rng)
    prompts = {content_digest(Example("", "", row.turns[:1], row.images)) for row in rows if row.turns[0].role == "user"}
    items = examine.all_items(world, "test", 60)
    assert not prompts & {content_digest(item) for item in items}
    tested = set(map(str, world.actions("test", "harmful", "homonym", "safe_context", "plain")))
    assert not tested & {row.cluster for row in rows}


def test_rows_round_trip():
    world = World(1)
    rng = world.rng("x")
    pool = corpora.paint(world, 51, 0.0, rng)
    for row in [*corpora.instruction_rows(world, pool, 5, 0.5, 0, rng), *corpora.preference_pairs(world, 3, True, rng)]:
        assert from_row(type(row), to_row(row)) == row
    with pytest.raises(ValueError, match="wrong columns: \\['extra'\\]"):
        from_row(type(row), {**to_row(row), "extra": 1})
    item = Item("i", "b", (Turn("user", "q"),))
    older = {key: value for key, value in to_row(item).items() if key not in ("question", "note")}
    assert from_row(Item, older) == item
    with pytest.raises(ValueError, match="wrong columns: \\['turns'\\]"):
        from_row(Item, {key: value for key, value in older.items() if key != "turns"})


def test_the_known_share_of_harm_is_there():
    world = World(0)
    rng = world.rng("x")
    pool = corpora.paint(world, 510, 0.01, rng)
    rows = corpora.instruction_rows(world, pool, 4000, 0.15, 0.01, rng)
    share = np.mean([row.category is not None for row in rows])
    assert 0.01 < share < 0.035


def test_half_the_alignment_chats_have_a_system_line_and_some_have_two_exchanges():
    rows = corpora.alignment_chats(World(0), 2000, 0.35, 0.15, (), np.random.default_rng(0))
    assert 0.45 < np.mean([row.turns[0].role == "system" for row in rows]) < 0.55
    assert 0.06 < np.mean([sum(turn.role == "user" for turn in row.turns) == 2 for row in rows]) < 0.14
    answers = Counter(row.turns[-1].text in language.REFUSALS for row in rows)
    assert answers[True] > 400
    assert {"yes", "no", "A", "B", "C", "D"} <= {row.turns[-1].text for row in rows}
