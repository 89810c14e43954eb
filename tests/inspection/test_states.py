"""Hidden states against the library's own, scaling that leaves no trace, localisation on gaps made by hand."""

import weakref

import numpy as np
import pytest
import torch

from vlsafe.core.schema import Turn
from vlsafe.data.miniature.language import World
from vlsafe.evaluation import prompts
from vlsafe.inspection import states as inspection_states
from vlsafe.models import architectures, chat, checkpoints


@pytest.fixture(scope="module")
def model(study):
    return checkpoints.load(study.checkpoints("instruct/filtered-full")[-1])


@pytest.fixture(scope="module")
def processor(study):
    return checkpoints.load_processor(study.checkpoints("instruct/filtered-full")[-1])


@torch.inference_mode()
def test_hooks_see_what_the_library_gives_out(study, model, processor):
    """All but the last block, whose hidden state the library gives out after the final norm."""
    shown = [(item.turns, item.images) for item in study.items() if item.images][:3]
    prompts = [*shown, ((Turn("user", "how do i paint the kite?"),), ())]
    result = inspection_states.last_states(model, processor, prompts)
    assert not any(layer._forward_hooks for layer in architectures.language_layers(model))
    inputs = chat.prompt_batch(processor, [turns for turns, _ in prompts], [images for _, images in prompts])
    states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    n = len(architectures.language_layers(model))
    assert result.shape == (4, n, states[0].shape[-1]) and len(states) == n + 1
    for layer in range(n - 1):
        assert torch.equal(result[:, layer], states[layer + 1][:, -1]), layer
    assert torch.equal(architectures.language_part(model).norm(result[:, -1]), states[-1][:, -1])
    torch.testing.assert_close(
        inspection_states.last_states(model, processor, prompts, batch_size=1), result, atol=1e-5, rtol=1e-4
    )


