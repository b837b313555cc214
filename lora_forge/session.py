"""The Python API: `run` for one prompt, `load` for many in turn on one loaded model, `compare` for objectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forge.comparison import CONTROLS, SEEDS
from lora_forge.config.run import RunConfig, collect_run_config, read_run_config
from lora_forge.errors import UsageError
from lora_forge.plan import Plan, Request, make_plan
from lora_forge.plugins import Registry, discover
from lora_forge.result import RunResult

if TYPE_CHECKING:
    from lora_forge.comparison.results import Results
    from lora_forge.model import LoadedModel

_OF_THE_MODEL = ("model", "base_model", "device", "dtype", "backend_options", "plugins", "strict_plugins")


class Session:
    """A loaded model and the plugins of the moment. Made by `load`; close it, or use it in a `with`."""

    def __init__(self, registry: Registry, settings: dict[str, Any], pipeline: Any = None) -> None:
        self._registry, self._settings, self._pipeline = registry, settings, pipeline
        self._model: LoadedModel | None = None

    def run(self, prompt: str, **settings: Any) -> RunResult:
        """Make a LoRA for `prompt`. Settings are the keys of a run config; they win over those of `load`.

        Without `output` no file is written; the result holds the weights.
        Raises UsageError (and its kinds) for what cannot be done as asked, RunFailed for a run that failed.
        """
        fixed = [key for key in settings if key in _OF_THE_MODEL]
        if fixed:
            raise UsageError(f"{', '.join(fixed)}: belongs to load(), since the session's model depends on it")
        config, mistakes = collect_run_config([self._settings, {**settings, "prompt": prompt}])
        in_memory = self._pipeline is not None
        return self.run_plan(make_plan(config, self._registry, in_memory=in_memory, mistakes=mistakes))

    def run_plan(self, plan: Plan) -> RunResult:
        """Carry out a plan made with this session's model and plugins."""
        # Checked before torch is imported, let alone a weight read.
        from lora_forge.saving import check_saving

        output = check_saving(plan)

        from lora_forge.clock import Clock
        from lora_forge.runner import forge

        clock = Clock()
        with clock.phase("open"):
            model = self._open(plan)
        config = plan.config
        request = Request(config.prompt, config.prompt_2, config.seed, output)
        return forge(plan, [request], model, self._registry, clock)[0]

    def check_plan(self, plan: Plan) -> LoadedModel:
        """Check a plan against its output path and model without reading weights; the model, opened."""
        from lora_forge.saving import check_saving

        check_saving(plan)
        return self._open(plan)

    def _open(self, plan: Plan) -> LoadedModel:
        from lora_forge.model import open_model

        if self._model is None:
            self._model = open_model(plan, pipeline=self._pipeline)
        else:
            self._model.check(plan)
        return self._model

    def close(self) -> None:
        """Let go of the model; a pipeline that was in memory is left as it was found."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    model: str = "sdxl_base", *, pipeline: Any = None, plugins: Iterable[str | Path] = (), **settings: Any
) -> Session:
    """A session on one base model. Its weights are read when the first run needs them.

    model: name or path of a model config. pipeline: diffusers' pipeline of that model family in memory
    (`StableDiffusionXLPipeline`, `StableDiffusionPipeline`), to be used in place and left as it was found,
    instead of reading a base model. plugins: plugin files.
    settings: keys of a run config that all runs of the session share.
    """
    settings = {**settings, "model": model, "plugins": tuple(Path(path) for path in plugins)}
    if pipeline is not None:
        idle = [key for key in ("base_model", "device", "dtype") if key in settings]
        if idle:
            raise UsageError(f"{', '.join(idle)}: belongs to a model that is read, not to a pipeline in memory")
        settings["dtype"] = str(getattr(pipeline, "dtype", "float32")).removeprefix("torch.")
    config: RunConfig = read_run_config([settings])
    return Session(discover(config.plugins, strict=config.strict_plugins), settings, pipeline)


def run(prompt: str, model: str = "sdxl_base", *, pipeline: Any = None, **settings: Any) -> RunResult:
    """Make a LoRA for one prompt: `load(model, …).run(prompt, …)`, and let go of the model."""
    of_the_model = {key: settings.pop(key) for key in _OF_THE_MODEL if key in settings}
    with load(model, pipeline=pipeline, **of_the_model) as session:
        return session.run(prompt, **settings)


def compare(
    prompts: Sequence[str],
    objectives: Sequence[str],
    *,
    output_dir: str | Path,
    model: str = "sdxl_base",
    seeds: int | Sequence[int] = SEEDS,
    seconds: float | None = None,
    paraphrases: Sequence[str] | None = None,
    controls: Sequence[str] | None = None,
    plugins: Iterable[str | Path] = (),
    **settings: Any,
) -> Results:
    """What `lora-forge compare` does: a LoRA of each objective for every prompt and seed, and what they came to.

    objectives: each a sum such as `"A + 0.1*B(key=value)"`. seeds: so many from 0, or these. seconds: of training for
    each LoRA. paraphrases: texts with `{prompt}`; controls: prompts that have nothing to do with these; None for those
    that come along. settings: keys of a run config that all share, and `batch_size` and `threads`.
    Called again with the same folder, it makes only what is missing. Raises UsageError (and its kinds) for what cannot
    be done as asked; a LoRA that failed is a row that says why.
    """
    from contextlib import nullcontext

    from lora_forge.comparison.compare import PARAPHRASES, Comparison
    from lora_forge.comparison.compare import compare as carry_out
    from lora_forge.effect.control_prompts import CONTROL_PROMPTS, drawn

    of_the_job = {key: settings.pop(key) for key in ("batch_size", "threads") if key in settings}
    layer = {**settings, "model": model, "plugins": tuple(Path(path) for path in plugins)}
    config = read_run_config([layer])
    asked = Comparison(
        layers=(layer,),
        objectives=tuple(objectives),
        prompts=tuple(prompts),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
        output_dir=str(output_dir),
        seconds=seconds,
        paraphrases=PARAPHRASES if paraphrases is None else tuple(paraphrases),
        controls=tuple(drawn(CONTROL_PROMPTS, CONTROLS, seed=0) if controls is None else controls),
        **of_the_job,
    )
    registry = discover(config.plugins, strict=config.strict_plugins)
    return carry_out(asked, registry, lambda _: nullcontext(lambda *_: None))
