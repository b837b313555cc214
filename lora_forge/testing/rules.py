"""What every kind of plugin is held to: the name of each rule, and what it promises, in the order they are checked."""

from __future__ import annotations

_FIRST = {
    "record": "its record (spec) is well-formed",
    "bounds": "defaults of its options lie within their own bounds",
    "options": "its options come back the same from JSON and from typed text",
    "builds": "its factory can be imported, and builds it",
}
_LAST = {"runs": "it raises nothing"}

RULES: dict[str, dict[str, str]] = {
    "initializer": _FIRST
    | {
        "pair": "it returns A and B of each layer, two tensors",
        "shape": "A is (rank, in), B is (out, rank), of whatever layer and rank it is given",
        "dtype": "A and B are float32 on the CPU",
        "finite": "A and B are finite",
        "deterministic": "the same layer and generator state give the same values",
        "generator": "it draws from the layer's generator alone; global seeds do not matter",
        "order": "a layer's values do not depend on the layers before it",
        "gradient": "if declared to be given a gradient, it makes something of it",
        "immutable": "it changes neither its options, nor the gradient it is given, nor what it returned earlier",
    }
    | _LAST,
    "loss": _FIRST
    | {
        "needs": "it asks for nothing that its `needs` do not declare",
        "immutable": "it changes nothing it is given: tokens, outputs, weights, its own options",
        "shape": "it returns one value per prompt, a tensor of shape (prompts,)",
        "finite": "its values and gradients are finite, also at the start, where B is zero",
        "differentiable": "its value has a gradient",
        "steps": "it can be asked again at the next step",
        "deterministic": "the same seed gives the same bits, whatever the global seed",
        "independent": "a prompt's value and gradient do not depend on the prompts beside it",
        "tokens": "if declared to read the content's tokens alone, it is the same where none follow the longest text",
        "solves": "if declared closed_form, solve() gives each prompt its own weights, and they do not raise its value",
        "reaches": "what a need alone brings in, a gradient reaches, in one component at least",
        "undeclared": "the gradient reaches no component beyond those its `needs` declare",
        "families": "it works on a model with one text encoder too, or says in an ObjectiveError what that lacks",
    }
    | _LAST,
    "optimizer": _FIRST
    | {
        "optimizer": "its factory gives a torch.optim.Optimizer",
        "in_place": "it moves the parameters' own memory, and does not put other tensors in their place",
        "finite": "what it moves stays finite",
        "moves": "its steps move every matrix",
        "zero_gradient": "gradients that are all zero do it no harm",
        "deterministic": "the same gradients give the same bits, whatever the global seed",
        "neighbours": "what belongs to another prompt stays as it is",
        "independent": "prompts that train together move as each does alone, to the bit",
        "elementwise": "if declared elementwise, one flat tensor moves as separate matrices do, to the bit",
    }
    | _LAST,
    "saver": _FIRST
    | {
        "one_file": "it writes the file, or fills the folder, it was given, and no other",
        "immutable": "it changes neither the weights nor the metadata",
        "reader": "its file can be read: as lora-forge's own, or by the `reader` it names",
        "gives_back": "the file gives back ΔW = alpha / rank · B @ A of every layer, whatever the model family",
        "reproducible": "the same request gives the same bytes, wherever they are written",
        "names": "paths with spaces and prompts of any letters do it no harm",
    }
    | _LAST,
    "backend": _FIRST
    | {
        "tiny": "it names a small model that it makes on the spot",
        "opens": "it opens that model, and names its family",
        "architecture": "it lists the linear layers of exactly the declared components, before anything is loaded",
        "target_groups": "each named choice of layers selects some",
        "frozen": "what it loads is frozen",
        "tokens": "tokens are int64 (rows, length), and what did not fit is told",
        "encode": "encoders give finite float32 outputs with a leading prompts dimension, masked or not",
        "conditioning": "what the denoiser is conditioned on is told by the declared names, prompts leading",
        "noise": "noise is predicted in the latents' own shape, finite float32",
        "schedule": "what it tells of the noise schedule is one float32 number a timestep, falling from 1 towards 0",
        "attention": "cross-attention is float32 probabilities over the tokens, (prompts, height, width, tokens)",
        "decode": "latents become float32 pictures in [0, 1], with a gradient to the latents",
        "deterministic": "the same input gives the same bits, whatever the global seed",
        "independent": "a prompt's outputs do not depend on the prompts beside it",
        "weight_norm": "a layer's frozen weight has a norm once it is loaded, and none before",
        "adapt_zero": "with B = 0 the adapted model is the frozen one",
        "adapt": "with B ≠ 0 outputs change, each prompt's by its own weights; frozen() still gives the frozen model",
        "reaches": "the gradient reaches exactly the components that `reaches` declares for each need",
        "release": "release() leaves the model as it was found",
        "usage": "usage() shows how to load the saved file",
        "pipeline": "pipeline() gives a diffusers pipeline of the whole model, without a LoRA in it, or there is none",
    }
    | _LAST,
    "executor": _FIRST
    | {
        "stays": "what a worker's train gives stays in its process, where that worker saves it",
        "each_once": "it reports each task once, with what its save gave, however many there are, none included",
        "one_report": "it reports one outcome at a time",
        "as_it_comes": "it reports an outcome as soon as it is there, not at the end",
        "local": "if declared local, its workers are in the process that asked",
        "one_worker": "no process makes more than one worker",
        "one_thread": "a worker trains one task at a time, always on one thread",
        "errors": "what a worker or a report raises ends the call with that error, and no task is tried again for it",
        "closes": "each worker is closed once, on its thread, when its tasks are done, also after an error",
    }
    | _LAST,
}
