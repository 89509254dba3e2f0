"""Stage 7, compare: every model answers the same held-out prompts; judges, costs, and a verdict with error bars.

Writes answers.jsonl, report.json and report.html.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from align import models, progress, ranks, training
from align.compare import report as page
from align.compare import statistics
from align.compare.blind import project_name, send_blind_pairs
from align.compare.schema import Example, Finding, ModelFigures, PpoCourse, Report, WinRateFigure
from align.config import Config
from align.data.load import load_demonstrations, only
from align.data.render import answer_ids, prompt_ids
from align.generate import Answer, Partial, batches, generate
from align.label import store_address
from align.logprobs import Pair, answer_logprobs
from align.ppo.diagnosis import HEALTH
from align.runs import Run, lineage, read_info, versions
from align.sample import fitting_prompts, gather_prompts, policy_folder, sft_model
from align.scorer import Scorer
from labeling_ui.panel import HiddenPreference, preferred
from reward.records import InputError, Record, digest, prompt_text, read_jsonl, write_jsonl
from reward.statistics import MeanFigure

JUDGES = {
    "simulated": (
        "simulated preference",
        "The hidden preference of the simulated panel, without its noise: a documented formula, not people.",
    ),
    "reward": (
        "reward model",
        "The pipeline's own reward model: the higher score wins. It is what ppo was trained to please, so its opinion "
        "of ppo is not independent.",
    ),
}


def run_compare(config: Config, run: Run) -> dict[str, Any]:
    """Answer, judge, measure, write; returns the headline figures."""
    if not ranks.is_first():
        return {}
    section = config.compare
    names = config.compared_models()
    judges = chosen_judges(config)
    tokenizer = models.load_tokenizer(sft_model(config), config.model)
    held_out = only("test", gather_prompts(config), "prompts")
    kept, _ = fitting_prompts(run, tokenizer, held_out, section.max_prompt_length)
    prompts = kept[: section.max_prompts]
    ids = [prompt_ids(tokenizer, record["prompt"]) for record in prompts]
    progress.say(f"  {len(prompts)} held-out prompts, models {', '.join(names)}, judges {', '.join(judges)}")

    answers = {name: answers_of(config, run, name, ids, tokenizer) for name in names}
    write_jsonl(run.folder / "answers.jsonl", _rows(prompts, answers))
    if section.blind_pairs:
        added = send_blind_pairs(config, prompts, answers)
        progress.say(f"  {added} blind pairs were added to project {project_name(config)} of {store_address(config)}")
    pairs = {name: [(p, a.ids) for p, a in zip(ids, answers[name], strict=True)] for name in names}
    logprobs, perplexity = measure(config, names, pairs, tokenizer)
    rewards = reward_scores(config, prompts, answers, pairs, tokenizer) if "reward" in config.stages else {}
    taste = HiddenPreference()
    texts = [prompt_text(record["prompt"]) for record in prompts]
    utility = {
        name: [taste.utility(text, answer.text) for text, answer in zip(texts, answers[name], strict=True)]
        for name in names
        if "simulated" in judges
    }

    def outcomes(name: str, judge: str) -> list[float]:
        """1, 1/2 or 0 per prompt for `name` against the first model."""
        if judge == "reward":
            return [_beats(a, b) for a, b in zip(rewards[name], rewards[names[0]], strict=True)]
        answered = zip(texts, answers[name], answers[names[0]], strict=True)
        return [preferred(taste, text, mine.text, other.text) for text, mine, other in answered]

    figures: list[ModelFigures] = []
    wins: dict[str, dict[str, statistics.WinRate]] = {}
    controlled: dict[str, dict[str, statistics.Estimate]] = {}
    lengths = {name: [len(answer.ids) for answer in answers[name]] for name in names}
    seed = config.seed
    for name in names:
        told = {judge: outcomes(name, judge) for judge in judges} if name != names[0] else {}
        wins[name] = {judge: statistics.win_rate(won) for judge, won in told.items()}
        controlled[name] = {
            judge: statistics.length_controlled_win_rate(won, lengths[name], lengths[names[0]])
            for judge, won in told.items()
        }
        figures.append(
            {
                "name": name,
                "path": policy_folder(config, name),
                "win_rate": {JUDGES[judge][0]: cast(WinRateFigure, win.record()) for judge, win in wins[name].items()},
                "equal_length": {
                    JUDGES[judge][0]: cast(MeanFigure, estimate.record())
                    for judge, estimate in controlled[name].items()
                },
                "reward": _mean(rewards.get(name), seed),
                "preference": _mean(utility.get(name), seed),
                "kl": _mean(logprobs.get(name), seed),
                "length": _mean(lengths[name], seed),
                "finished": sum(answer.finished for answer in answers[name]) / len(prompts),
                "perplexity": perplexity.get(name),
            }
        )
    report = Report(
        schema=1,
        pipeline=config.name,
        created=run.info["started_at"],
        notices=notices(config, judges),
        verdict=_verdicts(names, judges, wins, controlled, figures),
        judges=[{"name": JUDGES[judge][0], "description": JUDGES[judge][1]} for judge in judges],
        prompts={"n": len(prompts), "split": "test", "digest": digest([record["prompt"] for record in prompts])},
        models=figures,
        examples=_examples(prompts[: section.examples], answers, rewards, utility),
        lineage=_lineage(run),
        seeds={"seed": config.seed},
        versions=versions(),
        settings=section.model_dump(mode="json") | {"test_share": config.data.test_share},
    )
    if "ppo" in names:
        report["ppo"] = ppo_course(config.folder("ppo"))
    path = page.write_report(report, run.folder)
    progress.table(page.terminal_table(report))
    for sentence in [*report["notices"], *report["verdict"]]:
        progress.say(f"  {sentence}")
    progress.say(f"  report: {path}")
    return {
        "prompts": len(prompts),
        "verdict": report["verdict"],
        "win_rates": {name: {judge: win.record() for judge, win in by.items()} for name, by in wins.items() if by},
    }


def chosen_judges(config: Config) -> list[str]:
    """The judges of the config, or those that fit it: simulated for simulated labels, the reward model if there is one.

    Raises:
        InputError: a judge is asked for that this pipeline does not have, or there is none.
    """
    simulated, reward = config.label.source == "simulated" and "label" in config.stages, "reward" in config.stages
    if config.compare.judges is None:
        judges = [*(["simulated"] if simulated else []), *(["reward"] if reward else [])]
    else:
        judges = [*config.compare.judges]
    if "reward" in judges and not reward:
        raise InputError("compare.judges names reward, but the stages have no reward model: add `reward` to stages.")
    if "simulated" in judges and not simulated:
        raise InputError("compare.judges names simulated, but no label of this pipeline is simulated: use reward.")
    if not judges:
        raise InputError("compare has no judge: add `reward` to stages, or use label.source: simulated.")
    return judges


def answers_of(config: Config, run: Run, name: str, ids: list[list[int]], tokenizer: Any) -> list[Answer]:
    """One answer of a model to every prompt; batches generated before an interruption are read back."""
    section = config.compare
    partial = Partial(run.work / f"answers-{name}.jsonl")
    if len(partial.batches) < len(batches(ids, section.batch_size)):
        model = models.merged(models.load_policy(policy_folder(config, name), config.model))
        with progress.bar(f"compare: {name} answers", len(ids)) as report:
            # The same seed for every model: where two models agree, so do their answers.
            found = generate(model, tokenizer, ids, section, f"{config.seed} compare", skip=len(partial.batches))
            for indices, answers in found:
                partial.add([[i, a.ids, a.text, a.finished] for i, a in zip(indices, answers, strict=True)])
                report(min(len(partial.batches) * section.batch_size, len(ids)))
        del model
        training.release()
    return [Answer(*row[1:]) for row in sorted((r for b in partial.batches for r in b), key=lambda row: row[0])]


def measure(
    config: Config, names: list[str], pairs: dict[str, list[Pair]], tokenizer: Any
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(KL samples per model, perplexity per model).

    A KL sample is log pi(answer) - log ref(answer) in nats, for an answer sampled from pi at temperature 1; its mean
    over answers is an unbiased estimate of KL(pi || reference). It is left out where answers were not sampled so.
    """
    plain = config.compare.temperature == 1 and config.compare.top_p == 1 and config.compare.top_k == 0
    moved = [name for name in names if name in ("dpo", "ppo")] if plain else []
    demonstrations = held_out_demonstrations(config, tokenizer)
    sums: dict[str, list[float]] = {}
    perplexity: dict[str, Any] = {}
    reference: dict[str, list[float]] = {}
    loaded = (
        names if "sft" in names or not moved else [*names, "sft"]
    )  # in a pipeline without sft, the base is reference
    for name in loaded:
        model = models.load_policy(policy_folder(config, name), config.model)
        work = [own for own in moved if own == name or name == _reference(loaded)]
        total = sum(len(pairs[own]) for own in work) + (len(demonstrations) if name in names else 0)
        with progress.bar(f"compare: {name} likelihoods", total) as report:
            done = 0

            def score(rows: list[Pair], model: Any = model, report: Callable[..., None] = report) -> list[Any]:
                nonlocal done
                found = answer_logprobs(model, rows, tokenizer.pad_token_id, on_progress=lambda n: report(done + n))
                done += len(rows)
                return found

            for own in work:
                target = sums if own == name else reference
                target[own] = [float(row.sum()) for row in score(pairs[own])]
            if demonstrations and name in names:
                perplexity[name] = _perplexity([float(-row.mean()) for row in score(demonstrations)], config.seed)
        del model
        training.release()
    kl = {name: [a - b for a, b in zip(sums[name], reference[name], strict=True)] for name in moved}
    return kl, perplexity


