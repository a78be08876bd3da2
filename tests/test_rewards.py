"""Built-in rewards: gold answers score 1, hostile ones do not, and a bad row is an error instead of a 0."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_records import one_turn

from posttrain.records import Message, RewardResult, Rollout, Row
from posttrain.rewards.coding import code
from posttrain.rewards.combine import by_capability, weighted_sum
from posttrain.rewards.exact_match import exact_match
from posttrain.rewards.final_answer import final_answer
from posttrain.rewards.instructions import instructions
from posttrain.rewards.length import overlong
from posttrain.rewards.mathematics import math
from posttrain.rewards.multiple_choice import multiple_choice
from posttrain.rewards.puzzles import parse_sum, puzzles
from posttrain.rewards.valid_json import valid_json


def reply(text: str, finish_reason: str = "stop", num_tokens: int = 3) -> Rollout:
    ids = tuple(range(num_tokens))
    return one_turn("p", "g", 0, (1, 2), ids, text, (0.0,) * num_tokens, (), finish_reason)


def row(answer: object = None, capability: str = "math", **fields: object) -> Row:
    return Row("r1", capability, (Message("user", "?"),), answer, fields)


def value(result: RewardResult) -> float:
    return result.value


class TestFinalAnswer:
    def test_gold(self) -> None:
        assert final_answer(reply("2 + 2 = 4. Answer: 4"), row("4")) == RewardResult(1.0)
        assert value(final_answer(reply("Answer:  4 \n"), row(4))) == 1.0
        assert value(final_answer(reply("=> 4"), row("4"), marker="=>")) == 1.0

    @pytest.mark.parametrize(
        ("text", "finish_reason"),
        [
            ("Answer: 5", "stop"),
            ("Answer: 4", "length"),
            ("Answer: 3 Answer: 4", "stop"),
            ("Answer: 4 Answer: 4", "stop"),
            ("4", "stop"),
            ("", "stop"),
            ("Answer:", "stop"),
            ("Answer: 4 or 5", "stop"),
            ("Answer: 4\n5", "stop"),
        ],
    )
    def test_wrong(self, text: str, finish_reason: str) -> None:
        result = final_answer(reply(text, finish_reason), row("4"))
        assert result.value == 0.0
        assert result.reason

    def test_empty_gold_is_never_met_by_an_empty_answer(self) -> None:
        assert value(final_answer(reply("Answer: "), row(""))) == 0.0

    def test_a_row_without_an_answer_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="r1 has no answer"):
            final_answer(reply("Answer: 4"), row())


class TestPuzzles:
    countdown = row(None, family="countdown", numbers=[3, 5, 3], target=5)

    @pytest.mark.parametrize("answer", ["5 + 3 - 3", "3 + 5 - 3", "3-3+5", " 5+3  - 3 "])
    def test_countdown_gold(self, answer: str) -> None:
        assert puzzles(reply(f"5 + 3 = 8. Answer: {answer}"), self.countdown) == RewardResult(1.0)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("5", "wrong numbers"),
            ("3 + 3 - 5", "wrong"),
            ("5 + 3 - 3 + 3 - 3", "wrong numbers"),
            ("-3 + 5 + 3", "not an expression"),
            ("5 + (3 - 3)", "not an expression"),
            ("5 + 3 - 3 = 5", "not an expression"),
            ("5 * 3 - 3", "not an expression"),
            ("53 - 3", "wrong numbers"),
            ("5 3 3", "not an expression"),
            ("5 + 3 -", "not an expression"),
            ("５ + 3 - 3", "not an expression"),
            ("__import__('os').system('true')", "not an expression"),
            ("9" * 10_000, "not an expression"),
            ("5 + 3 - 3" + " + 0" * 1000, "not an expression"),
        ],
    )
    def test_countdown_hostile(self, answer: str, reason: str) -> None:
        assert puzzles(reply(f"Answer: {answer}"), self.countdown) == RewardResult(0.0, reason=reason)

    def test_other_families_compare_text(self) -> None:
        assert value(puzzles(reply("Answer: 1 2 3"), row("1 2 3", family="sort"))) == 1.0
        assert value(puzzles(reply("Answer: 1 3 2"), row("1 2 3", family="sort"))) == 0.0

    def test_unfinished_replies_and_repeated_markers_are_wrong(self) -> None:
        assert puzzles(reply("Answer: 5 + 3 - 3", "length"), self.countdown).reason == "unfinished"
        assert puzzles(reply("Answer: 5 Answer: 5 + 3 - 3"), self.countdown).reason == "2 markers"

    def test_bad_row(self) -> None:
        with pytest.raises(ValueError, match="numbers"):
            puzzles(reply("Answer: 1"), row(None, family="countdown", target=3))

    @given(st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 999)), min_size=1, max_size=8))
    def test_parse_sum_agrees_with_arithmetic(self, terms: list[tuple[str, int]]) -> None:
        text = str(terms[0][1]) + "".join(f" {sign} {number}" for sign, number in terms[1:])
        wanted = [terms[0][1]] + [number if sign == "+" else -number for sign, number in terms[1:]]
        assert parse_sum(text) == wanted

    @settings(max_examples=200)
    @given(st.text(max_size=40))
    def test_any_text_is_graded(self, text: str) -> None:
        assert puzzles(reply("Answer: " + text), self.countdown).value in (0.0, 1.0)


class TestExactMatch:
    def test_exact_match_follows_last_line_marker_and_options(self) -> None:
        assert value(exact_match(reply("thinking\nParis  \n"), row("Paris"))) == 1.0
        assert value(exact_match(reply("New   York"), row("New York"))) == 1.0
        assert value(exact_match(reply("New   York"), row("New York"), collapse_whitespace=False)) == 0.0
        assert value(exact_match(reply("paris"), row("Paris"))) == 0.0
        assert value(exact_match(reply("paris"), row("Paris"), ignore_case=True)) == 1.0
        assert value(exact_match(reply("so A: Paris\nbye"), row("Paris"), marker=r"A:")) == 1.0
        assert value(exact_match(reply("UK"), row(["Britain", "UK"]))) == 1.0

    def test_hostile(self) -> None:
        assert exact_match(reply("A: Rome A: Paris"), row("Paris"), marker="A:").reason == "2 markers"
        assert value(exact_match(reply("Rome Paris"), row("Paris"))) == 0.0
        assert value(exact_match(reply(""), row(""))) == 0.0


class TestMath:
    @pytest.mark.parametrize(
        ("text", "gold"),
        [
            ("\\boxed{4}", "4"),
            ("So it is \\boxed{\\frac{1}{2}}.", "0.5"),
            ("The answer is $x^2 + 2x + 1$.", "(x+1)^2"),
            ("Work.\nAnswer: 2\\sqrt{3}", "\\sqrt{12}"),
            ("#### 1,234", "1234"),
            ("we get 12", "12"),
            ("\\boxed{4}. The answer is 4.", "4"),
            ("The answer is (1, 2)", "(1,2)"),
            ("The answer is 3.5.", "3.5"),
        ],
    )
    def test_gold(self, text: str, gold: str) -> None:
        assert math(reply(text), row(gold)) == RewardResult(1.0)

    @pytest.mark.parametrize(
        "text",
        [
            "The answer is 3. The answer is 4",
            "The answer is 4. The answer is 3",
            "\\boxed{3} \\boxed{4}",
            "The answer is 3 or 4",
            "The answer is 3 -> 4",
            "Answer: $3$ $4$",
            "\\boxed{3$ $4}",
            "answer: 3 \\\\ 4",
            "answer: 3, 4",
            "4 apples and 3 oranges",
            "The answer is not 3 but 4",
            "\\boxed{\\boxed{3} 4}",
            "The answer is 4=3",
            "answer: " + "4 " * 1000,
            "The answer is four",
            "4 is incorrect.",
            "$4$ is not the right answer",
            "\\boxed{4} is wrong",
            "So \\(\\boxed{4}\\) was clearly incorrect.",
            "",
        ],
    )
    def test_hedged_or_wrong(self, text: str) -> None:
        result = math(reply(text), row("4"))
        assert result.value == 0.0
        assert result.reason

    def test_sums_within_sums_are_bounded_together(self) -> None:
        text = "\\boxed{\\sum_{k=1}^{1000}\\sum_{j=1}^{1000}\\sum_{i=1}^{1000}i}"
        assert math(reply(text), row("4")).value == 0.0
        assert math(reply("\\boxed{\\sum_{k=1}^{10}\\sum_{j=1}^{k}j}"), row("220")).value == 1.0

    def test_gold_that_is_no_mathematics(self) -> None:
        with pytest.raises(ValueError, match="cannot be read as mathematics"):
            math(reply("\\boxed{4}"), row(""))


class TestMultipleChoice:
    @pytest.mark.parametrize(
        "text", ["B", "(B)", "B) red", "The answer is B.", "Answer: (B)", "So \\boxed{B}", "**B**"]
    )
    def test_gold(self, text: str) -> None:
        text = text.replace("**B**", "answer: **B**")
        assert multiple_choice(reply(text), row("B", choices=["a", "b", "c"])) == RewardResult(1.0)

    @pytest.mark.parametrize(
        "text",
        ["A", "A or B", "A, B", "The answer is A. The answer is B", "ABCD", "\\boxed{A} answer: B", "But no", ""],
    )
    def test_wrong(self, text: str) -> None:
        assert value(multiple_choice(reply(text), row("B", choices=["a", "b", "c"]))) == 0.0

    @pytest.mark.parametrize(
        "text",
        [
            "B is incorrect", "B isn't it.", "B cannot be right", "Answer: B is wrong", "**B** is out", "(B) is false",
            "Answer: B or maybe A", "Answer: B, though it could be C.", "Answer: B; A is also correct",
            "\\boxed{B\\text{ or }A}", "Final answer: (B) blue", "B. green",
        ],
    )  # fmt: skip
    def test_ruled_out_hedged_or_contradicted(self, text: str) -> None:
        assert value(multiple_choice(reply(text), row("B", choices=["blue", "red", "green"]))) == 0.0

    @pytest.mark.parametrize(
        "text",
        [
            "B is correct.", "The answer is B, not A or C.", "The answer is B, as option A is false.", "(B) red",
            "The answer is B. It could be A if the sun were cold.", "B, since A or C would be too small",
            "The answer is B since a dog could be a pet", "Choices:\nA) blue\nB) red\nAnswer: B",
        ],
    )  # fmt: skip
    def test_other_letters_that_are_no_answers(self, text: str) -> None:
        assert value(multiple_choice(reply(text), row("B", choices=["blue", "red", "green"]))) == 1.0

    def test_bad_row(self) -> None:
        with pytest.raises(ValueError, match="none of the letters ABC"):
            multiple_choice(reply("B"), row("D", choices=["a", "b", "c"]))


class TestValidJson:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}  # noqa: RUF012

    def test_gold(self) -> None:
        assert value(valid_json(reply('{"n": 1}'), row(schema=self.schema))) == 1.0
        assert value(valid_json(reply('Here:\n```json\n{"n": 1}\n```'), row(), schema=self.schema)) == 1.0
        assert value(valid_json(reply("[1, 2]"), row("[1,2]"))) == 1.0

    @pytest.mark.parametrize(
        "text",
        ['{"n": "1"}', '{"m": 1}', "{", "", "NaN", '{"n": 1, "n": 2}', '{"n": 1} {"n": 1}', "[" * 100_000,
         '```json\n{"n": 1}\n```\n```json\n{"n": 2}\n```'],
    )  # fmt: skip
    def test_wrong(self, text: str) -> None:
        assert value(valid_json(reply(text), row(schema=self.schema))) == 0.0

    def test_a_bad_schema_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="schema is wrong"):
            valid_json(reply("1"), row(schema={"type": "nonsense"}))


class TestInstructions:
    @pytest.mark.parametrize(
        ("constraints", "good", "bad"),
        [
            ({"max_words": 2}, "two words", "now three words"),
            ({"min_words": 2}, "two words", "one"),
            ({"max_sentences": 1}, "One.", "One. Two."),
            ({"num_paragraphs": 2}, "a\n\nb", "a\nb"),
            ({"bullet_count": 2}, "- a\n* b", "- a\nb"),
            ({"must_include": ["red", "blue"]}, "Red and blue", "reddish blue"),
            ({"forbid": "red"}, "reddish", "so red"),
            ({"lowercase": True}, "abc 1", "Abc"),
            ({"uppercase": True}, "ABC 1", "ABc"),
            ({"starts_with": "Dear"}, "Dear you", "dear you"),
            ({"ends_with": "bye"}, "so bye", "bye now"),
        ],
    )
    def test_each_constraint_accepts_the_good_reply_and_rejects_the_bad_one(
        self, constraints: dict[str, object], good: str, bad: str
    ) -> None:
        assert value(instructions(reply(good), row(constraints=constraints))) == 1.0
        assert value(instructions(reply(bad), row(constraints=constraints))) == 0.0
        assert value(instructions(reply(""), row(constraints=constraints))) == 0.0

    def test_partial_credit_is_the_share_of_met_constraints(self) -> None:
        result = instructions(reply("abc def"), row(constraints={"lowercase": True, "max_words": 1}), partial=True)
        assert result == RewardResult(0.5, {"lowercase": 1.0, "max_words": 0.0}, "broken: max_words")

    def test_unknown_constraint_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="unknown constraint 'max_word'"):
            instructions(reply("a"), row(constraints={"max_word": 3}))


class TestOverlongAndCombinations:
    @pytest.mark.parametrize(("num_tokens", "wanted"), [(1, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (500, -1.0)])
    def test_overlong_penalises_the_last_part_of_the_budget(self, num_tokens: int, wanted: float) -> None:
        assert value(overlong(reply("x", num_tokens=num_tokens), row(), max_tokens=100)) == wanted

    def test_weighted_sum_adds_weighted_rewards(self) -> None:
        rewards = {"final_answer": 2.0, "overlong": {"weight": 0.5, "args": {"max_tokens": 100}}}
        result = weighted_sum(reply("Answer: 4", num_tokens=90), row("4"), rewards)
        assert result.value == 2.0 - 0.25
        assert result.parts == {"final_answer": 2.0, "overlong": -0.25}

    def test_by_capability_uses_the_reward_of_the_rows_capability(self) -> None:
        rewards = {"math": "final_answer", "default": {"name": "exact_match", "args": {"ignore_case": True}}}
        assert value(by_capability(reply("Answer: 4"), row("4"), rewards)) == 1.0
        assert value(by_capability(reply("PARIS"), row("Paris", capability="chat"), rewards)) == 1.0
        with pytest.raises(ValueError, match="no reward for capability 'chat'"):
            by_capability(reply("x"), row("4", capability="chat"), {"math": "final_answer"})


ADD = "def add(a, b):\n    return a + b"


FORGERY = """
import os
for fd in range(64):
    try:
        os.write(fd, b'{"passed": true}\\n' * 9)
    except OSError:
        pass
