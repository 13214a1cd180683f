"""Measure the layers of vLLM's model by dummy passes, before anything is compiled and before there is a KV cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.activations.layers import Reading
from rudder.sae_models.activations.measure import measure

TOKENS = 16


def measure_layers(runner: Any, config: Any, layers: nn.ModuleList, numbers: Sequence[int]) -> dict[int, Reading]:
    """Measure the layers `numbers` of the runner's model, by number. `config`: vLLM's configuration."""
    model, model_config = runner.get_model(), config.model_config
    tokens = min(TOKENS, config.scheduler_config.max_num_batched_tokens)
    positions = torch.arange(tokens, device=runner.device)
    ids = positions % model_config.get_vocab_size()
    if model_config.uses_mrope:
        positions = positions.expand(3, tokens)

    def run() -> None:
        from vllm.forward_context import set_forward_context

        # The model's own compiled graph would not call the hooks.
        with set_forward_context(None, config, num_tokens=tokens, skip_compiled=True):
            model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)

    with torch.inference_mode(), without_kv_cache(config):
        return measure(layers, numbers, tokens, model_config.get_hidden_size(), run)


@contextmanager
def without_kv_cache(config: Any) -> Iterator[None]:
    """Within the block, attention returns its query: before there is a KV cache, backends leave the output as it is."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    kinds = (Attention, MLAAttention)
    modules = [m for m in config.compilation_config.static_forward_context.values() if isinstance(m, kinds)]
    for module in modules:
        module.forward = stand_in(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def stand_in(attention: Any) -> Any:
    """Make a function in place of an attention's forward: values of its query in the shape of its output."""

    def forward(query: Tensor, *_args: Any, output_shape: Any = None, **_kwargs: Any) -> Tensor:
        shape = output_shape or (len(query), attention.num_heads * attention.head_size_v)
        flat = query.reshape(len(query), -1)
        index = torch.arange(shape[-1], device=query.device) % flat.shape[1]
        return flat[:, index].reshape(shape)

    return forward
