"""Broken rows end in the audit, by name; the rest trains."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlsafe.core.scale import Corpora
from vlsafe.core.schema import Example, Item, Pair, Stored, Turn, messages
from vlsafe.data import intake
from vlsafe.data.guards import Assessment
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import World
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.study import filtering
from vlsafe.training import datasets, trainers


def picture(mode="RGB", size=(32, 32), format="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=format)
    return buffer.getvalue()


def noise():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def header_only(width, height):
    """A PNG that claims a size and holds no pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def row(name, *images, question="what is it?", answer="apple."):
    return Example(name, "instructions", (Turn("user", question), Turn("assistant", answer)), images)


DEFECTS = {
    "picture corrupt": [
        row("bytes", b"\xff\xd8 this is no picture"), row("nothing", b""), row("truncated", noise()[:1500]),
        row("zero", header_only(0, 32)), row("no pixels", header_only(32, 32)), row("second", picture(), b"no"),
    ],
    "picture too small (4 x 40)": [row("small", picture(size=(4, 40)))],
    "picture too long (400 x 32)": [row("long", picture(size=(400, 32)))],
    "picture of mode I;16": [row("deep", picture("I;16"))],
    "picture too large": [row("large", header_only(9000, 9000)), row("bomb", header_only(40000, 40000))],
    "instruction empty": [row("no question", question=" \n")],
    "answer empty": [row("no answer", picture(), answer="")],
    "turns out of order": [
        Example("mute", "s", (Turn("user", "what is it?"),)), Example("none", "s", ()),
        Example("no user", "s", (Turn("assistant", "apple."),), (picture(),)),
        Example("twice", "s", (Turn("user", "what is it?"), Turn("user", "what is it?"))),
    ],
    "half a character in the text": [row("half", picture(), answer="apple \ud83d."), row("half too", question="\udc00 what?")],
    "control token in the text": [row("image word", picture(), question="<image> what is it?"), row("end", answer="apple</s>.")],
}  # fmt: skip


class Attentive:
    """A guard that finds all safe and keeps the contents that it assessed."""

    def __init__(self):
        self.seen = []

    def assess(self, contents):
        self.seen += contents
        return [Assessment(False, (), 0.1) for _ in contents]


def sound_rows(n=16):
    world = World(0)
    rng = world.rng("intake")
    return corpora.instruction_rows(world, corpora.paint(world, 84, 0, rng), n, Corpora(text_only_share=0.3), 0, rng)


def test_every_defect_ends_in_the_audit_and_the_rest_trains(study, tmp_path):
    sound = [*sound_rows(), *(row(f"mode {mode}", picture(mode)) for mode in ("P", "RGBA", "L", "LA", "1"))]
    sound += [row("cmyk", picture("CMYK", format="JPEG"))]
    long = row("long text", picture(), question="apple " * 300)
    rows = [*sound, long, *(bad for bads in DEFECTS.values() for bad in bads)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    text, image = Attentive(), Attentive()
    params = filtering.intake_params(study)
    processors = [study.processor(template) for template in params["templates"]]
    lines = intake.screen(rows, processors, params["limits"]["instructions"], text, image)
    named = {line["id"]: line["reasons"] for line in lines if line["skipped"]}
    wanted = {bad.id: reason for reason, bads in DEFECTS.items() for bad in bads}
    assert named.pop("long text").startswith("longer than the context (3")
    assert named == wanted
    assert not any(line["kept"] for line in lines if line["skipped"])
    kept = list(intake.passing(rows, lines))
    assert {r.id for r in kept} == {r.id for r in sound}
    assert sum(line["converted"] for line in lines) == 6
    assert len(text.seen) == len(sound) and len(image.seen) == sum(bool(r.images) for r in sound)
    start = study.checkpoints("projector/filtered")[-1]
    model = checkpoints.load(start)
    trainable.choose(model, "full", study.scale.lora)
    fit = study.scale.instruct.__class__(steps=1, batch_size=len(kept), learning_rate=1e-3)
    (loss,) = trainers.sft(model, checkpoints.load_processor(start), datasets.chat_dataset(kept, True), fit, tmp_path, 0)
    assert 0 < loss < 20


@pytest.mark.parametrize("template", ["llama2", "tulu"])
def test_lengths_are_those_of_the_processor_with_its_pictures(study, template):
    processor = study.processor(template)
    rows = [*sound_rows(), row("two", picture(), picture(size=(50, 40)))]
    for each in rows:
        text = processor.apply_chat_template(messages(each.turns, len(each.images)), tokenize=False)
        pictures = [chat.open_picture(data) for data in each.images] or None
        inputs = processor(text=text, images=pictures, add_special_tokens=False)
        assert intake.tokens(each, processor) == len(inputs["input_ids"][0])
        length = intake.tokens(each, processor)
        assert intake.unsound(each, [processor], length) is None
        assert intake.unsound(each, [processor], length - 1) == f"longer than the context ({length} > {length - 1})"


def test_training_never_cuts_image_tokens_in_silence(study, tmp_path):
    """What intake should have skipped is refused by the trainer, not cut."""
    start = study.checkpoints("projector/filtered")[-1]
    fit = study.scale.instruct.__class__(steps=1, batch_size=2, learning_rate=1e-3, max_length=12, micro_batches=1)
    rows = datasets.chat_dataset([row("a", picture()), row("b", picture())], True)
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        trainers.sft(checkpoints.load(start), checkpoints.load_processor(start), rows, fit, tmp_path, 0)


def test_a_screened_study_says_what_intake_did(study):
    numbers = study.numbers("screen/filtered")
    assert numbers["skipped"] == numbers["converted"] == 0
    audit = study.rows("screen/filtered", "audit.parquet")
    assert {"skipped", "converted"} <= set(audit[0]) and len(audit) == numbers["screened"]


def test_a_benchmark_prompt_is_a_leak_with_its_own_picture_alone_and_no_other_picture_is_read():
    item = Item("i", "b", (Turn("user", "what is it?"),), (picture(),))
    unread = [row("other text", Stored("nowhere/a.png"), question="who is it?"), row("other", picture("L")), row("none")]
    intake.refuse_leaks(unread, [item])
    system = Example("s", "x", (Turn("system", "be brief."), *row("same", picture()).turns), (picture(),))
    pair = Pair("p", "x", item.turns, "apple.", "pear.", item.images)
    later = Example("l", "x", (Turn("user", "who is it?"), Turn("assistant", "me."), *row("same").turns), (picture(),))
    for leak in (row("same", picture()), system, pair, later):
        with pytest.raises(ValueError, match="1 benchmark prompts are also in training rows, first 'i'"):
            intake.refuse_leaks([*unread, leak], [item])