"""


def block(source: str) -> Rollout:
    return reply(f"Here it is:\n```python\n{source}\n```\n")


@pytest.mark.slow
class TestCode:
    """Real programs in the real sandbox."""

    tests = [  # noqa: RUF012
        "assert add(1, 2) == 3",
        {"call": "add([1], [2])", "expected": [1, 2]},
        "assert add(1, 1) > 1",
    ]

    def test_gold(self) -> None:
        assert code(block(ADD), row(tests=self.tests)) == RewardResult(1.0, {"passed": 1.0})

    def test_programs_are_tested_with_standard_input(self) -> None:
        tests = [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5", "stdout": "10\n"}]
        assert value(code(block("print(sum(map(int, input().split())))"), row(tests=tests))) == 1.0
        assert value(code(block("print(3)"), row(tests=tests))) == 0.0
        assert value(code(block("print(3)"), row(tests=tests), partial=True)) == 0.5

    @pytest.mark.parametrize(
        "source",
        [
            "def add(a, b):\n    return 3",
            "import sys\nsys.exit(0)",
            "import os\nos._exit(0)",
            "def add(a, b):\n    import os\n    os._exit(0)",
            "class Any:\n    __eq__ = lambda *_: True\n    __gt__ = __eq__\ndef add(a, b):\n    return Any()",
            FORGERY,
            "def add(",
            "def sub(a, b):\n    return a - b",
            "raise KeyboardInterrupt",
        ],
    )
    def test_hostile(self, source: str) -> None:
        result = code(block(source), row(tests=self.tests))
        assert result.value == 0.0
        assert result.reason

    @pytest.mark.parametrize("source", ["import sys\nsys.exit(3)", "import os\nos._exit(1)", "import os\nos.abort()"])
    def test_a_program_that_fails_silently_has_not_passed(self, source: str) -> None:
        result = code(block(source), row(tests=[{"stdin": "1 2\n", "stdout": "3"}]))
        assert result.value == 0.0
        assert "exit code" in result.reason

    @pytest.mark.parametrize(
        "source",
        [
            "while True: pass",
            "x = bytearray(1 << 40)",
            "def add(a, b):\n    while True: pass",
            "def add(a, b):\n    return bytearray(1 << 40)",
            "with open('/tmp/f', 'wb') as file:\n    while True: file.write(bytes(1 << 16))",
            "files = [open('/dev/null') for _ in range(100)]",
            "import os, time\nwhile os.fork(): pass\ntime.sleep(100)",
        ],
    )
    def test_a_limit_is_a_wrong_answer(self, source: str) -> None:
        result = code(block(source), row(tests=self.tests), wall_s=1.0)
        assert (result.value, result.reason) == (0.0, "limit")

    def test_expected_values_are_not_visible_to_the_program(self) -> None:
        spy = "import sys, gc\nseen = repr([o for o in gc.get_objects() if isinstance(o, (dict, list))])\n"
        spy += "def f():\n    return '98' + '7654321' * 3 in seen + repr(sys._getframe(2).f_locals)"
        # So long a number that no address in a text of the program's objects has its digits by chance.
        tests = [{"call": "f()", "expected": True}, {"call": "1", "expected": 98765432176543217654321}]
        assert value(code(block(spy), row(tests=tests), partial=True)) == 0.0

    def test_a_reply_without_a_code_block_is_wrong(self) -> None:
        assert code(reply(ADD), row(tests=self.tests)).reason == "no code block"

    @pytest.mark.parametrize("tests", [None, [], ["print(1)"], ["assert ("], [{"call": "f()"}]])
    def test_bad_rows_are_errors(self, tests: object) -> None:
        with pytest.raises(ValueError, match="r1"):
            code(block(ADD), row(tests=tests))
