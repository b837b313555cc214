"""What was logged, as each library's own reader has it: one shape for all three."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRACKERS = ("tensorboard", "mlflow", "wandb")


@dataclass
class Logged:
    """One run's log. metrics: by name, (step, value) in order. files: artifacts, as paths."""

    prompt: str
    ended: str = "running"
    error: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def read(tracker: str, folder: Path) -> list[Logged]:
    """Every run a tracker logged from this folder, by prompt."""
    readers: dict[str, Callable[[Path], Iterator[Logged]]] = {
        "tensorboard": _tensorboard,
        "mlflow": _mlflow,
        "wandb": _wandb,
    }
    return sorted(readers[tracker](folder), key=lambda one: one.prompt)


def _tensorboard(folder: Path) -> Iterator[Logged]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for run in sorted((folder / "runs").iterdir() if (folder / "runs").exists() else ()):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        texts = {
            tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
            for tag in events.Tags()["tensors"]
            if tag.endswith("/text_summary")
        }
        one = Logged(texts["prompt"], error=texts.get("error"), about={"folder": run.name})
        for tag in events.Tags()["scalars"]:
            one.metrics[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for content in events.PluginTagToContent("hparams").values():
            data = HParamsPluginData.FromString(content)
            for name, value in data.session_start_info.hparams.items():
                one.parameters[name] = getattr(value, value.WhichOneof("kind"))
            if data.HasField("session_end_info"):
                one.ended = {"STATUS_SUCCESS": "well", "STATUS_FAILURE": "failed"}[
                    Status.Name(data.session_end_info.status)
                ]
        one.summary = {name: values[-1][1] for name, values in one.metrics.items()}
        one.files = [Path(texts["file"])] if "file" in texts else []
        yield one


def _mlflow(folder: Path, experiment: str = "0") -> Iterator[Logged]:
    from mlflow import MlflowClient

    client = MlflowClient()
    for run in client.search_runs([experiment]):
        ended = {"FINISHED": "well", "FAILED": "failed", "KILLED": "failed", "RUNNING": "running"}[run.info.status]
        one = Logged(run.data.params["prompt"], ended, run.data.tags.get("lora_forge.error"), dict(run.data.params))
        for name in run.data.metrics:
            history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
            one.metrics[name] = [(metric.step, metric.value) for metric in history]
        one.summary = dict(run.data.metrics)
        artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
        one.files = [artifacts / file.path for file in client.list_artifacts(run.info.run_id)]
        one.about = {"status": run.info.status, "name": run.info.run_name, **run.data.tags}
        yield one


def _wandb(folder: Path) -> Iterator[Logged]:
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        one = Logged("")
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                one.parameters = {name: value for name, value in config.items() if name != "_wandb"}
                one.prompt = one.parameters["prompt"]
                one.about = {key: getattr(record.run, key) for key in ("display_name", "project", "run_group")}
            elif kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in row.items():
                    if not name.startswith("_"):
                        one.metrics[name].append((int(row["_step"]), value))
            elif kind == "summary":
                for item in record.summary.update:
                    one.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif kind == "artifact":
                one.files += [Path(entry.local_path) for entry in record.artifact.manifest.contents]
                one.about["artifact"] = record.artifact
            elif kind == "exit":
                one.ended = "failed" if record.exit.exit_code else "well"
        one.error = one.summary.get("error")
        yield one


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: W&B's messages in a LevelDB log, whose framing it has no reader for."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header = 32768, 7  # crc32 (4 bytes), length (2), kind (1): whole, first, middle or last part
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = header, b""
    while position + header <= len(data):
        if block - position % block < header:  # the rest of a block that no header fits in is padding
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""
