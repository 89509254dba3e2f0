"""The label stage: people's labels from the store, an existing dataset, and what it refuses."""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from align import cli
from align.config import Config
from align.config_file import load_config
from align.label import collect, store_address
from align.pipeline import run_stage
from align.runs import read_info
from labeling_ui.accounts import Accounts
from labeling_ui.store import LabelStore
from reward.records import InputError, assistant_answer, read_jsonl, user_prompt
from tests.conftest import free_port


def comparison(number: int, split: str) -> dict[str, Any]:
    answers = [
        {"text": f"Kind answer {number}.", "model": "a", "sampling": {}},
        {"text": f"No {number}.", "model": "b"},
    ]
    return {"id": f"c{number}", "prompt": user_prompt(f"Question {number}?"), "split": split, "answers": answers}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A database in which two people judged four pairs: three for the first answer, one a tie."""
    path = tmp_path / "labels.sqlite"
    with LabelStore(path) as labels:
        project = labels.create_project("people")
        labels.add_items(project, [comparison(n, "test" if n == 3 else "train") for n in range(4)])
        for item in labels.items(project):
            for annotator in ("ana", "bo"):
                value = 4 if item.comparison_id == "c2" else 2
                key = f"{item.key} {annotator}"
                said = {"item_id": item.id, "annotator": annotator, "order": [0, 1], "value": value, "key": key}
                labels.record(project, said)
    return path


def people(tmp_path: Path, store: Path, *overrides: str) -> Config:
    path = tmp_path / "people.yaml"
    label = f"{{source: people, store: {store}, labels: 8, app: {{port: {free_port()}}}}}"
    path.write_text(f"stages: [label, reward]\nruns: {tmp_path / 'runs'}\nlabel: {label}\n")
    return load_config(path, overrides)


def test_people_become_preferences_with_their_names_and_strength(tmp_path: Path, store: Path) -> None:
    run = run_stage(people(tmp_path, store), "label")
    records = read_jsonl(run.folder / "preferences.jsonl")
    assert [(r["comparison_id"], r["split"]) for r in records] == [("c0", "train"), ("c1", "train"), ("c3", "test")]
    first = records[0]
    assert (first["chosen"], first["rejected"]) == (assistant_answer("Kind answer 0."), assistant_answer("No 0."))
    assert (first["margin"], first["weight"], first["annotators"]) == (2.0, 1.0, ["ana", "bo"])
    assert first["strengths"] == [2, 2]
    assert not any(record["simulated"] for record in records)
    assert [tie["comparison_id"] for tie in read_jsonl(run.folder / "ties.jsonl")] == ["c2"]
    info = read_info(run.folder)
    assert info is not None and not info["simulated_labels"] and info["summary"]["labels"] == 8


@pytest.mark.parametrize("method", ["majority", "dawid-skene", "bradley-terry"])
def test_the_config_says_how_labels_become_preferences(tmp_path: Path, store: Path, method: str) -> None:
    run = run_stage(people(tmp_path, store, f"label.aggregate={method}"), "label")
    assert [r["comparison_id"] for r in read_jsonl(run.folder / "preferences.jsonl")] == ["c0", "c1", "c3"]
    assert [r["comparison_id"] for r in read_jsonl(run.folder / "ties.jsonl")] == ["c2"]
    info = read_info(run.folder)
    assert info is not None and info["summary"]["aggregate"] == method
    known, doubtful = info["summary"].get("annotators"), info["summary"].get("uninformative")
    assert (known, doubtful) == ((None, None) if method == "majority" else (2, 0))


def test_a_new_label_is_another_input(tmp_path: Path, store: Path) -> None:
    config = people(tmp_path, store)
    run_stage(config, "label")
    assert run_stage(config, "label").finished
    with LabelStore(store) as labels:
        project = labels.project("people")
        item = labels.items(project)[0]
        said = {"item_id": item.id, "annotator": "cy", "order": [1, 0], "value": 1, "key": "late"}
        labels.record(project, said)
    with pytest.raises(InputError, match=r"labels: was 8, is 9"):
        run_stage(config, "label")
    run_stage(config, "label", force=True)
    assert store.is_file()


def test_too_few_labels_and_nothing_to_label_are_refused(tmp_path: Path, store: Path) -> None:
    with pytest.raises(InputError, match=r"has 8 labels, label\.min_labels wants 100"):
        run_stage(people(tmp_path, store, "label.min_labels=100", "label.finish=true"), "label")
    with pytest.raises(InputError, match="has nothing to label: run `align sample` before"):
        run_stage(people(tmp_path, tmp_path / "none.sqlite"), "label")


def test_the_stage_waits_for_people_and_goes_on(tmp_path: Path, store: Path) -> None:
    """It serves the app until the wanted label is in; what a person sends over HTTP ends the waiting."""
    config = people(tmp_path, store, "label.labels=9")
    with ThreadPoolExecutor(1) as pool:
        stage = pool.submit(run_stage, config, "label")
        with LabelStore(store) as labels:
            cookie, port = Accounts(labels).local("cy"), config.label.app.port
        origin = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                told = ask(port, "GET", "/api/next?project=people", cookie)
                break
            except OSError:
                time.sleep(0.1)
        assert not stage.done() and told["progress"]["given"] == 8
        body = {"project": "people", "lease": told["item"]["lease"], "key": "k", "value": 4}
        assert ask(port, "POST", "/api/label", cookie, body, origin)["saved"] == "k"
        run = stage.result(timeout=60)
    info = read_info(run.folder)
    assert info is not None and info["summary"]["labels"] == 9
    assert sum(1 for _ in (run.folder / "labels.csv").open()) == 10
    with pytest.raises(OSError):
        ask(port, "GET", "/login", cookie)  # the app ended with the waiting
    assert run_stage(config, "label").finished  # and a finished stage serves nothing


def test_closing_the_project_ends_the_waiting(tmp_path: Path, store: Path) -> None:
    with LabelStore(store) as labels:
        labels.close_project(labels.project("people"))
    info = read_info(run_stage(people(tmp_path, store, "label.labels=100"), "label").folder)
    assert info is not None and info["summary"]["labels"] == 8


def test_the_app_is_not_opened_to_others_in_clear_text(tmp_path: Path, store: Path) -> None:
    for override, message in (
        ("label.app.host=0.0.0.0", "clear text"),
        ("label.app.tls_key=key.pem", "come together"),
        ("label.app.url=http://label.example.org", None),
    ):
        config = people(tmp_path, store, "label.labels=12", override)
        if message is None:
            assert config.label.app.url == "http://label.example.org"
            continue
        with pytest.raises(InputError, match=message):
            run_stage(config, "label")


def ask(port: int, method: str, path: str, cookie: str, body: Any = None, origin: str | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Cookie": f"align_session={cookie}"} | ({"Origin": origin} if origin else {})
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


def test_simulated_labels_cannot_pass_for_peoples(tmp_path: Path) -> None:
    path = tmp_path / "simulated.sqlite"
    with LabelStore(path) as labels:
        labels.create_project("people", simulated=True)
    with pytest.raises(InputError, match="holds simulated labels"):
        run_stage(people(tmp_path, path), "label")


def test_a_dataset_becomes_preferences_and_what_is_left_out_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}.", "source": "x"} for n in range(30)]
    rows.append({"prompt": "Same?", "chosen": "It is.", "rejected": "It is."})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "dataset.yaml"
    path.write_text(f"runs: {tmp_path / 'runs'}\nlabel: {{source: dataset}}\ndata: {{preferences: pairs.jsonl}}\n")
    run = run_stage(load_config(path), "label")
    records = read_jsonl(run.folder / "preferences.jsonl")
    assert len(records) == 30 and {record["source"] for record in records} == {"x"}
    (dropped,) = read_jsonl(run.folder / "dropped.jsonl")
    assert dropped["reason"] == "with identical chosen and rejected" and dropped["record"]["prompt"] == "Same?"
    with pytest.raises(InputError, match=r"label\.aggregate is dawid-skene, but a dataset holds preferences"):
        run_stage(load_config(path, ["label.aggregate=dawid-skene"]), "label", force=True)


def test_uncertainty_orders_items_under_the_active_policy_alone(tmp_path: Path) -> None:
    path = tmp_path / "people.yaml"
    path.write_text(
        f"runs: {tmp_path / 'runs'}\nstages: [label]\nlabel: {{source: people, uncertain_by: some/model}}\n"
    )
    config = load_config(path)
    with LabelStore(store_address(config)) as store:
        store.add_items(store.create_project("people"), [comparison(0, "train")])
    with pytest.raises(InputError, match=r"orders the items under label\.policy: active, but the policy is random"):
        collect(config)


# align label CONFIG --import FILE

JSONL = {
    "own.jsonl": [comparison(n, "train") | {"id": f"own{n}"} for n in range(3)],
    "trl.jsonl": [{"prompt": f"T {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(3)],
    "argilla.jsonl": [
        {"id": f"a{n}", "fields": {"prompt": f"A {n}?", "response1": "Yes.", "response2": "No."}} for n in range(3)
    ],
    "studio.jsonl": [
        {"id": n, "data": {"prompt": f"L {n}?", "answer1": "Yes.", "answer2": "No."}, "annotations": []}
        for n in range(3)
    ],
}
TABLE = "prompt;answer_1;answer_2\nC 0?;Yes.;No.\nC 1?;Yes.;Yes.\nC 2?;Yes.;No.\n"


@pytest.fixture
def bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`align label CONFIG --import FILE` in this process: (exit code, stdout, stderr)."""
    config = tmp_path / "mine.yaml"
    label = f"label: {{store: {tmp_path / 'l.sqlite'}}}"
    config.write_text(f"stages: [label, reward]\nruns: {tmp_path / 'runs'}\n{label}\n")

    def call(file: Path, *overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["align", "label", str(config), "--import", str(file), *overrides])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("own.jsonl", "read as comparisons (JSONL)"),
        ("trl.jsonl", "read as preferences with prompt (JSONL)"),
        ("argilla.jsonl", "read as an Argilla export (JSONL)"),
        ("studio.jsonl", "read as a Label Studio export (JSONL); not used: annotations"),
        ("table.csv", "read as columns prompt, answer_1, answer_2 (CSV)"),
    ],
)
def test_a_file_is_imported_and_told(bring: Any, tmp_path: Path, name: str, form: str) -> None:
    file = tmp_path / name
    file.write_text(TABLE if name == "table.csv" else "".join(json.dumps(row) + "\n" for row in JSONL[name]), "utf-8")
    same = name == "table.csv"
    code, out, err = bring(file)
    assert (code, err) == (0, "")
    found, added = out.splitlines()
    assert found.startswith(f"{name}: 3 comparisons (") and found.endswith(f"{form}.")
    left_out = ", 1 left out because both answers are the same text" if same else ""
    where = f"Project mine in {tmp_path / 'l.sqlite'}:"
    assert added == f"{where} {3 - same} items added, 0 already there{left_out}."
    code, out, _ = bring(file)
    assert code == 0 and out.splitlines()[1] == f"{where} 0 items added, {3 - same} already there."
    with LabelStore(tmp_path / "l.sqlite") as labels:
        project = labels.project("mine")
        assert len(labels.items(project)) == 3 - same and not project.simulated
    assert not (tmp_path / "runs" / "mine" / "3-label").exists()  # nothing was served, waited for or exported


