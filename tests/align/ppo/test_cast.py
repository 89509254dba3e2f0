"""PPO's cast on tiny models: every role against the same model loaded plainly, and what may not be cast."""

from __future__ import annotations

import copy
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    OPTConfig,
    OPTForCausalLM,
)

from align.logprobs import Batch, Pair, collate
from align.ppo import maths
from align.ppo.cast import AdapterReward, Cast, PolicyWithValue, build_cast
from align.ppo.rewards import Episodes, ModelReward
from reward.records import InputError
from reward.scoring import score_rows

PROMPTS = [f"Tell me about rain, {'very ' * i}number {i}." for i in range(4)]
ANSWERS = [f" It is wet {'and cold ' * i}" for i in range(4)]


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[Pair]:
    return [(tokenizer(p).input_ids, tokenizer(a).input_ids) for p, a in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def batch(tokenizer: Any, pairs: list[Pair]) -> Batch:
    return collate(pairs, tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def episodes(pairs: list[Pair]) -> Episodes:
    ids = [list(column) for column in zip(*pairs, strict=True)]
    return Episodes(PROMPTS, ANSWERS, *ids, [False] * len(pairs), {"level": [3, 1, 2, 0]})


@pytest.fixture
def cast_of(base: Any, tokenizer: Any, vowels: Any, lora: Any) -> Callable[..., Cast]:
    def build(*rewards: Any, model: Any = None, **options: Any) -> Cast:
        torch.manual_seed(2)
        options = {"peft_config": lora()} | options
        return build_cast(copy.deepcopy(base) if model is None else model, rewards or [vowels], tokenizer, **options)

    return build


def rows_of(pairs: list[Pair]) -> list[list[int]]:
    return [prompt + answer for prompt, answer in pairs]


@torch.no_grad()
def plain_logits(model: Any, pairs: list[Pair]) -> list[Tensor]:
    """Logits TV before each answer token, by the model's own forward, a row at a time and without padding."""
    whole = [model(input_ids=torch.tensor([prompt + answer])).logits[0] for prompt, answer in pairs]
    return [logits[len(p) - 1 : len(p) + len(a) - 1].float() for logits, (p, a) in zip(whole, pairs, strict=True)]


def plain_logprobs(model: Any, pairs: list[Pair], temperature: float = 1.0) -> Tensor:
    """Of the answers, BT."""
    rows = zip(plain_logits(model, pairs), pairs, strict=True)
    found = [(x / temperature).log_softmax(-1).gather(1, torch.tensor(a)[:, None])[:, 0] for x, (_, a) in rows]
    return pad_sequence(found, batch_first=True)


def trained_names(cast: Cast) -> set[str]:
    return {name for name, parameter in cast.trained.named_parameters() if parameter.requires_grad}


# -- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "lora with a head of its own", "every weight", "every weight, shared"])
def test_the_reference_is_the_base_whatever_the_policy_became(
    kind: str, cast_of: Any, base: Any, lora: Any, stir: Any, reward_adapter: Any, batch: Batch, pairs: list[Pair],
    episodes: Episodes,
) -> None:  # fmt: skip
    config = lora(modules_to_save=["lm_head"] if "head" in kind else None) if "lora" in kind else None
    rewards = [str(reward_adapter())] if kind in ("lora", "every weight, shared") else []
    cast = cast_of(*rewards, peft_config=config)
    torch.testing.assert_close(cast.trained(batch)[0], plain_logprobs(base, pairs), atol=1e-5, rtol=0)
    stir(cast.trained.policy)
    cast.rewards(episodes)  # passes through the same weights where they are shared
    torch.testing.assert_close(cast.reference_logprobs(batch), plain_logprobs(base, pairs), atol=1e-5, rtol=0)
    assert (cast.trained(batch)[0] - cast.reference_logprobs(batch)).abs().max() > 0.1
    assert not any(p.requires_grad for n, p in cast.reference.named_parameters() if ".default" not in n)


def test_only_the_last_weights_are_a_full_policys_own(cast_of: Any) -> None:
    cast = cast_of(peft_config=None)
    assert all(parameter.requires_grad for parameter in cast.trained.parameters())
    assert cast.reference is not cast.trained.policy


@pytest.mark.parametrize("value_adapter", [False, True])
def test_only_policy_and_value_have_gradients_also_after_everyone_looked(
    value_adapter: bool, cast_of: Any, reward_adapter: Any, batch: Batch, episodes: Episodes
) -> None:
    cast = cast_of(str(reward_adapter()), value_adapter=value_adapter)
    before = trained_names(cast)
    cast.rewards(episodes)
    cast.look(batch)
    cast.reference_logprobs(batch)
    cast.trained(batch)
    assert trained_names(cast) == before
    adapters = {"default", "value"} if value_adapter else {"default"}
    assert {name.split(".")[-2] for name in before if "lora_" in name} == adapters
    assert {name for name in before if "lora_" not in name} == {"value_head.weight", "value_head.bias"}


def test_the_base_weights_are_held_once(cast_of: Any, base: Any, reward_adapter: Any) -> None:
    """With a reward adapter and a critic's own: what is not one of the three adapters is the base, to the weight."""
    cast = cast_of(str(reward_adapter()), value_adapter=True)
    held = {id(p): p for module in (cast.trained, cast.reference) for p in module.parameters()}.values()
    adapters = [p for n, p in cast.trained.policy.named_parameters() if "lora_" in n]
    head = sum(p.numel() for p in cast.trained.value_head.parameters())
    assert sum(p.numel() for p in held) == sum(p.numel() for p in [*base.parameters(), *adapters]) + head
    assert {n.split(".")[-2] for n, _ in cast.trained.named_parameters() if "lora_" in n} == {
        "default",
        "reward",
        "value",
    }


# -- what everyone says ----------------------------------------------------------------------------------------------


def test_looking_tells_what_plain_logits_tell(cast_of: Any, base: Any, stir: Any, batch: Batch, pairs: list) -> None:
    """Log-probabilities, entropy and the full KL at temperature 0.7, as sums over the vocabulary."""
    cast = cast_of(temperature=0.7)
    stir(cast.trained.policy)
    torch.nn.init.normal_(cast.trained.value_head.weight)
    views = cast.look(batch, with_full_kl=True)
    policy = copy.deepcopy(cast.trained.policy).merge_and_unload()
    p = pad_sequence([(row / 0.7).log_softmax(-1) for row in plain_logits(policy, pairs)], batch_first=True)
    q = pad_sequence([(row / 0.7).log_softmax(-1) for row in plain_logits(base, pairs)], batch_first=True)
    inside = batch.answer_BT
    torch.testing.assert_close(views.logprobs_BT, plain_logprobs(policy, pairs, 0.7), atol=1e-4, rtol=0)
    torch.testing.assert_close(views.ref_logprobs_BT, plain_logprobs(base, pairs, 0.7), atol=1e-4, rtol=0)
    torch.testing.assert_close(views.entropy_BT, -(p.exp() * p).sum(-1) * inside, atol=1e-4, rtol=0)
    torch.testing.assert_close(views.kl_BT, (p.exp() * (p - q)).sum(-1) * inside, atol=1e-4, rtol=0)
    assert views.kl_BT.sum() > 1
    trained = cast.trained(batch, with_entropy=True)
    for mine, theirs in zip(trained[:3], (views.logprobs_BT, views.value_BT, views.entropy_BT), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value_adapter", [False, True])
def test_the_value_is_the_head_on_the_state_before_the_token(
    value_adapter: bool, cast_of: Any, stir: Any, batch: Batch, pairs: list[Pair]
) -> None:
    cast = cast_of(value_adapter=value_adapter)
    stir(cast.trained.policy)
    if value_adapter:
        stir(cast.trained.policy, "value", std=0.5)
    torch.nn.init.normal_(cast.trained.value_head.weight)
    critic = copy.deepcopy(cast.trained.policy)
    critic.set_adapter("value" if value_adapter else "default")
    wanted = []
    for prompt, answer in pairs:
        states = critic(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[-1][0]
        wanted.append(cast.trained.value_head(states[len(prompt) - 1 : -1])[:, 0])
    expected = pad_sequence(wanted, batch_first=True)
    torch.testing.assert_close(cast.trained(batch).value_BT, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(cast.look(batch).value_BT, expected, atol=1e-4, rtol=0)


def touched(cast: Cast, loss: Tensor) -> dict[str, Tensor]:
    cast.trained.zero_grad()
    loss.backward()
    gradients = {n: p.grad for n, p in cast.trained.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient.any()}


def test_a_critic_of_its_own_and_the_policy_do_not_touch_each_other(cast_of: Any, stir: Any, batch: Batch) -> None:
    cast = cast_of(value_adapter=True)
    for adapter in ("default", "value"):
        stir(cast.trained.policy, adapter)
    torch.nn.init.normal_(cast.trained.value_head.weight)
    of_value = touched(cast, cast.trained(batch).value_BT.square().sum())
    of_policy = touched(cast, cast.trained(batch).logprobs_BT.sum())
    assert {name.split(".")[-2] for name in of_value if "lora_" in name} == {"value"}
    assert {name.split(".")[-2] for name in of_policy} == {"default"}
    assert len(of_policy) == len(of_value) - 2 == 2 * 7 * 2  # lora_A and lora_B of 7 linear layers in 2 blocks


def test_a_shared_trunk_learns_from_both_unless_only_the_critic_trains(cast_of: Any, stir: Any, batch: Batch) -> None:
    cast = cast_of()
    stir(cast.trained.policy)
    torch.nn.init.normal_(cast.trained.value_head.weight)
    both = touched(cast, cast.trained(batch).value_BT.square().sum())
    alone = touched(cast, cast.trained(batch, critic_only=True).value_BT.square().sum())
    assert any("lora_" in name for name in both)
    assert set(alone) == {"value_head.weight", "value_head.bias"}
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, both[name], atol=0, rtol=0)


def test_demonstrations_are_their_summed_nats(cast_of: Any, stir: Any, batch: Batch, pairs: list[Pair]) -> None:
    """At temperature 1, whatever the sampler's is, and apart from the episodes."""
    cast = cast_of(temperature=0.7)
    stir(cast.trained.policy)
    demonstrations = [(prompt[:4], answer[:2]) for prompt, answer in pairs]
    policy = copy.deepcopy(cast.trained.policy).merge_and_unload()
    output = cast.trained(batch, collate(demonstrations, 0))
    assert float(output.ptx_nll) == pytest.approx(-float(plain_logprobs(policy, demonstrations).sum()), rel=1e-5)
    torch.testing.assert_close(output.logprobs_BT, cast.trained(batch).logprobs_BT)
    assert float(cast.trained(batch).ptx_nll) == 0


# -- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_weight", [False, True])
def test_an_adapter_scores_as_the_reward_model_loaded_plainly(
    every_weight: bool, cast_of: Any, stir: Any, loud_model: Path, reward_adapter: Any, tokenizer: Any,
    pairs: list[Pair], episodes: Episodes, lora: Any,
) -> None:  # fmt: skip
    """The policy's adapter does not leak into the reward, nor the dropout that the reward was trained with."""
    folder = reward_adapter()
    cast = cast_of(str(folder), peft_config=None if every_weight else lora(), batch_size=3)
    stir(cast.trained.policy)
    plain = AutoModelForSequenceClassification.from_pretrained(loud_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    expected = score_rows(PeftModel.from_pretrained(plain, folder), rows_of(pairs), tokenizer.pad_token_id)
    total, parts = cast.rewards(episodes)
    assert isinstance(cast.rewards.rewards[0], AdapterReward)
    assert total == parts["reward_model"] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1  # the test can tell rows apart


def test_an_adapter_and_a_function_with_a_column_make_one_score(
    cast_of: Any, reward_adapter: Any, episodes: Episodes
) -> None:
    def depth(prompts: list[str], completions: list[str], level: list[int]) -> list[float]:
        return [float(n) for n in level]

    folder = str(reward_adapter())
    (alone, _), (total, parts) = (
        cast_of(folder).rewards(episodes),
        cast_of(folder, depth, reward_weights=[0.5, -2.0]).rewards(episodes),
    )
    assert total == pytest.approx([0.5 * a - 2.0 * b for a, b in zip(alone, [3, 1, 2, 0], strict=True)], abs=1e-5)
    assert parts["depth"] == [3, 1, 2, 0] and parts["reward_model"] == pytest.approx(alone, abs=1e-5)


def test_a_copy_of_the_base_is_the_base_and_another_base_is_a_model_of_its_own(
    cast_of: Any, reward_adapter: Any, loud_model: Path, tiny_model: Path, tmp_path: Path, pairs: list[Pair],
    episodes: Episodes, tokenizer: Any,
) -> None:  # fmt: skip
    shutil.copytree(loud_model, tmp_path / "copy")
    copied, other = reward_adapter(tmp_path / "copy"), reward_adapter(tiny_model)
    cast = cast_of(str(copied), str(other))
    shared, own = cast.rewards.rewards
    assert isinstance(shared, AdapterReward) and isinstance(own, ModelReward)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    expected = score_rows(PeftModel.from_pretrained(plain, other), rows_of(pairs), tokenizer.pad_token_id)
    precise = ModelReward(own.model.float(), own.tokenizer, "precise")  # a CPU may hold the loaded one in bfloat16
    assert precise(episodes) == pytest.approx(expected, abs=0.05)
    assert max(expected) - min(expected) > 0.2


def test_an_encoder_with_its_own_tokenizer_reads_the_text(cast_of: Any, episodes: Episodes) -> None:
    signs = string.ascii_letters + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    own = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}, do_lower_case=False)
    torch.manual_seed(4)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = BertForSequenceClassification(BertConfig(vocab_size=len(own), num_labels=1, **size)).eval()
    torch.nn.init.normal_(bert.classifier.weight)
    total, parts = cast_of(bert, reward_tokenizers=[own]).rewards(episodes)
    for found, prompt, answer in zip(total, PROMPTS, ANSWERS, strict=True):
        assert found == pytest.approx(float(bert(**own(prompt, answer, return_tensors="pt")).logits), abs=1e-5)
    assert len(set(total)) == 4 and list(parts) == ["BertForSequenceClassification"]


def test_a_reward_adapter_of_another_tokenizer_is_refused(
    cast_of: Any, reward_adapter: Any, loud_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(reward_adapter(), tmp_path / "adapter")
    same = AutoTokenizer.from_pretrained(loud_model)
    same.save_pretrained(folder)
    cast_of(str(folder))
    same.add_tokens(["<|aside|>"])
    same.save_pretrained(folder)
    with pytest.raises(InputError, match=r"trained with another tokenizer: 393 tokens against 394\. Train it again"):
        cast_of(str(folder))


def test_a_reward_adapter_with_several_labels_or_weights_missing_is_refused(
    cast_of: Any, reward_adapter: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(InputError, match=r"has 3 labels: a reward model has one\."):
        cast_of(str(reward_adapter(labels=3)))
    folder = shutil.copytree(reward_adapter(), tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({n: w for n, w in weights.items() if "q_proj" not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit its base: 4 weights missing, 0 left over"):
        cast_of(str(folder))
    save_file({n: w for n, w in weights.items() if "score" not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"has no score head with one output \(0 found\)"):
        cast_of(str(folder))


def test_two_reward_adapters_cannot_share_the_base(cast_of: Any, reward_adapter: Any) -> None:
    folder = str(reward_adapter())
    with pytest.raises(InputError, match=r"is a second reward adapter on the policy's base: one can share it\."):
        cast_of(folder, folder)


def test_one_tokenizer_for_each_reward(cast_of: Any, vowels: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"there are 1 reward tokenizers for 2 rewards: give one for each\."):
        cast_of(vowels, vowels, reward_tokenizers=[tokenizer])


# -- policies --------------------------------------------------------------------------------------------------------


def test_an_adapted_model_goes_on_from_where_it_is(
    cast_of: Any, base: Any, lora: Any, stir: Any, batch: Batch, pairs: list[Pair], tmp_path: Path
) -> None:
    adapted = get_peft_model(copy.deepcopy(base), lora())
    stir(adapted)
    adapted.save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    cast = cast_of(model=policy, peft_config=None)
    torch.testing.assert_close(
        cast.trained(batch)[0], plain_logprobs(adapted.merge_and_unload(), pairs), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(cast.reference_logprobs(batch), plain_logprobs(base, pairs), atol=1e-4, rtol=0)
    assert any("lora_A.default" in name for name in trained_names(cast))


def frozen(base: Any, lora: Any) -> Any:
    model = get_peft_model(base, lora())
    return model.requires_grad_(False)


def loose(base: Any, lora: Any) -> Any:
    model = get_peft_model(base, lora())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


BAD_POLICIES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (frozen, {"peft_config": None}, r"adapter is frozen.*is_trainable=True"),
    (
        loose,
        {"peft_config": None},
        r"1 weights beside the policy's adapter would be trained \(.*model\.norm\.weight, \.\.\.\)",
    ),
    (lambda base, lora: get_peft_model(base, lora()), {}, "a PeftModel and a peft_config is given as well"),
    (
        lambda base, lora: get_peft_model(base, lora(), adapter_name="mine"),
        {"peft_config": None},
        r"active adapters are \['mine'\]: one, named 'default', is trained",
    ),
    (
        lambda base, lora: base,
        {"peft_config": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])},
        r"the policy's adapter is a IA3Config; PPO trains LoRA or every weight\.",
    ),
    (
        lambda base, lora: get_peft_model(base, IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        {"peft_config": None},
        r"the policy's adapter is a IA3Config; PPO trains LoRA or every weight\.",
    ),
    (lambda base, lora: base, {"peft_config": None, "value_adapter": True}, "but the policy has none"),
]


@pytest.mark.parametrize(("policy", "options", "message"), BAD_POLICIES)
def test_policies_that_would_learn_nothing_or_the_wrong_thing_are_refused(
    policy: Any, options: dict[str, Any], message: str, cast_of: Any, base: Any, lora: Any
) -> None:
    with pytest.raises(InputError, match=message):
        cast_of(model=policy(base, lora), **options)


def test_nobody_drops_out(cast_of: Any, lora: Any, tokenizer: Any, batch: Batch) -> None:
    """Neither modules, nor models that call the function: OPT keeps its share as a number, 0.1 by default."""
    torch.manual_seed(6)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    config = OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, **size)
    for options in ({"peft_config": None}, {"peft_config": LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)}):
        model = OPTForCausalLM(config).train()
        assert (model(batch.ids_BS).logits - model(batch.ids_BS).logits).abs().max() > 0.01
        cast = cast_of(model=model, value_adapter=options["peft_config"] is not None, **options)
        torch.nn.init.normal_(cast.trained.value_head.weight)
        cast.trained.train()
        for first, second in zip(cast.trained(batch), cast.trained(batch), strict=True):
            torch.testing.assert_close(first, second, atol=0, rtol=0)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "value adapter", "every weight"])
def test_saving_and_loading_gives_the_same_policy_and_value(
    kind: str, cast_of: Any, base: Any, lora: Any, stir: Any, batch: Batch, pairs: list[Pair], tmp_path: Path
) -> None:
    """Into another cast bit for bit, and into plain transformers and PEFT."""
    options = {"peft_config": lora() if kind != "every weight" else None, "value_adapter": kind == "value adapter"}
    cast, other = cast_of(**options), cast_of(**options)
    stir(cast.trained.policy)
    if kind == "value adapter":
        stir(cast.trained.policy, "value")
    torch.nn.init.normal_(cast.trained.value_head.weight)
    cast.trained.save(tmp_path)
    assert (cast.trained(batch)[0] - other.trained(batch)[0]).abs().max() > 0.1
    other.trained.load(tmp_path)
    for mine, theirs in zip(cast.trained(batch), other.trained(batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    if kind == "every weight":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    else:
        plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert list(plain.peft_config) == ["default"]
    torch.testing.assert_close(plain_logprobs(plain, pairs), cast.trained(batch)[0], atol=1e-4, rtol=0)


def test_the_critic_begins_without_an_opinion(base: Any, batch: Batch) -> None:
    assert not PolicyWithValue(base, 1.0)(batch).value_BT.any()


def test_tiles_change_nothing(cast_of: Any, stir: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is said nor the gradients, whether the logits of all positions exist at once or of three."""
    cast = cast_of()
    stir(cast.trained.policy)
    found = []
    for tile in (2048, 3):
        monkeypatch.setattr("align.logprobs.TILE", tile)
        output = cast.trained(batch, batch, with_entropy=True)
        loss = output.logprobs_BT.sum() + output.entropy_BT.sum() + output.ptx_nll + output.value_BT.sum()
        found.append((cast.look(batch, with_full_kl=True), touched(cast, loss)))
    (whole, gradients), (tiled, tiled_gradients) = found
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert gradients.keys() == tiled_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, tiled_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_the_full_kl_is_the_mean_of_k1_over_what_the_policy_says(cast_of: Any, stir: Any, pairs: list[Pair]) -> None:
    """By definition: the exact KL of a position is the expectation of log p - log q under p, token by token."""
    cast = cast_of()
    stir(cast.trained.policy)
    prompt = pairs[0][0]
    every = [(prompt, [token]) for token in range(cast.trained.config.vocab_size)]
    views = cast.look(collate(every, 0), with_full_kl=True)
    k1 = maths.kl_estimate(views.logprobs_BT, views.ref_logprobs_BT, torch.ones_like(views.value_BT).bool(), "k1")
    expectation = (views.logprobs_BT.double().exp() * k1).sum()
    assert views.logprobs_BT.double().exp().sum() == pytest.approx(1, abs=1e-5)
    assert float(views.kl_BT[0, 0]) == pytest.approx(float(expectation), rel=1e-3)
