"""Models that one can talk to: found by a stage's folder, a model's or adapter's folder or a hub id; loaded so that an
adapter and what it stands on share one copy of the weights; and one answer of theirs, heard as it grows.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import models
from align.config import ModelSection
from align.runs import done_digest, read_info
from reward.records import InputError

if TYPE_CHECKING:
    from torch import Tensor

POLICIES = ("sft", "dpo", "ppo")
ADAPTER = "adapter_config.json"
TEST_SHARE = 0.2  # the default of data.test_share
REFRESH = 0.1  # seconds between two looks at an answer that grows


# -- which models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A model to be loaded.

    name: on the page and in the votes. folder: a model's, an adapter's, or a hub id. run: its run folder, None for
    models from elsewhere; then pipeline is "". test_share: of its pipeline's config.
    """

    name: str
    folder: str
    section: ModelSection
    run: Path | None = None
    pipeline: str = ""
    test_share: float = TEST_SHARE
    store: str | None = None

    @property
    def base(self) -> str | None:
        """What an adapter stands on; None for a whole model."""
        path = Path(self.folder) / ADAPTER
        if not path.is_file():
            return None
        try:
            return str(json.loads(path.read_text("utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged: it names no base_model_name_or_path.") from None


def find_places(run: str, other: str | None = None) -> list[Place]:
    """The models that talk, from left to right.

    Raises:
        InputError: there is no such folder, the run is not finished or holds no policy, it is a reward model, or both
            are the same.
    """
    place = _place(run)
    if other is None:
        before = _before(place)
        return [place] if before is None else [before, place]
    second = _place(other)
    if _resolved(place.folder) == _resolved(second.folder):
        raise InputError(f"{run} and {other} are the same model: give two different ones, or one alone.")
    if place.name == second.name:
        place, second = replace(place, name=run), replace(second, name=other)
    return [place, second]


def _place(run: str) -> Place:
    folder = Path(run).expanduser()
    info = read_info(folder)
    if info is not None:
        if info["stage"] not in POLICIES:
            raise InputError(
                f"{run} is the folder of the stage {info['stage']}, which holds no policy: give that of a finished "
                "sft, dpo or ppo stage, or a model's."
            )
        done_digest(folder)
        return _of_run(folder, info["stage"])
    path = models.base_path(ModelSection(base=run)) if not (folder / ADAPTER).is_file() else str(folder)
    if not folder.exists() and run.count("/") > 1:
        raise InputError(f"{run} does not exist: give the folder of a finished stage, a model's folder, or a hub id.")
    place = Place(Path(run).name if folder.exists() else run, path, ModelSection(base=run))
    _refuse_reward_model(place)
    return place


def _of_run(folder: Path, stage: str) -> Place:
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        # The chat template was saved beside the model.
        section = ModelSection(**{**config["model"], "chat_template": None})
        label = config.get("label") or {}
        return Place(
            stage,
            str((folder / "model").resolve()),
            section,
            folder,
            str(config["name"]),
            float(config["data"]["test_share"]),
            label.get("store"),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"{folder / 'config.yaml'} cannot be read ({type(error).__name__}: {error}): give {folder / 'model'}."
        ) from None


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


def _refuse_reward_model(place: Place) -> None:
    from transformers import AutoConfig

    advice = "is a reward model, which gives figures and no answers: give a policy (`align score` takes it)"
    if place.base is not None:
        if json.loads((Path(place.folder) / ADAPTER).read_text("utf-8")).get("task_type") == "SEQ_CLS":
            raise InputError(f"{place.folder} {advice}.")
        return
    try:
        config = AutoConfig.from_pretrained(place.folder, trust_remote_code=place.section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{place.folder} is neither a folder with a model nor a model that can be had from the hub "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})."
        ) from error
    if any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{place.folder} {advice}.")


def _resolved(folder: str) -> str:
    return str(Path(folder).resolve()) if Path(folder).is_dir() else folder


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
    tokenizers = [models.load_tokenizer(_tokenizer_folder(place), place.section) for place in places]
    bases = {_resolved(place.base or place.folder) for place in places}
    if len(bases) == 1 and any(place.base for place in places):
        from peft import PeftModel

        model: Any = models.load_causal_lm(bases.pop(), places[-1].section)
        adapters = [f"side-{number}" if place.base else "" for number, place in enumerate(places)]
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


def _tokenizer_folder(place: Place) -> str:
    """Beside an adapter there may be no tokenizer: then it is its base's."""
    beside = not place.base or any(
        (Path(place.folder) / f"tokenizer{end}").is_file() for end in (".json", "_config.json")
    )
    return place.folder if beside else str(place.base)


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
        stopped: asked before every token.

    Raises:
        Stopped: `stopped` said so.
        ValueError: what `align.decode.draw` raises.
    """
    import torch

    from align.decode import _pick, draw, stop_ids

    generator = torch.Generator().manual_seed(seed)
    uniform_BT = torch.rand((1, room), generator=generator, dtype=torch.float64)
    so_far: list[int] = []
    last = time.monotonic()

    def text(tokens: list[int]) -> str:
        return str(speaker.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def observe(_: Tensor, logprobs_BV: Tensor) -> Tensor:
        nonlocal last
        if stopped():
            raise Stopped
        if (now := time.monotonic()) - last >= REFRESH:
            last = now
            heard(text(so_far).rstrip("\N{REPLACEMENT CHARACTER}"))  # half of a character, until its next token comes
        # The token that `draw` is about to take, from the same numbers.
        uniform_B = uniform_BT[:, len(so_far)].to(logprobs_BV.device)
        so_far.append(int(_pick(logprobs_BV, uniform_B, temperature, 1.0, 0)[0]))
        return logprobs_BV[:, :0]

    with speaker.speaking() as model:
        (drawn,) = draw(
            model,
            [ids],
            max_new_tokens=room,
            stop_ids=stop_ids(model, speaker.tokenizer),
            temperature=temperature,
            uniform_BT=uniform_BT,
            observe=observe,
        )
    return Answer(text(drawn.ids), drawn.finished, "" if drawn.finished else f"Cut off after {room} tokens.", seed)
