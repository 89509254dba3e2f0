"""Bad answers are found, and ordinary ones of every kind are let alone."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare.quality import CHECKS, Check, quality, repeated_lines, repeated_words, repeats
from align.data.prepare.steps import Left
from reward.records import Record, assistant_answer, user_prompt

ALL: list[Check] = [*CHECKS]

VERSE = "Down the {} road we wander, {} stars above the trees,\nwith a {} in our pockets and a {} in the breeze.\n"
REFRAIN = (
    "Oh the river, oh the river, take me home before the night,\n"
    "let the lanterns on the water be our one and only light.\n"
)
SONG = "".join(
    VERSE.format(*words.split()) + REFRAIN
    for words in ("long silver penny rumour", "dusty seven letter melody", "narrow frozen button whistle")
)

ORDINARY = {
    "a number": "42",
    "a name": "Paris",
    "a letter": "(b)",
    "no": "No",
    "without a full stop": "I think so, it was fun and you should go",
    "a chat": "Oh nice! I love it. See you there :)",
    "an emoji": "That is great news. I am happy for you. Well done. See you on Friday evening 😀",
    "a list": "Here are three fruits:\n\n- apples\n- pears\n- plums",
    "steps": "1. Wash the rice.\n2. Boil the water.\n3. Add the rice and wait for ten minutes.",
    "a list without stops": "1. Wash the rice in cold water\n2. Boil it in a large pot\n3. Wait until it is all gone",
    "a table": "| year | sales |\n|---|---|\n" + "".join(f"| {year} | 100 |\n" for year in range(1990, 2020)),
    "code": "```python\ndef f(x):\n    return [x,\n            x]\n```",
    "code and words": "Use `print(x`, which lacks a bracket:\n\n```py\nprint(x\n```\n\nThen add it",
    "bare code": "for i in range(10):\n    if i:\n        print(i)\n    else:\n        print(0)\nreturn x",
    "html": "<ul>\n" + "  <li class='item'><a href='#'>Item</a></li>\n" * 4 + "</ul>",
    "json": '[\n' + ",\n".join(f'  {{"id": {n}, "name": "row {n}", "tags": ["a", "b"]}}' for n in range(12)) + "\n]",
    "a poem": "The rain came down on roof and lane\nand washed the dust away,\nthe sparrows at the pane\nwere waiting",
    "a haiku": "An old silent pond\nA frog jumps into the pond\nSplash! Silence again",
    "a song": SONG,
    "a times table": "\n".join(f"{a} x {b} = {a * b}" for a in (2, 3, 4) for b in range(1, 11)),
    "counting": ", ".join(map(str, range(1, 101))),
    "laughter": "Ha ha ha ha ha! " * 3,
    "a friend's letter": "Dear Ann,\n\nThank you for the book. I read it. Good.\n\nWith love from all of us,\nBob",
    "a letter in one line": "Thank you for this. It helps us all. Yours sincerely, Ann Lee of the old town museum",
    "some stops": "1. Floss your teeth.\n2. Write plans.\n3. Meditate\n4. Hear a talk about what you like",
    "a sign-off": "Thank you for writing to us. We will look into it. Please wait a day.\n\nBest regards,",
    "a quotation": "He had much to say. He said it. It was late.\n\n— Mark Twain, in a letter to an old friend of his",
    "Chinese": "太阳很大。今天天气很好。我们去公园散步，然后回家。",
    "Japanese": "今日は天気がいいです。公園に行きましょう。お弁当も持って行きます。",
    "Thai": "วันนี้อากาศดีมาก เราไปสวนสาธารณะกันเถอะ",
    "Arabic": "الطقس جميل اليوم. هل نذهب إلى الحديقة؟ نعم، هيا بنا.",
    "German": "Der Film fängt um acht an",
    "a formula": "The roots are\n\n$$x = \\frac{-b \\pm \\sqrt{b^2 - 4ac}}{2a}$$",
    "an address": "It is all there. Read it. It helps. See https://example.org/a/long/path",
    "a heading last": "Some text. More of it. And more.\n\n## The end of it all as it was told to us",
    "a question back": "I can look that up. It takes a while. There are many. Which of them do you mean?",
    "of a mistake": "I'm sorry to hear that. A cold passes in a week. Drink tea and rest.",
    "of chat programs": 'Such programs say "As an AI language model, I cannot" when they decline to answer.',
    "of cookies": "Sites keep small files called cookies. Many say “We use cookies” in a banner at the bottom.",
    "of buttons": "Make the label short, say “Click here to subscribe”, and put it on top.",
    "vitamins": "The one you get from oranges is vitamin C and the one from carrots is vitamin A",
    "a preposition": "That is the sort of holiday which all of us look forward to",
    "an ornament": "So it ends.\n\n~~~\n\nThank you for reading this little story of mine to the end",
    "a face": "It did not work out. I tried. It rained. She was sad about it :(",
    "options": "It is (a), because b) and c) are both wrong",
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_answers_are_let_alone(name: str) -> None:
    answer = ORDINARY[name]
    assert {check: find(answer) for check, (_, find) in CHECKS.items()} == dict.fromkeys(CHECKS, "")


PASSAGE = (
    "The harbour was quiet that morning. Three boats had come in before dawn, and their crews were mending nets on the "
    "quay while gulls walked between them. An old woman sold bread from a basket, and nobody spoke."
)


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (f"{PASSAGE} {PASSAGE}", "50 % of its words"),
        (f"{PASSAGE}\n\n{PASSAGE}\n\n{PASSAGE}", "67 % of its words"),
        ("I do not know. " * 20, "95 % of its words"),
        ("no " * 50, "98 % of its words"),
        ("你好吗我很好谢谢你。" * 12, "92 % of its words"),
        ("a" * 100, "'a' 100 times and more in a row"),
    ],
)
def test_answers_that_repeat_themselves(answer: str, share: str) -> None:
    assert repeats(answer) == share


def test_lines_between_others_repeat_too() -> None:
    lines = [
        f"Say this one thing again\nand {word}"
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    ]
    assert repeats("\n".join(lines)) == "90 % of its lines"


def test_repeated_words_by_hand() -> None:
    words = [str(n) for n in range(20)]
    assert repeated_words(words * 2) == 20 / 40
    assert repeated_words(words + words[:10]) == 10 / 30
    assert repeated_words(words + words[:9]) == 0
    assert repeated_words(["a"] * 12) == 11 / 12  # runs begin again at the second word
    assert repeated_words([]) == 0


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_repeated_words_against_the_definition(words: list[str]) -> None:
    covered = set()
    for start in range(len(words) - 9):
        if any(words[start : start + 10] == words[i : i + 10] for i in range(start)):
            covered |= set(range(start, start + 10))
    assert repeated_words(words) == (len(covered) / len(words) if words else 0)
    # The look that is spared where there are many different words would have found nothing.
    assert len(set(words)) <= len(words) - len(covered)


def test_repeated_lines_by_hand() -> None:
    line, other = "x" * 20, "y" * 30
    assert repeated_lines(f"{line}\n  {line}\n{other}\nshort\nshort") == pytest.approx(20 / 70)
    assert repeated_lines("") == 0


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I don't have feelings, but here is a list: a, b, c.",
        "Good question. As an AI, I have no opinion on it.",
        "Click here to subscribe to our channel",
        "Read the news.\n\nSubscribe to our newsletter for more",
        "We use cookies to make this site better.",
        "Some words.\nCopyright © 2020 The Paper. All rights reserved.",
        "Lorem ipsum dolor sit amet, consectetur.",
        "Skip to main content\nThe news",
    ],
)
def test_boilerplate(answer: str) -> None:
    assert CHECKS["boilerplate"][1](answer)


def row(asked: str, answer: str) -> Record:
    return {"prompt": user_prompt(asked), "completion": assistant_answer(answer)}


def test_every_check_has_its_reason_and_only_those_asked_for_are_made() -> None:
    bad: dict[Check, str] = {
        "repetition": "I do not know. " * 20,
        "boilerplate": "We use cookies to make this site better.",
        "truncated": "```py\nx = [1,",
        "refusal": "I'm sorry, but I can't help with that.",
    }
    reasons = ["that repeats itself", "of boilerplate", "that breaks off", "that refuses"]
    for (check, answer), reason in zip(bad.items(), reasons, strict=True):
        record = row("Why?", answer)
        left = pickle.loads(pickle.dumps(quality([check]))).apply(record)
        assert isinstance(left, Left) and left.reason == reason and left.detail
        assert quality([each for each in ALL if each != check]).apply(record) is record


def test_the_chosen_answer_is_judged_and_not_the_rejected_one() -> None:
    bad, good = assistant_answer("I'm sorry, but I can't help with that."), assistant_answer("Yes.")
    prompt = {"prompt": user_prompt("Why?")}
    fine: Record = {**prompt, "chosen": good, "rejected": bad}
    assert quality(ALL).apply(fine) is fine
    assert isinstance(quality(ALL).apply({**prompt, "chosen": bad, "rejected": good}), Left)


def test_what_was_asked_for_is_no_fault() -> None:
    for asked, answer in [
        ("Repeat 'I do not know' 20 times.", "I do not know. " * 20),
        ("Write the text of a cookie banner.", "We use cookies to make this site better."),
    ]:
        wanted = row(asked, answer)
        assert quality(ALL).apply(wanted) is wanted
        assert isinstance(quality(ALL).apply(row("Why?", answer)), Left)


@pytest.mark.parametrize("check", ["repetition", "boilerplate", "truncated", "refusal"])
@pytest.mark.parametrize(
    "unit",
    [
        "a ",
        "\n",
        " \n",
        "(",
        "[",
        "a. ",
        "1. a\n",
        "- ",
        "```\n",
        "as a ",
        "copyright 2020 ",
        "a" * 99 + " ",
        "好",
        "|\n",
    ],
)
def test_hostile_text_takes_linear_time(check: Check, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    CHECKS[check][1](text)
    assert time.process_time() - start < 3
