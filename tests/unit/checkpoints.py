"""Checkpoints in every published format, written by hand, each with its own few lines of arithmetic."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rudder.sae_models.formats import (
    adaptive_k,
    cross_layer,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    openai,
    opensae,
    qwen_scope,
    route_sae,
    saelens,
    sparsify,
    transcoders,
)
from rudder.sae_models.formats.source import Format
from rudder.sae_models.sae import SAE, Normalisation

LATENTS, WIDTH, K = 24, 6, 5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its reader, and the expected f [n, F] and y [n, d_out] for inputs x [n, d]."""

    format: Format
    path: Path
    file: Path
    x: Tensor
    f: Tensor
    y: Tensor


class Draw:
    """Random weights: matrices with rows of different norms, non-zero biases and thresholds."""

    def __init__(self, seed: int = 0) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.w_enc = self.normal(LATENTS, WIDTH)
        self.w_dec = self.normal(LATENTS, WIDTH) * (0.3 + 2 * torch.rand(LATENTS, 1, generator=self.g))
        self.b_enc, self.b_dec = self.normal(LATENTS), self.normal(WIDTH)
        self.threshold = 0.2 + torch.rand(LATENTS, generator=self.g)
        self.x = 3 * self.normal(40, WIDTH) + 1

    def normal(self, *shape: int) -> Tensor:
        """Draw from a standard normal distribution."""
        return torch.randn(*shape, generator=self.g)


def relu_above(z: Tensor, threshold: Tensor | float) -> Tensor:
    """Return relu(z) where z exceeds the threshold."""
    return z.relu() * (z > threshold)


def top(z: Tensor, k: int) -> Tensor:
    """Return the k largest of each token's z, where above 0."""
    return z.relu() * (z >= z.sort(descending=True).values[:, k - 1 : k])


def check(sae: SAE, checkpoint: Checkpoint, tolerance: float = 1e-5) -> None:
    """Assert that encode and decode agree with the formula, and that some latents are active and most are not."""
    f = sae.encode(checkpoint.x)
    assert 0.02 < float((checkpoint.f > 0).float().mean()) < 0.8
    assert torch.equal(f > 0, checkpoint.f > 0)
    assert_near(f, checkpoint.f, tolerance)
    if sae.router is None:
        assert_near(sae.decode(f, checkpoint.x), checkpoint.y, tolerance)
    else:
        assert_near(replace(sae, router=None, normalisation=Normalisation.NONE).decode(f), checkpoint.y, tolerance)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality within a tolerance relative to the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < tolerance * float(expected.abs().max())


def save_npz(file: Path, tensors: dict[str, Tensor]) -> None:
    """Save an npz file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in tensors.items()}
    np.savez(file, **arrays)


def save_safe(file: Path, tensors: dict[str, Tensor]) -> None:
    """Save a safetensors file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def save_torch(file: Path, content: Any) -> None:
    """Save a torch file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)


def save_json(file: Path, content: dict[str, Any]) -> None:
    """Save settings as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the content of a checkpoint's file."""
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            content: dict[str, Any] = {key: torch.from_numpy(arrays[key]) for key in arrays}
        save_npz(file, change(content))
    elif file.suffix == ".safetensors":
        save_safe(file, change({key: tensor.clone() for key, tensor in load_file(file).items()}))
    else:
        save_torch(file, change(torch.load(file)))


def linears(draw: Draw, encoder: str = "encoder", decoder: str = "decoder") -> dict[str, Tensor]:
    """Return the tensors of two `torch.nn.Linear`."""
    return {
        f"{encoder}.weight": draw.w_enc,
        f"{encoder}.bias": draw.b_enc,
        f"{decoder}.weight": draw.w_dec.T.contiguous(),
        f"{decoder}.bias": draw.b_dec,
    }


def write_gemma_scope(home: Path, d: Draw, prefix: str = "W_") -> Checkpoint:
    """Write a Gemma Scope SAE of the residual stream; some of its files have lower-case names."""
    folder = home / "models--google--gemma-scope-2b-pt-res/snapshots/abc/layer_20/width_16k/average_l0_71"
    tensors = {f"{prefix}enc": d.w_enc.T, f"{prefix}dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec}
    save_npz(folder / "params.npz", tensors | {"threshold": d.threshold})
    f = relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold)
    return Checkpoint(gemma_scope.FORMAT, folder, folder / "params.npz", d.x, f, f @ d.w_dec + d.b_dec)


