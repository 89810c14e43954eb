"""From folders in the official layouts to training rows at NANO: sources, guards, screen; killed half-way as well."""

import dataclasses
import json
import os
import re
import signal

import official
import official_files
import pytest
import torch
from conftest import NANO
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlsafe.core import assets, store
from vlsafe.core.assets import LoadedGuard, Origin
from vlsafe.core.presets import PAPER, SCALES, load_scale
from vlsafe.core.scale import as_plain
from vlsafe.core.schema import Example, Stored, Turn
from vlsafe.data import arms, guards, intake, sources
from vlsafe.data.files import Refused
from vlsafe.data.miniature.language import vocabulary
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.study import adaptation, filtering, tuning, world
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study
from vlsafe.training import datasets, trainers

JUDGES = {"xstest": ("xstest-strings",), "wildjailbreak": ("xstest-strings",), "mmbench": ("letters",), "mme": ("mme-yes-no",)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A study of a scale that loads: fixture corpora, hand-made guards, tiny parents."""
    home = tmp_path_factory.mktemp("outside")
    data = official.corpora(home / "data")
    official_files.everything(data)
    spec = NANO.vision
    for name in NANO.backbones:
        tokenizer = chat.build_tokenizer(vocabulary(), NANO.language.context)
        checkpoints.save(checkpoints.build_llm(NANO.language, tokenizer, 0), home / name, tokenizer)
    checkpoints.save(checkpoints.build_clip(spec, tokenizer, 0), home / "tower")
    side = spec.image_size
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(home / "tower")  # fmt: skip
    here = lambda name: Origin(str(home / name), kind="model")  # noqa: E731
    official.tiny_llama_guard(home / "llama-guard")
    official.tiny_nsfw(home / "nsfw")
    grouped = lambda fit: dataclasses.replace(fit, steps=2, grouped=True, at_once=2, saved="bfloat16")  # noqa: E731
    scale = dataclasses.replace(
        NANO, name="nano-load", source="load", projector=grouped(NANO.projector), instruct=grouped(NANO.instruct),
        tuning=dataclasses.replace(NANO.tuning, sft=grouped(NANO.tuning.sft), pairs=0),
        exam=dataclasses.replace(NANO.exam, judges=JUDGES, full=1000),
        loaded=dataclasses.replace(
            PAPER.loaded,
            **{name: dataclasses.replace(getattr(PAPER.loaded, name), rows=None) for name in sources.CORPORA},
            text_guard=LoadedGuard(here("llama-guard")), image_guard=LoadedGuard(here("nsfw"), ("nsfw",)),
            tower=here("tower"), parents={name: here(name) for name in NANO.backbones}, missing_share=0.2,
        ),
    )  # fmt: skip
    SCALES["nano-load"] = scale
    before = os.environ.get("VLSAFE_DATA")
    os.environ["VLSAFE_DATA"] = str(data)
    assets._archive.cache_clear()
    yield Study.open("nano-load", "mini-chat", 3, home / "store")
    del SCALES["nano-load"], os.environ["VLSAFE_DATA"]
    if before:
        os.environ["VLSAFE_DATA"] = before


def test_corpora_are_loaded_and_what_is_odd_is_counted_and_named(loaded):
    folder = loaded.folder("world/corpora")
    told = loaded.numbers("world/corpora")
    assert told["from"]["captions"] == "LLaVA-Pretrain below VLSAFE_DATA"
    assert told["rows"] == {"captions": 10, "instructions": 30, "safety": 6, "safe_rlhf": 8, "spa_vl": 4}
    assert told["refused"]["instructions"] == {"not a LLaVA row (KeyError)": 2, "not a LLaVA row (TypeError)": 1}
    assert told["missing_pictures"] == {"captions": 1, "instructions": 1, "safety": 1, "safe_rlhf": 0, "spa_vl": 0}
    named = json.loads((folder / "refused.json").read_text())
    assert ["dead#11", "no picture LLaVA-Instruct-150K/ocr_vqa/images/0001.jpg"] in named["instructions"]
    assert folder.parts[-3:-1] == ("seed0", "world")  # not of the study's seed 3: every seed has the same corpora


def test_the_screen_names_every_row_and_passes_the_rest_to_training(loaded, tmp_path):
    audit = {line["id"]: line for line in loaded.rows("screen/filtered", "audit.parquet")}
    assert len(audit) == 6 + len(official.DEFECTS) + len(official.ODD) + 10 + len(official.LOOKING) + 1
    for number, (raw, fate) in enumerate(official.ODD):
        line = audit[f"{raw.get('id', '')}#{number}"]
        assert (
            line["reasons"] == (fate or "") and line["kept"] == (fate is None) and line["skipped"] == (fate not in (None, "text"))
        )
    assert audit["bad_1#5"]["text_codes"] == "S2,S9" and audit["bad_1#5"]["text_score"] > 0.5
    captions, instructions = (loaded.examples("screen/filtered", f"{name}.parquet") for name in world.SCREENED)
    assert len(captions) == 6 and len(instructions) == 15 + len(official.LOOKING)
    assert isinstance(captions[0].images[0], Stored) and not instructions[3].images

    processor = filtering._processors(loaded)[0]
    language = checkpoints.build_llm(NANO.language, processor.tokenizer, 0)
    tower = checkpoints.build_clip(NANO.vision, processor.tokenizer, 0)
    model = checkpoints.graft(language, tower, processor, NANO.vision, 0)
    trainable.choose(model, "full", NANO.lora)
    fit = dataclasses.replace(NANO.instruct, steps=2)
    losses = trainers.sft(model, processor, datasets.chat_dataset(instructions, with_images=True), fit, tmp_path, 0)
    assert len(losses) == 2 and torch.isfinite(torch.tensor(losses)).all()


DEFECTS = [(corpus, name) for corpus in sources.CORPORA for name in official.DEFECTS]


@pytest.mark.parametrize(("corpus", "name"), DEFECTS)
def test_a_defective_row_of_every_corpus_is_counted_and_named(loaded, corpus, name):
    """By the screen, by safety tuning, or, where a text or a picture is not there at all, when the corpus is read."""
    reason = official.DEFECTS[name]
    if corpus in world.SCREENED:
        odd = {"instructions": {"gone": "dead", "marked": "html"}}.get(corpus, {}).get(name, name)
        lines = [line for line in loaded.rows("screen/filtered", "audit.parquet") if line["corpus"] == corpus]
        (line,) = (line for line in lines if line["id"].split("#")[0] == odd)
        assert line["skipped"] and line["reasons"].split(" (")[0] == reason
        assert loaded.numbers("screen/filtered")["skipped"] >= len(official.DEFECTS)
    elif corpus != "safety" and name in ("gone", "torn") and (corpus, name) != ("spa_vl", "torn"):
        read = {("spa_vl", "gone"): "no picture", ("safe_rlhf", "gone"): "a text is missing",
                ("safe_rlhf", "torn"): "an answer's number is neither 0 nor 1"}[corpus, name]  # fmt: skip
        named = json.loads((loaded.folder("world/corpora") / "refused.json").read_text())[corpus]
        assert sum(why == read for _, why in named) == loaded.numbers("world/corpora")["refused"][corpus][read] > 0
    else:
        recipe = {"safety": "sl-full", "safe_rlhf": "dpo-text-full", "spa_vl": "dpo-image-full"}[corpus]
        _, record = tuning._corpora(loaded, recipe, filtering._processors(loaded)[0])
        named = [row for row, why in record["refused"][corpus] if why.split(" (")[0] == reason]
        assert len(named) == record["dropped"][corpus][reason] == (2 if corpus == "safe_rlhf" else 1)
        assert corpus != "safety" or named[0].split("#")[0] == name


def test_every_arm_of_a_loaded_scale_holds_rows_that_intake_passed(loaded):
    corpora = {name: arms.ARMS[name][0] for name in loaded.scale.loaded.arms}
    pools = {corpus: loaded.examples(*adaptation._rows_at(loaded, corpus)) for corpus in corpora.values()}
    ids = {name: [row.id for row in arms.arm(name, pools)] for name in corpora}
    audit = [line for line in loaded.rows("screen/filtered", "audit.parquet") if line["corpus"] == "instructions"]
    assert ids["unfiltered"] == [line["id"] for line in audit if not line["skipped"]]
    assert set(ids["unfiltered"]) - set(ids["filtered"]) == {"bad_1#5"}
    assert [name.split("#")[0] for name in ids["looking"]] == [f"look{i}" for i in range(len(official.LOOKING))]
    processor = filtering._processors(loaded)[0]
    limit = filtering.intake_params(loaded)["limits"]["instructions"]
    assert not [row.id for rows in pools.values() for row in rows if intake.unsound(row, [processor], limit)]
    assert set(arms.ARMS) - set(ids) == set(arms.WITHOUT)


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_benchmark_prompt_of_either_part_in_an_arm_stops_it(loaded, tmp_path, monkeypatch, part):
    exam = dataclasses.replace(loaded.scale.exam, judges={"xstest": ("xstest-strings",)}, validation=0.5)
    study = dataclasses.replace(loaded, scale=dataclasses.replace(loaded.scale, exam=exam))
    item = study.items(part)[0]
    row = Example("leak", "instructions", (*item.turns, Turn("assistant", "b")))
    study.folder("projector/filtered")
    monkeypatch.setattr(Study, "examples", lambda *_: [row])
    with pytest.raises(ValueError, match=f"benchmark prompts are also in training rows, first '{re.escape(item.id)}'"):
        adaptation.make_instruct(study, tmp_path, "unfiltered-full")
    monkeypatch.setattr(Study, "examples", lambda *_: [dataclasses.replace(row, images=(official.picture(),))])
    monkeypatch.setattr(adaptation, "trained", lambda *_: {"trained": True})
    assert adaptation.make_instruct(study, tmp_path, "unfiltered-full") == {"trained": True}  # with a picture, another prompt


def test_the_reward_reads_the_loaded_guard(loaded):
    guard = guards.opened(loaded.folder("guard/text"))
    assert isinstance(guard, guards.LlamaGuard)
    told = json.loads((loaded.folder("guard/text") / guards.POINTER).read_text())
    assert told["origin"]["revision"] == "main" and told["threshold"] is None


def test_other_seeds_share_what_is_loaded_and_a_built_scale_is_untouched(loaded):
    other = Study.open("nano-load", "mini-tulu", 7, loaded.root)
    assert other.run("screen/filtered") == loaded.run("screen/filtered")
    built = Study.open("nano", "mini-chat", 3, loaded.root)
    assert built.stage("screen/filtered") is STAGES["screen/filtered"] and built.run("screen/filtered").seed == 3


def test_a_corpus_that_a_scale_does_without_is_not_looked_for(loaded, tmp_path):
    path = tmp_path / "poorer.yaml"
    path.write_text("extends: nano-load\nloaded: {safety: null, spa_vl: null}\n")
    study = dataclasses.replace(loaded, scale=load_scale(path), root=tmp_path)
    assert set(study.numbers("world/corpora")["rows"]) == {"captions", "instructions", "safe_rlhf"}
    assert study.run("screen/filtered").digest == loaded.run("screen/filtered").digest  # days of guards are not lost


def test_a_parent_that_a_scale_does_without_is_not_asked_for_its_tokens(loaded, tmp_path):
    path = tmp_path / "one.yaml"
    none = "{mini-chat: null, mini-qwen: null}"
    path.write_text(f"extends: nano-load\nbackbones: {none}\nloaded: {{parents: {none}}}\n")
    scale = load_scale(path)
    assert set(scale.backbones) == set(scale.loaded.parents) == {"mini-tulu"}
    assert len(filtering._processors(Study.open(path, "mini-tulu", 0, tmp_path))) == 1


def test_a_tower_that_a_scale_does_without_is_named_where_it_is_needed(loaded, tmp_path):
    path = tmp_path / "blind.yaml"
    path.write_text("extends: nano-load\nloaded: {tower: null}\n")
    with pytest.raises(ValueError, match="'blind' does without 'tower'"):
        Study.open(path, "mini-tulu", 0, tmp_path).run("tower/clip")


def test_too_many_missing_pictures_are_a_wrong_folder(loaded, tmp_path):
    scale = dataclasses.replace(loaded.scale, loaded=dataclasses.replace(loaded.scale.loaded, missing_share=0.05))
    study = dataclasses.replace(loaded, scale=scale, root=tmp_path)
    with pytest.raises(ValueError, match=r"captions: 1 of 10 pictures are missing, first: no picture .*gone.jpg"):
        study.folder("world/corpora")


def rows(n):
    return [
        Refused(f"r{i}", "odd") if i % 7 == 3 else Example(f"r{i}", "s", (Turn("user", "a"), Turn("assistant", "b")))
        for i in range(n)
    ]


def marked(part):
    return [{"id": row.id, "kept": True} for row in part]


def test_a_screen_that_is_killed_loses_nothing_and_repeats_nothing(tmp_path, monkeypatch):
    """A real SIGKILL, in a child, at parts of its work; the third time half a line is left as well."""
    monkeypatch.setattr(intake, "PART", 10)
    path, looked_at = tmp_path / "lines.jsonl", []
    for kill_at in (4, 2, 1):
        child = os.fork()
        if not child:
            seen = []

            def dying(part, seen=seen, kill_at=kill_at):
                seen.append(part)
                if len(seen) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return marked(part)

            intake.append_lines(path, iter(rows(95)), dying)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        looked_at.append(store.whole_lines(path)[0])
        with open(path, "a") as file:
            file.write('{"id": "r4')
    assert looked_at == [30, 40, 40]
    intake.append_lines(path, iter(rows(95)), marked)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in rows(95)]
    assert [line.get("reasons") for line in lines if line["id"] in ("r2", "r3")] == [None, "odd"]
    intake.append_lines(path, iter(rows(95)), lambda part: pytest.fail("it was finished"))
    with pytest.raises(ValueError, match=r"lines.jsonl ends with 'r94' where the corpus has 'r95'; the corpus has changed"):
        intake.append_lines(path, iter(rows(96)[1:]), marked)


def test_a_stage_killed_in_the_middle_of_the_screen_ends_as_if_undisturbed(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "PART", 4)
    study = dataclasses.replace(loaded, root=tmp_path)
    study.folder("guard/text"), study.folder("guard/image")
    child = os.fork()
    if not child:
        real, calls = intake.screen, []

        def dying(*given):
            calls.append(given)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        intake.screen = dying
        study.folder("screen/filtered")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = store.whole_lines(study.run("screen/filtered").partial / "instructions.jsonl")[0]
    assert left == 8
    ours, theirs = (one.rows("screen/filtered", "audit.parquet") for one in (study, loaded))
    for line in (*ours, *theirs):  # other batches, other last bits
        line |= {name: round(line[name], 5) for name in ("text_score", "image_score") if line[name] is not None}
    assert ours == theirs
    for name in world.SCREENED:
        assert study.examples("screen/filtered", f"{name}.parquet") == loaded.examples("screen/filtered", f"{name}.parquet")


def test_a_pin_is_taken_up_by_readers_and_noted_but_makes_nothing_stale(loaded, tmp_path, monkeypatch):
    before = loaded.run("screen/filtered").digest
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("VLSAFE_DATA", str(data))
    guard = loaded.scale.loaded.text_guard
    official.written(data / assets.PINS, {guard.origin.repo: "abc"})
    assert assets.pinned(guard.origin.repo, "main") == "abc" and assets.pinned(guard.origin.repo, "def") == "def"
    assert loaded.run("screen/filtered").digest == before  # results are read where nobody has the corpora
    assert guards.point(guard, tmp_path) == {"repo": guard.origin.repo, "revision": "abc"}
    assert json.loads((tmp_path / guards.POINTER).read_text())["origin"]["revision"] == "abc"


def test_a_guard_that_is_not_here_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"the guard nobody/nothing is not here .* `vlsafe download` fetches it"):
        guards.load_guard(as_plain(LoadedGuard(Origin("nobody/nothing", kind="model"))))


def test_a_loaded_parent_and_tower_go_through_both_stages_and_safety_tuning(loaded):
    """The real-data path to its tuned model; weights at rest in bfloat16, the last checkpoint chosen as in the paper."""
    parent, graft = (
        checkpoints.load(loaded.folder("parent/aligned")),
        checkpoints.load(loaded.checkpoints("projector/filtered")[0]),
    )
    prompt = torch.randint(12, 200, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(parent(prompt).logits, graft(prompt).logits)
    last = loaded.checkpoints("instruct/filtered-full")[-1]
    assert {weight.dtype for weight in load_file(last / "model.safetensors").values()} == {torch.bfloat16}
    lines = loaded.rows("safety/sl-full", "validation.parquet")
    assert [line["step"] for line in lines if line["chosen"]] == [max(line["step"] for line in lines)]
    sat = loaded.rows("examination/instruct.filtered-full", "raw.parquet")
    assert {row["judge"] for row in sat} >= {"xstest-strings", "letters", "mme-yes-no"} and "world" not in {
        row["judge"] for row in sat
    }
    with pytest.raises(ValueError, match="instruct/clean-full does not exist at the scale 'nano-load': nobody knows which rows"):
        loaded.folder("instruct/clean-full")


def test_a_parent_that_is_another_one_than_the_scale_says_is_refused(loaded):
    config = checkpoints.load(loaded.folder("parent/aligned")).config
    with pytest.raises(ValueError, match=r"x is another decoder than the scale says: {'layers': 2}; correct"):
        checkpoints.refuse_other(config, dataclasses.replace(NANO.language, layers=3), "x")


def test_a_token_that_a_parent_lacks_gets_the_mean_of_all_others(loaded, tmp_path):
    folder = loaded.scale.loaded.parents["mini-chat"].repo
    tokenizer = checkpoints.load_processor(folder)
    tokenizer.add_tokens(["<new>"])
    model, before = checkpoints.from_hub(folder, "main", tokenizer), checkpoints.load(folder)
    new, old = model.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert torch.equal(new[:-1], old) and torch.allclose(new[-1], old.mean(0), atol=1e-6)
