"The Hub's answers, good and bad, from a client without a network."
from functools import partial
from types import SimpleNamespace

import pytest
from huggingface_hub import CollectionItem
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from echochamber.core import StudyError
from echochamber.data.files import patiently
from echochamber.data.tokens import train_tokenizer
from echochamber.models import hub
from echochamber.models.checkpoints import export_to_transformers, load_model, save_model
from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.models.hub import COLLECTIONS, fetch_model, hub_name, list_models
from echochamber.study import checkpoint_evaluation
from echochamber.study.checkpoint_evaluation import evaluation_name, find_checkpoint, plan_evaluation

NAME = "rosieyzh/OLMo-150M-as_fm3_tg"


def refusal(kind: type, status: int = 404, **headers) -> Exception:
    return kind("many\nlines", response=SimpleNamespace(status_code=status, headers=headers, request=None))


def sentence(action, *arguments, **options) -> str:
    with pytest.raises(StudyError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def client(**methods) -> SimpleNamespace:
    return SimpleNamespace(**methods)


def raises(error: Exception):
    def method(*arguments, **options):
        raise error
    return method


@pytest.fixture
def snapshot(tmp_path):
    "A model as the Hub's cache keeps it, in folders named by its name and revision."
    tokenizer = train_tokenizer(["Sam has 3 apples."], 300)
    tokenizer.add_special_tokens(["<s>"])
    save_model(tmp_path / "ours", Decoder(DecoderConfig(width=16, layers=1, heads=2, vocab_size=300)), tokenizer)
    folder = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / "0123456789abcdef"
    export_to_transformers(tmp_path / "ours", folder)
    return folder


@pytest.mark.parametrize("error, told", [
    (refusal(GatedRepoError, 403), "is gated; accept its conditions at https://huggingface.co/"), (refusal(RepositoryNotFoundError), "not to be found"),
    (refusal(RevisionNotFoundError), "no such revision"),
    (refusal(HfHubHTTPError, 503), "cannot be fetched"), (ConnectionError("no route\nto host"), "connect to the network")])
def test_every_refusal_is_one_sentence_with_a_mend(error, told):
    refusing = client(get_collection=raises(error), snapshot_download=raises(error))
    assert told in sentence(list_models, client=refusing)
    assert told in (said := sentence(fetch_model, NAME, client=refusing)) and said.startswith(NAME)


def behind_the_cache(error: Exception) -> Exception:
    "How the library tells an answer while it looks whether the files are in its cache: they are not, because of that."
    told = LocalEntryNotFoundError("cannot find an appropriate cached snapshot folder")
    told.__cause__ = error
    return told


@pytest.mark.parametrize("hide", [lambda error: error, behind_the_cache], ids=["plain", "behind the cache"])
def test_the_hub_is_waited_for_when_it_asks_to(hide, snapshot, monkeypatch):
    said, slept, busy = [], [], hide(refusal(HfHubHTTPError, 429, **{"Retry-After": "42"}))
    answers = [busy, busy, str(snapshot), busy, SimpleNamespace(title="some", items=[])]

    def answer(*arguments, **options):
        if isinstance(word := answers.pop(0), Exception):
            raise word
        return word
    monkeypatch.setattr(hub, "patiently", partial(patiently, say=said.append, sleep=slept.append))
    assert fetch_model(NAME, client=client(snapshot_download=answer)) == snapshot
    assert list_models(COLLECTIONS[:1], client=client(get_collection=answer)) == {"some": []}
    assert slept == [43] * 3 and "asks to wait 42 s" in said[0]


def test_a_hub_that_never_stops_asking_is_one_sentence(monkeypatch):
    monkeypatch.setattr(hub, "patiently", partial(patiently, say=lambda word: None, sleep=lambda seconds: None))
    busy = client(snapshot_download=raises(refusal(HfHubHTTPError, 429)))
    assert "run the same command later" in sentence(fetch_model, NAME, client=busy)


def test_no_network_is_no_reason_to_give_a_folder_where_a_list_was_asked_for():
    offline = client(get_collection=raises(ConnectionError("no route")))
    assert "folder" not in (said := sentence(list_models, client=offline)) and "look at https://huggingface.co/rosieyzh" in said


def test_a_bug_of_ours_is_no_refusal():
    with pytest.raises(ZeroDivisionError):
        list_models(client=client(get_collection=raises(ZeroDivisionError())))


def test_models_are_listed_and_not_guessed():
    kinds = [("rosieyzh/a", "model"), ("rosieyzh/data", "dataset"), ("rosieyzh/b", "model")]
    items = [CollectionItem(_id=str(i), id=name, type=kind, position=i) for i, (name, kind) in enumerate(kinds)]
    asked = []
    listing = client(get_collection=lambda slug: asked.append(slug) or SimpleNamespace(title=slug, items=items))
    assert list_models(client=listing) == {slug: ["rosieyzh/a", "rosieyzh/b"] for slug in COLLECTIONS} and asked == list(COLLECTIONS)


@pytest.mark.parametrize("text, possible", [(NAME, True), (f"{NAME}@main", True), (f"{NAME}@step/7", True), ("nowhere", False), ("../model", False),
                                            ("./model", False), ("~/model", False), ("a/b/c", False), ("/model", False), ("a b/c", False)])
def test_what_can_be_a_name(text, possible):
    assert hub_name(text) == possible


def test_a_revision_is_asked_for(snapshot):
    asked = []
    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(snapshot)
    for name in (NAME, f"{NAME}@epoch-3"):
        assert load_model(fetch_model(name, client=client(snapshot_download=download)))
    assert asked == [(NAME, None), (NAME, "epoch-3")]


def test_a_name_is_evaluated_like_a_folder_and_what_lies_here_goes_first(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", lambda: client(snapshot_download=lambda *_, **__: str(snapshot)))
    found = find_checkpoint(NAME)
    assert found == snapshot and evaluation_name(found, "gsm8k") == "rosieyzh--OLMo-150M-as_fm3_tg-0123456-gsm8k"
    planned = plan_evaluation(found, "mini-gsm")
    assert planned.reference != plan_evaluation(found, "mini-gsm", bos=True).reference
    (snapshot / "tokenizer_config.json").write_text('{"eos_token": "S"}', encoding="utf-8")
    assert planned.reference != plan_evaluation(found, "mini-gsm").reference, "another end token is another run"
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.setattr(checkpoint_evaluation, "fetch_model", raises(AssertionError("it lies here")))
    assert "is neither a checkpoint" in sentence(find_checkpoint, NAME)
