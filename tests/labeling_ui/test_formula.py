"""LaTeX as MathML: what models write is drawn, what would do more than draw is shown as it was written, and no formula
keeps the server busy."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest

from labeling_ui import formula
from labeling_ui.formula import mathml
from labeling_ui.render import MOST_MATH, answer_html
from tests.labeling_ui.payloads import LATEX


class Shape(HTMLParser):
    """The elements of a formula, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shape(source: str) -> Shape:
    found = mathml(source)
    assert found is not None, source
    return Shape(found)


# What models write


@pytest.mark.parametrize(
    ("source", "tags", "text"),
    [
        (r"\frac{1}{2}", ["mfrac", "mn", "mn"], "12"),
        (r"x^2 + y_1", ["msup", "mi", "mn", "mo", "msub", "mi", "mn"], "x2+y1"),
        (r"\sqrt{x}", ["msqrt", "mi"], "x"),
        (r"\sqrt[3]{x}", ["mroot", "mi", "mn"], "x3"),
        (r"\alpha \leq \beta", ["mi", "mo", "mi"], "α≤β"),
        (r"a \cdot b \times c", ["mi", "mo", "mi", "mo", "mi"], "a·b×c"),
        (r"x \in \mathbb{R}", ["mi", "mo", "mi"], "x∈ℝ"),
        (r"\text{if } x > 0", ["mtext", "mi", "mo", "mn"], "if\u00a0x>0"),
        (r"\boxed{42}", ["mrow", "mn"], "42"),
    ],
)
def test_the_shape_is_that_of_the_formula(source: str, tags: list[str], text: str) -> None:
    found = shape(source)
    assert [tag for tag in found.tags if tag not in ("math", "mrow", "mstyle")] == [t for t in tags if t != "mrow"]
    assert found.text == text


COMMON = [
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}",
    r"\sum_{i=1}^{n} i = \frac{n(n+1)}{2}",
    r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}",
    r"\lim_{x \to 0} \frac{\sin x}{x} = 1",
    r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}",
    r"\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix}",
    r"f(x) = \begin{cases} 1 & x > 0 \\ 0 & \text{otherwise} \end{cases}",
    r"\begin{aligned} x &= 1 \\ y &= 2 \end{aligned}",
    r"\begin{align*} x &= 1 \\ y &= 2 \end{align*}",
    r"\left( \frac{a}{b} \right)^2",
    r"\left\{ x \mid x > 0 \right\}",
    r"P(A \mid B) = \frac{P(B \mid A) P(A)}{P(B)}",
    r"\nabla \cdot \mathbf{E} = \frac{\rho}{\varepsilon_0}",
    r"\mathcal{L}(\theta) = -\log \sigma(r_w - r_l)",
    r"\mathbb{E}_{x \sim p}[f(x)]",
    r"\hat{y} = \bar{x} + \vec{v} + \tilde{z} + \dot{q}",
    r"\overline{AB} \perp \underline{CD}",
    r"\angle ABC = 90^\circ",
    r"a \neq b \approx c \equiv d \pmod{7}",
    r"\binom{n}{k} = \frac{n!}{k!(n-k)!}",
    r"\operatorname{argmax}_\theta \ln p",
    r"A \cup B \subseteq C \cap D, \forall x \exists y",
    r"x_1, x_2, \ldots, x_n \quad \text{and} \quad \cdots",
    r"\boxed{x = 5}",
    r"|x| \geq \|v\|_2",
    r"\dfrac{dy}{dx} = \frac{\partial f}{\partial x}",
    r"f''(x) \Rightarrow g \iff h \to 0",
    r"\underbrace{a + b}_{n} + \overbrace{c}^{m}",
    r"\lfloor x \rfloor + \lceil y \rceil",
    r"50\% \text{ of } \$20",
]


@pytest.mark.parametrize("source", COMMON)
def test_what_models_write_is_drawn(source: str) -> None:
    found = shape(source)
    assert set(found.tags) <= formula.ATTRIBUTES.keys() and found.text.strip()
    assert "\\" not in found.text
    for written in (f"${source}$", f"$$\n{source}\n$$", rf"\({source}\)", rf"so \[{source}\] holds"):
        assert "<math" in answer_html(written), written


