"""The specification read literally: the whole pipeline, PEFT, a plain loop. It knows nothing of lora-forge.

python benchmarks/speed_baseline.py --model-folder DIR --config CONFIG.json --prompt TEXT --output FILE

This is what one would write from the specification alone, and what `speed.py` measures everything against. Prints
one JSON object: seconds by phase, and the loss of every step.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402  (importing is a phase too)
import itertools  # noqa: E402
import json  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from diffusers import StableDiffusionXLPipeline  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
Pairs = dict[str, dict[str, dict[str, torch.Tensor]]]


def main() -> None:
    """Make one LoRA, from the start of the process to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--model-folder", "--config", "--prompt", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    with open(given.config, encoding="utf-8") as file:
        config = json.load(file)
    moments = [("import", STARTED), ("load", time.perf_counter())]

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(given.model_folder, torch_dtype=torch.float32)
    pipe.to(given.device)
    for name in (*COMPONENTS, "vae"):
        getattr(pipe, name).requires_grad_(False)
    tokens = {
        encoder: getattr(pipe, tokenizer)(
            given.prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).to(given.device)
        for encoder, tokenizer in ENCODERS.items()
    }
    moments.append(("inject", time.perf_counter()))

    proposed = propose(config)
    adapted = {name: inject(getattr(pipe, name), config, proposed[name]) for name in COMPONENTS}
    moments.append(("steps", time.perf_counter()))

    losses = optimize(adapted, tokens, config, given.iterations)
    moments.append(("save", time.perf_counter()))

    save_file(trained(adapted), given.output)
    moments.append(("", time.perf_counter()))
    seconds = {name: later - moment for (name, moment), (_, later) in itertools.pairwise(moments)}
    print(json.dumps({"seconds": seconds, "losses": losses}))


def propose(config: dict[str, Any]) -> Pairs:
    """Initial weights by component and layer: A small and random, `(rank, in)`, B zero, `(out, rank)`."""
    rank = config["lora_rank"]
    return {
        component: {
            layer: {"lora_A": torch.randn(rank, columns) * 0.01, "lora_B": torch.zeros(rows, rank)}
            for layer, (rows, columns) in config[f"layer_dimensions_{component}"].items()
        }
        for component in COMPONENTS
    }


def inject(model: Any, config: dict[str, Any], proposed: dict[str, dict[str, torch.Tensor]]) -> Any:
    """Have PEFT put LoRA layers into a component, and copy the initial weights into them."""
    modules = dict(model.named_modules())
    # Newer transformers have no `text_model` level in one of the two encoders.
    paths = {layer: layer if layer in modules else layer.removeprefix("text_model.") for layer in proposed}
    lora = LoraConfig(r=config["lora_rank"], lora_alpha=config["lora_alpha"], target_modules=list(paths.values()))
    adapted = get_peft_model(model, lora)
    for layer, pair in proposed.items():
        module = model.get_submodule(paths[layer])
        module.lora_A["default"].weight.data.copy_(pair["lora_A"])
        module.lora_B["default"].weight.data.copy_(pair["lora_B"])
    return adapted


def optimize(adapted: dict[str, Any], tokens: dict[str, Any], config: dict[str, Any], iterations: int) -> list[float]:
    """The optimization loop; the loss before each update."""
    parameters = [p for model in adapted.values() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config["learning_rate"])
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        terms = []
        for encoder, given in tokens.items():
            output = adapted[encoder](input_ids=given.input_ids, attention_mask=given.attention_mask)
            terms.append(-torch.mean(torch.abs(output.last_hidden_state)))
        embedding_loss = torch.stack(terms).mean()
        l2_loss = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            l2_loss = l2_loss + config["regularization_strength"] * torch.sum(parameter**2)
        total = embedding_loss + l2_loss
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(total.item())
    return losses


def trained(adapted: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The trained tensors, named by component and PEFT's own names."""
    return {
        f"{component}.{name}": parameter.detach().contiguous()
        for component, model in adapted.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


if __name__ == "__main__":
    main()
