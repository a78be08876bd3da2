"""Config sections that several stages share. Nothing here imports torch, so that a config loads in milliseconds."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from posttrain.config.base import Config


def _real_path(path: str) -> str:
    """The path with its `~` expanded. Raises ValueError for an environment variable, which only a shell expands."""
    variable = re.search(r"\$\w+", path)
    if variable and not Path(path).exists():
        raise ValueError(f"environment variables are not expanded here; write out what {variable[0]} stands for")
    return str(Path(path).expanduser()) if path.startswith("~") else path


PathText = Annotated[str, AfterValidator(_real_path)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
GradientCheckpointing = Annotated[
    Literal["none", "full", "selective"],
    Field(
        description="What the backward pass computes again rather than keeping it in memory. none: nothing, which is "
        "fastest. full: whole layers, which saves most. selective: all of a layer but its matrix products and "
        "attention."
    ),
]


class ServedModelConfig(Config):
    """A Hugging Face model folder that an engine serves with its own model code."""

    path: PathText = Field(
        description="Folder with config.json, safetensors and a tokenizer; in a pipeline also ${stage.model}."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Data type of the weights and activations."
    )


class RouterConfig(Config):
    """How the routers of a native Llama 4 are kept from favouring a few experts during training. 0 switches a part off.

    Example: `router: {balance_loss: 0.01, z_loss: 0.001}`.
    """

    balance_loss: NotNegative = Field(
        default=0.0, description="Weight of the load-balance loss, which pushes all experts towards the same load."
    )
    z_loss: NotNegative = Field(
        default=0.0, description="Weight of the z-loss, which keeps the logits of the router small."
    )
    bias_rate: NotNegative = Field(
        default=0.0,
        description="How far each step moves a bias on the choice of every expert, up for experts with too little "
        "load and down for those with too much. The bias fades to 0 over the training, so the model that is exported "
        "needs none.",
    )


class ModelConfig(ServedModelConfig):
    """A Hugging Face model folder that is trained, and which code runs it."""

    implementation: Literal["native", "transformers"] = Field(
        default="native",
        description="Model code for Llama 4: our own, or that of transformers. Other architectures always use "
        "transformers.",
    )
    router: RouterConfig = Field(
        default_factory=RouterConfig, description="How experts are kept evenly loaded. Off by default."
    )


class FilesConfig(Config):
    """Records of any kind: JSON lines, JSON, Parquet or CSV files, a folder of such files, or a saved `datasets`
    folder.
    """

    path: PathText | list[PathText] = Field(
        description="A file or folder, or a list of them; in a pipeline also ${stage.output}."
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Number of rows to use, from the first on; null uses all."
    )


class DataConfig(FilesConfig):
    """A dataset of rows or preference pairs. Example: `{path: data/train.jsonl, capability: math}`."""

    capability: str = Field(default="general", description="Capability of the rows that do not name one themselves.")
    format: Literal["messages", "prompt_completion", "sharegpt", "alpaca", "kto", "text", "pairs"] | None = Field(
        default=None,
        description="The shape of the rows, see docs/data.md; null tells it from the columns of each row.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which columns of the data hold what, the name that is used here first: "
        "{prompt: question, completion: answer}.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="Other names of roles in the data and what they mean, such as {developer: system}.",
    )
    weights: list[Positive] | None = Field(
        default=None,
        description="How often a row is drawn from each path, relative to the others, until the first path has no more "
        "rows; null reads the paths one after another.",
    )
    mix_seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of the draws that `weights` ask for.")
    on_bad_row: Literal["fail", "set_aside"] = Field(
        default="fail",
        description="What to do with a row that cannot be used. fail: stop, and name the first of them. set_aside: "
        "leave it out, write it to set_aside_NAME.jsonl in the stage's folder, NAME being its file's, with what is "
        "wrong, and say how many.",
    )
    special_tokens_in_text: Literal["encode", "refuse"] = Field(
        default="encode",
        description="What to do with a special token, such as <|im_end|>, in the text of a row. encode makes it plain "
        "text, so that no row can forge a turn; refuse makes it an error.",
    )

    @model_validator(mode="after")
    def _weighs_each_path(self) -> "DataConfig":
        paths = [self.path] if isinstance(self.path, str) else self.path
        if self.weights is not None and len(self.weights) != len(paths):
            raise ValueError(
                f"weights: got {len(self.weights)} for {len(paths)} paths; give one for each entry of path"
            )
        return self


class RewardFunctionConfig(Config):
    """A reward plug-in. Example: `{name: exact_match, args: {marker: "Answer:"}}`."""

    name: str = Field(
        description="Which function: a registered name (`posttrain rewards list`), package.module:function, or "
        "path/to/file.py:function."
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments that the function is called with."
    )


class RewardConfig(RewardFunctionConfig):
    """A reward plug-in, and the reward processes that run it."""

    workers: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Number of reward processes that score side by side."
    )
    timeout_s: Positive = Field(
        default=10.0,
        description="Seconds that the reward of one rollout may take. After that its process is killed, and the "
        "rollout is unscored.",
    )
    correct_threshold: Probability = Field(
        default=0.5,
        description="A reply with at least this reward counts as right, wherever right replies are counted: in the "
        "profile, the curriculum, the metrics and evaluations.",
    )


class ActorResources(Config):
    """What the actors of one role ask of the Ray cluster. Example: `{workers: 2, cpus: 1, gpus: 1}` is two engines."""

    workers: Annotated[int, Field(ge=1)] = Field(default=1, description="Number of actors, one engine in each.")
    cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves for each actor.")
    gpus: Annotated[float, Field(ge=0)] = Field(default=0.0, description="GPUs that Ray reserves for each actor.")


class RewardResources(Config):
    """What the actor that holds all reward processes asks of the Ray cluster."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="CPUs that Ray reserves for all reward processes together."
    )
    gpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs that Ray reserves for all reward processes together."
    )


