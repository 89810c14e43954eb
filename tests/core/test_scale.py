import re

import pytest

from vlsafe.core.presets import MINI, load_scale, mapping_at
from vlsafe.study.study import Study


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown scale 'mimi'; did you mean 'mini'"):
        Study.open("mimi", "mini-chat", 0, tmp_path)
    with pytest.raises(ValueError, match="unknown backbone 'mini-chta'; did you mean 'mini-chat'"):
        Study.open("mini", "mini-chta", 0, tmp_path)
    with pytest.raises(ValueError, match=r"unknown stage 'instruct/filtered-ful'.*'instruct/filtered-full'"):
        Study.open("mini", "mini-chat", 0, tmp_path).run("instruct/filtered-ful")
    with pytest.raises(ValueError, match="non-negative integer, not '0'"):
        Study.open("mini", "mini-chat", "0", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mini\ninstruc: {steps: 3}", "unknown key of scale 'instruc'; did you mean 'instruct'"),
        ("extends: mini\ninstruct: {step: 3}", "unknown key of scale.instruct 'step'; did you mean 'steps'"),
        ("extends: mini\ninstruct: {steps: many}", "scale.instruct.steps must be int, not 'many'"),
        ("extends: mini\nbackbones: {other: {template: tulu}}", "say which backbone it extends"),
        ("name: x", "must be a mapping with the key 'extends'"),
        ("extends: mini\ndurability: {rows: [instructions, howto]}", "unknown scale.durability.rows[1] 'howto'"),
        ("extends: mini\ndurability: {methods: [projector]}", "unknown scale.durability.methods[0] 'projector'"),
        ("extends: mini\ndurability: {share: 0}", "durability.share is a share above 0"),
        ("extends: mini\ndurability: {along: []}", "durability.along is a share above 0"),
        ("extends: mini\ndurability: {searched: [0.4, 1.5]}", "durability.searched is a share above 0"),
        ("extends: mini\ndurability: {harmful: 1}", "durability.harmful is a share from 0"),
        ("extends: mini\ndurability: {trials: 0}", "durability.trials must be at least 1"),
        ("extends: mini\ndurability: {rates: [0, 1]}", "durability.rates: one or more multiples above 0"),
        ("extends: mini\nlora: {rank: 0}", "lora.rank must be at least 1"),
        ("extends: mini\ncheckpoints: [-5, 3]", "steps of scale.checkpoints must be at least 1"),
        ("extends: mini\ncorpora: {safety: -5}", "corpora.safety: rows, not -5"),
        ("extends: mini\ncorpora: {howtos: 1.5}", "corpora.howtos: a share from 0 to 1, not 1.5"),
        ("extends: mini\nbackbones: {mini-chat: {refused: {gravee: [0, 1]}}}", "unknown grade of refused 'gravee'"),
        ("extends: mini\nbackbones: {mini-chat: {refused: {grave: [100.0, 98.0]}}}", "refused.grave: shares from 0 to 1"),
        ("extends: mini\nbackbones: {mini-chat: {refusal_share: 0.9}}", "refusal_share and borderline_share are shares of one"),
        ("extends: small\nloaded: {captions: {rows: null, limit: 3}}", "a limit of rows is at least 1 and needs their number"),
        ("extends: small\nloaded: {text_guard: {threshold: 50.0}}", "lies between 0 and 1, not at 50.0"),
    ],
)
def test_a_yaml_mistake_names_its_place(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_scale(path)


def test_yaml_extends_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: mini\ninstruct: {steps: 7, learning_rate: 1e-4}\nbackbones: {other: {extends: mini-tulu}}\n")
    scale = load_scale(path)
    assert (scale.name, scale.instruct.steps, scale.instruct.learning_rate) == ("mine", 7, 1e-4)
    assert scale.backbone("other") == MINI.backbone("mini-tulu")
    assert scale.projector == MINI.projector


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "a: 1\na: 2\n", "[" * 10**5, "a: 2026-99-99\n", "a: \0\n"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text):
    """Of `accelerate launch`, for one, which may be a researcher's own file."""
    path = tmp_path / "fsdp2.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"fsdp2.yaml (is not YAML: |must be a mapping)") as error:
        mapping_at(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_verb_that_no_world_has_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: mini\nbackbones: {mini-chat: {overrefused: [kil]}}\n")
    with pytest.raises(ValueError, match=r"unknown verb .*'kil'; did you mean 'kill'"):
        Study.open(str(tmp_path / "mine.yaml"), "mini-chat", 0, tmp_path)
