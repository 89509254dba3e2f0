"""Stage 7, compare: every model answers the same held-out prompts; judges, costs, and a verdict with error bars.

Writes answers.jsonl, report.json, report.html and model_card.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from align import progress, ranks
from align.compare import contestants as who
from align.compare import people, telling, verdict
from align.compare import report as page
from align.compare.abilities import measure_abilities, tasks_of
from align.compare.climb import answers_along, over_optimisation
from align.compare.contestants import Contestant, answers_of
from align.compare.judging import Answered, Judgement, judge_names, judges_of
from align.compare.likelihoods import AnswerFigures
from align.compare.measuring import measure, reference_of
from align.compare.schema import SCHEMA, Finding, ModelFigures, PpoCourse, Report
from align.compare.texts import text_figures
from align.config import PREPARE, STAGES, Config
from align.data.load import load_demonstrations
from align.data.render import prompt_ids
from align.ppo.diagnosis import HEALTH
from align.runs import Run, lineage, versions
from labeling_ui.store import LabelStore
from reward.records import Record, answer_text, prompt_id, read_jsonl, write_jsonl
from reward.statistics import MeanFigure


def run_compare(config: Config, run: Run) -> dict[str, Any]:
    """Answer, on all processes; then judge, measure and write on the first, and return the headline figures."""
    section, seed = config.compare, config.seed
    found = who.contestants(config)
    judges = ranks.together(lambda: judges_of(config, run, found) if ranks.is_first() else [])
    tasks = tasks_of(config)
    prompts, seen_before = who.chosen_prompts(config, run, found)
    names = [one.name for one in found]
    asked = ", ".join(judge.name for judge in judges)
    progress.say(f"  {len(prompts)} prompts, models {', '.join(names)}, judges {asked}")

    seen = answer(config, run, found, prompts)
    reference = reference_of(config, found)
    looked_back = answers_along(config, run, found, seen, reference)
    if not ranks.is_first():
        return {}
    write_jsonl(run.folder / "answers.jsonl", _rows(seen))
    if section.blind_pairs and "people" not in judge_names(config):
        with LabelStore(people.store_address(config)) as store:
            people.send(config, store, seen)
    judgements = {judge.name: judge.judge(seen) for judge in judges}
    first_judge = judges[0].name

    unit, lengths = lengths_of(found, seen)
    demonstrations = demonstrations_of(config)
    wins, equal = verdict.win_figures(judgements), verdict.equal_length(judgements, lengths, names[0])
    abilities = verdict.abilities(judgements[first_judge].scores, seed) if judgements[first_judge].scores else {}
    measured = measure(config, found, seen, reference, demonstrations)
    answered = {prompt_id(record["prompt"]): answer_text(record["completion"]) for record in demonstrations}
    wanted = [answered.get(record["prompt_id"]) for record in prompts]
    on_files, by_lm_eval = measure_abilities(config, found, tasks)
    figures: list[ModelFigures] = []
    for one in found:
        name = one.name
        figure = figures_of(one, seen, judgements, measured.answers.get(name, []), lengths[name], wanted, seed)
        figure["win_rate"] = wins.get(name, {})
        figure["equal_length"] = {by: cast(MeanFigure, told.record()) for by, told in equal.get(name, {}).items()}
        figure["perplexity"] = measured.perplexity.get(name)
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
        notices=telling.notices(config, found, judges, seen, judgements),
        verdict=[
            verdict.headline(names[0], first_judge, figures, equal),
            *telling.sentences(first_judge, figures, equal),
        ],
        judges=telling.judge_figures(judges, judgements),
        prompts={
            "n": len(prompts),
            "split": "all" if config.stages == ["compare"] else "test",
            "digest": who.prompts_digest(prompts),
        },
        reference=reference.name if reference else None,
        length_unit=unit,
        models=figures,
        examples=telling.examples(seen, judgements, first_judge, section.examples),
        lineage=_lineage(run),
        seeds={"seed": seed},
        versions=versions(),
        settings=section.model_dump(mode="json") | {"test_share": config.data.test_share},
    )
    if seen_before:
        report["prompts"]["seen"] = seen_before
    if any(one.place == "ppo" for one in found):
        report["ppo"] = ppo_course(config.folder("ppo"))
    if looked_back:
        report["overoptimisation"] = over_optimisation(config, looked_back, judges, seen, judgements, measured)
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
    measured: Sequence[AnswerFigures | None],
    lengths: Sequence[int],
    references: Sequence[str | None],
    seed: int,
) -> ModelFigures:
    """What is measured of one model's answers by themselves."""
    rows = [row for row in measured if row is not None]
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
    if all(who.same_tokens(one.tokenizer, found[0].tokenizer) for one in found):
        return "tokens", {name: [len(answer.ids) for answer in answers] for name, answers in seen.answers.items()}
    return "characters", {name: [len(answer.text) for answer in answers] for name, answers in seen.answers.items()}


def demonstrations_of(config: Config) -> list[Record]:
    """Every demonstration of the pipeline, both sides: the references of BLEU and ROUGE, and of perplexity."""
    if not config.data.demonstrations:
        return []
    return load_demonstrations(config.data.demonstrations, config.data.test_share, config.data.max_rows).records


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
    return sorted(chain, key=lambda step: (PREPARE, *STAGES).index(step["stage"]))