def _reference(names: list[str]) -> str:
    return "sft" if "sft" in names else "base"


def held_out_demonstrations(config: Config, tokenizer: Any) -> list[Pair]:
    """Prompt and answer tokens of the test side's demonstrations; empty in a pipeline without demonstrations."""
    if not config.data.demonstrations:
        return []
    loaded = load_demonstrations(config.data.demonstrations, config.data.test_share, config.data.max_rows)
    rows = [record for record in loaded.records if record["split"] == "test"]
    pairs = [(prompt_ids(tokenizer, r["prompt"]), answer_ids(tokenizer, r["prompt"], r["completion"])) for r in rows]
    limit = config.sft.max_length
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= limit]
    if len(kept) < len(pairs):
        progress.say(f"  left out {len(pairs) - len(kept)} of {len(pairs)} demonstrations longer than {limit} tokens")
    return kept[: config.compare.max_prompts]


def reward_scores(
    config: Config,
    prompts: list[Record],
    answers: dict[str, list[Answer]],
    pairs: dict[str, list[Pair]],
    tokenizer: Any,
) -> dict[str, list[float]]:
    """The reward model's score of every model's answers: from their tokens, or from their text where it has a base and
    a tokenizer of its own."""
    from reward.scoring import score, score_rows

    folder = str(config.folder("reward") / "model")
    model = models.load_reward_model(folder, config.model)
    conversations = [record["prompt"] for record in prompts]
    scores = {}
    with progress.bar("compare: reward", sum(map(len, pairs.values()))) as report:
        for number, (name, rows) in enumerate(pairs.items()):
            done = number * len(rows)

            def told(count: int, done: int = done) -> None:
                report(done + count)

            if config.reward.base:
                reader = Scorer(model, models.load_reward_tokenizer(folder), "reward")
                texts, finished = ([getattr(a, key) for a in answers[name]] for key in ("text", "finished"))
                found = score(reader, conversations, texts, finished=finished, on_progress=told)
                scores[name] = [float(value) for value in found.mean]
            else:
                whole = [prompt + answer for prompt, answer in rows]
                scores[name] = score_rows(model, whole, tokenizer.pad_token_id, on_progress=told)
    del model
    training.release()
    return scores


