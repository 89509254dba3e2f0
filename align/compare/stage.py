"""Stage 7, compare: every model answers the same held-out prompts; judges, costs, and a verdict with error bars.

Writes answers.jsonl, report.json, report.html and model_card.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from align import models, progress, ranks, training
from align.compare import contestants as who
from align.compare import people, verdict
from align.compare import report as page
from align.compare.abilities import measure_abilities, tasks_of
from align.compare.climb import over_optimisation
from align.compare.contestants import Contestant, answers_of
from align.compare.judging import Answered, Judge, Judgement, judge_names, judges_of
from align.compare.likelihoods import AnswerFigures, answer_figures, perplexity_figure
from align.compare.schema import SCHEMA, Example, Finding, ModelFigures, PpoCourse, Report
from align.compare.schema import Judge as JudgeFigures
from align.compare.statistics import Estimate, WinRate, verdict_sentence
from align.compare.texts import text_figures
from align.config import STAGES, Config
from align.data.load import load_demonstrations
from align.data.render import answer_ids, prompt_ids
from align.logprobs import Pair, answer_logprobs
from align.ppo.diagnosis import HEALTH
from align.runs import Run, lineage, read_info, versions
from align.sample import sft_model
from labeling_ui.store import LabelStore
from reward.records import Record, answer_text, prompt_id, prompt_text, read_jsonl, write_jsonl
from reward.statistics import MeanFigure


def run_compare(config: Config, run: Run) -> dict[str, Any]:
    """Answer, judge, measure, write; returns the headline figures."""
    if not ranks.is_first():
        return {}
    section, seed = config.compare, config.seed
    found = who.contestants(config)
    judges = judges_of(config, run, found)
    tasks = tasks_of(config)
    prompts, seen_before = who.chosen_prompts(config, run, found)
    names = [one.name for one in found]
    asked = ", ".join(judge.name for judge in judges)
    progress.say(f"  {len(prompts)} prompts, models {', '.join(names)}, judges {asked}")

    seen = answer(config, run, found, prompts)
    write_jsonl(run.folder / "answers.jsonl", _rows(seen))
    if section.blind_pairs and "people" not in judge_names(config):
        with LabelStore(people.store_address(config)) as store:
            people.send(config, store, seen)
    judgements = {judge.name: judge.judge(seen) for judge in judges}
    first_judge = judges[0].name

    unit, lengths = lengths_of(found, seen)
    wins, equal = verdict.win_figures(judgements), verdict.equal_length(judgements, lengths, names[0])
    abilities = verdict.abilities(judgements[first_judge].scores, seed) if judgements[first_judge].scores else {}
    reference, likelihoods, perplexity = measure(config, found, seen)
    references = demonstrated(config)
    wanted = [references.get(record["prompt_id"]) for record in prompts]
    on_files, by_lm_eval = measure_abilities(config, found, tasks)
    figures: list[ModelFigures] = []
    for one in found:
        name = one.name
        figure = figures_of(one, seen, judgements, likelihoods.get(name, []), lengths[name], wanted, seed)
        figure["win_rate"] = wins.get(name, {})
        figure["equal_length"] = {by: cast(MeanFigure, told.record()) for by, told in equal.get(name, {}).items()}
        figure["perplexity"] = perplexity.get(name)
        if name in abilities:
            figure["ability"] = abilities[name]
        if name in on_files:
            figure["tasks"] = on_files[name]
        if name in by_lm_eval:
            figure["lm_eval"] = by_lm_eval[name]
        figures.append(figure)
    report = Report(
        schema=SCHEMA,
        pipeline=config.name,
        notices=notices(config, found, judges, seen, judgements),
        verdict=[
            verdict.headline(names[0], first_judge, figures, equal),
            *sentences(first_judge, figures, equal),
        ],
        judges=judge_figures(judges, judgements),
        prompts={
            "n": len(prompts),
            "split": "all" if config.stages == ["compare"] else "test",
            "digest": who.prompts_digest(prompts),
            **({"seen": seen_before} if seen_before else {}),  # type: ignore[typeddict-item]
        },
        reference=reference,
        length_unit=unit,
        models=figures,
        examples=examples(seen, judgements, first_judge, section.examples),
        lineage=_lineage(run),
        seeds={"seed": seed},
        versions=versions(),
        settings=section.model_dump(mode="json") | {"test_share": config.data.test_share},
    )
    if any(one.place == "ppo" for one in found):
        report["ppo"] = ppo_course(config.folder("ppo"))
        if climbed := over_optimisation(config, run, found, prompts, judges):
            report["overoptimisation"] = climbed
    path = page.write_report(report, run.folder)
    progress.table(page.terminal_table(report))
    for sentence in [*report["notices"], *report["verdict"]]:
        progress.say(f"  {sentence}")
    progress.say(f"  report: {path}")
    return {
        "prompts": len(prompts),
        "verdict": report["verdict"],
        "win_rates": {name: dict(by) for name, by in wins.items()},
    }


def figures_of(
    one: Contestant,
    seen: Answered,
    judgements: Mapping[str, Judgement],
    rows: Sequence[AnswerFigures],
    lengths: Sequence[int],
    references: Sequence[str | None],
    seed: int,
) -> ModelFigures:
    """What is measured of one model's answers by themselves; rows are those that have tokens."""
    answers = seen.answers[one.name]
    scores: dict[str, MeanFigure] = {}
    for judge, told in judgements.items():
        given = [score for score in told.scores.get(one.name, []) if score is not None]
        # A mean over some of the prompts would be another figure.
        if len(given) == len(answers) and (mean := verdict.mean_of(given, seed)):
            scores[judge] = mean
    kls = [row.kl for row in rows if row.kl is not None]
    return {
        "name": one.name,
        "path": one.path,
        "scores": scores,
        "kl": verdict.mean_of(kls, seed),
        "kl_per_token": verdict.ratio_of(kls, [row.tokens for row in rows], seed) if kls else None,
        "entropy": verdict.mean_of([row.entropy for row in rows], seed),
        "length": verdict.mean_of(lengths, seed),
        "finished": None if one.given is not None else sum(a.finished for a in answers) / len(answers),
        "perplexity": None,
        "text": text_figures([answer.text for answer in answers], references, seed),
    }


