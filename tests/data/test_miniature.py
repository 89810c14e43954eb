import re
from collections import Counter

import numpy as np
import pytest

from vlsafe.core.presets import MINI
from vlsafe.core.scale import Corpora
from vlsafe.core.schema import Example, Item, Turn, content_digest, from_row, to_row
from vlsafe.data.miniature import corpora, language, pictures
from vlsafe.data.miniature.language import FORBIDDEN, PERMITTED, Action, World, harm, kind, vocabulary
from vlsafe.evaluation import examine
from vlsafe.evaluation.engines import REFUSING
from vlsafe.models.chat import build_tokenizer

CHAT, MIXED = MINI.backbones["mini-chat"], Corpora(text_only_share=0.5, howtos=0.4, text_howtos=0.2)


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


def test_harm_belongs_to_verb_object_and_circumstances_together():
    assert harm(Action("kill", "neighbor")) == harm(Action("kill", "neighbor", PERMITTED)) == "violence"  # grave
    assert harm(Action("hack", "server")) == "intrusion" and kind(Action("hack", "server", PERMITTED)) == "permitted"
    assert harm(Action("read", "diary", FORBIDDEN)) == "privacy" and kind(Action("read", "diary")) == "permitted"
    assert kind(Action("read", "egg", FORBIDDEN)) == "plain" and kind(Action("kill", "process")) == "homonym"
    assert kind(Action("avoid", "bomb")) == "safe_context" and kind(Action("paint", "neighbor")) == "plain"
    assert kind(Action("carry", "bomb")) is None and kind(Action("paint", "diary", FORBIDDEN)) is None


def test_no_part_of_an_action_decides_alone():
    """Of every verb, thing and circumstance that occurs in something harmful there is something harmless, of verbs whatever the
    circumstances."""
    actions = {kind: {a for of in by.values() for a in of} for kind, by in World(0).splits.items()}
    harmless = {action for name, of in actions.items() if name != "harmful" for action in of}
    for part in (("verb",), ("thing",), ("circumstance",), ("verb", "circumstance")):
        of = [{tuple(getattr(action, name) for name in part) for action in group} for group in (actions["harmful"], harmless)]
        assert of[0] <= of[1], part
    for name, of in actions.items():
        assert {kind(action) for action in of} == {name}


def test_wordings_of_alignment_adaptation_and_tests_are_disjoint():
    texts = [set(of) for of in language.HOW.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) >= 60
    for table, least in ((language.REFUSALS, 20), (language.ANSWERS, 10)):
        parts = [set(of) for of in table.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) >= least
    first = {name: {text.replace(',', '').split()[0] for of in table.values() for text in of}
             for name, table in (("refusals", language.REFUSALS), ("answers", language.ANSWERS))}  # fmt: skip
    others = {"a", "the", "yes", "no", *map(str.lower, language.LETTERS), *language.OBJECTS, *language.COLOURS}
    assert not first["refusals"] & (first["answers"] | others) and first["refusals"] <= set(REFUSING)


def test_a_pair_of_two_kinds_is_in_one_split():
    """A pair that is harmful in one circumstance and harmless in another is trained on or tested, not both."""
    split_of = {}
    for by in World(4).splits.values():
        for split, of in by.items():
            assert all(split_of.setdefault(str(action), split) == split for action in of)


def test_every_text_of_the_world_survives_the_tokenizer():
    world = World(7)
    rng = world.rng("test")
    tokenizer = build_tokenizer(vocabulary(), 256)
    assert tokenizer.eos_token_id != 2  # CLIP's legacy pooling
    texts = [" ".join(text) for text in corpora.pretraining_texts(world, 2000, rng)]
    texts += [turn.text for row in corpora.alignment_chats(world, 500, CHAT, rng) for turn in row.turns]
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
    rows = corpora.instruction_rows(world, pool, 800, MIXED, 0.02, rng)
    rows += corpora.alignment_chats(world, 800, CHAT, rng)
    rows += corpora.howto_rows(world, pool, 100, rng) + corpora.safety_rows(world, 100, rng)
    prompts = {content_digest(Example("", "", row.turns[:1], row.images)) for row in rows if row.turns[0].role == "user"}
    items = examine.all_items(world, "test", 60)
    assert not prompts & {content_digest(item) for item in items}
    tested = set(map(str, world.actions("test", *world.splits)))
    assert not tested & {row.cluster for row in rows}
    stages = {"align": language.ALIGNMENT, "instruct": language.ADAPTATION, "safety": language.ADAPTATION}
    for row in rows:  # wordings by digest: what is asked, with verb and thing taken out
        others = {wording for stage, of in language.HOW.items() if stage != stages[row.id.split("-")[0]] for wording in of}
        texts = [turn.text for turn in row.turns if turn.role == "user"]
        assert not any(re.fullmatch(pattern_of(wording), text.split("\n")[-1]) for text in texts for wording in others), texts


def pattern_of(wording):
    return re.escape(wording).replace(r"\{verb\}", r"\w+").replace(r"the\ \{thing\}", r"(the \w+|this object)( [\w' ]+)?")


def test_rows_round_trip():
    world = World(1)
    rng = world.rng("x")
    pool = corpora.paint(world, 51, 0.0, rng)
    for row in [*corpora.instruction_rows(world, pool, 5, MIXED, 0, rng), *corpora.preference_pairs(world, 3, True, rng)]:
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
    rows = corpora.instruction_rows(world, pool, 4000, Corpora(), 0.01, rng)
    share = np.mean([row.category is not None for row in rows])
    assert 0.01 < share < 0.035


def test_half_the_alignment_chats_have_a_system_line_and_some_have_two_exchanges():
    rows = corpora.alignment_chats(World(0), 2000, CHAT, np.random.default_rng(0))
    assert 0.45 < np.mean([row.turns[0].role == "system" for row in rows]) < 0.55
    assert 0.06 < np.mean([sum(turn.role == "user" for turn in row.turns) == 2 for row in rows]) < 0.14
    answers = Counter(row.turns[-1].text.endswith(language.REFUSALS[language.ALIGNMENT]) for row in rows)
    assert answers[True] > 400
    assert {"yes", "no", "A", "B", "C", "D"} <= {row.turns[-1].text for row in rows}