def ppo_course(folder: Path) -> PpoCourse:
    """Score and KL of every update of a finished ppo stage, and what its diagnosis found."""
    # The last line of an update wins: one that was done again after a kill has two.
    lines = {line["update"]: line for line in read_jsonl(folder / "metrics.jsonl") if "objective/kl" in line}
    updates = [lines[number] for number in sorted(lines)]
    health = json.loads((folder / HEALTH).read_text("utf-8"))
    keys = ("check", "culprit", "severity", "sentence")
    return {
        "score": [update["objective/score"] for update in updates],
        "kl": [update["objective/kl"] for update in updates],
        "findings": [cast(Finding, {key: finding[key] for key in keys}) for finding in health["findings"]],
    }


def notices(config: Config, judges: list[str]) -> list[str]:
    """What a reader must know before believing a figure."""
    said = []
    if config.label.source == "simulated" and "label" in config.stages:
        said.append(
            "These labels are simulated: a program with a documented taste stood in for people. The figures show that "
            "the pipeline works, not that people prefer a model."
        )
    if "ppo" in config.stages:
        said += _summary(config, "ppo").get("reward_trust", [])
    if "reward" in judges and not _summary(config, "reward").get("trusted", True):
        said.append(
            "The reward model, a judge here, failed its own trust report: what it prefers says little about the models."
        )
    if judges == ["reward"] and "ppo" in config.stages:
        said.append(
            "The only judge is the reward model that ppo was trained on. Ask people, or a judge that ppo has not seen, "
            "before shipping ppo."
        )
    return said


