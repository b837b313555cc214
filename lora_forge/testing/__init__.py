"""The conformance kit: runs a plugin in the real engine on a tiny model, and says in words what is wrong with it.

```python
from lora_forge.testing import check_loss
from my_package import spec

def test_it_keeps_the_contract_of_a_loss():
    check_loss(spec)
```

Everything heavy is imported when a check starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_forge.testing.checks import check_backend as check_backend
    from lora_forge.testing.checks import check_executor as check_executor
    from lora_forge.testing.checks import check_initializer as check_initializer
    from lora_forge.testing.checks import check_loss as check_loss
    from lora_forge.testing.checks import check_optimizer as check_optimizer
    from lora_forge.testing.checks import check_saver as check_saver
    from lora_forge.testing.checks import examine as examine
    from lora_forge.testing.examination import Examination as Examination
    from lora_forge.testing.examination import Finding as Finding
    from lora_forge.testing.examination import NotConforming as NotConforming
    from lora_forge.testing.rules import RULES as RULES

_HOMES = {
    "check_loss": "checks",
    "check_initializer": "checks",
    "check_optimizer": "checks",
    "check_saver": "checks",
    "check_backend": "checks",
    "check_executor": "checks",
    "examine": "checks",
    "Examination": "examination",
    "Finding": "examination",
    "NotConforming": "examination",
    "RULES": "rules",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_forge.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_forge.testing.{_HOMES[name]}"), name)
