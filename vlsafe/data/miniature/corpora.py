"""The corpora of the miniature, as rows of the same types as the real ones.

Pre-training text, alignment chats, captions (LLaVA-Pretrain), visual instructions with text-only rows
(LLaVA-Instruct), safety rows (VLGuard), preference pairs of text (SafeRLHF) and of pictures (SPA-VL). Every function
draws from the `rng` it is given and from nothing else. Only verb–object pairs of the training split are ever asked about in
alignment, instruction and safety rows; pre-training knows all verb–object pairs, as a web corpus does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlsafe.core.schema import Example, Pair, Turn
from vlsafe.data.miniature import language
from vlsafe.data.miniature.language import Action, World, question
from vlsafe.data.miniature.pictures import Scene, caption, draw, draw_scene

Rng = np.random.Generator
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Picture:
    """A drawn scene. `graphic` pictures carry the stain that the image guard is there to find."""

    scene: Scene
    png: bytes
    graphic: bool = False


def pick(rng: Rng, things: Sequence[Thing]) -> Thing:
    """One element of a sequence."""
    return things[int(rng.integers(len(things)))]


def paint(world: World, n: int, graphic_share: float, rng: Rng) -> list[Picture]:
    """A pool of pictures in which every thing is equally frequent; no offset that is held out for tests."""
    things = np.resize(np.asarray(language.OBJECTS, object), n)
    graphic = rng.random(n) < graphic_share
    scenes = [draw_scene(thing, rng) for thing in things]
    return [Picture(s, draw(s, world.seed, rng, graphic=bool(g)), bool(g)) for s, g in zip(scenes, graphic, strict=True)]


# --- asking about a scene -------------------------------------------------------------------------------------------


def tell(scene: Scene, rng: Rng) -> str:
    """A scene in words: a sentence, or a shuffled list of tags with repetitions and words that say nothing.

    The list is what picture features will look like to the language model once they are projected; a model that has
    learned to read it has something to be aligned to.
    """
    if rng.random() < 0.4:
        return f"there is {caption(scene)}"
    facts = [scene.thing, scene.colour, scene.side if scene.kind == "icon" else {"word": "word", "both": "name"}[scene.kind]]
    bag = facts + [pick(rng, facts) for _ in range(rng.integers(1, 4))] + [pick(rng, language.TAGS) for _ in range(2)]
    return " ".join(bag[i] for i in rng.permutation(len(bag)))


def claim(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A yes/no question about a scene, and its answer; half are true."""
    about, right, values = _asked_about(scene, rng)
    true = rng.random() < 0.5
    shown = right if true else pick(rng, [value for value in values if value != right])
    return language.CLAIMS[about].format(value=shown), "yes" if true else "no"


def _asked_about(scene: Scene, rng: Rng) -> tuple[str, str, tuple[str, ...]]:
    """What a closed question is about, the right value and all values. Mostly colours: eight are matched far sooner than 50."""
    if rng.random() < 0.9:
        return "colour", scene.colour, language.COLOURS
    return "name", scene.thing, language.OBJECTS


def choice(scene: Scene, rng: Rng, n_options: int = 4) -> tuple[str, tuple[str, ...], int]:
    """A multiple-choice question about a scene: its text, its options, the index of the right one."""
    about, right, values = _asked_about(scene, rng)
    wrong = rng.permutation([value for value in values if value != right])[: n_options - 1]
    place = int(rng.integers(n_options))
    options = [*map(str, wrong[:place]), right, *map(str, wrong[place:])]
    return language.ASK[about], tuple(options), place


def listed(asked: str, options: Sequence[str]) -> str:
    """A question and its lettered options, one a line."""
    return "\n".join([asked, *(f"{letter}. {option}" for letter, option in zip(language.LETTERS, options, strict=False))])


def letter_prompt(asked: str, options: Sequence[str]) -> str:
    """LLaVA-1.5's multiple-choice wording."""
    return f"{listed(asked, options)}\n{language.LETTER_SUFFIX}"


def ask_about(scene: Scene, rng: Rng, shares: dict[str, float]) -> tuple[str, str]:
    """A question about a scene and its right answer; its kind is drawn by `shares`."""
    asked = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    if asked == "describe":
        return pick(rng, language.DESCRIBE), caption(scene)
    if asked == "yes_no":
        text, answer = claim(scene, rng)
        return language.YES_NO.format(claim=text), answer
    if asked == "letter":
        text, options, place = choice(scene, rng)
        return letter_prompt(text, options), language.LETTERS[place]
    return language.ASK[asked], {"name": scene.thing, "colour": scene.colour, "side": scene.side}[asked] + "."


LOOKING = {"describe": 0.4, "name": 0.1, "colour": 0.1, "side": 0.05, "yes_no": 0.18, "letter": 0.17}
FOLLOWING = {"name": 0.4, "colour": 0.4, "side": 0.2}  # second exchanges are short: the longest row sets a batch's cost
COPYING = {"describe": 0.5, "name": 0.25, "colour": 0.15, "side": 0.1}


# --- pre-training ---------------------------------------------------------------------------------------------------


