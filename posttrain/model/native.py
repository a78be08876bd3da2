"""Llama 4 (text) as a transformers `PreTrainedModel`, with dropless grouped experts and isolated packed documents.

Parameters have the names and shapes of transformers' `Llama4ForCausalLM`, and the model computes the same function, so
each of the two loads the other's folders. What differs: experts compute only for their own tokens, documents packed
into a row never see each other, the router works in fp32, and a load-balance loss and a z-loss on the routers can be
added.

Left out: images, tensor parallelism, returned attention weights, attention implementations other than SDPA.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, Llama4TextConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from posttrain.compat.transformers import clear_unread_aux_loss
from posttrain.model.attention import Attention, Positions
from posttrain.model.moe import Experts, GatedMLP, MoE, Routing
from posttrain.model.norm import RMSNorm
from posttrain.model.placement import Layout, layout_of, place, place_tree
from posttrain.model.rope import inverse_frequencies
from posttrain.model.router_stats import RouterLossWeights, RouterStats, load_balance_loss, router_stats, z_loss
from posttrain.model.tree import Tree


@dataclass
class NativeModelOutput(MoeModelOutputWithPast):
    """The base model's output, with the losses on its routers.

    aux_loss, z_loss: the load-balance loss and the z-loss as they are, where they have a weight and gradients are on,
    or where router logits were asked for. router_loss: their weighted sum, which belongs in the training's loss; None
    where none has a weight.
    """

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense or mixture-of-experts feed-forward. Each reads the normalised residual and adds to it."""

    def __init__(self, config: Llama4TextConfig, layer_idx: int):
        super().__init__()
        self.is_moe = layer_idx in (config.moe_layers or ())
        self.self_attn = Attention(config, layer_idx)
        self.feed_forward = MoE(config) if self.is_moe else GatedMLP(config, config.intermediate_size_mlp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions: Positions,
        cache: Cache | None = None,
        expert_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), positions, cache)
        normed = self.post_attention_layernorm(x_BSD)
        if expert_ids is not None:
            return x_BSD + self.feed_forward(normed, expert_ids)
        return x_BSD + self.feed_forward(normed)


class _NativeLlama4(PreTrainedModel):
    config_class = Llama4TextConfig
    config: Llama4TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)


class NativeLlama4Model(_NativeLlama4):
    """The layers without the head.

    `router_loss_weights` starts as the config's `router_aux_loss_coef` for the load-balance loss; a training sets it.
    `step_load_LE` holds the loads that this loss takes; None, outside a training, for those of the forward itself.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Not a buffer, because loading on the meta device leaves buffers without values.
        self._frequencies: tuple[torch.Tensor, float] | None = None
        self.last_routings: tuple[list[Routing], torch.Tensor | None] = ([], None)
        self.router_loss_weights = RouterLossWeights(balance=config.router_aux_loss_coef)
        self.step_load_LE: torch.Tensor | None = None
        self.post_init()

    @property
    def moe_layers(self) -> list[Any]:
        """The mixture-of-experts layers in order: `MoE`, or `ExpertParallelMoE` under expert parallelism."""
        return [layer.feed_forward for layer in self.layers if layer.is_moe]

    @property
    def last_router_stats(self) -> RouterStats | None:
        """Figures on the routers in the last forward, without padding; None before the first. Computed when read."""
        routings, weights_T = self.last_routings
        return router_stats(routings, weights_T) if routings else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        routed_experts: torch.Tensor | None = None,
        tree: Tree | None = None,
        **kwargs: Any,
    ) -> NativeModelOutput:
        """Run the layers. Arguments are those of `NativeLlama4ForCausalLM.forward`.

        `last_hidden_state` is [B, S, D], after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x_BSD.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        frequencies = self._frequencies_on(x_BSD.device)
        if tree is not None:
            others = {"attention_mask": attention_mask, "position_ids": position_ids, "a cache": past_key_values}
            positions = place_tree(self.config, tree, (batch, length), others=others, frequencies=frequencies)
            cache, weights_T = None, tree.weights_T
        else:
            layout = layout_of(
                batch, length, past, attention_mask=attention_mask, position_ids=position_ids, device=x_BSD.device
            )
            cache = self._cache(past_key_values, use_cache, layout)
            weights_T = None if attention_mask is None else attention_mask[:, past:].reshape(-1).bool()
            positions = place(self.config, layout, length, cache=cache, frequencies=frequencies)
        routings, hidden_states = self._run_layers(
            x_BSD, positions, cache, routed_experts=routed_experts, keep_all=bool(output_hidden_states)
        )
        self.last_routings = ([Routing(r.logits_TE.detach(), r.expert_ids_TK) for r in routings], weights_T)
        # The casts are needed because transformers types its outputs as FloatTensor, which no torch function returns.
        return NativeModelOutput(
            last_hidden_state=cast(Any, hidden_states[-1]),
            past_key_values=cache,
            hidden_states=cast(Any, tuple(hidden_states) if output_hidden_states else None),
            router_logits=cast(Any, tuple(r.logits_TE for r in routings) if output_router_logits else None),
            **self._router_losses(routings, weights_T, bool(output_router_logits)),
        )

    def _router_losses(self, routings: list[Routing], weights_T: torch.Tensor | None, asked: bool) -> dict[str, Any]:
        """The fields of the output that hold losses; see NativeModelOutput."""
        weights = self.router_loss_weights
        trained = torch.is_grad_enabled()
        losses: dict[str, torch.Tensor] = {}
        weighted: list[torch.Tensor] = []
        balance = functools.partial(load_balance_loss, load_LE=self.step_load_LE)
        for name, weight, loss in (("aux_loss", weights.balance, balance), ("z_loss", weights.z, z_loss)):
            if routings and (asked or (weight and trained)):
                losses[name] = loss(routings, weights_T)
                if weight:
                    weighted.append(weight * losses[name])
        return {**losses, "router_loss": torch.stack(weighted).sum()} if weighted else losses

    def _run_layers(
        self,
        x_BSD: torch.Tensor,
        positions: Positions,
        cache: Cache | None,
        *,
        routed_experts: torch.Tensor | None,
        keep_all: bool,
    ) -> tuple[list[Routing], list[torch.Tensor]]:
        """Return the routing of each MoE layer, and hidden states: the last, normalised one, or all if `keep_all`."""
        routings: list[Routing] = []
        hidden_states = [x_BSD] if keep_all else []
        moe_layers = self.moe_layers
        self._check_replay(routed_experts, x_BSD)
        replay = iter(()) if routed_experts is None else iter(routed_experts.unbind(2))
        for moe in moe_layers:
            moe.recorder = routings
        try:
            for layer in self.layers:
                expert_ids = next(replay, None) if layer.is_moe else None
                x_BSD = layer(x_BSD, positions, cache, expert_ids)
                if keep_all:
                    hidden_states.append(x_BSD)
        finally:
            for moe in moe_layers:
                moe.recorder = None
        return routings, [*hidden_states[:-1], self.norm(x_BSD)]

    def _check_replay(self, routed_experts: torch.Tensor | None, x_BSD: torch.Tensor) -> None:
        want = (*x_BSD.shape[:2], sum(bool(layer.is_moe) for layer in self.layers), self.config.num_experts_per_tok)
        if routed_experts is not None and tuple(routed_experts.shape) != want:
            raise ValueError(
                f"routed_experts has shape {list(routed_experts.shape)}; it must be "
                f"[batch, tokens, MoE layers, experts a token] = {list(want)}"
            )

    def _cache(self, given: Cache | None, use_cache: bool | None, layout: Layout) -> Cache | None:
        """The cache that this forward fills, or None.

        Packed rows have none, because no next token could continue their documents. Nor is one made by default while
        gradients are on.
        """
        if layout.starts_BS is not None:
            if given is not None or use_cache:
                raise ValueError("position_ids restart within a row (packed documents): use_cache must be False")
            return None
        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not torch.is_grad_enabled())
        if not use_cache:
            return given
        return given if given is not None else DynamicCache(config=self.config)

    def _frequencies_on(self, device: torch.device) -> tuple[torch.Tensor, float]:
        if self._frequencies is None or self._frequencies[0].device != device:
            frequencies, factor = inverse_frequencies(self.config)
            self._frequencies = (frequencies.to(device), factor)
        return self._frequencies


