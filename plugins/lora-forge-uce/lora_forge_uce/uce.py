"""The objective of Unified Concept Editing, and its best LoRA of a given rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_forge.batch import Batch
from lora_forge.contracts import EncoderOutput, LoraWeights, SolveRequest, TargetLayer
from lora_forge.errors import ObjectiveError
from lora_forge_uce.options import Options

EDITED = (".attn2.to_k", ".attn2.to_v")  # diffusers' names of what reads the text


@dataclass(frozen=True)
class Edit:
    """Of each prompt, the states that cross-attention reads, float32.

    source: of the prompt, `(prompts, length, width)`. gap: those of the target less those of the prompt, position by
    position. kept: of all texts to preserve, `(prompts, texts · length, width)`.
    """

    source: torch.Tensor
    gap: torch.Tensor
    kept: torch.Tensor


class Uce:
    """1/out · (mean_p ‖W c_p − W0 c*_p‖² + preserve_weight · mean_j ‖W c_j − W0 c_j‖² + ridge · ‖W − W0‖²), averaged
    over the target layers among the cross-attention's keys and values; `(prompts,)`.

    W0 is a layer's frozen weight `(out, in)` and W = W0 + ΔW. c_p is the frozen conditioning of the prompt at position
    p, c* that of the target, c_j those of the texts to preserve. Means instead of the paper's sums, so that neither
    `preserve_weight` nor `ridge` has to grow with the number of tokens.
    Source: Gandikota et al., Unified Concept Editing in Diffusion Models (arXiv:2308.14761); the ridge is
    that of its code.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, batch: Batch) -> torch.Tensor:
        (edit, layers), options = self._read(batch), self.options
        total = torch.zeros(batch.prompts, device=edit.source.device)
        for layer in layers:
            left, right = batch.low_rank(layer)
            missed = _times(edit.source, left, right) - edit.gap @ batch.weight(layer).T
            moved = _times(edit.kept, left, right)
            size = ((left.mT @ left) * (right @ right.mT)).sum((1, 2))  # ‖ΔW‖²
            value = _mean_square(missed) + options.preserve_weight * _mean_square(moved) + options.ridge * size
            total = total + value / layer.out_features
        return total / len(layers)

    def solve(self, request: SolveRequest) -> LoraWeights:
        """The A and B of that rank with the lowest value there is.

        With G = mean c cᵀ + preserve_weight · mean c_j c_jᵀ + ridge · I the value of a layer is, but for a constant,
        ‖(ΔW − ΔW*) G^½‖² / out, where ΔW* = W0 · mean (c* − c) cᵀ · G⁻¹. So the best ΔW of a rank is ΔW* G^½ cut off
        after that many singular values, times G^-½ (Eckart & Young 1936); any root of G will do, here Cholesky's.
        """
        edit, layers = self._read(request.batch)
        result: LoraWeights = {}
        solvers = [self._of_prompt(edit, prompt) for prompt in range(request.batch.prompts)]
        for layer in layers:
            weight = request.batch.weight(layer).cpu().double()
            pairs = [_truncated(weight @ gap, back, request.rank) for gap, back in solvers]
            result.setdefault(layer.component, {})[layer.name] = {
                "lora_A": torch.stack([right for _, right in pairs]).float(),
                "lora_B": torch.stack([left for left, _ in pairs]).float() * (request.rank / request.alpha),
            }
        return result

    def _of_prompt(self, edit: Edit, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What ΔW* is made of, whatever the layer: `gap` `(in, k)` and `back` `(k, in)`, ΔW* = W0 · gap · back.

        k is at most the number of tokens. `back` times the root of G has orthonormal rows. In float64 on the CPU.
        """
        source, gap, kept = (tensor[prompt].cpu().double() for tensor in (edit.source, edit.gap, edit.kept))
        gram = source.mT @ source / len(source) + self.options.preserve_weight * kept.mT @ kept / len(kept)
        gram.diagonal().add_(self.options.ridge)
        root = torch.linalg.cholesky(gram)
        whitened = torch.linalg.solve_triangular(root, source.mT / len(source), upper=False)
        basis, coordinates = torch.linalg.qr(whitened)
        back = torch.linalg.solve_triangular(root.mT, basis, upper=True).mT
        return gap.mT @ coordinates.mT, back

    def _read(self, batch: Batch) -> tuple[Edit, list[TargetLayer]]:
        """Raises ObjectiveError where there is no layer to edit, or none that reads what the encoders give."""
        layers = [layer for layer in batch.layers if layer.name.endswith(EDITED)]
        if not layers:
            raise ObjectiveError("uce edits attn2.to_k and attn2.to_v of the UNet, and none of them is a target layer")
        source = _states(batch, batch.frozen())
        target = _states(batch, batch.encode(self.options.target, adapted=False))
        kept = [_states(batch, batch.encode(text, adapted=False)) for text in self.options.preserve]
        if width := next((one.in_features for one in layers if one.in_features != source.shape[-1]), None):
            raise ObjectiveError(f"uce: cross-attention reads {width} numbers a token, and the encoders give others")
        return Edit(source, target - source, torch.cat(kept, dim=1)), layers


def _states(batch: Batch, outputs: dict[str, EncoderOutput]) -> torch.Tensor:
    """What cross-attention reads `(prompts, length, width)`: the conditioning's parts that are token by token."""
    return torch.cat([part for part in batch.conditioning(outputs).values() if part.ndim == 3], dim=-1)


def _times(states: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """ΔW of each of the states `(prompts, n, in)`, `(prompts, n, out)`."""
    return (states @ right.mT) @ left.mT


def _mean_square(vectors: torch.Tensor) -> torch.Tensor:
    """Mean of ‖v‖² over the vectors `(prompts, n, out)` of each prompt."""
    return vectors.square().sum(-1).mean(-1)


def _truncated(product: torch.Tensor, back: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`product @ back` cut off after `rank` singular values of `product` `(out, k)`, as left `(out, rank)` and right
    `(rank, in)` of equal size; what is beyond its own rank is zero.
    """
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    kept = min(rank, len(s))
    right = vh[:kept] @ back
    length = right.norm(dim=1, keepdim=True)
    root = (s[:kept, None] * length).sqrt()
    left, right = u[:, :kept] * root.mT, right / length * root
    missing = rank - kept
    return (
        torch.nn.functional.pad(left, (0, missing)),
        torch.nn.functional.pad(right, (0, 0, 0, missing)),
    )
