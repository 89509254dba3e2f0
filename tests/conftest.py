"""Shared fixtures: a tiny model with a tokenizer and chat template of its own, made here and never fetched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: tests never reach a model hub, and leave the cores to each other.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "true")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--no-first-run", "--disable-sync", "--disable-quic"]
in_browser = [
    pytest.mark.skipif(CHROMIUM is None, reason="CHROMIUM IS NOT INSTALLED: the pages are not tested"),
    pytest.mark.browser,
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SUBJECTS = ["rain", "bread", "a river", "music", "the moon", "a garden", "paper", "salt", "a clock", "winter"]
QUESTIONS = ["What is {}?", "Tell me about {}.", "Why do people like {}?", "Describe {} in one sentence."]


class Stopped(Exception):
    """What the tests stop a stage with."""


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Inside, training raises `Stopped` at the end of this optimiser step; what is expected to be raised is raised."""
    from align.training import _Bar

    real = _Bar.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **extra: Any) -> None:
        real(self, args, state, control, **extra)
        if state.global_step == step:
            raise Stopped

    _Bar.on_step_end = stop
    try:
        with pytest.raises(Stopped):
            yield
    finally:
        _Bar.on_step_end = real


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def demonstrations(count: int = 40) -> list[dict[str, str]]:
    """Small made-up demonstrations, all different, whose prompts fall on both sides of the split."""
    rows = []
    for index in range(count):
        subject = SUBJECTS[index % len(SUBJECTS)]
        question = QUESTIONS[index // len(SUBJECTS) % len(QUESTIONS)].format(subject)
        rows.append({"prompt": f"{question} ({index})", "completion": f"The answer about {subject} is short and kind."})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make_tiny_model(folder: Path, hidden: int = 32, layers: int = 2) -> Path:
    """A random Llama of about 60,000 weights with a byte-level BPE tokenizer trained on the demonstrations."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + " " + row["completion"] for row in demonstrations()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model in Hugging Face layout, with a ChatML template."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 40 demonstrations."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "demonstrations.jsonl", demonstrations())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout, where there is any; tests that want it are skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no real data beside the checkout")
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real browser, for the tests of a module."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
