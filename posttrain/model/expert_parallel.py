"""Expert parallelism for the native model, by DeepSpeed's AutoEP.

AutoEP replaces each `MoE` by a layer that holds this rank's share of the experts and exchanges tokens with the other
ranks. This module adds two things. `register_preset` tells AutoEP how Llama 4's experts are named and computed.
`adopt` gives AutoEP's layers what the native ones have and they lack: a router in fp32, router replay, recorded
routings and a bias on the choice of experts.

Importing this module imports DeepSpeed. Left out: tensor parallelism of experts.

Shapes: T tokens, E experts of all ranks, K experts of each token, B rows, S tokens of a row, D hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.base import AutoEPPresetAdapter, MoEModelPreset
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import nn

from posttrain.compat.deepspeed import change_expert_layers, register_expert_preset
from posttrain.model.moe import Routing, choose_experts

PRESET = "posttrain_llama4"


class _Adapter(AutoEPPresetAdapter):
    def resolve_route_norm(self, config: Any, preset: Any, model_config: Any) -> bool:
        return False  # each score is a sigmoid of its own logit; Llama 4 does not normalise over the chosen


def register_preset() -> None:
    """Tell AutoEP how to find the native model's mixture-of-experts layers, and how their scores are computed."""
    preset = MoEModelPreset(
        moe_layer_pattern=r".*layers\.\d+\.feed_forward",
        router_pattern="router",
        experts_pattern="experts",
        expert_storage="fused_3d",
        expert_w1="gate_up_proj",
        expert_w2="down_proj",
        expert_w3=None,
        num_experts_attr="num_local_experts",
        top_k_attr="num_experts_per_tok",
        score_func="sigmoid",
        score_apply="pre",
        route_norm=False,
        gate_bias=False,
        has_shared_experts=True,
        shared_experts_pattern="shared_expert",
        preset_adapter=PRESET,
        hf_model_types=(),
    )
    register_expert_preset(PRESET, preset, _Adapter())


class ExpertParallelRouter(TokenChoiceTopKRouter):
    """AutoEP's router, computing exactly what the native router does.

    Logits are in fp32. Experts are chosen by logit and not by score, because a sigmoid rounds large logits to the same
    score. replay_TK: expert ids to use instead of choosing, or None. recorder, choice_bias_E: as in `MoE`.
    """

    replay_TK: torch.Tensor | None
    recorder: list[Routing] | None
    choice_bias_E: torch.Tensor | None

    def forward(
        self, x: torch.Tensor, expert_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, D] -> scores [T, K] in the dtype of x, expert ids [T, K], tokens of each expert [E] (int32)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits_TE = F.linear(x.to(dtype), self.gate.weight.to(dtype))
        if self.replay_TK is None:
            ids_TK = choose_experts(logits_TE, self.top_k, self.choice_bias_E)
        else:
            ids_TK = self.replay_TK
        chosen_TK = logits_TE.gather(-1, ids_TK)
        if self.recorder is not None:
            self.recorder.append(Routing(logits_TE, ids_TK))
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts).to(torch.int32)
        return torch.sigmoid(chosen_TK).to(x.dtype), ids_TK, counts_E


class ExpertParallelMoE(AutoEPMoELayer):
    """AutoEP's layer with the native `MoE`'s signature, recorder and choice bias."""

    router: ExpertParallelRouter

    @property
    def recorder(self) -> list[Routing] | None:
        """As `MoE.recorder`."""
        return self.router.recorder

    @recorder.setter
    def recorder(self, value: list[Routing] | None) -> None:
        self.router.recorder = value

    @property
    def choice_bias_E(self) -> torch.Tensor | None:
        """As `MoE.choice_bias_E`."""
        return self.router.choice_bias_E

    @choice_bias_E.setter
    def choice_bias_E(self, value: torch.Tensor | None) -> None:
        self.router.choice_bias_E = value

    def forward(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor | None = None) -> torch.Tensor:
        """hidden_states [B, S, D] -> [B, S, D]. `expert_ids` [B, S, K] replays a choice of experts."""
        self.router.replay_TK = None if expert_ids is None else expert_ids.reshape(-1, self.top_k)
        try:
            out = super().forward(hidden_states)
        finally:
            self.router.replay_TK = None
        assert isinstance(out, torch.Tensor)  # a tuple would hold router logits too, which the preset does not ask for
        return out


def adopt(model: nn.Module) -> int:
    """Make every layer that AutoEP put into a model an `ExpertParallelMoE`; weights are kept. Returns their number."""
    layers = change_expert_layers(model, ExpertParallelMoE, ExpertParallelRouter)
    for layer in layers:
        layer.router.replay_TK = None
        layer.router.recorder = None
        layer.router.choice_bias_E = None
    return len(layers)
