"""Answers a second: the sampler here against `model.generate`, with a LoRA adapter loaded on the embedded model.

    python benchmarks/sampling.py --rounds 5

16 prompts x 4 answers x 48 tokens in one batch, nothing stops early, temperature 1 over the whole vocabulary. Both
sides in one process, alternating. Here every prompt is read once for its 4 answers, and the adapter is folded into the
weights for the time of sampling (folding and restoring are counted); there, prompts are repeated and the adapter is a
layer of its own, as it is where a trainer samples. Greedy answers are compared too: they must be the same tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    model, prompts = build(args)
    repeated = [prompt for prompt in prompts for _ in range(args.answers)]
    same = sum(a == b for a, b in zip(ours(model, prompts, args, 0.0), theirs(model, prompts, args, 0.0), strict=True))
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    for _, side in harness.rounds(list(seconds), args.rounds):
        torch.manual_seed(0)
        started = time.perf_counter()
        answers = (ours if side == "ours" else theirs)(model, repeated, args, 1.0)
        seconds[side].append(time.perf_counter() - started)
        assert sum(map(len, answers)) == len(repeated) * args.tokens
    count = len(repeated) * args.tokens
    rates = {side: harness.middle([count / s for s in own]) for side, own in seconds.items()}
    gain = harness.middle([b / a for a, b in zip(seconds["ours"], seconds["generate"], strict=True)])
    rows = [[side, harness.spread(rates[side], digits=1)] for side in seconds]
    text = harness.markdown(["side", "tokens/s"], rows)
    text += f"\n\nours/generate: {harness.spread(gain)}; greedy answers equal: {same} of {args.prompts}."
    claim = "`benchmarks/sampling.py`: 16 prompts x 4 answers x 48 tokens with a LoRA adapter loaded."
    harness.finish("sampling", claim, {"seconds": seconds, "gain": gain, "greedy_equal": same}, text, args.results)


def build(args: argparse.Namespace) -> tuple[Any, list[list[int]]]:
    import json

    import torch
    from peft import get_peft_model

    from align import models
    from align.config import ModelSection
    from align.data.render import prompt_ids

    tokenizer = models.load_tokenizer(harness.base_folder(), ModelSection())
    model = get_peft_model(
        models.load_causal_lm(harness.base_folder(), ModelSection()), harness.lora("CAUSAL_LM")
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    lines = (harness.ROOT / "configs" / "quickstart" / "prompts.jsonl").read_text("utf-8").splitlines()
    asked = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines[: args.prompts]]
    return model, [prompt_ids(tokenizer, prompt) for prompt in asked]


def ours(model: Any, prompts: list[list[int]], args: argparse.Namespace, temperature: float) -> list[list[int]]:
    from align.decode import draw
    from align.lora import folded

    with folded(model):
        drawn = draw(model, prompts, max_new_tokens=args.tokens, stop_ids=[], temperature=temperature)
    return [answer.ids for answer in drawn]


def theirs(model: Any, prompts: list[list[int]], args: argparse.Namespace, temperature: float) -> list[list[int]]:
    import torch

    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
    return output[:, size:].tolist()


if __name__ == "__main__":
    main()
