"""What every section of the config is made of: strictness, and the marks of values that are paths."""

from __future__ import annotations

import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class PathMark:
    """Marks a string that is a path on disk, so that it can be resolved against the place where it was written."""


class PathOrNameMark:
    """Marks a string that is a folder where there is one of this name, and else a name (of a hub model, of a stage)."""


FilePath = Annotated[str, PathMark()]
PathOrName = Annotated[str, PathOrNameMark()]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1; a learning rate of `true` is a slip, not 1.0."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and {annotation, *typing.get_args(annotation)} & {int, float}:
            raise ValueError(f"is {str(value).lower()}, but a number is wanted")
        return value
