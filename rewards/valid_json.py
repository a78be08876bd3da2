"""The reply is JSON, and fits the row's JSON schema if it has one. Schemas are never fetched from anywhere."""

import json
import re
from typing import Any

from posttrain.errors import MissingDependencyError
from posttrain.records import RewardResult, Rollout, Row

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def valid_json(rollout: Rollout, row: Row, schema: dict[str, Any] | None = None) -> RewardResult:
    """1 if the whole reply, or its only fenced block, is JSON that fits the schema and equals the row's answer, if any.

    schema: a JSON schema for every row; a row's own `schema` field comes first. Strict JSON: no NaN, no key twice.
    Raises ValueError where the schema itself is wrong.
    """
    blocks = _FENCED.findall(rollout.text)
    if len(blocks) > 1:
        return RewardResult(0.0, reason="several blocks")
    try:
        value = json.loads(
            blocks[0] if blocks else rollout.text, object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        return RewardResult(0.0, reason=f"not JSON: {str(error)[:80]}")
    wanted = row.fields.get("schema", schema)
    if wanted is not None and (problem := _misfit(value, wanted, row.id)):
        return RewardResult(0.0, reason=f"does not fit the schema: {problem[:120]}")
    if row.answer is not None and value != _expected(row.answer):
        return RewardResult(0.0, reason="wrong")
    return RewardResult(1.0)


def _expected(answer: Any) -> Any:
    """The row's answer as a value: text that is JSON is read, so that datasets may store either."""
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
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    error = next(validator.iter_errors(value), None)
    return error.message if error else ""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
