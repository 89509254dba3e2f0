"""What is personal is marked; what only looks like it stays; hostile text costs no more than other text."""

from __future__ import annotations

import json
import pickle
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare.scrub import Found, luhn, scrub, scrubbed
from reward.records import Record, assistant_answer, user_prompt

ALL: tuple[Found, ...] = get_args(Found)

# The keys are put together here, so that no scanner takes this file for a leak.
TOKEN = "0123456789abcdefghijABCDEFGHIJ0123456789"
JWT = ".".join(["eyJ" + "hbGciOiJIUzI1NiJ9", "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0", "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9"])
PEM = "-----BEGIN {}PRIVATE KEY-----\nMIIEpAIBAAKCAQEA75sdf+/=\nwKBgQDk\n-----END {}PRIVATE KEY-----"

PERSONAL = {
    "email": [
        "jane@example.com",
        "Jane.Doe+lists@mail.example.co.uk",
        "müller@firma.de",
        "a_b%c@sub-domain.example.museum",
    ],
    "phone": [
        "+49 30 901820",
        "+49 (0)30 901820",
        "+14155552671",
        "+1-202-555-0143",
        "+33 6 12 34 56 78",
        "+91 98765 43210",
        "+86 138 0013 8000",
        "(202) 555-0143",
        "202-555-0143",
        "202.555.0143",
        "1-800-555-0199",
        "415 555 2671",
        "020 7946 0958",
        "(030) 901820",
        "06 12 34 56 78",
        "0171/1234567",
        "0044 20 7946 0958",
    ],
    "key": [
        "sk-abcdEFGH1234567890abcdEF",
        "sk-ant-api03-abcdefghijk1234567890",
        "sk" + "_live_" + TOKEN[:24],
        "ghp_" + TOKEN[:36],
        "github_pat_" + TOKEN,
        "glpat-" + TOKEN[:20],
        "AKIA" + "IOSFODNN7EXAMPLE",
        "xoxb-" + "123456789012-abcdefghij",
        "hf_" + TOKEN[:34],
        "AIza" + TOKEN[:35],
        "npm_" + TOKEN[:36],
        "SG." + TOKEN[:22] + "." + TOKEN,
        JWT,
        PEM.format("", ""),
        PEM.format("RSA ", "RSA "),
        "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj" * 2,
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111",
        "5500000000000004",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "3530111333300000",
    ],
    "ip": [
        "8.8.8.8",
        "192.168.1.1",
        "66.249.65.1",
        "2001:db8::ff00:42:8329",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
    ],
}
EXAMPLES = [(kind, text) for kind, texts in PERSONAL.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_what_is_personal_is_marked_wherever_it_stands(kind: Found, text: str) -> None:
    for before, after in [
        ("", ""),
        ("It is ", "."),
        ("(", ")"),
        ('"', '", he said'),
        ("看", "。"),
        ("a\n", "\nb"),
        ("x: ", ", y"),
    ]:
        assert scrubbed(before + text + after, ALL) == f"{before}<{kind}>{after}"


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_only_what_is_asked_for_is_marked(kind: Found, text: str) -> None:
    others = [each for each in ALL if each != kind]
    assert scrubbed(text, [kind]) == f"<{kind}>"
    assert f"<{kind}>" not in scrubbed(text, others)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Call me at 5551234567 or text 555-1234.", "Call me at <phone> or text <phone>."),
        ("Tel. 030-1234567, fax: 7654321", "Tel. <phone>, fax: <phone>"),
        ("http://66.249.65.1:8080/x", "http://<ip>:8080/x"),
        ("10.0.0.1 - - GET /", "<ip> - - GET /"),
        ("ping 8.8.8.8 8.8.4.4", "ping <ip> <ip>"),
        ("202-555-0143 202-555-0144 +4930901820 x", "<phone> <phone> <phone> x"),
        ("aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY", "aws_secret_access_key = <key>"),
        ("请联系zhang@x.com谢谢müller@x.de。", "请联系<email>谢谢<email>。"),
        ("<bob@x.org>", "<<email>>"),
        ("a@b.co,c@d.co", "<email>,<email>"),
    ],
)
def test_marks_in_their_place(text: str, wanted: str) -> None:
    assert scrubbed(text, ALL) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("version 1.2.3.4", "v1.2.3.4", "Release 10.0.0.1"),
        *("Chrome/1.2.3.4", "pkg==1.2.3.4", "pkg >= 1.2.3.4", "^1.2.3.4"),
        *("1.2.3.4 Overview", "section 1.2.3.4", "§ 1.2.3.4", "1.2.3.4.5"),
        *("256.1.1.1", "127.0.0.1", "0.0.0.0", "255.255.255.0"),
        *("2026-11-22 12:30:45", "22/11/2026", "22.11.2026 14:30"),
        *("12-11-2026 10 30", "01.02.2026", "2026-11-22T10:20:30Z"),
        *("call 2021-11-22", "Call on 22 11 2026", "text 2010-2020"),
        *("Call us on 24/7", "call 100 times", "call 1000000 times", "tel 20211122"),
        *("ISBN 978-3-16-148410-0", "ISBN 0-306-40615-2", "ISBN: 0306406152", "978-0-306-40615-7", "9781234567897"),
        *("$1,299.00", "1 299 000", "1,000,000", "10 000 000 000"),
        *("+10 000 000", "3.14159265358979", "0.123456789", "1e-10"),
        *("1234567890", "12345678901234567890", "10 20 30 40 50", "1 2 3 4 5 6 7 8 9", "01 02 03 04 05 06 07 08 09 10"),
        *("0 1 1 2 3 5 8 13 21 34", "05-06-07", "1995-1996-1997", "UTC+0100", "+5.5 %", "2^10 = 1024", "x+12345678"),
        *("4111 1111 1111 1112", "1609459200000", "0000-0002-1825-0097", "4111 1111 1111"),
        *("std::vector<int>", "A::B::C::D", "12:34:56", "aa:bb:cc:dd:ee:ff", "::1", "Ratio 1:2:3:4", "abc::def"),
        *("W @ x", "a@b.transpose()", "@user", "foo@bar", "react@18.2.0", "user@localhost"),
        *("sk-learn-is-a-library-for-machine-learning", "task-123", "ghp_short"),
        *("AKIA", "eyJ.eyJ.", "risk-0123456789012345678901"),
        *("-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----", "-----BEGIN PRIVATE KEY----- comes first"),
        *("<email> and <phone>", "lat 52.5200, 13.4050", "007", "It cost 0800 dollars"),
    ],
)  # fmt: skip
def test_what_only_looks_personal_stays(text: str) -> None:
    assert scrubbed(text, ALL) == text


