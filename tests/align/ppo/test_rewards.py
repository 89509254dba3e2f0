"""Rewards: functions written for TRL, reward models against plain transformers, mixtures by hand."""

from __future__ import annotations

import functools
import math
import shutil
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from align.data.render import answer_ids, prompt_ids
from align.ppo.rewards import Episodes, FunctionReward, Mixture, ModelReward, Reward, as_reward, same_tokenizer
from reward.records import InputError, assistant_answer, user_prompt

TEXTS = [("What is rain?", " Water from clouds."), ("Describe salt.", " White."), ("Why music?", " Joy. " * 9)]


def episodes_of(texts: list[tuple[str, str]] = TEXTS, chat: bool = False, **columns: list[Any]) -> Episodes:
    prompts: Any = [user_prompt(p, "Be kind." if len(p) > 12 else None) if chat else p for p, _ in texts]
    completions: Any = [assistant_answer(c) if chat else c for _, c in texts]
    ids = [list(range(len(c))) for _, c in texts]
    return Episodes(prompts, completions, [[7]] * len(texts), ids, [True] * len(texts), columns)


def many(count: int) -> Episodes:
    return episodes_of([("Say it.", f" {i}" * (i % 4 + 1)) for i in range(count)])


def stir(model: torch.nn.Module) -> Any:
    """Weights far from their small start, so that rows have scores far apart."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def untemplated(tiny_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def decoder(tiny_model: Path) -> Any:
    return stir(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1))


@pytest.fixture(scope="module")
def bert_tokenizer() -> Any:
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


@pytest.fixture
def bert(bert_tokenizer: Any) -> Any:
    return stir(BertForSequenceClassification(BertConfig(**sizes(bert_tokenizer, 96))))


def sizes(tokenizer: Any, places: int) -> dict[str, Any]:
    """Of a tiny encoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": places, "num_labels": 1}


def alone(model: Any, ids: list[int]) -> float:
    return float(model(input_ids=torch.tensor([ids])).logits.item())


# -- functions -------------------------------------------------------------------------------------------------------


