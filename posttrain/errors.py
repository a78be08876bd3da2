"""The exceptions of this package, and the exit code that each branch of them means.

`UserError` is for what the user can correct (config, data, plug-in, checkpoint): the command line prints only its
message and exits with 2. `StageError` is for a run that failed after it had started and can be resumed: exit code 3.
Any other exception is a defect of this package; its traceback goes to the log, and the exit code is 3 too.
"""

EXIT_OK = 0
EXIT_USER = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130


class PosttrainError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = EXIT_FAILED


class UserError(PosttrainError):
    """The input is wrong. The message holds the value got, the rule, and the key or row to change."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """A YAML file, an override or a pipeline graph is wrong. `problems` lists each one on a line of its own."""

    def __init__(self, source: str, problems: list[str]):
        self.source = source
        self.problems = list(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, list[str]]]:
        """A rank raises it too, and it must arrive in the stage's process as it was."""
        return type(self), (self.source, self.problems)


class DataError(UserError):
    """A dataset cannot be read, or one of its rows breaks the rules."""


class PluginError(UserError):
    """A reward plug-in cannot be found, imported or called."""


class CheckpointError(UserError):
    """A model folder or checkpoint is incomplete, corrupt, or belongs to another model."""


class MissingDependencyError(UserError):
    """A package that this stage needs is not installed."""


class StageError(PosttrainError):
    """A stage failed after it had started. Earlier results are intact, and the same command continues the run."""


class TrainerLostError(StageError):
    """A rank of the RL trainer has died or does not answer."""
