"""What the parent makes of each model's answers: the stage against a plain forward pass, answer by answer."""

import math

import pandas as pd
import pytest
import torch

from vlsafe.analysis import merging
from vlsafe.analysis.measures import HEADLINE
from vlsafe.core.schema import Turn
from vlsafe.evaluation import engines
from vlsafe.models import chat, checkpoints
from vlsafe.study import judging

STAGE = judging.perplexity("default")


def test_the_stage_agrees_with_a_plain_forward_pass(study):
    found = pd.DataFrame(study.rows(STAGE, "perplexity.parquet")).set_index(["stage", "recipe"])
    assert {"parent", "instruct", "safety", "merge"} == {stage for stage, _ in found.index} and (found["answers"] > 3).all()
    folder = study.folder("parent/aligned")
    model, processor = checkpoints.load(folder), checkpoints.load_processor(folder)
    alike = merging.needed(*HEADLINE)
    items = {i.id: i for i in study.items() if i.scoring == "generated" and not i.images and i.benchmark in alike}
    raw, texts = (study.frame("examination/instruct.filtered-full", f"{file}.parquet") for file in ("raw", "responses"))
    asked = raw[(raw["exam"] == "full") & ~raw["harmful"].astype(bool)]
    said = texts[texts["model"] == asked["model"].iloc[0]].set_index("item")["text"]
    loss = tokens = 0
    for item in (items[name] for name in asked["item"].unique() if name in items):
        whole = chat.prompt_batch(processor, [(*item.turns, Turn("assistant", said[item.id]))], [()])["input_ids"][0]
        start = len(chat.prompt_batch(processor, [item.turns], [()])["input_ids"][0])
        with torch.inference_mode():
            log_probs = model(whole[None]).logits[0].log_softmax(-1)
        loss -= float(log_probs[start - 1 : -1].gather(1, whole[start:, None]).sum())
        tokens += len(whole) - start
    assert found.loc[("instruct", "filtered-full"), "perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_an_answer_that_does_not_follow_its_prompt_is_counted_and_not_read(study, monkeypatch, tmp_path):
    follows, seen = engines.follows, []

    def first_does_not(processor, item):
        seen.append(item)
        return len(seen) > 1 and follows(processor, item)

    monkeypatch.setattr(engines, "follows", first_does_not)
    monkeypatch.setattr(engines, "perplexity", lambda *_: 1.0)
    numbers = judging.make_perplexity(study, tmp_path, "default")
    assert numbers["skipped"] == 1 and numbers["models"] == len(pd.read_parquet(tmp_path / "perplexity.parquet"))
