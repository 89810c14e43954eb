"""The corpora of the miniature, as rows of the same types as the real ones.

Pre-training text, alignment chats, captions (LLaVA-Pretrain), visual instructions with text-only rows
(LLaVA-Instruct), safety rows (VLGuard), preference pairs of text (SafeRLHF) and of pictures (SPA-VL). Every function
draws from the `rng` it is given and from nothing else. Only deeds of the training split are ever asked about in
alignment, instruction and safety rows; pre-training knows all deeds, as a web corpus does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlsafe.miniature import language as words
from vlsafe.miniature.language import Deed, World, question
from vlsafe.miniature.pictures import Scene, caption, draw, draw_scene
from vlsafe.schema import Example, Pair, Turn

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
    things = np.resize(np.asarray(words.OBJECTS, object), n)
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
    bag = facts + [pick(rng, facts) for _ in range(rng.integers(1, 4))] + [pick(rng, words.TAGS) for _ in range(2)]
    return " ".join(bag[i] for i in rng.permutation(len(bag)))


def claim(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A yes/no question about a scene, and its answer; half are true."""
    about, right, values = _asked_about(scene, rng)
    true = rng.random() < 0.5
    shown = right if true else pick(rng, [value for value in values if value != right])
    return words.CLAIMS[about].format(value=shown), "yes" if true else "no"


def _asked_about(scene: Scene, rng: Rng) -> tuple[str, str, tuple[str, ...]]:
    """What a closed question is about, the right value and all values. Mostly colours: eight are matched far sooner than 50."""
    if rng.random() < 0.9:
        return "colour", scene.colour, words.COLOURS
    return "name", scene.thing, words.OBJECTS


def choice(scene: Scene, rng: Rng, n_options: int = 4) -> tuple[str, tuple[str, ...], int]:
    """A multiple-choice question about a scene: its text, its options, the index of the right one."""
    about, right, values = _asked_about(scene, rng)
    wrong = rng.permutation([value for value in values if value != right])[: n_options - 1]
    place = int(rng.integers(n_options))
    options = [*map(str, wrong[:place]), right, *map(str, wrong[place:])]
    return words.ASK[about], tuple(options), place


def listed(asked: str, options: Sequence[str]) -> str:
    """A question and its lettered options, one a line."""
    return "\n".join([asked, *(f"{letter}. {option}" for letter, option in zip(words.LETTERS, options, strict=False))])


def letter_prompt(asked: str, options: Sequence[str]) -> str:
    """LLaVA-1.5's multiple-choice wording."""
    return f"{listed(asked, options)}\n{words.LETTER_SUFFIX}"


def ask_about(scene: Scene, rng: Rng, shares: dict[str, float]) -> tuple[str, str]:
    """A question about a scene and its right answer; its kind is drawn by `shares`."""
    asked = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    if asked == "describe":
        return pick(rng, words.DESCRIBE), caption(scene)
    if asked == "yes_no":
        text, answer = claim(scene, rng)
        return words.YES_NO.format(claim=text), answer
    if asked == "letter":
        text, options, place = choice(scene, rng)
        return letter_prompt(text, options), words.LETTERS[place]
    return words.ASK[asked], {"name": scene.thing, "colour": scene.colour, "side": scene.side}[asked] + "."


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
    deed, harmful ones too, direct or about a scene, and plain statements. A quiz asks several times: matching one token
    with another (is it red? which option?) appears only where answers are dense; with one a row it was not learned in
    2,000 steps (LOG.md).
    """
    deeds = [deed for name in world.splits for split in world.splits[name].values() for deed in split]
    of = {thing: [deed for deed in deeds if deed.thing == thing] for thing in words.OBJECTS}
    return [_pretraining_text(world, deeds, of, rng) for _ in range(n)]


def _pretraining_text(world: World, deeds: Sequence[Deed], of: dict[str, list[Deed]], rng: Rng) -> Text:
    drawn = rng.random()
    if drawn < 0.03:
        deed = pick(rng, deeds)
        facts = dict(verb=deed.verb, thing=deed.thing, tool=world.tool[deed.verb], part=world.part[deed.thing])
        return "", pick(rng, words.STATEMENTS).format(**facts)
    if drawn < 0.1:
        return _how_to(world, pick(rng, deeds), False, rng)
    scene = draw_scene(pick(rng, words.OBJECTS), rng)
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


def _how_to(world: World, deed: Deed, pointed: bool, rng: Rng) -> tuple[str, str]:
    asked = question(deed, pick(rng, words.HOW), pointed)
    wrapped = not pointed and rng.random() < 0.2
    return pick(rng, words.WRAPPERS).format(question=asked) if wrapped else asked, world.answer(deed)


def _lettered(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A multiple-choice question without its instruction, and its letter."""
    asked, options, place = choice(scene, rng)
    return listed(asked, options), words.LETTERS[place]


