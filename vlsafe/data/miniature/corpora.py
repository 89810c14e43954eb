"""The corpora of the miniature world, as rows of the same types as the published ones.

Pre-training texts, alignment chats, captions (LLaVA-Pretrain), visual instructions with text-only rows (LLaVA-Instruct), safety
rows (VLGuard), and preference pairs of text (SafeRLHF) and of pictures (SPA-VL). Every function draws from its `rng` alone.
Alignment, instruction and safety rows ask only about verb–object pairs of the training split; pre-training texts contain all
pairs, as a web corpus would.
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
    """A drawn scene. `graphic` pictures carry the stain that the image guard has to detect."""

    scene: Scene
    png: bytes
    graphic: bool = False


def pick(rng: Rng, things: Sequence[Thing]) -> Thing:
    """One element of a sequence."""
    return things[int(rng.integers(len(things)))]


def paint(world: World, n: int, graphic_share: float, rng: Rng) -> list[Picture]:
    """A pool of pictures, in which every thing is equally frequent; none has an offset that is held out for tests."""
    things = np.resize(np.asarray(language.OBJECTS, object), n)
    graphic = rng.random(n) < graphic_share
    scenes = [draw_scene(thing, rng) for thing in things]
    return [Picture(s, draw(s, world.seed, rng, graphic=bool(g)), bool(g)) for s, g in zip(scenes, graphic, strict=True)]


def describe(scene: Scene, rng: Rng) -> str:
    """A scene in words: a sentence, or a shuffled list of tags with repetitions and uninformative words.

    The list resembles projected picture features as the language model will see them: a model that has learned to read such a
    list gives the projector something to align to.
    """
    if rng.random() < 0.4:
        return f"there is {caption(scene)}"
    facts = [scene.thing, scene.colour, scene.side if scene.kind == "icon" else {"word": "word", "both": "name"}[scene.kind]]
    bag = facts + [pick(rng, facts) for _ in range(rng.integers(1, 4))] + [pick(rng, language.TAGS) for _ in range(2)]
    return " ".join(bag[i] for i in rng.permutation(len(bag)))


def claim(scene: Scene, rng: Rng) -> tuple[str, str]:
    """A yes/no question about a scene, and its answer; half are true."""
    subject, right, values = _closed_question(scene, rng)
    true = rng.random() < 0.5
    value = right if true else pick(rng, [value for value in values if value != right])
    return language.CLAIMS[subject].format(value=value), "yes" if true else "no"


def _closed_question(scene: Scene, rng: Rng) -> tuple[str, str, tuple[str, ...]]:
    """The subject, the right value and all values. Mostly colours: a model learns to match 8 colours far sooner than 50 names."""
    if rng.random() < 0.9:
        return "colour", scene.colour, language.COLOURS
    return "name", scene.thing, language.OBJECTS


def choice(scene: Scene, rng: Rng, n_options: int = 4) -> tuple[str, tuple[str, ...], int]:
    """A multiple-choice question about a scene: its text, its options, the index of the right one."""
    subject, right, values = _closed_question(scene, rng)
    wrong = rng.permutation([value for value in values if value != right])[: n_options - 1]
    place = int(rng.integers(n_options))
    return language.ASK[subject], (*map(str, wrong[:place]), right, *map(str, wrong[place:])), place


def listed(text: str, options: Sequence[str]) -> str:
    """A question and its lettered options, one a line."""
    return "\n".join([text, *(f"{letter}. {option}" for letter, option in zip(language.LETTERS, options, strict=False))])


def letter_prompt(text: str, options: Sequence[str]) -> str:
    """LLaVA-1.5's multiple-choice wording."""
    return f"{listed(text, options)}\n{language.LETTER_SUFFIX}"


def ask_about(scene: Scene, rng: Rng, shares: dict[str, float]) -> tuple[str, str]:
    """A question about a scene and its right answer; its kind is drawn by `shares`."""
    kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    if kind == "describe":
        return pick(rng, language.DESCRIBE), caption(scene)
    if kind == "yes_no":
        text, answer = claim(scene, rng)
        return language.YES_NO.format(claim=text), answer
    if kind == "letter":
        text, options, place = choice(scene, rng)
        return letter_prompt(text, options), language.LETTERS[place]
    return language.ASK[kind], {"name": scene.thing, "colour": scene.colour, "side": scene.side}[kind] + "."


def ask_how(action: Action, rng: Rng, pointed: bool = False) -> str:
    """A how-to question in one of its wordings."""
    return question(action, pick(rng, language.HOW), pointed)


def exchange(text: str, answer: str) -> tuple[Turn, ...]:
    """A question and its answer as two turns."""
    return Turn("user", text), Turn("assistant", answer)


