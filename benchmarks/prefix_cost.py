"""What a group of K answers costs with and without its prompt shared, beside what the arithmetic says.

    python benchmarks/prefix_cost.py --prompts 64,256,1024,2048 --answers 2,4,8

One prompt with K answers of 64 tokens, forward without gradient on the embedded model. Plain rows cost K (L + 64)
tokens, shared ones L + 64 K; a token costs the weights it passes, and in attention the tokens it sees. `predicted` is
the ratio of these costs, `measured` that of the times, alternating within a round.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import harness

ANSWER = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--prompts", default="64,256,1024,2048")
    parser.add_argument("--answers", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    plain, shared = build()
    rows, record = [], []
    for length in map(int, args.prompts.split(",")):
        for count in map(int, args.answers.split(",")):
            ids = torch.randint(5, 40_000, (1, length)).repeat(count, 1)
            ids = torch.cat([ids, torch.randint(5, 40_000, (count, ANSWER))], 1)
            gains = []
            for _ in range(args.rounds):
                seconds = {}
                for name, model in (("shared", shared), ("plain", plain)):
                    started = time.perf_counter()
                    with torch.no_grad():
                        model(input_ids=ids, use_cache=False)
                    seconds[name] = time.perf_counter() - started
                gains.append(seconds["plain"] / seconds["shared"])
            said, found = predicted(plain, length, count), harness.middle(gains)
            assert found is not None
            record.append({"prompt": length, "answers": count, "predicted": said, "measured": found})
            rows.append(
                [str(length), str(count), f"{said:.2f}", harness.spread(found), f"{found['median'] / said:.2f}"]
            )
    alone = harness.middle(nothing_shared(plain, shared, rounds=max(5, args.rounds)))
    text = harness.markdown(["prompt tokens", "K", "predicted", "measured", "measured / predicted"], rows)
    text += (
        "\n\nRows that share nothing (8 of 256 tokens, forward and backward through an input that wants a gradient): "
        f"plain over shared {harness.spread(alone, digits=3)}; below 1 is what looking for prefixes costs."
    )
    claim = "`benchmarks/prefix_cost.py`: time of plain rows over that of shared ones, K answers of 64 tokens."
    harness.finish("prefix cost", claim, {"table": record, "nothing_shared": alone}, text, args.results)


def nothing_shared(plain: Any, shared: Any, rounds: int) -> list[float]:
    """Time of plain rows over that of the same rows with prefixes looked for in vain, forward and backward."""
    import torch

    ids = torch.randint(5, 40_000, (8, 256))
    ids[:, 0] = torch.arange(10, 18)  # no two begin alike
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for name, model in (("plain", plain), ("shared", shared))[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            scale = torch.ones((), requires_grad=True)
            hook = model.get_input_embeddings().register_forward_hook(lambda *given, scale=scale: given[-1] * scale)
            model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
            hook.remove()
            seconds[name] = time.perf_counter() - started
        ratios.append(seconds["plain"] / seconds["shared"])
    return ratios[1:]  # the first is warm-up


def build() -> tuple[Any, Any]:
    from align import models
    from align.config import ModelSection
    from align.prefix import share_prefixes

    plain = models.load_causal_lm(harness.base_folder(), ModelSection()).eval().requires_grad_(False).get_decoder()
    shared = copy.deepcopy(plain)
    if reason := share_prefixes(shared):
        raise SystemExit(f"prefixes are not shared: {reason}")
    return plain, shared


def predicted(model: Any, length: int, count: int) -> float:
    """Cost of plain rows over that of shared ones, in multiply-adds."""
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    per_seen = 2 * model.config.num_hidden_layers * model.config.num_attention_heads * model.config.head_dim

    def attention(first: int, last: int) -> float:  # of the tokens first..last, each with all before it and itself
        return per_seen * (last * (last + 1) - first * (first + 1)) / 2

    whole = length + ANSWER
    plain = count * (whole * weights + attention(0, whole))
    shared = (length + count * ANSWER) * weights + attention(0, length) + count * attention(length, whole)
    return plain / shared


if __name__ == "__main__":
    main()