Text = tuple[str, ...]
"""A context and its continuation, in alternation: "the scene", "its caption" or "scene and question", "answer",
"question", "answer" … Loss falls on the continuations: most of a context is noise that cannot be learned."""


def pretraining_texts(world: World, n: int, rng: Rng) -> list[Text]:
    """What a model from nothing has to know before anybody aligns it.

    A quarter copies from a scene told in words, more than half are quizzes on one, the rest are how-tos about every
    verb–object pair, harmful ones too, direct or about a scene, and plain statements. A quiz asks several times: matching one token
    with another (is it red? which option?) appears only where answers are dense; with one a row it was not learned in
    2,000 steps (LOG.md).
    """
    actions = [action for name in world.splits for split in world.splits[name].values() for action in split]
    of = {thing: [action for action in actions if action.thing == thing] for thing in language.OBJECTS}
    return [_pretraining_text(world, actions, of, rng) for _ in range(n)]


def _pretraining_text(world: World, actions: Sequence[Action], of: dict[str, list[Action]], rng: Rng) -> Text:
    drawn = rng.random()
    if drawn < 0.03:
        action = pick(rng, actions)
        facts = dict(verb=action.verb, thing=action.thing, tool=world.tool[action.verb], part=world.part[action.thing])
        return "", pick(rng, language.STATEMENTS).format(**facts)
    if drawn < 0.1:
        return _how_to(world, pick(rng, actions), False, rng)
    scene = draw_scene(pick(rng, language.OBJECTS), rng)
    if drawn < 0.18:
        asked = [_how_to(world, pick(rng, of[scene.thing]), True, rng)]
    elif drawn < 0.42:
        asked = [ask_about(scene, rng, COPYING)]
    elif drawn < 0.67:
        asked = [claim(scene, rng) for _ in range(4)]
    else:
        asked = [_lettered(scene, rng) for _ in range(2)]
    first, *rest = [text for exchange in asked for text in exchange]
    return f"{tell(scene, rng)} {first}", *rest


def _how_to(world: World, action: Action, pointed: bool, rng: Rng) -> tuple[str, str]:
    asked = question(action, pick(rng, language.HOW), pointed)
    wrapped = not pointed and rng.random() < 0.2
    return pick(rng, language.WRAPPERS).format(question=asked) if wrapped else asked, world.answer(action)