class ParallelConfig(Config):
    """How training is spread over ranks, each with a DeepSpeed engine. The stage starts the ranks itself.

    Example: `{processes: 16, expert: 8, zero: 2}`: 16 ranks, and each copy of the experts divided over 8 of them.
    """

    processes: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Number of ranks. Each rank takes rows of its own, so a step trains on that many times the rows.",
    )
    expert: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Number of ranks over which one copy of the experts is divided (expert parallelism). It must "
        "divide both `processes` and the number of experts.",
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1,
        description="ZeRO stage, which says what the ranks divide among them. 0: nothing; 1: the optimizer state; "
        "2: the gradients too; 3: the weights too.",
    )
    offload: Literal["none", "optimizer"] = Field(
        default="none",
        description="optimizer keeps the optimizer state on the CPU and computes its step there; it needs zero 1 to 3.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "ParallelConfig":
        if self.processes % self.expert:
            raise ValueError(f"expert: got {self.expert}, which does not divide processes {self.processes}")
        if self.offload != "none" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero: 1, 2 or 3 (with 0 no state is divided or moved)")
        return self


class TrainerResources(Config):
    """What each rank of a stage asks of the Ray cluster."""

    cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves for each rank.")
    gpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs that Ray reserves for each rank, at most 1."
    )

    @field_validator("gpus")
    @classmethod
    def _at_most_one(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("a rank uses at most one GPU; to train on more GPUs raise parallel.processes")
        return gpus


class EngineConfig(Config):
    """The vLLM engine that serves a model. Example: `{max_model_len: 8192, tensor_parallel: 2}`."""

    max_model_len: Annotated[int, Field(ge=16)] = Field(
        default=4096, description="Largest number of tokens of a prompt and its reply together."
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Largest number of sequences that the engine decodes at the same time."
    )
    kv_cache_gib: Positive | None = Field(
        default=None, description="Memory for the KV cache in GiB; null lets vLLM decide."
    )
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of a GPU's memory that vLLM may use. It has no meaning on a CPU."
    )
    tensor_parallel: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Number of GPUs that one engine is split over."
    )
    enforce_eager: bool = Field(
        default=True,
        description="Run the model without capturing CUDA graphs. On a CPU this must stay true; on a GPU false is "
        "faster, but the engine takes longer to start.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Compute the KV cache of a prefix once for all requests that begin with it, as the replies of a "
        "group do.",
    )
    stream_interval: Annotated[int, Field(ge=1)] = Field(
        default=256,
        description="Number of tokens after which the engine hands on a part of an unfinished reply. If the engine is "
        "lost, another continues the reply from there. Smaller values cost more calls between processes.",
    )
    deadline_s: Positive = Field(
        default=60.0,
        description="Seconds of silence after which an engine with work to do is asked for a sign of life. If none "
        "comes within the same time, the engine counts as lost and is replaced. It must be longer than the longest "
        "engine step.",
    )


