"""Built-in tools, which work in one sandbox for each episode: files that one call leaves, the next one finds.

Each call is a program in the sandbox (`scoring/sandbox/kept.py`), that of a file tool too: so what the policy does to
its files meets the same limits, and nothing here opens a path that the policy names.
"""

import json
from collections.abc import Mapping
from typing import Any

from posttrain.scoring.sandbox.kept import KeptSandbox
from posttrain.scoring.sandbox.run import Limits, SandboxError, SandboxResult

MAX_CHARS = 8_000  # of a result: the policy reads every character of it
_PATH = {"type": "string", "description": "Path of the file, relative to the working folder."}
_LIMITS = {
    "wall": "was stopped after {wall_s:g} seconds",
    "cpu": "was stopped after {cpu_s} seconds of computing",
    "memory": "needs more than {memory_mib} MiB of memory",
    "processes": "starts more than {num_processes} processes",
    "files": "opens too many files",
    "disk": "found no room: files may have {disk_mib} MiB together",
    "output": "was stopped because it printed more than {output_bytes} bytes",
}
_FILES = """
import json, os, sys

job = json.load(sys.stdin)
tool, path = job["tool"], job.get("path", ".")
try:
    if tool == "list_files":
        for folder, folders, files in os.walk(path, onerror=lambda error: (_ for _ in ()).throw(error)):
            folders.sort()
            for name in sorted(files):
                place = os.path.normpath(os.path.join(folder, name))
                if place != ".program.py":
                    print(f"{place} ({os.lstat(place).st_size} bytes)")
    elif tool == "read_file":
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if number >= job.get("first_line", 1):
                    sys.stdout.write(line)
    else:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(job["content"])
        print(f"wrote {len(job['content'])} characters")
except OSError as error:
    if error.errno in (24, 27, 28):
        raise
    sys.exit(f"{path}: {error.strerror}")
"""


def _schema(name: str, description: str, required: int, **properties: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool. required: how many of the first properties a call must give."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:required]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "python": [
        _schema(
            "python",
            "Run a Python program and return what it prints. Every call is a new interpreter: variables do not last, "
            "files in the working folder do. Only the standard library is there, and no network.",
            1,
            code={"type": "string", "description": "The program. What it prints is the result."},
        )
    ],
    "files": [
        _schema(
            "read_file",
            "Return the text of a file in the working folder.",
            1,
            path=_PATH,
            first_line={"type": "integer", "minimum": 1, "description": "Where to begin. Default: 1."},
        ),
        _schema(
            "write_file",
            "Write a file in the working folder, in place of one that is there.",
            2,
            path=_PATH,
            content={"type": "string", "description": "The whole text of the file."},
        ),
        _schema("list_files", "Return the names and sizes of the files in the working folder.", 0),
    ],
}


def names_of(group: str) -> list[str]:
    """The names of the tools in a group of SCHEMAS."""
    return [schema["function"]["name"] for schema in SCHEMAS[group]]


async def call_builtin(sandbox: KeptSandbox, limits: Limits, name: str, *, arguments: Mapping[str, Any]) -> str:
    """The result of a built-in tool, as the policy reads it; it begins with "Error:" if the call failed."""
    try:
        if name == "python":
            result = await sandbox.run(str(arguments["code"]))
        else:
            result = await sandbox.run(_FILES, json.dumps({**arguments, "tool": name}), is_isolated=True)
    except SandboxError as error:
        return f"Error: {error}"
    return _told(result, limits, "the program" if name == "python" else name)


def _told(result: SandboxResult, limits: Limits, who: str) -> str:
    printed = result.stdout.decode("utf-8", errors="replace").rstrip()
    words = result.stderr.strip()
    if result.limit:
        why = _LIMITS[result.limit].format(**{field: getattr(limits, field) for field in Limits.__dataclass_fields__})
        words = f"Error: {who} {why}" + (f"\n{words}" if words and result.limit not in ("wall", "output") else "")
    elif result.exit_code:
        words = f"Error: {who} ended with exit code {result.exit_code}" + (f"\n{words}" if words else "")
    else:
        words = ""
    if not words:
        return cut(printed) or "(no output)"
    return cut(words) + (f"\nIt printed:\n{cut(printed)}" if printed else "")


def cut(text: str, size: int = MAX_CHARS) -> str:
    """A text, or its beginning and end with how many characters are missing between them."""
    if len(text) <= size:
        return text
    half = size // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters are left out ...\n{text[-half:]}"
