# SPDX-License-Identifier: Apache-2.0
"""Models and adapters in files: checked before use, and read and written in pieces."""

from .export import ExportedLayer, LoraExport, export_lora
from .official import Import, import_official

__all__ = ["ExportedLayer", "Import", "LoraExport", "export_lora", "import_official"]
