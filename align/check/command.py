"""`align check CONFIG`, and the same check at the start of every training stage."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from align import progress, ranks
from align.check import record
from align.check.findings import Finding, refusals
from align.check.stages import Preflight
from align.config import PREPARE, Config
from reward.records import InputError


def check(config: Config, say: Callable[[str], None]) -> None:
    """Check all stages of a config, in order, and tell; what was checked is kept in check.json.

    Raises:
        InputError: something is refused; names how much of what.
    """
    found: list[Finding] = []
    preflight = Preflight(config)
    with _calm():
        for stage in config.stages:
            looked_at = None if stage == PREPARE else record.inputs(preflight.config, stage)
            seen = preflight.examine(stage)
            for line in seen.told:
                say(f"{stage}: {line}")
            if not seen.told and not seen.findings:
                say(f"{stage}: reads what another stage will make")
            found += seen.findings
            if looked_at and (seen.told or seen.findings):
                record.keep(preflight.config, stage, looked_at, seen.findings)
    for line in told(found):
        say(line)
    wrong = refusals(found)
    if wrong:
        counts = Counter(finding.stage for finding in wrong)
        by_stage = ", ".join(f"{count} of {stage}" for stage, count in counts.items())
        many = "1 thing is" if len(wrong) == 1 else f"{len(wrong)} things are"
        raise InputError(f"{many} refused ({by_stage}): mend what is said above, and run `align check` again.")


def before_stage(config: Config, stage: str) -> None:
    """Check what a stage is about to train on; nothing is done where check.json says that it has been, unchanged.

    Where a file is no longer what was checked, that is said, and the stage is checked again.

    Raises:
        InputError: something is refused; says the first of it.
    """
    preflight = Preflight(config)
    config = preflight.config
    now = record.inputs(config, stage)
    before = record.known(config, stage)
    if before and (before["files"], before["settings"]) == now and not before["refused"]:
        for what in before["warned"]:
            progress.say(f"  {stage}: {what}")
        return
    for change in record.changed(before["files"], now[0]) if before else []:
        progress.say(f"  {stage}: changed since it was checked, so it is checked again: {change}")
    with _calm():
        seen = preflight.examine(stage)
    if ranks.is_first() and (seen.told or seen.findings):
        record.keep(config, stage, now, seen.findings)
    wrong = refusals(seen.findings)
    if wrong:
        more = f" And {len(wrong) - 1} more: `align check` lists them." if len(wrong) > 1 else ""
        raise InputError(f"{stage}: {wrong[0].what}{more}")
    for finding in seen.findings:
        progress.say(f"  {stage}: {finding.what}")


@contextmanager
def _calm() -> Iterator[None]:
    """Without the tokenizers' advice. Not `align.training.calm_libraries`: the trainers cost seconds to import."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def told(findings: Iterable[Finding]) -> list[str]:
    """A line a finding, refused ones first; what several stages share is said once."""
    stages: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        stages.setdefault((finding.level, finding.what), []).append(finding.stage)
    ordered = sorted(stages.items(), key=lambda item: item[0][0] != "refused")
    return [f"{level.upper()} {', '.join(names)}: {what}" for (level, what), names in ordered]
