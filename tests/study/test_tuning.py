"""Safety tuning: the losses, the intake of preference rows, resumption, and what the stages wrote, on the NANO study."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from vlsafe import training
from vlsafe.core.presets import MINI, PAPER, SMALL
from vlsafe.core.scale import Fit, LoraSpec, Rollout
from vlsafe.core.schema import Item, Pair, Turn
from vlsafe.data import arms, guards, intake
from vlsafe.data.miniature import corpora
from vlsafe.data.miniature.language import HOW, World
from vlsafe.evaluation import validation
from vlsafe.evaluation.benchmarks import BENCHMARKS
from vlsafe.evaluation.engines import option_losses
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.study import adaptation, tuning
from vlsafe.study.graph import planned
from vlsafe.training import datasets, trainers

WORLD = World(0)


def pairs(with_pictures, n=8, split="train"):
    return corpora.preference_pairs(WORLD, n, with_pictures, WORLD.rng("test pairs"), split)


def speaking(folder, template):
    """A model's processor with the chat template of one of the parents."""
    processor = checkpoints.load_processor(folder)
    processor.chat_template = processor.tokenizer.chat_template = chat.template(template)
    return processor


def margins(folder, rows, template="llama2"):
    """log p(chosen) - log p(rejected) of every pair, by the engine that ranks options."""
    asked = [Item(p.id, "b", p.turns, p.images, options=(p.chosen, p.rejected), scoring="likelihood") for p in rows]
    found = option_losses(checkpoints.load(folder), speaking(folder, template), asked, 16)
    return np.array([rejected - chosen for chosen, rejected in found])


def dpo(study, folder, rows, fit, start, reference, method="full", milestones=(), progress=lambda step: None, template="llama2"):
    torch.manual_seed(0)
    model = trainable.choose(checkpoints.load(start), method, LoraSpec())
    data = datasets.pair_dataset(rows, any(row.images for row in rows))
    spec = study.scale.tuning.preference
    history = trainers.dpo(
        model, checkpoints.load(reference), speaking(start, template), data, spec, fit, folder, 0, milestones, progress
    )
    return history, model


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_notebook():
    """Chosen twice as likely as under the reference, rejected half: with beta 1 the loss is ln(1 + 1/4)."""
    chosen, rejected = math.log(0.4 / 0.2), math.log(0.1 / 0.2)
    assert math.log1p(math.exp(-(chosen - rejected))) == pytest.approx(math.log(1.25))


@pytest.mark.parametrize("template", ["llama2", "tulu"])
@pytest.mark.parametrize("shown", [False, True])
def test_dpos_loss_is_the_closed_form_and_ln_2_where_the_reference_is_the_model(study, tmp_path, shown, template):
    """One step over all pairs, so that the loss is their mean; the reference's part is computed before, where TRL can."""
    start, other = study.checkpoints("instruct/filtered-full")[-1], study.checkpoints("projector/filtered")[-1]
    rows = pairs(shown, 7)
    talk = (Turn("user", "how do i carry the apple?"), Turn("assistant", "use the spoon and the wax."))
    rows[-1] = dataclasses.replace(rows[-1], turns=(*talk, *rows[-1].turns))  # several turns: the last answer alone counts
    fit = dataclasses.replace(study.scale.tuning.preference.fit, steps=1, batch_size=len(rows), micro_batches=1)
    history, _ = dpo(study, tmp_path / "apart", rows, fit, start, other, template=template)
    beta = study.scale.tuning.preference.beta
    wanted = np.log1p(np.exp(-beta * (margins(start, rows, template) - margins(other, rows, template)))).mean()
    assert abs(wanted - math.log(2)) > 1e-4 and history[0]["loss"] == pytest.approx(wanted, abs=2e-5)
    history, _ = dpo(study, tmp_path / "same", rows, fit, start, start, template=template)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_first_step_of_every_dpo_recipe_is_ln_2(study):
    for name in ("dpo-text-full", "dpo-image-full", "dpo-both-full"):
        history = json.loads((study.folder(f"safety/{name}") / "history.json").read_text())
        assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), name


# --- equivalences ---------------------------------------------------------------------------------------------------


