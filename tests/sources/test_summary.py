"""The summary in words: groups of columns, and what is pointed out."""

import numpy as np

from rbm_dist.config.source import DigitsConfig
from rbm_dist.sources.scaling import Moments, Scaling
from rbm_dist.sources.streamed import About
from rbm_dist.sources.summary import feature_groups, summarise


def summary(rows_nF: np.ndarray, **settings: str) -> dict:
    config = DigitsConfig.model_validate(settings)
    names = [(f"f{column}", "float") for column in range(rows_nF.shape[1])]
    moments = Moments.of([rows_nF], rows_nF.shape[1])
    label_N = np.zeros(len(rows_nF), np.int64)
    scaling = Scaling.of(config, moments, sparse=False)
    return summarise(config, About(features=names), 1, label_N, label_N, {"read": 1, "kept": 1}, moments, scaling)


def example() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 8))


def test_columns_that_tell_nothing_are_named() -> None:
    rows = example()
    assert summary(rows)["warnings"] == []
    rows[:, 3] = 7
    assert summary(rows)["warnings"] == ["column f3 is the same in every row and tells nothing"]
    rows[:] = 1
    rows[:, 0] = np.nan
    same, missing = summary(rows)["warnings"]
    assert same.startswith("columns f1, f2, f3, f4, f5 and 2 more are the same in every row")
    assert missing == "column f0 is missing in every row and tells nothing"


def test_a_column_of_another_unit_is_named_with_its_range() -> None:
    rows = example()
    rows[:, 2] *= 1e30
    (warning,) = summary(rows)["warnings"]
    low, high = f"{rows[:, 2].min():.4g}", f"{rows[:, 2].max():.4g}"
    assert warning.startswith(f"column f2 ranges from {low} to {high}, while half of the columns stay within ±")
    assert warning.endswith("It is scaled by itself")
    rows[:, 2] /= 1e26
    assert summary(rows)["warnings"] == [], "which scaling by column takes care of"
    (warning,) = summary(rows, normalize="none")["warnings"]
    assert warning.endswith("Set source.normalize to auto, or drop it")


def test_neighbouring_columns_of_one_name_and_type_are_one_line() -> None:
    def column(name: str, kind: str, low: float, missing: int = 0) -> dict:
        return {"name": name, "type": kind, "min": low, "max": low + 1, "missing": missing}

    columns = [
        column("x1", "float", 0),
        column("x2", "float", -5, 3),
        column("x3", "int8", 0),
        column("age", "int8", 1),
    ]
    groups = feature_groups([*columns, *(column(f"v[{k}]", "list", k) for k in range(3))])
    assert [(each["name"], each["columns"], each["min"], each["max"], each["missing"]) for each in groups] == [
        ("x1 … x2", 2, -5, 1, 3), ("x3", 1, 0, 1, 0), ("age", 1, 1, 2, 0), ("v[0] … v[2]", 3, 0, 3, 0),
    ]  # fmt: skip
