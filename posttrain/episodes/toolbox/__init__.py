"""Tools that a run provides: what `environment.tools` names, and their calls in an environment process.

sources.py    what the YAML names, found and checked without running it; the schemas that the policy is shown
builtin.py    python, read_file, write_file and list_files, in the sandbox of the episode
servers.py    MCP servers over stdio
toolbox.py    the tools of one episode: calls one by name, ends what they started
"""