def _summary(config: Config, stage: str) -> dict[str, Any]:
    summary: dict[str, Any] = (read_info(config.folder(stage)) or {}).get("summary", {})
    return summary


def _verdicts(
    names: list[str],
    judges: list[str],
    wins: dict[str, dict[str, statistics.WinRate]],
    controlled: dict[str, dict[str, statistics.Estimate]],
    figures: list[ModelFigures],
) -> list[str]:
    base = figures[0]
    sentences = []
    for name, figure in zip(names[1:], figures[1:], strict=True):
        kl, length = figure["kl"], figure["length"]
        assert length and base["length"]
        ratio = length["mean"] / base["length"]["mean"]
        win = wins[name][judges[0]]
        judge = f"the {JUDGES[judges[0]][0]}"
        equal = controlled[name][judges[0]]
        moved = kl["mean"] if kl else None
        sentences.append(statistics.verdict_sentence(name, names[0], win, judge, moved, ratio, equal))
    return sentences


def _mean(values: Any, seed: int) -> Any:
    return None if values is None else statistics.mean_with_interval(values, seed=seed).record()


def _perplexity(losses: list[float], seed: int) -> Any:
    """exp of the mean over demonstrations of their loss in nats per token, and of the ends of its interval."""
    estimate = statistics.mean_with_interval(losses, seed=seed).record()
    mean = math.exp(estimate["mean"])
    ends = {end: None if estimate[end] is None else math.exp(estimate[end]) for end in ("low", "high")}
    error = estimate["standard_error"]
    return {"mean": mean, **ends, "standard_error": None if error is None else mean * error, "n": estimate["n"]}


def _beats(mine: float, other: float) -> float:
    return 0.5 if mine == other else float(mine > other)


def _rows(prompts: list[Record], answers: dict[str, list[Answer]]) -> list[Record]:
    return [
        {
            "prompt": record["prompt"],
            "prompt_id": record["prompt_id"],
            "split": record["split"],
            "answers": [
                {"model": name, "text": found[index].text, "finished": found[index].finished}
                for name, found in answers.items()
            ],
        }
        for index, record in enumerate(prompts)
    ]


def _examples(
    prompts: list[Record],
    answers: dict[str, list[Answer]],
    rewards: dict[str, list[float]],
    utility: dict[str, list[float]],
) -> list[Example]:
    judged = {JUDGES["simulated"][0]: utility, JUDGES["reward"][0]: rewards}
    return [
        {
            "prompt": prompt_text(record["prompt"]),
            "answers": [
                {
                    "model": name,
                    "text": found[index].text,
                    "scores": {judge: round(by[name][index], 3) for judge, by in judged.items() if name in by},
                }
                for name, found in answers.items()
            ],
        }
        for index, record in enumerate(prompts)
    ]


def _lineage(run: Run) -> list[Any]:
    keys = ("stage", "folder", "digest", "parents", "data")
    chain = [{key: entry[key] for key in keys} for entry in lineage(run.folder)]
    return [entry for entry in chain if entry["stage"] != run.stage]