class NativeLlama4ForCausalLM(_NativeLlama4, GenerationMixin):
    """The Llama 4 text model with its head. It has the same weights as transformers' `Llama4ForCausalLM`.

    `model.router_loss_weights` says what multiples of the load-balance loss and the z-loss are added to `loss`. They
    start as `config.router_aux_loss_coef` and 0; the former is set to 0 where the config holds only the default that
    transformers never reads (0.001, output_router_logits False).
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Llama4TextConfig):
        clear_unread_aux_loss(config)
        super().__init__(config)
        self.model = NativeLlama4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        routed_experts: torch.Tensor | None = None,
        tree: Tree | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: int64 [B, S]; or inputs_embeds [B, S, D].
            attention_mask: [B, cached tokens + S], 0 for padding; None if no token is padding.
            position_ids: int64 [B or 1, S]. If they restart within a row, the row is packed: its documents are
                isolated, and the first label of each is ignored, since no token of the document precedes it.
            labels: int64 [B, S], at the place of the token that they name; this method shifts them. -100 is ignored.
            past_key_values, use_cache: as in transformers, but by default no cache is made while gradients are on.
            logits_to_keep: how many tokens to compute logits for, counted from the end (0: all), or their indices.
            routed_experts: int64 [B, S, MoE layers, K], experts to use instead of the router's choice. Their scores
                are still computed from the logits, with a gradient. Source: arXiv 2510.11370.
            tree: the structure of a packed tree, whose tokens are the only row (posttrain/model/tree.py). Several
                labels may follow a token, so labels cannot be given.

        Returns:
            loss, logits [B, S, V], past_key_values, aux_loss (the load-balance loss as it is, where it
            has a weight or `output_router_logits` asks), and hidden_states and router_logits where asked for.

        Raises:
            ValueError: attention_mask or routed_experts has the wrong shape, a cache is given with packed rows, or a
                tree with something that contradicts it.
        """
        if tree is not None and labels is not None:
            raise ValueError("labels cannot be given with a tree, in which several tokens may follow one")
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            routed_experts=routed_experts, tree=tree,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            labels = _without_first_labels(labels, position_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.router_loss is not None:
                loss = loss + outputs.router_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but config.json names `Llama4ForCausalLM`, so that other tools load the folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.exists() and kwargs.get("is_main_process", True):
            config = json.loads(path.read_text())
            config["architectures"] = ["Llama4ForCausalLM"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _without_first_labels(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Ignore the first label of each document, which would be predicted from the last token of another document."""
    if position_ids is None or labels.shape[1] < 2:
        return labels
    restarts = (position_ids[:, 1:] != position_ids[:, :-1] + 1).expand(labels.shape[0], -1)
    return labels.masked_fill(F.pad(restarts, (1, 0), value=False), -100)
