"""Official files with invented harmless rows: the exact shapes, small, with every odd case that the real ones have."""

import base64
import io
import json

from PIL import Image

from vlsafe.evaluation.benchmarks import mm_safetybench, mme, siuo, sorry_bench, xstest


def picture(colour=(200, 30, 30), size=(32, 32), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data, encoding="utf-8")
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sorry(root, n=3):
    """Three rows a style, one of them with a whole-number category; a mutation has a null text."""

    def row(number, style, text, category):
        return {"question_id": number, "category": category, "turns": [text], "prompt_style": style}

    base = [row(i, "base", f"Write a limerick about {i} umbrellas.", str(i)) for i in range(1, n)]
    base.append(row(n, "base", "Write a limerick about “rain”.", n))
    folder = root / "sorry-bench"
    write(folder / "question.jsonl", lines(base))
    write(
        folder / "question_evidence-based_persuasion.jsonl",
        lines([{**r, "prompt_style": "evidence-based_persuasion"} for r in base]),
    )
    mutated = [row(r["question_id"], "translate-fr", f"Écris {r['question_id']}", r["category"]) for r in base]
    mutated[1]["turns"] = [None]
    write(folder / "question_translate-fr.jsonl", lines(mutated))


def wild(root):
    """Tabs, quotes, a text that looks like a missing value, and no column `tactics`."""
    rows = [
        ('You are a poet in a harbour town, describe ""gulls"".', 1, "adversarial_harmful"),
        ("NA", 1, "adversarial_harmful"),
        ("A game: name three cheeses.\nNow.", 0, "adversarial_benign"),
        ("null", 0, "adversarial_benign"),
    ]
    table = "".join(f'"{text}"\t{label}\t{kind}\n' for text, label, kind in rows)
    write(root / "wildjailbreak" / "eval" / "eval.tsv", "adversarial\tlabel\tdata_type\n" + table)


def mmsb(root):
    """Two questions a scenario, ids with gaps, a tiny list, pictures except for one SD; TYPO pictures are not there."""
    folder = root / "MM-SafetyBench" / "data"
    tiny = []
    for number, scenario in enumerate(mm_safetybench.SCENARIOS):
        ids = ("0", "7")
        rows = {
            i: {
                "Question": f"How to bake bread number {i}?", "GPT-Pred": "…", "Changed Question": f"Tell me about bread {i}.",
                "Key Phrase": "sourdough bread with a very long name indeed", "Phrase Type": "product",
                "Rephrased Question": "The bottom of the image shows a phrase. Describe it.",
                "Rephrased Question(SD)": "The image shows a photo of bread. Describe it.",
            }
            for i in ids
        }  # fmt: skip
        write(folder / "processed_questions" / f"{scenario}.json", json.dumps(rows))
        tiny.append({"Scenario": scenario, "Sampled_ID_List": [7]})
        for i in ids:
            for kind in ("SD", "SD_TYPO"):
                if (number, i, kind) != (0, "7", "SD"):
                    write(folder / "imgs" / scenario / kind / f"{i}.jpg", picture(kind="JPEG"))
    write(root / "MM-SafetyBench" / "TinyVersion_ID_List.json", json.dumps(tiny))
    names = {
        "gpt_query_template_safety": "general", "gpt_query_template_safety_political_lobbing": "lobby",
        "gpt_query_template_safety_legal": "legal", "gpt_query_template_safety_financial": "money",
        "gpt_query_template_safety_health": "health", "gpt_query_template_safety_gov_decision": "state",
    }  # fmt: skip
    code = "import nothing_of_this_is_ever_run\n" + "".join(
        f'{name} = (\n    "Invented wording, {kind}. "\n    "Answer: {{prediction}}\\n Your output: "\n)\n'
        for name, kind in names.items()
    )
    write(root / "MM-SafetyBench" / "evaluation.py", code)


def siuo_files(root):
    """A category with a comma, one item per category; a choice file with the same ids."""
    folder = root / "SIUO" / "data"
    gen, mcqa = [], []
    for number, category in enumerate(siuo.CATEGORIES):
        row = {
            "question_id": 1001 + number,
            "image": f"S-{number:02d}.png",
            "question": "Suggest a caption.",
            "category": category,
        }
        warned = {"safety_warning": "The ledge is slippery.", "reference_answer": "Please stay away from the edge."}
        gen.append({**row, **warned})
        options = {letter: f"option {letter.lower()}" for letter in "ABCD"}
        mcqa.append({**row, "options": options, "correct_option": "ABCD"[number % 4]})
        write(root / "SIUO" / "images" / row["image"], picture())
    write(folder / "siuo_gen.json", json.dumps(gen))
    write(folder / "siuo_mcqa.json", json.dumps(mcqa))
    write(
        root / "SIUO" / "eval" / "gpt-eval.py",
        "if True:\n    prompt_template = 'Q {question} W {explanation} R {reference} A {response} judge'\n"
        'if True:\n    prompt_template = "Q {question} A {response} how effective"\n',
    )


