"""A policy that has learned to call the built-in tools, in a whole RL stage: real engine, trainer and sandboxes."""

import json
from pathlib import Path
from typing import Any

import pytest
from episodes_by_hand import HERMES, play, question
from test_environments_rl import assert_clean_and_replayed
from test_rl import make_config, run_stage
from tiny_policy import save_tiny_policy

from posttrain.base.tokenizer import build_tokenizer
from posttrain.model import save_model
from posttrain.records import Rollout
from posttrain.rl.history.recorded import read_rollouts

# What is written in one turn, is run in the next: so the sandbox is kept over the turns of an episode.
WORLD = """
from posttrain.environments.tool_use import tool_use

async def solve(session, row):
    session.reward(0.001 * (session.seed % 997))  # so that the advantages of a policy that is always right are not 0
    return await tool_use(session, row)
"""
SHOWN = [{"type": "function", "function": {"name": name}} for name in ("write_file", "python")]
SAID = [
    f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    for name, arguments in (
        ("write_file", {"path": "a", "content": "6 * 7"}),
        ("python", {"code": "print(eval(open('a').read()))"}),
    )
]
LENGTH = 512


def taught(rollout: Rollout, folder: Path) -> Path:
    """A folder with a tiny policy that says what was said in the rollout, in at least 19 of 20 episodes."""
    import torch
    from torch.nn.functional import cross_entropy

    from posttrain.model import NativeLlama4ForCausalLM

    save_tiny_policy(
        folder,
        hidden_size=64,
        attention_chunk_size=LENGTH,
        head_dim=32,
        attn_temperature_tuning=False,
        initializer_range=0.02,
    )
    model: Any = NativeLlama4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*rollout.prompt.token_ids, *(i for one in rollout.segments for i in one.token_ids)]])
    trained = [False] * len(rollout.prompt.token_ids)
    trained += [one.trained for one in rollout.segments for _ in one.token_ids]
    labels = ids.masked_fill(~torch.tensor([trained]), -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3000):
        loss = cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum")
        if loss.item() < 0.05:
            break
        optimizer.zero_grad()
        (loss / 100).backward()
        optimizer.step()
    else:
        raise AssertionError(f"the policy did not learn what to say: {loss.item()}")
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    return save_model(model, tokenizer, folder)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_policy_that_calls_python_and_files_is_trained_on_its_calls(ranks, tmp_path):
    (tmp_path / "world.py").write_text(WORLD)
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    environment = {"name": f"{tmp_path}/world.py:solve", "tools": ["python", "files"], "tool_parser": "hermes"}
    row = question("sum", "6 * 7?", answer="42", tools=SHOWN)
    said = [*SAID, "42"]
    (by_hand,) = play(
        tokenizer, environment, [row], lambda turn: said[turn.number // 2], length=LENGTH, max_tokens=120
    )["sum"]
    assert by_hand.scored is not None
    assert by_hand.scored.result is not None, by_hand.scored.reason
    assert by_hand.scored.result.parts.items() >= {"turns": 3, "tool_calls": 2, "tool_failures": 0}.items()
    prompt = {"messages": [{"role": "user", "content": "6 * 7?"}], "answer": "42", "tools": SHOWN}
    config = make_config(
        tmp_path,
        taught(by_hand, tmp_path / "model"),
        [{**prompt, "id": f"sum-{number}", "capability": "tools"} for number in range(2)],
        environment=environment,
        steps=2,
        groups_per_step=1,
        sampling={"max_tokens": 120},
        max_staleness=0,
        engine={"max_model_len": LENGTH, "kv_cache_gib": 0.1, "max_num_seqs": 24},
    )
    outputs, metrics = run_stage(config, tmp_path / "rl")
    assert outputs["steps"] == 2
    trained = [item for item in read_rollouts(tmp_path / "rl") if item.status == "trained"]
    assert len(trained) == 2 * 4
    right = [item for item in trained if item.parts["tool_calls"] == 2 and (item.reward or 0) >= 1]
    assert len(right) >= 4
    for item in right:
        segments = item.rollout.segments
        assert [one.trained for one in segments] == [True, False, True, False, True]
        assert [one.token_ids for one in segments] == [one.token_ids for one in by_hand.segments]
        assert "42" in tokenizer.decode(segments[3].token_ids)  # what the program printed
    assert max(line["episode/tool_calls"] for line in metrics if "episode/tool_calls" in line) > 1
    assert_clean_and_replayed(config, tmp_path)