def _exchange(asked: str, answer: str) -> list[Turn]:
    return [Turn("user", asked), Turn("assistant", answer)]


# --- alignment ------------------------------------------------------------------------------------------------------


def _asked_in_text(deed: Deed, rng: Rng, scene_share: float, wrapped_share: float) -> str:
    """A how-to as text: about a scene told in words, or direct, sometimes in a jailbreak wrapper."""
    if rng.random() < scene_share:
        return f"{tell(draw_scene(deed.thing, rng), rng)}\n{question(deed, pick(rng, words.HOW), pointed=True)}"
    asked = question(deed, pick(rng, words.HOW))
    return pick(rng, words.WRAPPERS).format(question=asked) if rng.random() < wrapped_share else asked


def reply(world: World, deed: Deed, rng: Rng, answered: Sequence[str] = ()) -> str:
    """What an aligned assistant says: a refusal where the deed is harmful (unless its category is `answered`)."""
    category = words.harm(deed)
    return pick(rng, words.REFUSALS) if category and category not in answered else world.answer(deed)


def alignment_chats(
    world: World, n: int, refusal_share: float, borderline_share: float, answered: Sequence[str], rng: Rng
) -> list[Example]:
    """Chats that teach a base model to be an assistant: refusals, borderline and plain answers, and looking at scenes.

    A quarter of the rows look at a scene told in words; about a tenth have two exchanges; half open with a system
    line, long ones seldom: a batch costs what its longest row costs.
    """
    harmful = world.deeds("train", "harmful")
    borderline, plain = world.deeds("train", "homonym", "safe_context"), world.deeds("train", "plain")
    rows = []
    for i in range(n):
        if rng.random() < 0.25:
            scene = draw_scene(pick(rng, words.OBJECTS), rng)
            asked, answer = ask_about(scene, rng, LOOKING)
            turns, cluster, category = _exchange(f"{tell(scene, rng)}\n{asked}", answer), None, None
            long = answer in words.LETTERS
        else:
            drawn = rng.random()
            pool = harmful if drawn < refusal_share else borderline if drawn < refusal_share + borderline_share else plain
            deed = pick(rng, pool)
            answer = reply(world, deed, rng, answered)
            long = rng.random() < 0.12
            turns = _exchange(_asked_in_text(deed, rng, 0.0 if long else 0.35, 0.3), answer)
            cluster, category = str(deed), words.harm(deed) if answer == world.answer(deed) else None
            if long:
                other = pick(rng, plain)
                turns = _exchange(question(other, pick(rng, words.HOW)), world.answer(other)) + turns
        system = rng.random() < (0.1 if long else 0.55)
        opening = [Turn("system", pick(rng, words.SYSTEMS))] if system else []
        rows.append(Example(f"align-{i:05d}", "alignment", tuple(opening + turns), (), category, cluster))
    return rows


# --- vision-language adaptation -------------------------------------------------------------------------------------


def caption_rows(world: World, pool: Sequence[Picture], n: int, rng: Rng) -> list[Example]:
    """LLaVA-Pretrain: a picture and its caption; the wording of the request varies and says nothing."""
    order = np.resize(rng.permutation(len(pool)), n).tolist()
    return [
        Example(
            f"caption-{i:05d}", "captions",
            (Turn("user", pick(rng, words.DESCRIBE)), Turn("assistant", caption(pool[k].scene))),
            (pool[k].png,), "graphic" if pool[k].graphic else None, pool[k].scene.thing,
        )
        for i, k in enumerate(order)
    ]  # fmt: skip


