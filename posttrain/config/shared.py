"""Schemas that several stages share. No torch here: a config loads in milliseconds."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
GradientCheckpointing = Annotated[
    Literal["none", "full", "selective"],
    Field(
        description="What the backward computes again, to save memory: nothing, whole layers, or all of a layer "
        "but its matrix products and attention."
    ),
]


class ServedModelConfig(Config):
    """A Hugging Face model folder that an engine serves with its own model code."""

    path: str = Field(description="Folder with config.json, safetensors and tokenizer; or ${stage.model}.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Type of the weights and activations."
    )


class RouterConfig(Config):
    """How the routers of a native Llama 4 are kept from favouring a few experts while it is trained; 0 is off."""

    balance_loss: NotNegative = Field(default=0.0, description="Weight of the load-balance loss.")
    z_loss: NotNegative = Field(default=0.0, description="Weight of the z-loss, which keeps router logits small.")
    bias_rate: NotNegative = Field(
        default=0.0,
        description="How far a step moves the bias on the choice of each expert towards equal loads; the bias fades "
        "to nothing over the training.",
    )


class ModelConfig(ServedModelConfig):
    """A Hugging Face model folder that is trained, and how it is held in memory."""

    implementation: Literal["native", "transformers"] = Field(
        default="native", description="Model code for Llama 4; other architectures always use transformers."
    )
    router: RouterConfig = Field(default_factory=RouterConfig)


class FilesConfig(Config):
    """Records of any kind: JSON lines, JSON, parquet or CSV files, a folder of them, or a saved `datasets` folder."""

    path: str | list[str] = Field(description="File or folder, or several; or ${stage.output}.")
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Use only the first rows.")


class DataConfig(FilesConfig):
    """A dataset of rows or pairs, in the same kinds of file."""

    capability: str = Field(default="general", description="Capability of rows that do not name one.")


class RewardFunctionConfig(Config):
    """A reward plug-in: the name of an entry point, a dotted path, or path/to/file.py:function."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments given to the function.")


class RewardConfig(RewardFunctionConfig):
    """A reward plug-in, and the processes that run it."""

    workers: Annotated[int, Field(ge=1)] = Field(default=1, description="Processes that score side by side.")
    timeout_s: Positive = Field(default=10.0, description="A scoring that takes longer is killed with its process.")
    correct_threshold: Probability = Field(
        default=0.5,
        description="A reply with at least this reward counts as right, wherever these are counted.",
    )


class ActorResources(Config):
    """What one kind of actor asks of the Ray cluster. `workers` is how many there are; the rest is for each."""

    workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0


class RewardResources(Config):
    """What the actor that holds the reward processes asks of the Ray cluster, for all of them together."""

    cpus: Annotated[float, Field(ge=0)] = 0.0
    gpus: Annotated[float, Field(ge=0)] = 0.0


class ParallelConfig(Config):
    """A training spread over processes, each with a DeepSpeed engine; the stage starts them itself."""

    processes: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Ranks. Each takes its own rows, so a step trains on that many times the rows."
    )
    expert: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Ranks that share one copy of the experts; it divides processes and the experts."
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1, description="What ranks divide among them: 1 optimizer state, 2 gradients too, 3 weights too."
    )
    offload: Literal["none", "optimizer"] = Field(
        default="none", description="Keep optimizer state and its step on the CPU; needs zero of 1 to 3."
    )

    @model_validator(mode="after")
    def _fits(self) -> "ParallelConfig":
        if self.processes % self.expert:
            raise ValueError(f"expert: got {self.expert}, which does not divide processes {self.processes}")
        if self.offload != "none" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero: 1, 2 or 3 (with 0 no state is divided or moved)")
        return self


class TrainerResources(Config):
    """What each training process of a stage asks of the Ray cluster."""

    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("gpus")
    @classmethod
    def _at_most_one(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("a training process uses at most one GPU; more GPUs: parallel.processes")
        return gpus


class EngineConfig(Config):
    """The vLLM engine that serves the model."""

    max_model_len: Annotated[int, Field(ge=16)] = Field(
        default=4096, description="Longest prompt plus reply, in tokens."
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = Field(default=256, description="Sequences decoded at the same time.")
    kv_cache_gib: Positive | None = Field(default=None, description="Memory for the KV cache; None lets vLLM decide.")
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of a GPU given to vLLM."
    )
    tensor_parallel: Annotated[int, Field(ge=1)] = Field(default=1, description="GPUs that one engine is split over.")
    enforce_eager: bool = Field(default=True, description="Do not capture graphs. On a CPU it must stay true.")
    prefix_caching: bool = Field(default=True, description="Share the KV cache of equal prefixes.")
    stream_interval: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Tokens of a reply after which they are handed on, before the reply is finished."
    )
    deadline_s: Positive = Field(
        default=60.0,
        description="An engine that is silent for this long with work to do is asked for an answer, and is taken for "
        "lost if none comes within the same time. No engine step may last as long.",
    )


class SamplingConfig(Config):
    """How replies are drawn. Example: `{temperature: 1.0, max_tokens: 512}`."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="Longest reply; a longer one is truncated."
    )


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule."""

    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0


class TrackioConfig(Config):
    """trackio, on this machine unless its own variables say otherwise."""

    project: str = Field(min_length=1, description="Its run is called RUN-STAGE.")


class WandbConfig(Config):
    """Weights & Biases."""

    project: str = Field(min_length=1, description="Its run is called RUN-STAGE, in the group RUN.")
    mode: Literal["offline", "online"] = Field(
        default="offline", description="offline writes to the stage's folder; online sends to the service."
    )


class TrackersConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = Field(default=False, description="Event files in the stage's folder tensorboard/.")
    trackio: TrackioConfig | None = None
    wandb: WandbConfig | None = None

    @property
    def packages(self) -> list[str]:
        """The packages of those that are on; the extra of the same name installs each."""
        return [name for name in type(self).model_fields if getattr(self, name)]


class LoraConfig(Config):
    """Low-rank adapters, merged into the exported model."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], description="Names of linear modules."
    )
    target_parameters: list[str] = Field(
        default_factory=list,
        description="Weights of all experts in one, such as experts.gate_up_proj; each expert gets its own adapter.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "LoraConfig":
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules and target_parameters are both empty; name what is to be adapted")
        if self.target_parameters and self.dropout > 0:
            raise ValueError(
                f"dropout: got {self.dropout} with target_parameters; adapters of experts are added to the weight, "
                "which no dropout goes through: set dropout: 0.0"
            )
        return self


class VerifierConfig(RewardFunctionConfig):
    """A reward plug-in that says whether a reply keeps to a system instruction."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="w in the reward (1 - w) R + w V: V is the verifier's, R that of the task."
    )


class SystemInstruction(Config):
    """One system instruction and how often it is drawn; an empty text means no system turn."""

    text: str
    weight: Positive = 1.0
    verifier: VerifierConfig | None = Field(
        default=None, description="Checks replies to prompts that drew this instruction; None: the task's reward alone."
    )

    @model_validator(mode="after")
    def _has_text(self) -> "SystemInstruction":
        if self.verifier is not None and not self.text:
            raise ValueError("verifier: an empty text is no system turn, so there is nothing to verify; remove it")
        return self


class SystemsConfig(Config):
    """The set that system instructions are sampled from, for prompts that bring none of their own."""

    instructions: list[SystemInstruction] = Field(default_factory=list)

    @model_validator(mode="after")
    def _distinct(self) -> "SystemsConfig":
        texts = [item.text for item in self.instructions]
        if len(set(texts)) != len(texts):
            raise ValueError("each instruction may appear once; give it a larger weight instead")
        return self
