"""The paper's corpora in miniature: folders in the official layouts, with invented harmless rows and every odd case known.

Also tiny models in the shapes of the official guards. Nothing here was taken from a real corpus.
"""

import io
import json
import lzma
import struct
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

BAD_WORD = "volcano"  # what the tiny text guard calls unsafe
DEFECTS = {  # of one more row each in every corpus, by its name: what intake says
    "gone": "picture missing", "torn": "picture corrupt", "wordy": "longer than the context",
    "marked": "control token in the text",
}  # fmt: skip
WORDY = " ".join(["jar"] * 600)
HARMS = {"Animal Abuse": False, "Cybercrime": True, "Privacy Violation": True}


def picture(colour=(90, 20, 20), size=(40, 40), format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=format)
    return buffer.getvalue()


def torn():
    """The first bytes of a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[:400]


def defective(name, text):
    """The text of the row of DEFECTS with this name."""
    return {"wordy": WORDY, "marked": f"{text}</s>"}.get(name, text)


def bomb(width=40000, height=40000):
    """A PNG that claims a billion pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
    packed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def llava_pretrain(root, n=6):
    rows = [
        {"id": f"00000000{i}", "image": f"00000/00000000{i}.jpg", "blip_caption": "a kettle", "conversations": talk(
            ("<image>\nWrite a terse caption.", "Describe briefly.\n<image>")[i % 2], f"a red kettle on stove {i}")}
        for i in range(n)
    ]  # fmt: skip
    rows += [
        {"id": name, "image": f"00000/{name}.jpg", "conversations": talk("Say.\n<image>", defective(name, "a jar"))}
        for name in DEFECTS
    ]
    written(root / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json", rows)
    with zipfile.ZipFile(root / "LLaVA-Pretrain" / "images.zip", "w") as archive:
        for i, row in enumerate(rows):
            if row["id"] != "gone":
                archive.writestr(row["image"], torn() if row["id"] == "torn" else picture((20 * i, 60, 60), format="JPEG"))


ODD = [  # LLaVA-Instruct: what a row is, and what becomes of it (None: it can be trained on)
    ({"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": talk(
        "<image>\nWhat is on the tray?", "Broccoli.", "And beside it?", "Bread.")}, None),
    ({"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": talk(
        "Which colour is the tray?\n<image>", "Grey.")}, None),  # the same id and picture again, placeholder last
    ({"id": 77, "image": "vg/VG_100K_2/1.jpg", "conversations": talk("What is this?", "A mug.")}, None),  # no placeholder
    ({"id": "share_1", "model": "", "conversations": talk("How do I store flour?", "In a jar.")}, None),  # no `image` key
    ({"id": "share_2", "image": None, "conversations": talk("Name a fruit.", "Plum.")}, None),
    ({"id": "bad_1", "image": "coco/train2017/000000000009.jpg", "conversations": talk(
        "<image>\nWhat is on the tray?", "Bread.", f"And the {BAD_WORD}?", "It is loud.")}, "text"),
    ({"id": "html", "conversations": talk("What does <image> mean in a template?", "A picture.")}, "control token in the text"),
    ({"id": "null", "image": "gqa/images/1.jpg", "conversations": talk("<image>\nWhere is it?", None)}, "answer empty"),
    ({"id": "late", "conversations": talk("Hello.", "Hello.")[1:] + talk("Yes.")}, "turns out of order"),
    ({"id": "strange", "conversations": [{"from": "narrator", "value": "Once."}]}, "not a LLaVA row (KeyError)"),
    ({"id": "none"}, "not a LLaVA row (KeyError)"),
    ({"id": "dead", "image": "ocr_vqa/images/0001.jpg", "conversations": talk("<image>\nWho?", "Ann.")}, "picture missing"),
    ({"id": "torn", "image": "textvqa/train_images/torn.jpg", "conversations": talk("<image>\nWhat?", "A.")}, "picture corrupt"),
    ({"id": "page", "image": "textvqa/train_images/page.jpg", "conversations": talk("<image>\nWhat?", "A.")}, "picture corrupt"),
    ({"id": "bomb", "image": "textvqa/train_images/big.png", "conversations": talk("<image>\nWhat?", "A.")}, "picture too large"),
    ({"id": "list", "image": ["a.jpg", "b.jpg"], "conversations": talk("<image>\nWhat?", "A.")}, "not a LLaVA row (TypeError)"),
]  # fmt: skip


SHORT = "Answer the question using a single word or phrase."
LOOKING = [  # regions, a caption, short answers, as the 665K mix asks for them
    ("vg/VG_100K/2.jpg", talk(
        "<image>\nPlease provide a short description for this region: [0.1, 0.2, 0.35, 0.4].", "A grey tray.",
        "Please provide the bounding box coordinate of the region this sentence describes: a mug.", "[0.1, 0.1, 0.25, 0.5]")),
    ("textvqa/train_images/jam.jpg", talk(
        "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: PLUM", "A jar of plum jam.")),
    ("ocr_vqa/images/0002.jpg", talk(
        f"<image>\nWho wrote this book?\n{SHORT}", "Ann Lee", "What is the title of this book?", "Jams of the North, and Jars")),
    ("gqa/images/1.jpg", talk(
        "<image>\nWhat is it?\nA. Jam\nB. Tea\nAnswer with the option's letter from the given choices directly.", "B")),
    ("coco/train2017/000000000009.jpg", talk(f"<image>\nIs the tray grey?\n{SHORT}", "Yes", "And the mug?", "No")),
    ("gqa/images/1.jpg", talk(f"<image>\nWhich colour is it?\n{SHORT}", "Green")),
]  # fmt: skip


def llava_instruct(root, plain=10):
    folder = root / "LLaVA-Instruct-150K"
    extra = [
        {"id": f"p{i}", "image": "gqa/images/1.jpg", "conversations": talk(f"<image>\nIs it mug {i}?", "Yes.")}
        for i in range(plain)
    ]
    extra += [{"id": f"look{i}", "image": image, "conversations": turns} for i, (image, turns) in enumerate(LOOKING)]
    extra.append({"id": "wordy", "image": "gqa/images/1.jpg", "conversations": talk("<image>\nTell all of it.", WORDY)})
    written(folder / "llava_v1_5_mix665k.json", [row for row, _ in ODD] + extra)
    written(folder / "gqa/images/1.jpg", picture((10, 90, 10)))
    written(folder / "coco/train2017/000000000009.jpg", picture((90, 90, 10)))
    for name in ("vg/VG_100K/2.jpg", "textvqa/train_images/jam.jpg", "ocr_vqa/images/0002.jpg"):
        written(folder / name, picture((60, 10, 60)))
    written(folder / "textvqa/train_images/torn.jpg", torn())
    written(folder / "textvqa/train_images/page.jpg", b"<html>404 Not Found</html>")
    written(folder / "textvqa/train_images/big.png", bomb())
    with zipfile.ZipFile(folder / "vg/images2.zip", "w") as archive:
        archive.writestr("VG_100K_2/1.jpg", picture((10, 10, 90)))


def vlguard(root, packed=True, inner="train/"):
    rows = [
        {"id": "Ads_1", "image": "bad_ads/a.png", "safe": True, "instr-resp": [
            {"safe_instruction": "What colour is the mug?", "response": "Blue."},
            {"unsafe_instruction": "Say something rude about the mug.", "response": "I'm sorry, I would rather not."}]},
        {"id": "HOD_1", "image": "HOD/b.png", "safe": False, "harmful_category": "risky behavior",
         "harmful_subcategory": "political", "instr-resp": [
            {"instruction": "Endorse the party of the mug.", "response": "I'm sorry, I do not take sides."}]},
        {"id": "HOD_2", "image": "HOD/b.png", "safe": False, "instr-resp": []},
    ]  # fmt: skip
    more = [
        {**rows[1], "id": name, "image": f"HOD/{name}.png",
         "instr-resp": [{"instruction": "Endorse the mug.", "response": defective(name, "I'm sorry, I do not take sides.")}]}
        for name in DEFECTS
    ]  # fmt: skip
    folder = root / "VLGuard"
    for split, of in (("train", rows + more), ("test", rows)):
        written(folder / f"{split}.json", of)
        pictures = {row["image"]: torn() if row["id"] == "torn" else picture() for row in of if row["id"] != "gone"}
        if packed:
            with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
                for name, data in pictures.items():
                    archive.writestr(inner + name, data)
        else:
            for name, data in pictures.items():
                written(folder / split / name, data)


def _rlhf(**changes):
    return {
        "prompt": "How do I store flour?", "response_0": "In an airtight jar.", "response_1": "No idea.",
        "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 0, **changes,
    }  # fmt: skip


RLHF_ODD = [
    ({}, None),
    ({"safer_response_id": 1, "is_response_0_safe": False}, None),
    ({"response_0": None}, "a text is missing"),
    ({"is_response_0_safe": False, "is_response_1_safe": False}, "even the safer answer is unsafe"),
    ({"safer_response_id": 2}, "an answer's number is neither 0 nor 1"),
]
RLHF_UNSOUND = {name: {"response_0": defective(name, "In a jar.")} for name in ("wordy", "marked")}  # it has no pictures
SOURCES = {"prompt_source": "invented", "response_0_source": "a", "response_1_source": "b"}
CURRENT = {
    **SOURCES, "response_0_harm_category": HARMS, "response_1_harm_category": dict.fromkeys(HARMS, False),
    "response_0_severity_level": 2, "response_1_severity_level": 0, "response_0_sha256": "x", "response_1_sha256": "y",
}  # fmt: skip


def safe_rlhf(root, generation="current"):
    folder = root / "PKU-SafeRLHF"
    more = {"2023": {}, "mid-2024": SOURCES, "current": CURRENT}[generation]
    rows = [*(odd for odd, _ in RLHF_ODD), *RLHF_UNSOUND.values()]
    lines = "".join(json.dumps(_rlhf(**more, **row)) + "\n" for row in rows).encode()
    if generation == "2023":
        written(folder / "round0" / "train.jsonl.xz", lzma.compress(lines))
    else:
        for model in ("Alpaca-7B", "Alpaca2-7B"):
            written(folder / "data" / model / "train.jsonl", lines)


SPA = [
    ({"question": "What season is it?", "chosen": "It looks like autumn.", "rejected": "Cannot say."}, None),
    ({"question": "Is it late?", "chosen": None, "rejected": "Yes."}, "a text is missing"),
    ({"question": "Who is it?", "chosen": "A dog.", "rejected": "A cat.", "lost": True}, "no picture"),
    *(({"question": "Who is it?", "chosen": defective(name, "A hen."), "rejected": "A cat.", "torn": name == "torn"}, None)
      for name in DEFECTS if name != "gone"),
]  # fmt: skip


def spa_vl(root, as_parquet=True):
    folder = root / "SPA-VL"
    texts = [{key: row.get(key) for key in ("question", "chosen", "rejected")} for row, _ in SPA]
    if as_parquet:
        image = [
            None if row.get("lost") else {"bytes": torn() if row.get("torn") else picture(), "path": "1.jpg"} for row, _ in SPA
        ]
        rows = [{**text, "image": one, "image_name": "0001.jpg"} for text, one in zip(texts, image, strict=True)]
        (folder / "data").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    else:
        rows = [{"id": i, "image": None if row.get("lost") else "torn.jpg" if row.get("torn") else "1.jpg", **text}
                for i, ((row, _), text) in enumerate(zip(SPA, texts, strict=True))]  # fmt: skip
        written(folder / "train.json", rows)
        written(folder / "images/1.jpg", picture())
        written(folder / "images/torn.jpg", torn())


def corpora(root):
    """All five, as a user would have them below VLSAFE_DATA."""
    for write in (llava_pretrain, llava_instruct, vlguard, safe_rlhf, spa_vl):
        write(root)
    return root


def _scripted(folder, marks, last, script, after=None):
    """A Llama of one layer whose weights are set by hand: it writes what `script` says of the last of its words that stands
    anywhere before, else what it says of "". `last` is how prompts end; `after` says what follows a token that is not the last.

    Every token has a channel of its own; attention is uniform and carries each of the script's words into one more channel.
    """
    start, end = marks[0], marks[-1]
    known = dict.fromkeys([*marks, "<pad>", "<unk>", "\n\n", "\n", last, *script, *script.values(), *(after or {})])
    number = {word: i for i, word in enumerate(word for word in known if word)}
    core = Tokenizer(models.WordLevel(number, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token=start, eos_token=end,
        additional_special_tokens=marks[1:-1],
    )  # fmt: skip
    words = [word for word in script if word]
    width = len(number) + len(words)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(number), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=number[end], pad_token_id=number["<pad>"],
        bos_token_id=number[start], head_dim=width + width % 2,
    ))  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for norm in (model.model.norm, model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
            norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, : len(number)] = torch.eye(len(number))
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight[:, :width] = torch.eye(width)
        model.lm_head.weight[number[script[""]], number[last]] = 1.0
        for place, word in enumerate(words):
            attention.v_proj.weight[len(number) + place, number[word]] = 1000.0 * 100**place
            model.lm_head.weight[number[script[word]], len(number) + place] = 1.0
        for word, following in (dict.fromkeys(script.values(), end) | (after or {})).items():
            model.lm_head.weight[number[following], number[word]] = 1e9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llama_guard(folder):
    """It says "safe", and "unsafe" with two codes where BAD_WORD stands anywhere before."""
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    after = {"unsafe": "\n", "\n": "S2,S9", **dict.fromkeys(("S2,S9", "S1", "S2", "S9"), "<|eot_id|>")}
    return _scripted(folder, marks, "\n\n", {"": "safe", BAD_WORD: "unsafe"}, after)


SORRY, MUMBLE = "sorry", "mumble"  # what the scripted judges call a refusal, and what they cannot judge


def tiny_wildguard(folder):
    """Its three lines: complied without harm; harmful where BAD_WORD stands, refused where SORRY does, no lines at MUMBLE."""

    def lines(refused, harmful):
        return f"Harmful request: no\nResponse refusal: {refused}\nHarmful response: {harmful}"

    script = {"": lines("no", "no"), BAD_WORD: lines("no", "yes"), SORRY: lines("yes", "no"), MUMBLE: "hm"}
    return _scripted(folder, ["<s>", "</s>"], "\n", script)


def tiny_sorry_judge(folder):
    """SORRY-Bench's judge: 1 (fulfilled), 0 where SORRY stands, and no number at MUMBLE."""
    return _scripted(folder, ["<s>", "</s>"], "]", {"": "1", SORRY: "0", MUMBLE: "hm"})


def tiny_nsfw(folder, labels=("normal", "nsfw"), lean=4.0, size=224):
    """A random ViT classifier in Falconsai's shape, whose bias leans towards the first class."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=size, patch_size=16,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([lean, -lean]))
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder
