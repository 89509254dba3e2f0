"""`align chat`: talk to one model, or to two side by side, and say which is better; the votes become preferences.

Every side goes on with its own answers. A vote on what both were asked alike, with nothing before it or the same, is a
comparison like any other, in the project NAME-chat. Once the two conversations have parted, the last answers are no
longer answers to one prompt: such a vote judges two whole conversations, and goes to a project of its own,
NAME-chat-dialogues, from which no model should be trained as if they were.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align import progress
from align.policies import TEST_SHARE, Place
from align.speakers import Answer, Speaker, Stopped, answer, find_places, load_speakers
from labeling_ui.address import Address
from labeling_ui.assignment import Refused
from labeling_ui.checks import LONGEST_TEXT, checked_seconds, is_storable
from labeling_ui.project import PREFERENCE_GUIDELINES, is_name
from labeling_ui.render import visible
from labeling_ui.store import LabelStore, Settings
from reward.records import InputError, Message, Record, digest, split_of

# The page has three buttons: "better" on the scale of 1 (left much better) to 7.
VALUES = {"left": 2, "tie": 4, "right": 6}
MOST_CONVERSATIONS = 100  # kept in memory; the oldest are forgotten

log = logging.getLogger("align")


def chat(
    run: str,
    other: str | None = None,
    *,
    blind: bool = False,
    store: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8766,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int | None = None,
) -> None:
    """Serve the chat page on this machine until Ctrl-C.

    Args:
        run: a finished sft, dpo or ppo stage's folder, a model's or adapter's folder, or a hub id. An adapter, and a
            dpo or ppo stage, talks beside the model it was made from.
        other: a second model of the same kinds, in that one's place.
        blind: conversations begin with the sides shuffled and the names hidden until the vote.
        store: the label database of the votes; None: `label.store` of the run's config, else labels.sqlite beside the
            run folders, else in the current folder.
        host, port: where the page listens: 127.0.0.1 or localhost.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seed: with the same messages in the same order, it gives the same answers; None: a new one at every start.

    Raises:
        InputError: there is no such model or it is none that answers, the store cannot be opened, or the address is
            not this machine's own or taken.
    """
    try:
        with serving(
            run,
            other,
            blind=blind,
            store=store,
            address=Address(host, port),
            sampling=Sampling(max_new_tokens, temperature, seed),
        ) as link:
            progress.say(
                f"  chat: this link lets you in, once: {link}\n  chat: stop with Ctrl-C; votes are on the disk."
            )
            threading.Event().wait()
    except KeyboardInterrupt:
        progress.say("  chat: stopped.")


@contextlib.contextmanager
def serving(
    run: str,
    other: str | None = None,
    *,
    blind: bool = False,
    store: str | None = None,
    address: Address,
    sampling: Sampling,
) -> Iterator[str]:
    """The page of `chat` for the time of a block; yields its one-time link."""
    if address.host not in ("127.0.0.1", "localhost"):
        raise InputError(
            f"--host is {address.host}, but the chat page asks for no password: it listens on 127.0.0.1 or localhost "
            "alone; from another machine, come through an SSH tunnel (ssh -L)."
        )
    sampling.check()
    places = find_places(run, other)
    where = store or _default_store(places)
    # A page that hears after seconds that the database is busy keeps the vote and sends it again.
    with LabelStore(where, busy_seconds=5.0) as labels:
        from align.training import calm_libraries
        from labeling_ui.chat_page import serving_chat
        from labeling_ui.server import first_link

        with calm_libraries():
            speakers = load_speakers(places)
            name = next((p.pipeline for p in places if p.pipeline), places[-1].name)
            share = next((p.test_share for p in places if p.run), TEST_SHARE)
            talk = Conversations(speakers, sampling, labels, name, blind=blind, test_share=share)
            names = " and ".join(visible(speaker.name) for speaker in speakers)
            progress.say(f"  chat: {names}")
            if len(speakers) > 1:
                progress.say(f"  chat: votes go to project {visible(name)}-chat in {labels.database.name}")
            # Closed before the server ends: it would wait for the answer that is being written.
            with serving_chat(labels, address, talk) as site, contextlib.closing(talk):
                yield str(first_link(labels, site))


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, from the whole distribution; seed None: a new one."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int | None = None

    def check(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {self.max_new_tokens}: at least 1 is wanted.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}: a number of at least 0 is wanted; 0 is greedy.")


def _default_store(places: Sequence[Place]) -> str:
    for place in places:
        if place.store:
            return place.store
    runs = next((place.run.resolve().parent for place in places if place.run), Path.cwd())
    return str(runs / "labels.sqlite")


# -- conversations ----------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """A message and the answers to it, in the order of the speakers."""

    message: str
    answers: list[Answer]


@dataclass
class Conversation:
    """order: which speaker stands where, from left to right. vote: (key, choice) of the vote it ended with."""

    id: str
    number: int
    blind: bool
    order: list[int]
    turns: list[Turn] = field(default_factory=list)
    vote: tuple[str, str] | None = None

    def messages(self, speaker: int) -> list[Message]:
        """What was said to and by one speaker."""
        found = []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.message})
            found.append({"role": "assistant", "content": turn.answers[speaker].text})
        return found


class Conversations:
    """Who said what, as `labeling_ui.chat_page.Talk`; one answer is written at a time.

    Args:
        name: of the pipeline or model: votes go to the projects NAME-chat and NAME-chat-dialogues.
        test_share: share of prompts whose votes are held out.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        sampling: Sampling,
        store: LabelStore,
        name: str,
        *,
        blind: bool = False,
        test_share: float = TEST_SHARE,
    ) -> None:
        if not is_name(f"{name}-chat-dialogues"):
            raise InputError(f"The name {visible(name[:50])!r} cannot name a project: rename the folder.")
        self.speakers, self.sampling, self.store, self.name = list(speakers), sampling, store, name
        self.blind, self.test_share, self.annotator = blind and len(self.speakers) > 1, test_share, _user()
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._shuffle = secrets.SystemRandom().shuffle  # nobody who knows the seed knows the sides
        self._all: dict[str, Conversation] = {}
        self._number = 0
        self._lock = threading.RLock()  # of what is remembered
        self._speaking = threading.Lock()  # of the models
        self._closed = threading.Event()

    def close(self) -> None:
        """End the answer that is being written."""
        self._closed.set()

    def start(self, blind: bool | None) -> Record:
        with self._lock:
            blind = self.blind if blind is None else blind and len(self.speakers) > 1
            order = list(range(len(self.speakers)))
            if blind:
                self._shuffle(order)
            found = Conversation(secrets.token_hex(16), self._number, blind, order)
            self._number += 1
            self._all[found.id] = found
            while len(self._all) > MOST_CONVERSATIONS:
                del self._all[next(iter(self._all))]
            return self._view(found)

    def view(self, conversation: str) -> Record:
        with self._lock:
            return self._view(self._of(conversation))

    def say(
        self, conversation: str, text: str, told: Callable[[int, str], None], stopped: Callable[[], bool]
    ) -> Record:
        if not text.strip():
            raise Refused("empty", "The message is empty: write something.")
        if len(text) > LONGEST_TEXT:
            raise Refused("long", f"The message has {len(text)} characters: at most {LONGEST_TEXT} are wanted.")
        # An answer that was stopped ends with its next token.
        if not self._speaking.acquire(timeout=10):
            raise Refused("busy", "Another answer is being written: wait until it is done, or stop it.")
        try:
            found = self._of(conversation)
            if found.vote:
                raise Refused("over", "This conversation has ended with your vote: start a new one.")
            turn = Turn(text, self._answers(found, text, told, stopped))
            with self._lock:
                if found.vote:  # given in another tab meanwhile
                    raise Refused("over", "This conversation has ended with your vote: start a new one.")
                found.turns.append(turn)
                return self._view(found)
        finally:
            self._speaking.release()

    def _answers(
        self, found: Conversation, text: str, told: Callable[[int, str], None], stopped: Callable[[], bool]
    ) -> list[Answer]:
        """The answers of all speakers to one more message; written from left to right, which tells nothing of who they
        are. All or none."""
        asked = {}
        for place, speaker in enumerate(found.order):
            asked[speaker] = self._fitting(
                speaker, [*found.messages(speaker), {"role": "user", "content": text}], place
            )
        answers: dict[int, Answer] = {}
        for place, speaker in enumerate(found.order):
            told(place, "")
            ids, room = asked[speaker]
            seed = self._seed_of(found, speaker)
            try:
                answers[speaker] = answer(
                    self.speakers[speaker],
                    ids,
                    room,
                    self.sampling.temperature,
                    seed,
                    heard=functools.partial(told, place),
                    stopped=lambda: stopped() or self._closed.is_set(),
                )
            except Stopped:
                raise Refused("stopped", "Stopped: the answers are thrown away, your message is kept.") from None
            except Exception as error:
                from align.training import release

                log.exception("an answer failed")
                release()
                what = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                raise Refused(
                    "failed", f"{self._called(place)} failed to answer ({what}); your message is kept."
                ) from error
            told(place, answers[speaker].text)
        return [answers[speaker] for speaker in range(len(self.speakers))]

    def _fitting(self, speaker: int, messages: list[Message], place: int) -> tuple[list[int], int]:
        """(tokens of a conversation, room for the answer to it in tokens)."""
        from align.data.render import prompt_ids

        found = self.speakers[speaker]
        try:
            ids = prompt_ids(found.tokenizer, messages)
        except Exception as error:  # templates are programs, and raise what they like
            what = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise Refused(
                "template", f"The chat template of {self._called(place).lower()} refuses it: {what}"
            ) from error
        limit, room = found.context(), self.sampling.max_new_tokens
        if limit is not None:
            room = min(room, limit - len(ids))
        if room < 1:
            raise Refused(
                "long",
                f"With your message the conversation has {len(ids)} tokens, and {self._called(place).lower()} can take "
                f"{limit} with its answer: shorten the message or start a new conversation.",
            )
        return ids, room

    def _called(self, place: int) -> str:
        return "The model" if len(self.speakers) == 1 else f"The {('left', 'right')[place]} model"

    def _seed_of(self, found: Conversation, speaker: int) -> int:
        told = f"{self.seed} chat {found.number} {len(found.turns)} {self.speakers[speaker].name}"
        return int(hashlib.sha256(told.encode()).hexdigest()[:12], 16)

    def vote(self, conversation: str, choice: str, key: str, seconds: float | None) -> Record:
        with self._lock:
            found = self._of(conversation)
            if found.vote is not None:
                if found.vote != (key, choice):
                    raise Refused("voted", "This conversation has a vote already: start a new one.")
                return self._view(found)
            if reason := self._unvotable(found):
                raise Refused("nothing", reason)
            seconds = checked_seconds(seconds)
            self._store(found, choice, key, seconds)
            found.vote = (key, choice)  # only now: what is shown as stored is on the disk
            return self._view(found)

    def _store(self, found: Conversation, choice: str, key: str, seconds: float | None) -> None:
        comparison, together = self._comparison(found)
        project = self.store.create_project(
            f"{self.name}-chat" if together else f"{self.name}-chat-dialogues",
            instructions=PREFERENCE_GUIDELINES,
            settings=Settings(gold_share=0.0),
        )
        self.store.add_items(project, [comparison])
        item = next((item for item in self.store.items(project) if item.comparison_id == comparison["id"]), None)
        if item is None:
            raise Refused("nothing", "Both conversations read the same: there is nothing to vote on.")
        # Answers are stored in an order that tells nothing; on the screen they stood in another.
        place = {answer["model"]: index for index, answer in enumerate(comparison["answers"])}
        self.store.record(
            project,
            {
                "item_id": item.id,
                "annotator": self.annotator,
                "key": f"chat {found.id} {key}",
                "order": [place[self.speakers[speaker].name] for speaker in found.order],
                "value": VALUES[choice],
                "seconds": seconds,
            },
        )

    def _comparison(self, found: Conversation) -> tuple[Record, bool]:
        """(what was judged, whether both sides were asked the same).

        Where they were, `prompt` is the conversation so far and the answers are the last ones; else `prompt` is what
        both heard first, and each answer all that one side heard and said from there on.
        """
        sides = [found.messages(speaker) for speaker in range(len(self.speakers))]
        left, right = sides
        shared = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
        together = shared == len(left) - 1
        answers = []
        for speaker, messages in enumerate(sides):
            last = found.turns[-1].answers[speaker]
            sampling = {"temperature": self.sampling.temperature, "top_p": 1.0, "top_k": 0}
            sampling |= {"max_new_tokens": self.sampling.max_new_tokens, "seed": last.seed, "finished": last.finished}
            own = {"text": _transcript(messages[shared:]), "model": self.speakers[speaker].name, "sampling": sampling}
            answers.append(own if together else own | {"messages": messages[shared:]})
        prompt = left[:shared]
        comparison = {
            "prompt": prompt,
            "split": split_of(prompt, self.test_share),
            "answers": sorted(answers, key=lambda a: digest(a["text"])),
            "source": "chat",
            "blind": found.blind,
        }
        return {"id": f"chat-{digest(comparison)[:16]}", **comparison}, together

    def _unvotable(self, found: Conversation) -> str:
        if len(self.speakers) < 2:
            return "One model talks alone: there is nothing to vote on."
        if not found.turns:
            return "There is no answer yet."
        if found.messages(0) == found.messages(1):
            return "Both gave the same answer, so there is nothing to vote on: go on, or start a new conversation."
        if not all(is_storable(a.text.replace("\0", "")) for turn in found.turns for a in turn.answers):
            return "An answer holds what no database takes: start a new conversation."
        return ""

    def _of(self, conversation: str) -> Conversation:
        with self._lock:
            found = self._all.get(conversation)
        if found is None:
            raise Refused("unknown", "This conversation is not known: the program was started again since.")
        return found

    def _view(self, found: Conversation) -> Record:
        hidden = found.blind and not found.vote
        return {
            "id": found.id,
            "blind": found.blind,
            "sides": len(self.speakers),
            "names": None if hidden else [self.speakers[speaker].name for speaker in found.order],
            "turns": [
                {
                    "message": turn.message,
                    "answers": [{"text": turn.answers[s].text, "note": turn.answers[s].note} for s in found.order],
                }
                for turn in found.turns
            ],
            "voted": found.vote and found.vote[1],
            "unvotable": self._unvotable(found),
        }


def _transcript(messages: Sequence[Message]) -> str:
    """The answer, where it is one; else the rest of a conversation as text."""
    first, *rest = messages
    return "\n\n".join([first["content"], *(f"**{each['role']}:** {each['content']}" for each in rest)])


def _user() -> str:
    """Whose votes these are: the name on this machine, "local" where it has none."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = "local"
    return name if name.strip() and is_storable(name) else "local"
