"""`posttrain serve` and `posttrain chat`: which model a path means, the server's arguments, and a real conversation."""

import base64
import contextlib
import io
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from vision_models import draw, save_vision_policy

from posttrain.actors.shared_memory import shared_memory
from posttrain.cli.main import main
from posttrain.errors import ConfigError
from posttrain.serving.chat import converse
from posttrain.serving.models import served_folder, whole_model
from posttrain.serving.server import (
    ServeConfig,
    Server,
    free_port,
    members,
    served_dtype,
    server_arguments,
    serving,
)


def run_of(folder: Path, *stages: tuple[str, str, bool]) -> Path:
    """The folder of a run. stages: name, status, and whether it has left a model."""
    folder.mkdir()
    told = []
    for name, status, has_model in stages:
        outputs = {"model": f"{name}/model"} if has_model else {}
        told.append({"name": name, "status": status, "outputs": outputs})
        if has_model:
            (folder / name / "model").mkdir(parents=True)
            (folder / name / "model" / "config.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps({"stages": told}))
    return folder


def test_a_run_stands_for_its_last_model(tmp_path):
    run = run_of(tmp_path / "run", ("sft", "done", True), ("rl", "done", True), ("eval", "done", False))
    assert served_folder(str(run)) == run / "rl" / "model"
    assert served_folder(str(run / "sft")) == run / "sft" / "model"
    assert served_folder(str(run / "sft" / "model")) == run / "sft" / "model"


def test_what_has_no_model_is_told_in_one_message(tmp_path, capsys):
    empty = run_of(tmp_path / "empty", ("sft", "failed", False))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "pipeline.yaml").write_text("")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    for path, problem in (
        (empty, "no stage of the run has left a model; its stages: sft (failed)"),
        (tmp_path / "begun", "the run has no model yet"),
        (tmp_path / "adapter", "adapter_model.safetensors"),
        (tmp_path / "nothing", "there is no such folder"),
        (tmp_path, "neither a model folder (it has no config.json) nor a run"),
    ):
        for command in ("serve", "chat"):
            assert main([command, str(path)]) == 2
            assert problem in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "engine.max_len=3"]) == 2
    assert "max_len" in capsys.readouterr().err


def test_adapters_are_merged_with_their_base_as_long_as_they_are_served(tiny_model, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import Llama4ForCausalLM

    base = Llama4ForCausalLM.from_pretrained(tiny_model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path=str(tiny_model))
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    config = ServeConfig.model_validate({"engine": {"max_model_len": 64}})
    folder = served_folder(str(tmp_path / "adapter"))
    with whole_model(folder, served_dtype(folder, config)) as merged:
        found, before = load_file(merged / "model.safetensors"), load_file(tiny_model / "model.safetensors")
        assert {name.split(".")[-2] for name in before if not torch.equal(found[name], before[name])} == {"q_proj"}
        assert (merged / "tokenizer.json").is_file()
        assert server_arguments(merged, config, host="127.0.0.1", port=1, name="mine")[:2] == ["--model", str(merged)]
    assert not merged.exists()
    with whole_model(tiny_model, "float32") as same:
        assert same == tiny_model


def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"got {port}: "):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


def test_the_server_reads_calls_if_the_template_shows_how_they_look(tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32", "attn_temperature_tuning": true}')
    config = ServeConfig.model_validate({"engine": {"max_model_len": 64, "kv_cache_gib": 0.1, "stream_interval": 1}})
    words = server_arguments(tmp_path, config, host="127.0.0.1", port=1, name="mine")
    assert words[words.index("--dtype") + 1] == "float32"
    assert words[words.index("--max-model-len") + 1] == "64"
    assert words[words.index("--override-generation-config") + 1] == '{"attn_temperature_tuning": true}'
    assert "--enforce-eager" in words
    assert "--tool-call-parser" not in words
    (tmp_path / "chat_template.jinja").write_text("<tool_call>")
    words = server_arguments(tmp_path, config, host="127.0.0.1", port=1, name="mine")
    assert words[words.index("--tool-call-parser") + 1] == "hermes"


def test_a_turn_that_is_refused_is_no_part_of_the_conversation():
    """By hand, with the client's own errors."""
    asked: list[Any] = []

    def create(**given: Any) -> list[Any]:
        asked.append([message["content"] for message in given["messages"]])
        if given["messages"][-1]["content"] == "too long":
            raise openai.BadRequestError(
                "it is", response=httpx.Response(400, request=httpx.Request("POST", "http://x")), body=None
            )
        return [
            SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=piece))])
            for piece in ("4", "2", None)
        ]

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    shown: list[str] = []
    lines = ["one\n", "\n", "too long\n", "two\n", "/new\n", "three"]
    converse(client, "mine", lines, write=shown.append, system="Be good.")
    assert asked == [
        ["Be good.", "one"],
        ["Be good.", "one", "42", "too long"],
        ["Be good.", "one", "42", "two"],
        ["Be good.", "three"],
    ]
    assert "".join(shown) == "42\n[the server refused this turn: it is]\n42\n42\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_is_tried_by_hand_through_a_pipe(tiny_model, tmp_path, monkeypatch, capsys):
    """By vLLM's own server. A new conversation has the same likeliest tokens as the first."""
    run = run_of(tmp_path / "run", ("rl", "done", False))
    (run / "rl").mkdir()
    (run / "rl" / "model").symlink_to(tiny_model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n" + "long " * 400 + "\n/new\none\n"))
    segments: set[Path] = set()

    @contextlib.contextmanager
    def watched(*given: Any, **named: Any) -> Iterator[Server]:
        with serving(*given, **named) as server:
            yield server
            segments.update(shared_memory(member.pid for member in members(server.process.pid)))

    monkeypatch.setattr("posttrain.serving.server.serving", watched)
    settings = ["engine.max_model_len=256", "engine.kv_cache_gib=0.1", "--max-tokens", "8", "--temperature", "0"]
    assert main(["chat", str(run / "rl"), *settings]) == 0
    shown = capsys.readouterr().out
    first, _, rest = shown.partition("[the server refused this turn: ")
    assert first.strip()
    assert rest.endswith(f"]\n{first}")
    assert {path.name[:4] for path in segments} == {"psm_", "sem."}  # vLLM's queues between its processes, and a lock
    assert not [path for path in segments if path.exists()]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_served_model_is_shown_a_picture(tmp_path):
    policy = save_vision_policy(tmp_path / "policy")
    draw(tmp_path / "boxes.png", 3)
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "boxes.png").read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": data}}
    config = ServeConfig.model_validate({"engine": {"max_model_len": 256, "kv_cache_gib": 0.1}})
    with serving(policy, config, host="127.0.0.1", port=0, name="pictures") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")

        def prompt_tokens(*parts: Any) -> int:
            content: Any = [*parts, {"type": "text", "text": "1 + 1"}]
            reply = client.chat.completions.create(
                model="pictures", messages=[{"role": "user", "content": content}], max_tokens=4
            )
            assert reply.usage is not None
            assert reply.usage.completion_tokens > 0
            return reply.usage.prompt_tokens

        assert prompt_tokens(picture) > prompt_tokens()
