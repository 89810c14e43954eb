"""Train a CLIP from scratch on pictures and captions, classify pictures with it, and extract features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPModel, get_scheduler

from vlsafe.core.scale import Fit
from vlsafe.models.architectures import patch_embeddings
from vlsafe.models.chat import open_picture


def pixels(processor: Any, pictures: Sequence[bytes]) -> torch.Tensor:
    """Normalised pixels of picture files:  N pictures  ->  [N, 3, H, W]"""
    return processor.image_processor([open_picture(data) for data in pictures], return_tensors="pt")["pixel_values"]


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, true: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric contrastive loss, with several true captions of a picture and pictures of a caption.

    Shapes:   image, text  [N, D] unit rows;  true  [N, N] bool, picture × caption  ->  scalar
    Units:    nats
    Source:   Radford et al. 2021, section 2.3; targets spread evenly over the positives, as in Khosla et al. 2020
    """
    logits = scale * image @ text.T
    target = true.to(logits.dtype)
    by_image = functional.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = functional.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def fit_clip(
    model: CLIPModel, tokenizer: Any, pixels: torch.Tensor, captions: Sequence[Sequence[str]], groups: Sequence[int],
    fit: Fit, seed: int, progress: Callable[[int], None],
) -> float:  # fmt: skip
    """Train in place. A wide batch has every group once, a deep one half of the groups twice.

    Wide batches teach what a picture shows; three of four batches after the first 15 % are deep, because where everything
    in a batch has another name, colour does not lower the loss (LOG.md). The first 15 % of the steps use only the shortest
    caption (the object), afterwards 70 % of the rows the full one: words are learned slowly and need the easy task first.

    Shapes:   pixels  [P, 3, H, W];  captions  P × levels, from short to full;  groups  P integers  ->  last loss, nats
    Draws:    from a generator of `seed` only
    """
    rng = torch.Generator().manual_seed(seed)
    levels = len(captions[0])
    tokens = [text_inputs(tokenizer, [row[k] for row in captions])["input_ids"] for k in range(levels)]
    names = [torch.from_numpy(np.unique([row[k] for row in captions], return_inverse=True)[1]) for k in range(levels)]
    members = [torch.tensor([i for i, g in enumerate(groups) if g == group]) for group in sorted(set(groups))]
    per_group = max(1, fit.batch_size // len(members))
    optimizer = torch.optim.AdamW(model.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay, fused=True)
    schedule = get_scheduler(fit.schedule, optimizer, int(fit.warmup_ratio * fit.steps), fit.steps)
    model.train()
    loss = torch.tensor(0.0)
    for step in range(fit.steps):
        deep = step >= 0.15 * fit.steps and step % 4 > 0
        pools = [members[k] for k in torch.randperm(len(members), generator=rng)[: len(members) // (2 if deep else 1)]]
        each = 2 * per_group if deep else per_group
        batch = torch.cat([pool[torch.randint(len(pool), (each,), generator=rng)] for pool in pools])
        level = torch.zeros(len(batch), dtype=torch.long)
        if step >= 0.15 * fit.steps:
            full = torch.rand(len(batch), generator=rng) < 0.7
            level = torch.where(full, levels - 1, torch.randint(levels - 1, (len(batch),), generator=rng))
        loss = _contrast(model, pixels[batch], [t[batch] for t in tokens], [n[batch] for n in names], level)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # CLIP's own cap, ln 100
        progress(step + 1)
    model.eval()
    return loss.item()


def text_inputs(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Right-padded ids that end in EOS, where CLIP's text model pools; without it every sentence is its first word."""
    texts = [f"{text} {tokenizer.eos_token}" for text in texts]
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


def _contrast(
    model: CLIPModel, pixels: torch.Tensor, ids: list[torch.Tensor], names: list[torch.Tensor], level: torch.Tensor
) -> torch.Tensor:
    """The loss of one batch whose row i is captioned at `level[i]`; a caption is true of every picture it describes."""
    pad, width, rows = model.config.text_config.pad_token_id, max(t.shape[1] for t in ids), torch.arange(len(level))
    padded = torch.stack([functional.pad(t, (0, width - t.shape[1]), value=pad) for t in ids])
    described = torch.stack(names)  # [levels, N]: the caption's number of each picture at each level
    true = described[level, rows][None, :] == described[level].T  # [N pictures, N captions]
    text_ids = padded[level, rows]
    text = _unit(model.get_text_features(input_ids=text_ids, attention_mask=(text_ids != pad).long()))
    return contrastive_loss(_unit(model.get_image_features(pixel_values=pixels)), text, true, model.logit_scale.exp())


def _unit(features: Any) -> torch.Tensor:
    return functional.normalize(features.pooler_output, dim=-1)


@torch.inference_mode()
def zero_shot(
    model: CLIPModel, tokenizer: Any, pixels: torch.Tensor, names: Sequence[str], prompts: Sequence[str]
) -> torch.Tensor:
    """Index of the name whose prompts are nearest to each picture.

    Shapes:   pixels  [P, 3, H, W];  prompts contain "{}"  ->  [P]
    """
    batch = text_inputs(tokenizer, [prompt.format(name) for name in names for prompt in prompts])
    text = _unit(model.get_text_features(batch["input_ids"], batch["attention_mask"])).view(len(names), len(prompts), -1).mean(1)
    return (_unit(model.get_image_features(pixel_values=pixels)) @ functional.normalize(text, dim=-1).T).argmax(1)


@torch.inference_mode()
def features(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Features of an image guard: mean, maximum and minimum over the patch embeddings, before a position is added.

    Deeper features are worse: captions never mention a stain, and a tower forgets what they do not mention. On a development
    seed average precision was 0.81 after the first block, 0.97 with positions, 1.00 here; the pooled embedding is useless
    (recall 0.67 at precision 0.02).

    Shapes:   [P, 3, H, W]  ->  [P, 3 W]
    """
    patches = patch_embeddings(model, pixels)
    return torch.cat([patches.mean(1), patches.amax(1), patches.amin(1)], dim=1)
