"""Models that one can talk to: loaded so that an adapter and what it stands on share one copy of the weights; and one
answer of theirs, heard as it grows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import models
from align.policies import Place, find_policy, resolved
from align.runs import read_info
from reward.records import InputError

if TYPE_CHECKING:
    from align.decode import Drawn

REFRESH = 0.1  # seconds between two looks at an answer that grows


# -- which models -----------------------------------------------------------------------------------------------------


def find_places(run: str, other: str | None = None) -> list[Place]:
    """The models that talk, from left to right.

    Raises:
        InputError: there is no such folder, the run is not finished or holds no policy, it is a reward model, or both
            are the same.
    """
    place = find_policy(run)
    if other is None:
        before = _before(place)
        return [place] if before is None else [before, place]
    second = find_policy(other)
    if resolved(place.folder) == resolved(second.folder):
        raise InputError(f"{run} and {other} are the same model: give two different ones, or one alone.")
    if place.name == second.name:
        place, second = replace(place, name=run), replace(second, name=other)
    return [place, second]


def _before(place: Place) -> Place | None:
    """The model that a dpo or ppo stage, or an adapter, was made from; None where there is none to compare with."""
    info = read_info(place.run) if place.run else None
    parent = (info or {"parents": {}})["parents"].get("sft")
    name = "sft" if parent else "base"
    if (base := place.base) is not None:
        return Place(name, base, place.section, place.run, place.pipeline, place.test_share, place.store)
    if info is None or info["stage"] == "sft":
        return None
    folder = str(Path(parent["folder"]) / "model") if parent else models.base_path(place.section)
    return Place(name, folder, place.section, place.run, place.pipeline, place.test_share, place.store)


# -- models -----------------------------------------------------------------------------------------------------------


@dataclass
class Speaker:
    """A model that answers. `adapter` names the one that is its own in a model shared with the other side; "": none of
    them, the bare base; None: the model is not shared."""

    name: str
    model: Any
    tokenizer: Any
    adapter: str | None = None

    @contextlib.contextmanager
    def speaking(self) -> Iterator[Any]:
        """Inside, the model is this speaker's. On a CPU its adapter is folded into the weights, for the time of an
        answer: beside them it would cost more than half of the time again."""
        from align.lora import folded

        with contextlib.ExitStack() as stack:
            if self.adapter == "":
                stack.enter_context(self.model.disable_adapter())
            elif self.adapter is not None:
                self.model.set_adapter(self.adapter)
            if next(self.model.parameters()).device.type == "cpu":
                stack.enter_context(folded(self.model))
            yield self.model

    def context(self) -> int | None:
        """How many tokens the model can look back on; None where its config does not say."""
        from align.logprobs import base_model

        return getattr(base_model(self.model).config.get_text_config(), "max_position_embeddings", None)


def load_speakers(places: Sequence[Place]) -> list[Speaker]:
    """The models of one or two places; two that stand on one base, or one on the other, share its weights."""
    from align.quantised import as_held

    tokenizers = [models.load_tokenizer(place.tokenizer, place.section) for place in places]
    # What a place is, and what it stands on: an adapter on a quantised base is also a base, of those laid above it.
    folders = [resolved(place.folder) for place in places]
    bases = [resolved(place.base) if place.base else None for place in places]
    shared = [b for b in bases if b and all(b in pair for pair in zip(folders, bases, strict=True))]
    held = [as_held(place.folder, place.section) for place in places if place.base]
    if shared and all(section.quantization == held[0].quantization for section in held):
        from peft import PeftModel

        model: Any = models.load_causal_lm(shared[0], held[-1])
        adapters = ["" if folder == shared[0] else f"side-{number}" for number, folder in enumerate(folders)]
        adapted = False
        for place, adapter in zip(places, adapters, strict=True):
            if adapter and not adapted:
                model, adapted = PeftModel.from_pretrained(model, place.folder, adapter_name=adapter), True
            elif adapter:
                model.load_adapter(place.folder, adapter_name=adapter)
        model.eval()
        together = zip(places, tokenizers, adapters, strict=True)
        return [Speaker(place.name, model, tokenizer, adapter) for place, tokenizer, adapter in together]
    return [
        Speaker(place.name, models.load_policy(place.folder, place.section).eval(), tokenizer)
        for place, tokenizer in zip(places, tokenizers, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """What a speaker said. finished: it stopped by itself; else `note` says that it did not. seed: it was drawn by."""

    text: str
    finished: bool
    note: str
    seed: int


class Stopped(Exception):
    """Somebody pressed Stop, went away, or ended the program."""


def answer(
    speaker: Speaker,
    ids: list[int],
    room: int,
    temperature: float,
    seed: int,
    heard: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """One answer to a tokenised conversation, drawn as `align sample` draws.

    Args:
        room: longest answer in tokens.
        heard: gets the text so far, now and then.
        stopped: asked after every token.

    Raises:
        Stopped: `stopped` said so.
        ValueError: what `align.decode.draw` raises.
    """
    import torch

    from align.decode import draw, stop_ids

    generator = torch.Generator().manual_seed(seed)
    uniform_BT = torch.rand((1, room), generator=generator, dtype=torch.float64)
    last = time.monotonic()

    def text(tokens: list[int]) -> str:
        return str(speaker.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def told(answers: Sequence[Drawn]) -> None:
        nonlocal last
        if stopped():
            raise Stopped
        if (now := time.monotonic()) - last >= REFRESH:
            last = now
            # Half of a character is not shown until its next token comes.
            heard(text(answers[0].ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    with speaker.speaking() as model:
        (drawn,) = draw(
            model,
            [ids],
            max_new_tokens=room,
            stop_ids=stop_ids(model, speaker.tokenizer),
            temperature=temperature,
            uniform_BT=uniform_BT,
            on_token=told,
        )
    return Answer(text(drawn.ids), drawn.finished, "" if drawn.finished else f"Cut off after {room} tokens.", seed)
