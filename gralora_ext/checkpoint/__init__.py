# SPDX-License-Identifier: Apache-2.0
"""Models and adapters in files: checked before use, and read and written in pieces."""

from .export import ExportedLayer, LoraExport, export_lora
from .merging import MergeReport, merge
from .official import Import, import_official

__all__ = ["ExportedLayer", "Import", "LoraExport", "MergeReport", "export_lora", "import_official", "merge"]
