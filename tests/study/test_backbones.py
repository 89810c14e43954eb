"""A backbone that a researcher brings by a YAML file, end to end at NANO."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from vlsafe.core.presets import MINI, load_scale
from vlsafe.core.scale import as_plain
from vlsafe.models import chat, checkpoints
from vlsafe.study.graph import STAGES
from vlsafe.study.study import Study

OWN = {"mine": {"extends": "mini-chat", "language": {"architecture": "qwen2", "key_value_heads": 4, "tied_head": False}}}
DECODER = dataclasses.replace(MINI.language, architecture="qwen2", key_value_heads=4, tied_head=False)
SHIPPED = sorted((Path(__file__).parents[2] / "env/scales").glob("*.yaml"))


def extending(scale, folder):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": scale, "name": scale, "backbones": OWN}))
    return path


@pytest.fixture(scope="module")
def brought(study, tmp_path_factory):
    """NANO with a file's backbone, in the run store of the finished study, whose shared runs it takes over."""
    return Study.open(extending("nano", tmp_path_factory.mktemp("scale")), "mine", 0, study.root)


def test_the_file_adds_a_backbone_and_changes_nothing_else(tmp_path):
    scale = load_scale(extending("mini", tmp_path))
    assert scale.decoder("mine") == DECODER == MINI.decoder("mini-qwen")
    assert scale.decoder("mini-chat") == MINI.language
    assert {**vars(scale), "backbones": None} == {**vars(MINI), "backbones": None}
    assert {name: scale.backbones[name] for name in MINI.backbones} == dict(MINI.backbones)


@pytest.mark.parametrize("backbone", MINI.backbones)
def test_finished_runs_of_the_others_stay_valid(backbone, tmp_path):
    before, after = (Study.open(scale, backbone, 0, tmp_path) for scale in ("mini", extending("mini", tmp_path)))
    assert {name: before.run(name).digest for name in STAGES} == {name: after.run(name).digest for name in STAGES}


@pytest.mark.parametrize(
    "exam",
    [{"validation": 0.4}, {"dtype": "float32"}, {"judges": {"sorry_bench": ["xstest-strings"]}}],
    ids=lambda of: next(iter(of)),
)
def test_what_chooses_by_validation_items_depends_on_what_decides_them(exam, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "small", "exam": exam}))
    before, after = (Study.open(scale, "smollm2", 0, tmp_path) for scale in ("small", path))
    choosing = [name for name in STAGES if name.startswith("safety/")]
    choosing += [f"probe/{name}" for name in ("localisation", "direction", "layers", "drift", "objectives")]
    assert [name for name in choosing if before.run(name).params == after.run(name).params] == []


def test_fields_that_came_later_are_in_a_digest_only_where_they_are_set():
    assert "architecture" not in as_plain(MINI.language) and "language" not in as_plain(MINI.backbone("mini-chat"))
    assert as_plain(DECODER)["architecture"] == "qwen2"


def test_a_mistake_in_a_decoder_is_told_when_the_file_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: mini\nbackbones: {x: {extends: mini-chat, language: {key_value_head: 4}}}\n")
    with pytest.raises(
        ValueError, match=r"unknown key of scale.backbones.x.language 'key_value_head'; did you mean 'key_value_heads'"
    ):
        load_scale(path)


def test_it_is_a_qwen_on_the_shared_runs_of_the_others(brought, study):
    last = brought.checkpoints("instruct/filtered-full")[-1]
    assert brought.run("base/llm") == study.run("base/llm") and brought.run("screen/filtered") == study.run("screen/filtered")
    model = checkpoints.load(last)
    names = dict(model.named_parameters())
    layer = "model.language_model.layers.0.self_attn"
    assert f"{layer}.q_proj.bias" in names and f"{layer}.o_proj.bias" not in names
    assert names[f"{layer}.k_proj.weight"].shape[0] * 2 == names[f"{layer}.q_proj.weight"].shape[0]
    assert "lm_head.weight" in names and not torch.equal(names["lm_head.weight"], model.get_input_embeddings().weight)


def test_its_words_stay_its_words_when_it_is_read_back(brought, study):
    text = "how do i kill the process? use the spoon and the wax."
    folders = [brought.folder("parent/aligned"), brought.checkpoints("projector/filtered")[0], study.folder("parent/aligned")]
    read, grafted, others = (checkpoints.load_processor(folder) for folder in folders)
    assert read(text).input_ids == grafted.tokenizer(text).input_ids == others(text).input_ids
    assert read.decode(read(text).input_ids) == text


def test_its_graft_is_its_parent_on_text(brought):
    parent, graft = (
        checkpoints.load(f) for f in (brought.folder("parent/aligned"), brought.checkpoints("projector/filtered")[0])
    )
    prompt = torch.randint(12, 200, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(parent(prompt).logits, graft(prompt).logits)


def test_queries_start_like_the_key_that_they_share(study):
    spec = dataclasses.replace(DECODER, width=192, heads=4, key_value_heads=2, layers=1, matching=0.8)
    attention = checkpoints.build_llm(spec, chat.build_tokenizer(["a"], 16), 0).model.layers[0].self_attn
    keys = attention.k_proj.weight.unflatten(0, (2, 1, -1))
    queries = attention.q_proj.weight.unflatten(0, (2, 2, -1))
    alike = torch.nn.functional.cosine_similarity(keys.flatten(2), queries.flatten(2), dim=-1)
    assert alike.flatten().tolist() == pytest.approx([0.8] * 4, abs=0.03)


@pytest.mark.parametrize("scale", ["mini", "small", "paper", "pocket", *SHIPPED], ids=str)
def test_every_scale_that_is_shipped_can_be_opened(scale, tmp_path):
    from vlsafe.core.presets import load_scale

    for backbone in load_scale(scale).backbones:
        assert Study.open(scale, backbone, 0, tmp_path).run("parent/aligned").digest
