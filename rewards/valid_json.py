"""Expects JSON that fits the row's JSON schema, if the row has one. Schemas are never fetched from anywhere."""

import json
import math
from collections.abc import Mapping
from typing import Any

from posttrain.errors import MissingDependencyError
from posttrain.records import RewardResult, Rollout, Row

from .blocks import fenced_blocks
from .stated import without_reasoning

_TAGS = {"json", "jsonc", "json5", "jsonl"}


def valid_json(rollout: Rollout, row: Row, schema: dict[str, Any] | None = None) -> RewardResult:
    """1 if the reply, or its only block of JSON, is JSON that fits the schema and equals the row's answer, if any.

    schema: a JSON schema for all rows without a `schema` field of their own; its formats (date, email, uuid) are
    checked as far as jsonschema can. JSON is read strictly: NaN and repeated keys are wrong. Raises ValueError for a
    schema that is not valid.
    """
    text = rollout.text if _is_json(rollout.text) else without_reasoning(rollout.text)  # a value may hold "<think>"
    found = fenced_blocks(text)
    blocks = [block.text for block in found if block.tag in _TAGS] or [block.text for block in found if not block.tag]
    if len(blocks) > 1:
        return RewardResult(0.0, reason="several blocks")
    try:
        value = read_strictly(blocks[0] if blocks else text)
    except (ValueError, RecursionError) as error:
        return RewardResult(0.0, reason=f"not JSON: {str(error)[:80]}")
    wanted = row.fields.get("schema")
    wanted = _expected(schema if wanted is None else wanted)
    if wanted is not None and (problem := _misfit(value, wanted, row.id)):
        return RewardResult(0.0, reason=f"does not fit the schema: {problem[:120]}")
    if row.answer is not None and not _same(value, _expected(row.answer)):
        return RewardResult(0.0, reason="wrong")
    return RewardResult(1.0)


def read_strictly(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for NaN, repeated keys and numbers beyond float64."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def _is_json(text: str) -> bool:
    try:
        read_strictly(text)
    except (ValueError, RecursionError):
        return False
    return True


def _same(value: object, expected: object) -> bool:
    """Equality in which true is not 1, at any depth, while 1.0 is 1."""
    if isinstance(value, dict) and isinstance(expected, Mapping):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    if isinstance(value, list) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    return value == expected


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is out of range")
    return number


def _expected(answer: object) -> Any:
    """The row's answer as a value. If it is a text, the text is read as JSON, so that datasets may store either."""
    if not isinstance(answer, str):
        return answer
    try:
        return json.loads(answer)
    except ValueError:
        return answer


def _misfit(value: Any, schema: Any, row_id: str) -> str:
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise MissingDependencyError("schemas need jsonschema: pip install jsonschema") from error
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"row {row_id}: its schema is wrong: {error.message[:200]}") from error
    validator = jsonschema.Draft202012Validator(
        schema, registry=referencing.Registry(), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    error = next(validator.iter_errors(value), None)
    return error.message if error else ""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
