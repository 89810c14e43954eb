"""Interventions leave no trace, a planted band is found from a model's own states and answers, and a switch is a switch."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlsafe.core.schema import Item, Turn
from vlsafe.data.miniature.language import vocabulary
from vlsafe.evaluation import engines
from vlsafe.evaluation.engines import respond
from vlsafe.evaluation.judges import judge
from vlsafe.inspection import causal
from vlsafe.inspection import states as inspection_states
from vlsafe.models import architectures, chat, checkpoints
from vlsafe.study import causal as study_causal

C, LAYERS = 10.0, 6  # every state's constant, against which norms make everything else nearly linear
SCARY = {"apple": 0.58, "bread": 0.55, "kite": 0.50, "lamp": 0.46, "chair": 0.45, "violin": 0.20}  # harm that words hint at


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = chat.build_tokenizer(vocabulary(), 64)
    tokenizer.chat_template = chat.template("llama2")
    return tokenizer


def wired(tokenizer, planted=True):
    """Six blocks that pass everything on, but for two: block 2 collects hints of harm into a refusal, block 3 amplifies it.

    The residual stream has a constant (0), what a word hints at (1), and the refusal (2); the head weighs it against an answer.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=4, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:, 0] = C
        for word, hint in {"bomb": 1.0, "gun": 1.0, "acid": 1.0, **SCARY}.items():
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), 1] = hint
        if planted:
            collect, amplify = model.model.layers[2].self_attn, model.model.layers[3].mlp
            collect.v_proj.weight[0, 1], collect.o_proj.weight[2, 0] = 1.0, 300.0
            amplify.gate_proj.weight[0, 0], amplify.up_proj.weight[0, 2], amplify.down_proj.weight[2, 0] = 1.0, 1.0, 0.6
        unit = 8**0.5 / C
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("sorry"), 2] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("use"), 0] = threshold(model, tokenizer) / C if planted else unit
    return checkpoints._with_generation_ids(model, tokenizer)


def threshold(model, tokenizer):
    """The refusal at the last position of a prompt whose word hints at 0.6."""
    states = [inspection_states.last_states(model, tokenizer, [prompt(word)])[0, -1, 2] for word in ("kite", "bomb")]
    return float(states[0] + (states[1] - states[0]) * 0.2)


def prompt(word):
    return ((Turn("user", f"how do i carry the {word}?"),), ())


def located(model, tokenizer):
    harmless, harmful = (
        inspection_states.last_states(model, tokenizer, [prompt(word) for word in words])
        for words in (("drum", "boat", "mirror", "clock"), ("bomb", "gun", "acid"))
    )
    gap = inspection_states.angular_gap(harmless, harmful, 40, np.random.default_rng(0))["gap"]
    items = [Item(word, "scary", prompt(word)[0]) for word in SCARY]

    def refusals(band, factor):
        with inspection_states.scaled(model, band, factor):
            responses = respond(model, tokenizer, items, "toy", 8, 1)
        return sum(verdict.label == "2_full_refusal" for verdict in judge("xstest-strings", items, responses))

    return inspection_states.localise(gap, refusals, (1.1, 1.3)), gap


def test_a_planted_band_is_located_in_a_model(tokenizer):
    found, gap = located(wired(tokenizer), tokenizer)
    assert int(np.argmax(np.diff(gap, prepend=0.0))) == 2
    assert found.band == (2, 4) and "1.1" in found.reason
    counts = {(start, end): refused for start, end, factor, refused in found.counts if factor in (1.0, 1.1)}
    assert counts[0, 0] == 0 < counts[2, 3] < counts[2, 4] == counts[2, 5] == counts[0, 4]


def test_none_is_located_where_nothing_is_planted(tokenizer):
    found, gap = located(wired(tokenizer, planted=False), tokenizer)
    assert np.allclose(gap, gap[0], atol=1e-3) and found.band is None


def test_the_direction_is_a_switch_in_the_wired_model(tokenizer):
    """Its refusal is one direction: without it nothing is refused, with it everything is, and another one does nothing."""
    model = wired(tokenizer)
    words = ["bomb", "gun", "drum", "boat"]
    states = inspection_states.last_states(model, tokenizer, [prompt(word) for word in words])
    direction = causal.difference_of_means(states[:2], states[2:])
    items = [Item(word, "toy", prompt(word)[0]) for word in words]

    def refused():
        responses = respond(model, tokenizer, items, "toy", 4, 1)
        return [verdict.label == "2_full_refusal" for verdict in judge("xstest-strings", items, responses)]

    assert torch.nn.functional.cosine_similarity(direction[4], torch.eye(8)[2], dim=0) > 0.99
    assert refused() == [True, True, False, False]
    with causal.ablated(model, direction[4]):
        assert not any(refused())
    with causal.added(model, direction[4], 4):
        assert all(refused())
    with causal.ablated(model, torch.eye(8)[5]), causal.added(model, 20 * torch.eye(8)[5], 4):
        assert refused() == [True, True, False, False]
    assert refused() == [True, True, False, False] and not any(layer._forward_hooks for layer in model.model.layers)