def write_gemma_scope_2(home: Path, d: Draw) -> Checkpoint:
    """Write an affine transcoder of Gemma Scope 2."""
    folder = home / "gemma-scope-2-1b-pt/transcoder_all/layer_7_width_16k_l0_small_affine"
    skip = d.normal(WIDTH, WIDTH)
    tensors = {"w_enc": d.w_enc.T, "w_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_safe(folder / "params.safetensors", tensors | {"affine_skip_connection": skip})
    settings = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
        "affine_connection": True,
        "l0": 10,
    }
    save_json(folder / "config.json", settings)
    f = relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold)
    y = f @ d.w_dec + d.b_dec + d.x @ skip
    return Checkpoint(gemma_scope_2.FORMAT, folder, folder / "params.safetensors", d.x, f, y)


def write_openai(home: Path, d: Draw) -> Checkpoint:
    """Write a TopK SAE of OpenAI: layer norm first, then the pre-bias."""
    file = home / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    content = {
        "pre_bias": d.b_dec,
        "latent_bias": d.b_enc,
        "encoder.weight": d.w_enc,
        "decoder.weight": d.w_dec.T.contiguous(),
        "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long),
        "latents_activation_frequency": torch.ones(LATENTS),
        "latents_mean_square": torch.zeros(LATENTS),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }
    save_torch(file, content)
    mean, std = d.x.mean(-1, keepdim=True), d.x.std(-1, keepdim=True)
    h = (d.x - mean) / (std + 1e-5)
    f = top((h - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    return Checkpoint(openai.FORMAT, file, file, d.x, f, (f @ d.w_dec + d.b_dec) * std + mean)


def write_llama_scope(home: Path, d: Draw) -> Checkpoint:
    """Write a transcoder of Llama Scope: different norms at input and output, threshold in units of the output."""
    folder = home / "Llama3_1-8B-Base-L8TC-8x"
    save_safe(folder / "checkpoints/final.safetensors", linears(d))
    settings = {
        "d_model": WIDTH,
        "d_sae": LATENTS,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "jump_relu_threshold": 0.4,
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "dataset_average_activation_norm": {"in": 5.0, "out": 1.25},
        "hook_point_in": "blocks.8.hook_resid_mid",
        "hook_point_out": "blocks.8.hook_mlp_out",
    }
    save_json(folder / "hyperparams.json", settings)
    input_scale, out = math.sqrt(WIDTH) / 5.0, math.sqrt(WIDTH) / 1.25
    z = (d.x * input_scale) @ d.w_enc.T + d.b_enc
    f = z.relu() * (z * d.w_dec.norm(dim=1) / out > 0.4)
    y = (f @ d.w_dec + d.b_dec) / out
    return Checkpoint(llama_scope.FORMAT, folder, folder / "checkpoints/final.safetensors", d.x, f, y)


def write_llamascopium(home: Path, d: Draw) -> Checkpoint:
    """Write a JumpReLU SAE of Llamascopium 2.x, scaled by a dataset's norm, with thresholds on z times decoder norm."""
    folder, hook = home / "L15R-8x", "blocks.15.hook_resid_post"
    tensors = {"W_E": d.w_enc.T, "b_E": d.b_enc, "W_D": d.w_dec, "b_D": d.b_dec}
    tensors["activation_function.log_jumprelu_threshold"] = d.threshold.log()
    save_safe(
        folder / "sae_weights.safetensors", tensors | {f"dataset_average_activation_norm.{hook}": torch.tensor(4.0)}
    )
    save_json(folder / "config.json", scopium_settings(hook))
    scale = math.sqrt(WIDTH) / 4.0
    z = (d.x * scale) @ d.w_enc.T + d.b_enc
    f = z.relu() * (z * d.w_dec.norm(dim=1) > d.threshold)
    y = (f @ d.w_dec + d.b_dec) / scale
    return Checkpoint(llamascopium.FORMAT, folder, folder / "sae_weights.safetensors", d.x, f, y)


def scopium_settings(hook: str, **other: Any) -> dict[str, Any]:
    """Return a `config.json` of Llamascopium."""
    return {
        "sae_type": "sae",
        "d_model": WIDTH,
        "expansion_factor": LATENTS / WIDTH,
        "act_fn": "jumprelu",
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "hook_point_in": hook,
        "hook_point_out": hook,
        **other,
    }


def write_goodfire(home: Path, d: Draw) -> Checkpoint:
    """Write a Goodfire SAE: two linear layers and a ReLU."""
    file = home / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    save_torch(file, linears(d, "encoder_linear", "decoder_linear"))
    f = (d.x @ d.w_enc.T + d.b_enc).relu()
    return Checkpoint(goodfire.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec)


def write_deepseek_r1(home: Path, d: Draw) -> Checkpoint:
    """Write a DeepSeek R1 SAE: two linear layers in bfloat16."""
    file = home / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    half = {key: tensor.bfloat16() for key, tensor in linears(d).items()}
    save_torch(file, half)
    f = (d.x @ half["encoder.weight"].float().T + half["encoder.bias"].float()).relu()
    y = f @ half["decoder.weight"].float().T + half["decoder.bias"].float()
    return Checkpoint(deepseek_r1.FORMAT, file, file, d.x, f, y)


def write_qwen_scope(home: Path, d: Draw) -> Checkpoint:
    """Write a Qwen-Scope SAE: SAELens' names with transposed matrices, and k in the folder's name."""
    file = home / f"models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/snapshots/abc/layer3.sae.pt"
    save_torch(file, {"W_enc": d.w_enc, "b_enc": d.b_enc, "W_dec": d.w_dec.T.contiguous(), "b_dec": d.b_dec})
    f = top(d.x @ d.w_enc.T + d.b_enc, K)
    return Checkpoint(qwen_scope.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec)


def write_transcoders(home: Path, d: Draw) -> Checkpoint:
    """Write a transcoder in circuit-tracer's format with a skip connection."""
    file, skip = home / "layer_4.safetensors", d.normal(WIDTH, WIDTH)
    save_safe(file, {"W_enc": d.w_enc, "b_enc": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec, "W_skip": skip})
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    file.with_name("config.yaml").write_text(f"model_name: Qwen/Qwen3-0.6B\n{hooks}")
    f = (d.x @ d.w_enc.T + d.b_enc).relu()
    return Checkpoint(transcoders.FORMAT, home, file, d.x, f, f @ d.w_dec + d.b_dec + d.x @ skip.T)


def write_opensae(home: Path, d: Draw) -> Checkpoint:
    """Write an OpenSAE: layer norm, then the pre-bias."""
    file = home / "model.safetensors"
    save_safe(file, {"encoder.weight": d.w_enc, "encoder.bias": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec})
    settings = {
        "architectures": ["OpenSae"],
        "activation": "topk",
        "k": K,
        "input_normalize": True,
        "normalize_shift_back": True,
        "input_normalize_eps": 1e-5,
        "model_name": "meta-llama/meta-llama-3.1-8b",
        "input_hookpoint": "layers.12",
        "output_hookpoint": "layers.12",
    }
    save_json(home / "config.json", settings)
    mean, std = d.x.mean(-1, keepdim=True), d.x.std(-1, keepdim=True)
    f = top(((d.x - mean) / (std + 1e-5) - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    return Checkpoint(opensae.FORMAT, home, file, d.x, f, (f @ d.w_dec + d.b_dec) * (std + 1e-5) + mean)


def write_route_sae(home: Path, d: Draw, size: float = 3.0) -> Checkpoint:
    """Write a RouteSAE of nine sites; `size` is the scale of the inputs."""
    file, router = home / f"sum_hard_K{K}_1B_OpenWebText2_{LATENTS}.pt", d.normal(9, WIDTH)
    content = {
        "router.weight": router,
        "sae.pre_bias": d.b_dec,
        "sae.latent_bias": d.b_enc,
        "sae.encoder.weight": d.w_enc,
        "sae.decoder.weight": d.w_dec.T.contiguous(),
    }
    save_torch(file, content)
    x = size * d.normal(40, 9, WIDTH)
    h = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    p, site = (h.sum(1) @ router.T).softmax(-1).max(-1)
    read = p[:, None] * h[torch.arange(len(x)), site]
    f = top((read - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    return Checkpoint(route_sae.FORMAT, file, file, x, f, f @ d.w_dec + d.b_dec)


def write_adaptive_k(home: Path, d: Draw) -> Checkpoint:
    """Write an AdaptiveK SAE, whose probe determines the k of each token."""
    probe, offset = 0.8 * d.normal(WIDTH), torch.tensor([5.0])
    content = {"encoder.weight": d.w_enc, "encoder.bias": d.b_enc, "decoder.weight": d.w_dec.T.contiguous()}
    save_torch(home / "ae.pt", content | {"b_dec": d.b_dec})
    save_torch(home / "probe.pt", {"weights": probe[:, None], "bias": offset})
    save_json(home / "dynamic_config.json", {"base_k": 4, "min_k": 1, "max_k": 9, "trainer_type": "DynamicTopKTrainer"})
    save_json(home / "config.json", {"trainer": {"layer": 3, "lm_name": "EleutherAI/pythia-70m"}})
    score = (d.x @ probe + offset).clamp(0, 10) / 10
    counts = (1 + (9 - 1) / (1 + (-6 * (score - 0.5)).exp())).round().int()
    z = (d.x - d.b_dec) @ d.w_enc.T + d.b_enc
    f = torch.cat([top(token[None], int(k)) for token, k in zip(z, counts, strict=True)])
    return Checkpoint(adaptive_k.FORMAT, home, home / "ae.pt", d.x, f, f @ d.w_dec + d.b_dec)


LAYOUTS: dict[str, Callable[[Path, Draw], Checkpoint]] = {
    name.removeprefix("write_"): write for name, write in list(globals().items()) if name.startswith("write_")
}


def saelens_folder(home: Path, d: Draw) -> Checkpoint:
    """Write a JumpReLU SAE of SAELens."""
    folder, file = home / "sae", home / "sae/sae_weights.safetensors"
    tensors = {"W_enc": d.w_enc.T, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_safe(file, tensors)
    settings = {"architecture": "jumprelu", "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32"}
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"}
    normalised = {"normalize_activations": "none", "apply_b_dec_to_input": True, "reshape_activations": "none"}
    save_json(folder / "cfg.json", settings | normalised | {"metadata": metadata})
    f = relu_above((d.x - d.b_dec) @ d.w_enc.T + d.b_enc, d.threshold)
    return Checkpoint(saelens.FORMAT, folder, file, d.x, f, f @ d.w_dec + d.b_dec)


def sparsify_folder(home: Path, d: Draw) -> Checkpoint:
    """Write a TopK SAE of sparsify."""
    folder, file = home / "layers.3", home / "layers.3/sae.safetensors"
    save_safe(file, {"encoder.weight": d.w_enc, "encoder.bias": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec})
    save_json(folder / "cfg.json", {"d_in": WIDTH, "num_latents": LATENTS, "k": K, "activation": "topk"})
    f = top((d.x - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    return Checkpoint(sparsify.FORMAT, folder, file, d.x, f, f @ d.w_dec + d.b_dec)


def dictionary_learning_folder(home: Path, d: Draw) -> Checkpoint:
    """Write a BatchTopK SAE of dictionary_learning."""
    content = {"encoder.weight": d.w_enc, "encoder.bias": d.b_enc, "decoder.weight": d.w_dec.T.contiguous()}
    save_torch(home / "ae.pt", content | {"b_dec": d.b_dec, "k": torch.tensor(K), "threshold": torch.tensor(0.7)})
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "layer": 3}
    save_json(home / "config.json", {"trainer": trainer | {"lm_name": "a/b", "submodule_name": "resid_post_layer_3"}})
    f = relu_above((d.x - d.b_dec) @ d.w_enc.T + d.b_enc, 0.7)
    return Checkpoint(dictionary_learning.FORMAT, home, home / "ae.pt", d.x, f, f @ d.w_dec + d.b_dec)


def cross_layer_folder(home: Path, d: Draw) -> Checkpoint:
    """Write layer 2 of a cross-layer transcoder of five layers; y is what its latents write to that layer alone."""
    file, decoders = home / "W_enc_2.safetensors", d.normal(LATENTS, 3, WIDTH)
    save_safe(file, {"W_enc_2": d.w_enc, "b_enc_2": d.b_enc, "b_dec_2": d.b_dec, "threshold_2": d.threshold})
    save_safe(home / "W_dec_2.safetensors", {"W_dec_2": decoders})
    hooks = "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    (home / "config.yaml").write_text(f"model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\n{hooks}")
    f = relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold)
    return Checkpoint(cross_layer.FORMAT, home, file, d.x, f, f @ decoders[:, 0] + d.b_dec)


# With the formats whose arithmetic has test files of its own.
ALL = LAYOUTS | {
    "cross_layer": cross_layer_folder,
    "saelens": saelens_folder,
    "sparsify": sparsify_folder,
    "dictionary_learning": dictionary_learning_folder,
}