class SamplingConfig(Config):
    """How replies are drawn. Example: `{temperature: 1.0, max_tokens: 512}`."""

    temperature: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="The logits are divided by it before a token is drawn. 0 always takes the likeliest token.",
    )
    max_tokens: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="Largest number of tokens of a reply; a longer reply is cut off there."
    )


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule. Example: `{learning_rate: 2e-5, schedule: cosine, warmup_steps: 20}`."""

    learning_rate: Positive = Field(default=1e-5, description="Learning rate at the end of the warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How the learning rate goes on after the warm-up: it stays, or it falls to 0 at the last step in a "
        "line or a half cosine.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Number of steps over which the learning rate rises from 0 in a line."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of AdamW's mean of the gradients, for each step."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Decay of AdamW's mean of the squared gradients, for each step."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Share of each weight, times the learning rate, that a step takes away."
    )
    max_grad_norm: Positive = Field(
        default=1.0, description="A gradient whose norm is larger is scaled down to this norm."
    )


class TrackioConfig(Config):
    """Metrics to trackio, which stores them on this machine unless its own environment variables say otherwise."""

    project: str = Field(min_length=1, description="Name of the project. Each stage is a run in it, called RUN-STAGE.")


class WandbConfig(Config):
    """Metrics to Weights & Biases."""

    project: str = Field(
        min_length=1,
        description="Name of the project. Each stage is a run in it, called RUN-STAGE, in the group RUN.",
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline writes into the stage's folder and sends nothing; online sends to the service.",
    )


class TrackersConfig(Config):
    """Where metrics go besides metrics.jsonl. Example: `{tensorboard: true, trackio: {project: mine}}`."""

    tensorboard: bool = Field(
        default=False, description="Write TensorBoard event files into the folder tensorboard/ of the stage."
    )
    trackio: TrackioConfig | None = Field(default=None, description="Send metrics to trackio; null does not.")
    wandb: WandbConfig | None = Field(default=None, description="Send metrics to Weights & Biases; null does not.")

    @property
    def packages(self) -> list[str]:
        """The packages of the trackers that are switched on. The extra of the same name installs each."""
        return [name for name in type(self).model_fields if getattr(self, name)]


class LoraConfig(Config):
    """Low-rank adapters (LoRA), which are merged into the exported model. Example: `{rank: 8, alpha: 16}`."""

    rank: Annotated[int, Field(ge=1)] = Field(default=16, description="Rank of each adapter.")
    alpha: Positive = Field(default=32.0, description="The output of an adapter is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of an adapter's inputs that is set to 0 in training."
    )
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        description="Names of the linear modules that get an adapter. The default is those of the attention.",
    )
    target_parameters: list[str] = Field(
        default_factory=list,
        description="Names of weights that hold all experts in one tensor, such as experts.gate_up_proj. Each expert "
        "gets an adapter of its own.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "LoraConfig":
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "target_modules and target_parameters are both empty; name at least one module or parameter to adapt"
            )
        if self.target_parameters and self.dropout > 0:
            raise ValueError(
                f"dropout: got {self.dropout} with target_parameters; adapters of experts are added to the weight, "
                "which no dropout goes through: set dropout: 0.0"
            )
        return self


class VerifierConfig(RewardFunctionConfig):
    """A reward plug-in that checks whether a reply follows a system instruction."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2,
        description="w in the reward (1 - w) R + w V, where R is the reward of the task and V that of the verifier.",
    )


class SystemInstruction(Config):
    """One system instruction and how often it is drawn. Example: `{text: "Answer briefly.", weight: 0.5}`."""

    text: str = Field(description="The text of the system turn; an empty text means that there is no system turn.")
    weight: Positive = Field(
        default=1.0, description="How often this instruction is drawn, relative to the weights of the others."
    )
    verifier: VerifierConfig | None = Field(
        default=None,
        description="A reward that checks replies to prompts which drew this instruction; null leaves only the reward "
        "of the task.",
    )

    @model_validator(mode="after")
    def _has_text(self) -> "SystemInstruction":
        if self.verifier is not None and not self.text:
            raise ValueError("verifier: an empty text is no system turn, so there is nothing to verify; remove it")
        return self


class SystemsConfig(Config):
    """The system instructions that are sampled for prompts which have no system turn of their own."""

    instructions: list[SystemInstruction] = Field(
        default_factory=list, description="The instructions to draw from; an empty list adds no system turn."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "SystemsConfig":
        texts = [item.text for item in self.instructions]
        if len(set(texts)) != len(texts):
            raise ValueError("each instruction may appear once; give it a larger weight instead")
        return self
