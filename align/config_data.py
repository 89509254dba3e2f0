"""The sections of the config about data: which files, how they are mixed, and what is done to them first."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config_base import FilePath, PathOrName, Section
from align.config_fields import KeyProblem

# Keys of `data` that name files of records, and of `prepare` that name their sources.
DATA_KEYS = ("demonstrations", "prompts", "preferences")


class DataSection(Section):
    demonstrations: FilePath | None = Field(
        None, description="File of prompts with good answers, for sft: JSONL, JSON, CSV or Parquet."
    )
    prompts: FilePath | None = Field(
        None, description="File of further prompts for sample, ppo and compare, beside the demonstrations' own."
    )
    preferences: FilePath | None = Field(None, description="File of preference pairs, for label.source: dataset.")
    test_share: float = Field(0.2, gt=0, lt=1, description="Share of prompts held out of all training, by prompt hash.")
    max_rows: int | None = Field(None, gt=0, description="Use only the first rows of each file; for trying things out.")
    too_long_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="A stage that would leave out more than this share of its rows as too long is refused.",
    )


class BalanceSection(Section):
    """No group of rows may outweigh the smallest by more than a factor."""

    by: Literal["source", "label", "length"] = Field(
        description="source: the file of a mixture, or a column `source`; label: a column `label`; length: "
        "characters of the answer, in powers of two."
    )
    ratio: float = Field(3.0, ge=1, description="The largest group has at most this many times the smallest's rows.")


class AugmentSection(Section):
    """Further rows made from those of the train side, marked in a column `augmented`."""

    swap: bool = Field(False, description="Preferences: a copy of every pair with chosen_index turned round.")
    templates: list[str] = Field(
        [], description="Paraphrases of the prompt's last user turn, such as 'Please answer: {prompt}'."
    )
    share: float = Field(0.1, gt=0, le=1, description="Share of the rows that get a paraphrase.")

    @field_validator("templates")
    @classmethod
    def _with_a_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{prompt}") != 1 or template.strip() == "{prompt}":
                raise ValueError(
                    f"has {template!r}, but a text with {{prompt}} in it once, and something besides, is wanted"
                )
        return templates


class DataSource(Section):
    """One of several places that the rows of a kind come from."""

    path: PathOrName = Field(
        description="A file in any format that `align data convert` reads, a folder of Parquet parts, or a hub dataset."
    )
    name: str | None = Field(None, min_length=1, description="In the column `source` and the report; null: the path's.")
    weight: float | None = Field(
        None, gt=0, description="Share of the mixture, relative to the other sources' weights; null in all: every row."
    )
    max_rows: int | None = Field(None, gt=0, description="At most so many of its rows, drawn by the seed.")

    @property
    def title(self) -> str:
        return self.name or Path(self.path).name


class PrepareSection(Section):
    """What is done to the files of `data` before any stage reads them; every step can be switched off."""

    demonstrations: list[DataSource] | None = Field(
        None, min_length=1, description="Sources mixed into the demonstrations; null: the file data.demonstrations."
    )
    prompts: list[DataSource] | None = Field(
        None, min_length=1, description="Sources mixed into the prompts; null: the file data.prompts."
    )
    preferences: list[DataSource] | None = Field(
        None, min_length=1, description="Sources mixed into the preferences; null: the file data.preferences."
    )
    normalise: bool = Field(True, description="Mend broken Unicode (ftfy), compose characters (NFC), trim white space.")
    languages: list[str] = Field([], description="Languages kept, as ISO 639-1 codes such as en; empty: all.")
    min_answer_chars: int = Field(1, ge=0, description="Shortest answer kept, in characters.")
    max_answer_chars: int | None = Field(None, gt=0, description="Longest answer kept, in characters.")
    max_prompt_chars: int | None = Field(None, gt=0, description="Longest prompt kept, in characters.")
    quality: list[Literal["repetition", "boilerplate", "truncated", "refusal"]] = Field(
        [],
        description="Rows left out for their (chosen) answer: it repeats itself, is boilerplate, breaks off, refuses.",
    )
    scrub: list[Literal["email", "phone", "key", "card", "ip"]] = Field(
        [], description="Personal data replaced by a mark such as <email>."
    )
    exact_duplicates: bool = Field(True, description="Of rows that say the same, keep the first.")
    near_duplicates: float | None = Field(
        0.8, gt=0.4, lt=1, description="Rows of at least this Jaccard similarity count as one; null: none do."
    )
    decontaminate: list[PathOrName] = Field(
        [], description="Test sets, in any format: rows that share a long run of words with one are left out."
    )
    decontaminate_ngram: int = Field(13, ge=4, description="Words of such a run.")
    split: Literal["cluster", "hash"] = Field(
        "cluster",
        description="What goes to one side together: near-duplicate prompts, or only the very same prompt.",
    )
    balance: BalanceSection | None = Field(None, description="Even out groups of rows; null: leave them as they are.")
    augment: AugmentSection | None = Field(None, description="Make further rows; null: none.")
    processes: int | None = Field(None, gt=0, description="Worker processes; null: one a core, at most 8.")

    @model_validator(mode="after")
    def _weights_everywhere_or_nowhere(self) -> Self:
        for key in DATA_KEYS:
            sources: list[DataSource] = getattr(self, key) or []
            if len({source.weight is None for source in sources}) > 1:
                raise KeyProblem(key, f"`{key}` gives a weight to some of its sources: give one to each, or to none")
            titles = [source.title for source in sources]
            if twice := next((title for title in titles if titles.count(title) > 1), None):
                raise KeyProblem(key, f"`{key}` has two sources called {twice}: give each a `name` of its own")
        return self