def test_a_function_gets_what_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def length(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list:
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [float(len(ids)) for ids in completion_ids]

    reward, episodes = FunctionReward(length), episodes_of(level=[1, 2, 3])
    assert reward.name == "length"
    assert reward(episodes) == [len(c) for _, c in TEXTS]
    assert seen == {"prompts": episodes.prompts, "completions": episodes.completions, "level": [1, 2, 3]}


def test_the_same_function_climbs_in_trl(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    """TRL's own trainer calls the function and the column as we do: the oracle of the signature."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    calls: list[dict[str, Any]] = []

    def graded(prompts: Any, completions: Any, level: list[int], **kwargs: Any) -> list[float | None]:
        calls.append({"prompts": prompts, "completions": completions, "level": level, **kwargs})
        return [None if i % 2 else float(n) for i, n in enumerate(level)]

    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, report_to="none",
        max_completion_length=3, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": user_prompt("What is rain?"), "level": 3}] * 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    GRPOTrainer(model, graded, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    theirs = calls.pop()
    ids = theirs["completion_ids"]
    ours = Episodes(theirs["prompts"], theirs["completions"], ids, ids, [True] * 2, {"level": theirs["level"]})
    assert FunctionReward(graded)(ours) == [3.0, None]
    assert calls[0] == {name: theirs[name] for name in calls[0]}
    assert theirs.keys() - calls[0].keys() == {"trainer_state", "log_extra", "log_metric"}


class Scorer:
    def __call__(self, completions: list[str], weight: float = 2.0) -> list[float]:
        return [weight * len(c) for c in completions]


async def later(completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def only_by_place(prompts: list[str], answers: list[str], /) -> list[float]:
    return [float(len(a)) for a in answers]


LENGTHS = [float(len(c)) for _, c in TEXTS]


@pytest.mark.parametrize(
    ("function", "name", "wanted"),
    [
        (Scorer(), "Scorer", [2 * n for n in LENGTHS]),
        (functools.partial(Scorer(), weight=3.0), "Scorer", [3 * n for n in LENGTHS]),
        (later, "later", [1.0, 1.0, 1.0]),
        (lambda questions, answers: [len(a) for a in answers], "<lambda>", LENGTHS),
        (lambda q, a, level: [len(x) + n for x, n in zip(a, level, strict=True)], "<lambda>", None),
        (lambda *args: [len(a) for a in args[1]], "<lambda>", LENGTHS),
        (lambda level: level, "<lambda>", [10.0, 20.0, 30.0]),
    ],
)
def test_other_signatures(function: Any, name: str, wanted: list[float] | None) -> None:
    reward = FunctionReward(function)
    reward.check(["level"])
    wanted = wanted or [n + 10 * i for i, n in enumerate(LENGTHS, start=1)]
    assert (reward.name, reward(episodes_of(level=[10, 20, 30]))) == (name, wanted)


def test_positional_only_parameters_are_filled_by_place() -> None:
    with pytest.raises(InputError, match=r"`only_by_place` needs `answers`, but there is only"):
        FunctionReward(only_by_place).check([])  # one unknown name beside `prompts` could be anything
    assert FunctionReward(lambda q, a, /: [len(x) for x in a])(episodes_of()) == LENGTHS


def test_a_missing_column_is_named_before_anything_is_sampled() -> None:
    reward = FunctionReward(lambda completions, solution: [0.0])
    message = r"needs `solution`, but there is only `completion_ids`, `completions`, `level`, `prompts`: add the column"
    with pytest.raises(InputError, match=message):
        reward.check(["level"])
    with pytest.raises(InputError, match=message):
        Mixture([reward]).check(["level"])
    with pytest.raises(InputError, match="needs `solution`"):
        reward(episodes_of())
    reward.check(["solution"])


@pytest.mark.parametrize("returned", [(1, 2.5, None), [np.float32(1), np.int64(3), torch.tensor(0.5)]])
def test_good_returns_are_plain_floats(returned: Any) -> None:
    scores = FunctionReward(lambda completions: returned)(episodes_of())
    assert scores == [None if r is None else float(r) for r in returned]
    assert {type(score) for score in scores} <= {float, type(None)}


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_tensors_and_arrays_in_one_dimension_are_lists(kind: Any) -> None:
    assert FunctionReward(lambda completions: kind([1.0, 2.0, 3.0]))(episodes_of()) == [1, 2, 3]
    with pytest.raises(InputError, match=r"returned shape \(3, 1\) for 3 answers: \(3,\) is wanted"):
        FunctionReward(lambda completions: kind([[1.0], [2.0], [3.0]]))(episodes_of())
    with pytest.raises(InputError, match=r"returned True, a bool, at scores\[0\]"):
        FunctionReward(lambda completions: kind([True, False, True]))(episodes_of())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned None, a NoneType, for 3 answers: a list of numbers is wanted"),
        (1.0, r"returned 1\.0, a float, for 3 answers"),
        ("abc", r"returned 'abc', a str, for 3 answers"),
        ({"a": 1}, r"a dict, for 3 answers"),
        ((x for x in (1, 2, 3)), r"a generator, for 3 answers"),
        ([1.0, 2.0], r"returned 2 scores for 3 answers"),
        ([1.0, "good", 2.0], r"returned 'good', a str, at scores\[1\]"),
        ([1.0, 2.0, "x" * 99], r"returned 'x{12}\.\.\.x{13}', a str, at scores\[2\]"),
        ([1.0, True, 2.0], r"returned True, a bool, at scores\[1\]"),
        ([[1.0], 2.0, 3.0], r"returned \[1\.0\], a list, at scores\[0\]"),
        (
            [1.0, math.nan, math.inf],
            r"returned 2 of 3 scores that are NaN or infinite \(the first is nan at scores\[1\]",
        ),
        ([1.0, 0.0, -math.inf], r"returned 1 of 3 scores .*the first is -inf at scores\[2\]"),
    ],
)
def test_bad_returns_are_sentences(returned: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"the reward `<lambda>` .*{message}"):
        FunctionReward(lambda completions: returned)(episodes_of())


def test_what_a_function_raises_is_kept() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("solution")

    with pytest.raises(InputError, match="the reward `broken` raised KeyError on 3 answers: 'solution'") as caught:
        FunctionReward(broken)(episodes_of())
    assert isinstance(caught.value.__cause__, KeyError)


# -- mixtures --------------------------------------------------------------------------------------------------------


def constant(*scores: float | None) -> Reward:
    return FunctionReward(lambda completions: list(scores))


def test_a_mixture_by_hand() -> None:
    mixture = Mixture(
        [constant(1.0, 2.0, None), constant(10.0, None, -4.0), constant(0.0, 1.0, None)], [2.0, 0.5, -1.0]
    )
    total, parts = mixture(episodes_of())
    assert total == [2 * 1 + 0.5 * 10, 2 * 2 - 1, 0.5 * -4]
    assert mixture.names == ["<lambda>", "<lambda>_2", "<lambda>_3"] == list(parts)
    assert parts["<lambda>"][:2] == [1, 2] and math.isnan(parts["<lambda>"][2])
    assert math.isnan(parts["<lambda>_2"][1]) and parts["<lambda>_3"][:2] == [0, 1]


def test_weights_are_one_where_none_are_given() -> None:
    assert Mixture([constant(1.0, 2.0, 3.0), constant(0.5, 0.5, None)])(episodes_of())[0] == [1.5, 2.5, 3.0]


def test_names_stay_apart_also_where_one_looks_numbered() -> None:
    rewards = [constant(0.0) for _ in range(3)]
    for reward, name in zip(rewards, ["a", "a_2", "a"], strict=True):
        reward.name = name
    assert Mixture(rewards).names == ["a", "a_2", "a_3"]


def test_an_answer_without_any_reward_is_refused() -> None:
    mixture = Mixture([constant(1.0, None, None), constant(None, None, 1.0)])
    with pytest.raises(InputError, match=r"no reward applies to 1 of 3 answers \(the first is number 1 from 0\)"):
        mixture(episodes_of())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "there are 1 reward weights for 2 rewards"),
        ([1.0, 2.0, 3.0], "there are 3 reward weights for 2 rewards"),
        ([1.0, math.nan], "the weight of the reward `<lambda>` is nan"),
        ([math.inf, 1.0], "the weight of the reward `<lambda>` is inf"),
    ],
)
def test_bad_weights_are_sentences(weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture([constant(1.0), constant(2.0)], weights)
    with pytest.raises(InputError, match="there is no reward"):
        Mixture([])


def test_a_mixture_checks_rewards_it_does_not_know() -> None:
    class Own:
        name = "own"

        def __call__(self, episodes: Episodes) -> list[float | None]:
            return [math.nan] * len(episodes)

    with pytest.raises(InputError, match="the reward `own` returned 3 of 3 scores that are NaN"):
        Mixture([Own()])(episodes_of())


# -- reward models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_conversations_score_as_the_plain_forward_of_each(decoder: Any, tokenizer: Any, batch_size: int) -> None:
    texts = [*TEXTS, ("Tell me about paper. " * 8, "It is flat."), ("Why?", "")]
    episodes = episodes_of(texts, chat=True)
    wanted = []
    for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        wanted.append(alone(decoder, tokenizer(text.removesuffix("\n"))["input_ids"]))  # ends in the stop token
    decoder.train()  # dropout would be on
    scores = ModelReward(decoder, tokenizer, "judge", batch_size)(episodes)
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.1  # the test can tell rows apart


def test_conversations_have_the_tokens_that_reward_models_are_trained_on(decoder: Any, tokenizer: Any) -> None:
    episodes, reward = episodes_of(chat=True), ModelReward(decoder, tokenizer, "judge")
    for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
        wanted = prompt_ids(tokenizer, prompt) + answer_ids(tokenizer, prompt, completion)
        assert reward.row(prompt, completion)["input_ids"] == wanted


def test_a_template_without_stop_token_stands_whole(decoder: Any, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    row = ModelReward(decoder, tokenizer, "judge").row(user_prompt("Why?"), assistant_answer("So."))
    assert tokenizer.decode(row["input_ids"]) == "user: Why?\nassistant: So.\n"


def test_a_template_that_refuses_is_a_sentence(decoder: Any, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match="the chat template of the reward `judge` failed: System role not supported"):
        ModelReward(decoder, tokenizer, "judge")(episodes_of(chat=True))


def test_texts_are_put_in_a_row_with_the_stop_token(decoder: Any, tokenizer: Any) -> None:
    wanted = [alone(decoder, [*tokenizer(p + c)["input_ids"], tokenizer.eos_token_id]) for p, c in TEXTS]
    assert ModelReward(decoder, tokenizer, "judge")(episodes_of()) == pytest.approx(wanted, abs=1e-5)


def test_without_a_template_the_turns_stand_on_lines(decoder: Any, untemplated: Any) -> None:
    row = ModelReward(decoder, untemplated, "judge").row(user_prompt("Why?", "Be kind."), assistant_answer("So."))
    assert untemplated.decode(row["input_ids"]) == "Be kind.\nWhy?\nSo.<|im_end|>"


@pytest.mark.parametrize("configured", [None, 0, 2])
def test_a_tokenizer_without_padding_token(decoder: Any, untemplated: Any, configured: int | None) -> None:
    """Padding of any kind leaves each score where plain transformers reads it for that row alone."""
    untemplated.pad_token = None
    decoder.config.pad_token_id = configured
    episodes = many(9)
    wanted = [
        alone(decoder, [*untemplated(p + c)["input_ids"], 2])
        for p, c in zip(episodes.prompts, episodes.completions, strict=True)
    ]
    reward = ModelReward(decoder, untemplated, "judge", 4)
    for _ in range(2):  # the second call must not see what the first left behind
        assert reward(episodes) == pytest.approx(wanted, abs=1e-5)


def test_an_encoder_reads_pairs(bert: Any, bert_tokenizer: Any) -> None:
    for chat in (False, True):
        episodes = episodes_of(chat=chat)
        befores = [p if isinstance(p, str) else "\n".join(m["content"] for m in p) for p in episodes.prompts]
        pairs = [bert_tokenizer(b, c, return_tensors="pt") for b, (_, c) in zip(befores, TEXTS, strict=True)]
        assert all(pair["token_type_ids"].sum() > 0 for pair in pairs)
        wanted = [bert(**pair).logits.item() for pair in pairs]
        assert ModelReward(bert.train(), bert_tokenizer, "bert", 2)(episodes) == pytest.approx(wanted, abs=1e-5)
        assert max(wanted) - min(wanted) > 1e-3
        bert.eval()


def test_an_encoder_with_a_chat_template_of_its_own(bert: Any, bert_tokenizer: Any, tmp_path: Path) -> None:
    bert_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
    episodes = episodes_of(chat=True)
    wanted = []
    for prompt, completion in zip(episodes.prompts, episodes.completions, strict=True):
        text = "[CLS]" + "".join(m["content"] + "[SEP]" for m in [*prompt, *completion])
        wanted.append(alone(bert, tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert ModelReward(bert, tokenizer, "bert")(episodes) == pytest.approx(wanted, abs=1e-5)


def test_too_long_is_refused_with_the_numbers(decoder: Any, bert: Any, tokenizer: Any, bert_tokenizer: Any) -> None:
    long = episodes_of([("Hi.", "a"), ("Hi.", "?!" * 600)])
    tokens = len(tokenizer("Hi." + "?!" * 600)["input_ids"]) + 1
    message = rf"1 of 2 answers .* too long for the reward `judge`: the longest has {tokens} tokens, the limit is 512"
    with pytest.raises(InputError, match=message):
        ModelReward(decoder, tokenizer, "judge")(long)
    with pytest.raises(InputError, match=r"2 of 2 .* the limit is 3\."):
        ModelReward(decoder, tokenizer, "judge", max_length=3)(long)
    with pytest.raises(InputError, match="the reward `judge` has max_length 513, but the model takes 512 tokens"):
        ModelReward(decoder, tokenizer, "judge", max_length=513)
    assert ModelReward(bert, bert_tokenizer, "bert").max_length == 96  # the tokenizer's own limit is 1e30
    bert_tokenizer.model_max_length = 80
    try:
        assert ModelReward(bert, bert_tokenizer, "bert").max_length == 80
    finally:
        bert_tokenizer.model_max_length = int(1e30)


def test_roberta_loses_places_to_its_padding_token(bert_tokenizer: Any) -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**sizes(bert_tokenizer, 66), pad_token_id=1)).eval()
    reward = ModelReward(model, bert_tokenizer, "roberta")
    assert reward.max_length == 64
    alone(model, [5] * 64)
    with pytest.raises((IndexError, RuntimeError)):
        alone(model, [5] * 65)


def test_models_that_are_no_reward_models_are_refused(
    tiny_model: Path, tokenizer: Any, bert: Any, bert_tokenizer: Any
) -> None:
    three = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    with pytest.raises(InputError, match="the reward `judge` has 3 labels: a reward model has one"):
        ModelReward(three, tokenizer, "judge")
    with pytest.raises(
        InputError, match=rf"tokens up to {len(tokenizer) - 1}, but the model embeds {len(bert_tokenizer)}"
    ):
        ModelReward(bert, tokenizer, "judge")
    t5 = T5ForSequenceClassification(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, num_layers=1, num_labels=1)
    )
    with pytest.raises(InputError, match="is an encoder-decoder"):
        ModelReward(t5, tokenizer, "judge")


def test_a_score_that_is_not_finite_is_refused(decoder: Any, tokenizer: Any) -> None:
    decoder.score.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="the reward `judge` returned 3 of 3 scores that are NaN"):
        ModelReward(decoder, tokenizer, "judge")(episodes_of())


def test_scoring_leaves_no_graph_and_takes_no_answers(
    decoder: Any, bert: Any, tokenizer: Any, bert_tokenizer: Any
) -> None:
    for model, own in ((decoder, tokenizer), (bert, bert_tokenizer)):
        reward = ModelReward(model, own, "judge")
        assert reward(episodes_of([])) == []
        reward(episodes_of())
        assert all(p.grad is None for p in model.parameters()) and not model.training


# -- loading ---------------------------------------------------------------------------------------------------------


def adapter_folder(base: Path | str, folder: Path, labels: int = 1, **lora: Any) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    settings: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 4, "modules_to_save": ["score"]}
    adapted = get_peft_model(model, LoraConfig(**settings | {"target_modules": ["q_proj", "v_proj"]} | lora))
    stir_adapter(adapted)
    adapted.save_pretrained(folder)
    return folder


def stir_adapter(model: torch.nn.Module) -> None:
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def test_a_peft_folder_scores_as_plain_peft_does(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = adapter_folder(tiny_model, tmp_path / "reward" / "model")
    reward = ModelReward.load(str(folder), torch.float32, "cpu", 2)  # its tokenizer is the base's
    assert (reward.name, reward.batch_size) == ("reward", 2)
    plain = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1), folder
    ).eval()
    episodes = episodes_of(chat=True)
    rows = [reward.row(p, c)["input_ids"] for p, c in zip(episodes.prompts, episodes.completions, strict=True)]
    wanted = [alone(plain, row) for row in rows]
    assert reward(episodes) == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.01
    assert same_tokenizer(reward.tokenizer, tokenizer) is None


def test_a_peft_encoder_brings_its_classifier(bert: Any, bert_tokenizer: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path / "base")
    bert_tokenizer.save_pretrained(tmp_path / "base")
    folder = adapter_folder(
        tmp_path / "base", tmp_path / "judge", target_modules=["query"], modules_to_save=["classifier"]
    )
    reward = ModelReward.load(folder, torch.float32, "cpu")
    plain = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(tmp_path / "base"), folder).eval()
    wanted = [plain(**bert_tokenizer(p, c, return_tensors="pt")).logits.item() for p, c in TEXTS]
    assert (reward.name, reward(episodes_of())) == ("judge", pytest.approx(wanted, abs=1e-5))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_whole_model_is_loaded_with_its_tokenizer(
    kind: str, decoder: Any, bert: Any, tokenizer: Any, bert_tokenizer: Any, tmp_path: Path
) -> None:
    model, own = (decoder, tokenizer) if kind == "decoder" else (bert, bert_tokenizer)
    model.save_pretrained(tmp_path / "judge")
    with pytest.raises(InputError, match="judge has no tokenizer: save the one"):
        ModelReward.load(tmp_path / "judge")  # transformers makes an empty one up for BERT, without a word
    own.save_pretrained(tmp_path / "judge")
    reward = as_reward(str(tmp_path / "judge"), dtype=torch.float32, device="cpu", batch_size=2)
    assert reward.name == "judge"
    assert reward(episodes_of()) == pytest.approx(ModelReward(model, own, "x")(episodes_of()), abs=1e-5)


def test_a_random_head_is_never_used(tiny_model: Path, bert: Any, bert_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no trained score head \(score\.weight would be random\)"):
        ModelReward.load(tiny_model)
    bert.bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match=r"\(classifier\.bias, classifier\.weight would be random\)"):
        ModelReward.load(tmp_path / "bert")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM", r=2))
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match=r"policy has no trained score head \(score\.weight would be random\)"):
        ModelReward.load(tmp_path / "policy")


def test_several_labels_are_refused_with_the_shapes(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path / "three")
    message = r"is no reward model with one label: score\.weight is \({}, 32\), not \(1, 32\)"
    with pytest.raises(InputError, match=message.format(3)):
        ModelReward.load(tmp_path / "three")
    with pytest.raises(InputError, match=message.format(2)):
        ModelReward.load(adapter_folder(tiny_model, tmp_path / "two", labels=2))


def test_an_adapter_with_weights_missing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = adapter_folder(tiny_model, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "layers.1" not in name}, file)
    with pytest.raises(InputError, match=r"does not fit its base .*: 4 of its weights are missing"):
        ModelReward.load(folder)


@pytest.mark.parametrize("source", ["./none", "~/none", "/none/such", "runs/none/model", Path("none")])
def test_a_missing_folder_is_a_sentence(source: str | Path) -> None:
    with pytest.raises(InputError, match="does not exist: give a folder or a hub id"):
        ModelReward.load(source)


def test_what_cannot_be_loaded_is_a_sentence(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    for source in (tmp_path, "nobody/none-such"):
        with pytest.raises(InputError, match=r"cannot load the (reward )?model"):
            ModelReward.load(source)
    orphan = adapter_folder(shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "orphan")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"cannot load the (reward )?model"):
        ModelReward.load(orphan)


# -- what a user may give --------------------------------------------------------------------------------------------


def test_rewards_and_functions_are_told_apart(decoder: Any, tokenizer: Any) -> None:
    class Own:
        name = "own"

        def __call__(self, episodes: Episodes) -> list[float | None]:
            return [1.0] * len(episodes)

    class Named(Scorer):
        name = "a function of TRL's with a name"

    own, model = Own(), ModelReward(decoder, tokenizer, "judge")
    assert as_reward(own) is own and as_reward(model) is model
    assert as_reward(as_reward(later)).name == "later"
    assert isinstance(as_reward(Named()), FunctionReward)
    loaded = as_reward(decoder, tokenizer, batch_size=3, dtype=torch.float32)
    assert isinstance(loaded, ModelReward) and loaded.batch_size == 3 and loaded.name == "model"
    with pytest.raises(InputError, match="the reward model `model` comes without a tokenizer"):
        as_reward(decoder)
    with pytest.raises(InputError, match=r"3, a int, is no reward: give a function"):
        as_reward(3)
    with pytest.raises(InputError, match="is a class: give an instance"):
        as_reward(Scorer)


def test_a_function_is_imported_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards_x.py").write_text(
        "NUMBER = 3\ndef short(completions):\n    return [-len(c) for c in completions]\n"
    )
    (tmp_path / "broken_rewards_x.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    reward = as_reward("own_rewards_x:short")
    assert (reward.name, reward(episodes_of())) == ("short", [-n for n in LENGTHS])
    for path, message in {
        "no_such.module:f": "importing no_such.module raised ModuleNotFoundError: No module named 'no_such'",
        "broken_rewards_x:f": "importing broken_rewards_x raised .* No module named 'no_such_library'",
        "own_rewards_x:none": r"there is no `none` in own_rewards_x: name one of its functions \(short\)",
        "own_rewards_x:NUMBER": r"`NUMBER` is a int in own_rewards_x: name one of its functions \(short\)",
        ":f": "importing  raised ValueError",
    }.items():
        with pytest.raises(InputError, match=message):
            as_reward(path)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizers_are_compared_by_what_they_do(tiny_model: Path, tokenizer: Any, bert_tokenizer: Any) -> None:
    def changed(**tokens: Any) -> Any:
        return AutoTokenizer.from_pretrained(tiny_model, **tokens)

    count = len(tokenizer)
    assert same_tokenizer(tokenizer, changed()) is None
    assert same_tokenizer(tokenizer, bert_tokenizer) == f"{count} tokens against {len(bert_tokenizer)}"
    assert same_tokenizer(tokenizer, changed(eos_token="<|im_start|>")) == "the stop token is 2 against 1"
    assert same_tokenizer(tokenizer, changed(pad_token="<|im_start|>")) == "the padding token is 0 against 1"
    first, second = changed(), changed()
    first.add_tokens(["<a>"])
    second.add_tokens(["<b>"])
    assert same_tokenizer(first, second) == f"the token '<a>' is {count} against None"
    from tokenizers import normalizers

    lower = changed()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    clause = same_tokenizer(tokenizer, lower)
    assert clause == f"'Hello' is {tokenizer('Hello')['input_ids']} against {tokenizer('hello')['input_ids']}"