def answer(config: Config, run: Run, found: Sequence[Contestant], prompts: list[Record]) -> Answered:
    """Every model's answers, generated or read back."""
    answers, ids = {}, {}
    for number, one in enumerate(found):
        answers[one.name] = answers_of(config, run, one, prompts, str(number))
        asked = one.tokenizer is not None
        ids[one.name] = [prompt_ids(one.tokenizer, record["prompt"]) if asked else [] for record in prompts]
    return Answered(prompts, ids, answers)


def lengths_of(found: Sequence[Contestant], seen: Answered) -> tuple[Any, dict[str, list[int]]]:
    """(unit, length of every answer by model): tokens, or characters where tokens cannot be compared."""
    if all(who.shares_tokens(one, found[0]) for one in found):
        return "tokens", {name: [len(answer.ids) for answer in answers] for name, answers in seen.answers.items()}
    return "characters", {name: [len(answer.text) for answer in answers] for name, answers in seen.answers.items()}


def measure(
    config: Config, found: Sequence[Contestant], seen: Answered
) -> tuple[str | None, dict[str, list[AnswerFigures]], dict[str, MeanFigure]]:
    """(name of the reference, figures of every answer by model, perplexity by model).

    KL is exact at every position of an answer that the policy itself sampled at temperature 1; where answers are not
    sampled so, it is left out, because its mean over them is not KL(pi || reference). The reference is the pipeline's
    SFT model (its base, without sft); between models from elsewhere, the first.
    """
    alone = config.stages == ["compare"]
    base = found[0] if alone else next((one for one in found if one.place == "sft"), None)
    place = found[0].path if alone else sft_model(config)
    name = found[0].name if alone else ("sft" if "sft" in config.stages else "base")
    if alone and found[0].tokenizer is None:
        place, name = "", ""
    tokenizer = base.tokenizer if base else models.load_tokenizer(place, config.model)
    whole = config.compare.temperature == 1 and config.compare.top_p == 1 and config.compare.top_k == 0
    figures: dict[str, list[AnswerFigures]] = {}
    perplexity: dict[str, MeanFigure] = {}
    demonstrations = held_out_demonstrations(config, tokenizer) if place else []
    for one in found:
        if one.tokenizer is None:
            continue
        pad = one.tokenizer.pad_token_id
        comparable = bool(place) and who.shares_tokens(one, Contestant("", "", "", tokenizer))
        # The base was before the reference: it has not moved away from it.
        moved = comparable and whole and one.path != place and one.place != "base"
        pairs = [(p, a.ids) for p, a in zip(seen.prompt_ids[one.name], seen.answers[one.name], strict=True)]
        kept = [pair for pair in pairs if pair[1]]
        model = models.load_policy(one.path, config.model)
        reference: Any = None
        if moved:
            on_reference = hasattr(model, "peft_config") and _base_of(one.path) == place
            reference = "adapter off" if on_reference else models.merged(models.load_policy(place, config.model))
        rows = demonstrations if comparable else []
        with progress.bar(f"compare: {one.name} likelihoods", len(kept) + len(rows)) as report:
            figures[one.name] = answer_figures(model, reference, kept, pad, on_progress=report)
            if rows:
                told = answer_logprobs(models.merged(model), rows, pad, on_progress=_after(report, len(kept)))
                perplexity[one.name] = perplexity_figure([float(-row.mean()) for row in told], config.seed)
        del model, reference
        training.release()
    return name or None, figures, perplexity