def test_a_box_bold_letters_and_sides_are_left_to_the_style_sheet() -> None:
    assert 'class="al-boxed"' in str(mathml(r"\boxed{42}"))
    aligned = str(mathml(r"\begin{array}{rl} x & y \end{array}"))
    assert 'class="al-right"' in aligned and 'class="al-left"' in aligned


# What is shown as it was written


@pytest.mark.parametrize(
    "source",
    [
        r"\href{https://a.example}{x}", r"\color{white}{x}", r"\style{color:red}{x}", r"\phantom{x}", r"\hphantom{x}",
        r"\vphantom{x}", r"\hspace{99em}x", r"\nosuchcommand", r"\htmlClass{a}{b}", r"\def\x{y}\x", r"\frac{1}",
        r"x_1_2", r"\left( x", r"\begin{matrix} x", r"\text{\href{a}{b}}", "", " ", "x" * (formula.LONGEST + 1),
        "{" * 60 + "x" + "}" * 60,
    ],
    ids=lambda source: source[:20],
)  # fmt: skip
def test_what_does_more_than_draw_or_cannot_be_read_is_no_formula(source: str) -> None:
    assert mathml(source) is None


def test_what_is_not_drawn_stays_as_it_was_written() -> None:
    for source in (r"\href{javascript:alert(1)}{x}", r"\color{white}{hidden}", r"\nosuchcommand{y}"):
        assert source in Shape(answer_html(f"a $${source}$$ b")).text


def test_spaces_are_never_negative() -> None:
    found = str(mathml(r"a \! \! \! b \, c \quad d"))
    assert "width=" in found and 'width="-' not in found


def test_no_attribute_leads_anywhere() -> None:
    names = set(formula.VALUES)
    assert not names & {"href", "xlink:href", "src", "style", "id", "actiontype", "background", "definitionurl"}
    for name, pattern in formula.VALUES.items():
        for wrong in ("javascript:alert(1)", "url(//evil.example)", "9999em", "-5em", "x", "", "true false"):
            assert pattern.fullmatch(wrong) is None, (name, wrong)


# Size and time


@pytest.mark.parametrize("text", LATEX.values(), ids=LATEX)
def test_hostile_latex_takes_no_time(text: str) -> None:
    source = text.strip("$")
    start = time.process_time()
    found = mathml(source[: formula.LONGEST])
    assert time.process_time() - start < 1
    assert found is None or len(found) < 60 * formula.LONGEST


PARTS = [
    "{", "}", "{}", "^", "_", "^{", "_1^2", "'", "&", r"\\", r"\left(", r"\right)", r"\sqrt", r"\sqrt{", r"\frac",
    r"\frac{1}{", r"\text{", r"\text{a}", r"\begin{matrix}", r"\end{matrix}", r"\begin{array}{", r"\over", r"\choose",
    r"\mathrm{", r"\limits", r"\genfrac", r"\sideset", r"\hspace{", r"\color{", r"\style{", r"\href{", r"\big",
    r"\overset{", "1", "1.", "-1", "-1 ", "%", "% ", "\\", r"\ ", "|", "<", r"\!", r"\displaystyle", r"\bf", r"\not",
    r"\operatorname{", r"\prime", r"\dots", "漢", "\u202e", "é", r"\substack{",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_longest_formula_of_anything_takes_no_time(part: str) -> None:
    start = time.process_time()
    found = mathml((part * formula.LONGEST)[: formula.LONGEST])
    assert time.process_time() - start < 2
    assert found is None or len(found) < 60 * formula.LONGEST


def test_of_many_formulas_the_last_are_shown_as_they_were_written() -> None:
    html = answer_html("$x$ " * 10_000)
    drawn, written = html.count("<math>"), html.count('<span class="math">$x$</span>')
    assert drawn + written == 10_000 and drawn == MOST_MATH // 11


def test_whatever_the_library_stumbles_over_is_no_fault_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RecursionError, IndexError, RuntimeError, AssertionError, StopIteration, ValueError):

        def fail(source: str, block: bool, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr(formula, "_converted", fail)
        assert mathml("x") is None