def test_imports_take_the_split_and_the_settings_of_the_config(bring: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"T {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = bring(tmp_path / "t.jsonl", "data.test_share=0.5", "label.project=other", "label.labels_per_item=2")
    assert code == 0 and "Project other in" in out
    with LabelStore(tmp_path / "l.sqlite") as labels:
        items = labels.items(labels.project("other"))
        assert labels.project("other").settings.overlap == 2
    assert 15 < sum(item.payload["split"] == "test" for item in items) < 45


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "none.jsonl does not exist: give the path of a JSONL, JSON or CSV file"),
        ("", "is empty: a JSONL, JSON or CSV file"),
        ('{"question": 1}\n', "the format cannot be told from the columns question: wanted are"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a", "answer_1": "b"}\n', "line 1: 1 answers, but at least 2"),
        ('{"\\u001b]0;owned\\u0007\\u202e\\rx": 1}\n', "the format cannot be told from the columns �]0;owned�� x:"),
    ],
)
def test_what_cannot_be_imported_is_told_in_a_sentence(
    bring: Any, tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "none.jsonl"
    if content is not None:
        file.write_text(content, "utf-8")
    code, out, err = bring(file)
    assert (code, out) == (2, "")
    assert err.startswith("align: ") and said in err and err.count("\n") == 1 and err.rstrip().endswith(".")
    assert not set("\x1b\x07\r\u202e") & set(err)
    assert not (tmp_path / "l.sqlite").exists()  # nothing was made for a file that cannot be read


def test_an_import_that_contradicts_the_project_changes_nothing(bring: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(comparison(0, "train")) + "\n")
    assert bring(file)[0] == 0
    file.write_text("".join(json.dumps(row) + "\n" for row in (comparison(7, "train"), comparison(0, "test"))))
    code, out, err = bring(file)
    assert (code, out) == (2, "") and "Comparison c0 " in err
    with LabelStore(tmp_path / "l.sqlite") as labels:
        assert len(labels.items(labels.project("mine"))) == 1
        labels.create_project("robots", simulated=True)
    code, _, err = bring(file, "label.project=robots")
    assert code == 2 and "project robots holds simulated labels" in err