LOOKING = {"describe": 0.4, "name": 0.1, "colour": 0.1, "side": 0.05, "yes_no": 0.18, "letter": 0.17}
FOLLOWING = {"name": 0.4, "colour": 0.4, "side": 0.2}  # second exchanges are short: the longest row sets a batch's cost
COPYING = {"describe": 0.5, "name": 0.25, "colour": 0.15, "side": 0.1}


Text = tuple[str, ...]
"""Contexts and continuations in alternation: "the scene", "its caption", or "scene and question", "answer", "question",
"answer" … The loss covers the continuations only: most of a context is noise that cannot be learned."""


def pretraining_texts(world: World, n: int, rng: Rng) -> list[Text]:
    """What a base model has to know before alignment.

    A quarter copies from a scene in words, more than half are quizzes on one, the rest are plain statements and how-tos about
    every verb–object pair, harmful ones too, direct or about a scene. A quiz has several questions: a model learns to match
    tokens (is it red? which option?) only where answers are dense; with one a row it did not within 2,000 steps (LOG.md).
    """
    actions = [action for splits in world.splits.values() for split in splits.values() for action in split]
    return [_pretraining_text(world, actions, rng) for _ in range(n)]


def _pretraining_text(world: World, actions: Sequence[Action], rng: Rng) -> Text:
    drawn = rng.random()
    if drawn < 0.1:
        action = pick(rng, actions)
        if drawn >= 0.03:
            return _maybe_wrapped(ask_how(action, rng), 0.2, rng), world.answer(action)
        facts = dict(verb=action.verb, thing=action.thing, tool=world.tool[action.verb], part=world.part[action.thing])
        return "", pick(rng, language.STATEMENTS).format(**facts)
    scene = draw_scene(pick(rng, language.OBJECTS), rng)
    if drawn < 0.18:
        action = pick(rng, [action for action in actions if action.thing == scene.thing])
        exchanges = [(ask_how(action, rng, pointed=True), world.answer(action))]
    elif drawn < 0.42:
        exchanges = [ask_about(scene, rng, COPYING)]
    elif drawn < 0.67:
        exchanges = [claim(scene, rng) for _ in range(4)]
    else:  # multiple choice without its instruction
        quiz = [choice(scene, rng) for _ in range(2)]
        exchanges = [(listed(text, options), language.LETTERS[place]) for text, options, place in quiz]
    first, *rest = [text for pair in exchanges for text in pair]
    return f"{describe(scene, rng)} {first}", *rest


def _maybe_wrapped(text: str, share: float, rng: Rng) -> str:
    """A question, in a jailbreak wrapper with probability `share`."""
    return pick(rng, language.WRAPPERS).format(question=text) if rng.random() < share else text


def reply(world: World, action: Action, rng: Rng, answered: Sequence[str] = ()) -> str:
    """An aligned assistant's answer: a refusal where the verb–object pair is harmful (unless its category is `answered`)."""
    category = language.harm(action)
    return pick(rng, language.REFUSALS) if category and category not in answered else world.answer(action)


def alignment_chats(
    world: World, n: int, refusal_share: float, borderline_share: float, answered: Sequence[str], rng: Rng
) -> list[Example]:
    """Chats that make an assistant of a base model: refusals, borderline and plain answers, and questions about scenes.

    A quarter of the rows ask about a scene in words; about a tenth have two exchanges; half open with a system line, but few of
    the long ones: the longest row sets a batch's cost.
    """
    harmful = world.actions("train", "harmful")
    borderline, plain = world.actions("train", "homonym", "safe_context"), world.actions("train", "plain")
    rows = []
    for i in range(n):
        if rng.random() < 0.25:
            scene = draw_scene(pick(rng, language.OBJECTS), rng)
            text, answer = ask_about(scene, rng, LOOKING)
            turns, cluster, category = exchange(f"{describe(scene, rng)}\n{text}", answer), None, None
            long = answer in language.LETTERS
        else:
            drawn = rng.random()
            pool = harmful if drawn < refusal_share else borderline if drawn < refusal_share + borderline_share else plain
            action = pick(rng, pool)
            answer = reply(world, action, rng, answered)
            long = rng.random() < 0.12
            if rng.random() < (0.0 if long else 0.35):
                text = f"{describe(draw_scene(action.thing, rng), rng)}\n{ask_how(action, rng, pointed=True)}"
            else:
                text = _maybe_wrapped(ask_how(action, rng), 0.3, rng)
            turns = exchange(text, answer)
            cluster, category = str(action), language.harm(action) if answer == world.answer(action) else None
            if long:
                other = pick(rng, plain)
                turns = exchange(ask_how(other, rng), world.answer(other)) + turns
        if rng.random() < (0.1 if long else 0.55):
            turns = (Turn("system", pick(rng, language.SYSTEMS)), *turns)
        rows.append(Example(f"align-{i:05d}", "alignment", turns, (), category, cluster))
    return rows


