"""Languages are told apart in ten of them; what is hard to tell is kept."""

from __future__ import annotations

import pickle

import pytest

from align.data.prepare.language import TOO_SHORT, check_codes, language, other_language
from align.data.prepare.steps import Left
from reward.records import InputError, Record, assistant_answer, user_prompt

SENTENCES = {
    "en": [
        "The baker opens his shop at six every morning.",
        "Could you tell me how far it is to the station?",
        "Rain is expected in the north, but the south stays dry.",
        "My sister learnt to swim when she was four years old.",
    ],
    "de": [
        "Der Bäcker öffnet seinen Laden jeden Morgen um sechs.",
        "Können Sie mir sagen, wie weit es zum Bahnhof ist?",
        "Im Norden wird Regen erwartet, im Süden bleibt es trocken.",
        "Meine Schwester lernte schwimmen, als sie vier Jahre alt war.",
    ],
    "fr": [
        "Le boulanger ouvre son magasin tous les matins à six heures.",
        "Pourriez-vous me dire à quelle distance se trouve la gare ?",
        "On attend de la pluie au nord, mais le sud restera sec.",
        "Ma sœur a appris à nager quand elle avait quatre ans.",
    ],
    "es": [
        "El panadero abre su tienda todas las mañanas a las seis.",
        "¿Podría decirme a qué distancia está la estación?",
        "Se espera lluvia en el norte, pero el sur seguirá seco.",
        "Mi hermana aprendió a nadar cuando tenía cuatro años.",
    ],
    "it": [
        "Il fornaio apre il suo negozio ogni mattina alle sei.",
        "Potrebbe dirmi quanto dista la stazione?",
        "Al nord è prevista pioggia, ma il sud resterà asciutto.",
        "Mia sorella ha imparato a nuotare quando aveva quattro anni.",
    ],
    "pl": [
        "Piekarz otwiera swój sklep codziennie o szóstej rano.",
        "Czy może mi pan powiedzieć, jak daleko jest do dworca?",
        "Na północy spodziewany jest deszcz, ale na południu będzie sucho.",
        "Moja siostra nauczyła się pływać, kiedy miała cztery lata.",
    ],
    "ru": [
        "Пекарь открывает свою лавку каждое утро в шесть часов.",
        "Не могли бы вы сказать, далеко ли до вокзала?",
        "На севере ожидается дождь, а на юге останется сухо.",
        "Моя сестра научилась плавать, когда ей было четыре года.",
    ],
    "ar": [
        "يفتح الخباز متجره كل صباح في الساعة السادسة.",
        "هل يمكنك أن تخبرني كم تبعد المحطة؟",
        "من المتوقع هطول الأمطار في الشمال بينما يبقى الجنوب جافا.",
        "تعلمت أختي السباحة عندما كانت في الرابعة من عمرها.",
    ],
    "zh": [
        "面包师每天早上六点开店。",
        "请问到火车站有多远？",
        "预计北方有雨，南方仍然干燥。",
        "我妹妹四岁的时候学会了游泳。",
    ],
    "ja": [
        "パン屋さんは毎朝六時に店を開けます。",
        "駅までどのくらいあるか教えていただけますか。",
        "北部では雨が予想されますが、南部は晴れが続きます。",
        "妹は四歳のときに泳げるようになりました。",
    ],
}


def row(asked: str, answer: str) -> Record:
    return {"prompt": user_prompt(asked), "completion": assistant_answer(answer)}


def pieces(code: str, size: int) -> list[str]:
    """Runs of whole words, from every second word on, as short as they can be for so many bytes of letters."""
    found = []
    for text in SENTENCES[code]:
        words = list(text) if code in ("zh", "ja") else [word + " " for word in text.split(" ")]
        for start in range(0, len(words), 2):
            for end in range(start + 1, len(words) + 1):
                piece = "".join(words[start:end])
                if len("".join(filter(str.isalpha, piece)).encode()) >= size:
                    found.append(piece)
                    break
    return found


@pytest.mark.parametrize("code", SENTENCES)
def test_no_short_piece_is_left_out_of_its_own_language(code: str) -> None:
    short = pieces(code, TOO_SHORT)
    assert len(short) >= 4
    assert [piece for piece in short if other_language(piece, frozenset([code]))] == []


def test_pieces_in_other_languages_are_recognised() -> None:
    told = [
        bool(other_language(piece, frozenset([wanted])))
        for code in SENTENCES
        for piece in pieces(code, TOO_SHORT)
        for wanted in SENTENCES
        if wanted != code
    ]
    assert len(told) > 800 and sum(told) / len(told) > 0.9


def test_a_row_in_another_language_is_left_out_with_its_code() -> None:
    english, german = SENTENCES["en"], SENTENCES["de"]
    step = pickle.loads(pickle.dumps(language(["en"])))
    kept = row(english[1], english[0])
    assert step.apply(kept) is kept
    assert step.apply(row(german[1], german[0])) == Left("in another language", "de")
    pair: Record = {"prompt": user_prompt(german[1]), "chosen": assistant_answer(german[0]), "rejected": []}
    assert step.apply(pair) == Left("in another language", "de")
    assert language(["en", "de"]).apply(pair) is pair
    assert step.apply({"prompt": user_prompt(" ".join(SENTENCES["ru"]))}) == Left("in another language", "ru")


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("2 + 2", "4"),
        ("Ja?", "Nein."),  # too short
        ("Translate to French: the baker opens his shop.", "Le boulanger ouvre son magasin."),
        ("What is this?\n```\nfür jeden in der Liste, die wir haben, tue dies und das\n```", "A loop."),
        ("Where?", "https://de.wikipedia.org/wiki/Der_Bäcker_öffnet_seinen_Laden_jeden_Morgen_um_sechs"),
        ("Name four", "Lionel Messi, Cristiano Ronaldo, Zinedine Zidane, Diego Maradona"),
        ("The moves?", "e4 e5 Nf3 Nc6 Bb5 a6 Ba4 Nf6 O-O Be7 Re1 b5 Bb3 d6 c3 O-O h3 Nb8 d4 Nbd7"),
        ("?", "x = [1, 2, 3]; y = {k: v}; 0xdeadbeef 3.14159 #ff00aa " * 4),
    ],
)
def test_what_is_hard_to_tell_is_kept(asked: str, answer: str) -> None:
    record = row(asked, answer)
    assert language(["en"]).apply(record) is record


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("EN", "en"),
        ("en-GB", "en"),
        ("zh_Hans", "zh"),
        ("english", "en"),
        ("german", "de"),
        ("jp", "ja"),
        ("eng", "en"),
    ],
)
def test_an_unknown_code_is_refused_with_the_nearest(given: str, near: str) -> None:
    with pytest.raises(InputError, match=f"names '{given}', but .* did you mean '{near}'") as caught:
        language(["fr", given])
    assert str(caught.value).startswith("prepare.languages")


def test_a_word_that_is_near_nothing_gets_the_list() -> None:
    with pytest.raises(InputError, match=r"known are ace, af, .*, zu"):
        check_codes(["qqqqqqqq"])
