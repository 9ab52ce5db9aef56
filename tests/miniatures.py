"Miniatures of the six sources, each in the exact schema, kind of file and place of the real one, from a seeded generator."
import json
import random
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from echochamber.data.corpora import background_text, question_solution_pairs, three_sources
from echochamber.data.llama import train_llama_tokenizer
from echochamber.data.preparation import CorpusConfig
from echochamber.data.problems import ProblemConfig

LONG = 1_000_000  # characters of the longest document
AWKWARD = ("Tokenizers write </s> and <s> and <unk>.", "漢字 é ½ 🙂\t\r\n  two\n\n\nlines", "x▁y", "data:image/png;base64," + "Ab9/" * 400)


def rows_of(format: str, count: int, seed: int) -> list[tuple[str, str]]:
    "Questions and solutions of one format, the first solutions with something awkward inside."
    source = next(s for s in three_sources(ProblemConfig(operations=(1, 2), operands=(2, 9)), seed) if s.format == format)
    pairs = list(islice(question_solution_pairs(source), count))
    return [(question, f"{solution}\n# {AWKWARD[number]}" if number < len(AWKWARD) else solution)
            for number, (question, solution) in enumerate(pairs)]


def write_parquet(folder: Path, names: list[str], rows: list[dict], group: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pq.write_table(pa.Table.from_pylist(rows[number::len(names)]), folder / name, row_group_size=group)


def tinygsm(root: Path, rows: int, seed: int) -> None:
    table = [{"question": q, "code": s} for q, s in rows_of("tinygsm", rows, seed)] + [{"question": "Nothing?", "code": None}]
    write_parquet(root / "TinyGSM/TinyGSM/data", [f"train-{n:05d}-of-00003.parquet" for n in range(3)], table)


def omi1(root: Path, rows: int, seed: int) -> None:
    folder = root / "nvidia/OpenMathInstruct-1"
    for kind, number in (("correct", rows), ("incorrect", 9)):
        (folder / f"{kind}_solutions").mkdir(parents=True)
        lines = [{"question": q, "expected_answer": "1", "predicted_answer": "1", "error_message": "", "is_correct": kind == "correct",
                  "generation_type": "without_reference_solution", "dataset": "gsm8k", "generated_solution": s}
                 for q, s in rows_of("omi1", number, seed)]
        lines.append(lines[0] | {"generated_solution": " \n"})
        (folder / f"{kind}_solutions/train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def omi2(root: Path, rows: int, seed: int) -> None:
    folder, table = root / "nvidia/OpenMathInstruct-2/data", [
        {"problem": q, "generated_solution": s, "expected_answer": "1", "problem_source": "augmented_gsm8k"} for q, s in rows_of("omi2", rows, seed)]
    write_parquet(folder, [f"train-{n:05d}-of-00002.parquet" for n in range(2)], table)
    for subset in ("1M", "2M", "5M"):
        write_parquet(folder, [f"train_{subset}-00000-of-00001.parquet"], table[:20])


def metamath(root: Path, rows: int, seed: int) -> None:
    folder = root / "meta-math/MetaMathQA"
    folder.mkdir(parents=True)
    array = [{"type": "GSM_Rephrased", "query": q, "original_question": q, "response": f"{s}\nThe answer is: 1"}
             for q, s in rows_of("omi2", rows, seed + 1)] + [{"type": "GSM_SV", "query": "", "original_question": "", "response": "?"}]
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(array), encoding="utf-8")


def finemath(root: Path, rows: int, seed: int) -> None:
    rng = random.Random(f"finemath-{seed}")
    texts = ["\n".join(background_text(rng) for _ in range(rng.randint(1, 12))) for _ in range(rows)]
    texts[rows // 2] = ("\n".join(background_text(rng) for _ in range(400)) + "\n") * (LONG // 10_000)
    texts[rows // 2] = texts[rows // 2][:LONG]
    table = [{"url": f"https://example.org/{n}", "fetch_time": n, "content_mime_type": "text/html", "text": text, "token_count": 1,
              "char_count": len(text), "metadata": "{}", "score": 3.5, "int_score": 3, "crawl": "…", "snapshot_type": "latest",
              "language": "en", "language_score": 0.9} for n, text in enumerate([*texts, *AWKWARD, ""])]
    write_parquet(root / "HuggingFaceTB/finemath/finemath-3plus", [f"train-{n:05d}-of-00004.parquet" for n in range(4)], table)


def algebraic_stack(root: Path, rows: int, seed: int) -> None:
    rng, folder = random.Random(f"stack-{seed}"), root / "EleutherAI/proof-pile-2/algebraic-stack/train"
    folder.mkdir(parents=True)
    metas = {"c": lambda n: {"hexsha": "0", "stars": n}, "isabelle": lambda n: {"path": "x", "afp": True}, "python": lambda n: {"size": [n]}}
    for language, meta in metas.items():
        lines = [json.dumps({"text": f"({language})\n" + "\n".join(background_text(rng) for _ in range(5)), "meta": meta(n)}) for n in range(rows)]
        lines.append(json.dumps({"text": None, "meta": {}}))
        halves = ("\n".join(lines[: rows // 2]) + "\n").encode(), ("\n".join(lines[rows // 2:]) + "\n").encode()
        (folder / f"{language}0000.jsonl.zst").write_bytes(b"".join(pa.compress(half, "zstd", asbytes=True) for half in halves))


WRITERS = {"tinygsm": tinygsm, "omi1": omi1, "omi2": omi2, "metamath": metamath, "finemath": finemath, "algebraic-stack": algebraic_stack}
REJECTED = {"tinygsm": {"no text": 1}, "omi1": {"empty": 1}, "omi2": {}, "metamath": {"empty": 1}, "finemath": {"empty": 1},
            "algebraic-stack": {"no text": 3}}


def write_mirror(root: Path, rows: int = 120, seed: int = 0, names: tuple[str, ...] = tuple(WRITERS)) -> Path:
    "All six sources below `root`, by the ids of the Hub, and a tokenizer of Llama-2's kind in `root/tokenizer`."
    for name in names:
        WRITERS[name](root, rows, seed)
    (root / "tokenizer").mkdir(parents=True)
    texts = [text for format in ("tinygsm", "omi1", "omi2") for pair in rows_of(format, 60, seed) for text in pair]
    train_llama_tokenizer(texts, 600).save(str(root / "tokenizer/tokenizer.json"))
    return root


def write_gsm8k(root: Path, count: int = 4) -> Path:
    "The repository of GSM8K below a mirror: parquet, and which file is which split in its README. Its folder."
    folder, splits = root / "openai/gsm8k", ("train", "test")
    for split in splits:
        rows = [{"question": f"Sam has {n} apples and buys one more; how many for the {split}?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}
                for n in range(count)]
        write_parquet(folder / "main", [f"{split}-00000-of-00001.parquet"], rows)
    paths = "".join(f"  - split: {split}\n    path: main/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{paths}---\n", encoding="utf-8")
    return folder


def miniature_config(root: Path, **changes) -> CorpusConfig:
    "All six sources of a mirror, in many small units."
    from echochamber.data.preparation import choose_source
    values = {"sources": [choose_source(name) for name in WRITERS], "tokenizer": str(root / "tokenizer"), "sha256": None,
              "held_out": 0.05, "benchmarks": ["mini-gsm"], "unit_bytes": 8_000}
    return CorpusConfig.parse(values | changes)
