"""The report stays true, inert and the same, whatever texts and gaps the run put into it."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from align.compare.report import markdown_summary, render_html, terminal_table, write_report
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
    "details summary article dl dt dd"
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
            "win_rate": {by: won.record() for by, won in results.get(name, {}).items()},
            "reward": estimate(reward, 0.9, seed=i),
            "preference": estimate(reward / 2 - 0.5, 0.4, seed=i + 10),
            "kl": None if kl is None else estimate(kl, 2.5, seed=i + 20),
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
        "schema": 1,
        "pipeline": "quickstart",
        "created": "2025-01-31T12:00:00Z",
        "notices": ["These labels are simulated: they show that the pipeline works, not what people prefer."],
        "verdict": [
            verdict_sentence(name, "base", by_judge[judge], f"the {judge}") for name, by_judge in results.items()
        ],
        "judges": [
            {"name": judge, "description": "A fixed rule that scores answers; shown each pair in both orders."},
            {"name": people, "description": "Blind pairs in the labeling UI, sides drawn at random."},
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
        if "style" not in self._within:
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
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
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
        "dpo is better than base: preferred on 81\u00a0% of 74 held-out prompts",
        "worse is worse than base",
        "Win rate, simulated preference",
        "Gains and costs",
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
    assert head[:3] == ["Model", "Win rate, simulated preference", "Win rate, people"]
    assert head[3:] == [
        "Reward",
        "Simulated preference",
        "KL to reference",
        "Answer length",
        "Finished",
        "Perplexity",
    ]
    assert base[:3] == ["base", "–", "–"] and base[5] == "–"
    assert dpo[1] == "81 % (71–88 %)"
    assert re.fullmatch(r"\d\.\d\d ± 0\.\d\d", dpo[5])
    assert len({len(row) for row in (head, base, sft, dpo)}) == 1


def test_a_missing_figure_is_a_dash_that_says_why():
    report = make_report()
    for model in report["models"]:
        model.update(reward=None, preference=None, kl=None, perplexity=None)
    page = render_html(report)
    assert 'title="No reward model scored these answers."' in page
    assert 'title="KL to the SFT reference is not defined for this model."' in page
    assert 'title="Not judged by people."' in page
    assert "Simulated preference" not in terminal_table(report)[0]
    assert page.count('<svg role="img"') == 2  # win rate and length are left


def test_one_prompt_and_nothing_to_compare():
    report = make_report()
    alone = report["models"][0]
    alone["length"] = mean_with_interval([-1234.5]).record()
    alone["reward"] = alone["kl"] = mean_with_interval([-0.001]).record()
    report.update(models=[alone], verdict=[], examples=[], lineage=[], notices=[], judges=[])
    page = render_html(report)
    assert "No verdict: no model was compared with the base." in page
    assert "Answers side by side" not in page
    assert terminal_table(report)[1][:2] == ["base", "0.00"]
    assert "−1,234" in terminal_table(report)[1][4]


def test_names_are_never_formulas_or_tags():
    report = make_report()
    report["models"][2]["name"] = "a$b$ <i>&"
    page = Page(render_html(report))
    assert page.text.count("a$b$ <i>&") >= 5  # table and four plots
    assert "i" not in {tag for tag, _ in page.tags}


def test_markdown_summary():
    report = make_report()
    report["notices"].append("a | b <script>\n# c")
    text = markdown_summary(report)
    assert "> **Note:** These labels are simulated" in text
    assert r"a \| b \<script\> \# c" in text
    assert "- dpo is better than base" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert len({line.count("|") for line in rows}) == 1
    assert "| dpo | 81 % (71–88 %) |" in text


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    other = copy.deepcopy(make_report()) | {"schema": 2}
    with pytest.raises(ValueError, match="schema 2"):
        write_report(other, tmp_path / "other")
    broken = make_report()
    broken["models"][0]["reward"]["mean"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_report(broken, tmp_path)
    assert not list(tmp_path.iterdir())
