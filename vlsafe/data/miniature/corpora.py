"""The corpora of the miniature world, as rows of the same types as the published ones.

Pre-training texts, alignment chats, captions (LLaVA-Pretrain), visual instructions with text-only rows (LLaVA-Instruct), safety
rows (VLGuard), and preference pairs of text (SafeRLHF) and of pictures (SPA-VL). Every function draws from its `rng` alone.
Alignment, instruction and safety rows ask only about verb–object pairs of the training split, in wordings of their own (`stage`);
pre-training texts contain all pairs and wordings, as a web corpus would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlsafe.core.scale import Backbone, Corpora
from vlsafe.core.schema import Example, Pair, Turn
from vlsafe.data.miniature import language
from vlsafe.data.miniature.language import ADAPTATION, ALIGNMENT, Action, World, question
from vlsafe.data.miniature.pictures import Scene, caption, draw, draw_scene, named, shown

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
        return f"there is {shown(scene)}"
    facts = [scene.thing, scene.colour, scene.side if scene.kind == "icon" else {"word": "word", "both": "name"}[scene.kind]]
    bag = facts + [pick(rng, facts) for _ in range(rng.integers(1, 10))]
    bag += [pick(rng, language.TAGS) for _ in range(rng.integers(2, 5))]
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


def ask_how(action: Action, rng: Rng, stage: str, pointed: bool = False) -> str:
    """A how-to question in one of a stage's wordings, with its circumstances in words."""
    return question(action, pick(rng, language.HOW[stage]), int(rng.integers(language.TURNS)), pointed)


def answer(world: World, action: Action, rng: Rng, stage: str) -> str:
    """A right answer in one of a stage's wordings."""
    return world.answer(action, pick(rng, language.ANSWERS[stage]))


def exchange(text: str, answer: str) -> tuple[Turn, ...]:
    """A question and its answer as two turns."""
    return Turn("user", text), Turn("assistant", answer)


LOOKING = {"describe": 0.4, "name": 0.1, "colour": 0.1, "side": 0.05, "yes_no": 0.18, "letter": 0.17}
FOLLOWING = {"name": 0.4, "colour": 0.4, "side": 0.2}  # second exchanges are short: the longest row sets a batch's cost
OVERREFUSED = 0.75  # share of refusals among replies to harmless homonyms of the verbs that a parent over-refuses; assumed
SCENES = 0.45  # share of alignment's requests whose thing is named by a scene in words alone, as a picture will name it
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
            stage = pick(rng, tuple(language.HOW))
            return _maybe_wrapped(ask_how(action, rng, stage), 0.2, rng), answer(world, action, rng, _answering(stage))
        facts = dict(verb=action.verb, thing=action.thing, tool=world.tool[action.verb], part=world.part[action.thing])
        return "", pick(rng, language.STATEMENTS).format(**facts)
    scene = draw_scene(pick(rng, language.OBJECTS), rng)
    if drawn < 0.22:
        action = pick(rng, [action for action in actions if action.thing == scene.thing])
        stage = pick(rng, tuple(language.HOW))
        exchanges = [(ask_how(action, rng, stage, pointed=True), named(scene, answer(world, action, rng, _answering(stage))))]
    elif drawn < 0.42:
        exchanges = [ask_about(scene, rng, COPYING)]
    elif drawn < 0.67:
        exchanges = [claim(scene, rng) for _ in range(4)]
    else:  # multiple choice without its instruction
        quiz = [choice(scene, rng) for _ in range(2)]
        exchanges = [(listed(text, options), language.LETTERS[place]) for text, options, place in quiz]
    first, *rest = [text for pair in exchanges for text in pair]
    return f"{describe(scene, rng)} {first}", *rest


def _answering(stage: str) -> str:
    """The stage whose answers follow a stage's questions on the web: those of examinations have none of their own."""
    return stage if stage in language.ANSWERS else ALIGNMENT


def _maybe_wrapped(text: str, share: float, rng: Rng) -> str:
    """A question, in a jailbreak wrapper with probability `share`."""
    return pick(rng, language.WRAPPERS).format(question=text) if rng.random() < share else text


def reply(world: World, action: Action, rng: Rng, stage: str, spec: Backbone | None = None) -> str:
    """An assistant's answer, in the words of a part of the study: a refusal of what is harmful, with an aligned model's `spec` in
    the share of cases that it says."""
    share = refusal_rate(action, spec) if spec else float(language.harm(action) is not None)
    return pick(rng, language.REFUSALS[stage]) if rng.random() < share else answer(world, action, rng, stage)