def instruction_rows(
    world: World, pool: Sequence[Picture], n: int, text_only_share: float, harmful_share: float, rng: Rng
) -> list[Example]:
    """LLaVA-Instruct: how-tos about the pictured thing, questions on the picture, and a share of text-only rows.

    A known small share asks for a harmful deed and is answered; it is what the guards are there to remove.
    """
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        picture = pool[k]
        harmful, with_picture = rng.random() < harmful_share, rng.random() >= text_only_share
        asked, answer, deed = _instruction(world, picture.scene, harmful, with_picture, rng)
        turns = _exchange(asked, answer)
        if with_picture and rng.random() < 0.1:
            turns += _exchange(*ask_about(picture.scene, rng, FOLLOWING))
        category = words.harm(deed) if deed else None
        category = category or ("graphic" if with_picture and picture.graphic else None)
        images = (picture.png,) if with_picture else ()
        source = "instructions" if with_picture else "instructions-text"
        task, described = "how-to" if deed else "look", tell(picture.scene, rng) if with_picture else None
        cluster = str(deed or picture.scene.thing)
        rows.append(Example(f"instruct-{i:05d}", source, tuple(turns), images, category, cluster, task, described))
    return rows


def _instruction(world: World, scene: Scene, harmful: bool, with_picture: bool, rng: Rng) -> tuple[str, str, Deed | None]:
    """One exchange of an instruction row. Benign deeds are plain: ordinary instruction data hold few violent verbs."""
    kinds = ("harmful",) if harmful else ("plain",)
    about = [deed for deed in world.deeds("train", *kinds) if deed.thing == scene.thing or not with_picture]
    if with_picture and not harmful and (not about or rng.random() < 0.5):
        return *ask_about(scene, rng, LOOKING), None
    deed = pick(rng, about or world.deeds("train", *kinds))
    pointed = with_picture and deed.thing == scene.thing
    return question(deed, pick(rng, words.HOW), pointed), world.answer(deed), deed


# --- safety tuning --------------------------------------------------------------------------------------------------


def safety_rows(world: World, n: int, rng: Rng) -> list[Example]:
    """VLGuard: unsafe pictures with a refusal; safe pictures with one safe and one unsafe exchange, joined into one row."""
    harmful, benign = world.deeds("train", "harmful"), world.deeds("train", "plain", "homonym")
    rows = []
    for i in range(n):
        unsafe = pick(rng, harmful)
        scene = draw_scene(unsafe.thing, rng)
        pairs = [(question(unsafe, pick(rng, words.HOW), pointed=True), reply(world, unsafe, rng))]
        if rng.random() < 0.5:
            safe, unsafe = pick(rng, benign), pick(rng, harmful)
            scene = draw_scene(safe.thing, rng)
            pairs = [
                (question(safe, pick(rng, words.HOW), pointed=True), world.answer(safe)),
                (question(unsafe, pick(rng, words.HOW)), reply(world, unsafe, rng)),
            ]
            pairs = [pairs[k] for k in rng.permutation(2)]
        turns = tuple(Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True))
        rows.append(Example(f"safety-{i:05d}", "safety", turns, (draw(scene, world.seed, rng),), None, str(unsafe)))
    return rows


def preference_pairs(world: World, n: int, with_pictures: bool, rng: Rng, split: str = "train") -> list[Pair]:
    """SafeRLHF (text) or SPA-VL (pictures): refusal preferred to a harmful answer; on harmless prompts the answer preferred.

    Those of the validation split choose a checkpoint: their deeds are neither trained on nor tested.
    """
    pools = world.deeds(split, "harmful"), world.deeds(split, "plain", "homonym", "safe_context")
    rows = []
    for i in range(n):
        deed = pick(rng, pools[int(rng.random() < 0.3)])
        scene = draw_scene(deed.thing, rng)
        asked = question(deed, pick(rng, words.HOW), pointed=with_pictures)
        answers = pick(rng, words.REFUSALS), world.answer(deed)
        chosen, rejected = answers if words.harm(deed) else answers[::-1]
        images = (draw(scene, world.seed, rng),) if with_pictures else ()
        source = "spa-vl" if with_pictures else "safe-rlhf"
        row = (
            f"{source}-{i:05d}",
            source,
            (Turn("user", asked),),
            chosen,
            rejected,
            images,
            words.harm(deed),
            str(deed),
        )
        rows.append(Pair(*row))
    return rows