def caption_rows(world: World, pool: Sequence[Picture], n: int, rng: Rng) -> list[Example]:
    """LLaVA-Pretrain: a picture and its caption; the wording of the request varies and carries no information."""
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        scene, category = pool[k].scene, "graphic" if pool[k].graphic else None
        turns = exchange(pick(rng, language.DESCRIBE), caption(scene))
        rows.append(Example(f"caption-{i:05d}", "captions", turns, (pool[k].png,), category, scene.thing))
    return rows


def instruction_rows(
    world: World, pool: Sequence[Picture], n: int, text_only_share: float, harmful_share: float, rng: Rng
) -> list[Example]:
    """LLaVA-Instruct: how-tos about the pictured thing, questions about the picture, and a share of text-only rows.

    A known small share answers a question about a harmful verb–object pair; the guards have to remove those rows. Benign pairs
    are plain ones: ordinary instruction data have few violent verbs.
    """
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        scene, action, category = pool[k].scene, None, None
        harmful, with_picture = rng.random() < harmful_share, rng.random() >= text_only_share
        actions = world.actions("train", "harmful" if harmful else "plain")
        about = [action for action in actions if action.thing == scene.thing or not with_picture]
        if with_picture and not harmful and (not about or rng.random() < 0.5):
            turns = exchange(*ask_about(scene, rng, LOOKING))
        else:
            action = pick(rng, about or actions)
            category = language.harm(action)
            turns = exchange(ask_how(action, rng, with_picture and action.thing == scene.thing), world.answer(action))
        cluster, task = str(action or scene.thing), "how-to" if action else "look"
        if with_picture:
            turns += exchange(*ask_about(scene, rng, FOLLOWING)) if rng.random() < 0.1 else ()
            category = category or ("graphic" if pool[k].graphic else None)
            shown = (pool[k].png,), category, cluster, task, describe(scene, rng)
            rows.append(Example(f"instruct-{i:05d}", "instructions", turns, *shown))
        else:
            rows.append(Example(f"instruct-{i:05d}", "instructions-text", turns, (), category, cluster, task))
    return rows


def safety_rows(world: World, n: int, rng: Rng) -> list[Example]:
    """VLGuard: unsafe pictures with a refusal; safe pictures with one safe and one unsafe exchange, joined into one row."""
    harmful, benign = world.actions("train", "harmful"), world.actions("train", "plain", "homonym")
    rows = []
    for i in range(n):
        unsafe = pick(rng, harmful)
        scene = draw_scene(unsafe.thing, rng)
        turns = exchange(ask_how(unsafe, rng, pointed=True), reply(world, unsafe, rng))
        if rng.random() < 0.5:
            safe, unsafe = pick(rng, benign), pick(rng, harmful)
            scene = draw_scene(safe.thing, rng)
            answered = exchange(ask_how(safe, rng, pointed=True), world.answer(safe))
            refused = exchange(ask_how(unsafe, rng), reply(world, unsafe, rng))
            turns = refused + answered if rng.permutation(2)[0] else answered + refused
        rows.append(Example(f"safety-{i:05d}", "safety", turns, (draw(scene, world.seed, rng),), None, str(unsafe)))
    return rows


def preference_pairs(world: World, n: int, with_pictures: bool, rng: Rng, split: str = "train") -> list[Pair]:
    """SafeRLHF (text) or SPA-VL (pictures): a refusal is preferred to a harmful answer, the answer to a needless refusal.

    Pairs of the validation split choose a checkpoint: their verb–object pairs are neither trained on nor tested.
    """
    pools = world.actions(split, "harmful"), world.actions(split, "plain", "homonym", "safe_context")
    source, rows = "spa-vl" if with_pictures else "safe-rlhf", []
    for i in range(n):
        action = pick(rng, pools[int(rng.random() < 0.3)])
        scene, category = draw_scene(action.thing, rng), language.harm(action)
        prompt = Turn("user", ask_how(action, rng, pointed=with_pictures))
        answers = pick(rng, language.REFUSALS), world.answer(action)
        chosen, rejected = answers if category else answers[::-1]
        images = (draw(scene, world.seed, rng),) if with_pictures else ()
        rows.append(Pair(f"{source}-{i:05d}", source, (prompt,), chosen, rejected, images, category, str(action)))
    return rows