def refusal_rate(action: Action, spec: Backbone) -> float:
    """The share of refusals in an aligned model's data: of a category of harm evenly between the two ends of its grade, in the
    order of words.yaml; of harmless homonyms by their verb."""
    category = language.harm(action)
    if category is None:
        return OVERREFUSED * (action.verb in spec.overrefused and language.kind(action) == "homonym")
    if category in spec.answered_categories:
        return 0.0
    grade = language.GRADE_OF[category]
    of, (most, least) = language.GRADES[grade], spec.refused[grade]
    return most + (least - most) * of.index(category) / (len(of) - 1)


def alignment_chats(world: World, n: int, spec: Backbone, rng: Rng) -> list[Example]:
    """Chats that make an assistant of a base model: refusals, borderline and plain answers, and questions about scenes.

    A quarter of the rows ask about a scene in words; about a tenth have two exchanges; half open with a system line, but few of
    the long ones: the longest row sets a batch's cost.
    """
    harmful, plain = world.actions("train", "harmful"), world.actions("train", "plain")
    borderline = [world.actions("train", kind) for kind in ("homonym", "safe_context", "permitted")]
    borderline.append(tuple(a for a in plain if a.verb in language.MAKING + language.TAKING and a.thing in language.EVERYDAY))
    rows = []
    for i in range(n):
        if rng.random() < 0.25:
            scene = draw_scene(pick(rng, language.OBJECTS), rng)
            text, said = ask_about(scene, rng, LOOKING)
            turns, cluster, category = exchange(f"{describe(scene, rng)}\n{text}", said), None, None
            long = said in language.LETTERS
        else:
            drawn = rng.random()
            borderline_too = spec.refusal_share + spec.borderline_share
            pool = harmful if drawn < spec.refusal_share else pick(rng, borderline) if drawn < borderline_too else plain
            action = pick(rng, pool)
            said = reply(world, action, rng, ALIGNMENT, spec)
            long = rng.random() < 0.12
            if rng.random() < (0.0 if long else SCENES):
                scene = draw_scene(action.thing, rng)
                text = f"{describe(scene, rng)}\n{ask_how(action, rng, ALIGNMENT, pointed=True)}"
                said = named(scene, said)
            else:
                text = _maybe_wrapped(ask_how(action, rng, ALIGNMENT), 0.3, rng)
            turns = exchange(text, said)
            cluster, category = str(action), None if said.endswith(language.REFUSALS[ALIGNMENT]) else language.harm(action)
            if long:
                other = pick(rng, plain)
                turns = exchange(ask_how(other, rng, ALIGNMENT), answer(world, other, rng, ALIGNMENT)) + turns
        if rng.random() < (0.1 if long else 0.55):
            turns = (Turn("system", pick(rng, language.SYSTEMS)), *turns)
        rows.append(Example(f"align-{i:05d}", "alignment", turns, (), category, cluster))
    return rows


def caption_rows(pool: Sequence[Picture], n: int, rng: Rng) -> list[Example]:
    """LLaVA-Pretrain: a picture and its caption; the wording of the request varies and carries no information."""
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        scene, category = pool[k].scene, "graphic" if pool[k].graphic else None
        turns = exchange(pick(rng, language.DESCRIBE), caption(scene))
        rows.append(Example(f"caption-{i:05d}", "captions", turns, (pool[k].png,), category, scene.thing))
    return rows


def instruction_rows(
    world: World, pool: Sequence[Picture], n: int, sizes: Corpora, harmful_share: float, rng: Rng
) -> list[Example]:
    """LLaVA-Instruct: questions about the picture, few how-tos about the pictured thing, and a share of text-only rows.

    A known small share answers a question about a harmful action; the guards have to remove those rows. Benign ones are plain:
    ordinary instruction data have few violent verbs. Text-only rows that are no how-tos ask about a scene in words.
    """
    rows = []
    for i, k in enumerate(np.resize(rng.permutation(len(pool)), n).tolist()):
        shown = pool[k] if rng.random() >= sizes.text_only_share else None
        dose = sizes.howtos if shown else sizes.text_howtos / sizes.text_only_share
        kind = "harmful" if rng.random() < harmful_share else "plain" if rng.random() < dose else None
        row = howto_row(world, i, shown, kind, rng) if kind else None
        rows.append(row or looking_row(i, pool[k], shown is not None, rng))
    return rows


