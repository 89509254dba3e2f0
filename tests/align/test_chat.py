"""Chat: which models are found, what they answer and to what, and what becomes of a vote: real tiny models, a real
store, and the app's own routes."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.chat import Conversations, Sampling, _default_store, chat, serving
from align.decode import draw, stop_ids
from align.runs import open_run
from align.speakers import Answer, Speaker, Stopped, answer, find_places, load_speakers
from labeling_ui.accounts import Accounts
from labeling_ui.address import Address, Site
from labeling_ui.assignment import Refused
from labeling_ui.chat_page import create_chat_app
from labeling_ui.store import LabelStore
from reward.aggregate import preferences
from reward.records import InputError, split_of
from tests.conftest import free_port, make_tiny_model

ORIGIN = "http://127.0.0.1:8766"
ASKED = [{"role": "user", "content": "What is rain?"}]


def make_run(folder: Path, stage: str, fill: Callable[[Path], object], parents: dict[str, Path] | None = None) -> Path:
    """A finished run folder of a stage, whose `model` is what `fill` writes."""
    config = {"name": "tiny", "model": {"base": "none", "dtype": "float32"}, "data": {"test_share": 0.5}}
    with open_run(stage, folder, {"seed": 0}, config_yaml=yaml.safe_dump(config), parents=parents) as run:
        (folder / "model").mkdir()
        fill(folder / "model")
        run.finish({})
    return folder


def adapter(base: Path, seed: int) -> Callable[[Path], None]:
    """Writes an adapter on `base` that changes what it says, and its tokenizer."""

    def fill(folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)

    return fill


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder: sft, dpo and ppo (adapters), a dpo that trained all weights, and stages without a policy."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    sft = make_run(folder / "1-sft", "sft", make_tiny_model)
    make_run(folder / "5-dpo", "dpo", adapter(sft / "model", 1), {"sft": sft})
    make_run(folder / "6-ppo", "ppo", adapter(sft / "model", 2), {"sft": sft})
    make_run(folder / "5-whole", "dpo", lambda path: make_tiny_model(path, hidden=16, layers=1), {"sft": sft})
    make_run(folder / "4-reward", "reward", lambda path: None)
    return folder


@pytest.fixture(scope="module")
def pair(runs: Path) -> list[Speaker]:
    return load_speakers(find_places(str(runs / "5-dpo")))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.sqlite", busy_seconds=0.2) as store:
        yield store


@pytest.fixture
def talk(pair: list[Speaker], store: LabelStore) -> Conversations:
    return Conversations(pair, Sampling(8, 1.0, seed=3), store, "tiny", test_share=0.5)


def say(talk: Conversations, view: dict[str, Any], text: str) -> dict[str, Any]:
    return talk.say(view["id"], text, lambda place, so_far: None, lambda: False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


# Which models


def test_a_stage_talks_beside_what_it_was_made_from(runs: Path) -> None:
    for run, names in (
        ("5-dpo", ["sft", "dpo"]),
        ("6-ppo", ["sft", "ppo"]),
        ("5-whole", ["sft", "dpo"]),
        ("1-sft", ["sft"]),
    ):
        assert [place.name for place in find_places(str(runs / run))] == names
    both = find_places(str(runs / "6-ppo"), str(runs / "5-dpo"))
    assert [(p.name, p.pipeline, p.test_share) for p in both] == [("ppo", "tiny", 0.5), ("dpo", "tiny", 0.5)]
    twice = find_places(str(runs / "5-dpo"), str(runs / "5-whole"))
    assert [p.name for p in twice] == [str(runs / "5-dpo"), str(runs / "5-whole")]
    assert [p.name for p in find_places(str(runs / "5-dpo" / "model"))] == ["base", "model"]
    assert [p.name for p in find_places(str(runs / "1-sft" / "model"))] == ["model"]


def test_sides_that_stand_on_one_base_share_it_and_are_themselves(runs: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(runs / "1-sft" / "model", dtype=torch.float32)
    want = {"sft": logits(base)}
    for name in ("dpo", "ppo"):
        fresh = AutoModelForCausalLM.from_pretrained(runs / "1-sft" / "model", dtype=torch.float32)
        folder = next(runs.glob(f"*-{name}")) / "model"
        want[name] = logits(PeftModel.from_pretrained(fresh, folder))
    assert not torch.allclose(want["sft"], want["dpo"], atol=1e-2)
    for given in (["5-dpo"], ["5-dpo", "6-ppo"], ["6-ppo", "1-sft"]):
        speakers = load_speakers(find_places(*(str(runs / run) for run in given)))
        assert speakers[0].model is speakers[1].model
        for _ in range(2):  # and again, after the other one has spoken
            for speaker in speakers:
                with speaker.speaking() as model:
                    torch.testing.assert_close(logits(model), want[speaker.name], atol=1e-5, rtol=1e-5)
    whole = load_speakers(find_places(str(runs / "5-whole")))
    assert whole[0].model is not whole[1].model


def test_models_of_other_tokenizers_talk_together(runs: Path, store: LabelStore, tmp_path: Path) -> None:
    """Each is asked in its own template and tokens."""
    other = make_tiny_model(tmp_path / "other", hidden=16, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(other)
    speakers = load_speakers(find_places(str(runs / "1-sft"), str(other)))
    assert [s.name for s in speakers] == ["sft", "other"]
    asked = [
        talked.tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) for talked in speakers
    ]
    assert asked == [
        "<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n",
        "user: What is rain?<|im_end|>",
    ]
    view = say(talk := Conversations(speakers, Sampling(4), store, "x"), talk.start(None), "Hi")
    assert len(view["turns"][0]["answers"]) == 2


def test_what_cannot_talk_is_refused(runs: Path, tmp_path: Path) -> None:
    reward = tmp_path / "reward-model"
    reward.mkdir()
    config = json.loads((runs / "1-sft" / "model" / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    told = {"base_model_name_or_path": str(runs / "1-sft" / "model"), "task_type": "SEQ_CLS"}
    (scorer / "adapter_config.json").write_text(json.dumps(told))
    begun = tmp_path / "5-dpo"
    with pytest.raises(RuntimeError), open_run("dpo", begun, {"seed": 0}, config_yaml="{}"):
        raise RuntimeError
    for run, words in (
        (runs / "4-reward", "stage reward, which holds no policy"),
        (begun, "has not finished"),
        (tmp_path / "a" / "b" / "none", "does not exist"),
        ("some/where/else", "does not exist"),
        (runs, "folder without config.json"),
        (reward, "is a reward model"),
        (scorer, "is a reward model"),
        ("nobody/nothing", "neither a folder with a model nor"),
    ):
        with pytest.raises(InputError, match=words):
            find_places(str(run))
    with pytest.raises(InputError, match="the same model"):
        find_places(str(runs / "5-dpo"), str(runs / "5-dpo" / "model"))


def test_the_page_is_for_this_machine_alone(runs: Path) -> None:
    for host in ("0.0.0.0", "192.168.0.1", "::"):
        with pytest.raises(InputError, match="localhost"):
            chat(str(runs / "5-dpo"), host=host)
    with pytest.raises(InputError, match="max-new-tokens is 0"):
        chat(str(runs / "5-dpo"), max_new_tokens=0)
    with pytest.raises(InputError, match="temperature"):
        chat(str(runs / "5-dpo"), temperature=-1.0)


# Answers


def test_an_answer_is_what_the_sampler_draws_and_is_heard_as_it_grows(
    pair: list[Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.speakers.REFRESH", 0.0)
    ids = pair[0].tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    for speaker in pair:
        heard: list[str] = []
        found = answer(speaker, ids, 24, 0.8, 11, heard.append)
        uniform = torch.rand((1, 24), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
        with speaker.speaking() as model:
            stops = stop_ids(model, speaker.tokenizer)
            (drawn,) = draw(model, [ids], max_new_tokens=24, stop_ids=stops, temperature=0.8, uniform_BT=uniform)
        assert found.text == speaker.tokenizer.decode(drawn.ids, skip_special_tokens=True).strip()
        assert len(heard) == len(drawn.ids) and len(set(heard)) > 5
        # Half a character may be hidden, never another one shown.
        assert all(found.text.startswith(text.rstrip()) for text in heard)
        assert found.note == ("" if drawn.finished else "Cut off after 24 tokens.")


def test_a_seed_gives_the_same_answers(pair: list[Speaker], store: LabelStore) -> None:
    told = []
    for seed in (1, 1, 2):
        talk = Conversations(pair, Sampling(8, seed=seed), store, "tiny")
        view = say(talk, say(talk, talk.start(None), "What is rain?"), "And salt?")
        told.append([[a["text"] for a in turn["answers"]] for turn in view["turns"]])
    assert told[0] == told[1] != told[2]


def test_every_side_goes_on_with_its_own_answers(
    talk: Conversations, pair: list[Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    seen = type(pair[0].tokenizer).apply_chat_template

    def watch(self: Any, messages: Any, **options: Any) -> Any:
        asked.append([message["content"] for message in messages])
        return seen(self, messages, **options)

    monkeypatch.setattr(type(pair[0].tokenizer), "apply_chat_template", watch)
    first = say(talk, talk.start(None), "One?")
    left, right = (a["text"] for a in first["turns"][0]["answers"])
    assert left != right
    say(talk, first, "Two?")
    assert asked == [["One?"], ["One?"], ["One?", left, "Two?"], ["One?", right, "Two?"]]


def test_messages_that_cannot_be_answered_change_nothing(talk: Conversations) -> None:
    view = say(talk, talk.start(None), "What is rain?")
    for text, reason in (("", "empty"), (" \n", "empty"), ("rain " * 2000, "long"), ("x" * 300_000, "long")):
        with pytest.raises(Refused) as error:
            say(talk, view, text)
        assert error.value.reason == reason
    with pytest.raises(Refused, match="not known"):
        say(talk, {"id": "other"}, "Hi")
    with pytest.raises(Refused, match="thrown away"):
        talk.say(view["id"], "Hi", lambda place, so_far: None, lambda: True)
    assert talk.view(view["id"]) == view
    assert len(say(talk, view, "Hi")["turns"]) == 2


def test_an_answer_ends_where_the_context_does(pair: list[Speaker], store: LabelStore) -> None:
    talk = Conversations(pair[:1], Sampling(10_000, 1.0, seed=0), store, "tiny")
    limit = pair[0].context()
    assert limit == 512
    # Nearly full: the answer is cut at the context's end, or ended by itself before.
    length = len(pair[0].tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"])
    found = talk._fitting(0, ASKED, 0)
    assert (len(found[0]), found[1]) == (length, limit - length)


def test_a_model_that_fails_is_told_and_the_message_is_not_lost(runs: Path, store: LabelStore) -> None:
    speakers = load_speakers(find_places(str(runs / "5-whole")))
    talk = Conversations(speakers, Sampling(4), store, "tiny", blind=True)
    view = talk.start(None)
    with torch.no_grad():
        speakers[1].model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Refused, match=r"The (left|right) model failed to answer \(the model's logits are not numbers"):
        say(talk, view, "Hi")
    assert talk.view(view["id"])["turns"] == [] and not talk._speaking.locked()


def test_closing_ends_an_answer(pair: list[Speaker], talk: Conversations) -> None:
    talk.close()
    with pytest.raises(Refused, match="Stopped"):
        say(talk, talk.start(None), "Hi")
    with pytest.raises(Stopped):
        answer(pair[0], [5, 6], 4, 1.0, 0, stopped=lambda: True)


# Votes


def voted(talk: Conversations, blind: bool, choice: str, *texts: str) -> dict[str, Any]:
    view = talk.start(blind)
    for text in texts:
        view = say(talk, view, text)
    return talk.vote(view["id"], choice, "k", 1.5)


@pytest.mark.parametrize("choice", ["left", "right"])
@pytest.mark.parametrize("blind", [False, True])
def test_a_vote_becomes_an_ordinary_preference(
    talk: Conversations, store: LabelStore, blind: bool, choice: str
) -> None:
    for question in ("What is rain?", "What is salt?", "Why paper?"):
        view = voted(talk, blind, choice, question)
        project = store.project("tiny-chat")
        assert not project.simulated and view["voted"] == choice
        won = view["turns"][0]["answers"][choice == "right"]["text"]
        item, event = store.items(project)[-1], store.labels(project)[-1]
        assert item.payload["blind"] is blind and item.payload["source"] == "chat"
        texts = [answer["text"] for answer in item.payload["answers"]]
        assert [texts[i] for i in event.body["order"]] == [a["text"] for a in view["turns"][0]["answers"]]
        assert event.body["seconds"] == 1.5 and event.annotator == talk.annotator
        names = {answer["text"]: answer["model"] for answer in item.payload["answers"]}
        assert view["names"] == [names[a["text"]] for a in view["turns"][0]["answers"]]
        found = preferences(store.votes(project), simulated=False).records
        (record,) = [r for r in found if r["prompt"][0]["content"] == question]
        assert record["chosen"] == [{"role": "assistant", "content": won}] and record["margin"] == 2
        assert record["split"] == split_of(record["prompt"], 0.5) and record["prompt"] == [
            {"role": "user", "content": question}
        ]
        seeds = [answer["sampling"]["seed"] for answer in item.payload["answers"]]
        assert len(set(seeds)) == 2 and item.payload["answers"][0]["sampling"]["max_new_tokens"] == 8


def test_a_tie_is_a_tie(talk: Conversations, store: LabelStore) -> None:
    voted(talk, False, "tie", "What is rain?")
    found = preferences(store.votes(store.project("tiny-chat")), simulated=False)
    assert not found.records and len(found.ties) == 1


def test_names_are_hidden_until_the_vote_and_sides_are_drawn(talk: Conversations) -> None:
    drawn = set()
    for _ in range(40):
        view = talk.start(True)
        assert view["names"] is None and "sft" not in json.dumps(view)
        drawn.add(tuple(talk._of(view["id"]).order))
    assert drawn == {(0, 1), (1, 0)}  # by chance not both: once in 2**39
    assert {tuple(talk.start(False)["names"]) for _ in range(20)} == {("sft", "dpo")}
    view = say(talk, talk.start(True), "What is rain?")
    assert view["names"] is None and "dpo" not in json.dumps(view)
    assert sorted(talk.vote(view["id"], "tie", "k", None)["names"]) == ["dpo", "sft"]


def test_a_vote_on_parted_conversations_is_no_preference_pair(talk: Conversations, store: LabelStore) -> None:
    """Two last answers to different conversations are no answers to one prompt: they are kept apart."""
    view = voted(talk, False, "left", "What is rain?", "And salt?")
    assert [p.name for p in store.projects()] == ["tiny-chat-dialogues"]
    (item,) = store.items(store.project("tiny-chat-dialogues"))
    assert item.payload["prompt"] == ASKED
    by_model = {answer["model"]: answer for answer in item.payload["answers"]}
    for place, name in enumerate(view["names"]):
        first, last = (turn["answers"][place]["text"] for turn in view["turns"])
        assert by_model[name]["text"] == f"{first}\n\n**user:** And salt?\n\n**assistant:** {last}"
        assert [m["content"] for m in by_model[name]["messages"]] == [first, "And salt?", last]


def test_conversations_that_have_not_parted_are_the_prompt(pair: list[Speaker], store: LabelStore) -> None:
    """Both said the same at first: the vote is on the last answers, and the prompt is all before them."""
    talk = Conversations(pair, Sampling(8, 1.0, seed=3), store, "tiny")
    view = say(talk, talk.start(False), "What is rain?")
    found = talk._of(view["id"])
    found.turns[0].answers = [Answer("Water.", True, "", 1), Answer("Water.", True, "", 2)]
    assert "same answer" in talk.view(view["id"])["unvotable"]
    with pytest.raises(Refused, match="same answer"):
        talk.vote(view["id"], "left", "k", None)
    say(talk, view, "And salt?")
    talk.vote(view["id"], "left", "k", None)
    (item,) = store.items(store.project("tiny-chat"))
    assert [m["content"] for m in item.payload["prompt"]] == ["What is rain?", "Water.", "And salt?"]


def test_a_vote_is_taken_once(talk: Conversations, store: LabelStore) -> None:
    view = say(talk, talk.start(False), "What is rain?")
    for _ in range(3):
        assert talk.vote(view["id"], "left", "k", 1.0)["voted"] == "left"
    with pytest.raises(Refused, match="has a vote"):
        talk.vote(view["id"], "right", "other", 1.0)
    assert len(store.events(store.project("tiny-chat"))) == 1
    with pytest.raises(Refused, match="ended with your vote"):
        say(talk, view, "More")
    with pytest.raises(Refused, match="no answer yet"):
        talk.vote(talk.start(False)["id"], "left", "k", 1.0)


def test_one_model_alone_has_no_votes(pair: list[Speaker], store: LabelStore) -> None:
    talk = Conversations(pair[:1], Sampling(4), store, "tiny", blind=True)
    view = say(talk, talk.start(True), "Hi")
    assert view["names"] == ["sft"] and view["sides"] == 1 and not view["blind"]
    with pytest.raises(Refused, match="alone"):
        talk.vote(view["id"], "left", "k", None)


def test_a_conversation_long_ago_is_forgotten(talk: Conversations) -> None:
    first = talk.start(False)["id"]
    views = [talk.start(False)["id"] for _ in range(100)]
    with pytest.raises(Refused, match="not known"):
        talk.view(first)
    assert talk.view(views[0])["id"] == views[0]


# The routes


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStore]:
    """The store behind the routes."""
    with LabelStore(tmp_path_factory.mktemp("routes") / "labels.sqlite", busy_seconds=0.2) as store:
        yield store


@pytest.fixture(scope="module")
def app(pair: list[Speaker], labels: LabelStore) -> Any:
    talk = Conversations(pair, Sampling(8, 1.0, seed=3), labels, "tiny", test_share=0.5)
    return create_chat_app(labels, Site([ORIGIN], local=True), talk, pages=False)


def client(app: Any) -> TestClient:
    return TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN}, follow_redirects=False)


@pytest.fixture(scope="module")
def browser(app: Any, labels: LabelStore) -> Iterator[TestClient]:
    with client(app) as browser:
        token = Accounts(labels).invite("admin")
        assert browser.post("/local", data={"token": token}).headers["location"] == "/label/"
        assert browser.get("/label/").headers["location"] == "/chat/"
        yield browser


def count(labels: LabelStore) -> int:
    """Votes so far."""
    return sum(labels.count_labels(project) for project in labels.projects())


def lines(response: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_question_and_a_vote_through_the_routes(browser: TestClient, labels: LabelStore) -> None:
    before = count(labels)
    view = browser.get("/api/chat/conversation").json()
    assert view["turns"] == [] and browser.get(f"/api/chat/conversation?id={view['id']}").json() == view
    *steps, last = lines(
        browser.post("/api/chat/say", json={"conversation": view["id"], "text": "**What** is `<rain>`?"})
    )
    assert [step["place"] for step in steps if step["blank"]][:2] == [0, 1] and {s["place"] for s in steps} == {0, 1}
    (turn,) = last["view"]["turns"]
    assert "<strong>What</strong>" in turn["message"]["html"] and "&lt;rain&gt;" in turn["message"]["html"]
    said = {"conversation": view["id"], "choice": "right", "key": "k", "seconds": 2.0}
    assert browser.post("/api/chat/vote", json=said).json()["voted"] == "right"
    assert count(labels) == before + 1
    assert browser.get(f"/api/chat/conversation?id={view['id']}").json()["voted"] == "right"
    assert browser.get("/api/chat/conversation?id=of-another-start").json()["turns"] == []


def test_what_is_wrong_is_said(browser: TestClient) -> None:
    name = browser.get("/api/chat/conversation").json()["id"]
    for text, reason in ((" ", "empty"), ("rain " * 2000, "long")):
        (told,) = lines(browser.post("/api/chat/say", json={"conversation": name, "text": text}))
        assert told["reason"] == reason and told["error"].endswith(".")
    for path, said in (
        ("say", {"conversation": name, "text": "a\0b"}),
        ("say", {"conversation": name, "text": 5}),
        ("say", {"text": "Hi"}),
        ("say", [1]),
        ("vote", {"conversation": name, "choice": "both", "key": "k"}),
        ("vote", {"conversation": name, "choice": "left"}),
    ):
        assert browser.post(f"/api/chat/{path}", json=said).status_code == 422, said
    half = browser.post("/api/chat/say", content=json.dumps({"conversation": name, "text": "\ud800"}))
    assert half.status_code == 422


def test_nobody_else_gets_in(app: Any, browser: TestClient) -> None:
    stranger = client(app)
    assert stranger.get("/api/chat/conversation").json()["reason"] == "login"
    for path in ("new", "say", "stop", "vote"):
        said = {"conversation": "x", "text": "Hi", "choice": "left", "key": "k"}
        assert stranger.post(f"/api/chat/{path}", json=said).json()["reason"] == "login"
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert browser.post(f"/api/chat/{path}", json=said, headers=headers).status_code == 403
    assert stranger.post("/local", data={"token": "guessed"}).status_code == 403


def test_a_locked_database_keeps_the_vote_for_later(browser: TestClient, labels: LabelStore) -> None:
    name, before = browser.get("/api/chat/conversation").json()["id"], count(labels)
    browser.post("/api/chat/say", json={"conversation": name, "text": "What is salt?"})
    said = {"conversation": name, "choice": "left", "key": "k", "seconds": None}
    with sqlite3.connect(labels.database.name, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        told = browser.post("/api/chat/vote", json=said)
        assert told.status_code == 503 and told.json()["reason"] == "database"
        assert browser.get(f"/api/chat/conversation?id={name}").json()["voted"] is None
        other.execute("ROLLBACK")
    assert browser.post("/api/chat/vote", json=said).json()["voted"] == "left"
    assert count(labels) == before + 1


# The program


def test_it_is_served_and_ends_while_an_answer_is_written(runs: Path, tmp_path: Path) -> None:
    import httpx

    where, heard = tmp_path / "votes.sqlite", threading.Event()
    ended: list[Any] = []

    def ask(visitor: httpx.Client, name: str) -> None:
        said = {"conversation": name, "text": "What is rain?"}
        with visitor.stream("POST", "/api/chat/say", json=said) as response:
            for line in response.iter_lines():
                heard.set()
                ended.append(json.loads(line))

    address, run = Address(port=free_port()), str(runs / "5-dpo")
    with serving(run, blind=True, store=str(where), address=address, sampling=Sampling(400, 1.0)) as link:
        origin, token = link.split("/local?token=")
        visitor = httpx.Client(base_url=origin, headers={"Origin": origin}, timeout=20)
        assert visitor.post("/local", data={"token": token}).status_code == 303
        assert visitor.post("/local", data={"token": token}).status_code == 403  # once
        view = visitor.get("/api/chat/conversation").json()
        assert view["blind"] and view["names"] is None
        asking = threading.Thread(target=ask, args=(visitor, view["id"]))
        asking.start()
        assert heard.wait(20)
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 5
    asking.join(10)
    assert ended[-1].get("reason") == "stopped" or "view" in ended[-1]
    with LabelStore(where) as store:
        assert store.projects() == []  # a talk without a vote leaves none


def test_the_default_store_lies_beside_the_run_folders(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _default_store(find_places(str(runs / "5-dpo"))) == str(runs.resolve() / "labels.sqlite")
    monkeypatch.chdir(tmp_path)
    assert _default_store(find_places(str(runs / "1-sft" / "model"))) == str(tmp_path / "labels.sqlite")
