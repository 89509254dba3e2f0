"""People as judges: the compared answers as blind pairs of the labelling app, and their votes read back.

Annotators see two answers to a held-out prompt and no name; which model stands left is drawn when the pair is lent.
"""

from __future__ import annotations

from collections.abc import Sequence

from align import progress
from align.compare.judging import Answered, Judgement
from align.config import Config
from align.label import serve_until
from labeling_ui.project import PREFERENCE_GUIDELINES
from labeling_ui.store import LabelStore, Project, Settings
from reward.aggregate import Vote
from reward.records import InputError, Record, digest


def project_name(config: Config) -> str:
    """The project in the label database that holds the pairs."""
    return f"{config.name}-compare"


def store_address(config: Config) -> str:
    """Where people's votes are: the label database, or one beside the run folders, which no --force clears."""
    if config.label.store:
        return config.label.store
    config.folder("compare").parent.mkdir(parents=True, exist_ok=True)
    return str(config.folder("compare").parent / "labels.sqlite")


def pairs_of(seen: Answered, name: str) -> list[Record | None]:
    """The comparison of each prompt, the first model's answer first; None where both say the same."""
    pairs: list[Record | None] = []
    for record, base, mine in zip(seen.prompts, seen.answers[seen.first], seen.answers[name], strict=True):
        answers = [{"text": base.text, "model": seen.first}, {"text": mine.text, "model": name}]
        comparison = {"prompt": record["prompt"], "split": "test", "answers": answers}
        # The id comes from the content, so that sending the same answers again adds nothing.
        pairs.append(None if base.text == mine.text else {"id": digest(comparison)[:16], **comparison})
    return pairs


def send(config: Config, store: LabelStore, seen: Answered) -> Project:
    """Add a pair for every prompt and every model but the first, which it is compared with."""
    pairs = [pair for name in seen.others for pair in pairs_of(seen, name) if pair]
    settings = Settings(overlap=config.label.labels_per_item, gold_share=0.0, lease_seconds=config.label.lease_seconds)
    project = store.create_project(project_name(config), instructions=PREFERENCE_GUIDELINES, settings=settings)
    added = store.add_items(project, pairs).added
    progress.say(f"  {added} blind pairs were added to project {project.name} of {store.database.name}")
    return project


def outcome(votes: Sequence[Vote]) -> float | None:
    """For the second answer of a pair: 1, 0.5 or 0 by majority, each vote counting once; None without votes."""
    if not votes:
        return None
    balance = sum((vote.strength < 0) - (vote.strength > 0) for vote in votes)
    return 0.5 if balance == 0 else float(balance > 0)


class People:
    """People who vote on blind pairs."""

    name = "people"
    independent, gives_scores = True, False
    trust: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.description = (
            "People saw both answers without names, in an order drawn anew for each of them, and the majority decides; "
            f"up to {config.label.labels_per_item} votes a pair."
        )

    def judge(self, seen: Answered) -> Judgement:
        """Waits, serving the app, until every pair has its votes or `label.finish` says that these will do.

        Raises:
            InputError: nobody has voted.
        """
        with LabelStore(store_address(self.config)) as store:
            project = send(self.config, store, seen)
            wanted = len(store.items(project)) * self.config.label.labels_per_item
            waits = not self.config.label.finish and not store.closed(project)
            if waits and store.count_labels(project) < wanted:
                serve_until(self.config, store, project, wanted)
            given = {_key(record): votes for record, votes in store.votes(project)}
        found = Judgement({})
        for name in seen.others:
            told: list[float | None] = []
            votes_in_all = 0
            for pair in pairs_of(seen, name):
                votes = given.get(_key(pair), []) if pair else []
                votes_in_all += len(votes)
                told.append(outcome(votes) if pair else 0.5)
            found.outcomes[name], found.votes[name] = told, votes_in_all
        if not any(found.votes.values()):
            raise InputError(
                f"nobody has voted on the blind pairs of project {project.name} in {store.database.name}: run the same "
                "command without label.finish, and open the page it names."
            )
        return found


def _key(pair: Record) -> tuple[str, ...]:
    """What a pair is, whatever else its record holds."""
    return digest(pair["prompt"]), *(answer["text"] for answer in pair["answers"])
