"""The plan: counts and formulas against what is really built and really kept, and the command as users meet it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from align import cli, models
from align.config import AdapterSection, Config, ModelSection
from align.lean import lean_layers
from align.logprobs import Batch, collate, states_before_answers
from align.lora import lean_lora
from align.plan import memory, planning, rates, rows, stages
from align.plan.memory import Layout, Precision, Tokens
from align.plan.planning import Machine, largest_batch, machine_of, memory_size
from align.plan.shapes import Adapter, Shape, base_of, read_base
from align.prefix import share_prefixes
from reward.records import InputError

F32, BF16 = Precision(32, 4), Precision(16, 2)
# Llama-3-8B's shape, from its published configuration.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMALL = Shape("small", 4, 64, 192, 4, 64, 32, 512, True, 512, 500_000, 32_768, 0, 400_000, 100_000)
LORA = Adapter(10_000, 0, {"attention": 3, "output": 1, "mlp": 2, "down": 1}, 56, 400_000)


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def tiny_config(model: Path, data: Path, stages: list[str], **sections: Any) -> Config:
    preferences = data.with_name("preferences.jsonl")
    if not preferences.exists():
        pairs = [json.loads(line) for line in data.read_text().splitlines()]
        written = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": "No."} for p in pairs]
        preferences.write_text("".join(json.dumps(pair) + "\n" for pair in written))
    raw = {
        "name": "tiny",
        "stages": stages,
        "model": {"base": str(model)},
        "data": {"demonstrations": str(data), "preferences": str(preferences)},
        "label": {"source": "dataset"},
        **sections,
    }
    return Config.model_validate(raw)


# -- counts -----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_model_that_is_really_built(tiny_model: Path) -> None:
    section = ModelSection(base=str(tiny_model))
    base, real = read_base(section), models.load_causal_lm(str(tiny_model), section)
    assert base.shape.parameters == sum(p.numel() for p in real.parameters())
    assert base.shape.embedding == real.get_input_embeddings().weight.numel()
    assert base.shape.head == 0  # tied
    linear = sum(m.weight.numel() for m in real.model.modules() if isinstance(m, torch.nn.Linear))
    assert base.shape.linear == linear
    assert all(p.device.type == "meta" for p in base.model.parameters())


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_adapters_are_counted_as_peft_builds_them(tiny_model: Path, keys: dict[str, Any]) -> None:
    from peft import get_peft_model

    section = AdapterSection.model_validate(keys)
    base = read_base(ModelSection(base=str(tiny_model)))
    real = get_peft_model(
        models.load_causal_lm(str(tiny_model), ModelSection(base=str(tiny_model))),
        models.lora_config(section, "CAUSAL_LM"),
    )
    for _ in range(2):  # the base is as it was: the same again
        found = base.adapter(section)
        assert found.parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.first == (keys.get("layers_to_transform") or [0])[0]
    assert base.adapter(section, heads=3).parameters == found.parameters + 3 * base.shape.hidden


def test_an_adapter_that_fits_nothing_is_refused(tiny_model: Path) -> None:
    base = read_base(ModelSection(base=str(tiny_model)))
    with pytest.raises(InputError, match="does not fit"):
        base.adapter(AdapterSection(target_modules=["no_such_layer"]))


# -- formulas ---------------------------------------------------------------------------------------------------------


def saved_bytes(model: Any, batch: Batch, autocast: bool) -> int:
    """Bytes of all that autograd keeps of a forward pass, every storage once, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden_NH = states_before_answers(model, batch)
    assert hidden_NH.requires_grad
    return sum(size for address, (size, _) in kept.items() if address not in own)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize(
    "dtype, autocast, whole",
    [("float32", False, False), ("bfloat16", False, False), ("bfloat16", True, False), ("float32", False, True)],
    ids=["f32", "bf16", "bf16-autocast", "all-weights"],
)
def test_activations_are_what_autograd_keeps(dtype: str, autocast: bool, whole: bool, share: bool) -> None:
    """Tensor by tensor, on a model that is built and run; what is left out (rotary angles, places) is under 3 %."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype))
    base = base_of(config, "built")
    adapter = None if whole else base.adapter(AdapterSection(r=8))
    if not whole:
        model = get_peft_model(model, models.lora_config(AdapterSection(r=8), "CAUSAL_LM"))
    model.train()
    lean_lora(model)
    lean_layers(model)
    if share:
        assert share_prefixes(model) is None
    batch = [rows.Row(40, (30, 30)), rows.Row(40, (30, 30))]
    stream = torch.Generator().manual_seed(0)
    pairs = []
    for row in batch:
        prompt = torch.randint(3, 256, (row.prompt,), generator=stream).tolist()
        # One more token: the last of a row is never computed.
        pairs += [(prompt, torch.randint(3, 256, (n + 1,), generator=stream).tolist()) for n in row.answers]
    tokens = rows.tokens_of(batch, 0, share)
    if not share:  # the masks of this forward pass: the last token of every row is padding
        columns = tokens.places + len(pairs)
        tokens = Tokens(columns, columns, columns, len(pairs) * 71 * 71, tokens.answers, packed=False)
    precision = Precision(8.0 * getattr(torch, dtype).itemsize, getattr(torch, dtype).itemsize, autocast)
    lean = dtype == "float32" and not autocast
    planned = 6 * sum(memory.layer_tensors(base.shape, adapter, precision, tokens, lean))
    found = saved_bytes(model, collate(pairs, 0), autocast)
    assert planned == pytest.approx(found, rel=0.03 if not autocast else 0.08)


def test_a_training_step_by_hand() -> None:
    """One layer, H = 8, I = 16, a single head of 8; 10 tokens, LoRA of rank 1 on all seven layers, f32 on a CPU."""
    shape = Shape("hand", 1, 8, 16, 1, 8, 8, 100, True, 64, 2000, 800, 0, 640, 700)
    adapter = Adapter(100, 0, {"attention": 3, "output": 1, "mlp": 2, "down": 1}, 7, 640)
    tokens = Tokens(10, 10, 10, 0, 5, packed=True)
    # Norms 2 x 80, inputs 80 + 80 + 80 + 160, attention 4 x 80 and a scale of 10, gate and up 2 x 160, ranks 70 floats
    floats = 160 + 400 + 320 + 10 + 320 + 70
    kept = memory.activations(shape, adapter, F32, tokens, Layout())
    assert kept == pytest.approx(4 * floats * memory.HEAP)
    assert memory.weights(shape, F32, Layout()) == 2000 * 4
    assert memory.weights(shape, Precision(4.127, 2), Layout()) == 640 * 4.127 / 8 + 1360 * 2
    assert memory.trained(100, 4, Layout()) == {"gradients": 400, "optimiser": 800}
    assert memory.trained(100, 4, Layout(True, 4, 2)) == {"gradients": 100 + 400, "optimiser": 300}
    # ZeRO on 16-bit weights: 2 + 2 + 12 bytes a weight on one device
    whole = memory.weights(shape, BF16, Layout(True, 1, 1)) + sum(memory.trained(2000, 2, Layout(True, 1, 1)).values())
    assert whole == 2000 * (2 + 2 + 12) + min(memory.BUCKET, 2000) * 2
    assert memory.cache(shape, F32, rows=3, length=20) == 2 * 8 * 4 * 3 * 20
    assert memory.folded(adapter, F32) == 640 * 4
    assert memory.folded(adapter, Precision(4.127, 4)) == 0  # quantised weights are not folded


def test_tokens_of_a_batch_by_hand() -> None:
    pair = rows.Row(10, (4, 6))
    shared = rows.tokens_of([pair, pair], common=3, share=True)
    assert (shared.places, shared.queries) == (3 + 2 * (7 + 4 + 6), 2 * (7 + 4 + 6))
    assert shared.keys == 2 * (14 + 16)
    assert shared.masked == 2 * (11 * 14 + 6 * 16)
    padded = rows.tokens_of([pair, pair], common=3, share=False)
    assert (padded.places, padded.masked, padded.answers) == (4 * 16, 4 * 16 * 16, 20)
    packed = rows.packed_tokens([rows.Row(10, (5,))] * 2, limit=40, count=10)
    assert (packed.places, packed.masked) == (60, 3600)  # two conversations of 15 fit into each row of 40
    assert rows.packed_tokens([rows.Row(10, (5,))] * 2, limit=40, count=3).places == 45  # there are no more


def job(stage: str = "dpo", batch: int = 4, layout: Layout | None = None, whole: bool = False, **more: Any) -> Any:
    section = getattr(Config(name="x"), stage)
    found = rows.Rows((rows.Row(60, (30, 30)),), 100, 10, 0, "made up")
    return stages.Job(
        stage, SMALL, more.pop("precision", BF16), layout or Layout(gpu=True), found, batch, None if whole else LORA,
        section, more.pop("checkpointing", False), **more,
    )  # fmt: skip


@given(
    st.sampled_from(["sft", "reward", "dpo"]),
    st.integers(1, 64),
    st.integers(1, 128),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_more_gpus_and_more_splitting_never_take_more(
    stage: str, batch: int, gpus: int, zero: int, whole: bool, offload: bool
) -> None:
    def total(gpus: int, zero: int, batch: int = batch) -> float:
        return stages.peak(job(stage, batch, Layout(True, gpus, zero, offload), whole)).total

    assert total(2 * gpus, zero) <= total(gpus, zero)
    assert total(gpus, 3) <= total(gpus, 2) <= total(gpus, 1)
    assert total(gpus, zero) <= total(gpus, zero, batch + 1)


@given(st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=30)
def test_checkpointing_and_fewer_bits_never_take_more(batch: int, gpu: bool) -> None:
    plain = job("sft", batch, Layout(gpu=gpu))
    assert stages.peak(job("sft", batch, Layout(gpu=gpu), checkpointing=True)).total <= stages.peak(plain).total
    quantised = job("sft", batch, Layout(gpu=gpu), precision=Precision(planning.NF4, 2))
    assert stages.peak(quantised).total < stages.peak(plain).total


@given(st.floats(1.05, 1.6))
@settings(deadline=None, max_examples=20)
def test_the_largest_batch_is_the_largest(gib: float) -> None:
    found = largest_batch(job(), gib * 2**30)
    assert found is not None
    assert found < planning.LARGEST_BATCH
    assert stages.peak(job(batch=found)).total <= gib * 2**30 < stages.peak(job(batch=found + 1)).total


def test_no_batch_fits_into_too_little() -> None:
    assert largest_batch(job(), 2**20) is None


def test_flops_are_those_of_the_rule_of_thumb() -> None:
    """6 a weight and token where all is trained, 4 under LoRA, without attention, head and adapter."""
    shape = Shape("m", 2, 64, 192, 4, 64, 64, 1000, True, 0, 10**6, 64_000, 0, 2 * (4 * 64 * 64 + 3 * 64 * 192), 1)
    attention = 4.0 * 100 * 10 / 2 * 64 * 2
    assert rates.forward_flops(shape, 100, 10, 0) == 2 * 100 * shape.linear + attention
    assert rates.training_flops(shape, None, 100, 10, 0) == 3 * (2 * 100 * shape.linear + attention)
    none = Adapter(0, 0, LORA.copies, 0, 0)
    assert rates.training_flops(shape, none, 100, 10, 0) == 2 * (2 * 100 * shape.linear + attention)
    upper = Adapter(0, 1, LORA.copies, 0, 0)
    assert rates.training_flops(shape, upper, 100, 10, 0) == 1.5 * (2 * 100 * shape.linear + attention)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, size", [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("0.5 TiB", 2**39)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-80GB", "80gb", "0GB", "eighty GB", "80GBit"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 80GB or 24GiB"):
        memory_size(text)


def test_machines_that_are_none_are_refused() -> None:
    for arguments in ({"gpu": "h100"}, {"size": "80GB"}, {"gpus": -1}, {"gpus": 1, "gpu": "h1000"}, {"tflops": 0.0}):
        with pytest.raises(InputError):
            machine_of(**arguments)
    assert machine_of(2, "h100").memory == 80 * 2**30
    assert machine_of().gpus == 0


def test_a_hub_id_without_network_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"no-such/model.*give a folder with the model's config.json, or a hub id"):
        read_base(ModelSection(base="no-such/model"))


def said(*arguments: str | Path) -> str:
    found = CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0
    return found.output


def written(config: Config, folder: Path) -> Path:
    file = folder / "plan.yaml"
    file.write_text(config.model_dump_json())
    return file


def test_the_command_plans_for_this_machine(tiny_model: Path, tiny_demonstrations: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tiny_demonstrations, ["sft", "label", "reward", "dpo", "ppo", "compare"])
    output = said(written(config, tmp_path), "--tflops", "0.01")
    assert "on this machine's CPU" in output
    for stage in ("sft", "reward", "dpo", "ppo", "compare"):
        line = next(line for line in output.splitlines() if re.match(rf"{stage}\s+0", line))
        assert re.search(r"0\.1\d", line), line  # a tiny model: what is left is the libraries
    assert "rows of demonstrations.jsonl" in output
    assert "0.01 TFLOP/s as given" in output
    assert "in one process" in output


def test_a_config_json_is_enough(big_folder: Path, tmp_path: Path) -> None:
    raw = {"name": "big", "stages": ["sft", "dpo"], "model": {"base": str(big_folder)}}
    raw |= {key: {"gradient_checkpointing": True} for key in ("sft", "dpo")}
    config = Config.model_validate(raw)
    output = said(written(config, tmp_path), "--gpus", "8", "--gpu", "h100")
    assert "8,030,261,248 parameters" in output
    assert "8 GPUs h100 of 80.0 GiB" in output
    assert "assumed, as no data file is set" in output
    assert "ZeRO-3, offload" in output
    weights = next(line for line in output.splitlines() if line.startswith("sft")).split()[1]
    assert float(weights) == pytest.approx(8_030_261_248 * 2 / 2**30, abs=0.1)
    assert "configs/accelerate/zero2.yaml` with num_processes: 8" in output


def test_what_does_not_fit_says_what_would(big_folder: Path, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"name": "big", "stages": ["sft"], "model": {"base": str(big_folder)}, "sft": {"packing": False}}
    )
    machine = machine_of(1, "a100", "24GiB")
    found = planning.plan(config, machine)
    assert not found.fits
    output = said(written(config, tmp_path), "--gpus", "1", "--gpu-memory", "24GiB")
    assert "sft does not fit" in output
    options = dict(found.stages[0].remedies)
    assert options
    assert all(size <= machine.usable for size in options.values())
    assert any("gradient_checkpointing" in option or "load_in_4bit" in option for option in options)
    hopeless = said(written(config, tmp_path), "--gpus", "1", "--gpu-memory", "900MB")
    assert "take more GPUs" in hopeless


@pytest.mark.parametrize(
    "gpus, size, file",
    [
        (1, "80GB", "single_gpu.yaml"),
        (8, "80GB", "zero2.yaml"),
        (8, "16GB", "zero3.yaml"),
        (16, "80GB", "multi_node.yaml"),
    ],
)
def test_a_launcher_is_suggested(big_folder: Path, gpus: int, size: str, file: str) -> None:
    raw = {"name": "big", "stages": ["sft"], "model": {"base": str(big_folder)}}
    raw["sft"] = {"per_device_train_batch_size": 1, "max_length": 512, "gradient_checkpointing": True}
    found = planning.plan(Config.model_validate(raw), machine_of(gpus, "a100", size))
    assert found.file == file
    assert (Path(__file__).parents[2] / "configs" / "accelerate" / file).is_file()


def test_a_quantised_base_is_never_split(big_folder: Path) -> None:
    raw = {"name": "big", "stages": ["dpo"], "model": {"base": str(big_folder), "quantization": {"load_in_4bit": True}}}
    found = planning.plan(Config.model_validate(raw), Machine(4, 80 * 2**30))
    assert found.precision.bits == pytest.approx(4.127)
    assert "ZeRO-3" not in found.layout


def test_times_follow_the_work(tiny_model: Path, tiny_demonstrations: Path) -> None:
    def seconds(**ppo: Any) -> float:
        config = tiny_config(tiny_model, tiny_demonstrations, ["ppo"], ppo={"per_device_train_batch_size": 4, **ppo})
        return planning.plan(config, Machine(1, 2**36, tflops=1e-3)).stages[0].seconds

    assert seconds(total_episodes=64) == pytest.approx(2 * seconds(total_episodes=32))
    assert seconds(num_ppo_epochs=4) > seconds(num_ppo_epochs=2)
    assert math.isfinite(seconds())


@pytest.mark.slow
def test_a_real_stage_takes_what_was_planned() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "plan_vs_measured.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model", "small", "--batch", "16", "--stages", "sft,dpo"],
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout.splitlines()[0])
    assert set(record["ratios"]) == {"sft", "dpo"}
    for stage, ratio in record["ratios"].items():
        assert 0.8 <= ratio <= 1.25, (stage, ratio)
