"""Quantised bases: in few bits, with the SFT adapter below what is trained on them, and loaded as they were held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from align import models, quantised
from align.config import QuantizationSection
from align.config_file import load_config
from align.decode import draw
from align.logprobs import answer_logprobs, base_model
from align.lora import folded, lean_lora
from align.prefix import share_prefixes
from align.reference import weights_digest
from align.stepper import supported
from reward.records import InputError
from tests.quantising import EIGHT, FOUR, IDS, below_of, logits, plain_settings, section

pytest.importorskip("bitsandbytes")

PAIRS = [([5, 9, 40], [77, 12, 3]), ([5, 9, 40], [101, 50]), ([7], [30, 200, 150, 90])]


def randomise(model: Any, seed: int, std: float = 0.2) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Path:
    return tiny_model


def adapter_on(base: Path, folder: Path, quantization: QuantizationSection = FOUR, **config: Any) -> Path:
    """An adapter far from zero on the quantised base, saved by PEFT."""
    keys = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(models.load_causal_lm(str(base), section(quantization)), LoraConfig(**keys))
    randomise(model, 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("sft") / "model")


# -- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "model:\n  quantization: {load_in_4bit: true, load_in_8bit: true}\n",
            "line 2: in `model.quantization`, load_in_4bit and load_in_8bit are both true: set one of them.",
        ),
        (
            "model:\n  quantization:\n    bnb_4bit_quant_type: nf4\n",
            "neither load_in_4bit nor load_in_8bit is true: set one of them, or leave `quantization` out.",
        ),
        (
            "model:\n  quantization:\n    load_in_4bit: true\n    bnb_4bit_quant_typ: nf4\n",
            "line 4: in `model.quantization`, unknown key `bnb_4bit_quant_typ`: did you mean `bnb_4bit_quant_type`?",
        ),
        (
            "model:\n  quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf5}\n",
            "but one of 'nf4' or 'fp4' is wanted.",
        ),
        (
            "model:\n  quantization:\n    load_in_8bit: true\n    bnb_4bit_quant_type: fp4\n",
            "line 4: in `model.quantization`, `bnb_4bit_quant_type` has no effect with load_in_8bit: leave it out.",
        ),
        (
            "model:\n  quantization: {load_in_4bit: true, llm_int8_threshold: 3}\n",
            "`llm_int8_threshold` has no effect with load_in_4bit: leave it out.",
        ),
        (
            "dpo:\n  adapter: null\nmodel:\n  quantization: {load_in_4bit: true}\n",
            "line 2: `dpo.adapter` is null, which trains every weight, but the weights under model.quantization cannot "
            "be trained: leave dpo.adapter out, or model.quantization.",
        ),
    ],
)
def test_settings_are_refused_with_their_line(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refusal:
        load_config(file)
    assert wanted in str(refusal.value) and str(file) in str(refusal.value)


def test_what_is_not_trained_on_the_quantised_base_may_be_trained_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {quantization: {load_in_4bit: true}}\nstages: [sft, label, reward, ppo]\n")
    load_config(file, ["dpo.adapter=null"])  # not a stage of this pipeline
    load_config(file, ["reward.adapter=null", "reward.base=some/encoder"])  # another base, which is not quantised
    with pytest.raises(InputError, match=r"reward\.adapter"):
        load_config(file, ["reward.adapter=null"])


def test_without_bitsandbytes_the_way_to_get_it_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'align-rlhf\\[quantised\\]'"):
        models.load_causal_lm(str(base), section())


def test_zero3_is_refused_before_anything_is_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import integrations

    monkeypatch.setattr(integrations, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(InputError, match=r"ZeRO-1 or ZeRO-2"):
        models.load_causal_lm(str(base), section())


# -- one frozen model out of base and SFT adapter ----------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "dtype", "share"), [(FOUR, torch.uint8, 0.16), (EIGHT, torch.int8, 0.28)])
def test_the_base_is_held_in_few_bits(
    base: Path, quantization: QuantizationSection, dtype: torch.dtype, share: float
) -> None:
    whole = models.load_causal_lm(str(base), section(None))
    model = models.load_causal_lm(str(base), section(quantization))
    held = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)][:-1]  # the head is last
    assert len(held) == 14 and {weight.dtype for weight in held} == {dtype}
    sizes = [sum(p.numel() * p.element_size() for p in m.model.layers.parameters()) for m in (model, whole)]
    assert sizes[0] < share * sizes[1]
    assert 0 < (logits(model) - logits(whole)).norm() < 0.2 * logits(whole).norm()


@pytest.mark.parametrize("quantization", [FOUR, EIGHT])
def test_evaluation_computes_what_training_computes(base: Path, quantization: QuantizationSection) -> None:
    """Rows alone, in a batch, evaluated or trained on: the same numbers, without which no reference is exact."""
    model = models.load_causal_lm(str(base), section(quantization))
    wanted = logits(model)
    alone = torch.cat([model(input_ids=row[None]).logits for row in IDS])
    torch.testing.assert_close(alone, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.train()(input_ids=IDS).logits, wanted, atol=1e-6, rtol=0)


def test_weights_are_never_repacked_for_a_processors_own_instructions(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AVX512-BF16, bitsandbytes' first evaluation leaves weights through which no gradient passes."""
    import bitsandbytes.nn.modules as own

    monkeypatch.setattr(own, "has_avx512bf16", lambda: True)
    packed: list[Any] = []
    monkeypatch.setattr(own, "_convert_weight_packed_for_cpu", lambda *given: packed.append(given) or given)
    bare = AutoModelForCausalLM.from_pretrained(base, quantization_config=plain_settings(), dtype=torch.float32).eval()
    with torch.no_grad():
        bare(input_ids=IDS)
    assert packed  # what happens without us
    packed.clear()
    logits(models.load_causal_lm(str(base), section()))
    assert not packed


@pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_base_and_adapter_are_one_frozen_model(base: Path, sft: Path, head: Any) -> None:
    model, _ = models._load(head, str(sft), section(), None)
    # transformers itself finds the base by the adapter's own record
    plain = head.from_pretrained(sft, quantization_config=plain_settings(), dtype=torch.float32)
    if head is AutoModelForSequenceClassification:
        plain.score.weight.data.copy_(model.score.weight)
        plain.config.pad_token_id = model.config.pad_token_id
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)
    bare = head.from_pretrained(base, quantization_config=plain_settings(), dtype=torch.float32)
    assert head is not AutoModelForCausalLM or (logits(model) - logits(bare)).abs().max() > 0.1
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".below_" in name)
    assert len(below_of(model)) == 28 and not hasattr(model, "peft_config")
    assert model.name_or_path == str(sft)


@pytest.mark.parametrize("quantization", [FOUR, EIGHT])
def test_a_policy_begins_as_its_reference_and_learns_above_it(
    base: Path, tmp_path: Path, quantization: QuantizationSection
) -> None:
    """Bit for bit at the start; after a step only the policy's own adapter has moved, and it alone is saved."""
    sft = adapter_on(base, tmp_path / "sft", quantization)
    stack = models.load_causal_lm(str(sft), section(quantization))
    wanted = logits(stack)
    model = get_peft_model(stack, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), wanted)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    assert (logits(model) - wanted).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "policy")
    assert all("below" not in name for name in load_peft_weights(str(tmp_path / "policy"), device="cpu"))
    again = models.load_policy(str(tmp_path / "policy"), section(quantization))
    assert torch.equal(logits(again), logits(model))
    assert models.merged(again) is again  # folded into 4 bits it would be lost
    with folded(again) as done:
        assert not done
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_on_the_head_is_below_too(base: Path, tmp_path: Path) -> None:
    """The head is no quantised layer: lean LoRA layers and the lean head must see what lies below it."""
    targets = ["q_proj", "lm_head"]
    sft = adapter_on(base, tmp_path / "sft", target_modules=targets)
    wanted = AutoModelForCausalLM.from_pretrained(sft, quantization_config=plain_settings(), dtype=torch.float32)
    model = get_peft_model(
        models.load_causal_lm(str(sft), section()),
        LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"),
    )
    lean_lora(model)
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=0)
    found = answer_logprobs(models.load_causal_lm(str(sft), section()), PAIRS, 0)
    for row, own in zip(found, answer_logprobs(wanted, PAIRS, 0), strict=True):
        torch.testing.assert_close(row, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "trained beside the adapter"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "no linear layer"),
        ({"lora_bias": True}, "not plain LoRA"),
    ],
)
def test_what_cannot_lie_below_is_refused(base: Path, tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = adapter_on(base, tmp_path / "sft", **config)
    with pytest.raises(InputError, match=reason):
        models.load_causal_lm(str(folder), section())


@pytest.mark.parametrize(
    ("layers", "targets", "wanted"),
    [(1, None, "0 of its weights are missing, 14 left over"), (3, ["q_proj"], "2 of its weights are missing, 24 left")],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    base: Path, sft: Path, tmp_path: Path, layers: int, targets: list[str] | None, wanted: str
) -> None:
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig.from_pretrained(base, num_hidden_layers=layers)).save_pretrained(other)
    folder = Path(shutil.copytree(sft, tmp_path / "sft"))
    file = folder / "adapter_config.json"
    changed = {"base_model_name_or_path": str(other), **({"target_modules": targets} if targets else {})}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(InputError, match=f"does not fit its base .*{wanted}"):
        models.load_causal_lm(str(folder), section())