def _after(report: Callable[[int], object], done: int) -> Callable[[int], object]:
    return lambda count: report(done + count)


def _base_of(path: str) -> str:
    return str(json.loads((Path(path) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])


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


def demonstrated(config: Config) -> dict[str, str]:
    """Demonstrated answers by prompt id: the references of BLEU and ROUGE."""
    if not config.data.demonstrations:
        return {}
    loaded = load_demonstrations(config.data.demonstrations, config.data.test_share, config.data.max_rows)
    return {prompt_id(record["prompt"]): answer_text(record["completion"]) for record in loaded.records}


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


def notices_of_pipeline(config: Config, has_ppo: bool) -> list[str]:
    """What the pipeline's own stages say that a reader must know."""
    said = []
    if config.label.source == "simulated" and "label" in config.stages:
        said.append(
            "These labels are simulated: a program with a documented taste stood in for people. The figures show that "
            "the pipeline works, not that people prefer a model."
        )
    if has_ppo:
        said += _summary(config, "ppo").get("reward_trust", [])
    if "reward" in judge_names(config) and not _summary(config, "reward").get("trusted", True):
        said.append(
            "The reward model, a judge here, failed its own trust report: what it prefers says little about the models."
        )
    return said


def notices(
    config: Config,
    found: Sequence[Contestant],
    judges: Sequence[Judge],
    seen: Answered,
    judgements: Mapping[str, Judgement],
) -> list[str]:
    """What a reader must know before believing a figure."""
    said = notices_of_pipeline(config, any(one.place == "ppo" for one in found))
    count = len(seen.prompts)
    if count < verdict.FEW_PROMPTS:
        said.append(
            f"There are only {count} prompts: nothing but a huge difference could be seen. Compare on at least "
            f"{verdict.FEW_PROMPTS}, better 200."
        )
    if not any(judge.independent for judge in judges):
        said.append(
            "No judge is independent of ppo: all of them are what it was trained on. Ask people, or a judge that ppo "
            "has not seen, before shipping ppo."
        )
    said += who.differences(found)
    for one in found:
        empty = sum(not answer.text.strip() for answer in seen.answers[one.name])
        if empty:
            which = "Every answer" if empty == count else f"{empty} of {count} answers"
            said.append(f"{which} of {one.name} {'is' if empty in (1, count) else 'are'} empty.")
        if one.trained_on is None and one.given is None:
            said.append(f"What {one.name} was trained on is not known here: prompts it has seen could not be left out.")
    for judge in judges:
        told = judgements[judge.name]
        if told.asked and told.failed > told.asked / 10:
            said.append(
                f"The {judge.name} gave no usable answer to {told.failed} of {told.asked} questions: its figures rest "
                "on the others."
            )
    return said


def _summary(config: Config, stage: str) -> dict[str, Any]:
    summary: dict[str, Any] = (read_info(config.folder(stage)) or {}).get("summary", {})
    return summary


def judge_figures(judges: Sequence[Judge], judgements: Mapping[str, Judgement]) -> list[JudgeFigures]:
    """What is known of every judge's reliability."""
    voted = judgements.get(people.People.name)
    found: list[JudgeFigures] = []
    for judge in judges:
        told = judgements[judge.name]
        figures: JudgeFigures = {
            "name": judge.name,
            "description": judge.description,
            "independent": judge.independent,
            "sentences": [],
        }
        if told.asked:
            figures |= {"asked": told.asked, "failed": told.failed}
        if bias := verdict.bias_of(told):
            figures["bias"] = bias
        agrees = verdict.agreement(told, voted, "people") if voted and told is not voted else None
        if agrees:
            figures["agreement"] = agrees
        if judge.trust:
            figures["trust"] = judge.trust
        figures["sentences"] = verdict.reliability(told, bias, agrees)
        if told.votes:
            votes = sum(told.votes.values())
            figures["sentences"].append(f"{votes} votes were cast on {len(told.votes)} models' pairs.")
        found.append(figures)
    return found


def sentences(judge: str, figures: Sequence[ModelFigures], equal: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """The verdict on every model by the judge that is told first."""
    base, said = figures[0], []
    for figure in figures[1:]:
        name, kl, length = figure["name"], figure["kl"], figure["length"]
        won = figure.get("win_rate", {}).get(judge)
        if won is None:
            said.append(f"It is not known whether {name} is better than {base['name']}: the {judge} gave no verdict.")
            continue
        keys = ("rate", "low", "high", "wins", "ties", "losses", "n")
        win = WinRate(**{key: won[key] for key in keys})  # type: ignore[literal-required]
        ratio = (
            length["mean"] / base["length"]["mean"] if length and base["length"] and base["length"]["mean"] else None
        )
        moved = kl["mean"] if kl else None
        said.append(verdict_sentence(name, base["name"], win, f"the {judge}", moved, ratio, equal[name].get(judge)))
    return said


def examples(seen: Answered, judgements: Mapping[str, Judgement], judge: str, count: int) -> list[Example]:
    """The first `count` prompts with their answers, the worst regressions first."""
    scores = judgements[judge].scores
    margins = {
        name: [(mine or 0.0) - (base or 0.0) for mine, base in zip(scores[name], scores[seen.first], strict=True)]
        for name in seen.others
        if name in scores
    }
    order = verdict.worst_first(judgements[judge].outcomes, margins)
    return [
        {
            "prompt": prompt_text(seen.prompts[number]["prompt"]),
            "answers": [
                {
                    "model": name,
                    "text": answers[number].text,
                    "scores": {
                        by: round(score, 3)
                        for by, told in judgements.items()
                        if name in told.scores and (score := told.scores[name][number]) is not None
                    },
                    "outcomes": {
                        by: outcome
                        for by, told in judgements.items()
                        if name in told.outcomes and (outcome := told.outcomes[name][number]) is not None
                    },
                }
                for name, answers in seen.answers.items()
            ],
        }
        for number in order[:count]
    ]


def _rows(seen: Answered) -> list[Record]:
    return [
        {
            "prompt": record["prompt"],
            "prompt_id": record["prompt_id"],
            "split": record["split"],
            "answers": [
                {"model": name, "text": found[index].text, "finished": found[index].finished}
                for name, found in seen.answers.items()
            ],
        }
        for index, record in enumerate(seen.prompts)
    ]


def _lineage(run: Run) -> list[Any]:
    chain = []
    for entry in lineage(run.folder):
        if entry["stage"] == run.stage:
            continue
        step = {key: entry[key] for key in ("stage", "folder", "digest", "parents", "data")}
        if "labels" in entry["summary"]:
            keys = ("labels", "annotators", "aggregate", "ties")
            told = {key: entry["summary"][key] for key in keys if key in entry["summary"]}
            step["labels"] = told | {"simulated": entry["simulated_labels"]}
        chain.append(step)
    return sorted(chain, key=lambda step: STAGES.index(step["stage"]))