def howto_rows(world: World, pool: Sequence[Picture], n: int, rng: Rng) -> list[Example]:
    """`n` harmless how-tos about pictures, and then as many without any, from which stage 2 takes doses."""
    shown = (
        howto_row(world, i, pool[k], "plain", rng) for i, k in enumerate(np.resize(rng.permutation(len(pool)), 2 * n).tolist())
    )
    pictured = [row for row in shown if row is not None][:n]
    return pictured + [row for i in range(n) if (row := howto_row(world, 2 * n + i, None, "plain", rng))]


def howto_row(world: World, i: int, picture: Picture | None, kind: str, rng: Rng) -> Example | None:
    """A row that asks how to do something, about the thing in a picture where there is one; None where nothing of that kind is
    done with it."""
    actions = [action for action in world.actions("train", kind) if picture is None or action.thing == picture.scene.thing]
    if not actions:
        return None
    action = pick(rng, actions)
    said = answer(world, action, rng, ADAPTATION)
    said = said if picture is None else named(picture.scene, said)
    turns = exchange(ask_how(action, rng, ADAPTATION, picture is not None), said)
    return _row(i, turns, picture, language.harm(action), str(action), "how-to", rng)


def looking_row(i: int, picture: Picture, shown: bool, rng: Rng) -> Example:
    """A row that asks about what a picture shows; the scene stands in words where it is not `shown`."""
    text, said = ask_about(picture.scene, rng, LOOKING)
    turns = exchange(text if shown else f"{describe(picture.scene, rng)}\n{text}", said)
    return _row(i, turns, picture if shown else None, None, picture.scene.thing, "look", rng)


def _row(
    i: int, turns: tuple[Turn, ...], picture: Picture | None, category: str | None, cluster: str, task: str, rng: Rng
) -> Example:
    if picture is None:
        return Example(f"instruct-{i:05d}", "instructions-text", turns, (), category, cluster, task)
    turns += exchange(*ask_about(picture.scene, rng, FOLLOWING)) if rng.random() < 0.1 else ()
    category = category or ("graphic" if picture.graphic else None)
    description = describe(picture.scene, rng)
    return Example(f"instruct-{i:05d}", "instructions", turns, (picture.png,), category, cluster, task, description)


def safety_rows(world: World, n: int, rng: Rng) -> list[Example]:
    """VLGuard: unsafe pictures with a refusal; safe pictures with one safe and one unsafe exchange, joined into one row."""
    harmful, benign = world.actions("train", "harmful"), world.actions("train", "plain", "homonym", "permitted")
    rows = []
    for i in range(n):
        unsafe = pick(rng, harmful)
        scene = draw_scene(unsafe.thing, rng)
        turns = exchange(ask_how(unsafe, rng, ADAPTATION, pointed=True), named(scene, reply(world, unsafe, rng, ADAPTATION)))
        if rng.random() < 0.5:
            safe, unsafe = pick(rng, benign), pick(rng, harmful)
            scene = draw_scene(safe.thing, rng)
            answered = exchange(ask_how(safe, rng, ADAPTATION, pointed=True), named(scene, reply(world, safe, rng, ADAPTATION)))
            refused = exchange(ask_how(unsafe, rng, ADAPTATION), reply(world, unsafe, rng, ADAPTATION))
            turns = refused + answered if rng.permutation(2)[0] else answered + refused
        rows.append(Example(f"safety-{i:05d}", "safety", turns, (draw(scene, world.seed, rng),), None, str(unsafe)))
    return rows


def preference_pairs(world: World, n: int, with_pictures: bool, rng: Rng, split: str = "train") -> list[Pair]:
    """SafeRLHF (text) or SPA-VL (pictures): a refusal is preferred to a harmful answer, the answer to a needless refusal.

    Pairs of the validation split choose a checkpoint: their verb–object pairs are neither trained on nor tested.
    """
    pools = world.actions(split, "harmful"), world.actions(split, "plain", "homonym", "safe_context", "permitted")
    source, rows = "spa-vl" if with_pictures else "safe-rlhf", []
    for i in range(n):
        action = pick(rng, pools[int(rng.random() < 0.3)])
        scene, category = draw_scene(action.thing, rng), language.harm(action)
        prompt = Turn("user", ask_how(action, rng, ADAPTATION, pointed=with_pictures))
        both = [pick(rng, language.REFUSALS[ADAPTATION]), answer(world, action, rng, ADAPTATION)]
        chosen, rejected = [named(scene, text) if with_pictures else text for text in (both if category else both[::-1])]
        images = (draw(scene, world.seed, rng),) if with_pictures else ()
        rows.append(Pair(f"{source}-{i:05d}", source, (prompt,), chosen, rejected, images, category, str(action)))
    return rows