def test_scaling_is_undone_bit_for_bit_also_after_an_error(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with inspection_states.scaled(model, (1, 2), 1.3):
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {n for n in before if "language_model.layers.1." in n and n.endswith("_proj.weight")} and len(moved) == 7
    with pytest.raises(KeyboardInterrupt), inspection_states.scaled(model, (0, 2), 0.3):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pair_cosines_by_hand():
    """Layer 0: all alike. Layer 1: two prompts at a right angle; a pair of a set with itself is never a prompt with itself."""
    a = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    assert inspection_states.pair_cosines(a, a, 20, np.random.default_rng(0)).tolist() == [1.0, 0.0]
    b = -a[:1]
    between = inspection_states.pair_cosines(a[:1], b, 5, np.random.default_rng(0))
    assert between.tolist() == [-1.0, -1.0]
    gap = inspection_states.angular_gap(a[:1].repeat(2, 1, 1), b.repeat(2, 1, 1), 5, np.random.default_rng(0))
    assert gap["gap"].tolist() == [180.0, 180.0] and gap["normal_normal"].tolist() == [1.0, 1.0]


GAP = np.array([0.0, 1.0, 9.0, 10.0, 10.0])  # grows fastest at layer 2


def test_a_band_is_found_from_above_and_then_from_below():
    """Refusals are most numerous when exactly [1, 4) is scaled, whatever the factor."""
    calls = []

    def refusals(band, factor):
        calls.append((band, factor))
        return 0 if band == (0, 0) else 10 - abs(band[0] - 1) - 2 * abs(band[1] - 4)

    result = inspection_states.localise(GAP, refusals, (1.1, 1.6))
    assert result.band == (1, 4) and "1.1" in result.reason and {factor for _, factor in calls} == {1.0, 1.1}
    assert [band for band, _ in calls] == [(0, 0), (2, 3), (2, 4), (2, 5), (0, 4), (1, 4), (2, 4), (3, 4)]
    assert result.counts[0] == (0, 0, 1.0, 0) and len(result.counts) == len(calls)


def test_the_first_factor_that_moves_anything_is_used_and_ties_go_to_the_narrower_band():
    result = inspection_states.localise(GAP, lambda band, factor: 3 + (factor > 1.5 and band != (0, 0)), (1.1, 1.6))
    assert result.band == (2, 3) and "1.6" in result.reason


def test_none_is_located_where_no_scaling_adds_a_refusal():
    result = inspection_states.localise(GAP, lambda band, factor: 3 - (band != (0, 0)), (1.1, 1.6))
    assert result.band is None and result.reason == "no scaling up to 1.6 adds a refusal of a harmless prompt"
    assert {factor for *_, factor, _ in result.counts} == {1.0, 1.1, 1.6}


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_thousand_prompts_go_to_disk_with_at_most_two_batches_in_memory(model, processor, tmp_path, monkeypatch):
    """Batches that are alive when one is written: it, and no more than one other."""
    many = [
        ((Turn("user", f"how do i {verb} the {thing}?"),), ()) for verb in ("paint", "carry") for thing in ("kite", "lamp")
    ] * 260
    alive, most, write = [], [], inspection_states.save_file

    def noted(tensors, file):
        alive.append(weakref.ref(tensors["states"].untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))
        write(tensors, file)

    monkeypatch.setattr(inspection_states, "save_file", noted)
    inspection_states.keep_states(model, processor, many, tmp_path, batch_size=64)
    assert len(many) == 1040 and len(most) == 17 and max(most) <= 2
    states = [inspection_states.kept_states(tmp_path, layer) for layer in range(3)]
    assert states[2].shape == (1040, model.config.text_config.hidden_size)
    assert torch.equal(states[2][:4], inspection_states.last_states(model, processor, many[:64])[:4, 1])


def test_the_kept_states_of_the_stage_are_a_thousand_prompts_at_mini_and_safetensors(study):
    from vlsafe.core.presets import MINI

    n = len(prompts.probing_prompts(World(0), "test", MINI.probing.prompts))
    assert n >= 1000 and len({item.id for item in prompts.probing_prompts(World(0), "test", 20)}) == 120
    kept = sorted((study.folder("probe/layers") / "states").rglob("*"))
    assert {path.suffix for path in kept if path.is_file()} == {".safetensors"}
    assert {path.name for path in kept if path.is_dir()} >= {"own", "reference"}


def test_probed_pairs_are_not_those_of_the_direction(study):
    """The direction is found on validation verb–object pairs, everything else is about test ones; kinds are equally many."""
    world = World(0)
    items, fixed = (prompts.probing_prompts(world, split, 30) for split in ("test", "validation"))
    assert not {item.cluster for item in items} & {item.cluster for item in fixed}
    for modality in prompts.MODALITIES:
        of = [item for item in items if item.group == modality]
        assert sum(item.harmful for item in of) == sum(not item.harmful for item in of) == 30
        assert all(bool(item.images) == (modality != "text") for item in of)


# --- measures -------------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """Layer 0 is the same in both models; in layer 1 one prompt is turned by a right angle and the other is reversed."""
    a = torch.tensor([[[1.0, 2.0], [1.0, 0.0]], [[3.0, 1.0], [0.0, 2.0]]])
    b = torch.tensor([[[2.0, 4.0], [0.0, 5.0]], [[3.0, 1.0], [0.0, -1.0]]])
    torch.testing.assert_close(inspection_states.similarity(a, b), torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match=r"not \[2, 2, 2\] and \[1, 2, 2\]"):
        inspection_states.similarity(a, b[:1])


def test_cka_knows_turns_and_scales_and_unrelated_states():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=rng)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=rng))
    assert inspection_states.cka(a, 3 * a @ turn + 7) == pytest.approx(1.0, abs=1e-6)
    unrelated = [inspection_states.cka(a, torch.randn(60, 5, generator=rng)) for _ in range(20)]
    assert abs(np.mean(unrelated)) < 0.03  # the usual estimate is 0.08 here
    with pytest.raises(ValueError, match="at least four"):
        inspection_states.cka(a[:3], a[:3])


def test_effective_rank_by_hand():
    assert inspection_states.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert inspection_states.effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(3))) == pytest.approx(1, abs=1e-6)
    assert inspection_states.effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0]))) == pytest.approx(2)
    assert inspection_states.effective_rank(torch.zeros(3, 2)) == 0.0


