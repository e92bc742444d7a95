"""What configuration models are made of: numbers with bounds, and `Section`."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _not_a_boolean(value: Any) -> Any:
    # pydantic would read `lr: true` as 1.0.
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "Input should be a number")
    return value


NUMBER = BeforeValidator(_not_a_boolean)
Fraction = Annotated[float, Field(ge=0, lt=1), NUMBER]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Positive = Annotated[int, Field(ge=1), NUMBER]
Count = Annotated[int, Field(ge=0), NUMBER]
Rate = Annotated[float, Field(gt=0), NUMBER]
Weight = Annotated[float, Field(ge=0), NUMBER]
# At least one layer; 0 draws nothing and -1 takes every in-neighbour.
Fanout = Annotated[tuple[Annotated[int, Field(ge=-1), NUMBER], ...], Field(min_length=1)]


class Section(BaseModel):
    """A section of the configuration: immutable, refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