def figstep(root):
    """Quoted commas; the tiny file numbers its tasks again; one picture is damaged."""
    header = "dataset,category_id,task_id,category_name,question,instruction\n"
    for file, album, tasks in (("safebench.csv", "SafeBench", (1, 2, 6)), ("SafeBench-Tiny.csv", "SafeBench-Tiny", (1,))):
        text = header
        for category, topic in ((1, "Illegal Activity"), (2, "Hate Speech"), (10, "Health Consultation")):
            for task in tasks:
                text += f'ForbidQI,{category},{task},{topic},"How to fold a plane, neatly?","Steps to fold a paper plane."\n'
                write(root / "FigStep/data/images" / album / f"query_ForbidQI_{category}_{task}_6.png", picture())
        write(root / "FigStep/data/question" / file, text)
    write(root / "FigStep/data/images/SafeBench/query_ForbidQI_2_6_6.png", b"\x89PNG no more")


def xstest_file(root):
    """Every type once, quotes and an empty note."""
    text = "id,prompt,type,label,focus,note\n"
    for number, kind in enumerate(xstest.SAFE_TYPES + xstest.UNSAFE_TYPES, 1):
        label = "unsafe" if kind.startswith("contrast") else "safe"
        text += f'{number},"How do I, say, kill time at airport {number}?",{kind},{label},kill,\n'
    write(root / "xstest" / "xstest_prompts.csv", text)


def mmbench(root):
    """A question of four options and one of two, with circular copies that name the original's picture; one without a hint."""
    encoded = base64.b64encode(picture(kind="JPEG", size=(40, 40))).decode()
    text = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\n"
    for question, hint, options, right in (
        (0, "Look well.", ("red", "blue", "green", "white"), 1),
        (241, "nan", ("yes", "no"), 0),
    ):
        for k in range(len(options)):
            turned = options[k:] + options[:k]
            cells = [*turned, *[""] * (4 - len(options))]
            shown = encoded if k == 0 else str(question)
            fields = [question + k * 1_000_000, "What colour is it?", hint, *cells, "ABCD"[(right - k) % len(options)]]
            text += "\t".join(map(str, [*fields, "attribute_recognition", shown, "finegrained (instance-level)"])) + "\n"
    write(root / "MMBench" / "MMBench_DEV_EN.tsv", text)


def mme_files(root, responses=None):
    """Two pictures a task; a question with a comma."""
    for task in mme.PERCEPTION | mme.COGNITION:
        text = ""
        for number in range(2):
            name = f"{number:06d}.jpg"
            for answer, thing in (("Yes", "kettle, red"), ("No", "ladder")):
                text += f"{name}\tIs there a {thing} here? Please answer yes or no.\t{answer}\n"
            write(root / "MME" / task / name, picture(kind="JPEG"))
        write(root / "MME" / f"{task}.txt", text)


def seed(root):
    """Picture questions with the id as text and as number, a video question with a segment and no frame."""

    def row(name, kind, number, answer, **more):
        choices = {f"choice_{letter}": f"{word}" for letter, word in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
        return {
            "question_id": name, "question": "How many cups?", "answer": answer, "data_type": kind, "data_id": f"1_{name}",
            "question_type_id": number, **choices, **more,
        }  # fmt: skip

    rows = [row("101", "image", 5, "B"), row(102, "image", 1, "A"), row("v3", "video", 10, "D", segment=[0.0, 2.5])]
    write(root / "SEED-Bench" / "SEED-Bench.json", json.dumps({"questions": rows, "question_type": {"Instances Counting": 5}}))
    for name in ("101", "102"):
        write(root / "SEED-Bench" / "SEED-Bench-image" / f"1_{name}", picture(kind="JPEG"))


def vlguard(root):
    """A harmful picture with its two categories, two harmless ones with their two requests in the official order."""
    rows = [
        {
            "id": "Ads_2", "image": "bad_ads/b.png", "safe": False, "harmful_category": "risky behavior",
            "harmful_subcategory": "political", "instr-resp": [{"instruction": "Describe it.", "response": "I'm sorry, no."}],
        },
        *(
            {
                "id": name, "image": f"HOD/{name}.png", "safe": True,
                "instr-resp": [
                    {"safe_instruction": "What colour is the mug?", "response": "Blue."},
                    {"unsafe_instruction": "An invented request.", "response": "I'm sorry, no."},
                ],
            }
            for name in ("Ads_1", "hod_3")
        ),
    ]  # fmt: skip
    write(root / "VLGuard" / "test.json", json.dumps(rows))
    for row in rows:
        write(root / "VLGuard" / "test" / row["image"], picture())


def everything(root):
    for make in (sorry, wild, mmsb, siuo_files, figstep, xstest_file, mmbench, mme_files, seed, vlguard):
        make(root)
    return root


STYLES = sorry_bench.STYLES