PIECES = st.sampled_from([*(text for _, text in EXAMPLES), *"-+:/@.v(0a", "127", "call ", "12", "see", "<email>"])


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.lists(PIECES, max_size=8), st.sampled_from([", ", "\n", "; ", " or "]))
def test_a_second_run_finds_nothing_more(pieces: list[str], between: str) -> None:
    once = scrubbed(between.join(pieces), ALL)
    assert scrubbed(once, ALL) == once


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10**15), st.integers(0, 14), st.integers(1, 9))
def test_a_wrong_digit_is_no_card(number: int, place: int, change: int) -> None:
    """Luhn's rule finds every single wrong digit; exactly one check digit of ten is right."""
    body = f"{number:015d}"
    right = [digit for digit in "0123456789" if luhn(body + digit)]
    assert len(right) == 1
    wrong = body[:place] + str((int(body[place]) + change) % 10) + body[place + 1 :]
    assert not luhn(wrong + right[0])


def test_the_check_digit_by_hand() -> None:
    assert luhn("79927398713") and luhn("4111 1111 1111 1111") and not luhn("79927398710")


def test_all_turns_are_scrubbed_and_the_step_is_final() -> None:
    secret = "jane@example.com"
    record: Record = {
        "prompt": [*user_prompt(f"I am {secret}", system=f"You are {secret}"), *assistant_answer(f"Hi {secret}")],
        "chosen": assistant_answer(f"Write to {secret}."),
        "rejected": assistant_answer(f"No, {secret}."),
        "n": 1,
    }
    step = pickle.loads(pickle.dumps(scrub(["email"])))
    made = step.apply(record)
    assert step.private and isinstance(made, dict)
    assert secret not in json.dumps(made) and json.dumps(made).count("<email>") == 5
    clean: Record = {"prompt": user_prompt("Why?"), "completion": assistant_answer("So.")}
    assert step.apply(clean) is clean


HOSTILE = [
    *("a", "a.", "a@", "a@a.", "a-", "1", "1 ", "1.", "12."),
    *("12-", "1:", "ab:", "+1", "+1 2", "0 12", "0 12 ", "(202) ", "call ", "call 1"),
    *("4111 ", "4111-", "sk-", "sk-a"),
    *("eyJaaaaaaaaaaa.", "eyJ", "ghp_", "aws_secret_access_key ", "-----BEGIN PRIVATE KEY-----\n"),
    *("-", "tel", "SG.aaaaaaaaaaaaaaaaaaaaaaaaaa.", "1.1.1.1", "::", "\n", " "),
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_megabyte_of_hostile_text_takes_less_than_a_second(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    scrubbed(text, ALL)
    assert time.process_time() - start < 1