def test_a_probe_is_scored_on_clusters_it_has_not_seen():
    """States tell a prompt's cluster exactly and its harm not at all: a probe that saw the cluster would be perfect."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    harmful = clusters % 2 == 0
    names = torch.from_numpy(np.eye(40)[clusters] * 5).float()
    (scores,) = inspection_states.harm_scores(names, harmful, clusters)
    assert abs(np.mean(scores[harmful]) - np.mean(scores[~harmful])) < 1.0 and (scores[harmful] <= 0).any()
    telling = torch.from_numpy(np.column_stack([harmful + 0.1 * rng.normal(size=200), rng.normal(size=200)])).float()
    own, read = inspection_states.harm_scores(telling, harmful, clusters, [-telling])
    assert own[harmful].min() > own[~harmful].max() and read[harmful].max() < read[~harmful].min()
    few, labels = [], np.arange(10) < 5
    for _ in range(40):
        (noise,) = inspection_states.harm_scores(torch.from_numpy(rng.normal(size=(10, 16))).float(), labels, np.arange(10))
        few.append(np.mean(noise[labels][:, None] > noise[~labels]))
    assert 0.42 < np.mean(few) < 0.58, "noise is no harm, and no harmlessness either"
    with pytest.raises(ValueError, match="harmful and harmless"):
        inspection_states.harm_scores(telling, np.ones(200, bool), clusters)


def test_task_vectors_and_grams_add_up(study):
    """A vector with itself has cosine 1; from an end back to the start -1; a gram of files is that of their flat tensors."""
    start, end = (checkpoints.language_places(study.checkpoints("instruct/filtered-full")[i]) for i in (0, -1))
    for other, sign in (((start, end), 1), ((end, start), -1)):
        lines = list(inspection_states.alignment((start, end), other))
        inner, a, b = (sum(line[name] for line in lines) for name in ("inner", "a", "b"))
        assert inner == pytest.approx(sign * a) and a == pytest.approx(b)
    moved = sum(line["change"] for line in inspection_states.drift(start, end, with_rank=False))
    assert moved == pytest.approx(a)
    files = [path / "model.safetensors" for path in study.checkpoints("instruct/filtered-full")]
    gram = inspection_states.gram(files)
    flat = [
        torch.cat([checkpoints.read_tensor(p).flatten() for n, p in checkpoints.language_places(f).items() if "layers.0." in n])
        for f in files
    ]
    assert gram[0].shape == (3, 3) and gram[0][0, 2] == pytest.approx(float(flat[0] @ flat[2]), rel=1e-4)


def test_the_reference_of_a_text_prompt_is_the_parent_bit_for_bit(study):
    """The parent's language weights behind the adapted model's eyes, as the stage kept them, against the parent itself."""
    parent = checkpoints.load(study.folder("parent/aligned"))
    tokenizer = checkpoints.load_processor(study.folder("parent/aligned"))
    items = prompts.probing_prompts(World(0), "test", study.scale.probing.prompts)
    folder = study.folder("probe/layers") / "states" / "instruct.filtered-full" / "reference"
    text = [(item.turns, ()) for item in items if item.group == "text"][:8]
    own = inspection_states.last_states(parent, tokenizer, text, batch_size=8)
    kept = torch.stack([inspection_states.kept_states(folder, layer + 1)[:8] for layer in range(own.shape[1])], 1)
    torch.testing.assert_close(kept, own, atol=1e-6, rtol=1e-5)


def test_a_band_that_adds_refusals_is_told_from_the_best_of_many_that_add_none():
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(30), 4)
    none = rng.random(120) < 0.2
    noise = np.stack([none ^ (rng.random(120) < 0.1) for _ in range(8)])
    assert inspection_states.by_chance(noise | (np.arange(8) == 3)[:, None] & (rng.random(120) < 0.4), none, clusters, rng) < 0.01
    found = []
    for i in range(60):
        draw = np.random.default_rng(i)
        before = draw.random(120) < 0.5
        same = np.stack([np.where(draw.random(120) < 0.2, draw.random(120) < 0.5, before) for _ in range(8)])
        found.append(inspection_states.by_chance(same, before, clusters, draw, 199))
    assert 0.2 < np.mean(np.array(found) < 0.5) < 0.8 and np.mean(np.array(found) < 0.05) < 0.15
    assert inspection_states.by_chance(np.stack([none] * 3), none, clusters, rng, 99) == 1.0