def trained(study, objective, method, folder, fit, milestones=(), stop=None, dropout=0.05):
    start = study.checkpoints("instruct/filtered-full")[-1]
    rows = pairs(True) + pairs(False)

    def progress(step):
        if step == stop:
            raise KeyboardInterrupt

    if objective == "dpo":
        history, model = dpo(study, folder, rows, fit, start, start, method, milestones, progress)
    else:
        torch.manual_seed(0)
        model = trainable.choose(checkpoints.load(start), method, LoraSpec(dropout=dropout))
        data = datasets.chat_dataset([arms.answered(row, row.chosen) for row in rows], with_images=True)
        history = trainers.sft_history(model, checkpoints.load_processor(start), data, fit, folder, 0, milestones, progress)
    return history, model.state_dict()


CASES = [("sft", "full"), ("sft", "lora"), ("dpo", "full"), ("dpo", "lora")]


@pytest.mark.parametrize("objective, method", CASES)
def test_micro_batches_change_nothing_but_rounding(study, tmp_path, objective, method):
    fit = dataclasses.replace(study.scale.tuning.sft, steps=3, batch_size=8, schedule="constant")
    found = {
        n: trained(study, objective, method, tmp_path / str(n), dataclasses.replace(fit, micro_batches=n), dropout=0.0)[0]
        for n in (1, 4)
    }
    for whole, split in zip(found[1], found[4], strict=True):
        assert whole["loss"] == pytest.approx(split["loss"], abs=1e-4)
        assert whole["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-3)
    assert trainers.tokens_seen(found[1]) == trainers.tokens_seen(found[4])


@pytest.mark.parametrize("objective, method", CASES[1:])
def test_resumed_is_uninterrupted(study, tmp_path, objective, method):
    """SFT with all weights stands in test_models."""
    fit = dataclasses.replace(study.scale.tuning.sft, steps=4, batch_size=4)
    history, whole = trained(study, objective, method, tmp_path / "whole", fit, (2,))
    with pytest.raises(KeyboardInterrupt):
        trained(study, objective, method, tmp_path / "cut", fit, (2,), stop=3)
    again, resumed = trained(study, objective, method, tmp_path / "cut", fit, (2,))
    assert [r["loss"] for r in again] == [r["loss"] for r in history] and len(again) == 4
    assert trainers.tokens_seen(again) == trainers.tokens_seen(history)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# --- intake ---------------------------------------------------------------------------------------------------------


def test_every_odd_preference_row_has_a_stated_outcome(study):
    processor = checkpoints.load_processor(study.checkpoints("projector/filtered")[-1])
    plain, pictured = pairs(False, 1)[0], pairs(True, 1)[0]
    talk = (Turn("user", "what is it?"), Turn("assistant", "red."))

    def why(row, limit=200):
        return intake.unsound_pair(row, [processor], limit)

    change = dataclasses.replace
    assert why(plain) is None and why(pictured) is None
    assert why(change(pictured, turns=(*talk, *pictured.turns))) is None
    assert why(change(plain, turns=talk)) == "turns out of order"
    assert why(change(plain, chosen=f" {plain.rejected} ")) == "chosen equals rejected"
    assert why(change(plain, rejected=" ")) == "answer empty"
    assert why(change(pictured, images=(b"no picture",))) == "picture corrupt"
    assert why(pictured, 20).startswith("longer than the context")
    long = change(plain, rejected="wax " * 300)  # the longer answer decides
    assert why(long).startswith("longer than the context")
    with pytest.raises(ValueError, match="'safe-rlhf-00000' lacks its prompt"):
        why(change(plain, turns=()))
    kept, refused = intake.sound([plain, long, change(long, id="b"), pictured], intake.unsound_pair, [processor], 200)
    assert kept == [plain, pictured] and intake.tally(refused) == {"longer than the context": 2}
    assert [row for row, _ in refused] == [long.id, "b"]
    with pytest.raises(ValueError, match="none of 1 rows can be trained on, the first, 'safe-rlhf-00000', because: longer"):
        intake.sound([long], intake.unsound_pair, [processor], 200)


def test_a_replay_is_seeded_has_no_row_twice_and_keeps_its_order():
    rows = corpora.alignment_chats(WORLD, 30, MINI.backbones["mini-chat"], WORLD.rng("a"))
    drawn = [arms.replayed(rows, 10, WORLD.rng("replay")) for _ in range(2)]
    ids = [row.id for row in drawn[0]]
    assert drawn[0] == drawn[1] and len(set(ids)) == 10 and ids == sorted(ids)
    with pytest.raises(ValueError, match="31 rows are to be replayed of 30"):
        arms.replayed(rows, 31, WORLD.rng("replay"))


# --- reward and choice ----------------------------------------------------------------------------------------------


def test_the_reward_is_the_guards_on_harmful_prompts_and_the_right_answer_on_others():
    class Guard:
        def assess(self, talks):
            self.read = [talk[-1].text for talk in talks]
            return [
                guards.Assessment(unsafe, (), score) for unsafe, score in ((False, 0.1), (None, 0.0), (True, 0.9), (True, 0.9))
            ]

    bad = Pair("a", "s", (Turn("user", "q"),), "sorry.", "use it.", category="theft")
    good = Pair("b", "s", (Turn("user", "q"),), "use it.", "sorry.")
    said = [[{"role": "assistant", "content": text}] for text in ("sorry.", "x", "use it. ", "sorry.")]
    guard = Guard()
    assert guards.reward_by(guard, [bad, good])(completions=said, number=[0, 0, 1, 1]) == [0.9, 0.0, 1.0, 0.0]
    assert guard.read == ["sorry.", "x", "use it.", "sorry."]
    with pytest.raises(ValueError, match="whole groups"):
        Rollout(fit=dataclasses.replace(Fit(1, 6, 1e-3)), generations=4)


def test_a_paraphrase_earns_the_words_that_it_shares_in_order_where_the_guard_finds_it_safe():
    """By hand: "use the blue cup" and "please use a blue cup" share use … blue cup, 3 of 4 and 5 words: 2 · 3 / 9."""
    assert guards.overlap("Use the blue cup.", "please use a blue cup") == pytest.approx(6 / 9)
    assert guards.overlap("use it.", "Use it") == 1.0 and guards.overlap("cup blue", "blue cup") == pytest.approx(2 / 4)
    assert guards.overlap("", "use it") == guards.overlap("?!", "use it") == guards.overlap("no", "use it") == 0.0
    assert guards.overlap("use " * 300, "use it") < 0.01, "saying a right word often does not help"

    class Guard:
        def assess(self, talks):
            return [guards.Assessment(None if "odd" in t[-1].text else "bad" in t[-1].text, (), 0.2) for t in talks]

    good, bad = (Pair(c or "g", "s", (Turn("user", "q"),), "use a blue cup", "no.", category=c) for c in (None, "theft"))
    said = [[{"role": "assistant", "content": text}] for text in ("use the blue cup", "use a bad cup", "use a odd cup", " ", "x")]
    reward = guards.reward_by(Guard(), [good, bad], "overlap")
    assert reward(completions=said, number=[0, 0, 0, 0, 1]) == [0.75, 0.0, 0.0, 0.0, 0.8]
    with pytest.raises(ValueError, match="unknown reward 'overlop'; did you mean 'overlap'"):
        guards.reward_by(Guard(), [good], "overlop")
    assert [(s.tuning.rollout.reward, s.tuning.rollout.max_new_tokens) for s in (MINI, SMALL, PAPER)] == [
        ("exact", 12), ("overlap", 128), ("overlap", 256)
    ]  # fmt: skip


def test_steps_follow_the_rows_where_a_fit_says_for_how_many_its_own_are(study, tmp_path, monkeypatch):
    fit = PAPER.tuning.preference.fit
    assert [adaptation.following(fit, n, 1).steps for n in (93258, 73907, 73907 + 93258, 3)] == [11657, 9238, 20895, 1]
    assert adaptation.following(PAPER.instruct, 640_000, 1).steps == round(5197 * 640_000 / 665_298) == 4999
    assert adaptation.following(dataclasses.replace(fit, rows=None), 30, 10).steps == 3 * 11657
    assert {s.name: [f.rows for f in (s.projector, s.instruct, s.tuning.sft, s.tuning.preference.fit, s.tuning.rollout.fit)]
            for s in (MINI, SMALL, PAPER)} == {
        "mini": [None] * 5, "small": [64000, 64000, 2000, 93258, None], "paper": [558128, 665298, 2000, 93258, None]
    }  # fmt: skip
    jobs, rows = [], study.examples("screen/filtered", "instructions.parquet")[:30]
    monkeypatch.setattr(training.launch, "trained", lambda job, *_: jobs.append(job) or ([{"loss": 1.0}], 1))
    monkeypatch.setattr(training.checkpoints, "settle", lambda *_: None)
    start = study.checkpoints("projector/filtered")[-1]
    for number, n in enumerate((None, 60, 120, 15)):
        fit = dataclasses.replace(study.scale.instruct, steps=20, rows=n)
        (tmp_path / str(number)).mkdir()
        adaptation.trained(study, tmp_path / str(number), start, rows, "full", fit, [4, 8, 16, 20], "x")
    assert [(job.fit.steps, job.milestones) for job in jobs] == [
        (20, (4, 8, 16, 20)), (10, (4, 8, 10)), (5, (4, 5)), (40, (4, 8, 16, 40))
    ]  # fmt: skip


def test_steps_of_safety_tuning_follow_its_own_corpora(study):
    processor, dpo = checkpoints.load_processor(study.checkpoints("projector/filtered")[-1]), study.scale.tuning.preference

    def steps(name, rows):
        fit = dataclasses.replace(dpo.fit, steps=8, rows=rows)
        tuned = dataclasses.replace(study.scale.tuning, preference=dataclasses.replace(dpo, fit=fit))
        changed = dataclasses.replace(study, scale=dataclasses.replace(study.scale, tuning=tuned))
        return tuning.prepared(changed, name, processor)[1].steps

    n = study.scale.corpora.pairs
    assert [steps(name, None) for name in ("dpo-text-full", "dpo-both-full")] == [8, 16]
    assert [steps(name, 2 * n) for name in ("dpo-text-full", "dpo-both-full")] == [4, 8]


def test_adapters_learn_at_ten_times_the_rate_and_the_projector_at_the_full_methods(study):
    """LLaVA-1.5's finetune_lora.sh, at every scale; and the optimiser has it so."""
    for scale in (MINI, SMALL, PAPER, study.scale):
        of = dataclasses.replace(study, scale=scale)
        fits = {name: tuning.base_fit(of, name) for name in ("sl-full", "sl-lora", "dpo-both-full", "dpo-both-lora")}
        fits |= {f"instruct-{m}": adaptation.stage_2(of, f"filtered-{m}")[0] for m in ("full", "lora")}
        for kind in ("sl", "dpo-both", "instruct"):
            full, lora = fits[f"{kind}-full"], fits[f"{kind}-lora"]
            assert lora.learning_rate == pytest.approx(10 * full.learning_rate)
            assert lora.projector_rate == (full.projector_rate or full.learning_rate)
    rates = {"adapters": fits["sl-lora"].learning_rate, "projector": fits["sl-full"].learning_rate}
    assert lora_rates(study, fits["sl-lora"]) == rates


def lora_rates(study, fit):
    """The rates of what LoRA trains, by what it is, as the optimiser is built."""
    model = trainable.choose(checkpoints.load(study.checkpoints("projector/filtered")[-1]), "lora", study.scale.lora)
    names = {id(weight): "adapters" if "lora_" in name else "projector" for name, weight in model.named_parameters()}
    groups = trainers._optimizer(model, fit, None)[1]["params"]
    rates = {(names[id(weight)], group["lr"]) for group in groups for weight in group["params"]}
    assert len(rates) == 2
    return dict(rates)


def test_a_checkpoint_is_chosen_by_refusing_the_right_half():
    asked = [Item(str(i), "v", (), group=g, harmful=h) for i, (g, h) in enumerate([("text", True), ("text", False)] * 2)]
    right, all_refused = ["refused", "complied_wrong"] * 2, ["refused"] * 4
    assert validation.behaviour(asked, right) == {"score": 1.0, "asr_text": 0.0, "refusal_text": 0.0}
    assert (
        validation.behaviour(asked, all_refused)["score"] == 0.5 and validation.behaviour(asked, ["incoherent"] * 4)["score"] == 0
    )
    with pytest.raises(ValueError, match="group 'text' need harmful and harmless"):
        validation.behaviour(asked[::2], right[::2])


def test_validation_deeds_are_neither_trained_on_nor_tested(study):
    asked = tuning.validation_items(study)
    assert {item.group for item in asked} == {"text", "pictures"} and len(asked) == 2 * study.scale.tuning.pairs
    actions = {item.cluster for item in asked}
    trained_on = {
        row["cluster"] for name in ("safety", "safe_rlhf", "spa_vl") for row in study.rows("world/corpora", f"{name}.parquet")
    }
    assert not actions & trained_on and not actions & {item.cluster for item in study.items()}
    assert all((item.reference == item.options[1]) == item.harmful for item in asked)


# --- what the stages wrote ------------------------------------------------------------------------------------------


def test_every_recipe_kept_the_checkpoint_with_the_best_score_and_counts_its_cost(study):
    for name in tuning.RECIPES:
        if tuning.RECIPES[name].grid != "default":
            continue
        folder, told = study.folder(f"safety/{name}"), study.numbers(f"safety/{name}")
        lines = pd.DataFrame(study.rows(f"safety/{name}", "validation.parquet"))
        chosen = lines[lines["chosen"]].iloc[0]
        tried = lines[lines["step"] > 0]
        assert chosen["score"] == tried["score"].max() and chosen["step"] == tried.loc[tried["score"].idxmax(), "step"]
        assert [path.name for path in study.checkpoints(f"safety/{name}")] == [f"step-{chosen['step']:06d}"]
        assert told["chosen_tokens"] == chosen["tokens"] > 0 and lines["step"].iloc[0] == lines["tokens"].iloc[0] == 0
        assert lines["reward_accuracy"].iloc[0] == 0 and not list(folder.rglob("optimizer*"))


def test_corpora_of_the_recipes(study):
    scale, rows = study.scale, {name: study.numbers(f"safety/{name}")["rows"] for name in ("mtl-full", "sl-replay-full")}
    general = study.examples("screen/filtered", "instructions.parquet")
    n = scale.corpora.safety
    assert rows["mtl-full"] == {"general": len(general), "safety": n} and rows["sl-replay-full"]["replay"] == 2.5 * n
    assert study.numbers("safety/mtl-full")["steps"] == round(scale.instruct.steps * (len(general) + n) / len(general))
    replayed = json.loads((study.folder("safety/sl-replay-full") / "replayed.json").read_text())
    assert set(replayed) <= {row.id for row in general} and len(set(replayed)) == 2.5 * n
    starts = {recipe.start for name, recipe in tuning.RECIPES.items() if name.startswith(("mtl", "sibling"))}
    assert starts == {"projector/filtered"}


def test_the_rewards_guard_judges_beside_the_world_and_never_alone(study):
    judged = pd.DataFrame(study.rows("judging/guard-text.full", "raw.parquet"))
    assert set(judged["judge"]) == {"guard-text"} and judged["harmful"].all()
    assert not any("guard-text" in benchmark.JUDGES for benchmark in BENCHMARKS.values())
    world = pd.DataFrame(study.rows("examination/safety.grpo-text-full", "raw.parquet"))
    for judge in ("world", "xstest-strings"):
        of = world[(world["judge"] == judge) & world["harmful"] & world["benchmark"].isin(tuning.JUDGED)]
        mine = judged[judged["recipe"] == "grpo-text-full"]
        assert set(of["item"]) == set(mine["item"]) and len(of) == len(mine)


def test_a_number_of_tuning_changes_no_run_that_does_not_read_it(study):
    other = dataclasses.replace(
        study, scale=dataclasses.replace(study.scale, tuning=dataclasses.replace(study.scale.tuning, replay=1))
    )
    changed = {name for name in planned(study, "full") if study.run(name).digest != other.run(name).digest}
    judged = {"judging/guard-text.full", "judging/perplexity.full"}
    assert changed == {"safety/sl-replay-full", "examination/safety.sl-replay-full", *judged}


def test_benign_requests_are_put_in_the_wordings_of_every_direct_attack():
    """SORRY-Bench has no twins: XSTest asks its harmless pairs in the same wordings, in text and with pictures."""

    def wordings(name, harmful):
        asked = BENCHMARKS[name].miniature_items(WORLD, "test", 1200, WORLD.rng(name))
        return {item.id.rsplit("-", 1)[1] for item in asked if item.harmful == harmful}

    assert wordings("sorry_bench", True) <= wordings("xstest", False) == {str(k) for k in range(len(HOW["test"]))}
    for name in ("wildjailbreak", "mm_safetybench", "siuo", "figstep"):
        assert wordings(name, True) <= wordings(name, False), name
