"""The tokenizer on any text, packing, and batches by step: across resumption, accumulation and two real processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echochamber.core import StudyError, project_root
from echochamber.data.corpora import MIXTURES, MixtureConfig, build_corpus
from echochamber.data.tokens import (
    END_TOKEN,
    PackedData,
    epoch_rows,
    load_tokenizer,
    pack_corpus,
    pack_documents,
    save_tokenizer,
    train_tokenizer,
)

CORPUS = build_corpus(MixtureConfig(tokens=50_000, background=0.2, sources=MIXTURES["three-formats"]()))["train"]
TOKENIZER = train_tokenizer(CORPUS["text"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_every_text_survives_the_round_trip(text):
    tokens = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(tokens) == text and END_TOKEN not in tokens


@given(TEXT.map(str.rstrip), TEXT)
def test_the_tokens_of_a_prompt_begin_those_of_its_document(question, solution):
    prompt = TOKENIZER.encode(question).ids
    assert TOKENIZER.encode(f"{question}\n\n{solution}").ids[:len(prompt)] == prompt


def test_real_questions_begin_their_documents_and_survive(real_file):
    for row in map(json.loads, real_file("gsm8k").read_text(encoding="utf-8").splitlines()):
        document = row["question"].strip() + "\n\n" + row["answer"]
        prompt, tokens = TOKENIZER.encode(row["question"].strip()).ids, TOKENIZER.encode(document).ids
        assert tokens[:len(prompt)] == prompt and TOKENIZER.decode(tokens) == document


def test_training_is_deterministic_and_the_file_complete(tmp_path):
    assert train_tokenizer(CORPUS["text"]).to_str() == TOKENIZER.to_str()
    save_tokenizer(tmp_path, TOKENIZER)
    assert load_tokenizer(tmp_path).encode("a<|endoftext|>b").ids == TOKENIZER.encode("a<|endoftext|>b").ids
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_vocabulary_is_bounded():
    assert train_tokenizer(CORPUS["text"], vocab_size=300).get_vocab_size() == 300


@pytest.mark.parametrize("content", [None, "", "{}", "\0", "[1]"])
def test_missing_or_corrupt_tokenizer_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(StudyError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@given(st.lists(st.lists(st.integers(1, 60_000), max_size=20), max_size=20), st.integers(1, 12))
def test_packing_keeps_the_stream(documents, context):
    rows = pack_documents(documents, context)
    stream = [token for document in documents for token in (*document, END_TOKEN)]
    assert rows.shape == (max(0, (len(stream) - 1) // context), context + 1)
    targets = rows[:, 1:].ravel().tolist()
    assert targets == stream[1:len(targets) + 1]
    assert (rows[1:, 0] == rows[:-1, -1]).all()


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 100), st.integers(0, 3))
def test_positions_are_a_pure_function(rows, start, length, seed):
    whole = epoch_rows(0, start + length + 1, rows, seed)
    assert (epoch_rows(start, start + length, rows, seed) == whole[start:start + length]).all()
    for epoch in range(len(whole) // rows):
        assert sorted(whole[epoch * rows:(epoch + 1) * rows]) == list(range(rows))


def test_held_out_loaders_read_every_row_once():
    packed = pack_corpus(CORPUS["text"], TOKENIZER, 64)
    data = PackedData(packed, batch_size=7, held_out={"first": packed.select(range(10)), "second": packed.select(range(3))})
    first, second = data.val_dataloader()
    assert [len(batch) for batch in first] == [7, 3] and [len(batch) for batch in second] == [3]
    assert torch.cat(first)[:, 0].tolist() == np.asarray(packed[:10]["tokens"])[:, 0].tolist()


WITNESS = """
import json, os, sys
import lightning, torch
from datasets import Dataset
from echochamber.data.tokens import PackedData

class Witness(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []
    def training_step(self, rows, index):
        self.seen.append(rows[:, 0].tolist())
        return self.weight * 0
    def on_train_end(self):
        with open(f"{sys.argv[1]}/{self.trainer.global_rank}.json", "w", encoding="utf-8") as file:
            json.dump(self.seen, file)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())

rows = Dataset.from_dict({"tokens": [[i, i, i] for i in range(20)]}).with_format("numpy")
trainer = lightning.Trainer(max_steps=6, accumulate_grad_batches=2, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False,
                            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Witness(), PackedData(rows, batch_size=8, seed=3))
"""


@pytest.mark.sessions
def test_two_processes_share_each_batch_of_one(tmp_path):
    (tmp_path / "witness.py").write_text(WITNESS, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project_root())}
    done = subprocess.run([sys.executable, "witness.py", str(tmp_path)], cwd=tmp_path, env=environment, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((Path(tmp_path) / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for step in range(6):  # two micro-batches of two rows on each of two ranks
        parts = [ranks[rank][2 * step + micro_batch] for micro_batch in (0, 1) for rank in (0, 1)]
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert sum(parts, []) == epoch_rows(8 * step, 8 * step + 8, 20, seed=3).tolist()