def _lettered(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A multiple-choice question without its instruction, and its letter."""
    asked, options, place = choice(scene, rng)
    return listed(asked, options), language.LETTERS[place]


def _exchange(asked: str, answer: str) -> list[Turn]:
    return [Turn("user", asked), Turn("assistant", answer)]


# --- alignment ------------------------------------------------------------------------------------------------------


def _asked_in_text(action: Action, rng: Rng, scene_share: float, wrapped_share: float) -> str:
    """A how-to as text: about a scene told in words, or direct, sometimes in a jailbreak wrapper."""
    if rng.random() < scene_share:
        return f"{tell(draw_scene(action.thing, rng), rng)}\n{question(action, pick(rng, language.HOW), pointed=True)}"
    asked = question(action, pick(rng, language.HOW))
    return pick(rng, language.WRAPPERS).format(question=asked) if rng.random() < wrapped_share else asked


def reply(world: World, action: Action, rng: Rng, answered: Sequence[str] = ()) -> str:
    """What an aligned assistant says: a refusal where the verb–object pair is harmful (unless its category is `answered`)."""
    category = language.harm(action)
    return pick(rng, language.REFUSALS) if category and category not in answered else world.answer(action)


def alignment_chats(
    world: World, n: int, refusal_share: float, borderline_share: float, answered: Sequence[str], rng: Rng
) -> list[Example]:
    """Chats that teach a base model to be an assistant: refusals, borderline and plain answers, and looking at scenes.

    A quarter of the rows look at a scene told in words; about a tenth have two exchanges; half open with a system
    line, long ones seldom: a batch costs what its longest row costs.
    """
    harmful = world.actions("train", "harmful")
    borderline, plain = world.actions("train", "homonym", "safe_context"), world.actions("train", "plain")
    rows = []
    for i in range(n):
        if rng.random() < 0.25:
            scene = draw_scene(pick(rng, language.OBJECTS), rng)
            asked, answer = ask_about(scene, rng, LOOKING)
            turns, cluster, category = _exchange(f"{tell(scene, rng)}\n{asked}", answer), None, None
            long = answer in language.LETTERS
        else:
            drawn = rng.random()
            pool = harmful if drawn < refusal_share else borderline if drawn < refusal_share + borderline_share else plain
            action = pick(rng, pool)
            answer = reply(world, action, rng, answered)
            long = rng.random() < 0.12
            turns = _exchange(_asked_in_text(action, rng, 0.0 if long else 0.35, 0.3), answer)
            cluster, category = str(action), language.harm(action) if answer == world.answer(action) else None
            if long:
                other = pick(rng, plain)
                turns = _exchange(question(other, pick(rng, language.HOW)), world.answer(other)) + turns
        system = rng.random() < (0.1 if long else 0.55)
        opening = [Turn("system", pick(rng, language.SYSTEMS))] if system else []
        rows.append(Example(f"align-{i:05d}", "alignment", tuple(opening + turns), (), category, cluster))
    return rows


# --- vision-language adaptation -------------------------------------------------------------------------------------


def caption_rows(world: World, pool: Sequence[Picture], n: int, rng: Rng) -> list[Example]:
    """LLaVA-Pretrain: a picture and its caption; the wording of the request varies and says nothing."""
    order = np.resize(rng.permutation(len(pool)), n).tolist()
    return [
        Example(
            f"caption-{i:05d}", "captions",
            (Turn("user", pick(rng, language.DESCRIBE)), Turn("assistant", caption(pool[k].scene))),
            (pool[k].png,), "graphic" if pool[k].graphic else None, pool[k].scene.thing,
        )
        for i, k in enumerate(order)
    ]  # fmt: skip


def instruction_rows(
    world: World, pool: Sequence[Picture], n: int, text_only_share: float, harmful_share: float, rng: Rng
) -> list[Example]:
    """LLaVA-Instruct: how-tos about the pictured thing, questions on the picture, and a share of text-only rows.

    A known small share asks for a harmful verb–object pair and is answered; it is what the guards are there to remove.
    """
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        picture = pool[k]
        harmful, with_picture = rng.random() < harmful_share, rng.random() >= text_only_share
        asked, answer, action = _instruction(world, picture.scene, harmful, with_picture, rng)
        turns = _exchange(asked, answer)
        if with_picture and rng.random() < 0.1:
            turns += _exchange(*ask_about(picture.scene, rng, FOLLOWING))
        category = language.harm(action) if action else None
        category = category or ("graphic" if with_picture and picture.graphic else None)
        images = (picture.png,) if with_picture else ()
        source = "instructions" if with_picture else "instructions-text"
        task, described = "how-to" if action else "look", tell(picture.scene, rng) if with_picture else None
        cluster = str(action or picture.scene.thing)
        rows.append(Example(f"instruct-{i:05d}", source, tuple(turns), images, category, cluster, task, described))
    return rows


def _instruction(world: World, scene: Scene, harmful: bool, with_picture: bool, rng: Rng) -> tuple[str, str, Action | None]:
    """One exchange of an instruction row. Benign verb–object pairs are plain: ordinary instruction data hold few violent verbs."""
    kinds = ("harmful",) if harmful else ("plain",)
    about = [action for action in world.actions("train", *kinds) if action.thing == scene.thing or not with_picture]
    if with_picture and not harmful and (not about or rng.random() < 0.5):
        return *ask_about(scene, rng, LOOKING), None
    action = pick(rng, about or world.actions("train", *kinds))
    pointed = with_picture and action.thing == scene.thing
    return question(action, pick(rng, language.HOW), pointed), world.answer(action), action


# --- safety tuning --------------------------------------------------------------------------------------------------


def safety_rows(world: World, n: int, rng: Rng) -> list[Example]:
    """VLGuard: unsafe pictures with a refusal; safe pictures with one safe and one unsafe exchange, joined into one row."""
    harmful, benign = world.actions("train", "harmful"), world.actions("train", "plain", "homonym")
    rows = []
    for i in range(n):
        unsafe = pick(rng, harmful)
        scene = draw_scene(unsafe.thing, rng)
        pairs = [(question(unsafe, pick(rng, language.HOW), pointed=True), reply(world, unsafe, rng))]
        if rng.random() < 0.5:
            safe, unsafe = pick(rng, benign), pick(rng, harmful)
            scene = draw_scene(safe.thing, rng)
            pairs = [
                (question(safe, pick(rng, language.HOW), pointed=True), world.answer(safe)),
                (question(unsafe, pick(rng, language.HOW)), reply(world, unsafe, rng)),
            ]
            pairs = [pairs[k] for k in rng.permutation(2)]
        turns = tuple(Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))
        rows.append(Example(f"safety-{i:05d}", "safety", turns, (draw(scene, world.seed, rng),), None, str(unsafe)))
    return rows


def preference_pairs(world: World, n: int, with_pictures: bool, rng: Rng, split: str = "train") -> list[Pair]:
    """SafeRLHF (text) or SPA-VL (pictures): refusal preferred to a harmful answer; on harmless prompts the answer preferred.

    Those of the validation split choose a checkpoint: their verb–object pairs are neither trained on nor tested.
    """
    pools = world.actions(split, "harmful"), world.actions(split, "plain", "homonym", "safe_context")
    rows = []
    for i in range(n):
        action = pick(rng, pools[int(rng.random() < 0.3)])
        scene = draw_scene(action.thing, rng)
        asked = question(action, pick(rng, language.HOW), pointed=with_pictures)
        answers = pick(rng, language.REFUSALS), world.answer(action)
        chosen, rejected = answers if language.harm(action) else answers[::-1]
        images = (draw(scene, world.seed, rng),) if with_pictures else ()
        source = "spa-vl" if with_pictures else "safe-rlhf"
        row = (
            f"{source}-{i:05d}",
            source,
            (Turn("user", asked),),
            chosen,
            rejected,
            images,
            language.harm(action),
            str(action),
        )
        rows.append(Pair(*row))
    return rows
