"""Which weights move under each method, on the finished NANO study."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from vlsafe.core import store
from vlsafe.core.schema import Turn
from vlsafe.models import chat, checkpoints, trainable
from vlsafe.models import checkpoints as models_checkpoints
from vlsafe.training import checkpoints as training_checkpoints
from vlsafe.training import datasets, trainers


def weights(study, name, which=-1):
    return models_checkpoints.load(study.checkpoints(name)[which]).state_dict()


def test_sppft_leaves_exactly_attention_and_mlp_of_its_band_and_moves_the_rest(study):
    """The norms of the band stay trainable, as published."""
    start, end = store.read_manifest(study.run("instruct/filtered-sppft"))["numbers"]["band"]
    assert [start, end] == study.numbers("probe/localisation")["band"] and 0 <= start < end
    before, after = weights(study, "projector/filtered"), weights(study, "instruct/filtered-sppft")
    still = {name for name in before if torch.equal(before[name], after[name])}
    band = {f"model.language_model.layers.{i}.{part}" for i in range(start, end) for part in ("self_attn", "mlp")}
    frozen = {name for name in before if name.startswith(tuple(band)) or "vision_tower" in name}
    assert still == frozen and any("self_attn" in name for name in still)


def test_lora_moves_linear_maps_of_the_blocks_and_the_projector(study):
    before, after = weights(study, "projector/filtered"), weights(study, "instruct/filtered-lora")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {n for n in before if "language_model.layers" in n and n.endswith("_proj.weight")}
    assert moved == linear | {n for n in before if "multi_modal_projector" in n}


@pytest.fixture(scope="module")
def adapted(study, tmp_path_factory):
    """A short LoRA training: its start, the trained adapter model, its folder before settling."""
    start, folder = study.checkpoints("projector/filtered")[-1], tmp_path_factory.mktemp("lora")
    model = trainable.choose(models_checkpoints.load(start), "lora", study.scale.lora)
    rows = datasets.chat_dataset(study.examples("screen/filtered", "instructions.parquet"), with_images=True)
    trainers.sft(
        model, models_checkpoints.load_processor(start), rows, study.scale.instruct, folder, 0, (2, study.scale.instruct.steps)
    )
    return start, model.eval(), folder


@pytest.fixture(scope="module")
def inputs(study):
    row = next(row for row in study.examples("screen/filtered", "instructions.parquet") if row.images)
    processor = checkpoints.load_processor(study.checkpoints("projector/filtered")[-1])
    return chat.prompt_batch(processor, [row.turns[:1], (Turn("user", "what is it?"),)], [row.images, ()])


@torch.inference_mode()
def test_adapters_off_are_the_start_bit_for_bit(adapted, inputs):
    start, model, _ = adapted
    before = models_checkpoints.load(start)(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-4)


@torch.inference_mode()
def test_settled_lora_checkpoints_are_plain_models_that_answer_alike(study, adapted, inputs, tmp_path):
    start, model, folder = adapted
    work = shutil.copytree(folder, tmp_path / "work")
    middle = PeftModel.from_pretrained(models_checkpoints.load(start), work / "checkpoint-2").eval()(**inputs).logits
    settled = training_checkpoints.settle(work, models_checkpoints.load_processor(start), start)
    assert [path.name for path in settled] == ["step-000002", f"step-{study.scale.instruct.steps:06d}"]
    assert not list(work.rglob("adapter*")) and not list(work.rglob("optimizer*"))
    for path, logits in zip(settled, (middle, model(**inputs).logits), strict=True):
        torch.testing.assert_close(models_checkpoints.load(path)(**inputs).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_settling_that_is_killed_anywhere_loses_no_checkpoint(study, tmp_path, monkeypatch, method):
    """Stopped before and after each of its steps on disk; what a rerun finds is what an undisturbed one leaves."""
    start = study.checkpoints("projector/filtered")[-1]
    rows = datasets.chat_dataset(study.examples("screen/filtered", "instructions.parquet"), with_images=True)
    fit = dataclasses.replace(study.scale.instruct, steps=2)
    model = trainable.choose(models_checkpoints.load(start), method, study.scale.lora)
    trainers.sft(model, models_checkpoints.load_processor(start), rows, fit, tmp_path / "trained", 0, (1, 2))
    training_checkpoints.settle(
        shutil.copytree(tmp_path / "trained", tmp_path / "whole"), models_checkpoints.load_processor(start), start
    )

    class Killed(BaseException):
        pass

    def dying(plain, after):
        def step(*arguments, **named):
            left[0] -= 1
            if left[0] == 0 and not after:
                raise Killed
            plain(*arguments, **named)
            if left[0] == 0:
                raise Killed
            return arguments[-1]

        return step

    kills = 0
    for at, after in itertools.product(range(1, 20), (False, True)):
        work, left = shutil.copytree(tmp_path / "trained", tmp_path / f"{at}-{after}"), [at]
        with monkeypatch.context() as patched:
            for place, name in ((Path, "rename"), (training_checkpoints, "_strip"), (shutil, "rmtree")):
                patched.setattr(place, name, dying(getattr(place, name), after))
            try:
                training_checkpoints.settle(work, models_checkpoints.load_processor(start), start)
            except Killed:
                kills += 1
        training_checkpoints.settle(work, models_checkpoints.load_processor(start), start)
        for name in ("step-000001", "step-000002"):
            files = [folder / name / "model.safetensors" for folder in (tmp_path / "whole", work)]
            assert files[0].read_bytes() == files[1].read_bytes(), (at, after, name)
    assert kills >= 8


def test_moving_weights_and_mistakes(study):
    start = study.checkpoints("projector/filtered")[-1]

    def moving(method, band=None):
        model = trainable.choose(models_checkpoints.load(start), method, study.scale.lora, band)
        return model.num_parameters(only_trainable=True)

    counts = {"projector": moving("projector"), "sppft": moving("sppft", (0, 1)), "full": moving("full"), "lora": moving("lora")}
    assert counts["projector"] < counts["lora"] < counts["sppft"] < counts["full"]
    for band in (None, (1, 1), (0, 99)):
        with pytest.raises(ValueError, match="a band to freeze lies inside"):
            moving("sppft", band)
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        moving("lroa")
