"""The plain endpoint's questions and answers: rows by column name, as JSON, to classes with probabilities."""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rbm_dist.errors import InputError
from rbm_dist.serve.loaded import LoadedStudent
from rbm_dist.serve.protocol import TooManyRowsError, matrix, parse_json


class Question(BaseModel):
    """Rows to classify. A bare list of rows is the same as `{"rows": […]}`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"rows": [{"age": 31.5, "colour": "red", "height": None}], "top_k": 2}]},
    )
    rows: list[Any] = Field(
        [],
        description="Each an object of column names to values, as in the table that was learned from (null: missing; "
        "other names are passed over), or a list of all features as numbers.",
    )
    top_k: int | None = Field(None, ge=1, description="Also give so many of the most probable classes.")
    explain: bool = Field(False, description="Also give the experts that each row went to.")
    pos: list[list[float]] | None = Field(None, description="Positional encodings, for a model with that input.")
    prop: list[list[float]] | None = Field(None, description="Propagated labels, for a model with that input.")


class Candidate(BaseModel):
    """One class, as likely as it is."""

    cls: int = Field(alias="class")
    class_name: str | None = Field(None, description="Absent for a model whose classes are numbers.")
    probability: float


class Memory(BaseModel):
    """Where one routing memory sent a row."""

    layer: int
    experts: list[int] = Field(description="Best first.")
    weights: list[float]
    cosines: list[float] = Field(description="Of the row with the experts' memories.")


class Prediction(Candidate):
    """What is said of one row."""

    top: list[Candidate] | None = Field(None, description="With top_k: the most probable classes, best first.")
    memories: list[Memory] | None = Field(None, description="With explain; empty for a model without experts.")


class Answer(BaseModel):
    """One prediction per row, in their order."""

    model: str
    version: str
    predictions: list[Prediction]


class Failure(BaseModel):
    """Why there is no answer."""

    error: str


def parse(body: bytes, student: LoadedStudent, max_rows: int) -> tuple[Question, dict[str, np.ndarray]]:
    """Read a question, and its rows as the student's inputs. Raises `InputError`."""
    found = parse_json(body)
    try:
        question = Question.model_validate({"rows": found} if isinstance(found, list) else found, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    encodings = {name: value for name in ("pos", "prop") if (value := getattr(question, name)) is not None}
    count = len(question.rows) if "feat" in student.inputs else max([*map(len, encodings.values()), 0])
    if count == 0:
        raise InputError('no rows: {"rows": [{column: value, …}, …]} expected')
    if count > max_rows:
        raise TooManyRowsError(f"{count:,} rows; one request may have {max_rows:,} (--max-rows)")
    rows: Any = question.rows
    if rows and isinstance(rows[0], list):
        rows = matrix(rows, (len(rows), student.inputs.get("feat", 0)), "rows")
    elif rows and not isinstance(rows[0], dict):
        raise InputError("row 0: an object of columns to values, or a list of numbers, expected")
    given = {name: matrix(rows_, (count, student.inputs.get(name, 0)), name) for name, rows_ in encodings.items()}
    return question, student.read(rows, **given)


def answer(
    question: Question, name: str, student: LoadedStudent, probability_BC: np.ndarray, memories: list[Any] | None
) -> dict[str, Any]:
    """An `Answer`, ready for JSON. memories: per row, if they were asked for."""
    kept = min(question.top_k or 1, probability_BC.shape[1])
    order_BC = np.argsort(-probability_BC, axis=1, kind="stable")[:, :kept]
    likely_BC = np.take_along_axis(probability_BC, order_BC, 1)
    names = student.class_names
    predictions = []
    for row, (class_C, probability_C) in enumerate(zip(order_BC.tolist(), likely_BC.tolist(), strict=True)):
        top = [
            {"class": cls, **({} if names is None else {"class_name": names[cls]}), "probability": probability}
            for cls, probability in zip(class_C, probability_C, strict=True)
        ]
        prediction = dict(top[0])
        if question.top_k is not None:
            prediction["top"] = top
        if memories is not None:
            prediction["memories"] = memories[row]
        predictions.append(prediction)
    return {"model": name, "version": student.digest, "predictions": predictions}