@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_and_shared_prefixes_agree_with_the_forward_pass(sft: Path, adapted: bool) -> None:
    model = models.load_causal_lm(str(sft), section()).eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
        randomise(model, 2, std=0.1)
    assert not supported(model)  # the stepper multiplies plain matrices itself: it must step aside
    torch.manual_seed(0)
    drawn = draw(model, [prompt for prompt, _ in PAIRS], max_new_tokens=6, stop_ids=[])
    pairs = [(prompt, one.ids) for (prompt, _), one in zip(PAIRS, drawn, strict=True)]
    found = answer_logprobs(model, pairs, 0)
    for row, one in zip(found, drawn, strict=True):
        torch.testing.assert_close(row, torch.tensor(one.logprobs), atol=1e-5, rtol=0)
    base_model(model).config.use_cache = False
    assert share_prefixes(model) is None
    for row, shared in zip(found, answer_logprobs(model, pairs, 0), strict=True):
        torch.testing.assert_close(shared, row, atol=1e-5, rtol=0)


def test_the_digest_of_a_reference_knows_how_it_is_held(base: Path, sft: Path, tmp_path: Path) -> None:
    held: dict[str, Callable[[], Any]] = {
        "whole": lambda: models.load_causal_lm(str(base), section(None)),
        "nf4": lambda: models.load_causal_lm(str(base), section()),
        "fp4": lambda: models.load_causal_lm(
            str(base), section(QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
        ),
        "int8": lambda: models.load_causal_lm(str(base), section(EIGHT)),
        "sft": lambda: models.load_causal_lm(str(sft), section()),
    }
    digests = {name: weights_digest(load()) for name, load in held.items()}
    assert len(set(digests.values())) == len(held)
    assert digests == {name: weights_digest(load()) for name, load in held.items()}
    adapted = get_peft_model(held["sft"](), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert weights_digest(adapted) == digests["sft"]
    scaled = held["nf4"]()
    weight = scaled.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight.quant_state.state2.absmax *= 2  # the same 4-bit values of other size
    assert weights_digest(scaled) != digests["nf4"]


def test_what_is_trained_keeps_its_number_format(sft: Path) -> None:
    model = get_peft_model(
        models.load_causal_lm(str(sft), section()),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # as TRL's trainers do
        parameter.data = parameter.data.bfloat16()
    quantised.keep_precision(model)
    assert {parameter.dtype for parameter in trained} == {torch.float32}
