"""The report stays true, inert and the same, whatever texts and gaps the run put into it."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from align.compare.model_card import model_card
from align.compare.report import render_html, terminal_table, write_report
from align.compare.statistics import mean_with_interval, verdict_sentence, win_rate

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></div></details><style>body{display:none}</style><iframe src='https://evil.example'></iframe>",
    "<!-- ]]> {{ 7 * 7 }} {% raw %} </title> <svg onload=alert(1)> &lt;b&gt;",
    "\u202eمرحبا بالعالم\u202c $x$ \\alpha",
    "long " * 20_000,
    "",
]
OURS = (
    "html head meta title style body header main section h1 h2 h3 h4 p strong em bdi div span small code "
    "table thead tbody tr th td figure figcaption svg g path defs use clippath rect text tspan "
    "details summary article dl dt dd ins form label input select optgroup option output script"
)


def estimate(mean, spread, n=74, seed=0):
    return mean_with_interval(np.random.default_rng(seed).normal(mean, spread, n)).record()


def wins(won, tied, lost):
    return win_rate([1] * won + [0.5] * tied + [0] * lost)


def make_report():
    """What a quickstart run with simulated labels writes; every text in it that others wrote is hostile."""
    judge, people = "simulated preference", "people"
    results = {
        "sft": {judge: wins(45, 6, 23), people: wins(20, 2, 18)},
        "dpo": {judge: wins(58, 4, 12), people: wins(27, 3, 10)},
        "ppo": {judge: wins(61, 2, 11)},
        "worse": {judge: wins(10, 2, 62), people: wins(3, 0, 37)},
    }
    models = [
        {
            "name": name,
            "path": f"runs/quickstart/{i}-{name}",
            "win_rate": {
                by: won.record() | {"p": 0.01, "p_adjusted": 0.03, "unjudged": 0}
                for by, won in results.get(name, {}).items()
            },
            "scores": {judge: estimate(reward, 0.9, seed=i)},
            "kl": None if kl is None else estimate(kl, 2.5, seed=i + 20),
            "kl_per_token": None if kl is None else estimate(kl / 50, 0.1, seed=i + 25),
            "entropy": estimate(2.1, 0.3, seed=i + 60),
            "ability": {"strength": reward + 0.8, "low": reward + 0.6, "high": reward + 1.0},
            "text": {
                "distinct_1": 0.4,
                "distinct_2": 0.8,
                "self_similarity": estimate(0.1, 0.02, seed=i + 50),
                "refusals": {"rate": 0.01, "low": 0.0, "high": 0.07, "n": 74},
                "empty": {"rate": 0.0, "low": 0.0, "high": 0.05, "n": 74},
                "bleu": None,
                "rouge_l": None,
                "references": 0,
            },
            "length": estimate(length, 30, seed=i + 30),
            "finished": finished,
            "perplexity": estimate(perplexity, 4, seed=i + 40),
        }
        for i, (name, reward, kl, length, finished, perplexity) in enumerate(
            [
                ("base", -0.8, None, 160, 0.31, 21),
                ("sft", 0.2, 0.0, 92, 0.95, 11.2),
                ("dpo", 1.1, 7.5, 118, 0.97, 11.9),
                ("ppo", 1.6, 14.2, 131, 1.0, 12.8),
                ("worse", -1.9, 31.0, 210, 0.5, 33.0),
            ]
        )
    ]
    del models[0]["win_rate"]
    return {
        "schema": 2,
        "pipeline": "quickstart",
        "notices": ["These labels are simulated: they show that the pipeline works, not what people prefer."],
        "reference": "sft",
        "length_unit": "tokens",
        "verdict": [
            "dpo, which wins most often, is better than base: preferred by the simulated preference on 81 % of 74 "
            "held-out prompts. Its price: 7.5 nats of KL per answer."
        ]
        + [verdict_sentence(name, "base", by_judge[judge], f"the {judge}") for name, by_judge in results.items()],
        "judges": [
            {
                "name": judge,
                "description": "A fixed rule that scores answers.",
                "independent": True,
                "agreement": {
                    "people": "people",
                    "share": {"rate": 0.8, "low": 0.7, "high": 0.87, "n": 90},
                    "kappa": 0.6,
                },
                "sentences": ["It prefers what people prefer on 80 % of 90 pairs (95 % interval 70–87 %)."],
            },
            {
                "name": people,
                "description": "Blind pairs in the labelling app, sides drawn at random.",
                "independent": True,
                "sentences": [],
            },
        ],
        "prompts": {"n": 74, "split": "test", "digest": "0f" * 32},
        "models": models,
        "examples": [
            {
                "prompt": prompt,
                "answers": [
                    {
                        "model": model["name"],
                        "text": NASTY[(i + j) % len(NASTY)],
                        "scores": {judge: 0.2 * j - 0.5, "<b>reward</b>": 1.25 * j},
                        "outcomes": {judge: [1.0, 0.5, 0.0][(i + j) % 3]} if j else {},
                    }
                    for j, model in enumerate(models)
                ],
            }
            for i, prompt in enumerate(["How do I boil an egg?", *NASTY])
        ],
        "lineage": [
            {
                "stage": "sft",
                "folder": "runs/quickstart/1-sft",
                "digest": "ab" * 32,
                "parents": [],
                "data": {"data/demonstrations.jsonl": "cd" * 32},
            },
            {
                "stage": "dpo",
                "folder": "runs/quickstart/5-dpo",
                "digest": "12" * 32,
                "parents": ["ab" * 32],
                "data": {},
            },
        ],
        "seeds": {"sft": 0, "bootstrap": 0},
        "versions": {"torch": "2.9.0", "align-rlhf": "0.1.0"},
        "settings": {"max_new_tokens": 256, "temperature": 0.7, "judges": [judge, people]},
    }


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._within = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._within.append(tag)

    def handle_endtag(self, tag):
        if tag in self._within:
            while self._within.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self._within):
            self.text += data


@pytest.fixture(scope="module")
def html():
    return render_html(make_report())


def test_nothing_in_the_page_can_act(html):
    ours = set(OURS.split())
    for tag, attributes in Page(html).tags:
        assert tag in ours
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action", "formaction", "srcdoc", "background", "poster", "ping"}
            if name in {"href", "xlink:href"}:
                assert tag == "use" and value.startswith("#")


def test_hostile_texts_are_shown_as_they_are(html):
    text = Page(html).text
    for nasty in NASTY:
        assert nasty in text
    assert "Empty answer." in text
    assert "<b>reward</b>" in text


def test_the_page_asks_nobody_for_anything(html):
    [script] = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "form-action 'none'; base-uri 'none'"
    )
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in Page(html).tags
    for tag, attributes in Page(html).tags:
        for name, value in attributes.items():
            assert name.startswith("xmlns") or not re.search(r"https?://", value or ""), (tag, name, value)
    [style] = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert "url(" not in style and "@import" not in style
    assert "<?xml" not in html and html.lower().count("<!doctype") == 1


def test_ids_are_unique_and_every_reference_resolves(html):
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"|aria-labelledby="([^"]+)"', html))
    assert {name for names in wanted for name in names if name} <= set(ids)


def test_plots_take_the_pages_colours(html):
    assert html.count('<svg role="img"') == 4
    assert "#010203" not in html and "#040506" not in html
    assert "currentColor" in html and "var(--plot-rule)" in html


def test_same_report_same_bytes(tmp_path):
    pages = [write_report(make_report(), tmp_path / name) for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert pages[0].with_suffix(".json").read_bytes() == pages[1].with_suffix(".json").read_bytes()


def test_json_round_trip(tmp_path):
    page = write_report(make_report(), tmp_path / "new" / "folder")
    assert page.name == "report.html"
    again = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert again == make_report()
    assert render_html(again) == page.read_text(encoding="utf-8")


def test_the_first_screen_says_notice_then_verdict_then_table(html):
    text = Page(html).text
    order = [
        "These labels are simulated",
        "dpo, which wins most often, is better than base: preferred by the simulated preference on 81\u00a0% of 74",
        "Win rate, simulated preference",
        "Gains and costs",
        "dpo is better than base: preferred on 81\u00a0% of 74 held-out prompts",
        "worse is worse than base",
        "What it cost",
        "Can the judges be believed?",
        "Answers side by side",
        "Method",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_a_notice_only_where_there_is_one(html):
    assert 'class="notice"' in html
    report = make_report()
    report["notices"] = []
    assert 'class="notice"' not in render_html(report)


def test_terminal_table():
    head, base, sft, dpo, *_ = terminal_table(make_report())
    assert head == [
        "Model",
        "Win rate, simulated preference",
        "Win rate, people",
        "Strength",
        "Score, simulated preference",
        "KL",
        "Answer length",
        "Finished",
        "Perplexity",
    ]
    assert base[:3] == ["base", "–", "–"] and base[5] == "–"
    assert dpo[1] == "81 % (71–88 %)"
    assert re.fullmatch(r"\d\.\d\d ± 0\.\d\d", dpo[5])
    assert len({len(row) for row in (head, base, sft, dpo)}) == 1


def test_a_missing_figure_is_a_dash_that_says_why_and_an_empty_column_is_left_out():
    report = make_report()
    for model in report["models"][1:]:
        model.update(scores={}, kl=None, kl_per_token=None, perplexity=None)
        model.pop("ability")
    report["models"][0].pop("ability")
    page = render_html(report)
    assert 'title="Not every answer has a score by simulated preference."' in page
    assert 'title="Not judged by people."' in page
    assert "nats per answer" not in page and "BLEU" not in page
    assert page.count('<svg role="img"') == 3  # win rate, length, and the base's perplexity are left


def test_one_prompt_and_nothing_to_compare():
    report = make_report()
    alone = report["models"][0]
    alone["length"] = mean_with_interval([-1234.5]).record()
    alone["kl"] = mean_with_interval([-0.001]).record()
    alone.pop("ability")
    report.update(models=[alone], verdict=[], examples=[], lineage=[], notices=[], judges=[])
    page = render_html(report)
    assert "No verdict: no model was compared with another." in page
    assert "Answers side by side" not in page
    assert terminal_table(report)[1][:2] == ["base", "0.00"]
    assert "−1,234" in terminal_table(report)[1][2]


def test_names_are_never_formulas_or_tags():
    report = make_report()
    report["models"][2]["name"] = "a$b$ <i>&"
    page = Page(render_html(report))
    assert page.text.count("a$b$ <i>&") >= 5  # tables and plots
    assert "i" not in {tag for tag, _ in page.tags}


def test_the_answers_know_what_they_may_be_filtered_by(html):
    shown = [attributes for tag, attributes in Page(html).tags if attributes.get("class") == "example"]
    options = {a["value"] for tag, a in Page(html).tags if tag == "option"} - {""}
    told = {word for attributes in shown for word in attributes["data-outcomes"].split()}
    assert len(shown) == 8 and told <= options
    # Model 1 of prompt 0 is tied by judge 0 (see make_report), and so on.
    assert shown[0]["data-outcomes"] == "1-0-tied 2-0-lost 3-0-won 4-0-tied"


def test_what_the_first_model_did_not_say_is_marked():
    report = make_report()
    report["examples"] = [
        {
            "prompt": "?",
            "answers": [
                {"model": "base", "text": "a fox <b>ran</b> home", "scores": {}},
                {"model": "dpo", "text": "a red fox <b>ran</b> home", "scores": {}, "outcomes": {"people": 0.0}},
                {"model": "ppo", "text": "nothing alike", "scores": {}},
            ],
        }
    ]
    page = render_html(report)
    assert re.search(r"a <ins>red ?</ins> ?fox &lt;b&gt;ran&lt;/b&gt; home", page)
    assert page.count("<ins>") == 2  # this one and the legend's: where all is new, nothing is marked
    assert '<dd class="worse">lost</dd>' in page


def test_over_optimisation_is_drawn_and_told():
    report = make_report()
    points = [
        {
            "name": f"update {step}",
            "step": step,
            "proxy": estimate(step / 10, 0.5, seed=step),
            "gold": estimate(-((step - 8) ** 2) / 50, 0.5, seed=step + 1),
            "kl": estimate(step, 0.5, seed=step + 2),
            "length": estimate(40, 4, seed=step + 3),
        }
        for step in (0, 4, 8, 12)
    ]
    report["overoptimisation"] = {
        "proxy_name": "the reward model",
        "gold_name": "the reader",
        "checkpoints": points,
        "parting": 2,
        "recommended": 2,
        "best_of_n": {"n": [1, 2, 4], "kl": [0.0, 0.19, 0.64], "proxy": [0.0, 0.2, 0.3], "gold": [0.0, 0.1, 0.1]},
        "sentences": ["From update 8 on the reward model still rises."],
    }
    page = render_html(report)
    assert page.count('<svg role="img"') == 5
    assert "From update 8 on the reward model still rises." in page
    for words in ("they part", "ship this", "the reader"):
        assert words in page
    assert "From update 8 on" in model_card(report)


def test_model_card():
    report = make_report()
    report["notices"].append("a | b <script>\n# c")
    text = model_card(report)
    assert "> **Note:** These labels are simulated" in text
    assert r"a \| b \<script\> \# c" in text
    assert "- dpo is better than base" in text
    assert "| dpo | 81 % (71–88 %) |" in text
    assert "It prefers what people prefer on 80 % of 90 pairs" in text
    assert "data/demonstrations.jsonl cdcdcdcdcdcd" in text
    tables = re.split(r"\n\n", text)
    for table in tables:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({re.sub(r"\\\|", "", line).count("|") for line in rows}) <= 1


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    other = copy.deepcopy(make_report()) | {"schema": 3}
    with pytest.raises(ValueError, match="schema 3"):
        write_report(other, tmp_path / "other")
    broken = make_report()
    broken["models"][0]["length"]["mean"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(broken, tmp_path)
    assert not list(tmp_path.iterdir())
