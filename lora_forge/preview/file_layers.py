"""A LoRA file's layers, as layers of the base model it is tried on."""

from __future__ import annotations

from collections.abc import Mapping

from lora_forge.errors import LoraFileError
from lora_forge.files.layer_tensors import Layers, named_keys, read_layer, read_layers
from lora_forge.files.lora_file import LoraFile
from lora_forge.files.names import own_names
from lora_forge.records import BackendSpec


def read_model_layers(lora: LoraFile, spec: BackendSpec, sizes: Mapping[str, Mapping[str, tuple[int, int]]]) -> Layers:
    """All layers. sizes: the backend's `architecture()`.

    Raises LoraFileError as `read_layers` does, and for linear layers that are of another size in the model.
    """
    names = own_names([(component, name) for component in sizes for name in sizes[component]], spec.layout)
    if not lora.unknown and all(one.name in names and one.is_plain for one in lora.layers):
        layers = {names[one.name]: read_layer(lora, one) for one in lora.layers}  # of a plugin's family, too
    else:
        layers, _ = read_layers(lora)
    other = [
        f"{component}.{layer}"
        for (component, layer), one in layers.items()
        if (size := sizes.get(component, {}).get(layer)) and size != (one.up.shape[0], *one.down.shape[1:])
    ]
    if other:
        raise LoraFileError(
            f"{str(lora.path)!r}: in the base model these layers are of another size: {named_keys(other)}; --model and "
            "--base-model say another"
        )
    return layers