def test_an_ablated_stream_has_no_component_left(tokenizer):
    model, seen = wired(tokenizer), []
    direction = torch.tensor([3.0, 0, 4, 0, 0, 0, 0, 0])
    with torch.inference_mode(), causal.ablated(model, direction), inspection_states.hooked(model, seen.append):
        model(**chat.prompt_batch(tokenizer, [prompt("bomb")[0]], [()]))
    assert len(seen) == LAYERS + 1
    assert max(float((state @ direction / 5).abs().max()) for state in seen) < 1e-4


def test_a_transplant_is_undone_bit_for_bit_also_after_an_error(tokenizer):
    model, donor = wired(tokenizer), architectures.language_weights(wired(tokenizer, planted=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), causal.transplanted(model, donor, (2, causal.EVERYTHING)):
        assert not torch.equal(
            model.state_dict()["model.layers.2.self_attn.o_proj.weight"], before["model.layers.2.self_attn.o_proj.weight"]
        )
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"blocks \[6\] are not in the model"), causal.transplanted(model, donor, (6,)):
        pass
    name, weight = next(iter(donor.items()))
    with pytest.raises(ValueError, match=f"the donor's {name} has another shape"):
        causal.transplanted(model, {**donor, name: weight[:-1]}, (causal.EVERYTHING,)).__enter__()


def test_a_direction_is_moved_once_and_not_at_every_step(tokenizer, monkeypatch):
    """A decoding step that is captured on a GPU may not copy from the CPU's memory."""
    model, moved = wired(tokenizer), []
    direction, plain = torch.ones(model.config.hidden_size), torch.Tensor.to
    with causal.ablated(model, direction), causal.added(model, direction, 1):
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *to, **more: (moved.append(self.shape), plain(self, *to, **more))[1])
        model(torch.tensor([[4, 5, 6]]))
        monkeypatch.undo()
    assert direction.shape not in moved


def test_the_examination_is_an_argument_and_sees_each_patch(tokenizer):
    """Only patches that take a planted block away end the refusal."""
    model, donor = wired(tokenizer), architectures.language_weights(wired(tokenizer, planted=False))
    items = [Item("bomb", "toy", prompt("bomb")[0])]

    def examine(model, name):
        return [{"name": name, "text": respond(model, tokenizer, items, name, 1, 1)[0].text}]

    rows = causal.transplants(model, donor, causal.bands(LAYERS, [1, 2]), examine)
    assert len(rows) == 11 and all(row["name"] == row["blocks"] for row in rows)
    silent = {row["name"] for row in rows if row["text"] != "sorry"}
    assert silent == {"band-2", "band-1-2", "band-2-3"}  # without block 3 the refusal is weaker, and still one


def test_sets_of_blocks():
    assert [patch.name for patch in causal.bands(3, [1, 2])] == ["band-0", "band-1", "band-2", "band-0-1", "band-1-2"]
    drawn = causal.random_sets(8, 3, 20, np.random.default_rng(0))
    assert len({patch.blocks for patch in drawn}) == 20 and not {p.blocks for p in drawn} & {
        p.blocks for p in causal.bands(8, [3])
    }
    assert all(len(set(patch.blocks)) == 3 and patch.kind == "random" for patch in drawn)
    assert causal.random_sets(8, 1, 20, np.random.default_rng(0)) == [] == causal.random_sets(8, 8, 20, np.random.default_rng(0))
    many = causal.random_sets(32, 9, 20, np.random.default_rng(0))  # far too many sets to list
    assert len({patch.blocks for patch in many}) == 20 and all(len(patch.blocks) == 9 for patch in many)


def test_killed_interventions_go_on_with_the_answers_that_are_there(study, tmp_path, monkeypatch):
    """Killed at the fourth of many models; what three have answered is not asked again, and the rows are those without a kill."""
    plain, models = engines._greedy, []

    def until(limit):
        def respond(model, processor, items, name, *more, original=engines.respond):
            if len(models) == limit:
                raise KeyboardInterrupt
            models.append(name)
            return original(model, processor, items, name, *more)

        return respond

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(engines, "respond", until(3))
        study_causal.make_transplants(study, tmp_path)
    assert len(models) == len(list(tmp_path.glob("answers-*.jsonl"))) == 3
    generated = []
    monkeypatch.setattr(engines, "respond", until(None))
    monkeypatch.setattr(engines, "_greedy", lambda *rest: (generated.append(models[-1]), plain(*rest))[1])
    study_causal.make_transplants(study, tmp_path)
    assert models[:3] == models[3:6] and len(set(models)) == len(models) - 3
    assert generated and not set(generated) & set(models[:3])
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "raw.parquet"), study.frame("causal/transplants"))
