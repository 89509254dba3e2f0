"""Is it the SFT model, the reward or the hyperparameters? Says so from the figures of a PPO run, in plain sentences.

Every check gives at most one finding. It looks at the recent updates through their median, so one odd update says
nothing; a trend compares them with the first ones. A figure that is missing is NaN, and every comparison with NaN is
False: the conditions are written so that False means no finding.

What healthy PPO on language models shows, from which the limits below keep their distance: an update moves the policy
by 0.001-0.05 nats a token and clips less than 30 % of them, KL to the reference is 1-20 nats an answer, and rounding to
bf16 sets sampling and training apart by less than 0.05 nats a token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Culprit = Literal["sft model", "reward", "critic", "hyperparameters", "sampling"]
Severity = Literal["warning", "error"]
Update = Mapping[str, float]

HEALTH = "health.json"  # where a ppo stage keeps its findings

RECENT, FIRST = 5, 3  # updates; to move a median of 5 takes 3 odd ones
PATIENCE = 10  # updates before a check says that something does not happen


@dataclass(frozen=True)
class Settings:
    """The keys of `ppo` that figures are weighed against, or that a remedy names with their value."""

    response_length: int
    temperature: float
    kl_coef: float
    kl_target: float | None
    learning_rate: float
    critic_warmup_updates: int
    num_ppo_epochs: int
    cliprange: float
    vf_coef: float
    missing_eos_penalty: float | None


@dataclass(frozen=True)
class Finding:
    check: str  # a stable name
    culprit: Culprit
    severity: Severity  # error: the run is not worth continuing as it is
    evidence: str  # one clause, with the numbers
    remedy: str  # imperative, with the keys of `ppo` to change

    @property
    def sentence(self) -> str:
        return f"{self.evidence[0].upper()}{self.evidence[1:]}: {self.remedy}."


def diagnose(updates: Sequence[Update], settings: Settings) -> list[Finding]:
    """What is wrong with a run, errors before warnings, then the likeliest culprit first; [] where it is healthy.

    Args:
        updates: the logged figures of each update, oldest first; keys may be missing and values NaN.
    """
    run = _Run(updates, settings)
    found = [finding for check in _CHECKS if (finding := check(run))]
    names = {finding.check for finding in found}
    found = [finding for finding in found if not names & _EXPLAINED_BY.get(finding.check, set())]
    if not found and (stalled := _score_stalled(run)):  # a symptom of all the others, so told only when alone
        found = [stalled]
    return sorted(found, key=lambda finding: finding.severity)  # "error" < "warning", and the sort is stable


def summary(findings: Sequence[Finding]) -> str:
    """The sentences, one a line."""
    return "\n".join(finding.sentence for finding in findings) or "Healthy: no check found anything wrong."


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    updates: Sequence[Update]
    settings: Settings

    def __len__(self) -> int:
        return len(self.updates)

    def after_warmup(self) -> _Run:
        """Only the updates that train the policy."""
        warmup = self.settings.critic_warmup_updates
        numbers = [(_values([u], "update") or [i])[0] for i, u in enumerate(self.updates)]
        return _Run([u for u, i in zip(self.updates, numbers, strict=True) if i >= warmup], self.settings)

    def recent(self, key: str, at_least: int = 3) -> float:
        """The median of the last updates; NaN where fewer than `at_least` of them have the figure."""
        return _median(self.updates[-RECENT:], key, at_least)

    def first(self, key: str) -> float:
        """The median of the first updates; NaN while they overlap with the recent ones."""
        return _median(self.updates[:FIRST], key, 2) if len(self) >= FIRST + RECENT else math.nan

    def rise(self, key: str) -> tuple[float, float]:
        """Mean of the last third less mean of the first, and its standard error; NaN below 9 updates."""
        values = _values(self.updates, key)
        third = len(values) // 3
        if third < 3:
            return math.nan, math.nan
        head, tail = values[:third], values[-third:]
        error = math.sqrt((statistics.variance(head) + statistics.variance(tail)) / third)
        return statistics.fmean(tail) - statistics.fmean(head), error

    def rows(self, *keys: str) -> list[list[float]]:
        """The figures of the updates that have all of them."""
        return [row for u in self.updates if len(row := [v for key in keys for v in _values([u], key)]) == len(keys)]

    @property
    def kl_coef(self) -> float:
        """As it is now, where it adapts."""
        now = self.recent("objective/kl_coef", at_least=1)
        return now if now >= 0 else self.settings.kl_coef


def _values(updates: Sequence[Update], key: str) -> list[float]:
    """The finite ones."""
    return [u[key] for u in updates if isinstance(u.get(key), int | float) and math.isfinite(u[key])]


def _median(updates: Sequence[Update], key: str, at_least: int) -> float:
    values = _values(updates, key)
    return statistics.median(values) if len(values) >= at_least else math.nan


def _broken(update: Update, key: str) -> bool:
    return isinstance(update.get(key), float) and not math.isfinite(update[key])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _grade(is_error: bool) -> Severity:
    return "error" if is_error else "warning"


# --- reward ----------------------------------------------------------------------------------------------------------


def _flat(spread: float, score: float) -> bool:
    """No spread to speak of: bf16 rounds by 4e-3 of the score, a real difference between answers is larger."""
    return spread <= max(1e-6, 1e-4 * abs(score))


def _reward_not_finite(run: _Run) -> Finding | None:
    bad = [u for u in run.updates[-RECENT:] if _broken(u, "objective/score")]
    if not bad:
        return None  # a component alone may be NaN: it had no say on the update's episodes
    parts = sorted({k for u in bad for k in u if k.startswith("reward/") and not k.endswith("_std") and _broken(u, k)})
    which = f" ({', '.join(parts)})" if parts else ""
    evidence = f"the score{which} was NaN or infinite in {len(bad)} of the last {min(RECENT, len(run))} updates"
    return Finding("reward-not-finite", "reward", "error", evidence, "mend the reward and resume from a checkpoint")


def _scores_clipped(run: _Run) -> Finding | None:
    share = run.recent("objective/score_clipped")
    if not share > 0.5:
        return None
    evidence = f"{_percent(share)} of the scores are cut by reward_clip, which makes good answers equal"
    # 95 %: hardly an answer left to prefer.
    return Finding("scores-clipped", "hyperparameters", _grade(share > 0.95), evidence, "raise reward_clip")


def _reward_constant(run: _Run) -> Finding | None:
    rows = run.rows("objective/score_std", "objective/score")
    flat, scores = [_flat(*row) for row in rows], [score for _, score in rows]
    if not flat or not all(flat[-RECENT:]):
        return None
    if all(flat) and _flat(max(scores) - min(scores), scores[-1]):
        times = f"all {len(flat)} updates" if len(flat) > 1 else "the only update"
        evidence = f"the reward gives every answer the same score ({_number(scores[-1])} in {times})"
        remedy = "read episodes beside their scores, and mend the reward or take prompts that it tells answers apart on"
        # Said at once; but a rule that pays rare successes has three updates to show one before it is an error.
        return Finding("reward-constant", "reward", _grade(len(flat) >= 3), evidence, remedy)
    if len(flat) <= RECENT:
        return None
    evidence = f"the reward no longer tells answers apart (all score {_number(scores[-1])}, for {RECENT} updates)"
    remedy = "stop here if that is the best score, else read the answers and go back to an earlier checkpoint"
    return Finding("reward-constant", "reward", "warning", evidence, remedy)


def _component_constant(run: _Run) -> Finding | None:
    stds = {key for u in run.updates for key in u if key.startswith("reward/") and key.endswith("_std")}
    rows = {name: run.rows(name + "_std", name) for name in sorted(std.removesuffix("_std") for std in stds)}
    flat = [name for name, pairs in rows.items() if len(pairs) >= RECENT and all(_flat(*pair) for pair in pairs)]
    if sum(map(bool, rows.values())) < 2 or not flat:
        return None
    listed = " and ".join(f"{name} ({_number(rows[name][-1][1])})" for name in flat)
    evidence = f"of the rewards, {listed} gave every answer the same score in all {len(rows[flat[0]])} updates"
    return Finding("reward-component-constant", "reward", "warning", evidence, "mend that reward or take it out")


def _reward_is_length(run: _Run) -> Finding | None:
    rise, error = run.rise("objective/score")
    first, now, r = run.first("episode/length"), run.recent("episode/length"), run.recent("episode/score_length_r")
    # r = 0.7: length is half of the variance of the scores. A quarter longer: answers did follow.
    if not (rise > 3 * error and now > 1.25 * first and r > 0.7):
        return None
    lengths = f"from {_number(first)} to {_number(now)} tokens"
    evidence = f"the score rises with length (r = {r:.2f}), and answers grew {lengths}"
    remedy = "take length out of the reward, with a penalty or with preference pairs of like length"
    return Finding("reward-is-length", "reward", "warning", evidence, remedy)


def _score_stalled(run: _Run) -> Finding | None:
    run = run.after_warmup()
    rise, error = run.rise("objective/score")
    spread, kl = run.recent("objective/score_std"), run.recent("objective/kl")
    moves = run.recent("policy/approx_kl") >= 1e-5
    # RLHF gains half a standard deviation of the score and more; here 0.2 is out of reach by two standard errors.
    if not (len(run) >= 3 * PATIENCE and moves and rise + 2 * error < 0.2 * spread):
        return None
    evidence = f"over {len(run)} updates the score changed by {_number(rise)}, against a spread of {_number(spread)}"
    if _reachable_kl(run, spread) < 4:
        return Finding("score-stalled", "hyperparameters", "warning", evidence, _lower_kl_coef(run, spread))
    if kl < 1:
        remedy = f"raise learning_rate ({run.settings.learning_rate:g} now), as KL is only {_number(kl)} nats an answer"
        return Finding("score-stalled", "hyperparameters", "warning", evidence, remedy)
    remedy = "measure the reward on held-out pairs, for the policy does move, or take more episodes an update"
    return Finding("score-stalled", "reward", "warning", evidence, remedy)


# --- sampling --------------------------------------------------------------------------------------------------------


def _disagreement(run: _Run) -> tuple[float, Severity | None]:
    """Mean |log p sampler - log p trainer| in nats a token, and how bad; a mean over so many tokens tells at once."""
    kl, mean = run.recent("sampling/kl", at_least=1), run.recent("sampling/mismatch", at_least=1)
    # 0.1 is twice what rounding gives; where log-ratios are normal, a KL of 0.2 is a mean of 0.5.
    severity: Severity | None = "warning" if kl > 0.05 or mean > 0.1 else None
    return mean if mean >= 0 else kl, "error" if kl > 0.2 or mean > 0.5 else severity


def _sample_alike(run: _Run) -> str:
    temperature = _number(run.settings.temperature)
    return (
        f"sample at the temperature of training ({temperature}), without top-k, top-p or dropout, from the same weights"
    )


def _kl_negative(run: _Run) -> Finding | None:
    rows = _Run(run.updates[-RECENT:], run.settings).rows("objective/kl", "objective/kl_std")
    # No KL is negative, and an honest estimate is so by 3 standard errors once in 700 updates. 0.1: rounding.
    below = [kl for kl, error in rows if kl < min(-0.1, -3 * error)]
    if len(below) < 3:
        return None
    nats, disagree = _disagreement(run)
    evidence = f"KL is negative ({_number(statistics.median(below))} nats an answer)"
    if nats >= 0 and not disagree:
        evidence += f", though sampling and training agree to {_number(nats)} nats a token"
        remedy = "set kl_estimator to k3, which is never negative, or to full, which is exact"
        return Finding("kl-negative", "hyperparameters", "warning", evidence, remedy)
    evidence += f", as sampling and training disagree by {_number(nats)} nats a token" if disagree else ""
    return Finding("kl-negative", "sampling", "error", evidence, _sample_alike(run))


def _sampling_mismatch(run: _Run) -> Finding | None:
    nats, severity = _disagreement(run)
    if severity is None:
        return None
    evidence = f"sampling and training disagree by {_number(nats)} nats a token, where rounding gives 0.05 at most"
    return Finding("sampling-mismatch", "sampling", severity, evidence, _sample_alike(run))


# --- step size and KL ------------------------------------------------------------------------------------------------

_TOO_FAR = (  # key, warning above, error above, clause
    ("policy/approx_kl", 0.2, 1.0, "an update moves the policy by {} nats a token"),
    (
        "policy/approx_kl_last",
        0.2,
        1.0,
        "the last mini-batch of an update finds the policy {} nats a token from where it began",
    ),
    ("policy/clip_fraction", 0.4, 0.7, "{} of the tokens are clipped"),
    ("policy/ratio_max", 1e3, 1e6, "a token becomes {} times as likely in an update"),
)
_LOSSES = ("grad_norm", "loss/policy", "policy/approx_kl", "policy/ratio_max")


def _kl_leap(run: _Run) -> tuple[float, float, float]:
    """The two updates that raised KL most, where they brought most of what it is now: KL before and after (nats an
    answer), and the step in nats a token; NaN where there are none such."""
    rows = run.rows("objective/kl", "episode/length")
    kls, now = [kl for kl, _ in rows], run.recent("objective/kl")
    leaps = [(math.nan, math.nan, math.nan)]
    for i in range(1, len(rows) - 2):
        before = max(0.0, *kls[max(0, i - 2) : i])  # no KL is negative: an estimate below 0 is noise
        after, length = (statistics.median(column) for column in zip(*rows[i : i + 3], strict=True))
        if length > 0 and after - before > 0.5 * now and now - before > 0.5 * (after - before):
            leaps.append((before, after, (after - before) / length))
    return max(leaps, key=lambda leap: leap[2] if leap[2] >= 0 else -math.inf)


def _learning_rate_too_high(run: _Run) -> Finding | None:
    run, settings = run.after_warmup(), run.settings
    clauses, extreme = [], False
    # A policy torn apart by the first updates is calm afterwards: at nearly uniform tokens there is no gradient left.
    # A healthy update moves it by 0.05 nats a token; two that move it by 1 leave little of the reference.
    before, after, step = _kl_leap(run)
    if step > 1:
        clauses.append(f"KL leapt from {_number(before)} to {_number(after)} nats an answer within two updates")
        extreme = True
    for key, warning, error, clause in _TOO_FAR:
        value, is_share = run.recent(key), key == "policy/clip_fraction"
        if value > warning and not (is_share and settings.cliprange < 0.1):  # so narrow a range is meant to clip
            clauses.append(clause.format(_percent(value) if is_share else _number(value)))
            extreme |= value > error
    first, gradient = run.first("grad_norm"), run.recent("grad_norm")
    if gradient > 10 and gradient > 100 * first > 0:  # the critic's first gradients shrink in a healthy run
        clauses.append(f"the gradient norm grew from {_number(first)} to {_number(gradient)}")
        extreme |= gradient > 1e4 * first
    recent = run.updates[-RECENT:]
    not_finite = sum(any(_broken(u, key) for key in _LOSSES) for u in recent)
    if not_finite >= 3:  # the loss scaler of fp16 may skip a step or two
        clauses = [f"losses or gradients were NaN or infinite in {not_finite} of the last {len(recent)} updates"]
        extreme = True
    if not clauses:
        return None
    remedy = f"lower learning_rate ({settings.learning_rate:g} now) or num_ppo_epochs ({settings.num_ppo_epochs} now)"
    evidence = " and ".join(clauses[:2])
    return Finding("learning-rate-too-high", "hyperparameters", _grade(extreme), evidence, remedy)


def _policy_still(run: _Run) -> Finding | None:
    run = run.after_warmup()
    moved, clipped, kl = (run.recent(k) for k in ("policy/approx_kl", "policy/clip_fraction", "objective/kl"))
    # With one optimiser step an update, approx_kl is 0 by definition: KL to the reference has to be 0 as well.
    if not (len(run) >= PATIENCE and moved < 1e-5 and clipped <= 0 and abs(kl) < 0.1):
        return None
    evidence = f"after {len(run)} updates the policy is {_number(kl)} nats an answer from the reference"
    evidence += f" and moves by {_number(moved)} nats a token an update"
    remedy = f"raise learning_rate ({run.settings.learning_rate:g} now)"
    # Exactly 0: nothing is being trained.
    return Finding("policy-still", "hyperparameters", _grade(moved == kl == 0), evidence, remedy)


def _kl_runaway(run: _Run) -> Finding | None:
    target = run.settings.kl_target
    limit = max(40.0, 3 * (target or 0))
    now, before = run.recent("objective/kl"), _median(run.updates[-2 * RECENT : -RECENT], "objective/kl", 3)
    if not (now > limit and now > 1.1 * before):
        return None
    evidence = f"KL rose from {_number(before)} to {_number(now)} nats an answer in {RECENT} updates"
    evidence += f", where kl_target is {_number(target)}" if target else ""
    remedy = f"{'' if target else 'set kl_target, '}raise kl_coef ({_number(run.kl_coef)} now) or lower learning_rate"
    return Finding("kl-runaway", "hyperparameters", _grade(now > 4 * limit), evidence, remedy)


def _reachable_kl(run: _Run, spread: float) -> float:
    """KL in nats of the best policy, reference x exp(score / kl_coef): spread^2 / (2 kl_coef^2) for a normal score."""
    return spread**2 / (2 * run.kl_coef**2) if run.kl_coef > 0 else math.inf


def _lower_kl_coef(run: _Run, spread: float) -> str:
    return f"lower kl_coef from {_number(run.kl_coef)} to about {_number(spread / math.sqrt(20))}"  # reaches 10 nats


def _kl_pinned(run: _Run) -> Finding | None:
    run = run.after_warmup()
    kl, spread = run.recent("objective/kl"), run.recent("objective/score_std")
    moves = run.recent("policy/approx_kl") >= 1e-5
    if not (len(run) >= PATIENCE and moves and abs(kl) < 0.5 and spread > 1e-6 and _reachable_kl(run, spread) < 0.5):
        return None
    evidence = f"the penalty holds KL at {_number(kl)} nats an answer, as kl_coef is {_number(run.kl_coef)}"
    evidence += f" where scores differ by {_number(spread)}"
    return Finding("kl-pinned", "hyperparameters", "warning", evidence, _lower_kl_coef(run, spread))


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers_vanish(run: _Run) -> Finding | None:
    first, now = run.first("episode/length"), run.recent("episode/length")
    if not (now < 5 and now < 0.2 * first):
        return None
    evidence = f"answers shrank from {_number(first)} to {_number(now)} tokens, so it pays to stop at once"
    remedy = "look at the score of an empty answer and mend the reward, or raise kl_coef"
    return Finding("answers-vanish", "reward", "error", evidence, remedy)


def _answers_never_stop(run: _Run) -> Finding | None:
    early, now = _median(run.updates[:FIRST], "episode/finished", FIRST), run.recent("episode/finished")
    if not (early < 0.1 and now < 0.1):
        return None
    evidence = f"from the start only {_percent(now)} of the answers stop within {run.settings.response_length} tokens"
    remedy = "train sft on answers that end in the stop token, or raise response_length"
    remedy += ", or set missing_eos_penalty" if run.settings.missing_eos_penalty is None else ""
    return Finding("answers-never-stop", "sft model", "warning", evidence, remedy)  # some tasks mean it: no error


def _answers_ramble(run: _Run) -> Finding | None:
    first, now = run.first("episode/finished"), run.recent("episode/finished")
    if not (now < 0.5 * first and now < first - 0.2):
        return None
    penalty = run.settings.missing_eos_penalty
    evidence = f"{_percent(first)} of the answers stopped by themselves at first, and {_percent(now)} do now"
    remedy = "set missing_eos_penalty" if penalty is None else f"raise missing_eos_penalty ({_number(penalty)} now)"
    return Finding("answers-ramble", "hyperparameters", "warning", evidence, remedy)


_COLLAPSE = (  # key, warning and error below this share of the first, clause, format; healthy entropy halves at most
    ("objective/entropy", 0.2, 0.05, "entropy fell from {} to {} nats a token", _number),
    ("episode/distinct", 0.4, 0.2, "different 4-grams fell from {} to {} of all", _percent),
)


def _mode_collapse(run: _Run) -> Finding | None:
    clauses, extreme = [], False
    for key, warning, error, clause, say in _COLLAPSE:
        first, now = run.first(key), run.recent(key)
        if now < warning * first:
            clauses.append(clause.format(say(first), say(now)))
            extreme |= now < error * first
    if not clauses:
        return None
    remedy = f"go back to an earlier checkpoint and raise kl_coef ({_number(run.kl_coef)} now) or lower learning_rate"
    return Finding("mode-collapse", "hyperparameters", _grade(extreme), " and ".join(clauses), remedy)


# --- critic ----------------------------------------------------------------------------------------------------------


def _returns_settled(run: _Run) -> bool:
    """Whether returns have lost half of their variance, as where answers became good: little is left to explain."""
    return run.recent("return/std") < 0.7 * run.first("return/std")


def _critic_diverges(run: _Run) -> Finding | None:
    explained, learning_rate = run.recent("value/explained_variance"), run.settings.learning_rate
    if not (explained < -1 and len(run.after_warmup()) >= PATIENCE) or _returns_settled(run):
        return None
    # A critic starts at 0 and first learns the mean of the returns, which explains none of their variance.
    if run.recent("loss/value") < 0.8 * _median(run.updates[-2 * RECENT : -RECENT], "loss/value", 3):
        return None
    evidence = f"the critic's errors vary {_number(1 - explained)} times as much as the returns it predicts"
    remedy = f"lower learning_rate ({learning_rate:g} now) or warm the critic up (critic_warmup_updates)"
    return Finding("critic-diverges", "critic", "error", evidence, remedy)


def _critic_explains_nothing(run: _Run) -> Finding | None:
    explained, first, now = run.recent("value/explained_variance"), run.first("loss/value"), run.recent("loss/value")
    if not (explained < 0.05 and len(run.after_warmup()) >= PATIENCE) or _returns_settled(run):
        return None
    share = _percent(max(explained, 0))
    evidence = f"the critic explains {share} of the variance of the returns after {len(run)} updates"
    falls, stands = now < 0.8 * first, now >= 0.8 * first
    evidence += f", and its loss stands at {_number(now)}" if stands else ""
    evidence += f", though its loss fell from {_number(first)} to {_number(now)}" if falls else ""
    warmup = f"critic_warmup_updates, {run.settings.critic_warmup_updates} now"
    remedy = (
        f"warm it up longer ({warmup})"
        if falls
        else f"raise vf_coef ({run.settings.vf_coef:g} now) or warm it up ({warmup})"
    )
    return Finding("critic-explains-nothing", "critic", "warning", evidence, remedy)


# The likeliest culprit first: what is broken for certain, then what the run was set to, then what it turned into.
_CHECKS: tuple[Callable[[_Run], Finding | None], ...] = (
    _reward_not_finite,
    _reward_constant,
    _kl_negative,
    _sampling_mismatch,
    _scores_clipped,
    _learning_rate_too_high,
    _policy_still,
    _kl_pinned,
    _answers_never_stop,
    _answers_vanish,
    _reward_is_length,
    _kl_runaway,
    _mode_collapse,
    _answers_ramble,
    _critic_diverges,
    _critic_explains_nothing,
    _component_constant,
)
# A finding is left out beside one that causes it.
_EXPLAINED_BY = {
    "reward-constant": {"scores-clipped"},
    "sampling-mismatch": {"kl-negative"},
    "learning-rate-too-high": {"reward-not-finite"},
    "policy-still": {"reward-constant"},
    "critic-explains-nothing": {"reward-constant", "critic-diverges", "policy-still", "learning-rate-too-high"},
    "answers-ramble": {"reward-is-length"},
    "mode-collapse": {"answers-vanish"},
}
